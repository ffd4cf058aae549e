"""The collator that packs prompts with their answers as prefix trees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypedDict, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase, modeling_utils
from transformers.utils import logging

from ..sharing.prefix_tree import PrefixTree, from_sequences
from .packing import PackingStrategy, pack_lengths

logger = logging.get_logger(__name__)

TruncationMode = Literal["keep_start", "keep_end"]


IGNORED = -100  # a token that no loss counts, as in Transformers


NOTHING = -1  # padding of indices


class AnswerLabels(TypedDict, total=False):
    """Where the answers of B packed rows are: A answers, P pairs and L labels at most in a row.

    All indices are int64 and count within their row; -1 is padding.

    Attributes:
        positions: `[B, L]`, the places in the row that predict a token of an answer, padded with 0.
        tokens: int64 `[B, L]`, the tokens that they predict, padded with -100.
        answers: `[B, A, T]`, for each answer which of the L labels are its T tokens. Answers with a common beginning
            share labels.
        last: `[B, A]`, the place in the row of each answer's last token.
        example: `[B, A]`, the example of the batch that each answer belongs to. Answers of one example are in the same
            row, side by side, in the order in which they were given.
        pairs: `[B, P, 2]`, the chosen and the rejected answer of each pair. Absent when the examples were lists of
            answers.
        margin: float32 `[B, P]`, by how much the chosen answer is better. Only when the examples have it.
        ref_logps: int32 `[B, A]`, the bits of float32 numbers; `reference_log_probs` reads them. Only when the examples
            have it.
    """

    positions: Tensor
    tokens: Tensor
    answers: Tensor
    last: Tensor
    example: Tensor
    pairs: Tensor
    margin: Tensor
    ref_logps: Tensor


@dataclass
class SharedPromptDataCollator:
    """Packs prompts and their answers into rows in which every prompt occurs once.

    Examples are `{"prompt", "chosen", "rejected"}` or `{"prompt", "answers": [...]}`, all of a batch of the same kind.
    Their values are

    * token ids,
    * strings. As in TRL 1.16, prompt and answer are tokenized together, and the answer ends with the EOS token;
    * or lists of chat messages, which go through the tokenizer's chat template, with the example's `tools` and
      `chat_template_kwargs` if it has them. As in TRL, an answer begins where its conversation stops to agree with the
      prompt that ends in a generation prompt.

    They may also have `ref_logps`, a log-probability for each answer from `compute_log_probs`, and `margin`, a number
    for each pair. Other columns are ignored. Set `TrainingArguments(remove_unused_columns=False)`: to Trainer, all
    columns look unused.

    Each example is a prefix tree: its prompt, then a branch for each answer, which begins with a copy of the prompt's
    last token, so that every position predicts one token. What answers have in common beyond the prompt is merged too.

    Args:
        tokenizer: for strings and chat messages; also tells which token pads.
        max_length: tokens of a row. The default is a single row for the whole batch, of any length.
        max_sequence_length: tokens of a prompt with one of its answers; longer ones are truncated, each on its own, as
            TRL does with its `max_length`. By default nothing is truncated.
        truncation_mode: "keep_start" cuts off ends of answers, "keep_end" beginnings of prompts. Answers of different
            lengths then keep different parts of the prompt, which cannot be shared.
        max_branches: answers that share one copy of their prompt at most. Models with sliding windows or chunks need a
            limit for groups of more than 15 answers: each branch takes one of the 16 intervals that bounds hold.
        pad_to_multiple_of: rows are padded to a multiple of this many tokens.
        strategy: which examples go into which row, see `hf_flashmask.training.pack_lengths`.

    Returns:
        When called with a list of examples, a dict with

        * `input_ids`, int64 `[B, N]`, and `position_ids`, int64 `[B, N]`, which count along each branch;
        * `attention_mask`, bounds, int32 `[B, 1, 1, N]`;
        * `labels`, `AnswerLabels`, for the losses of this module;
        * `logits_to_keep`, int64 `[B, L]`, the positions that predict answers: causal language models compute no other
          logits. Absent when this Transformers cannot select positions by row.

    Raises:
        ValueError: when an example cannot be used: an empty prompt or answer, a tree longer than `max_length`, a prompt
            that leaves no token of an answer; the message names the example.
    """

    tokenizer: PreTrainedTokenizerBase | None = None
    max_length: int | None = None
    max_sequence_length: int | None = None
    truncation_mode: TruncationMode = "keep_start"
    max_branches: int | None = None
    pad_to_multiple_of: int | None = None
    strategy: PackingStrategy = "first_fit_decreasing"

    def __post_init__(self) -> None:
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

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if not examples:
            raise ValueError("`examples` is empty: there is nothing to pack")
        columns = _common_columns(examples)
        trees = [self._tree(number, example) for number, example in enumerate(examples)]
        lengths = [tree.merged.input_ids.shape[1] for tree in trees]
        if self.max_length is not None and max(lengths) > self.max_length:
            number = next(number for number, length in enumerate(lengths) if length > self.max_length)
            raise ValueError(
                f"example {number} of the batch needs a row of {lengths[number]} tokens for its prompt and "
                f"{len(trees[number].answers)} answers, but `max_length` is {self.max_length}: raise it, set "
                "`max_sequence_length`, or split the answers into several examples"
            )
        rows = pack_lengths(lengths, self.max_length or sum(lengths), self.strategy)
        packed = [_Row.of([trees[number] for number in row], row) for row in rows]
        row_length = max(row.input_ids.shape[0] for row in packed)
        if self.pad_to_multiple_of is not None:
            row_length += -row_length % self.pad_to_multiple_of

        def pad(name: str, value: int) -> Tensor:
            return pad_sequence([getattr(row, name) for row in packed], batch_first=True, padding_value=value)

        def pad_row(name: str, value: int) -> Tensor:
            values = pad(name, value)
            return nn.functional.pad(values, (0, row_length - values.shape[1]), value=value)

        pad_token = getattr(self.tokenizer, "pad_token_id", None)
        labels = AnswerLabels(
            positions=pad("positions", 0),
            tokens=pad("tokens", IGNORED),
            answers=_pad_answers([row.answers for row in packed]),
            last=pad("last", NOTHING),
            example=pad("example", NOTHING),
        )
        if "chosen" in columns:
            labels["pairs"] = _index_pairs(labels["example"])
        if "ref_logps" in columns:
            # Under DeepSpeed, Trainer rounds all floating point inputs to the dtype of the weights, which the sum of
            # many log-probabilities does not survive.
            labels["ref_logps"] = _per_answer(_reference_values(examples, trees), labels["example"]).view(torch.int32)
        if "margin" in columns:
            margins = torch.tensor([float(example["margin"]) for example in examples])
            pair_example = labels["example"][:, ::2]
            labels["margin"] = margins[pair_example].masked_fill(pair_example == NOTHING, 0.0)
        batch = {
            "input_ids": pad_row("input_ids", 0 if pad_token is None else pad_token),
            "position_ids": pad_row("position_ids", 0),
            # Padding is hidden, and sees nothing.
            "attention_mask": pad_row("subtree_ends", 0)[:, None, None, :],
            "labels": labels,
        }
        if len(packed) == 1 or _SELECTS_BY_ROW:
            batch["logits_to_keep"] = labels["positions"]
        return batch

    def _tree(self, number: int, example: Mapping[str, Any]) -> _Tree:
        """Tokenize, truncate and merge one example."""
        answers = example["answers"] if "answers" in example else [example["chosen"], example["rejected"]]
        sequences, start = self._tokenize(number, example, answers)
        starts = [start] * len(sequences)
        limit = self.max_sequence_length
        if limit is not None:
            if self.truncation_mode == "keep_end":
                starts = [max(start - max(len(sequence) - limit, 0), 0) for sequence in sequences]
                sequences = [sequence[-limit:] for sequence in sequences]
            else:
                sequences = [sequence[:limit] for sequence in sequences]
        for sequence, kept in zip(sequences, starts):
            if kept >= len(sequence):
                raise ValueError(
                    f"the prompt of example {number} of the batch has {start} tokens, which leaves no token of an "
                    f"answer with `max_sequence_length` {limit}: remove such examples, as TRL does, or raise it"
                )
        # A sequence that was cut into its answer has no prompt left that could predict its first token.
        starts = [max(start, 1) for start in starts]
        return _Tree.of(
            from_sequences(sequences, one_label_per_token=True, max_branches=self.max_branches), sequences, starts
        )

    def _tokenize(self, number: int, example: Mapping[str, Any], answers: Any) -> tuple[list[list[int]], int]:
        """Token ids of the prompt with each answer, and how many of them are the prompt's in all of them."""
        kinds = {_kind(value) for value in (example["prompt"], *answers)}
        if len(kinds) != 1 or not len(answers):
            raise ValueError(
                f"example {number} of the batch must have a prompt and at least one answer, all of them token ids, "
                f"strings, or lists of chat messages; got {len(answers)} answers, and {sorted(kinds)}"
            )
        kind = kinds.pop()
        if kind == "token ids":
            prompt_ids = _token_ids(example["prompt"])
            sequences = [prompt_ids + _token_ids(answer) for answer in answers]
            start = len(prompt_ids)
        else:
            encode = self._encode_text if kind == "strings" else self._encode_messages
            prompt_ids, *sequences = encode(example, answers)
            start = min(_common_prefix_length(prompt_ids, sequence) for sequence in sequences)
            if start < len(prompt_ids):
                logger.warning_once(
                    "The tokens of a prompt are not the beginning of those of prompt and answer: the chat template "
                    "renders it in another way when an answer follows, or tokens merge where they meet. The answer "
                    "begins where they part."
                )
        if start == 0:
            raise ValueError(f"the prompt of example {number} of the batch is empty: nothing predicts its answers")
        if any(len(sequence) == start for sequence in sequences):
            raise ValueError(f"example {number} of the batch has an empty answer: it has no token to score")
        return sequences, start

    def _encode_text(self, example: Mapping[str, Any], answers: Sequence[Any]) -> list[list[int]]:
        tokenizer, prompt = self._required_tokenizer("strings"), example["prompt"]
        end = tokenizer.eos_token or ""
        texts = [prompt + (answer if answer.endswith(end) else answer + end) for answer in answers]
        return tokenizer([prompt, *texts])["input_ids"]

    def _encode_messages(self, example: Mapping[str, Any], answers: Sequence[Any]) -> list[list[int]]:
        tokenizer, prompt = self._required_tokenizer("chat messages"), list(example["prompt"])
        options = {"tools": example.get("tools"), **(example.get("chat_template_kwargs") or {})}

        def encode(messages: list, add_generation_prompt: bool) -> list[int]:
            encoding: Any = tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=True, add_generation_prompt=add_generation_prompt, **options
            )
            return encoding["input_ids"]

        return [encode(prompt, True), *(encode(prompt + list(answer), False) for answer in answers)]

    def _required_tokenizer(self, kind: str) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise ValueError(f"the examples are {kind}: pass SharedPromptDataCollator(tokenizer), or token ids")
        return self.tokenizer


