"""The plain Trainer: packed rows under flashmask against padded rows of the same documents under eager attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build
from torch import Tensor
from transformers import DataCollatorWithFlattening, PreTrainedModel, Trainer, TrainingArguments

STEPS, DOCUMENTS_PER_STEP = 20, 4


class Documents(torch.utils.data.Dataset):
    """Token ids that follow a rule, which a model can learn."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        lengths = torch.randint(2, 24, (STEPS * DOCUMENTS_PER_STEP,), generator=generator).tolist()
        starts = torch.randint(1, 90, (len(lengths),), generator=generator).tolist()
        self.rows = [
            [1 + (start + 3 * step) % 96 for step in range(length)]
            for start, length in zip(starts, lengths, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.rows[index]}


def pad_right(features: list[dict[str, Any]]) -> dict[str, Tensor]:
    """One row per document. The first token of a document is no label, as in a packed row."""
    longest = max(len(feature["input_ids"]) for feature in features)
    batch = {name: torch.zeros(len(features), longest, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    batch["labels"] = torch.full((len(features), longest), -100)
    for row, feature in enumerate(features):
        tokens = torch.tensor(feature["input_ids"])
        batch["input_ids"][row, : len(tokens)] = tokens
        batch["attention_mask"][row, : len(tokens)] = 1
        batch["labels"][row, 1 : len(tokens)] = tokens[1:]
    return batch


def train(model: PreTrainedModel, collator: Any, folder: Path) -> list[float]:
    """The loss of every step."""
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=STEPS,
            per_device_train_batch_size=DOCUMENTS_PER_STEP,
            learning_rate=3e-3,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
            seed=5,
        ),
        train_dataset=Documents(),
        data_collator=collator,
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("flash_attn_kwargs", [False, True])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss"])
def test_losses_equal_eager_on_padded_rows(name: str, flash_attn_kwargs: bool, tmp_path: Path) -> None:
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=flash_attn_kwargs)
    packed, padded = build(name), build(name, "eager")
    losses = train(packed, collator, tmp_path)
    expected = train(padded, pad_right, tmp_path)
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.5
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=2e-4, atol=2e-4)
    for (parameter, trained), reference in zip(packed.named_parameters(), padded.parameters(), strict=True):
        # Adam divides by the size of the gradient: where the gradient is rounding noise, the step is too.
        difference = (trained - reference).abs().mean()
        assert difference < 1e-3, parameter


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_gradient_checkpointing_changes_nothing(name: str, use_reentrant: bool, tmp_path: Path) -> None:
    losses = train(build(name), DataCollatorWithFlattening(), tmp_path)
    model = build(name)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert train(model, DataCollatorWithFlattening(), tmp_path) == losses
