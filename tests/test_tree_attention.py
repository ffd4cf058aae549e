"""TRL's tree packing on FlashMask attention, against each sample alone."""

from __future__ import annotations

import importlib
import itertools
import math
import queue
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import pytest
import tiny_models
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel, PreTrainedTokenizerFast
from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer, async_grpo_trainer, packing
from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

from hf_flashmask.integration import flashmask_attention_forward
from hf_flashmask.sharing import tree_attention
from hf_flashmask.sharing.tree_attention import register_tree_attention, tree_attention_forward

register_tree_attention()

MODELS = ["llama", "qwen3", "mistral", "gemma2", "gpt_oss"]  # the last three with windows, softcap, sinks


def random_rollouts(seed: int, groups: int = 2, branches: int = 5) -> list[list[int]]:
    """Groups of rollouts that share a prompt. Some share turns, some are equal, one is a prefix of another."""
    generator = random.Random(seed)

    def turn(longest: int) -> list[int]:
        return [generator.randrange(1, tiny_models.VOCABULARY) for _ in range(generator.randint(1, longest))]

    rollouts = []
    for _ in range(groups):
        group = [turn(9) + turn(5)]
        for _ in range(branches):
            earlier = generator.choice(group)
            group.append(earlier[: generator.randint(1, len(earlier))] + turn(8))
        rollouts += [*group, group[-1], group[-2][:-1] or group[-2]]
    return rollouts


def sample(input_ids: list[int], group: int = 0) -> dict[str, Any]:
    """A rollout in the form of the trainer's queue. All tokens but the first are trained."""
    trained = torch.ones(len(input_ids), dtype=torch.long)
    trained[0] = 0
    return {
        "input_ids": torch.tensor(input_ids),
        "completion_mask": trained,
        "old_log_probs": -torch.rand(len(input_ids)),
        "advantage": random.uniform(-1, 1),
        "group_id": group,
        "metrics": {},
    }


def pack(rollouts: list[list[int]]) -> dict[str, Tensor]:
    row = packing.TreeRow()
    for rollout in rollouts:
        row.add(sample(rollout))
    return row.pack()


def forward(model: PreTrainedModel, packed: dict[str, Tensor], **changes: Any) -> Tensor:
    """Logits `[N, vocabulary]` of a call like the trainer's."""
    longest_segment, longest_path = packed["tree_max_seqlens"].tolist()
    arguments = {
        "input_ids": packed["input_ids"][None],
        "position_ids": packed["position_ids"][None],
        "use_cache": False,
        "tree_max_seqlen_q": longest_segment,
        "tree_max_seqlen_k": longest_path,
        **{name: packed[name] for name in ("tree_kv_index", "tree_cu_seqlens_q", "tree_cu_seqlens_k")},
        **changes,
    }
    return model(**arguments).logits[0]


def paths(packed: dict[str, Tensor]) -> dict[tuple[int, ...], Tensor]:
    """Token ids of every path -> where they are in the row."""
    boundaries = packed["tree_cu_seqlens_k"].tolist()
    places = [packed["tree_kv_index"][start:end] for start, end in itertools.pairwise(boundaries)]
    return {tuple(packed["input_ids"][place].tolist()): place for place in places}


def relative_error(ours: Tensor, truth: Tensor) -> float:
    return float(((ours - truth).abs().max() / truth.abs().max()).detach())


@pytest.fixture
def trl_own_attention() -> ModuleType:
    """TRL before `register_tree_attention`."""
    importlib.reload(packing)
    packing.register_tree_attention()
    assert AttentionInterface()["tree_fa3"].__module__ == packing.__name__
    return packing


# Registration


def test_replaces_the_attention_that_trl_registered_before(trl_own_attention: ModuleType) -> None:
    register_tree_attention()
    register_tree_attention()
    assert AttentionInterface()["tree_fa3"] is tree_attention_forward


