"""Bounds from the rows that see each key, masks side by side along the keys, and some of the rows of a mask."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .algebra import disjoint
from .form import (
    MAX_INTERVALS,
    NO_END,
    TooManyIntervalsError,
    broadcast_masks,
    check_bounds,
    check_int_tensor,
    check_size,
    lower_and_upper,
)


def from_visible_intervals(starts: Tensor, ends: Tensor, q_len: int) -> Tensor:
    """Each key is seen by the rows of n intervals, `start <= i < end`, in any order, with or without overlap.

    What lies between them is hidden. This makes bounds of any mask whose columns can be said in this way.

    Args:
        starts, ends: integers `[B or 1, H or 1, n, S_k]`. `start >= end` is an empty interval.
        q_len: S_q.

    Returns:
        int32 `[B or 1, H or 1, C, S_k]`, C = 2 for n = 1, else 2 (n + 1).

    Raises:
        TypeError: when `starts` or `ends` are not integer tensors.
        ValueError: when they have other shapes, or n is 0.
        TooManyIntervalsError: when n is `MAX_INTERVALS` or more.

    >>> starts, ends = torch.tensor([[[[0, 1, 2, 3]]]]), torch.tensor([[[[2, 2, 4, 4]]]])
    >>> from_visible_intervals(starts, ends, 4).tolist()
    [[[[2, 2, 4, 4], [0, 1, 2, 3]]]]
    """
    for name, edge in (("starts", starts), ("ends", ends)):
        check_int_tensor(name, edge, (4,), "[B or 1, H or 1, n, S_k]")
    if any(one != 1 and other != 1 and one != other for one, other in zip(starts.shape, ends.shape)):
        raise ValueError(
            "`starts` and `ends` must have the same shape, or 1 where the other one has more, got "
            f"{list(starts.shape)} and {list(ends.shape)}"
        )
    # Small integers do not hold every row.
    starts, ends = (edge.to(torch.int32) if edge.element_size() < 4 else edge for edge in (starts, ends))
    starts, ends = torch.broadcast_tensors(starts.clamp(0, q_len), ends.clamp(0, q_len))
    intervals = starts.shape[2]
    if intervals == 0:
        raise ValueError("`starts` and `ends` must hold at least one interval for each key, got n = 0")
    if intervals == 1:
        return torch.cat([ends, starts], dim=2).to(torch.int32)
    if intervals >= MAX_INTERVALS:
        raise TooManyIntervalsError(
            f"`starts` and `ends` hold {intervals} visible intervals for each key, bounds hold at most "
            f"{MAX_INTERVALS - 1}: merge those that overlap or touch, or use bounds.from_mask_mod, which finds out how "
            "many it needs"
        )
    starts, ends = disjoint(starts, ends)
    visible = [(starts[:, :, number], ends[:, :, number]) for number in range(intervals)]
    return from_ordered_intervals(visible, q_len)


def from_ordered_intervals(
    visible: Sequence[tuple[Tensor, Tensor]], q_len: int, *, from_the_first: bool = False, to_the_last: bool = False
) -> Tensor:
    """Bounds from visible intervals of rows in ascending order, each edge `[S_k]`, `[B, S_k]` or `[B, H, S_k]`.

    Rows that are known to be none, before the first interval or after the last one, take no planes. What lies below the
    last visible row comes first in every form, so that masks side by side have it in the same planes.

    Raises:
        TooManyIntervalsError: for more than `MAX_INTERVALS` hidden intervals.
    """
    starts, ends = zip(*visible)
    if len(visible) == 1:
        planes = [ends[0], starts[0]]
    else:
        zero, last = torch.zeros_like(ends[-1]), torch.full_like(ends[-1], q_len)
        hidden = [] if to_the_last else [(ends[-1], last)]
        hidden += [*zip(ends[:-1], starts[1:])][::-1]
        hidden += [] if from_the_first else [(zero, starts[0])]
        hidden += [(zero, zero)] if len(hidden) == 1 else []
        if len(hidden) > MAX_INTERVALS:
            raise TooManyIntervalsError(
                f"this mask needs {len(hidden)} hidden intervals per key, bounds hold at most {MAX_INTERVALS}"
            )
        planes = [edge for interval in hidden for edge in interval]
    result = torch.stack(torch.broadcast_tensors(*planes), dim=-2).clamp(0, q_len).to(torch.int32)
    return result[:, None] if result.ndim == 3 else result[(None,) * (4 - result.ndim)]


def concatenate_keys(*bounds: Tensor, q_len: int) -> Tensor:
    """Masks of the same rows and of different keys, side by side: `[keys of the first | keys of the second | ...]`.

    Args:
        bounds: one or more masks, `[B or 1, H or 1, C, S_k]` each, with S_k and C of its own; shapes broadcast over
            batch and heads.
        q_len: S_q. The causal triangle of C = 1 is aligned at the bottom right of the mask that has it.

    Returns:
        int32 `[B or 1, H or 1, C, sum of S_k]`, C = 2 where every mask has 1 or 2 planes, else the most of any.

    Raises:
        TypeError, ValueError: when an argument does not have the form of bounds.
        ValueError: for no mask, or masks that do not agree in batch and heads.

    >>> from hf_flashmask.bounds import bidirectional, causal
    >>> concatenate_keys(bidirectional(2, 3), causal(2), q_len=2).tolist()
    [[[[2, 2, 2, 2, 2], [0, 0, 0, 0, 1]]]]
    """
    if not bounds:
        raise ValueError("concatenate_keys() needs at least one mask")
    for mask in bounds:
        check_bounds(mask)
    if len(bounds) == 1:
        return bounds[0].contiguous()
    if any(len({*sizes} - {1}) > 1 for sizes in zip(*(mask.shape[:2] for mask in bounds))):
        shapes = [list(mask.shape) for mask in bounds]
        raise ValueError(
            f"concatenate_keys() needs masks that agree in batch and heads or have 1 of them, got {shapes}"
        )
    if all(mask.shape[2] <= 2 for mask in bounds):
        return torch.cat(broadcast_masks([_with_two_planes(mask, q_len) for mask in bounds]), dim=3)
    count = max(mask.shape[2] // 2 for mask in bounds)
    return torch.cat(broadcast_masks([_with_intervals(mask, q_len, count) for mask in bounds]), dim=3)


def _with_two_planes(bounds: Tensor, q_len: int) -> Tensor:
    """The same mask, of C = 1 or 2, with C = 2."""
    return bounds if bounds.shape[2] == 2 else torch.stack(torch.broadcast_tensors(*lower_and_upper(bounds, q_len)), 2)


def _with_intervals(bounds: Tensor, q_len: int, count: int) -> Tensor:
    """The same mask in `2 * count >= 4` planes: the lower interval first, the upper one last, empty ones between."""
    planes = bounds.shape[2]
    if planes == 2 * count:
        return bounds

    def constant(value: int, planes: int) -> Tensor:
        return bounds.new_full((), value).expand(*bounds.shape[:2], planes, bounds.shape[3])

    if planes > 2:
        return torch.cat([bounds[:, :, :2], constant(0, 2 * count - planes), bounds[:, :, 2:]], dim=2)
    lower, upper = _with_two_planes(bounds, q_len).split(1, dim=2)
    return torch.cat([lower, constant(NO_END, 1), constant(0, 2 * count - 3), upper], dim=2)


def select_rows(bounds: Tensor, first: int | Tensor, q_len: int, *, of: int | None = None) -> Tensor:
    """The mask of some rows: those from `first` on. With slices of the last dimension, any rectangle of a mask.

    Args:
        bounds: int32 `[B or 1, H or 1, C, S_k]`.
        first: the row that becomes row 0, an `int` or a 0-d integer tensor.
        q_len: the number of rows of the result.
        of: the number of rows of `bounds`, by default S_k. Rows from a `first` that is a tensor must lie in these:
            nothing reads it to find out, and rows outside are undefined.

    Returns:
        int32 `[B or 1, H or 1, C, S_k]`; C = 1 becomes 2, unless the rows are known to be the last ones.

    Raises:
        TypeError, ValueError: when `bounds` do not have the form of bounds.
        TypeError: when `first` is neither an `int` nor an integer tensor.
        ValueError: when the rows are known not to be rows of `bounds`.

    >>> from hf_flashmask.bounds import causal
    >>> select_rows(causal(5), 1, 2).tolist()
    [[[[2, 2, 2, 2, 2], [0, 0, 1, 2, 2]]]]
    """
    check_bounds(bounds)
    of = bounds.shape[3] if of is None else of
    if isinstance(first, Tensor):
        check_int_tensor("first", first, (0,), "[]")
    else:
        check_size("first", first, least=0)
    begin = 0 if isinstance(first, Tensor) else first
    if q_len < 0 or begin + q_len > of:
        raise ValueError(
            f"`first` and `q_len` must select rows of the {of} that `bounds` have, got `q_len` = {q_len} from {begin} "
            "on; pass `of` where the mask has another number of rows than keys"
        )
    if bounds.shape[2] == 1 and not (isinstance(first, int) and first + q_len == of):
        bounds = _with_two_planes(bounds, of)
    # From values within the rows nothing overflows.
    return (bounds.clamp(0, of) - first).clamp(0, q_len).to(torch.int32).contiguous()
