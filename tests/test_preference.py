"""Packed rows with shared prompts, against a padded row for each answer under Transformers' own attention."""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from tiny_models import VOCABULARY, build, config_of, eager_twin
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from hf_flashmask import bounds
from hf_flashmask.training import (
    SharedPromptDataCollator,
    answer_log_probs,
    answer_scores,
    compute_log_probs,
    dpo_loss,
    reference_log_probs,
    reward_loss,
    set_loss,
    split_pairs,
    token_log_probs,
)

MODELS = ["llama", "qwen3", "gemma2"]
RELATIVE = 1e-5

Example = dict[str, Any]


def tokens(length: int) -> list[int]:
    return torch.randint(1, VOCABULARY, (length,)).tolist()


def between(low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, ()))


def random_answers(count: int) -> list[list[int]]:
    """Answers of various lengths. Some begin like another one, some equal another one, or its beginning."""
    answers = [tokens(between(1, 9))]
    while len(answers) < count:
        other = answers[between(0, len(answers) - 1)]
        kept = other[: between(0, len(other))]
        answers.append([tokens(between(1, 9)), [*kept, *tokens(between(1, 5))], list(other)][between(0, 2)])
    return answers


def random_groups(seed: int, count: int = 5, most: int = 6) -> list[Example]:
    torch.manual_seed(seed)
    prompts = [tokens(length) for length in (1, *(between(1, 13) for _ in range(count - 1)))]
    return [{"prompt": prompt, "answers": random_answers(between(1, most))} for prompt in prompts]


def random_pairs(seed: int, count: int = 5) -> list[Example]:
    groups = random_groups(seed, count)
    pairs = [(group["prompt"], random_answers(2)) for group in groups]
    return [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, (chosen, rejected) in pairs]


def answers_of(example: Example) -> list[list[int]]:
    return example["answers"] if "answers" in example else [example["chosen"], example["rejected"]]


# The truth: a padded row for each answer


def padded(sequences: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    input_ids = nn.utils.rnn.pad_sequence([torch.tensor(sequence) for sequence in sequences], batch_first=True)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    return {
        "input_ids": input_ids,
        "attention_mask": (torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
    }


def log_probs_alone(twin: nn.Module, prompt: list[int], answers: list[list[int]]) -> list[Tensor]:
    logits = twin(**padded([prompt + answer for answer in answers]), use_cache=False).logits
    rows = logits.log_softmax(-1)
    return [
        torch.stack([row[len(prompt) - 1 + i, token] for i, token in enumerate(answer)]).sum()
        for row, answer in zip(rows, answers)
    ]


def all_log_probs_alone(twin: nn.Module, examples: Sequence[Example]) -> list[list[Tensor]]:
    return [log_probs_alone(twin, example["prompt"], answers_of(example)) for example in examples]


def by_example(values: Tensor, labels: Any) -> list[list[Tensor]]:
    """`[B, A]` -> a list for each example of `labels["example"]`; padding must be 0."""
    found: dict[int, list[Tensor]] = {}
    for value, example in zip(values.flatten(), labels["example"].flatten().tolist()):
        found.setdefault(example, []).append(value)
    assert all(value == 0 for value in found.pop(-1, []))
    return [found[example] for example in sorted(found)]


def assert_values_equal(actual: list[list[Tensor]], expected: list[list[Tensor]]) -> None:
    assert [len(row) for row in actual] == [len(row) for row in expected]
    flat = [torch.stack([value for row in values for value in row]) for values in (actual, expected)]
    torch.testing.assert_close(*flat, rtol=RELATIVE, atol=RELATIVE)


def assert_gradients_equal(model: nn.Module, twin: nn.Module) -> None:
    for (name, actual), expected in zip(model.named_parameters(), twin.parameters()):
        if expected.grad is None:
            assert actual.grad is None, name
            continue
        assert actual.grad is not None, name
        error = (actual.grad - expected.grad).norm() / expected.grad.norm().clamp(min=1e-3)
        assert error <= 2 * RELATIVE, f"{name}: {error:.1e}"


# Values, losses and gradients


@pytest.mark.parametrize("max_length", [None, 80])
@pytest.mark.parametrize("name", MODELS)
def test_log_probs_and_gradients_are_those_of_every_answer_alone(name: str, max_length: int | None) -> None:
    model = build(name)
    twin = eager_twin(model)
    examples = random_groups(seed=3, count=7)
    batch = SharedPromptDataCollator(max_length=max_length)(examples)
    labels = batch.pop("labels")
    assert (batch["input_ids"].shape[0] > 1) == (max_length is not None)

    actual = by_example(answer_log_probs(model(**batch, use_cache=False).logits, labels), labels)
    expected = all_log_probs_alone(twin, examples)
    assert_values_equal(actual, expected)

    weights = [[torch.randn(()) for _ in row] for row in expected]
    for values in (actual, expected):
        sum(weight * value for row, chosen in zip(weights, values) for weight, value in zip(row, chosen)).backward()
    assert_gradients_equal(model, twin)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 6),
    most=st.integers(1, 8),
    room=st.one_of(st.none(), st.integers(0, 60)),
)
def test_log_probs_of_random_trees(seed: int, count: int, most: int, room: int | None) -> None:
    examples = random_groups(seed, count, most)
    longest = max(sum(len(example["prompt"]) + len(answer) for answer in example["answers"]) for example in examples)
    batch = SharedPromptDataCollator(max_length=None if room is None else longest + room)(examples)
    labels = batch.pop("labels")
    with torch.no_grad():
        log_probs = answer_log_probs(LLAMA(**batch, use_cache=False).logits, labels)
        assert_values_equal(by_example(log_probs, labels), all_log_probs_alone(LLAMA_TWIN, examples))


