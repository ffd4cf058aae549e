"""Whole models under `torch.compile` and `torch.export` against eager attention on each document alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from tiny_models import VOCABULARY, build, eager_twin, logits_alone, packed, padded, random_documents
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters

from hf_flashmask import bounds

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


@pytest.mark.parametrize(("name", "num_layers"), [("gemma2", 2), ("bert", 1)])
def test_compiled_without_graph_breaks(name: str, num_layers: int) -> None:
    model = build(name, num_hidden_layers=num_layers)
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


@pytest.mark.parametrize(("name", "num_layers"), [("llama", 1), ("gemma3", 2)])
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


@pytest.mark.parametrize(("name", "num_layers"), [("llama", 1), ("gemma3", 2)])
def test_prefill_compiles_no_more_after_the_second_length(name: str, num_layers: int) -> None:
    """What `generate` computes first: a padded batch that fills a new cache."""
    model = build(name, num_hidden_layers=num_layers)
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

    length = torch.export.Dim("length", min=1, max=128)
    example = inputs(random_documents([5, 1, 9]))
    program = torch.export.export(
        model,
        (),
        {**example, "use_cache": False},
        dynamic_shapes={**{name: {1: length} for name in example}, "use_cache": None},
    )
    assert any("flashmask" in str(node.target) for node in program.graph.nodes)
    for lengths in [[1], [2], [1, 1], [1, 2], [30, 34], *PACKINGS]:
        documents = random_documents(lengths)
        row = inputs(documents)
        expected = logits_alone(twin, documents) if has_documents else twin(row["input_ids"]).logits
        torch.testing.assert_close(program.module()(**row, use_cache=False).logits, expected, **TOLERANCE)


# Once per forward pass


class OperatorCalls:
    """A backend that runs the graphs of AOTAutograd node by node, and notes what `flashmask_kernels` is called with."""

    def __init__(self) -> None:
        self.arguments: dict[str, list[tuple[Any, ...]]] = {"schedule": [], "forward": [], "backward": []}
        self.backend = aot_autograd(fw_compiler=self._compile, partition_fn=min_cut_rematerialization_partition)

    def _compile(self, module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        calls = self.arguments

        class Recorder(torch.fx.Interpreter):
            def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                if getattr(target, "namespace", None) == "flashmask_kernels":
                    calls[target._opname].append(args)
                return super().call_function(target, args, kwargs)

        return make_boxed_func(Recorder(module).run)

    def distinct_bounds(self) -> int:
        return len({id(args[3]) for args in self.arguments["forward"]})


KINDS_OF_LAYERS = {"llama": 1, "bert": 1, "gemma3": 2, "gpt_oss": 2}


def two_layers_of_each_kind(name: str) -> torch.nn.Module:
    hybrid = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
    return build(name, **(hybrid if KINDS_OF_LAYERS[name] == 2 else {}))


def call_of(how: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Documents, and what a model is called with to compute them all."""
    documents = random_documents([20] if how == "plain" else [5, 1, 14])
    row = packed(documents)
    if how == "plain":
        return documents, {"input_ids": row["input_ids"]}
    if how == "padded":
        return documents, padded(documents, "left")
    if how == "bounds":
        mask = bounds.from_position_ids(row["position_ids"])
        return documents, {"input_ids": row["input_ids"], "attention_mask": mask}
    return documents, row


# Not all models tell their mask function about `position_ids`, and bidirectional attention hides nothing.
@pytest.mark.parametrize(
    ("name", "how", "is_training"),
    [
        ("llama", "packed", False),
        ("llama", "plain", False),
        ("llama", "bounds", False),
        ("gemma3", "padded", False),
        ("gpt_oss", "packed", False),
        ("bert", "plain", False),
        ("llama", "packed", True),
        ("gemma3", "packed", True),
    ],
)
def test_compiled_layers_share_bounds_and_schedules(
    name: str, how: str, is_training: bool, interpreted: Callable[..., None]
) -> None:
    interpreted()
    model, kinds = two_layers_of_each_kind(name).train(is_training), KINDS_OF_LAYERS[name]
    calls, (documents, call) = OperatorCalls(), call_of(how)
    compiled = torch.compile(model, fullgraph=True, backend=calls.backend)
    # Padded as a prefill of `generate`, which fills a cache.
    options = {} if name == "bert" else {"use_cache": how == "padded"}
    with torch.set_grad_enabled(is_training):
        logits = compiled(**call, **options).logits
    assert len(calls.arguments["forward"]) == 2 * kinds
    assert calls.distinct_bounds() == kinds
    assert len(calls.arguments["schedule"]) == kinds
    if is_training:
        logits.square().mean().backward()
        assert len(calls.arguments["backward"]) == 2 * kinds
        # The tests' tiles are others in each of the three kernels.
        assert len(calls.arguments["schedule"]) == 3 * kinds
    if how == "padded":
        logits = logits[call["attention_mask"].bool()][None]
    torch.testing.assert_close(logits, logits_alone(eager_twin(model), documents), **TOLERANCE)


def test_bounds_of_the_user_keep_nothing_of_a_compiled_call() -> None:
    documents, call = call_of("bounds")
    before = set(vars(call["attention_mask"]))
    model = build("llama")
    twin = eager_twin(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**call).logits, logits_alone(twin, documents), **TOLERANCE)
        assert set(vars(call["attention_mask"])) == before
        call["attention_mask"].copy_(bounds.causal(20))
        torch.testing.assert_close(compiled(**call).logits, twin(call["input_ids"]).logits, **TOLERANCE)


@pytest.mark.parametrize("length", [4, 10])
def test_dense_masks_of_0_and_1_do_not_pass_for_bounds(length: int) -> None:
    compiled = torch.compile(build("llama"), fullgraph=True, backend="eager")
    tokens = torch.randint(1, 9, (1, length))
    dense = torch.ones(1, 1, length, length, dtype=torch.int32).tril()
    with pytest.raises(RuntimeError, match=r"holds nothing but 0 and 1: if it is a dense mask, call \.bool\(\)"):
        compiled(tokens, attention_mask=dense)


@pytest.mark.parametrize("has_gradients", [False, True])
def test_checkpointed_layers_compile_in_one_graph(has_gradients: bool) -> None:
    """What one region of a graph makes, another cannot have."""
    model = build("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    # What only reentrant checkpointing needs, torch 2.9 does not compile.
    model.disable_input_require_grads()
    documents = random_documents(LENGTHS)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(has_gradients):
        logits = compiled(**packed(documents), use_cache=False).logits
    if has_gradients:
        logits.square().mean().backward()
    torch.testing.assert_close(logits, logits_alone(eager_twin(model).eval(), documents), **TOLERANCE)


@pytest.mark.parametrize("place", ["", "self_attn.o_proj"])
def test_graph_breaks(place: str) -> None:
    """Between the layers, and within them. The compiler traces every frame around a break up to it: there are fewer of
    them without the head.
    """
    model = build("llama", num_hidden_layers=2 if not place else 1)
    twin = eager_twin(model)
    for layer in model.model.layers:
        module = layer.get_submodule(place)
        module.register_forward_hook(torch._dynamo.disable(lambda module, inputs, output: output + 0))
    model.model.compile(backend="eager")
    with torch.no_grad():
        for lengths in PACKINGS[:2]:
            documents = random_documents(lengths)
            expected = logits_alone(twin, documents)
            torch.testing.assert_close(model(**packed(documents), use_cache=False).logits, expected, **TOLERANCE)
    assert graphs_compiled() > 3
