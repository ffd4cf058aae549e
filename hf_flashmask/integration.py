"""The `flashmask` attention implementation of Transformers: registration, mask function, attention function.

How a mask travels, once per forward pass:

1. Transformers calls `flashmask_mask` with a mask function, cache offsets and 2-D padding. It returns None where
   nothing is hidden, and bounds for everything else, with the packed documents where the model passes `position_ids`.
2. Every attention layer calls `flashmask_attention_forward`, which adds the documents that are still missing: no mask
   function is told about `cu_seq_lens_q`, and those of many models are not told about `position_ids`.

Bounds that documents may still be added to are marked by views, which cost nothing: they are uint32, with numbers of
heads that no model has, which tell whether those of `position_ids` are among them (`_mark`). Plain causal attention is
a tensor without planes. Other int32 bounds are final: they came from the user, or belong to a step with a cache.
Nothing here reads a tensor on the host, except in a decoding step, to find out whether it needs a mask at all; what
`conversion` reads, it says.

Prefix trees are one tensor of bounds for all layers; `flashmask_mask` adds the windows and chunks of each layer type.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeGuard, cast
from weakref import ref

import torch
import transformers
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, masking_utils
from transformers.utils import logging
from transformers.utils.import_utils import is_tracing

from flashmask_kernels import flashmask_attention
from flashmask_kernels.ops import once_in_graph, share_in_graph

from . import bounds as _bounds
from .conversion import Tree, from_dense_mask, from_mask_function, in_tree

__all__ = ["NAME", "flashmask_attention_forward", "flashmask_mask", "register", "register_tree"]

NAME = "flashmask"
"""The value of `attn_implementation`."""

logger = logging.get_logger(__name__)


# Mask function


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


# Prefix trees


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


# Attention function


def flashmask_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, as Transformers' attention interface calls it.

    Args:
        module: the attention layer.
        query: `[B, H, S_q, D]`.
        key: `[B, H_kv, S_k, D]`.
        value: `[B, H_kv, S_k, D_v]`.
        attention_mask: None, or int32 bounds `[B or 1, H or 1, C, S_k]`: those of `flashmask_mask`, or the user's own.
            The user's are final: nothing is added to them, neither documents nor the layer's sliding window.
        dropout: probability with which a weight is dropped. Models pass 0 unless they are in training mode.
        scaling: factor of the scores, by default `D ** -0.5`.
        is_causal: by default `module.is_causal`, or True without it. Used when `attention_mask` is None.
        sliding_window: a query sees keys at most `sliding_window - 1` away, None and 0 mean no window. Used when
            `attention_mask` is None.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        s_aux: `[H]`, the attention sinks.
        position_ids: `[B or 1, S]`; in self-attention a document starts wherever they do not increase.
        cu_seq_lens_q, cu_seq_lens_k: `[documents + 1]`, cumulative lengths of one packed row. They go before
            `position_ids`.

    Returns:
        output `[B, S_q, H, D_v]`, and None for the attention weights, which are never computed.

    Raises:
        NotImplementedError, TypeError, ValueError: for whatever would otherwise change the result silently.
    """
    _refuse_unsupported_arguments(module, kwargs)
    is_causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    bounds = attention_mask
    if bounds is not None and module.training and torch.compiler.is_compiling():
        # Each layer its own tensor: checkpointed layers cannot share what they make. With gradients the compiler
        # removes common subexpressions itself.
        bounds = bounds.view(bounds.shape)
    is_causal = is_causal or (bounds is not None and _is_plain_causal(bounds))
    if bounds is None or _is_marked(bounds):
        documents: tuple[Tensor, ...] = ()
        if query.shape[2] == key.shape[2] and not _is_cross_attention(module, is_causal, kwargs):
            documents = _document_tensors(query, position_ids, cu_seq_lens_q, cu_seq_lens_k)
        if bounds is not None and bounds.shape[1] == _WITH_DOCUMENTS and cu_seq_lens_q is None:
            documents = ()
        layer = _Layer(query.shape[2], key.shape[2], is_causal, sliding_window or None, cu_seq_lens_q is not None)
        sources = documents if bounds is None else (bounds, *documents)
        build = functools.partial(_build_bounds, bounds, documents, layer, query.device)
        bounds = once_per_forward_pass(build, layer, sources)
    else:
        _refuse_router_losses(bounds, kwargs)
        if bounds.dtype == torch.bool or bounds.is_floating_point():
            _check_dense_mask(bounds, query, key)
            convert = functools.partial(from_dense_mask, bounds, query.shape[2])
            bounds = once_per_forward_pass(convert, "dense", (bounds,))
        _check_final_bounds(cast(Tensor, bounds), query, key)

    target_dtype = _target_dtype(module, query)
    if target_dtype != query.dtype:
        query, key, value = query.to(target_dtype), key.to(target_dtype), value.to(target_dtype)
    few_rows = query.shape[2] < key.shape[2] and query.shape[2] <= _FEW_ROWS and not torch.is_grad_enabled()
    is_small_mask = query.shape[2] == 1 if bounds is None else bounds.shape[1] == 1
    if few_rows and is_small_mask and softcap is None and s_aux is None and dropout == 0:
        output = _attend_few_rows(query, key, value, bounds, scaling)
    else:
        output = flashmask_attention(
            query,
            key,
            value,
            bounds,
            is_causal=bounds is None and is_causal,
            scale=scaling,
            softcap=softcap,
            sinks=s_aux,
            dropout_p=dropout,
            deterministic=bool(kwargs.get("deterministic")),
        )
    return output.transpose(1, 2).contiguous(), None


