"""How the work is divided: over the programs, and over the warps of each.

The warps of a thread block have different tasks. The scheduler draws pieces of work (one row tile or column tile of
one head) from a counter, each shortly before it is used. The producer loads their tiles by TMA. Where a piece is a row
tile, two warps make the masks of its cut tiles from the bounds. Two consumers of four warps each compute 64 rows or
columns, or of wide heads a part of the dims or one of the gradients.
"""

import torch
from torch import Tensor

from ..launch.launcher import num_processors
from ..schedule import tiles_in
from .gluon_api import aggregate, gl, gluon, mbarrier
from .tiles import load_scalar, make_barriers, make_scalars, store_scalar

# 3 x 128 threads with 168 registers fill the register file; of these, consumers take 240 and leave 24 to the others.
LAUNCH_OPTIONS = {"num_warps": 4, "maxnreg": 168}
REGISTERS = gl.constexpr([240, 24, 24])
REGISTERS_WITH_MASKS = gl.constexpr([240, 24, 24, 24])
# Of heads past 256: their tiles of scores are small, and their producer loads each in two parts.
REGISTERS_OF_PARTS = gl.constexpr([224, 56, 56])
REGISTERS_OF_PARTS_WITH_MASKS = gl.constexpr([224, 56, 56, 56])
# The next piece of work is drawn when so many tiles of this one remain to be loaded: long enough for the draw.
TILES_LEFT = gl.constexpr(2)
_BYTES_IN_L2 = 32 << 20
_FEWEST_TILES = 400  # three for each processor


def new_counters(count: int, device: torch.device) -> list[Tensor]:
    """Integers that start at 0: kernels count pieces of work in them, and note NaN."""
    return list(torch.zeros(count, dtype=torch.int32, device=device).unbind())


def heads_at_a_time(num_heads: int, tiles_per_head: int, *visited: Tensor) -> int:
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
class ScheduleLists:
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


@aggregate
class Work:
    """The piece of work that `assign_work` hands over next: tile, batch * heads + head, and the numbers of cut and
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


@gluon.jit
def assign_work(lists, counter, work, num_items, heads_at_a_time, BLOCK: gl.constexpr, LAST_FIRST: gl.constexpr):
    """The scheduler.

    The tiles with most work under a causal mask come first, after the tile of global tokens.

    Long rows take heads in groups, so that what their tiles visit stays in L2: 32K tokens, 32 / 32 heads, D = 128, full
    29.7, 53.3 and 36.4 ms (forward, dK/dV, dQ) instead of 31.7, 60.0 and 42.3, prefix-LM 16.9, 32.4 and 22.5 instead of
    19.2, 36.5 and 26.6, causal as fast. Others take all heads, neighbours in memory: documents of 800 tokens 0.77 ms
    forward instead of 0.94. Groups of few tiles end unevenly: 8K, 32 / 8 heads, causal, dK/dV 2.00 instead of 1.63 ms.
    """
    num_tiles = lists.num_tiles
    max_runs = lists.max_runs
    if heads_at_a_time < lists.HEADS:
        is_long = _rows_are_long(lists.schedule, num_tiles, max_runs, BLOCK)
        heads_at_a_time = gl.where(is_long, heads_at_a_time, lists.HEADS)
    num_heads = num_items // num_tiles
    number = 0
    item = gl.program_id(0)
    while item < num_items:
        # The first tile of all heads comes first: that of global tokens takes longer than a whole group may.
        tile = 0
        batch_head = item
        if item >= num_heads:
            within = (item - num_heads) % ((num_tiles - 1) * heads_at_a_time)
            group = (item - num_heads) // ((num_tiles - 1) * heads_at_a_time)
            tile = 1 + within // heads_at_a_time
            if LAST_FIRST:
                tile = num_tiles - tile
            batch_head = group * heads_at_a_time + within % heads_at_a_time
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