LLAMA = build("llama")
LLAMA_TWIN = eager_twin(LLAMA)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("name", [*MODELS, "mistral"])  # all layers of Mistral have a window
def test_dpo_trains_as_unshared_dpo_does(name: str, label_smoothing: float) -> None:
    model, beta = build(name), 0.3
    twin, reference = eager_twin(model), build(name, initializer_range=0.05)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    examples, collator = random_pairs(seed=5), SharedPromptDataCollator(max_length=40)
    for example, values in zip(examples, compute_log_probs(reference, examples, collator, batch_size=2)):
        example["ref_logps"] = values
    set_loss(model, dpo_loss, beta=beta, label_smoothing=label_smoothing)
    batch = collator(examples)
    assert batch["input_ids"].shape[0] > 1
    loss = model(**batch).loss
    loss.backward()

    with torch.no_grad():
        reference_values = all_log_probs_alone(eager_twin(reference), examples)
    losses = []
    for (chosen, rejected), (ref_chosen, ref_rejected) in zip(all_log_probs_alone(twin, examples), reference_values):
        odds = torch.sigmoid(beta * ((chosen - ref_chosen) - (rejected - ref_rejected)))
        losses.append(-(1 - label_smoothing) * odds.log() - label_smoothing * (1 - odds).log())
    expected = torch.stack(losses).mean()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=RELATIVE, atol=0)
    assert_gradients_equal(model, twin)


def build_reward_model(name: str) -> transformers.PreTrainedModel:
    torch.manual_seed(2)
    config = config_of(name, num_labels=1)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="flashmask").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("with_margin", [False, True])
@pytest.mark.parametrize("name", [*MODELS, "mistral"])
def test_reward_models_train_as_unshared_sequence_classifiers_do(name: str, with_margin: bool) -> None:
    model = build_reward_model(name)
    twin = eager_twin(model)
    examples = random_pairs(seed=6)
    margins = torch.rand(len(examples)) if with_margin else torch.zeros(len(examples))
    if with_margin:
        for example, margin in zip(examples, margins.tolist()):
            example["margin"] = margin
    set_loss(model, reward_loss, center_rewards_coefficient=0.05)
    batch = SharedPromptDataCollator(max_length=40)(examples)
    assert batch["input_ids"].shape[0] > 1
    loss = model(**batch).loss
    loss.backward()

    sequences = [example["prompt"] + example[side] for side in ("chosen", "rejected") for example in examples]
    chosen, rejected = twin(**padded(sequences)).logits[:, 0].chunk(2)  # at the last token, as Transformers finds it
    expected = (-(chosen - rejected - margins).sigmoid().log() + 0.05 * (chosen + rejected) ** 2).mean()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=RELATIVE, atol=0)
    assert_gradients_equal(model, twin)


