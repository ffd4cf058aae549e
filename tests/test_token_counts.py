"""Trainer's count of the tokens that are not padding, against the tokens of the examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import pytest
import torch
from test_packing import Corpus, pad_right
from test_preference import answers_of, random_groups, random_pairs
from tiny_models import build
from transformers import Trainer, TrainerState, TrainingArguments, default_data_collator

from flashmask_kernels import ops
from hf_flashmask import (
    FlashMaskCallback,
    PackedDataCollator,
    SharedPromptDataCollator,
    integration,
    set_loss,
    share_prefixes,
)


def arguments_of(folder: Path, **options: Any) -> TrainingArguments:
    """Of four examples a step, as the collator makes them."""
    return TrainingArguments(
        str(folder),
        report_to="none",
        remove_unused_columns=False,
        per_device_train_batch_size=4,
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )


def num_input_tokens_seen(model: Any, examples: list[dict[str, Any]], collator: Any, folder: Path) -> int:
    trainer = Trainer(
        model=model,
        args=arguments_of(folder, use_cpu=True, num_train_epochs=1, include_num_input_tokens_seen="non_padding"),
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


# FlashMaskCallback


def logged(
    model: Any,
    examples: list[dict[str, Any]],
    collator: Any,
    folder: Path,
    callback: FlashMaskCallback | None = None,
    evaluated: list[dict[str, Any]] | None = None,
    device: str = "cpu",
) -> Any:
    """The logs of a training of two steps with four examples each, without those at its end."""
    arguments = arguments_of(
        folder,
        use_cpu=device == "cpu",
        max_steps=2,
        logging_steps=1,
        train_sampling_strategy="sequential",
        eval_strategy="no" if evaluated is None else "steps",
        eval_steps=1,
    )
    if device == "cuda":
        arguments._n_gpu = 1  # of those there; Trainer has more of them in nn.DataParallel
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=examples,
        eval_dataset=evaluated,
        data_collator=collator,
        callbacks=[callback or FlashMaskCallback()],
    )
    trainer.train()
    return [log for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize("with_bounds", [False, True])
def test_the_callback_logs_the_fill_of_packed_rows(with_bounds: bool, tmp_path: Path) -> None:
    model, lengths = build("llama"), [9, 2, 17, 5, 7, 13, 6, 3]
    collator = PackedDataCollator(24, pad_to_multiple_of=24, bounds_for=model.config if with_bounds else None)
    logs = logged(model, Corpus(lengths).examples("list"), collator, tmp_path)
    for log, tokens in zip(logs, (33, 29)):  # both batches need two rows of 24
        assert log["flashmask/fill"] == pytest.approx(tokens / 48, abs=1e-4)
        assert log["flashmask/padding"] == 48 - tokens
        assert log["flashmask/tokens_per_document"] == tokens / 4
        assert "flashmask/shared" not in log


@pytest.mark.parametrize("with_positions", [False, True])
def test_the_callback_counts_documents_by_ids(with_positions: bool, tmp_path: Path) -> None:
    row = {"input_ids": [5, 6, 7, 8, 9, 3], "attention_mask": [1, 1, 2, 2, 3, 0], "labels": [5, 6, 7, 8, 9, -100]}
    if with_positions:
        row["position_ids"] = [0, 1, 2, 3, 4, 0]
    for log in logged(build("llama"), [row] * 8, default_data_collator, tmp_path):
        assert log["flashmask/tokens_per_document"] == pytest.approx(5 / 3, abs=1e-4)


def test_the_callback_logs_padding_and_shared_tokens(tmp_path: Path) -> None:
    model = build("llama")
    rows = [[1, 2, 3, 4, 5], [1, 2, 3, 9], [7, 8], [7, 8, 9, 10, 11, 12]] * 2
    examples = [{"input_ids": row} for row in rows]
    with share_prefixes(model) as sharing:
        first, second = logged(model, examples, pad_right, tmp_path, FlashMaskCallback(sharing))
    assert first["flashmask/fill"] == pytest.approx(17 / 24, abs=1e-4)
    assert first["flashmask/shared"] == second["flashmask/shared"] == pytest.approx(5 / 17, abs=1e-4)
    assert "share_prefixes computed 24 of 34 tokens in 2 calls: 29.4% saved" in sharing.summary


def test_the_callback_does_not_count_evaluation(tmp_path: Path) -> None:
    model = build("llama")
    examples = [{"input_ids": row} for row in [[1, 2, 3, 4, 5], [1, 2, 3, 9], [7, 8], [7, 8, 9, 10, 11, 12]] * 2]
    same = [{"input_ids": [1, 2, 3, 4, 5, 6, 7]}] * 8
    with share_prefixes(model) as sharing:
        logs = logged(model, examples, pad_right, tmp_path, FlashMaskCallback(sharing), evaluated=same)
    assert sharing.given_tokens == 2 * 17 + 2 * 8 * 7
    for log in logs:
        assert log["flashmask/shared"] == pytest.approx(5 / 17, abs=1e-4)


def test_the_callback_does_not_count_answers_that_are_generated_in_a_step(tmp_path: Path) -> None:
    """As GRPO generates them, in training mode."""

    class Generating(Trainer):
        def compute_loss(self, model: Any, inputs: dict[str, Any], **kwargs: Any) -> Any:
            with torch.no_grad():
                model.generate(torch.tensor([[0, 5, 6], [7, 8, 9]]), max_new_tokens=3, pad_token_id=0)
            return super().compute_loss(model, inputs, **kwargs)

    trainer = Generating(
        model=build("llama"),
        args=arguments_of(tmp_path, use_cpu=True, max_steps=1, logging_steps=1, train_sampling_strategy="sequential"),
        train_dataset=[{"input_ids": list(range(1, 1 + length))} for length in (9, 2, 17, 5)],
        data_collator=pad_right,
        callbacks=[FlashMaskCallback()],
    )
    trainer.train()
    log = next(log for log in trainer.state.log_history if "loss" in log)
    assert log["flashmask/fill"] == pytest.approx(33 / 68, abs=1e-4)
    assert log["flashmask/padding"] == 35
    assert log["flashmask/tokens_per_document"] == 33 / 4


def test_evaluations_get_no_figures_of_the_training(tmp_path: Path) -> None:
    """Two steps are behind the evaluation, and the training has logged none yet."""
    model = build("llama")
    examples = [{"input_ids": row} for row in [[1, 2, 3, 4, 5], [1, 2, 3, 9], [7, 8], [7, 8, 9, 10, 11, 12]] * 2]
    arguments = arguments_of(tmp_path, use_cpu=True, max_steps=4, logging_steps=4, eval_strategy="steps", eval_steps=2)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=examples * 2,
        eval_dataset=examples,
        data_collator=PackedDataCollator(24),
        callbacks=[FlashMaskCallback()],
    )
    trainer.train()
    logs = trainer.state.log_history
    assert [any(key.startswith("flashmask/") for key in log) for log in logs] == ["loss" in log for log in logs]
    assert sum("eval_loss" in log for log in logs) == 2


@pytest.mark.parametrize("slow", ["attention", "mlp"])
def test_the_callback_logs_the_part_of_attention_in_a_step(
    slow: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either attention, forward and backward, or another layer is made to take almost all of a step."""

    def slowed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            sleep(0.2)
            return function(*args, **kwargs)

        return call

    model, lengths = build("llama"), [9, 2, 17, 5, 7, 13, 6, 3]
    if slow == "mlp":
        for layer in model.model.layers:
            monkeypatch.setattr(layer.mlp, "forward", slowed(layer.mlp.forward))
    else:
        for name in ("tiled_forward", "tiled_backward"):
            monkeypatch.setattr(ops, name, slowed(getattr(ops, name)))
    examples, callback = Corpus(lengths).examples("list"), FlashMaskCallback(attention_every=2)
    first, second = logged(model, examples, PackedDataCollator(24), tmp_path, callback)
    assert "flashmask/attention" not in first
    assert (second["flashmask/attention"] > 0.5) == (slow == "attention")
    assert 0 < second["flashmask/attention"] < 1


