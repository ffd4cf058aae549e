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
            _refuse(TypeError, "indexed them like a tensor")
        return super().__getitem__(name)

    def __getattr__(self, name: str) -> NoReturn:
        _refuse(AttributeError, f"asked for their `{name}`")

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> NoReturn:
        _refuse(TypeError, f"gave them to {getattr(function, '__name__', function)}()")


def _refuse(error: type[Exception], what: str) -> NoReturn:
    raise error(
        "the labels of SharedPromptDataCollator say where answers are, and only the losses of hf_flashmask read them, "
        f"but something {what}: call set_loss(model, ...) on the model that is trained, and leave out what computes "
        "another loss (`label_smoothing_factor`, `use_liger_kernel`, `compute_loss_func` of the training)"
    )
