"""Models on several GPUs: loss and gradients of one process, or an error that names the engine and the way that works.

Processes on one machine, connected by gloo, against one process under eager attention with each document alone.

| engine | packed, windows, sinks | bounds, padding | bounds of heads | image blocks | trees | one kv head |
|---|---|---|---|---|---|---|
| DDP, also by accelerate and Trainer | exact | exact | exact | exact | exact | exact |
| FSDP2, also by accelerate; HSDP; FSDP1 | exact | exact | exact | exact | exact | exact |
| with checkpointing, both kinds | exact | exact | exact | exact | exact | exact |
| with LoRA (DDP, FSDP2) | exact | | | | | |
| ZeRO-2, ZeRO-3, where DeepSpeed is installed | exact | exact | | | exact | exact |
| in bfloat16 (DDP, FSDP1, FSDP2, ZeRO; images and trees in FSDP2) | as eager | | | as eager | as eager | as eager |
| `tp_plan="auto"` (gpt-oss keeps its heads whole) | exact | exact | exact | exact | exact | Transformers fails |
| `nn.DataParallel` | exact (1) | exact (2) | | | exact | |
| hooks of `device_map` | exact | exact | | exact | exact | |
| Ulysses of DeepSpeed, which drops masks | exact (3) | refused (4) | refused | refused | refused | exact |
| with `keep_masks`, also accelerate's without DeepSpeed | exact | exact | exact | as bounds | exact | exact (5) |
| axolotl's ringmaster, one document | exact, sinks refused | | | | | |
| torch's `context_parallel` | refused | refused | refused | refused | refused | refused |

"Trees" are `share_prefixes` under a loss that compares answers, and under DDP in TRL's DPOTrainer. (1)
`cu_seq_lens_q` is refused. (2) Bounds of batch 1 beside several rows are refused. (3) Sinks and chunks are refused.
(4) Padding after the last token is exact. (5) accelerate's refuses it.

`nn.DataParallel` itself drops the rows of the batch for which a tensor of batch 1 has no part. The layer sees it only
where a replica has several rows. Ulysses is that of `replica_cases.deepspeed`, `accelerate_ulysses` and
`train_ringmaster`, which do what the libraries do.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import processes
import pytest
import replica_cases
import torch
import transformers
from accelerate import dispatch_model
from packaging.version import Version
from replica_cases import (
    CASES,
    Results,
    batch_of,
    build_model,
    documents_of,
    errors,
    gradients_of,
    loss_of_documents,
    true_loss,
)
from tiny_models import VOCABULARY, eager_twin, padded
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_flashmask import bounds, keep_masks, share_prefixes
from hf_flashmask.parallel import kept_masks
from hf_flashmask.parallel.group import Group

LOSS, GRADIENTS = 1e-6, 1e-5

REFUSED = {
    "ulysses llama left padding": "DeepSpeed's Ulysses does this.* has dropped the padding",
    "ulysses llama left padding of a whole part": "has dropped the padding",
    "ulysses llama document ids": "has dropped the documents in `attention_mask`",
    "ulysses llama bounds": "has dropped the bounds or the tree.*Use hf_flashmask.sequence_parallel",
    "ulysses llama heads": "has dropped the bounds or the tree",
    "ulysses gemma3 bounds": "has dropped the masks for its types of layers",
    "ulysses gemma3 tree": "has dropped the bounds or the tree",
    "ulysses gemma3_images images": "has dropped image blocks",
    "ulysses llama4 packed": "has dropped image blocks, chunks",
    "ulysses gpt_oss packed": "2 query heads, and has attention sinks for 4.*Ulysses",
    "ringmaster gpt_oss": "2 query heads, and has attention sinks for 4",
    "kept deepspeed without an engine": "no engine has replaced the attention function",
    "ring llama": '`context_parallel`.*needs "sdpa"',
    "tensor llama_one_kv_head packed": "shape '.*' is invalid for input",  # an error of Transformers
}


def compute(folder: Path, *names: str, gpus: int = 0) -> None:
    """Let processes run all cases, or those named, on the CPU or on GPUs."""
    processes.run_at_once(Path(replica_cases.__file__), [str(folder), *names, str(gpus)], [{}], folder)


def read(folder: Path, gpus: int = 0) -> dict[int, list[Results]]:
    """What each process found, by the number of processes."""
    return {
        ranks: [json.loads((folder / f"results_{ranks}_{rank}.json").read_text()) for rank in range(ranks)]
        for ranks in ([gpus] if gpus else CASES)
    }


def with_marks(*case: Any) -> Any:
    """The parameters of a case, the last of which is its name."""
    return pytest.param(*case, marks=pytest.mark.needs("deepspeed") if case[-1].startswith("zero") else ())


def assert_equals_one_process(result: dict[str, Any], most_loss: float, most_gradients: float) -> None:
    """The errors of one process: in float32 the largest allowed, in bfloat16 those of eager attention."""
    assert "error" not in result, result["traceback"]
    if "eager_loss" in result:
        assert result["loss"] < 2 * result["eager_loss"] + 5e-4
        assert result["gradients"] < 1.5 * result["eager_gradients"]
    else:
        assert max(result["loss"] / most_loss, result["gradients"] / most_gradients) < 1, result


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Results]]:
    return read(processes.compute_once(tmp_path_factory, "replicas", compute))


# The tensor parallelism of Transformers 5.4 leaves gradients in parts.
IS_LEFT_OUT = "tensor" if Version(transformers.__version__) < Version("5.10") else "nothing"


@pytest.mark.parametrize(
    ("ranks", "name"),
    [with_marks(ranks, name) for ranks, cases in CASES.items() for name in cases if not name.startswith(IS_LEFT_OUT)],
)
def test_several_processes_equal_one(results: dict[int, list[Results]], ranks: int, name: str) -> None:
    for result in (of_rank[name] for of_rank in results[ranks]):
        if name in REFUSED:
            assert re.search(REFUSED[name], result.get("error", ""), re.DOTALL), result
            continue
        assert_equals_one_process(result, LOSS, GRADIENTS)
        if name.startswith("kept"):
            layer_types = 2 if re.search("gpt_oss|gemma3", name) else 1
            assert result["masks"] == (0 if re.search("bounds|heads|tree", name) else layer_types)
        if name.startswith("tensor"):
            assert result["is_sharded"] == ("gpt_oss" not in name)


def test_the_page_says_what_the_cases_say() -> None:
    page = (Path(__file__).parents[1] / "docs" / "many_gpus.md").read_text()
    rows = re.findall(r"^\| [^|]+ \| [^|]+ \| (exact|refused) \| (.+) \|$", page, re.MULTILINE)
    shown = {name: verdict for verdict, names in rows for name in re.findall("`([^`]+)`", names)}
    assert shown.keys() <= CASES[2].keys()
    assert {name for name in CASES[2] if name.startswith(("ulysses", "kept", "ring"))} - shown.keys() == {
        "ulysses llama left padding of a whole part",
        "kept deepspeed without an engine",
    }
    assert {name for name, verdict in shown.items() if verdict == "refused"} == shown.keys() & REFUSED.keys()


def test_accelerate_takes_the_name_after_the_constructor() -> None:
    handler = accelerate.utils.DeepSpeedSequenceParallelConfig(sp_seq_length_is_variable=True)
    handler.sp_attn_implementation = "flashmask"
    config = accelerate.ParallelismConfig(sp_backend="deepspeed", sp_size=2, sp_handler=handler)
    assert config.sp_handler.sp_attn_implementation == "flashmask"


# What `keep_masks` is given


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position_ids": None}, r"`position_ids` \[B or 1, 12\] must say .* got NoneType"),
        ({"cu_seq_lens_q": torch.tensor([0, 12])}, "`cu_seq_lens_q` of one rank's tokens cannot be gathered"),
        (
            {"attention_mask": bounds.causal(12)},
            r"2-D with the 12 tokens of this rank, or bounds of .* 24\] on all ranks, got \[1",
        ),
        ({"attention_mask": torch.ones(1, 7)}, r"got \[1, 7\]"),
    ],
)
def test_keep_masks_refuses(kept: Any, change: dict[str, Any], message: str) -> None:
    batch = {"input_ids": torch.ones(1, 12, dtype=torch.long), "position_ids": torch.arange(12)[None]}
    with pytest.raises((ValueError, NotImplementedError), match=message):
        kept(**batch | change)


def test_evaluation_under_an_engine_that_exchanges_only_in_training(kept: Any) -> None:
    """Each rank has rows of its own there; what hides keys is kept as well."""
    kept.eval()
    twin = eager_twin(kept)
    documents = documents_of(0)
    batch = padded(documents, "left")
    logits = kept(**batch, use_cache=False).logits
    for row, document in zip(logits, documents):
        torch.testing.assert_close(row[-document.shape[1] :], twin(document).logits[0], rtol=1e-4, atol=1e-5)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A model of the first of two ranks in training, under an engine that hands its function no mask."""
    inner = ALL_ATTENTION_FUNCTIONS["flashmask"]

    def drop(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        return inner(module, query, key, value, None, **kwargs)

    group = Group(None, rank=0, size=2)
    monkeypatch.setattr(kept_masks, "groups_of", lambda *_: [group])
    monkeypatch.setattr(kept_masks, "all_gather", lambda part, _: torch.stack([part, part]))
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "flashmask", drop)
    model = build_model("llama").train()
    with keep_masks(model, group):
        yield model
    assert ALL_ATTENTION_FUNCTIONS["flashmask"] is drop


