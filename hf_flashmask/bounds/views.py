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


def explain(bounds: Tensor, query: int, key: int, q_len: int | None = None, *, batch: int = 0, head: int = 0) -> str:
    """Whether a query sees a key, and which interval hides it, in a sentence. Reads one column on the host.

    Args:
        bounds: int32 `[B or 1, H or 1, C, S_k]`.
        query, key: row and column.
        q_len: S_q, by default S_k.
        batch, head: which mask; any number where the bounds have one for all.

    Returns:
        The sentence.

    Raises:
        TypeError, ValueError: when `bounds` do not have the form of bounds.
        IndexError: when there is no such query, key, batch row or head.

    >>> from hf_flashmask.bounds import sliding_window
    >>> explain(sliding_window(2, 5), query=4, key=1)
    'query 4 does not see key 1: it is hidden from the rows 3 and after (LTS)'
    >>> explain(sliding_window(2, 5), query=1, key=4)
    'query 1 does not see key 4: it is hidden from the rows before 4 (the causal triangle)'
    >>> explain(sliding_window(2, 5), query=1, key=0)
    'query 1 sees key 0, which is hidden from the rows 2 and after (LTS)'
    """
    check_bounds(bounds)
    batches, heads, _, kv_len = bounds.shape
    q_len = kv_len if q_len is None else q_len
    for name, index, size in (("query", query, q_len), ("key", key, kv_len)):
        if not 0 <= index < size:
            raise IndexError(f"`{name}` is {index}, but the mask has {size}, counted from 0")
    for name, index, size in (("batch", batch, batches), ("head", head, heads)):
        if index < 0 or (size > 1 and index >= size):
            raise IndexError(f"`{name}` is {index}, but the bounds have {size}, counted from 0")
    one_mask = bounds[batch if batches > 1 else 0, head if heads > 1 else 0][None, None]
    names, start, end = named_intervals(one_mask, q_len)
    column = zip(start[0, 0, :, key].tolist(), end[0, 0, :, key].tolist(), names)
    hidden = [interval for interval in column if interval[0] < interval[1]]
    hiding = [_hidden_rows_in_words(*interval, q_len) for interval in hidden if interval[0] <= query < interval[1]]
    if hiding:
        return f"query {query} does not see key {key}: it is hidden from {', and from '.join(hiding)}"
    others = ", and from ".join(_hidden_rows_in_words(*interval, q_len) for interval in hidden)
    return f"query {query} sees key {key}, which is hidden from {others or 'no row'}"


def named_intervals(bounds: Tensor, q_len: int) -> tuple[list[str], Tensor, Tensor]:
    """What hides rows from keys, and which rows of each key, cut to those that there are.

    Returns:
        n names; starts and ends `[B or 1, H or 1, n, S_k]`, empty where start >= end.
    """
    start, end = (edge.clamp(0, q_len) for edge in hidden_intervals(bounds, q_len))
    count = start.shape[2]
    if bounds.shape[2] == 4:
        names = ["LTS to LTE", "UTS to UTE"]
    elif bounds.shape[2] > 4:
        names = [f"interval {number} of {count}" for number in range(1, count + 1)]
    else:
        names = ["the causal triangle" if bounds.shape[2] == 1 else "UTE", "LTS"]
    return names, start, end


def _hidden_rows_in_words(start: int, end: int, name: str, q_len: int) -> str:
    if start == 0 and end == q_len:
        return f"all rows ({name})"
    if start == 0:
        return f"the rows before {end} ({name})"
    return f"the rows {start} and after ({name})" if end == q_len else f"the rows {start} to {end - 1} ({name})"
