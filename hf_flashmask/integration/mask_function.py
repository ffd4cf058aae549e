"""The mask function, and what it is told beside the arguments that Transformers hands to mask functions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, masking_utils

from .. import bounds as _bounds
from ..bounds.trees import depth_in_prefix_trees
from .call_checks import computes_with_mask
from .closures import closure_holds_whole_rows, is_plain_leaf
from .conversion import from_mask_function, from_mask_function_in_tree
from .documents import (
    after_cache,
    document_ids_of_call,
    ids_beside_cache,
    positions_tell_documents,
    starts_of_later_documents,
)
from .engines import note_made
from .final_bounds import (
    refuse_bounds_of_encoder,
    refuse_bounds_shared_by_layer_types,
    refuse_mask_of_flex_attention,
    warn_of_meeting_documents,
)
from .layer_types import layer_types_have_key_ranges
from .mask import Hints, Mask, Place, Tree
from .memo import recent
from .reading import may_be_read
from .refused_documents import refuse_fractions_as_ids, refuse_ids_as_factors
from .whole_sequence import WholeSequence

__all__ = ["flashmask_mask", "prepare"]

T = TypeVar("T")


def prepare(
    find_sizes: Callable[[Tensor, Tensor | None], tuple],
    creator: object,
    config: PreTrainedConfig,
    inputs_embeds: Tensor,
    attention_mask: Any,
    position_ids: Tensor | None,
    *,
    has_static_cache: bool,
    is_cross_attention: bool,
) -> tuple:
    """What Transformers' `_preprocess_mask_arguments` returns, with `Hints` in the place of the 2-D mask.

    Here, and nowhere else, one sees that the user gave one mask for all layers, its values, and `position_ids` beside a
    cache. Transformers looks for packed documents only without a cache and without a 2-D mask, even of ones. Here they
    are always found.

    Args:
        find_sizes: Transformers' function, of `inputs_embeds` and the mask alone.
        creator: what tells the functions that make masks apart: one that comes again makes those of another pass.
    """
    if isinstance(attention_mask, dict):  # models with several types of layers take theirs before this
        raise TypeError(
            f"`attention_mask` is a dict of masks for {', '.join(map(repr, attention_mask))}, but all layers of "
            f"{config.model_type} see the same keys: pass the tensor itself"
        )
    refuse_mask_of_flex_attention(attention_mask)
    if isinstance(attention_mask, WholeSequence):
        whole = attention_mask
        embeds = whole.stand_in(inputs_embeds)
        early_exit, made, _, *sizes = prepare(
            find_sizes,
            creator,
            config,
            embeds,
            whole.mask,
            whole.position_ids,
            has_static_cache=has_static_cache,
            is_cross_attention=is_cross_attention,
        )
        if not isinstance(made, (Mask, Hints)):
            made = Hints((embeds.shape[0], embeds.shape[1]), embeds.device, is_token=made)
        if isinstance(made, Hints):
            made.has_token_types = whole.has_token_types
        made.exchange = whole.exchange
        return early_exit, made, None, *sizes
    batch, length = inputs_embeds.shape[:2]
    if isinstance(attention_mask, Mask) or (isinstance(attention_mask, Tensor) and attention_mask.ndim == 4):
        early_exit, _, _, *sizes = find_sizes(inputs_embeds, None)
        if isinstance(attention_mask, Tensor):
            refuse_bounds_of_encoder(attention_mask, length, is_cross_attention=is_cross_attention)
        mask = _final_mask(creator, config, attention_mask, position_ids)
        if early_exit or mask.tree is None:
            return True, note_made(mask, config, length, position_ids, None), None, *sizes
        return False, Hints((batch, length), mask.device, tree=mask.tree), None, *sizes
    early_exit, is_token, _, *sizes = find_sizes(inputs_embeds, attention_mask)
    if early_exit:
        return early_exit, is_token, None, *sizes
    place = Place(*sizes)
    if is_token is not None and place.is_square:
        _check_padding_mask(is_token, batch, length, may_be_longer=has_static_cache)
    ids = document_ids_of_call(attention_mask, inputs_embeds.device)
    if ids is not None and computes_with_mask(config) and (length > 1 or is_cross_attention):
        refuse_ids_as_factors(ids, config.model_type)
    if is_cross_attention:
        ids = None
    if ids is not None and length > 1:
        refuse_fractions_as_ids(ids)
    positions = position_ids if positions_tell_documents(position_ids, batch, length) else None

    def once(what: str, build: Callable[[], T]) -> T:
        """What is the same for all types of layers. Another model makes it anew."""
        sources = tuple(source for source in (position_ids, attention_mask, inputs_embeds) if source is not None)
        return recent.get((what, id(config)), sources, creator, build, inputs_embeds.device)

    ends_of_ids = None
    if ids is not None and is_token is not None and not place.is_square:
        split = functools.partial(ids_beside_cache, ids, is_token, place, has_static_cache=has_static_cache)
        (is_token, ends_of_ids), ids = once("document ids", split), None
    if length == 1 or (positions is None and ids is None and ends_of_ids is None):
        return early_exit, is_token, None, *sizes
    shape = (batch, place.kv_len) if is_token is None else tuple(is_token.shape)
    known = functools.partial(Hints, shape, inputs_embeds.device, is_token=is_token, position_ids=positions)
    if not place.is_square:
        return early_exit, known(ends_of_ids=ends_of_ids), None, *sizes
    of_keys, ids = _padding_mask_of_keys(is_token, place), _padding_mask_of_keys(ids, place)
    known = functools.partial(known, document_ids=ids)
    if positions is None:
        assert ids is not None
        ends = once("ends of ids", lambda: _bounds.document_ends_of_mask(ids, of_keys))
        return early_exit, known(ends_of_ids=ends), None, *sizes
    ends = once("document ends", lambda: _bounds.document_ends(positions, of_keys, ids))
    return early_exit, known(document_ends=ends), None, *sizes


def _final_mask(creator: object, config: Any, mask: Mask | Tensor, position_ids: Tensor | None) -> Mask:
    """What the model was called with as a mask for all layers."""
    if isinstance(mask, Mask):
        if mask.tree is None:
            return mask.for_this_pass()
        tree: Tree | None = mask.tree
    else:
        tree = _tree_of_user(creator, config, mask, position_ids)
        if tree is None:
            refuse_bounds_shared_by_layer_types(config, mask)
            warn_of_meeting_documents(config, mask, position_ids)
            return Mask.of_user(mask)
    assert tree is not None
    if not torch.compiler.is_compiling():
        return Mask.of_user(tree.bounds, tree)
    if layer_types_have_key_ranges(config, tree.bounds):
        raise NotImplementedError(
            "windows and chunks inside prefix trees, bounds of one plane, do not work in torch.compile: run this model "
            "without it, or pass bounds that hold the windows, which have more than one plane"
        )
    return Mask.of_user(tree.bounds)


def _tree_of_user(creator: object, config: Any, mask: Tensor, position_ids: Tensor | None) -> Tree | None:
    """Bounds that layers may have to narrow along the branches of a prefix tree; other bounds are final."""
    if position_ids is None or not layer_types_have_key_ranges(config, mask):
        return None
    _, heads, num_planes, length = mask.shape
    may_be_tree = mask.dtype == torch.int32 and heads == num_planes == 1
    if not may_be_tree or position_ids.ndim != 2 or position_ids.shape[1] != length:
        return None
    if not may_be_read(mask):  # what cannot be read is taken for a tree, whose windows are refused there
        return Tree(mask, position_ids)
    # Read once for all types of layers.
    find = functools.partial(depth_in_prefix_trees, mask, position_ids)
    depth = recent.get("prefix trees", (mask, position_ids), creator, find, mask.device)
    return None if depth is None else Tree(mask.expand(len(depth), -1, -1, -1), depth)


def flashmask_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = masking_utils.causal_mask_function,
    attention_mask: Tensor | Hints | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Mask:
    """The mask that a Transformers mask function and a 2-D mask describe.

    The arguments are those of `transformers.masking_utils.sdpa_mask`. `attention_mask` `[B, S]` is bool, False for
    padding, whose keys are hidden and whose rows are not; or the `Hints` of `prepare`, which hold it.

    Returns:
        A `Mask`, whose bounds are `[B or 1, 1, C, kv_length]`, or None where nothing but the causal triangle hides a
        key.

    Raises:
        NotImplementedError: when `mask_function` is not understood; the message names it.
    """
    device = torch.device(device)
    if isinstance(attention_mask, Hints):
        hints = attention_mask
    else:
        hints = Hints((batch_size, kv_length), device, is_token=attention_mask)
    note = functools.partial(
        note_made,
        config=kwargs.get("config"),
        num_rows=q_length,
        position_ids=hints.position_ids,
        mask_function=mask_function,
        document_ids=hints.document_ids,
    )
    if hints.tree is not None:
        if hints.tree.max_branches is None and not may_be_read(hints.tree.bounds):
            raise NotImplementedError(
                "windows and chunks inside prefix trees depend on the number of branches, which a CUDA graph cannot "
                "read: pass bounds that hold the windows, which have more than one plane"
            )
        bounds = from_mask_function_in_tree(mask_function, hints.tree)
        return note(
            Mask(bounds, kv_len=kv_length, device=device, is_final=True, is_users=True, exchange=hints.exchange)
        )
    if isinstance(q_offset, Tensor):
        q_offset = q_offset.clone()  # a static cache counts its tokens in it, before the layers read it
    place = Place(q_length, kv_length, q_offset, kv_offset)
    if hints.exchange is not None:
        _check_whole_sequence(hints, mask_function, place, has_user_functions=use_vmap)
    is_token = _padding_mask_of_keys(hints.is_token, place)
    is_last_row = q_length == 1 and isinstance(q_offset, int) and q_offset + 1 == kv_offset + kv_length
    if (place.is_square or is_last_row) and hints.document_ends is None:
        # In a decoding step windows and chunks hide nothing until they are full.
        is_causal = mask_function is masking_utils.causal_mask_function or (
            is_last_row and kv_offset == 0 and kv_length <= (local_size or 0)
        )
        needs_no_bounds = (is_causal and allow_is_causal_skip) or (
            mask_function is masking_utils.bidirectional_mask_function and allow_is_bidirectional_skip
        )
        if needs_no_bounds and (is_token is None or (is_last_row and _has_no_padding(is_token))):
            mask = Mask(
                None,
                kv_len=kv_length,
                device=device,
                is_causal=place.is_square and is_causal,
                place=place,
                exchange=hints.exchange,
            )
            return note(mask)
    is_apart = hints.document_ends is not None
    of_cache = None if is_apart else hints.position_ids
    document_ends, ends_of_ids = hints.document_ends, hints.ends_of_ids
    has_later_documents = of_cache is not None or ends_of_ids is not None
    if place.is_square and is_plain_leaf(mask_function) and ends_of_ids is not None:  # fewer launches than to intersect
        document_ends, ends_of_ids = ends_of_ids, None
    bounds = from_mask_function(
        mask_function,
        document_ends=document_ends,
        starts_later_by=functools.partial(_starts_later_by, hints, place) if has_later_documents else None,
        is_token=is_token,
        batch_size=batch_size,
        q_len=q_length,
        kv_len=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        device=device,
        has_user_functions=use_vmap,
    )
    has_ranges = mask_function is not masking_utils.causal_mask_function and (local_size or 0) < kv_offset + kv_length
    if of_cache is not None:
        apart = after_cache(of_cache, is_token, place, has_ranges=has_ranges)
        bounds = _bounds.intersect(bounds, apart, q_len=q_length)
    if ends_of_ids is not None:
        apart = _bounds_by_ids(ends_of_ids, place, is_causal=bounds.shape[2] == 1)
        bounds = _bounds.intersect(bounds, apart, q_len=q_length)
    if is_token is not None:
        bounds = _hide_padding(bounds, is_token)
    mask = Mask(
        bounds,
        kv_len=kv_length,
        device=device,
        has_ranges=has_ranges,
        has_documents=is_apart or of_cache is not None,
        is_token=is_token,
        document_ids=hints.document_ids,
        document_ends=hints.document_ends if is_apart else hints.ends_of_ids,
        position_ids=of_cache,
        place=place,
        exchange=hints.exchange,
    )
    return note(mask)


def _bounds_by_ids(ends_of_ids: Tensor, place: Place, *, is_causal: bool) -> Tensor:
    if place.is_square:
        return _bounds.from_document_ends(ends_of_ids, is_causal=is_causal)
    return _bounds.from_document_ends(
        ends_of_ids,
        q_len=place.q_len,
        kv_len=place.kv_len,
        is_causal=is_causal,
        q_offset=place.q_offset,
        kv_offset=place.kv_offset,
    )


def _starts_later_by(hints: Hints, place: Place) -> Tensor:
    """How far behind the first token of its row each key's document starts, `[B or 1, S_k]`."""
    starts = torch.zeros(1, 1, dtype=torch.int64, device=hints.device)
    if hints.position_ids is not None:
        starts = starts_of_later_documents(hints.position_ids, _padding_mask_of_keys(hints.is_token, place), place)
    if hints.ends_of_ids is not None:
        of_ids = _padding_mask_of_keys(_bounds.document_starts(hints.ends_of_ids), place)
        assert of_ids is not None
        starts = torch.maximum(starts, of_ids)
    if hints.is_token is None:
        return starts
    return (starts - hints.is_token.byte().argmax(1, keepdim=True)).clamp(min=0)