# nn.DataParallel: on the CPU it has no replicas, so that here they are made as it makes them


def data_parallel(model: nn.Module, **batch: Any) -> list[Any]:
    """Outputs of two replicas in two threads. Every tensor is cut along its first dimension; a dict is as long as the
    tensor with the fewest parts.
    """
    parts = [_scatter(value) for value in batch.values()]
    calls = [dict(zip(batch, values)) for values in zip(*parts)]
    outputs: list[Any] = [None] * len(calls)

    def run(index: int) -> None:
        try:
            outputs[index] = _replica(model)(**calls[index])
        except Exception as error:
            outputs[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for output in outputs:
        if isinstance(output, Exception):
            raise output
    return outputs


def _scatter(value: Any) -> list[Any]:
    if isinstance(value, Tensor):
        return list(value.chunk(2))
    if isinstance(value, dict):
        return [dict(zip(value, values)) for values in zip(*map(_scatter, value.values()))]
    return [value, value]


def _replica(module: nn.Module) -> nn.Module:
    """A copy that shares parameters, as `torch.nn.parallel.replicate` makes it."""
    replica = module._replicate_for_data_parallel()
    replica._parameters = dict(module._parameters)
    for name, child in module._modules.items():
        replica._modules[name] = None if child is None else _replica(child)
    return replica


def rows_of_two() -> tuple[dict[str, Tensor], list[list[Tensor]]]:
    """A packed row of 24 tokens for each of two replicas."""
    documents = [documents_of(0), [documents_of(1)[1], documents_of(1)[1] % 7]]
    rows = [replica_cases.packed(row) for row in documents]
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}, documents


