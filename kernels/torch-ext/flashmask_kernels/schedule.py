"""Bounds -> the tiles to visit. FlashMask's classification (arXiv 2410.01359, section 4.2) of every tile as hidden,
cut or full.

A tile of BLOCK_M rows x BLOCK_N columns is hidden when an interval covers its rows in every column, full when no
interval of any column touches its rows, and cut otherwise. The minima and maxima of each plane over a tile's columns
decide that in O(1) per tile. The schedule depends on the bounds alone, so one serves all layers and heads that share
them.

A schedule is one int32 tensor ``[masks, T, 2 + T']``: for each of T row tiles (or column tiles) the number of cut
tiles, the number of full tiles, and the list of the T' tiles across, cut ones from its front, full ones from its
back. ``masks`` counts the batch times the heads of the bounds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Beyond every row. Bounds may be any int32, so they are compared and never added to.
_FAR = tl.constexpr((1 << 31) - 1)


def mask_strides(bounds: torch.Tensor, num_heads: int) -> tuple[int, int]:
    """How attention heads index masks: mask = batch * stride + head // heads_per_mask."""
    batch, heads = bounds.shape[:2]
    return (0 if batch == 1 else heads), num_heads // heads


@triton.jit
def _load_plane(bounds, plane, columns, kv_len, other):
    return tl.load(bounds + plane * kv_len.to(tl.int64) + columns, mask=columns < kv_len, other=other)


