"""The figures that the project publishes: what is measured, how it is counted, gathered and reported.

What needs no GPU is tested here: that the forms of a mask are one mask, that the truth is right and wrong results are
found, that pieces of a run come together, and that the report says what the rows say.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from itertools import accumulate
from pathlib import Path
from time import sleep
from types import SimpleNamespace
from typing import Any

import processes
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import create_mask

from flashmask_kernels import dispatch, flashmask_attention, reference_attention
from hf_flashmask.bounds import from_cu_seqlens, tile_occupancy, to_dense, visible_pairs

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))  # its files import each other by name

import attention_gpu  # noqa: E402
import decoding_gpu  # noqa: E402
import example_steps_gpu  # noqa: E402
import families  # noqa: E402
import masking_gpu  # noqa: E402
import masks  # noqa: E402
import measurement  # noqa: E402
import parallel_cost  # noqa: E402
import parallel_gpu  # noqa: E402
import parallel_scaling  # noqa: E402
import peers  # noqa: E402
import report  # noqa: E402
import row_intervals  # noqa: E402
import training_gpu  # noqa: E402
import truth  # noqa: E402
import tune  # noqa: E402


def test_the_pages_say_what_the_results_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["report.py", "--check"])
    report.main()  # exits where they differ


def test_without_a_gpu_a_gpu_benchmark_says_so() -> None:
    with pytest.raises(SystemExit, match="torch finds none"):
        measurement.require_gpu()


# Masks


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize(("length", "documents", "seed"), [(203, 4, 0), (149, 1, 1), (260, 9, 2)])
def test_all_forms_of_a_mask_are_one_mask(length: int, documents: int, seed: int, heads: int) -> None:
    row = masks.random_row(length, documents, seed)
    for name, form in masks.mask_forms(row, heads=heads, seed=seed).items():
        mask = form()
        visible = to_dense(mask.bounds())
        if mask.mask_mod is None:
            assert visible.all(), name
        else:
            theirs = create_mask(mask.mask_mod, 1, visible.shape[1], length, length, device="cpu")
            assert torch.equal(theirs, visible), name
        if mask.varlen is not None:
            assert torch.equal(dense_of(mask.varlen)[None, None], visible), name


def dense_of(varlen: masks.Varlen) -> Tensor:
    """What variable-length kernels document: documents apart, causal, a window of keys up to the query's own."""
    length = sum(varlen.lengths)
    query, key = torch.arange(length)[:, None], torch.arange(length)
    document = torch.arange(len(varlen.lengths)).repeat_interleave(torch.tensor(varlen.lengths))
    visible = document[:, None] == document
    if varlen.is_causal:
        visible = visible & (key <= query)
    return visible if varlen.window is None else visible & (query - key < varlen.window)


def test_a_mask_can_be_built_again_and_again() -> None:
    row = masks.random_row(131, 3)
    for name, form in masks.mask_forms(row).items():
        mask = form()
        assert torch.equal(mask.bounds(), mask.bounds()), name
        assert torch.equal(mask.bounds(), masks.paper_masks(row)[name]), name


def test_every_mask_of_the_benchmark_exists_and_has_a_name_in_the_report() -> None:
    table = masks.mask_forms(masks.random_row(64, 2))
    assert set(table) == {*attention_gpu.PAPER_MASKS, *attention_gpu.MORE_MASKS} == set(report.MASK_NAMES)
    assert len(attention_gpu.PAPER_MASKS) == 12
    for name in attention_gpu.WITHOUT_DOCUMENTS:
        other = masks.paper_masks(masks.random_row(64, 5, seed=1))[name]
        assert torch.equal(masks.paper_masks(masks.random_row(64, 2))[name], other), name


@pytest.mark.parametrize("name", families.FAMILIES)
def test_families_are_the_masks_that_flex_attention_is_given(name: str) -> None:
    masking_gpu.check_family(name, "cpu")
    family = families.FAMILIES[name](masking_gpu.CHECKED_DIVISOR, "cpu")
    shape = attention_gpu.family_shape(family, 16)
    assert (shape.length, shape.keys) == (family.q_len, family.kv_len)
    assert family.bounds().shape[3] == family.kv_len


def test_a_family_that_is_another_mask_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    family = families.FAMILIES["HSTU"](masking_gpu.CHECKED_DIVISOR, "cpu")
    wrong = family._replace(mask_mod=lambda b, h, q, k: q >= k)
    monkeypatch.setitem(families.FAMILIES, "HSTU", lambda divisor, device: wrong)
    with pytest.raises(AssertionError, match="HSTU: another mask"):
        masking_gpu.check_family("HSTU", "cpu")


@pytest.mark.parametrize("peer", ["flashmask", "flex_attention", "sdpa, dense mask"])
def test_peers_attend_to_more_keys_than_queries(peer: str) -> None:
    family = families.FAMILIES["anchored blocks"](64, "cpu")
    generator = torch.Generator().manual_seed(0)
    query, d_out = (torch.randn(1, 4, family.q_len, 16, generator=generator) for _ in range(2))
    key, value = (torch.randn(1, 2, family.kv_len, 16, generator=generator) for _ in range(2))
    sizes = (1, family.q_len, 4, 2, 16, torch.float32, "cpu", family.kv_len)
    case = peers.Case(family.mask(), *sizes)
    attention = peers.PEERS[peer](case)
    bounds = family.bounds()
    out = attention.attend(query, key, value, attention.build())
    expected = truth.attend_in_float32(query, key, value, d_out, bounds).out
    seen = to_dense(bounds, family.q_len)[0, 0].any(1)
    assert torch.allclose(out[:, :, seen], expected[:, :, seen], atol=1e-4)


@pytest.mark.parametrize("tile_size", [16, 32])
def test_sparsity_counts_the_tiles_that_one_interval_hides(tile_size: int) -> None:
    length = 203
    for name, bounds in masks.paper_masks(masks.random_row(length, 5, seed=4), heads=2).items():
        padded = torch.nn.functional.pad(to_dense(bounds), (0, -length % tile_size, 0, -length % tile_size))
        tiles = padded.unflatten(2, (-1, tile_size)).unflatten(4, (-1, tile_size))
        hidden = float((~tiles.any(5).any(3)).float().mean())
        sparsity = masks.tile_sparsity(bounds, tile_size)
        if name in ("full", "causal", "causal_document", "document", "sliding_window", "share_question"):
            assert sparsity == pytest.approx(hidden), name
        else:
            assert sparsity <= hidden + 1e-6, name
    # Rows 0-15 hidden by the first interval, 16-31 by the second: a tile of 32 rows needs both.
    both = torch.tensor([0, 16, 16, 32], dtype=torch.int32)[None, None, :, None].expand(1, 1, 4, 32)
    assert not to_dense(both, 32).any()
    assert masks.tile_sparsity(both, 32) == 0
    assert masks.tile_sparsity(both, 16) == 1


def test_document_lists_are_drawn_the_same_each_time_or_read(tmp_path: Path) -> None:
    for length, fewest in ((8192, 3), (32768, 10), (131072, 11)):
        rows = masks.rows_of(length, 5)
        assert rows == masks.rows_of(length, 5)
        assert all(sum(row.lengths) == length and fewest <= len(row.lengths) <= fewest + 4 for row in rows)
        assert len({tuple(row.lengths) for row in rows}) == 5
    sample = {"documents": [[2, 5], [0, 4]], "qk_sparse": [0, 1]}
    (tmp_path / "lists.json").write_text(json.dumps({"9": [sample, sample, sample]}))
    assert masks.rows_of(9, 2, tmp_path) == [masks.PackedRow([5, 4], [2, 0], [False, True])] * 2
    with pytest.raises(ValueError, match="has document lists of 10 tokens"):
        masks.rows_of(10, 1, tmp_path)


# Truth


def random_inputs(batch: int, heads: int, kv_heads: int, length: int, dim: int) -> list[Tensor]:
    shapes = [(batch, length, count, dim) for count in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(shape).transpose(1, 2) for shape in shapes]


