"""FlashMask's backward pass for sm_90 in two kernels, warp-specialised and persistent.

As in the portable kernels, one makes dK and dV by column tiles and one dQ by row tiles: seven matrix products of each
tile instead of five, and gradients that are bitwise repeatable. The two consumers of dK/dV divide the keys of a column
tile; of heads past 128 they divide the gradients.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..common.nan_repair import redo_backward
from ..common.row_statistics import RowStatistics, padded_rows
from ..common.tiles import LOG2_E
from ..configs import Configs
from ..launch.launcher import Launcher
from ..launch.layout import gradient_layouts
from ..schedule import mask_strides, max_runs_of, tiles_in
from .gluon_api import async_load, gl, gluon, hopper, mbarrier
from .tiles import (
    LAUNCH_OPTIONS,
    REGISTERS,
    REGISTERS_WITH_MASKS,
    Lists,
    Ring,
    addressable,
    deal_out_work,
    forgotten,
    heads_per_group,
    hide,
    hide_by_mask,
    load_planes,
    load_run,
    load_scalar,
    make_barriers,
    make_mask_ring,
    make_masks,
    make_scalars,
    make_work,
    new_counters,
    note_nan,
    num_programs,
    padded_dim,
    store_rows,
    store_scalar,
    tile_source,
)

# dK and dV


@gluon.jit
def _produce_rows(
    q, k, v, d_out, lse_2, delta, lists, q_ring, d_out_ring, lse_tiles, delta_tiles, row_tiles, k_ring, v_tiles, work,
    KV_HEADS: gl.constexpr, HEADS_PER_KV_HEAD: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """K and V fill one buffer together, and so do Q, the statistics of its rows and their number."""
    number = 0
    step = 0
    column_tile, batch_kv_head, _, _ = work.take(number)
    while column_tile >= 0:
        batch = batch_kv_head // KV_HEADS
        kv_head = batch_kv_head % KV_HEADS
        runs = lists.runs_of(batch_kv_head, column_tile)
        KEY_TILES: gl.constexpr = k_ring.tiles.shape[0]
        for consumer in gl.static_range(KEY_TILES):
            column = (column_tile * KEY_TILES + consumer) * 64
            full = k_ring.full.index(consumer)
            mbarrier.wait(k_ring.empty.index(consumer), (number & 1) ^ 1)
            mbarrier.expect(full, k.block_type.nbytes + v.block_type.nbytes)
            async_load(k, [batch, kv_head, column, 0], full, k_ring.tiles.index(consumer))
            async_load(v, [batch, kv_head, column, 0], full, v_tiles.index(consumer))
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
                    mbarrier.expect(full, q.block_type.nbytes + 2 * lse_2.block_type.nbytes)
                    async_load(q, [batch, head, row_tile * BLOCK_M, 0], full, q_ring.tiles.index(stage))
                    rows = [batch * KV_HEADS * HEADS_PER_KV_HEAD + head, row_tile * BLOCK_M]
                    async_load(lse_2, rows, full, lse_tiles.index(stage))
                    async_load(delta, rows, full, delta_tiles.index(stage))
                    d_out_ring.load(d_out, [batch, head, row_tile * BLOCK_M, 0], stage, phase)
                    step += 1
        number += 1
        column_tile, batch_kv_head, _, _ = work.take(number)


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

    k_tile = k_ring.tiles.index(consumer).reshape([64, BLOCK_DIM])
    v_tile = v_tiles.index(consumer).reshape([64, BLOCK_DIM_V])
    factor = scale * LOG2_E
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
        for IS_CUT in gl.static_range(1, -1, -1):
            for _ in range((num_cut if IS_CUT else num_full) * HEADS_PER_KV_HEAD):
                stage = step % STAGES
                phase = step // STAGES & 1
                step += 1
                q_ring.wait(stage, phase)
                q_tile = q_ring.tiles.index(stage).reshape([BLOCK_M, BLOCK_DIM])
                scores = gl.zeros([64, BLOCK_M], gl.float32, scores_layout)
                scores = hopper.warpgroup_mma(k_tile, q_tile.permute([1, 0]), scores, use_acc=False, is_async=True)
                d_out_ring.wait(stage, phase)
                d_out_tile = d_out_ring.tiles.index(stage).reshape([BLOCK_M, BLOCK_DIM_V])
                d_p = gl.zeros([64, BLOCK_M], gl.float32, scores_layout)
                d_p = hopper.warpgroup_mma(v_tile, d_out_tile.permute([1, 0]), d_p, use_acc=False, is_async=True)
                row_lse_2 = lse_tiles.index(stage).load(scores_layout)
                scores = hopper.warpgroup_mma_wait(1, [scores])
                probabilities = gl.exp2(scores * factor - row_lse_2)
                if IS_CUT:
                    row = load_scalar(row_tiles.index(stage)) * BLOCK_M
                    rows = row + gl.arange(0, BLOCK_M, gl.SliceLayout(0, scores_layout))
                    probabilities = hide(probabilities, 0.0, rows, columns, planes, mask_bounds, kv_len, NUM_PLANES)
                p_tile = gl.convert_layout(probabilities.to(dtype), p_layout)
                row_delta = delta_tiles.index(stage).load(scores_layout)
                d_v_tile = hopper.warpgroup_mma(p_tile, d_out_tile, d_v_tile, is_async=True)
                d_p = hopper.warpgroup_mma_wait(1, [d_p])
                d_scores = probabilities * (d_p - row_delta)
                d_s_tile = gl.convert_layout(d_scores.to(dtype), d_s_layout)
                d_k_tile = hopper.warpgroup_mma(d_s_tile, q_tile, d_k_tile, is_async=True)
                d_v_tile = hopper.warpgroup_mma_wait(1, [d_v_tile])
                d_out_ring.release(stage)
                d_k_tile = hopper.warpgroup_mma_wait(0, [d_k_tile])
                q_ring.release(stage)
        k_ring.release(consumer)
        note_nan(has_nan, d_k_tile)
        note_nan(has_nan, d_v_tile)
        store_rows(d_k, d_k_strides, d_k_tile * scale, batch, kv_head, first_column, kv_len, DIM, BLOCK_DIM)
        store_rows(d_v, d_v_strides, d_v_tile, batch, kv_head, first_column, kv_len, DIM_V, BLOCK_DIM_V)
        number += 1
        column_tile, batch_kv_head, num_cut, num_full = work.take(number)


@gluon.jit
def _consume_for_values(
    d_v, has_nan, bounds, lists, q_ring, d_out_ring, lse_tiles, row_tiles, k_ring, p_ring, work,
    d_v_strides, scale, q_len, kv_len,
    KV_HEADS: gl.constexpr, HEADS_PER_KV_HEAD: gl.constexpr, NUM_PLANES: gl.constexpr, DIM_V: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_DIM: gl.constexpr, BLOCK_DIM_V: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Of wide heads: P, which it hands over, and dV. The registers of one consumer hold one gradient of 64 keys."""
    dtype: gl.constexpr = q_ring.tiles.dtype
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    d_v_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DIM_V, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, d_v_layout, 2)

    factor = scale * LOG2_E
    number = 0
    step = 0
    column_tile, batch_kv_head, num_cut, num_full = work.take(number)
    while column_tile >= 0:
        mask_bounds = bounds + lists.mask_of(batch_kv_head) * NUM_PLANES * kv_len
        first_column = column_tile * 64
        columns = first_column + gl.arange(0, 64, gl.SliceLayout(1, scores_layout))
        planes = load_planes(mask_bounds, columns, q_len, kv_len, NUM_PLANES)
        d_v_tile = gl.zeros([64, BLOCK_DIM_V], gl.float32, d_v_layout)
        k_ring.wait(0, number & 1)
        for IS_CUT in gl.static_range(1, -1, -1):
            for _ in range((num_cut if IS_CUT else num_full) * HEADS_PER_KV_HEAD):
                stage = step % STAGES
                phase = step // STAGES & 1
                k_tile = k_ring.tiles.index(forgotten(0)).reshape([64, BLOCK_DIM])
                q_ring.wait(stage, phase)
                q_tile = q_ring.tiles.index(stage).reshape([BLOCK_M, BLOCK_DIM])
                scores = gl.zeros([64, BLOCK_M], gl.float32, scores_layout)
                scores = hopper.warpgroup_mma(k_tile, q_tile.permute([1, 0]), scores, use_acc=False, is_async=True)
                row_lse_2 = lse_tiles.index(stage).load(scores_layout)
                scores = hopper.warpgroup_mma_wait(0, [scores])
                probabilities = gl.exp2(scores * factor - row_lse_2)
                if IS_CUT:
                    row = load_scalar(row_tiles.index(stage)) * BLOCK_M
                    rows = row + gl.arange(0, BLOCK_M, gl.SliceLayout(0, scores_layout))
                    probabilities = hide(probabilities, 0.0, rows, columns, planes, mask_bounds, kv_len, NUM_PLANES)
                q_ring.release(stage)
                d_out_ring.wait(stage, phase)
                d_out_tile = d_out_ring.tiles.index(stage).reshape([BLOCK_M, BLOCK_DIM_V])
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
            first_column, kv_len, DIM_V, BLOCK_DIM_V,
        )  # fmt: skip
        number += 1
        column_tile, batch_kv_head, num_cut, num_full = work.take(number)


