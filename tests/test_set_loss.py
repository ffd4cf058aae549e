"""`set_loss` and `reset_loss`: called again, with options and labels that do not fit, and in evaluations by Trainer."""

from __future__ import annotations

import copy
import functools
import io
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from test_preference import (
    all_log_probs_alone,
    answers_of,
    assert_values_equal,
    build_reward_model,
    by_example,
    padded,
    random_groups,
    random_pairs,
)
from tiny_models import VOCABULARY, build, eager_twin
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from hf_flashmask import reset_loss, set_loss
from hf_flashmask.training import (
    AnswerLabels,
    SharedPromptDataCollator,
    answer_log_probs,
    compute_log_probs,
    dpo_loss,
    reward_loss,
    split_pairs,
)


def pairs_with_reference(seed: int, count: int = 5) -> list[dict[str, Any]]:
    examples = random_pairs(seed, count)
    for number, example in enumerate(examples):
        example["ref_logps"] = [-30.0 - number, -31.0]
    return examples


def sum_of_values(values: Tensor, labels: AnswerLabels) -> Tensor:
    return values.sum()


def test_models_in_which_answers_meet_outside_of_attention_are_refused() -> None:
    config = transformers.Lfm2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
    )
    model = transformers.Lfm2ForCausalLM._from_config(config, attn_implementation="flashmask")
    refused_by_both(model, "cannot share what goes from token to token other than by")


def refused_by_both(model: nn.Module, message: str) -> None:
    with pytest.raises(NotImplementedError, match=f"set_loss {message}"):
        set_loss(model, dpo_loss)
    with pytest.raises(NotImplementedError, match=f"compute_log_probs {message}"):
        compute_log_probs(model, random_pairs(2, 3), SharedPromptDataCollator())


def test_models_that_count_positions_from_another_number_are_refused() -> None:
    config = transformers.RobertaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, is_decoder=True
    )
    model = transformers.RobertaForCausalLM._from_config(config, attn_implementation="flashmask")
    refused_by_both(model, "counts positions from 0, but RobertaModel counts them from the one after `padding_idx`")


def test_adapters_for_which_a_row_is_one_sequence_are_refused() -> None:
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    refused_by_both(get_peft_model(build("llama"), prompts), "cannot share prefixes under prompt learning of PEFT")
    alora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6])
    refused_by_both(get_peft_model(build("llama"), alora), ".* has the aLoRA adapter 'default' of PEFT")


def test_rows_whose_columns_matter_are_refused() -> None:
    """Llama 4 scales scores by the column of the query from `floor_scale` on, whatever its position."""
    examples = random_pairs(3, 4)
    model = build("llama4", floor_scale=8, attn_temperature_tuning=True)
    with pytest.raises(ValueError, match=r"a row of the batch has \d+ tokens, and this model scales scores by the col"):
        compute_log_probs(model, examples, SharedPromptDataCollator())
    set_loss(model, sum_of_values)
    with pytest.raises(ValueError, match="set `max_length` to at most that"):
        model(**SharedPromptDataCollator()(examples))