def _check_whole_sequence(hints: Hints, mask_function: Callable, place: Place, *, has_user_functions: bool) -> None:
    exchange = hints.exchange
    assert exchange is not None
    if not place.is_square or place.q_len != exchange.length:
        raise NotImplementedError(
            f"sequence_parallel does not work with a cache: the mask is one of {place.q_len} queries and "
            f"{place.kv_len} keys, the whole sequence has {exchange.length} tokens. Train with `use_cache=False`, and "
            "generate after `parallel.remove()`"
        )
    # The length of blocks alone does not tell: Transformers pads blocks of fewer tokens.
    length = exchange.length if hints.has_token_types else None
    if not closure_holds_whole_rows(mask_function, length, has_user_functions=has_user_functions):
        raise NotImplementedError(
            "this model adds to its mask a function that looks tokens up (blocks that it finds among the tokens of a "
            "call, a function of the user), but a rank of sequence_parallel holds only a part of them: pass bounds of "
            "the whole sequence "
            "as `attention_mask` in the batch that is cut, such as hf_flashmask.bounds.causal_with_blocks makes, for "
            "models with several types of layers a dict of bounds"
        )


def _hide_padding(bounds: Tensor, is_token: Tensor) -> Tensor:
    if bounds.shape[2] == 1:
        return bounds * is_token[:, None, None]  # one launch less than to fill where there is none
    return _bounds.hide_keys(bounds, ~is_token)