_SELECTS_BY_ROW = hasattr(modeling_utils, "slice_logits_to_keep")
"""Whether models take `logits_to_keep` `[B, L]`. Older ones take the same positions of all rows, so of a single row."""


class _Tree(NamedTuple):
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
    def of(cls, merged: PrefixTree, sequences: list[list[int]], starts: list[int]) -> _Tree:
        parts = list(zip(merged.index, sequences, starts))
        predicting = [index[start - 1 : len(sequence) - 1] for index, sequence, start in parts]
        predicted = [torch.tensor(sequence[start:]) for _, sequence, start in parts]
        positions, label = torch.cat(predicting).unique(return_inverse=True)
        tokens = torch.empty_like(positions)
        tokens[label] = torch.cat(predicted)  # answers that share a position predict the same token there
        answers = list(label.split([len(part) for part in predicting]))
        last = torch.stack([index[len(sequence) - 1] for index, sequence, _ in parts])
        return cls(merged, positions, tokens, answers, last)


class _Row(NamedTuple):
    """Trees side by side. The names are those of `AnswerLabels`."""

    input_ids: Tensor
    position_ids: Tensor
    subtree_ends: Tensor
    positions: Tensor
    tokens: Tensor
    answers: list[Tensor]
    last: Tensor
    example: Tensor

    @classmethod
    def of(cls, trees: list[_Tree], numbers: list[int]) -> _Row:
        places = [0, *torch.tensor([tree.merged.input_ids.shape[1] for tree in trees]).cumsum(0).tolist()]
        labels = [0, *torch.tensor([len(tree.positions) for tree in trees]).cumsum(0).tolist()]
        return cls(
            input_ids=torch.cat([tree.merged.input_ids[0] for tree in trees]),
            position_ids=torch.cat([tree.merged.position_ids[0] for tree in trees]),
            subtree_ends=torch.cat([tree.merged.bounds[0, 0, 0] + place for tree, place in zip(trees, places)]),
            positions=torch.cat([tree.positions + place for tree, place in zip(trees, places)]),
            tokens=torch.cat([tree.tokens for tree in trees]),
            answers=[answer + label for tree, label in zip(trees, labels) for answer in tree.answers],
            last=torch.cat([tree.last + place for tree, place in zip(trees, places)]),
            example=torch.cat([torch.full_like(tree.last, number) for tree, number in zip(trees, numbers)]),
        )


