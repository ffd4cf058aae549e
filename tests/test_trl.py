"""Unmodified TRL trainers under `share_prefixes`, against eager attention without sharing."""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    set_seed,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
)
from trl.trainer import sft_trainer

from hf_flashmask import bounds
from hf_flashmask.sharing.shared_prefix import share_prefixes

WORDS = [f"w{index}" for index in range(90)]
SPECIAL = ["<pad>", "<end>", "<unknown>", "<user>", "<assistant>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
STEPS = 3


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word."""
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<unknown>",
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def build_model(model_class: type[PreTrainedModel]) -> PreTrainedModel:
    set_seed(0)
    config = model_class.config_class(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        num_labels=1,
    )
    if hasattr(config, "sliding_window"):
        config.sliding_window = 7
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():  # far from uniform attention
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def words(generator: random.Random, shortest: int, longest: int) -> str:
    return " ".join(generator.choices(WORDS, k=generator.randint(shortest, longest)))


def prompts(count: int) -> list[str]:
    """Questions of many lengths after a common instruction."""
    generator = random.Random(1)
    instruction = words(generator, 9, 9)
    return [f"{instruction} {words(generator, 1, 17)}" for _ in range(count)]


def preferences() -> Dataset:
    generator = random.Random(2)
    rows = []
    for prompt in prompts(12):
        chosen = words(generator, 2, 13)
        # Some answers begin alike.
        beginning = " ".join(chosen.split()[: generator.choice([0, 0, 1])])
        rows.append({"prompt": prompt, "chosen": " " + chosen, "rejected": f" {beginning} {words(generator, 1, 9)}"})
    return Dataset.from_list(rows)


def conversations() -> Dataset:
    """A question, its answer, another question, and two answers to that."""
    generator = random.Random(3)

    def turn(role: str) -> dict[str, str]:
        return {"role": role, "content": words(generator, 1, 9)}

    rows = [
        {
            "prompt": [turn("user"), turn("assistant"), turn("user")],
            "chosen": [turn("assistant")],
            "rejected": [turn("assistant")],
        }
        for _ in range(12)
    ]
    return Dataset.from_list(rows)


def unpaired_preferences() -> Dataset:
    """Every prompt with three answers; the ones with an even number of words are good."""
    generator = random.Random(4)
    rows = []
    for prompt in prompts(4):
        for _ in range(3):
            completion = words(generator, 1, 9)
            rows.append({"prompt": prompt, "completion": " " + completion, "label": len(completion.split()) % 2 == 0})
    return Dataset.from_list(rows)


def questions() -> Dataset:
    return Dataset.from_list([{"prompt": prompt} for prompt in prompts(6)])


def reward(completions: list[str], **kwargs: Any) -> list[float]:
    """Any function of the text that tells answers apart."""
    return [sum(map(ord, completion)) % 17 / 17 for completion in completions]


class Run(NamedTuple):
    log: list[dict[str, float]]
    weights: dict[str, Tensor]
    tokens: Counter[str]
    scores: list[Tensor]
    """Log-probabilities of the tokens of answers, by the policy, by the one before and by the reference."""


@contextmanager
def counted_tokens(*trained: nn.Module | None) -> Iterator[Counter[str]]:
    """Numbers of tokens outside of generation: with padding, of different prefixes in each batch, and computed."""
    tokens: Counter[str] = Counter()
    is_inside = False

    def enter(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        nonlocal is_inside
        if kwargs.get("past_key_values") is None and kwargs.get("cache") is None:
            is_inside = True
            input_ids, is_token = kwargs["input_ids"], kwargs["attention_mask"].bool()
            rows = [row[mask].tolist() for row, mask in zip(input_ids, is_token)]
            tokens["padded"] += input_ids.numel()
            tokens["different"] += len({tuple(row[: length + 1]) for row in rows for length in range(len(row))})

    def embed(embedding: nn.Module, args: tuple) -> None:
        tokens["computed"] += args[0].numel() if is_inside else 0

    def leave(*args: Any) -> None:
        nonlocal is_inside
        is_inside = False

    handles = []
    for model in filter(None, trained):
        handles.append(model.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(model.register_forward_hook(leave))
        handles.append(model.get_input_embeddings().register_forward_pre_hook(embed))
    yield tokens
    for handle in handles:
        handle.remove()


def record_scores(trainer: Any) -> list[Tensor]:
    """Of trainers that generate answers, in the order in which they compute them."""
    scores: list[Tensor] = []
    name = "_get_per_token_logps_and_entropies"
    original = getattr(trainer, name, None)

    def compute(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *args, **kwargs):
        computed = original(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        scores.append(computed[0].detach()[attention_mask[:, -logits_to_keep:].bool()])
        return computed

    if original is not None:
        setattr(trainer, name, compute)
    return scores


@pytest.fixture
def train_twice(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Run, Run]]:
    """Train with flashmask and shared prefixes, and again with eager attention and without sharing."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def train(
        is_shared: bool,
        trainer_class: type,
        config_class: type,
        data: Callable[[], Dataset],
        *,
        model_class: type[PreTrainedModel] = LlamaForCausalLM,
        is_shared_first: bool = False,
        device: str = "cpu",
        **settings: Any,
    ) -> Run:
        folder, attention = tmp_path / "model", "flashmask" if is_shared else "eager"
        build_model(model_class).save_pretrained(folder)
        of_trainer = {"peft_config", "reward_funcs", "eval_dataset"} & set(settings)
        arguments: dict[str, Any] = {
            "train_dataset": data(),
            "processing_class": copy.deepcopy(tokenizer),
            **{name: settings.pop(name) for name in of_trainer},
            "args": config_class(
                **{
                    "output_dir": str(tmp_path / attention),
                    "use_cpu": device == "cpu",
                    "bf16": False,
                    "max_steps": STEPS,
                    "per_device_train_batch_size": 4,
                    "gradient_checkpointing": False,
                    "optim": "sgd",  # steps in proportion to gradients: small errors stay small
                    "learning_rate": 0.3,
                    "lr_scheduler_type": "constant",
                    "logging_steps": 1,
                    "save_strategy": "no",
                    "report_to": "none",
                    "disable_tqdm": True,
                    **({} if is_shared_first else {"model_init_kwargs": {"attn_implementation": attention}}),
                    **settings,
                }
            ),
        }
        if device == "cuda":
            arguments["args"]._n_gpu = 1  # of those there; Trainer has more of them in nn.DataParallel
        with ExitStack() as stack:

            def share_and_count(*models: nn.Module | None) -> Counter[str]:
                if is_shared:
                    stack.enter_context(share_prefixes(*models))
                return stack.enter_context(counted_tokens(*models))

            if is_shared_first:
                model = model_class.from_pretrained(folder, attn_implementation=attention)
                tokens = share_and_count(model)
                trainer = trainer_class(model=model, **arguments)
                assert tokens["computed"] > 0
            else:
                trainer = trainer_class(model=str(folder), **arguments)
                tokens = share_and_count(trainer.model, getattr(trainer, "ref_model", None))
            scores = record_scores(trainer)
            before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
            trainer.train()
        weights = {name: weight.detach() for name, weight in trainer.model.named_parameters()}
        assert any((weights[name] - before[name]).abs().max() > 1e-3 for name in weights)
        return Run(trainer.state.log_history[:-1], weights, tokens, scores)

    return lambda *args, **kwargs: (train(True, *args, **kwargs), train(False, *args, **kwargs))


