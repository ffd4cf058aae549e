"""dQ by row tiles."""

from __future__ import annotations

from ..common.tiles import LOG2_E
from .gluon_api import gl, gluon, hopper
from .masks import hide_by_mask, make_mask_ring, make_masks
from .tiles import Ring, hidden_from_compiler, make_barriers, note_nan, product_over_dims, store_rows, tile_of
from .work import (
    REGISTERS_OF_PARTS_WITH_MASKS,
    REGISTERS_WITH_MASKS,
    TILES_LEFT,
    ScheduleLists,
    assign_work,
    load_run,
    make_work,
)


@gluon.jit
def _produce_columns(
    q, k, v, d_out, lists, q_ring, d_out_tiles, k_ring, v_ring, work,
    NUM_HEADS: gl.constexpr, HEADS_PER_KV_HEAD: gl.constexpr, BLOCK_N: gl.constexpr, Q_TILES: gl.constexpr,
    STAGES: gl.constexpr, V_STAGES: gl.constexpr,
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
        for tile in gl.static_range(Q_TILES):
            row = (row_tile * Q_TILES + tile) * 64
            q_ring.load_both(q, d_out, d_out_tiles, [batch, head, row], tile, (number & 1) ^ 1)
        for IS_CUT in gl.static_range(1, -1, -1):
            for run in range(gl.load(runs + (1 - IS_CUT))):
                first_tile, end_tile = load_run(runs, run, lists.max_runs, IS_CUT)
                for column_tile in range(first_tile, end_tile):
                    column = column_tile * BLOCK_N
                    k_ring.load(k, [batch, kv_head, column], step % STAGES, (step // STAGES & 1) ^ 1)
                    v_ring.load(v, [batch, kv_head, column], step % V_STAGES, (step // V_STAGES & 1) ^ 1)
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
    PARTS: gl.constexpr, Q_TILES: gl.constexpr, STAGES: gl.constexpr, V_STAGES: gl.constexpr, consumer: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_ring.tiles.dtype
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    d_q_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DIM, 16])
    d_s_layout: gl.constexpr = gl.DotOperandLayout(0, d_q_layout, 2)

    # A consumer has rows of its own, or dims of dQ.
    own_rows: gl.constexpr = consumer % Q_TILES
    own_part: gl.constexpr = consumer % PARTS
    factor = scale * LOG2_E
    number = 0
    step = 0
    mask_step = 0
    row_tile, batch_head, num_cut, num_full = work.take(number)
    while row_tile >= 0:
        first_row = (row_tile * Q_TILES + own_rows) * 64
        rows = first_row + gl.arange(0, 64, gl.SliceLayout(1, scores_layout))
        statistics = batch_head.to(gl.int64) * statistics_len + rows
        row_lse_2 = gl.load(lse_2 + statistics)
        row_delta = gl.load(delta + statistics)
        d_q_tile = gl.zeros([64, BLOCK_DIM], gl.float32, d_q_layout)
        q_ring.wait(own_rows, number & 1)
        for IS_CUT in gl.static_range(1, -1, -1):
            for _ in range(num_cut if IS_CUT else num_full):
                stage = step % STAGES
                v_stage = step % V_STAGES
                own = hidden_from_compiler(own_rows) if BLOCK_DIM > 128 else own_rows
                v_phase = step // V_STAGES & 1
                k_ring.wait(stage, step // STAGES & 1)
                step += 1
                scores = product_over_dims(q_ring.tiles, own, k_ring.tiles, stage, scores_layout, PARTS)
                v_ring.wait(v_stage, v_phase)
                v_own = hidden_from_compiler(v_stage) if PARTS == 2 else v_stage
                d_p = product_over_dims(d_out_tiles, own, v_ring.tiles, v_own, scores_layout, PARTS)
                scores = hopper.warpgroup_mma_wait(1, [scores])
                probabilities = gl.exp2(scores * factor - row_lse_2[:, None])
                if IS_CUT:
                    probabilities = hide_by_mask(probabilities, 0.0, masks, mask_step, BLOCK_N, own_rows)
                    mask_step += 1
                d_p = hopper.warpgroup_mma_wait(0, [d_p])
                v_ring.release(v_stage)
                d_scores = probabilities * (d_p - row_delta[:, None])
                d_s_tile = gl.convert_layout(d_scores.to(dtype), d_s_layout)
                k_tile = tile_of(k_ring.tiles, stage * PARTS + own_part)
                d_q_tile = hopper.warpgroup_mma(d_s_tile, k_tile, d_q_tile, is_async=True)
                d_q_tile = hopper.warpgroup_mma_wait(0, [d_q_tile])
                k_ring.release(stage)
        q_ring.release(own_rows)
        note_nan(has_nan, d_q_tile)
        store_rows(
            d_q, d_q_strides, d_q_tile * scale, batch_head // NUM_HEADS, batch_head % NUM_HEADS,
            first_row, own_part * BLOCK_DIM, q_len, DIM, BLOCK_DIM,
        )  # fmt: skip
        number += 1
        row_tile, batch_head, num_cut, num_full = work.take(number)


@gluon.jit(
    do_not_specialize=[
        "q_len", "kv_len", "statistics_len", "num_items", "num_row_tiles", "heads_at_a_time", "mask_stride_b",
        "max_runs",
    ]
)  # fmt: skip
def query_gradient_kernel(
    q, k, v, d_out, lse_2, delta, d_q, bounds, schedule, counter, has_nan, d_q_strides,
    scale, q_len, kv_len, statistics_len, num_items, num_row_tiles, heads_at_a_time, mask_stride_b, max_runs,
    NUM_HEADS: gl.constexpr, HEADS_PER_KV_HEAD: gl.constexpr, HEADS_PER_MASK: gl.constexpr,
    NUM_PLANES: gl.constexpr, DIM: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_DIM: gl.constexpr, BLOCK_DIM_V: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    # The consumers divide the rows of a tile, or of heads past 256 the dims of dQ.
    Q_TILES: gl.constexpr = 2 // PARTS
    # Q, dO and tiles of 256 dims leave room for three tiles of keys. That of V is soon free again.
    V_STAGES: gl.constexpr = STAGES if BLOCK_DIM <= 128 else 1
    q_tiles = gl.allocate_shared_memory(q.dtype, [2, 1, 1, 64, BLOCK_DIM], q.layout)
    d_out_tiles = gl.allocate_shared_memory(d_out.dtype, [2, 1, 1, 64, BLOCK_DIM_V], d_out.layout)
    k_tiles = gl.allocate_shared_memory(k.dtype, [STAGES * PARTS, 1, 1, BLOCK_N, BLOCK_DIM], k.layout)
    v_tiles = gl.allocate_shared_memory(v.dtype, [V_STAGES * PARTS, 1, 1, BLOCK_N, BLOCK_DIM_V], v.layout)
    masks = make_mask_ring(BLOCK_N, 4 if BLOCK_DIM <= 128 else 2)
    work = make_work(4)
    q_ring = Ring(q_tiles, make_barriers(Q_TILES, 1), make_barriers(Q_TILES, PARTS))
    k_ring = Ring(k_tiles, make_barriers(STAGES, 1), make_barriers(STAGES, 2))
    v_ring = Ring(v_tiles, make_barriers(V_STAGES, 1), make_barriers(V_STAGES, 2))
    lists = ScheduleLists(schedule, num_row_tiles, mask_stride_b, max_runs, NUM_HEADS, HEADS_PER_MASK)
    hopper.fence_async_shared()
    gl.warp_specialize(
        [
            (_consume_columns, (
                d_q, lse_2, delta, has_nan, q_ring, d_out_tiles, k_ring, v_ring, masks, work,
                d_q_strides, scale, q_len, statistics_len,
                NUM_HEADS, DIM, BLOCK_N, BLOCK_DIM, PARTS, Q_TILES, STAGES, V_STAGES, 0,
            )),
            (_consume_columns, (
                d_q, lse_2, delta, has_nan, q_ring, d_out_tiles, k_ring, v_ring, masks, work,
                d_q_strides, scale, q_len, statistics_len,
                NUM_HEADS, DIM, BLOCK_N, BLOCK_DIM, PARTS, Q_TILES, STAGES, V_STAGES, 1,
            )),
            (_produce_columns, (
                q, k, v, d_out, lists, q_ring, d_out_tiles, k_ring, v_ring, work,
                NUM_HEADS, HEADS_PER_KV_HEAD, BLOCK_N, Q_TILES, STAGES, V_STAGES,
            )),
            (assign_work, (lists, counter, work, num_items, heads_at_a_time, BLOCK_N, True)),
            (make_masks, (bounds, lists, masks, work, q_len, kv_len, NUM_PLANES, Q_TILES * 64, BLOCK_N)),
        ],
        [4, 1, 1, 2],
        REGISTERS_WITH_MASKS if PARTS == 1 else REGISTERS_OF_PARTS_WITH_MASKS,
    )  # fmt: skip