@pytest.mark.parametrize("kind", ["packed", "bounds"])
@pytest.mark.parametrize("name", ["llama", "gpt_oss", "gemma3"])
def test_data_parallel(name: str, kind: str) -> None:
    model = build_model(name)
    twin = eager_twin(model)
    batch, documents = rows_of_two()
    call: dict[str, Any] = dict(batch)
    if kind == "bounds":
        own = bounds.from_position_ids(batch["position_ids"])
        call["attention_mask"] = own
        if name != "llama":
            window = bounds.sliding_window(model.config.sliding_window, own.shape[-1])
            windowed = bounds.intersect(own, window)
            call["attention_mask"] = {"full_attention": own, "sliding_attention": windowed}
    outputs = data_parallel(model, **call, use_cache=False)
    assert len(outputs) == 2
    loss = torch.stack([loss_of_documents(output.logits, row) for output, row in zip(outputs, documents)]).sum()
    loss.backward()
    alone = [torch.cat([twin(document).logits for document in row], dim=1) for row in documents]
    expected = torch.stack([loss_of_documents(logits, row) for logits, row in zip(alone, documents)]).sum()
    expected.backward()
    error = errors(loss, gradients_of(model), (expected.detach(), gradients_of(twin)))
    assert max(error["loss"] / LOSS, error["gradients"] / GRADIENTS) < 1, error


