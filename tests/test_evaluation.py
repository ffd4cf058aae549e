"""Trainer's evaluation of packed rows: where several processes would gather predictions, it is refused before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_set_loss import arguments_of, pairs_with_reference
from tiny_models import build
from transformers import Trainer

from hf_flashmask import PackedDataCollator, SharedPromptDataCollator, dpo_loss, set_loss

DOCUMENTS = [{"input_ids": list(range(1, length))} for length in (9, 4, 17, 6, 12)]


def pad(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    rows = [torch.tensor(example["input_ids"]) for example in examples]
    labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
    batch = {"input_ids": labels.clamp(min=0), "labels": labels.clone(), "attention_mask": (labels >= 0).long()}
    batch["labels"][:, 0] = -100  # Trainer of Transformers 5.4 counts them
    return batch


def trainer_of(
    collator: Any, examples: list[dict[str, Any]], folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> Trainer:
    """On one process, whose arguments say that it is one of two: the collectives of one process cannot fail."""
    model = build("llama")
    if isinstance(collator, SharedPromptDataCollator):
        set_loss(model, dpo_loss)
    arguments = arguments_of(folder, per_device_eval_batch_size=5, **options)
    trainer = Trainer(model=model, args=arguments, eval_dataset=examples, data_collator=collator)
    monkeypatch.setattr(type(arguments), "world_size", 2)
    return trainer


@pytest.mark.parametrize(
    ("collator", "examples"),
    [
        (PackedDataCollator(max_length=24), DOCUMENTS),
        (SharedPromptDataCollator(max_length=40), pairs_with_reference(5, count=6)),
    ],
)
def test_predictions_of_several_processes_are_refused(
    collator: Any, examples: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(collator, examples, tmp_path, monkeypatch)
    assert trainer.evaluate()["eval_loss"] > 0  # gathers losses alone
    message = f"{type(collator).__name__} with `max_length` may give each of the 2 processes a different number of rows"
    with pytest.raises(NotImplementedError, match=message):
        trainer.predict(examples)  # type: ignore[arg-type]
    trainer.compute_metrics = lambda prediction: {"rows": float(len(prediction.predictions))}
    with pytest.raises(NotImplementedError, match="evaluate without `compute_metrics`"):
        trainer.evaluate()
    trainer.args.remove_unused_columns = True  # puts the collator into another one
    with pytest.raises(NotImplementedError, match="prediction_loss_only=True"):
        trainer.evaluate()


def test_what_the_message_names_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(PackedDataCollator(max_length=24), DOCUMENTS, tmp_path, monkeypatch)
    loss = trainer.evaluate()["eval_loss"]
    trainer.compute_metrics = lambda prediction: {"rows": float(len(prediction.predictions))}
    trainer.data_collator = pad
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert found["eval_rows"] == len(DOCUMENTS)
    trainer.data_collator = PackedDataCollator()
    assert trainer.predict(DOCUMENTS).predictions.shape[0] == 1  # type: ignore[arg-type]
    trainer.data_collator = PackedDataCollator(max_length=24)
    trainer.args.prediction_loss_only = True
    assert trainer.predict(DOCUMENTS).metrics["test_loss"] == pytest.approx(loss, rel=1e-5)  # type: ignore[arg-type]


def test_one_process_predicts_rows(tmp_path: Path) -> None:
    arguments = arguments_of(tmp_path, per_device_eval_batch_size=5)
    collator = PackedDataCollator(max_length=24)
    trainer = Trainer(model=build("llama"), args=arguments, data_collator=collator)
    rows = len(collator(DOCUMENTS)["input_ids"])
    assert 1 < rows < len(DOCUMENTS)
    assert trainer.predict(DOCUMENTS).predictions.shape[0] == rows  # type: ignore[arg-type]
