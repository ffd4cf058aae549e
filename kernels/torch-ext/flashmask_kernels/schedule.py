"""Bounds -> the tiles to visit. FlashMask's classification (arXiv 2410.01359, section 4.2) of every tile as hidden,
cut or full.

A tile of BLOCK_M rows x BLOCK_N columns is hidden when its columns' intervals together cover all its rows, full when
none of its elements is hidden, and cut otherwise. The minima and maxima of each plane over a tile's columns settle most
tiles in O(1); the others are looked at column by column. The schedule depends on the bounds alone, so one serves all
layers and heads that share them.

A schedule is one int32 tensor ``[masks, T, 2 + 2 R]``: for each of T row tiles (or column tiles) the number of runs of
cut tiles, the number of runs of full tiles, and R pairs of first and end tile; those of cut tiles from the front, those
of full tiles from the back. A run is adjacent tiles of the same kind: their number does not grow with the length, and
the loop over a run computes its addresses instead of loading them. ``masks`` counts the batch times the heads of the
bounds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_HIDDEN, _CUT, _FULL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


def tiles_in(length: int, block: int) -> int:
    """Tiles of a length (`triton.cdiv` takes the host microseconds)."""
    return -(-length // block)


def mask_strides(bounds: torch.Tensor, num_heads: int) -> tuple[int, int]:
    """How attention heads index masks: mask = batch * stride + head // heads_per_mask."""
    batch, heads = bounds.shape[:2]
    return (0 if batch == 1 else heads), num_heads // heads


