"""Hooks on models that drop what tells documents apart, compute with it, or hand it to what it does not describe."""

from __future__ import annotations

import functools
import inspect
import re
import sys
from typing import Any

import transformers
from torch import Tensor
from transformers import PreTrainedModel

from .arguments import by_name
from .documents import document_ids_of_call
from .hooks import set_hook
from .name import NAME
from .refused_documents import refuse_dropped_lengths, refuse_ids_as_factors

__all__ = ["check_calls", "computes_with_mask"]


def check_calls(model: PreTrainedModel, implementation: str) -> None:
    """Add the hooks to a model that uses flashmask now and to its parts of the same configuration, or remove them."""
    is_ours = implementation == NAME
    for part in model.modules():
        if not isinstance(part, PreTrainedModel) or part.config is not model.config:
            continue
        is_backbone = type(part).__name__.endswith("Model")
        has_lengths = is_backbone and part.config.model_type in _DROP_LENGTHS | _HAND_LENGTHS_TO_IMAGES
        counts = any(_model_counts_by_mask(type(part), maker) for maker in _MAKERS_OF_POSITIONS)  # type: ignore[arg-type]
        set_hook(part, _check_lengths_of_call, is_needed=is_ours and has_lengths)
        set_hook(part, _check_ids_of_call, is_needed=is_ours and counts)


_DROP_LENGTHS = {"nemotron", "stablelm"}
"""Their layers do not hand `cu_seq_lens_q` on to attention."""

_HAND_LENGTHS_TO_IMAGES = {"llava"}
"""Their encoder of images is called with the `cu_seq_lens_q` of the text."""


def _check_lengths_of_call(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    lengths, config = kwargs.get("cu_seq_lens_q"), model.config
    if lengths is None or config._attn_implementation != NAME:
        return
    call = by_name(model, args, kwargs)
    if config.model_type in _DROP_LENGTHS:
        refuse_dropped_lengths(lengths, call.get("position_ids"), config.model_type)
    elif call.get("pixel_values") is not None:
        raise NotImplementedError(
            f"`cu_seq_lens_q` also reaches the encoder of images of {config.model_type}, whose patches it does not "
            "describe: pass `position_ids` [B, S] that restart with every document instead"
        )


_MAKERS_OF_POSITIONS = ("get_rope_index", "compute_3d_position_ids")
"""Methods that make positions in three dimensions where none are given; the second counts those behind earlier ones."""


@functools.cache
def _model_counts_by_mask(model_class: type, method: str) -> bool:
    """Whether a method adds the 2-D mask up, or takes 1 alone for a token."""
    try:
        source = inspect.getsource(inspect.unwrap(getattr(model_class, method)))
    except (AttributeError, OSError, TypeError):
        return False
    return re.search(r"attention_mask(\[\w+\])?(\.\w+\(\))?(\.cumsum\(| == 1)", source) is not None


def _check_ids_of_call(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Where positions are given, or made without the numbers of the mask, ids are no harm."""
    call = by_name(model, args, kwargs)
    mask, cache = call.get("attention_mask"), call.get("cache", call.get("past_key_values"))  # until Transformers 5.23
    ids = document_ids_of_call(mask, mask.device) if isinstance(mask, Tensor) else None
    is_ours = NAME in (model.config._attn_implementation, model.config.get_text_config()._attn_implementation)
    if not is_ours or ids is None or call.get("position_ids") is not None:
        return
    has_earlier = getattr(model, "rope_deltas", None) is not None
    goes_on = has_earlier and (call.get("input_ids") is None or (cache is not None and cache.get_seq_length() > 0))
    if _model_counts_by_mask(type(model), _MAKERS_OF_POSITIONS[goes_on]):  # type: ignore[arg-type]
        refuse_ids_as_factors(ids, model.config.model_type)


def computes_with_mask(config: transformers.PreTrainedConfig) -> bool:
    """Whether a model computes with the numbers of the 2-D mask: recurrent and convolutional layers multiply states by
    it, embeddings multiply by it, or add it up to count positions, the encoder of Pegasus-X takes 1 alone for a token.
    """
    module = sys.modules.get(type(config).__module__.replace(".configuration_", ".modeling_"))
    return config.model_type in _COMPUTE_WITH_MASK or any(hasattr(module, name) for name in _OF_RECURRENT_LAYERS)


_COMPUTE_WITH_MASK = {"esm", "opt", "biogpt", "pegasus_x"}


_OF_RECURRENT_LAYERS = ("apply_mask_to_padding_states", "create_recurrent_attention_mask")
