"""Which models are refused, and why."""

from __future__ import annotations

import functools
import inspect
import re
import sys
from typing import Any

from transformers import PreTrainedModel


def check_support(model: PreTrainedModel) -> None:
    """Refuse, before it is built, a model that would compute something else with flashmask."""
    reason = _reason_against_config(model) or _reason_against_class(type(model))  # type: ignore[arg-type]
    if reason is not None:
        others = '"sdpa" or "eager"' if model._supports_sdpa else '"eager"'
        raise ValueError(
            f'{type(model).__name__} does not work with attn_implementation="flashmask": {reason}. Use {others} for '
            "it; in a composite model the other parts can still use flashmask, as in "
            'attn_implementation={"": "eager", "text_config": "flashmask"}.'
        )


def keeps_eager(model: PreTrainedModel) -> bool:
    """Whether a part of a model, such as the audio encoder of Gemma 4, has its own eager attention and no other."""
    supports_less = _supports_more_than_eager(_model_family_of(type(model))) and not _supports_more_than_eager(
        type(model)
    )
    return supports_less or model.config.model_type in _PARTS_THAT_KEEP_EAGER


_PARTS_THAT_KEEP_EAGER = {"phi4_multimodal_audio", "phi4_multimodal_vision"}
"""One adds a bias, the layers of the other are wrongly declared causal. The language model can do without them."""


# What a configuration says


_ADDS_A_BIAS = "it adds a bias to its attention scores"


_SELECTING_LAYERS = {
    "indexed_attention",
    "compressed_sparse_attention",
    "heavily_compressed_attention",
    "minimax_m3_sparse",
}
"""Layer types in which each query attends only to keys that it selects."""


_SETTINGS_OF_A_BIAS = ("relative_attention_num_buckets", "rel_extent")
"""Settings that only models with a bias have."""


_SWITCHES_OF_A_BIAS = ("use_relative_position_bias", "use_shared_relative_position_bias")


_BIASED_POSITIONS = {
    (embeddings, sound) for embeddings in ("relative", "relative_key") for sound in ("input_values", "input_features")
}
"""Position embeddings and inputs of Conformers. The text part of SeamlessM4T has the same configuration."""


_REFUSED_MODEL_TYPES = {
    "nemotron_asr_streaming_encoder": _ADDS_A_BIAS,
    "parakeet_encoder": _ADDS_A_BIAS,
    "swin": _ADDS_A_BIAS,
    "lasr_encoder": "its convolutions compute with a dense mask",
    "doge": "its layers compute with a dense mask",
    "t5gemma2_decoder": "it joins the masks of two sequences as if they were dense",
}


def _reason_against_config(model: PreTrainedModel) -> str | None:
    config: Any = model.config
    if (getattr(config, "position_embeddings_type", None), model.main_input_name) in _BIASED_POSITIONS:
        return _ADDS_A_BIAS
    selecting = _SELECTING_LAYERS.intersection(getattr(config, "layer_types", None) or ())
    if selecting:
        return f"each query of its layers of type {min(selecting)!r} attends only to keys that it selects"
    if any(hasattr(config, name) for name in _SETTINGS_OF_A_BIAS):
        return _ADDS_A_BIAS
    if any(getattr(config, name, False) for name in _SWITCHES_OF_A_BIAS):
        return _ADDS_A_BIAS
    if config.model_type == "siglip2_vision_model" and config.vision_use_head:
        return "the head that pools its patches computes with a dense mask (set vision_use_head = False to do without)"
    return _REFUSED_MODEL_TYPES.get(config.model_type)


# What a class and its modeling file say


@functools.cache
def _reason_against_class(model_class: type) -> str | None:
    """Judge the class by the first modeling file among those of its bases that has layers of attention."""
    sources = {base: _source_of_module(base) for base in model_class.__mro__ if _is_of_a_model(base)}
    for base, source in sources.items():
        if source is None:  # a class from a notebook is judged by its bases
            continue
        if re.search(r"ATTENTION_CLASSES\[\s*(config\.)?_?attn_implementation\s*\]", source):
            return "it picks its attention layer from a fixed list of implementations"
        if re.search(r"^class \w*Attention\w*\(nn\.Module\):", source, re.MULTILINE):
            if "ALL_ATTENTION_FUNCTIONS" not in source:
                return "it computes attention itself, not through the attention interface"
            if not _supports_more_than_eager(_model_family_of(base)):
                # They may use dense masks of their own (BigBird-Pegasus, Splinter). They refuse sdpa as well.
                return "Transformers supports only eager attention for it"
            return None
    if any(sources.values()) or getattr(model_class, "_supports_attention_backend", False):
        return None
    return (
        f"the source of its module `{model_class.__module__}` cannot be read, which would tell whether it computes "
        "attention through the attention interface, and the class does not declare `_supports_attention_backend`"
    )


def _is_of_a_model(model_class: type) -> bool:
    return issubclass(model_class, PreTrainedModel) and model_class is not PreTrainedModel


def _source_of_module(model_class: type) -> str | None:
    try:
        return inspect.getsource(sys.modules[model_class.__module__])
    except (KeyError, OSError, TypeError):
        return None


def _supports_more_than_eager(model_class: type) -> bool:
    flags = ("_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn", "_supports_attention_backend")
    return any(getattr(model_class, flag, False) for flag in flags)


def _model_family_of(model_class: type) -> type:
    """The direct subclass of `PreTrainedModel` among the bases, from which all models of a modeling file inherit."""
    return next(base for base in model_class.__mro__ if PreTrainedModel in base.__bases__)
