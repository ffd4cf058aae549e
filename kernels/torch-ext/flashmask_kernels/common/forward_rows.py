"""FlashMask's forward pass (arXiv 2410.01359, algorithm 1) for the rows of one tile: FlashAttention-2 over the tiles of
the schedule.

It visits first the cut tiles of its row of the schedule, where `hidden_elements` masks single scores, then the full
tiles, whose loop carries no mask. Hidden tiles are in neither list.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    LN_2,
    LOG2_E,
    count_runs,
    dot_of_visible,
    hidden_elements,
    holds_nan,
    kept_elements,
    load_rows,
    load_run,
    soft_capped,
    store_rows,
)


@triton.jit
def attend_rows(
    q, k, v, out, lse, bounds, schedule, sinks, seed, strides, factors, sizes, program, first,
    NUM_HEADS: tl.constexpr, HEADS_PER_KV_HEAD: tl.constexpr, HEADS_PER_MASK: tl.constexpr, NUM_PLANES: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_DROPOUT: tl.constexpr, DIM: tl.constexpr,
    DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_DIM_V: tl.constexpr, PRECISION: tl.constexpr, USE_DESCRIPTORS: tl.constexpr,
    QUERY_IN_REGISTERS: tl.constexpr, SCHEDULED_M: tl.constexpr, SCHEDULED_N: tl.constexpr, HIDES_NAN: tl.constexpr,
):  # fmt: skip
    """Write output and log-sum-exp of BLOCK_M rows, from row ``first`` of a row tile on. Returns whether the output
    holds NaN.

    The tiles of the schedule are SCHEDULED_M x SCHEDULED_N. With HIDES_NAN, NaN of a hidden value stays out.
    """
    q_strides, k_strides, v_strides, out_strides = strides
    scale, softcap, drop_below, keep_scale = factors
    q_len, kv_len, mask_stride_b, max_runs = sizes
    num_row_tiles = tl.cdiv(q_len, SCHEDULED_M)
    # Neighbouring programs share a head, so that its K and V stay in L2. Under a causal mask the last rows have the
    # most work, so they come first.
    row_tile = num_row_tiles - 1 - program % num_row_tiles
    batch_head = program // num_row_tiles
    batch = batch_head // NUM_HEADS
    head = batch_head % NUM_HEADS
    kv_head = head // HEADS_PER_KV_HEAD
    mask = (batch * mask_stride_b + head // HEADS_PER_MASK).to(tl.int64)
    bounds += mask * NUM_PLANES * kv_len
    schedule += (mask * num_row_tiles + row_tile) * (2 + 2 * max_runs)

    start_m = row_tile * SCHEDULED_M + first
    rows = start_m + tl.arange(0, BLOCK_M)
    q_tile = load_rows(q, q_strides, batch, head, start_m, q_len, DIM, BLOCK_M, BLOCK_DIM, True, USE_DESCRIPTORS)
    if QUERY_IN_REGISTERS:
        # A computed value enters the matrix product from registers, a loaded one from shared memory. Two operands of a
        # 64 x 64 product saturate shared memory; with K alone in it, it also has room for a third stage.
        q_tile = tl.where((rows < q_len)[:, None], q_tile, 0.0)
    output = tl.zeros([BLOCK_M, BLOCK_DIM_V], dtype=tl.float32)
    # Scores and the maxima of their rows, [BLOCK_M], are in base 2.
    if HAS_SINKS:
        # A sink is a score that every row has seen before its first key.
        row_max = tl.full([BLOCK_M], 1.0, dtype=tl.float32) * (tl.load(sinks + head).to(tl.float32) * LOG2_E)
        row_sum = tl.full([BLOCK_M], 1.0, dtype=tl.float32)
    else:
        row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)

    STEPS: tl.constexpr = SCHEDULED_N // BLOCK_N
    STAGES: tl.constexpr = 1 if HIDES_NAN else None
    # Compiled twice, for the cut tiles and for the full ones; with HIDES_NAN once, where every tile counts as cut.
    for IS_CUT in tl.static_range(1, HIDES_NAN - 1, -1):
        for run in range(count_runs(schedule, IS_CUT, HIDES_NAN)):
            first_tile, end_tile = load_run(schedule, run, max_runs, IS_CUT, HIDES_NAN)
            for step in tl.range(first_tile * STEPS, end_tile * STEPS, num_stages=STAGES):
                start_n = step * BLOCK_N
                k_tile = load_rows(
                    k, k_strides, batch, kv_head, start_n, kv_len, DIM, BLOCK_N, BLOCK_DIM, IS_CUT, USE_DESCRIPTORS
                )
                columns = start_n + tl.arange(0, BLOCK_N)
                scores = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
                factor = scale * LOG2_E
                if HAS_SOFTCAP:
                    scores = soft_capped(scores * scale, softcap)
                    factor = LOG2_E
                if IS_CUT:
                    hidden = hidden_elements(bounds, rows[:, None], columns[None, :], q_len, kv_len, NUM_PLANES)
                    scores = tl.where(hidden, float("-inf"), scores * factor)
                    factor = 1.0
                new_max = tl.maximum(row_max, tl.max(scores, 1) * factor)
                # A row that has seen nothing yet keeps -inf; subtracting 0 instead avoids inf - inf.
                shift = tl.where(new_max == float("-inf"), 0.0, new_max) if IS_CUT else new_max
                probabilities = tl.exp2(scores * factor - shift[:, None])
                correction = tl.exp2(row_max - shift)
                row_sum = row_sum * correction + tl.sum(probabilities, 1)
                row_max = new_max
                if HAS_DROPOUT:
                    kept = kept_elements(seed, batch_head, rows[:, None], columns[None, :], drop_below)
                    probabilities = tl.where(kept, probabilities, 0.0)
                v_tile = load_rows(
                    v, v_strides, batch, kv_head, start_n, kv_len, DIM_V, BLOCK_N, BLOCK_DIM_V, IS_CUT, USE_DESCRIPTORS
                )
                output = output * correction[:, None]
                if HIDES_NAN:
                    output = dot_of_visible(probabilities, hidden, v_tile, output, PRECISION)
                else:
                    output = tl.dot(probabilities.to(v_tile.dtype), v_tile, output, input_precision=PRECISION)

    # A row that saw nothing gets output 0 / 1 and log-sum-exp -inf + log 1.
    row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
    output = output * (keep_scale / row_sum)[:, None]
    store_rows(out, out_strides, output, batch, head, start_m, q_len, DIM_V, BLOCK_M, BLOCK_DIM_V)
    lse += batch_head.to(tl.int64) * q_len
    tl.store(lse + rows, (row_max + tl.log2(row_sum)) * LN_2, mask=rows < q_len)
    return holds_nan(output)