@triton.jit(do_not_specialize=["q_len", "kv_len"])
def column_extrema_kernel(bounds, extrema, q_len, kv_len, NUM_PLANES: tl.constexpr, BLOCK_N: tl.constexpr):
    """Minimum and maximum of each plane over one column tile: extrema [masks, 2 * NUM_PLANES, num_column_tiles].

    Columns past the last key count for nothing. Neither do empty intervals; and a column that two planes hide entirely
    counts as hidden for both, so that it never keeps its neighbours' tile alive.
    """
    num_column_tiles = tl.cdiv(kv_len, BLOCK_N)
    column_tile = tl.program_id(0) % num_column_tiles
    mask = (tl.program_id(0) // num_column_tiles).to(tl.int64)
    bounds += mask * NUM_PLANES * kv_len
    extrema += mask * 2 * NUM_PLANES * num_column_tiles + column_tile
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = columns < kv_len
    for pair in tl.static_range((NUM_PLANES + 1) // 2):
        first = _load_plane(bounds, 2 * pair, columns, kv_len, 0)
        if NUM_PLANES == 1:
            dead = first <= tl.maximum(columns - (kv_len - q_len), 0)
            first = tl.where(dead, -_FAR, first)
        else:
            second = _load_plane(bounds, 2 * pair + 1, columns, kv_len, 0)
            if NUM_PLANES == 2:
                dead = first <= second
                first = tl.where(dead, -_FAR, first)
                second = tl.where(dead, _FAR, second)
            else:
                empty = first >= second
                first = tl.where(empty, _FAR, first)
                second = tl.where(empty, -_FAR, second)
            row = extrema + (4 * pair + 2) * num_column_tiles
            tl.store(row, tl.min(tl.where(exists, second, _FAR)))
            tl.store(row + num_column_tiles, tl.max(tl.where(exists, second, -_FAR)))
        row = extrema + 4 * pair * num_column_tiles
        tl.store(row, tl.min(tl.where(exists, first, _FAR)))
        tl.store(row + num_column_tiles, tl.max(tl.where(exists, first, -_FAR)))


@triton.jit
def _classify(
    extrema,
    row_tiles,
    column_tiles,
    num_column_tiles,
    q_len,
    kv_len,
    NUM_PLANES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(hidden, cut) of tiles; one of ``row_tiles`` and ``column_tiles`` is a vector, the other a scalar."""
    inside = column_tiles < num_column_tiles
    first_row = row_tiles * BLOCK_M
    end_row = tl.minimum(first_row + BLOCK_M, q_len)
    first_column = column_tiles * BLOCK_N
    end_column = tl.minimum(first_column + BLOCK_N, kv_len)
    hidden = first_row >= q_len
    # The columns past the last key must be masked element by element.
    cut = first_column + BLOCK_N > kv_len
    for pair in tl.static_range((NUM_PLANES + 1) // 2):
        plane = extrema + 4 * pair * num_column_tiles + column_tiles
        first_min = tl.load(plane, mask=inside, other=0)
        first_max = tl.load(plane + num_column_tiles, mask=inside, other=0)
        if NUM_PLANES == 1:
            shift = kv_len - q_len
            hidden |= (first_max <= first_row) | (first_column - shift >= end_row)
            cut |= (first_min < end_row) | (end_column - 1 - shift > first_row)
        else:
            second_min = tl.load(plane + 2 * num_column_tiles, mask=inside, other=0)
            second_max = tl.load(plane + 3 * num_column_tiles, mask=inside, other=0)
            if NUM_PLANES == 2:
                hidden |= (first_max <= first_row) | (second_min >= end_row)
                cut |= (first_min < end_row) | (second_max > first_row)
            else:
                hidden |= (first_max <= first_row) & (second_min >= end_row)
                cut |= (first_min < end_row) & (second_max > first_row)
    return hidden, cut


@triton.jit(do_not_specialize=["q_len", "kv_len"])
def schedule_kernel(
    extrema,
    schedule,
    q_len,
    kv_len,
    NUM_PLANES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program lists the tiles of one row tile or column tile: cut ones from the front, full ones from the back."""
    num_row_tiles = tl.cdiv(q_len, BLOCK_M)
    num_column_tiles = tl.cdiv(kv_len, BLOCK_N)
    if BY_COLUMN:
        num_lists = num_column_tiles
        num_tiles = num_row_tiles
    else:
        num_lists = num_row_tiles
        num_tiles = num_column_tiles
    own_tile = tl.program_id(0) % num_lists
    mask = (tl.program_id(0) // num_lists).to(tl.int64)
    extrema += mask * 2 * NUM_PLANES * num_column_tiles
    schedule += (mask * num_lists + own_tile) * (num_tiles + 2)
    tiles = schedule + 2

    num_cut = 0
    num_full = 0
    for start in range(0, num_tiles, CHUNK):
        others = start + tl.arange(0, CHUNK)
        if BY_COLUMN:
            hidden, cut = _classify(
                extrema, others, own_tile, num_column_tiles, q_len, kv_len, NUM_PLANES, BLOCK_M, BLOCK_N
            )
        else:
            hidden, cut = _classify(
                extrema, own_tile, others, num_column_tiles, q_len, kv_len, NUM_PLANES, BLOCK_M, BLOCK_N
            )
        is_cut = ((others < num_tiles) & (hidden == 0) & cut).to(tl.int32)
        is_full = ((others < num_tiles) & (hidden == 0) & (cut == 0)).to(tl.int32)
        tl.store(tiles + num_cut + tl.cumsum(is_cut) - 1, others, mask=is_cut != 0)
        tl.store(tiles + num_tiles - num_full - tl.cumsum(is_full), others, mask=is_full != 0)
        num_cut += tl.sum(is_cut)
        num_full += tl.sum(is_full)
    tl.store(schedule, num_cut)
    tl.store(schedule + 1, num_full)


def build_schedule(bounds: torch.Tensor, q_len: int, block_m: int, block_n: int, by_column: bool) -> torch.Tensor:
    """Classify the tiles of ``bounds`` and list those to visit: two launches, no synchronisation.

    Args:
        bounds: int32 ``[B or 1, H or 1, C, S_k]``, contiguous, on a device that Triton runs on.
        q_len: number of query rows S_q.
        block_m, block_n: rows and columns of a tile.
        by_column: list the row tiles of each column tile instead of the column tiles of each row tile.
    """
    batch, heads, num_planes, kv_len = bounds.shape
    num_masks = batch * heads
    schedule = bounds.new_empty(schedule_shape(num_masks, q_len, kv_len, block_m, block_n, by_column))
    extrema = bounds.new_empty(num_masks, 2 * num_planes, triton.cdiv(kv_len, block_n))
    column_extrema_kernel[(num_masks * extrema.shape[-1],)](
        bounds, extrema, q_len, kv_len, NUM_PLANES=num_planes, BLOCK_N=block_n, num_warps=1
    )
    schedule_kernel[(num_masks * schedule.shape[1],)](
        extrema,
        schedule,
        q_len,
        kv_len,
        NUM_PLANES=num_planes,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BY_COLUMN=by_column,
        CHUNK=256,
        num_warps=4,
    )
    return schedule


def schedule_shape(
    num_masks: int, q_len: int, kv_len: int, block_m: int, block_n: int, by_column: bool
) -> tuple[int, int, int]:
    """Shape of what `build_schedule` returns."""
    num_row_tiles, num_column_tiles = triton.cdiv(q_len, block_m), triton.cdiv(kv_len, block_n)
    num_lists, num_tiles = (num_column_tiles, num_row_tiles) if by_column else (num_row_tiles, num_column_tiles)
    return num_masks, num_lists, 2 + num_tiles
