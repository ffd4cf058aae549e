"""FlashMask's backward pass for one tile of keys, or of queries: what each visits, and its gradients."""

from __future__ import annotations

import triton
import triton.language as tl

from .row_statistics import statistics_offset
from .tiles import (
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
def _score_gradients(
    scores, d_probabilities, lse_2, delta, hidden, kept, scale, softcap, keep_scale,
    HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr, IS_CUT: tl.constexpr, HIDES_NAN: tl.constexpr,
):  # fmt: skip
    """P after dropout and dS (before the factor ``scale``) of one tile, from Q K^T and dO V^T in either orientation."""
    if HAS_SOFTCAP:
        capped = soft_capped(scores * scale, softcap)
        exponent = capped * LOG2_E - lse_2
    else:
        exponent = scores * (scale * LOG2_E) - lse_2
    probabilities = tl.exp2(exponent)
    if IS_CUT:
        probabilities = tl.where(hidden, 0.0, probabilities)
    if HAS_DROPOUT:
        d_probabilities = tl.where(kept, d_probabilities * keep_scale, 0.0)
    d_scores = probabilities * (d_probabilities - delta)
    if HAS_SOFTCAP:
        d_scores *= 1.0 - (capped / softcap) * (capped / softcap)
    if HIDES_NAN:
        d_scores = tl.where(hidden, 0.0, d_scores)
    if HAS_DROPOUT:
        probabilities = tl.where(kept, probabilities, 0.0)
    return probabilities, d_scores


@triton.jit
def key_value_gradients(
    q, k, v, d_out, lse_2, delta, d_k, d_v, bounds, schedule, seed, strides, factors, sizes, program, first,
    NUM_HEADS: tl.constexpr, HEADS_PER_KV_HEAD: tl.constexpr, HEADS_PER_MASK: tl.constexpr, NUM_PLANES: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_DIM_V: tl.constexpr,
    PRECISION: tl.constexpr, USE_DESCRIPTORS: tl.constexpr, SCHEDULED_M: tl.constexpr, SCHEDULED_N: tl.constexpr,
    HIDES_NAN: tl.constexpr,
):  # fmt: skip
    """Write dK and dV of BLOCK_N keys, from key ``first`` of a column tile on. Returns whether they hold NaN.

    The tiles of the schedule are SCHEDULED_M x SCHEDULED_N. With HIDES_NAN, NaN of a row stays out of the gradients of
    the keys that it does not see.
    """
    q_strides, k_strides, v_strides, d_out_strides, d_k_strides, d_v_strides = strides
    scale, softcap, drop_below, keep_scale = factors
    q_len, kv_len, mask_stride_b, max_runs = sizes
    num_column_tiles = tl.cdiv(kv_len, SCHEDULED_N)
    column_tile = program % num_column_tiles
    batch_kv_head = program // num_column_tiles
    KV_HEADS: tl.constexpr = NUM_HEADS // HEADS_PER_KV_HEAD
    batch = batch_kv_head // KV_HEADS
    kv_head = batch_kv_head % KV_HEADS
    start_n = column_tile * SCHEDULED_N + first
    columns = start_n + tl.arange(0, BLOCK_N)
    k_tile = load_rows(k, k_strides, batch, kv_head, start_n, kv_len, DIM, BLOCK_N, BLOCK_DIM, True, USE_DESCRIPTORS)
    v_tile = load_rows(
        v, v_strides, batch, kv_head, start_n, kv_len, DIM_V, BLOCK_N, BLOCK_DIM_V, True, USE_DESCRIPTORS
    )
    d_k_tile = tl.zeros([BLOCK_N, BLOCK_DIM], dtype=tl.float32)
    d_v_tile = tl.zeros([BLOCK_N, BLOCK_DIM_V], dtype=tl.float32)

    STAGES: tl.constexpr = 1 if HIDES_NAN else None
    # Query heads that share a mask are visited in turn, tile by tile: one long loop keeps the loads in flight, where a
    # loop per head drains them between heads. H200, 32K, D = 64 / 128: 40 documents 1.29 / 2.21 ms instead of
    # 1.51 / 2.40, one document 18.2 / 34.5 instead of 18.7 / 33.1.
    HEADS_PER_LOOP: tl.constexpr = HEADS_PER_KV_HEAD if HEADS_PER_MASK >= HEADS_PER_KV_HEAD else 1
    STEPS: tl.constexpr = SCHEDULED_M // BLOCK_M * HEADS_PER_LOOP
    for member in range(0, HEADS_PER_KV_HEAD, HEADS_PER_LOOP):
        first_head = kv_head * HEADS_PER_KV_HEAD + member
        mask = (batch * mask_stride_b + first_head // HEADS_PER_MASK).to(tl.int64)
        mask_bounds = bounds + mask * NUM_PLANES * kv_len
        mask_schedule = schedule + (mask * num_column_tiles + column_tile) * (2 + 2 * max_runs)
        # Compiled twice, for the cut tiles and for the full ones; with HIDES_NAN once, where every tile counts as cut.
        for IS_CUT in tl.static_range(1, HIDES_NAN - 1, -1):
            for run in range(count_runs(mask_schedule, IS_CUT, HIDES_NAN)):
                first_tile, end_tile = load_run(mask_schedule, run, max_runs, IS_CUT, HIDES_NAN)
                for step in tl.range(first_tile * STEPS, end_tile * STEPS, num_stages=STAGES):
                    head = first_head + step % HEADS_PER_LOOP
                    start_m = step // HEADS_PER_LOOP * BLOCK_M
                    rows = start_m + tl.arange(0, BLOCK_M)
                    offsets = statistics_offset(batch * NUM_HEADS + head, q_len) + rows
                    q_tile = load_rows(
                        q, q_strides, batch, head, start_m, q_len, DIM, BLOCK_M, BLOCK_DIM, True, USE_DESCRIPTORS
                    )
                    row_lse_2 = tl.load(lse_2 + offsets)
                    scores = tl.dot(k_tile, q_tile.T, input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
                    d_out_tile = load_rows(
                        d_out, d_out_strides, batch, head, start_m, q_len,
                        DIM_V, BLOCK_M, BLOCK_DIM_V, True, USE_DESCRIPTORS,
                    )  # fmt: skip
                    d_probabilities = tl.dot(v_tile, d_out_tile.T, input_precision=PRECISION)
                    row_delta = tl.load(delta + offsets)
                    hidden = False
                    if IS_CUT:
                        hidden = hidden_elements(
                            mask_bounds, rows[None, :], columns[:, None], q_len, kv_len, NUM_PLANES
                        )
                    kept = True
                    if HAS_DROPOUT:
                        kept = kept_elements(
                            seed, batch * NUM_HEADS + head, rows[None, :], columns[:, None], drop_below
                        )
                    probabilities, d_scores = _score_gradients(
                        scores, d_probabilities, row_lse_2[None, :], row_delta[None, :], hidden, kept,
                        scale, softcap, keep_scale, HAS_SOFTCAP, HAS_DROPOUT, IS_CUT, HIDES_NAN,
                    )  # fmt: skip
                    if HIDES_NAN:
                        d_v_tile = dot_of_visible(probabilities, hidden, d_out_tile, d_v_tile, PRECISION)
                        d_k_tile = dot_of_visible(d_scores, hidden, q_tile, d_k_tile, PRECISION)
                    else:
                        d_v_tile = tl.dot(
                            probabilities.to(d_out_tile.dtype), d_out_tile, d_v_tile, input_precision=PRECISION
                        )
                        d_k_tile = tl.dot(d_scores.to(q_tile.dtype), q_tile, d_k_tile, input_precision=PRECISION)

    d_k_tile *= scale
    d_v_tile *= keep_scale
    store_rows(d_k, d_k_strides, d_k_tile, batch, kv_head, start_n, kv_len, DIM, BLOCK_N, BLOCK_DIM)
    store_rows(d_v, d_v_strides, d_v_tile, batch, kv_head, start_n, kv_len, DIM_V, BLOCK_N, BLOCK_DIM_V)
    return holds_nan(d_k_tile) | holds_nan(d_v_tile)


@triton.jit
def query_gradients(
    q, k, v, d_out, lse_2, delta, d_q, bounds, schedule, seed, strides, factors, sizes, program, first,
    NUM_HEADS: tl.constexpr, HEADS_PER_KV_HEAD: tl.constexpr, HEADS_PER_MASK: tl.constexpr, NUM_PLANES: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_DIM_V: tl.constexpr,
    PRECISION: tl.constexpr, USE_DESCRIPTORS: tl.constexpr, SCHEDULED_M: tl.constexpr, SCHEDULED_N: tl.constexpr,
    HIDES_NAN: tl.constexpr,
):  # fmt: skip
    """Write dQ of BLOCK_M rows, from row ``first`` of a row tile on. Returns whether it holds NaN.

    The tiles of the schedule are SCHEDULED_M x SCHEDULED_N. With HIDES_NAN, NaN of a hidden key stays out.
    """
    q_strides, k_strides, v_strides, d_out_strides, d_q_strides = strides
    scale, softcap, drop_below, keep_scale = factors
    q_len, kv_len, mask_stride_b, max_runs = sizes
    num_row_tiles = tl.cdiv(q_len, SCHEDULED_M)
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
    d_out_tile = load_rows(
        d_out, d_out_strides, batch, head, start_m, q_len, DIM_V, BLOCK_M, BLOCK_DIM_V, True, USE_DESCRIPTORS
    )
    offsets = statistics_offset(batch_head, q_len) + rows
    row_lse_2 = tl.load(lse_2 + offsets)
    row_delta = tl.load(delta + offsets)
    d_q_tile = tl.zeros([BLOCK_M, BLOCK_DIM], dtype=tl.float32)

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
                v_tile = load_rows(
                    v, v_strides, batch, kv_head, start_n, kv_len, DIM_V, BLOCK_N, BLOCK_DIM_V, IS_CUT, USE_DESCRIPTORS
                )
                scores = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
                d_probabilities = tl.dot(d_out_tile, v_tile.T, input_precision=PRECISION)
                columns = start_n + tl.arange(0, BLOCK_N)
                hidden = False
                if IS_CUT:
                    hidden = hidden_elements(bounds, rows[:, None], columns[None, :], q_len, kv_len, NUM_PLANES)
                kept = True
                if HAS_DROPOUT:
                    kept = kept_elements(seed, batch_head, rows[:, None], columns[None, :], drop_below)
                _, d_scores = _score_gradients(
                    scores, d_probabilities, row_lse_2[:, None], row_delta[:, None], hidden, kept,
                    scale, softcap, keep_scale, HAS_SOFTCAP, HAS_DROPOUT, IS_CUT, HIDES_NAN,
                )  # fmt: skip
                if HIDES_NAN:
                    d_q_tile = dot_of_visible(d_scores, hidden, k_tile, d_q_tile, PRECISION)
                else:
                    d_q_tile = tl.dot(d_scores.to(k_tile.dtype), k_tile, d_q_tile, input_precision=PRECISION)

    d_q_tile *= scale
    store_rows(d_q, d_q_strides, d_q_tile, batch, head, start_m, q_len, DIM, BLOCK_M, BLOCK_DIM)
    return holds_nan(d_q_tile)