def assert_same_training(shared: Run, unshared: Run) -> None:
    """Losses, gradient norms, the logged figures of log-probabilities, those of answers, and the final weights."""
    assert len(shared.log) == len(unshared.log) >= STEPS
    for ours, truth in zip(shared.log, unshared.log):
        for name in truth:
            is_speed = "time" in name or "per_second" in name
            is_tie = "accuracies" in name and abs(truth[name.replace("accuracies", "margins")]) < 1e-6
            if not is_speed and not is_tie:
                assert ours[name] == pytest.approx(truth[name], rel=1e-4, abs=1e-5), name
    assert len(shared.scores) == len(unshared.scores)
    for scores, truth in zip(shared.scores, unshared.scores):
        torch.testing.assert_close(scores, truth, rtol=1e-4, atol=1e-5)
    for name, truth in unshared.weights.items():
        assert (shared.weights[name] - truth).abs().max() <= 1e-5 * truth.abs().max().clamp(min=1), name

    assert unshared.tokens["computed"] == unshared.tokens["padded"]
    assert shared.tokens["computed"] == shared.tokens["different"] < 0.5 * unshared.tokens["computed"]


ONLINE = {
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 7,
    "num_iterations": 2,  # the second one needs the log-probabilities of the first
    "beta": 0.1,  # needs a reference model
    "reward_funcs": reward,
}
TRAINERS = {
    "dpo": (DPOTrainer, DPOConfig, preferences, {}),
    "dpo, conversations": (DPOTrainer, DPOConfig, conversations, {}),
    "reward": (RewardTrainer, RewardConfig, preferences, {"model_class": LlamaForSequenceClassification}),
    "kto": (KTOTrainer, KTOConfig, unpaired_preferences, {}),
    "grpo": (GRPOTrainer, GRPOConfig, questions, ONLINE),
    "rloo": (RLOOTrainer, RLOOConfig, questions, ONLINE),
}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", TRAINERS)
def test_trainer(train_twice: Callable[..., tuple[Run, Run]], name: str, device: str) -> None:
    """The policy, and the reference model of those that have one."""
    trainer_class, config_class, data, settings = TRAINERS[name]
    shared, unshared = train_twice(trainer_class, config_class, data, device=device, **settings)
    assert_same_training(shared, unshared)
    assert bool(shared.scores) == (settings is ONLINE)


