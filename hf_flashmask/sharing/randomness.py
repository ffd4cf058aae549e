"""Random numbers that a model draws in training mode. Rows that share a token would draw them once instead of each."""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .backbone import modules_of_backbone
from .layer_source import source_of_layer

_WORDS = ("drop", "jitter", "noise")
_ATTRIBUTES_OF_MODULES = frozenset(vars(nn.Module()))


def refuse_randomness(backbone: PreTrainedModel) -> None:
    """Raise when the backbone drops activations, or adds noise, naming all settings that have to be 0."""
    if backbone.training and backbone.config.get_text_config().model_type == "phimoe":
        raise NotImplementedError(
            "share_prefixes cannot share tokens while Phi-MoE trains: its routers draw random numbers for every token"
        )
    layers_of_class: dict[type, list[Any]] = defaultdict(list)
    for module in modules_of_backbone(backbone):
        layers_of_class[type(module)].append(module)
    pvera = (kind for kind in layers_of_class if kind.__module__.startswith("peft.tuners.pvera"))
    if any(_pvera_draws_random_numbers(layer) for kind in pvera for layer in layers_of_class[kind]):
        raise NotImplementedError(
            "share_prefixes cannot share tokens under PVeRA of PEFT, which draws random numbers for every token: use "
            "VeRA, or evaluation mode with `sample_at_inference=False`"
        )
    settings = dict.fromkeys(_settings_of_randomness(backbone, layers_of_class))
    if not settings:
        return
    places: dict[str, list[str]] = {}
    for setting, place in settings:
        places.setdefault(place, []).append(setting)
    advice = "; ".join(
        f"set {', '.join(names)} in {place}{_when_to_set_dropout(place, names)}" for place, names in places.items()
    )
    raise NotImplementedError(
        "share_prefixes cannot share tokens under dropout or noise, which differ from row to row in training: "
        f"{advice}. Evaluation mode needs none of this"
    )


def _pvera_draws_random_numbers(layer: Any) -> bool:
    if getattr(layer, "disable_adapters", True):
        return False
    return any(layer.training or layer.sample_at_inference.get(name) for name in layer.active_adapters)


def _when_to_set_dropout(place: str, names: list[str]) -> str:
    """Layers copy their settings when they are made."""
    if place != "the config":
        return ""
    return f" before the model is made, as from_pretrained(..., {', '.join(names)}) does"


def _settings_of_randomness(
    backbone: PreTrainedModel, layers_of_class: Mapping[type, list[Any]]
) -> Iterator[tuple[str, str]]:
    """For everything random, the setting that stops it, and where the user finds that setting."""
    random: list[tuple[Any, str]] = []
    for layer_class, layers in layers_of_class.items():
        training = [layer for layer in layers if layer.training]
        random += _random_attributes(layer_class, training)
        for setting in _settings_read_in_training(source_of_layer(layers[0])):
            if any(_draws_random_numbers(getattr(getattr(layer, "config", None), setting, None)) for layer in training):
                yield f"{setting}=0.0", "the config"
    names = {layer: name for name, layer in backbone.named_modules()} if random else {}
    for layer, attribute in random:
        name = names[layer]
        if isinstance(layer, nn.modules.dropout._DropoutNd):
            owner, _, attribute = name.rpartition(".")
            yield _setting_of_random_attribute(backbone, name, backbone.get_submodule(owner), attribute, layer.p)
        else:
            yield _setting_of_random_attribute(
                backbone, f"{name}.{attribute}", layer, attribute, vars(layer)[attribute]
            )


def _random_attributes(layer_class: type, layers: list[Any]) -> Iterator[tuple[Any, str]]:
    """The attributes that make layers of one class random. Names are looked at once for all layers: they are many."""
    if issubclass(layer_class, nn.modules.dropout._DropoutNd):
        yield from ((layer, "p") for layer in layers if layer.p > 0)
        return
    names = set().union(*map(vars, layers)) - _ATTRIBUTES_OF_MODULES
    for name in sorted(filter(_is_random, names)):
        yield from ((layer, name) for layer in layers if _draws_random_numbers(vars(layer).get(name)))


def _setting_of_random_attribute(
    backbone: PreTrainedModel, name: str, owner: nn.Module, attribute: str, value: float
) -> tuple[str, str]:
    if "neftune" in attribute:
        return "neftune_noise_alpha=None", "the training arguments"
    if "lora_dropout" in name:
        return "lora_dropout=0.0", "the LoraConfig"
    config: Any = getattr(owner, "config", None) or backbone.config.get_text_config()
    assigned = re.search(rf"self\.{attribute}\b[^=\n]*=[^=]\s*[^\n]*?\n?[^\n]*?config\.(\w+)", source_of_layer(owner))
    if assigned is not None and getattr(config, assigned[1], None) == value:
        return f"{assigned[1]}=0.0", "the config"
    # What the layer was made with is not read off its source: every setting of this kind that has the value.
    same = [key for key, other in config.to_dict().items() if _is_random(key) and other == value]
    if same:
        return ", ".join(f"{key}=0.0" for key in same), "the config"
    return f"`{name}` = 0", f"the model ({type(owner).__name__})"


@functools.cache
def _settings_read_in_training(source: str) -> tuple[str, ...]:
    """Settings that layers read off their configuration while they compute, on the line of what depends on training."""
    lines = [line for line in source.splitlines() if "training" in line]
    settings = dict.fromkeys(re.findall(r"self\.config\.(\w+)", "\n".join(lines)))
    return tuple(setting for setting in settings if _is_random(setting))


@functools.cache
def _is_random(name: str) -> bool:
    return any(word in name.lower() for word in _WORDS)


def _draws_random_numbers(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
