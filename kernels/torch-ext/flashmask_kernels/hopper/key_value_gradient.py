"""dK and dV by column tiles. The consumers divide the keys of a tile, or of heads past 128 the gradients."""

from __future__ import annotations

from ..common.tiles import LOG2_E
from .gluon_api import async_load, gl, gluon, hopper, mbarrier
from .masks import hide, load_planes
from .tiles import (
    Ring,
    held_dims,
    hidden_from_compiler,
    load_parts,
    load_scalar,
    make_barriers,
    make_scalars,
    note_nan,
    product_over_dims,
    store_rows,
    store_scalar,
    tile_of,
    times_statistic,
)
from .work import REGISTERS, REGISTERS_OF_PARTS, TILES_LEFT, ScheduleLists, assign_work, load_run, make_work


@gluon.constexpr_function
def _spread(rows):
    """From one buffer of ``rows`` statistics to the next that TMA can fill: it writes to multiples of 128 bytes."""
    return max(32 // rows, 1)


@gluon.jit
def _statistics(tiles, stage):
    return tiles.index(stage * _spread(tiles.shape[2]))


@gluon.jit
def _produce_rows(
    q, k, v, d_out, lse_2, delta, lists, q_ring, d_out_ring, lse_tiles, delta_tiles, row_tiles, k_ring, v_tiles, work,
    KV_HEADS: gl.constexpr, HEADS_PER_KV_HEAD: gl.constexpr, BLOCK_M: gl.constexpr, PARTS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """K and V fill one buffer together, and so do Q, the statistics of its rows and their number."""
    number = 0
    step = 0
    column_tile, part_of_head, num_cut, num_full = work.read(number)
    while column_tile >= 0:
        tiles_left = (num_cut + num_full) * HEADS_PER_KV_HEAD
        work.draw_next(tiles_left <= TILES_LEFT)
        batch_kv_head = part_of_head // PARTS
        batch = batch_kv_head // KV_HEADS
        kv_head = batch_kv_head % KV_HEADS
        runs = lists.runs_of(part_of_head, column_tile)
        KEY_TILES: gl.constexpr = k_ring.full.shape[0]
        for consumer in gl.static_range(KEY_TILES):
            column = (column_tile * KEY_TILES + consumer) * 64
            k_ring.load_both(k, v, v_tiles, [batch, kv_head, column], consumer, (number & 1) ^ 1)
        for IS_CUT in gl.static_range(1, -1, -1):
            for run in range(gl.load(runs + (1 - IS_CUT))):
                first_tile, end_tile = load_run(runs, run, lists.max_runs, IS_CUT)
                for tile in range(first_tile * HEADS_PER_KV_HEAD, end_tile * HEADS_PER_KV_HEAD):
                    # Query heads that share a mask and a key are visited in turn.
                    head = kv_head * HEADS_PER_KV_HEAD + tile % HEADS_PER_KV_HEAD
                    row_tile = tile // HEADS_PER_KV_HEAD
                    stage = step % STAGES
                    phase = (step // STAGES & 1) ^ 1
                    full = q_ring.full.index(stage)
                    mbarrier.wait(q_ring.empty.index(stage), phase)
                    store_scalar(row_tiles.index(stage), row_tile)
                    mbarrier.expect(full, PARTS * q.block_type.nbytes + 2 * lse_2.block_type.nbytes)
                    load_parts(q, [batch, head, row_tile * BLOCK_M], full, q_ring.tiles, stage, PARTS)
                    rows = [batch * KV_HEADS * HEADS_PER_KV_HEAD + head, row_tile * BLOCK_M]
                    async_load(lse_2, rows, full, _statistics(lse_tiles, stage))
                    async_load(delta, rows, full, _statistics(delta_tiles, stage))
                    d_out_ring.load(d_out, [batch, head, row_tile * BLOCK_M], stage, phase)
                    step += 1
                    tiles_left -= 1
                    work.draw_next(tiles_left == TILES_LEFT)
        number += 1
        column_tile, part_of_head, num_cut, num_full = work.read(number)


@gluon.jit
def _consume_rows(
    d_k, d_v, has_nan, bounds, lists, q_ring, d_out_ring, lse_tiles, delta_tiles, row_tiles, k_ring, v_tiles, work,
    d_k_strides, d_v_strides, scale, q_len, kv_len,
    KV_HEADS: gl.constexpr, HEADS_PER_KV_HEAD: gl.constexpr, NUM_PLANES: gl.constexpr, DIM: gl.constexpr,
    DIM_V: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_DIM: gl.constexpr, BLOCK_DIM_V: gl.constexpr, STAGES: gl.constexpr, consumer: gl.constexpr,
):  # fmt: skip
    """Scores have keys for rows here: P and dS then enter their products from registers."""
    dtype: gl.constexpr = q_ring.tiles.dtype
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    d_k_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DIM, 16])
    d_v_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DIM_V, 16])
    d_s_layout: gl.constexpr = gl.DotOperandLayout(0, d_k_layout, 2)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, d_v_layout, 2)

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
        columns = first_column + gl.arange(0, 64, gl.SliceLayout(1, scores_layout))
        planes = load_planes(mask_bounds, columns, q_len, kv_len, NUM_PLANES)
        d_k_tile = gl.zeros([64, BLOCK_DIM], gl.float32, d_k_layout)
        d_v_tile = gl.zeros([64, BLOCK_DIM_V], gl.float32, d_v_layout)
        k_ring.wait(consumer, number & 1)
        # With heads past 64, registers are left for half of K.
        held_k = held_dims(tile_of(k_ring.tiles, consumer), 64, scores_layout)
        held_v = held_dims(tile_of(v_tiles, consumer), 64, scores_layout) if BLOCK_DIM == 64 else None
        for IS_CUT in gl.static_range(1, -1, -1):
            for _ in range((num_cut if IS_CUT else num_full) * HEADS_PER_KV_HEAD):
                stage = step % STAGES
                phase = step // STAGES & 1
                step += 1
                q_ring.wait(stage, phase)
                q_tile = tile_of(q_ring.tiles, stage)
                scores = times_statistic(_statistics(lse_tiles, stage), of_lse, scores_layout)
                d_p = times_statistic(_statistics(delta_tiles, stage), -1.0, scores_layout)
                scores = product_over_dims(
                    k_ring.tiles, consumer, q_ring.tiles, stage, scores_layout, PARTS=1, held=held_k, sums=scores
                )
                d_out_ring.wait(stage, phase)
                d_out_tile = tile_of(d_out_ring.tiles, stage)
                d_p = product_over_dims(
                    v_tiles, consumer, d_out_ring.tiles, stage, scores_layout, PARTS=1, held=held_v, sums=d_p
                )
                scores = hopper.warpgroup_mma_wait(1, [scores])
                probabilities = gl.exp2(scores * factor)
                if IS_CUT:
                    row = load_scalar(row_tiles.index(stage)) * BLOCK_M
                    rows = row + gl.arange(0, BLOCK_M, gl.SliceLayout(0, scores_layout))
                    probabilities = hide(probabilities, 0.0, rows, columns, planes, mask_bounds, kv_len, NUM_PLANES)
                p_tile = gl.convert_layout(probabilities.to(dtype), p_layout)
                d_v_tile = hopper.warpgroup_mma(p_tile, d_out_tile, d_v_tile, is_async=True)
                d_p = hopper.warpgroup_mma_wait(1, [d_p])
                d_scores = probabilities * d_p
                d_s_tile = gl.convert_layout(d_scores.to(dtype), d_s_layout)
                d_k_tile = hopper.warpgroup_mma(d_s_tile, q_tile, d_k_tile, is_async=True)
                d_v_tile = hopper.warpgroup_mma_wait(1, [d_v_tile])
                d_out_ring.release(stage)
                d_k_tile = hopper.warpgroup_mma_wait(0, [d_k_tile])
                q_ring.release(stage)
        k_ring.release(consumer)
        note_nan(has_nan, d_k_tile)
        note_nan(has_nan, d_v_tile)
        store_rows(d_k, d_k_strides, d_k_tile * scale, batch, kv_head, first_column, 0, kv_len, DIM, BLOCK_DIM)
        store_rows(d_v, d_v_strides, d_v_tile, batch, kv_head, first_column, 0, kv_len, DIM_V, BLOCK_DIM_V)
        number += 1
        column_tile, batch_kv_head, num_cut, num_full = work.take(number)


