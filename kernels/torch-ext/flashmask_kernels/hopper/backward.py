"""FlashMask's backward pass for sm_90 in two kernels, warp-specialised and persistent.

As in the portable kernels, one makes dK and dV by column tiles and one dQ by row tiles: seven matrix products of each
tile instead of five, and gradients that are bitwise repeatable.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common.nan_repair import redo_backward
from ..common.row_statistics import RowStatistics, padded_rows
from ..configs import Configs
from ..launch.launcher import Launcher
from ..launch.layout import gradient_layouts
from ..launch.tile_sources import TileSources, addressable_by_tma
from ..schedule import mask_strides, max_runs_of, tiles_in
from .key_value_gradient import key_value_gradient_kernel
from .query_gradient import query_gradient_kernel
from .tiles import TileWidths, tma_source
from .work import LAUNCH_OPTIONS, heads_at_a_time, new_counters, num_programs


class AttentionBackward:
    """The backward kernels for inputs of one kind, as `portable.AttentionBackward`, without dropout and softcap and for
    head sizes to 512.
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
        configs: Configs,
    ) -> None:
        inputs = query, key, value, d_out = tuple(addressable_by_tma(tensor) for tensor in (query, key, value, d_out))
        batch_size, num_heads, q_len, dim = query.shape
        kv_heads, kv_len, dim_v = value.shape[1:]
        block_dim, block_dim_v, parts = TileWidths.of(dim, dim_v)
        mask_stride_b, heads_per_mask = mask_strides(bounds, num_heads)
        heads_per_kv_head = num_heads // kv_heads
        self._row_statistics = RowStatistics(out, d_out, d_lse)
        self._gradient_layouts = gradient_layouts(query, value)
        d_query_strides, d_key_strides, d_value_strides = (layout.strides[:3] for layout in self._gradient_layouts)

        config = configs.key_value_gradient
        num_column_tiles = tiles_in(kv_len, config.block_n)
        num_items = num_column_tiles * batch_size * kv_heads * parts
        blocks: tuple[tuple[int, ...], ...] = (
            (config.block_m, block_dim),
            (64, block_dim),
            (64, block_dim_v),
            (config.block_m, block_dim_v),
        )
        statistic = self._row_statistics.layout.new(out, torch.float32).flatten(0, 1)
        self._column_sources = TileSources(
            *map(tma_source, (*inputs, statistic, statistic), (*blocks, (config.block_m,), (config.block_m,)))
        )
        numbers: tuple[Any, ...] = (
            d_key_strides,
            d_value_strides,
            scale,
            q_len,
            kv_len,
            num_items,
            num_column_tiles,
            heads_at_a_time(kv_heads, num_column_tiles * parts, query, d_out) * parts,
            mask_stride_b,
            max_runs_of(by_column),
        )
        constants = {
            "KV_HEADS": kv_heads,
            "HEADS_PER_KV_HEAD": heads_per_kv_head,
            "KV_HEADS_PER_MASK": heads_per_mask // heads_per_kv_head,
            "NUM_PLANES": bounds.shape[2],
            "DIM": dim,
            "DIM_V": dim_v,
            "BLOCK_M": config.block_m,
            "BLOCK_DIM": block_dim,
            "BLOCK_DIM_V": block_dim_v,
            "PARTS": parts,
            "STAGES": config.num_stages,
        }
        programs = num_programs(query.device, num_items)
        self._launch_d_key_value = Launcher(key_value_gradient_kernel, programs, numbers, constants, **LAUNCH_OPTIONS)
        column_tile = config.block_m, config.block_n

        config = configs.query_gradient
        num_row_tiles = tiles_in(q_len, config.block_m)
        num_items = num_row_tiles * batch_size * num_heads
        blocks = (64, block_dim), (config.block_n, block_dim), (config.block_n, block_dim_v), (64, block_dim_v)
        self._row_sources = TileSources(*map(tma_source, inputs, blocks))
        numbers = (
            d_query_strides,
            scale,
            q_len,
            kv_len,
            padded_rows(q_len),
            num_items,
            num_row_tiles,
            heads_at_a_time(kv_heads, num_row_tiles * heads_per_kv_head, key, value) * heads_per_kv_head,
            mask_stride_b,
            max_runs_of(by_row),
        )
        constants = {
            "NUM_HEADS": num_heads,
            "HEADS_PER_KV_HEAD": heads_per_kv_head,
            "HEADS_PER_MASK": heads_per_mask,
            "NUM_PLANES": bounds.shape[2],
            "DIM": dim,
            "BLOCK_N": config.block_n,
            "BLOCK_DIM": block_dim,
            "BLOCK_DIM_V": block_dim_v,
            "PARTS": parts,
            "STAGES": config.num_stages,
        }
        programs = num_programs(query.device, num_items)
        self._launch_d_query = Launcher(query_gradient_kernel, programs, numbers, constants, **LAUNCH_OPTIONS)
        row_tile = config.block_m, config.block_n
        self._redo = redo_backward(d_out, query, key, value, bounds, by_column, by_row, scale, column_tile, row_tile)

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
        seed: None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Arguments and results as of `portable.AttentionBackward`."""
        inputs = query, key, value, d_out = tuple(addressable_by_tma(tensor) for tensor in (query, key, value, d_out))
        lse_2, delta = self._row_statistics(out, lse, d_out, d_lse)
        gradients = tuple(layout.new(query) for layout in self._gradient_layouts)
        d_query, d_key, d_value = gradients
        column_counter, row_counter, has_nan = new_counters(3, query.device)
        self._launch_d_key_value(
            *self._column_sources(*inputs, lse_2, delta), d_key, d_value, bounds, by_column, column_counter, has_nan
        )
        self._launch_d_query(*self._row_sources(*inputs), lse_2, delta, d_query, bounds, by_row, row_counter, has_nan)
        self._redo(has_nan, *inputs, lse_2, delta, *gradients, bounds, by_column, by_row)
        return d_query, d_key, d_value, delta
