"""Masks of models whose image tokens see each other. A rank has a part of an image: they are made of the whole row."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .. import bounds as _bounds
from ..integration import Mask
from .shard import Batch

__all__ = ["with_image_blocks"]

_MODEL_TYPES = {"gemma3"}
"""Models whose masks in training are those of generation's first step, which their classes make in a function of its
own. The tests compare each with one process.
"""


def with_image_blocks(model: PreTrainedModel, batch: Batch) -> Batch:
    """The batch with bounds for each type of layers, where the model would look up which tokens belong to images."""
    token_types = batch.by_token.get("token_type_ids")
    is_final = isinstance(batch.mask, dict) or (batch.mask is not None and batch.mask.ndim == 4)
    make = vars(type(model)).get("create_masks_for_generate")
    if token_types is None or is_final or model.config.model_type not in _MODEL_TYPES or make is None:
        return batch
    config = model.config.get_text_config()
    embeds = torch.empty((), dtype=model.dtype, device=batch.device)
    given = {
        "config": model.config,
        "inputs_embeds": embeds.expand(*token_types.shape, config.hidden_size),
        "attention_mask": batch.mask,
        "position_ids": batch.document_positions,
        "token_type_ids": token_types,
    }
    function = make.__func__
    # The cache and other arguments, whose names depend on the version of Transformers.
    parameters = inspect.signature(function).parameters.values()
    required = (p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD)
    masks = function(**dict.fromkeys(required) | given)
    return batch._replace(mask={kind: _bounds_of(mask, batch) for kind, mask in masks.items()})


def _bounds_of(mask: Mask, batch: Batch) -> Tensor:
    if mask.bounds is None:
        return _bounds.causal(batch.length, batch.length, device=batch.device)
    return mask.bounds