@pytest.mark.parametrize("name", ["causal_document", "prefix_lm_document", "global_sliding_window", "qk_sparse"])
def test_the_truth_in_pieces_is_dense_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truth, "SCORES", 97 * 20)  # pieces of 20 rows, the last of 17
    bounds = masks.paper_masks(masks.random_row(97, 4, seed=1))[name]
    query, key, value, d_out = random_inputs(1, 4, 2, 97, 8)
    leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    out, _ = reference_attention(*leaves, bounds)
    expected = (out, *torch.autograd.grad(out, leaves, d_out))
    for ours, theirs in zip(truth.attend_in_float32(query, key, value, d_out, bounds), expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("batch", "heads", "kv_heads", "mask_heads"), [(2, 4, 2, 1), (1, 3, 3, 3), (2, 4, 1, 4)])
def test_wrong_results_are_found(batch: int, heads: int, kv_heads: int, mask_heads: int) -> None:
    bounds = masks.paper_masks(masks.random_row(65, 3), heads=mask_heads)["random_eviction"]
    query, key, value, d_out = random_inputs(batch, heads, kv_heads, 65, 16)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    expected = truth.Truth(*leaves, d_out, bounds)
    out = flashmask_attention(*leaves, bounds)
    right = truth.Attended(out.detach(), *torch.autograd.grad(out, leaves, d_out))
    assert max(expected.check(right).values()) < 1e-5
    for name in truth.Attended._fields:
        for row, head in ((0, 0), (-1, -1)):
            wrong = getattr(right, name).clone()
            wrong[row, head, 40:] *= 1.05
            with pytest.raises(ValueError, match=f"wrong result.*{name}"):
                expected.check(right._replace(**{name: wrong}))
            wrong[row, head, 3, 3] = float("nan")
            with pytest.raises(ValueError, match="nan"):
                expected.check(right._replace(**{name: wrong}))


# What is measured


def test_peers_have_the_masks_that_they_can_express() -> None:
    row = masks.random_row(64, 3)
    expressed: dict[str, set[str]] = {}
    for name, form in masks.mask_forms(row).items():
        case = peers.Case(form(), 1, 64, 4, 2, 16, torch.float32, "cpu")
        for peer, make in peers.PEERS.items():
            if make(case) is not None:
                expressed.setdefault(peer, set()).add(name)
    everything = set(report.MASK_NAMES)
    packed = {"full", "causal", "sliding_window", "causal_document", "document"}
    assert expressed == {
        "flashmask": everything,
        "flashmask, deterministic": everything,
        "flex_attention": everything,
        "flex_attention, 64 x 64": everything,
        "flex_attention on FA4": everything,
        "sdpa, dense mask": everything,
        "FA2 varlen": packed,
        "FA4 varlen": packed,
        "cuDNN": {"full", "causal"},
        "cuDNN flex_attention": everything,
        "cuDNN flex_attention, deterministic": everything,
    }
    long = peers.Case(masks.mask_forms(row)["causal"](), 1, 65536, 4, 2, 16)
    assert peers.sdpa_dense(long) is None


@pytest.mark.parametrize("heads", [1, 4])
def test_masks_in_the_form_of_cudnn_are_the_same_masks(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_intervals, "PAIRS", 203 * 40 * heads)  # pieces of 40 rows, the last of 3
    length = 203
    row = masks.random_row(length, 5, seed=2)
    few = set()
    for name, form in masks.mask_forms(row, heads=heads, seed=2).items():
        bounds = form().bounds()
        table = row_intervals.visible_key_intervals(bounds, length, most=length)
        assert_shows(table, bounds, length)
        if table.shape[2] <= 7:
            few.add(name)
    assert few >= set(attention_gpu.PAPER_MASKS) - {"random_eviction"}


@pytest.mark.parametrize(
    ("planes", "q_len", "kv_len"), [(1, 61, 61), (1, 30, 61), (2, 61, 40), (4, 1, 61), (10, 77, 33)]
)
def test_any_bounds_have_the_form_of_cudnn(planes: int, q_len: int, kv_len: int) -> None:
    generator = torch.Generator().manual_seed(planes)
    bounds = torch.randint(-5, q_len + 5, (2, 3, planes, kv_len), generator=generator, dtype=torch.int32)
    assert_shows(row_intervals.visible_key_intervals(bounds, q_len), bounds, q_len)


def assert_shows(table: Tensor | None, bounds: Tensor, q_len: int) -> None:
    """The keys of `[0, F0)`, `[F1, F2)`, ... are those that rows see, and cuDNN's checks of these pass."""
    assert table is not None
    kv_len = bounds.shape[3]
    assert table.dtype == torch.int32
    assert table.is_contiguous()
    assert table.shape == (*bounds.shape[:2], table.shape[2], q_len)
    assert table.shape[2] % 2 == 1
    edges = torch.cat([torch.zeros_like(table[:, :, :1]), table], dim=2)
    assert (edges.diff(dim=2) >= 0).all()
    assert (edges <= kv_len).all()
    starts, ends = edges[:, :, 0::2, :, None], edges[:, :, 1::2, :, None]
    key = torch.arange(kv_len)
    shown = ((key >= starts) & (key < ends)).any(2)
    assert torch.equal(shown, to_dense(bounds, q_len))


def test_masks_of_many_intervals_have_no_form_of_cudnn() -> None:
    row = masks.random_row(1024, 3)
    evicted = masks.mask_forms(row)["random_eviction"]()
    assert row_intervals.visible_key_intervals(evicted.bounds(), 1024) is None
    assert peers.cudnn_flex(peers.Case(evicted, 1, 1024, 4, 2, 16, torch.float32, "cpu")) is None
    alternating = torch.arange(9, dtype=torch.int32).remainder(2)[None, None, None] * 9  # odd keys are visible
    assert row_intervals.visible_key_intervals(torch.cat([alternating, 0 * alternating], 2), 9, most=5) is not None
    assert row_intervals.visible_key_intervals(torch.cat([alternating, 0 * alternating], 2), 9, most=4) is None


def test_the_plan_of_cudnn_gets_a_table_of_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Any] = {}

    def create_mask_plan(table: Tensor, query: Tensor, key: Tensor, value: Tensor, *, build_backward: bool) -> Tensor:
        assert build_backward
        made.update(table=table, shapes=[tuple(tensor.shape) for tensor in (query, key, value)])
        return table

    def flex_attn_func(query: Tensor, key: Tensor, value: Tensor, *, mask_plan: Tensor, deterministic: bool) -> Tensor:
        made.update(deterministic=deterministic)
        key, value = (tensor.repeat_interleave(query.shape[2] // key.shape[2], 2) for tensor in (key, value))
        ends = torch.cat([torch.zeros_like(mask_plan[:, :1]), mask_plan], 1).unflatten(2, (query.shape[0], -1))
        column = torch.arange(key.shape[1])
        visible = ((column >= ends[:, 0::2, ..., None]) & (column < ends[:, 1::2, ..., None])).any(1).transpose(0, 1)
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
        return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~visible, -torch.inf).softmax(-1), value)

    module = SimpleNamespace(create_mask_plan=create_mask_plan, flex_attn_func=flex_attn_func)
    monkeypatch.setitem(sys.modules, "cudnn", SimpleNamespace(flex_attention=module))
    monkeypatch.setitem(sys.modules, "cudnn.flex_attention", module)
    mask = masks.mask_forms(masks.random_row(80, 3))["qk_sparse"]()
    query, key, value, d_out = random_inputs(2, 4, 2, 80, 16)
    expected = truth.attend_in_float32(query, key, value, d_out, mask.bounds()).out
    seen = to_dense(mask.bounds())[0, 0].any(1)
    case = peers.Case(mask, 2, 80, 4, 2, 16, torch.float32, "cpu")
    for peer, deterministic in (("cuDNN flex_attention", False), ("cuDNN flex_attention, deterministic", True)):
        attention = peers.PEERS[peer](case)
        out = attention.attend(query, key, value, attention.build())
        torch.testing.assert_close(out[:, :, seen], expected[:, :, seen], rtol=1e-4, atol=1e-5)
        assert made["shapes"] == [(2, 80, 4, 16), (2, 80, 2, 16), (2, 80, 2, 16)]
        assert made["table"].shape == (1, made["table"].shape[1], 2 * 80)
        assert made["deterministic"] is deterministic


