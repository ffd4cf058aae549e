"""The part of a model whose forward pass shares prefixes: where it is, whether it can share, and its traits."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sys
from typing import Any, NamedTuple, cast

from torch import nn
from transformers import PreTrainedModel

from ..integration import NAME
from ..integration.adapters import adapters_that_see_rows
from ..integration.layer_types import KEY_RANGE_OF_LAYER_TYPE

_ATTENTION_LAYER_TYPES = {"full_attention", *KEY_RANGE_OF_LAYER_TYPE}
_LOOK_AT_LARGEST_POSITION = {"dynamic", "longrope"}
_MASK_CREATORS = ("create_causal_mask", "create_sliding_window_causal_mask", "create_chunked_causal_mask")


def find_backbone(model: nn.Module, asking: str = "share_prefixes") -> PreTrainedModel:
    """The model without its head, out of all wrappers: the innermost module that is called with `input_ids`.

    `asking` is who needs it, for the messages of errors.
    """
    inner: Any = model
    if not isinstance(inner, nn.Module):
        raise TypeError(
            f"{asking} takes models, got {type(inner).__name__}; of a trainer pass trainer.model (and "
            "trainer.ref_model, where it has one)"
        )
    while not isinstance(inner, PreTrainedModel):
        refuse_prompt_learning(inner, asking)
        # DDP and FSDP, torch.compile, TRL's value heads, peft and its tuners.
        names = ("module", "_orig_mod", "pretrained_model", "base_model", "model")
        inner = next((part for name in names if isinstance(part := getattr(inner, name, None), nn.Module)), None)
        if inner is None:
            raise ValueError(f"{asking} needs a Transformers model, {type(model).__name__} holds none")
    backbone = cast(PreTrainedModel, inner.base_model)
    if backbone is inner and inner.get_output_embeddings() is not None:
        # A model whose `base_model_prefix` names nothing (Llama 4's language model).
        parts = _models_in(inner)
        backbone = parts[0] if len(parts) == 1 else backbone
    # The head of OPT calls the decoder directly, past the model that only wraps it.
    while len(parts := _models_in(backbone)) == 1 and _num_weights(parts[0]) == _num_weights(backbone):
        backbone = parts[0]
    return backbone


def _num_weights(model: nn.Module) -> int:
    return len(list(model.parameters()))


def _models_in(model: nn.Module) -> list[PreTrainedModel]:
    return [part for part in model.children() if isinstance(part, PreTrainedModel)]


def refuse_prompt_learning(wrapper: Any, asking: str) -> None:
    settings = getattr(wrapper, "peft_config", None)
    active = getattr(wrapper, "active_adapter", None)
    names = [active] if isinstance(active, str) else active
    if not isinstance(settings, dict) or not isinstance(names, list):
        return
    for name in names:
        if getattr(settings.get(name), "is_prompt_learning", False):
            raise NotImplementedError(
                f"{asking} cannot share prefixes under prompt learning of PEFT: the adapter {name!r} "
                f"({type(settings[name]).__name__}) puts learned vectors before the tokens of every row; use an "
                f"adapter of another kind (for example LoRA), or train without {asking}"
            )


def check_implementation(backbone: PreTrainedModel, asking: str = "share_prefixes") -> None:
    implementation = backbone.config.get_text_config()._attn_implementation
    if implementation != NAME:
        raise ValueError(
            f'{asking} needs attn_implementation="flashmask", {type(backbone).__name__} uses "{implementation}": '
            'call model.set_attn_implementation("flashmask") first'
        )


def check_backbone(backbone: PreTrainedModel, asking: str = "share_prefixes") -> None:
    """Raise unless the model can be called with prefix trees."""
    check_implementation(backbone, asking)
    name = type(backbone).__name__
    if any(getattr(module, "is_causal", True) is False for module in backbone.modules()):
        raise ValueError(f"{asking} needs a causal model; in {name} a token sees the ones after it")
    if backbone.config.is_encoder_decoder:
        raise ValueError(f"{asking} needs a decoder, {name} has an encoder as well")
    if found := meeting_places(backbone):
        raise NotImplementedError(
            f"{asking} cannot share what goes from token to token other than by attention: {name} has {found}"
        )
    modules = [sys.modules[base.__module__] for base in type(backbone).__mro__ if issubclass(base, PreTrainedModel)]
    if not any(hasattr(module, creator) for module in modules for creator in _MASK_CREATORS):
        raise NotImplementedError(f"{asking} cannot give {name} a mask: it makes its own")
    if not takes_positions(backbone):
        raise NotImplementedError(
            f"{asking} cannot tell {name} the positions of tokens: its forward takes no `position_ids`"
        )


def takes_positions(backbone: PreTrainedModel) -> bool:
    is_told = "position_ids" in inspect.signature(type(backbone).forward).parameters
    return is_told and "`position_ids` were provided but will be ignored" not in source_of(backbone)


def meeting_places(model: PreTrainedModel) -> str:
    """Where tokens meet elsewhere than in attention, by name; empty if nowhere."""
    config: Any = model.config.get_text_config()
    other_layers = set(getattr(config, "layer_types", None) or ()) - _ATTENTION_LAYER_TYPES
    if getattr(config, "trigram_input", False):  # MobileBERT joins the embeddings of neighbours
        other_layers.add("trigram_input")
    convolutions = {type(module).__name__ for module in modules_of(model) if isinstance(module, nn.Conv1d)}
    found = ", ".join(sorted(other_layers | convolutions | adapters_that_see_rows(modules_of(model))))
    return found or ("a recurrent state" if model._is_stateful else "")


def modules_of(model: nn.Module) -> list[nn.Module]:
    """All modules. `modules()` takes several times as long, in every call."""
    found, seen = [model], {model}
    for module in found:
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return found


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
        sources = [source_of(layer) for layer in backbone.modules()]
        return cls(
            key_ranges=tuple(limit for limit in limits if limit is not None),
            relative_up_to=_relative_up_to(backbone),
            packs_up_to=config.floor_scale - 1 if scales_by_column else float("inf"),
            counts_visible_tokens=_counts_visible_tokens(source_of(backbone)),
            counts_by_token_ids=any("create_position_ids_from_input_ids(" in source for source in sources),
        )


def _counts_visible_tokens(source: str) -> bool:
    counting = re.search(
        r"position_ids = (torch\.cumsum\(\w*attention_mask|attention_mask(\.\w+\(\))?\.cumsum\()", source
    )
    # Models of images and text count so only in what they generate.
    return counting is not None and "rope_deltas" not in source


def _relative_up_to(backbone: PreTrainedModel) -> float:
    names = _rope_types(backbone)
    # Some rotary embeddings change with the largest position, or from layer type to layer type.
    if not names or names & _LOOK_AT_LARGEST_POSITION or any(map(_normalizes_after_rotation, backbone.modules())):
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
    return "Rotary" in type(module).__name__ and bool(_rope_types(module) & _LOOK_AT_LARGEST_POSITION)


def _normalizes_after_rotation(layer: nn.Module) -> bool:
    """Whether a norm with weights follows the rotation of queries: scores then depend on positions, not distances."""
    _, rotates, rest = source_of(layer).partition("apply_rotary_pos_emb(")
    norms = re.findall(r"= self\.(\w*norm)\(query", rest) if rotates else []
    return any(list(getattr(layer, name).parameters()) for name in norms if hasattr(layer, name))


def source_of(layer: nn.Module) -> str:
    """The source of a layer's class and its bases, without those of torch; empty where it is not found."""
    return _source_of_class(type(layer))  # type: ignore[arg-type]


@functools.cache
def _source_of_class(layer_class: type) -> str:
    sources = []
    for base in layer_class.__mro__:
        if base not in (object, PreTrainedModel) and not base.__module__.startswith("torch."):
            try:
                of_module = _sources_of_classes(inspect.getsource(sys.modules[base.__module__]))
                sources.append(of_module.get(base.__qualname__) or inspect.getsource(base))
            except (KeyError, OSError, TypeError):  # a class from a notebook
                continue
    return "\n".join(sources)


@functools.cache
def _sources_of_classes(text: str) -> dict[str, str]:
    """Of the classes that the text of a module defines at its top. Before Python 3.13, `inspect` parses it again for
    each class.
    """
    lines = text.split("\n")  # as `ast` counts them: `splitlines` also ends them at form feeds
    classes = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
    starts = [min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) for node in classes]
    return {node.name: "\n".join(lines[start - 1 : node.end_lineno]) for node, start in zip(classes, starts)}
