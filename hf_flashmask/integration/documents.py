"""Which tokens of a call belong to one packed document: by `position_ids`, by `cu_seq_lens_q`, by ids in the 2-D mask,
beside a cache.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from .. import bounds as _bounds
from .mask import Mask, Place
from .reading import may_be_read, read_and_refuse

__all__ = [
    "Documents",
    "after_cache",
    "are_ids",
    "document_ids_of_call",
    "documents_of_cross_attention",
    "documents_of_layer",
    "first_columns_of_documents",
    "ids_beside_cache",
    "positions_tell_documents",
    "starts_of_later_documents",
]


@dataclass
class Documents:
    """The tensors that tell the packed documents of a call apart.

    No named tuple: the compiler of torch 2.9 does not trace their properties.

    Attributes:
        position_ids: `[B or 1, S_q]`.
        cu_seq_lens_q, cu_seq_lens_k: `[documents + 1]`, cumulative lengths of one packed row; the second where the keys
            have other documents.
    """

    position_ids: Tensor | None = None
    cu_seq_lens_q: Tensor | None = None
    cu_seq_lens_k: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        told = self.position_ids, self.cu_seq_lens_q, self.cu_seq_lens_k
        return tuple(tensor for tensor in told if tensor is not None)

    @property
    def key(self) -> str:
        """Which tensors they are."""
        if self.cu_seq_lens_q is None:
            return "position_ids"
        return "cu_seq_lens" if self.position_ids is None else "both"

    def beside(self, mask: Mask, q_len: int) -> Documents | None:
        """What is to be added to a mask. Beside a cache lengths tell all."""
        has_lengths = self.cu_seq_lens_q is not None
        is_behind = has_lengths and mask.place is not None and not mask.place.is_square
        if self.position_ids is None or not (mask.has_documents or q_len == 1 or is_behind):
            return self
        if not has_lengths:
            return None
        return Documents(None, self.cu_seq_lens_q, self.cu_seq_lens_k)


def positions_tell_documents(position_ids: Tensor | None, batch: int, length: int) -> TypeGuard[Tensor]:
    """Multimodal models have positions in several dimensions, which do not count tokens."""
    if position_ids is None or position_ids.ndim != 2 or position_ids.is_complex():
        return False
    # Not `rows in (1, batch)`: the compiler finds no number equal to a symbolic one there (torch 2.13).
    rows = position_ids.shape[0]
    return (rows == 1 or rows == batch) and position_ids.shape[1] == length


def documents_of_layer(
    query: Tensor,
    position_ids: Tensor | None,
    cu_seq_lens_q: Tensor | None,
    cu_seq_lens_k: Tensor | None,
    mask: Mask | Tensor | None = None,
) -> Documents | None:
    """What a layer of self-attention is told about documents.

    Beside cumulative lengths, positions tell them in layers that have a mask of tokens; those of image encoders count
    patches.
    """
    batch, _, q_len, _ = query.shape
    position_ids = position_ids if positions_tell_documents(position_ids, batch, q_len) else None
    if cu_seq_lens_q is None:
        return None if position_ids is None else Documents(position_ids)
    _check_one_row_of_lengths(batch)
    if not isinstance(mask, Mask):
        position_ids = None
    differ = cu_seq_lens_k is not None and cu_seq_lens_k is not cu_seq_lens_q
    return Documents(position_ids, cu_seq_lens_q, cu_seq_lens_k if differ else None)


def documents_of_cross_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    has_users_mask: bool,
    cu_seq_lens_q: Tensor | None,
    cu_seq_lens_k: Tensor | None,
) -> Documents | None:
    """What a layer of cross-attention is told about documents: a model hands the same lengths to all its layers.

    Raises:
        NotImplementedError: where the lengths cannot be those of both sides.
    """
    if cu_seq_lens_q is None or has_users_mask:
        return None
    if query.shape[2] != key.shape[2]:
        raise NotImplementedError(
            f"`cu_seq_lens_q` packs documents, and {type(module).__name__} attends from {query.shape[2]} tokens to "
            f"{key.shape[2]} others: which of them belong together is not known. Pass one document in each row; or "
            "run the encoder by itself, and pass `encoder_outputs` with "
            "attention_mask=bounds.from_cu_seqlens(decoder_lengths, S_q, cu_seqlens_k=encoder_lengths, kv_len=S_k, "
            "is_causal=False)"
        )
    _check_one_row_of_lengths(query.shape[0])
    if cu_seq_lens_k is not None and cu_seq_lens_k is not cu_seq_lens_q:
        reason = (
            "`cu_seq_lens_q` and `cu_seq_lens_k` differ, but a model hands them to encoder and decoder alike: "
            "pass bounds for each of them"
        )
        if cu_seq_lens_k.shape != cu_seq_lens_q.shape:
            raise NotImplementedError(reason)
        read_and_refuse(cu_seq_lens_k != cu_seq_lens_q, reason)
    return Documents(cu_seq_lens_q=cu_seq_lens_q)


def _check_one_row_of_lengths(batch: int) -> None:
    if batch != 1:
        raise ValueError(
            f"`cu_seq_lens_q` describes the documents of one packed row, but the batch has {batch} rows; pass "
            "`position_ids` that restart with every document instead"
        )


def starts_of_later_documents(position_ids: Tensor, is_token: Tensor | None, place: Place) -> Tensor:
    """The index at which each key's document starts, beside a cache, `[B or 1, S_k]`; 0 in the first one of the row.

    The first document of the call goes on with the tokens in the cache. Positions do not tell where those begin: a
    model counts them from the padding on the left, or from the first token.

    Args:
        position_ids: `[B or 1, S_q]`.
        is_token: bool `[B, S_k]`, False for padding.
    """
    rows = _documents_among_rows(position_ids, is_token, place)
    starts = _bounds.document_starts(rows.ends)
    of_call = torch.where(starts > rows.first, starts + place.q_offset, 0)
    row_of_key = _row_of_each_key(place, position_ids.device)
    return torch.where(row_of_key < 0, 0, of_call[:, row_of_key.clamp(0, place.q_len - 1)])


def first_columns_of_documents(mask: Mask | Tensor | None, documents: Documents | None, q_len: int) -> Tensor | None:
    """The column of the first token of each query's document, by all that the mask and the layer are told.

    A document that continues the tokens in a cache starts with them.

    Args:
        mask: what the layer was called with. Bounds of users say nothing of documents.
        documents: what the layer was told.
        q_len: the number of queries.

    Returns:
        `[B or 1, S_q or 1]`, or None where nothing is said of documents or padding.
    """
    known: list[Tensor] = []
    place, is_token, has_documents = Place(q_len, q_len), None, False
    if isinstance(mask, Mask) and mask.place is not None:
        place, is_token, has_documents = mask.place, mask.is_token, mask.has_documents
        if is_token is not None:
            known.append(is_token.byte().argmax(1, keepdim=True))
        if mask.document_ends is not None:
            starts = _bounds.document_starts(mask.document_ends)
            known.append(starts if place.is_square else starts[:, place.q_offset : place.q_offset + q_len])
        if mask.position_ids is not None:
            known.append(_first_columns_by_positions(mask.position_ids, is_token, place))
    if documents is not None and documents.cu_seq_lens_q is not None:
        ends, starts = documents.cu_seq_lens_q, documents.cu_seq_lens_q
        if documents.cu_seq_lens_k is not None:
            starts = documents.cu_seq_lens_k
        row = torch.arange(q_len, dtype=ends.dtype, device=ends.device)
        known.append(starts[torch.searchsorted(ends, row, right=True) - 1][None])
    has_documents |= documents is not None and documents.cu_seq_lens_q is not None and not place.is_square
    if documents is not None and documents.position_ids is not None and not has_documents:
        known.append(_first_columns_by_positions(documents.position_ids, is_token, place))
    return functools.reduce(torch.maximum, known) if known else None


def _first_columns_by_positions(position_ids: Tensor, is_token: Tensor | None, place: Place) -> Tensor:
    rows = _documents_among_rows(position_ids, is_token, place)
    starts = _bounds.document_starts(rows.ends).long()
    position_ids = position_ids.expand(len(starts), -1)
    is_alone = position_ids.gather(1, starts) < position_ids.gather(1, rows.first.expand(len(starts), -1))
    return torch.where(starts > rows.first, starts + place.q_offset * is_alone, 0)


def after_cache(position_ids: Tensor, is_token: Tensor | None, place: Place, *, has_ranges: bool) -> Tensor:
    """Bounds that keep the documents of a call beside a cache apart; what is causal in the mask stays to be added.

    A document whose positions start where those of the call start, or later, continues the tokens in the cache, as the
    first one does: several continuations of one prefix. A document that starts at a lower position is alone.

    Args:
        position_ids: `[B or 1, S_q]`.
        is_token: bool `[B, S_k]`, False for padding.
        has_ranges: whether the mask hides keys by their distance, which the rows do not tell of a second continuation.

    Returns:
        `[B or 1, 1, 2, S_k]`.

    Raises:
        NotImplementedError: for a second continuation under a window or chunks, and for one after a document that is
            alone. In a graph it is an assertion on the device.
    """
    q_len = place.q_len
    ends, first_row, is_row_token = _documents_among_rows(position_ids, is_token, place)
    position_ids = position_ids.expand(len(ends), -1)
    row = torch.arange(q_len, device=ends.device)
    starts = nn.functional.pad(ends[:, :-1] == row[1:], (1, 0)) & (row > first_row)
    if is_row_token is not None:
        starts = starts & is_row_token  # a row of padding alone has no first token
    is_alone = starts & (position_ids < position_ids.gather(1, first_row.expand(len(position_ids), -1)))
    first_alone = torch.where(is_alone, row, q_len).amin(1, keepdim=True)
    if not isinstance(place.q_offset, int) or place.q_offset > 0:
        continues = starts & ~is_alone & (place.q_offset > 0)
        if has_ranges:
            read_and_refuse(
                continues,
                "`position_ids` pack several continuations of the cached tokens into one row, which layers with "
                "windows or chunks cannot tell apart: give each continuation a row of the batch",
            )
        else:
            read_and_refuse(
                continues & (row > first_alone),
                "`position_ids` pack a continuation of the cached tokens behind a document of its own: put the "
                "continuations first",
            )
    row_of_key = _row_of_each_key(place, ends.device)
    of_call = ends[:, row_of_key.clamp(0, q_len - 1)]
    lts = torch.where(row_of_key < 0, first_alone, of_call).to(torch.int32)
    return torch.stack([lts, torch.zeros_like(lts)], dim=1)[:, None]


class _DocumentsAmongRows(NamedTuple):
    """The documents among the queries of a call beside a cache.

    Attributes:
        ends: int32 `[B or 1, S_q]`, past-the-last row of the document of each.
        first: `[B or 1, 1]`, the row of the first token.
        is_token: bool `[B, S_q]`, False for padding.
    """

    ends: Tensor
    first: Tensor
    is_token: Tensor | None


def _documents_among_rows(position_ids: Tensor, is_token: Tensor | None, place: Place) -> _DocumentsAmongRows:
    if is_token is None:
        first = torch.zeros(1, 1, dtype=torch.int64, device=position_ids.device)
        return _DocumentsAmongRows(_bounds.document_ends(position_ids), first, None)
    key_of_row = torch.arange(place.q_len, device=is_token.device) + (place.q_offset - place.kv_offset)
    is_row_token = is_token[:, key_of_row.clamp(0, place.kv_len - 1)]
    first = is_row_token.byte().argmax(1, keepdim=True)
    return _DocumentsAmongRows(
        _bounds.document_ends(position_ids.expand(len(is_token), -1), is_row_token), first, is_row_token
    )


def _row_of_each_key(place: Place, device: torch.device) -> Tensor:
    """Negative for the tokens in the cache."""
    return torch.arange(place.kv_len, device=device) + (place.kv_offset - place.q_offset)


def document_ids_of_call(attention_mask: Any, device: torch.device) -> Tensor | None:
    """The 2-D mask, `[B, S]`, where its values may tell documents apart: `(1, 1, 2, 2, 2, 0)` is two and padding.

    A mask of bool has none, one of 0 and 1 is one document in each row.
    """
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2 or attention_mask.dtype == torch.bool:
        return None
    has_few_operations = attention_mask.dtype in (torch.uint16, torch.uint32, torch.uint64)
    return attention_mask.to(device, torch.int64 if has_few_operations else attention_mask.dtype)


def are_ids(attention_mask: Tensor) -> Tensor:
    """Where a 2-D mask holds another value than 0 and 1."""
    return attention_mask != attention_mask.bool()


def ids_beside_cache(
    ids: Tensor, is_token: Tensor, place: Place, *, has_static_cache: bool
) -> tuple[Tensor | None, Tensor | None]:
    """What a 2-D mask tells queries behind cached tokens, whose rows are its last columns.

    Args:
        ids: numbers `[B, S]`, of all tokens so far.
        is_token: bool `[B, S]`, where they are not 0.

    Returns:
        * bool `[B, S]`, False for what is padding to all queries: to a single one all tokens of other documents are.
          None where the host knows that it sees every key.
        * int32 `[B, S]`, for several queries past-the-last token of each one's document. None where the host knows that
          each row is one document.

    Raises:
        NotImplementedError: for documents beside a static cache, and for the ids that `generate` appends.
    """
    if has_static_cache or isinstance(place.q_offset, Tensor):
        _refuse_beside_static_cache(ids, place)
        return is_token, None
    so_far = place.q_offset + place.q_len
    ids, is_token = ids[:, :so_far], is_token[:, :so_far]
    values = _read_least_and_largest_id(ids)
    if values == [1, 1] and place.q_len == 1 and ids.shape[1] == so_far:
        return None, None
    if values is not None and values[0] >= 0 and values[1] <= 1:
        return is_token, None
    ends = _bounds.document_ends_of_mask(ids, is_token)
    starts = (ends[:, 1:] != ends[:, :-1]) & (ids[:, 1:] == 1)
    read_and_refuse(
        starts[:, -place.q_len :],
        "`attention_mask` holds document ids, and a new token beside the cache has id 1 after another id, as generate "
        "appends it: it would see no token before it. Give each prompt a row of the batch, with a mask of 0 and 1; in "
        "a loop of your own append the id of the document that goes on",
    )
    return (is_token & (ends == ends[:, -1:]), None) if place.q_len == 1 else (is_token, ends)


def _refuse_beside_static_cache(ids: Tensor, place: Place) -> None:
    """In a step of one token nothing waits for the device, which asserts it."""
    reason = (
        "`attention_mask` holds document ids, which do not work beside a static cache: pass a mask of 0 and 1, and "
        "`position_ids` that restart with every document"
    )
    if place.q_len == 1 and ids.is_cuda:
        torch._assert_async(~are_ids(ids).any(), reason)
    else:
        read_and_refuse(are_ids(ids), reason)


def _read_least_and_largest_id(ids: Tensor) -> list[float] | None:
    """The least and the largest id, where the host may know them."""
    if not may_be_read(ids) or ids.numel() == 0:
        return None
    values: list[float] = torch.stack(torch.aminmax(ids)).tolist()
    return values
