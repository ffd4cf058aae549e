"""Trainer's count of the tokens that are not padding, against the tokens of the examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_packing import Corpus, pad_right
from test_preference import answers_of, random_groups, random_pairs
from tiny_models import build
from transformers import Trainer, TrainingArguments

from hf_flashmask import PackedDataCollator, SharedPromptDataCollator, set_loss, share_prefixes


def num_input_tokens_seen(model: Any, examples: list[dict[str, Any]], collator: Any, folder: Path) -> int:
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(folder),
            use_cpu=True,
            report_to="none",
            remove_unused_columns=False,
            num_train_epochs=1,
            per_device_train_batch_size=4,
            save_strategy="no",
            disable_tqdm=True,
            include_num_input_tokens_seen="non_padding",
        ),
        train_dataset=examples,
        data_collator=collator,
    )
    trainer.train()
    return trainer.state.num_input_tokens_seen


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "llama4"])
@pytest.mark.parametrize("max_length", [None, 24])
def test_packed_documents_with_bounds(name: str, max_length: int | None, tmp_path: Path) -> None:
    lengths = [9, 1, 17, 5, 2, 13, 6, 1, 3]
    model = build(name)
    collator = PackedDataCollator(max_length, pad_to_multiple_of=16, bounds_for=model.config)
    assert num_input_tokens_seen(model, Corpus(lengths).examples("list"), collator, tmp_path) == sum(lengths)


@pytest.mark.parametrize("examples", [random_groups(1, count=6), random_pairs(2, count=6)], ids=["groups", "pairs"])
def test_shared_prompts(examples: list[dict[str, Any]], tmp_path: Path) -> None:
    model = build("llama")
    set_loss(model, lambda values, labels: values.sum())
    collator = SharedPromptDataCollator(max_length=80, pad_to_multiple_of=16)
    given = sum(len(example["prompt"]) + len(answer) for example in examples for answer in answers_of(example))
    assert num_input_tokens_seen(model, examples, collator, tmp_path) == given


def test_padded_batches(tmp_path: Path) -> None:
    """`share_prefixes` leaves the batch itself alone."""
    model, lengths = build("llama"), [9, 1, 17, 5]
    examples = [{"input_ids": list(range(1, length + 1))} for length in lengths]
    with share_prefixes(model) as shared:
        assert num_input_tokens_seen(model, examples, pad_right, tmp_path) == sum(lengths)
    assert shared.computed_tokens < shared.given_tokens == sum(lengths)
