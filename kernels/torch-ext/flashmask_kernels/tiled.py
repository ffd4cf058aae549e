"""The algorithm of the kernels in plain torch: for the CPU and for every device or shape that has no Triton kernel.

Rows are taken BLOCK_M at a time. For each such row tile the visible column tiles are joined to runs, a run costs one
batched matrix product per head group, and hidden tiles cost nothing. Low-precision inputs are computed in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .dropout import kept_elements
from .reference import visible_mask

# Small enough that the tiles at document boundaries waste little, large enough that a matrix product outweighs its
# Python call.
BLOCK = 128
# Scores of one step stay in a core's cache: 2^20 float32 are 4 MiB.
MAX_SCORES = 1 << 20


class _Run(NamedTuple):
    """Adjacent column tiles that a row tile visits; ``is_cut`` when an element of them is hidden."""

    columns: slice
    is_cut: bool


class _RowTile(NamedTuple):
    rows: slice
    runs: list[_Run]


class _Group(NamedTuple):
    """The part of the batch and of the heads that shares one mask, and the tiles that this mask leaves visible."""

    batch: slice
    heads: slice
    kv_heads: slice
    bounds: Tensor
    row_tiles: list[_RowTile]


def tiled_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    sinks: Tensor | None,
    seed: Tensor | None,
    scale: float,
    softcap: float | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Output ``[B, H, S_q, D_v]`` in the query's dtype, log-sum-exp ``[B, H, S_q]`` in float32 (or float64)."""
    batch_size, num_heads, q_len, _ = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    out = query.new_empty(batch_size, q_len, num_heads, value.shape[-1]).transpose(1, 2)
    lse = query.new_empty(batch_size, num_heads, q_len, dtype=dtype)
    # 0 * NaN is NaN, also where the 0 is the weight of a hidden key.
    hides_nan = not _all_finite(value)
    for group in _groups(query, key, bounds):
        q, k, v, group_out, group_lse = (
            _split_heads(tensor[group.batch, heads], group)
            for tensor, heads in (
                (query, group.heads),
                (key, group.kv_heads),
                (value, group.kv_heads),
                (out, group.heads),
                (lse, group.heads),
            )
        )
        for rows, runs in group.row_tiles:
            q_tile = q[..., rows, :].to(dtype) * scale
            shape = q_tile.shape[:-1]
            if sinks is None:
                row_max, row_sum = q_tile.new_full(shape, -torch.inf), q_tile.new_zeros(shape)
            else:
                group_sinks = sinks[group.heads].to(dtype).view(1, shape[1], shape[2], 1)
                row_max, row_sum = group_sinks.expand(shape), q_tile.new_ones(shape)
            output = q_tile.new_zeros(*shape, v.shape[-1])
            for run in runs:
                scores = _scores(q_tile, k, rows, run, group.bounds, q_len, softcap)
                new_max = torch.maximum(row_max, scores.amax(-1))
                shift = new_max.masked_fill(new_max == -torch.inf, 0.0)
                probabilities = scores.sub_(shift[..., None]).exp_()
                correction = (row_max - shift).exp_()
                row_sum = row_sum * correction + probabilities.sum(-1)
                if seed is not None:
                    probabilities.mul_(_keep_factors(seed, group, query, rows, run, dropout_p))
                visible = _visible(group.bounds, rows, run.columns, q_len) if hides_nan else None
                output.mul_(correction[..., None])
                output.add_(_matmul(probabilities, v[..., run.columns, :].to(dtype), visible))
                row_max = new_max
            group_out[..., rows, :] = output.div_(row_sum.masked_fill(row_sum == 0.0, 1.0)[..., None]).to(out.dtype)
            group_lse[..., rows] = row_max + row_sum.log()
    return out, lse