def test_peers_that_are_not_installed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda module: None if module.startswith("cudnn") else object())
    assert peers.missing_peers() == dict.fromkeys(
        ("cuDNN flex_attention", "cuDNN flex_attention, deterministic"),
        "cudnn.flex_attention (nvidia-cudnn-frontend) is not installed",
    )


@pytest.mark.parametrize("peer", ["flashmask", "flashmask, deterministic"])
def test_only_the_deterministic_peer_asks_for_it(peer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def attend(*tensors: Tensor, deterministic: bool, schedules: Any) -> Tensor:
        asked.append((deterministic, schedules.bounds is tensors[3]))
        return tensors[0]

    monkeypatch.setattr(peers, "flashmask_attention", attend)
    mask = masks.mask_forms(masks.random_row(80, 3))["causal"]()
    attention = peers.PEERS[peer](peers.Case(mask, 2, 80, 4, 2, 16, torch.float32, "cpu"))
    attention.attend(*random_inputs(2, 4, 2, 80, 16)[:3], attention.build())
    assert asked == [(peer == "flashmask, deterministic", True)]


def test_one_row_of_the_pipeline_but_its_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Tensor] = []

    def clock(function: Any, **_: Any) -> dict[str, float]:
        calls.append(function())
        return {"milliseconds": 2.0, "spread": 0.0}

    for name in ("time_on_gpu", "time_on_cpu"):
        monkeypatch.setattr(attention_gpu, name, clock)
    monkeypatch.setattr(attention_gpu, "peak_memory", lambda function: len(function()))
    mask = masks.mask_forms(masks.random_row(80, 3))["prefix_lm_document"]()
    *inputs, d_out = random_inputs(2, 4, 2, 80, 16)
    inputs = [tensor.requires_grad_() for tensor in inputs]
    expected = truth.Truth(*inputs, d_out, mask.bounds())
    for peer in ("flashmask", "sdpa, dense mask"):
        calls.clear()
        attention = peers.PEERS[peer](peers.Case(mask, 2, 80, 4, 2, 16, torch.float32, "cpu"))
        row = attention_gpu.measure(attention, tuple(inputs), d_out, expected)
        parts = {"forward", "backward", "mask", "mask_host"}
        assert row["milliseconds"] == {**dict.fromkeys(parts, 2), "total": 4}
        assert max(row["relative_error"].values()) < 1e-5
        assert row["peak_mib"] == 3
        assert calls[0].shape == d_out.shape
        assert [gradient.shape for gradient in calls[1]] == [tensor.shape for tensor in inputs]

    deaf = peers.Attention(None, lambda query, key, value, _: flashmask_attention(query, key, value, is_causal=True))
    with pytest.raises(ValueError, match="wrong result"):
        attention_gpu.measure(deaf, tuple(inputs), d_out, expected)


def test_stacks_of_layers_are_timed_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = masks.mask_forms(masks.random_row(80, 3))["prefix_lm_document"]()
    *inputs, d_out = random_inputs(2, 4, 2, 80, 16)
    inputs = [tensor.requires_grad_() for tensor in inputs]
    query, key, value = inputs
    for _ in range(attention_gpu.LAYERS):
        query, _ = reference_attention(query, key, value, mask.bounds())
    of_stack = torch.autograd.grad(query, inputs, d_out)
    case = peers.Case(mask, 2, 80, 4, 2, 16, torch.float32, "cpu")
    attentions = {peer: peers.PEERS[peer](case) for peer in ("flashmask", "sdpa, dense mask", "flex_attention")}

    def clock(functions: dict[str, Any], repeats: int) -> dict[str, dict[str, float]]:
        for function in functions.values():
            torch.testing.assert_close(function(), of_stack, rtol=1e-4, atol=1e-5)
        return {peer: {"milliseconds": 4.0 + number, "spread": 0.25} for number, peer in enumerate(functions)}

    monkeypatch.setattr(attention_gpu, "time_in_turns", clock)
    rows = [{"implementation": peer, "milliseconds": {}, "spread": {}} for peer in list(attentions)[:2]]
    failed = {"implementation": "flex_attention", "error": "it does not compile"}
    timed = attention_gpu.with_end_to_end(iter([*rows, failed]), attentions, tuple(inputs), d_out)
    assert [row.get("milliseconds") for row in timed] == [
        {"end_to_end": 4 / attention_gpu.LAYERS},
        {"end_to_end": 5 / attention_gpu.LAYERS},
        None,
    ]
    assert [row.get("spread") for row in timed] == [{"end_to_end": 0.25}, {"end_to_end": 0.25}, None]


def test_functions_that_take_turns() -> None:
    calls: list[str] = []

    def work(name: str, seconds: float) -> Any:
        return lambda: (calls.append(name), sleep(seconds))

    times = measurement.time_in_turns({"short": work("short", 0.001), "long": work("long", 0.02)}, repeats=4)
    assert calls == ["short", "long"] * 5
    assert 1 <= times["short"]["milliseconds"] < times["long"]["milliseconds"] >= 20


