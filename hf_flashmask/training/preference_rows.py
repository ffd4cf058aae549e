"""Examples as prefix trees, trees side by side in rows, and the labels of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..sharing.prefix_tree import PrefixTree
from .labels import IGNORED, NOTHING, AnswerLabels


class TreeInPreferenceRow(NamedTuple):
    """An example as one piece of a row.

    Attributes:
        merged: its sequences.
        positions: `[L]`, ascending, the places that predict tokens of answers.
        tokens: `[L]`, the tokens that they predict.
        answers: for each answer which of these are its own.
        last: `[A]`, the places of the last tokens.
    """

    merged: PrefixTree
    positions: Tensor
    tokens: Tensor
    answers: list[Tensor]
    last: Tensor

    @classmethod
    def of(cls, merged: PrefixTree, sequences: list[list[int]], starts: list[int]) -> TreeInPreferenceRow:
        """`starts` are the numbers of tokens of the prompt in each sequence."""
        parts = list(zip(merged.index, sequences, starts))
        predicting = [index[start - 1 : len(sequence) - 1] for index, sequence, start in parts]
        predicted = [torch.tensor(sequence[start:]) for _, sequence, start in parts]
        positions, label = torch.cat(predicting).unique(return_inverse=True)
        tokens = torch.empty_like(positions)
        tokens[label] = torch.cat(predicted)  # answers that share a position predict the same token there
        answers = list(label.split([len(part) for part in predicting]))
        last = torch.stack([index[len(sequence) - 1] for index, sequence, _ in parts])
        return cls(merged, positions, tokens, answers, last)

    @property
    def length(self) -> int:
        return self.merged.input_ids.shape[1]


class PreferenceRow(NamedTuple):
    """Trees side by side. The names are those of `AnswerLabels`."""

    input_ids: Tensor
    position_ids: Tensor
    subtree_ends: Tensor
    positions: Tensor
    tokens: Tensor
    answers: Tensor
    ends: Tensor
    last: Tensor
    example: Tensor

    @classmethod
    def of(cls, trees: list[TreeInPreferenceRow], numbers: list[int]) -> PreferenceRow:
        """`numbers` are those of the examples in the batch."""
        places = [0, *torch.tensor([tree.length for tree in trees]).cumsum(0).tolist()]
        labels = [0, *torch.tensor([len(tree.positions) for tree in trees]).cumsum(0).tolist()]
        answers = [answer + label for tree, label in zip(trees, labels) for answer in tree.answers]
        return cls(
            input_ids=torch.cat([tree.merged.input_ids[0] for tree in trees]),
            position_ids=torch.cat([tree.merged.position_ids[0] for tree in trees]),
            subtree_ends=torch.cat([tree.merged.bounds[0, 0, 0] + place for tree, place in zip(trees, places)]),
            positions=torch.cat([tree.positions + place for tree, place in zip(trees, places)]),
            tokens=torch.cat([tree.tokens for tree in trees]),
            answers=torch.cat(answers),
            ends=torch.tensor([len(answer) for answer in answers]).cumsum(0),
            last=torch.cat([tree.last + place for tree, place in zip(trees, places)]),
            example=torch.cat([torch.full_like(tree.last, number) for tree, number in zip(trees, numbers)]),
        )


def labels_of_preference_rows(
    rows: Sequence[PreferenceRow], columns: set[str], examples: Sequence[Mapping[str, Any]]
) -> AnswerLabels:
    padding = {"positions": 0, "tokens": IGNORED, "answers": NOTHING, "ends": NOTHING, "last": NOTHING}
    padding["example"] = NOTHING
    labels = AnswerLabels(
        {name: stack_rows([getattr(row, name) for row in rows], value) for name, value in padding.items()}
    )
    if "chosen" in columns:
        labels["pairs"] = _pairs_in_rows(labels["example"])
    if "ref_logps" in columns:
        # Under DeepSpeed, Trainer rounds all floating point inputs to the dtype of the weights, which the sum of many
        # log-probabilities does not survive.
        values = _ref_logps_of_examples(examples, labels["example"])
        labels["ref_logps"] = _ref_logps_in_rows(values, labels["example"]).view(torch.int32)
    if "margin" in columns:
        margins = torch.tensor([float(example["margin"]) for example in examples])
        pair_example = labels["example"][:, ::2]
        labels["margin"] = margins[pair_example].masked_fill(pair_example == NOTHING, 0.0)
    return labels


def stack_rows(values: Sequence[Tensor], value: int) -> Tensor:
    """Rows of different lengths as one tensor, `value` after the shorter ones."""
    return pad_sequence(list(values), batch_first=True, padding_value=value)


def _ref_logps_of_examples(examples: Sequence[Mapping[str, Any]], answer_example: Tensor) -> list[list[float]]:
    values = [[float(value) for value in example["ref_logps"]] for example in examples]
    for number, row in enumerate(values):
        num_answers = int((answer_example == number).sum())
        if len(row) != num_answers:
            raise ValueError(
                f"`ref_logps` of example {number} of the batch must have one value for each of its {num_answers} "
                f"answers, got {len(row)}"
            )
    return values


def _ref_logps_in_rows(values: list[list[float]], example: Tensor) -> Tensor:
    """Values by example -> float32 `[B, A]`."""
    rows = [torch.tensor([value for number in _examples_in_row(row) for value in values[number]]) for row in example]
    return pad_sequence(rows, batch_first=True)


def _examples_in_row(row: Tensor) -> list[int]:
    """The examples of a row in their order, without padding."""
    return list(dict.fromkeys(number for number in row.tolist() if number != NOTHING))


def _pairs_in_rows(example: Tensor) -> Tensor:
    """`[B, P, 2]`. The two answers of an example stand side by side."""
    pairs = torch.arange(example.shape[1]).expand_as(example)
    return torch.where(example == NOTHING, NOTHING, pairs).unflatten(1, (-1, 2))
