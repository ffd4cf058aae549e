"""Labels of answers that share prompts -> the labels whose tokens one rank holds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..training.labels import IGNORED, AnswerLabels, LabelsOfRank
from .group import Group, add_up

__all__ = ["answers_of_rank"]


def answers_of_rank(labels: AnswerLabels, rows: Tensor, groups: Sequence[Group]) -> LabelsOfRank:
    """The host waits for the number of labels.

    Args:
        rows: `[N]`, rising, the tokens of each row that this rank holds.
        groups: of this rank, the dimensions of the mesh.
    """
    positions, tokens = labels["positions"], labels["tokens"]
    place, is_own = _find_answers_on_rank(rows, positions)
    is_own &= tokens != IGNORED
    # At least one, so that the gradients of all ranks take the same way.
    width = max(1, int(is_own.sum(1).max()))
    # As many labels as tokens would pass for logits of all tokens: then they are in the order of these.
    slot = torch.where(is_own, place if width == len(rows) else is_own.cumsum(1) - 1, width)

    def in_slots(values: Tensor, padding: int) -> Tensor:
        return values.new_full((len(values), width + 1), padding).scatter(1, slot, values)[:, :width].contiguous()

    last_place, is_here = _find_answers_on_rank(rows, labels["last"])

    def over_all_groups(values: Tensor) -> Tensor:
        for group in groups:
            values = add_up(values, group)
        return values

    return LabelsOfRank(
        labels,
        positions=in_slots(place, 0),
        tokens=in_slots(tokens, IGNORED),
        numbers=in_slots(torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens), 0),
        last=last_place.masked_fill(~is_here, -1),
        add_up=over_all_groups,
    )


def _find_answers_on_rank(rows: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Where the wanted tokens of a row are on this rank, and whether they are there."""
    place = torch.searchsorted(rows, wanted.contiguous()).clamp(max=len(rows) - 1)
    return place, rows[place] == wanted
