"""A Transformers mask function -> bounds, exactly, or an error that names the mask.

Transformers describes a mask as a function of `(batch_idx, head_idx, q_idx, kv_idx)` that its factories in
`transformers.masking_utils` compose: causal, sliding windows, chunks, blocks, packed documents, joined by AND and OR.
The composition is read off those closures and rebuilt with `hf_flashmask.bounds`: AND intersects, OR unites.

Inside `torch.compile` closures cannot be read. There the rows that a key is visible to are found by bisection with
the function itself, which is exact because every mask that Transformers composes on its own shows a key to one
interval of rows around the key's own position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import masking_utils

from . import bounds

__all__ = ["from_mask_function"]


class _Call(NamedTuple):
    """The rows and keys of one attention call, as Transformers passes them to a mask function."""

    batch: int
    q_len: int
    kv_len: int
    q_offset: int | Tensor
    kv_offset: int
    device: torch.device | str
    has_user_functions: bool

    @property
    def place(self) -> dict[str, Any]:
        """The arguments that the constructors of `hf_flashmask.bounds` share."""
        return {"q_len": self.q_len, "kv_len": self.kv_len, "q_offset": self.q_offset, "kv_offset": self.kv_offset}


class _Documents(NamedTuple):
    """Packed documents: first row and past-the-last row of each token's own, and its position there, `[B, S]` each."""

    starts: Tensor
    ends: Tensor
    position_ids: Tensor

    @classmethod
    def of(cls, document_ids: Tensor) -> _Documents:
        starts = torch.searchsorted(document_ids, document_ids)
        ends = torch.searchsorted(document_ids, document_ids, right=True)
        return cls(starts, ends, torch.arange(document_ids.shape[1], device=document_ids.device) - starts)


class _Leaf(NamedTuple):
    """A mask function that is no AND, and the positions it counts in where documents are packed."""

    function: Callable
    position_ids: Tensor | None


def from_mask_function(
    mask_function: Callable,
    *,
    document_ids: Tensor | None = None,
    batch_size: int,
    q_len: int,
    kv_len: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    device: torch.device | str = "cpu",
    has_user_functions: bool = True,
) -> Tensor:
    """Bounds `[B or 1, 1, C, S_k]` that show exactly what `mask_function` shows, to each document by itself.

    Args:
        mask_function: composed by the factories of `transformers.masking_utils`.
        document_ids: `[B, S]`, the packed documents, where queries and keys are the same tokens: numbers that do not
            decrease. Chunks are counted from the start of a document.
        batch_size: B, the range of the function's first argument.
        q_len, kv_len: S_q and S_k.
        q_offset, kv_offset: the indices of the first query and the first key. `q_offset` may be a 0-d tensor.
        device: where the bounds are made.
        has_user_functions: whether somebody else's functions may be part of the composition (Transformers'
            `use_vmap`). Without them its document ids are known to increase, which is else checked on the host.

    Raises:
        NotImplementedError: when a part of the mask is not understood; the message names it.
    """
    call = _Call(batch_size, q_len, kv_len, q_offset, kv_offset, device, has_user_functions)
    is_compiling = torch.compiler.is_dynamo_compiling() and not _is_plain(mask_function)
    if document_ids is None:
        return _bisect(mask_function, call, None) if is_compiling else _convert(mask_function, call, None, False)
    documents = _Documents.of(document_ids)
    if is_compiling:
        return _bisect(mask_function, call, documents)
    visible = _convert(mask_function, call, documents.position_ids, is_causal=False)
    return bounds.intersect(visible, bounds.from_document_ids(document_ids, is_causal=visible.shape[2] == 1))


def _convert(mask_function: Callable, call: _Call, position_ids: Tensor | None, is_causal: bool) -> Tensor:
    """`mask_function`, and the causal triangle if `is_causal`.

    The triangle is given to every constructor instead of being intersected at the end: causal bounds need one plane.
    """
    leaves = list(_leaves_of_and(mask_function, position_ids))
    is_causal = is_causal or any(leaf.function is masking_utils.causal_mask_function for leaf in leaves)
    parts = [_convert_leaf(leaf, call, is_causal) for leaf in leaves if not _is_plain(leaf.function)]
    if parts:
        return bounds.intersect(*parts, q_len=call.q_len)
    if is_causal:
        return bounds.causal(**call.place, device=call.device)
    return bounds.bidirectional(call.q_len, call.kv_len, device=call.device)


def _is_plain(mask_function: Callable) -> bool:
    return mask_function in (masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function)


def _leaves_of_and(mask_function: Callable, position_ids: Tensor | None) -> Iterator[_Leaf]:
    if _is_plain(mask_function) or _factory(mask_function) != "and_masks":
        yield _Leaf(mask_function, position_ids)
        return
    parts = _closure(mask_function)["mask_functions"]
    is_packed = any(_factory(part) == "packed_sequence_mask_function" for part in parts)
    for part in parts:
        if is_packed and _factory(part) == "remap_positions_for_packed_sequence":
            remapped = _closure(part)
            yield from _leaves_of_and(remapped["mask_function"], remapped["position_ids"])
        else:
            yield from _leaves_of_and(part, position_ids)


