"""Compute again the rows that hold NaN: NaN of a hidden key or row, as 0 x NaN, must not be in them.

For kernels that do not keep it out themselves and set a flag when they write NaN. Without the flag these kernels return
at once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch.launcher import Launcher, num_processors
from ..launch.layout import Layout, gradient_layouts
from ..schedule import mask_strides, max_runs_of
from .backward_rows import key_value_gradients, query_gradients
from .forward_rows import attend_rows
from .tiles import SMALL_BLOCK, head_dim_blocks, holds_nan, load_rows


@triton.jit
def _rows_hold_nan(
    source, strides, batch, head, start, length, DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr
):
    tile = load_rows(source, strides, batch, head, start, length, DIM, BLOCK_ROWS, BLOCK_DIM, True, False)
    return holds_nan(tile.to(tl.float32))


@triton.jit(do_not_specialize=["q_len", "kv_len", "batch_size", "mask_stride_b", "max_runs"])
def redo_forward_kernel(
    has_nan, q, k, v, out, lse, bounds, schedule, sinks, q_strides, k_strides, v_strides, out_strides,
    scale, q_len, kv_len, batch_size, mask_stride_b, max_runs,
    NUM_HEADS: tl.constexpr, HEADS_PER_KV_HEAD: tl.constexpr, HEADS_PER_MASK: tl.constexpr, NUM_PLANES: tl.constexpr,
    HAS_SINKS: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_DIM_V: tl.constexpr, SCHEDULED_M: tl.constexpr, SCHEDULED_N: tl.constexpr,
):  # fmt: skip
    if tl.load(has_nan) != 0:
        num_row_tiles = tl.cdiv(q_len, SCHEDULED_M)
        for program in range(tl.program_id(0), num_row_tiles * batch_size * NUM_HEADS, tl.num_programs(0)):
            start = (num_row_tiles - 1 - program % num_row_tiles) * SCHEDULED_M
            batch_head = program // num_row_tiles
            for first in range(0, SCHEDULED_M, SMALL_BLOCK):
                if _rows_hold_nan(
                    out, out_strides, batch_head // NUM_HEADS, batch_head % NUM_HEADS, start + first, q_len,
                    DIM_V, SMALL_BLOCK, BLOCK_DIM_V,
                ):  # fmt: skip
                    attend_rows(
                        q, k, v, out, lse, bounds, schedule, sinks, None,
                        (q_strides, k_strides, v_strides, out_strides), (scale, 0.0, 0, 1.0),
                        (q_len, kv_len, mask_stride_b, max_runs), program, first,
                        NUM_HEADS, HEADS_PER_KV_HEAD, HEADS_PER_MASK, NUM_PLANES, False, HAS_SINKS, False,
                        DIM, DIM_V, SMALL_BLOCK, SMALL_BLOCK, BLOCK_DIM, BLOCK_DIM_V, "tf32", False, False,
                        SCHEDULED_M, SCHEDULED_N, True,
                    )  # fmt: skip


@triton.jit(
    do_not_specialize=["q_len", "kv_len", "batch_size", "mask_stride_b", "max_runs_by_column", "max_runs_by_row"]
)
def redo_backward_kernel(
    has_nan, q, k, v, d_out, lse_2, delta, d_q, d_k, d_v, bounds, by_column, by_row,
    q_strides, k_strides, v_strides, d_out_strides, d_q_strides, d_k_strides, d_v_strides,
    scale, q_len, kv_len, batch_size, mask_stride_b, max_runs_by_column, max_runs_by_row,
    NUM_HEADS: tl.constexpr, HEADS_PER_KV_HEAD: tl.constexpr, HEADS_PER_MASK: tl.constexpr, NUM_PLANES: tl.constexpr,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_DIM_V: tl.constexpr,
    COLUMN_M: tl.constexpr, COLUMN_N: tl.constexpr, ROW_M: tl.constexpr, ROW_N: tl.constexpr,
):  # fmt: skip
    if tl.load(has_nan) != 0:
        KV_HEADS: tl.constexpr = NUM_HEADS // HEADS_PER_KV_HEAD
        num_column_tiles = tl.cdiv(kv_len, COLUMN_N)
        for program in range(tl.program_id(0), num_column_tiles * batch_size * KV_HEADS, tl.num_programs(0)):
            start = program % num_column_tiles * COLUMN_N
            batch = program // num_column_tiles // KV_HEADS
            head = program // num_column_tiles % KV_HEADS
            for first in range(0, COLUMN_N, SMALL_BLOCK):
                d_k_has_nan = _rows_hold_nan(
                    d_k, d_k_strides, batch, head, start + first, kv_len, DIM, SMALL_BLOCK, BLOCK_DIM
                )
                d_v_has_nan = _rows_hold_nan(
                    d_v, d_v_strides, batch, head, start + first, kv_len, DIM_V, SMALL_BLOCK, BLOCK_DIM_V
                )
                if d_k_has_nan | d_v_has_nan:
                    key_value_gradients(
                        q, k, v, d_out, lse_2, delta, d_k, d_v, bounds, by_column, None,
                        (q_strides, k_strides, v_strides, d_out_strides, d_k_strides, d_v_strides),
                        (scale, 0.0, 0, 1.0), (q_len, kv_len, mask_stride_b, max_runs_by_column), program, first,
                        NUM_HEADS, HEADS_PER_KV_HEAD, HEADS_PER_MASK, NUM_PLANES, False, False,
                        DIM, DIM_V, SMALL_BLOCK, SMALL_BLOCK, BLOCK_DIM, BLOCK_DIM_V, "tf32", False,
                        COLUMN_M, COLUMN_N, True,
                    )  # fmt: skip
        num_row_tiles = tl.cdiv(q_len, ROW_M)
        for program in range(tl.program_id(0), num_row_tiles * batch_size * NUM_HEADS, tl.num_programs(0)):
            start = (num_row_tiles - 1 - program % num_row_tiles) * ROW_M
            batch_head = program // num_row_tiles
            for first in range(0, ROW_M, SMALL_BLOCK):
                if _rows_hold_nan(
                    d_q, d_q_strides, batch_head // NUM_HEADS, batch_head % NUM_HEADS, start + first, q_len,
                    DIM, SMALL_BLOCK, BLOCK_DIM,
                ):  # fmt: skip
                    query_gradients(
                        q, k, v, d_out, lse_2, delta, d_q, bounds, by_row, None,
                        (q_strides, k_strides, v_strides, d_out_strides, d_q_strides),
                        (scale, 0.0, 0, 1.0), (q_len, kv_len, mask_stride_b, max_runs_by_row), program, first,
                        NUM_HEADS, HEADS_PER_KV_HEAD, HEADS_PER_MASK, NUM_PLANES, False, False,
                        DIM, DIM_V, SMALL_BLOCK, SMALL_BLOCK, BLOCK_DIM, BLOCK_DIM_V, "tf32", False,
                        ROW_M, ROW_N, True,
                    )  # fmt: skip


def redo_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    sinks: Tensor | None,
    schedule: Tensor,
    scale: float,
    tile: tuple[int, int],
) -> Launcher:
    """A launcher that computes again, in place, the rows of an output that hold NaN, if a flag is not 0. It is called
    with the flag, query, key, value, output, log-sum-exp, bounds, schedule and sinks.

    Arguments as of `AttentionForward`; the tiles of ``schedule`` have ``tile`` rows and columns.
    """
    batch_size, num_heads, q_len, dim = query.shape
    kv_heads, kv_len, dim_v = value.shape[1:]
    block_dim, block_dim_v = head_dim_blocks(dim, dim_v)
    mask_stride_b, heads_per_mask = mask_strides(bounds, num_heads)
    numbers = (
        *(tensor.stride()[:3] for tensor in (query, key, value)),
        Layout.of_model(batch_size, num_heads, q_len, dim_v).strides[:3],
        scale, q_len, kv_len, batch_size, mask_stride_b, max_runs_of(schedule),
    )  # fmt: skip
    constants = {
        "NUM_HEADS": num_heads, "HEADS_PER_KV_HEAD": num_heads // kv_heads, "HEADS_PER_MASK": heads_per_mask,
        "NUM_PLANES": bounds.shape[2], "HAS_SINKS": sinks is not None, "DIM": dim, "DIM_V": dim_v,
        "BLOCK_DIM": block_dim, "BLOCK_DIM_V": block_dim_v, "SCHEDULED_M": tile[0], "SCHEDULED_N": tile[1],
    }  # fmt: skip
    return Launcher(redo_forward_kernel, num_processors(query.device), numbers, constants)


def redo_backward(
    d_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    by_column: Tensor,
    by_row: Tensor,
    scale: float,
    column_tile: tuple[int, int],
    row_tile: tuple[int, int],
) -> Launcher:
    """A launcher that computes again, in place, the rows of dQ, dK and dV that hold NaN, if a flag is not 0. It is
    called with the flag, query, key, value, d_out, both statistics of the rows, dQ, dK, dV, bounds and both schedules.

    Arguments as of `AttentionBackward`; the tiles of ``by_column`` and ``by_row`` have ``column_tile`` and ``row_tile``
    rows and columns.
    """
    batch_size, num_heads, q_len, dim = query.shape
    kv_heads, kv_len, dim_v = value.shape[1:]
    block_dim, block_dim_v = head_dim_blocks(dim, dim_v)
    mask_stride_b, heads_per_mask = mask_strides(bounds, num_heads)
    numbers = (
        *(tensor.stride()[:3] for tensor in (query, key, value, d_out)),
        *(layout.strides[:3] for layout in gradient_layouts(query, value)),
        scale, q_len, kv_len, batch_size, mask_stride_b, max_runs_of(by_column), max_runs_of(by_row),
    )  # fmt: skip
    constants = {
        "NUM_HEADS": num_heads, "HEADS_PER_KV_HEAD": num_heads // kv_heads, "HEADS_PER_MASK": heads_per_mask,
        "NUM_PLANES": bounds.shape[2], "DIM": dim, "DIM_V": dim_v,
        "BLOCK_DIM": block_dim, "BLOCK_DIM_V": block_dim_v,
        "COLUMN_M": column_tile[0], "COLUMN_N": column_tile[1], "ROW_M": row_tile[0], "ROW_N": row_tile[1],
    }  # fmt: skip
    return Launcher(redo_backward_kernel, num_processors(query.device), numbers, constants)