def tiled_backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    out: Tensor,
    lse: Tensor,
    seed: Tensor | None,
    scale: float,
    softcap: float | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, and delta = rowsum(out * d_out) - d_lse, float32 ``[B, H, S_q]``."""
    q_len = query.shape[2]
    dtype = lse.dtype
    delta = (out.to(dtype) * d_out.to(dtype)).sum(-1)
    if d_lse is not None:
        delta -= d_lse
    # exp(score - inf) is 0, the probability of every key in a row that sees nothing.
    safe_lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    d_query, d_key, d_value = (
        tensor.new_zeros(tensor.shape[0], tensor.shape[2], tensor.shape[1], tensor.shape[3], dtype=dtype).transpose(
            1, 2
        )
        for tensor in (query, key, value)
    )
    hides_nan = not _all_finite(query, key, value, d_out, delta)
    for group in _groups(query, key, bounds):
        q, d_o, group_lse, group_delta, d_q = (
            _split_heads(tensor[group.batch, group.heads], group) for tensor in (query, d_out, safe_lse, delta, d_query)
        )
        k, v, d_k, d_v = (
            _split_heads(tensor[group.batch, group.kv_heads], group) for tensor in (key, value, d_key, d_value)
        )
        for rows, runs in group.row_tiles:
            q_tile = q[..., rows, :].to(dtype) * scale
            d_o_tile = d_o[..., rows, :].to(dtype)
            for run in runs:
                scores = _scores(q_tile, k, rows, run, group.bounds, q_len, softcap)
                slope = None if softcap is None else 1 - (scores / softcap).square_()
                probabilities = scores.sub_(group_lse[..., rows, None]).exp_()
                visible = _visible(group.bounds, rows, run.columns, q_len) if hides_nan else None
                if visible is not None:
                    probabilities.masked_fill_(~visible, 0.0)
                d_scores = _matmul(d_o_tile, v[..., run.columns, :].to(dtype).transpose(-1, -2))
                if seed is None:
                    d_v[..., run.columns, :] += _matmul_transposed(probabilities, d_o_tile, visible)
                else:
                    factors = _keep_factors(seed, group, query, rows, run, dropout_p)
                    d_v[..., run.columns, :] += _matmul_transposed(probabilities * factors, d_o_tile, visible)
                    d_scores.mul_(factors)
                d_scores.sub_(group_delta[..., rows, None]).mul_(probabilities)
                if slope is not None:
                    # A hidden score is -inf: its slope is NaN or -inf, its gradient 0.
                    d_scores.mul_(slope.masked_fill_(probabilities == 0.0, 0.0))
                if visible is not None:
                    d_scores.masked_fill_(~visible, 0.0)
                d_q[..., rows, :] += _matmul(d_scores, k[..., run.columns, :].to(dtype), visible).mul_(scale)
                d_k[..., run.columns, :] += _matmul_transposed(d_scores, q_tile, visible)
    return d_query.to(query.dtype), d_key.to(key.dtype), d_value.to(value.dtype), delta


def _groups(query: Tensor, key: Tensor, bounds: Tensor) -> Iterator[_Group]:
    batch_size, num_heads, q_len, _ = query.shape
    kv_heads = key.shape[1]
    mask_batch, mask_heads = bounds.shape[:2]
    heads_per_mask, heads_per_kv_head = num_heads // mask_heads, num_heads // kv_heads
    group_batch = batch_size if mask_batch == 1 else 1
    # Any int32 is legal; within [0, S_q] row numbers can be subtracted.
    bounds = bounds.clamp(0, q_len)
    max_columns = max(BLOCK, MAX_SCORES // (group_batch * heads_per_mask * BLOCK) // BLOCK * BLOCK)
    for batch in range(mask_batch):
        for head in range(mask_heads):
            first_head = head * heads_per_mask
            yield _Group(
                slice(batch * group_batch, (batch + 1) * group_batch),
                slice(first_head, first_head + heads_per_mask),
                slice(first_head // heads_per_kv_head, (first_head + heads_per_mask - 1) // heads_per_kv_head + 1),
                bounds[batch, head],
                visible_row_tiles(bounds[batch, head], q_len, max_columns),
            )


def visible_row_tiles(bounds: Tensor, q_len: int, max_columns: int) -> list[_RowTile]:
    """Every row tile with the runs that it visits, none when it sees nothing.

    Args:
        bounds: int32 ``[C, S_k]``, one mask.
        max_columns: the longest run, a multiple of BLOCK.
    """
    kv_len = bounds.shape[-1]
    hidden, cut = (kind.tolist() for kind in classify_tiles(bounds, q_len, BLOCK, BLOCK))
    row_tiles = []
    for row_hidden, row_cut, start_row in zip(hidden, cut, range(0, q_len, BLOCK)):
        runs: list[_Run] = []
        for is_hidden, is_cut, start in zip(row_hidden, row_cut, range(0, kv_len, BLOCK)):
            if is_hidden:
                continue
            stop = min(start + BLOCK, kv_len)
            previous = runs[-1] if runs else None
            if previous and previous.columns.stop == start and stop - previous.columns.start <= max_columns:
                runs[-1] = _Run(slice(previous.columns.start, stop), previous.is_cut or is_cut)
            else:
                runs.append(_Run(slice(start, stop), is_cut))
        row_tiles.append(_RowTile(slice(start_row, min(start_row + BLOCK, q_len)), runs))
    return row_tiles


def classify_tiles(bounds: Tensor, q_len: int, block_m: int, block_n: int) -> tuple[Tensor, Tensor]:
    """Which tiles are hidden and which of the others are cut (arXiv 2410.01359, section 4.2): by the minima and maxima
    of the planes where they settle it, else column by column.

    Args:
        bounds: int32 ``[C, S_k]``, one mask.

    Returns:
        Two bool tensors ``[row tiles, column tiles]``. A tile is hidden when the intervals of its columns together
        cover all its rows, cut when it is not and an element of it is hidden.
    """
    kv_len = bounds.shape[-1]
    first_row = torch.arange(0, q_len, block_m, device=bounds.device)[:, None]
    end_row = (first_row + block_m).clamp(max=q_len)
    # Repeating the last column fills the last tile without changing what it is.
    intervals = _intervals(bounds, q_len)
    last = intervals[..., -1:].expand(-1, 2, -kv_len % block_n)
    start, end = torch.cat([intervals, last], -1).unflatten(-1, (-1, block_n)).unbind(1)
    hidden = ((start.amax(-1)[:, None] <= first_row) & (end.amin(-1)[:, None] >= end_row)).any(0)
    touched = ((start.amin(-1)[:, None] < end_row) & (end.amax(-1)[:, None] > first_row)).any(0)
    rows, columns = (touched & ~hidden).nonzero(as_tuple=True)
    for row, column in zip(rows.split(_AT_ONCE), columns.split(_AT_ONCE)):
        first, last = first_row[row], end_row[row]
        # How far the rows are covered without a gap. An interval may reach further only after another one has.
        covered = first.expand(-1, block_n)
        for _ in intervals:
            for lower, upper in zip(start[:, column], end[:, column]):
                covered = torch.where((lower <= covered) & (upper > covered), upper, covered)
        hidden[row, column] = (covered >= last).all(-1)
        touched[row, column] = (start[:, column].maximum(first) < end[:, column].minimum(last)).any(-1).any(0)
    return hidden, touched & ~hidden


_AT_ONCE = 4096  # tiles that are looked at column by column


def _intervals(bounds: Tensor, q_len: int) -> Tensor:
    """Bounds of one mask as intervals of hidden rows, ``[n, 2, S_k]``."""
    num_planes, kv_len = bounds.shape
    if num_planes > 2:
        return bounds.unflatten(0, (-1, 2))
    start, zero, everything = bounds[0], torch.zeros_like(bounds[0]), torch.full_like(bounds[0], q_len)
    end = bounds[1] if num_planes == 2 else torch.arange(kv_len, device=bounds.device) - (kv_len - q_len)
    return torch.stack([torch.stack([start, everything]), torch.stack([zero, end.to(bounds.dtype)])])


def _split_heads(tensor: Tensor, group: _Group) -> Tensor:
    """``[B, heads, ...]`` -> ``[B, kv heads, heads per kv head, ...]``, a view."""
    kv_heads = group.kv_heads.stop - group.kv_heads.start
    return tensor.unflatten(1, (kv_heads, tensor.shape[1] // kv_heads))


def _scores(
    q_tile: Tensor, k: Tensor, rows: slice, run: _Run, bounds: Tensor, q_len: int, softcap: float | None
) -> Tensor:
    scores = _matmul(q_tile, k[..., run.columns, :].to(q_tile.dtype).transpose(-1, -2))
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    if run.is_cut:
        scores.masked_fill_(~_visible(bounds, rows, run.columns, q_len), -torch.inf)
    return scores


def _keep_factors(seed: Tensor, group: _Group, query: Tensor, rows: slice, run: _Run, dropout_p: float) -> Tensor:
    """What dropout multiplies the weights of one run with, ``[B, kv heads, heads per kv head, rows, columns]``."""
    head = torch.arange(query.shape[0] * query.shape[1], device=query.device).view(query.shape[:2])
    head = _split_heads(head[group.batch, group.heads], group)[..., None, None]
    row, column = (torch.arange(part.start, part.stop, device=query.device) for part in (rows, run.columns))
    kept = kept_elements(seed, head, row[:, None], column, dropout_p)
    return kept.to(torch.promote_types(query.dtype, torch.float32)).div_(1 - dropout_p)


def _visible(bounds: Tensor, rows: slice, columns: slice, q_len: int) -> Tensor:
    """The dense mask of one run, ``[rows, columns]``."""
    planes = bounds[:, columns] - rows.start
    if len(bounds) == 1:
        # The causal triangle depends on where the run lies: give it as UTE.
        diagonal = torch.arange(columns.start, columns.stop, device=bounds.device, dtype=bounds.dtype)
        planes = torch.cat([planes, (diagonal - (bounds.shape[-1] - q_len) - rows.start)[None]])
    return visible_mask(planes, rows.stop - rows.start)


def _all_finite(*tensors: Tensor) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def _matmul(left: Tensor, right: Tensor, visible: Tensor | None = None) -> Tensor:
    """``[B, K, G, M, X] @ [B, K, 1, X, Y]``: the heads of one key head are rows of one product.

    With ``visible``, bool ``[M, X]``, what ``right`` holds counts only where it is seen: NaN and infinity make NaN
    there and nothing elsewhere.
    """
    batch, kv_heads, heads, rows, inner = left.shape
    finite = right if visible is None else right.where(right.isfinite(), 0.0)
    product = left.reshape(batch, kv_heads, heads * rows, inner) @ finite[:, :, 0]
    product = product.view(batch, kv_heads, heads, rows, -1)
    if visible is not None:
        seen = visible.to(right.dtype) @ right.isfinite().logical_not_().to(right.dtype)
        product.masked_fill_(seen > 0, torch.nan)
    return product


def _matmul_transposed(left: Tensor, right: Tensor, visible: Tensor | None = None) -> Tensor:
    """``sum over G of [B, K, G, M, X]^T @ [B, K, G, M, Y]`` as ``[B, K, 1, X, Y]``; ``visible`` as in `_matmul`."""
    finite = right if visible is None else right.where(right.isfinite(), 0.0)
    product = (left.flatten(2, 3).transpose(-1, -2) @ finite.flatten(2, 3)).unsqueeze(2)
    if visible is not None:
        seen = visible.to(right.dtype).T @ right.isfinite().logical_not_().to(right.dtype)
        product.masked_fill_(seen.sum(2, keepdim=True) > 0, torch.nan)
    return product