@gluon.jit
def _consume_for_values(
    d_v, has_nan, bounds, lists, q_ring, d_out_ring, lse_tiles, row_tiles, k_ring, p_ring, work,
    d_v_strides, scale, q_len, kv_len,
    KV_HEADS: gl.constexpr, HEADS_PER_KV_HEAD: gl.constexpr, NUM_PLANES: gl.constexpr, DIM_V: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_DIM_V: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Of wide heads: P, which it hands over, and dV. The registers of one consumer hold one gradient of 64 keys, in 256
    dims.
    """
    dtype: gl.constexpr = q_ring.tiles.dtype
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    d_v_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DIM_V, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, d_v_layout, 2)

    factor = scale * LOG2_E
    number = 0
    step = 0
    column_tile, part_of_head, num_cut, num_full = work.take(number)
    while column_tile >= 0:
        batch_kv_head = part_of_head // PARTS
        part = part_of_head % PARTS
        mask_bounds = bounds + lists.mask_of(part_of_head) * NUM_PLANES * kv_len
        first_column = column_tile * 64
        columns = first_column + gl.arange(0, 64, gl.SliceLayout(1, scores_layout))
        planes = load_planes(mask_bounds, columns, q_len, kv_len, NUM_PLANES)
        d_v_tile = gl.zeros([64, BLOCK_DIM_V], gl.float32, d_v_layout)
        k_ring.wait(0, number & 1)
        held_k = held_dims(tile_of(k_ring.tiles, 0), 64 * PARTS, scores_layout)
        for IS_CUT in gl.static_range(1, -1, -1):
            for _ in range((num_cut if IS_CUT else num_full) * HEADS_PER_KV_HEAD):
                stage = step % STAGES
                phase = step // STAGES & 1
                own = hidden_from_compiler(0)
                q_ring.wait(stage, phase)
                scores = product_over_dims(k_ring.tiles, own, q_ring.tiles, stage, scores_layout, PARTS, held_k)
                row_lse_2 = _statistics(lse_tiles, stage).load(scores_layout)
                scores = hopper.warpgroup_mma_wait(0, [scores])
                probabilities = gl.exp2(scores * factor - row_lse_2)
                if IS_CUT:
                    row = load_scalar(row_tiles.index(stage)) * BLOCK_M
                    rows = row + gl.arange(0, BLOCK_M, gl.SliceLayout(0, scores_layout))
                    probabilities = hide(probabilities, 0.0, rows, columns, planes, mask_bounds, kv_len, NUM_PLANES)
                q_ring.release(stage)
                d_out_ring.wait(stage, phase)
                d_out_tile = tile_of(d_out_ring.tiles, stage * PARTS + part)
                p_tile = gl.convert_layout(probabilities.to(dtype), p_layout)
                d_v_tile = hopper.warpgroup_mma(p_tile, d_out_tile, d_v_tile, is_async=True)
                p_ring.store(probabilities, step)
                d_v_tile = hopper.warpgroup_mma_wait(0, [d_v_tile])
                d_out_ring.release(stage)
                step += 1
        k_ring.release(0)
        note_nan(has_nan, d_v_tile)
        store_rows(
            d_v, d_v_strides, d_v_tile, batch_kv_head // KV_HEADS, batch_kv_head % KV_HEADS,
            first_column, part * BLOCK_DIM_V, kv_len, DIM_V, BLOCK_DIM_V,
        )  # fmt: skip
        number += 1
        column_tile, part_of_head, num_cut, num_full = work.take(number)


@gluon.jit
def _consume_for_keys(
    d_k, has_nan, q_ring, d_out_ring, delta_tiles, k_ring, v_tiles, p_ring, work, d_k_strides, scale, kv_len,
    KV_HEADS: gl.constexpr, HEADS_PER_KV_HEAD: gl.constexpr, DIM: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_DIM: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Of wide heads: dP, dS from it and the P of the other consumer, and dK."""
    dtype: gl.constexpr = q_ring.tiles.dtype
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    d_k_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DIM, 16])
    d_s_layout: gl.constexpr = gl.DotOperandLayout(0, d_k_layout, 2)

    number = 0
    step = 0
    column_tile, part_of_head, num_cut, num_full = work.take(number)
    while column_tile >= 0:
        batch_kv_head = part_of_head // PARTS
        part = part_of_head % PARTS
        d_k_tile = gl.zeros([64, BLOCK_DIM], gl.float32, d_k_layout)
        k_ring.wait(0, number & 1)
        held_v = held_dims(tile_of(v_tiles, 0), 64 * PARTS, scores_layout)
        for _ in range((num_cut + num_full) * HEADS_PER_KV_HEAD):
            stage = step % STAGES
            phase = step // STAGES & 1
            own = hidden_from_compiler(0)
            d_out_ring.wait(stage, phase)
            d_p = product_over_dims(v_tiles, own, d_out_ring.tiles, stage, scores_layout, PARTS, held_v)
            q_ring.wait(stage, phase)
            row_delta = _statistics(delta_tiles, stage).load(scores_layout)
            d_p = hopper.warpgroup_mma_wait(0, [d_p])
            d_out_ring.release(stage)
            d_scores = p_ring.take(scores_layout, step) * (d_p - row_delta)
            d_s_tile = gl.convert_layout(d_scores.to(dtype), d_s_layout)
            q_tile = tile_of(q_ring.tiles, stage * PARTS + part)
            d_k_tile = hopper.warpgroup_mma(d_s_tile, q_tile, d_k_tile, is_async=True)
            d_k_tile = hopper.warpgroup_mma_wait(0, [d_k_tile])
            q_ring.release(stage)
            step += 1
        k_ring.release(0)
        note_nan(has_nan, d_k_tile)
        store_rows(
            d_k, d_k_strides, d_k_tile * scale, batch_kv_head // KV_HEADS, batch_kv_head % KV_HEADS,
            column_tile * 64, part * BLOCK_DIM, kv_len, DIM, BLOCK_DIM,
        )  # fmt: skip
        number += 1
        column_tile, part_of_head, num_cut, num_full = work.take(number)