def test_flops_count_visible_pairs() -> None:
    bounds = from_cu_seqlens(torch.tensor([0, 10, 30, 64], dtype=torch.int32), 64)
    pairs = int(visible_pairs(bounds, 64))
    assert pairs == sum(n * (n + 1) // 2 for n in (10, 20, 34)) == int(to_dense(bounds).sum())
    flops = measurement.visible_flops(pairs, heads=6, head_dim=16)
    # Two products of 2 D operations forward; backward five.
    assert flops["forward"] == 6 * pairs * 2 * (2 * 16)
    assert flops["backward"] == 6 * pairs * 5 * (2 * 16)
    assert flops["total"] == flops["forward"] + flops["backward"]
    assert measurement.tflops({"forward": 3e12, "backward": 1e12}, {"forward": 2.0}) == {"forward": 1500.0}


def test_the_papers_protocol_has_128k_tokens_and_a_hidden_size_of_4096() -> None:
    shapes = attention_gpu.shapes("paper", [8192, 32768, 131072], [64, 128], [(1, 1)])
    assert len(shapes) == 6
    for shape in shapes:
        assert shape.batch * shape.length == 128 * 1024
        assert shape.heads * shape.head_dim == 4096
        assert shape.kv_heads == shape.heads
    expected = [attention_gpu.Shape(1, 512, 32, 8, 64), attention_gpu.Shape(1, 512, 32, 32, 64)]
    assert attention_gpu.shapes("bar", [512], [64], [(32, 8), (32, 32)]) == expected


def test_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    def parse(*arguments: str) -> Any:
        monkeypatch.setattr(sys, "argv", ["attention_gpu.py", *arguments])
        return attention_gpu.parse_arguments()

    default = parse()
    assert (default.lengths, default.head_dims, default.heads) == ([32768], [128], [(32, 8)])
    assert default.masks == list(attention_gpu.PAPER_MASKS)
    assert "flashmask" in default.peers
    paper = parse("--protocol", "paper")
    assert (paper.lengths, paper.head_dims) == ([8192, 32768, 131072], [64, 128])
    assert parse("--heads", "32/8", "16").heads == [(32, 8), (16, 16)]
    assert len(parse("--masks", "all").masks) == 15
    assert parse("--protocol", "sparsity").peers == ["flashmask"]


# Runs in pieces


def run(folder: Path, **settings: Any) -> measurement.Run:
    return measurement.Run("speed", {"dtype": "bfloat16", **settings}, ("mask", "length"), folder)


def test_pieces_of_a_run_come_together(tmp_path: Path) -> None:
    first = run(tmp_path)
    first.add({"mask": "causal", "length": 1, "milliseconds": 5})
    first.add({"mask": "full", "length": 1, "error": "out of memory"})
    second = run(tmp_path)
    assert second.path == first.path
    assert second.has({"mask": "causal", "length": 1})
    assert not second.has({"mask": "full", "length": 1})  # it failed: --missing tries again
    assert not second.has({"mask": "causal", "length": 2})
    second.add({"mask": "full", "length": 1, "milliseconds": 7})
    second.add({"mask": "causal", "length": 2, "milliseconds": 9})
    written = json.loads(first.path.read_text())
    assert [row["milliseconds"] for row in written["rows"]] == [5, 7, 9]
    assert {"device", "date", "torch", "triton", "kernels", "updated"} <= set(written["environment"])
    assert written["settings"] == {"dtype": "bfloat16"}


def test_other_kernels_or_settings_are_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(tmp_path)
    first.add({"mask": "causal", "length": 1, "milliseconds": 5})
    assert run(tmp_path, vocabulary=7).path != first.path
    monkeypatch.setattr(measurement, "kernels_hash", lambda: "another")
    other = run(tmp_path)
    assert other.path != first.path
    assert other.rows == []
    other.add({"mask": "causal", "length": 1, "milliseconds": 4})
    written = json.loads(other.path.read_text())
    written["environment"]["updated"] = "2999-01-01"
    other.path.write_text(json.dumps(written))
    latest = measurement.latest_run("speed", tmp_path)
    assert latest is not None
    assert [row["milliseconds"] for row in latest["rows"]] == [4]
    assert measurement.latest_run("nothing", tmp_path) is None
    first.add({"mask": "full", "length": 2, "milliseconds": 6})
    with_full = measurement.latest_run("speed", tmp_path, mask="full", length=2)
    assert with_full is not None
    assert [row["milliseconds"] for row in with_full["rows"]] == [5, 6]
    assert measurement.latest_run("speed", tmp_path, mask="full", length=1) is None


def test_processes_that_measure_at_once_add_to_one_file(tmp_path: Path) -> None:
    script = f"""
import os, sys
sys.path.append({str(BENCHMARKS)!r})
import measurement, pathlib
run = measurement.Run("speed", {{"dtype": "bfloat16"}}, ("mask", "length"), pathlib.Path({str(tmp_path)!r}))
for length in range(40):
    run.add({{"mask": os.environ["MASK"], "length": length}})
"""
    (tmp_path / "script.py").write_text(script)
    environments = [{"MASK": mask} for mask in ("causal", "full", "document")]
    processes.run_at_once(tmp_path / "script.py", [], environments, tmp_path)
    rows = run(tmp_path).rows
    assert len(rows) == 3 * 40
    assert all(run(tmp_path).has({"mask": "full", "length": length}) for length in range(40))


def test_the_day_does_not_begin_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = run(tmp_path).path
    environment = measurement.environment
    monkeypatch.setattr(measurement, "environment", lambda device: {**environment(device), "date": "1999-12-31"})
    assert run(tmp_path).path == before


def test_a_deadline() -> None:
    assert not measurement.Deadline(None).is_over()
    assert not measurement.Deadline(60).is_over()
    assert measurement.Deadline(0).is_over()


# Training


def test_documents_of_training_are_log_normal_and_fill_the_row() -> None:
    lengths = [n for seed in range(200) for n in training_gpu.document_lengths(32768, seed)[:-1]]
    assert 650 < torch.tensor(lengths).median() < 750
    assert min(lengths) >= training_gpu.SHORTEST_DOCUMENT
    assert training_gpu.document_lengths(8192, 1) != training_gpu.document_lengths(8192, 2)
    batch = training_gpu.packed_batch(8192, 3, 97, "cpu")
    lengths = training_gpu.document_lengths(8192, 3)
    assert sum(lengths) == 8192
    assert batch["varlen"]["cu_seq_lens_q"].tolist() == [0, *accumulate(lengths)]
    assert batch["varlen"]["max_length_q"] == max(lengths)
    starts = batch["position_ids"][0] == 0
    assert starts.sum() == len(lengths)
    assert torch.equal(batch["labels"][0] == -100, starts)
    assert batch["num_items_in_batch"] == 8192 - len(lengths)


def test_whole_documents_of_training_fit_the_row_and_are_not_cut() -> None:
    totals = set()
    for seed in range(20):
        cut, whole = (training_gpu.document_lengths(8192, seed, is_whole) for is_whole in (False, True))
        assert whole == cut[: len(whole)]
        assert len(whole) >= len(cut) - 1
        totals.add(sum(whole))
        batch = training_gpu.packed_batch(8192, seed, 97, "cpu", is_whole=True)
        assert batch["input_ids"].shape == batch["labels"].shape == batch["position_ids"].shape == (1, sum(whole))
        assert batch["varlen"]["cu_seq_lens_q"][-1] == sum(whole) <= 8192
        assert batch["num_items_in_batch"] == sum(whole) - len(whole)
    assert len(totals) > 10
    # One that is longer than the row is cut all the same.
    assert any(training_gpu.document_lengths(200, seed, is_whole=True) == [200] for seed in range(9))


def test_the_first_step_of_training_tells_right_from_wrong_attention() -> None:
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    trainee = training_gpu.Trainee(shape, 97, "cpu", torch.float32)
    batch = training_gpu.packed_batch(1200, 3, 97, "cpu")
    alone = trainee.each_document_alone(batch)
    assert alone.hidden_states.shape == (1200, 32)
    for implementation in ("flashmask", "sdpa"):
        trainee.use(implementation)
        assert max(trainee.first_step([batch]).check(alone).values()) < 1e-4
    one_document = {**batch, "position_ids": torch.arange(1200)[None]}
    with pytest.raises(ValueError, match="hidden_states"):
        trainee.first_step([one_document]).check(alone)
    trainee.use(training_gpu.FLOOR)
    with pytest.raises(ValueError, match="wrong result"):
        trainee.first_step([batch]).check(alone)
    # The floor does everything but attention: all parameters get gradients.
    trainee.gradients(batch)
    assert all(parameter.grad is not None for parameter in trainee.model.parameters())
    weights = [parameter.clone() for parameter in trainee.model.parameters()]
    trainee.step(batch)
    assert not any(torch.equal(old, new) for old, new in zip(weights, trainee.model.parameters()))


# Steps of examples


@pytest.mark.parametrize("workload", example_steps_gpu.SMOKE_WORKLOADS.values(), ids=example_steps_gpu.SMOKE_WORKLOADS)
def test_steps_of_examples_compute_the_same_under_each_mask(workload: example_steps_gpu.Workload) -> None:
    example = example_steps_gpu.example_of(workload, torch.float32)
    batches = [example.batch(seed) for seed in range(2)]
    truth = example_steps_gpu.truth_of(example, batches)
    assert truth().hidden_states.shape == (workload.q_len, 64)
    for peer in ("flashmask", "sdpa"):
        errors = example_steps_gpu.check(example, peer, batches, truth)["relative_error"]
        assert max(errors.values()) < 1e-4
    for batch in batches:
        drawn, losses = example.draw(batch), []
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # FlexAttention has no gradients on a CPU
            for peer in ("flex_attention", "sdpa"):
                example.use(peer)
                losses.append(float(example.loss(batch, drawn, example.make_mask(peer, batch, drawn))))
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    ids = batches[0].rows.document_ids
    together = batches[0]._replace(rows=dataclasses.replace(batches[0].rows, document_ids=ids * 0))
    with pytest.raises(ValueError, match="wrong result"):
        example.first_step("flashmask", together).check(truth())
    # The floor does everything but attention.
    example.use(training_gpu.IMPLEMENTATIONS[training_gpu.FLOOR])
    example.gradients(training_gpu.FLOOR, batches[0])
    trained = [parameter for parameter in example.model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None for parameter in trained)


def test_steps_of_examples_have_the_shapes_of_the_families() -> None:
    for workload, name in zip(
        example_steps_gpu.WORKLOADS.values(),
        ("block diffusion", "block diffusion, packed", "anchored blocks"),
        strict=True,
    ):
        family = families.FAMILIES[name](1, "cpu")
        assert (workload.q_len, workload.kv_len) == (family.q_len, family.kv_len)


def test_the_command_checks_steps_of_examples_anywhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["example_steps_gpu.py", "--smoke"])
    example_steps_gpu.main()
    printed = capsys.readouterr().out
    for workload in example_steps_gpu.SMOKE_WORKLOADS:
        assert f"{workload}: flashmask" in printed


