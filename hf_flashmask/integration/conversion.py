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

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CodeType
from typing import Any, NamedTuple, cast

import torch
import transformers
from torch import Tensor
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from torch.overrides import TorchFunctionMode
from transformers import masking_utils
from transformers.utils import logging
from transformers.utils.import_utils import is_tracing

from .. import bounds

__all__ = ["Tree", "from_dense_mask", "from_mask_function", "in_tree", "range_of"]

logger = logging.get_logger(__name__)


@dataclass(frozen=True)  # torch 2.9 cannot compile the properties of a named tuple
class _Call:
    """The arguments that describe the rows and keys of one attention call to a mask function."""

    batch: int
    q_len: int
    kv_len: int
    q_offset: int | Tensor
    kv_offset: int
    device: torch.device | str
    has_user_functions: bool
    document_ends: Tensor | None = None
    counted_from: Tensor | None = None
    is_token: Tensor | None = None

    @property
    def place(self) -> dict[str, Any]:
        """The arguments that all constructors of `hf_flashmask.bounds` take."""
        return {"q_len": self.q_len, "kv_len": self.kv_len, "q_offset": self.q_offset, "kv_offset": self.kv_offset}


class _Documents(NamedTuple):
    """Packed documents, `[B, S]` each: where the document of every token starts and ends, and its position there."""

    starts: Tensor
    ends: Tensor
    position_ids: Tensor
    is_padding: Tensor

    @classmethod
    def of(cls, document_ends: Tensor, is_token: Tensor | None) -> _Documents:
        starts = bounds.document_starts(document_ends)
        index = torch.arange(starts.shape[1], device=starts.device)
        is_padding = torch.zeros_like(starts, dtype=torch.bool) if is_token is None else ~is_token
        return cls(starts, document_ends, index - starts, is_padding)


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


class _UnknownFunctionError(Exception):
    """Raised for a part of a mask function that has to be evaluated."""

    def __init__(self, function: Callable) -> None:
        super().__init__(function)
        self.function = function


class _Leaf(NamedTuple):
    """A mask function other than AND, and the positions it counts with if Transformers found packed documents."""

    function: Callable
    position_ids: Tensor | None


