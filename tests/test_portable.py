"""The Triton kernels against dense attention: in Triton's interpreter without a GPU, compiled with one.

The interpreter computes bfloat16 products wrongly, so that dtype is left to the GPU.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from attention_checks import (
    NOT_FINITE,
    assert_documents_are_alone,
    assert_hides_what_is_not_finite,
    assert_matches_reference,
    assert_right_past_32_bit_offsets,
    masks,
    model_tensor,
    random_documents,
    random_intervals,
)
from torch.utils._python_dispatch import BaseTorchDispatchMode

from flashmask_kernels import dispatch, flashmask_attention, reference_attention, schedule
from flashmask_kernels.configs import Configs


def attend(query, key, value, bounds, **options):
    return flashmask_attention(query, key, value, bounds, return_lse=True, **options)


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch):
    """All sizes take these kernels, with descriptors where there are any. New memory is full of NaN or the largest
    integer: an element nobody wrote shows.
    """
    monkeypatch.setattr(dispatch, "specializes", lambda *arguments: False)
    monkeypatch.setattr(dispatch, "FEWEST_DESCRIBED_ELEMENTS", {})
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("use_descriptors", [False, True])
@pytest.mark.parametrize("mask", masks(8, 8))
def test_masks_interpreted(mask: str, use_descriptors: bool, interpreted) -> None:
    interpreted(use_descriptors)
    q_len = kv_len = 61
    query, key, value = (model_tensor(1, q_len, heads, 16, torch.float32, "cpu") for heads in (2, 1, 1))
    assert_matches_reference(attend, query, key, value, masks(q_len, kv_len)[mask])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("q_len", "kv_len", "dim", "dim_v", "heads", "kv_heads", "bounds_shape"),
    [
        (33, 70, 24, 16, 4, 2, (2, 2, 1)),
        (70, 33, 8, 40, 3, 1, (1, 3, 2)),
        (1, 37, 16, 16, 2, 2, (2, 1, 4)),
        (47, 47, 20, 12, 6, 3, (1, 6, 6)),
    ],
)
def test_shapes_interpreted(dtype, q_len, kv_len, dim, dim_v, heads, kv_heads, bounds_shape, interpreted) -> None:
    interpreted()
    query = model_tensor(2, q_len, heads, dim, dtype, "cpu")
    key, value = (model_tensor(2, kv_len, kv_heads, size, dtype, "cpu") for size in (dim, dim_v))
    bounds = random_intervals(*bounds_shape, q_len, kv_len)
    assert_matches_reference(attend, query, key, value, bounds)


@pytest.mark.parametrize("in_graph", [False, True])
def test_tiles_of_short_rows_interpreted(in_graph: bool, interpreted, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels and schedules have the same ones, in operators too, which do not ask for the length."""
    interpreted(use_descriptors=True, of_short_rows=(16, 16, 4, 2))
    monkeypatch.setattr(dispatch, "FEWEST_DESCRIBED_ELEMENTS", dict.fromkeys(Configs._fields, 1 << 60))
    query, key, value = (model_tensor(1, 61, heads, 16, torch.float32, "cpu") for heads in (2, 1, 1))
    # A dispatch mode sees the operators of a graph instead of an autograd.Function.
    with BaseTorchDispatchMode() if in_graph else contextlib.nullcontext():
        assert_matches_reference(attend, query, key, value, masks(61, 61)["causal_document"])


def test_scale_of_zero_interpreted(interpreted) -> None:
    """Visible keys count alike, and a hidden one still for nothing."""
    interpreted()
    query, key, value = (model_tensor(1, 45, heads, 16, torch.float32, "cpu") for heads in (4, 2, 2))
    bounds = random_intervals(1, 1, 2, 45, 45)
    expected = reference_attention(query, key, value, bounds, scale=0.0)
    torch.testing.assert_close(attend(query, key, value, bounds, scale=0.0), expected)


@pytest.mark.parametrize(("softcap", "has_sinks"), [(2.0, False), (None, True), (2.0, True)])
def test_softcap_and_sinks_interpreted(softcap: float | None, has_sinks: bool, interpreted) -> None:
    interpreted()
    query, key, value = (model_tensor(1, 45, heads, 16, torch.float32, "cpu") for heads in (4, 2, 2))
    sinks = torch.randn(4) if has_sinks else None
    assert_matches_reference(attend, query, key, value, random_intervals(1, 1, 2, 45, 45), softcap, sinks)


