"""Layer types that see a range of the keys: windows and chunks."""

from __future__ import annotations

import transformers
from torch import Tensor

__all__ = ["KEY_RANGE_OF_LAYER_TYPE", "layer_types_have_key_ranges"]

KEY_RANGE_OF_LAYER_TYPE = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
"""Layer types that do not see all keys -> the setting with the number of keys that they see."""


def layer_types_have_key_ranges(config: transformers.PreTrainedConfig, bounds: Tensor) -> bool:
    """Whether some layers do not see all keys of a row of this length."""
    layer_types = set(getattr(config, "layer_types", None) or KEY_RANGE_OF_LAYER_TYPE)
    limits = [getattr(config, limit, None) for name, limit in KEY_RANGE_OF_LAYER_TYPE.items() if name in layer_types]
    return any(limit is not None and limit < bounds.shape[-1] for limit in limits)