def test_scores_are_those_at_the_last_tokens() -> None:
    examples = random_groups(seed=8)
    labels = SharedPromptDataCollator(max_length=80)(examples)["labels"]
    model = build_reward_model("llama")
    batch = {key: value for key, value in SharedPromptDataCollator(max_length=80)(examples).items() if key != "labels"}
    scores = model.score(model.model(**batch).last_hidden_state)
    expected = [
        list(model(**padded([example["prompt"] + answer for answer in example["answers"]])).logits[:, 0])
        for example in examples
    ]
    for form in (scores, scores[..., 0]):
        assert_values_equal(by_example(answer_scores(form, labels), labels), expected)


def test_log_probs_need_logits_of_the_answers_only() -> None:
    examples = random_groups(seed=9)
    is_by_row = Version(transformers.__version__) >= Version("5.21")
    batch = SharedPromptDataCollator(max_length=80 if is_by_row else None)(examples)
    labels, kept = batch.pop("labels"), batch.pop("logits_to_keep")
    full = LLAMA(**batch, use_cache=False).logits
    made = LLAMA(**batch, logits_to_keep=kept, use_cache=False).logits
    kept = kept.view(full.shape[0], -1)  # models before 5.21 select the same positions in all rows, here in one
    rows, length = kept.shape
    selected = full[torch.arange(rows)[:, None], kept]
    crossed = full[:, kept]  # if `[B, L]` is given to those models
    torch.testing.assert_close(made, selected)
    assert length < full.shape[1] - 10
    for logits in (full, crossed):
        torch.testing.assert_close(answer_log_probs(logits, labels), answer_log_probs(selected, labels))


def test_many_labels_are_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    examples = random_groups(seed=10)
    labels = SharedPromptDataCollator()(examples)["labels"]
    logits = torch.randn(*labels["positions"].shape, VOCABULARY, requires_grad=True)
    at_once = answer_log_probs(logits, labels)
    (gradient,) = torch.autograd.grad(at_once.square().sum(), logits)
    monkeypatch.setattr("hf_flashmask.training.losses._LABELS_AT_ONCE", 7)
    in_parts = answer_log_probs(logits, labels)
    torch.testing.assert_close(in_parts, at_once)
    torch.testing.assert_close(torch.autograd.grad(in_parts.square().sum(), logits)[0], gradient)


def test_log_probs_of_half_precision_logits_are_summed_in_float32() -> None:
    example = {"prompt": tokens(3), "answers": [tokens(200)]}
    labels = SharedPromptDataCollator()([example])["labels"]
    logits = torch.randn(*labels["positions"].shape, VOCABULARY, dtype=torch.bfloat16)
    expected = logits.double().log_softmax(-1).gather(2, labels["tokens"][..., None]).sum()
    actual = answer_log_probs(logits, labels)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.sum().double(), expected, rtol=1e-6, atol=0)


def answers_in_rows(per_token: Tensor, labels: Any) -> tuple[list[Tensor], list[int]]:
    """The values of every answer's tokens, and the example that it belongs to."""
    found, owners = [], []
    for values, ends, examples in zip(per_token, labels["ends"].tolist(), labels["example"].tolist()):
        for start, end, owner in zip([0, *ends], ends, examples):
            if owner >= 0:
                found.append(values[start:end])
                owners.append(owner)
    return found, owners


def test_group_losses_can_be_built() -> None:
    """GRPO's advantage-weighted log-probabilities over the answers of each prompt."""
    examples = random_groups(seed=11)
    batch = SharedPromptDataCollator(max_length=80)(examples)
    labels = batch.pop("labels")
    per_token = token_log_probs(LLAMA(**batch, use_cache=False).logits, labels)
    rewards = [[math.sin(len(answer)) for answer in example["answers"]] for example in examples]
    actual = expected = torch.zeros(())
    for number, (example, values) in enumerate(zip(examples, rewards)):
        rows = [values for values, owner in zip(*answers_in_rows(per_token, labels)) if owner == number]
        alone = log_probs_alone(LLAMA_TWIN, example["prompt"], example["answers"])
        for row, value, answer, log_prob in zip(rows, values, example["answers"], alone):
            advantage = value - sum(values) / len(values)
            assert len(row) == len(answer)
            actual = actual + advantage * row.sum() / len(answer)
            expected = expected + advantage * log_prob / len(answer)
    torch.testing.assert_close(actual, expected, rtol=RELATIVE, atol=1e-4)


# Rows


