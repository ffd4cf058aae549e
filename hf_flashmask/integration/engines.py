"""What engines for several GPUs do to a call on its way to a layer. What would change the result silently is an error.

Replicas and shards of parameters (DDP, FSDP, HSDP, ZeRO) leave calls alone. Others move heads, rows or masks:

* tensor parallelism leaves each rank some heads: a mask that differs between heads is cut likewise (`heads_of_rank`);
* `nn.DataParallel` cuts every tensor along its first dimension;
* sequence parallelism gathers the rows of a layer after the masks were made, and may drop those;
* torch's `context_parallel` replaces `scaled_dot_product_attention`, and nothing else. Torch 2.9 to 2.11 stay in this
  state when an error leaves the context.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.overrides import _get_current_function_mode_stack as _function_modes

from .closures import causality_and_window_of
from .documents import Documents, are_ids
from .mask import Mask

__all__ = [
    "heads_of_rank",
    "note_made",
    "refuse_cut_call",
    "refuse_dropped_mask",
    "refuse_gathered_tokens",
    "refuse_ring",
]

_WAY_OUT = (
    "Use hf_flashmask.sequence_parallel, or an engine that hands attention layers the mask of the whole sequence as "
    "`attention_mask`"
)


def refuse_ring() -> None:
    """Refuse torch's `context_parallel`: attention would stay within this rank's part of the sequence."""
    if _is_of_ring(functional.scaled_dot_product_attention) or any(map(_is_mode_of_ring, _function_modes())):
        raise NotImplementedError(
            "torch's `context_parallel` (also accelerate's `cp_size`) replaces scaled_dot_product_attention only: with "
            'attn_implementation="flashmask" each rank would attend to its own part of the sequence. It needs "sdpa". '
            f"{_WAY_OUT}. Where an error has left the context, torch 2.9 to 2.11 keep the function replaced and the "
            "buffers cut: enter the context again and leave it without an error, and make the buffers anew."
        )


def _is_mode_of_ring(mode: TorchFunctionMode) -> bool:
    """torch 2.9 has this way to replace the function as well. Guards of graphs watch which modes are entered."""
    return _is_defined_in_torch_distributed(type(mode), "_context_parallel")


@torch.compiler.assume_constant_result
def _is_of_ring(function: Callable) -> bool:
    """In a graph the answer is a constant, for this function: where it is another one, a guard fails."""
    return _is_defined_in_torch_distributed(function, "_distribute_function")


def _is_defined_in_torch_distributed(local: Any, function: str) -> bool:
    """Whether this function or class is made in that function of torch.distributed."""
    is_local = getattr(local, "__qualname__", "").startswith(f"{function}.<locals>.")
    return is_local and local.__module__.startswith("torch.distributed.")


def refuse_cut_call(
    module: nn.Module,
    query: Tensor,
    bounds: Tensor | None,
    cu_seq_lens_q: Tensor | None,
    sinks: Tensor | None,
) -> None:
    """Refuse heads that do not fit their sinks, and what `nn.DataParallel` has cut along the wrong dimension.

    It gives each replica a part of every tensor. Where some have fewer parts than others, the rows of the other
    replicas are never computed, without a word.

    Args:
        bounds: what the model was called with, None for masks that were made in this replica.
    """
    heads = query.shape[1]
    if sinks is not None and sinks.ndim == 1 and sinks.shape[0] > heads and sinks.shape[0] % heads == 0:
        raise NotImplementedError(
            f"{type(module).__name__} attends with {heads} query heads, and has attention sinks for "
            f"{sinks.shape[0]}: an engine has split its heads between ranks (Ulysses, tensor parallelism) without its "
            f"sinks, and the layer is not told which heads it has. {_WAY_OUT}."
        )
    if not getattr(module, "_is_replica", False):
        return
    if cu_seq_lens_q is not None:
        raise NotImplementedError(
            "nn.DataParallel cuts `cu_seq_lens_q` into parts, as if it had a row for each row of the batch: leave it "
            "out and pass `position_ids` [B, S] that restart with every document, or use DDP"
        )
    if bounds is not None and bounds.shape[0] == 1 < query.shape[0]:
        raise ValueError(
            "nn.DataParallel cuts every tensor along its first dimension, and drops the rows of the batch that an "
            "`attention_mask` of batch 1 has no part for: expand it to the batch, or use DDP"
        )


# Tensor parallelism


def heads_of_rank(module: nn.Module, mask: Tensor, heads: int) -> Tensor:
    """A mask `[B, H, C, S_k]` that differs between heads, cut to the `heads` of this rank under tensor parallelism.

    The ranks of the mesh hold equal, consecutive parts of the heads.
    """
    if mask.ndim != 4 or mask.shape[1] in (1, heads) or torch.compiler.is_compiling():
        return mask
    part = _part_of_heads(module)
    if part is None or part[1] * heads != mask.shape[1]:
        return mask
    return mask[:, part[0] * heads : (part[0] + 1) * heads]


def _part_of_heads(module: nn.Module) -> tuple[int, int] | None:
    """Which of how many parts of the output of its projections a layer computes, by the placement of their weights."""
    if not torch.distributed.is_available():
        return None
    from torch.distributed.tensor import DTensor, Shard

    for weight in module.parameters():
        if isinstance(weight, DTensor):
            for dimension, placement in enumerate(weight.placements):
                if isinstance(placement, Shard) and placement.dim == weight.ndim - 2:
                    mesh = weight.device_mesh
                    return mesh.get_local_rank(dimension), mesh.size(dimension)
    return None


# Masks that do not arrive


class _MadeMask(NamedTuple):
    """What is known of a mask when it is made.

    Attributes:
        config: of the model.
        num_rows: how many rows of the sequence the model has been called with.
        position_ids: `[B or 1, num_rows]`.
        mask_function: None for final masks.
        is_token: bool `[B, num_rows]`, False for padding, until a layer has found that no token sees it.
        document_ids: `[B, num_rows]`, the 2-D mask, until a layer has found that it holds no ids of documents.
    """

    config: Any
    num_rows: int
    position_ids: Tensor | None
    mask_function: Callable | None
    is_token: Tensor | None
    document_ids: Tensor | None


class _AliveMasks(threading.local):
    """The masks of this thread that still exist: those of the running pass, and what is kept for backward."""

    def __init__(self) -> None:
        self.made: WeakKeyDictionary[Mask, _MadeMask] = WeakKeyDictionary()


_alive_masks = _AliveMasks()


def note_made(
    mask: Mask,
    config: Any,
    num_rows: int,
    position_ids: Tensor | None,
    mask_function: Callable | None,
    document_ids: Tensor | None = None,
) -> Mask:
    """Remember, as long as the mask exists, that a model has it. Nothing else reads this than `refuse_dropped_mask`."""
    if config is not None and not torch.compiler.is_compiling():
        _alive_masks.made[mask] = _MadeMask(config, num_rows, position_ids, mask_function, mask.is_token, document_ids)
    return mask


def refuse_dropped_mask(
    module: nn.Module,
    query: Tensor,
    documents: Documents | None,
    *,
    is_causal: bool,
    sliding_window: int | None,
) -> None:
    """For a layer of self-attention that an engine calls without a mask: refuse where it has dropped what the layer is
    not told otherwise.

    Sequence parallelism gathers the rows of all ranks for a layer; DeepSpeed's Ulysses (ALST) hands it None as the
    mask. The layer knows `is_causal`, its window and the documents in `position_ids`.
    """
    if torch.compiler.is_compiling():
        if is_causal:  # a layer of a vision tower is given no mask by its model
            _refuse_dropped_mask_in_graph(type(module).__name__)
        return
    config, num_rows = getattr(module, "config", None), query.shape[2]
    of_model = [(mask, call) for mask, call in _alive_masks.made.items() if call.config is config]
    made = [(mask, call) for mask, call in of_model if num_rows > call.num_rows or mask.is_final]
    lost = _dropped_by_engine(made, documents, is_causal, sliding_window)
    has_lengths = documents is not None and documents.cu_seq_lens_q is not None  # vision towers make no masks
    if not of_model and not has_lengths and _takes_dict(config) and torch._C._current_graph_task_id() == -1:
        lost = "the masks for its types of layers in `attention_mask`"
    if lost is not None:
        _alive_masks.made.clear()  # an error keeps the masks of its pass alive
        raise NotImplementedError(
            f"{type(module).__name__} attends over {num_rows} rows without a mask: an engine for sequence parallelism "
            f"(DeepSpeed's Ulysses does this) has dropped {lost}, and the result would silently be another one. Under "
            "such an engine causal masks, sliding windows, documents that `position_ids` tell apart and padding after "
            f"the last token work. {_WAY_OUT}."
        )


@torch.compiler.assume_constant_result
def _refuse_dropped_mask_in_graph(name: str) -> None:
    """As a constant, so that the error ends the compilation: an error of traced code would run that code uncompiled."""
    raise NotImplementedError(
        f"{name} is compiled without a mask, under an engine that puts a function of its own in the place of "
        "flashmask's: whether the engine has dropped a mask is not known in a graph. Call "
        "hf_flashmask.keep_masks(model, group), or do not compile the model."
    )


def _takes_dict(config: Any) -> bool:
    """Whether a model may have been called with masks for its types of layers: then the mask function was not asked."""
    return len(set(getattr(config, "layer_types", None) or ())) > 1


def _dropped_by_engine(
    made: list[tuple[Mask, _MadeMask]], documents: Documents | None, is_causal: bool, sliding_window: int | None
) -> str | None:
    """What a layer does not know of the masks that its model has made."""
    gathered = None if documents is None else documents.position_ids
    ranges = []
    for mask, call in made:
        if mask.is_final:
            return "the bounds or the tree in `attention_mask`"
        if call.document_ids is not None:
            if bool(are_ids(call.document_ids).any()):
                return "the documents in `attention_mask`"
            _alive_masks.made[mask] = call = call._replace(document_ids=None)  # the other layers need not read it again
        if call.is_token is not None:
            if _sees_padding(call.is_token, call.position_ids, gathered, is_causal):
                return "the padding in `attention_mask`"
            _alive_masks.made[mask] = call._replace(is_token=None)
        assert call.mask_function is not None
        seen = causality_and_window_of(call.mask_function)
        if seen is None:
            return "image blocks, chunks or another overlay of the mask"
        ranges.append(seen)
    if ranges and (is_causal, sliding_window) not in ranges:
        return "a sliding window or the direction of the mask"
    return None


def _sees_padding(is_token: Tensor, position_ids: Tensor | None, gathered: Tensor | None, is_causal: bool) -> bool:
    """Whether some token would see padding. Padding after the last token of a causal row, or in documents of its own,
    is seen by no token.

    Args:
        is_token: bool `[B, S]`, of this rank's part of the sequence.
        position_ids: `[B or 1, S]`, of this part.
        gathered: `[B or 1, P x S]`, of the whole sequence.
    """
    length = is_token.shape[1]
    if not is_causal or position_ids is None or gathered is None or gathered.shape[1] <= length:
        return not bool(is_token.all())
    within = ~is_token[:, :-1] & is_token[:, 1:] & (position_ids[:, 1:] > position_ids[:, :-1])
    is_first_part = position_ids[:, :1] == gathered[:, :1]
    goes_on = gathered[:, length : length + 1] > gathered[:, length - 1 : length]
    starts_empty = ~is_token.any(1, keepdim=True) & is_first_part & goes_on
    return bool(within.any() | starts_empty.any())


def refuse_gathered_tokens(mask: Mask, module: nn.Module, query: Tensor, key: Tensor) -> None:
    """Refuse the mask of one rank's tokens where a layer is given those of several. A user's mask tells keys alone."""
    if mask.bounds is None or torch.compiler.is_compiling():
        return
    q_len, kv_len = query.shape[2], key.shape[2]
    made_for = (q_len, mask.shape[-1]) if mask.place is None else mask.place.sizes[:2]
    # Other lengths of a user's bounds are the user's mistake, which `check_bounds` explains.
    is_users_mistake = mask.place is None and (made_for[1] <= 1 or kv_len % made_for[1] != 0)
    if made_for != (q_len, kv_len) and not is_users_mistake:
        raise ValueError(
            f"the mask of {type(module).__name__} is one of {made_for[0]} queries and {made_for[1]} keys, but the "
            f"layer was called with {q_len} queries and {kv_len} keys: an engine for sequence or context parallelism "
            f"has brought the tokens of several ranks together, and not their masks. {_WAY_OUT}."
        )