@pytest.mark.parametrize("name", TRAINERS)
def test_trainer_with_lora(train_twice: Callable[..., tuple[Run, Run]], name: str) -> None:
    """The reference is the model without its adapter."""
    trainer_class, config_class, data, settings = TRAINERS[name]
    task = "SEQ_CLS" if name == "reward" else "CAUSAL_LM"
    lora = LoraConfig(r=4, lora_alpha=16, lora_dropout=0.0, target_modules=["q_proj", "v_proj"], task_type=task)
    runs = train_twice(trainer_class, config_class, data, peft_config=lora, **settings)
    assert_same_training(*runs)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", TRAINERS)
def test_trainer_with_gradient_checkpointing(
    train_twice: Callable[..., tuple[Run, Run]], name: str, use_reentrant: bool
) -> None:
    trainer_class, config_class, data, settings = TRAINERS[name]
    runs = train_twice(
        trainer_class,
        config_class,
        data,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
        **settings,
    )
    assert_same_training(*runs)


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_trainer_with_reference_computed_before(train_twice: Callable[..., tuple[Run, Run]], name: str) -> None:
    """The constructor of the trainer computes the reference, so share_prefixes gets the model before."""
    trainer_class, config_class, data, settings = TRAINERS[name]
    runs = train_twice(
        trainer_class, config_class, data, precompute_ref_log_probs=True, is_shared_first=True, **settings
    )
    assert_same_training(*runs)


def test_margins_of_reward_models(train_twice: Callable[..., tuple[Run, Run]]) -> None:
    """The trainer passes them to the model, which does not read them."""

    def with_margins() -> Dataset:
        pairs = preferences()
        return pairs.add_column("margin", [0.1 * number for number in range(len(pairs))])

    runs = train_twice(RewardTrainer, RewardConfig, with_margins, model_class=LlamaForSequenceClassification)
    assert_same_training(*runs)


def test_evaluation(train_twice: Callable[..., tuple[Run, Run]]) -> None:
    runs = train_twice(
        DPOTrainer, DPOConfig, preferences, eval_dataset=preferences(), eval_strategy="steps", eval_steps=1
    )
    assert_same_training(*runs)
    assert sum("eval_loss" in entry for entry in runs[0].log) == STEPS


def test_sliding_windows(train_twice: Callable[..., tuple[Run, Run]]) -> None:
    runs = train_twice(DPOTrainer, DPOConfig, preferences, model_class=MistralForCausalLM)
    assert_same_training(*runs)


def test_packed_rows_for_an_engine_that_cuts_tokens() -> None:
    """The recipe of docs/many_gpus.md: what DeepSpeed's data loader can cut, and padding in documents of its own."""
    collate = sft_trainer.DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True, pad_to_multiple_of=4)
    rows = [{"input_ids": [5, 6, 7, 8, 9], "seq_lengths": [2, 3]}]
    given = collate(rows)
    assert any(value.ndim == 1 for value in given.values() if isinstance(value, torch.Tensor))  # why it is needed
    batch = {name: value for name, value in given.items() if name in ("input_ids", "labels", "position_ids")}
    assert {tuple(value.shape) for value in batch.values()} == {(1, 8)}
    starts = bounds.from_position_ids(batch["position_ids"])
    assert torch.equal(bounds.to_dense(starts)[0, 0].sum(1), torch.tensor([1, 2, 1, 2, 3, 1, 1, 1]))
    assert batch["labels"][0, 5:].eq(-100).all()