@pytest.mark.parametrize("max_runs", [1, 2])
def test_more_runs_than_a_schedule_holds_interpreted(
    max_runs: int, interpreted, monkeypatch: pytest.MonkeyPatch
) -> None:
    interpreted()
    complete = schedule.schedule_shape
    monkeypatch.setattr(schedule, "schedule_shape", lambda *args: (*complete(*args)[:2], 2 + 2 * max_runs))
    query, key, value = (model_tensor(1, 133, heads, 16, torch.float32, "cpu") for heads in (2, 1, 1))
    stripes = torch.where(torch.arange(133) // 16 % 2 == 0, 20, 133).int()[None, None, None]
    assert_matches_reference(attend, query, key, value, stripes)
    assert_matches_reference(attend, query, key, value, random_intervals(1, 2, 4, 133, 133))


@pytest.mark.parametrize(
    ("mask", "bad", "dtype", "use_descriptors"),
    [
        ("causal_document", float("nan"), torch.float32, True),
        ("causal_document", float("inf"), torch.float16, False),
        ("document", float("-inf"), torch.float32, False),
        ("sliding_window", float("nan"), torch.float16, True),
        ("window_in_documents", float("nan"), torch.float32, False),
    ],
)
def test_hidden_nan_interpreted(mask: str, bad: float, dtype: torch.dtype, use_descriptors: bool, interpreted) -> None:
    interpreted(use_descriptors)
    assert_hides_what_is_not_finite(attend, bad, dtype, 16, masks(61, 61)[mask])


def test_hidden_nan_with_softcap_and_sinks_interpreted(interpreted) -> None:
    interpreted()
    bounds = masks(61, 61)["sliding_window"]
    assert_hides_what_is_not_finite(attend, float("nan"), torch.float32, 16, bounds, softcap=2.0, sinks=torch.randn(2))


def test_document_of_nan_interpreted(interpreted) -> None:
    interpreted()
    query, key, value, d_out = (model_tensor(1, 90, heads, 16, torch.float32, "cpu") for heads in (2, 1, 1, 2))
    for tensor in (query, key, value, d_out):
        tensor[:, :, 21:53] = torch.nan
    bounds = torch.tensor([21] * 21 + [53] * 32 + [90] * 37, dtype=torch.int32)[None, None, None]
    assert_documents_are_alone(attend, query, key, value, d_out, bounds, [(0, 21), (53, 90)])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mask", masks(8, 8))
def test_masks(mask: str, dtype: torch.dtype) -> None:
    q_len = kv_len = 1021
    query, key, value = (model_tensor(2, q_len, heads, 64, dtype, "cuda") for heads in (4, 2, 2))
    assert_matches_reference(attend, query, key, value, masks(q_len, kv_len)[mask].cuda())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("q_len", "kv_len", "dim", "dim_v", "heads", "kv_heads", "bounds_shape"),
    [
        (300, 700, 128, 128, 8, 2, (2, 2, 1)),
        (700, 300, 80, 96, 3, 1, (1, 3, 2)),
        (1, 517, 72, 72, 2, 2, (2, 1, 4)),
        (470, 471, 192, 128, 6, 3, (1, 6, 6)),
        (257, 255, 256, 256, 4, 4, (1, 1, 2)),
        (129, 640, 20, 36, 5, 1, (2, 5, 2)),
        (333, 333, 8, 16, 14, 2, (1, 1, 1)),
        (423, 423, 32, 32, 8, 4, (1, 1, 1)),
        (160, 130, 464, 464, 7, 1, (1, 1, 2)),
        (97, 200, 320, 512, 10, 5, (2, 5, 32)),
    ],
)
def test_shapes(dtype, q_len, kv_len, dim, dim_v, heads, kv_heads, bounds_shape) -> None:
    query = model_tensor(2, q_len, heads, dim, dtype, "cuda")
    key, value = (model_tensor(2, kv_len, kv_heads, size, dtype, "cuda") for size in (dim, dim_v))
    bounds = random_intervals(*bounds_shape, q_len, kv_len).cuda()
    assert_matches_reference(attend, query, key, value, bounds)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 80, 128])
