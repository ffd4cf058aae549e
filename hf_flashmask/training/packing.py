"""Packed supervised fine-tuning: documents of any lengths in rows of a given length, kept apart by the mask."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from transformers.utils import logging

from ..integration.documents import are_ids
from .evaluation import GivesPredictionsOfRows, refuse_predictions_of_rows
from .labels import IGNORED
from .option_checks import check_option_at_least, check_option_is_one_of
from .packed_bounds import layer_types_of_packed_bounds, packed_bounds
from .token_counts import count_tokens_in_trainer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["Overflow", "PackedDataCollator", "PackingStrategy", "pack_lengths"]

logger = logging.get_logger(__name__)

PackingStrategy: TypeAlias = Literal["first_fit_decreasing", "in_order"]
Overflow: TypeAlias = Literal["error", "truncate", "split"]


@dataclass
class PackedDataCollator(GivesPredictionsOfRows):
    """Pack the documents of a batch into rows, for causal language models, `transformers.Trainer` and any DataLoader.

    An example is `{"input_ids": ..., "labels": ...}`, lists, NumPy arrays or tensors `[length]`; `labels` default to
    `input_ids`, and the model shifts them. The collator ignores other keys, like `DataCollatorWithFlattening`, and
    refuses keys that would change what is learned. It drops documents without tokens; no other token is lost unless
    `overflow` is "truncate". Trainer's `per_device_train_batch_size` counts documents: more documents fill rows better.
    A batch has as many rows R as its documents need, and as many positions S as the longest row needs:

    * `input_ids` int64 `[R, S]`.
    * `labels` int64 `[R, S]`; -100 for the first token of each document, which nothing predicts, and for padding.
    * `position_ids` int64 `[R, S]`, from 0 in every document. The padding at the end of a row has positions 0.
    * `attention_mask`, with `bounds_for` only: the finished mask of that model.

    Without `bounds_for`, positions separate the documents: attn_implementation="flashmask" starts a document wherever
    they do not increase, in every layer, and adds the window or the chunks of the layer. Each position of padding is
    then a document of its own, which no token sees and which costs one pair. This works for all models that pass
    `position_ids` to their attention, with any mix of full, sliding and chunked layers. A router's auxiliary loss
    (`output_router_logits=True`) counts padding as tokens.

    With `bounds_for`, the batch carries bounds, int32 `[R, 1, 1, S]` (LTS = end of the document). They hide padding
    and do not depend on what the model does with positions. Bounds are final: no layer adds its window to them, so they
    are made for one model. They contain the window of a model whose layers all have one (Mistral), chunks start with
    their document, and a model with layers of several types (Gemma 2) gets a dict with bounds for each type.

    Args:
        max_length: tokens that fit into a row. None: one row with all documents, however long. With a number, Trainer
            on several processes evaluates the loss alone: it cannot gather predictions of different numbers of rows.
        strategy: how documents are distributed over rows, see `pack_lengths`. Inside a row they keep their order.
        overflow: what to do with a document longer than `max_length`. "error" raises; "truncate" keeps its first
            `max_length` tokens; "split" cuts it into documents of at most `max_length` tokens. These do not see each
            other and count positions from 0, and the first token of each has no label.
        pad_to_multiple_of: round S up. With `max_length` as the multiple every batch has S = `max_length`.
        pad_token_id: any id that the model has; nothing depends on it.
        bounds_for: the model's configuration, to put bounds into the batch.

    Raises:
        TypeError, ValueError: for an option or an example that cannot be used; the message names it.
        NotImplementedError: when there are no final bounds for the model in `bounds_for`.
    """

    max_length: int | None = None
    strategy: PackingStrategy = field(default="first_fit_decreasing", kw_only=True)
    overflow: Overflow = field(default="error", kw_only=True)
    pad_to_multiple_of: int = field(default=1, kw_only=True)
    pad_token_id: int = field(default=0, kw_only=True)
    bounds_for: PreTrainedConfig | None = field(default=None, kw_only=True)
    _num_tokens: int = field(default=0, init=False, repr=False, compare=False)
    _num_positions: int = field(default=0, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_option_is_one_of("strategy", self.strategy, PackingStrategy)
        check_option_is_one_of("overflow", self.overflow, Overflow)
        if self.max_length is not None:
            check_option_at_least("max_length", self.max_length, 1)
            refuse_predictions_of_rows()
        check_option_at_least("pad_to_multiple_of", self.pad_to_multiple_of, 1)
        check_option_at_least("pad_token_id", self.pad_token_id, 0)
        if self.bounds_for is not None:
            layer_types_of_packed_bounds(self.bounds_for)
            count_tokens_in_trainer()

    @property
    def fill(self) -> float:
        """Fraction of positions that hold tokens, over all batches that this object has packed; nan before the first.

        The workers of a DataLoader (`dataloader_num_workers` > 0 in Trainer) pack with copies of this object, which
        count for themselves: in the main process it stays nan, and a warning says so. `FlashMaskCallback` logs the fill
        of the batches that a model got, wherever they were packed.
        """
        if self._num_positions:
            return self._num_tokens / self._num_positions
        logger.warning(
            "PackedDataCollator.fill is nan: this object has packed no batch. The workers of a DataLoader pack with "
            "copies of it: use FlashMaskCallback, which logs the fill of each batch that the model gets, or no workers "
            "(dataloader_num_workers=0)"
        )
        return math.nan

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Pack one batch of examples."""
        documents = [piece for index, example in enumerate(examples) for piece in self._documents(index, example)]
        _check_labels_to_pack(examples)
        if not documents:
            raise ValueError(f"the batch has no token: `input_ids` of all its {len(examples)} examples are empty")
        lengths = [len(document.input_ids) for document in documents]
        rows = pack_lengths(lengths, self.max_length or sum(lengths), self.strategy)
        longest = max(sum(lengths[index] for index in row) for row in rows)
        shape = len(rows), -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of

        batch: dict[str, Any] = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "labels": torch.full(shape, IGNORED),
            "position_ids": torch.zeros(shape, dtype=torch.int64),
        }
        is_padding = torch.ones(shape, dtype=torch.bool)
        for row, indices in enumerate(rows):
            used = slice(sum(lengths[index] for index in indices))
            batch["input_ids"][row, used] = torch.cat([documents[index].input_ids for index in indices])
            batch["labels"][row, used] = torch.cat([documents[index].labels for index in indices])
            batch["position_ids"][row, used] = torch.cat([torch.arange(lengths[index]) for index in indices])
            is_padding[row, used] = False
        batch["labels"].masked_fill_(batch["position_ids"] == 0, IGNORED)
        if self.bounds_for is not None:
            batch["attention_mask"] = packed_bounds(self.bounds_for, batch["position_ids"], is_padding)

        self._num_tokens += sum(lengths)
        self._num_positions += is_padding.numel()
        return batch

    def _documents(self, index: int, example: Mapping[str, Any]) -> Iterable[_DocumentToPack]:
        """The documents of an example: none, one, or several pieces of at most `max_length` tokens."""
        document = _read_example_to_pack(index, example)
        length = len(document.input_ids)
        if self.max_length is None or length <= self.max_length:
            return [document] if length else []
        if self.overflow == "error":
            raise ValueError(
                f"example {index} of the batch has {length} tokens, more than `max_length` ({self.max_length}): raise "
                '`max_length`, leave such examples out, or pass overflow="truncate" or overflow="split"'
            )
        pieces = (_DocumentToPack(*piece) for piece in zip(*(part.split(self.max_length) for part in document)))
        return [next(pieces)] if self.overflow == "truncate" else pieces