def _convert_leaf(leaf: _Leaf, call: _Call, is_causal: bool) -> Tensor:
    """Bounds of one leaf.

    Positions count from the start of each document where documents are packed, but a document's positions go up one by
    one: distances, and with them windows, are the same in rows. Only chunks depend on where the counting starts. Blocks
    are looked up by row: Transformers looks them up by position, which finds those of the first document for all.
    """
    factory = _factory(leaf.function)
    arguments = _closure(leaf.function)
    if factory == "or_masks":
        parts = [_convert(part, call, leaf.position_ids, is_causal) for part in arguments["mask_functions"]]
        return bounds.union(*parts, q_len=call.q_len)
    if factory == "sliding_window_overlay":
        if is_causal and arguments["sliding_window"] < 1:
            # Nothing is visible. Qwen2-MoE makes such a mask when it has no windows, and uses it in no layer.
            return torch.zeros_like(bounds.causal(**call.place, device=call.device))
        window = bounds.sliding_window(arguments["sliding_window"], **call.place, device=call.device)
        if is_causal:
            return window
        lts = window[:, :, :1]
        return torch.cat([lts, torch.zeros_like(lts)], dim=2)
    if factory == "packed_sequence_mask_function":
        document_ids = arguments["packed_sequence_mask"]
        if call.has_user_functions:
            _check_runs(leaf.function, document_ids)
        return bounds.from_document_ids(document_ids, is_causal=is_causal, **call.place)
    if factory == "chunked_overlay" and leaf.position_ids is not None:
        # Chunks are the documents of a document, and start where it starts: left padding is outside of it.
        chunk_ids = leaf.position_ids // arguments["chunk_size"]
        return bounds.from_document_ids(chunk_ids, is_causal=is_causal, **call.place)
    if factory == "chunked_overlay":
        left_padding = arguments["left_padding"]
        return bounds.chunked(
            arguments["chunk_size"], left_padding=left_padding, is_causal=is_causal, device=call.device, **call.place
        )
    if factory == "sliding_window_bidirectional_overlay":
        part = bounds.sliding_window(arguments["sliding_window"], **call.place, is_causal=False, device=call.device)
    elif factory == "blockwise_overlay":
        _check_runs(leaf.function, arguments["block_sequence_ids"])
        part = bounds.from_document_ids(arguments["block_sequence_ids"], is_causal=False, **call.place)
    else:
        raise NotImplementedError(_not_understood(leaf.function, "Transformers' factories do not make it"))
    if is_causal:
        part = bounds.intersect(part, bounds.causal(**call.place, device=call.device), q_len=call.q_len)
    return part


def _factory(mask_function: Callable) -> str | None:
    """The function of `transformers.masking_utils` that made this closure."""
    if getattr(mask_function, "__module__", None) != masking_utils.__name__:
        return None
    factory, _, _ = mask_function.__qualname__.partition(".<locals>.")
    return factory


def _closure(mask_function: Callable) -> dict[str, Any]:
    code, cells = getattr(mask_function, "__code__", None), getattr(mask_function, "__closure__", None)
    return {} if code is None else {name: cell.cell_contents for name, cell in zip(code.co_freevars, cells or ())}


def _check_runs(mask_function: Callable, ids: Tensor) -> None:
    """Bounds hold ids whose tokens are adjacent. Reads one bool from the device."""
    starts = torch.nn.functional.pad(ids[:, 1:] != ids[:, :-1], (1, 0), value=True) & (ids >= 0)
    ordered = ids.sort(dim=-1).values
    distinct = torch.nn.functional.pad(ordered[:, 1:] != ordered[:, :-1], (1, 0), value=True) & (ordered >= 0)
    if not torch.equal(starts.sum(-1), distinct.sum(-1)):
        raise NotImplementedError(_not_understood(mask_function, "tokens with the same id are not adjacent"))
    if _factory(mask_function) == "packed_sequence_mask_function" and bool((ids < 0).any()):
        raise NotImplementedError(_not_understood(mask_function, "its document ids are negative"))


def _not_understood(mask_function: Callable, reason: str) -> str:
    name = getattr(mask_function, "__qualname__", repr(mask_function))
    module = getattr(mask_function, "__module__", "an unknown module")
    return (
        f'attn_implementation="flashmask" cannot express the mask function `{name}` of `{module}`: {reason}. Pass the '
        'mask as bounds in `attention_mask` (see hf_flashmask.bounds), or use attn_implementation="sdpa".'
    )


def _bisect(mask_function: Callable, call: _Call, documents: _Documents | None) -> Tensor:
    """LTS and UTE of every key, found with O(log S_q) calls of the mask function on one row per key."""
    if call.has_user_functions or getattr(mask_function, "__name__", "") == "or_mask":
        raise NotImplementedError(
            f'attn_implementation="flashmask" cannot read the mask function `{mask_function.__name__}` inside '
            "torch.compile, because it holds overlays (image blocks, or functions of the model's own). Compute the "
            'mask outside of the compiled region, or use attn_implementation="sdpa".'
        )
    batch = torch.arange(call.batch, device=call.device)[:, None]
    head = torch.zeros_like(batch)
    # The function's indices of the keys and of the first and last row to look at, and what is a local row there.
    if documents is None:
        key = torch.arange(call.kv_len, device=call.device) + call.kv_offset
        lowest, highest = key.new_zeros(()) + call.q_offset, key.new_zeros(()) + (call.q_offset + call.q_len - 1)
        local = -call.q_offset
    else:
        key, local = documents.position_ids, documents.starts
        lowest, highest = torch.zeros_like(key), documents.ends - documents.starts - 1

    def is_visible(row: Tensor) -> Tensor:
        return mask_function(batch, head, row, key)

    own_row = torch.minimum(torch.maximum(key, lowest), highest).expand(call.batch, -1)
    first, last = own_row, own_row
    step = 1
    while step < call.q_len:
        step *= 2
    while step >= 1:
        down, up = torch.maximum(first - step, lowest), torch.minimum(last + step, highest)
        first, last = torch.where(is_visible(down), down, first), torch.where(is_visible(up), up, last)
        step //= 2
    hidden = ~is_visible(own_row)
    lts, ute = (last + local + 1).masked_fill(hidden, 0), (first + local).masked_fill(hidden, call.q_len)
    return torch.stack([lts, ute], dim=1)[:, None].to(torch.int32)