def test_stays_when_the_trainer_registers_its_own_afterwards(trl_own_attention: ModuleType) -> None:
    register_tree_attention()
    async_grpo_trainer.register_tree_attention()
    assert AttentionInterface()["tree_fa3"] is tree_attention_forward


def test_without_trl_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl.experimental.async_grpo", None)
    with pytest.raises(ImportError, match=r"trl >= 1.16 \(pip install 'hf-flashmask\[trl\]'\)"):
        register_tree_attention()


def test_a_trl_that_packs_no_trees_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(packing, "tree_attention")
    with pytest.raises(ImportError, match="packs no trees"):
        register_tree_attention()


# Values


@pytest.mark.parametrize("name", MODELS)
def test_every_sample_comes_out_as_it_does_alone(name: str) -> None:
    model = tiny_models.build(name, attn_implementation="tree_fa3")
    twin = tiny_models.eager_twin(model)
    for seed in range(3):
        rollouts = random_rollouts(seed)
        packed = pack(rollouts)
        assert packed["input_ids"].numel() < sum(map(len, rollouts))
        logits, places = forward(model, packed), paths(packed)
        assert set(map(tuple, rollouts)) <= set(places)
        for tokens, place in places.items():
            alone = twin(torch.tensor([tokens])).logits[0]
            assert relative_error(logits[place], alone) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_the_sum_over_samples_alone(name: str) -> None:
    model = tiny_models.build(name, attn_implementation="tree_fa3")
    twin = tiny_models.eager_twin(model)
    rollouts = random_rollouts(seed=7)
    packed = pack(rollouts)
    weights = torch.randn(packed["token_index"].numel())

    log_probs = forward(model, packed).log_softmax(-1)[packed["token_index"]]
    labels = packed["shift_labels"][packed["token_index"]]
    (weights * log_probs.gather(1, labels[:, None])[:, 0]).sum().backward()

    for tokens, weight in zip(rollouts, weights.split([len(tokens) - 1 for tokens in rollouts])):
        row = torch.tensor([tokens])
        log_probs = twin(row).logits[0, :-1].log_softmax(-1)
        (weight * log_probs.gather(1, row[0, 1:, None])[:, 0]).sum().backward()

    for (parameter_name, ours), truth in zip(model.named_parameters(), twin.parameters()):
        assert relative_error(ours.grad, truth.grad) < 1e-5, parameter_name


def test_samples_without_a_common_prefix_are_packed_documents() -> None:
    model = tiny_models.build("llama", attn_implementation="tree_fa3")
    rollouts = [[first, 5, 6, 7][: first + 1] for first in (1, 2, 3)]
    packed = pack(rollouts)
    assert packed["input_ids"].numel() == sum(map(len, rollouts))
    alone = tiny_models.logits_alone(tiny_models.eager_twin(model), [torch.tensor([tokens]) for tokens in rollouts])
    assert relative_error(forward(model, packed), alone[0]) < 1e-5


