"""Which rows SDPA computes on the CPU, and that they are the same there."""

from __future__ import annotations

import pytest
import torch
from attention_checks import NOT_FINITE, masks, random_intervals
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

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

    def note(query: Tensor, key: Tensor, value: Tensor, mask: LayerMask, scaling: float | None) -> Tensor | None:
        calls.append(mask)
        return attend(query, key, value, mask, scaling)

    monkeypatch.setattr(integration.attention, "attend_dense_rows", note)
    return calls


def layer() -> nn.Module:
    module = nn.Module()
    module.is_causal = True
    return module.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", [*masks(8, 8), "of each sequence"])
def test_equal_dense_attention(mask: str, dtype: torch.dtype, sdpa_calls: list[LayerMask]) -> None:
    """Also rows that see nothing."""
    length = 61
    bounds = random_intervals(2, 1, 4, length, length) if mask == "of each sequence" else masks(length, length)[mask]
    inputs = [torch.randn(2, length, heads, 16).to(dtype).transpose(1, 2) for heads in (4, 2, 2)]
    output, _ = flashmask_attention_forward(layer(), *inputs, bounds, scaling=0.3)
    expected, _ = reference_attention(*(tensor.double() for tensor in inputs), bounds, scale=0.3, dtype=torch.float64)
    atol = (1e-5 if dtype == torch.float32 else 2e-2) * float(expected.abs().max())
    torch.testing.assert_close(output.transpose(1, 2).double(), expected, rtol=0, atol=atol)
    assert len(sdpa_calls) == 1


@pytest.mark.parametrize("mask", ["none", "documents"])
@pytest.mark.parametrize("q_len", [1, 3, 61])
@pytest.mark.parametrize("is_training", [False, True])
def test_a_negative_scale_is_that_of_dense_attention(q_len: int, mask: str, is_training: bool) -> None:
    """By SDPA and by the kernels."""
    query, key, value = (torch.randn(1, heads, length, 16) for heads, length in ((4, q_len), (2, 61), (2, 61)))
    position = torch.arange(61)
    visible = (position[:, None] >= position)[61 - q_len :]
    bounds = None
    if mask == "documents":
        visible = visible & ((position >= 30)[:, None] == (position >= 30))[61 - q_len :]
        bounds = bounds_of.select_rows(bounds_of.from_cu_seqlens(torch.tensor([0, 30, 61]), 61), 61 - q_len, q_len)
    scores = -0.3 * query @ key.repeat_interleave(2, 1).mT
    expected = scores.masked_fill(~visible, float("-inf")).softmax(-1) @ value.repeat_interleave(2, 1)
    with torch.set_grad_enabled(is_training):
        output, _ = flashmask_attention_forward(layer().train(is_training), query, key, value, bounds, scaling=-0.3)
    torch.testing.assert_close(output.transpose(1, 2), expected)


@pytest.mark.parametrize("bad", NOT_FINITE)
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_what_is_not_finite_stays_in_its_document(name: str, bad: float) -> None:
    bounds = bounds_of.from_cu_seqlens(torch.tensor([0, 30, 61]), 61)
    inputs = {part: torch.randn(1, heads, 61, 16) for part, heads in (("query", 4), ("key", 2), ("value", 2))}
    expected, _ = reference_attention(*inputs.values(), bounds)
    inputs[name][:, :, 33] = bad
    output, _ = flashmask_attention_forward(layer(), *inputs.values(), bounds)
    torch.testing.assert_close(output.transpose(1, 2)[:, :, :30], expected[:, :, :30])


def test_training_is_for_the_kernels(sdpa_calls: list[LayerMask]) -> None:
    """Without gradients too: so reentrant checkpointing computes a layer before it computes it with them."""
    with torch.no_grad():
        inputs = [torch.randn(1, heads, 9, 8) for heads in (4, 2, 2)]
        flashmask_attention_forward(layer().train(), *inputs, None)
        assert not sdpa_calls
        flashmask_attention_forward(layer(), *inputs, None)
        assert sdpa_calls


def test_gradients_are_for_the_kernels(sdpa_calls: list[LayerMask]) -> None:
    """NaN in the gradient of one document does not reach the other."""
    bounds = bounds_of.from_cu_seqlens(torch.tensor([0, 30, 61]), 61)
    leaves = [torch.randn(1, heads, 61, 16, requires_grad=True) for heads in (4, 2, 2)]
    d_out = torch.randn(1, 61, 4, 16)
    output, _ = flashmask_attention_forward(layer(), *leaves, bounds)
    d_out[:, 33] = float("nan")
    for gradient in torch.autograd.grad(output, leaves, d_out):
        assert gradient[:, :, :30].isfinite().all()
    with torch.no_grad():
        flashmask_attention_forward(layer(), *leaves, bounds)
    assert len(sdpa_calls) == 1


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


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("has_bounds", [False, True])
def test_transforms_see_the_operator(has_bounds: bool) -> None:
    """`torch.vmap`, under which no value can be read, and the count of FLOPs."""
    mask = bounds_of.causal(9)
    inputs = [torch.randn(3, 1, heads, 9, 8) for heads in (4, 2, 2)]

    def attend(*tensors: Tensor) -> Tensor:
        return flashmask_attention_forward(layer(), *tensors, mask if has_bounds else None)[0].transpose(1, 2)

    outputs = torch.vmap(attend)(*inputs)
    for output, *tensors in zip(outputs, *inputs):
        torch.testing.assert_close(output, reference_attention(*tensors, mask)[0])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        attend(*(tensor[0] for tensor in inputs))
    assert counter.get_total_flops() == 4 * 9 * 9 * 2 * (8 + 8)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((3, 4, 9, 8), (1, 2, 9, 8), (1, 2, 9, 8)), "`key` must be"),
        (((1, 3, 9, 8), (1, 2, 9, 8), (1, 2, 9, 8)), "multiple of the key's 2 heads"),
        (((1, 4, 9, 8), (1, 2, 9, 8), (1, 2, 7, 8)), "`value` must be"),
    ],
)
def test_what_does_not_fit_is_refused(shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flashmask_attention_forward(layer(), *(torch.randn(shape) for shape in shapes), bounds_of.causal(9))
