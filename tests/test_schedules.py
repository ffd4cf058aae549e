"""How long schedules live, and who shares them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from attention_checks import assert_replays_as_eager, masks, model_tensor, random_intervals
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from flashmask_kernels import Schedules, flashmask_attention, reference_attention, schedules

ROWS, COLUMNS, TALL_COLUMNS = (16, 32, False), (16, 32, True), (32, 32, True)


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is built, in turn."""
    log = []
    monkeypatch.setattr(schedules, "column_extrema", lambda *_: log.append("extrema") or torch.zeros(1))
    monkeypatch.setattr(schedules, "build_schedule", lambda *_: log.append("schedule") or torch.zeros(1))
    return log


def inputs(length: int = 37, device: str = "cpu") -> list[Tensor]:
    return [model_tensor(1, length, heads, 16, torch.float32, device) for heads in (2, 1, 1)]


def test_each_schedule_is_made_once(builds: list[str]) -> None:
    shared = Schedules(random_intervals(1, 1, 1, 37, 37), 37)
    assert builds == [], "made when they are asked for"
    assert shared.get(ROWS) is shared.get(ROWS)
    assert shared.get(COLUMNS) is not shared.get(ROWS)
    shared.get(TALL_COLUMNS)
    assert builds == ["extrema", "schedule", "schedule", "schedule"]
    Schedules(shared.bounds, 37).get(ROWS)
    assert len(builds) == 6, "another object shares nothing"