def test_steps_of_examples_from_the_command_line_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example_steps_gpu, "require_gpu", lambda: None)
    monkeypatch.setattr(example_steps_gpu, "WORKLOADS", example_steps_gpu.SMOKE_WORKLOADS)
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 << 20)
    measured = []

    def measure(peers: list[str]) -> dict[tuple[str, str], dict[str, Any]]:
        arguments = ["--missing", "--output", str(tmp_path), "--peers", *peers]
        monkeypatch.setattr(sys, "argv", ["example_steps_gpu.py", *arguments])
        example_steps_gpu.main()
        (path,) = tmp_path.iterdir()
        return {(row["workload"], row["implementation"]): row for row in json.loads(path.read_text())["rows"]}

    time_peer = example_steps_gpu.time_peer

    def counted(example: Any, peer: str, batches: list[Any]) -> dict[str, Any]:
        measured.append(peer)
        if peer == "sdpa":
            raise torch.OutOfMemoryError("too large")
        return time_peer(example, peer, batches)

    monkeypatch.setattr(example_steps_gpu, "time_peer", counted)
    rows = measure(["flashmask", "sdpa", training_gpu.FLOOR])
    for workload in example_steps_gpu.SMOKE_WORKLOADS:
        ours, sdpa, floor = (rows[workload, peer] for peer in ("flashmask", "sdpa", training_gpu.FLOOR))
        assert max(ours["relative_error"].values()) < 0.1
        assert ours["mask_milliseconds"] > 0
        assert ours["tokens_per_second"] == pytest.approx(192e3 / ours["milliseconds"], rel=0.5)
        assert "milliseconds" not in sdpa
        assert "OutOfMemoryError" in sdpa["error"]
        assert floor["peak_mib"] == 3
    measured.clear()
    measure(["flashmask", "sdpa", training_gpu.FLOOR])
    assert measured == ["sdpa"] * 2


# Several GPUs


