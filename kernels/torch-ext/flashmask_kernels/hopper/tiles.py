"""What the forward and the backward kernels share: dealing out work, buffers and their barriers, masking cut tiles.

The warps of a thread block have different tasks. The scheduler draws pieces of work (one row tile or column tile of
one head) from a counter, each shortly before it is used. The producer loads their tiles by TMA. Where a piece is a row
tile, two warps make the masks of its cut tiles from the bounds. Two consumers of four warps each compute 64 rows or
columns. They synchronise by barriers in shared memory: a `full` barrier tells that a buffer holds a tile, an `empty`
one that it may be overwritten.
"""

import functools

import torch
from torch import Tensor

from ..launch.launcher import num_processors
from ..launch.tile_sources import descriptors_can_address
from ..schedule import tiles_in
from .gluon_api import TensorDescriptor, aggregate, async_load, gl, gluon, mbarrier

# 3 x 128 threads with 168 registers fill the register file; of these, consumers take 240 and leave 24 to the others.
LAUNCH_OPTIONS = {"num_warps": 4, "maxnreg": 168}
REGISTERS = gl.constexpr([240, 24, 24])
REGISTERS_WITH_MASKS = gl.constexpr([240, 24, 24, 24])
_BYTES_IN_L2 = 32 << 20
_FEWEST_TILES = 400  # three for each processor
# The next piece of work is drawn when so many tiles of this one remain to be loaded: long enough for the draw.
TILES_LEFT = gl.constexpr(2)
_MASK_LAYOUT = gl.constexpr(gl.BlockedLayout([4, 1], [1, 32], [1, 2], [1, 0]))
_DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, torch.float32: gl.float32}


def tile_source(tensor: Tensor, *block: int) -> TensorDescriptor:
    """The TMA descriptor of ``tensor`` for tiles of shape ``block``."""
    layout = _tile_layout(block, tensor.dtype)
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block), layout)


@functools.lru_cache
def _tile_layout(block: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(block), _DTYPES[dtype])


def padded_dim(dim: int) -> int:
    """Width of a tile for a head size; TMA fills what lies past the head with 0."""
    return 64 if dim <= 64 else 128 if dim <= 128 else 256


def addressable(tensor: Tensor) -> Tensor:
    """``tensor``, copied if TMA cannot read it where it is: expanded, or at an odd address."""
    return tensor if descriptors_can_address(tensor) else tensor.clone(memory_format=torch.contiguous_format)


def new_counters(count: int, device: torch.device) -> list[Tensor]:
    """Integers that start at 0: kernels count pieces of work in them, and note NaN."""
    return list(torch.zeros(count, dtype=torch.int32, device=device).split(1))


