"""Preference training on shared prompts: a prompt is computed once for all its answers.

`SharedPromptDataCollator` lays examples out as prefix trees, many to a row. `set_loss` makes a model compute a loss
over answers, so that the plain `transformers.Trainer` trains on them:

    set_loss(model, dpo_loss, beta=0.1)
    Trainer(model=model, args=..., train_dataset=..., data_collator=SharedPromptDataCollator(tokenizer)).train()

Everything in between is functions on tensors: `answer_log_probs` and `answer_scores` reduce what a model computes at
every position to one value for each answer, `[B, A]`; `dpo_loss` and `reward_loss` make a loss of such values.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypedDict, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase, modeling_utils
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.utils import logging

from .conversion import Tree
from .integration import KEY_RANGE_OF_LAYER_TYPE, NAME, register_tree
from .packing import PackingStrategy, pack_lengths
from .prefix_tree import PrefixTree, from_sequences

__all__ = [
    "AnswerLabels",
    "SharedPromptDataCollator",
    "answer_log_probs",
    "answer_scores",
    "compute_log_probs",
    "dpo_loss",
    "reference_log_probs",
    "reward_loss",
    "set_loss",
    "split_pairs",
    "token_log_probs",
]

logger = logging.get_logger(__name__)

TruncationMode = Literal["keep_start", "keep_end"]

_IGNORED = -100  # a token that no loss counts, as in Transformers
_NOTHING = -1  # padding of indices


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


# Collator


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
        strategy: which examples go into which row, see `hf_flashmask.packing.pack_lengths`.

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
            tokens=pad("tokens", _IGNORED),
            answers=_pad_answers([row.answers for row in packed]),
            last=pad("last", _NOTHING),
            example=pad("example", _NOTHING),
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
            labels["margin"] = margins[pair_example].masked_fill(pair_example == _NOTHING, 0.0)
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
    return list(dict.fromkeys(number for number in row.tolist() if number != _NOTHING))


def _index_pairs(example: Tensor) -> Tensor:
    """`[B, P, 2]`. The two answers of an example stand side by side."""
    pairs = torch.arange(example.shape[1]).expand_as(example)
    return torch.where(example == _NOTHING, _NOTHING, pairs).unflatten(1, (-1, 2))


def _pad_answers(rows: list[list[Tensor]]) -> Tensor:
    """`[B, A, T]`"""
    padded = pad_sequence([answer for row in rows for answer in row], batch_first=True, padding_value=_NOTHING)
    return pad_sequence(padded.split([len(row) for row in rows]), batch_first=True, padding_value=_NOTHING)


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


# From a model's outputs to one value for each answer


_LABELS_AT_ONCE = 1024  # rows of logits whose float32 log-softmax exists at the same time


def token_log_probs(logits: Tensor, labels: AnswerLabels) -> Tensor:
    """The log-probability of every token of every answer, given what is before it in its branch.

    Only positions that predict an answer are looked at, in float32, a part of them at a time: neither forward nor
    backward keeps a log-softmax.

    Args:
        logits: `[B, N, V]` of whole rows, or `[B, L, V]` of the positions in the collator's `logits_to_keep`.

    Returns:
        float32 `[B, A, T]`, 0 where `labels["answers"]` is padding.
    """
    selected, tokens = _select_positions(logits, labels["positions"]), labels["tokens"]
    parts = zip(selected.flatten(0, 1).split(_LABELS_AT_ONCE), tokens.flatten().split(_LABELS_AT_ONCE))
    log_probs = torch.cat([checkpoint(_log_probs_of_tokens, *part, use_reentrant=False) for part in parts])
    answers = labels["answers"]
    by_label = log_probs.view_as(tokens)[:, None, :].expand(-1, answers.shape[1], -1)
    return by_label.gather(2, answers.clamp(min=0)).masked_fill(answers == _NOTHING, 0.0)


def answer_log_probs(logits: Tensor, labels: AnswerLabels) -> Tensor:
    """The log-probability of each answer given its prompt, the sum of `token_log_probs`.

    Returns:
        float32 `[B, A]`, 0 for padding.
    """
    return token_log_probs(logits, labels).sum(-1)


def answer_scores(scores: Tensor, labels: AnswerLabels) -> Tensor:
    """The score at each answer's last token.

    Args:
        scores: `[B, N, 1]` or `[B, N]`, of whole rows: what the head of a reward model makes of every position.

    Returns:
        float32 `[B, A]`, 0 for padding.
    """
    if scores.ndim == 3 and scores.shape[2] == 1:
        scores = scores[..., 0]
    last = labels["last"]
    if scores.ndim != 2 or scores.shape[0] != last.shape[0]:
        raise ValueError(
            f"`scores` must be [B, N, 1] or [B, N], a score for each position of {last.shape[0]} rows, got "
            f"{list(scores.shape)}; the `logits` that a sequence classifier returns are one for each row"
        )
    return scores.float().gather(1, last.clamp(min=0)).masked_fill(last == _NOTHING, 0.0)


def _select_positions(logits: Tensor, positions: Tensor) -> Tensor:
    """`[B, L, V]`. L is less than N: nothing follows the last token of an answer, so it is not among the positions."""
    if logits.ndim == 4:  # a model that selects the positions of every row in every row
        logits = logits.diagonal(dim1=0, dim2=1).movedim(-1, 0)
    if logits.ndim != 3 or logits.shape[0] != positions.shape[0] or logits.shape[1] < positions.shape[1]:
        raise ValueError(
            f"`logits` must be [B, N, V] of {positions.shape[0]} rows, or [B, L, V] of the {positions.shape[1]} "
            f"positions in `logits_to_keep`, got {list(logits.shape)}"
        )
    if logits.shape[1] == positions.shape[1]:
        return logits
    return logits.take_along_dim(positions[..., None], dim=1)


def _log_probs_of_tokens(logits: Tensor, tokens: Tensor) -> Tensor:
    """`[R, V]`, `[R]` -> float32 `[R]`, 0 where there is no token."""
    return -nn.functional.cross_entropy(logits.float(), tokens, ignore_index=_IGNORED, reduction="none")


def split_pairs(values: Tensor, labels: AnswerLabels) -> tuple[Tensor, Tensor, Tensor]:
    """Values of answers `[B, A]` -> of the chosen ones `[B, P]`, of the rejected ones, and bool, which are no padding.

    Raises:
        ValueError: when the examples were lists of answers.
    """
    if "pairs" not in labels:
        raise ValueError(
            "the examples of this batch are lists of answers, not pairs: give them `chosen` and `rejected`, or use a "
            "loss of your own over the answers of each example, labels['example']"
        )
    pairs = labels["pairs"]
    chosen, rejected = (values.gather(1, pairs[..., side].clamp(min=0)) for side in (0, 1))
    return chosen, rejected, pairs[..., 0] != _NOTHING


def reference_log_probs(labels: AnswerLabels) -> Tensor:
    """The `ref_logps` of the examples, float32 `[B, A]`, 0 for padding.

    Raises:
        ValueError: when the examples have none.
    """
    if "ref_logps" not in labels:
        raise ValueError(
            "the examples have no `ref_logps`: add what compute_log_probs(reference_model, dataset, data_collator) "
            "returns to the dataset as a column of that name"
        )
    return labels["ref_logps"].view(torch.float32)


# Losses


def dpo_loss(
    log_probs: Tensor,
    labels: AnswerLabels,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    ref_log_probs: Tensor | None = None,
) -> Tensor:
    """Direct preference optimization (arXiv 2305.18290, equation 7), averaged over the pairs of the batch.

    With the log-ratios r = log p(answer) - log p_reference(answer) and d = beta * (r_chosen - r_rejected), the loss of
    a pair is -log sigmoid(d); with label smoothing e, the probability that a pair is labelled the wrong way round,
    -(1 - e) log sigmoid(d) - e log sigmoid(-d) (conservative DPO, https://ericmitchell.ai/cdpo.pdf).

    Args:
        log_probs: `[B, A]`, from `answer_log_probs`.
        beta: how strongly the model is held to the reference.
        label_smoothing: from 0 to less than 0.5.
        ref_log_probs: `[B, A]`, those of the reference model. Default: `ref_logps` of the examples.

    Returns:
        The loss, 0-d.
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"`label_smoothing` must be from 0 to less than 0.5, got {label_smoothing}")
    if ref_log_probs is None:
        ref_log_probs = reference_log_probs(labels)
    chosen, rejected, is_pair = split_pairs(log_probs - ref_log_probs, labels)
    difference = beta * (chosen - rejected)
    log_sigmoid = nn.functional.logsigmoid
    losses = -(1 - label_smoothing) * log_sigmoid(difference) - label_smoothing * log_sigmoid(-difference)
    return _mean(losses, is_pair)