_FEW_ROWS = 16
"""Up to this many queries against a cache, a dense mask is small, and SDPA no slower than a kernel for it."""


def _attend_few_rows(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor | None, scaling: float | None) -> Tensor:
    """A decoding step, `[B, H, S_q, D_v]`.

    Without bounds there is one row, the last one, which sees every key. With a mask or large heads, no fast backend of
    SDPA lets heads share keys: query heads that share a key head become rows, so that no key is copied.
    """
    attend = functools.partial(nn.functional.scaled_dot_product_attention, scale=scaling)
    kv_heads, group, q_len = key.shape[1], query.shape[1] // key.shape[1], query.shape[2]
    if bounds is None and query.shape[-1] == value.shape[-1] <= 256:
        return attend(query, key, value, enable_gqa=group > 1)
    rows = query.unflatten(1, (kv_heads, group)).flatten(2, 3)
    if bounds is None:
        return attend(rows, key, value).unflatten(2, (group, q_len)).flatten(1, 2)

    def dense() -> Tensor:
        visible = _bounds.to_dense(bounds, q_len)
        return visible.repeat(1, 1, group, 1) if q_len > 1 else visible

    def additive() -> Tensor:
        # As SDPA would make it of `visible` in every layer: its fast backend asks for rows of whole 16 elements.
        shape = *visible.shape[:-1], -(-visible.shape[-1] // 16) * 16
        padded = torch.zeros(shape, dtype=query.dtype, device=query.device)
        return padded[..., : visible.shape[-1]].masked_fill_(~visible, float("-inf"))

    visible = cast(Tensor, once_per_forward_pass(dense, ("visible", q_len, group), (bounds,)))
    mask = once_per_forward_pass(additive, ("additive", query.dtype), (visible,))
    output = attend(rows, key, value, attn_mask=mask)
    # A row that sees nothing is 0 everywhere else too; backends of SDPA differ about it.
    sees_nothing = once_per_forward_pass(lambda: ~visible.any(-1, keepdim=True), "sees_nothing", (visible,))
    output = output.masked_fill(cast(Tensor, sees_nothing), 0.0)
    return output.unflatten(2, (group, q_len)).flatten(1, 2)


class _Layer(NamedTuple):
    """What the bounds of a layer depend on besides tensors."""

    q_len: int
    kv_len: int
    is_causal: bool
    sliding_window: int | None
    has_cu_seq_lens: bool


class _Built(NamedTuple):
    """Bounds, and the state of the tensors that they were built from."""

    bounds: Tensor | None
    sources: tuple[ref[Tensor], ...]
    versions: tuple[int, ...]


_built_bounds: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""First source tensor -> layer -> the last bounds built for it; it goes when that tensor goes."""


def once_per_forward_pass(
    build: Callable[[], Tensor | None], layer: Hashable, sources: tuple[Tensor, ...]
) -> Tensor | None:
    """`build()`, which reads `sources`, once for all layers that are equal: they share bounds and schedule of tiles."""
    if sources and torch.compiler.is_compiling():
        return once_in_graph(cast(Callable[[], Tensor], build), (layer,), *sources)
    # An inference tensor does not tell whether it was changed.
    if not sources or any(source.is_inference() for source in sources):
        return build()
    versions = tuple(source._version for source in sources)
    built = _built_bounds.setdefault(sources[0], {})
    last: _Built | None = built.get(layer)
    if (
        last is None
        or last.versions != versions
        or len(last.sources) != len(sources)
        or any(known() is not source for known, source in zip(last.sources, sources))
    ):
        last = built[layer] = _Built(build(), tuple(ref(source) for source in sources), versions)
    return last.bounds


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


def _is_cross_attention(module: nn.Module, is_causal: bool, kwargs: dict[str, Any]) -> bool:
    """Whether keys come from elsewhere. `position_ids` then describe the queries only, even if the lengths agree."""
    return (
        kwargs.get("encoder_hidden_states") is not None
        or bool(getattr(module, "is_cross_attention", False))
        or "CrossAttention" in type(module).__name__
        or (bool(getattr(module, "is_decoder", False)) and not is_causal)
    )


def _target_dtype(module: nn.Module, query: Tensor) -> torch.dtype:
    """float32 queries are cast as Transformers casts them for FlashAttention.

    Under autocast to its dtype; otherwise to that of the layer's weights, which differs where norms stay in float32.
    """
    if query.dtype != torch.float32:
        return query.dtype
    if torch.is_autocast_enabled(query.device.type):
        return torch.get_autocast_dtype(query.device.type)
    if hasattr(getattr(module, "config", None), "_is_quantized"):
        return cast(torch.dtype, cast(Any, module).config.dtype)
    weights = (weight.dtype for weight in module.parameters() if weight.ndim == 2 and weight.is_floating_point())
    return next(weights, query.dtype)


# What is refused


_UNSUPPORTED_ARGUMENTS = {
    "position_bias": "a bias added to the scores",
    "indices": "keys selected for each query",
    "block_indices": "blocks of keys selected for each query",
    "sinks": "attention sinks in a form of the model's own",
    "cache": "the paged cache of continuous batching",
}


def _refuse_unsupported_arguments(module: nn.Module, kwargs: dict[str, Any]) -> None:
    for argument, meaning in _UNSUPPORTED_ARGUMENTS.items():
        if kwargs.get(argument) is not None:
            raise NotImplementedError(
                f'attn_implementation="flashmask" does not support `{argument}` ({meaning}), which '
                f"{type(module).__name__} passes; use another implementation for this model."
            )
    if kwargs.get("output_attentions"):
        logger.warning_once(
            'attn_implementation="flashmask" never computes the attention weights: `output_attentions=True` returns '
            'none of them. Use attn_implementation="eager" to get them.'
        )


_masks_of_users: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Bounds that a model was called with, or that were made of the tree that it was called with."""


def _refuse_router_losses(bounds: Tensor, kwargs: dict[str, Any]) -> None:
    """Models read the mask that they were called with as the weights of tokens in the losses of their routers."""
    if kwargs.get("output_router_logits") and not is_tracing(bounds) and bounds in _masks_of_users:
        raise NotImplementedError(
            "with bounds as `attention_mask`, `output_router_logits=True` would weigh tokens by the bounds in the "
            "auxiliary loss: set it to False, or let `position_ids` tell the documents apart instead"
        )


def _check_dense_mask(attention_mask: Tensor, query: Tensor, key: Tensor) -> None:
    batch, heads, q_len, _ = query.shape
    kv_len, shape = key.shape[2], attention_mask.shape
    fits = all(size in (1, expected) for size, expected in zip(shape, (batch, heads, q_len)))
    if attention_mask.ndim != 4 or not fits or shape[3] != kv_len:
        raise ValueError(
            f"`attention_mask` is a dense mask of shape {list(shape)}; expected [B or 1, H or 1, S_q or 1, S_k] with "
            f"B = {batch}, H = {heads}, S_q = {q_len} and S_k = {kv_len}"
        )
    if attention_mask.device != query.device:
        raise ValueError(
            f"`attention_mask` is on {attention_mask.device}, the queries are on {query.device}; move it there with "
            ".to()"
        )


def _check_final_bounds(attention_mask: Tensor, query: Tensor, key: Tensor) -> None:
    _bounds.check_bounds(
        attention_mask,
        name="attention_mask",
        batch=query.shape[0],
        heads=query.shape[1],
        kv_len=key.shape[2],
        device=query.device,
    )


def _check_padding_mask(attention_mask: Tensor, batch: int, length: int) -> None:
    if attention_mask.ndim != 2 or attention_mask.shape[0] not in (1, batch) or attention_mask.shape[1] != length:
        raise ValueError(
            f"`attention_mask` has shape {list(attention_mask.shape)}; expected [{batch}, {length}], 0 for padding, "
            "or bounds [B or 1, H or 1, C, S_k]"
        )


KEY_RANGE_OF_LAYER_TYPE = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
"""Layer types that see less than everything -> the setting that says how many keys."""


def _has_key_ranges(config: transformers.PreTrainedConfig, bounds: Tensor) -> bool:
    """Whether some layers do not see all of so long a row."""
    layer_types = set(getattr(config, "layer_types", None) or KEY_RANGE_OF_LAYER_TYPE)
    limits = [getattr(config, limit, None) for name, limit in KEY_RANGE_OF_LAYER_TYPE.items() if name in layer_types]
    return any(limit is not None and limit < bounds.shape[-1] for limit in limits)


def _layers_see_different_keys(config: transformers.PreTrainedConfig, bounds: Tensor) -> bool:
    """Whether one tensor of final bounds, for full and windowed layers alike, would silently widen the windows."""
    return len(set(getattr(config, "layer_types", None) or ())) > 1 and _has_key_ranges(config, bounds)


def _refuse_bounds_shared_by_layer_types(config: transformers.PreTrainedConfig, bounds: Tensor) -> None:
    if _layers_see_different_keys(config, bounds):
        raise ValueError(
            "`attention_mask` is one tensor of bounds, but this model has layers that see different keys: pass a dict "
            f"with bounds for each of its layer types, {sorted(set(config.layer_types))}, or, for prefix trees (bounds "
            "[B, 1, 1, S_k]) outside of torch.compile, `position_ids` [B or 1, S] that count along the branches"
        )


def _reason_against(model: PreTrainedModel) -> str | None:
    """Why a model cannot use the attention interface with bounds, known before it is built."""
    settings = getattr(model.config, "position_embeddings_type", None), model.main_input_name
    if settings in _BIASED_POSITIONS:
        return _ADDS_A_BIAS
    return _reason_against_config(model.config) or _reason_against_class(type(model))  # type: ignore[arg-type]


@functools.cache
def _reason_against_class(model_class: type) -> str | None:
    """Read off the source of the modeling file, and what its models declare."""
    for base in model_class.__mro__:
        if base is PreTrainedModel or not issubclass(base, PreTrainedModel):
            continue
        try:
            source = inspect.getsource(sys.modules[base.__module__])
        except (KeyError, OSError, TypeError):  # a class from a notebook: its bases are still looked at
            continue
        if re.search(r"ATTENTION_CLASSES\[\s*(config\.)?_?attn_implementation\s*\]", source):
            return "it picks its attention layer from a fixed list of implementations"
        if re.search(r"^class \w*Attention\w*\(nn\.Module\):", source, re.MULTILINE):
            if "ALL_ATTENTION_FUNCTIONS" not in source:
                return "it computes attention itself, not through the attention interface"
            if not _supports_more_than_eager(_family_of(base)):
                # Such models may compute with masks of their own (BigBird-Pegasus, Splinter), and refuse sdpa as well.
                return "Transformers supports only eager attention for it"
            return None
    return None


_SELECTING_LAYERS = {
    "indexed_attention",
    "compressed_sparse_attention",
    "heavily_compressed_attention",
    "minimax_m3_sparse",
}
_ADDS_A_BIAS = "it adds a bias to its attention scores"
_SETTINGS_OF_A_BIAS = ("relative_attention_num_buckets", "rel_extent")
_SWITCHES_OF_A_BIAS = ("use_relative_position_bias", "use_shared_relative_position_bias")
_BIASED_POSITIONS = {
    (embeddings, sound) for embeddings in ("relative", "relative_key") for sound in ("input_values", "input_features")
}
"""Position embeddings of Conformers, and what they read: the text part of SeamlessM4T has the same configuration."""
_PARTS_THAT_KEEP_EAGER = {"phi4_multimodal_audio", "phi4_multimodal_vision"}
"""A bias, and layers that call themselves causal and are not: the language model does not depend on either."""
_MODELS_WITH_DENSE_MASKS = {
    "nemotron_asr_streaming_encoder": _ADDS_A_BIAS,
    "parakeet_encoder": _ADDS_A_BIAS,
    "swin": _ADDS_A_BIAS,
    "doge": "its layers compute with a dense mask",
    "t5gemma2_decoder": "it joins the masks of two sequences as if they were dense",
}


def _reason_against_config(config: Any) -> str | None:
    selecting = _SELECTING_LAYERS.intersection(getattr(config, "layer_types", None) or ())
    if selecting:
        return f"each query of its layers of type {min(selecting)!r} attends only to keys that it selects"
    if any(hasattr(config, name) for name in _SETTINGS_OF_A_BIAS):
        return _ADDS_A_BIAS
    if any(getattr(config, name, False) for name in _SWITCHES_OF_A_BIAS):
        return _ADDS_A_BIAS
    if config.model_type == "siglip2_vision_model" and config.vision_use_head:
        return "the head that pools its patches computes with a dense mask (set vision_use_head = False to do without)"
    return _MODELS_WITH_DENSE_MASKS.get(config.model_type)


def _supports_more_than_eager(model_class: type) -> bool:
    flags = ("_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn", "_supports_attention_backend")
    return any(getattr(model_class, flag, False) for flag in flags)


def _family_of(model_class: type) -> type:
    """The class next to `PreTrainedModel` among the bases: that of all models in a modeling file."""
    return next(base for base in model_class.__mro__ if PreTrainedModel in base.__bases__)


# Registration


def register() -> None:
    """Make `attn_implementation="flashmask"` known to Transformers. Importing hf_flashmask does it; again is harmless.

    Besides the two public registries, three private functions are wrapped, because Transformers takes every name that
    contains "flash" for FlashAttention. The wrappers pass everything on unless the name is exactly "flashmask".

    Raises:
        ImportError: when this Transformers does not have what is wrapped; the message names its version.
    """
    AttentionInterface.register(NAME, flashmask_attention_forward)
    AttentionMaskInterface.register(NAME, flashmask_mask)
    for owner, name, wrap in _WRAPPERS:
        original = getattr(owner, name, None)
        if not callable(original):
            raise ImportError(
                f"hf_flashmask needs transformers >= 5.4; version {transformers.__version__} has no "
                f"`{owner.__name__}.{name}`. Please report it with this version number."
            )
        if not hasattr(original, _OURS):
            wrapper = functools.wraps(original)(wrap(original))
            setattr(wrapper, _OURS, True)
            setattr(owner, name, wrapper)


def _wrap_check(original: Callable) -> Callable:
    """FlashAttention's checks would import a package called flashmask, or swap the name for another implementation."""

    def check_and_adjust(self: PreTrainedModel, attn_implementation: Any, *args: Any, **kwargs: Any) -> str:
        if attn_implementation == NAME:
            return self.get_correct_attn_implementation(NAME)
        return original(self, attn_implementation, *args, **kwargs)

    return check_and_adjust


def _wrap_dispatch(original: Callable) -> Callable:
    """Transformers asks no model whether it supports a custom implementation."""

    def get_correct(self: PreTrainedModel, requested_attention: Any, *args: Any, **kwargs: Any) -> str:
        if requested_attention != NAME:
            return original(self, requested_attention, *args, **kwargs)
        reason = _reason_against(self)
        if reason is not None:
            others = '"sdpa" or "eager"' if self._supports_sdpa else '"eager"'
            raise ValueError(
                f'{type(self).__name__} does not work with attn_implementation="flashmask": {reason}. Use {others} for '
                "it; in a composite model the other parts can still use flashmask, as in "
                'attn_implementation={"": "eager", "text_config": "flashmask"}.'
            )
        supports_less = _supports_more_than_eager(_family_of(type(self))) and not _supports_more_than_eager(type(self))
        if supports_less or self.config.model_type in _PARTS_THAT_KEEP_EAGER:
            # The audio encoder of Gemma 4, for example.
            logger.warning_once(f"{type(self).__name__} supports only eager attention, and keeps it.")
            return "eager"
        return original(self, requested_attention, *args, **kwargs)

    return get_correct


def _wrap_is_flash(original: Callable) -> Callable:
    """`masking_utils` refuses chunked masks (Llama 4) for FlashAttention; bounds hold them."""

    def is_flash_attention_requested(config: Any = None, *args: Any, **kwargs: Any) -> bool:
        if config is not None and config._attn_implementation == NAME:
            return False
        return original(config, *args, **kwargs)

    return is_flash_attention_requested


def _wrap_preprocess(original: Callable) -> Callable:
    """Here, and nowhere else, one sees that the user gave one mask for all layers, and `position_ids` beside a cache.

    Transformers looks for packed documents only without a cache and without a 2-D mask, even of ones. Here they are
    always found, and take the place of the 2-D mask on the way to `flashmask_mask`.
    """

    def preprocess_mask_arguments(
        config: Any,
        inputs_embeds: Tensor,
        attention_mask: Any,
        past_key_values: Any,
        position_ids: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple:
        if config._attn_implementation != NAME:
            return original(config, inputs_embeds, attention_mask, past_key_values, position_ids, *args, **kwargs)
        if isinstance(attention_mask, dict):  # models with several types of layers take theirs before this
            raise TypeError(
                f"`attention_mask` is a dict of masks for {', '.join(map(repr, attention_mask))}, but all layers of "
                f"{config.model_type} see the same keys: pass the tensor itself"
            )
        attention_mask = _unwrap_tree_for_compiler(config, attention_mask)
        tree = _tree_of_user(config, attention_mask, position_ids)
        if tree is not None:
            _, _, _, *sizes = original(config, inputs_embeds, None, past_key_values, None, *args, **kwargs)
            return False, _send_tree(tree), None, *sizes
        arguments = original(config, inputs_embeds, attention_mask, past_key_values, None, *args, **kwargs)
        early_exit, mask, _, *sizes = arguments
        if early_exit and mask is not None and not _is_marked(mask):
            _refuse_bounds_shared_by_layer_types(config, mask)
            if not is_tracing(mask):
                _masks_of_users[mask] = True
        if early_exit and mask is not None and torch.compiler.is_compiling():
            mask = share_in_graph(mask.view(mask.shape))
        if not early_exit and mask is not None and _is_square(*sizes):
            _check_padding_mask(mask, *inputs_embeds.shape[:2])
        if not early_exit and _is_square(*sizes) and _are_of_tokens(position_ids, *inputs_embeds.shape[:2]):
            documents = _find_documents(position_ids, attention_mask, _mask_of_keys(mask, *sizes[1::2]))
            mask = documents.expand(inputs_embeds.shape[0], -1)
        return early_exit, mask, None, *sizes

    return preprocess_mask_arguments


_OURS = "_knows_flashmask"
_WRAPPERS = (
    (PreTrainedModel, "_check_and_adjust_attn_implementation", _wrap_check),
    (PreTrainedModel, "get_correct_attn_implementation", _wrap_dispatch),
    (masking_utils, "is_flash_attention_requested", _wrap_is_flash),
    (masking_utils, "_preprocess_mask_arguments", _wrap_preprocess),
)