@pytest.mark.parametrize("branches", [15, 16, 24])
def test_windows_over_as_many_branches_as_bounds_hold_and_more(branches: int) -> None:
    """A shared token leaves the window in each branch, and each branch needs an interval of its own."""
    model = tiny_models.build("mistral", attn_implementation="tree_fa3")
    twin = tiny_models.eager_twin(model)
    prompt = list(range(1, 8))
    rollouts = [[*prompt, 20 + branch, *range(30, 37)] for branch in range(branches)]
    packed = pack(rollouts)
    logits, places = forward(model, packed), paths(packed)
    for tokens in rollouts:
        assert relative_error(logits[places[tuple(tokens)]], twin(torch.tensor([tokens])).logits[0]) < 1e-5


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(use_reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny_models.build("gemma2", attn_implementation="tree_fa3").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        forward(model, pack(random_rollouts(seed=3))).square().mean().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert torch.equal(*gradients)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_compiles_in_one_piece(name: str) -> None:
    """Windows too: under the compiler they read nothing from the device."""
    torch._dynamo.reset()
    model = tiny_models.build(name, attn_implementation="tree_fa3")
    packed = pack(random_rollouts(seed=1))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert relative_error(forward(compiled, packed), forward(model, packed)) < 1e-5


def test_layers_share_the_bounds_of_a_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def attention_forward(*args: Any, **kwargs: Any) -> Any:
        seen.append(args[4])
        return flashmask_attention_forward(*args, **kwargs)

    monkeypatch.setattr(tree_attention, "flashmask_attention_forward", attention_forward)
    layer_types = ["sliding_attention", "full_attention"] * 2
    model = tiny_models.build("gemma2", "tree_fa3", num_hidden_layers=4, layer_types=layer_types)
    packed = pack(random_rollouts(seed=5))
    forward(model, packed)
    assert seen[0] is seen[2]
    assert seen[1] is seen[3]
    assert seen[0].shape[2] > seen[1].shape[2] == 1
    assert seen[0].shape[3] == packed["input_ids"].numel()  # no keys were copied


def test_trees_written_into_the_same_tensors_are_noticed() -> None:
    model = tiny_models.build("mistral", attn_implementation="tree_fa3")
    packed = pack([[1, 2, 3, 4], [1, 2, 3, 5], [6, 7, 8, 9]])
    other = pack([[6, 7, 8, 9], [1, 2, 3, 4], [1, 2, 3, 5]])
    forward(model, packed)
    for name in packed:
        packed[name].copy_(other[name])
    assert torch.equal(forward(model, packed), forward(model, other))


def test_bounds_are_built_without_reading_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device fails at every read."""
    seen = []
    monkeypatch.setattr(tree_attention, "flashmask_attention_forward", lambda *args, **kwargs: seen.append(args[4]))
    packed = {name: tensor.to("meta") for name, tensor in pack(random_rollouts(seed=1)).items()}
    query = torch.empty(1, 4, packed["input_ids"].numel(), 8, device="meta")
    tree = {name: packed[name] for name in ("tree_kv_index", "tree_cu_seqlens_q", "tree_cu_seqlens_k")}
    tree_attention_forward(torch.nn.Module(), query, query[:, :2], query[:, :2], None, **tree)
    assert seen[0].shape == (1, 1, 1, query.shape[2])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma2"])
def test_on_a_gpu(name: str) -> None:
    """On a GPU the Triton kernels are compiled, not interpreted."""
    with torch.device("cuda"):
        test_every_sample_comes_out_as_it_does_alone(name)
        test_gradients_are_the_sum_over_samples_alone(name)


# Training


class RecordedRollouts:
    """A rollout worker that has all rollouts from the start, and an inference server that takes no weights."""

    def __init__(self, samples: list[dict[str, Any]]) -> None:
        self.rollout_buffer: queue.Queue = queue.Queue()
        self.metrics_queue: queue.Queue = queue.Queue()
        for recorded in samples:
            fields = {name: getattr(value, "numpy", lambda value=value: value)() for name, value in recorded.items()}
            self.rollout_buffer.put(RolloutSample(prompt=[], completion=[], model_version=1, **fields))

    def send_weights(self, iterator: Any) -> None:
        for _ in iterator:
            pass

    def check_health(self, stale_after_s: float) -> None:
        raise RuntimeError("all rollouts are used up")

    def do_nothing(self, *args: Any) -> None:
        pass

    start = stop = update_model_version = do_nothing
    init_weight_transfer = pause = resume = destroy = do_nothing


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_async_grpo_trainer_trains_as_on_samples_alone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL's trainer, unmodified except for the inference server and the GPU's peak speed, which do not exist here."""
    monkeypatch.setattr(async_grpo_trainer, "VLLMClient", lambda *args: None)
    monkeypatch.setattr(async_grpo_trainer, "get_peak_flops_per_device", lambda *args: None)
    learning_rate, steps, batch = 0.1, 3, 8
    twin = tiny_models.build(name, attn_implementation="eager")
    twin.save_pretrained(tmp_path / "model")
    rollouts = [rollout for seed in range(3) for rollout in random_rollouts(seed)]
    assert len(rollouts) >= (steps + 1) * batch  # one batch is fetched ahead
    samples = [sample(rollout, group=index // batch) for index, rollout in enumerate(rollouts)]
    vocabulary = {f"<{index}>": index for index in range(tiny_models.VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<1>")), pad_token="<0>", eos_token="<2>"
    )
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    worker = RecordedRollouts(samples)
    trainer = AsyncGRPOTrainer(
        model=str(tmp_path / "model"),
        reward_funcs=lambda **kwargs: [],
        args=AsyncGRPOConfig(
            output_dir=str(tmp_path / "out"),
            use_cpu=True,
            bf16=False,
            max_steps=steps,
            per_device_train_batch_size=batch,
            token_budget=-1,
            max_staleness=steps,
            optim="sgd",
            learning_rate=learning_rate,
            max_grad_norm=1e9,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=datasets.Dataset.from_dict({"prompt": ["<3>"]}),
        processing_class=tokenizer,
        rollout_worker=worker,
        weight_transfer=worker,
    )
    assert trainer.model.config._attn_implementation == "tree_fa3"
    assert AttentionInterface()["tree_fa3"] is tree_attention_forward
    trainer.train()

    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    for step in range(steps):
        loss = grpo_loss_alone(twin, samples[step * batch : (step + 1) * batch])
        loss.backward()
        gradients = [parameter.grad for parameter in twin.parameters()]
        assert log[step]["batch/packing_ratio"] > 1
        assert log[step]["loss"] == pytest.approx(loss.item(), rel=1e-5, abs=1e-6)
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
        assert log[step]["grad_norm"] == pytest.approx(norm, rel=1e-4)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter -= learning_rate * parameter.grad
        twin.zero_grad()
    for (parameter_name, ours), truth in zip(trainer.model.named_parameters(), twin.parameters()):
        assert relative_error(ours.detach(), truth.detach()) < 1e-4, parameter_name


def grpo_loss_alone(twin: PreTrainedModel, samples: list[dict[str, Any]], epsilon: float = 0.2) -> Tensor:
    """The trainer's loss, computed sample by sample."""
    total, tokens = torch.zeros(()), 0
    for each in samples:
        row = each["input_ids"][None]
        log_probs = twin(row).logits[0, :-1].log_softmax(-1).gather(1, row[0, 1:, None])[:, 0]
        ratio = (log_probs - each["old_log_probs"][1:]).exp()
        clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
        total = total - torch.minimum(ratio * each["advantage"], clipped * each["advantage"]).sum()
        tokens += log_probs.numel()
    return total / tokens


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tree_kv_index": None}, "needs the segments of a packed prefix tree"),
        ({"tree_cu_seqlens_k": torch.tensor([0], dtype=torch.int32)}, "must describe the same segments"),
        ({"tree_cu_seqlens_q": torch.tensor([0.0])}, r"`tree_cu_seqlens_q` must be int32 or int64 \[n\]"),
    ],
)
def test_incomplete_trees_are_refused(changes: dict[str, Any], message: str) -> None:
    model = tiny_models.build("llama", attn_implementation="tree_fa3")
    with pytest.raises(ValueError, match=message):
        forward(model, pack(random_rollouts(seed=1)), **changes)


def test_a_batch_of_rows_is_refused() -> None:
    model = tiny_models.build("llama", attn_implementation="tree_fa3")
    packed = pack(random_rollouts(seed=1))
    twice = {name: packed[name].expand(2, -1) for name in ("input_ids", "position_ids")}
    with pytest.raises(ValueError, match="a packed prefix tree is one row"):
        forward(model, packed, **twice)
