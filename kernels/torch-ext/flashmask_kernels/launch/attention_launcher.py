"""What all portable attention kernels, forward and backward, are launched with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..common.tiles import head_dim_blocks
from ..configs import Config
from ..dropout import drop_below
from ..schedule import mask_strides, max_runs_of
from .launcher import Launcher
from .tile_sources import TileSources, descriptors_can_address


class AttentionLauncher:
    """Launches an attention kernel on inputs of one kind, that of the inputs it is made from (see `Launcher`).

    Args:
        inputs: query, key, value; for a backward kernel the gradient of the output as well.
        strides: of batch, heads and rows of the other tensors ``[B, H, S, D]``, as the kernel takes them.
        constants: of this kernel, besides those that all kernels have.
    """

    def __init__(
        self,
        kernel: Any,
        programs: int,
        inputs: tuple[Tensor, ...],
        strides: tuple[tuple[int, ...], ...],
        bounds: Tensor,
        schedule: Tensor,
        scale: float,
        softcap: float | None,
        dropout_p: float,
        config: Config,
        **constants: bool,
    ) -> None:
        query, _, value = inputs[:3]
        _, num_heads, q_len, dim = query.shape
        _, kv_heads, kv_len, dim_v = value.shape
        block_dim, block_dim_v = head_dim_blocks(dim, dim_v)
        mask_stride_b, heads_per_mask = mask_strides(bounds, num_heads)
        rows, columns = config.block_m, config.block_n
        tiles = (rows, block_dim), (columns, block_dim), (columns, block_dim_v), (rows, block_dim_v)
        # Without descriptors, `load_rows` reads from the tensors themselves.
        use_descriptors = config.use_descriptors and descriptors_can_address(*inputs)
        self._sources = TileSources(*map(_descriptor, inputs, tiles)) if use_descriptors else None
        numbers = (
            *(tensor.stride()[:3] for tensor in inputs),
            *strides,
            scale,
            0.0 if softcap is None else softcap,
            drop_below(dropout_p),
            1.0 / (1.0 - dropout_p),
            q_len,
            kv_len,
            mask_stride_b,
            max_runs_of(schedule),
        )
        common_constants = {
            "NUM_HEADS": num_heads,
            "HEADS_PER_KV_HEAD": num_heads // kv_heads,
            "HEADS_PER_MASK": heads_per_mask,
            "NUM_PLANES": bounds.shape[2],
            "HAS_SOFTCAP": softcap is not None,
            "HAS_DROPOUT": dropout_p > 0,
            "DIM": dim,
            "DIM_V": dim_v,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_DIM": block_dim,
            "BLOCK_DIM_V": block_dim_v,
            "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
            "USE_DESCRIPTORS": use_descriptors,
        }
        self._launch = Launcher(kernel, programs, numbers, {**common_constants, **constants}, **config.options)

    def __call__(self, inputs: tuple[Tensor, ...], *others: Tensor | None) -> None:
        sources = self._sources(*inputs) if self._sources else inputs
        self._launch(*sources, inputs, *others)


def _descriptor(tensor: Tensor, tile: tuple[int, int]) -> TensorDescriptor:
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [1, 1, *tile])
