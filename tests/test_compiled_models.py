"""Whole models under `torch.compile` and `torch.export` against eager attention on each document alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tiny_models import VOCABULARY, build, eager_twin, logits_alone, packed, padded, random_documents
from torch._dynamo.utils import counters

LENGTHS = [5, 1, 9, 7, 2]
PACKINGS = [LENGTHS, [3, 8, 30], [40], [17, 12]]
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _forget_what_was_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs_compiled() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("name", ["gemma2", "bert"])
def test_compiled_without_graph_breaks(name: str) -> None:
    model = build(name)
    twin = eager_twin(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    for lengths in (LENGTHS, [3, 8]):
        documents = random_documents(lengths)
        row = packed(documents)
        expected = logits_alone(twin, documents)
        ones = torch.ones_like(row["input_ids"])
        torch.testing.assert_close(compiled(**row, use_cache=False).logits, expected, **TOLERANCE)
        torch.testing.assert_close(compiled(**row, attention_mask=ones, use_cache=False).logits, expected, **TOLERANCE)


def test_left_padding_in_a_chunked_model() -> None:
    model = build("llama4")
    documents = random_documents([9, 6])
    batch = padded(documents, "left")
    logits = torch.compile(model, fullgraph=True, backend="eager")(**batch, use_cache=False).logits
    for row, document in enumerate(documents):
        tokens = batch["attention_mask"][row].bool()
        torch.testing.assert_close(logits[row, tokens], eager_twin(model)(document).logits[0], **TOLERANCE)


@pytest.mark.parametrize(("name", "num_layers"), [("llama", 1), ("qwen3", 1), ("gemma3", 2)])
def test_training_compiles_no_more_after_the_second_length(name: str, num_layers: int) -> None:
    model = build(name, num_hidden_layers=num_layers)
    twin = eager_twin(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    graphs = []
    for lengths in PACKINGS:
        documents = random_documents(lengths)
        weights = torch.randn(1, sum(lengths), VOCABULARY)
        model.zero_grad()
        twin.zero_grad()
        (compiled(**packed(documents), use_cache=False).logits * weights).sum().backward()
        (logits_alone(twin, documents) * weights).sum().backward()
        largest = max(float(parameter.grad.abs().max()) for parameter in twin.parameters())
        for (parameter, ours), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
            error = (ours.grad - expected.grad).abs().max() / expected.grad.abs().max().clamp(min=1e-3 * largest)
            assert error < 2e-5, f"{parameter}: {error}"
        graphs.append(graphs_compiled())
    assert graphs == [1, 2, 2, 2]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_prefill_compiles_no_more_after_the_second_length(name: str) -> None:
    """What `generate` computes first: a padded batch that fills a new cache."""
    model = build(name)
    twin = eager_twin(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    graphs = []
    for lengths in ([9, 3, 7], [20, 31], [5, 11, 2, 40], [13, 13]):
        documents = random_documents(lengths)
        batch = padded(documents, "left")
        with torch.no_grad():
            logits = compiled(**batch, use_cache=True).logits
        tokens = batch["attention_mask"].bool()
        torch.testing.assert_close(logits[tokens][None], logits_alone(twin, documents), **TOLERANCE)
        graphs.append(graphs_compiled())
    assert graphs == [1, 2, 2, 2]


@pytest.mark.parametrize(
    ("name", "has_documents"), [("llama", False), ("llama", True), ("qwen3", True), ("gemma3", False), ("gemma3", True)]
)
def test_exported_for_every_length(name: str, has_documents: bool) -> None:
    model = build(name)
    twin = eager_twin(model)

    def inputs(documents: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        row = packed(documents)
        return row if has_documents else {"input_ids": row["input_ids"]}

    length = torch.export.Dim("length", min=3, max=128)
    example = inputs(random_documents([5, 1, 9]))
    program = torch.export.export(
        model,
        (),
        {**example, "use_cache": False},
        dynamic_shapes={**{name: {1: length} for name in example}, "use_cache": None},
    )
    assert any("flashmask" in str(node.target) for node in program.graph.nodes)
    for lengths in PACKINGS:
        documents = random_documents(lengths)
        row = inputs(documents)
        expected = logits_alone(twin, documents) if has_documents else twin(row["input_ids"]).logits
        torch.testing.assert_close(program.module()(**row, use_cache=False).logits, expected, **TOLERANCE)