def pack_lengths(
    lengths: Sequence[int], max_length: int, strategy: PackingStrategy = "first_fit_decreasing"
) -> list[list[int]]:
    """Distribute documents over rows of at most `max_length` tokens.

    Args:
        lengths: tokens of each document, 0 or more.
        max_length: tokens that fit into a row.
        strategy: "first_fit_decreasing" takes the longest document first and puts each into the first row that has room
            for it; it needs at most 11/9 of the fewest rows possible, plus one, and O(n log n) time for n documents.
            "in_order" keeps the given order: a document that does not fit into the last row opens the next one, O(n).

    Returns:
        For each row the indices of its documents, ascending. Every index occurs once, no row is empty.

    Raises:
        ValueError: when a document is longer than `max_length`, naming the first one; when an argument is out of range.
    """
    check_option_is_one_of("strategy", strategy, PackingStrategy)
    check_option_at_least("max_length", max_length, 1)
    for index, length in enumerate(lengths):
        if not 0 <= length <= max_length:
            raise ValueError(
                f"`lengths` must be from 0 to `max_length` ({max_length}), got {length} at index {index}; truncate or "
                "split what is longer"
            )
    if strategy == "in_order":
        return _pack_in_order(lengths, max_length)
    return _pack_first_fit_decreasing(lengths, max_length)