def test_the_layout_of_a_pair() -> None:
    """The row holds the prompt without its last token once. Each branch begins with a copy of that token."""
    batch = SharedPromptDataCollator(pad_to_multiple_of=4)([{"prompt": [5, 6, 7], "chosen": [8, 9], "rejected": [10]}])
    labels = batch["labels"]
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 7, 10, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 2, 3, 0]]
    assert batch["attention_mask"].tolist() == [[[[7, 7, 5, 5, 5, 7, 7, 0]]]]
    assert batch["attention_mask"].dtype == torch.int32
    visible = bounds.to_dense(batch["attention_mask"])[0, 0]
    assert visible[6].tolist() == [True, True, False, False, False, True, True, False]
    assert not visible[7].any()
    assert not visible[:, 7].any()
    assert labels["positions"].tolist() == [[2, 3, 5]]
    assert labels["tokens"].tolist() == [[8, 9, 10]]
    assert labels["answers"].tolist() == [[0, 1, 2]]
    assert labels["ends"].tolist() == [[2, 3]]
    assert labels["last"].tolist() == [[4, 6]]
    assert labels["example"].tolist() == [[0, 0]]
    assert labels["pairs"].tolist() == [[[0, 1]]]


@pytest.mark.parametrize("seed", range(6))
def test_every_position_predicts_at_most_one_token(seed: int) -> None:
    for labels in (SharedPromptDataCollator(max_length=100)(random_groups(seed))["labels"],):
        for positions, predicted in zip(labels["positions"], labels["tokens"]):
            places = positions[predicted >= 0].tolist()
            assert len(places) == len(set(places))


@pytest.mark.parametrize("name", ["gemma2", "mistral"])
def test_groups_larger_than_windows_allow_for(name: str) -> None:
    torch.manual_seed(22)
    examples = [{"prompt": tokens(7), "answers": [tokens(between(1, 6)) for _ in range(20)]}]
    model = build(name)
    (values,) = compute_log_probs(model, examples, SharedPromptDataCollator(max_branches=15))
    with torch.no_grad():
        expected = all_log_probs_alone(eager_twin(model), examples)
    assert_values_equal([[torch.tensor(value) for value in values]], expected)


def test_shared_tokens_occur_once() -> None:
    prompt, common = tokens(50), tokens(20)
    examples = [{"prompt": prompt, "answers": [[*common, 1], [*common, 2], [3], [3]]}]
    batch = SharedPromptDataCollator()(examples)
    # 49 tokens of the prompt, its last token twice, 19 + 2 of the common part, four ends, two of them equal
    assert batch["input_ids"].shape == (1, 49 + 2 + 19 + 2 + 3)
    assert batch["labels"]["positions"].shape == (1, 20 + 2 + 1)
    assert batch["labels"]["answers"].shape == (1, 21 + 21 + 1 + 1)
    assert batch["labels"]["ends"].tolist() == [[21, 42, 43, 44]]


@pytest.mark.parametrize("strategy", ["first_fit_decreasing", "in_order"])
def test_rows_hold_whole_examples_up_to_max_length(strategy: Any) -> None:
    examples = random_groups(seed=12, count=12)
    batch = SharedPromptDataCollator(max_length=90, pad_to_multiple_of=16, strategy=strategy)(examples)
    rows, length = batch["input_ids"].shape
    assert rows > 2
    assert length % 16 == 0
    owners = [set(row.tolist()) - {-1} for row in batch["labels"]["example"]]
    assert sorted(example for owner in owners for example in owner) == list(range(12))
    used = (batch["attention_mask"] > 0).sum(-1)
    assert used.max() <= 90
    if strategy == "in_order":
        assert [example for owner in owners for example in sorted(owner)] == list(range(12))


def test_all_tensors_are_batch_first_and_survive_a_worker() -> None:
    examples = random_pairs(seed=13)
    for example in examples:
        example.update(margin=0.5, ref_logps=[-1.5, -200.123])
    collator = pickle.loads(pickle.dumps(SharedPromptDataCollator(max_length=60)))
    batch = collator(examples)
    rows = batch["input_ids"].shape[0]
    for name, value in {**batch, **batch["labels"]}.items():
        if name != "labels":
            assert value.shape[0] == rows, name
            expected = {"attention_mask": torch.int32, "ref_logps": torch.int32, "margin": torch.float32}
            assert value.dtype == expected.get(name, torch.int64), name


