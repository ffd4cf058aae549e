"""What the layers of a model attend under: `masks_of`."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import bounds
from .layer_mask import LayerMask


class _InspectedLayer(NamedTuple):
    module: nn.Module
    bounds: Tensor


_inspected: ContextVar[list[_InspectedLayer] | None] = ContextVar("_inspected", default=None)
"""The layers that the running `masks_of` has seen."""


def note_mask_of_layer(module: nn.Module, query: Tensor, key: Tensor, mask: LayerMask) -> None:
    """Tell a running `masks_of` of this thread what a layer attends under."""
    seen = _inspected.get()
    if seen is None:
        return
    made = mask.bounds
    if made is None:
        make = bounds.causal if mask.is_causal else bounds.bidirectional
        made = make(query.shape[2], key.shape[2], device=query.device)
    seen.append(_InspectedLayer(module, made.detach()))


def masks_of(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The bounds that each type of layer really uses for a batch, with its documents, windows and padding.

    Calls the model once, in the mode that it is in, without gradients and outside of what is compiled. The states of
    random numbers stay as they are. A cache in `batch` grows, as in any call: pass a copy of it.

    Args:
        model: a model of Transformers with `attn_implementation="flashmask"`.
        batch: the arguments of its call.

    Returns:
        int32 `[B or 1, H or 1, C, S_k]` by the type of the layer: that of the configuration's `layer_types`, or else
        the name of the layer's class. Where layers of one type differ, each mask has the path of its first layer after
        the type. A model of layer types takes them back as `attention_mask`, another one the single mask in them.
        `visualization.plot` and `to_text` draw them, `bounds.explain` reads them.

    Raises:
        ValueError: when no layer of the model attends with flashmask.

    ```python
    masks = hf_flashmask.masks_of(model, collator(rows))
    print(to_text(masks["sliding_attention"]))
    ```
    """
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    token = _inspected.set([])
    try:
        with torch.random.fork_rng(devices), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            model(**batch)
        seen = _inspected.get() or []
    finally:
        _inspected.reset(token)
    if not seen:
        raise ValueError('no layer of this model attends with flashmask: load it with attn_implementation="flashmask"')
    paths = {id(module): path for path, module in model.named_modules()}
    masks: dict[str, dict[str, Tensor]] = {}
    for module, made in seen:
        of_type = masks.setdefault(_inspected_layer_type(module), {})
        if not any(made.shape == other.shape and torch.equal(made, other) for other in of_type.values()):
            of_type[paths.get(id(module), str(len(of_type)))] = made
    return {
        name if len(of_type) == 1 else f"{name} ({path})": made
        for name, of_type in masks.items()
        for path, made in of_type.items()
    }


def _inspected_layer_type(module: nn.Module) -> str:
    layer_types = getattr(getattr(module, "config", None), "layer_types", None)
    index = getattr(module, "layer_idx", None)
    if layer_types and isinstance(index, int) and index < len(layer_types):
        return str(layer_types[index])
    return type(module).__name__
