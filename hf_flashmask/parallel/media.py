"""Batches with images: whole on every rank, until the text model is called with the embeddings of all tokens.

What looks for images among the tokens is a part of the model of its own around the text model, and does on every rank
what it does in one process. The text model's call is cut to the tokens of the rank. Each rank has the gradients that
its own tokens pass on to images and embeddings; their sum over the ranks is that of one process, as it is for weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..integration import Mask
from ..integration.arguments import by_name
from ..integration.whole_sequence import Exchange, WholeSequence

__all__ = ["cut_text_model_call", "find_text_model", "media_arguments_of", "with_positions_of_media"]


def find_text_model(base: PreTrainedModel) -> PreTrainedModel:
    """The part whose layers attend among the tokens of a row: of models of text alone, the model itself."""
    config = base.config
    if config.get_text_config() is config or config.is_encoder_decoder:
        return base
    found = base.get_decoder()
    return found if isinstance(found, PreTrainedModel) else base


_DIMENSION_OF_TOKENS = {
    "input_ids": 1,
    "inputs_embeds": 1,
    "position_ids": -1,
    "per_layer_inputs": 1,
    "moe_mm_token_type_ids": 1,
}
"""Arguments of text models -> the dimension that is cut."""
_OF_IMAGE_TOKENS = {"visual_pos_masks", "deepstack_visual_embeds"}
"""Which tokens are of images, `[B, S]`, and what some layers add to these, each `[image tokens, D]`."""
_NOT_CUT = {
    *("self", "attention_mask", "cache", "past_key_values", "use_cache", "cache_position"),
    *("output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "logits_to_keep"),
}
_CUT_BEFORE = {"labels", "shift_labels", "num_items_in_batch", "logits_to_keep"}
"""What models hand on to their text models beside its arguments, and `shard` has cut."""


def media_arguments_of(base: PreTrainedModel) -> frozenset[str]:
    """Names of the arguments that are images and videos, or describe them; none where the text model cannot be cut."""
    text_model = find_text_model(base)
    known = {*_DIMENSION_OF_TOKENS, *_OF_IMAGE_TOKENS, *_NOT_CUT}
    taken = _parameters_of_media_function(text_model.forward)
    if text_model is base or not {"inputs_embeds", "position_ids"} <= taken <= known:
        return frozenset()
    names = {"pixel_values", "pixel_values_videos", "second_per_grid_ts"}
    for part in (base, base.base_model):
        for getter in ("get_image_features", "get_video_features"):
            names |= _parameters_of_media_function(getattr(part, getter)) if hasattr(part, getter) else set()
    return frozenset(names & _parameters_of_media_function(base.forward) - known)


def _parameters_of_media_function(function: Any) -> set[str]:
    parameters = inspect.signature(function).parameters.values()
    return {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}


def with_positions_of_media(
    base: PreTrainedModel, media: frozenset[str], batch: Mapping[str, Any]
) -> Mapping[str, Any]:
    """The batch with the positions that a model counts by the rows and columns of its images when none are given."""
    counting = [part for part in (base, base.base_model) if hasattr(part, "get_rope_index")]
    has_media = any(batch.get(name) is not None for name in media)
    if not counting or not has_media or batch.get("position_ids") is not None:
        return batch
    count = getattr(counting[0], "compute_3d_position_ids", None)
    parameters = {} if count is None else inspect.signature(count).parameters
    missing = [name for name in ("input_ids", "mm_token_type_ids") if name in parameters and batch.get(name) is None]
    mask = batch.get("attention_mask")
    if count is None or missing or not (mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)):
        raise ValueError(
            f"{type(base).__name__} counts positions by the places of images, of whole rows under no other than a 2-D "
            f"mask; the batch has {sorted(batch)}: pass all that its processor returns, or `position_ids` [3, B, S]"
        )
    with torch.no_grad():
        return {**batch, "position_ids": count(**{name: batch.get(name) for name in parameters})}


def cut_text_model_call(
    text_model: PreTrainedModel, args: tuple[Any, ...], call: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """A forward pre-hook on a text model, whose call is cut to the tokens of this rank."""
    call = by_name(text_model, args, call)
    exchange = _exchange_of_text_model_call(call.get("attention_mask"))
    if exchange is None or not exchange.takes_whole_rows:
        return None
    _check_text_model_call(text_model, call, exchange.length)
    rows = exchange.rows
    cut: dict[str, Any] = {
        name: _cut_text_model_argument(call[name], dim, rows)
        for name, dim in _DIMENSION_OF_TOKENS.items()
        if call.get(name) is not None
    }
    if call.get("visual_pos_masks") is not None:
        cut |= _cut_image_tokens(call["visual_pos_masks"], call["deepstack_visual_embeds"], rows)
    if call.get("cache_position") is not None:  # which counts the tokens of the call, until Transformers 5.4
        cut["cache_position"] = None
    return (), call | cut


def _exchange_of_text_model_call(mask: Any) -> Exchange | None:
    if isinstance(mask, Mapping):
        mask = next(iter(mask.values()), None)
    return mask.exchange if isinstance(mask, (Mask, WholeSequence)) else None


def _check_text_model_call(text_model: PreTrainedModel, call: dict[str, Any], length: int) -> None:
    name = type(text_model).__name__
    position_ids = call.get("position_ids")
    if not isinstance(position_ids, Tensor) or position_ids.shape[-1] != length:
        raise NotImplementedError(
            f"sequence_parallel cannot tell {name} the positions of its tokens: the model around it hands no "
            f"`position_ids` of the {length} tokens of a row on to it"
        )
    known = {*_DIMENSION_OF_TOKENS, *_OF_IMAGE_TOKENS, *_NOT_CUT, *_CUT_BEFORE}
    for argument, value in call.items():
        if isinstance(value, Tensor) and value.ndim > 0 and argument not in known:
            raise NotImplementedError(
                f"sequence_parallel does not know how to cut `{argument}` {list(value.shape)}, which {name} is called "
                "with for batches with images: leave them out, or train this model without sequence_parallel"
            )


def _cut_text_model_argument(values: Tensor, dimension: int, rows: Tensor | slice) -> Tensor:
    return (values[..., rows] if dimension == -1 else values[:, rows]).contiguous()


def _cut_image_tokens(is_image: Tensor, added: list[Tensor] | None, rows: Tensor | slice) -> dict[str, Any]:
    own = is_image[:, rows]
    place = (is_image.flatten().cumsum(0) - 1).view(is_image.shape)[:, rows][own]
    return {
        "visual_pos_masks": own,
        "deepstack_visual_embeds": None if added is None else [values[place] for values in added],
    }
