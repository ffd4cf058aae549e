"""`compute_log_probs`: the log-probabilities of all answers of a dataset."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .branches import follow_branches
from .labels import AnswerLabels
from .losses import answer_log_probs
from .preference_collator import SharedPromptDataCollator


@torch.no_grad()
def compute_log_probs(
    model: nn.Module,
    dataset: Sequence[Mapping[str, Any]],
    data_collator: SharedPromptDataCollator,
    *,
    batch_size: int = 8,
) -> list[list[float]]:
    """The log-probability of every answer of a dataset under a model in evaluation mode, without gradients.

    Log-probabilities of the reference model, computed once before training, save its memory and its forward passes:

        dataset = dataset.add_column("ref_logps", compute_log_probs(model, dataset, data_collator))

    With adapters, call it within `model.disable_adapter()`; when the training uses autocast, within the same autocast.

    Args:
        dataset: examples for `data_collator`.
        data_collator: the collator of the training, because it decides what is truncated.
        batch_size: examples computed at a time.

    Returns:
        For each example one number for each answer, in the given order; the chosen answer comes before the rejected.

    Raises:
        ValueError, NotImplementedError: for a model that `set_loss` refuses because answers in a row would change.
    """
    device, training = next(model.parameters()).device, model.training
    hook = follow_branches(model, "compute_log_probs")
    model.eval()
    try:
        return [
            values
            for first in range(0, len(dataset), batch_size)
            for values in _log_probs_by_example(
                model, data_collator([dataset[i] for i in range(first, min(first + batch_size, len(dataset)))]), device
            )
        ]
    finally:
        model.train(training)
        hook.remove()


def _log_probs_by_example(model: nn.Module, batch: dict[str, Any], device: torch.device) -> Iterator[list[float]]:
    labels = AnswerLabels({name: value.to(device) for name, value in batch.pop("labels").items()})
    inputs = {name: value.to(device) for name, value in batch.items()}
    log_probs = answer_log_probs(model(**inputs, use_cache=False).logits, labels)
    values: dict[int, list[float]] = {}
    for example, value in zip(labels["example"].flatten().tolist(), log_probs.flatten().tolist()):
        values.setdefault(example, []).append(value)
    return (values[example] for example in sorted(values) if example >= 0)
