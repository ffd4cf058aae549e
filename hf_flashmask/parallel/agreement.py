"""The ranks of a group tell each other what they were given, so that a difference is an error on all of them."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .group import Group, all_gather

__all__ = ["check_agreement"]


def check_agreement(
    groups: Sequence[Group], device: torch.device, batch: Any, settings: str, error: Exception | None
) -> None:
    """Raise on every rank when one rank has refused its batch, or when the ranks were given different ones.

    A collective of a few numbers in each group, for whose result the host waits.

    Args:
        groups: of this rank, the dimensions of the mesh.
        device: of the numbers: one that the group communicates from.
        batch: what this rank was given.
        settings: what else must be equal.
        error: why this rank refuses its batch.

    Raises:
        RuntimeError: also when a rank is lost: at once, or after the timeout of the process group.
    """
    tensors = dict(sorted(_tensors_to_agree_on(batch))) if isinstance(batch, Mapping) else {}
    described = ", ".join(f"`{name}` {list(tensor.shape)} {tensor.dtype}" for name, tensor in tensors.items())
    if isinstance(batch, Mapping):
        numbers = sorted((name, value) for name, value in batch.items() if isinstance(value, (bool, int, float)))
        described += "".join(f", `{name}` {value}" for name, value in numbers)
    is_refused = torch.tensor(error is not None, dtype=torch.int64, device=device)
    names = torch.tensor(zlib.crc32(f"{settings}; {described}".encode()), device=device)
    contents = torch.zeros((), dtype=torch.int64, device=device)
    for number, tensor in enumerate(tensors.values(), start=1):
        contents = contents * 31 + number * _checksum(tensor).to(device)
    rank, size = 0, 1
    for group in groups:
        rank, size = rank + size * group.rank, size * group.size
    try:
        table = _numbers_of_all_ranks(torch.stack([is_refused, names, contents]), groups)
    except RuntimeError as lost:
        raise RuntimeError(
            f"rank {rank} of {size} has waited for the other ranks of its sequence-parallel group in `shard`: one has "
            f"died, has raised an error, or does not call `shard` for this batch. Rank {rank} was given {described}"
        ) from (error or lost)
    if error is not None:
        raise error
    refusing = [rank for rank, row in enumerate(table) if row[0]]
    if refusing:
        raise RuntimeError(
            f"rank {refusing[0]} of the sequence-parallel group refused the batch that it was given: its own error "
            f"says why. Rank {rank} was given {described}"
        )
    if any(row[1] != table[0][1] for row in table):
        raise ValueError(
            "the ranks of a sequence-parallel group were given different batches; all of them must get the same one, "
            f"which `shard` cuts. Rank {rank} of {size} was given {described} ({settings})"
        )
    if any(row[2] != table[0][2] for row in table):
        raise ValueError(
            "the ranks of a sequence-parallel group were given batches of equal shapes with different contents; all "
            "of them must get the same batch, which `shard` cuts: let the sampler of the data loader depend on the "
            f"rank among the data-parallel groups only. Rank {rank} of {size} was given {described}"
        )


def _numbers_of_all_ranks(row: Tensor, groups: Sequence[Group]) -> list[list[int]]:
    """The rows of all ranks, on the host."""
    rows = row[None]
    for group in groups:
        rows = all_gather(rows, group).flatten(0, 1)
    return rows.tolist()


def _tensors_to_agree_on(batch: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Tensor]]:
    found = []
    for name, value in batch.items():
        if isinstance(value, Mapping):
            found += _tensors_to_agree_on(value, f"{prefix}{name}.")
        elif isinstance(value, Tensor):
            found.append((f"{prefix}{name}", value))
    return found


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _checksum(tensor: Tensor) -> Tensor:
    """A number, int64, that tells contents apart. Embeddings do not count: kernels may round them differently."""
    if tensor.requires_grad or tensor.is_complex():
        return torch.zeros((), dtype=torch.int64, device=tensor.device)
    values = tensor.reshape(-1)
    if values.is_floating_point():
        values = values.contiguous().view(_INTEGERS[values.element_size()])
    return (values.long() * torch.arange(1, values.numel() + 1, device=tensor.device)).sum()
