"""The collator that packs prompts with their answers as prefix trees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from torch import nn
from transformers import PreTrainedTokenizerBase, modeling_utils

from ..sharing.prefix_tree import from_sequences
from .evaluation import GivesPredictionsOfRows, refuse_predictions_of_rows
from .packing import PackingStrategy, pack_lengths
from .preference_examples import (
    TruncationMode,
    columns_of_preference_examples,
    tokenize_preference_example,
    truncate_preference_example,
)
from .preference_rows import PreferenceRow, TreeInPreferenceRow, labels_of_preference_rows, stack_rows
from .token_counts import count_tokens_in_trainer


@dataclass
class SharedPromptDataCollator(GivesPredictionsOfRows):
    """Pack prompts and their answers into rows that hold every prompt once.

    Examples are `{"prompt", "chosen", "rejected"}` or `{"prompt", "answers": [...]}`; a batch has one kind. The values
    of an example are

    * token ids,
    * strings. As in TRL 1.16, prompt and answer are tokenized together, and the answer ends with the EOS token;
    * or lists of chat messages, for the tokenizer's chat template, with the example's `tools` (a list or its JSON) and
      `chat_template_kwargs` if it has them. As in TRL, an answer begins at the first token at which its conversation
      differs from the prompt with a generation prompt.

    Examples may also have `ref_logps`, a log-probability for each answer from `compute_log_probs`, and `margin`, a
    number for each pair. Other columns are ignored. Set `TrainingArguments(remove_unused_columns=False)`, because
    Trainer takes all columns for unused.

    Each example is a prefix tree: its prompt, and a branch for each answer. A branch begins with a copy of the prompt's
    last token, so that every position predicts one token. Common beginnings of answers are merged too.

    Trainer's `include_num_input_tokens_seen="non_padding"` counts the tokens of the examples, a prompt once for each
    answer; "all" counts the positions of the rows, a prompt once.

    Args:
        tokenizer: for strings and chat messages; also tells which token pads.
        max_length: tokens of a row. The default is a single row for the whole batch, of any length.
        max_sequence_length: tokens of a prompt with one of its answers. Each longer sequence is truncated on its own,
            as with TRL's `max_length`. By default nothing is truncated.
        truncation_mode: "keep_start" cuts off ends of answers, "keep_end" beginnings of prompts. With "keep_end",
            answers of different lengths keep different parts of the prompt, which cannot be shared.
        max_branches: the largest number of answers that share one copy of their prompt. Models with sliding windows or
            chunks need a limit for groups of more than 15 answers: each branch takes one of the 16 intervals of bounds.
        pad_to_multiple_of: pad rows to a multiple of this many tokens.
        strategy: how examples are distributed over rows, see `hf_flashmask.training.pack_lengths`.

    Returns:
        When called with a list of examples, a dict with

        * `input_ids`, int64 `[B, N]`, and `position_ids`, int64 `[B, N]`, which count along each branch;
        * `attention_mask`, bounds, int32 `[B, 1, 1, N]`;
        * `labels`, `AnswerLabels`, for the losses of this module;
        * `logits_to_keep`, int64 `[B, L]`, the positions that predict answers: causal language models compute only
          their logits. With Transformers before 5.21 `[L]`, and absent with a `max_length`.

    Raises:
        TypeError: for a `tokenizer` that is none.
        ValueError: for an empty prompt or answer, a tree longer than `max_length`, a prompt that leaves no token of an
            answer; the message names the example.
    """

    tokenizer: PreTrainedTokenizerBase | None = None
    max_length: int | None = None
    max_sequence_length: int | None = None
    truncation_mode: TruncationMode = "keep_start"
    max_branches: int | None = None
    pad_to_multiple_of: int | None = None
    strategy: PackingStrategy = "first_fit_decreasing"

    def __post_init__(self) -> None:
        if self.tokenizer is not None and not hasattr(self.tokenizer, "apply_chat_template"):
            raise TypeError(
                f"`tokenizer` must be a tokenizer or None, got {type(self.tokenizer).__name__}: name other arguments, "
                "such as `max_length=`"
            )
        if self.truncation_mode not in get_args(TruncationMode):
            raise ValueError(
                f"`truncation_mode` must be one of {list(get_args(TruncationMode))}, got {self.truncation_mode!r}"
            )
        for name, least in (
            ("max_length", 2),
            ("max_sequence_length", 2),
            ("max_branches", 1),
            ("pad_to_multiple_of", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"`{name}` must be None or at least {least}, got {value}")
        count_tokens_in_trainer()
        if self.max_length is not None:
            refuse_predictions_of_rows()

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if not examples:
            raise ValueError("`examples` is empty: there is nothing to pack")
        columns = columns_of_preference_examples(examples)
        trees = [self._tree(number, example) for number, example in enumerate(examples)]
        lengths = [tree.length for tree in trees]
        if self.max_length is not None and max(lengths) > self.max_length:
            number = next(number for number, length in enumerate(lengths) if length > self.max_length)
            raise ValueError(
                f"example {number} of the batch needs a row of {lengths[number]} tokens for its prompt and "
                f"{len(trees[number].answers)} answers, but `max_length` is {self.max_length}: raise it, set "
                "`max_sequence_length`, or split the answers into several examples"
            )
        numbers = pack_lengths(lengths, self.max_length or sum(lengths), self.strategy)
        rows = [PreferenceRow.of([trees[number] for number in row], row) for row in numbers]
        row_length = max(len(row.input_ids) for row in rows)
        if self.pad_to_multiple_of is not None:
            row_length += -row_length % self.pad_to_multiple_of

        def pad_row(name: str, value: int) -> Any:
            values = stack_rows([getattr(row, name) for row in rows], value)
            return nn.functional.pad(values, (0, row_length - values.shape[1]), value=value)

        pad_token = getattr(self.tokenizer, "pad_token_id", None)
        labels = labels_of_preference_rows(rows, columns, examples)
        batch = {
            "input_ids": pad_row("input_ids", 0 if pad_token is None else pad_token),
            "position_ids": pad_row("position_ids", 0),
            # Padding is hidden, and sees nothing.
            "attention_mask": pad_row("subtree_ends", 0)[:, None, None, :],
            "labels": labels,
        }
        if SELECTS_BY_ROW:
            batch["logits_to_keep"] = labels["positions"]
        elif self.max_length is None:  # always a single row: Trainer joins the logits of several batches
            batch["logits_to_keep"] = labels["positions"][0]
        return batch

    def _tree(self, number: int, example: Mapping[str, Any]) -> TreeInPreferenceRow:
        sequences, start = tokenize_preference_example(number, example, self.tokenizer)
        limit = self.max_sequence_length or max(map(len, sequences))
        sequences, starts = truncate_preference_example(number, sequences, start, limit, self.truncation_mode)
        merged = from_sequences(sequences, one_label_per_token=True, max_branches=self.max_branches)
        return TreeInPreferenceRow.of(merged, sequences, starts)


SELECTS_BY_ROW = hasattr(modeling_utils, "slice_logits_to_keep")
"""Whether models take `logits_to_keep` `[B, L]`. Older ones take `[L]`, the same positions of all rows."""
