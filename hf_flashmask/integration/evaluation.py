"""Mask functions called with rows and keys: in tiles of columns, and inside of a compiled graph by a search."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .. import bounds
from ..bounds.dense import PAIRS_OF_A_TILE, evaluate_in_tiles


@dataclass(frozen=True)  # torch 2.9 cannot compile the properties of a named tuple
class EvaluatedCall:
    """The arguments that describe the rows and keys of one attention call to a mask function."""

    batch: int
    q_len: int
    kv_len: int
    q_offset: int | Tensor
    kv_offset: int
    device: torch.device | str
    has_user_functions: bool
    document_ends: Tensor | None = None
    starts_later_by: Callable[[], Tensor] | None = None
    is_token: Tensor | None = None

    @property
    def place(self) -> dict[str, Any]:
        """The arguments that all constructors of `hf_flashmask.bounds` take."""
        return {"q_len": self.q_len, "kv_len": self.kv_len, "q_offset": self.q_offset, "kv_offset": self.kv_offset}


class _EvaluatedDocuments(NamedTuple):
    """Packed documents, `[B, S]` each: where the document of every token starts and ends, and its position there."""

    starts: Tensor
    ends: Tensor
    position_ids: Tensor
    is_padding: Tensor

    @classmethod
    def of(cls, document_ends: Tensor, is_token: Tensor | None) -> _EvaluatedDocuments:
        starts = bounds.document_starts(document_ends)
        index = torch.arange(starts.shape[1], device=starts.device)
        is_padding = torch.zeros_like(starts, dtype=torch.bool) if is_token is None else ~is_token
        return cls(starts, document_ends, index - starts, is_padding)


def evaluate(mask_function: Callable, call: EvaluatedCall) -> Iterator[Tensor]:
    """The mask in tiles of columns, `[B or 1, 1, S_q, columns]`, evaluated like Transformers' `sdpa_mask`."""
    if call.document_ends is not None:
        mask_function = _evaluated_in_documents(
            mask_function, _EvaluatedDocuments.of(call.document_ends, call.is_token), call.batch
        )
    rows = torch.arange(call.q_len, device=call.device) + call.q_offset
    keys = torch.arange(call.kv_len, device=call.device) + call.kv_offset
    batch, head = torch.arange(call.batch, device=call.device), torch.zeros(1, dtype=torch.long, device=call.device)
    for visible in _evaluate_tiles(mask_function, batch, head, rows, keys, call):
        visible = visible.to(call.device, torch.bool).expand(call.batch, 1, call.q_len, -1)
        yield visible[:1] if visible.stride(0) == 0 else visible


def _evaluate_tiles(
    mask_function: Callable, batch: Tensor, head: Tensor, rows: Tensor, keys: Tensor, call: EvaluatedCall
) -> Iterator[Tensor]:
    if call.has_user_functions:
        yield from evaluate_in_tiles(mask_function, batch, head, rows, keys)
        return
    for columns in keys.split(max(PAIRS_OF_A_TILE // max(call.batch * call.q_len, 1), 1)):
        yield mask_function(batch[:, None, None, None], head[:, None, None], rows[:, None], columns)


def _evaluated_in_documents(mask_function: Callable, documents: _EvaluatedDocuments, batch_size: int) -> Callable:
    starts, ends, position_ids, is_padding = (values.expand(batch_size, -1) for values in documents)

    def in_documents(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        same_document = (ends[batch, row] == ends[batch, key]) & ~is_padding[batch, key]
        query_position, key_position = position_ids[batch, row], position_ids[batch, key]
        with _LookUpByRow(ends.shape[1]) as look_up:
            look_up.follow(query_position, starts[batch, row], ends[batch, row] - 1)
            look_up.follow(key_position, starts[batch, key], ends[batch, key] - 1)
            return mask_function(batch, head, query_position, key_position) & same_document

    return in_documents


class _LookUpByRow(TorchFunctionMode):
    """Replaces positions in a document by rows when a function indexes a tensor that is as long as the row.

    The result of a position and constants, such as `kv_idx - 1`, is a position. The result of two positions is not.
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self.positions: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def follow(self, position: Tensor, first_row: Tensor, last_row: Tensor) -> None:
        self.positions[id(position)] = (position, first_row, last_row)

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is Tensor.__getitem__:
            tensor, index = args
            if max(tensor.shape, default=0) >= self.length:
                index = tuple(map(self._row, index)) if isinstance(index, tuple) else self._row(index)
            return function(tensor, index)
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not result.dtype.is_floating_point and result.dtype != torch.bool:
            documents = {id(rows[0]): rows for rows in map(self._rows_of_document, args) if rows is not None}
            if len(documents) == 1:
                self.follow(result, *documents.popitem()[1])
        return result

    def _rows_of_document(self, value: Any) -> tuple[Tensor, Tensor] | None:
        known = self.positions.get(id(value))
        return None if known is None else known[1:]

    def _row(self, index: Any) -> Any:
        rows = self._rows_of_document(index)
        return index if rows is None else torch.minimum(index + rows[0], rows[1])


# Together they search 16^6 rows. Numbers that depend on S_q would compile again for every length.
_CANDIDATES, _ROUNDS = 16, 6


def search_visible_rows(mask_function: Callable, call: EvaluatedCall) -> Tensor:
    """LTS and UTE of every key, by a search from its own row; each round divides the size of the steps by 16."""
    documents = None if call.document_ends is None else _EvaluatedDocuments.of(call.document_ends, call.is_token)
    batch = torch.arange(call.batch, device=call.device)[:, None, None]
    head = torch.zeros_like(batch)
    # What the function gets for the keys and for the first and the last row of the search; plus `local` it is the row.
    if documents is None:
        key = torch.arange(call.kv_len, device=call.device)[None, None] + call.kv_offset
        lowest, local = torch.zeros_like(key) + call.q_offset, -call.q_offset
        if call.starts_later_by is not None:
            later = call.starts_later_by()[:, None]
            key, lowest, local = key - later, lowest - later, local + later
        highest = lowest + (call.q_len - 1)
    else:
        key, local = documents.position_ids[:, None], documents.starts[:, None]
        lowest, highest = torch.zeros_like(key), (documents.ends - documents.starts - 1)[:, None]
    own_row = torch.minimum(torch.maximum(key, lowest), highest).expand(call.batch, -1, -1)
    steps = torch.arange(1, _CANDIDATES, device=call.device)[:, None]

    def count_visible(row: Tensor) -> Tensor:
        return mask_function(batch, head, row, key).expand_as(row).sum(1, keepdim=True)

    first, last = own_row, own_row
    for exponent in reversed(range(_ROUNDS)):
        step = _CANDIDATES**exponent
        down, up = torch.maximum(first - step * steps, lowest), torch.minimum(last + step * steps, highest)
        first = torch.maximum(first - step * count_visible(down), lowest)
        last = torch.minimum(last + step * count_visible(up), highest)
    hidden = count_visible(own_row) == 0
    if documents is not None:
        hidden = hidden | documents.is_padding[:, None]
    lts, ute = (last + local + 1).masked_fill(hidden, 0), (first + local).masked_fill(hidden, call.q_len)
    return torch.stack([lts, ute], dim=2).to(torch.int32)
