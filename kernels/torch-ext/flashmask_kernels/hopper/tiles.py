"""Tiles in memory: how TMA reads them, the buffers through which warps hand them over, and how results are written.

Warps synchronise by barriers in shared memory: a `full` barrier tells that a buffer holds a tile, an `empty` one that
it may be overwritten.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .gluon_api import TensorDescriptor, aggregate, async_load, gl, gluon, hopper, mbarrier

_DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, torch.float32: gl.float32}


class TileWidths(NamedTuple):
    """How the dims of a head are cut into tiles; TMA fills what lies past the head with 0.

    Attributes:
        block_dim, block_dim_v: dims of a tile of Q and K, and of V.
        parts: tiles beside each other. Two consumers hold the sums of 256 dims each.
    """

    block_dim: int
    block_dim_v: int
    parts: int

    @classmethod
    def of(cls, dim: int, dim_v: int) -> "TileWidths":
        if max(dim, dim_v) > 256:
            return cls(256, 256, 2)
        return cls(_padded(dim), _padded(dim_v), 1)


def _padded(dim: int) -> int:
    return 64 if dim <= 64 else 128 if dim <= 128 else 256


def tma_source(tensor: Tensor, block: tuple[int, ...]) -> TensorDescriptor:
    """The TMA descriptor of ``tensor`` for tiles of ``block`` in its last dimensions."""
    block = (1,) * (tensor.dim() - len(block)) + block
    layout = _tile_layout(block, tensor.dtype)
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block), layout)


@functools.lru_cache
def _tile_layout(block: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(block), _DTYPES[dtype])


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
def hidden_from_compiler(index):
    """``index``, of which the compiler does not know that it never changes. It would compute all matrix descriptors of
    a buffer before a loop and spill them: dQ of heads of 256 took 54 instead of 39 ms (32K tokens, causal).
    """
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [index], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def load_parts(source, coordinates, full, tiles, index, PARTS: gl.constexpr):
    """Fill a buffer by TMA: ``PARTS`` tiles of neighbouring dims, from the row with these coordinates on."""
    BLOCK_DIM: gl.constexpr = source.block_type.shape[3]
    batch, head, row = coordinates
    for part in gl.static_range(PARTS):
        async_load(source, [batch, head, row, part * BLOCK_DIM], full, tiles.index(index * PARTS + part))


@gluon.jit
def tile_of(tiles, index):
    """What TMA loaded into the buffer, [rows, dims]."""
    ROWS: gl.constexpr = tiles.shape[3]
    BLOCK_DIM: gl.constexpr = tiles.shape[4]
    return tiles.index(index).reshape([ROWS, BLOCK_DIM])


@gluon.jit
def held_dims(tile, MOST: gl.constexpr, layout: gl.constexpr):
    """The first dims of a tile, at most ``MOST``, in registers: for products with that layout, its rows on the left.

    Two operands of 64 x 64 in shared memory take as long to read as to multiply.
    """
    DIMS: gl.constexpr = MOST if tile.shape[1] > MOST else tile.shape[1]
    return tile.slice(0, DIMS, 1).load(gl.DotOperandLayout(0, layout, 2))


@gluon.constexpr_function
def _doublings(number, end):
    return (end // number).bit_length() - 1


@gluon.jit
def product_over_dims(
    left, left_index, right, right_index, layout: gl.constexpr, PARTS: gl.constexpr, held=None, sums=None
):  # fmt: skip
    """``left @ right.T`` of two buffers of ``PARTS`` tiles, issued; added to ``sums``, if given. ``held`` has the first
    dims of ``left``.
    """
    ROWS: gl.constexpr = left.shape[3]
    COLUMNS: gl.constexpr = right.shape[3]
    ADD: gl.constexpr = sums is not None
    if sums is None:
        sums = gl.zeros([ROWS, COLUMNS], gl.float32, layout)
    for part in gl.static_range(PARTS):
        rows = tile_of(left, left_index * PARTS + part)
        columns = tile_of(right, right_index * PARTS + part)
        if held is None or part > 0:
            sums = hopper.warpgroup_mma(rows, columns.permute([1, 0]), sums, use_acc=ADD or part > 0, is_async=True)
        else:
            HELD: gl.constexpr = held.shape[1]
            held_columns = columns.slice(0, HELD, 1).permute([1, 0])
            sums = hopper.warpgroup_mma(held, held_columns, sums, use_acc=ADD, is_async=True)
            for doubling in gl.static_range(_doublings(HELD, columns.shape[1])):
                # Slices have powers of two as sizes: as many dims as were multiplied before.
                next_rows = rows.slice(HELD << doubling, HELD << doubling, 1)
                next_columns = columns.slice(HELD << doubling, HELD << doubling, 1).permute([1, 0])
                sums = hopper.warpgroup_mma(next_rows, next_columns, sums, is_async=True)
    return sums


@gluon.jit
def times_statistic(tile, factor, layout: gl.constexpr):
    """``factor`` times a statistic of each row of queries, as [64 keys, rows]: what a sum of products begins with.

    Scores that begin with the log-sum-exp need no registers for it later, nor a subtraction. The assembly makes each
    register a value of its own: ptxas would copy values that several share between the products, and wait for those
    before (C7517).
    """
    ROWS: gl.constexpr = tile.shape[1]
    value = tile.load(layout).broadcast_to([64, ROWS])
    return gl.inline_asm_elementwise(
        "mul.f32 $0, $1, $2;", "=f,f,f", [value, gl.full([64, ROWS], factor, gl.float32, layout)],
        dtype=gl.float32, is_pure=False, pack=1,
    )  # fmt: skip


@aggregate
class Ring:
    """Buffers that one partition fills and others empty, in turn. They start empty: to wait for the phase before the
    first one succeeds at once. A buffer for TMA has one or two tiles.
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
        PARTS: gl.constexpr = self.tiles.shape[0] // self.full.shape[0]
        mbarrier.wait(self.empty.index(index), phase)
        mbarrier.expect(self.full.index(index), PARTS * source.block_type.nbytes)
        load_parts(source, coordinates, self.full.index(index), self.tiles, index, PARTS)

    @gluon.jit
    def load_both(self, source, other_source, other_tiles, coordinates, index, phase):
        """Fill a buffer by TMA once it is empty, and the same one of ``other_tiles``, which shares its barriers."""
        PARTS: gl.constexpr = self.tiles.shape[0] // self.full.shape[0]
        mbarrier.wait(self.empty.index(index), phase)
        mbarrier.expect(self.full.index(index), PARTS * (source.block_type.nbytes + other_source.block_type.nbytes))
        load_parts(source, coordinates, self.full.index(index), self.tiles, index, PARTS)
        load_parts(other_source, coordinates, self.full.index(index), other_tiles, index, PARTS)

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
    target, strides, tile, batch, head, first, first_dim, length, DIM: gl.constexpr, BLOCK_DIM: gl.constexpr
):  # fmt: skip
    """Write ``tile`` [64, BLOCK_DIM] to the rows and dims of one head that exist, 8 bytes a thread."""
    layout: gl.constexpr = _stored_layout(gl.num_warps(), BLOCK_DIM)
    tile = gl.convert_layout(tile.to(target.dtype.element_ty), layout)
    rows = gl.arange(0, 64, gl.SliceLayout(1, layout))
    dims = first_dim + gl.arange(0, BLOCK_DIM, gl.SliceLayout(0, layout))
    base = target + batch.to(gl.int64) * strides[0] + head.to(gl.int64) * strides[1] + first.to(gl.int64) * strides[2]
    mask = (first + rows < length)[:, None] & (dims < DIM)[None, :]
    gl.store(base + rows[:, None] * strides[2] + dims[None, :], tile, mask=mask)
