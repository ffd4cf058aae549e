"""Bounds from bounds: intersection, union, hidden keys, the fewest planes that say the same."""

from __future__ import annotations

import sys
import warnings
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from .form import (
    MAX_INTERVALS,
    NO_END,
    TooManyIntervalsError,
    broadcast_masks,
    check_bounds,
    check_max_intervals,
    hidden_intervals,
    lower_and_upper,
    own_rows_of_keys,
    refuse_without_waiting,
)


def intersect(*bounds: Tensor, q_len: int | None = None) -> Tensor:
    """What is visible in every mask.

    Masks of C = 1 and 2 collapse to one lower and one upper bound. The intervals of other masks are put side by side,
    whether or not they overlap: C = 2 (n + 1) for n of them. What they have in common depends on values, which are not
    read: `simplify` finds it. Fewer planes come from an intersection inside a union than from a union inside an
    intersection.

    Args:
        bounds: one or more masks of the same S_k; shapes broadcast over batch and heads.
        q_len: S_q, needed to place the causal triangle of C = 1 beside other forms when S_q differs from S_k.

    Returns:
        int32 `[B or 1, H or 1, C, S_k]`.

    Raises:
        TypeError, ValueError: when an argument does not have the form of bounds.
        ValueError: for no mask, or masks of several key lengths.
        TooManyIntervalsError: when the result needs more than `MAX_INTERVALS` hidden intervals.

    >>> from hf_flashmask.bounds import from_position_ids, sliding_window
    >>> intersect(from_position_ids(torch.tensor([0, 1, 2, 0, 1])), sliding_window(2, 5)).tolist()
    [[[[2, 3, 3, 5, 5]]]]
    """
    _check_operands("intersect", bounds)
    planes = {mask.shape[2] for mask in bounds}
    if planes == {1}:
        return reduce(torch.minimum, bounds).contiguous()
    simple = [lower_and_upper(mask, q_len) for mask in bounds if mask.shape[2] <= 2]
    others = [mask for mask in bounds if mask.shape[2] > 2]
    if simple:
        lts, ute = simple[0]
        for other_lts, other_ute in simple[1:]:
            lts, ute = torch.minimum(lts, other_lts), torch.maximum(ute, other_ute)
        lts, ute = torch.broadcast_tensors(lts, ute)
        if not others:
            return torch.stack([lts, ute], dim=2)
        others.append(torch.stack([lts, torch.full_like(lts, NO_END), torch.zeros_like(ute), ute], dim=2))
    check_max_intervals("intersect", sum(mask.shape[2] // 2 for mask in others))
    result = torch.cat(broadcast_masks(others), dim=2).contiguous()
    _suggest_simplify("intersect", result, q_len)
    return result


def union(*bounds: Tensor, q_len: int | None = None) -> Tensor:
    """What is visible in any of the masks.

    Masks of C = 1 collapse to one. Then m masks with n_1 ... n_m hidden intervals (C = 1 and 2 have two) give
    n_1 + ... + n_m - m + 1 intervals. Many of them are usually empty: whether rows lie between two masks depends on
    values, which are not read. `simplify` removes what is empty.

    Args:
        bounds: one or more masks of the same S_k; shapes broadcast over batch and heads.
        q_len: S_q, needed to place the causal triangle of C = 1 beside other forms when S_q differs from S_k.

    Returns:
        int32 `[B or 1, H or 1, C, S_k]`.

    Raises:
        TypeError, ValueError: when an argument does not have the form of bounds.
        ValueError: for no mask, or masks of several key lengths.
        TooManyIntervalsError: when the result needs more than `MAX_INTERVALS` hidden intervals.

    >>> from hf_flashmask.bounds import prefix_lm, sliding_window
    >>> union(sliding_window(2, 5), sliding_window(3, 5)).tolist()
    [[[[3, 4, 5, 5, 5]]]]
    >>> mask = union(sliding_window(2, 5), prefix_lm(3, 5))
    >>> mask.shape[2], simplify(mask, 5).shape[2]
    (6, 2)
    """
    _check_operands("union", bounds)
    causal = [mask for mask in bounds if mask.shape[2] == 1]
    if causal:
        bounds = (reduce(torch.maximum, causal), *(mask for mask in bounds if mask.shape[2] > 1))
    if len(bounds) == 1:
        return bounds[0].contiguous()
    families = [torch.stack(disjoint(*hidden_intervals(mask, q_len)), dim=0) for mask in bounds]
    count = sum(family.shape[3] for family in families)
    check_max_intervals("union", count - len(bounds) + 1)
    batch, heads = torch.broadcast_shapes(*(family.shape[1:3] for family in families))
    start, end = torch.cat([family.expand(-1, batch, heads, -1, -1) for family in families], dim=3).unbind(0)
    # Intervals of one mask are disjoint, so a row is hidden by all m masks where it lies in m intervals at once: from
    # the (k + m)-th smallest start on, before the (k + 1)-th smallest end.
    start = start.sort(dim=2).values[:, :, len(bounds) - 1 :]
    end = end.sort(dim=2).values[:, :, : count - len(bounds) + 1]
    result = torch.stack([start, end], dim=3).flatten(2, 3)
    _suggest_simplify("union", result, q_len)
    return result


def hide_keys(bounds: Tensor, hidden: Tensor) -> Tensor:
    """Hide some keys from every query. C stays as it is.

    Args:
        bounds: int32 `[B or 1, H or 1, C, S_k]`.
        hidden: bool `[B or 1, S_k]`, True for the keys to hide.

    Returns:
        int32 `[B or 1, H or 1, C, S_k]`.

    Raises:
        TypeError, ValueError: when `bounds` do not have the form of bounds.
        ValueError: when `hidden` has another type or does not fit `bounds`.

    >>> from hf_flashmask.bounds import causal
    >>> hide_keys(causal(3), torch.tensor([[True, False, False]])).tolist()
    [[[[0, 3, 3]]]]
    """
    check_bounds(bounds)
    if hidden.dtype != torch.bool or hidden.ndim != 2 or hidden.shape[1] != bounds.shape[3]:
        raise ValueError(
            f"`hidden` must be bool [B or 1, {bounds.shape[3]}] for these bounds, got {hidden.dtype} "
            f"{list(hidden.shape)}"
        )
    hidden = hidden[:, None, None, :]
    if bounds.shape[2] == 1:
        return bounds.masked_fill(hidden, 0)
    # Plane 0 starts an interval and plane 1 ends one in every form, also in C = 2, where the column is then hidden by
    # LTS and by UTE alike: the kernels can skip it from either side.
    starts = bounds[:, :, 0::2].masked_fill(hidden, 0)
    ends = bounds[:, :, 1::2].masked_fill(hidden, NO_END)
    return torch.stack([starts, ends], dim=3).flatten(2, 3)


def simplify(bounds: Tensor, q_len: int | None = None, *, planes: int | None = None) -> Tensor:
    """The fewest planes that say the same. Waits once for the device, unless it is told the number of planes.

    Values are clamped to `[0, q_len]`, overlapping and adjacent intervals merged, and empty ones dropped. C = 1 when
    every column is the causal triangle and one lower bound.

    Args:
        bounds: int32 `[B or 1, H or 1, C, S_k]`.
        q_len: S_q, by default S_k.
        planes: C of the result where it is known: then nothing is read from the device, and the call can be traced.

    Returns:
        int32 `[B or 1, H or 1, C, S_k]`.

    Raises:
        TypeError, ValueError: when `bounds` do not have the form of bounds.
        ValueError: when `planes` is not 1 or an even number up to `2 * MAX_INTERVALS`.
        TooManyIntervalsError: when the mask needs more than `planes`. On a device it is an assertion there.

    >>> from hf_flashmask.bounds import bidirectional, causal
    >>> simplify(intersect(bidirectional(3), causal(3))).shape
    torch.Size([1, 1, 1, 3])
    """
    check_bounds(bounds)
    q_len = bounds.shape[3] if q_len is None else q_len
    if planes is None:
        return fewest_planes(*hidden_intervals(bounds, q_len), q_len)
    if planes != 1 and (planes % 2 or not 2 <= planes <= 2 * MAX_INTERVALS):
        raise ValueError(f"`planes` must be 1 or an even number up to {2 * MAX_INTERVALS}, got {planes}")
    return _simplify_to_planes(*hidden_intervals(bounds, q_len), q_len, planes)


def _check_operands(operation: str, bounds: tuple[Tensor, ...]) -> None:
    if not bounds:
        raise ValueError(f"{operation}() needs at least one mask")
    for mask in bounds:
        check_bounds(mask)
    if any(mask.shape[3] != bounds[0].shape[3] for mask in bounds):
        raise ValueError(f"{operation}() needs masks of one key length, got {[mask.shape[3] for mask in bounds]}")


_suggested: set[int] = set()
"""The numbers of planes for which `_suggest_simplify` has looked."""


def _suggest_simplify(operation: str, bounds: Tensor, q_len: int | None) -> None:
    """Warn once where fewer planes say the same. Looks at the first mask of each C that a user composes on the CPU.

    On other devices looking would wait for the device, and what the integration composes the user cannot simplify.
    """
    planes = bounds.shape[2]
    if torch.compiler.is_compiling() or planes <= 4 or planes in _suggested:
        return
    is_ours = sys._getframe(2).f_globals.get("__name__", "").startswith("hf_flashmask.")
    if is_ours or not bounds.is_cpu or type(bounds) is not Tensor:
        return
    _suggested.add(planes)
    fewest = simplify(bounds, q_len).shape[2]
    if fewest < planes:
        warnings.warn(
            f"{operation}() of these masks has C = {planes} planes, simplify(bounds, q_len) says the same with C = "
            f"{fewest}. Attention takes longer with more planes: simplify the mask that you compose, if you do not yet",
            stacklevel=3,
        )


def _shift_planes_down(planes: Tensor, fill: int) -> Tensor:
    """Plane k becomes plane k + 1, the first one `fill`."""
    return torch.cat([torch.full_like(planes[:, :, :1], fill), planes[:, :, :-1]], dim=2)


def disjoint(start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """As many intervals that hide the same rows, sorted and without overlap; empty ones have start = end."""
    start, order = start.sort(dim=2)
    end = end.gather(2, order)
    reached = _shift_planes_down(end.cummax(dim=2).values, fill=torch.iinfo(torch.int32).min)
    start = torch.maximum(start, reached)
    return start, torch.maximum(start, end)


def fewest_planes(start: Tensor, end: Tensor, q_len: int, triangle: Tensor | None = None) -> Tensor:
    """Bounds from the hidden intervals of each key, `[B, H, n >= 2, S_k]` in any order, with or without overlap.

    `triangle`, `[B or 1, 1, S_k]`: before which row the causal triangle hides each key, by default that of S_k keys.
    """
    if start.numel() == 0:
        return torch.empty_like(start[:, :, :1])
    merged = _simplify_intervals(start, end, q_len, triangle)
    intervals, has_inner, is_not_causal = torch.stack(
        [merged.counts.amax(), merged.has_inner.any().long(), merged.is_not_causal.any().long()]
    ).tolist()
    if has_inner:
        return merged.pairs(max(intervals, 2))
    return merged.lower_and_upper() if is_not_causal else merged.lts.unsqueeze(2).contiguous()


def _simplify_to_planes(start: Tensor, end: Tensor, q_len: int, planes: int) -> Tensor:
    """`fewest_planes`, which reads their number, when it is known."""
    if start.numel() == 0:
        return start.new_empty((*start.shape[:2], planes, start.shape[3]))
    merged = _simplify_intervals(start, end, q_len, None)
    if planes <= 2:
        refused = merged.has_inner | merged.is_not_causal if planes == 1 else merged.has_inner
    else:
        refused = merged.counts > planes // 2
    message = f"simplify() was told that {planes} planes are enough, but a key needs more"
    refuse_without_waiting(refused, TooManyIntervalsError(message))
    if planes == 1:
        return merged.lts.unsqueeze(2).contiguous()
    return merged.lower_and_upper() if planes == 2 else merged.pairs(planes // 2)


class _SimplifiedIntervals(NamedTuple):
    """Hidden intervals of each key, merged: `[B, H, n, S_k]`, sorted and apart, an empty one being (q_len, 0)."""

    start: Tensor
    end: Tensor
    lts: Tensor
    ute: Tensor
    triangle: Tensor
    counts: Tensor
    has_inner: Tensor
    is_not_causal: Tensor

    def lower_and_upper(self) -> Tensor:
        return torch.stack([self.lts, self.ute], dim=2)

    def pairs(self, intervals: int) -> Tensor:
        start, end = self.start[:, :, :intervals], self.end[:, :, :intervals]
        missing = intervals - start.shape[2]
        if missing > 0:
            start, end = (torch.cat([edge, edge[:, :, :1].expand(-1, -1, missing, -1) * 0], 2) for edge in (start, end))
        if intervals == 2:
            # A lone interval goes to the side of the diagonal on which it lies, so that neighbouring columns agree.
            lone_lower = ~(start[:, :, 1] < end[:, :, 1]) & (start[:, :, 0] > self.triangle)
            order = torch.stack([~lone_lower, lone_lower], dim=2).long()
            start, end = start.gather(2, order), end.gather(2, order)
        return torch.stack([start, end], dim=3).flatten(2, 3)


def _simplify_intervals(start: Tensor, end: Tensor, q_len: int, triangle: Tensor | None) -> _SimplifiedIntervals:
    start, end = start.clamp(0, q_len), end.clamp(0, q_len)
    empty = start >= end
    start, end = start.masked_fill(empty, q_len), end.masked_fill(empty, 0)
    start, order = start.sort(dim=2)
    end = end.gather(2, order)
    reached = _shift_planes_down(end.cummax(dim=2).values, fill=-1)
    merged = (((start > reached) & (start < end)).cumsum(2) - 1).clamp(min=0)
    start = torch.full_like(start, q_len).scatter_reduce(2, merged, start, "amin")
    end = torch.zeros_like(end).scatter_reduce(2, merged, end, "amax")

    some = start < end
    lts = torch.where(end == q_len, start, q_len).amin(2)
    ute = torch.where(start == 0, end, 0).amax(2)
    if triangle is None:
        triangle = own_rows_of_keys(q_len, start.shape[3], None, 0, start.device).clamp(0, q_len)
    has_inner = (some & (start > 0) & (end < q_len)).any(2)
    is_not_causal = (ute != triangle) & (ute != q_len)
    return _SimplifiedIntervals(start, end, lts, ute, triangle, some.sum(2), has_inner, is_not_causal)
