"""dQ by row tiles."""

from __future__ import annotations

from ..common.tiles import LOG2_E
from .gluon_api import async_load, gl, gluon, hopper, mbarrier
from .masks import hide_by_mask, make_mask_ring, make_masks
from .tiles import Ring, forgotten, make_barriers, note_nan, store_rows
from .work import REGISTERS_WITH_MASKS, TILES_LEFT, Lists, assign_work, load_run, make_work


@gluon.jit
def _produce_columns(
    q, k, v, d_out, lists, q_ring, d_out_tiles, k_ring, v_ring, work,
    NUM_HEADS: gl.constexpr, HEADS_PER_KV_HEAD: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    V_STAGES: gl.constexpr,
):  # fmt: skip
    """Q and dO fill one buffer together."""
    number = 0
    step = 0
    row_tile, batch_head, num_cut, num_full = work.read(number)
    while row_tile >= 0:
        tiles_left = num_cut + num_full
        work.draw_next(tiles_left <= TILES_LEFT)
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
                    tiles_left -= 1
                    work.draw_next(tiles_left == TILES_LEFT)
        number += 1
        row_tile, batch_head, num_cut, num_full = work.read(number)


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
            (assign_work, (lists, counter, work, num_items, heads_per_group, BLOCK_N, True)),
            (make_masks, (bounds, lists, masks, work, q_len, kv_len, NUM_PLANES, BLOCK_N, False)),
        ],
        [4, 1, 1, 2],
        REGISTERS_WITH_MASKS,
    )  # fmt: skip