def _common_columns(examples: Sequence[Mapping[str, Any]]) -> set[str]:
    """The columns that matter, which all examples must have alike."""
    known = {"prompt", "chosen", "rejected", "answers", "ref_logps", "margin"}
    columns = [{name for name in known if example.get(name) is not None} for example in examples]
    for number, names in enumerate(columns):
        if names - {"ref_logps", "margin"} not in ({"prompt", "chosen", "rejected"}, {"prompt", "answers"}):
            raise ValueError(
                "an example must have `prompt`, `chosen` and `rejected`, or `prompt` and `answers`; example "
                f"{number} of the batch has {sorted(examples[number])}. If these are columns of your dataset but not "
                "all of them, set TrainingArguments(remove_unused_columns=False)"
            )
        if names != columns[0]:
            raise ValueError(
                f"all examples of a batch must have the same columns, but the first one has {sorted(columns[0])}, and "
                f"example {number} has {sorted(names)}"
            )
    if "margin" in columns[0] and "answers" in columns[0]:
        raise ValueError("`margin` belongs to `chosen` and `rejected`; examples with `answers` have no pairs")
    return columns[0]


def _reference_values(examples: Sequence[Mapping[str, Any]], trees: Sequence[_Tree]) -> list[list[float]]:
    values = [[float(value) for value in example["ref_logps"]] for example in examples]
    for number, (row, tree) in enumerate(zip(values, trees)):
        if len(row) != len(tree.answers):
            raise ValueError(
                f"`ref_logps` of example {number} of the batch must have one value for each of its "
                f"{len(tree.answers)} answers, got {len(row)}"
            )
    return values


