"""The packing collator: the content of a batch, and the losses and gradients of models, against each document alone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import VOCABULARY, WINDOW, build, config_of, eager_twin
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hf_flashmask import bounds
from hf_flashmask.training import PackedDataCollator, pack_lengths

PAD = 10**6
STRATEGIES = ["first_fit_decreasing", "in_order"]
LENGTHS = [9, 1, 17, 5, 2, 13, 6, 1, 3]
AS_INPUT: dict[str, Callable[[list[int]], Any]] = {
    "list": list,
    "numpy": lambda values: np.array(values, dtype=np.int32),
    "tensor": lambda values: torch.tensor(values, dtype=torch.int64),
}


# pack_lengths


def first_fit_decreasing(lengths: list[int], max_length: int) -> list[list[int]]:
    """The definition, in quadratic time."""
    rows: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index], reverse=True):
        fits = [row for row in rows if sum(lengths[other] for other in row) + lengths[index] <= max_length]
        if fits:
            fits[0].append(index)
        else:
            rows.append([index])
    return [sorted(row) for row in rows]


@settings(deadline=None)
@given(st.lists(st.integers(0, 20), max_size=40), st.integers(20, 60))
def test_first_fit_decreasing_is_what_its_name_says(lengths: list[int], max_length: int) -> None:
    assert pack_lengths(lengths, max_length) == first_fit_decreasing(lengths, max_length)


@settings(deadline=None)
@given(st.lists(st.integers(0, 20), max_size=40), st.integers(20, 60))
def test_in_order_opens_a_row_only_for_what_does_not_fit(lengths: list[int], max_length: int) -> None:
    rows = pack_lengths(lengths, max_length, "in_order")
    assert [index for row in rows for index in row] == list(range(len(lengths)))
    totals = [sum(lengths[index] for index in row) for row in rows]
    assert all(total <= max_length for total in totals)
    assert all(total + lengths[row[0]] > max_length for total, row in zip(totals, rows[1:]))


def test_100_000_documents_take_seconds() -> None:
    lengths = torch.randint(1, 4097, (100_000,), generator=torch.Generator().manual_seed(0)).tolist()
    start = time.perf_counter()
    rows = pack_lengths(lengths, 4096)
    assert time.perf_counter() - start < 20  # one second; a search through all the rows would take many minutes
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert max(sum(lengths[index] for index in row) for row in rows) <= 4096
    assert sum(lengths) / (4096 * len(rows)) > 0.99


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([3, 9, 4], 8), r"from 0 to `max_length` \(8\), got 9 at index 1"),
        (([3, -1], 8), "got -1 at index 1"),
        (([3], 0), "`max_length` must be an integer of at least 1, got 0"),
        (([3], 2.5), "`max_length` must be an integer of at least 1, got 2.5"),
        (([3], 8, "best_fit"), r"`strategy` must be one of \['first_fit_decreasing', 'in_order'\], got 'best_fit'"),
    ],
)
def test_pack_lengths_refuses(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_lengths(*arguments)


# What is in a batch


class Corpus:
    """Documents whose tokens all differ: every token of a batch identifies itself. Some have labels."""

    def __init__(self, lengths: list[int], has_labels: bool = False) -> None:
        ids = iter(range(sum(lengths)))
        self.documents = [[next(ids) for _ in range(length)] for length in lengths]
        self.place = {
            token: (number, position) for number, ids in enumerate(self.documents) for position, token in enumerate(ids)
        }
        self.has_labels = has_labels

    def label(self, token: int) -> int:
        if not self.has_labels:
            return token
        return -100 if token % 3 == 0 else 1000 + token

    def examples(self, kind: str) -> list[dict[str, Any]]:
        as_input = AS_INPUT[kind]
        examples: list[dict[str, Any]] = [{"input_ids": as_input(document)} for document in self.documents]
        if self.has_labels:
            for example, document in zip(examples, self.documents):
                example["labels"] = as_input([self.label(token) for token in document])
        return examples


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(any),
    max_length=st.none() | st.integers(12, 30),
    strategy=st.sampled_from(STRATEGIES),
    multiple=st.sampled_from([1, 2, 7, 16]),
    has_labels=st.booleans(),
    kind=st.sampled_from(list(AS_INPUT)),
)
def test_every_token_is_packed_once_with_its_position_and_label(
    lengths: list[int], max_length: int | None, strategy: Any, multiple: int, has_labels: bool, kind: str
) -> None:
    corpus = Corpus(lengths, has_labels)
    collator = PackedDataCollator(max_length, strategy=strategy, pad_to_multiple_of=multiple, pad_token_id=PAD)
    batch = collator(corpus.examples(kind))
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    assert {(tensor.dtype, tensor.shape) for tensor in batch.values()} == {(torch.int64, batch["input_ids"].shape)}

    packed: list[int] = []
    used = []
    for tokens, labels, positions in zip(*(batch[key].tolist() for key in ("input_ids", "labels", "position_ids"))):
        used.append(len(tokens) - tokens.count(PAD))
        for column, (token, label, position) in enumerate(zip(tokens, labels, positions)):
            if column >= used[-1]:
                assert (token, label, position) == (PAD, -100, 0)
                continue
            document, expected_position = corpus.place[token]
            assert position == expected_position
            assert label == (-100 if position == 0 else corpus.label(token))
            if position > 0:
                assert tokens[column - 1] == corpus.documents[document][position - 1]
        packed += tokens[: used[-1]]
    assert sorted(packed) == sorted(corpus.place)
    if strategy == "in_order" or max_length is None:
        assert packed == sorted(corpus.place)

    assert max_length is None or max(used) <= max_length
    assert (
        (len(used) == 1)
        if max_length is None
        else (len(used) == len(pack_lengths([n for n in lengths if n], max_length, strategy)))
    )
    assert batch["input_ids"].shape[1] == math.ceil(max(used) / multiple) * multiple
    assert collator.fill == sum(lengths) / batch["input_ids"].numel()


def test_multiple_of_max_length_fixes_the_shape() -> None:
    collator = PackedDataCollator(16, pad_to_multiple_of=16)
    assert collator(Corpus([3]).examples("list"))["input_ids"].shape == (1, 16)
    assert collator(Corpus([9, 9]).examples("list"))["input_ids"].shape == (2, 16)


def test_fill_counts_all_batches() -> None:
    collator = PackedDataCollator(10, pad_to_multiple_of=10)
    assert math.isnan(collator.fill)
    collator(Corpus([10, 4]).examples("list"))
    assert collator.fill == 14 / 20
    collator(Corpus([1]).examples("list"))
    assert collator.fill == 15 / 30


def test_workers_pack_the_same_batches_and_count_for_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr("hf_flashmask.training.packing.logger.warning", warnings.append)
    examples = Corpus(LENGTHS).examples("list")
    collator, copied = PackedDataCollator(20), PackedDataCollator(20)
    expected = list(DataLoader(examples, batch_size=4, collate_fn=collator))
    batches = list(DataLoader(examples, batch_size=4, collate_fn=copied, num_workers=1))
    assert len(batches) == 3
    for batch, other in zip(batches, expected, strict=True):
        torch.testing.assert_close(batch, other, rtol=0, atol=0)
    assert 0 < collator.fill <= 1
    assert not warnings
    assert math.isnan(copied.fill)
    assert "FlashMaskCallback" in warnings[0]


# Too long


def test_truncate_keeps_the_beginning() -> None:
    batch = PackedDataCollator(4, overflow="truncate", strategy="in_order")(Corpus([4, 9, 2], True).examples("list"))
    assert batch["input_ids"].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [13, 14, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 1001, 1002, -100], [-100, 1005, -100, 1007], [-100, 1014, -100, -100]]


def test_split_makes_documents_of_the_pieces() -> None:
    batch = PackedDataCollator(4, overflow="split", strategy="in_order")(Corpus([9, 2]).examples("tensor"))
    assert batch["input_ids"].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 0, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 1, 2, 3], [-100, 5, 6, 7], [-100, -100, 10, -100]]


@settings(deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any), st.sampled_from(STRATEGIES))
def test_split_loses_no_token(lengths: list[int], strategy: Any) -> None:
    batch = PackedDataCollator(7, overflow="split", strategy=strategy, pad_token_id=PAD)(
        Corpus(lengths).examples("list")
    )
    tokens = batch["input_ids"][batch["input_ids"] != PAD].tolist()
    assert sorted(tokens) == list(range(sum(lengths)))


# Bounds


def visible(corpus: Corpus, row: list[int], can_see: Callable[[int, int], bool]) -> Tensor:
    """The mask of one row, pair by pair: `can_see(query position, key position)` inside a document, nothing else."""
    mask = torch.zeros(len(row), len(row), dtype=torch.bool)
    for i, query in enumerate(row):
        for j, key in enumerate(row[: i + 1]):
            if query != PAD and key != PAD:
                (query_document, query_position), (key_document, key_position) = corpus.place[query], corpus.place[key]
                mask[i, j] = query_document == key_document and can_see(query_position, key_position)
    return mask


SEES: dict[str, Callable[[int, int], bool]] = {
    "full_attention": lambda query, key: True,
    "sliding_attention": lambda query, key: query - key < WINDOW,
    "chunked_attention": lambda query, key: query // WINDOW == key // WINDOW,
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("name", "layer_types"),
    [
        ("llama", ["full_attention"]),
        ("qwen3", ["full_attention"]),
        ("mistral", ["sliding_attention"]),
        ("gemma2", ["full_attention", "sliding_attention"]),
        ("gpt_oss", ["full_attention", "sliding_attention"]),
        ("llama4", ["chunked_attention", "full_attention"]),
    ],
)
def test_bounds_are_the_whole_mask(name: str, layer_types: list[str], strategy: Any) -> None:
    corpus = Corpus(LENGTHS)
    collator = PackedDataCollator(
        20, strategy=strategy, pad_to_multiple_of=3, pad_token_id=PAD, bounds_for=config_of(name)
    )
    batch = collator(corpus.examples("list"))
    masks = batch["attention_mask"]
    if len(layer_types) == 1:
        masks = {layer_types[0]: masks}
    assert sorted(masks) == layer_types
    for layer_type, mask in masks.items():
        assert (mask.dtype, mask.shape[1:3]) == (torch.int32, (1, 1))
        assert mask.is_contiguous()
        expected = [visible(corpus, row, SEES[layer_type]) for row in batch["input_ids"].tolist()]
        assert torch.equal(bounds.to_dense(mask), torch.stack(expected)[:, None])


# Models


def alone(twin: PreTrainedModel, examples: list[dict[str, list[int]]]) -> tuple[float, list[Tensor]]:
    """Mean loss per label, and its gradients, with every document in a call of its own."""
    total, num_labels = torch.zeros(()), 0
    for example in examples:
        logits, labels = twin(torch.tensor([example["input_ids"]])).logits[0], example["labels"]
        for position in range(1, len(labels)):
            if labels[position] != -100:
                total = total - logits[position - 1].log_softmax(-1)[labels[position]]
                num_labels += 1
    loss = total / num_labels
    loss.backward()
    return loss.item(), [parameter.grad for parameter in twin.parameters()]


@pytest.mark.parametrize("returns_bounds", [False, True], ids=["position_ids", "bounds"])
@pytest.mark.parametrize("max_length", [None, 24])
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma2", "gpt_oss", "llama4"])
def test_loss_and_gradients_equal_each_document_alone(name: str, max_length: int | None, returns_bounds: bool) -> None:
    model = build(name)
    twin = eager_twin(model)
    generator = torch.Generator().manual_seed(7)
    examples = []
    for length in LENGTHS:
        ids = torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()
        prompt = length // 4
        examples.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    collator = PackedDataCollator(max_length, pad_to_multiple_of=5, bounds_for=model.config if returns_bounds else None)
    batch = collator(examples)
    assert collator.fill < 1
    assert batch["input_ids"].shape[0] == (1 if max_length is None else 3)

    loss = model(**batch).loss
    loss.backward()
    expected_loss, expected_gradients = alone(twin, examples)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
    for (parameter, trained), expected in zip(model.named_parameters(), expected_gradients, strict=True):
        assert (trained.grad is None) == (expected is None), parameter
        if expected is not None:
            difference = (trained.grad - expected).abs().max().item()
            assert difference <= 2e-5 * max(expected.abs().max().item(), 1e-2), parameter


def test_padding_of_any_id_changes_nothing() -> None:
    model = build("gemma2")
    examples = Corpus(LENGTHS).examples("list")
    for bounds_for in (None, model.config):
        collators = [
            PackedDataCollator(24, pad_to_multiple_of=32, pad_token_id=pad_token_id, bounds_for=bounds_for)
            for pad_token_id in (0, VOCABULARY - 1)
        ]
        first, second = (model(**collator(examples)).loss for collator in collators)
        assert first.item() == second.item()


def pad_right(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """One row for each document; its first token is no label."""
    ids = [torch.tensor(example["input_ids"]) for example in examples]
    labels = [torch.cat([torch.tensor([-100]), document[1:]]) for document in ids]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(document) for document in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }


def train(model: PreTrainedModel, collator: Any, folder: Path) -> tuple[list[float], float]:
    """The losses of five steps of two batches each, and of an evaluation, under an unmodified Trainer."""
    lengths = [1 + (7 * number) % 19 for number in range(40)]
    documents = [[1 + (number + 3 * step) % 96 for step in range(length)] for number, length in enumerate(lengths)]
    columns = {
        "text": ["..."] * len(documents),
        "input_ids": documents,
        "attention_mask": [[1] * length for length in lengths],
    }
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=5,
            per_device_train_batch_size=4,
            per_device_eval_batch_size=len(documents),
            gradient_accumulation_steps=2,
            learning_rate=3e-3,
            adam_epsilon=1e-5,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict(columns),
        eval_dataset=Dataset.from_dict(columns),
        data_collator=collator,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, trainer.evaluate()["eval_loss"]


@pytest.mark.parametrize("returns_bounds", [False, True], ids=["position_ids", "bounds"])
@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_trainer_learns_as_from_padded_rows(name: str, returns_bounds: bool, tmp_path: Path) -> None:
    model = build(name)
    collator = PackedDataCollator(32, bounds_for=model.config if returns_bounds else None)
    losses, evaluation = train(model, collator, tmp_path)
    expected_losses, expected_evaluation = train(build(name, "eager"), pad_right, tmp_path)
    assert len(losses) == 5
    assert losses[-1] < losses[0] - 0.1
    assert losses == pytest.approx(expected_losses, rel=1e-3)
    assert evaluation == pytest.approx(expected_evaluation, rel=1e-3)
    assert 0.5 < collator.fill <= 1


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 0}, "`max_length` must be an integer of at least 1, got 0"),
        ({"pad_to_multiple_of": 0}, "`pad_to_multiple_of` must be an integer of at least 1, got 0"),
        ({"max_length": torch.nn.Linear(2, 2)}, "`max_length` must be an integer of at least 1, got Linear$"),
        ({"pad_token_id": None}, "`pad_token_id` must be an integer of at least 0, got None"),
        ({"strategy": "wrapped"}, "`strategy` must be one of .* got 'wrapped'"),
        ({"overflow": "drop"}, r"`overflow` must be one of \['error', 'truncate', 'split'\], got 'drop'"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PackedDataCollator(**options)


GOOD = {"input_ids": [1, 2, 3], "labels": None, "attention_mask": [1, 1, 1], "text": "...", "length": 3}


@pytest.mark.parametrize(
    ("example", "error", "message"),
    [
        ({"input_ids": list(range(9))}, ValueError, r"example 1 of the batch has 9 tokens.*`max_length` \(8\).*split"),
        ({"text": "..."}, ValueError, r"example 1 of the batch has no `input_ids`, got \['text'\]: tokenize"),
        ([1, 2, 3], ValueError, "example 1 of the batch has no `input_ids`, got list"),
        ({"input_ids": [[1, 2]]}, TypeError, r"`input_ids` of example 1 .* \[length\], got torch.int64 \[1, 2\]"),
        ({"input_ids": [1.0]}, TypeError, r"`input_ids` of example 1 .* got torch.float32 \[1\]"),
        ({"input_ids": "text"}, TypeError, "`input_ids` of example 1 of the batch must be integers .* got str"),
        ({"input_ids": [1, 2], "labels": [1]}, ValueError, "`labels` of example 1 .* each of its 2 tokens, got 1"),
        ({"input_ids": [1, 0], "attention_mask": [1, 0]}, ValueError, "example 1 .* has padding"),
        ({"input_ids": [1, 2], "attention_mask": [1, 2]}, ValueError, "example 1 .* has ids of documents in its"),
        ({"input_ids": [1], "attention_mask": [1, 1]}, ValueError, "`attention_mask` of example 1 .* 1 tokens, got 2"),
        ({"input_ids": [1], "position_ids": [0]}, ValueError, "example 1 .* has `position_ids`"),
        ({"input_ids": [1], "seq_lengths": [1]}, ValueError, "example 1 .* has `seq_lengths`"),
        ({"input_ids": [1], "shift_labels": [1]}, ValueError, "example 1 .* has `shift_labels`"),
        ({"input_ids": [1], "assistant_masks": [1]}, ValueError, "example 1 .* has `assistant_masks`.*-100 where"),
        ({"input_ids": [1], "completion_mask": [1]}, ValueError, "example 1 .* has `completion_mask`.*-100 where"),
        ({"input_ids": [1], "pixel_values": torch.ones(3, 2)}, ValueError, "example 1 .* has `pixel_values`.*tokens"),
    ],
)
def test_bad_examples_are_named(example: Any, error: type[Exception], message: str) -> None:
    collator = PackedDataCollator(8)
    assert collator([GOOD])["input_ids"].tolist() == [[1, 2, 3]]
    with pytest.raises(error, match=message):
        collator([GOOD, example])
    assert collator.fill == 1


def test_labels_are_given_for_all_examples_or_for_none() -> None:
    with_labels = {**GOOD, "labels": [-100, 2, 3]}
    with pytest.raises(ValueError, match="example 1 of the batch has no `labels`, example 0 has: give all examples"):
        PackedDataCollator(8)([with_labels, GOOD])


def test_a_batch_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="the batch has no token: `input_ids` of all its 2 examples are empty"):
        PackedDataCollator(8)([{"input_ids": []}, {"input_ids": torch.empty(0, dtype=torch.int64)}])


def test_bounds_are_refused_where_they_would_be_wrong() -> None:
    config = config_of("gpt_oss")
    collator = PackedDataCollator(8, bounds_for=config)
    config.output_router_logits = True
    with pytest.raises(NotImplementedError, match="`bounds_for`: with output_router_logits=True"):
        collator([GOOD])
    with pytest.raises(NotImplementedError, match="`bounds_for`: with output_router_logits=True"):
        PackedDataCollator(8, bounds_for=config)
    config = config_of("qwen3", layer_types=["full_attention", "linear_attention"])
    with pytest.raises(NotImplementedError, match=r"Qwen3Config has layers of type \['linear_attention'\]"):
        PackedDataCollator(8, bounds_for=config)