def test_the_benchmark_of_several_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its way from the command line to the file, on two processes: figures that are checked, and one failure."""
    failing = "tiny:1:63:one"  # tokens that the last way cannot share out
    workloads = ["--workloads", failing, "tiny:1:1500:packed"]
    monkeypatch.setattr(sys, "argv", ["parallel_gpu.py", "--smoke", "--output", str(tmp_path), *workloads])
    parallel_gpu.main()
    (path,) = tmp_path.iterdir()
    bandwidth, *rows = json.loads(path.read_text())["rows"]
    assert bandwidth["all_to_all"] > 0
    assert [row["way"] for row in rows] == [*parallel_gpu.SMOKE_WAYS] * 2
    failed = rows.pop(len(parallel_gpu.SMOKE_WAYS) - 1)
    assert failed["workload"] == failing
    assert "milliseconds" not in failed
    assert "Error" in failed["error"]
    for row in rows:
        assert "error" not in row, row["error"]
        assert max(row["relative_error"].values()) < 1e-5  # in float32, each document alone
        assert row["tokens_per_second"] > 0
        assert len(row["peak_mib"]) == 2


def test_a_case_that_takes_too_long_is_recorded() -> None:
    setting = parallel_gpu.Setting(2, is_smoke=True, vocabulary=97, port=0)
    case = parallel_gpu.Workload.parse("tiny:1:64:one"), "ulysses"
    ((_, row),) = parallel_gpu.measure_all(setting, [case], seconds_of_case=-parallel_gpu.START_UP)
    assert "TimeoutError" in row["error"]


def test_wrong_training_is_found() -> None:
    truth = parallel_gpu.Trained(2.0, 3.0, torch.ones(4))
    assert truth.check(truth) == {"loss": 0, "norm": 0, "gradient": 0}
    for wrong in (truth._replace(loss=2.01), truth._replace(norm=3.1), truth._replace(gradient=torch.arange(4.0))):
        with pytest.raises(ValueError, match="wrong result"):
            wrong.check(truth)


def test_the_time_that_intervals_cover() -> None:
    assert parallel_gpu.covered([]) == 0
    assert parallel_gpu.covered([(4, 6), (0, 2), (1, 3), (1, 2)]) == 5


def test_workloads_are_read() -> None:
    workload = parallel_gpu.Workload.parse("8b:2:131072:one")
    assert (str(workload), workload.model["num_hidden_layers"]) == ("8b:2:131072:one", 2)
    assert workload.lengths(0) == [131072]
    for text in ("8b:2:131072", "9b:2:131072:one", "8b:two:131072:one", "8b:2:131072:some"):
        with pytest.raises(argparse.ArgumentTypeError, match="shape:layers:tokens:documents"):
            parallel_gpu.Workload.parse(text)


MODEL = parallel_cost.Model.of(parallel_gpu.ALL_SHAPES["8b"], layers=4, vocabulary=32768)


@pytest.fixture
def step() -> parallel_cost.Step:
    return parallel_cost.Step(1000.0, 600.0, 32768, MODEL, lambda ranks: parallel_cost.imbalance([32768], ranks))


def test_the_bytes_on_the_wire_are_those_of_what_is_sent() -> None:
    """By the sizes of the tensors that leave a rank in one direction: queries, keys, values and the output."""
    length, heads, kv_heads, dim, ranks = 4096, 32, 8, 128, 4
    held = 2 * (length // ranks) * dim * (heads + 2 * kv_heads + heads)
    shape = (length, heads, kv_heads, dim)
    assert parallel_cost.bytes_on_the_wire("ulysses", ranks, *shape) == held * (ranks - 1) / ranks
    keys_and_values = 2 * (length // ranks) * dim * 2 * kv_heads
    assert parallel_cost.bytes_on_the_wire("all_gather", ranks, *shape) == keys_and_values * (ranks - 1)
    # One key head is sent to every rank.
    one = 2 * (length // ranks) * dim * (heads + 2 * ranks + heads) * (ranks - 1) / ranks
    assert parallel_cost.bytes_on_the_wire("ulysses", ranks, length, heads, 1, dim) == one


def test_predicted_steps(step: parallel_cost.Step) -> None:
    free = parallel_cost.Links(1e9, 1e9)
    for way in ("ulysses", "all_gather"):
        of_two = parallel_cost.Group.of(way, 2)
        assert parallel_cost.predict(step, of_two, free).milliseconds == pytest.approx(500, rel=1e-3)
    links = parallel_cost.Links(400.0)
    sent = parallel_cost.bytes_on_the_wire("ulysses", 2, 32768, 32, 8, 128)
    found = parallel_cost.predict(step, parallel_cost.Group.of("ulysses", 2), links)
    assert found.exchanges == pytest.approx(3 * 4 * sent / 400e9 * 1e3)
    assert found.milliseconds == pytest.approx(500 + found.exchanges)
    replicas = parallel_cost.Group.of("data parallel", 2)
    assert parallel_cost.predict(step, replicas, links).milliseconds == 1000
    slow = parallel_cost.predict(step, replicas, parallel_cost.Links(0.1))
    weights = MODEL.bytes_of_weights
    assert slow.milliseconds == pytest.approx(3 * weights / 2 / 0.1e9 * 1e3)  # half of them comes and goes
    nodes = parallel_cost.predict(step, parallel_cost.Group.of(parallel_cost.ACROSS_ULYSSES, 64), links)
    assert nodes.milliseconds > 1000 / 64
    assert nodes.balance < 1.05


def test_groups_of_both_kinds_send_less_than_all_gather_alone() -> None:
    both = parallel_cost.Group.of(parallel_cost.ACROSS_ULYSSES, 8, inside=4)
    assert (both.nodes, both.inside, both.dealing_ranks) == (2, 4, 2)
    inside = parallel_cost.bytes_on_the_wire("ulysses", 4, 16384, 32, 8, 128)
    keys_and_values = 2 * 16384 * 128 * 2 * (8 // 4)  # of its heads and of the rows of its four, to the other four
    assert both.sent(MODEL, 32768) == (inside + keys_and_values, 0)
    assert both.sent(MODEL, 32768).inside < parallel_cost.Group.of("all_gather", 8).sent(MODEL, 32768).inside


def test_the_model_of_costs_finds_its_constants() -> None:
    small = parallel_cost.Model.of(parallel_gpu.ALL_SHAPES["1b"], layers=16, vocabulary=32768)
    constants = parallel_cost.Constants({"8b": 1.8, "1b": 2.3}, loss=2.8, intermediate=16.0, hidden=5.0)
    alone = parallel_cost.Group("one GPU", 1, 1)
    measured = []
    for shape, model, length in (("8b", MODEL, 131072), ("8b", MODEL._replace(layers=2), 131072), ("1b", small, 32768)):
        step = constants.step(shape, model, length, 100.0, lambda ranks: 1.0)
        peak = constants.peak(model, length, alone, shards_weights=False)
        measured.append(parallel_cost.Measured(shape, model, length, step.milliseconds - 100, peak))
    found = parallel_cost.calibrate(measured)
    assert found.layers == pytest.approx(constants.layers)
    assert found[1:] == pytest.approx(constants[1:])
    assert MODEL.products(131072)[1] == pytest.approx(8 * 131072 * 32768 * 4096 * 1e-12)


def test_one_document_in_contiguous_parts_would_not_balance() -> None:
    work, _ = parallel_cost.work_of_blocks([32768], 8)
    contiguous = work.unflatten(0, (8, -1)).sum(1).double()
    assert contiguous.max() / contiguous.mean() > 1.8
    assert parallel_cost.imbalance([32768], 8) < 1.01
    assert parallel_cost.imbalance([700, 32768 - 700 - 33, 33], 8) < 1.02


@pytest.mark.parametrize("name", parallel_scaling.masks_of(2048, None))
def test_tiles_are_counted_as_in_the_dense_mask(name: str) -> None:
    bounds = parallel_scaling.masks_of(2048, None)[name]()
    occupancy = tile_occupancy(bounds, tile_size=parallel_scaling.TILE)[0, 0]
    found = parallel_scaling.count_exactly(bounds)
    assert found.visible.tolist() == (occupancy > 0).sum(1).tolist()
    assert found.cut.tolist() == ((occupancy > 0) & (occupancy < 1)).sum(1).tolist()


def test_cuts_give_every_rank_as_many_blocks() -> None:
    bounds = parallel_scaling.masks_of(8192, None)["packed documents"]()
    for name, cut in parallel_scaling.CUTS.items():
        assert cut(bounds, 64, 4).flatten().sort().values.tolist() == list(range(64)), name
    assert parallel_scaling.zigzag(bounds, 8, 2).tolist() == [[0, 1, 6, 7], [2, 3, 4, 5]]
    with pytest.raises(ValueError, match="too short for 64 ranks"):
        parallel_scaling.dealt(bounds, 64, 64)


def test_two_gpus_are_predicted_within_15_percent() -> None:
    """Steps and memory that were measured, from what one GPU has measured."""
    run = report.parallel_run()
    assert run is not None
    simulation = report.Simulation(report.results("parallel_scaling"), run)
    rows = list(report.compared_with_measured(simulation, run))
    assert len({row[0] for row in rows}) == 4
    for row in rows:
        for error in (row[4], row[7]):
            assert error == "-" or abs(int(error.rstrip("%"))) <= 15, row


def test_dealt_rows_balance_on_64_ranks() -> None:
    """But where each rank gets four blocks: there the longest document alone is more than the mean."""
    rows = [row for row in report.results("parallel_scaling")["rows"] if row.get("cut") == "dealt"]
    assert len(rows) == 5 * 5 * 4
    for row in rows:
        if row["length"] > 32768:
            assert max(row["tiles"], row["time_128"]) <= 1.05, row


def test_the_table_of_several_gpus() -> None:
    shapes = parallel_gpu.ALL_SHAPES
    base = {**parallel_gpu.name_of((parallel_gpu.Workload.parse("8b:2:32768:one"), "one GPU"), 2)}
    figures = {"tokens_per_second": 20000, "peak_mib": [20480, 10240], "bytes_of_weights": 10**9}
    times = {"milliseconds": 1000.0, "attention": [600.0, 600.0], "exposed": [0.0, 0.0], "balance": 1.0}
    rows = [
        {"workload": "bandwidth", "way": "bandwidth", "gpus": 2, "all_to_all": 400.0, "all_gather": 300.0},
        {**base, "way": "ring with sdpa", "error": "OutOfMemoryError: CUDA"},
        {**base, "way": "ulysses", **figures, **times, "milliseconds": 520.0, "exposed": [15.0, 20.0]},
        {**base, **figures, **times},
    ]
    environment = {"device": "A GPU", "torch": "2.11", "triton": "3.6", "date": "2026-01-01"}
    settings = {"vocabulary": 32768, "shapes": shapes, "nccl": "2.28"}
    text = "\n".join(report.parallel_section({"environment": environment, "settings": settings, "rows": rows}))
    name = "Llama 3.1 8B's shape, 2 layers, 32,768 tokens, one document"
    assert "**2 x A GPU**" in text
    assert f"| {name} | one GPU | 20,000 | 20 | 1000 | 600 | 1.00 | 0 | - |" in text
    assert f"| {name} | ulysses | 20,000 | 20 | 520 | 600 | 1.00 | 20 | 503 |" in text  # 500 and 2.5 on the wire
    assert f"| {name} | ring with sdpa | out of memory | - | - | - | - | - | - |" in text


# Tuning


def test_candidates_take_every_field_of_a_configuration() -> None:
    grid = {"block_m": (32, 64), "block_n": (64,), "num_warps": (4, 8), "num_stages": (2,)}
    found = tune.candidates(["forward", "query_gradient"], [64], grid)
    assert len(found) == len(set(found)) == 2 * 2 * 2
    assert {candidate.config.block_m for candidate in found} == {32, 64}
    assert {candidate.config.use_descriptors for candidate in found} == {False}  # its default
    assert set(tune.GRID) <= set(tune.Config._fields)


def test_tuning_launches_the_portable_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where sm_90, which fake tensors stand for, has kernels of its own."""
    monkeypatch.setattr(tune.table, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(tune.table, "_HAS_GLUON", True)
    with FakeTensorMode():
        query, bounds = torch.empty(1, 32, 8192, 128, device="cuda").bfloat16(), torch.empty(1, 1, 1, 8192)
    assert dispatch.specializes(query, query, bounds, None, 0.0)
    candidate = tune.Candidate("query_gradient", 128, tune.Config(32, 32, 2, 5))
    with tune.launched_with(candidate):
        family = dispatch.family_of(query, query, bounds, 1.0, None, 0.0, False, True)
        assert dispatch.configs_of(query, query, family).query_gradient == candidate.config
    assert dispatch.specializes(query, query, bounds, None, 0.0)


def test_the_fastest_over_all_workloads_goes_into_the_table() -> None:
    workloads = (tune.FIRST, *tune.THEN)
    steady, uneven, unfinished = (tune.Config(size, 64, 4, 2, True) for size in (64, 128, 32))
    rows = [
        {"kernel": kernel, "head_dim": 128, "config": config._asdict(), "mask": mask, "length": n, "milliseconds": time}
        for kernel in tune.Configs._fields
        for config, times in ((steady, (2, 2, 2, 2)), (uneven, (1, 4, 4, 4)), (unfinished, (1,)))
        for (mask, n), time in zip(workloads, times)
    ]
    rows.append({"kernel": "forward", "head_dim": 64, "config": steady._asdict(), "registers": 168, "spills": 0})
    assert [config for _, config in tune.ranking(rows, "forward", 128, workloads)] == [steady, uneven]
    assert {config for _, config in tune.ranking(rows, "forward", 128, [tune.FIRST])[:2]} == {uneven, unfinished}
    (line,) = tune.table_rows(rows)
    table = eval("{" + line + "}", vars(tune))
    assert table == {128: tune.Configs(steady, steady, steady)}


# Report


def row(mask: str, implementation: str, milliseconds: float, **more: Any) -> dict[str, Any]:
    shape = {"length": 32768, "heads": 32, "kv_heads": 8, "head_dim": 128, **more}
    flops = {"forward": 1e12, "backward": 2.5e12, "total": 3.5e12}
    times = {"forward": milliseconds / 4, "backward": 0.75 * milliseconds, "total": milliseconds, "mask": 0.02}
    return {
        "protocol": "bar",
        "mask": mask,
        "sample": 0,
        "batch": 1,
        "implementation": implementation,
        "visible": 0.5,
        "tile_sparsity": 0.25,
        "milliseconds": times,
        "tflops": measurement.tflops(flops, times),
        "tflops_tiles": measurement.tflops(flops, times),
        "peak_mib": 100.0,
        **shape,
    }


@pytest.fixture
def speed() -> dict[str, Any]:
    rows = [
        row("causal", "flashmask", 10),
        row("causal", "flex_attention", 11),
        row("causal_document", "flashmask", 2),
        row("causal_document", "flex_attention", 4),
        row("causal_document", "flashmask", 1, length=8192),
        row("causal_document", "flex_attention", 1.5, length=8192),
        row("causal_document", "flex_attention, 64 x 64", 1.25, length=8192),
        {**row("full", "cuDNN", 1), "error": "RuntimeError: no such kernel\nand more"},
        row("causal_document", "flashmask", 3, protocol="sparsity", sample=5),
        row("causal", "flashmask", 10, protocol="paper", heads=32, kv_heads=32, batch=4),
        row("causal", "FA2 varlen", 20, protocol="paper", heads=32, kv_heads=32, batch=4),
        row("document", "flashmask", 10, protocol="paper", heads=32, kv_heads=32, batch=4),
        row("document", "flashmask", 30, protocol="paper", heads=32, kv_heads=32, batch=4, sample=1),
    ]
    environment = {"device": "A GPU", "torch": "2.11", "triton": "3.6", "date": "2026-01-01"}
    settings = {"dtype": "bfloat16", "not_installed": {"FA4 varlen": "flash_attn.cute is not installed"}}
    return {"environment": environment, "settings": settings, "rows": rows}


def test_the_table_of_masks(speed: dict[str, Any]) -> None:
    speed["rows"][0]["milliseconds"]["mask"] = 1.0
    text = "\n".join(report.attention_section(speed))
    assert "**A GPU**, bfloat16, 32 query and 8 key heads of size 128, one row of 32,768 tokens" in text
    assert "| causal | 50.0% | 350 | 318 | 1.10 |" in text
    assert "| packed documents | 50.0% | 1750 | 875 | 2.00 |" in text
    assert "Geometric mean: 1.48 times as fast as `flex_attention`." in text  # (1.1 * 2) ** 0.5
    assert "flashmask 0.02 ms, flex_attention 0.02 ms. With flashmask this is 4.0% of the forward pass" in text
    assert "the largest share of any mask is 40.0%, for causal." in text
    assert "with a forward tile of 64 x 64 where its default for heads of 64 spills registers:" in text
    assert "| 8,192 | 32/8 | 128 | 1 | 1.25 | 1.25 (packed documents) |" in text
    assert "| 32,768 | 32/8 | 128 | 2 | 1.48 | 1.10 (causal) |" in text


@pytest.fixture
def rivals(speed: dict[str, Any]) -> dict[str, Any]:
    """Two masks beside the CUDA kernels; the second one is not a mask of FlashAttention-4."""
    names = list(report.RIVALS)
    speed["rows"] = [row("causal", name, ms) for name, ms in zip(names, (10, 12.5, 8, 16, 7, 20))]
    speed["rows"] += [row("share_question", name, ms) for name, ms in zip(names[:4], (4, 5, 5, 20))]
    speed["rows"] += [row("causal", names[0], 3, length=8192), row("causal", names[2], 2, length=8192)]
    speed["rows"] += [{**row("full", "FA4 varlen", 1), "error": "RuntimeError: no such kernel"}]
    for found in speed["rows"]:
        if found["implementation"] == "FA4 varlen":
            found["milliseconds"].pop("mask")
        elif found["implementation"].startswith("cuDNN"):
            found["milliseconds"]["mask"] = 16.0  # a millisecond of each layer
    speed["environment"] |= {"nvidia-cudnn-frontend": "1.32", "flash-attn-4": "4.0", "updated": "2026-01-01"}
    return speed


def test_the_tables_beside_the_fastest_cuda_kernels(rivals: dict[str, Any]) -> None:
    lines = report.rivals_section([rivals])
    text = "\n".join(lines)
    assert "cuDNN Frontend 1.32, flash-attn-4 4.0, torch 2.11, Triton 3.6, 2026-01-01." in text
    assert text.index("32,768 tokens, 32 query and 8 key heads of size 128:") < text.index("8,192 tokens, 32 query")
    causal, *_ = [line for line in lines if line.startswith("| causal | ")]
    assert [cell.split(" / ")[2] for cell in causal.split(" | ")[1:]] == [
        "350", "280", "438", "219", "500**", "175 |",
    ]  # fmt: skip
    (shared,) = [line for line in lines if line.startswith("| shared questions | ") and " / " in line]
    assert shared.count("**") == 2
    assert shared.startswith("| shared questions | **")
    assert shared.endswith("| - | - |")
    assert "of 3 rows with another CUDA kernel: flashmask 1, cuDNN flex_attention 1, FA4 varlen 1." in text
    assert "Of the two deterministic backward passes, flashmask's is the faster in 2 of 2." in text


def test_kernels_that_are_always_deterministic_stand_for_both(rivals: dict[str, Any]) -> None:
    rivals["rows"] = [found for found in rivals["rows"] if found["implementation"] != "flashmask, deterministic"]
    causal, *_ = [line for line in report.rivals_section([rivals]) if line.startswith("| causal | ")]
    assert [cell.split(" / ")[2] for cell in causal.split(" | ")[1:3]] == ["350", "350"]


def test_the_front_page_beside_the_fastest_cuda_kernels(rivals: dict[str, Any]) -> None:
    lines = report.rivals_headline([rivals])
    assert "A GPU, bfloat16, 32,768 tokens" in lines[0]
    # 8 / 10 and 5 / 4; 7 / 10; 20 / 10; 16 / 12.5 and 20 / 5.
    ratios = "1.02 (0.80 to 1.25) | 0.70 (0.70 to 0.70) | 2.00 (2.00 to 2.00) | 2.64 (1.28 to 4.00)"
    assert lines[-1] == f"| 128, 32/8 heads | {ratios} |"


def test_each_row_beside_the_fastest_cuda_kernels_is_of_the_newest_run(rivals: dict[str, Any]) -> None:
    rows = [row("causal", name, ms) for name, ms in ((report.RIVALS[0], 8), (report.RIVALS[2], 10))]
    newer = {**rivals, "environment": {**rivals["environment"], "kernels": "2"}, "rows": rows}
    rivals["environment"]["kernels"] = "1"
    lines = report.rivals_section([rivals, newer])
    (causal,) = [line for line in lines if line.startswith("| causal | ")]
    assert [cell.split(" / ")[-1] for cell in causal.split(" | ")[1:]] == ["438**", "438", "350", "- |"]
    assert "| causal ¹ | " in "\n".join(lines)  # of the length that the newer run lacks
    assert "| shared questions ¹ | " in "\n".join(lines)
    # 10 / 8 of the newer run, 5 / 4 of the older one; FlashAttention-4 is in that one alone, 7 / 10.
    assert report.rivals_headline([rivals, newer])[-1].startswith("| 128, 32/8 heads | 1.25 (1.25 to 1.25) | 0.70 (")


def test_only_a_run_that_measured_them_is_beside_the_fastest_cuda_kernels(
    rivals: dict[str, Any], tmp_path: Path
) -> None:
    assert report.rivals_runs(tmp_path) == []
    failed = [{**found, "error": "no"} if "cuDNN" in found["implementation"] else found for found in rivals["rows"]]
    newer = {**rivals["environment"], "updated": "2026-02-01"}
    (tmp_path / "attention_gpu-1.json").write_text(json.dumps({**rivals, "environment": newer, "rows": failed}))
    assert report.rivals_runs(tmp_path) == []
    (tmp_path / "attention_gpu-2.json").write_text(json.dumps(rivals))
    assert report.rivals_runs(tmp_path) == [rivals]


def test_tables_do_not_depend_on_the_order_of_measuring(speed: dict[str, Any]) -> None:
    published = json.loads(report.PUBLISHED.read_text())
    backwards = {**speed, "rows": speed["rows"][::-1]}
    assert report.attention_section(backwards) == report.attention_section(speed)
    assert report.paper_section(backwards, published) == report.paper_section(speed, published)
    masks_shown = [line.split(" | ")[0] for line in report.attention_section(backwards) if line.startswith("| ")]
    assert masks_shown[1:3] == ["| causal", "| packed documents"]


def test_the_papers_tables_stand_beside_the_authors_figures(speed: dict[str, Any]) -> None:
    published = json.loads(report.PUBLISHED.read_text())
    text = "\n".join(report.paper_section(speed, published))
    assert "| mask | sparsity | flashmask | FA2 varlen | published, V3 | published, V1 |" in text
    assert "| causal | 0.250 | 350 | 175 | 608 | 345 |" in text
    assert "| flashmask, times as fast (geometric mean) |  | 1.00 | 2.00 | - | - |" in text
    # Two samples: 7 TFLOP in 40 ms.
    assert "| documents, bidirectional | 0.250 | 175 | - | 476 | 234 |" in text
    assert published["hardware"] in text
    for figures in published["rows"]:
        assert figures["mask"] in attention_gpu.PAPER_MASKS
        if "forward" in figures:  # the three of a row belong together
            total = 3.5 / (1 / figures["forward"] + 2.5 / figures["backward"])
            assert total == pytest.approx(figures["total"], rel=5e-3)


def test_short_rows_are_reported_with_their_launches(speed: dict[str, Any]) -> None:
    assert report.short_rows_section(speed) == []
    for name, time in (("flashmask", 0.3), ("FA2 varlen", 0.4)):
        short = row("causal_document", name, 1, length=1024)
        short["milliseconds"]["end_to_end"] = time
        speed["rows"].append(short)
    text = "\n".join(report.short_rows_section(speed))
    assert "| mask | tokens | heads | size | flashmask | FA2 varlen |" in text
    assert "| packed documents | 1,024 | 32/8 | 128 | 0.30 (1.00) | 0.40 (1.00) |" in text


def test_what_failed_is_reported(speed: dict[str, Any]) -> None:
    text = "\n".join(report.failures(speed, "bar"))
    assert "- cuDNN: `RuntimeError: no such kernel` on full (32,768, 32/8, 128)" in text
    assert "- FA4 varlen: flash_attn.cute is not installed" in text
    assert "cuDNN" not in "\n".join(report.attention_section(speed))


def test_the_table_of_training() -> None:
    step = {"shape": "1b", "workload": "steps", "tokens_per_second": 45000, "peak_mib": 20480}
    whole = {**step, "workload": "whole documents", "length": 32768}
    result = {
        "environment": {"device": "A GPU", "torch": "2.11", "triton": "3.6", "date": "2026-01-01"},
        "settings": {"median_document": 700, "vocabulary": 32768, "shapes": training_gpu.SHAPES},
        "rows": [
            {**step, "length": 8192, "implementation": "flashmask"},
            {**step, "length": 8192, "implementation": "sdpa", "tokens_per_second": 25000},
            {**step, "length": 32768, "implementation": "flashmask"},
            {**step, "length": 32768, "implementation": "sdpa", "error": "OutOfMemoryError: ..."},
            {**step, "length": 32768, "implementation": "flex_attention", "tokens_per_second": 40000},
            {**whole, "implementation": "flashmask", "tokens_per_second": 44000},
            {**whole, "implementation": "flex_attention", "tokens_per_second": 35000},
            {"shape": "1b", "length": 0, "workload": "longest", "implementation": "flashmask", "longest": 196608},
        ],
    }
    text = "\n".join(report.training_section(result))
    name = "Llama 3.2 1B's shape, 16 layers"
    assert "| model | tokens of a row | flashmask | flex_attention | sdpa | times flex_attention |" in text
    assert f"| {name} | 8,192 | 45,000 (20) | - | 25,000 (20) | - |" in text
    assert f"| {name} | 32,768 | 45,000 (20) | 40,000 (20) | - | 1.12 |" in text
    assert f"| {name} | up to 32,768, whole documents | 44,000 (20) | 35,000 (20) | - | 1.26 |" in text
    assert f"| {name} | longest row | 196,608 | - | - |  |" in text


def test_the_table_of_steps_of_examples() -> None:
    row = {"milliseconds": 200.0, "peak_mib": 20480, "mask_milliseconds": 0.25}
    _, diffusion, drafter = example_steps_gpu.WORKLOADS
    flex = {**row, "implementation": "flex_attention", "milliseconds": 250.0, "mask_milliseconds": 1.5}
    floor = {"implementation": "no attention", "milliseconds": 150.0, "peak_mib": 19456}
    result = {
        "environment": {"device": "A GPU", "torch": "2.11", "triton": "3.6", "date": "2026-01-01"},
        "settings": {
            "dtype": "bfloat16",
            "workloads": {name: workload._asdict() for name, workload in example_steps_gpu.WORKLOADS.items()},
        },
        "rows": [
            {**row, "workload": diffusion, "implementation": "flashmask"},
            {**flex, "workload": diffusion},
            {**floor, "workload": diffusion},
            {**row, "workload": drafter, "implementation": "flashmask"},
            {"workload": drafter, "implementation": "flex_attention", "error": "ValueError: wrong result"},
        ],
    }
    text = "\n".join(report.example_steps_section(result))
    assert f"| {diffusion}, checkpointing | 200 (20) | 250 (20) | 150 (19) | 1.25 | 1.67 | 0.25 | 1.50 |" in text
    assert f"| {drafter} | 200 (20) | - | - | - | - | 0.25 | - |" in text


def test_pictures(speed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "PICTURE", tmp_path / "shared_prompts.png")
    report.draw_speed_per_mask(speed)
    report.draw_speed_over_sparsity(speed)
    report.draw_memory_over_length(speed)
    step = {"shape": "1b", "workload": "steps", "length": 8192, "implementation": "flashmask", "tokens_per_second": 5}
    report.draw_training({"rows": [step, {**step, "workload": "whole documents"}]})
    assert {file.name for file in tmp_path.iterdir()} == {
        "speed_per_mask.png",
        "speed_over_sparsity.png",
        "memory_over_length.png",
        "training.png",
    }


# Making masks, and decoding


@pytest.mark.parametrize("layers", masking_gpu.MASKS)
def test_all_implementations_make_the_same_masks(layers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch._dynamo.config.patch(disable=True):
        masking_gpu.check_makers(masking_gpu.MASKS[layers], "cpu")
        monkeypatch.setattr(masking_gpu, "make_bounds", lambda layers, *_: [from_cu_seqlens(CU_SEQLENS, 1100)] * 2)
        with pytest.raises(AssertionError, match="flashmask makes another"):
            masking_gpu.check_makers(masking_gpu.MASKS[layers], "cpu")


CU_SEQLENS = torch.tensor([0, 7, 1100], dtype=torch.int32)


@pytest.mark.parametrize("name", decoding_gpu.MODELS)
def test_all_implementations_decode_the_same(name: str) -> None:
    """Under a window too: it is shorter than the cache here."""
    model = decoding_gpu.MODELS[name]._replace(head_dim=16)
    model = model._replace(window=model.window and 11)
    step = decoding_gpu.step_of(model, 2, 37, "cpu")
    expected = decoding_gpu.attend_in_float32(model, step)
    with torch.inference_mode():
        for make, attend, context in decoding_gpu.implementations(model, step, "cpu").values():
            with context():
                decoding_gpu.check(attend(make()), expected)
    with pytest.raises(AssertionError):
        decoding_gpu.check(expected[:, None].flip(0), expected)


def test_the_report_of_making_masks() -> None:
    row = {"mask": "packed documents", "length": 30000, "launches": 9, "reads": 0, "peak_mib": 1.26}
    rows = [
        {**row, "implementation": "flashmask", "milliseconds": {"device": 0.05, "host": 0.21}},
        {**row, "implementation": "flex_attention", "milliseconds": {"device": 2.5, "host": 3.0}, "reads": 2},
        {**row, "implementation": "sdpa", "milliseconds": {"device": 1.0, "host": 2.0}, "length": 8192},
    ]
    lines = report.masking_section({"environment": measurement.environment("cpu"), "rows": rows})
    assert "30,000 tokens" in lines[0]
    assert lines[-1] == ("| packed documents | 0.05 / 0.21 ms, 9, 0, 1.3 MiB | 2.50 / 3.00 ms, 9, 2, 1.3 MiB | - |")
