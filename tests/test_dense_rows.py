"""Which rows SDPA computes on the CPU, and that they are the same there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attention_checks import masks, random_intervals
from torch import Tensor, nn

from flashmask_kernels import reference_attention
from hf_flashmask import bounds as bounds_of
from hf_flashmask import integration
from hf_flashmask.integration import flashmask_attention_forward
from hf_flashmask.integration.dense_rows import sees_most_keys
from hf_flashmask.integration.layer_mask import LayerMask


@pytest.fixture
def sdpa_calls(monkeypatch: pytest.MonkeyPatch) -> list[LayerMask]:
    calls: list[LayerMask] = []
    attend = integration.attention.attend_dense_rows

    def note(query: Tensor, key: Tensor, value: Tensor, mask: LayerMask, scaling: float | None) -> Tensor:
        calls.append(mask)
        return attend(query, key, value, mask, scaling)

    monkeypatch.setattr(integration.attention, "attend_dense_rows", note)
    return calls


def layer() -> nn.Module:
    module = nn.Module()
    module.is_causal = True
    return module


def results(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: list[Tensor], d_out: Tensor
) -> tuple[Tensor, ...]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out = attend(*leaves)
    return out, *torch.autograd.grad(out, leaves, d_out.to(out.dtype))


@pytest.mark.parametrize("by_kernels", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", [*masks(8, 8), "of each sequence"])
def test_both_ways_equal_dense_attention(
    mask: str, dtype: torch.dtype, by_kernels: bool, sdpa_calls: list[LayerMask], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output and gradients, with rows that see nothing among them."""
    if by_kernels:
        monkeypatch.setattr(integration.attention, "sees_most_keys", lambda *_: False)
    length = 61
    bounds = random_intervals(2, 1, 4, length, length) if mask == "of each sequence" else masks(length, length)[mask]
    inputs = [torch.randn(2, length, heads, 16).to(dtype).transpose(1, 2) for heads in (4, 2, 2)]
    d_out = torch.randn(2, 4, length, 16)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return flashmask_attention_forward(layer(), query, key, value, bounds, scaling=0.3)[0].transpose(1, 2)

    def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return reference_attention(query, key, value, bounds, scale=0.3, dtype=torch.float64)[0]

    expected = results(dense, [tensor.double() for tensor in inputs], d_out)
    for actual, truth in zip(results(attend, inputs, d_out), expected):
        atol = (1e-5 if dtype == torch.float32 else 2e-2) * float(truth.detach().abs().max())
        torch.testing.assert_close(actual.double(), truth, rtol=0, atol=atol)
    assert len(sdpa_calls) == (not by_kernels)


@pytest.mark.parametrize("is_causal", [False, True])
def test_without_a_mask(is_causal: bool, sdpa_calls: list[LayerMask]) -> None:
    inputs = [torch.randn(2, 45, heads, 16).transpose(1, 2) for heads in (4, 2, 2)]
    output, _ = flashmask_attention_forward(layer(), *inputs, None, is_causal=is_causal)
    bounds = bounds_of.causal(45) if is_causal else bounds_of.bidirectional(45)
    torch.testing.assert_close(output.transpose(1, 2), reference_attention(*inputs, bounds)[0])
    assert sdpa_calls


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        (bounds_of.causal(200), True),
        (bounds_of.sliding_window(5, 200), True),
        (bounds_of.causal(1024), True),
        (bounds_of.sliding_window(700, 1024), True),
        (bounds_of.sliding_window(64, 512), True),
        (bounds_of.sliding_window(64, 1024), False),
        (bounds_of.causal(2048), False),
        (bounds_of.from_cu_seqlens(torch.arange(0, 1025, 128), 1024), False),
        (bounds_of.causal(200).expand(1, 2, -1, -1), False),
        (bounds_of.causal(5000), False),
    ],
)
def test_which_rows_see_most_keys(bounds: Tensor, expected: bool) -> None:
    """Those of a dense mask that is large, and those of heads with masks of their own, do not count."""
    length = bounds.shape[3]
    tensor = torch.empty(1, 2, length, 8)
    assert sees_most_keys(tensor, tensor, tensor, LayerMask(bounds, length)) == expected
    assert not sees_most_keys(tensor, tensor, tensor[..., :4], LayerMask(bounds, length))
    on_meta = tensor.to("meta")
    assert not sees_most_keys(on_meta, on_meta, on_meta, LayerMask(bounds, length))


def test_sinks_softcap_and_dropout_are_for_the_kernels(sdpa_calls: list[LayerMask]) -> None:
    inputs = [torch.randn(1, heads, 9, 8) for heads in (4, 2, 2)]
    for options in ({"s_aux": torch.zeros(4)}, {"softcap": 5.0}, {"dropout": 0.1}):
        flashmask_attention_forward(layer(), *inputs, None, **options)
    assert not sdpa_calls