def _per_answer(values: list[list[float]], example: Tensor) -> Tensor:
    """Values by example -> float32 `[B, A]`."""
    rows = [torch.tensor([value for number in _distinct(row) for value in values[number]]) for row in example]
    return pad_sequence(rows, batch_first=True)


def _distinct(row: Tensor) -> list[int]:
    """The examples of a row in their order, without padding."""
    return list(dict.fromkeys(number for number in row.tolist() if number != NOTHING))


def _index_pairs(example: Tensor) -> Tensor:
    """`[B, P, 2]`. The two answers of an example stand side by side."""
    pairs = torch.arange(example.shape[1]).expand_as(example)
    return torch.where(example == NOTHING, NOTHING, pairs).unflatten(1, (-1, 2))


def _pad_answers(rows: list[list[Tensor]]) -> Tensor:
    """`[B, A, T]`"""
    padded = pad_sequence([answer for row in rows for answer in row], batch_first=True, padding_value=NOTHING)
    return pad_sequence(padded.split([len(row) for row in rows]), batch_first=True, padding_value=NOTHING)


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "strings"
    return "chat messages" if len(value) and isinstance(value[0], Mapping) else "token ids"


def _token_ids(value: Any) -> list[int]:
    ids = torch.as_tensor(value)
    if ids.ndim != 1 or (ids.is_floating_point() and len(ids)):
        raise ValueError(f"token ids must be a list of integers, got {ids.dtype} {list(ids.shape)}")
    return ids.long().tolist()


def _common_prefix_length(left: Sequence[int], right: Sequence[int]) -> int:
    differences = (place for place, tokens in enumerate(zip(left, right)) if tokens[0] != tokens[1])
    return next(differences, min(len(left), len(right)))
