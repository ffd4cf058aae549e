"""A Transformers mask function -> bounds, exactly, or an error that names the mask.

Transformers describes a mask as a function of `(batch_idx, head_idx, q_idx, kv_idx)` that its factories in
`transformers.masking_utils` compose: causal, sliding windows, chunks, blocks, packed documents, joined by AND and OR.
The composition is read off those closures and rebuilt with `hf_flashmask.bounds`: AND intersects, OR unites. Because
another version of Transformers may count differently, what is read off is compared once with the function itself.
A composition that contains an unknown function, from a model or a user, is evaluated in tiles of columns, in the same
way as Transformers evaluates it, and the intervals are read off the tiles. In prefix trees, windows and chunks are
counted along the branches.

Inside `torch.compile` closures cannot be read. There the function itself is used to search for the rows that see a key.
This is exact because every mask that Transformers composes on its own shows a key to one interval of rows around the
position of the key. Overlays are converted outside of the compiled graph.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import masking_utils

from .. import bounds
from .closures import (
    WHY_NOT_IN_A_GRAPH,
    UnknownFunctionError,
    closure_of,
    convert_closure,
    factory_of,
    has_overlays,
    is_plain_leaf,
    leaves_of_and,
    name_of,
)
from .evaluation import EvaluatedCall, evaluate, search_visible_rows
from .mask import Tree
from .name import logger
from .reading import may_be_read

__all__ = ["from_dense_mask", "from_mask_function", "from_mask_function_in_tree"]


def from_mask_function(
    mask_function: Callable,
    *,
    document_ends: Tensor | None = None,
    starts_later_by: Callable[[], Tensor] | None = None,
    is_token: Tensor | None = None,
    batch_size: int,
    q_len: int,
    kv_len: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    device: torch.device | str = "cpu",
    has_user_functions: bool = True,
) -> Tensor:
    """Bounds `[B or 1, 1, C, S_k]` that show exactly what `mask_function` shows, to each document by itself.

    Masks composed of Transformers' own functions take O(S_k) time. Only blocks and unknown functions read a value back
    to the host. Unknown functions take O(S_q x S_k) time and O(S_q) memory.

    Args:
        mask_function: any function of `(batch_idx, head_idx, q_idx, kv_idx)`. As in Transformers, the head is always 0.
        document_ends: int32 `[B, S]`, the packed documents, where queries and keys are the same tokens: past-the-last
            row of each token's own (`bounds.document_ends`). Functions are given the positions in a document, as if it
            were alone; what they look up in a tensor that is as long as the row, `ids[batch_idx, q_idx]`, is looked up
            at the row of the token.
        starts_later_by: where `document_ends` are not given, how far behind the first token of its row each key's
            document starts, `[B or 1, S_k]`: chunks are counted from there.
        is_token: bool `[B, S_k]`, False for padding, which functions are not asked about beside documents. The bounds
            need not hide it.
        batch_size: B, the range of the function's first argument.
        q_len, kv_len: S_q and S_k.
        q_offset, kv_offset: the indices of the first query and the first key. `q_offset` may be a 0-d tensor.
        device: where the bounds are made.
        has_user_functions: whether the composition may contain functions from outside of Transformers (its
            `use_vmap`). Without them, all functions broadcast, and document ids increase; with them, the order of the
            ids is checked on the host.

    Raises:
        NotImplementedError: when a key needs more hidden intervals than bounds hold; the message names the function and
            the key.
    """
    call = EvaluatedCall(
        batch_size,
        q_len,
        kv_len,
        q_offset,
        kv_offset,
        device,
        has_user_functions,
        document_ends,
        starts_later_by,
        is_token,
    )
    if not torch.compiler.is_dynamo_compiling() or is_plain_leaf(mask_function):
        return _convert_or_evaluate(mask_function, call)
    if has_overlays(mask_function, has_user_functions):
        return _convert_outside_of_the_graph(mask_function, call)
    return search_visible_rows(mask_function, call)


_AS_GOOD_AS_HIDDEN = -1e4
"""Users and models that do not add -inf to the scores to hide a key add this or less, in any dtype."""


def from_dense_mask(mask: Tensor, q_len: int) -> Tensor:
    """Bounds of a dense mask from a user or a model. Reads it on the host, and warns once that this is wasteful.

    Args:
        mask: `[B or 1, H or 1, S_q or 1, S_k]`, bool with True = visible, or what is added to the scores: 0, or -1e4
            and less for hidden.
        q_len: S_q.

    Raises:
        NotImplementedError: when the mask is a bias, needs too many intervals, or is inside of `torch.compile`.
        ValueError: when its shape is not the one above.
    """
    if mask.ndim != 4 or (mask.shape[2] != 1 and mask.shape[2] != q_len):
        raise ValueError(
            f"`attention_mask` is a dense mask of shape {list(mask.shape)}; expected [B or 1, H or 1, {q_len} (the "
            "number of queries) or 1, S_k]"
        )
    if not may_be_read(mask):
        raise NotImplementedError(
            "`attention_mask` is a dense mask, which cannot be read inside of torch.compile or a CUDA graph: convert "
            "it before with hf_flashmask.bounds.from_dense"
        )
    logger.warning_once(
        'attn_implementation="flashmask" converts a dense 4-D `attention_mask` to bounds in O(S_q x S_k) time and '
        "memory. Pass bounds instead (see hf_flashmask.bounds), or no more than the 2-D mask and `position_ids`."
    )
    visible = mask if mask.dtype == torch.bool else mask == 0
    if mask.dtype != torch.bool and (mask.requires_grad or not bool((visible | (mask <= _AS_GOOD_AS_HIDDEN)).all())):
        raise NotImplementedError(
            'attn_implementation="flashmask" cannot add a bias to the scores: the float `attention_mask` may hold only '
            "0 for visible keys and -inf, or -1e4 and less, for hidden ones. Use "
            'attn_implementation="sdpa" for this model or this mask. Bounds [B or 1, H or 1, C, S_k] are int32: call '
            ".to(torch.int32) on them"
        )
    if mask.shape[2] == 1:
        return _bounds_of_one_row(visible, q_len)
    try:
        return bounds.from_dense(visible)
    except bounds.TooManyIntervalsError as error:
        raise NotImplementedError(f"`attention_mask` cannot be expressed as bounds: {error}.") from error


def _bounds_of_one_row(visible: Tensor, q_len: int) -> Tensor:
    """Bounds from one row of a mask, `[B or 1, H or 1, 1, S_k]`."""
    return torch.cat([visible * q_len, torch.zeros_like(visible)], dim=2).to(torch.int32)


def from_mask_function_in_tree(mask_function: Callable, tree: Tree) -> Tensor:
    """Bounds of a prefix tree: a token sees what `mask_function` shows it in the sequence from the root to the token.

    Raises:
        NotImplementedError: when the function is not causal, or contains something besides windows and chunks; the
            message names it.
        ValueError: when a window cuts a tree with more branches than bounds have intervals for.
    """
    leaves = [leaf.function for leaf in leaves_of_and(mask_function, None)]
    if masking_utils.causal_mask_function not in leaves:
        raise NotImplementedError(_not_understood(mask_function, "in a prefix tree attention must be causal"))
    end_depth = None
    for leaf in leaves:
        factory, arguments = factory_of(leaf), closure_of(leaf)
        if is_plain_leaf(leaf):
            continue
        if factory == "sliding_window_overlay":
            size, end = arguments["sliding_window"], tree.depth + arguments["sliding_window"]
        elif factory == "chunked_overlay":
            size = arguments["chunk_size"]
            end = (tree.depth // size + 1) * size
        else:
            raise NotImplementedError(_not_understood(leaf, "prefix trees hold windows and chunks only"))
        if tree.end_depth is None or size < tree.end_depth:
            end_depth = end if end_depth is None else torch.minimum(end_depth, end)
    if end_depth is None:
        return tree.bounds
    return bounds.limit_depth(tree.bounds, tree.depth, end_depth, max_branches=tree.max_branches)


def _not_understood(mask_function: Callable, reason: str) -> str:
    return (
        f'attn_implementation="flashmask" cannot express the mask function {name_of(mask_function)}: {reason}. Pass '
        'the mask as bounds in `attention_mask` (see hf_flashmask.bounds), or use attn_implementation="sdpa".'
    )


def _convert_or_evaluate(mask_function: Callable, call: EvaluatedCall) -> Tensor:
    """By structure if that is known, otherwise by evaluation, which may need fewer intervals."""
    ends = call.document_ends
    try:
        if ends is not None and is_plain_leaf(mask_function):
            is_causal = mask_function is masking_utils.causal_mask_function
            return bounds.from_document_ends(ends, is_causal=is_causal)
        visible = convert_closure(mask_function, call, None, is_causal=False)
        if ends is None:
            return visible
        return bounds.intersect(visible, bounds.from_document_ends(ends, is_causal=visible.shape[2] == 1))
    except UnknownFunctionError as unknown:
        named = unknown.function
    except bounds.TooManyIntervalsError:
        named = mask_function
    tiles = evaluate(mask_function, call)
    if call.q_len == 1:
        # A single row is hidden or not. A step with a cache reads nothing from the device.
        return _bounds_of_one_row(torch.cat(list(tiles), dim=3), 1)
    try:
        return bounds.from_tiles(tiles)
    except bounds.TooManyIntervalsError as error:
        raise NotImplementedError(
            f'attn_implementation="flashmask" cannot express a mask with the function {name_of(named)}: {error}.'
        ) from error


_convert_outside_of_the_graph = torch.compiler.disable(_convert_or_evaluate, reason=WHY_NOT_IN_A_GRAPH)
