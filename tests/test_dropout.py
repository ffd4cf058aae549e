"""Dropout of attention weights: which are dropped, in every implementation, and what that does to the result."""

from __future__ import annotations

import pytest
import torch
from attention_checks import model_tensor, random_intervals
from torch import Tensor
from torch.testing import assert_close

from flashmask_kernels import flashmask_attention, reference_attention
from flashmask_kernels.dropout import draw_seed, kept_elements, random_bits

SEED, RATE = 11, 0.3


def kept(batch: int, heads: int, q_len: int, kv_len: int, device: str = "cpu", rate: float = RATE) -> Tensor:
    """The mask that the next call after `torch.manual_seed(SEED)` uses, `[B, H, S_q, S_k]`."""
    torch.manual_seed(SEED)
    head = torch.arange(batch * heads, device=device).view(batch, heads, 1, 1)
    rows, columns = torch.arange(q_len, device=device)[:, None], torch.arange(kv_len, device=device)
    return kept_elements(draw_seed(torch.device(device)), head, rows, columns, rate)


def check(q_len: int, kv_len: int, dtype: torch.dtype, device: str, tolerance: float) -> None:
    query = model_tensor(2, q_len, 4, 16, dtype, device)
    key, value = (model_tensor(2, kv_len, 2, 16, dtype, device) for _ in range(2))
    sinks = torch.randn(4, device=device)
    bounds = random_intervals(2, 2, 4, q_len, kv_len).to(device)
    keep, d_out = kept(2, 4, q_len, kv_len, device), torch.randn(2, 4, q_len, 16, device=device)

    def ours(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(SEED)
        return flashmask_attention(*inputs[:3], bounds, sinks=inputs[3], dropout_p=RATE, return_lse=True)

    def truth(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return reference_attention(*inputs[:3], bounds, sinks=inputs[3], keep=keep, dropout_p=RATE)

    results = []
    for attend, kind in ((ours, dtype), (truth, torch.float32)):
        inputs = [tensor.detach().to(kind).requires_grad_() for tensor in (query, key, value, sinks)]
        out, lse = attend(*inputs)
        loss = (out.float() * d_out).sum() + torch.where(lse.isinf(), 0.0, lse).square().sum()
        results.append((out.float(), lse, *(gradient.float() for gradient in torch.autograd.grad(loss, inputs))))
    for mine, expected in zip(*results):
        assert_close(mine, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("q_len", "kv_len"), [(45, 45), (20, 61)])
def test_output_and_gradients(q_len: int, kv_len: int) -> None:
    check(q_len, kv_len, torch.float32, "cpu", 1e-5)


def test_output_and_gradients_interpreted(interpreted) -> None:
    interpreted()
    check(37, 45, torch.float32, "cpu", 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_output_and_gradients_on_a_gpu(dtype: torch.dtype, tolerance: float) -> None:
    check(517, 700, dtype, "cuda", tolerance)


def test_philox_is_the_published_one() -> None:
    """Known answers of the Random123 library."""
    zero = torch.zeros(1, dtype=torch.int64)
    assert random_bits(zero, zero, zero, zero).item() == 0x6627E8D5


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_weights_are_dropped_at_the_rate_and_independently(rate: float) -> None:
    keep = kept(3, 5, 64, 64, rate=rate).double()
    deviation = (rate * (1 - rate) / keep.numel()) ** 0.5
    assert abs(keep.mean() - (1 - rate)) < 5 * deviation
    centred = (keep - (1 - rate)) / (rate * (1 - rate)) ** 0.5
    for shifted in (centred.roll(shift, dim) for shift in (1, 2) for dim in range(4)):
        assert (centred * shifted).mean().abs() < 5 / keep.numel() ** 0.5


def test_the_mean_over_seeds_is_attention_without_dropout() -> None:
    query, key, value = (model_tensor(1, 24, 2, 16, torch.float32, "cpu") for _ in range(3))
    outputs = torch.stack([flashmask_attention(query, key, value, is_causal=True, dropout_p=0.2) for _ in range(2000)])
    deviation = outputs.std(0) / outputs.shape[0] ** 0.5
    error = (outputs.mean(0) - flashmask_attention(query, key, value, is_causal=True)).abs()
    assert (error <= 6 * deviation + 1e-6).all()


def test_seed_comes_from_the_generator() -> None:
    query, key, value = (model_tensor(1, 24, 2, 16, torch.float32, "cpu") for _ in range(3))

    def attend() -> Tensor:
        return flashmask_attention(query, key, value, dropout_p=0.5)

    torch.manual_seed(3)
    first, second = attend(), attend()
    torch.manual_seed(3)
    assert torch.equal(attend(), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_repeats_the_seed(use_reentrant: bool) -> None:
    inputs = [model_tensor(1, 24, 2, 16, torch.float32, "cpu").requires_grad_() for _ in range(3)]

    def attend(*tensors: Tensor) -> Tensor:
        return flashmask_attention(*tensors, is_causal=True, dropout_p=0.5)

    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(7)
        out = (
            torch.utils.checkpoint.checkpoint(attend, *inputs, use_reentrant=use_reentrant)
            if checkpointed
            else attend(*inputs)
        )
        for tensor in inputs:
            tensor.grad = None
        out.square().sum().backward()
        gradients.append([tensor.grad for tensor in inputs])
    assert all(torch.equal(one, two) for one, two in zip(*gradients))