def test_no_schedule_crosses_streams_or_the_border_of_a_capture(
    builds: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = [(False, 1)]
    monkeypatch.setattr(schedules, "capture_and_stream", lambda device: home[0])
    bounds = random_intervals(1, 1, 1, 37, 37)
    outside = Schedules(bounds, 37)
    first = outside.get(ROWS)
    home[0] = (False, 2)
    assert outside.get(ROWS) is not first
    home[0] = (True, 1)
    captured = [outside.get(ROWS) for _ in range(2)]
    assert first is not captured[0] is not captured[1], "two captures look alike: neither may read the other's"
    inside = Schedules(bounds, 37)
    assert inside.get(ROWS) is inside.get(ROWS), "the layers of a captured pass share"
    home[0] = (True, 2)
    of_capture = inside.get(ROWS)
    home[0] = (False, 1)
    assert outside.get(ROWS) is first
    assert inside.get(ROWS) is not of_capture
    assert len(builds) == 2 * 7


def test_layers_share_what_they_are_handed(interpreted: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    interpreted()
    built = []
    original = schedules.build_schedule
    monkeypatch.setattr(schedules, "build_schedule", lambda *args: built.append(args[2:5]) or original(*args))
    query, key, value = (tensor.requires_grad_() for tensor in inputs())
    bounds = masks(37, 37)["causal_document"]
    shared, hidden, truth = Schedules(bounds, 37), query, query
    for _ in range(3):
        hidden = flashmask_attention(hidden, key, value, bounds, schedules=shared)
        truth, _ = reference_attention(truth, key, value, bounds)
    assert len(built) == 1
    leaves = (query, key, value)
    for ours, expected in zip(torch.autograd.grad(hidden.sum(), leaves), torch.autograd.grad(truth.sum(), leaves)):
        assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert len(built) == len(set(built)) == 3
    for _ in range(2):
        flashmask_attention(query, key, value, bounds).sum().backward()
    assert len(built) == 9, "without an object, a call and its backward share and nothing is remembered"


@pytest.mark.parametrize("how", ["numpy", "data", "inference"])
def test_bounds_that_change_unseen_between_calls(how: str, interpreted: Callable[..., None]) -> None:
    interpreted()
    query, key, value = inputs()
    first, second = (masks(37, 37)[name] for name in ("causal", "causal_document"))
    with torch.inference_mode(how == "inference"):
        bounds = torch.from_numpy(first.numpy().copy()) if how == "numpy" else first.clone()
        flashmask_attention(query, key, value, bounds)
        if how == "numpy":
            np.copyto(bounds.numpy(), second.numpy())
        elif how == "data":
            bounds.data.copy_(second)
        else:
            bounds.copy_(second)
        assert_close(flashmask_attention(query, key, value, bounds), reference_attention(query, key, value, second)[0])


@pytest.mark.parametrize("is_contiguous", [False, True])
def test_bounds_of_any_strides(is_contiguous: bool, interpreted: Callable[..., None]) -> None:
    interpreted()
    query, key, value = inputs()
    bounds = random_intervals(1, 1, 2, 37, 37).repeat_interleave(2, 3)[..., ::2]
    bounds = bounds.contiguous() if is_contiguous else bounds
    shared = Schedules(bounds, 37)
    for _ in range(2):
        out = flashmask_attention(query, key, value, bounds, schedules=shared)
        assert_close(out, reference_attention(query, key, value, bounds)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("given", ["another tensor", "nothing", "another length"])
def test_schedules_of_another_mask_are_refused(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = inputs()
    bounds = random_intervals(1, 1, 2, 37, 37)
    shared = Schedules(bounds, 36 if given == "another length" else 37)
    monkeypatch.setattr(Schedules, "get", lambda *_: pytest.fail("it must be refused before any work"))
    wanted = {"another tensor": bounds.clone(), "nothing": None, "another length": bounds}[given]
    with pytest.raises(ValueError, match=r"`schedules` must be made (from the `bounds` of this|for 37 query rows)"):
        flashmask_attention(query, key, value, wanted, schedules=shared)


class Graphs:
    """Runs the graphs of a compiled function as they are, and counts the operators in them."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def __call__(self, module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        for graph in module.modules():
            if isinstance(graph, torch.fx.GraphModule):
                targets = [node.target for node in graph.graph.nodes]
                self.calls.update(
                    target._schema.name.partition("::")[2]
                    for target in targets
                    if getattr(target, "namespace", None) == "flashmask_kernels"
                )
        return module


def layers(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, shared: Schedules | None = None) -> Tensor:
    for _ in range(3):
        query = flashmask_attention(query, key, value, bounds, schedules=shared)
    return query


@pytest.mark.parametrize("made", ["in the graph", "by the caller"])
@pytest.mark.parametrize("needs_gradient", [False, True])
def test_in_a_graph(made: str, needs_gradient: bool, interpreted: Callable[..., None]) -> None:
    interpreted()
    query, key, value = (tensor.requires_grad_(needs_gradient) for tensor in inputs())
    graphs = Graphs()

    def attend(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, shared: Schedules | None) -> Tensor:
        return layers(query, key, value, bounds, shared or Schedules(bounds, query.shape[2]))

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=graphs)
    with torch.set_grad_enabled(needs_gradient):
        for length in (37, 41):
            query, key, value = (tensor.requires_grad_(needs_gradient) for tensor in inputs(length))
            bounds = masks(length, length)["causal_document"]
            shared = None if made == "in the graph" else Schedules(bounds, length)
            out = compiled(query, key, value, bounds, shared)
            assert_close(out, layers(query, key, value, bounds), rtol=1e-4, atol=1e-5)
    assert graphs.calls["forward"] == 3, "one graph for all lengths"
    assert graphs.calls["schedule"] == (1 if made == "in the graph" and not needs_gradient else 3)


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_in_a_checkpointed_region_of_a_graph(needs_gradient: bool, interpreted: Callable[..., None]) -> None:
    """Without gradients the region gets no object: Dynamo refuses to write to it there."""
    interpreted()
    query, key, value = (tensor.requires_grad_(needs_gradient) for tensor in inputs())
    bounds = masks(37, 37)["causal_document"]

    def attend(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor) -> Tensor:
        shared = Schedules(bounds, query.shape[2])
        in_region = shared if needs_gradient else None
        for _ in range(2):
            query = checkpoint(
                lambda query: flashmask_attention(query, key, value, bounds, schedules=in_region),
                query,
                use_reentrant=False,
            )
        return flashmask_attention(query, key, value, bounds, schedules=shared)

    with torch.set_grad_enabled(needs_gradient):
        out = torch.compile(attend, fullgraph=True, backend="aot_eager")(query, key, value, bounds)
        truth = layers(query, key, value, bounds)
    assert_close(out, truth, rtol=1e-4, atol=1e-5)
    if needs_gradient:
        leaves = (query, key, value)
        for ours, expected in zip(torch.autograd.grad(out.sum(), leaves), torch.autograd.grad(truth.sum(), leaves)):
            assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_graph_breaks_between_layers(interpreted: Callable[..., None]) -> None:
    """An object that leaves the graph it was made in still belongs to its bounds."""
    interpreted()
    pause = torch._dynamo.disable(torch.clone)

    def attend(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor) -> Tensor:
        shared = Schedules(bounds, query.shape[2])
        for _ in range(3):
            query = pause(flashmask_attention(query, key, value, bounds, schedules=shared))
        return query

    compiled = torch.compile(attend, backend="eager")
    with torch.no_grad():
        for length in (37, 41, 50):
            query, key, value = inputs(length)
            bounds = masks(length, length)["causal_document"]
            out = compiled(query, key, value, bounds)
            assert_close(out, layers(query, key, value, bounds), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("made", ["before", "in the pass"])
def test_a_captured_pass_of_several_layers(made: str) -> None:
    """A replay uses what the bounds hold then, whoever made the object."""
    kept: dict[int, Schedules] = {}

    def random_inputs() -> list[Tensor]:
        return [*inputs(300, "cuda"), random_intervals(1, 1, 2, 300, 300).cuda()]

    def attend(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor) -> Tensor:
        # Eager calls may not keep an object either: the bounds change between them.
        is_capturing = torch.cuda.is_current_stream_capturing()
        if made == "before":
            kept.setdefault(id(bounds), Schedules(bounds, 300))
        shared = kept[id(bounds)] if made == "before" and is_capturing else Schedules(bounds, 300)
        return layers(query, key, value, bounds, shared)

    assert_replays_as_eager(attend, random_inputs)
