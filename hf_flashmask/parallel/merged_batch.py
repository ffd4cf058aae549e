"""Batches whose common prefixes `share_prefixes` computes once: merged before they are cut."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..sharing.shared_prefix import merge_by_share_prefixes
from ..training.labels import IGNORED

__all__ = ["LabelsOfMergedBatch", "MergedBatch", "merge_batch"]


class LabelsOfMergedBatch(NamedTuple):
    """Labels of a padded batch in the row that its rows were merged into: a token may have one from each of them.

    Attributes:
        places: int64 `[K]`, in the row.
        tokens: int64 `[K]`, the tokens that are predicted there.
    """

    places: Tensor
    tokens: Tensor

    def of_rank(self, rows: Tensor) -> LabelsOfMergedBatch:
        """Those of the tokens `rows`, rising, by their places among these. The host waits for their number."""
        place = torch.searchsorted(rows, self.places).clamp(max=len(rows) - 1)
        is_own = rows[place] == self.places
        if not is_own.any():  # one that does not count, so that the gradients of all ranks take the same way
            return LabelsOfMergedBatch(place.new_zeros(1), self.tokens.new_full((1,), IGNORED))
        return LabelsOfMergedBatch(place[is_own], self.tokens[is_own])


class MergedBatch(NamedTuple):
    """A padded batch as one row.

    Attributes:
        arguments: of the model, without labels.
        labels: of all rows.
        depth: `[1, N]`, in which windows along the branches count.
    """

    arguments: dict[str, Any]
    labels: LabelsOfMergedBatch
    depth: Tensor


def merge_batch(model: PreTrainedModel, batch: Mapping[str, Any]) -> MergedBatch | None:
    """None where `share_prefixes` leaves the batch alone.

    Raises:
        NotImplementedError, ValueError: for batches of which no loss could be exact.
    """
    tree = merge_by_share_prefixes(model, batch)
    if tree is None:
        return None
    labels, shifted = batch.get("labels"), batch.get("shift_labels")
    if shifted is None and isinstance(labels, Tensor):
        shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    name = type(model).__name__
    if not isinstance(shifted, Tensor) or "logits_to_keep" not in inspect.signature(type(model).forward).parameters:
        raise NotImplementedError(
            f"share_prefixes under sequence_parallel merges the rows of a batch before it cuts them, and computes the "
            f"loss of `labels` by `logits_to_keep`: the batch has {sorted(batch)}, and {name} must take it. Remove "
            "share_prefixes for losses of your own, or use SharedPromptDataCollator with set_loss"
        )
    has_label = shifted != IGNORED
    if (has_label & (tree.index < 0)).any():
        raise ValueError(
            "`labels`: padding of this batch predicts tokens, which share_prefixes does not compute: set the label of "
            "the first token of each row to -100"
        )
    merged = {key: value for key, value in batch.items() if "labels" not in key}
    merged |= {"input_ids": tree.input_ids, "position_ids": tree.position_ids, "attention_mask": tree.bounds}
    return MergedBatch(merged, LabelsOfMergedBatch(tree.index[has_label], shifted[has_label]), tree.depth)
