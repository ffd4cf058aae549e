"""The bounds of packed rows for each type of layer of a model, final: with its windows and chunks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from .. import bounds

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")


def packed_bounds(config: PreTrainedConfig, position_ids: Tensor, is_padding: Tensor) -> Tensor | dict[str, Tensor]:
    """Bounds `[R, 1, 1, S]`, or a dict of them when the layers of the model see different keys."""
    masks = {
        layer_type: bounds.hide_keys(
            _packed_bounds_of_layer_type(layer_type, config.get_text_config(), position_ids), is_padding
        )
        for layer_type in layer_types_of_packed_bounds(config)
    }
    return masks if len(masks) > 1 else next(iter(masks.values()))


def _packed_bounds_of_layer_type(layer_type: str, config: Any, position_ids: Tensor) -> Tensor:
    if layer_type == "chunked_attention":
        position_ids = position_ids % config.attention_chunk_size
    documents = bounds.from_position_ids(position_ids)
    if layer_type != "sliding_attention":
        return documents
    return bounds.intersect(documents, bounds.sliding_window(config.sliding_window, position_ids.shape[1]))


def layer_types_of_packed_bounds(config: PreTrainedConfig, asking: str = "`bounds_for`") -> list[str]:
    """The types of layers that `transformers.masking_utils.create_masks_for_generate` finds in this model."""
    text_config: Any = config.get_text_config()
    if getattr(text_config, "output_router_logits", False):
        raise NotImplementedError(
            f"{asking}: with output_router_logits=True this model reads `attention_mask` as a padding mask for its "
            "auxiliary loss, and would read bounds wrongly; set it to False, or pack documents by their positions "
            "(PackedDataCollator without `bounds_for`)"
        )
    layer_types = sorted(set(getattr(text_config, "layer_types", None) or ()))
    unknown = [layer_type for layer_type in layer_types if layer_type not in _LAYER_TYPES]
    if unknown:
        raise NotImplementedError(
            f"`bounds_for`: {type(text_config).__name__} has layers of type {unknown}, final bounds are known for "
            f"{list(_LAYER_TYPES)}; leave `bounds_for` out if the model's attention gets `position_ids`"
        )
    if layer_types:
        return layer_types
    if getattr(text_config, "sliding_window", None) is not None:
        return ["sliding_attention"]
    has_chunks = getattr(text_config, "attention_chunk_size", None) is not None
    return ["chunked_attention" if has_chunks else "full_attention"]
