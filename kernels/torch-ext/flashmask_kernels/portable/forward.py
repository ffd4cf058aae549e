"""FlashMask's forward pass: one program computes BLOCK_M query rows of one head by `attend_rows`.

When NaN comes out, it may be 0 x NaN of a hidden value: the program repeats its rows in small tiles without it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.forward_rows import attend_rows
from ..common.tiles import SMALL_BLOCK
from ..configs import Config
from ..launch.attention_launcher import AttentionLauncher
from ..launch.layout import Layout
from ..schedule import tiles_in


@triton.jit(do_not_specialize=["q_len", "kv_len", "mask_stride_b", "max_runs", "drop_below"])
def attention_forward_kernel(
    q, k, v, tensors, out, lse, bounds, schedule, sinks, seed, q_strides, k_strides, v_strides, out_strides, scale,
    softcap, drop_below, keep_scale, q_len, kv_len, mask_stride_b, max_runs,
    NUM_HEADS: tl.constexpr, HEADS_PER_KV_HEAD: tl.constexpr, HEADS_PER_MASK: tl.constexpr, NUM_PLANES: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_DROPOUT: tl.constexpr, DIM: tl.constexpr,
    DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_DIM_V: tl.constexpr, PRECISION: tl.constexpr, USE_DESCRIPTORS: tl.constexpr,
    QUERY_IN_REGISTERS: tl.constexpr,
):  # fmt: skip
    has_nan = attend_rows(
        q, k, v, out, lse, bounds, schedule, sinks, seed,
        (q_strides, k_strides, v_strides, out_strides), (scale, softcap, drop_below, keep_scale),
        (q_len, kv_len, mask_stride_b, max_runs), tl.program_id(0), 0,
        NUM_HEADS, HEADS_PER_KV_HEAD, HEADS_PER_MASK, NUM_PLANES, HAS_SOFTCAP, HAS_SINKS, HAS_DROPOUT,
        DIM, DIM_V, BLOCK_M, BLOCK_N, BLOCK_DIM, BLOCK_DIM_V, PRECISION, USE_DESCRIPTORS, QUERY_IN_REGISTERS,
        BLOCK_M, BLOCK_N, False,
    )  # fmt: skip
    if has_nan:
        # 0 x NaN is NaN, so NaN of a hidden value may be in the output. The barrier separates the two stores.
        tl.debug_barrier()
        for first in range(0, BLOCK_M, SMALL_BLOCK):
            attend_rows(
                tensors[0], tensors[1], tensors[2], out, lse, bounds, schedule, sinks, seed,
                (q_strides, k_strides, v_strides, out_strides), (scale, softcap, drop_below, keep_scale),
                (q_len, kv_len, mask_stride_b, max_runs), tl.program_id(0), first,
                NUM_HEADS, HEADS_PER_KV_HEAD, HEADS_PER_MASK, NUM_PLANES, HAS_SOFTCAP, HAS_SINKS, HAS_DROPOUT,
                DIM, DIM_V, SMALL_BLOCK, SMALL_BLOCK, BLOCK_DIM, BLOCK_DIM_V, PRECISION, False, False,
                BLOCK_M, BLOCK_N, True,
            )  # fmt: skip


class AttentionForward:
    """The forward kernel for inputs of one kind, that of the inputs it is made from (see `Launcher`).

    Args:
        query, key, value: ``[B, H, S_q, D]``, ``[B, H_kv, S_k, D]``, ``[B, H_kv, S_k, D_v]``, last dimension
            contiguous.
        bounds: int32 ``[B or 1, H, H_kv or 1, C, S_k]``, contiguous.
        sinks: ``[H]``, or None.
        schedule: the schedule by rows of ``bounds`` for the tile sizes of ``config``.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bounds: Tensor,
        sinks: Tensor | None,
        schedule: Tensor,
        scale: float,
        softcap: float | None,
        dropout_p: float,
        config: Config,
    ) -> None:
        batch_size, num_heads, q_len, _ = query.shape
        self._out_layout = Layout.of_model(batch_size, num_heads, q_len, value.shape[-1])
        self._lse_layout = Layout.of_rows(batch_size, num_heads, q_len)
        self._launch = AttentionLauncher(
            attention_forward_kernel,
            tiles_in(q_len, config.block_m) * batch_size * num_heads,
            (query, key, value),
            (self._out_layout.strides[:3],),
            bounds,
            schedule,
            scale,
            softcap,
            dropout_p,
            config,
            HAS_SINKS=sinks is not None,
            QUERY_IN_REGISTERS=config.query_in_registers,
        )

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bounds: Tensor,
        sinks: Tensor | None,
        schedule: Tensor,
        seed: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            seed: int64 ``[1]``, or None without dropout.

        Returns:
            output ``[B, H, S_q, D_v]`` in the query's dtype, laid out like a model's ``[B, S_q, H, D_v]``; log-sum-exp
            ``[B, H, S_q]`` in float32.
        """
        out = self._out_layout.new(query)
        lse = self._lse_layout.new(query, torch.float32)
        self._launch((query, key, value), out, lse, bounds, schedule, sinks, seed)
        return out, lse
