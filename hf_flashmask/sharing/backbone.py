"""The part of a model whose forward pass shares prefixes: where it is, and whether it can share."""

from __future__ import annotations

import inspect
import sys
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from ..integration import NAME
from ..integration.adapters import adapters_that_see_rows
from ..integration.layer_types import KEY_RANGE_OF_LAYER_TYPE
from .layer_source import source_of_layer

_ATTENTION_LAYER_TYPES = {"full_attention", *KEY_RANGE_OF_LAYER_TYPE}
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
        parts = _backbones_inside(inner)
        backbone = parts[0] if len(parts) == 1 else backbone
    # The head of OPT calls the decoder directly, past the model that only wraps it.
    while len(parts := _backbones_inside(backbone)) == 1 and _num_parameters(parts[0]) == _num_parameters(backbone):
        backbone = parts[0]
    return backbone


def _num_parameters(model: nn.Module) -> int:
    return len(list(model.parameters()))


def _backbones_inside(model: nn.Module) -> list[PreTrainedModel]:
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


def check_backbone_implementation(backbone: PreTrainedModel, asking: str = "share_prefixes") -> None:
    implementation = backbone.config.get_text_config()._attn_implementation
    if implementation != NAME:
        raise ValueError(
            f'{asking} needs attn_implementation="flashmask", {type(backbone).__name__} uses "{implementation}": '
            'call model.set_attn_implementation("flashmask") first'
        )


def check_backbone(backbone: PreTrainedModel, asking: str = "share_prefixes") -> None:
    """Raise unless the model can be called with prefix trees."""
    check_backbone_implementation(backbone, asking)
    name = type(backbone).__name__
    if any(getattr(module, "is_causal", True) is False for module in backbone.modules()):
        raise ValueError(f"{asking} needs a causal model; in {name} a token sees the ones after it")
    if backbone.config.is_encoder_decoder:
        raise ValueError(f"{asking} needs a decoder, {name} has an encoder as well")
    if found := mixing_outside_attention(backbone):
        raise NotImplementedError(
            f"{asking} cannot share what goes from token to token other than by attention: {name} has {found}"
        )
    modules = [sys.modules[base.__module__] for base in type(backbone).__mro__ if issubclass(base, PreTrainedModel)]
    if not any(hasattr(module, creator) for module in modules for creator in _MASK_CREATORS):
        raise NotImplementedError(f"{asking} cannot give {name} a mask: it makes its own")
    if not backbone_takes_position_ids(backbone):
        raise NotImplementedError(
            f"{asking} cannot tell {name} the positions of tokens: its forward takes no `position_ids`"
        )


def backbone_takes_position_ids(backbone: PreTrainedModel) -> bool:
    is_told = "position_ids" in inspect.signature(type(backbone).forward).parameters
    return is_told and "`position_ids` were provided but will be ignored" not in source_of_layer(backbone)


def mixing_outside_attention(model: PreTrainedModel) -> str:
    """Where tokens meet elsewhere than in attention, by name; empty if nowhere."""
    config: Any = model.config.get_text_config()
    other_layers = set(getattr(config, "layer_types", None) or ()) - _ATTENTION_LAYER_TYPES
    if getattr(config, "trigram_input", False):  # MobileBERT joins the embeddings of neighbours
        other_layers.add("trigram_input")
    convolutions = {type(module).__name__ for module in modules_of_backbone(model) if isinstance(module, nn.Conv1d)}
    found = ", ".join(sorted(other_layers | convolutions | adapters_that_see_rows(modules_of_backbone(model))))
    return found or ("a recurrent state" if model._is_stateful else "")


def modules_of_backbone(model: nn.Module) -> list[nn.Module]:
    """All modules. `modules()` takes several times as long, in every call."""
    found, seen = [model], {model}
    for module in found:
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return found
