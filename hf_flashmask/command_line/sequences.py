"""The token sequences of a dataset, as trainers make them of its columns."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

_FORMATS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text", ".arrow": "arrow"}
_COLUMNS = (
    ("prompt", "chosen", "rejected"),
    ("chosen", "rejected"),
    ("prompt", "completion"),
    ("messages",),
    ("text",),
)
"""The columns that are read, the first of these that the dataset has; `input_ids` go before all of them."""

SequenceGroup = list[list[int]]
"""The sequences of one example, which may share a prefix."""


@dataclass(frozen=True)
class Sequences:
    """What was read.

    Attributes:
        groups: for each example its sequences: one, or two of preference data, which share their prompt.
        columns: those that were read.
        num_truncated: sequences that were cut to `max_length`.
    """

    groups: list[SequenceGroup]
    columns: tuple[str, ...]
    num_truncated: int


def read_sequences(
    data: str, tokenizer: Any, max_length: int, *, split: str = "train", most_examples: int = 5000
) -> Sequences:
    """Read a file, a folder or a dataset of the Hub, and tokenize its first examples.

    Args:
        data: a file ending in csv, json, jsonl, parquet, arrow or txt, a folder, or a name on the Hub.
        tokenizer: of Transformers; None for a dataset with `input_ids`.
        max_length: longer sequences are cut to so many tokens.

    Raises:
        ValueError: for a file that does not exist, is of another kind or cannot be parsed, for columns that no trainer
            makes sequences of, and for values in them that are neither text nor token ids.
    """
    dataset = _load_dataset(data, split)
    dataset = dataset.select(range(min(most_examples, len(dataset))))
    columns = _columns_of_dataset(dataset.column_names)
    if columns != ("input_ids",) and tokenizer is None:
        raise ValueError(f"the dataset holds text ({', '.join(columns)}): pass --tokenizer")
    groups = [
        _tokenize_row_of_dataset(number, row, columns, tokenizer)
        for number, row in enumerate(_rows_of_dataset(data, dataset, columns))
    ]
    groups = [[sequence for sequence in group if sequence] for group in groups]
    num_truncated = sum(len(sequence) > max_length for group in groups for sequence in group)
    groups = [[sequence[:max_length] for sequence in group] for group in groups if group]
    if not groups:
        raise ValueError(f"no example of {data!r} has a token")
    return Sequences(groups, columns, num_truncated)


def load_tokenizer(name: str) -> Any:
    """
    Raises:
        ValueError: when there is none of that name, or no network to ask for it.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"--tokenizer {name!r} is no folder here, or cannot be read: {error}") from error


def _load_dataset(data: str, split: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError("reading data needs datasets: pip install 'hf-flashmask[train]'") from error
    if not sys.stderr.isatty():  # a bar fills a log file with fragments
        datasets.disable_progress_bars()
    path = Path(data)
    if path.suffix in _FORMATS and not path.exists():
        raise ValueError(f"there is no file {data}")
    if not path.is_file():
        return datasets.load_dataset(data, split=split)
    if path.suffix not in _FORMATS:
        raise ValueError(f"cannot read {data}: only files ending in {', '.join(_FORMATS)}")
    if path.stat().st_size == 0:
        raise ValueError(f"the file {data} is empty")
    try:
        return datasets.load_dataset(_FORMATS[path.suffix], data_files=data, split="train")
    except Exception as error:  # each format has errors of its own, most of them behind another one
        _refuse_unreadable_dataset(data, error)


def _rows_of_dataset(data: str, dataset: Any, columns: tuple[str, ...]) -> Iterator[Mapping[str, Any]]:
    try:
        yield from dataset.select_columns(list(columns))
    except UnicodeDecodeError as error:
        _refuse_unreadable_dataset(data, error)


def _refuse_unreadable_dataset(data: str, error: BaseException) -> NoReturn:
    while error.__cause__ is not None:
        error = error.__cause__
    advice = "; texts are UTF-8: convert the file" if isinstance(error, UnicodeDecodeError) else ""
    raise ValueError(f"cannot read {data}: {type(error).__name__}: {error}{advice}") from error


def _columns_of_dataset(found: Sequence[str]) -> tuple[str, ...]:
    for columns in (("input_ids",), *_COLUMNS):
        if set(columns) <= set(found):
            return columns
    known = "; ".join(" + ".join(columns) for columns in _COLUMNS)
    raise ValueError(
        f"the dataset has the columns {', '.join(found)}; one of these sets is needed: input_ids; {known}. Rename the "
        "columns of the file, such as the one with texts to `text`"
    )


def _tokenize_row_of_dataset(
    number: int, row: Mapping[str, Any], columns: tuple[str, ...], tokenizer: Any
) -> SequenceGroup:
    for column in columns:
        _check_value_of_column(number, column, row[column])
    values = [row[column] for column in columns]
    if columns == ("input_ids",):
        return [list(values[0])]
    if "rejected" not in columns:
        return [_encode_sequence(values, tokenizer)]
    *prompt, chosen, rejected = values
    return [_encode_sequence([*prompt, answer], tokenizer) for answer in (chosen, rejected)]


def _check_value_of_column(number: int, column: str, value: Any) -> None:
    if isinstance(value, list) or (isinstance(value, str) and column != "input_ids"):
        return
    expected = "token ids" if column == "input_ids" else "a string or messages"
    raise ValueError(f"`{column}` of example {number} is {value!r:.80}; expected {expected}")


def _encode_sequence(parts: list[Any], tokenizer: Any) -> list[int]:
    """Text parts, or the turns of conversations, one after the other."""
    if isinstance(parts[0], str):
        return list(tokenizer("".join(parts))["input_ids"])
    turns = [turn for part in parts for turn in part]
    return list(tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"])
