"""The ranks that share a sequence, and what they send to each other, with gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "Group",
    "add_up",
    "all_gather",
    "check_groups_apart",
    "exchange_pieces",
    "gather_with_gradients",
    "groups_of",
]


class Group(NamedTuple):
    """The ranks that share a sequence."""

    handle: dist.ProcessGroup
    rank: int
    size: int

    @classmethod
    def of(cls, handle: dist.ProcessGroup, name: str) -> Group:
        rank = dist.get_rank(handle)
        if rank < 0:
            raise ValueError(f"this process, rank {dist.get_rank()}, is not in the group that `{name}` names")
        return cls(handle, rank, dist.get_world_size(handle))


def groups_of(mesh: DeviceMesh | dist.ProcessGroup, name: str, dimensions: int) -> list[Group]:
    """The groups of a mesh with up to so many dimensions, that of the last dimension first."""
    if isinstance(mesh, dist.ProcessGroup):
        return [Group.of(mesh, name)]
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"`{name}` must be a DeviceMesh or a process group, got {type(mesh).__name__}")
    if mesh.ndim > dimensions:
        raise ValueError(
            f"`{name}` has the dimensions {mesh.mesh_dim_names or mesh.ndim}, at most {dimensions} expected: pass "
            'those of the sequence, as in mesh["sp"]'
        )
    return [Group.of(mesh.get_group(dimension), name) for dimension in reversed(range(mesh.ndim))]


def check_groups_apart(of_sequence: list[Group], of_data: Group) -> None:
    """Raise when ranks share a sequence and are said to hold other batches: the loss would be divided by both."""
    own = {rank for group in of_sequence for rank in dist.get_process_group_ranks(group.handle)} - {dist.get_rank()}
    if both := sorted(own.intersection(dist.get_process_group_ranks(of_data.handle))):
        raise ValueError(
            f"`data_mesh` and `mesh` both hold the ranks {both} beside this one, {dist.get_rank()}: `data_mesh` is of "
            'the ranks that hold other batches, as mesh["dp"] beside mesh["sp"]'
        )


def exchange_pieces(pieces: Tensor, group: Group) -> Tensor:
    """`[P, ...]`: piece p goes to rank p, and what rank p sends comes back at p. The same for the gradient."""
    return _ExchangePieces.apply(pieces, group)


def gather_with_gradients(rows: Tensor, group: Group) -> Tensor:
    """`[S / P, ...]` of each rank -> `[S, ...]` on all, in the order of the ranks.

    The gradients of the ranks travel in their own dtype, and are summed in float32.
    """
    return _GatherWithGradients.apply(rows, group)


def add_up(values: Tensor, group: Group) -> Tensor:
    """The sum over the ranks, on all of them. The same for the gradient: each rank has a loss of its own."""
    return _AddUp.apply(values, group)


def all_gather(values: Tensor, group: Group) -> Tensor:
    """`[P, ...]`, without gradients."""
    if torch.compiler.is_compiling():
        gathered = _wait_for_collective(
            _in_graphs.all_gather_into_tensor(values.flatten(), group.size, group.handle.group_name)
        )
        return gathered.view(group.size, *values.shape)
    gathered = values.new_empty(group.size, *values.shape)
    gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name since torch 2.13
    gather_into(gathered.flatten(), values.contiguous().flatten(), group=group.handle)
    return gathered


_in_graphs = torch.ops._c10d_functional
"""Collectives that return what they receive, which `torch.compile` keeps in its graphs."""


def _wait_for_collective(received: Tensor) -> Tensor:
    return _in_graphs.wait_tensor(received)


class _ExchangePieces(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pieces: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _all_to_all(pieces, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _all_to_all(gradient, ctx.group), None


class _GatherWithGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return all_gather(rows, group).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        pieces = gradient.unflatten(0, (ctx.group.size, -1))
        return _all_to_all(pieces, ctx.group).sum(0, dtype=torch.float32).to(gradient.dtype), None


class _AddUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _all_reduce(values, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(gradient, ctx.group), None


def _all_reduce(values: Tensor, group: Group) -> Tensor:
    if torch.compiler.is_compiling():
        return _wait_for_collective(_in_graphs.all_reduce(values.contiguous(), "sum", group.handle.group_name))
    total = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group.handle)
    return total


def _all_to_all(pieces: Tensor, group: Group) -> Tensor:
    pieces = pieces.contiguous()
    if torch.compiler.is_compiling():
        sizes = [1] * group.size
        return _wait_for_collective(_in_graphs.all_to_all_single(pieces, sizes, sizes, group.handle.group_name))
    received = torch.empty_like(pieces)
    dist.all_to_all_single(received, pieces, group=group.handle)
    return received
