"""Numbers of tokens in Trainer's logs. Trainer adds up `attention_mask`, but bounds are not ones and zeros."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .labels import AnswerLabels
from .trainer_methods import wrap_in_trainer


def count_tokens_in_trainer() -> None:
    """Make `include_num_input_tokens_seen="non_padding"` count the tokens of batches with bounds. Again is harmless.

    Other batches are counted as before.
    """
    wrap_in_trainer("_track_num_input_tokens", _counting_tokens)


def _counting_tokens(original: Callable[..., Any]) -> Callable[..., Any]:
    def track(self: Any, inputs: Any) -> Any:
        num_tokens = _num_tokens_for_trainer(inputs)
        return original(self, inputs if num_tokens is None else {**inputs, "attention_mask": num_tokens})

    return track


def _num_tokens_for_trainer(inputs: Any) -> Tensor | None:
    """`num_given_tokens`; None where there are no bounds."""
    is_padding = padding_of_counted_batch(inputs)
    return None if is_padding is None else num_given_tokens(inputs, is_padding)


def num_given_tokens(inputs: Mapping[str, Any], is_padding: Tensor) -> Tensor:
    """The tokens that the examples of a batch had, a prompt once for each answer."""
    labels = inputs.get("labels")
    if not isinstance(labels, AnswerLabels):
        return (~is_padding).sum()
    last = labels["last"]
    return (inputs["position_ids"].gather(1, last.clamp(min=0)) + 1).masked_fill(last < 0, 0).sum()


def padding_of_counted_batch(inputs: Any) -> Tensor | None:
    """Where a batch with bounds of a collator of ours has padding, bool `[B, S]`; None where there are no bounds."""
    if not isinstance(inputs, Mapping):
        return None
    bounds = inputs.get("attention_mask")
    if isinstance(bounds, Mapping):
        bounds = next(iter(bounds.values()))
    if not isinstance(bounds, Tensor) or bounds.ndim != 4 or bounds.dtype != torch.int32:
        return None
    # LTS of a token is more than its own row, LTS of padding 0.
    return bounds[:, 0, 0] <= torch.arange(bounds.shape[-1], device=bounds.device)
