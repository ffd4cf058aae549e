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

from .arguments import by_name
from .hooks import set_hook
from .mask import Mask
from .name import NAME

__all__ = ["keep_documents_under_mrope", "takes_text_positions", "with_text_positions"]


def keep_documents_under_mrope(model: PreTrainedModel, implementation: str) -> None:
    """Add the hook to a model that needs it and uses flashmask now, or remove it."""
    set_hook(model, _add_text_positions, is_needed=implementation == NAME and takes_text_positions(model))


def takes_text_positions(model: PreTrainedModel) -> bool:
    """Whether the first of four planes of positions tells the mask about documents."""
    return _has_fourth_plane(type(model))  # type: ignore[arg-type]


@functools.cache
def _has_fourth_plane(model_class: type) -> bool:
    try:
        return "position_ids.shape[0] == 4" in inspect.getsource(inspect.unwrap(vars(model_class)["forward"]))
    except (KeyError, OSError, TypeError):
        return False


def _add_text_positions(
    model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """A forward pre-hook: `position_ids` `[3, B, S]` or `[B, S]` become `[4, B, S]`."""
    kwargs = by_name(model, args, kwargs)
    position_ids = kwargs.get("position_ids")
    if not isinstance(position_ids, Tensor) or model.config._attn_implementation != NAME:
        return None
    if position_ids.ndim == 2:
        position_ids = position_ids.expand(4, -1, -1)
    elif position_ids.ndim == 3 and position_ids.shape[0] == 3:
        position_ids = with_text_positions(position_ids, _tokens_of_call(position_ids.shape[2], kwargs))
    else:
        return None
    return (), {**kwargs, "position_ids": position_ids}


def with_text_positions(position_ids: Tensor, is_token: Tensor | None) -> Tensor:
    """`[3, B or 1, S]` -> `[4, B or 1, S]`, the first plane counting tokens; `is_token` is bool `[B, S]`."""
    if is_token is not None:
        position_ids = position_ids.expand(3, max(position_ids.shape[1], is_token.shape[0]), -1)
    return torch.cat([_text_positions_of_documents(position_ids, is_token)[None], position_ids])


def _tokens_of_call(length: int, kwargs: dict[str, Any]) -> Tensor | None:
    """Which of the call's tokens are no padding: bool `[B, S]`. None where nothing tells."""
    mask = kwargs.get("attention_mask")
    if isinstance(mask, dict):
        mask = next(iter(mask.values()), None)
    cache = kwargs.get("cache", kwargs.get("past_key_values"))  # the second is its name until Transformers 5.23
    if isinstance(mask, Mask) and mask.is_token is not None and mask.place is not None:
        is_token, first = mask.is_token, mask.place.q_offset - mask.place.kv_offset
    elif isinstance(mask, Tensor) and mask.ndim == 2:
        is_token, first = mask.ne(0), 0 if cache is None else cache.get_seq_length()
    else:
        return None
    column = torch.arange(length, device=is_token.device) + first
    return is_token[:, column.clamp(0, is_token.shape[1] - 1)]


def _text_positions_of_documents(position_ids: Tensor, is_token: Tensor | None) -> Tensor:
    """The place of each token in its document, `[B, S]`.

    A document starts where all three positions are 0, or those of the row's first token. Time alone does not tell: it
    is the same for all patches of an image, and goes back and forth where sound and video alternate. Documents that do
    not start at 0 count from 1: beside a cache they continue it, and those that start at 0 do not.
    """
    row = torch.arange(position_ids.shape[2], device=position_ids.device)
    first = position_ids[:, :, :1]
    if is_token is not None:
        is_token = is_token.to(position_ids.device)
        first_row = is_token.byte().argmax(1, keepdim=True)
        first = position_ids.gather(2, first_row.expand(3, position_ids.shape[1], 1))
    starts_at_0 = (position_ids == 0).all(0)
    starts = starts_at_0 | (position_ids == first).all(0)
    if is_token is not None:
        starts = starts & is_token
    start = torch.where(starts, row, 0).cummax(1).values
    return row - start + (~starts_at_0).gather(1, start)