@triton.jit(do_not_specialize=["kv_len"])
def column_extrema_kernel(bounds, extrema, kv_len, NUM_PLANES: tl.constexpr, BLOCK_N: tl.constexpr):
    """Minimum and maximum of each plane over one column tile: extrema [masks, 2 * NUM_PLANES, num_column_tiles]."""
    num_column_tiles = tl.cdiv(kv_len, BLOCK_N)
    column_tile = tl.program_id(0) % num_column_tiles
    mask = (tl.program_id(0) // num_column_tiles).to(tl.int64)
    bounds += mask * NUM_PLANES * kv_len
    extrema += mask * 2 * NUM_PLANES * num_column_tiles + column_tile
    # The last column stands in for those past the end.
    columns = tl.minimum(column_tile * BLOCK_N + tl.arange(0, BLOCK_N), kv_len - 1)
    for plane in tl.static_range(NUM_PLANES):
        values = tl.load(bounds + plane * kv_len.to(tl.int64) + columns)
        tl.store(extrema + 2 * plane * num_column_tiles, tl.min(values))
        tl.store(extrema + (2 * plane + 1) * num_column_tiles, tl.max(values))


@triton.jit
def _classify(
    extrema,
    first_row,
    end_row,
    column_tiles,
    num_column_tiles,
    q_len,
    kv_len,
    NUM_PLANES: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(hidden, touched) of tiles, by their extrema: whether one interval covers all their rows in every column, and
    whether an interval may touch them. Rows or column tiles are a vector.
    """
    inside = column_tiles < num_column_tiles
    first_column = column_tiles * BLOCK_N
    end_column = tl.minimum(first_column + BLOCK_N, kv_len)
    hidden = inside & (first_row < 0)
    touched = hidden
    for pair in tl.static_range((NUM_PLANES + 1) // 2):
        plane = extrema + 4 * pair * num_column_tiles + column_tiles
        first_min = tl.load(plane, mask=inside, other=0)
        first_max = tl.load(plane + num_column_tiles, mask=inside, other=0)
        if NUM_PLANES == 1:
            shift = kv_len - q_len
            hidden |= (first_max <= first_row) | (first_column - shift >= end_row)
            touched |= (first_min < end_row) | (end_column - 1 - shift > first_row)
        else:
            second_min = tl.load(plane + 2 * num_column_tiles, mask=inside, other=0)
            second_max = tl.load(plane + 3 * num_column_tiles, mask=inside, other=0)
            if NUM_PLANES == 2:
                hidden |= (first_max <= first_row) | (second_min >= end_row)
                touched |= (first_min < end_row) | (second_max > first_row)
            else:
                hidden |= (first_max <= first_row) & (second_min >= end_row)
                touched |= (first_min < end_row) & (second_max > first_row)
    return hidden, touched


@triton.jit
def classify_columns(bounds, columns, first_row, end_row, q_len, kv_len, NUM_PLANES: tl.constexpr):
    """(hidden, touched) of the rows [first_row, end_row) of single columns: whether the intervals together cover them
    all, and whether one touches them.
    """
    exists = columns < kv_len
    if NUM_PLANES <= 2:
        start = tl.load(bounds + columns, mask=exists, other=0)
        if NUM_PLANES == 1:
            end = columns - (kv_len - q_len)
        else:
            end = tl.load(bounds + kv_len + columns, mask=exists, other=0)
        # Rows below `end` and from `start` on are hidden.
        hidden = tl.minimum(start, end_row) <= tl.maximum(end, first_row)
        touched = (start < end_row) | (end > first_row)
    else:
        # How far the rows are covered without a gap. An interval may reach further only after another one has.
        covered = first_row + 0 * columns
        touched = covered < 0
        for _ in range(NUM_PLANES // 2):
            # Not unrolled: with 16 intervals that took the compiler 48 s.
            for interval in range(NUM_PLANES // 2):
                plane = bounds + 2 * interval * kv_len.to(tl.int64)
                start = tl.load(plane + columns, mask=exists, other=0)
                end = tl.load(plane + kv_len + columns, mask=exists, other=0)
                covered = tl.where((start <= covered) & (end > covered), end, covered)
                touched |= tl.maximum(start, first_row) < tl.minimum(end, end_row)
        hidden = covered >= end_row
    return hidden | (columns >= kv_len), touched & exists


@triton.jit
def _store_runs(runs, tiles, is_kind, was_kind, num_runs, STEP: tl.constexpr, max_runs):
    """Note which tiles begin a run and which are the first after one; how many runs there are now."""
    begins = (is_kind & (was_kind == 0)).to(tl.int32)
    ends = was_kind & (is_kind == 0)
    begun = num_runs + tl.cumsum(begins)
    run = runs + STEP * (begun - 1)
    tl.store(run, tiles, mask=(begins != 0) & (begun <= max_runs))
    tl.store(run + 1, tiles, mask=ends & (begun <= max_runs))
    return num_runs + tl.sum(begins)


@triton.jit(do_not_specialize=["q_len", "kv_len", "max_runs"])
def schedule_kernel(
    bounds,
    extrema,
    schedule,
    q_len,
    kv_len,
    max_runs,
    NUM_PLANES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program lists the runs of one row tile or column tile."""
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
    bounds += mask * NUM_PLANES * kv_len
    extrema += mask * 2 * NUM_PLANES * num_column_tiles
    schedule += (mask * num_lists + own_tile) * (2 + 2 * max_runs)
    runs = schedule + 2
    last_run = runs + 2 * (max_runs - 1)

    num_cut = 0
    num_full = 0
    previous = 0
    first_visited = num_tiles
    end_visited = 0
    in_chunk = tl.arange(0, CHUNK)
    for start in range(0, num_tiles, CHUNK):
        tiles = start + in_chunk
        if BY_COLUMN:
            row_tiles, column_tiles = tiles, own_tile + 0 * tiles
        else:
            row_tiles, column_tiles = own_tile + 0 * tiles, tiles
        first_row = row_tiles * BLOCK_M
        end_row = tl.minimum(first_row + BLOCK_M, q_len)
        hidden, touched = _classify(
            extrema, first_row, end_row, column_tiles, num_column_tiles, q_len, kv_len, NUM_PLANES, BLOCK_N
        )
        hidden |= tiles >= num_tiles
        unsettled = touched & (hidden == 0)
        if tl.max(unsettled.to(tl.int32)) > 0:
            # A few columns show that most of these tiles are cut.
            shows_hidden = tiles < 0
            shows_visible = shows_hidden
            for sample in range(4):
                column = tl.minimum(column_tiles * BLOCK_N + sample * (BLOCK_N - 1) // 3, kv_len - 1)
                hides_all, touches = classify_columns(bounds, column, first_row, end_row, q_len, kv_len, NUM_PLANES)
                shows_hidden |= touches
                shows_visible |= hides_all == 0
            unsettled &= (shows_hidden & shows_visible) == 0
        if tl.max(unsettled.to(tl.int32)) > 0:
            covered = tiles >= 0
            touched_by_column = tiles < 0
            for column in range(0, BLOCK_N, 16):
                columns = column_tiles[:, None] * BLOCK_N + column + tl.arange(0, 16)[None, :]
                hides_all, touches = classify_columns(
                    bounds, columns, first_row[:, None], end_row[:, None], q_len, kv_len, NUM_PLANES
                )
                covered &= tl.min(hides_all.to(tl.int32), 1) != 0
                touched_by_column |= tl.max(touches.to(tl.int32), 1) != 0
            hidden |= covered
            touched &= touched_by_column
        # The columns past the last key must be masked element by element.
        touched |= column_tiles * BLOCK_N + BLOCK_N > kv_len
        kind = tl.where(hidden, _HIDDEN, tl.where(touched, _CUT, _FULL))
        lowest = tl.min(kind)
        highest = tl.max(kind)
        if highest != _HIDDEN:
            first_visited = tl.minimum(first_visited, start)
            end_visited = tl.minimum(start + CHUNK, num_tiles)
        if (lowest != highest) | (highest != previous):
            kind_before = tl.where(in_chunk == 0, previous, tl.gather(kind, tl.maximum(in_chunk - 1, 0), 0))
            num_cut = _store_runs(runs, tiles, kind == _CUT, kind_before == _CUT, num_cut, 2, max_runs)
            num_full = _store_runs(last_run, tiles, kind == _FULL, kind_before == _FULL, num_full, -2, max_runs)
            previous = tl.sum(tl.where(in_chunk == CHUNK - 1, kind, 0))
    # A run that reaches the last tile of the last chunk has not ended.
    tl.store(runs + 2 * num_cut - 1, num_tiles, mask=(previous == _CUT) & (num_cut <= max_runs))
    tl.store(last_run - 2 * num_full + 3, num_tiles, mask=(previous == _FULL) & (num_full <= max_runs))
    if num_cut + num_full > max_runs:
        # One run of all gives the same result: what is hidden or full may be visited as cut.
        num_cut = 1
        num_full = 0
        tl.debug_barrier()
        tl.store(runs, first_visited)
        tl.store(runs + 1, end_visited)
    tl.store(schedule, num_cut)
    tl.store(schedule + 1, num_full)


def column_extrema(bounds: torch.Tensor, block_n: int) -> torch.Tensor:
    """Minimum and maximum of each plane over each column tile, int32 ``[masks, 2 C, tiles]``: one launch."""
    batch, heads, num_planes, kv_len = bounds.shape
    extrema = bounds.new_empty(batch * heads, 2 * num_planes, tiles_in(kv_len, block_n))
    column_extrema_kernel[(batch * heads * extrema.shape[-1],)](
        bounds, extrema, kv_len, NUM_PLANES=num_planes, BLOCK_N=block_n, num_warps=1
    )
    return extrema


def build_schedule(
    bounds: torch.Tensor,
    q_len: int,
    block_m: int,
    block_n: int,
    by_column: bool,
    extrema: torch.Tensor | None = None,
) -> torch.Tensor:
    """Classify the tiles of ``bounds`` and list those to visit: a launch besides that of `extrema`, no synchronisation.

    Args:
        bounds: int32 ``[B or 1, H or 1, C, S_k]``, contiguous, on a device that Triton runs on.
        q_len: number of query rows S_q.
        block_m, block_n: rows and columns of a tile.
        by_column: list the row tiles of each column tile instead of the column tiles of each row tile.
        extrema: what `column_extrema` makes of the bounds, if other schedules share it; default: made here.
    """
    extrema = column_extrema(bounds, block_n) if extrema is None else extrema
    batch, heads, num_planes, kv_len = bounds.shape
    schedule = bounds.new_empty(schedule_shape(batch * heads, q_len, kv_len, block_m, block_n, by_column))
    schedule_kernel[(schedule.shape[0] * schedule.shape[1],)](
        bounds,
        extrema,
        schedule,
        q_len,
        kv_len,
        max_runs_of(schedule),
        NUM_PLANES=num_planes,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BY_COLUMN=by_column,
        # A warp needs no barriers: four with 256 tiles took twice as long. H200, 32K, us by rows / by columns: causal
        # 9.9 / 8.4, random eviction 85 / 51; by 32 tiles 9.1 / 7.0 and 106 / 48, by 128 tiles 15.2 / 9.5 and 129 / 65.
        CHUNK=64,
        num_warps=1,
    )
    return schedule


def schedule_shape(
    num_masks: int, q_len: int, kv_len: int, block_m: int, block_n: int, by_column: bool
) -> tuple[int, int, int]:
    """Shape of what `build_schedule` returns: a few bytes per key, however long the row."""
    num_row_tiles, num_column_tiles = tiles_in(q_len, block_m), tiles_in(kv_len, block_n)
    num_lists, num_tiles = (num_column_tiles, num_row_tiles) if by_column else (num_row_tiles, num_column_tiles)
    max_runs = min(num_tiles, max(64, (1 << 17) // max(num_tiles, 1)))
    return num_masks, num_lists, 2 + 2 * max_runs


def max_runs_of(schedule: torch.Tensor) -> int:
    return (schedule.shape[-1] - 2) // 2