def reward_loss(scores: Tensor, labels: AnswerLabels, *, center_rewards_coefficient: float = 0.0) -> Tensor:
    """The Bradley-Terry loss of a reward model (arXiv 2203.02155, equation 1), averaged over the pairs of the batch.

    The loss of a pair is -log sigmoid(s_chosen - s_rejected - margin) + c * (s_chosen + s_rejected)^2. The margin
    (arXiv 2307.09288, equation 2) is that of the examples, or 0; the second term, with the coefficient c, keeps scores
    near 0 (arXiv 2312.09244).

    Args:
        scores: `[B, A]`, from `answer_scores`.

    Returns:
        The loss, 0-d.
    """
    chosen, rejected, is_pair = split_pairs(scores, labels)
    difference = chosen - rejected
    if "margin" in labels:
        difference = difference - labels["margin"]
    losses = -nn.functional.logsigmoid(difference) + center_rewards_coefficient * (chosen + rejected) ** 2
    return _mean(losses, is_pair)


def _mean(losses: Tensor, is_pair: Tensor) -> Tensor:
    return losses.masked_fill(~is_pair, 0.0).sum() / is_pair.sum()


# With transformers.Trainer


def set_loss(model: nn.Module, loss: Callable[..., Tensor], **options: Any) -> None:
    """Make `model(**batch).loss` the given loss over the answers of a batch from `SharedPromptDataCollator`.

    Causal language models give the loss their `answer_log_probs`, sequence classifiers with one label, the usual reward
    models, their `answer_scores`: scores at the last token of every answer, although the `logits` that they return are
    still one for each row. Windows and chunks of the model's layers are counted along the branches. Nothing else about
    the model changes, checkpoints neither. Trainer averages losses of several batches when it accumulates gradients.
    Call it before the model is compiled; a model with adapters of PEFT may be passed as it is.

    Args:
        model: a causal language model, or a sequence classifier made of Transformers' own `score` head.
        loss: called with values `[B, A]`, the `AnswerLabels`, and `options`: `dpo_loss`, `reward_loss` or your own.

    Raises:
        ValueError: when the model does not use attn_implementation="flashmask", does not ask its `loss_function` for
            the loss, or has more than one label.
    """
    base = _base_model(model)
    if not _asks_for_loss(type(base)):
        raise ValueError(
            f"{type(base).__name__} does not compute its loss with `self.loss_function`, which set_loss replaces: call "
            "answer_log_probs or answer_scores on its outputs in a loss of your own"
        )
    if isinstance(base, GenericForSequenceClassification):
        if base.config.num_labels != 1:
            raise ValueError(f"a reward model has one label, got `num_labels` {base.config.num_labels}")
        reduce: Callable[..., Tensor] = answer_scores
    elif base.get_output_embeddings() is not None:
        reduce = answer_log_probs
    else:
        raise ValueError(f"set_loss needs a causal language model or a sequence classifier, got {type(base).__name__}")
    base.base_model.register_forward_pre_hook(_follow_branches, with_kwargs=True)
    base.loss_function = functools.partial(_loss_of_answers, reduce=reduce, loss=functools.partial(loss, **options))
    # The loss is the mean over a batch: Trainer divides it by the number of batches of a step.
    base.accepts_loss_kwargs = False  # type: ignore[assignment]


