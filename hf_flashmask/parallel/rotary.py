"""Rotary embeddings that depend on the largest position of a call: that of the whole row, not of a rank's part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..sharing.traits import depends_on_largest_position
from .group import Group

__all__ = ["share_largest_position"]


def share_largest_position(
    model: nn.Module, groups: Sequence[Group], is_part: Callable[[], bool] = lambda: True
) -> list[RemovableHandle]:
    """Hooks on what computes such embeddings (longrope, dynamic): one more position, the largest one of all ranks.

    A collective of one number in each of their calls, whose result the host does not wait for.

    Args:
        groups: of this rank, the dimensions of the mesh.
        is_part: whether a call has the tokens of a part of each row.
    """

    def add(module: nn.Module, args: tuple[Any, ...], call: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not is_part():
            return args, call
        position_ids = call["position_ids"] if "position_ids" in call else args[1]
        largest = position_ids.amax()
        for group in groups:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group.handle)
        extended = torch.cat([position_ids, largest.expand(*position_ids.shape[:-1], 1)], dim=-1)
        if "position_ids" in call:
            return args, {**call, "position_ids": extended}
        return (args[0], extended, *args[2:]), call

    def take_away(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not is_part():
            return output
        return output[..., :-1, :] if isinstance(output, Tensor) else tuple(part[..., :-1, :] for part in output)

    hooks: list[RemovableHandle] = []
    for rotary in filter(depends_on_largest_position, model.modules()):
        hooks += [rotary.register_forward_pre_hook(add, with_kwargs=True), rotary.register_forward_hook(take_away)]
    return hooks
