"""The mask function, and what a mask knows on its way to the layers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import masking_utils
from transformers.utils.import_utils import is_tracing

from flashmask_kernels.ops import share_in_graph

from .. import bounds as _bounds
from .conversion import Tree, from_mask_function, in_tree
from .memo import _masks_of_users, once_per_forward_pass
from .support import _has_key_ranges


def flashmask_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """Bounds for a Transformers mask function and a 2-D mask.

    The arguments are those of `transformers.masking_utils.sdpa_mask`. `attention_mask` `[B, S]` is bool, False for
    padding, whose keys are hidden and whose rows are not; or int32, the documents of `_find_documents`.

    Returns:
        Bounds `[B or 1, 1, C, kv_length]`; where queries and keys are the same tokens, with the mark, and without
        planes for plain causal attention. None where every query sees every key, unless a compiler asks.

    Raises:
        NotImplementedError: when `mask_function` is not understood; the message names it.
    """
    tree = None if attention_mask is None else _tree_on_its_way(attention_mask)
    if tree is not None:
        bounds = in_tree(mask_function, tree)
        _masks_of_users[bounds] = True
        return bounds
    is_square = _is_square(q_length, kv_length, q_offset, kv_offset)
    has_documents = attention_mask is not None and attention_mask.dtype == torch.int32
    padding_mask = None if has_documents else _mask_of_keys(attention_mask, kv_length, kv_offset)
    is_last_row = q_length == 1 and isinstance(q_offset, int) and q_offset + 1 == kv_offset + kv_length
    if (is_square or is_last_row) and not has_documents:
        # In a decoding step windows and chunks hide nothing until they are full.
        is_causal = mask_function is masking_utils.causal_mask_function or (
            is_last_row and kv_offset == 0 and kv_length <= (local_size or 0)
        )
        can_rebuild = (is_causal and allow_is_causal_skip) or (
            mask_function is masking_utils.bidirectional_mask_function and allow_is_bidirectional_skip
        )
        if can_rebuild and (padding_mask is None or (is_last_row and _has_no_padding(padding_mask))):
            if is_square and is_causal:
                return share_in_graph(_plain_causal(kv_length, device))
            if not (is_square and torch.compiler.is_compiling()):  # whose layers share what they make of a tensor
                return None
    bounds = from_mask_function(
        mask_function,
        document_ends=attention_mask if has_documents else None,
        batch_size=batch_size,
        q_len=q_length,
        kv_len=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        device=device,
        has_user_functions=use_vmap,
    )
    if padding_mask is not None:
        bounds = _bounds.hide_keys(bounds, padding_mask == 0, start=-1)
    return share_in_graph(_mark(bounds, padding_mask, has_documents) if is_square else bounds)


def _has_no_padding(padding_mask: Tensor) -> bool:
    """Read on the host: in a decoding step that is less than a mask costs, and the step waits for its token anyway."""
    return not is_tracing(padding_mask) and bool(padding_mask.all())


def _is_square(q_length: int, kv_length: int, q_offset: int | Tensor, kv_offset: int) -> bool:
    """Whether queries and keys are the same tokens. The offset of a static cache is on the device: it is not read."""
    return q_length == kv_length and isinstance(q_offset, int) and q_offset == kv_offset == 0


def _mask_of_keys(attention_mask: Tensor | None, kv_length: int, kv_offset: int) -> Tensor | None:
    """The part of the 2-D mask that belongs to the keys, `[B, kv_length]`; slots not yet filled are padding."""
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2:
        raise ValueError(
            f"`attention_mask` must be 2-D [B, S] or bounds [B or 1, H or 1, C, S_k], got {list(attention_mask.shape)}"
        )
    missing = kv_offset + kv_length - attention_mask.shape[1]
    if missing > 0:
        attention_mask = nn.functional.pad(attention_mask, (0, missing))
    return attention_mask[:, kv_offset : kv_offset + kv_length]


def _find_documents(
    position_ids: Tensor, attention_mask: Tensor | None = None, is_token: Tensor | None = None
) -> Tensor:
    """Documents and padding as one int32 2-D mask: the ends of `bounds.document_ends`, with a minus for padding.

    Padding belongs to the document before it: what a row of padding computes after the last document, such as the first
    token that `generate` adds to a right-padded row, depends on that.

    Args:
        position_ids: `[B or 1, S]`.
        attention_mask: what the model was called with, of which bool `is_token` `[B, S]` was made for this layer type.
    """

    def find() -> Tensor:
        ends = _bounds.document_ends(position_ids, is_token)
        return ends if is_token is None else torch.where(is_token, ends, -ends)

    sources = (position_ids,) if attention_mask is None else (position_ids, attention_mask)
    return cast(Tensor, once_per_forward_pass(find, "documents", sources))


_PLAIN_CAUSAL, _WITH_DOCUMENTS, _WITHOUT_DOCUMENTS, _WITHOUT_DOCUMENTS_PADDED = 17, 7, 11, 13
"""What the number of heads says of bounds that are not final: whether `position_ids` were read, and whether there is
padding. No model has so many heads, so that bounds of a user's that are uint32 or empty by mistake are refused.
"""


def _plain_causal(kv_length: int, device: torch.device | str) -> Tensor:
    """No planes at all. None would not do: some causal layers call themselves bidirectional (PaliGemma)."""
    return torch.empty((1, _PLAIN_CAUSAL, 0, kv_length), dtype=torch.int32, device=device)


def _is_plain_causal(mask: Tensor) -> bool:
    return mask.dtype == torch.int32 and mask.ndim == 4 and mask.shape[1:3] == (_PLAIN_CAUSAL, 0)


def _mark(bounds: Tensor, is_token: Tensor | None, has_documents: bool) -> Tensor:
    """A view of bounds to which documents may be added. Padded bounds start with less than 0 exactly for padding."""
    if has_documents:
        heads = _WITH_DOCUMENTS
    elif is_token is None:
        heads = _WITHOUT_DOCUMENTS
    else:
        heads = _WITHOUT_DOCUMENTS_PADDED
    return bounds.view(torch.uint32).expand(-1, heads, -1, -1)


def _is_marked(bounds: Tensor) -> bool:
    """Whether bounds, or the lack of them, came from `flashmask_mask` and are not final."""
    marks = (_WITH_DOCUMENTS, _WITHOUT_DOCUMENTS, _WITHOUT_DOCUMENTS_PADDED)
    is_view = bounds.dtype == torch.uint32 and bounds.ndim == 4 and bounds.shape[1] in marks
    return is_view or _is_plain_causal(bounds)


def _unmark(marked: Tensor) -> Tensor:
    return marked[:, :1].view(torch.int32)


_trees: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""The masks as which prefix trees travel -> the trees. No tree holds its own mask, which would then never go."""