def _loss_of_answers(
    logits: Tensor,
    labels: AnswerLabels,
    *args: Any,
    reduce: Callable[..., Tensor],
    loss: Callable[..., Tensor],
    **kwargs: Any,
) -> Tensor:
    """In the form of a `loss_function` of Transformers, which also gets what the model knows and was called with."""
    return loss(reduce(logits, labels), labels)


def _base_model(model: nn.Module) -> PreTrainedModel:
    """The model without the wrapper of PEFT."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    if not isinstance(base, PreTrainedModel):
        raise ValueError(f"a model of Transformers, or one with adapters of PEFT, is needed, got {type(base).__name__}")
    implementation = base.config.get_text_config()._attn_implementation
    if implementation != NAME:
        raise ValueError(
            f'rows with shared prompts need attn_implementation="{NAME}", {type(base).__name__} uses '
            f'"{implementation}": call model.set_attn_implementation("{NAME}") first'
        )
    return base


def _follow_branches(
    backbone: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A forward pre-hook: bounds that a user passes are final, those of trees are narrowed to windows and chunks."""
    mask, position_ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if not isinstance(mask, Tensor) or mask.ndim != 4 or position_ids is None:
        return args, kwargs
    if not torch.compiler.is_compiling():
        return args, {**kwargs, "attention_mask": register_tree(Tree(mask, position_ids, end_depth=mask.shape[-1]))}
    _refuse_windows(backbone, mask)
    return args, kwargs


