"""The kernels written for sm_90 against dense attention, each document alone, and the portable kernels' own cases."""

from __future__ import annotations

import functools

import pytest
import torch
from attention_checks import (
    NOT_FINITE,
    assert_documents_are_alone,
    assert_hides_what_is_not_finite,
    assert_inductor_computes_as_eager,
    assert_matches_reference,
    assert_near,
    assert_replays_as_eager,
    assert_right_past_32_bit_offsets,
    masks,
    model_tensor,
    random_documents,
    random_intervals,
)
from torch import Tensor

from flashmask_kernels import api, dispatch, flashmask_attention, reference_attention
from flashmask_kernels.configs import select_specialized_configs

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch):
    """All sizes take these kernels. New memory is full of NaN or the largest integer: an element nobody wrote shows."""
    if select_specialized_configs(torch.device("cuda"), torch.bfloat16, 128) is None:
        pytest.fail("needs an sm_90 GPU and Triton 3.6 to 3.9: leave out tests/test_hopper.py on others", pytrace=False)
    monkeypatch.setattr(dispatch, "FEWEST_SPECIALIZED_ELEMENTS", 0)
    # Only deterministic algorithms fill new memory; the kernels are not told, so that the fused one is among them.
    monkeypatch.setattr(api, "_torch_is_deterministic", lambda: False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def attend(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, **options) -> tuple[Tensor, Tensor]:
    assert dispatch.specializes(query, value, bounds, None, 0.0)
    return flashmask_attention(query, key, value, bounds, return_lse=True, **options)


@pytest.mark.parametrize(
    ("dtype", "dim"),
    [
        (torch.bfloat16, 64),
        (torch.float16, 40),
        (torch.bfloat16, 72),
        (torch.bfloat16, 128),
        (torch.float16, 96),
        (torch.bfloat16, 256),
        (torch.float16, 136),
        (torch.bfloat16, 512),
        (torch.float16, 328),
    ],
)
@pytest.mark.parametrize("mask", masks(8, 8))
def test_masks(mask: str, dtype: torch.dtype, dim: int) -> None:
    length = 2085
    query, key, value = (model_tensor(2, length, heads, dim, dtype, "cuda") for heads in (4, 2, 2))
    assert_matches_reference(attend, query, key, value, masks(length, length)[mask].cuda())


@pytest.mark.parametrize(
    ("q_len", "kv_len", "dim", "dim_v", "heads", "kv_heads", "bounds_shape"),
    [
        (1400, 2100, 128, 128, 8, 2, (3, 2, 1)),
        (2100, 1025, 80, 96, 3, 1, (1, 1, 2)),
        (1376, 1536, 72, 72, 2, 2, (3, 1, 4)),
        (2047, 2049, 128, 64, 6, 3, (1, 3, 6)),
        (1600, 1111, 16, 104, 7, 1, (3, 1, 2)),
        (1500, 1500, 96, 64, 10, 5, (3, 5, 32)),
        (1500, 1500, 8, 72, 2, 2, (1, 2, 1)),
        (1400, 2100, 64, 64, 8, 2, (3, 2, 1)),
        (2100, 1025, 40, 48, 3, 1, (1, 1, 2)),
        (1376, 1536, 56, 56, 2, 2, (3, 1, 4)),
        (1600, 1111, 16, 64, 7, 1, (3, 1, 2)),
        (1500, 1500, 64, 8, 10, 5, (3, 5, 32)),
        (1400, 2100, 256, 256, 8, 2, (3, 2, 1)),
        (2047, 2049, 192, 128, 6, 3, (1, 3, 6)),
        (2100, 1025, 128, 256, 3, 1, (1, 1, 2)),
        (1600, 1111, 248, 8, 7, 1, (3, 1, 4)),
        (1500, 1500, 16, 200, 10, 5, (3, 5, 32)),
        (1400, 2100, 512, 512, 8, 2, (3, 2, 1)),
        (2047, 2049, 264, 128, 6, 3, (1, 3, 6)),
        (2100, 1025, 64, 512, 3, 1, (1, 1, 2)),
        (1600, 1111, 504, 8, 7, 1, (3, 1, 4)),
        (1500, 1500, 16, 320, 10, 5, (3, 5, 32)),
    ],
)
def test_shapes(q_len, kv_len, dim, dim_v, heads, kv_heads, bounds_shape) -> None:
    query = model_tensor(3, q_len, heads, dim, torch.bfloat16, "cuda")
    key, value = (model_tensor(3, kv_len, kv_heads, size, torch.bfloat16, "cuda") for size in (dim, dim_v))
    bounds = random_intervals(*bounds_shape, q_len, kv_len).cuda()
    assert_matches_reference(attend, query, key, value, bounds // 64 * 64 if bounds_shape[2] > 2 else bounds)


@pytest.mark.parametrize("planes", [2, 4])
@pytest.mark.parametrize("dim", [64, 80, 128, 256, 512])
def test_nothing_hidden(dim: int, planes: int) -> None:
    """No tile is cut: what the loop over the full ones needs, it cannot have from the loop over the cut ones."""
    query, key, value = (model_tensor(1, 2048, heads, dim, torch.bfloat16, "cuda") for heads in (4, 2, 2))
    bounds = torch.zeros(1, 1, planes, 2048, dtype=torch.int32, device="cuda")
    bounds[:, :, 0] = 2048
    bounds[:, :, 1] = 0 if planes == 2 else 2048
    assert_matches_reference(attend, query, key, value, bounds)


@pytest.mark.parametrize("dim", [64, 80, 128, 256, 512])
def test_sinks(dim: int) -> None:
    query, key, value = (model_tensor(2, 2051, heads, dim, torch.bfloat16, "cuda") for heads in (4, 2, 2))
    sinks = torch.randn(4, device="cuda", dtype=torch.bfloat16)
    bounds = random_intervals(1, 2, 2, 2051, 2051).cuda()
    assert_matches_reference(attend, query, key, value, bounds, sinks=sinks)


def test_what_tma_cannot_address() -> None:
    """A part of a larger tensor at an odd address, with odd strides, and a gradient of the output that is expanded."""
    joined = torch.randn(2, 2050, 3, 3 * 80 + 1, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
    query, key, value = (joined[..., 1 + 80 * part : 81 + 80 * part] for part in range(3))
    bounds = masks(2050, 2050)["causal_document"].cuda()
    assert_matches_reference(attend, query, key, value, bounds)
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    dense = [tensor.detach().contiguous().requires_grad_() for tensor in (query, key, value)]
    of_sum = torch.autograd.grad(attend(*leaves, bounds)[0].sum(), leaves)
    of_ones = torch.autograd.grad(attend(*dense, bounds)[0], dense, torch.ones_like(query))
    assert all(torch.equal(one, other) for one, other in zip(of_sum, of_ones))


@pytest.mark.parametrize("mask", masks(8, 8))
def test_two_backward_kernels_for_small_heads(mask: str) -> None:
    query, key, value = (model_tensor(2, 2085, heads, 64, torch.bfloat16, "cuda") for heads in (4, 2, 2))
    deterministic = functools.partial(attend, deterministic=True)
    assert_matches_reference(deterministic, query, key, value, masks(2085, 2085)[mask].cuda())


@pytest.mark.parametrize(("dim", "deterministic"), [(512, False), (256, False), (128, False), (64, True), (64, False)])
def test_gradients_are_bitwise_repeatable(dim: int, deterministic: bool) -> None:
    """But for dQ of the fused kernel, which is the same up to rounding: dK and dV are repeatable in any case."""
    query, key, value = (
        model_tensor(1, 6000, heads, dim, torch.bfloat16, "cuda").requires_grad_() for heads in (8, 2, 2)
    )
    bounds = masks(6000, 6000)["causal_document"].cuda()
    d_out = torch.randn_like(query)
    first, *others = (
        torch.autograd.grad(
            attend(query, key, value, bounds, deterministic=deterministic)[0], (query, key, value), d_out
        )
        for _ in range(4)
    )
    family = dispatch.family_of(query, value, bounds, 1.0, None, 0.0, deterministic, True)
    for other in others:
        assert torch.equal(first[1], other[1])
        assert torch.equal(first[2], other[2])
        if family == dispatch.FUSED_HOPPER:
            assert_near(first[0], other[0])
        else:
            assert torch.equal(first[0], other[0])


@pytest.mark.parametrize("dim", [64, 128, 256, 512])
def test_cuda_graph_of_forward_and_backward(dim: int) -> None:
    def random_inputs() -> list[Tensor]:
        tensors = [model_tensor(2, 1500, heads, dim, torch.bfloat16, "cuda") for heads in (4, 2, 2)]
        return [*tensors, random_intervals(1, 1, 2, 1500, 1500).cuda()]

    assert_replays_as_eager(lambda *inputs: attend(*inputs, deterministic=True)[0], random_inputs)


@pytest.mark.parametrize("dim", [64, 128, 256, 512])
def test_compiled_by_inductor_equals_eager(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the compiler checks that tracing leaves the switch of deterministic algorithms as it was
    monkeypatch.setattr(dispatch, "FEWEST_SPECIALIZED_ELEMENTS", 0)
    assert_inductor_computes_as_eager(2050, dim, deterministic=True)


@pytest.mark.parametrize("dim", [64, 80, 128, 256, 512])
@pytest.mark.parametrize("bad", NOT_FINITE)
@pytest.mark.parametrize("mask", ["causal_document", "document", "window_in_documents"])
def test_hidden_nan(mask: str, bad: float, dim: int) -> None:
    assert_hides_what_is_not_finite(attend, bad, torch.bfloat16, dim, masks(4133, 4133)[mask].cuda())


@pytest.mark.parametrize("dim", [64, 80, 128, 256, 512])
def test_long_packed_rows(dim: int) -> None:
    """Every document, of lengths from a few tokens on, is what it is alone."""
    length = 40_000
    starts, ends = random_documents(length, 60)
    query, key, value, d_out = (model_tensor(1, length, heads, dim, torch.bfloat16, "cuda") for heads in (16, 4, 4, 16))
    documents = sorted({(int(start), int(end)) for start, end in zip(starts[::50], ends[::50])})
    assert_documents_are_alone(attend, query, key, value, d_out, ends.int().cuda()[None, None, None], documents)


@pytest.mark.parametrize("dim", [64, 128, 256, 512])
def test_tensors_past_32_bit_offsets(dim: int) -> None:
    assert_right_past_32_bit_offsets(attend, dim)


def test_what_the_portable_kernels_compute() -> None:
    """Softcap, dropout, a mask for each of the query heads that share a key, short rows, and small heads."""
    query, value = (torch.empty(1, heads, 4096, 128, dtype=torch.bfloat16, device="cuda") for heads in (4, 2))
    bounds = torch.zeros(1, 1, 2, 4096, dtype=torch.int32, device="cuda")
    assert dispatch.specializes(query, value, bounds, None, 0.0)
    assert not dispatch.specializes(query, value, bounds, 5.0, 0.0)
    assert not dispatch.specializes(query, value, bounds, None, 0.1)
    assert not dispatch.specializes(query, value, bounds.expand(1, 4, 2, 4096), None, 0.0)
    assert not dispatch.specializes(query[:, :, :1000], value, bounds, None, 0.0)
    assert not dispatch.specializes(query.float(), value.float(), bounds, None, 0.0)
    assert not dispatch.specializes(query[..., :32], value[..., :32], bounds, None, 0.0)


@pytest.mark.parametrize("dim", [64, 128])
def test_scale_of_zero(dim: int) -> None:
    """All visible keys have the same weight. The backward of these kernels would divide by the scale."""
    query, key, value = (model_tensor(1, 1100, heads, dim, torch.bfloat16, "cuda") for heads in (4, 2, 2))
    scaled = functools.partial(attend, scale=0.0)
    dense = functools.partial(reference_attention, scale=0.0)
    assert_matches_reference(scaled, query, key, value, masks(1100, 1100)["causal"].cuda(), reference=dense)


def test_new_lengths_do_not_recompile() -> None:
    from flashmask_kernels.hopper.forward import attention_forward_kernel

    def run(length: int) -> None:
        query, key, value = (model_tensor(1, length, heads, 128, torch.bfloat16, "cuda") for heads in (4, 2, 2))
        flashmask_attention(query, key, value, is_causal=True)

    run(4096)
    caches = attention_forward_kernel.device_caches
    compiled = sum(len(cache[0]) for cache in caches.values())
    for length in (4097, 5000, 8192):
        run(length)
    assert sum(len(cache[0]) for cache in caches.values()) == compiled