def _has_no_padding(is_token: Tensor) -> bool:
    """Read on the host: in a decoding step that is less than a mask costs, and the step waits for its token anyway."""
    return may_be_read(is_token) and bool(is_token.all())


def _padding_mask_of_keys(is_token: Tensor | None, place: Place) -> Tensor | None:
    """The part of the 2-D mask that belongs to the keys, `[B, kv_len]`; slots not yet filled are padding."""
    if is_token is None:
        return None
    if is_token.ndim != 2:
        raise ValueError(
            f"`attention_mask` must be 2-D [B, S] or bounds [B or 1, H or 1, C, S_k], got {list(is_token.shape)}"
        )
    first, end = place.kv_offset, place.kv_offset + place.kv_len
    missing = end - is_token.shape[1]
    if missing > 0:
        is_token = nn.functional.pad(is_token, (0, missing))
    return is_token[:, first:end]


def _check_padding_mask(attention_mask: Tensor, batch: int, length: int, *, may_be_longer: bool) -> None:
    """Beside a static cache the mask may hold slots not yet filled, whose number one of a window does not tell."""
    # Not `rows in (1, batch)`: the compiler finds no number equal to a symbolic one there (torch 2.13).
    rows = attention_mask.shape[0]
    is_wrong = attention_mask.ndim != 2 or (rows != 1 and rows != batch)
    columns = attention_mask.shape[-1]
    if is_wrong or (columns < length if may_be_longer else columns != length):
        raise ValueError(
            f"`attention_mask` has shape {list(attention_mask.shape)}; expected [{batch}, {length}], 0 for padding, "
            "or bounds [B or 1, H or 1, C, S_k]"
        )
