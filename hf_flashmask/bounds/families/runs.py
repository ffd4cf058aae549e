"""Runs of adjacent positions: documents, blocks, chunks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..algebra import hide_keys
from ..form import check_integer, check_per_position, check_q_len_and_kv_len, previous_values, run_numbers


class Runs(NamedTuple):
    """First and past-the-last position of each position's run, int32 `[B, S]`."""

    start: Tensor
    end: Tensor


@dataclass
class DocumentRuns:
    """The documents of a row, and each position.

    Attributes:
        position: int32 `[S]`.
        runs: the document of each position.
        ids: as they were given, `[B, S]`, for runs that end where documents do. Empty for one document.
        is_padding: bool `[B, S]`, or None without padding.
    """

    position: Tensor
    runs: Runs
    ids: tuple[Tensor, ...]
    is_padding: Tensor | None

    @property
    def are_packed(self) -> bool:
        return len(self.ids) > 0

    def hide_padding(self, bounds: Tensor, copies: int = 1) -> Tensor:
        """Of keys that are so many copies of the positions, one after the other."""
        if self.is_padding is not None:
            bounds = hide_keys(bounds, self.is_padding if copies == 1 else self.is_padding.repeat(1, copies))
        return bounds.contiguous()  # ids may be a view of other strides


def runs_of(*ids: Tensor) -> Runs:
    """A run ends where any of the ids, `[B or 1, S]`, changes."""
    numbers = run_numbers(torch.ne, ids[0], previous_values(ids[0]))
    for others in ids[1:]:
        numbers = numbers + run_numbers(torch.ne, others, previous_values(others))
    start = torch.searchsorted(numbers, numbers, out_int32=True)
    return Runs(start, torch.searchsorted(numbers, numbers, right=True, out_int32=True))


def document_runs_of(
    document_ids: Tensor | None, length: int | None = None, device: torch.device | str | None = None
) -> DocumentRuns:
    """From ids, or else one document of `length` positions."""
    if document_ids is None:
        if length is None:
            raise ValueError("pass `document_ids` or `length`: nothing says how many positions there are")
        check_integer("length", length)
        check_q_len_and_kv_len(length, length)
        position = torch.arange(length, dtype=torch.int32, device=device)
        return DocumentRuns(position, Runs(torch.zeros_like(position), torch.full_like(position, length)), (), None)
    document_ids = check_per_position("document_ids", document_ids)
    if length is not None and length != document_ids.shape[1]:
        raise ValueError(f"`document_ids` have {document_ids.shape[1]} positions, the other arguments say {length}")
    position = torch.arange(document_ids.shape[1], dtype=torch.int32, device=document_ids.device)
    return DocumentRuns(position, runs_of(document_ids), (document_ids,), document_ids < 0)


def document_runs_beside(ids: Tensor, document_ids: Tensor | None) -> DocumentRuns:
    """The documents of positions that other ids, `[B, S]`, describe as well."""
    documents = document_runs_of(document_ids, ids.shape[1], ids.device)
    check_rows_of_runs(documents, len(ids))
    return documents


def check_rows_of_runs(documents: DocumentRuns, rows: int) -> None:
    """Raise when they are those of another number of rows than the other arguments, and neither of one row."""
    if documents.are_packed and len(documents.ids[0]) != rows and 1 not in (len(documents.ids[0]), rows):
        raise ValueError(
            f"`document_ids` have {len(documents.ids[0])} rows, the other arguments have {rows}: they must have as "
            "many, or one of them a single row that serves all"
        )
