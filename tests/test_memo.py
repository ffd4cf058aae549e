"""What is remembered between layers: made once per forward pass, and never another pass's."""

from __future__ import annotations

import gc
import random
import textwrap
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz_calls import Sequence
from processes import run_at_once
from tiny_models import build, eager_twin, logits_alone, packed, random_documents
from torch import Tensor, nn
from transformers import masking_utils

from flashmask_kernels import schedules
from hf_flashmask import bounds
from hf_flashmask.integration import layer_mask, memo
from hf_flashmask.integration.memo import Memo, recent

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
CPU = torch.device("cpu")
MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}


class Layer(nn.Module):
    def __init__(self, layer_idx: int | None = None) -> None:
        super().__init__()
        if layer_idx is not None:
            self.layer_idx = layer_idx


def counter() -> tuple[list[int], Callable[[], int]]:
    calls: list[int] = []
    return calls, lambda: calls.append(0) or len(calls)


# The rules


@pytest.mark.parametrize("mode", MODES)
def test_layers_of_a_pass_share(mode: str) -> None:
    with MODES[mode]():
        calls, build_one = counter()
        own, source, layers = Memo(), torch.zeros(3), [Layer(index) for index in range(4)]
        for get in (own.get, recent.get):
            calls.clear()
            values = [get("key", (source,), layer, build_one, CPU) for layer in layers]
            assert values == [1] * 4
            assert get("other key", (source,), layers[0], build_one, CPU) == 2
            assert get("key", (source.clone(),), layers[3], build_one, CPU) == 3


@pytest.mark.parametrize("has_index", [False, True])
def test_a_layer_that_comes_again_begins_a_pass(has_index: bool) -> None:
    own, source = Memo(), torch.zeros(3)
    layers = [Layer(index if has_index else None) for index in range(3)]
    for get in (own.get, recent.get):
        _, build_one = counter()
        for number in range(1, 4):
            assert [get("key", (source,), layer, build_one, CPU) for layer in layers] == [number] * 3


def test_a_layer_before_the_last_one_begins_a_pass() -> None:
    """The first layer of another model, which has never asked, with the same tensor in another state."""
    _, build_one = counter()
    source, others = torch.zeros(3), [Layer(index) for index in range(3)]
    for layer in [Layer(0), Layer(1)]:
        recent.get("key", (source,), layer, build_one, CPU)
    assert [recent.get("key", (source,), layer, build_one, CPU) for layer in others] == [2, 2, 2]


def test_changes_are_noticed_by_layers_without_a_place() -> None:
    calls, build_one = counter()
    layers = [Layer() for _ in range(4)]
    array = torch.zeros(3).numpy().copy()
    for source in (torch.from_numpy(array), torch.zeros(3)):
        calls.clear()
        recent.get("key", (source,), layers[0], build_one, CPU)
        array[:] = 1
        source.data.add_(0) if source.untyped_storage().resizable() else None
        recent.get("key", (source,), layers[1], build_one, CPU)
        assert len(calls) == (1 if source.untyped_storage().resizable() else 2)
        source.add_(1)
        recent.get("key", (source,), layers[2], build_one, CPU)
        assert len(calls) == (2 if source.untyped_storage().resizable() else 3)


def test_another_model_begins_a_pass() -> None:
    """It makes the masks of other types of layers than the model before it, of the same tensors."""
    positions, others = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]]), torch.tensor([[0, 1, 0, 1, 2, 3, 4, 5, 6]])
    embeddings = torch.randn(1, 9, 32)
    build("llama")(inputs_embeds=embeddings, position_ids=positions)
    positions.numpy()[:] = others.numpy()
    model = build("mistral")
    logits = model(inputs_embeds=embeddings, position_ids=positions).logits
    torch.testing.assert_close(logits, model(inputs_embeds=embeddings, position_ids=others).logits)


