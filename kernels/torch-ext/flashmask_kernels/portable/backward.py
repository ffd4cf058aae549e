"""FlashMask's backward pass in two kernels: one program per key tile makes dK and dV, one per query tile makes dQ.

The scores are computed twice, seven matrix products instead of five, and in return nothing is accumulated by atomics:
gradients are bitwise repeatable, and each kernel skips hidden tiles with a schedule of its own. A fused kernel with
atomic dQ measured 293-330 TFLOP/s where this form reached 433 (H200, causal, 32K, D = 128, bf16).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..dropout import drop_below
from ..schedule import mask_strides, max_runs_of
from .configs import Configs
from .forward import head_dim_blocks
from .tiles import (
    LOG2_E,
    descriptors_can_address,
    hidden_elements,
    kept_elements,
    load_rows,
    load_run,
    soft_capped,
    store_rows,
    tile_source,
)


@triton.jit(do_not_specialize=["q_len"])
def backward_preprocess_kernel(
    out,
    d_out,
    lse,
    d_lse,
    lse_2,
    delta,
    out_strides,
    d_out_strides,
    q_len,
    NUM_HEADS: tl.constexpr,
    HAS_D_LSE: tl.constexpr,
    DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_DIM_V: tl.constexpr,
):
    """The log-sum-exp in base 2, and delta = rowsum(out * d_out) - d_lse: P * (dP - delta) then holds the gradient of
    the log-sum-exp as well.
    """
    num_row_tiles = tl.cdiv(q_len, BLOCK_M)
    start_m = (tl.program_id(0) % num_row_tiles) * BLOCK_M
    batch_head = tl.program_id(0) // num_row_tiles
    batch = batch_head // NUM_HEADS
    head = batch_head % NUM_HEADS
    rows = start_m + tl.arange(0, BLOCK_M)
    out_tile = load_rows(out, out_strides, batch, head, start_m, q_len, DIM_V, BLOCK_M, BLOCK_DIM_V, True, False)
    d_out_tile = load_rows(d_out, d_out_strides, batch, head, start_m, q_len, DIM_V, BLOCK_M, BLOCK_DIM_V, True, False)
    row_delta = tl.sum(out_tile.to(tl.float32) * d_out_tile.to(tl.float32), 1)
    offsets = batch_head.to(tl.int64) * q_len + rows
    if HAS_D_LSE:
        row_delta -= tl.load(d_lse + offsets, mask=rows < q_len, other=0.0)
    tl.store(delta + offsets, row_delta, mask=rows < q_len)
    tl.store(lse_2 + offsets, tl.load(lse + offsets, mask=rows < q_len) * LOG2_E, mask=rows < q_len)


@triton.jit
def _score_gradients(
    scores,
    d_probabilities,
    lse_2,
    delta,
    hidden,
    kept,
    scale,
    softcap,
    keep_scale,
    HAS_SOFTCAP: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    IS_CUT: tl.constexpr,
):
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
    if HAS_DROPOUT:
        probabilities = tl.where(kept, probabilities, 0.0)
    return probabilities, d_scores


@triton.jit(do_not_specialize=["q_len", "kv_len", "mask_stride_b", "max_runs", "drop_below"])
def key_value_gradient_kernel(
    q,
    k,
    v,
    d_out,
    lse_2,
    delta,
    d_k,
    d_v,
    bounds,
    schedule,
    seed,
    q_strides,
    k_strides,
    v_strides,
    d_out_strides,
    d_k_strides,
    d_v_strides,
    scale,
    softcap,
    drop_below,
    keep_scale,
    q_len,
    kv_len,
    mask_stride_b,
    max_runs,
    NUM_HEADS: tl.constexpr,
    HEADS_PER_KV_HEAD: tl.constexpr,
    HEADS_PER_MASK: tl.constexpr,
    NUM_PLANES: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_DIM_V: tl.constexpr,
    PRECISION: tl.constexpr,
    USE_DESCRIPTORS: tl.constexpr,
):
    num_column_tiles = tl.cdiv(kv_len, BLOCK_N)
    column_tile = tl.program_id(0) % num_column_tiles
    batch_kv_head = tl.program_id(0) // num_column_tiles
    KV_HEADS: tl.constexpr = NUM_HEADS // HEADS_PER_KV_HEAD
    batch = batch_kv_head // KV_HEADS
    kv_head = batch_kv_head % KV_HEADS
    start_n = column_tile * BLOCK_N
    columns = start_n + tl.arange(0, BLOCK_N)
    k_tile = load_rows(k, k_strides, batch, kv_head, start_n, kv_len, DIM, BLOCK_N, BLOCK_DIM, True, USE_DESCRIPTORS)
    v_tile = load_rows(
        v, v_strides, batch, kv_head, start_n, kv_len, DIM_V, BLOCK_N, BLOCK_DIM_V, True, USE_DESCRIPTORS
    )
    d_k_tile = tl.zeros([BLOCK_N, BLOCK_DIM], dtype=tl.float32)
    d_v_tile = tl.zeros([BLOCK_N, BLOCK_DIM_V], dtype=tl.float32)

    # Query heads that share a mask are visited in turn, tile by tile: one long loop keeps the loads in flight, where a
    # loop per head drains them between heads. H200, 32K, D = 64 / 128: 40 documents 1.29 / 2.21 ms instead of
    # 1.51 / 2.40, one document 18.2 / 34.5 instead of 18.7 / 33.1.
    HEADS_PER_LOOP: tl.constexpr = HEADS_PER_KV_HEAD if HEADS_PER_MASK >= HEADS_PER_KV_HEAD else 1
    for member in range(0, HEADS_PER_KV_HEAD, HEADS_PER_LOOP):
        first_head = kv_head * HEADS_PER_KV_HEAD + member
        mask = (batch * mask_stride_b + first_head // HEADS_PER_MASK).to(tl.int64)
        mask_bounds = bounds + mask * NUM_PLANES * kv_len
        mask_schedule = schedule + (mask * num_column_tiles + column_tile) * (2 + 2 * max_runs)
        # Compiled twice: for the cut tiles, then for the full ones.
        for IS_CUT in tl.static_range(1, -1, -1):
            for run in range(tl.load(mask_schedule + (1 - IS_CUT))):
                first_tile, end_tile = load_run(mask_schedule, run, max_runs, IS_CUT)
                for step in range(first_tile * HEADS_PER_LOOP, end_tile * HEADS_PER_LOOP):
                    head = first_head + step % HEADS_PER_LOOP
                    start_m = step // HEADS_PER_LOOP * BLOCK_M
                    rows = start_m + tl.arange(0, BLOCK_M)
                    offsets = (batch * NUM_HEADS + head).to(tl.int64) * q_len + rows
                    q_tile = load_rows(
                        q, q_strides, batch, head, start_m, q_len, DIM, BLOCK_M, BLOCK_DIM, True, USE_DESCRIPTORS
                    )
                    # P of a row that does not exist is exp(-inf) = 0.
                    row_lse_2 = tl.load(lse_2 + offsets, mask=rows < q_len, other=float("inf"))
                    scores = tl.dot(k_tile, q_tile.T, input_precision=PRECISION)
                    d_out_tile = load_rows(
                        d_out, d_out_strides, batch, head, start_m, q_len,
                        DIM_V, BLOCK_M, BLOCK_DIM_V, True, USE_DESCRIPTORS,
                    )  # fmt: skip
                    d_probabilities = tl.dot(v_tile, d_out_tile.T, input_precision=PRECISION)
                    row_delta = tl.load(delta + offsets, mask=rows < q_len, other=0.0)
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
                        scale, softcap, keep_scale, HAS_SOFTCAP, HAS_DROPOUT, IS_CUT,
                    )  # fmt: skip
                    d_v_tile = tl.dot(
                        probabilities.to(d_out_tile.dtype), d_out_tile, d_v_tile, input_precision=PRECISION
                    )
                    d_k_tile = tl.dot(d_scores.to(q_tile.dtype), q_tile, d_k_tile, input_precision=PRECISION)

    d_k_tile *= scale
    d_v_tile *= keep_scale
    store_rows(d_k, d_k_strides, d_k_tile, batch, kv_head, start_n, kv_len, DIM, BLOCK_N, BLOCK_DIM)
    store_rows(d_v, d_v_strides, d_v_tile, batch, kv_head, start_n, kv_len, DIM_V, BLOCK_N, BLOCK_DIM_V)


@triton.jit(do_not_specialize=["q_len", "kv_len", "mask_stride_b", "max_runs", "drop_below"])
def query_gradient_kernel(
    q,
    k,
    v,
    d_out,
    lse_2,
    delta,
    d_q,
    bounds,
    schedule,
    seed,
    q_strides,
    k_strides,
    v_strides,
    d_out_strides,
    d_q_strides,
    scale,
    softcap,
    drop_below,
    keep_scale,
    q_len,
    kv_len,
    mask_stride_b,
    max_runs,
    NUM_HEADS: tl.constexpr,
    HEADS_PER_KV_HEAD: tl.constexpr,
    HEADS_PER_MASK: tl.constexpr,
    NUM_PLANES: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_DIM_V: tl.constexpr,
    PRECISION: tl.constexpr,
    USE_DESCRIPTORS: tl.constexpr,
):
    num_row_tiles = tl.cdiv(q_len, BLOCK_M)
    row_tile = num_row_tiles - 1 - tl.program_id(0) % num_row_tiles
    batch_head = tl.program_id(0) // num_row_tiles
    batch = batch_head // NUM_HEADS
    head = batch_head % NUM_HEADS
    kv_head = head // HEADS_PER_KV_HEAD
    mask = (batch * mask_stride_b + head // HEADS_PER_MASK).to(tl.int64)
    bounds += mask * NUM_PLANES * kv_len
    schedule += (mask * num_row_tiles + row_tile) * (2 + 2 * max_runs)

    start_m = row_tile * BLOCK_M
    rows = start_m + tl.arange(0, BLOCK_M)
    q_tile = load_rows(q, q_strides, batch, head, start_m, q_len, DIM, BLOCK_M, BLOCK_DIM, True, USE_DESCRIPTORS)
    d_out_tile = load_rows(
        d_out, d_out_strides, batch, head, start_m, q_len, DIM_V, BLOCK_M, BLOCK_DIM_V, True, USE_DESCRIPTORS
    )
    offsets = batch_head.to(tl.int64) * q_len + rows
    row_lse_2 = tl.load(lse_2 + offsets, mask=rows < q_len, other=float("inf"))
    row_delta = tl.load(delta + offsets, mask=rows < q_len, other=0.0)
    d_q_tile = tl.zeros([BLOCK_M, BLOCK_DIM], dtype=tl.float32)

    # Compiled twice: for the cut tiles, then for the full ones.
    for IS_CUT in tl.static_range(1, -1, -1):
        for run in range(tl.load(schedule + (1 - IS_CUT))):
            first_tile, end_tile = load_run(schedule, run, max_runs, IS_CUT)
            for column_tile in range(first_tile, end_tile):
                start_n = column_tile * BLOCK_N
                k_tile = load_rows(
                    k, k_strides, batch, kv_head, start_n, kv_len, DIM, BLOCK_N, BLOCK_DIM, IS_CUT, USE_DESCRIPTORS
                )
                v_tile = load_rows(
                    v, v_strides, batch, kv_head, start_n, kv_len, DIM_V, BLOCK_N, BLOCK_DIM_V, IS_CUT, USE_DESCRIPTORS
                )
                scores = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)
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
                    scale, softcap, keep_scale, HAS_SOFTCAP, HAS_DROPOUT, IS_CUT,
                )  # fmt: skip
                d_q_tile = tl.dot(d_scores.to(k_tile.dtype), k_tile, d_q_tile, input_precision=PRECISION)

    d_q_tile *= scale
    store_rows(d_q, d_q_strides, d_q_tile, batch, head, start_m, q_len, DIM, BLOCK_M, BLOCK_DIM)


def attention_backward(
    d_out: torch.Tensor,
    d_lse: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    by_column: torch.Tensor,
    by_row: torch.Tensor,
    seed: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    dropout_p: float,
    configs: Configs,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the backward kernels.

    Args:
        d_out: gradient of the output, ``[B, H, S_q, D_v]``, last dimension contiguous.
        d_lse: gradient of the log-sum-exp, float32 ``[B, H, S_q]``, or None.
        by_column, by_row: schedules of ``bounds`` for the tile sizes of ``configs.key_value_gradient`` and
            ``configs.query_gradient``.
        seed: that of the forward pass.

    Returns:
        Gradients of query, key and value in their shapes and dtypes, laid out like a model's ``[B, S, H, D]``, and
        delta, the row sums of ``out * d_out`` less ``d_lse``, float32 ``[B, H, S_q]``.
    """
    batch_size, num_heads, q_len, dim = query.shape
    kv_heads, kv_len, dim_v = value.shape[1:]
    block_dim, block_dim_v = head_dim_blocks(dim, dim_v)
    mask_stride_b, heads_per_mask = mask_strides(bounds, num_heads)
    lse_2, delta = torch.empty_like(lse), torch.empty_like(lse)
    d_query, d_key, d_value = (
        tensor.new_empty(tensor.shape[0], tensor.shape[2], tensor.shape[1], tensor.shape[3]).transpose(1, 2)
        for tensor in (query, key, value)
    )

    preprocess_rows = 64 if block_dim_v <= 256 else 16
    backward_preprocess_kernel[(triton.cdiv(q_len, preprocess_rows) * batch_size * num_heads,)](
        out,
        d_out,
        lse,
        d_lse,
        lse_2,
        delta,
        out.stride()[:3],
        d_out.stride()[:3],
        q_len,
        NUM_HEADS=num_heads,
        HAS_D_LSE=d_lse is not None,
        DIM_V=dim_v,
        BLOCK_M=preprocess_rows,
        BLOCK_DIM_V=block_dim_v,
    )

    constants = {
        "NUM_HEADS": num_heads,
        "HEADS_PER_KV_HEAD": num_heads // kv_heads,
        "HEADS_PER_MASK": heads_per_mask,
        "NUM_PLANES": bounds.shape[2],
        "HAS_SOFTCAP": softcap is not None,
        "HAS_DROPOUT": seed is not None,
        "DIM": dim,
        "DIM_V": dim_v,
        "BLOCK_DIM": block_dim,
        "BLOCK_DIM_V": block_dim_v,
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
    }
    softcap = 0.0 if softcap is None else softcap
    can_use_descriptors = descriptors_can_address(query, key, value, d_out)

    config = configs.key_value_gradient
    use_descriptors = config.use_descriptors and can_use_descriptors
    key_value_gradient_kernel[(triton.cdiv(kv_len, config.block_n) * batch_size * kv_heads,)](
        tile_source(query, config.block_m, block_dim, use_descriptors),
        tile_source(key, config.block_n, block_dim, use_descriptors),
        tile_source(value, config.block_n, block_dim_v, use_descriptors),
        tile_source(d_out, config.block_m, block_dim_v, use_descriptors),
        lse_2,
        delta,
        d_key,
        d_value,
        bounds,
        by_column,
        seed,
        query.stride()[:3],
        key.stride()[:3],
        value.stride()[:3],
        d_out.stride()[:3],
        d_key.stride()[:3],
        d_value.stride()[:3],
        scale,
        softcap,
        drop_below(dropout_p),
        1.0 / (1.0 - dropout_p),
        q_len,
        kv_len,
        mask_stride_b,
        max_runs_of(by_column),
        **constants,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        USE_DESCRIPTORS=use_descriptors,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )

    config = configs.query_gradient
    use_descriptors = config.use_descriptors and can_use_descriptors
    query_gradient_kernel[(triton.cdiv(q_len, config.block_m) * batch_size * num_heads,)](
        tile_source(query, config.block_m, block_dim, use_descriptors),
        tile_source(key, config.block_n, block_dim, use_descriptors),
        tile_source(value, config.block_n, block_dim_v, use_descriptors),
        tile_source(d_out, config.block_m, block_dim_v, use_descriptors),
        lse_2,
        delta,
        d_query,
        bounds,
        by_row,
        seed,
        query.stride()[:3],
        key.stride()[:3],
        value.stride()[:3],
        d_out.stride()[:3],
        d_query.stride()[:3],
        scale,
        softcap,
        drop_below(dropout_p),
        1.0 / (1.0 - dropout_p),
        q_len,
        kv_len,
        mask_stride_b,
        max_runs_of(by_row),
        **constants,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        USE_DESCRIPTORS=use_descriptors,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return d_query, d_key, d_value, delta