def heads_per_group(num_heads: int, tiles_per_head: int, *visited: Tensor) -> int:
    """How many of ``num_heads`` the programs work on at the same time where rows are long: as many as fit into L2 with
    their part of ``visited``, which all tiles of a head read, but enough that a group has many tiles, because at its
    end some programs are idle.
    """
    size = sum(tensor.numel() * tensor.element_size() for tensor in visited) // visited[0].shape[0]
    fewest = max(num_heads * _BYTES_IN_L2 // size, tiles_in(_FEWEST_TILES, tiles_per_head), 1)
    return next((count for count in range(fewest, num_heads) if num_heads % count == 0), num_heads)


def num_programs(device: torch.device, num_items: int) -> int:
    """One persistent program for each processor."""
    return min(num_processors(device), num_items)


@gluon.jit
def make_barriers(NUM: gl.constexpr, COUNT: gl.constexpr):
    """Barriers that complete a phase when ``COUNT`` arrived."""
    barriers = gl.allocate_shared_memory(gl.int64, [NUM, 1], mbarrier.MBarrierLayout())
    for index in gl.static_range(NUM):
        mbarrier.init(barriers.index(index), count=COUNT)
    return barriers


@gluon.jit
def make_scalars(NUM: gl.constexpr):
    return gl.allocate_shared_memory(gl.int32, [NUM, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def store_scalar(buffer, value):
    buffer.store(gl.full([1], value, gl.int32, gl.BlockedLayout([1], [32], [gl.num_warps()], [0])))


@gluon.jit
def load_scalar(buffer):
    return gl.max(buffer.load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), 0)


@gluon.jit
def forgotten(index):
    """``index``, of which the compiler does not know that it never changes. It would compute all matrix descriptors of
    a buffer before a loop and spill them: dQ of heads of 256 took 54 instead of 39 ms (32K tokens, causal).
    """
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [index], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def load_run(runs, run, max_runs, IS_CUT: gl.constexpr):
    """First and end tile of a run in one list of a schedule: cut runs from the front, full ones from the back."""
    pair = runs + (2 + 2 * run if IS_CUT else 2 * max_runs - 2 * run)
    return gl.load(pair), gl.load(pair + 1)


@gluon.jit
def _count_tiles(runs, max_runs, IS_CUT: gl.constexpr):
    count = 0
    for run in range(gl.load(runs + (1 - IS_CUT))):
        first_tile, end_tile = load_run(runs, run, max_runs, IS_CUT)
        count += end_tile - first_tile
    return count


@gluon.jit
def _rows_are_long(schedule, num_tiles, max_runs, BLOCK: gl.constexpr):
    """Whether four tiles of the first mask visit more than 4096 rows or columns, by ``BLOCK``, on average."""
    visited = 0
    for eighth in gl.static_range(1, 8, 2):
        runs = schedule + (num_tiles * eighth // 8).to(gl.int64) * (2 + 2 * max_runs)
        visited += _count_tiles(runs, max_runs, 1) + _count_tiles(runs, max_runs, 0)
    return visited * BLOCK > 4 * 4096


@aggregate
class Ring:
    """Buffers that one partition fills and others empty, in turn. They start empty: to wait for the phase before the
    first one succeeds at once.
    """

    tiles: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, tiles, full, empty):
        self.tiles, self.full, self.empty = tiles, full, empty

    @gluon.jit
    def load(self, source, coordinates, index, phase):
        """Fill a buffer by TMA once it is empty."""
        mbarrier.wait(self.empty.index(index), phase)
        mbarrier.expect(self.full.index(index), source.block_type.nbytes)
        async_load(source, coordinates, self.full.index(index), self.tiles.index(index))

    @gluon.jit
    def wait(self, index, phase):
        mbarrier.wait(self.full.index(index), phase)

    @gluon.jit
    def store(self, values, step):
        """Fill the buffer of that step from registers."""
        STAGES: gl.constexpr = self.tiles.shape[0]
        mbarrier.wait(self.empty.index(step % STAGES), (step // STAGES & 1) ^ 1)
        self.tiles.index(step % STAGES).store(values)
        mbarrier.arrive(self.full.index(step % STAGES), count=1)

    @gluon.jit
    def take(self, layout: gl.constexpr, step):
        """What `store` filled in at that step."""
        STAGES: gl.constexpr = self.tiles.shape[0]
        mbarrier.wait(self.full.index(step % STAGES), step // STAGES & 1)
        values = self.tiles.index(step % STAGES).load(layout)
        mbarrier.arrive(self.empty.index(step % STAGES), count=1)
        return values

    @gluon.jit
    def release(self, index):
        mbarrier.arrive(self.empty.index(index), count=1)


@aggregate
class Work:
    """The piece of work that `deal_out_work` hands over next: tile, batch * heads + head, and the numbers of cut and
    full tiles to visit; tile -1 ends it.
    """

    item: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, item, full, empty):
        self.item, self.full, self.empty = item, full, empty

    @gluon.jit
    def read(self, number):
        """The piece of that number."""
        mbarrier.wait(self.full, number & 1)
        tile = load_scalar(self.item.index(0))
        batch_head = load_scalar(self.item.index(1))
        num_cut = load_scalar(self.item.index(2))
        num_full = load_scalar(self.item.index(3))
        return tile, batch_head, num_cut, num_full

    @gluon.jit
    def take(self, number):
        """The piece of that number, which this reader no longer needs then."""
        piece = self.read(number)
        mbarrier.arrive(self.empty, count=1)
        return piece

    @gluon.jit
    def draw_next(self, is_due):
        """What the producer does in the place of `take`, once for each piece."""
        if is_due:
            mbarrier.arrive(self.empty, count=1)


@gluon.jit
def make_work(READERS: gl.constexpr):
    return Work(make_scalars(4), make_barriers(1, 1).index(0), make_barriers(1, READERS).index(0))


@aggregate
class Lists:
    """The lists of a schedule, one for each tile of each mask, and which mask a head has."""

    schedule: gl.tensor
    num_tiles: gl.tensor
    mask_stride_b: gl.tensor
    max_runs: gl.tensor
    HEADS: gl.constexpr
    HEADS_PER_MASK: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, schedule, num_tiles, mask_stride_b, max_runs, HEADS, HEADS_PER_MASK):
        self.schedule, self.num_tiles = schedule, num_tiles
        self.mask_stride_b, self.max_runs = mask_stride_b, max_runs
        self.HEADS, self.HEADS_PER_MASK = gl.constexpr(HEADS), gl.constexpr(HEADS_PER_MASK)

    @gluon.jit
    def mask_of(self, batch_head):
        batch = batch_head // self.HEADS
        return (batch * self.mask_stride_b + batch_head % self.HEADS // self.HEADS_PER_MASK).to(gl.int64)

    @gluon.jit
    def runs_of(self, batch_head, tile):
        """Where the list of a tile begins."""
        mask = self.mask_of(batch_head)
        return self.schedule + (mask * self.num_tiles + tile) * (2 + 2 * self.max_runs)


@gluon.jit
def deal_out_work(lists, counter, work, num_items, heads_per_group, BLOCK: gl.constexpr, LAST_FIRST: gl.constexpr):
    """The scheduler.

    The tiles with most work under a causal mask come first, after the tile of global tokens.

    Long rows take heads in groups, so that what their tiles visit stays in L2: 32K tokens, 32 / 32 heads, D = 128, full
    29.7, 53.3 and 36.4 ms (forward, dK/dV, dQ) instead of 31.7, 60.0 and 42.3, prefix-LM 16.9, 32.4 and 22.5 instead of
    19.2, 36.5 and 26.6, causal as fast. Others take all heads, neighbours in memory: documents of 800 tokens 0.77 ms
    forward instead of 0.94. Groups of few tiles end unevenly: 8K, 32 / 8 heads, causal, dK/dV 2.00 instead of 1.63 ms.
    """
    num_tiles = lists.num_tiles
    max_runs = lists.max_runs
    if heads_per_group < lists.HEADS:
        is_long = _rows_are_long(lists.schedule, num_tiles, max_runs, BLOCK)
        heads_per_group = gl.where(is_long, heads_per_group, lists.HEADS)
    num_heads = num_items // num_tiles
    number = 0
    item = gl.program_id(0)
    while item < num_items:
        # The first tile of all heads comes first: that of global tokens takes longer than a whole group may.
        tile = 0
        batch_head = item
        if item >= num_heads:
            within = (item - num_heads) % ((num_tiles - 1) * heads_per_group)
            group = (item - num_heads) // ((num_tiles - 1) * heads_per_group)
            tile = 1 + within // heads_per_group
            if LAST_FIRST:
                tile = num_tiles - tile
            batch_head = group * heads_per_group + within % heads_per_group
        runs = lists.runs_of(batch_head, tile)
        store_scalar(work.item.index(0), tile)
        store_scalar(work.item.index(1), batch_head)
        store_scalar(work.item.index(2), _count_tiles(runs, max_runs, 1))
        store_scalar(work.item.index(3), _count_tiles(runs, max_runs, 0))
        mbarrier.arrive(work.full, count=1)
        # Drawn only when the producer has nearly loaded the last piece: an idle processor could compute one that waits.
        mbarrier.wait(work.empty, number & 1)
        item = gl.atomic_add(counter, 1) + gl.num_programs(0)
        number += 1
    store_scalar(work.item.index(0), -1)
    mbarrier.arrive(work.full, count=1)


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
def _hand_over_mask(visible, masks, step):
    masks.store(visible, step)
    return step + 1


@gluon.jit
def make_masks(
    bounds, lists, masks, work, q_len, kv_len,
    NUM_PLANES: gl.constexpr, BLOCK_N: gl.constexpr, FIRST_IS_MASKED: gl.constexpr,
):  # fmt: skip
    """Make the masks of each row tile's cut tiles; with ``FIRST_IS_MASKED`` also that of a first tile that is full.

    Consumers that loaded the bounds of all their columns themselves took 7.0 instead of 4.1 ms forward with global
    tokens and a window (32K tokens, C = 4) and 20.3 instead of 16.5 ms with evictions (C = 1).
    """
    number = 0
    step = 0
    row_tile, batch_head, num_cut, num_full = work.take(number)
    while row_tile >= 0:
        mask_bounds = bounds + lists.mask_of(batch_head) * NUM_PLANES * kv_len
        runs = lists.runs_of(batch_head, row_tile)
        for run in range(gl.load(runs)):
            first_tile, end_tile = load_run(runs, run, lists.max_runs, 1)
            for column_tile in range(first_tile, end_tile):
                first_column = column_tile * BLOCK_N
                visible = _visible_rows(mask_bounds, row_tile * 128, first_column, q_len, kv_len, NUM_PLANES, BLOCK_N)
                step = _hand_over_mask(visible, masks, step)
        if FIRST_IS_MASKED and (num_cut == 0) & (num_full > 0):
            all_visible = gl.full([4, BLOCK_N], -1, gl.int32, _MASK_LAYOUT)
            step = _hand_over_mask(all_visible, masks, step)
        number += 1
        row_tile, batch_head, num_cut, num_full = work.take(number)


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


@gluon.jit
def hide_by_mask(values, hidden_value, masks, step, BLOCK_N: gl.constexpr, consumer: gl.constexpr):
    """``values`` [64, BLOCK_N], with ``hidden_value`` where the mask number ``step`` of `make_masks` has no bit."""
    layout: gl.constexpr = _words_layout(BLOCK_N)
    STAGES: gl.constexpr = masks.tiles.shape[0]
    stage = step % STAGES
    masks.wait(stage, step // STAGES & 1)
    words = masks.tiles.index(stage).slice(2 * consumer, 2).load(gl.SliceLayout(1, layout))
    rows = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    bits = gl.expand_dims(gl.expand_dims(1 << rows, 0), 2)
    by_words = gl.convert_layout(values.reshape([2, 32, BLOCK_N]), layout, assert_trivial=True)
    by_words = gl.where((gl.expand_dims(words, 1) & bits) != 0, by_words, hidden_value)
    masks.release(stage)
    return gl.convert_layout(by_words.reshape([64, BLOCK_N]), values.type.layout, assert_trivial=True)


@gluon.jit
def note_nan(has_nan, tile):
    """Set the flag if there is NaN in ``tile`` [64, N]; infinities of either sign may pass for one."""
    sums = gl.sum(tile, 1)
    gl.store(has_nan + gl.zeros_like(sums).to(gl.int32), 1, mask=sums != sums)


@gluon.constexpr_function
def _stored_layout(num_warps, block_dim):
    """Four neighbours a thread: pairs of threads swap what wgmma's result gives them, without shared memory."""
    columns = block_dim * 4 // num_warps
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [8, 0], *[[0, 16 << i] for i in range((columns // 16).bit_length() - 1)]],
        lane_bases=[[0, 8], [0, 4], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0], *([[0, columns]] if num_warps == 8 else [])],
        block_bases=[],
        shape=[64, block_dim],
    )


@gluon.jit
def store_rows(
    target, strides, tile, batch, head, first, length, DIM: gl.constexpr, BLOCK_DIM: gl.constexpr
):  # fmt: skip
    """Write ``tile`` [64, BLOCK_DIM] to the rows of one head that exist, 8 bytes a thread."""
    layout: gl.constexpr = _stored_layout(gl.num_warps(), BLOCK_DIM)
    tile = gl.convert_layout(tile.to(target.dtype.element_ty), layout)
    rows = gl.arange(0, 64, gl.SliceLayout(1, layout))
    dims = gl.arange(0, BLOCK_DIM, gl.SliceLayout(0, layout))
    base = target + batch.to(gl.int64) * strides[0] + head.to(gl.int64) * strides[1] + first.to(gl.int64) * strides[2]
    mask = (first + rows < length)[:, None] & (dims < DIM)[None, :]
    gl.store(base + rows[:, None] * strides[2] + dims[None, :], tile, mask=mask)