def test_nothing_crosses_the_border_of_inference_mode() -> None:
    own, source = Memo(), torch.zeros(3)
    for get in (own.get, recent.get):
        _, build_one = counter()
        with torch.inference_mode():
            get("key", (source,), Layer(0), build_one, CPU)
        assert get("key", (source,), Layer(1), build_one, CPU) == 2


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_nothing_outlives_the_tensors_and_the_pass(name: str) -> None:
    model, documents = build(name), random_documents([5, 8])
    row = packed(documents)
    masks: Any = bounds.from_position_ids(row["position_ids"])
    if name == "gemma3":
        masks = {kind: masks.clone() for kind in ("full_attention", "sliding_attention")}
    with torch.no_grad():
        model(row["input_ids"], attention_mask=masks, use_cache=False)
    alive = [weakref.ref(mask) for mask in (masks.values() if isinstance(masks, dict) else [masks])]
    del masks
    gc.collect()
    assert all(mask() is None for mask in alive)
    with torch.no_grad():
        model(**row)
    alive = [weakref.ref(row.pop("position_ids"))]
    gc.collect()
    assert alive[0]() is None
    assert not [known for known in recent._entries if any(source() is None for source in known.sources)]


def test_few_entries_are_kept() -> None:
    sources = [torch.zeros(1) for _ in range(50)]
    for source in sources:
        recent.get("key", (source,), Layer(0), lambda: 0, CPU)
    assert len(recent._entries) <= recent._MOST