def test_the_callback_logs_no_part_of_attention_that_flashmask_does_not_compute(tmp_path: Path) -> None:
    model, examples = build("llama", "sdpa"), [{"input_ids": [1, 2, 3]}] * 8
    for log in logged(model, examples, pad_right, tmp_path, FlashMaskCallback(attention_every=1)):
        assert "flashmask/attention" not in log


@pytest.mark.parametrize("computed", ["decoding", "dense rows"])
def test_the_part_of_attention_has_what_sdpa_computes(
    computed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reference model that attends within the step, without gradients, takes almost all of it."""
    model, reference = build("llama"), build("llama").eval()
    name = "attend_few_rows" if computed == "decoding" else "attend_dense_rows"
    attend = getattr(integration.attention, name)

    def slowed(*args: Any) -> Any:
        sleep(0.2)
        return attend(*args)

    def forward(*args: Any) -> Any:
        with torch.no_grad():
            cache = reference(tokens, use_cache=computed == "decoding").past_key_values
            if computed == "decoding":
                reference(tokens[:, -1:], past_key_values=cache)
        return forward_of_head(*args)

    monkeypatch.setattr(integration.attention, name, slowed)
    tokens, forward_of_head = torch.randint(1, 30, (1, 9)), model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", forward)
    examples, callback = Corpus([9, 2, 17, 5] * 2).examples("list"), FlashMaskCallback(attention_every=2)
    _, second = logged(model, examples, PackedDataCollator(48), tmp_path, callback)
    assert 0.5 < second["flashmask/attention"] < 1


LONG_DOCUMENTS = [{"input_ids": [1 + token % 90 for token in range(length)]} for length in (8192, 7000, 8000, 6001) * 2]
"""Rows whose attention keeps a GPU busy, and takes a good part of the step of a tiny model."""


@pytest.mark.gpu
def test_the_part_of_attention_on_a_gpu_is_what_events_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            spans.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            begin, end = spans[-1]
            begin.record()
            result = function(*args)
            end.record()
            return result

        return staticmethod(call)

    class Timed(FlashMaskCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            super().on_step_begin(*args, **kwargs)
            torch.cuda.synchronize()
            self.begin = perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            torch.cuda.synchronize()
            self.seconds = perf_counter() - self.begin
            super().on_step_end(*args, **kwargs)

    for name in ("forward", "backward"):
        monkeypatch.setattr(ops.FlashMaskAttention, name, timed(getattr(ops.FlashMaskAttention, name)))
    model, callback = build("llama"), Timed(attention_every=2)
    first, second = logged(model, LONG_DOCUMENTS, PackedDataCollator(32768), tmp_path, callback, device="cuda")
    assert "flashmask/attention" not in first
    assert len(spans) == 2 * 2 * len(model.model.layers)  # steps, forward and backward
    milliseconds = sum(begin.elapsed_time(end) for begin, end in spans[len(spans) // 2 :])
    assert 0 < second["flashmask/attention"] < 1
    assert second["flashmask/attention"] == pytest.approx(milliseconds / 1e3 / callback.seconds, rel=0.25)


@pytest.mark.gpu
def test_the_callback_waits_for_a_gpu_only_in_steps_that_it_profiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither where a step begins or ends nor where a batch is counted: a read of the device would raise."""
    waits, of_calls = [0], []
    synchronize = torch.cuda.synchronize

    def count(*args: Any) -> None:
        waits[0] += 1
        synchronize(*args)

    @contextmanager
    def watched() -> Iterator[None]:
        before = waits[0]
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
        of_calls.append(waits[0] > before)

    class Watched(FlashMaskCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            with watched():
                super().on_step_begin(*args, **kwargs)

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            with watched():
                super().on_step_end(*args, **kwargs)

        def _count(self, *args: Any) -> None:
            with watched():
                super()._count(*args)

    monkeypatch.setattr(torch.cuda, "synchronize", count)
    examples, callback = Corpus([9, 2, 17, 5] * 2).examples("list"), Watched(attention_every=2)
    logged(build("llama"), examples, PackedDataCollator(48), tmp_path, callback, device="cuda")
    assert of_calls == [False, False, False, True, False, True]


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["forward", "backward", "optimizer"])
def test_a_training_that_fails_in_a_step_leaves_nothing_behind(
    where: str, error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither torch's profiler nor a hook; the next training is profiled."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        assert torch.autograd._profiler_enabled()
        raise error

    owner, name = {
        "forward": (torch.nn.functional, "cross_entropy"),
        "backward": (ops, "tiled_backward"),
        "optimizer": (torch.optim.AdamW, "step"),
    }[where]
    model, examples = build("llama"), Corpus([9, 2, 17, 5] * 2).examples("list")
    callback = FlashMaskCallback(attention_every=1)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        with pytest.raises(error):
            logged(model, examples, PackedDataCollator(48), tmp_path, callback)
    assert not torch.autograd._profiler_enabled()
    assert not model._forward_pre_hooks
    for log in logged(model, examples, PackedDataCollator(48), tmp_path, callback):
        assert "flashmask/attention" in log


def test_a_loop_that_fails_outside_of_trainer_is_cleared_when_the_next_begins() -> None:
    """Other loops than Trainer's call callbacks too."""
    model, callback = build("llama"), FlashMaskCallback(attention_every=1)
    arguments, state = TrainingArguments(use_cpu=True), TrainerState()
    callback.on_train_begin(arguments, state, None, model)
    callback.on_step_begin(arguments, state, None)
    assert torch.autograd._profiler_enabled()
    callback.on_train_begin(arguments, state, None, model)
    assert not torch.autograd._profiler_enabled()
    assert len(model._forward_pre_hooks) == 1


def test_the_callback_refuses_a_number_of_steps_below_one() -> None:
    with pytest.raises(ValueError, match="`attention_every` must be a number of steps from 1 on, or None, got 0"):
        FlashMaskCallback(attention_every=0)


def test_the_callback_logs_prompts_that_a_row_shares(tmp_path: Path) -> None:
    model, examples = build("llama"), random_groups(1, count=8)
    set_loss(model, lambda values, labels: values.sum())
    collator = SharedPromptDataCollator()
    log = logged(model, examples, collator, tmp_path)[0]
    given = sum(len(example["prompt"]) + len(answer) for example in examples[:4] for answer in answers_of(example))
    computed = collator(examples[:4])["input_ids"].numel()  # one row without padding; equal answers are one too
    assert log["flashmask/shared"] == pytest.approx(1 - computed / given, abs=1e-4)
    assert log["flashmask/shared"] > 0
    assert log["flashmask/fill"] == 1