# Again and again


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_a_loss_can_be_set_again(name: str) -> None:
    examples = pairs_with_reference(1)
    batch = SharedPromptDataCollator(max_length=64)(examples)
    model = build(name)
    set_loss(model, dpo_loss, beta=0.3)
    expected = model(**batch).loss
    again = build(name)
    set_loss(again, sum_of_values)
    total = again(**batch).loss
    set_loss(again, dpo_loss, beta=0.3)
    torch.testing.assert_close(again(**batch).loss, expected, rtol=0, atol=0)
    expected_total = sum(torch.stack(values).sum() for values in all_log_probs_alone(eager_twin(model), examples))
    torch.testing.assert_close(total, expected_total, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_log_probs_can_be_computed_after_a_loss_was_set(name: str) -> None:
    examples, collator = random_groups(2), SharedPromptDataCollator()
    model = build(name)
    expected = compute_log_probs(model, examples, collator)
    set_loss(model, sum_of_values)
    assert compute_log_probs(model, examples, collator) == expected
    with torch.no_grad():
        assert_values_equal(
            [[torch.tensor(value) for value in row] for row in expected],
            all_log_probs_alone(eager_twin(model), examples),
        )


def test_a_loss_can_be_taken_back() -> None:
    batch = SharedPromptDataCollator()(pairs_with_reference(3))
    input_ids = torch.randint(1, VOCABULARY, (2, 9))
    model = build("mistral")
    attributes, hooks = set(vars(model)), len(model.model._forward_pre_hooks)
    expected = model(input_ids, labels=input_ids).loss
    reset_loss(model)  # nothing to undo
    set_loss(model, dpo_loss)
    set_loss(model, dpo_loss, beta=0.2)
    assert torch.isfinite(model(**batch).loss)
    reset_loss(model)
    assert set(vars(model)) == attributes
    assert len(model.model._forward_pre_hooks) == hooks
    torch.testing.assert_close(model(input_ids, labels=input_ids).loss, expected, rtol=0, atol=0)


def test_a_loss_of_the_users_own_comes_back() -> None:
    model = build("llama")
    model.loss_function = own = lambda **arguments: torch.tensor(3.0)
    model.accepts_loss_kwargs = True
    set_loss(model, dpo_loss)
    assert model.accepts_loss_kwargs is False
    reset_loss(model)
    assert model.loss_function is own
    assert model.accepts_loss_kwargs is True


def test_models_with_a_loss_can_be_copied_and_saved() -> None:
    batch = SharedPromptDataCollator()(pairs_with_reference(4))
    model = build("gemma2")
    set_loss(model, dpo_loss, beta=0.3)
    expected = model(**batch).loss
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        torch.testing.assert_close(other(**batch).loss, expected, rtol=0, atol=0)
        set_loss(other, dpo_loss, beta=0.3)
        torch.testing.assert_close(other(**batch).loss, expected, rtol=0, atol=0)
        reset_loss(other)
        assert not other.model._forward_pre_hooks
    torch.testing.assert_close(model(**batch).loss, expected, rtol=0, atol=0)


def test_adapters_of_peft() -> None:
    batch = SharedPromptDataCollator()(random_groups(5))
    model = get_peft_model(build("mistral"), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    set_loss(model, sum_of_values)
    expected = model(**batch).loss
    set_loss(model, sum_of_values)
    torch.testing.assert_close(model(**batch).loss, expected, rtol=0, atol=0)
    reset_loss(model)
    assert "_loss_function" not in vars(model.get_base_model())


# Options


def needs_a_scale(values: Tensor, labels: AnswerLabels, *, scale: float, shift: float = 0.0) -> Tensor:
    return values.sum() * scale + shift


@pytest.mark.parametrize(
    ("loss", "options", "error", "message"),
    [
        (
            dpo_loss,
            {"betta": 0.1},
            TypeError,
            "dpo_loss has no option betta; its options are: beta, label_smoothing, ref_log_probs",
        ),
        (dpo_loss, {"label_smoothing": 0.5}, ValueError, "`label_smoothing` must be from 0 to less than 0.5, got 0.5"),
        (dpo_loss, {"beta": -0.1}, ValueError, "`beta` must be a number above 0, got -0.1"),
        (dpo_loss, {"beta": "0.1"}, ValueError, "`beta` must be a number above 0, got '0.1'"),
        (functools.partial(dpo_loss, label_smoothing=0.7), {}, ValueError, "`label_smoothing` must be"),
        (functools.partial(dpo_loss, betta=0.7), {}, TypeError, "dpo_loss has no option betta"),
        (needs_a_scale, {}, TypeError, "needs_a_scale needs the option scale; its options are: scale, shift"),
        (lambda values, labels: values, {"beta": 1}, TypeError, "has no option beta; its options are: none"),
        (reward_loss, {}, ValueError, "reward_loss takes scores of a sequence classifier .* is a LlamaForCausalLM"),
    ],
)
def test_losses_are_checked_when_they_are_set(
    loss: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = build("llama")
    with pytest.raises(error, match=message):
        set_loss(model, loss, **options)
    assert "_loss_function" not in vars(model)


def test_options_of_other_losses_are_passed_on() -> None:
    batch = SharedPromptDataCollator()(random_groups(6))
    model = build("llama")
    set_loss(model, sum_of_values)
    total = model(**batch).loss
    set_loss(model, functools.partial(needs_a_scale, scale=2.0), shift=1.0)
    torch.testing.assert_close(model(**batch).loss, 2 * total + 1)
    set_loss(model, lambda values, labels, **options: values.sum() * options["scale"], scale=3.0)
    torch.testing.assert_close(model(**batch).loss, 3 * total)


def test_log_probs_of_a_classifier_are_refused() -> None:
    with pytest.raises(ValueError, match=r"dpo_loss takes log-probabilities .* but the model is a Llama"):
        set_loss(build_reward_model("llama"), dpo_loss)


# Labels that do not fit the loss


def test_ordinary_labels_are_refused() -> None:
    model = build("llama")
    set_loss(model, dpo_loss)
    input_ids = torch.randint(1, VOCABULARY, (2, 9))
    with pytest.raises(TypeError, match=r"its `labels` are Tensor: .* or call reset_loss\(model\)"):
        model(input_ids, labels=input_ids)


@pytest.mark.parametrize("build_model", [build, build_reward_model])
def test_a_model_without_a_loss_says_so(build_model: Any) -> None:
    batch = SharedPromptDataCollator()(random_pairs(7))
    with pytest.raises(
        (TypeError, AttributeError), match=r"call set_loss\(model, \.\.\.\) on the model that is trained"
    ):
        build_model("llama")(**batch)


def arguments_of(folder: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        str(folder),
        use_cpu=True,
        report_to="none",
        remove_unused_columns=False,
        max_steps=1,
        disable_tqdm=True,
        **options,
    )


def test_label_smoothing_of_trainer_is_refused(tmp_path: Path) -> None:
    model = build("llama")
    set_loss(model, dpo_loss)
    trainer = Trainer(
        model=model,
        args=arguments_of(tmp_path, label_smoothing_factor=0.1),
        train_dataset=pairs_with_reference(8),
        data_collator=SharedPromptDataCollator(),
    )
    with pytest.raises(TypeError, match=r"leave out what computes another loss .`label_smoothing_factor`"):
        trainer.train()


def lce_forward(self: nn.Module, input_ids: Tensor, labels: Any = None, **kwargs: Any) -> Tensor:
    """What matters of Liger's: it has a loss of its own, which shifts the labels, besides `self.loss_function(`."""
    return nn.functional.pad(labels, (0, 1))


@pytest.mark.parametrize("of_class", [False, True])
def test_models_of_liger_are_refused(of_class: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lce_forward, "__module__", "liger_kernel.transformers.model.llama")
    model = build("llama")
    if of_class:
        monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", lce_forward)
    else:
        model.forward = types.MethodType(lce_forward, model)
    with pytest.raises(ValueError, match=r"is Liger's, .* \(`use_liger_kernel=False`\)"):
        set_loss(model, dpo_loss)


def test_liger_applied_afterwards_is_refused() -> None:
    """As by Trainer, with `use_liger_kernel`."""
    model = build("llama")
    set_loss(model, dpo_loss)
    model.forward = types.MethodType(lce_forward, model)
    with pytest.raises(TypeError, match=r"gave them to pad\(\): .*`use_liger_kernel`"):
        model(**SharedPromptDataCollator()(random_pairs(9)))


# Evaluation


class Metrics:
    """Keeps what it is called with."""

    def __call__(self, prediction: transformers.EvalPrediction) -> dict[str, float]:
        self.predictions, self.labels = prediction.predictions, prediction.label_ids
        return {"rows": float(len(self.labels["last"]))}


def evaluate(
    model: nn.Module, examples: list[dict[str, Any]], folder: Path, collator: SharedPromptDataCollator, **options: Any
) -> tuple[Metrics, Any]:
    metrics = Metrics()
    trainer = Trainer(
        model=model,
        args=arguments_of(folder, per_device_eval_batch_size=3, **options),
        eval_dataset=examples,
        data_collator=collator,
        compute_metrics=metrics,
    )
    evaluated = trainer.evaluate()
    predicted = trainer.predict(examples)  # type: ignore[arg-type]
    assert evaluated["eval_loss"] == predicted.metrics["test_loss"]
    assert evaluated["eval_rows"] == len(predicted.label_ids["last"])
    return metrics, evaluated


@pytest.mark.parametrize("accumulation", [None, 1])
@pytest.mark.parametrize("max_length", [None, 40])
def test_metrics_of_answers_of_unequal_lengths(
    tmp_path: Path, max_length: int | None, accumulation: int | None
) -> None:
    """Batches differ in everything: rows, answers, pairs, labels. The metrics compute what each answer alone does."""
    examples = pairs_with_reference(10, count=11)
    model, collator = build("llama"), SharedPromptDataCollator(max_length=max_length)
    set_loss(model, dpo_loss)
    metrics, _ = evaluate(model, examples, tmp_path, collator, eval_accumulation_steps=accumulation)
    labels = metrics.labels.tensors()
    log_probs = answer_log_probs(torch.from_numpy(metrics.predictions), labels)

    # Trainer joins the rows of the batches, whose examples are counted from 0 each.
    first, expected = 0, []
    with torch.no_grad():
        alone = all_log_probs_alone(eager_twin(model), examples)
    for batch in range(0, len(examples), 3):
        own = collator(examples[batch : batch + 3])["labels"]["example"]
        for row in own.tolist():
            numbers = dict.fromkeys(number for number in row if number >= 0)
            expected.append([value for number in numbers for value in alone[batch + number]])
        first += len(own)
    assert len(log_probs) == first == len(expected)
    for row, values in zip(log_probs, expected):
        torch.testing.assert_close(row[: len(values)], torch.stack(values), rtol=1e-5, atol=1e-5)
        assert (row[len(values) :] == 0).all()
    chosen, rejected, is_pair = split_pairs(log_probs, labels)
    assert int(is_pair.sum()) == len(examples)
    differences = torch.tensor([float(row[0] - row[1]) for row in alone])
    actual = (chosen - rejected)[is_pair]
    torch.testing.assert_close(actual.sort().values, differences.sort().values, rtol=1e-4, atol=1e-4)


def test_metrics_of_groups(tmp_path: Path) -> None:
    model = build("llama")
    set_loss(model, sum_of_values)
    metrics, _ = evaluate(model, random_groups(11, count=8), tmp_path, SharedPromptDataCollator())
    ends = metrics.labels["ends"]
    assert (ends < 0).any()
    assert ends.max() == (metrics.labels["answers"] >= 0).sum(1).max()


def test_reward_models_are_evaluated(tmp_path: Path) -> None:
    examples = random_pairs(12, count=8)
    model = build_reward_model("llama")
    set_loss(model, reward_loss)
    metrics, evaluated = evaluate(model, examples, tmp_path, SharedPromptDataCollator(), eval_accumulation_steps=2)
    sequences = [example["prompt"] + answer for example in examples for answer in answers_of(example)]
    with torch.no_grad():
        scores = eager_twin(model)(**padded(sequences)).logits[:, 0].view(-1, 2)
    losses = nn.functional.softplus(scores[:, 1] - scores[:, 0])
    assert evaluated["eval_loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert len(metrics.predictions) == 3


def test_labels_survive_a_padded_join() -> None:
    """-100, with which Trainer pads, is padding like -1."""
    examples = pairs_with_reference(13)
    labels = SharedPromptDataCollator()(examples)["labels"]
    wider = AnswerLabels(
        {
            name: nn.functional.pad(value, (0,) * (2 * value.ndim - 4) + (0, 3), value=-100)
            for name, value in labels.items()
        }
    )
    logits = torch.randn(*labels["positions"].shape, VOCABULARY)
    log_probs = answer_log_probs(logits, labels)
    padded_logits = nn.functional.pad(logits, (0, 0, 0, 3), value=-100.0)
    joined = answer_log_probs(padded_logits, wider)
    assert by_example(joined[:, : log_probs.shape[1]], labels) == by_example(log_probs, labels)
    assert (joined[:, log_probs.shape[1] :] == 0).all()
    torch.testing.assert_close(dpo_loss(joined, wider), dpo_loss(log_probs, labels))