def test_reference_log_probs_are_exact_and_go_with_their_answers() -> None:
    """Under DeepSpeed, Trainer casts floating point inputs to the dtype of the weights, but not integers."""
    examples = random_groups(seed=14)
    for number, example in enumerate(examples):
        example["ref_logps"] = [-100 * number - answer - 0.123 for answer in range(len(example["answers"]))]
    labels = SharedPromptDataCollator(max_length=80)(examples)["labels"]
    expected = [[torch.tensor(value) for value in example["ref_logps"]] for example in examples]
    actual = by_example(reference_log_probs(labels), labels)
    assert actual == expected


def test_compute_log_probs_gives_the_order_of_the_dataset() -> None:
    examples = random_groups(seed=15, count=7)
    model = build("llama")
    for training in (True, False):
        model.train(training)
        values = compute_log_probs(model, examples, SharedPromptDataCollator(max_length=80), batch_size=3)
        assert model.training == training
    with torch.no_grad():
        expected = all_log_probs_alone(LLAMA_TWIN, examples)
    assert_values_equal([[torch.tensor(value) for value in row] for row in values], expected)


# Examples of all kinds


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = "<|end|> <|user|> <|assistant|> who are you I am a mask the of rows and <unk>"
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words.split())}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", unk_token="<unk>")
    tokenizer.chat_template = (
        "{% for message in messages %}<|{{ message.role }}|> {{ message.content }} <|end|> {% endfor %}"
        "{% if add_generation_prompt %}<|assistant|> {% endif %}"
    )
    return tokenizer


def branch(batch: dict[str, Any], answer: int) -> tuple[list[int], list[int]]:
    """The tokens that an answer's last token sees, in order, and the tokens that its labels predict."""
    last = batch["labels"]["last"][0, answer]
    visible = bounds.to_dense(batch["attention_mask"])[0, 0, last]
    start, end = [0, *batch["labels"]["ends"][0].tolist()][answer : answer + 2]
    own = batch["labels"]["answers"][0, start:end]
    return batch["input_ids"][0, visible].tolist(), batch["labels"]["tokens"][0, own].tolist()


def test_strings_are_tokenized_as_trl_does(tokenizer: PreTrainedTokenizerFast) -> None:
    example = {"prompt": "who are you", "chosen": " I am a mask", "rejected": " rows <|end|>"}
    batch = SharedPromptDataCollator(tokenizer)([example])
    prompt, chosen, rejected = [3, 4, 5], [6, 7, 8, 9, 0], [12, 0]
    assert branch(batch, 0) == (prompt + chosen, chosen)
    assert branch(batch, 1) == (prompt + rejected, rejected)


def test_messages_go_through_the_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    example = {
        "prompt": [{"role": "user", "content": "who are you"}],
        "answers": [[{"role": "assistant", "content": text}] for text in ("I am a mask", "rows", "a mask")],
    }
    batch = SharedPromptDataCollator(tokenizer)([example])
    prompt = [1, 3, 4, 5, 0, 2]
    for number, answer in enumerate([[6, 7, 8, 9, 0], [12, 0], [8, 9, 0]]):
        assert branch(batch, number) == (prompt + answer, answer)


@pytest.mark.parametrize("form", [list, json.dumps])
def test_tools_of_the_chat_template(tokenizer: PreTrainedTokenizerFast, form: Callable[[Any], Any]) -> None:
    """TRL takes JSON too, because a dataset cannot store functions with different signatures otherwise."""
    tool = {"type": "function", "function": {"name": "rows", "parameters": {"type": "object", "properties": {}}}}
    with_tools = copy.deepcopy(tokenizer)
    with_tools.chat_template = "{% for tool in tools %}{{ tool.function.name }} {% endfor %}" + tokenizer.chat_template
    example = {
        "prompt": [{"role": "user", "content": "who"}],
        "answers": [[{"role": "assistant", "content": "I"}]],
        "tools": form([tool, tool]),
    }
    batch = SharedPromptDataCollator(with_tools)([example])
    assert branch(batch, 0) == ([12, 12, 1, 3, 0, 2, 6, 0], [6, 0])
    with pytest.raises(ValueError, match="`tools` of an example is a string, but no JSON"):
        SharedPromptDataCollator(with_tools)([{**example, "tools": "rows"}])


