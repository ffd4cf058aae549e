"""Mask functions read by structure: the closures that `transformers.masking_utils` composes them of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any, NamedTuple, cast

import torch
import transformers
from torch import Tensor
from transformers import masking_utils
from transformers.utils.import_utils import is_tracing

from .. import bounds
from .evaluation import EvaluatedCall, evaluate
from .name import logger


class UnknownFunctionError(Exception):
    """Raised for a part of a mask function that has to be evaluated."""

    def __init__(self, function: Callable) -> None:
        super().__init__(function)
        self.function = function


class _Leaf(NamedTuple):
    """A mask function other than AND, and the positions it counts with if Transformers found packed documents."""

    function: Callable
    position_ids: Tensor | None


def convert_closure(
    mask_function: Callable, call: EvaluatedCall, position_ids: Tensor | None, is_causal: bool
) -> Tensor:
    """Bounds of `mask_function`, intersected with the causal triangle if `is_causal`.

    Every constructor applies the triangle itself, because causal bounds need only one plane.
    """
    leaves = list(leaves_of_and(mask_function, position_ids))
    is_causal = is_causal or any(leaf.function is masking_utils.causal_mask_function for leaf in leaves)
    parts = [_convert_leaf_closure(leaf, call, is_causal) for leaf in leaves if not is_plain_leaf(leaf.function)]
    if parts:
        return bounds.intersect(*parts, q_len=call.q_len)
    if is_causal:
        return bounds.causal(**call.place, device=call.device)
    return bounds.bidirectional(call.q_len, call.kv_len, device=call.device)


def is_plain_leaf(mask_function: Callable) -> bool:
    return mask_function in (masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function)


def leaves_of_and(mask_function: Callable, position_ids: Tensor | None) -> Iterator[_Leaf]:
    if is_plain_leaf(mask_function) or factory_of(mask_function) != "and_masks":
        yield _Leaf(mask_function, position_ids)
        return
    parts = closure_of(mask_function)["mask_functions"]
    is_packed = any(factory_of(part) == "packed_sequence_mask_function" for part in parts)
    for part in parts:
        if is_packed and factory_of(part) == "remap_positions_for_packed_sequence":
            remapped = closure_of(part)
            yield from leaves_of_and(remapped["mask_function"], remapped["position_ids"])
        else:
            yield from leaves_of_and(part, position_ids)


def _convert_leaf_closure(leaf: _Leaf, call: EvaluatedCall, is_causal: bool) -> Tensor:
    """Bounds of one leaf.

    In packed rows, positions start again with every document, and increase by one within it. Distances between
    positions are therefore distances between rows, and windows can be made of rows. Only chunks depend on the start.
    Blocks are looked up by row: Transformers looks them up by position, which finds the first document's for all.
    """
    factory = factory_of(leaf.function)
    arguments = closure_of(leaf.function)
    if factory == "or_masks":
        parts = [convert_closure(part, call, leaf.position_ids, is_causal) for part in arguments["mask_functions"]]
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
        if call.has_user_functions and not _block_ids_are_documents(document_ids, call):
            raise UnknownFunctionError(leaf.function)
        return bounds.from_document_ids(document_ids, is_causal=is_causal, **call.place)
    if factory == "chunked_overlay":
        # In packed rows chunks start with the document. Left padding is not part of it.
        first = arguments["left_padding"]
        if leaf.position_ids is not None:
            first = torch.arange(call.kv_len, device=call.device) - leaf.position_ids
        elif call.document_ends is not None:
            first = bounds.document_starts(call.document_ends)
        elif call.starts_later_by is not None:
            first = first[:, None] + call.starts_later_by()
        chunk_size = arguments["chunk_size"]
        return bounds.chunked(chunk_size, left_padding=first, is_causal=is_causal, device=call.device, **call.place)
    if factory == "sliding_window_bidirectional_overlay" and arguments["sliding_window"] >= 0:
        part = bounds.sliding_window(arguments["sliding_window"], **call.place, is_causal=False, device=call.device)
    elif factory == "blockwise_overlay" and _block_ids_are_runs(arguments["block_sequence_ids"], call):
        part = bounds.from_document_ids(arguments["block_sequence_ids"], is_causal=False, **call.place)
    else:
        raise UnknownFunctionError(leaf.function)
    if is_causal:
        part = bounds.intersect(part, bounds.causal(**call.place, device=call.device), q_len=call.q_len)
    return part


def has_overlays(mask_function: Callable, has_user_functions: bool) -> bool:
    """Whether more than windows and chunks may be in a mask function, as far as a graph can tell."""
    return has_user_functions or getattr(mask_function, "__name__", "") == "or_mask"


def closure_holds_whole_rows(mask_function: Callable, length: int | None, *, has_user_functions: bool = True) -> bool:
    """Whether a mask function finds all that it looks up by the index of a token, in rows of this length.

    It may hold numbers, and with a length tensors `[B, length]`. Functions from outside of Transformers may look up
    what they do not hold, in their module or in an object.
    """
    if not torch.compiler.is_dynamo_compiling():
        return _closure_holds_whole_rows(mask_function, length)
    is_of_positions = is_plain_leaf(mask_function) or not has_overlays(mask_function, has_user_functions)
    return is_of_positions or _looks_up_outside_of_the_graph(mask_function, length)


def _closure_holds_whole_rows(mask_function: Callable, length: int | None) -> bool:
    if is_plain_leaf(mask_function) or factory_of(mask_function) in _OF_POSITIONS:
        return True
    if not isinstance(mask_function, FunctionType) or not mask_function.__module__.startswith("transformers."):
        return False
    return all(_value_holds_whole_rows(value, length) for value in closure_of(mask_function).values())


_OF_POSITIONS = {"sliding_window_overlay", "sliding_window_bidirectional_overlay", "chunked_overlay"}


def _value_holds_whole_rows(value: Any, length: int | None) -> bool:
    if isinstance(value, Tensor):
        return value.ndim == 2 and value.shape[1] == length
    if isinstance(value, (tuple, list)):
        return all(_value_holds_whole_rows(part, length) for part in value)
    return isinstance(value, (int, float)) or (callable(value) and _closure_holds_whole_rows(value, length))


WHY_NOT_IN_A_GRAPH = (
    'attn_implementation="flashmask" cannot read masks with overlays (image blocks, functions of the model or of the '
    "user) inside the graph: compile without fullgraph=True, or make the mask outside of what is compiled"
)


_looks_up_outside_of_the_graph = torch.compiler.disable(_closure_holds_whole_rows, reason=WHY_NOT_IN_A_GRAPH)


def causality_and_window_of(mask_function: Callable) -> tuple[bool, int | None] | None:
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
        elif factory != "packed_sequence_mask_function" and not is_plain_leaf(leaf.function):
            return None
        is_causal = is_causal or leaf.function is masking_utils.causal_mask_function
    return is_causal, window


def factory_of(mask_function: Callable) -> str | None:
    """The function of `transformers.masking_utils` that made this closure, if its closures are read correctly."""
    if getattr(mask_function, "__module__", None) != masking_utils.__name__:
        return None
    factory, _, _ = mask_function.__qualname__.partition(".<locals>.")
    return factory if _is_read_correctly(factory, mask_function.__code__) else None


def closure_of(mask_function: Callable) -> dict[str, Any]:
    code, cells = getattr(mask_function, "__code__", None), getattr(mask_function, "__closure__", None)
    return {} if code is None else {name: cell.cell_contents for name, cell in zip(code.co_freevars, cells or ())}


def _block_ids_are_runs(ids: Tensor, call: EvaluatedCall) -> bool:
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


def _block_ids_are_documents(ids: Tensor, call: EvaluatedCall) -> bool:
    return _block_ids_are_runs(ids, call) and not bool((ids < 0).any())


def name_of(mask_function: Callable) -> str:
    name = getattr(mask_function, "__qualname__", repr(mask_function))
    return f"`{name}` of `{getattr(mask_function, '__module__', 'an unknown module')}`"


def check_factories() -> None:
    """Compare all that Transformers has. What it gets or is given later is compared at its first use."""
    for factory in _example_arguments_of_factories():
        if hasattr(masking_utils, factory):
            factory_of(_example_of_factory(factory))


_is_correct: dict[CodeType, bool] = {}
"""Code of the functions that a factory makes -> whether they show what is read off them. Each is compared once."""


def _is_read_correctly(factory: str, code: CodeType) -> bool:
    known = _is_correct.get(code)
    if known is not None:
        return known
    if is_tracing(torch.empty(0)):  # nothing can be compared here
        return False
    if factory not in _example_arguments_of_factories():
        _is_correct[code] = False
        return False
    example = _example_of_factory(factory)
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
        example = masking_utils.and_masks(
            masking_utils.packed_sequence_mask_function(_example_ids_of_factories()), example
        )
        place = (8, 8, 0, 0)
    call = EvaluatedCall(2, *place, "cpu", has_user_functions=False)
    expected = torch.cat(list(evaluate(example, call)), dim=3)
    causal = torch.cat(list(evaluate(masking_utils.causal_mask_function, call)), dim=3)
    try:
        read = [convert_closure(example, call, None, is_causal) for is_causal in (False, True)]
    except (UnknownFunctionError, LookupError, RuntimeError, TypeError, ValueError):
        return False  # the closure holds something else
    shown = [bounds.to_dense(part, call.q_len).expand_as(expected) for part in read]
    return torch.equal(shown[0], expected) and torch.equal(shown[1], expected & causal)


def _example_of_factory(factory: str) -> Callable:
    return cast(Callable, getattr(masking_utils, factory)(*_example_arguments_of_factories()[factory]))


def _example_arguments_of_factories() -> dict[str, tuple]:
    """Factories whose closures are read -> arguments to call them with."""
    causal, everything = masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function
    ids = _example_ids_of_factories()
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


def _example_ids_of_factories() -> Tensor:
    return torch.tensor([[0, 0, 1, 1, 1, 2, 2, 2], [0, 1, 1, 1, 1, 1, 2, 2]], device="cpu")
