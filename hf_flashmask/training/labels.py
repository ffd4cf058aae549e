"""Labels of rows that hold answers, and what is said when something takes them for a tensor of token ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

IGNORED = -100
"""A token that no loss counts, as in Transformers."""

NOTHING = -1
"""Padding of indices. Trainer pads with -100 when it joins batches of an evaluation: whatever is below 0 is padding."""


class AnswerLabels(dict[str, Tensor]):
    """Where the answers of B packed rows are: A answers, P pairs and L labels at most in a row.

    All indices are int64 and count within their row; less than 0 is padding.

    Items:
        positions: `[B, L]`, the places in the row that predict a token of an answer, padded with 0.
        tokens: int64 `[B, L]`, the tokens that they predict, padded with -100.
        answers: `[B, E]`, which of the L labels the tokens of the answers are, one answer after the other. Answers with
            a common beginning share labels.
        ends: `[B, A]`, where each answer ends in `answers`; it begins where the one before it ends.
        last: `[B, A]`, the place in the row of each answer's last token.
        example: `[B, A]`, the example of the batch that each answer belongs to. Answers of one example are in the same
            row, side by side, in the order in which they were given.
        pairs: `[B, P, 2]`, the chosen and the rejected answer of each pair. Absent when the examples were lists of
            answers.
        margin: float32 `[B, P]`, by how much the chosen answer is better. Only when the examples have it.
        ref_logps: int32 `[B, A]`, the bits of float32 numbers; `reference_log_probs` reads them. Only when the examples
            have it.
    """

    def tensors(self) -> AnswerLabels:
        """The labels that `compute_metrics` of Trainer gets, which hold NumPy arrays, as losses take them."""
        return AnswerLabels({name: torch.as_tensor(value) for name, value in self.items()})

    def __getitem__(self, name: str) -> Tensor:
        if not isinstance(name, str):
            _refuse_labels_as_tensor(TypeError, "indexed them like a tensor")
        return super().__getitem__(name)

    def __getattr__(self, name: str) -> NoReturn:
        _refuse_labels_as_tensor(AttributeError, f"asked for their `{name}`")

    def __reduce__(self) -> tuple[Any, ...]:
        """As a call with a plain dict, which `torch.load(weights_only=True)` can make."""
        return type(self), (dict(self),)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> NoReturn:
        _refuse_labels_as_tensor(TypeError, f"gave them to {getattr(function, '__name__', function)}()")


class LabelsOfRank:
    """The labels of a batch whose rows several ranks share out. It reads like the `AnswerLabels` of the whole batch.

    The losses of this package make values of the tokens that this rank holds, and add up those of all ranks: each rank
    gets the values of all answers. N tokens of each row are here, L of the K labels of the whole row.

    Attributes:
        whole: those of the whole batch.
        positions: int64 `[B, L]`, the places among the tokens of this rank that predict tokens of answers.
        tokens: int64 `[B, L]`, the tokens that they predict, -100 for padding.
        numbers: int64 `[B, L]`, which of the K labels these are.
        last: int64 `[B, A]`, the places among the tokens of this rank of the answers' last tokens, -1 if they are
            elsewhere.
        add_up: the sum of a tensor over the ranks, with gradients.
    """

    # Engines rebuild dataclasses and dictionaries on their way to the model, and would drop what they do not know.
    def __init__(
        self,
        whole: AnswerLabels,
        *,
        positions: Tensor,
        tokens: Tensor,
        numbers: Tensor,
        last: Tensor,
        add_up: Callable[[Tensor], Tensor],
    ) -> None:
        self.whole, self.positions, self.tokens, self.numbers, self.last = whole, positions, tokens, numbers, last
        self.add_up = add_up

    def __getitem__(self, name: str) -> Tensor:
        return self.whole[name]

    def __contains__(self, name: object) -> bool:
        return name in self.whole

    def __getattr__(self, name: str) -> NoReturn:
        _refuse_labels_as_tensor(AttributeError, f"asked for their `{name}`")

    __torch_function__ = AnswerLabels.__torch_function__

    def gather_labels(self, values: Tensor) -> Tensor:
        """`[B, L]` of each rank, 0 for padding -> `[B, K]` on all of them."""
        return self.add_up(values.new_zeros(self.whole["tokens"].shape).scatter_add(1, self.numbers, values))


def _refuse_labels_as_tensor(error: type[Exception], what: str) -> NoReturn:
    raise error(
        "the labels of SharedPromptDataCollator say where answers are, and only the losses of hf_flashmask read them, "
        f"but something {what}: call set_loss(model, ...) on the model that is trained, and leave out what computes "
        "another loss (`label_smoothing_factor`, `use_liger_kernel`, `compute_loss_func` of the training)"
    )