def _pack_in_order(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    rows: list[list[int]] = []
    room = -1
    for index, length in enumerate(lengths):
        if length > room:
            rows.append([])
            room = max_length
        rows[-1].append(index)
        room -= length
    return rows


def _pack_first_fit_decreasing(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """A binary tree over the rows finds the first row with enough room. Each node holds the largest room below it."""
    leaves = 1 << max(len(lengths) - 1, 0).bit_length()
    room = [max_length] * (2 * leaves)  # the children of node n are 2n and 2n + 1
    rows: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length, node = lengths[index], 1
        while node < leaves:
            node *= 2
            if room[node] < length:
                node += 1
        if node - leaves == len(rows):
            rows.append([])
        rows[node - leaves].append(index)
        room[node] -= length
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return [sorted(row) for row in rows]


# Examples


class _DocumentToPack(NamedTuple):
    """Tokens and labels, int64 `[length]`."""

    input_ids: Tensor
    labels: Tensor


_REFUSED_KEYS = {
    "position_ids": "packed rows count positions from 0 in every document; give each document as an example of its own",
    "seq_lengths": "it holds several documents; give each of them as an example of its own",
    "shift_labels": "give `labels` that are not shifted",
    "assistant_masks": "give `labels`, with -100 where the mask is 0",
    "completion_mask": "give `labels`, with -100 where the mask is 0",
    **dict.fromkeys(
        ("pixel_values", "pixel_values_videos", "input_features"),
        "rows that it packs hold tokens only; pad such examples with the processor of the model",
    ),
}
"""Keys that would change the training if they were ignored -> what to do instead."""


def _check_labels_to_pack(examples: Sequence[Mapping[str, Any]]) -> None:
    """Without labels an example learns all its tokens: beside one with labels that is an oversight."""
    has_labels = [example.get("labels") is not None for example in examples]
    if any(has_labels) and not all(has_labels):
        raise ValueError(
            f"example {has_labels.index(False)} of the batch has no `labels`, example {has_labels.index(True)} has: "
            "give all examples `labels`, or none"
        )


def _read_example_to_pack(index: int, example: Any) -> _DocumentToPack:
    name = f"example {index} of the batch"
    if not isinstance(example, Mapping) or "input_ids" not in example:
        keys = list(example) if isinstance(example, Mapping) else type(example).__name__
        raise ValueError(f"{name} has no `input_ids`, got {keys}: tokenize the dataset before it is collated")
    for key, advice in _REFUSED_KEYS.items():
        if example.get(key) is not None:
            raise ValueError(f"{name} has `{key}`, which PackedDataCollator cannot use: {advice}")
    input_ids = _tokens_to_pack(f"`input_ids` of {name}", example["input_ids"])
    others = {"labels": input_ids, "attention_mask": torch.ones_like(input_ids)}
    for key in others:
        if example.get(key) is not None:
            others[key] = _tokens_to_pack(f"`{key}` of {name}", example[key])
            if others[key].shape != input_ids.shape:
                raise ValueError(
                    f"`{key}` of {name} must have one value for each of its {len(input_ids)} tokens, got "
                    f"{len(others[key])}"
                )
    if not bool(others["attention_mask"].all()):
        raise ValueError(f"{name} has padding (0 in its `attention_mask`): tokenize without padding")
    if bool(are_ids(others["attention_mask"]).any()):
        raise ValueError(
            f"{name} has ids of documents in its `attention_mask`, which PackedDataCollator cannot use: give each of "
            "them as an example of its own"
        )
    return _DocumentToPack(input_ids, others["labels"])


def _tokens_to_pack(name: str, values: Any) -> Tensor:
    """Integers `[length]` on the CPU as int64."""
    try:
        tokens = values if isinstance(values, Tensor) else torch.tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be integers [length], got {type(values).__name__}: {error}") from error
    is_empty = tokens.ndim == 1 and not len(tokens)  # an empty list has no dtype of its own
    if tokens.ndim != 1 or (not is_empty and (tokens.is_floating_point() or tokens.is_complex())):
        raise TypeError(f"{name} must be integers [length], got {tokens.dtype} {list(tokens.shape)}")
    return tokens.to("cpu", torch.int64)
