"""What kernels do with one tile: load its rows, mask a cut tile, store the result."""

from __future__ import annotations

import functools

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Rows and columns of the tiles in which a program repeats its work after NaN: the fewest that `tl.dot` takes. Kernels
# in half precision then need no more registers. Those in float32 do (sm_90, forward, D = 128: 252 instead of 107).
SMALL_BLOCK = tl.constexpr(16)


@functools.lru_cache
def head_dim_blocks(dim: int, dim_v: int) -> tuple[int, int]:
    """Tile widths for the head sizes: the next power of two, at least the 16 that `tl.dot` needs."""
    return max(16, triton.next_power_of_2(dim)), max(16, triton.next_power_of_2(dim_v))


@triton.jit
def _row_pointer(tensor, strides, batch, head, row):
    """In 64 bits: a head may span more than 2^31 elements. ``strides`` are those of batch, heads and rows."""
    return tensor + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1] + row.to(tl.int64) * strides[2]


@triton.jit
def load_rows(
    source,
    strides,
    batch,
    head,
    start,
    length,
    DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    CHECK_ROWS: tl.constexpr,
    USE_DESCRIPTORS: tl.constexpr,
):
    """Rows [start, start + BLOCK_ROWS) of one head as [BLOCK_ROWS, BLOCK_DIM]; what lies outside reads as 0."""
    if USE_DESCRIPTORS:
        return source.load([batch, head, start, 0]).reshape([BLOCK_ROWS, BLOCK_DIM])
    else:
        base = _row_pointer(source, strides, batch, head, start)
        rows = tl.arange(0, BLOCK_ROWS)
        dims = tl.arange(0, BLOCK_DIM)
        pointers = base + rows[:, None] * strides[2] + dims[None, :]
        if CHECK_ROWS and BLOCK_DIM != DIM:
            return tl.load(pointers, mask=(start + rows < length)[:, None] & (dims < DIM)[None, :], other=0.0)
        elif CHECK_ROWS:
            return tl.load(pointers, mask=(start + rows < length)[:, None], other=0.0)
        elif BLOCK_DIM != DIM:
            return tl.load(pointers, mask=(dims < DIM)[None, :], other=0.0)
        else:
            return tl.load(pointers)


@triton.jit
def store_rows(
    target,
    strides,
    tile,
    batch,
    head,
    start,
    length,
    DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Write ``tile`` [BLOCK_ROWS, BLOCK_DIM] to the rows of one head that exist."""
    base = _row_pointer(target, strides, batch, head, start)
    rows = tl.arange(0, BLOCK_ROWS)
    dims = tl.arange(0, BLOCK_DIM)
    mask = (start + rows < length)[:, None] & (dims < DIM)[None, :]
    tl.store(base + rows[:, None] * strides[2] + dims[None, :], tile.to(target.dtype.element_ty), mask=mask)


@triton.jit
def count_runs(schedule, IS_CUT: tl.constexpr, OF_ALL: tl.constexpr):
    """The number of runs in one list of a schedule, or in both."""
    if OF_ALL:
        return tl.load(schedule) + tl.load(schedule + 1)
    else:
        return tl.load(schedule + (1 - IS_CUT))


@triton.jit
def load_run(schedule, run, max_runs, IS_CUT: tl.constexpr, OF_ALL: tl.constexpr):
    """First and end tile of a run: cut runs lie at the front, full ones at the back. ``OF_ALL`` counts through both."""
    if OF_ALL:
        num_cut = tl.load(schedule)
        pair = schedule + tl.where(run < num_cut, 2 + 2 * run, 2 * (max_runs + num_cut) - 2 * run)
    else:
        pair = schedule + (2 + 2 * run if IS_CUT else 2 * max_runs - 2 * run)
    return tl.load(pair), tl.load(pair + 1)


@triton.jit
def hidden_elements(bounds, rows, columns, q_len, kv_len, NUM_PLANES: tl.constexpr):
    """True where a row does not see a column. ``rows`` and ``columns`` broadcast to the tile, in either orientation.

    ``bounds`` points at the planes of one mask, [NUM_PLANES, kv_len]. Columns past the last key are hidden.
    """
    exists = columns < kv_len
    if NUM_PLANES == 1:
        lts = tl.load(bounds + columns, mask=exists, other=0)
        return (rows >= lts) | (columns - (kv_len - q_len) > rows)
    elif NUM_PLANES == 2:
        lts = tl.load(bounds + columns, mask=exists, other=0)
        ute = tl.load(bounds + kv_len + columns, mask=exists, other=0)
        return (rows >= lts) | (rows < ute)
    else:
        hidden = (columns >= kv_len) & (rows >= 0)
        for interval in tl.static_range(NUM_PLANES // 2):
            plane = bounds + 2 * interval * kv_len.to(tl.int64)
            start = tl.load(plane + columns, mask=exists, other=0)
            end = tl.load(plane + kv_len + columns, mask=exists, other=0)
            hidden |= (rows >= start) & (rows < end)
        return hidden


@triton.jit
def holds_nan(tile):
    """Whether an element of ``tile`` is NaN; infinities of either sign may pass for one."""
    total = tl.sum(tl.sum(tile, 1), 0)
    return total != total


@triton.jit
def dot_of_visible(weights, hidden, tile, accumulator, PRECISION: tl.constexpr):
    """accumulator + weights @ tile without the products of hidden weights, which may be 0 x NaN.

    A row that sees NaN or infinity becomes NaN.
    """
    finite = tl.abs(tile.to(tl.float32)) < float("inf")
    seen = tl.dot(tl.where(hidden, 0.0, 1.0).to(tl.float16), tl.where(finite, 0.0, 1.0).to(tl.float16))
    finite_tile = tl.where(finite, tile, 0.0).to(tile.dtype)
    product = tl.dot(weights.to(tile.dtype), finite_tile, accumulator, input_precision=PRECISION)
    return tl.where(seen > 0.0, float("nan"), product)


@triton.jit
def kept_elements(seed, batch_head, rows, columns, drop_below):
    """True where dropout keeps a weight, as in `dropout.kept_elements`. ``rows`` and ``columns`` broadcast."""
    bits, _, _, _ = tl.philox(tl.load(seed), columns, rows, batch_head, 0 * batch_head)
    return (bits >> 8).to(tl.int32) >= drop_below


@triton.jit
def soft_capped(scores, softcap):
    """softcap * tanh(scores / softcap), by a tanh that every backend has."""
    return softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)
