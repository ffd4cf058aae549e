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
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import masking_utils

from .. import bounds
from .closures import (
    UnknownFunctionError,
    closure_of,
    convert,
    factory_of,
    is_plain,
    leaves_of_and,
    name_of,
    not_understood,
)
from .evaluation import Call, evaluate, search
from .name import logger
from .reading import may_be_read

__all__ = ["Tree", "from_dense_mask", "from_mask_function", "in_tree", "knows_whole_rows", "range_of"]


class Tree(NamedTuple):
    """The prefix trees that the rows of a batch hold.

    Attributes:
        bounds: `[B, 1, 1, S]`, causal and LTS = end of the subtree.
        depth: `[B, S]`, the number of tokens before each one on its path from the root.
        end_depth: what no depth reaches, if known.
        max_branches: the largest number of leaves in one tree, if known.
    """

    bounds: Tensor
    depth: Tensor
    end_depth: int | None = None
    max_branches: int | None = None


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
    call = Call(
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
    if not torch.compiler.is_dynamo_compiling() or is_plain(mask_function):
        return _read(mask_function, call)
    if _has_overlays(mask_function, has_user_functions):
        return _read_outside_of_the_graph(mask_function, call)
    return search(mask_function, call)


def _has_overlays(mask_function: Callable, has_user_functions: bool) -> bool:
    """Whether more than windows and chunks may be in a mask function, as far as a graph can tell."""
    return has_user_functions or getattr(mask_function, "__name__", "") == "or_mask"


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
        return _same_for_every_row(visible, q_len)
    try:
        return bounds.from_dense(visible)
    except bounds.TooManyIntervalsError as error:
        raise NotImplementedError(f"`attention_mask` cannot be expressed as bounds: {error}.") from error


def _same_for_every_row(visible: Tensor, q_len: int) -> Tensor:
    """Bounds from one row of a mask, `[B or 1, H or 1, 1, S_k]`."""
    return torch.cat([visible * q_len, torch.zeros_like(visible)], dim=2).to(torch.int32)


def in_tree(mask_function: Callable, tree: Tree) -> Tensor:
    """Bounds of a prefix tree: a token sees what `mask_function` shows it in the sequence from the root to the token.

    Raises:
        NotImplementedError: when the function is not causal, or contains something besides windows and chunks; the
            message names it.
        ValueError: when a window cuts a tree with more branches than bounds have intervals for.
    """
    leaves = [leaf.function for leaf in leaves_of_and(mask_function, None)]
    if masking_utils.causal_mask_function not in leaves:
        raise NotImplementedError(not_understood(mask_function, "in a prefix tree attention must be causal"))
    end_depth = None
    for leaf in leaves:
        factory, arguments = factory_of(leaf), closure_of(leaf)
        if is_plain(leaf):
            continue
        if factory == "sliding_window_overlay":
            size, end = arguments["sliding_window"], tree.depth + arguments["sliding_window"]
        elif factory == "chunked_overlay":
            size = arguments["chunk_size"]
            end = (tree.depth // size + 1) * size
        else:
            raise NotImplementedError(not_understood(leaf, "prefix trees hold windows and chunks only"))
        if tree.end_depth is None or size < tree.end_depth:
            end_depth = end if end_depth is None else torch.minimum(end_depth, end)
    if end_depth is None:
        return tree.bounds
    return bounds.limit_depth(tree.bounds, tree.depth, end_depth, max_branches=tree.max_branches)


def knows_whole_rows(mask_function: Callable, length: int | None, *, has_user_functions: bool = True) -> bool:
    """Whether a mask function finds all that it looks up by the index of a token, in rows of this length.

    It may hold numbers, and with a length tensors `[B, length]`. Functions from outside of Transformers may look up
    what they do not hold, in their module or in an object.
    """
    if not torch.compiler.is_dynamo_compiling():
        return _knows_whole_rows(mask_function, length)
    is_of_positions = is_plain(mask_function) or not _has_overlays(mask_function, has_user_functions)
    return is_of_positions or _looks_up_outside_of_the_graph(mask_function, length)


def _knows_whole_rows(mask_function: Callable, length: int | None) -> bool:
    if is_plain(mask_function) or factory_of(mask_function) in _OF_POSITIONS:
        return True
    if not isinstance(mask_function, FunctionType) or not mask_function.__module__.startswith("transformers."):
        return False
    return all(_is_of_rows(value, length) for value in closure_of(mask_function).values())


_OF_POSITIONS = {"sliding_window_overlay", "sliding_window_bidirectional_overlay", "chunked_overlay"}


def _is_of_rows(value: Any, length: int | None) -> bool:
    if isinstance(value, Tensor):
        return value.ndim == 2 and value.shape[1] == length
    if isinstance(value, (tuple, list)):
        return all(_is_of_rows(part, length) for part in value)
    return isinstance(value, (int, float)) or (callable(value) and _knows_whole_rows(value, length))


def range_of(mask_function: Callable) -> tuple[bool, int | None] | None:
    """Whether a mask function is causal, and its sliding window, None without one. None for any other function.

    Packed documents may be in it as well.
    """
    is_causal, window = False, None
    for leaf in leaves_of_and(mask_function, None):
        factory = factory_of(leaf.function)
        if factory in ("sliding_window_overlay", "sliding_window_bidirectional_overlay"):
            # Layers are told of the window on either side as a window with the token itself.
            size = int(closure_of(leaf.function)["sliding_window"]) + (factory != "sliding_window_overlay")
            window = size if window is None else min(size, window)
        elif factory != "packed_sequence_mask_function" and not is_plain(leaf.function):
            return None
        is_causal = is_causal or leaf.function is masking_utils.causal_mask_function
    return is_causal, window


def _read(mask_function: Callable, call: Call) -> Tensor:
    """By structure if that is known, otherwise by evaluation, which may need fewer intervals."""
    ends = call.document_ends
    try:
        if ends is not None and is_plain(mask_function):
            is_causal = mask_function is masking_utils.causal_mask_function
            return bounds.from_document_ends(ends, is_causal=is_causal)
        visible = convert(mask_function, call, None, is_causal=False)
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
        return _same_for_every_row(torch.cat(list(tiles), dim=3), 1)
    try:
        return bounds.from_tiles(tiles)
    except bounds.TooManyIntervalsError as error:
        raise NotImplementedError(
            f'attn_implementation="flashmask" cannot express a mask with the function {name_of(named)}: {error}.'
        ) from error


_WHY_NOT_IN_THE_GRAPH = (
    'attn_implementation="flashmask" cannot read masks with overlays (image blocks, functions of the model or of the '
    "user) inside the graph: compile without fullgraph=True, or make the mask outside of what is compiled"
)
_read_outside_of_the_graph = torch.compiler.disable(_read, reason=_WHY_NOT_IN_THE_GRAPH)
_looks_up_outside_of_the_graph = torch.compiler.disable(_knows_whole_rows, reason=_WHY_NOT_IN_THE_GRAPH)