def test_data_parallel_shares_prefixes() -> None:
    model = build_model("gemma3")
    rows = [documents_of(0)[2][0], documents_of(0)[2][0].clone(), documents_of(0)[3][0], documents_of(0)[3][0].clone()]
    rows[1][-2:] = rows[3][-1:] = 5
    batch = padded([row[None] for row in rows], "right")
    del batch["position_ids"]
    expected = [eager_twin(model)(row[None]).logits[0] for row in rows]
    with share_prefixes(model) as sharing:
        outputs = data_parallel(model, **batch, use_cache=False)
    assert sharing.computed_tokens < sharing.given_tokens
    logits = [row for output in outputs for row in output.logits]
    for row, truth in zip(logits, expected):
        torch.testing.assert_close(row[: len(truth)], truth, rtol=1e-4, atol=1e-5)


def test_data_parallel_refuses_what_it_cuts() -> None:
    model = build_model("llama")
    batch = {"input_ids": torch.randint(1, VOCABULARY, (4, 6)), "use_cache": False}
    with pytest.raises(ValueError, match=r"nn.DataParallel cuts .* expand it to the batch, or use DDP"):
        data_parallel(model, **batch, attention_mask=bounds.causal(6))
    with pytest.raises(NotImplementedError, match=r"nn.DataParallel cuts `cu_seq_lens_q` .* use DDP"):
        data_parallel(
            model,
            input_ids=batch["input_ids"][:1],
            use_cache=False,
            cu_seq_lens_q=torch.tensor([0, 2, 3, 6], dtype=torch.int32),
            cu_seq_lens_k=torch.tensor([0, 2, 3, 6], dtype=torch.int32),
            max_length_q=3,
            max_length_k=3,
        )


# device_map


@pytest.mark.parametrize(
    ("name", "kind"),
    [("llama", "packed"), ("gpt_oss", "bounds"), ("gemma3", "padded"), ("gemma3_images", "images"), ("gemma3", "tree")],
)
def test_hooks_of_a_device_map(name: str, kind: str) -> None:
    """The hooks that move the arguments of each layer, with the CPU as every device."""
    model = build_model(name)
    twin = eager_twin(model)
    dispatched = dispatch_model(copy.deepcopy(model), {"": "cpu"}, force_hooks=True)
    with share_prefixes(dispatched) if kind == "tree" else contextlib.nullcontext():
        loss = replica_cases.loss_of_batch(dispatched, kind, 0, model)
    loss.backward()
    expected = true_loss(twin, kind, 0)
    expected.backward()
    error = errors(loss, gradients_of(dispatched), (expected.detach(), gradients_of(twin)))
    assert max(error["loss"] / LOSS, error["gradients"] / GRADIENTS) < 1, error


# Masks that do not arrive, in one process


@pytest.fixture
def replace_attention(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable], None]:
    def replace(change: Callable) -> None:
        inner = ALL_ATTENTION_FUNCTIONS["flashmask"]

        def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
            query, key, value, mask = change(query, key, value, mask)
            output, _ = inner(module, query, key, value, mask, **kwargs)
            return output[:, : output.shape[1] // 2], None

        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "flashmask", attend)

    return replace


def twice(*tensors: Tensor) -> list[Tensor]:
    return [torch.cat([tensor, tensor], dim=2) for tensor in tensors]


def test_bounds_of_one_part_beside_gathered_queries(replace_attention: Callable[[Callable], None]) -> None:
    model = build_model("llama")
    replace_attention(lambda query, key, value, mask: (*twice(query, key, value), mask))
    with pytest.raises(ValueError, match=r"24 keys, .* and 48 keys.* brought the tokens of several"):
        model(**batch_of("packed", 0, model), use_cache=False)


def test_after_an_error_other_calls_work(replace_attention: Callable[[Callable], None]) -> None:
    model = build_model("llama")
    replace_attention(lambda query, key, value, mask: (*twice(query, key, value), None))
    with pytest.raises(NotImplementedError, match="has dropped the bounds") as kept:
        model(**batch_of("bounds", 0, model), use_cache=False)
    model(input_ids=torch.cat(documents_of(0), dim=1), use_cache=False)
    assert kept.value.__traceback__ is not None