_TREE_PLANES = 3
"""A number of planes that bounds cannot have: nothing takes a tree for a final mask and loses the windows."""


def register_tree(tree: Tree) -> Tensor:
    """What to pass as `attention_mask`: every layer narrows the tree to its own window or chunk along the branches."""
    mask = tree.bounds.expand(-1, -1, _TREE_PLANES, -1)
    _trees[mask] = tree
    return mask


def _unwrap_tree_for_compiler(config: Any, attention_mask: Any) -> Any:
    """The compiler cannot look a tree up. Where no layer narrows it, its bounds are final."""
    if not _is_tree_mask(attention_mask) or not is_tracing(attention_mask):
        return attention_mask
    if _has_key_ranges(config, attention_mask):
        raise NotImplementedError(
            "windows and chunks inside prefix trees do not work in torch.compile: run this model without it"
        )
    return attention_mask[:, :, :1].contiguous()


def _is_tree_mask(attention_mask: Any) -> bool:
    is_bounds = isinstance(attention_mask, Tensor) and attention_mask.ndim == 4 and attention_mask.dtype == torch.int32
    return is_bounds and attention_mask.shape[2] == _TREE_PLANES and attention_mask.stride(2) == 0


def _tree_of_user(config: Any, attention_mask: Any, position_ids: Tensor | None) -> Tree | None:
    """What the model was called with as a mask, if it is a prefix tree that layers may have to narrow.

    Other bounds are final.
    """
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 4 or is_tracing(attention_mask):
        return None
    known: Tree | None = _trees.get(attention_mask)
    if known is not None or position_ids is None or not _has_key_ranges(config, attention_mask):
        return known
    batch, heads, num_planes, length = attention_mask.shape
    is_tree = attention_mask.dtype == torch.int32 and heads == num_planes == 1
    if not is_tree or position_ids.ndim != 2 or position_ids.shape[1] != length:
        return None
    return Tree(attention_mask, position_ids.expand(batch, -1))


