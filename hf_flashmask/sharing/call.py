"""A call of the backbone: whether its rows can be merged, and what would make that inexact."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
from transformers.utils import TransformersKwargs

from ..integration import flashmask_attention_forward
from ..integration.adapters import adapters_that_see_rows
from .backbone import check_backbone_implementation, modules_of_backbone
from .layer_source import source_of_layer
from .randomness import refuse_randomness
from .traits import Traits

_ARGUMENTS_OF_ALL_MODELS = {
    *inspect.signature(flashmask_attention_forward).parameters,
    *FlashAttentionKwargs.__annotations__,
    *TransformersKwargs.__annotations__,
} - {"kwargs"}


def call_has_cache(arguments: Mapping[str, Any]) -> bool:
    caches = (arguments.get("past_key_values"), arguments.get("cache"))  # its name since Transformers 5.24
    return any(cache is not None for cache in caches) or bool(arguments.get("use_cache"))


def is_padded_batch(arguments: Mapping[str, Any]) -> bool:
    """Whether this is a padded batch of several rows, and none that was packed before."""
    input_ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
    return (input_ids is None or (input_ids.ndim == 2 and input_ids.shape[0] > 1)) and (
        mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)
    )


def check_call(backbone: PreTrainedModel, arguments: Mapping[str, Any]) -> None:
    check_backbone_implementation(backbone)
    config = backbone.config.get_text_config()
    given = arguments.get("output_router_logits")
    if given or (given is None and getattr(config, "output_router_logits", False)):
        raise NotImplementedError(
            "share_prefixes cannot honour `output_router_logits=True`: it would count shared tokens once and padding "
            "never"
        )
    if adapters := ", ".join(
        sorted(adapters_that_see_rows(modules_of_backbone(backbone)))
    ):  # that came after the hooks
        raise NotImplementedError(
            f"share_prefixes cannot share tokens under {adapters}: what it makes of a token depends on other tokens of "
            "the batch; use LoRA without `alora_invocation_tokens`, or another adapter"
        )
    for name, value in arguments.items():
        is_known = name in ("input_ids", "attention_mask", "position_ids") or "labels" in name
        if (
            not is_known
            and any(tensor.ndim > 0 for tensor in _tensors_in_argument(value))
            and _reads_call_argument(backbone, name)
        ):
            raise NotImplementedError(
                f"share_prefixes compares rows by their token ids and cannot tell where `{name}` differs; call the "
                "model without it, or without share_prefixes"
            )
    if arguments.get("input_ids") is None:
        raise NotImplementedError("share_prefixes compares rows by their token ids: pass `input_ids`")
    refuse_randomness(backbone)


def _tensors_in_argument(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, Mapping)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors_in_argument(part)


def _reads_call_argument(backbone: PreTrainedModel, name: str) -> bool:
    """Whether some layer could read this argument. Trainers pass columns that only their losses read (`margin`)."""
    if name in _ARGUMENTS_OF_ALL_MODELS:
        return True
    word = re.compile(rf"\b{re.escape(name)}\b")
    return any(word.search(source_of_layer(layer)) for layer in backbone.modules())


def positions_of_call(arguments: Mapping[str, Any], traits: Traits, name: str) -> Tensor | None:
    """The positions of the padded batch, or None where those that count from each row's first token do the same."""
    position_ids: Tensor | None = arguments.get("position_ids")
    input_ids, mask = arguments["input_ids"], arguments.get("attention_mask")
    if position_ids is not None:
        if position_ids.ndim != 2:
            raise NotImplementedError(
                f"share_prefixes needs `position_ids` [B or 1, S], got {list(position_ids.shape)}: leave them out"
            )
        return position_ids
    if traits.counts_by_token_ids:
        raise NotImplementedError(
            f"share_prefixes does not know how {name} counts positions: pass `position_ids` [B or 1, S]"
        )
    is_relative = input_ids.shape[1] <= traits.relative_up_to
    if traits.counts_visible_tokens and mask is not None:
        is_visible = mask.long()
        position_ids = is_visible.cumsum(1) - 1
        return position_ids.masked_fill(is_visible == 0, 1 if is_relative else -1)
    if is_relative:
        return None
    return torch.arange(input_ids.shape[1], device=input_ids.device)[None]