def test_an_answer_begins_where_the_template_departs_from_the_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    example = {
        "prompt": [{"role": "user", "content": "who are you"}],
        "chosen": [{"role": "assistant", "content": "I am a mask"}],
        "rejected": [{"role": "assistant", "content": "rows"}],
        "chat_template_kwargs": {"thinks": True},
    }
    thinking = copy.deepcopy(tokenizer)
    thinking.chat_template = tokenizer.chat_template.replace(
        "{% if add_generation_prompt %}<|assistant|>", "{% if add_generation_prompt and thinks %}<|assistant|> the of"
    )
    batch = SharedPromptDataCollator(thinking)([example])
    assert branch(batch, 0) == ([1, 3, 4, 5, 0, 2, 6, 7, 8, 9, 0], [6, 7, 8, 9, 0])
    assert branch(batch, 1) == ([1, 3, 4, 5, 0, 2, 12, 0], [12, 0])


@pytest.mark.parametrize("as_ids", [list, torch.tensor, lambda ids: torch.tensor(ids, dtype=torch.int32).numpy()])
def test_token_ids_of_any_form(as_ids: Callable[[list[int]], Any]) -> None:
    example = {"prompt": as_ids([5, 6]), "chosen": as_ids([7]), "rejected": as_ids([8, 9])}
    assert SharedPromptDataCollator()([example])["input_ids"].tolist() == [[5, 6, 7, 6, 8, 9]]


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("max_length", [9, 12, 17])
def test_truncation_is_that_of_trl(mode: Any, max_length: int) -> None:
    trl = pytest.importorskip("trl.trainer.dpo_trainer")
    torch.manual_seed(16)
    examples = [
        {"prompt": tokens(between(1, 8)), "chosen": tokens(between(1, 12)), "rejected": tokens(between(1, 12))}
        for _ in range(9)
    ]
    theirs = trl.DataCollatorForPreference(pad_token_id=0, max_length=max_length, truncation_mode=mode)(
        [{f"{name}_ids": value for name, value in example.items()} for example in examples]
    )
    for number, example in enumerate(examples):
        batch = SharedPromptDataCollator(max_sequence_length=max_length, truncation_mode=mode)([example])
        for answer, row in enumerate((number, number + len(examples))):
            is_token, is_label = theirs["attention_mask"][row].bool(), theirs["completion_mask"][row].bool()
            is_label[0] = False  # nothing predicts the first token of a row: the shift of labels drops it
            sequence, predicted = branch(batch, answer)
            assert sequence == theirs["input_ids"][row, is_token].tolist()
            assert predicted == theirs["input_ids"][row, is_label].tolist()


def test_truncated_examples_are_scored_as_alone() -> None:
    examples = [{"prompt": tokens(11), "answers": [tokens(9), tokens(3), tokens(1)]}]
    collator = SharedPromptDataCollator(max_sequence_length=13, truncation_mode="keep_end")
    (values,) = compute_log_probs(LLAMA, examples, collator)
    with torch.no_grad():
        for value, answer in zip(values, examples[0]["answers"]):
            prompt = (examples[0]["prompt"] + answer)[-13 : -len(answer)]
            (expected,) = log_probs_alone(LLAMA_TWIN, prompt, [answer])
            assert value == pytest.approx(expected.item(), rel=RELATIVE)


# With Trainer


def train(
    model: nn.Module, examples: list[Example], collator: Any, folder: Path, trainer_class: Any = Trainer, **options: Any
) -> list[float]:
    settings = {"per_device_train_batch_size": 4, "max_steps": 8, **options}
    trainer = trainer_class(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            learning_rate=1e-3,
            adam_epsilon=1e-5,
            use_cpu=True,
            seed=0,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            **settings,
        ),
        train_dataset=examples,
        eval_dataset=examples,
        data_collator=collator,
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class UnsharedDPO(Trainer):
    """DPO as one writes it without this library."""

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Tensor:
        pairs = zip(all_log_probs_alone(model, inputs), (example["ref_logps"] for example in inputs))
        difference = [(chosen - rejected) - (ref[0] - ref[1]) for (chosen, rejected), ref in pairs]
        return -nn.functional.logsigmoid(0.5 * torch.stack(difference)).mean()

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs


