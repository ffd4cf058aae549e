"""The mask that one kind of layer attends under, made once per forward pass.

What the mask function made is completed by what only attention layers are told: `cu_seq_lens_q`, in many models
`position_ids`, and without a mask `is_causal` and `sliding_window`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from flashmask_kernels import Schedules
from flashmask_kernels.dispatch import is_traced_for_export

from .. import bounds as _bounds
from .conversion import from_dense_mask
from .documents import (
    Documents,
    after_cache,
    first_columns_of_documents,
)
from .engines import heads_of_rank
from .final_bounds import refuse_mask_of_flex_attention, warn_of_meeting_documents
from .mask import Mask, Place
from .memo import recent
from .reading import may_be_read, read_and_refuse
from .refused_documents import refuse_lengths_beside_cache

__all__ = ["LayerMask", "layer_mask"]

T = TypeVar("T")


class LayerMask:
    """Bounds, and what the layers that share them make of them.

    Attributes:
        bounds: int32 `[B or 1, H or 1, C, S_k]`; None: attention without a mask, as `is_causal` says.
        is_causal: without bounds, whether a query sees no key after its own position.
        schedules: the tiles that the kernels visit under the bounds.
    """

    def __init__(self, bounds: Tensor | None, q_len: int, *, is_causal: bool = False) -> None:
        self.bounds, self.is_causal = bounds, is_causal and bounds is None
        self.schedules = None if bounds is None else Schedules(bounds, q_len)
        self._made: dict[tuple[object, ...], Any] = {}

    def once(self, key: tuple[object, ...], build: Callable[[], T]) -> T:
        """What is made of the bounds, once for equal keys, which hold no lengths."""
        if key not in self._made:
            self._made[key] = build()
        return self._made[key]


def layer_mask(
    mask: Mask | Tensor | None,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    documents: Documents | None,
    *,
    is_causal: bool,
    sliding_window: int | None,
) -> LayerMask:
    """The mask of one call of an attention layer.

    Args:
        mask: what the layer was called with.
        module: the layer.
        query, key: `[B, H, S_q, D]`, `[B, H_kv, S_k, D]`.
        documents: what the layer was told about documents.
        is_causal, sliding_window: what the layer was told beside the mask; read where it has none.
    """
    if isinstance(mask, Mask):
        if mask.bounds is not None and mask.bounds.device != query.device:
            raise ValueError(
                f"`attention_mask` is on {mask.device}, the queries are on {query.device}; move it there with .to()"
            )
        if mask.is_final:
            assert mask.bounds is not None
            build = functools.partial(_layer_mask_of_user, mask.bounds, module, query, key)
            return mask.memo.get("final", (), module, build, query.device)
        if documents is not None:
            documents = documents.beside(mask, query.shape[2])
        if documents is None:
            return mask.memo.get(None, (), module, lambda: _complete_layer_mask(mask, module, None), query.device)
        build = functools.partial(_complete_layer_mask, mask, module, documents)
        return mask.memo.get(documents.key, documents.tensors, module, build, query.device)
    if mask is not None:
        refuse_mask_of_flex_attention(mask)
        return _layer_mask_of_tensor(mask, module, query, key, documents)
    place = Place(query.shape[2], key.shape[2])
    if not place.is_square:
        documents = None
    if documents is None and sliding_window is None:
        return LayerMask(None, place.q_len, is_causal=is_causal)
    described = (*place.sizes, is_causal, sliding_window, None if documents is None else documents.key, query.device)
    sources = () if documents is None else documents.tensors
    build = functools.partial(
        _layer_mask_without_mask, module, documents, place, is_causal, sliding_window, query.device
    )
    return recent.get(("no mask", *described), sources, module, build, query.device)


def _complete_layer_mask(mask: Mask, module: nn.Module, documents: Documents | None) -> LayerMask:
    """A mask of the mask function, with the documents that the layer was told about."""
    place = mask.place
    assert place is not None
    is_causal = mask.is_causal if mask.bounds is None else mask.bounds.shape[2] == 1
    if documents is None:
        if mask.bounds is not None:
            return LayerMask(mask.bounds, place.q_len)
        if place.is_square and torch.compiler.is_compiling():  # so that the layers share what a graph makes of it
            return LayerMask(_plain_layer_bounds(is_causal, place, mask.device), place.q_len)
        return LayerMask(None, place.q_len, is_causal=is_causal)
    apart = _document_bounds(documents, module, place, is_causal, mask.is_token, mask.has_ranges)
    if mask.bounds is None:
        return LayerMask(apart, place.q_len)
    chunk = getattr(getattr(module, "config", None), "attention_chunk_size", None)
    if chunk is not None and mask.has_ranges and documents.cu_seq_lens_q is not None:
        # Compiled graphs have two planes, of which the second is the triangle.
        if place.is_square and mask.bounds.shape[2] <= 2 and getattr(module, "is_causal", True):
            lts, *triangle = mask.bounds.split(1, dim=2)
            lts = _chunks_of_documents(lts, apart[:, 0, 0], mask.document_ends, chunk)
            return LayerMask(torch.cat([lts, *triangle], dim=2) if triangle else lts, place.q_len)
        _refuse_chunks_of_lengths(mask, documents, place.q_len, chunk)
    return LayerMask(_bounds.intersect(mask.bounds, apart, q_len=place.q_len), place.q_len)


def _chunks_of_documents(bounds: Tensor, by_lengths: Tensor, by_mask: Tensor | None, chunk: int) -> Tensor:
    """Causal bounds whose chunks start with each document.

    `cu_seq_lens_q` does not reach the mask function, which starts chunks with the documents that it knows, or the row.

    Args:
        bounds: what it made, `[B or 1, 1, 1, S]`.
        by_lengths, by_mask: past-the-last token of each one's document, `[B or 1, S]`, by the lengths, and as the mask
            function knows it.
        chunk: its tokens.
    """
    starts, ends = _bounds.document_starts(by_lengths), by_lengths
    if by_mask is not None:
        starts, ends = torch.maximum(starts, _bounds.document_starts(by_mask)), torch.minimum(ends, by_mask)
    index = torch.arange(ends.shape[1], dtype=ends.dtype, device=ends.device)
    chunk_ends = torch.minimum(starts + ((index - starts) // chunk + 1) * chunk, ends)[:, None, None]
    return torch.where(bounds > index, chunk_ends, bounds)  # padding does not even see itself


def _refuse_chunks_of_lengths(mask: Mask, documents: Documents, q_len: int, chunk: int) -> None:
    """Refuse lengths beside a cache where the chunks of a document would not start with it, as those of the mask do."""
    by_lengths, by_mask = (
        first_columns_of_documents(None, documents, q_len),
        first_columns_of_documents(mask, None, q_len),
    )
    assert by_lengths is not None
    behind = by_lengths - (0 if by_mask is None else by_mask)
    read_and_refuse(
        (behind > 0) & (behind % chunk != 0),
        "`cu_seq_lens_q` packs documents behind cached tokens, and layers with chunks are not told where they start: "
        "pass `position_ids` [B, S] that restart with every document as well",
    )


def _layer_mask_without_mask(
    module: nn.Module,
    documents: Documents | None,
    place: Place,
    is_causal: bool,
    sliding_window: int | None,
    device: torch.device,
) -> LayerMask:
    parts = []
    if sliding_window is not None and sliding_window < max(place.q_len, place.kv_len):
        window = sliding_window if is_causal else sliding_window - 1
        parts.append(_bounds.sliding_window(window, place.q_len, place.kv_len, is_causal=is_causal, device=device))
    if documents is not None:
        parts.append(_document_bounds(documents, module, place, is_causal))
    bounds = _bounds.intersect(*parts, q_len=place.q_len) if parts else None
    return LayerMask(bounds, place.q_len, is_causal=is_causal)


def _plain_layer_bounds(is_causal: bool, place: Place, device: torch.device) -> Tensor:
    make = _bounds.causal if is_causal else _bounds.bidirectional
    return make(place.q_len, place.kv_len, device=device)


def _document_bounds(
    documents: Documents,
    module: nn.Module,
    place: Place,
    is_causal: bool,
    is_token: Tensor | None = None,
    has_ranges: bool = False,
) -> Tensor:
    """Bounds that keep documents apart, C = 1 with the triangle where the mask beside them has it.

    Layer types have masks of their own: what they do not depend on is shared among them.
    """
    rows, keys, position_ids = documents.cu_seq_lens_q, documents.cu_seq_lens_k, documents.position_ids
    if rows is not None:
        if keys is None:
            refuse_lengths_beside_cache(place)
        elif place.kv_offset:  # a cache of a window has dropped the first keys
            keys = (keys - place.kv_offset).clamp(min=0)
        build = functools.partial(
            _bounds.from_cu_seqlens, rows, place.q_len, kv_len=place.kv_len, cu_seqlens_k=keys, is_causal=is_causal
        )
        sources = documents.tensors
        if position_ids is not None:
            build = functools.partial(_bounds_by_lengths_and_positions, build, position_ids, is_token, is_causal)
            sources = sources if is_token is None else (*sources, is_token)
        described = (documents.key, place.q_len, place.kv_len, place.kv_offset, is_causal)
        return recent.get(described, sources, module, build, rows.device)
    assert position_ids is not None
    if not place.is_square:
        return after_cache(position_ids, is_token, place, has_ranges=has_ranges)
    if is_token is not None:  # whose padding the mask hides
        ends = _bounds.document_ends(position_ids, is_token)
    else:
        find = functools.partial(_bounds.document_ends, position_ids)
        ends = recent.get("document ends", (position_ids,), module, find, position_ids.device)
    return _bounds.from_document_ends(ends, is_causal=is_causal)


def _bounds_by_lengths_and_positions(
    by_lengths: Callable[[], Tensor], position_ids: Tensor, is_token: Tensor | None, is_causal: bool
) -> Tensor:
    by_positions = _bounds.from_document_ends(_bounds.document_ends(position_ids, is_token), is_causal=is_causal)
    parts = by_lengths(), by_positions
    is_one_plane = all(part.shape[2] == 1 for part in parts)
    return torch.minimum(*parts) if is_one_plane else _bounds.intersect(*parts)


def _layer_mask_of_tensor(
    mask: Tensor, module: nn.Module, query: Tensor, key: Tensor, documents: Documents | None
) -> LayerMask:
    """A tensor that reached the layer past the mask function: a user's dict of bounds, or a model's own dense mask."""

    def build() -> LayerMask:
        if documents is not None and query.shape[2] == key.shape[2]:
            warn_of_meeting_documents(getattr(module, "config", module), mask, documents.position_ids)
        return _layer_mask_of_user(mask, module, query, key)

    return recent.get(("tensor", query.shape[2]), (mask,), module, build, query.device)


def _layer_mask_of_user(mask: Tensor, module: nn.Module, query: Tensor, key: Tensor) -> LayerMask:
    if mask.dtype == torch.bool or mask.is_floating_point():
        _check_dense_mask(mask, query, key)
        convert = functools.partial(from_dense_mask, mask, query.shape[2])
        mask = recent.get("dense", (mask,), module, convert, query.device)
    else:
        _refuse_dense_integers(mask, query.shape[2])
    mask = heads_of_rank(module, mask, query.shape[1])
    _bounds.check_bounds(
        mask,
        name="attention_mask",
        batch=query.shape[0],
        heads=query.shape[1],
        kv_len=key.shape[2],
        device=query.device,
    )
    return LayerMask(mask.contiguous(), query.shape[2])


def _refuse_dense_integers(mask: Tensor, q_len: int) -> None:
    """A dense mask of 0 and 1 must not pass for bounds, whose planes could be as many as a short row has queries.

    One plane is as much as a dense mask that is the same for all queries. On a GPU that is not looked at: reading it
    would wait for the device in every call with bounds. In a graph it is an assertion on the device.
    """
    if mask.dtype != torch.int32:
        raise TypeError(
            f"`attention_mask` is {mask.dtype} {list(mask.shape)}: bounds [B or 1, H or 1, C, S_k] are int32, and a "
            "dense mask [B or 1, H or 1, S_q or 1, S_k] is bool, or float with 0 and -inf. Call .to(torch.int32) on "
            "bounds, .bool() on a dense mask of 0 and 1"
        )
    # An exported program may take other lengths, which comparing one with the planes would rule out.
    if mask.ndim != 4 or q_len < 2 or is_traced_for_export():
        return
    is_readable = may_be_read(mask)
    if mask.shape[2] != q_len and not (mask.shape[2] == 1 and mask.is_cpu and is_readable):
        return
    # In one plane the first token of a row may have LTS = 1, as a document of its own; no other key that is seen has.
    telling = mask[..., 1:] if mask.shape[2] == 1 else mask
    looks_dense = ((mask == 0) | (mask == 1)).all() & telling.any()
    reason = (
        "`attention_mask` is int32 and holds nothing but 0 and 1: if it is a dense mask, call .bool() on it; as bounds "
        "it would hide every key from all queries but the first, or none"
    )
    if not is_readable:
        torch._assert_async(~looks_dense, reason)
    elif bool(looks_dense):
        raise ValueError(f"{reason}. It is {list(mask.shape)}, with {q_len} queries")


def _check_dense_mask(attention_mask: Tensor, query: Tensor, key: Tensor) -> None:
    batch, heads, q_len, _ = query.shape
    kv_len, shape = key.shape[2], attention_mask.shape
    fits = all(size == 1 or size == expected for size, expected in zip(shape, (batch, heads, q_len)))
    if attention_mask.ndim != 4 or not fits or shape[3] != kv_len:
        raise ValueError(
            f"`attention_mask` is a dense mask of shape {list(shape)}; expected [B or 1, H or 1, S_q or 1, S_k] with "
            f"B = {batch}, H = {heads}, S_q = {q_len} and S_k = {kv_len}. Bounds [B or 1, H or 1, C, S_k] are int32: "
            "call .to(torch.int32) on them"
        )
    if attention_mask.device != query.device:
        raise ValueError(
            f"`attention_mask` is on {attention_mask.device}, the queries are on {query.device}; move it there with "
            ".to()"
        )
