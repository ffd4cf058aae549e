"""The tests of `test_models` that compute, on a GPU: there the Triton kernels are compiled, not interpreted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import test_compiled_models
import test_generation
import test_models
import test_shared_prefix
import torch
from tiny_models import DECODERS, MODELS, build, eager_twin, logits_alone, packed, random_documents
from transformers.models.llama import modeling_llama

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _everything_on_the_gpu() -> Iterator[None]:
    with torch.device("cuda"):
        yield


@pytest.mark.parametrize("how", ["training", "cache"])
@pytest.mark.parametrize("name", MODELS)
def test_packed_logits_equal_each_document_alone(name: str, how: str) -> None:
    test_models.test_packed_logits_equal_each_document_alone(name, how)


@pytest.mark.parametrize("name", MODELS)
def test_packed_gradients_equal_each_document_alone(name: str) -> None:
    test_models.test_packed_gradients_equal_each_document_alone(name, use_cache=False)


# Not the models with experts: one rounding error sends a token to another expert.
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma2", "gpt2", "bert"])
def test_gradients_of_mixed_precision_are_as_exact_as_those_of_eager_attention(name: str) -> None:
    model = build(name)
    twin = eager_twin(model)
    documents = random_documents([113, 7, 128, 1, 98])
    weights = torch.randn(1, 347, model.config.vocab_size)

    def gradients(logits: torch.Tensor, source: torch.nn.Module) -> dict[str, torch.Tensor]:
        source.zero_grad()
        (logits * weights).sum().backward()
        return {key: value.grad.double() for key, value in source.named_parameters() if value.grad is not None}

    truth = gradients(logits_alone(twin, documents), twin)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        logits = model(**packed(documents), use_cache=False).logits
        expected = logits_alone(twin, documents)
    ours, eager = gradients(logits, model), gradients(expected, twin)
    largest = max(float(value.norm()) for value in truth.values())
    for key, exact in truth.items():
        allowed = 1.5 * (eager[key] - exact).norm() + 1e-3 * largest
        assert (ours[key] - exact).norm() <= allowed, key


@pytest.mark.needs("liger_kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_and_loss_of_liger(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    model = build("llama").train()
    twin = eager_twin(model)
    documents = random_documents([113, 7, 128, 1, 98])
    batch = packed(documents)
    batch["labels"] = batch["input_ids"].masked_fill(batch["position_ids"] == 0, -100)

    def loss_alone() -> torch.Tensor:
        logits = logits_alone(twin, documents)[0, :-1].float()
        return torch.nn.functional.cross_entropy(logits, batch["labels"][0, 1:])

    def with_gradients(loss: torch.Tensor, source: torch.nn.Module) -> dict[str, torch.Tensor]:
        names, parameters = zip(*source.named_parameters())
        gradients = torch.autograd.grad(loss, parameters)
        return {name: value.detach().double() for name, value in zip(("loss", *names), (loss, *gradients))}

    truth = with_gradients(loss_alone(), twin)
    torch.nn.Module.to(twin, dtype)
    eager = with_gradients(loss_alone(), twin)
    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):  # to be put back
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    apply_liger_kernel_to_llama(model=model.to(dtype))
    output = model(**batch, use_cache=False)
    assert output.logits is None  # Liger's loss needs none
    ours = with_gradients(output.loss, model)
    largest = max(float(value.norm()) for key, value in truth.items() if key != "loss")
    for key, exact in truth.items():
        allowed = 2 * (eager[key] - exact).norm() + 1e-3 * (exact if key == "loss" else largest)
        assert (ours[key] - exact).norm() <= allowed, key


# Not gpt_oss: on a GPU its experts are computed in groups of tokens, whose rounding depends on all documents.
@pytest.mark.parametrize("name", ["llama", "mistral", "bert"])
def test_changing_one_document_leaves_the_others_bitwise_unchanged(name: str) -> None:
    test_models.test_changing_one_document_leaves_the_others_bitwise_unchanged(name, "training")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_padded_logits_equal_each_document_alone(name: str, side: str) -> None:
    test_models.test_padded_logits_equal_each_document_alone(name, side)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("name", "cache"), test_generation.with_caches(DECODERS, ["dynamic", "static"]))
def test_greedy_generation_equals_eager(name: str, side: str, cache: str) -> None:
    test_generation.test_greedy_generation_equals_eager(name, side, cache)


def test_bounds_of_a_prefix_tree_are_final() -> None:
    test_models.test_bounds_of_a_prefix_tree_are_final("llama")


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_compiled_without_graph_breaks(name: str) -> None:
    test_compiled_models.test_compiled_without_graph_breaks(name, num_layers=2)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "mistral", "llama4", "deepseek_v3", "gpt2"])
def test_shared_prefixes(name: str, side: str) -> None:
    test_shared_prefix.test_random_trees(name, side)


@pytest.mark.parametrize("count", [2, 16, 23])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_shared_answers_to_one_prompt(name: str, count: int) -> None:
    test_shared_prefix.test_answers_to_one_prompt(name, count)
