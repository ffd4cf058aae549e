"""Examples of prompts and answers: their columns, and their token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .chat import encode_messages, template_options

logger = logging.get_logger(__name__)

TruncationMode = Literal["keep_start", "keep_end"]


def columns_of_preference_examples(examples: Sequence[Mapping[str, Any]]) -> set[str]:
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


def answers_of_preference_example(example: Mapping[str, Any]) -> Sequence[Any]:
    return example["answers"] if "answers" in example else [example["chosen"], example["rejected"]]


def tokenize_preference_example(
    number: int, example: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None
) -> tuple[list[list[int]], int]:
    """Token ids of the prompt with each answer, and the number of leading tokens that belong to the prompt."""
    answers = answers_of_preference_example(example)
    kinds = {_kind_of_example_value(value) for value in (example["prompt"], *answers)}
    if len(kinds) != 1 or not len(answers):
        raise ValueError(
            f"example {number} of the batch must have a prompt and at least one answer, all of them token ids, "
            f"strings, or lists of chat messages; got {len(answers)} answers, and {sorted(kinds)}"
        )
    kind = kinds.pop()
    if kind == "token ids":
        prompt_ids = _token_ids_of_example_value(example["prompt"])
        sequences = [prompt_ids + _token_ids_of_example_value(answer) for answer in answers]
        start = len(prompt_ids)
    else:
        encode = _encode_texts_of_example if kind == "strings" else _encode_messages_of_example
        prompt_ids, *sequences = encode(_tokenizer_for_examples(tokenizer, kind), example, answers)
        start = min(_length_of_common_prompt(prompt_ids, sequence) for sequence in sequences)
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


def truncate_preference_example(
    number: int, sequences: list[list[int]], start: int, limit: int, mode: TruncationMode
) -> tuple[list[list[int]], list[int]]:
    """At most `limit` tokens of each sequence, and the number of leading tokens of each that belong to the prompt."""
    starts = [start] * len(sequences)
    if mode == "keep_end":
        starts = [max(start - max(len(sequence) - limit, 0), 0) for sequence in sequences]
        sequences = [sequence[-limit:] for sequence in sequences]
    else:
        sequences = [sequence[:limit] for sequence in sequences]
    for sequence, kept in zip(sequences, starts):
        if kept >= len(sequence):
            raise ValueError(
                f"the prompt of example {number} of the batch has {start} tokens, which leaves no token of an answer "
                f"with `max_sequence_length` {limit}: remove such examples, as TRL does, or raise it"
            )
    # Where nothing of the prompt is left, nothing predicts the first token of the answer.
    return sequences, [max(start, 1) for start in starts]


def _encode_texts_of_example(
    tokenizer: PreTrainedTokenizerBase, example: Mapping[str, Any], answers: Sequence[Any]
) -> list:
    prompt, end = example["prompt"], tokenizer.eos_token or ""
    texts = [prompt + (answer if answer.endswith(end) else answer + end) for answer in answers]
    return tokenizer([prompt, *texts])["input_ids"]


def _encode_messages_of_example(
    tokenizer: PreTrainedTokenizerBase, example: Mapping[str, Any], answers: Sequence[Any]
) -> list:
    prompt, options = list(example["prompt"]), template_options(example)
    conversations = [prompt + list(answer) for answer in answers]
    return [
        encode_messages(tokenizer, prompt, options, add_generation_prompt=True),
        *(encode_messages(tokenizer, messages, options, add_generation_prompt=False) for messages in conversations),
    ]


def _tokenizer_for_examples(tokenizer: PreTrainedTokenizerBase | None, kind: str) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise ValueError(f"the examples are {kind}: pass SharedPromptDataCollator(tokenizer), or token ids")
    return tokenizer


def _kind_of_example_value(value: Any) -> str:
    if isinstance(value, str):
        return "strings"
    return "chat messages" if len(value) and isinstance(value[0], Mapping) else "token ids"


def _token_ids_of_example_value(value: Any) -> list[int]:
    ids = torch.as_tensor(value)
    if ids.ndim != 1 or (ids.is_floating_point() and len(ids)):
        raise ValueError(f"token ids must be a list of integers, got {ids.dtype} {list(ids.shape)}")
    return ids.long().tolist()


def _length_of_common_prompt(left: Sequence[int], right: Sequence[int]) -> int:
    differences = (place for place, tokens in enumerate(zip(left, right)) if tokens[0] != tokens[1])
    return next(differences, min(len(left), len(right)))
