"""Which scores of a cut tile are hidden: by bounds that a consumer holds in registers, or by bits that two warps make
of them for both consumers.
"""

from .gluon_api import gl, gluon
from .tiles import Ring, make_barriers
from .work import load_run

_MASK_LAYOUT = gl.constexpr(gl.BlockedLayout([4, 1], [1, 32], [1, 2], [1, 0]))


@gluon.jit
def load_planes(bounds, columns, q_len, kv_len, NUM_PLANES: gl.constexpr):
    """For masks with one or two planes: the rows at which the visible rows of each column end, and begin."""
    if NUM_PLANES > 2:
        return columns, columns
    # A column past the last key is hidden from row 0 on.
    lts = gl.load(bounds + columns, mask=columns < kv_len, other=0)
    if NUM_PLANES == 1:
        return lts, columns - (kv_len - q_len)
    return lts, gl.load(bounds + kv_len + columns, mask=columns < kv_len, other=0)


@gluon.jit
def hide(values, hidden_value, rows, columns, planes, bounds, kv_len, NUM_PLANES: gl.constexpr):
    """``values`` [columns, rows], with ``hidden_value`` where the row does not see the column.

    ``planes`` are those of `load_planes`. One interval at a time keeps few registers alive.
    """
    row = rows[None, :]
    if NUM_PLANES <= 2:
        lts, ute = planes
        return gl.where((row >= lts[:, None]) | (row < ute[:, None]), hidden_value, values)
    exists = columns < kv_len
    values = gl.where(exists[:, None], values, hidden_value)
    for interval in gl.static_range(NUM_PLANES // 2):
        plane = bounds + 2 * interval * kv_len.to(gl.int64)
        start = gl.load(plane + columns, mask=exists, other=0)[:, None]
        end = gl.load(plane + kv_len + columns, mask=exists, other=0)[:, None]
        values = gl.where((row >= start) & (row < end), hidden_value, values)
    return values


@gluon.jit
def make_mask_ring(BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    """Masks of 128 rows: word ``i`` of a column has the rows from ``32 * i`` on, the first in its lowest bit."""
    masks = gl.allocate_shared_memory(gl.int32, [STAGES, 4, BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    return Ring(masks, make_barriers(STAGES, 1), make_barriers(STAGES, 2))


@gluon.jit
def _rows_from(start, first_row, first_bits):
    """The bits of all rows from ``start`` on."""
    shift = gl.maximum(gl.maximum(start, first_row) - first_row - first_bits, 0)
    return gl.where(shift < 32, -1 << (shift & 31), 0)


@gluon.jit
def _visible_rows(bounds, first_row, first_column, q_len, kv_len, NUM_PLANES: gl.constexpr, BLOCK_N: gl.constexpr):
    columns = first_column + gl.arange(0, BLOCK_N, gl.SliceLayout(0, _MASK_LAYOUT))
    first_bits = (32 * gl.arange(0, 4, gl.SliceLayout(1, _MASK_LAYOUT)))[:, None]
    exists = columns < kv_len
    if NUM_PLANES <= 2:
        start, end = load_planes(bounds, columns, q_len, kv_len, NUM_PLANES)
        hidden = _rows_from(start[None, :], first_row, first_bits) | ~_rows_from(end[None, :], first_row, first_bits)
    else:
        hidden = gl.zeros([4, BLOCK_N], gl.int32, _MASK_LAYOUT)
        for interval in gl.static_range(NUM_PLANES // 2):
            plane = bounds + 2 * interval * kv_len.to(gl.int64)
            start = gl.load(plane + columns, mask=exists, other=0)
            end = gl.load(plane + kv_len + columns, mask=exists, other=0)
            from_start = _rows_from(start[None, :], first_row, first_bits)
            hidden |= from_start & ~_rows_from(end[None, :], first_row, first_bits)
    return gl.where(exists[None, :], ~hidden, 0)


@gluon.jit
def make_masks(
    bounds, lists, masks, work, q_len, kv_len,
    NUM_PLANES: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Make the masks of each row tile's cut tiles.

    Consumers that loaded the bounds of all their columns themselves took 7.0 instead of 4.1 ms forward with global
    tokens and a window (32K tokens, C = 4) and 20.3 instead of 16.5 ms with evictions (C = 1).
    """
    number = 0
    step = 0
    row_tile, batch_head, _num_cut, _num_full = work.take(number)
    while row_tile >= 0:
        mask_bounds = bounds + lists.mask_of(batch_head) * NUM_PLANES * kv_len
        runs = lists.runs_of(batch_head, row_tile)
        for run in range(gl.load(runs)):
            first_tile, end_tile = load_run(runs, run, lists.max_runs, 1)
            for column_tile in range(first_tile, end_tile):
                first_column = column_tile * BLOCK_N
                first_row = row_tile * BLOCK_M
                visible = _visible_rows(mask_bounds, first_row, first_column, q_len, kv_len, NUM_PLANES, BLOCK_N)
                masks.store(visible, step)
                step += 1
        number += 1
        row_tile, batch_head, _num_cut, _num_full = work.take(number)


@gluon.constexpr_function
def _words_layout(block_n):
    """The layout of wgmma's result [64, block_n] seen as [2, 32, block_n]: which rows are in one word of a mask."""
    columns = [[0, 0, 8 << i] for i in range((block_n // 8).bit_length() - 1)]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 1], [0, 8, 0], *columns],
        lane_bases=[[0, 0, 2], [0, 0, 4], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
        warp_bases=[[0, 16, 0], [1, 0, 0]],
        block_bases=[],
        shape=[2, 32, block_n],
    )


@gluon.constexpr_function
def _select_by_bit(hidden_value):
    """The assembly that keeps a value where its word has the bit. LLVM vectorises the test of 64 bits and its results:
    it packs them into words and takes them out again, 250 of the 780 instructions for a cut tile.
    """
    hidden = {0.0: "0f00000000", float("-inf"): "0fff800000"}[hidden_value]
    return (
        "{ .reg .b32 bit; .reg .pred seen; and.b32 bit, $2, $3; setp.ne.b32 seen, bit, 0; "
        f"selp.f32 $0, $1, {hidden}, seen; }}"
    )


@gluon.jit
def hide_by_mask(
    values, hidden_value: gl.constexpr, masks, step, BLOCK_N: gl.constexpr, half: gl.constexpr
):  # fmt: skip
    """``values`` [64, BLOCK_N], with ``hidden_value`` where the mask number ``step`` of `make_masks` has no bit.

    ``half``: of its 128 rows.
    """
    layout: gl.constexpr = _words_layout(BLOCK_N)
    STAGES: gl.constexpr = masks.tiles.shape[0]
    stage = step % STAGES
    masks.wait(stage, step // STAGES & 1)
    words = masks.tiles.index(stage).slice(2 * half, 2).load(gl.SliceLayout(1, layout))
    rows = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    bits = gl.expand_dims(gl.expand_dims(1 << rows, 0), 2)
    by_words = gl.convert_layout(values.reshape([2, 32, BLOCK_N]), layout, assert_trivial=True)
    by_words = gl.inline_asm_elementwise(
        _select_by_bit(hidden_value), "=f,f,r,r", [by_words, gl.expand_dims(words, 1), bits],
        dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip
    masks.release(stage)
    return gl.convert_layout(by_words.reshape([64, BLOCK_N]), values.type.layout, assert_trivial=True)