@gluon.jit(
    do_not_specialize=[
        "q_len", "kv_len", "num_items", "num_column_tiles", "heads_at_a_time", "mask_stride_b", "max_runs"
    ]
)  # fmt: skip
def key_value_gradient_kernel(
    q, k, v, d_out, lse_2, delta, d_k, d_v, bounds, schedule, counter, has_nan,
    d_k_strides, d_v_strides,
    scale, q_len, kv_len, num_items, num_column_tiles, heads_at_a_time, mask_stride_b, max_runs,
    KV_HEADS: gl.constexpr, HEADS_PER_KV_HEAD: gl.constexpr, KV_HEADS_PER_MASK: gl.constexpr,
    NUM_PLANES: gl.constexpr, DIM: gl.constexpr, DIM_V: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_DIM: gl.constexpr, BLOCK_DIM_V: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    q_tiles = gl.allocate_shared_memory(q.dtype, [STAGES * PARTS, 1, 1, BLOCK_M, BLOCK_DIM], q.layout)
    d_out_tiles = gl.allocate_shared_memory(d_out.dtype, [STAGES * PARTS, 1, 1, BLOCK_M, BLOCK_DIM_V], d_out.layout)
    lse_tiles = gl.allocate_shared_memory(gl.float32, [STAGES * _spread(BLOCK_M), 1, BLOCK_M], lse_2.layout)
    delta_tiles = gl.allocate_shared_memory(gl.float32, [STAGES * _spread(BLOCK_M), 1, BLOCK_M], delta.layout)
    # The consumers divide the keys, or where heads are wide, the gradients. Of heads past 256, a piece of work is one
    # part of a head: it computes all scores, and 256 dims of the gradients.
    KEY_TILES: gl.constexpr = 2 if BLOCK_DIM + BLOCK_DIM_V <= 256 else 1
    k_tiles = gl.allocate_shared_memory(k.dtype, [KEY_TILES * PARTS, 1, 1, 64, BLOCK_DIM], k.layout)
    v_tiles = gl.allocate_shared_memory(v.dtype, [KEY_TILES * PARTS, 1, 1, 64, BLOCK_DIM_V], v.layout)
    row_tiles = make_scalars(STAGES)
    work = make_work(3)
    q_ring = Ring(q_tiles, make_barriers(STAGES, 1), make_barriers(STAGES, 2))
    d_out_ring = Ring(d_out_tiles, make_barriers(STAGES, 1), make_barriers(STAGES, 2))
    k_ring = Ring(k_tiles, make_barriers(KEY_TILES, 1), make_barriers(KEY_TILES, 2 // KEY_TILES))
    lists = ScheduleLists(
        schedule, num_column_tiles, mask_stride_b, max_runs, KV_HEADS * PARTS, KV_HEADS_PER_MASK * PARTS
    )
    hopper.fence_async_shared()
    if KEY_TILES == 2:
        gl.warp_specialize(
            [
                (_consume_rows, (
                    d_k, d_v, has_nan, bounds, lists, q_ring, d_out_ring, lse_tiles, delta_tiles, row_tiles, k_ring,
                    v_tiles, work, d_k_strides, d_v_strides, scale, q_len, kv_len,
                    KV_HEADS, HEADS_PER_KV_HEAD, NUM_PLANES, DIM, DIM_V, BLOCK_M, BLOCK_DIM, BLOCK_DIM_V, STAGES, 0,
                )),
                (_consume_rows, (
                    d_k, d_v, has_nan, bounds, lists, q_ring, d_out_ring, lse_tiles, delta_tiles, row_tiles, k_ring,
                    v_tiles, work, d_k_strides, d_v_strides, scale, q_len, kv_len,
                    KV_HEADS, HEADS_PER_KV_HEAD, NUM_PLANES, DIM, DIM_V, BLOCK_M, BLOCK_DIM, BLOCK_DIM_V, STAGES, 1,
                )),
                (_produce_rows, (
                    q, k, v, d_out, lse_2, delta, lists, q_ring, d_out_ring, lse_tiles, delta_tiles, row_tiles, k_ring,
                    v_tiles, work, KV_HEADS, HEADS_PER_KV_HEAD, BLOCK_M, PARTS, STAGES,
                )),
                (assign_work, (lists, counter, work, num_items, heads_at_a_time, BLOCK_M, False)),
            ],
            [4, 1, 1],
            REGISTERS,
        )  # fmt: skip
    else:
        p_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_M], gl.float32)
        p_tiles = gl.allocate_shared_memory(gl.float32, [2, 64, BLOCK_M], p_layout)
        p_ring = Ring(p_tiles, make_barriers(2, 1), make_barriers(2, 1))
        gl.warp_specialize(
            [
                (_consume_for_values, (
                    d_v, has_nan, bounds, lists, q_ring, d_out_ring, lse_tiles, row_tiles, k_ring, p_ring, work,
                    d_v_strides, scale, q_len, kv_len,
                    KV_HEADS, HEADS_PER_KV_HEAD, NUM_PLANES, DIM_V, BLOCK_M, BLOCK_DIM_V, PARTS, STAGES,
                )),
                (_consume_for_keys, (
                    d_k, has_nan, q_ring, d_out_ring, delta_tiles, k_ring, v_tiles, p_ring, work, d_k_strides, scale,
                    kv_len, KV_HEADS, HEADS_PER_KV_HEAD, DIM, BLOCK_M, BLOCK_DIM, PARTS, STAGES,
                )),
                (_produce_rows, (
                    q, k, v, d_out, lse_2, delta, lists, q_ring, d_out_ring, lse_tiles, delta_tiles, row_tiles, k_ring,
                    v_tiles, work, KV_HEADS, HEADS_PER_KV_HEAD, BLOCK_M, PARTS, STAGES,
                )),
                (assign_work, (lists, counter, work, num_items, heads_at_a_time, BLOCK_M, False)),
            ],
            [4, 1, 1],
            REGISTERS if PARTS == 1 else REGISTERS_OF_PARTS,
        )  # fmt: skip
