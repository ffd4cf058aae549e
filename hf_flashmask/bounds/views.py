"""What bounds say, in other forms: a dense mask, the paper's indices, counts of visible pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from flashmask_kernels.reference import visible_mask

from .algebra import disjoint
from .form import check_bounds, hidden_intervals


def to_dense(bounds: Tensor, q_len: int | None = None) -> Tensor:
    """The mask as bool `[B or 1, H or 1, S_q, S_k]`, True = visible. The definition of bounds; O(S_q x S_k) memory.

    `q_len` (S_q) defaults to S_k.
    """
    check_bounds(bounds)
    return visible_mask(bounds, bounds.shape[3] if q_len is None else q_len)


def to_startend_row_indices(bounds: Tensor) -> tuple[Tensor, bool]:
    """The paper's and PaddlePaddle's form: int32 `[B, H, S_k, C]`, and whether it is to be read as causal.

    Raises:
        ValueError: when `bounds` has more than two intervals, which that form cannot hold.
    """
    check_bounds(bounds)
    if bounds.shape[2] > 4:
        raise ValueError(
            f"`startend_row_indices` holds two hidden intervals per key, these bounds have {bounds.shape[2] // 2}; "
            "simplify(bounds, q_len) may need fewer"
        )
    return bounds.transpose(2, 3).contiguous(), bounds.shape[2] == 1


def visible_pairs(bounds: Tensor, q_len: int | None = None) -> Tensor:
    """Number of visible (query, key) pairs, int64 `[B or 1, H or 1]`. `q_len` defaults to S_k."""
    check_bounds(bounds)
    kv_len = bounds.shape[3]
    q_len = kv_len if q_len is None else q_len
    start, end = disjoint(*(edge.clamp(0, q_len) for edge in hidden_intervals(bounds, q_len)))
    return q_len * kv_len - (end - start).sum((2, 3), dtype=torch.int64)


def tile_occupancy(bounds: Tensor, q_len: int | None = None, *, tile_size: int) -> Tensor:
    """Fraction of visible pairs in each tile of `tile_size` rows by `tile_size` columns.

    Float64 `[B or 1, H or 1, ceil(S_q / tile_size), ceil(S_k / tile_size)]`: 0 = hidden tile, 1 = full, between = cut.
    The last tiles may be smaller and count by their own size. O(S_k) memory besides the result, one pass over the keys
    for each row of tiles. `q_len` defaults to S_k.
    """
    check_bounds(bounds)
    if tile_size < 1:
        raise ValueError(f"`tile_size` must be at least 1, got {tile_size}")
    batch, heads, _, kv_len = bounds.shape
    q_len = kv_len if q_len is None else q_len
    start, end = disjoint(*(edge.clamp(0, q_len) for edge in hidden_intervals(bounds, q_len)))
    columns = -(-kv_len // tile_size)
    width = torch.full((columns,), tile_size, device=bounds.device)
    width[-1:] -= columns * tile_size - kv_len
    occupancy = torch.empty(batch, heads, -(-q_len // tile_size), columns, dtype=torch.float64, device=bounds.device)
    for tile, first in enumerate(range(0, q_len, tile_size)):
        last = min(first + tile_size, q_len)
        hidden = (end.clamp(first, last) - start.clamp(first, last)).sum(2)
        padded = torch.nn.functional.pad(last - first - hidden, (0, columns * tile_size - kv_len))
        visible = padded.unflatten(-1, (columns, tile_size)).sum(-1)
        occupancy[:, :, tile] = visible.double() / (width * (last - first))
    return occupancy
