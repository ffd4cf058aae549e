"""What a forward pass needs to know of a backbone: how it counts positions, and how far its layers see."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from ..integration.layer_types import KEY_RANGE_OF_LAYER_TYPE
from .layer_source import source_of_layer

_ROPE_TYPES_BY_LARGEST_POSITION = {"dynamic", "longrope"}


class Traits(NamedTuple):
    """What a forward pass needs to know of a backbone.

    Attributes:
        key_ranges: how many keys a query sees at most in layers that do not see all.
        relative_up_to: positions of rows up to this length matter only by their distances; 0 when they always matter.
        packs_up_to: rows up to this length can be packed. From some column on, Llama 4 scales scores by the column of
            the query, whatever its position.
        counts_visible_tokens: whether it counts positions by the 2-D mask, not by columns, when none are given.
        counts_by_token_ids: whether it counts positions by which token ids are padding, when none are given.
    """

    key_ranges: tuple[int, ...]
    relative_up_to: float
    packs_up_to: float
    counts_visible_tokens: bool
    counts_by_token_ids: bool

    @classmethod
    def of(cls, backbone: PreTrainedModel) -> Traits:
        config: Any = backbone.config.get_text_config()
        limits = [getattr(config, limit, None) for limit in KEY_RANGE_OF_LAYER_TYPE.values()]
        scales_by_column = getattr(config, "attn_temperature_tuning", False)
        sources = [source_of_layer(layer) for layer in backbone.modules()]
        return cls(
            key_ranges=tuple(limit for limit in limits if limit is not None),
            relative_up_to=_relative_positions_up_to(backbone),
            packs_up_to=config.floor_scale - 1 if scales_by_column else float("inf"),
            counts_visible_tokens=_counts_visible_tokens(source_of_layer(backbone)),
            counts_by_token_ids=any("create_position_ids_from_input_ids(" in source for source in sources),
        )


def _counts_visible_tokens(source: str) -> bool:
    counting = re.search(
        r"position_ids = (torch\.cumsum\(\w*attention_mask|attention_mask(\.\w+\(\))?\.cumsum\()", source
    )
    # Models of images and text count so only in what they generate.
    return counting is not None and "rope_deltas" not in source


def _relative_positions_up_to(backbone: PreTrainedModel) -> float:
    names = _rope_types(backbone)
    # Some rotary embeddings change with the largest position, or from layer type to layer type.
    if not names or names & _ROPE_TYPES_BY_LARGEST_POSITION or any(map(_normalizes_after_rotation, backbone.modules())):
        return 0
    config: Any = backbone.config.get_text_config()
    # Ministral 3 and Mistral 4 scale scores by the position of the query, from some position on.
    rope = getattr(config, "rope_parameters", None) or {}
    is_scaled = bool(rope.get("llama_4_scaling_beta"))
    return float(rope["original_max_position_embeddings"]) if is_scaled else float("inf")


def _rope_types(model: nn.Module) -> set[str]:
    """Of all rotary embeddings; empty without any."""
    rotary = [module for module in model.modules() if "Rotary" in type(module).__name__]
    kinds = [getattr(module, "rope_type", "default") for module in rotary]
    return {name for kind in kinds for name in (kind.values() if isinstance(kind, dict) else [kind])}


def depends_on_largest_position(module: nn.Module) -> bool:
    """Whether a module is a rotary embedding that looks at the largest position of a call."""
    return "Rotary" in type(module).__name__ and bool(_rope_types(module) & _ROPE_TYPES_BY_LARGEST_POSITION)


def _normalizes_after_rotation(layer: nn.Module) -> bool:
    """Whether a norm with weights follows the rotation of queries: scores then depend on positions, not distances."""
    _, rotates, rest = source_of_layer(layer).partition("apply_rotary_pos_emb(")
    norms = re.findall(r"= self\.(\w*norm)\(query", rest) if rotates else []
    return any(list(getattr(layer, name).parameters()) for name in norms if hasattr(layer, name))