# Built once


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "kinds"), [("llama", 1), ("gemma2", 2), ("gpt_oss", 2), ("bert", 1), ("mistral", 1)])
def test_bounds_and_schedules_are_made_once_per_pass(
    name: str, kinds: int, mode: str, interpreted: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    interpreted()
    built, made = [], []
    build_schedule, complete = schedules.build_schedule, layer_mask._complete_layer_mask
    monkeypatch.setattr(schedules, "build_schedule", lambda *args: built.append(args) or build_schedule(*args))
    monkeypatch.setattr(layer_mask, "_complete_layer_mask", lambda *args: made.append(args) or complete(*args))
    layer_types = ["sliding_attention", "full_attention"] * 2 if kinds == 2 else None
    model = build(name, num_hidden_layers=4, **({"layer_types": layer_types} if kinds == 2 else {}))
    documents = random_documents([5, 8])
    with MODES[mode]():
        for number in (1, 2):
            logits = model(**packed(documents)).logits
            assert (len(made), len(built)) == (number * kinds, number * kinds)
    torch.testing.assert_close(logits, logits_alone(eager_twin(model), documents), **TOLERANCE)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_an_engine_that_hands_every_layer_new_positions_builds_once(
    name: str, interpreted: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    interpreted()
    built = []
    build_schedule = schedules.build_schedule
    monkeypatch.setattr(schedules, "build_schedule", lambda *args: built.append(args) or build_schedule(*args))
    model, documents = build(name), random_documents([5, 8])

    def copy(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, {**kwargs, "position_ids": kwargs["position_ids"].clone()}

    for layer in model.model.layers:
        layer.register_forward_pre_hook(copy, with_kwargs=True)
    model(**packed(documents))
    assert len(built) == (2 if name == "gemma2" else 1)


@pytest.mark.parametrize("mode", MODES)
def test_a_dict_of_bounds_is_scheduled_once_per_pass(
    mode: str, interpreted: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    interpreted()
    built = []
    build_schedule = schedules.build_schedule
    monkeypatch.setattr(schedules, "build_schedule", lambda *args: built.append(args) or build_schedule(*args))
    model = build("gemma2", num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2)
    documents = random_documents([5, 8])
    row = packed(documents)
    with MODES[mode]():
        apart = bounds.from_position_ids(row["position_ids"])
        window = bounds.intersect(apart, bounds.sliding_window(4, 13))
        masks = {"full_attention": apart, "sliding_attention": window}
        for number in (1, 2):
            logits = model(row["input_ids"], attention_mask=masks, position_ids=row["position_ids"]).logits
            assert len(built) == 2 * number
    torch.testing.assert_close(logits, logits_alone(eager_twin(model), documents), **TOLERANCE)


# Never stale


def test_random_sequences_of_calls() -> None:
    """See `fuzz_calls.py`, which runs 10,000 of them."""
    for seed in range(40):
        Sequence(random.Random(seed), CPU).run()


def test_tensors_changed_by_another_process(tmp_path: Path) -> None:
    """`broadcast` writes to a tensor and leaves its version as it is."""
    script = tmp_path / "two_processes.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import os, torch, torch.distributed as dist
            from tiny_models import build, eager_twin, logits_alone, packed, random_documents

            rank = int(os.environ["RANK"])
            dist.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=rank, world_size=2)
            torch.manual_seed(3)
            tokens, packings = random_documents([13])[0], [[5, 8], [2, 10, 1], [13]]
            for name in ("llama", "gpt_oss", "bert"):
                model = build(name)
                twin = eager_twin(model)
                position_ids = torch.zeros(1, 13, dtype=torch.long)
                for mode in (torch.enable_grad, torch.no_grad):
                    for lengths in packings:
                        documents = list(tokens.split(lengths, 1))
                        given = packed(documents)["position_ids"] if rank == 0 else torch.zeros(1, 13, dtype=torch.long)
                        before = position_ids._version
                        if rank == 0:
                            position_ids.data.copy_(given)
                        dist.broadcast(position_ids, 0)
                        assert position_ids._version == before
                        with mode():
                            logits = model(tokens, position_ids=position_ids).logits
                            torch.testing.assert_close(logits, logits_alone(twin, documents), rtol=1e-4, atol=1e-5)
            dist.destroy_process_group()
            """
        )
    )
    run_at_once(script, [], [{"RANK": "0"}, {"RANK": "1"}], tmp_path)


@pytest.mark.gpu
def test_random_sequences_of_calls_on_a_gpu() -> None:
    for seed in range(200):
        Sequence(random.Random(seed), torch.device("cuda")).run()


# CUDA graphs


def on_gpu(name: str) -> tuple[nn.Module, nn.Module]:
    model = build(name)
    twin = eager_twin(model)
    return model.cuda(), twin.cuda()


@pytest.mark.gpu
@pytest.mark.parametrize("warm_up", [True, False])
@pytest.mark.parametrize("mode", ["no_grad", "inference"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3", "bert"])  # experts copy from the host
def test_a_captured_model_follows_its_inputs(name: str, mode: str, warm_up: bool) -> None:
    model, twin = on_gpu(name)
    tokens = random_documents([13])[0].cuda()
    packings = [list(tokens.split(lengths, 1)) for lengths in ([5, 8], [13], [1, 2, 10], [6, 7])]
    call = {} if name == "bert" else {"use_cache": False}
    with MODES[mode]():
        expected = [logits_alone(twin, documents) for documents in packings]
        position_ids = packed([part.cpu() for part in packings[0]])["position_ids"].cuda()
        if warm_up:
            model(tokens, position_ids=position_ids, **call)
        else:  # kernels must be compiled before a capture, but not with these tensors
            model(tokens.clone(), position_ids=position_ids.clone(), **call)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(tokens, position_ids=position_ids, **call).logits
        # A plain call before any replay must not read what only a replay computes.
        torch.testing.assert_close(model(tokens, position_ids=position_ids, **call).logits, expected[0], **TOLERANCE)
        for documents, truth in zip(packings[::-1], expected[::-1]):
            position_ids.copy_(packed([part.cpu() for part in documents])["position_ids"])
            graph.replay()
            torch.testing.assert_close(captured, truth, **TOLERANCE)
            torch.testing.assert_close(model(tokens, position_ids=position_ids, **call).logits, truth, **TOLERANCE)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_the_recipe_of_the_documentation(name: str) -> None:
    page = (Path(__file__).parents[1] / "docs" / "cuda_graphs.md").read_text()
    recipe = page.partition("```python\n")[2].partition("```")[0]
    model, twin = on_gpu(name)
    packings = [random_documents(lengths) for lengths in ([5, 8], [13], [1, 2, 10])]
    results: list[Tensor] = []
    names = {
        "model": model,
        "length": 13,
        "batches": [{key: value.cuda() for key, value in packed(documents).items()} for documents in packings],
        "use": lambda logits: results.append(logits.clone()),
    }
    exec(recipe, names)
    for logits, documents in zip(results, packings, strict=True):
        expected = logits_alone(twin, [document.cuda() for document in documents])
        torch.testing.assert_close(logits, expected, **TOLERANCE)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_make_graphed_callables(name: str) -> None:
    model, twin = on_gpu(name)
    tokens = random_documents([13])[0].cuda()

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor, position_ids: Tensor) -> Tensor:
            return self.model(ids, position_ids=position_ids, use_cache=False).logits

    positions = packed(random_documents([5, 8]))["position_ids"].cuda()
    graphed = torch.cuda.make_graphed_callables(Logits(), (tokens, positions))
    weights = torch.randn(1, 13, 97, device="cuda")
    for lengths in ([1, 12], [13], [6, 7]):
        documents = list(tokens.split(lengths, 1))
        positions = packed([part.cpu() for part in documents])["position_ids"].cuda()
        model.zero_grad()
        twin.zero_grad()
        logits, expected = graphed(tokens, positions), logits_alone(twin, documents)
        torch.testing.assert_close(logits, expected, **TOLERANCE)
        (logits * weights).sum().backward()
        (expected * weights).sum().backward()
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_masks_made_outside_of_a_graph_are_completed_in_it() -> None:
    model, twin = on_gpu("gemma2")
    tokens = random_documents([13])[0].cuda()
    embeds = torch.zeros(1, 13, 32, device="cuda")
    masks = masking_utils.create_masks_for_generate(model.config, embeds, None, None, position_ids=None)
    position_ids = packed(random_documents([5, 8]))["position_ids"].cuda()
    call = {"attention_mask": masks, "position_ids": position_ids, "use_cache": False}
    with torch.no_grad():
        model(tokens, **call)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(tokens, **call).logits
        for lengths in ([2, 11], [13]):
            documents = list(tokens.split(lengths, 1))
            position_ids.copy_(packed([part.cpu() for part in documents])["position_ids"])
            graph.replay()
            torch.testing.assert_close(captured, logits_alone(twin, documents), **TOLERANCE)


@pytest.mark.gpu
def test_other_streams_do_not_read_what_is_not_yet_written() -> None:
    model, twin = on_gpu("gpt_oss")
    tokens, streams = random_documents([13])[0].cuda(), [torch.cuda.Stream() for _ in range(3)]
    position_ids = torch.zeros(1, 13, dtype=torch.long, device="cuda")
    with torch.no_grad():
        for lengths in ([2, 11], [13], [4, 4, 5], [12, 1]):
            documents = list(tokens.split(lengths, 1))
            truth = logits_alone(twin, documents)
            position_ids.copy_(packed([part.cpu() for part in documents])["position_ids"])
            torch.cuda.synchronize()
            outputs = []
            for stream in streams:
                with torch.cuda.stream(stream):
                    outputs.append(model(tokens, position_ids=position_ids, use_cache=False).logits)
            torch.cuda.synchronize()
            for logits in outputs:
                torch.testing.assert_close(logits, truth, **TOLERANCE)


def test_the_memory_has_one_home() -> None:
    """Nothing else in the packages remembers tensors by their identity."""
    root = Path(memo.__file__).resolve().parents[2]
    kept = []
    for folder in ("hf_flashmask", "kernels/torch-ext/flashmask_kernels"):
        for path in (root / folder).rglob("*.py"):
            text = path.read_text()
            if "WeakIdKeyDictionary" in text or "WeakTensorKeyDictionary" in text:
                kept.append(path.name)
    assert kept == []