@pytest.mark.parametrize("accumulation", [1, 2])
def test_trainer_trains_dpo_as_unshared(tmp_path: Path, accumulation: int) -> None:
    examples = random_pairs(seed=17, count=8)
    model, collator = build("llama"), SharedPromptDataCollator(max_length=64)
    twin = eager_twin(model)
    for example, values in zip(examples, compute_log_probs(model, examples, collator)):
        example["ref_logps"] = values
    set_loss(model, dpo_loss, beta=0.5)
    options = {
        "max_steps": 8,
        "gradient_accumulation_steps": accumulation,
        "per_device_train_batch_size": 4 // accumulation,
    }
    losses = train(model, examples, collator, tmp_path, **options)
    expected = train(twin, examples, list, tmp_path, UnsharedDPO, **options)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[-1] < losses[0] - 0.01
    assert losses == pytest.approx(expected, abs=1e-4)


def test_a_trained_reward_model_loads_as_a_sequence_classifier(tmp_path: Path) -> None:
    examples, collator = random_pairs(seed=18, count=8), SharedPromptDataCollator(max_length=64)
    model = build_reward_model("qwen3")
    set_loss(model, reward_loss)
    losses = train(model, examples, collator, tmp_path)
    assert losses[-1] < losses[0] - 0.05
    model.save_pretrained(tmp_path / "reward")
    loaded, report = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "reward", attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    batch = collator(examples)
    labels = batch.pop("labels")
    scores = answer_scores(model.score(model.model(**batch).last_hidden_state), labels)
    expected = [
        list(loaded(**padded([example["prompt"] + answer for answer in answers_of(example)])).logits[:, 0])
        for example in examples
    ]
    assert_values_equal(by_example(scores, labels), expected)


def test_trainer_evaluates(tmp_path: Path) -> None:
    examples = random_pairs(seed=19, count=6)
    for example in examples:
        example["ref_logps"] = [-30.0, -31.0]
    model, collator = build("llama"), SharedPromptDataCollator(max_length=64)
    set_loss(model, dpo_loss)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(tmp_path), use_cpu=True, report_to="none", remove_unused_columns=False, per_device_eval_batch_size=6
        ),
        eval_dataset=examples,
        data_collator=collator,
    )
    with torch.no_grad():
        expected = model(**collator(examples)).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=RELATIVE)


def test_models_with_adapters_may_be_passed() -> None:
    class Adapted(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base

        def get_base_model(self) -> nn.Module:
            return self.base

    model = build("llama")
    set_loss(Adapted(model), lambda values, labels: values.sum())
    batch = SharedPromptDataCollator()(random_groups(seed=20))
    loss = model(**batch).loss
    torch.testing.assert_close(loss, answer_log_probs(model(**batch).logits, batch["labels"]).sum())


def test_compiled_models_train_as_others_do() -> None:
    examples = random_pairs(seed=24)
    for example in examples:
        example["ref_logps"] = [-30.0, -31.0]
    batch = SharedPromptDataCollator()(examples)
    model = build("llama")
    set_loss(model, dpo_loss)
    expected = model(**batch).loss
    torch.testing.assert_close(torch.compile(model, backend="eager")(**batch).loss, expected)

    windowed = build("mistral")
    set_loss(windowed, dpo_loss)
    with pytest.raises(NotImplementedError, match="models with sliding windows or chunks that are shorter than a row"):
        torch.compile(windowed, backend="eager")(**batch)


# What is refused


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], "`examples` is empty"),
        ([{"prompt": [1], "chosen": [2]}], "must have `prompt`, `chosen` and `rejected`"),
        ([{"input_ids": [1]}], "remove_unused_columns=False"),
        ([{"prompt": [1], "chosen": [2], "rejected": []}], "example 0 of the batch has an empty answer"),
        ([{"prompt": [1], "answers": [[2], []]}], "has an empty answer"),
        ([{"prompt": [1], "answers": []}], "at least one answer"),
        ([{"prompt": [], "answers": [[2]]}], "the prompt of example 0 of the batch is empty"),
        ([{"prompt": "who", "chosen": "I", "rejected": "a"}], r"pass SharedPromptDataCollator\(tokenizer\)"),
        ([{"prompt": "who", "chosen": [1], "rejected": "a"}], r"got 2 answers, and \['strings', 'token ids'\]"),
        ([{"prompt": [0.5], "answers": [[2]]}], "token ids must be a list of integers"),
        ([{"prompt": [1], "answers": [[2]]}, {"prompt": [1], "chosen": [2], "rejected": [3]}], "the same columns"),
        ([{"prompt": [1], "answers": [[2]], "ref_logps": [-1.0, -2.0]}], "one value for each of its 1 answers, got 2"),
        ([{"prompt": [1], "answers": [[2]], "margin": 1.0}], "`margin` belongs to"),
        (
            [{"prompt": [1], "answers": [[2]]}, {"prompt": [1] * 50, "answers": [[2]]}],
            "example 1 .* a row of 51 tokens",
        ),
    ],
)
def test_unusable_examples_are_refused(examples: list[Example], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SharedPromptDataCollator(max_length=40)(examples)


def test_a_prompt_that_fills_the_sequence_is_refused() -> None:
    collator = SharedPromptDataCollator(max_sequence_length=6)
    with pytest.raises(ValueError, match="the prompt of example 1 of the batch has 6 tokens, which leaves no token"):
        collator([{"prompt": tokens(5), "answers": [[1]]}, {"prompt": tokens(6), "answers": [[1]]}])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"truncation_mode": "middle"}, "`truncation_mode` must be one of"),
        ({"max_length": 0}, "`max_length` must be None or at least 2, got 0"),
        ({"max_sequence_length": 1}, "`max_sequence_length` must be None or at least 2, got 1"),
        ({"max_branches": 0}, "`max_branches` must be None or at least 1, got 0"),
        ({"pad_to_multiple_of": 0}, "`pad_to_multiple_of` must be None or at least 1"),
    ],
)
def test_unusable_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SharedPromptDataCollator(**settings)


