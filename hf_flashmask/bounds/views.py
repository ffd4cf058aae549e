"""What bounds say, in other forms: a dense mask, the paper's indices, counts of visible pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from flashmask_kernels.reference import visible_mask

from .algebra import disjoint
from .form import check_bounds, hidden_intervals


def to_dense(bounds: Tensor, q_len: int | None = None) -> Tensor:
    """The mask as a bool tensor, True = visible: what bounds mean. O(S_q x S_k) memory.

    Args:
        bounds: int32 `[B or 1, H or 1, C, S_k]`.
        q_len: S_q, by default S_k.

    Returns:
        bool `[B or 1, H or 1, S_q, S_k]`.

    Raises:
        TypeError, ValueError: when `bounds` do not have the form of bounds.

    >>> to_dense(torch.tensor([[[[2, 3, 3]]]], dtype=torch.int32)).int()
    tensor([[[[1, 0, 0],
              [1, 1, 0],
              [0, 1, 1]]]], dtype=torch.int32)
    """
    check_bounds(bounds)
    return visible_mask(bounds, bounds.shape[3] if q_len is None else q_len)


def to_startend_row_indices(bounds: Tensor) -> tuple[Tensor, bool]:
    """Bounds in the form of the paper and of PaddlePaddle.

    Args:
        bounds: int32 `[B or 1, H or 1, C, S_k]`, C = 1, 2 or 4.

    Returns:
        int32 `[B or 1, H or 1, S_k, C]`, and whether it is to be read as causal.

    Raises:
        TypeError, ValueError: when `bounds` do not have the form of bounds.
        ValueError: when `bounds` have more than two intervals, which that form cannot hold.
    """
    check_bounds(bounds)
    if bounds.shape[2] > 4:
        raise ValueError(
            f"`startend_row_indices` holds two hidden intervals per key, these bounds have {bounds.shape[2] // 2}; "
            "simplify(bounds, q_len) may need fewer"
        )
    return bounds.transpose(2, 3).contiguous(), bounds.shape[2] == 1


def visible_pairs(bounds: Tensor, q_len: int | None = None) -> Tensor:
    """Number of visible (query, key) pairs.

    Args:
        bounds: int32 `[B or 1, H or 1, C, S_k]`.
        q_len: S_q, by default S_k.

    Returns:
        int64 `[B or 1, H or 1]`.

    Raises:
        TypeError, ValueError: when `bounds` do not have the form of bounds.

    >>> from hf_flashmask.bounds import causal
    >>> visible_pairs(causal(4))
    tensor([[10]])
    """
    check_bounds(bounds)
    kv_len = bounds.shape[3]
    q_len = kv_len if q_len is None else q_len
    start, end = disjoint(*(edge.clamp(0, q_len) for edge in hidden_intervals(bounds, q_len)))
    return q_len * kv_len - (end - start).sum((2, 3), dtype=torch.int64)


def tile_occupancy(bounds: Tensor, q_len: int | None = None, *, tile_size: int) -> Tensor:
    """Fraction of visible pairs in each tile of `tile_size` rows by `tile_size` columns.

    O(S_k) memory besides the result, one pass over the keys for each row of tiles.

    Args:
        bounds: int32 `[B or 1, H or 1, C, S_k]`.
        q_len: S_q, by default S_k.
        tile_size: the last tiles may be smaller and count by their own size.

    Returns:
        float64 `[B or 1, H or 1, ceil(S_q / tile_size), ceil(S_k / tile_size)]`: 0 = hidden tile, 1 = full, between =
        cut.

    Raises:
        TypeError, ValueError: when `bounds` do not have the form of bounds, or `tile_size` is less than 1.

    >>> from hf_flashmask.bounds import causal
    >>> tile_occupancy(causal(4), tile_size=2)
    tensor([[[[0.7500, 0.0000],
              [1.0000, 0.7500]]]], dtype=torch.float64)
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
