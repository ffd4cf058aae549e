"""Packed documents in models whose positions have three dimensions: time, height and width (multimodal RoPE).

Their text models tell the mask about documents only where `position_ids` are `[4, B, S]`, of which the first plane
counts tokens. Without it the documents of `[3, B, S]`, and in some models those of `[B, S]`, would be dropped: a hook
adds the plane.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .name import NAME

__all__ = ["keep_documents"]


def keep_documents(model: PreTrainedModel) -> None:
    """Add the hook to a model that needs it; again is harmless."""
    takes = _takes_text_positions(type(model))  # type: ignore[arg-type]
    if takes and _add_text_positions not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_add_text_positions, with_kwargs=True)


@functools.cache
def _takes_text_positions(model_class: type) -> bool:
    try:
        return "position_ids.shape[0] == 4" in inspect.getsource(inspect.unwrap(vars(model_class)["forward"]))
    except (KeyError, OSError, TypeError):
        return False


def _add_text_positions(
    model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """A forward pre-hook: `position_ids` `[3, B, S]` or `[B, S]` become `[4, B, S]`."""
    if args:
        kwargs = {**dict(zip(list(inspect.signature(model.forward).parameters), args)), **kwargs}
    position_ids = kwargs.get("position_ids")
    if not isinstance(position_ids, Tensor) or model.config._attn_implementation != NAME:
        return None
    if position_ids.ndim == 2:
        position_ids = position_ids.expand(4, -1, -1)
    elif position_ids.ndim == 3 and position_ids.shape[0] == 3:
        text_positions = _count_in_documents(position_ids, kwargs.get("attention_mask"))
        position_ids = torch.cat([text_positions[None], position_ids])
    else:
        return None
    return (), {**kwargs, "position_ids": position_ids}


def _count_in_documents(position_ids: Tensor, attention_mask: Any) -> Tensor:
    """The place of each token in its document, `[B, S]`.

    A document starts where all three positions are those of the row's first token. Time alone does not tell: it is
    the same for all patches of an image, and goes back and forth where sound and video alternate.
    """
    length = position_ids.shape[2]
    row = torch.arange(length, device=position_ids.device)
    first = position_ids[:, :, :1]
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2 and attention_mask.shape[1] == length:
        first_token = attention_mask.ne(0).byte().argmax(1, keepdim=True).to(position_ids.device)
        first = position_ids.gather(2, first_token.expand(3, position_ids.shape[1], 1))
    starts = (position_ids == first).all(0)
    return row - torch.where(starts, row, 0).cummax(1).values
