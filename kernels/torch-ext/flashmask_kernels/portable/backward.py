"""FlashMask's backward pass in two kernels: one program per key tile makes dK and dV, one per query tile makes dQ.

The scores are computed twice, seven matrix products instead of five, and in return nothing is accumulated by atomics:
gradients are bitwise repeatable, and each kernel skips hidden tiles with a schedule of its own. A fused kernel with
atomic dQ measured 293-330 TFLOP/s where this form reached 433 (H200, causal, 32K, D = 128, bf16).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..common.backward_rows import key_value_gradients, query_gradients
from ..common.row_statistics import STATISTICS_BLOCK, padded_rows, write_row_statistics
from ..common.tiles import SMALL_BLOCK
from ..configs import Configs
from ..launch.attention_launcher import AttentionLauncher
from ..launch.layout import Layout, gradient_layouts
from ..schedule import tiles_in

# Called, not inlined, so that they do not add to the registers of the kernels.
_key_value_gradients_again = triton.jit(noinline=True)(key_value_gradients.fn)
_query_gradients_again = triton.jit(noinline=True)(query_gradients.fn)


@triton.jit(do_not_specialize=["q_len", "kv_len", "mask_stride_b", "max_runs", "drop_below"])
def key_value_gradient_kernel(
    q, k, v, d_out, tensors, lse_2, delta, d_k, d_v, bounds, schedule, seed, q_strides, k_strides, v_strides,
    d_out_strides, d_k_strides, d_v_strides, scale, softcap, drop_below, keep_scale, q_len, kv_len, mask_stride_b,
    max_runs,
    NUM_HEADS: tl.constexpr, HEADS_PER_KV_HEAD: tl.constexpr, HEADS_PER_MASK: tl.constexpr, NUM_PLANES: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_DIM_V: tl.constexpr,
    PRECISION: tl.constexpr, USE_DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    has_nan = key_value_gradients(
        q, k, v, d_out, lse_2, delta, d_k, d_v, bounds, schedule, seed,
        (q_strides, k_strides, v_strides, d_out_strides, d_k_strides, d_v_strides),
        (scale, softcap, drop_below, keep_scale), (q_len, kv_len, mask_stride_b, max_runs), tl.program_id(0), 0,
        NUM_HEADS, HEADS_PER_KV_HEAD, HEADS_PER_MASK, NUM_PLANES, HAS_SOFTCAP, HAS_DROPOUT,
        DIM, DIM_V, BLOCK_M, BLOCK_N, BLOCK_DIM, BLOCK_DIM_V, PRECISION, USE_DESCRIPTORS,
        BLOCK_M, BLOCK_N, False,
    )  # fmt: skip
    if has_nan:
        # 0 x NaN is NaN, so NaN of a row that does not see a key may be in them. The barrier separates the two stores.
        tl.debug_barrier()
        for first in range(0, BLOCK_N, SMALL_BLOCK):
            _key_value_gradients_again(
                tensors[0], tensors[1], tensors[2], tensors[3], lse_2, delta, d_k, d_v, bounds, schedule, seed,
                (q_strides, k_strides, v_strides, d_out_strides, d_k_strides, d_v_strides),
                (scale, softcap, drop_below, keep_scale), (q_len, kv_len, mask_stride_b, max_runs),
                tl.program_id(0), first,
                NUM_HEADS, HEADS_PER_KV_HEAD, HEADS_PER_MASK, NUM_PLANES, HAS_SOFTCAP, HAS_DROPOUT,
                DIM, DIM_V, SMALL_BLOCK, SMALL_BLOCK, BLOCK_DIM, BLOCK_DIM_V, PRECISION, False,
                BLOCK_M, BLOCK_N, True,
            )  # fmt: skip


@triton.jit(do_not_specialize=["q_len", "kv_len", "mask_stride_b", "max_runs", "drop_below"])
def query_gradient_kernel(
    q, k, v, d_out, tensors, out, lse, d_lse, lse_2, delta, d_q, bounds, schedule, seed, q_strides, k_strides,
    v_strides, d_out_strides, d_q_strides, out_strides, scale, softcap, drop_below, keep_scale, q_len, kv_len,
    mask_stride_b, max_runs,
    NUM_HEADS: tl.constexpr, HEADS_PER_KV_HEAD: tl.constexpr, HEADS_PER_MASK: tl.constexpr, NUM_PLANES: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr, HAS_D_LSE: tl.constexpr, DIM: tl.constexpr,
    DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_DIM_V: tl.constexpr, PRECISION: tl.constexpr, USE_DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Write the statistics of the rows, which the kernel of dK and dV reads too, and dQ."""
    num_row_tiles = tl.cdiv(q_len, BLOCK_M)
    row_tile = num_row_tiles - 1 - tl.program_id(0) % num_row_tiles
    start_m = row_tile * BLOCK_M
    num_rows = BLOCK_M
    if row_tile == num_row_tiles - 1:
        num_rows = tl.cdiv(q_len, STATISTICS_BLOCK) * STATISTICS_BLOCK - start_m
    for first in range(0, num_rows, BLOCK_M):
        write_row_statistics(
            out, tensors[3], lse, d_lse, lse_2, delta, out_strides, d_out_strides, q_len,
            tl.program_id(0) // num_row_tiles, start_m + first, NUM_HEADS, HAS_D_LSE, DIM_V, BLOCK_M, BLOCK_DIM_V,
        )  # fmt: skip
    tl.debug_barrier()
    has_nan = query_gradients(
        q, k, v, d_out, lse_2, delta, d_q, bounds, schedule, seed,
        (q_strides, k_strides, v_strides, d_out_strides, d_q_strides),
        (scale, softcap, drop_below, keep_scale), (q_len, kv_len, mask_stride_b, max_runs), tl.program_id(0), 0,
        NUM_HEADS, HEADS_PER_KV_HEAD, HEADS_PER_MASK, NUM_PLANES, HAS_SOFTCAP, HAS_DROPOUT,
        DIM, DIM_V, BLOCK_M, BLOCK_N, BLOCK_DIM, BLOCK_DIM_V, PRECISION, USE_DESCRIPTORS,
        BLOCK_M, BLOCK_N, False,
    )  # fmt: skip
    if has_nan:
        # 0 x NaN is NaN, so NaN of a hidden key may be in dQ. The barrier separates the two stores.
        tl.debug_barrier()
        for first in range(0, BLOCK_M, SMALL_BLOCK):
            _query_gradients_again(
                tensors[0], tensors[1], tensors[2], tensors[3], lse_2, delta, d_q, bounds, schedule, seed,
                (q_strides, k_strides, v_strides, d_out_strides, d_q_strides),
                (scale, softcap, drop_below, keep_scale), (q_len, kv_len, mask_stride_b, max_runs),
                tl.program_id(0), first,
                NUM_HEADS, HEADS_PER_KV_HEAD, HEADS_PER_MASK, NUM_PLANES, HAS_SOFTCAP, HAS_DROPOUT,
                DIM, DIM_V, SMALL_BLOCK, SMALL_BLOCK, BLOCK_DIM, BLOCK_DIM_V, PRECISION, False,
                BLOCK_M, BLOCK_N, True,
            )  # fmt: skip