def test_a_length_in_the_place_of_the_tokenizer_is_refused() -> None:
    with pytest.raises(TypeError, match=r"`tokenizer` must be a tokenizer or None, got int: .*`max_length=`"):
        SharedPromptDataCollator(64)  # type: ignore[arg-type]


def test_losses_refuse_what_they_cannot_use() -> None:
    groups = SharedPromptDataCollator()(random_groups(seed=21))["labels"]
    pairs = SharedPromptDataCollator()(random_pairs(seed=21))["labels"]
    values = torch.zeros(groups["example"].shape)
    with pytest.raises(ValueError, match="lists of answers, not pairs"):
        split_pairs(values, groups)
    with pytest.raises(ValueError, match="compute_log_probs"):
        dpo_loss(torch.zeros(pairs["example"].shape), pairs)
    with pytest.raises(ValueError, match="`label_smoothing` must be from 0"):
        dpo_loss(torch.zeros(pairs["example"].shape), pairs, label_smoothing=0.5)
    with pytest.raises(ValueError, match="one for each row"):
        answer_scores(torch.zeros(3, 1), groups)
    with pytest.raises(ValueError, match="`logits` must be"):
        answer_log_probs(torch.zeros(1, 2, VOCABULARY), groups)


def test_models_that_set_loss_cannot_serve_are_refused() -> None:
    def classifier(model_class: Any, name: str, **changes: Any) -> nn.Module:
        return model_class._from_config(config_of(name, **changes), attn_implementation="flashmask")

    with pytest.raises(ValueError, match="GPT2ForSequenceClassification does not compute its loss with"):
        set_loss(classifier(transformers.GPT2ForSequenceClassification, "gpt2", num_labels=1), reward_loss)
    with pytest.raises(ValueError, match="a reward model has one label, got `num_labels` 3"):
        set_loss(classifier(LlamaForSequenceClassification, "llama", num_labels=3), reward_loss)
    with pytest.raises(ValueError, match="needs a causal language model or a sequence classifier"):
        set_loss(classifier(transformers.LlamaForTokenClassification, "llama"), reward_loss)
    with pytest.raises(
        ValueError, match="a model of Transformers, or one with adapters of PEFT, is needed, got Linear"
    ):
        set_loss(nn.Linear(2, 2), reward_loss)


def test_models_with_other_attention_are_refused() -> None:
    """Eager attention would add bounds to the scores as if they were a bias."""
    examples = random_pairs(seed=23)
    with pytest.raises(ValueError, match=r'LlamaForCausalLM uses "eager": call model\.set_attn'):
        set_loss(LLAMA_TWIN, dpo_loss)
    with pytest.raises(ValueError, match=r'LlamaForCausalLM uses "eager": call model\.set_attn'):
        compute_log_probs(LLAMA_TWIN, examples, SharedPromptDataCollator())
