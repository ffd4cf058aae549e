"""FlashMask's backward pass for sm_90 in one kernel, for head sizes to 64: five matrix products of each tile.

Two consumers make dK and dV of a column tile, as in `backward`. A third warpgroup makes dQ from the dS that they leave
in shared memory, and adds it to float32 in global memory. The order of these additions changes from call to call: dQ is
not bitwise repeatable.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.nan_repair import redo_backward
from ..common.row_statistics import RowStatistics
from ..common.tiles import LOG2_E, holds_nan
from ..common.tiles import store_rows as store_tile
from ..configs import Configs
from ..launch.launcher import Launcher
from ..launch.layout import Layout, gradient_layouts
from ..launch.tile_sources import TileSources, addressable_by_tma
from ..schedule import mask_strides, max_runs_of, tiles_in
from .gluon_api import async_load, gl, gluon, hopper, mbarrier
from .masks import hide, load_planes
from .tiles import (
    Ring,
    held_dims,
    load_scalar,
    make_barriers,
    make_scalars,
    note_nan,
    store_rows,
    store_scalar,
    tile_of,
    times_statistic,
    tma_source,
)
from .work import (
    TILES_LEFT,
    ScheduleLists,
    assign_work,
    heads_at_a_time,
    load_run,
    make_work,
    new_counters,
    num_programs,
)

# 4 x 128 threads with 128 registers fill the register file: each consumer takes 192, dQ 104, and the others 24.
_LAUNCH_OPTIONS = {"num_warps": 4, "maxnreg": 128}
REGISTERS = gl.constexpr([192, 104, 24, 24])
# Both head sizes and the rows of a tile: the layouts below are written for one warpgroup's product of 64 x 64.
BLOCK = gl.constexpr(64)
_D_S_STAGES = gl.constexpr(2)


@gluon.jit
def _produce(
    q, k, v, d_out, lse_2, delta, lists, q_ring, d_out_ring, lse_tiles, delta_tiles, row_tiles, k_ring, v_tiles, work,
    KV_HEADS: gl.constexpr, HEADS_PER_KV_HEAD: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """K and V fill one buffer together, and so do Q, the statistics of its rows and their number."""
    number = 0
    step = 0
    column_tile, batch_kv_head, num_cut, num_full = work.read(number)
    while column_tile >= 0:
        tiles_left = (num_cut + num_full) * HEADS_PER_KV_HEAD
        work.draw_next(tiles_left <= TILES_LEFT)
        batch = batch_kv_head // KV_HEADS
        kv_head = batch_kv_head % KV_HEADS
        runs = lists.runs_of(batch_kv_head, column_tile)
        k_ring.load_both(k, v, v_tiles, [batch, kv_head, column_tile * 128], 0, (number & 1) ^ 1)
        for head in range(kv_head * HEADS_PER_KV_HEAD, (kv_head + 1) * HEADS_PER_KV_HEAD):
            for IS_CUT in gl.static_range(1, -1, -1):
                for run in range(gl.load(runs + (1 - IS_CUT))):
                    first_tile, end_tile = load_run(runs, run, lists.max_runs, IS_CUT)
                    for tile in range(first_tile, end_tile):
                        # From the last row on: under a causal mask all programs then visit the same rows.
                        row_tile = first_tile + end_tile - 1 - tile
                        stage = step % STAGES
                        phase = (step // STAGES & 1) ^ 1
                        full = q_ring.full.index(stage)
                        mbarrier.wait(q_ring.empty.index(stage), phase)
                        store_scalar(row_tiles.index(step % (STAGES + _D_S_STAGES)), row_tile)
                        mbarrier.expect(full, q.block_type.nbytes + 2 * lse_2.block_type.nbytes)
                        async_load(q, [batch, head, row_tile * BLOCK, 0], full, q_ring.tiles.index(stage))
                        rows = [batch * KV_HEADS * HEADS_PER_KV_HEAD + head, row_tile * BLOCK]
                        async_load(lse_2, rows, full, lse_tiles.index(stage))
                        async_load(delta, rows, full, delta_tiles.index(stage))
                        d_out_ring.load(d_out, [batch, head, row_tile * BLOCK], stage, phase)
                        step += 1
                        tiles_left -= 1
                        work.draw_next(tiles_left == TILES_LEFT)
        number += 1
        column_tile, batch_kv_head, num_cut, num_full = work.read(number)


@gluon.jit
def _consume(
    d_k, d_v, has_nan, bounds, lists, q_ring, d_out_ring, lse_tiles, delta_tiles, row_tiles, k_ring, v_tiles, d_s_ring,
    work, d_k_strides, d_v_strides, scale, q_len, kv_len,
    KV_HEADS: gl.constexpr, HEADS_PER_KV_HEAD: gl.constexpr, NUM_PLANES: gl.constexpr, DIM: gl.constexpr,
    DIM_V: gl.constexpr, STAGES: gl.constexpr, consumer: gl.constexpr,
):  # fmt: skip
    """Scores have keys for rows here: P and dS then enter their products from registers."""
    dtype: gl.constexpr = q_ring.tiles.dtype
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    operand_layout: gl.constexpr = gl.DotOperandLayout(0, layout, 2)

    k_tile = tile_of(k_ring.tiles, 0).slice(64 * consumer, 64)
    v_tile = tile_of(v_tiles, 0).slice(64 * consumer, 64)
    factor = scale * LOG2_E
    of_lse = -1.0 / factor
    number = 0
    step = 0
    column_tile, batch_kv_head, num_cut, num_full = work.take(number)
    while column_tile >= 0:
        batch = batch_kv_head // KV_HEADS
        kv_head = batch_kv_head % KV_HEADS
        mask_bounds = bounds + lists.mask_of(batch_kv_head) * NUM_PLANES * kv_len
        first_column = column_tile * 128 + consumer * 64
        columns = first_column + gl.arange(0, 64, gl.SliceLayout(1, layout))
        planes = load_planes(mask_bounds, columns, q_len, kv_len, NUM_PLANES)
        d_k_tile = gl.zeros([64, BLOCK], gl.float32, layout)
        d_v_tile = gl.zeros([64, BLOCK], gl.float32, layout)
        k_ring.wait(0, number & 1)
        held_k = held_dims(k_tile, BLOCK, layout)
        for _ in range(HEADS_PER_KV_HEAD):
            for IS_CUT in gl.static_range(1, -1, -1):
                for _ in range(num_cut if IS_CUT else num_full):
                    stage = step % STAGES
                    phase = step // STAGES & 1
                    q_tile = tile_of(q_ring.tiles, stage)
                    d_out_tile = tile_of(d_out_ring.tiles, stage)
                    q_ring.wait(stage, phase)
                    scores = times_statistic(lse_tiles.index(stage), of_lse, layout)
                    d_p = times_statistic(delta_tiles.index(stage), -1.0, layout)
                    scores = hopper.warpgroup_mma(held_k, q_tile.permute([1, 0]), scores, is_async=True)
                    d_out_ring.wait(stage, phase)
                    d_p = hopper.warpgroup_mma(v_tile, d_out_tile.permute([1, 0]), d_p, is_async=True)
                    scores = hopper.warpgroup_mma_wait(1, [scores])
                    probabilities = gl.exp2(scores * factor)
                    if IS_CUT:
                        row = load_scalar(row_tiles.index(step % (STAGES + _D_S_STAGES))) * BLOCK
                        rows = row + gl.arange(0, BLOCK, gl.SliceLayout(0, layout))
                        probabilities = hide(probabilities, 0.0, rows, columns, planes, mask_bounds, kv_len, NUM_PLANES)
                    p_tile = gl.convert_layout(probabilities.to(dtype), operand_layout)
                    d_v_tile = hopper.warpgroup_mma(p_tile, d_out_tile, d_v_tile, is_async=True)
                    d_p = hopper.warpgroup_mma_wait(1, [d_p])
                    d_scores = (probabilities * d_p).to(dtype)
                    d_s_tile = gl.convert_layout(d_scores, operand_layout)
                    d_k_tile = hopper.warpgroup_mma(d_s_tile, q_tile, d_k_tile, is_async=True)
                    d_s_stage = step % _D_S_STAGES
                    mbarrier.wait(d_s_ring.empty.index(d_s_stage), (step // _D_S_STAGES & 1) ^ 1)
                    d_s_ring.tiles.index(d_s_stage).slice(64 * consumer, 64).store(d_scores)
                    hopper.fence_async_shared()
                    mbarrier.arrive(d_s_ring.full.index(d_s_stage), count=1)
                    d_v_tile = hopper.warpgroup_mma_wait(1, [d_v_tile])
                    d_out_ring.release(stage)
                    d_k_tile = hopper.warpgroup_mma_wait(0, [d_k_tile])
                    q_ring.release(stage)
                    step += 1
        k_ring.release(0)
        note_nan(has_nan, d_k_tile)
        note_nan(has_nan, d_v_tile)
        store_rows(d_k, d_k_strides, d_k_tile * scale, batch, kv_head, first_column, 0, kv_len, DIM, BLOCK)
        store_rows(d_v, d_v_strides, d_v_tile, batch, kv_head, first_column, 0, kv_len, DIM_V, BLOCK)
        number += 1
        column_tile, batch_kv_head, num_cut, num_full = work.take(number)


@gluon.jit
def _make_query_gradients(
    d_q_sums, row_tiles, k_ring, d_s_ring, work, num_row_tiles,
    HEADS_PER_KV_HEAD: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    k_tile = tile_of(k_ring.tiles, 0)
    number = 0
    step = 0
    column_tile, batch_kv_head, num_cut, num_full = work.take(number)
    while column_tile >= 0:
        k_ring.wait(0, number & 1)
        # dQ transposed, for the same reason: K^T is the operand that can stay in registers.
        k_transposed = held_dims(k_tile.permute([1, 0]), 128, layout)
        k_ring.release(0)
        for head in range(HEADS_PER_KV_HEAD):
            first_tile = (batch_kv_head * HEADS_PER_KV_HEAD + head) * num_row_tiles
            for _ in range(num_cut + num_full):
                stage = step % _D_S_STAGES
                d_s_ring.wait(stage, step // _D_S_STAGES & 1)
                row_tile = first_tile + load_scalar(row_tiles.index(step % (STAGES + _D_S_STAGES)))
                d_s_tile = d_s_ring.tiles.index(stage)
                d_q_tile = gl.zeros([BLOCK, BLOCK], gl.float32, layout)
                d_q_tile = hopper.warpgroup_mma(k_transposed, d_s_tile, d_q_tile, use_acc=False, is_async=True)
                d_q_tile = hopper.warpgroup_mma_wait(0, [d_q_tile])
                d_s_ring.release(stage)
                _add_to_sums(d_q_sums + row_tile.to(gl.int64) * (BLOCK * BLOCK), d_q_tile)
                step += 1
        number += 1
        column_tile, batch_kv_head, num_cut, num_full = work.take(number)


# One thread holds, in each group of 8 columns, two neighbours of a row and those of the row 8 below it. The sums have
# these four side by side, so that one instruction adds them. Their order: group of 8 columns, warp (16 rows), row of
# the 8, pair of columns, upper or lower row, column of the pair.
_SUMS_LAYOUT = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[1, 0, 0, 0], [2, 0, 0, 0], [4, 0, 0, 0]],
        lane_bases=[[0, 0, 0, 1], [0, 0, 0, 2], [0, 0, 1, 0], [0, 0, 2, 0], [0, 0, 4, 0]],
        warp_bases=[[0, 1, 0, 0], [0, 2, 0, 0]],
        block_bases=[],
        shape=[8, 4, 8, 4],
    )
)
_FLAT_SUMS_LAYOUT = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[128], [256], [512]],
        lane_bases=[[1], [2], [4], [8], [16]],
        warp_bases=[[32], [64]],
        block_bases=[],
        shape=[1024],
    )
)


@gluon.jit
def _add_to_sums(sums, tile):
    """Add ``tile`` [64, 64], a product of a warpgroup, to float32 sums in the order of its registers."""
    by_thread = tile.reshape([4, 2, 8, 8, 4, 2]).permute([3, 0, 2, 4, 1, 5])
    left, right = gl.split(by_thread)
    upper_left, lower_left = gl.split(left)
    upper_right, lower_right = gl.split(right)
    fours = gl.convert_layout(
        gl.arange(0, 1024, _FLAT_SUMS_LAYOUT).reshape([8, 4, 8, 4]), _SUMS_LAYOUT, assert_trivial=True
    )
    addresses = (sums + 4 * fours).to(gl.int64, bitcast=True)
    gl.inline_asm_elementwise(
        "red.relaxed.gpu.global.add.v4.f32 [$1], {$2, $3, $4, $5}; mov.u32 $0, 0;", "=r,l,f,f,f,f",
        [
            addresses,
            gl.convert_layout(upper_left, _SUMS_LAYOUT, assert_trivial=True),
            gl.convert_layout(upper_right, _SUMS_LAYOUT, assert_trivial=True),
            gl.convert_layout(lower_left, _SUMS_LAYOUT, assert_trivial=True),
            gl.convert_layout(lower_right, _SUMS_LAYOUT, assert_trivial=True),
        ],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit(
    do_not_specialize=[
        "q_len", "kv_len", "num_items", "num_row_tiles", "num_column_tiles", "heads_at_a_time", "mask_stride_b",
        "max_runs",
    ]
)  # fmt: skip
def fused_gradient_kernel(
    q, k, v, d_out, lse_2, delta, d_q_sums, d_k, d_v, bounds, schedule, counter, has_nan, d_k_strides, d_v_strides,
    scale, q_len, kv_len, num_items, num_row_tiles, num_column_tiles, heads_at_a_time, mask_stride_b, max_runs,
    KV_HEADS: gl.constexpr, HEADS_PER_KV_HEAD: gl.constexpr, KV_HEADS_PER_MASK: gl.constexpr,
    NUM_PLANES: gl.constexpr, DIM: gl.constexpr, DIM_V: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    q_tiles = gl.allocate_shared_memory(q.dtype, [STAGES, 1, 1, BLOCK, BLOCK], q.layout)
    d_out_tiles = gl.allocate_shared_memory(d_out.dtype, [STAGES, 1, 1, BLOCK, BLOCK], d_out.layout)
    lse_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK], lse_2.layout)
    delta_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK], delta.layout)
    k_tiles = gl.allocate_shared_memory(k.dtype, [1, 1, 1, 128, BLOCK], k.layout)
    v_tiles = gl.allocate_shared_memory(v.dtype, [1, 1, 1, 128, BLOCK], v.layout)
    d_s_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([128, BLOCK], q.dtype)
    d_s_tiles = gl.allocate_shared_memory(q.dtype, [_D_S_STAGES, 128, BLOCK], d_s_layout)
    # dQ reads a number last: by then the producer may be ahead by the stages of Q and those of dS.
    row_tiles = make_scalars(STAGES + _D_S_STAGES)
    work = make_work(4)
    q_ring = Ring(q_tiles, make_barriers(STAGES, 1), make_barriers(STAGES, 2))
    d_out_ring = Ring(d_out_tiles, make_barriers(STAGES, 1), make_barriers(STAGES, 2))
    k_ring = Ring(k_tiles, make_barriers(1, 1), make_barriers(1, 3))
    d_s_ring = Ring(d_s_tiles, make_barriers(_D_S_STAGES, 2), make_barriers(_D_S_STAGES, 1))
    lists = ScheduleLists(schedule, num_column_tiles, mask_stride_b, max_runs, KV_HEADS, KV_HEADS_PER_MASK)
    hopper.fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (
                d_k, d_v, has_nan, bounds, lists, q_ring, d_out_ring, lse_tiles, delta_tiles, row_tiles, k_ring,
                v_tiles, d_s_ring, work, d_k_strides, d_v_strides, scale, q_len, kv_len,
                KV_HEADS, HEADS_PER_KV_HEAD, NUM_PLANES, DIM, DIM_V, STAGES, 0,
            )),
            (_consume, (
                d_k, d_v, has_nan, bounds, lists, q_ring, d_out_ring, lse_tiles, delta_tiles, row_tiles, k_ring,
                v_tiles, d_s_ring, work, d_k_strides, d_v_strides, scale, q_len, kv_len,
                KV_HEADS, HEADS_PER_KV_HEAD, NUM_PLANES, DIM, DIM_V, STAGES, 1,
            )),
            (_make_query_gradients, (
                d_q_sums, row_tiles, k_ring, d_s_ring, work, num_row_tiles, HEADS_PER_KV_HEAD, STAGES,
            )),
            (_produce, (
                q, k, v, d_out, lse_2, delta, lists, q_ring, d_out_ring, lse_tiles, delta_tiles, row_tiles, k_ring,
                v_tiles, work, KV_HEADS, HEADS_PER_KV_HEAD, STAGES,
            )),
            (assign_work, (lists, counter, work, num_items, heads_at_a_time, BLOCK, False)),
        ],
        [4, 4, 1, 1],
        REGISTERS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["q_len", "num_row_tiles"])
def query_gradient_of_sums_kernel(
    d_q_sums, d_q, has_nan, d_q_strides, scale, q_len, num_row_tiles, NUM_HEADS: tl.constexpr, DIM: tl.constexpr
):
    """dQ of one row tile, from the sums of dQ transposed in the order of `_add_to_sums`."""
    batch_head = tl.program_id(0) // num_row_tiles
    row_tile = tl.program_id(0) % num_row_tiles
    sums = tl.load(d_q_sums + tl.program_id(0).to(tl.int64) * 4096 + tl.arange(0, 4096))
    by_row = tl.permute(tl.reshape(sums, (8, 4, 8, 4, 2, 2)), (0, 3, 5, 1, 4, 2))
    tile = tl.reshape(by_row, (64, 64)) * scale
    if holds_nan(tile):
        tl.store(has_nan, 1)
    store_tile(
        d_q, d_q_strides, tile, batch_head // NUM_HEADS, batch_head % NUM_HEADS, row_tile * 64, q_len, DIM, 64, 64
    )


class FusedAttentionBackward:
    """The backward kernels for inputs of one kind, as `AttentionBackward`, for head sizes to 64.
    dQ is not bitwise repeatable.
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
        mask_stride_b, heads_per_mask = mask_strides(bounds, num_heads)
        heads_per_kv_head = num_heads // kv_heads
        self._row_statistics = RowStatistics(out, d_out, d_lse)
        self._gradient_layouts = gradient_layouts(query, value)
        d_query_strides, d_key_strides, d_value_strides = (layout.strides[:3] for layout in self._gradient_layouts)

        config = configs.key_value_gradient
        num_row_tiles, num_column_tiles = tiles_in(q_len, config.block_m), tiles_in(kv_len, config.block_n)
        num_items = num_column_tiles * batch_size * kv_heads
        self._sums_layout = Layout.of_rows(batch_size, num_heads, num_row_tiles * config.block_m * BLOCK.value)
        statistic = self._row_statistics.layout.new(out, torch.float32).flatten(0, 1)
        rows, columns = (config.block_m, BLOCK.value), (config.block_n, BLOCK.value)
        blocks = rows, columns, columns, rows, (config.block_m,), (config.block_m,)
        self._sources = TileSources(*map(tma_source, (*inputs, statistic, statistic), blocks))
        numbers = (
            d_key_strides,
            d_value_strides,
            scale,
            q_len,
            kv_len,
            num_items,
            num_row_tiles,
            num_column_tiles,
            heads_at_a_time(kv_heads, num_column_tiles, query, d_out),
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
            "STAGES": config.num_stages,
        }
        programs = num_programs(query.device, num_items)
        self._launch = Launcher(fused_gradient_kernel, programs, numbers, constants, **_LAUNCH_OPTIONS)
        self._launch_d_query = Launcher(
            query_gradient_of_sums_kernel,
            num_row_tiles * batch_size * num_heads,
            (d_query_strides, scale, q_len, num_row_tiles),
            {"NUM_HEADS": num_heads, "DIM": dim},
        )
        column_tile, row_tile = config[:2], configs.query_gradient[:2]
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
        sums = self._sums_layout.new(query, torch.float32).zero_()
        counter, has_nan = new_counters(2, query.device)
        self._launch(*self._sources(*inputs, lse_2, delta), sums, d_key, d_value, bounds, by_column, counter, has_nan)
        self._launch_d_query(sums, d_query, has_nan)
        self._redo(has_nan, *inputs, lse_2, delta, *gradients, bounds, by_column, by_row)
        return d_query, d_key, d_value, delta