class AttentionBackward:
    """The backward kernels for inputs of one kind, that of the inputs they are made from (see `Launcher`).

    Args:
        d_out: gradient of the output, ``[B, H, S_q, D_v]``, last dimension contiguous.
        d_lse: gradient of the log-sum-exp, float32 ``[B, H, S_q]``, or None.
        query, key, value, bounds: as of `AttentionForward`.
        out: its result.
        by_column, by_row: schedules of ``bounds`` for the tile sizes of ``configs.key_value_gradient`` and
            ``configs.query_gradient``.
    """

    def __init__(
        self,
        d_out: Tensor,
        d_lse: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bounds: Tensor,
        out: Tensor,
        by_column: Tensor,
        by_row: Tensor,
        scale: float,
        softcap: float | None,
        dropout_p: float,
        configs: Configs,
    ) -> None:
        batch_size, num_heads, q_len, _ = query.shape
        kv_heads, kv_len = key.shape[1:3]
        self._statistics_layout = Layout.of_rows(batch_size, num_heads, padded_rows(q_len))
        self._layouts = gradient_layouts(query, value)
        d_query_strides, *d_key_value_strides = (layout.strides[:3] for layout in self._layouts)
        inputs = query, key, value, d_out
        config = configs.query_gradient
        self._launch_d_query = AttentionLauncher(
            query_gradient_kernel,
            tiles_in(q_len, config.block_m) * batch_size * num_heads,
            inputs,
            (d_query_strides, out.stride()[:3]),
            bounds,
            by_row,
            scale,
            softcap,
            dropout_p,
            config,
            HAS_D_LSE=d_lse is not None,
        )
        config = configs.key_value_gradient
        self._launch_d_key_value = AttentionLauncher(
            key_value_gradient_kernel,
            tiles_in(kv_len, config.block_n) * batch_size * kv_heads,
            inputs,
            tuple(d_key_value_strides),
            bounds,
            by_column,
            scale,
            softcap,
            dropout_p,
            config,
        )

    def __call__(
        self,
        d_out: Tensor,
        d_lse: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bounds: Tensor,
        out: Tensor,
        lse: Tensor,
        by_column: Tensor,
        by_row: Tensor,
        seed: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """
        Args:
            lse, seed: those of the forward pass.

        Returns:
            Gradients of query, key and value in their shapes and dtypes, laid out like a model's ``[B, S, H, D]``, and
            delta, the row sums of ``out * d_out`` less ``d_lse``, float32 ``[B, H, padded_rows(S_q)]``.
        """
        lse_2, delta = self._statistics_layout.new(lse), self._statistics_layout.new(lse)
        d_query, d_key, d_value = (layout.new(query) for layout in self._layouts)
        inputs = query, key, value, d_out
        self._launch_d_query(inputs, out, lse, d_lse, lse_2, delta, d_query, bounds, by_row, seed)
        self._launch_d_key_value(inputs, lse_2, delta, d_key, d_value, bounds, by_column, seed)
        return d_query, d_key, d_value, delta