@gluon.jit
def _consume_for_keys(
    d_k, has_nan, q_ring, d_out_ring, delta_tiles, k_ring, v_tiles, p_ring, work, d_k_strides, scale, kv_len,
    KV_HEADS: gl.constexpr, HEADS_PER_KV_HEAD: gl.constexpr, DIM: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_DIM: gl.constexpr, BLOCK_DIM_V: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Of wide heads: dP, dS from it and the P of the other consumer, and dK."""
    dtype: gl.constexpr = q_ring.tiles.dtype
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    d_k_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DIM, 16])
    d_s_layout: gl.constexpr = gl.DotOperandLayout(0, d_k_layout, 2)

    number = 0
    step = 0
    column_tile, batch_kv_head, num_cut, num_full = work.take(number)
    while column_tile >= 0:
        d_k_tile = gl.zeros([64, BLOCK_DIM], gl.float32, d_k_layout)
        k_ring.wait(0, number & 1)
        for _ in range((num_cut + num_full) * HEADS_PER_KV_HEAD):
            stage = step % STAGES
            phase = step // STAGES & 1
            v_tile = v_tiles.index(forgotten(0)).reshape([64, BLOCK_DIM_V])
            d_out_ring.wait(stage, phase)
            d_out_tile = d_out_ring.tiles.index(stage).reshape([BLOCK_M, BLOCK_DIM_V])
            d_p = gl.zeros([64, BLOCK_M], gl.float32, scores_layout)
            d_p = hopper.warpgroup_mma(v_tile, d_out_tile.permute([1, 0]), d_p, use_acc=False, is_async=True)
            q_ring.wait(stage, phase)
            row_delta = delta_tiles.index(stage).load(scores_layout)
            d_p = hopper.warpgroup_mma_wait(0, [d_p])
            d_out_ring.release(stage)
            d_scores = p_ring.take(scores_layout, step) * (d_p - row_delta)
            d_s_tile = gl.convert_layout(d_scores.to(dtype), d_s_layout)
            q_tile = q_ring.tiles.index(stage).reshape([BLOCK_M, BLOCK_DIM])
            d_k_tile = hopper.warpgroup_mma(d_s_tile, q_tile, d_k_tile, is_async=True)
            d_k_tile = hopper.warpgroup_mma_wait(0, [d_k_tile])
            q_ring.release(stage)
            step += 1
        k_ring.release(0)
        note_nan(has_nan, d_k_tile)
        store_rows(
            d_k, d_k_strides, d_k_tile * scale, batch_kv_head // KV_HEADS, batch_kv_head % KV_HEADS,
            column_tile * 64, kv_len, DIM, BLOCK_DIM,
        )  # fmt: skip
        number += 1
        column_tile, batch_kv_head, num_cut, num_full = work.take(number)


@gluon.jit(
    do_not_specialize=[
        "q_len", "kv_len", "num_items", "num_column_tiles", "heads_per_group", "mask_stride_b", "max_runs"
    ]
)  # fmt: skip
def key_value_gradient_kernel(
    q, k, v, d_out, lse_2, delta, d_k, d_v, bounds, schedule, counter, has_nan,
    d_k_strides, d_v_strides,
    scale, q_len, kv_len, num_items, num_column_tiles, heads_per_group, mask_stride_b, max_runs,
    KV_HEADS: gl.constexpr, HEADS_PER_KV_HEAD: gl.constexpr, KV_HEADS_PER_MASK: gl.constexpr,
    NUM_PLANES: gl.constexpr, DIM: gl.constexpr, DIM_V: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_DIM: gl.constexpr, BLOCK_DIM_V: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    q_tiles = gl.allocate_shared_memory(q.dtype, [STAGES, 1, 1, BLOCK_M, BLOCK_DIM], q.layout)
    d_out_tiles = gl.allocate_shared_memory(d_out.dtype, [STAGES, 1, 1, BLOCK_M, BLOCK_DIM_V], d_out.layout)
    lse_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_M], lse_2.layout)
    delta_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_M], delta.layout)
    # The consumers divide the keys, or where heads are wide, the gradients.
    KEY_TILES: gl.constexpr = 2 if BLOCK_DIM + BLOCK_DIM_V <= 256 else 1
    k_tiles = gl.allocate_shared_memory(k.dtype, [KEY_TILES, 1, 1, 64, BLOCK_DIM], k.layout)
    v_tiles = gl.allocate_shared_memory(v.dtype, [KEY_TILES, 1, 1, 64, BLOCK_DIM_V], v.layout)
    row_tiles = make_scalars(STAGES)
    work = make_work(3)
    q_ring = Ring(q_tiles, make_barriers(STAGES, 1), make_barriers(STAGES, 2))
    d_out_ring = Ring(d_out_tiles, make_barriers(STAGES, 1), make_barriers(STAGES, 2))
    k_ring = Ring(k_tiles, make_barriers(KEY_TILES, 1), make_barriers(KEY_TILES, 2 // KEY_TILES))
    lists = Lists(schedule, num_column_tiles, mask_stride_b, max_runs, KV_HEADS, KV_HEADS_PER_MASK)
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
                    v_tiles, work, KV_HEADS, HEADS_PER_KV_HEAD, BLOCK_M, STAGES,
                )),
                (deal_out_work, (lists, counter, work, num_items, heads_per_group, BLOCK_M, False)),
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
                    KV_HEADS, HEADS_PER_KV_HEAD, NUM_PLANES, DIM_V, BLOCK_M, BLOCK_DIM, BLOCK_DIM_V, STAGES,
                )),
                (_consume_for_keys, (
                    d_k, has_nan, q_ring, d_out_ring, delta_tiles, k_ring, v_tiles, p_ring, work, d_k_strides, scale,
                    kv_len, KV_HEADS, HEADS_PER_KV_HEAD, DIM, BLOCK_M, BLOCK_DIM, BLOCK_DIM_V, STAGES,
                )),
                (_produce_rows, (
                    q, k, v, d_out, lse_2, delta, lists, q_ring, d_out_ring, lse_tiles, delta_tiles, row_tiles, k_ring,
                    v_tiles, work, KV_HEADS, HEADS_PER_KV_HEAD, BLOCK_M, STAGES,
                )),
                (deal_out_work, (lists, counter, work, num_items, heads_per_group, BLOCK_M, False)),
            ],
            [4, 1, 1],
            REGISTERS,
        )  # fmt: skip


# dQ


@gluon.jit
def _produce_columns(
    q, k, v, d_out, lists, q_ring, d_out_tiles, k_ring, v_ring, work,
    NUM_HEADS: gl.constexpr, HEADS_PER_KV_HEAD: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    V_STAGES: gl.constexpr,
):  # fmt: skip
    """Q and dO fill one buffer together."""
    number = 0
    step = 0
    row_tile, batch_head, _, _ = work.take(number)
    while row_tile >= 0:
        batch = batch_head // NUM_HEADS
        head = batch_head % NUM_HEADS
        kv_head = head // HEADS_PER_KV_HEAD
        runs = lists.runs_of(batch_head, row_tile)
        for consumer in gl.static_range(2):
            row = row_tile * 128 + consumer * 64
            full = q_ring.full.index(consumer)
            mbarrier.wait(q_ring.empty.index(consumer), (number & 1) ^ 1)
            mbarrier.expect(full, q.block_type.nbytes + d_out.block_type.nbytes)
            async_load(q, [batch, head, row, 0], full, q_ring.tiles.index(consumer))
            async_load(d_out, [batch, head, row, 0], full, d_out_tiles.index(consumer))
        for IS_CUT in gl.static_range(1, -1, -1):
            for run in range(gl.load(runs + (1 - IS_CUT))):
                first_tile, end_tile = load_run(runs, run, lists.max_runs, IS_CUT)
                for column_tile in range(first_tile, end_tile):
                    k_ring.load(
                        k, [batch, kv_head, column_tile * BLOCK_N, 0], step % STAGES, (step // STAGES & 1) ^ 1
                    )  # fmt: skip
                    v_ring.load(
                        v, [batch, kv_head, column_tile * BLOCK_N, 0], step % V_STAGES, (step // V_STAGES & 1) ^ 1
                    )  # fmt: skip
                    step += 1
        number += 1
        row_tile, batch_head, _, _ = work.take(number)


@gluon.jit
def _consume_columns(
    d_q, lse_2, delta, has_nan, q_ring, d_out_tiles, k_ring, v_ring, masks, work,
    d_q_strides, scale, q_len, statistics_len,
    NUM_HEADS: gl.constexpr, DIM: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_DIM: gl.constexpr,
    BLOCK_DIM_V: gl.constexpr, STAGES: gl.constexpr, V_STAGES: gl.constexpr, consumer: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_ring.tiles.dtype
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    d_q_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DIM, 16])
    d_s_layout: gl.constexpr = gl.DotOperandLayout(0, d_q_layout, 2)

    factor = scale * LOG2_E
    number = 0
    step = 0
    mask_step = 0
    row_tile, batch_head, num_cut, num_full = work.take(number)
    while row_tile >= 0:
        first_row = row_tile * 128 + consumer * 64
        rows = first_row + gl.arange(0, 64, gl.SliceLayout(1, scores_layout))
        statistics = batch_head.to(gl.int64) * statistics_len + rows
        row_lse_2 = gl.load(lse_2 + statistics)
        row_delta = gl.load(delta + statistics)
        d_q_tile = gl.zeros([64, BLOCK_DIM], gl.float32, d_q_layout)
        q_ring.wait(consumer, number & 1)
        for IS_CUT in gl.static_range(1, -1, -1):
            for _ in range(num_cut if IS_CUT else num_full):
                stage = step % STAGES
                v_stage = step % V_STAGES
                own = forgotten(consumer) if BLOCK_DIM > 128 else consumer
                q_tile = q_ring.tiles.index(own).reshape([64, BLOCK_DIM])
                d_out_tile = d_out_tiles.index(own).reshape([64, BLOCK_DIM_V])
                v_phase = step // V_STAGES & 1
                k_ring.wait(stage, step // STAGES & 1)
                step += 1
                k_tile = k_ring.tiles.index(stage).reshape([BLOCK_N, BLOCK_DIM])
                scores = gl.zeros([64, BLOCK_N], gl.float32, scores_layout)
                scores = hopper.warpgroup_mma(q_tile, k_tile.permute([1, 0]), scores, use_acc=False, is_async=True)
                v_ring.wait(v_stage, v_phase)
                v_tile = v_ring.tiles.index(v_stage).reshape([BLOCK_N, BLOCK_DIM_V])
                d_p = gl.zeros([64, BLOCK_N], gl.float32, scores_layout)
                d_p = hopper.warpgroup_mma(d_out_tile, v_tile.permute([1, 0]), d_p, use_acc=False, is_async=True)
                scores = hopper.warpgroup_mma_wait(1, [scores])
                probabilities = gl.exp2(scores * factor - row_lse_2[:, None])
                if IS_CUT:
                    probabilities = hide_by_mask(probabilities, 0.0, masks, mask_step, BLOCK_N, consumer)
                    mask_step += 1
                d_p = hopper.warpgroup_mma_wait(0, [d_p])
                v_ring.release(v_stage)
                d_scores = probabilities * (d_p - row_delta[:, None])
                d_s_tile = gl.convert_layout(d_scores.to(dtype), d_s_layout)
                d_q_tile = hopper.warpgroup_mma(d_s_tile, k_tile, d_q_tile, is_async=True)
                d_q_tile = hopper.warpgroup_mma_wait(0, [d_q_tile])
                k_ring.release(stage)
        q_ring.release(consumer)
        note_nan(has_nan, d_q_tile)
        store_rows(
            d_q, d_q_strides, d_q_tile * scale, batch_head // NUM_HEADS, batch_head % NUM_HEADS,
            first_row, q_len, DIM, BLOCK_DIM,
        )  # fmt: skip
        number += 1
        row_tile, batch_head, num_cut, num_full = work.take(number)


@gluon.jit(
    do_not_specialize=[
        "q_len", "kv_len", "statistics_len", "num_items", "num_row_tiles", "heads_per_group", "mask_stride_b",
        "max_runs",
    ]
)  # fmt: skip
def query_gradient_kernel(
    q, k, v, d_out, lse_2, delta, d_q, bounds, schedule, counter, has_nan, d_q_strides,
    scale, q_len, kv_len, statistics_len, num_items, num_row_tiles, heads_per_group, mask_stride_b, max_runs,
    NUM_HEADS: gl.constexpr, HEADS_PER_KV_HEAD: gl.constexpr, HEADS_PER_MASK: gl.constexpr,
    NUM_PLANES: gl.constexpr, DIM: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_DIM: gl.constexpr, BLOCK_DIM_V: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    # Q, dO and tiles of 256 dims leave room for three tiles of keys. That of V is soon free again.
    V_STAGES: gl.constexpr = STAGES if BLOCK_DIM <= 128 else 1
    q_tiles = gl.allocate_shared_memory(q.dtype, [2, 1, 1, 64, BLOCK_DIM], q.layout)
    d_out_tiles = gl.allocate_shared_memory(d_out.dtype, [2, 1, 1, 64, BLOCK_DIM_V], d_out.layout)
    k_tiles = gl.allocate_shared_memory(k.dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_DIM], k.layout)
    v_tiles = gl.allocate_shared_memory(v.dtype, [V_STAGES, 1, 1, BLOCK_N, BLOCK_DIM_V], v.layout)
    masks = make_mask_ring(BLOCK_N, 4 if BLOCK_DIM <= 128 else 2)
    work = make_work(4)
    q_ring = Ring(q_tiles, make_barriers(2, 1), make_barriers(2, 1))
    k_ring = Ring(k_tiles, make_barriers(STAGES, 1), make_barriers(STAGES, 2))
    v_ring = Ring(v_tiles, make_barriers(V_STAGES, 1), make_barriers(V_STAGES, 2))
    lists = Lists(schedule, num_row_tiles, mask_stride_b, max_runs, NUM_HEADS, HEADS_PER_MASK)
    hopper.fence_async_shared()
    gl.warp_specialize(
        [
            (_consume_columns, (
                d_q, lse_2, delta, has_nan, q_ring, d_out_tiles, k_ring, v_ring, masks, work,
                d_q_strides, scale, q_len, statistics_len,
                NUM_HEADS, DIM, BLOCK_N, BLOCK_DIM, BLOCK_DIM_V, STAGES, V_STAGES, 0,
            )),
            (_consume_columns, (
                d_q, lse_2, delta, has_nan, q_ring, d_out_tiles, k_ring, v_ring, masks, work,
                d_q_strides, scale, q_len, statistics_len,
                NUM_HEADS, DIM, BLOCK_N, BLOCK_DIM, BLOCK_DIM_V, STAGES, V_STAGES, 1,
            )),
            (_produce_columns, (
                q, k, v, d_out, lists, q_ring, d_out_tiles, k_ring, v_ring, work,
                NUM_HEADS, HEADS_PER_KV_HEAD, BLOCK_N, STAGES, V_STAGES,
            )),
            (deal_out_work, (lists, counter, work, num_items, heads_per_group, BLOCK_N, True)),
            (make_masks, (bounds, lists, masks, work, q_len, kv_len, NUM_PLANES, BLOCK_N, False)),
        ],
        [4, 1, 1, 2],
        REGISTERS_WITH_MASKS,
    )  # fmt: skip


class AttentionBackward:
    """The backward kernels for inputs of one kind, as `portable.AttentionBackward`, without dropout and softcap and for
    head sizes to 256.
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
        query, key, value, d_out = (addressable(tensor) for tensor in (query, key, value, d_out))
        batch_size, num_heads, q_len, dim = query.shape
        kv_heads, kv_len, dim_v = value.shape[1:]
        block_dim, block_dim_v = padded_dim(dim), padded_dim(dim_v)
        mask_stride_b, heads_per_mask = mask_strides(bounds, num_heads)
        heads_per_kv_head = num_heads // kv_heads
        self._row_statistics = RowStatistics(out, d_out, d_lse)
        self._gradient_layouts = gradient_layouts(query, value)
        d_query_strides, d_key_strides, d_value_strides = (layout.strides[:3] for layout in self._gradient_layouts)

        config = configs.key_value_gradient
        num_column_tiles = tiles_in(kv_len, config.block_n)
        num_items = num_column_tiles * batch_size * kv_heads
        self._block_m = config.block_m
        self._column_blocks = (
            (config.block_m, block_dim),
            (64, block_dim),
            (64, block_dim_v),
            (config.block_m, block_dim_v),
        )
        numbers: tuple[Any, ...] = (
            d_key_strides,
            d_value_strides,
            scale,
            q_len,
            kv_len,
            num_items,
            num_column_tiles,
            heads_per_group(kv_heads, num_column_tiles, query, d_out),
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
            "BLOCK_M": config.block_m,
            "BLOCK_DIM": block_dim,
            "BLOCK_DIM_V": block_dim_v,
            "STAGES": config.num_stages,
        }
        programs = num_programs(query.device, num_items)
        self._launch_d_key_value = Launcher(key_value_gradient_kernel, programs, numbers, constants, **LAUNCH_OPTIONS)
        column_tile = config.block_m, config.block_n

        config = configs.query_gradient
        num_row_tiles = tiles_in(q_len, config.block_m)
        num_items = num_row_tiles * batch_size * num_heads
        self._row_blocks = (
            (64, block_dim),
            (config.block_n, block_dim),
            (config.block_n, block_dim_v),
            (64, block_dim_v),
        )
        numbers = (
            d_query_strides,
            scale,
            q_len,
            kv_len,
            padded_rows(q_len),
            num_items,
            num_row_tiles,
            heads_per_group(kv_heads, num_row_tiles * heads_per_kv_head, key, value) * heads_per_kv_head,
            mask_stride_b,
            max_runs_of(by_row),
        )
        constants = {
            "NUM_HEADS": num_heads,
            "HEADS_PER_KV_HEAD": heads_per_kv_head,
            "HEADS_PER_MASK": heads_per_mask,
            "NUM_PLANES": bounds.shape[2],
            "DIM": dim,
            "BLOCK_N": config.block_n,
            "BLOCK_DIM": block_dim,
            "BLOCK_DIM_V": block_dim_v,
            "STAGES": config.num_stages,
        }
        programs = num_programs(query.device, num_items)
        self._launch_d_query = Launcher(query_gradient_kernel, programs, numbers, constants, **LAUNCH_OPTIONS)
        row_tile = config.block_m, config.block_n
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
        inputs = query, key, value, d_out = tuple(addressable(tensor) for tensor in (query, key, value, d_out))
        lse_2, delta = self._row_statistics(out, lse, d_out, d_lse)
        gradients = tuple(layout.new(query) for layout in self._gradient_layouts)
        d_query, d_key, d_value = gradients
        column_counter, row_counter, has_nan = new_counters(3, query.device)
        self._launch_d_key_value(
            *(tile_source(tensor, 1, 1, *block) for tensor, block in zip(inputs, self._column_blocks)),
            *(tile_source(statistic.flatten(0, 1), 1, self._block_m) for statistic in (lse_2, delta)),
            d_key, d_value, bounds, by_column, column_counter, has_nan,
        )  # fmt: skip
        self._launch_d_query(
            *(tile_source(tensor, 1, 1, *block) for tensor, block in zip(inputs, self._row_blocks)),
            lse_2, delta, d_query, bounds, by_row, row_counter, has_nan,
        )  # fmt: skip
        self._redo(has_nan, *inputs, lse_2, delta, *gradients, bounds, by_column, by_row)
        return d_query, d_key, d_value, delta