@torch.compiler.disable  # the compiler would catch the error and go on without the window
def _refuse_windows(backbone: PreTrainedModel, bounds: Tensor) -> None:
    config = backbone.config.get_text_config()
    limits = [getattr(config, limit, None) for limit in KEY_RANGE_OF_LAYER_TYPE.values()]
    if any(limit is not None and limit < bounds.shape[-1] for limit in limits):
        raise NotImplementedError(
            "rows with shared prompts do not work under torch.compile for models with sliding windows or chunks that "
            f"are shorter than a row, here {bounds.shape[-1]} tokens: train without it"
        )


def _asks_for_loss(model_class: type) -> bool:
    for forward in (vars(base)["forward"] for base in model_class.__mro__ if "forward" in vars(base)):
        try:
            if "self.loss_function(" in inspect.getsource(inspect.unwrap(forward)):
                return True
        except OSError:  # a class from a notebook, whose source is not found
            return True
    return False


@torch.no_grad()
def compute_log_probs(
    model: nn.Module,
    dataset: Sequence[Mapping[str, Any]],
    data_collator: SharedPromptDataCollator,
    *,
    batch_size: int = 8,
) -> list[list[float]]:
    """The log-probability of every answer of a dataset under a model in evaluation mode, without gradients.

    Computed once before training, those of the reference model spare a second model in memory and its forward passes:

        dataset = dataset.add_column("ref_logps", compute_log_probs(model, dataset, data_collator))

    With adapters, call it within `model.disable_adapter()`; when training under autocast, within the same.

    Args:
        dataset: examples of `data_collator`, which should be the one of the training: it decides what is truncated.
        batch_size: examples computed at a time.

    Returns:
        For each example one number for each answer, in the given order; the chosen answer comes before the rejected.
    """
    device, training = next(model.parameters()).device, model.training
    hook = _base_model(model).base_model.register_forward_pre_hook(_follow_branches, with_kwargs=True)
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
    labels = AnswerLabels(**{name: value.to(device) for name, value in batch.pop("labels").items()})
    inputs = {name: value.to(device) for name, value in batch.items()}
    log_probs = answer_log_probs(model(**inputs, use_cache=False).logits, labels)
    values: dict[int, list[float]] = {}
    for example, value in zip(labels["example"].flatten().tolist(), log_probs.flatten().tolist()):
        values.setdefault(example, []).append(value)
    values.pop(_NOTHING, None)
    return (values[example] for example in sorted(values))