def from_mask_function(
    mask_function: Callable,
    *,
    document_ends: Tensor | None = None,
    counted_from: Tensor | None = None,
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
        counted_from: `[B or 1, S_k]`, the index at which each key's document starts. Default: that of `document_ends`.
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
    call = _Call(
        batch_size,
        q_len,
        kv_len,
        q_offset,
        kv_offset,
        device,
        has_user_functions,
        document_ends,
        counted_from,
        is_token,
    )
    if not torch.compiler.is_dynamo_compiling() or _is_plain(mask_function):
        return _read(mask_function, call)
    if has_user_functions or getattr(mask_function, "__name__", "") == "or_mask":
        return _read_outside_of_the_graph(mask_function, call)
    return _search(mask_function, call)


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
    if is_tracing(mask):
        raise NotImplementedError(
            "`attention_mask` is a dense mask, which cannot be read inside of torch.compile: convert it before with "
            "hf_flashmask.bounds.from_dense"
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
            'attn_implementation="sdpa" for this model or this mask.'
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
    leaves = [leaf.function for leaf in _leaves_of_and(mask_function, None)]
    if masking_utils.causal_mask_function not in leaves:
        raise NotImplementedError(_not_understood(mask_function, "in a prefix tree attention must be causal"))
    end_depth = None
    for leaf in leaves:
        factory, arguments = _factory(leaf), _closure(leaf)
        if _is_plain(leaf):
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


def range_of(mask_function: Callable) -> tuple[bool, int | None] | None:
    """Whether a mask function is causal, and its sliding window, None without one. None for any other function.

    Packed documents may be in it as well.
    """
    is_causal, window = False, None
    for leaf in _leaves_of_and(mask_function, None):
        factory = _factory(leaf.function)
        if factory in ("sliding_window_overlay", "sliding_window_bidirectional_overlay"):
            # Layers are told of the window on either side as a window with the token itself.
            size = int(_closure(leaf.function)["sliding_window"]) + (factory != "sliding_window_overlay")
            window = size if window is None else min(size, window)
        elif factory != "packed_sequence_mask_function" and not _is_plain(leaf.function):
            return None
        is_causal = is_causal or leaf.function is masking_utils.causal_mask_function
    return is_causal, window


def _read(mask_function: Callable, call: _Call) -> Tensor:
    """By structure if that is known, otherwise by evaluation, which may need fewer intervals."""
    ends = call.document_ends
    try:
        if ends is not None and mask_function is masking_utils.causal_mask_function:
            return bounds.from_document_ends(ends)
        visible = _convert(mask_function, call, None, is_causal=False)
        if ends is None:
            return visible
        return bounds.intersect(visible, bounds.from_document_ends(ends, is_causal=visible.shape[2] == 1))
    except _UnknownFunctionError as unknown:
        named = unknown.function
    except bounds.TooManyIntervalsError:
        named = mask_function
    tiles = _evaluate(mask_function, call)
    if call.q_len == 1:
        # A single row is hidden or not. A step with a cache reads nothing from the device.
        return _same_for_every_row(torch.cat(list(tiles), dim=3), 1)
    try:
        return bounds.from_tiles(tiles)
    except bounds.TooManyIntervalsError as error:
        raise NotImplementedError(
            f'attn_implementation="flashmask" cannot express a mask with the function {_name(named)}: {error}.'
        ) from error


_read_outside_of_the_graph = torch.compiler.disable(
    _read,
    reason='attn_implementation="flashmask" cannot read masks with overlays (image blocks, functions of the model or '
    "of the user) inside the graph: compile without fullgraph=True, or make the mask outside of what is compiled",
)


def _convert(mask_function: Callable, call: _Call, position_ids: Tensor | None, is_causal: bool) -> Tensor:
    """Bounds of `mask_function`, intersected with the causal triangle if `is_causal`.

    Every constructor applies the triangle itself, because causal bounds need only one plane.
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

    In packed rows, positions start again with every document, and increase by one within it. Distances between
    positions are therefore distances between rows, and windows can be made of rows. Only chunks depend on the start.
    Blocks are looked up by row: Transformers looks them up by position, which finds the first document's for all.
    """
    factory = _factory(leaf.function)
    arguments = _closure(leaf.function)
    if factory == "or_masks":
        parts = [_convert(part, call, leaf.position_ids, is_causal) for part in arguments["mask_functions"]]
        return bounds.union(*parts, q_len=call.q_len)
    if factory == "sliding_window_overlay" and is_causal and arguments["sliding_window"] < 1:
        # Nothing is visible. Qwen2-MoE makes such a mask if it has no windows, but no layer uses it.
        return torch.zeros_like(bounds.causal(**call.place, device=call.device))
    if factory == "sliding_window_overlay" and arguments["sliding_window"] >= 1:
        window = bounds.sliding_window(arguments["sliding_window"], **call.place, device=call.device)
        if is_causal:
            return window
        lts = window[:, :, :1]
        return torch.cat([lts, torch.zeros_like(lts)], dim=2)
    if factory == "packed_sequence_mask_function":
        document_ids = arguments["packed_sequence_mask"]
        if call.has_user_functions and not _are_documents(document_ids, call):
            raise _UnknownFunctionError(leaf.function)
        return bounds.from_document_ids(document_ids, is_causal=is_causal, **call.place)
    if factory == "chunked_overlay":
        # In packed rows chunks start with the document. Left padding is not part of it.
        first = arguments["left_padding"]
        if leaf.position_ids is not None:
            first = torch.arange(call.kv_len, device=call.device) - leaf.position_ids
        elif call.document_ends is not None:
            first = bounds.document_starts(call.document_ends)
        elif call.counted_from is not None:
            first = call.counted_from
        chunk_size = arguments["chunk_size"]
        return bounds.chunked(chunk_size, left_padding=first, is_causal=is_causal, device=call.device, **call.place)
    if factory == "sliding_window_bidirectional_overlay" and arguments["sliding_window"] >= 0:
        part = bounds.sliding_window(arguments["sliding_window"], **call.place, is_causal=False, device=call.device)
    elif factory == "blockwise_overlay" and _are_runs(arguments["block_sequence_ids"], call):
        part = bounds.from_document_ids(arguments["block_sequence_ids"], is_causal=False, **call.place)
    else:
        raise _UnknownFunctionError(leaf.function)
    if is_causal:
        part = bounds.intersect(part, bounds.causal(**call.place, device=call.device), q_len=call.q_len)
    return part


def _factory(mask_function: Callable) -> str | None:
    """The function of `transformers.masking_utils` that made this closure, if its closures are read correctly."""
    if getattr(mask_function, "__module__", None) != masking_utils.__name__:
        return None
    factory, _, _ = mask_function.__qualname__.partition(".<locals>.")
    return factory if _is_read_correctly(factory, mask_function.__code__) else None


def _closure(mask_function: Callable) -> dict[str, Any]:
    code, cells = getattr(mask_function, "__code__", None), getattr(mask_function, "__closure__", None)
    return {} if code is None else {name: cell.cell_contents for name, cell in zip(code.co_freevars, cells or ())}


def _are_runs(ids: Tensor, call: _Call) -> bool:
    """Whether tokens with the same id in a document are adjacent. Reads one bool from the device.

    In a step with a cache, evaluating its single row is cheaper than this, so the answer is False.
    """
    if call.q_len == 1:
        return False
    if call.document_ends is not None:
        ids = torch.where(ids < 0, ids, call.document_ends.long() * (ids.amax() + 1) + ids)
    starts = torch.nn.functional.pad(ids[:, 1:] != ids[:, :-1], (1, 0), value=True) & (ids >= 0)
    ordered = ids.sort(dim=-1).values
    distinct = torch.nn.functional.pad(ordered[:, 1:] != ordered[:, :-1], (1, 0), value=True) & (ordered >= 0)
    return torch.equal(starts.sum(-1), distinct.sum(-1))


def _are_documents(ids: Tensor, call: _Call) -> bool:
    return _are_runs(ids, call) and not bool((ids < 0).any())


def _not_understood(mask_function: Callable, reason: str) -> str:
    return (
        f'attn_implementation="flashmask" cannot express the mask function {_name(mask_function)}: {reason}. Pass the '
        'mask as bounds in `attention_mask` (see hf_flashmask.bounds), or use attn_implementation="sdpa".'
    )


def _name(mask_function: Callable) -> str:
    name = getattr(mask_function, "__qualname__", repr(mask_function))
    return f"`{name}` of `{getattr(mask_function, '__module__', 'an unknown module')}`"


# What is read off a closure, compared with the function


def check_factories() -> None:
    """Compare all that Transformers has. What it gets or is given later is compared at its first use."""
    for factory in _examples():
        if hasattr(masking_utils, factory):
            _factory(_example(factory))


_is_correct: dict[CodeType, bool] = {}
"""Code of the functions that a factory makes -> whether they show what is read off them. Each is compared once."""


def _is_read_correctly(factory: str, code: CodeType) -> bool:
    known = _is_correct.get(code)
    if known is not None:
        return known
    if is_tracing(torch.empty(0)):  # nothing can be compared here
        return False
    if factory not in _examples():
        _is_correct[code] = False
        return False
    example = _example(factory)
    _is_correct[code] = True  # for the comparison, which reads it
    _is_correct[code] = example.__code__ is code and _shows_what_is_read(factory, example)
    if not _is_correct[code]:
        logger.warning_once(
            f"`transformers.masking_utils.{factory}` of transformers {transformers.__version__} makes other masks than "
            "in the versions that hf_flashmask was tested with. Masks with it are evaluated element by element: they "
            "are right, but take O(S_q x S_k) time. Please report it with this version number."
        )
    return _is_correct[code]


def _shows_what_is_read(factory: str, example: Callable) -> bool:
    """Compare a few rows and keys, on the CPU."""
    place: tuple[int, int, int, int] = (6, 7, 2, 1)
    if factory == "remap_positions_for_packed_sequence":  # it is read inside of a row of documents only
        example = masking_utils.and_masks(masking_utils.packed_sequence_mask_function(_example_ids()), example)
        place = (8, 8, 0, 0)
    call = _Call(2, *place, "cpu", has_user_functions=False)
    expected = torch.cat(list(_evaluate(example, call)), dim=3)
    causal = torch.cat(list(_evaluate(masking_utils.causal_mask_function, call)), dim=3)
    try:
        read = [_convert(example, call, None, is_causal) for is_causal in (False, True)]
    except (_UnknownFunctionError, LookupError, RuntimeError, TypeError, ValueError):
        return False  # the closure holds something else
    shown = [bounds.to_dense(part, call.q_len).expand_as(expected) for part in read]
    return torch.equal(shown[0], expected) and torch.equal(shown[1], expected & causal)


def _example(factory: str) -> Callable:
    return cast(Callable, getattr(masking_utils, factory)(*_examples()[factory]))


def _examples() -> dict[str, tuple]:
    """Factories whose closures are read -> arguments to call them with."""
    causal, everything = masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function
    ids = _example_ids()
    is_in_block = torch.tensor([[1, 1, 0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1, 0, 0]], device="cpu")
    return {
        "and_masks": (everything, causal, everything),
        "or_masks": (causal, everything, causal),
        "sliding_window_overlay": (3,),
        "sliding_window_bidirectional_overlay": (2,),
        "chunked_overlay": (3, torch.tensor([0, 2], device="cpu")),
        "blockwise_overlay": (ids * is_in_block + is_in_block - 1,),  # tokens of -1 are in no block
        "packed_sequence_mask_function": (ids,),
        "remap_positions_for_packed_sequence": (
            masking_utils.chunked_overlay(2, torch.zeros(2, dtype=torch.long, device="cpu")),
            torch.tensor([[0, 1, 0, 1, 2, 0, 1, 2], [0, 0, 1, 2, 3, 4, 0, 1]], device="cpu"),
        ),
    }


def _example_ids() -> Tensor:
    return torch.tensor([[0, 0, 1, 1, 1, 2, 2, 2], [0, 1, 1, 1, 1, 1, 2, 2]], device="cpu")


# Evaluation


_TILE = 2**22
"""Number of pairs of a row and a column that are evaluated at once."""


def _evaluate(mask_function: Callable, call: _Call) -> Iterator[Tensor]:
    """The mask in tiles of columns, `[B or 1, 1, S_q, columns]`, evaluated like Transformers' `sdpa_mask`."""
    if call.document_ends is not None:
        mask_function = _in_documents(mask_function, _Documents.of(call.document_ends, call.is_token), call.batch)
    rows = torch.arange(call.q_len, device=call.device) + call.q_offset
    keys = torch.arange(call.kv_len, device=call.device) + call.kv_offset
    batch, head = torch.arange(call.batch, device=call.device), torch.zeros(1, dtype=torch.long, device=call.device)
    if call.has_user_functions:
        for dimensions in ((None, None, 0, None), (None, None, None, 0), (None, 0, None, None), (0, None, None, None)):
            mask_function = torch.vmap(mask_function, in_dims=dimensions)
    else:
        batch, head = batch[:, None, None, None], head[:, None, None]
    for columns in keys.split(max(_TILE // max(call.batch * call.q_len, 1), 1)):
        if call.has_user_functions:
            with TransformGetItemToIndex():
                visible = mask_function(batch, head, rows, columns)
        else:
            visible = mask_function(batch, head, rows, columns[:, None])
        visible = visible.to(call.device, torch.bool).expand(call.batch, 1, columns.shape[0], call.q_len)
        if visible.stride(0) == 0:
            visible = visible[:1]
        yield visible.transpose(2, 3)


def _in_documents(mask_function: Callable, documents: _Documents, batch_size: int) -> Callable:
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


# Inside torch.compile


# Together they search 16^6 rows. Numbers that depend on S_q would compile again for every length.
_CANDIDATES, _ROUNDS = 16, 6


def _search(mask_function: Callable, call: _Call) -> Tensor:
    """LTS and UTE of every key, by a search from its own row; each round divides the size of the steps by 16."""
    documents = None if call.document_ends is None else _Documents.of(call.document_ends, call.is_token)
    batch = torch.arange(call.batch, device=call.device)[:, None, None]
    head = torch.zeros_like(batch)
    # What the function gets for the keys and for the first and the last row of the search; plus `local` it is the row.
    if documents is None:
        key = torch.arange(call.kv_len, device=call.device)[None, None] + call.kv_offset
        lowest = torch.zeros_like(key) + call.q_offset
        highest, local = lowest + (call.q_len - 1), -call.q_offset
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