def test_short_rows_at_any_address(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too short for descriptors. Calls of the same shapes and strides differ in what the hardware may load at once."""
    monkeypatch.setattr(dispatch, "FEWEST_DESCRIBED_ELEMENTS", dict.fromkeys(Configs._fields, 1 << 60))
    bounds = masks(1021, 1021)["causal_document"]
    whole = torch.empty(bounds.numel() + 1, dtype=torch.int32, device="cuda")
    for offset in (0, 1, 8, 0):
        joined = torch.randn(2, 1021, 4, dim + 8, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
        part = joined[..., offset : offset + dim]
        moved = whole[offset % 2 :][: bounds.numel()].view(bounds.shape).copy_(bounds)
        assert_matches_reference(attend, part, part[:, :2], part[:, 2:], moved)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("softcap", "has_sinks"), [(2.0, False), (None, True), (2.0, True)])
def test_softcap_and_sinks(softcap: float | None, has_sinks: bool, dtype: torch.dtype) -> None:
    query, key, value = (model_tensor(2, 453, heads, 64, dtype, "cuda") for heads in (4, 2, 2))
    sinks = torch.randn(4, device="cuda", dtype=dtype) if has_sinks else None
    assert_matches_reference(attend, query, key, value, random_intervals(1, 4, 2, 453, 453).cuda(), softcap, sinks)


@pytest.mark.gpu
def test_gradients_are_bitwise_repeatable() -> None:
    query, key, value = (
        model_tensor(1, 2000, heads, 128, torch.bfloat16, "cuda").requires_grad_() for heads in (8, 2, 2)
    )
    bounds = masks(2000, 2000)["causal_document"].cuda()
    d_out = torch.randn_like(query)
    first, second = (
        torch.autograd.grad(flashmask_attention(query, key, value, bounds), (query, key, value), d_out)
        for _ in range(2)
    )
    assert all(torch.equal(one, two) for one, two in zip(first, second))


@pytest.mark.gpu
def test_new_lengths_do_not_recompile() -> None:
    from flashmask_kernels.portable.forward import attention_forward_kernel

    def run(length: int) -> None:
        query, key, value = (model_tensor(1, length, heads, 64, torch.bfloat16, "cuda") for heads in (4, 2, 2))
        flashmask_attention(query, key, value, is_causal=True)

    run(256)
    caches = attention_forward_kernel.device_caches
    compiled = sum(len(cache[0]) for cache in caches.values())
    for length in (1, 17, 255, 300, 512, 1000):
        run(length)
    assert sum(len(cache[0]) for cache in caches.values()) == compiled


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "dim"),
    [(torch.bfloat16, 64), (torch.bfloat16, 128), (torch.bfloat16, 192), (torch.float16, 80), (torch.float32, 64)],
)
@pytest.mark.parametrize("bad", NOT_FINITE)
@pytest.mark.parametrize("mask", ["causal_document", "document", "sliding_window", "window_in_documents"])
def test_hidden_nan(mask: str, bad: float, dtype: torch.dtype, dim: int) -> None:
    assert_hides_what_is_not_finite(attend, bad, dtype, dim, masks(701, 701)[mask].cuda())


@pytest.mark.gpu
@pytest.mark.parametrize("bad", NOT_FINITE)
@pytest.mark.parametrize("dim", [64, 128])
def test_document_of_nan(dim: int, bad: float) -> None:
    query, key, value, d_out = (model_tensor(1, 1021, heads, dim, torch.bfloat16, "cuda") for heads in (4, 2, 2, 4))
    for tensor in (query, key, value, d_out):
        tensor[:, :, 241:663] = bad
    ends = torch.tensor([241] * 241 + [663] * 422 + [1021] * 358, dtype=torch.int32, device="cuda")
    assert_documents_are_alone(attend, query, key, value, d_out, ends[None, None, None], [(0, 241), (663, 1021)])


@pytest.mark.gpu
def test_million_tokens_in_a_thousand_documents() -> None:
    length = 1 << 20
    starts, ends = random_documents(length, 1000)
    query, key, value, d_out = (model_tensor(1, length, heads, 64, torch.bfloat16, "cuda") for heads in (2, 1, 1, 2))
    positions = [0, length // 2, length // 4 * 3, length - 1]
    documents = [(int(starts[position]), int(ends[position])) for position in positions]
    bounds = ends.int().cuda()[None, None, None]
    assert_documents_are_alone(attend, query, key, value, d_out, bounds, documents)


@pytest.mark.gpu
def test_tensors_past_32_bit_offsets() -> None:
    assert_right_past_32_bit_offsets(attend)