def _send_tree(tree: Tree) -> Tensor:
    """The tree as a 2-D mask: no sum of it is 0, so that Transformers counts no left padding."""
    mask = tree.bounds[:, 0, 0] + 1
    _trees[mask] = tree
    return mask


def _tree_on_its_way(attention_mask: Tensor) -> Tree | None:
    if is_tracing(attention_mask):
        return None
    tree: Tree | None = _trees.get(attention_mask)
    return tree


class _Layer(NamedTuple):
    """What the bounds of a layer depend on besides tensors."""

    q_len: int
    kv_len: int
    is_causal: bool
    sliding_window: int | None
    has_cu_seq_lens: bool


def _build_bounds(
    mask: Tensor | None, documents: tuple[Tensor, ...], layer: _Layer, device: torch.device
) -> Tensor | None:
    """Bounds of the mask function, or else of `is_causal` and the sliding window, with the documents kept apart."""
    is_causal, parts = layer.is_causal, []
    is_token: Tensor | None = None
    if mask is not None and not _is_plain_causal(mask):
        bounds = _unmark(mask)
        parts.append(bounds)
        is_causal = bounds.shape[2] == 1
        is_token = bounds[:, 0, 0] >= 0 if mask.shape[1] == _WITHOUT_DOCUMENTS_PADDED else None
    elif layer.sliding_window is not None and layer.sliding_window < max(layer.q_len, layer.kv_len):
        window = layer.sliding_window if is_causal else layer.sliding_window - 1
        parts.append(_bounds.sliding_window(window, layer.q_len, layer.kv_len, is_causal=is_causal, device=device))
    if documents and layer.has_cu_seq_lens:
        rows, keys = documents[0], documents[1] if len(documents) > 1 else None
        build = functools.partial(_bounds.from_cu_seqlens, rows, layer.q_len, cu_seqlens_k=keys, is_causal=is_causal)
        parts.append(cast(Tensor, once_per_forward_pass(build, ("cu_seq_lens", layer.q_len, is_causal), documents)))
    elif documents and is_token is not None:
        # The bounds of the mask function hide the padding.
        ends = _bounds.document_ends(documents[0], is_token)
        parts.append(_bounds.from_document_ends(ends, is_causal=is_causal))
    elif documents:
        parts.append(_bounds.from_document_ends(_find_documents(documents[0]), is_causal=is_causal))
    if not parts and mask is not None and torch.compiler.is_compiling():  # for all layers that share the mask
        parts.append(_bounds.causal(layer.q_len, device=device))
    if not parts:
        return None
    return (parts[0] if len(parts) == 1 else _bounds.intersect(*parts, q_len=layer.q_len)).contiguous()


def _document_tensors(
    query: Tensor, position_ids: Tensor | None, cu_seq_lens_q: Tensor | None, cu_seq_lens_k: Tensor | None
) -> tuple[Tensor, ...]:
    """The tensors that tell the packed documents of this call apart, if any."""
    batch, _, q_len, _ = query.shape
    if cu_seq_lens_q is not None:
        if batch != 1:
            raise ValueError(
                f"`cu_seq_lens_q` describes the documents of one packed row, but the batch has {batch} rows; "
                "pass `position_ids` that restart with every document instead"
            )
        differ = cu_seq_lens_k is not None and cu_seq_lens_k is not cu_seq_lens_q
        return (cu_seq_lens_q, cu_seq_lens_k) if differ else (cu_seq_lens_q,)  # type: ignore[return-value]
    return (position_ids,) if _are_of_tokens(position_ids, batch, q_len) else ()


def _are_of_tokens(position_ids: Tensor | None, batch: int, length: int) -> TypeGuard[Tensor]:
    """Multimodal models have positions in several dimensions, which do not count tokens."""
    if position_ids is None or position_ids.ndim != 2 or position_ids.is_floating_point():
        return False
    return position_ids.shape[0] in (1, batch) and position_ids.shape[1] == length
