"""Few rows against many keys, without gradients: the kernels that split the keys, against dense attention.

In Triton's interpreter without a GPU, compiled with one. The interpreter computes bfloat16 products wrongly, so that
dtype is left to the GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attention_checks import NOT_FINITE, assert_near, masks, random_intervals
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import BaseTorchDispatchMode

from flashmask_kernels import configs, dispatch, flashmask_attention, reference_attention
from flashmask_kernels.configs import Config
from flashmask_kernels.portable import decoding


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch):
    """Short caches are split too. New memory is full of NaN: an element nobody wrote shows."""
    monkeypatch.setattr(decoding, "FEWEST_TILES", 1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[decoding.DecodingForward]:
    """What the kernels for few rows are called on."""
    made: list[decoding.DecodingForward] = []
    original = decoding.DecodingForward.__call__

    def call(self: decoding.DecodingForward, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        made.append(self)
        return original(self, *inputs)

    monkeypatch.setattr(decoding.DecodingForward, "__call__", call)
    return made


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on the CPU take the kernel, with small tiles: a short cache has many of them."""
    monkeypatch.setattr(dispatch, "decoding_config_of", lambda query, value: Config(16, 16, 4, 2))


def cached(batch: int, heads: int, length: int, dim: int, dtype: torch.dtype, device: str) -> Tensor:
    """Random ``[B, heads, S, D]``, as a static cache gives them: a part of longer rows."""
    return torch.randn(batch, heads, length + 5, dim + 8, device=device).to(dtype)[:, :, 2 : 2 + length, :dim]


def assert_decodes(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, softcap: float | None = None, sinks: Tensor | None = None
) -> None:
    with torch.inference_mode():
        out, lse = flashmask_attention(
            query, key, value, bounds, softcap=softcap, sinks=sinks, return_lse=True, scale=0.2
        )
    wide = [tensor.double() for tensor in (query, key, value)]
    expected, expected_lse = reference_attention(
        *wide, bounds, softcap=softcap, sinks=sinks, scale=0.2, dtype=torch.float64
    )
    assert out.dtype == query.dtype
    assert out.transpose(1, 2).is_contiguous()
    assert torch.equal(lse == -torch.inf, expected_lse == -torch.inf)
    assert_near(out, expected)
    assert_near(lse, expected_lse)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("q_len", [1, 3])
@pytest.mark.parametrize("mask", masks(8, 8))
def test_masks_interpreted(mask: str, q_len: int, calls) -> None:
    query = torch.randn(1, q_len, 4, 16).transpose(1, 2)
    key, value = (cached(1, 2, 77, 16, torch.float32, "cpu") for _ in range(2))
    assert_decodes(query, key, value, masks(q_len, 77)[mask])
    assert calls


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("batch", "q_len", "kv_len", "dim", "dim_v", "heads", "kv_heads", "bounds_shape"),
    [
        (2, 1, 130, 24, 80, 4, 2, (2, 2, 2)),
        (1, 5, 67, 8, 40, 6, 1, (1, 1, 1)),
        (3, 1, 33, 16, 16, 2, 2, (1, 2, 4)),
        (1, 2, 3, 20, 12, 33, 3, (1, 1, 6)),
        (1, 16, 50, 16, 16, 10, 2, (1, 2, 32)),
    ],
)
def test_shapes_interpreted(dtype, batch, q_len, kv_len, dim, dim_v, heads, kv_heads, bounds_shape, calls) -> None:
    query = torch.randn(batch, q_len, heads, dim).to(dtype).transpose(1, 2)
    key, value = (cached(batch, kv_heads, kv_len, size, dtype, "cpu") for size in (dim, dim_v))
    assert_decodes(query, key, value, random_intervals(*bounds_shape, q_len, kv_len))
    assert calls


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("processors", [1, 4, 100])
@pytest.mark.parametrize(("softcap", "has_sinks"), [(2.0, False), (None, True), (2.0, True)])
def test_softcap_and_sinks_interpreted(
    softcap: float | None, has_sinks: bool, processors: int, calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one part, whose results are final, in a few, and in as many as there are tiles."""
    monkeypatch.setattr(decoding, "num_processors", lambda device: processors)
    query = torch.randn(2, 2, 4, 16).transpose(1, 2)
    key, value = (cached(2, 2, 150, 16, torch.float32, "cpu") for _ in range(2))
    sinks = torch.randn(4) if has_sinks else None
    for bounds in (random_intervals(2, 1, 2, 2, 150), masks(2, 150)["causal"], masks(2, 150)["nothing"]):
        assert_decodes(query, key, value, bounds, softcap, sinks)
    assert len(calls) == 3


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("bad", NOT_FINITE)
@pytest.mark.parametrize("q_len", [1, 3])
def test_what_is_hidden_may_be_nan_interpreted(q_len: int, bad: float) -> None:
    assert_hides_what_is_not_finite(q_len, bad, torch.float32, "cpu", 90)


def assert_hides_what_is_not_finite(q_len: int, bad: float, dtype: torch.dtype, device: str, kv_len: int) -> None:
    """Keys and values on the left are padding, the last is seen by the last row alone."""
    query = torch.randn(1, q_len, 4, 16, device=device).to(dtype).transpose(1, 2)
    key, value = (cached(1, 2, kv_len, 16, dtype, device) for _ in range(2))
    padding = kv_len // 3
    bounds = torch.where(torch.arange(kv_len) < padding, 0, q_len).to(torch.int32).to(device)[None, None, None]
    clean = flashmask_attention(query, key, value, bounds)
    for tensor in (key, value):
        tensor[:, :, :padding] = bad
    assert_near(flashmask_attention(query, key, value, bounds), clean)
    value[:, :, -1] = bad
    out = flashmask_attention(query, key, value, bounds)
    torch.testing.assert_close(out[:, :, :-1], clean[:, :, :-1])
    assert not out[:, :, -1].isfinite().any()


@pytest.mark.usefixtures("interpreted")
def test_tangents_are_refused(calls) -> None:
    query, key, value = (torch.randn(1, 2, length, 16) for length in (1, 40, 40))
    with forward_ad.dual_level(), torch.no_grad():
        flashmask_attention(query, key, value)
        assert len(calls) == 1
        with pytest.raises(NotImplementedError, match="forward mode"):
            flashmask_attention(forward_ad.make_dual(query, torch.ones_like(query)), key, value)
    assert len(calls) == 1


@pytest.mark.usefixtures("interpreted")
def test_where_gradients_are_needed_other_kernels_compute(calls) -> None:
    query, key, value = (torch.randn(1, 2, length, 16, requires_grad=True) for length in (1, 40, 40))
    out = flashmask_attention(query, key, value)
    assert not calls
    out.sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(flashmask_attention(query, key, value), out)
    assert len(calls) == 1


@pytest.mark.usefixtures("interpreted")
def test_operators_of_a_graph_decode_too_interpreted(calls) -> None:
    query, key, value = (torch.randn(1, heads, length, 16) for heads, length in ((4, 1), (2, 90), (2, 90)))
    with torch.no_grad():
        expected = flashmask_attention(query, key, value)
        with BaseTorchDispatchMode():  # sees operators instead of an autograd.Function
            assert torch.equal(flashmask_attention(query, key, value), expected)
        compiled = torch.compile(flashmask_attention, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(query, key, value), expected)
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"q_len": dispatch.MOST_DECODED_ROWS}, True),
        ({"q_len": dispatch.MOST_DECODED_ROWS + 1}, False),
        ({"kv_len": 1}, False),
        ({"mask_heads": 2}, True),
        ({"mask_heads": 8}, False),
        ({"dropout_p": 0.1}, False),
        ({"dim": 512}, True),
        ({"dtype": torch.float64}, False),
        ({"dtype": torch.float32, "dim": 512}, False),
        ({"device": "cpu"}, False),
    ],
)
def test_which_calls_are_decoding(change: dict, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "architecture", lambda device: "sm_90")
    what = {"q_len": 1, "kv_len": 100, "mask_heads": 1, "dim": 64, "dtype": torch.bfloat16, "device": "cuda"} | change
    dropout_p = what.pop("dropout_p", 0.0)
    with FakeTensorMode():
        query = torch.empty(2, 8, what["q_len"], what["dim"], dtype=what["dtype"], device=what["device"])
        value = torch.empty(2, 2, what["kv_len"], what["dim"], dtype=what["dtype"], device=what["device"])
        bounds = torch.empty(1, what["mask_heads"], 2, what["kv_len"], dtype=torch.int32, device=what["device"])
        assert dispatch.decodes(query, value, bounds, dropout_p) == expected


@pytest.mark.parametrize("kv_len", [1, 100, 1024, 8192, 131072])
@pytest.mark.parametrize("programs", [1, 8, 64, 1000])
def test_parts(kv_len: int, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They fill the GPU, as far as there are enough keys, and no part is without tiles."""
    monkeypatch.undo()
    parts = decoding.parts_of_keys(kv_len, programs, 64, 132)
    assert 1 <= parts <= max(1, kv_len // 64)
    assert parts == 1 or parts * programs <= 2 * 132
    assert parts * programs > 132 or parts == -(-kv_len // 256)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("q_len", [1, 4])
@pytest.mark.parametrize("mask", masks(8, 8))
def test_masks(mask: str, q_len: int, dtype: torch.dtype, calls) -> None:
    query = torch.randn(2, q_len, 8, 64, device="cuda").to(dtype).transpose(1, 2)
    key, value = (cached(2, 2, 1501, 64, dtype, "cuda") for _ in range(2))
    assert_decodes(query, key, value, masks(q_len, 1501)[mask].cuda())
    assert calls


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "q_len", "kv_len", "dim", "dim_v", "heads", "kv_heads", "bounds_shape"),
    [
        (1, 1, 20011, 64, 64, 64, 8, (1, 1, 1)),
        (3, 1, 4097, 256, 256, 16, 8, (3, 8, 2)),
        (2, 5, 1500, 512, 512, 32, 4, (1, 4, 4)),
        (1, 16, 700, 192, 128, 12, 2, (1, 1, 6)),
        (1, 1, 300, 80, 72, 71, 1, (1, 1, 32)),
        (64, 1, 999, 128, 128, 32, 8, (64, 1, 2)),
    ],
)
@pytest.mark.parametrize(("softcap", "has_sinks"), [(None, False), (20.0, True)])
def test_shapes(
    softcap, has_sinks, batch, q_len, kv_len, dim, dim_v, heads, kv_heads, bounds_shape, dtype, calls
) -> None:
    query = torch.randn(batch, q_len, heads, dim, device="cuda").to(dtype).transpose(1, 2)
    key, value = (cached(batch, kv_heads, kv_len, size, dtype, "cuda") for size in (dim, dim_v))
    bounds = random_intervals(*bounds_shape, q_len, kv_len).cuda()
    sinks = torch.randn(heads, device="cuda").to(dtype) if has_sinks else None
    assert_decodes(query, key, value, bounds, softcap, sinks)
    assert calls


@pytest.mark.gpu
@pytest.mark.parametrize("bad", NOT_FINITE)
@pytest.mark.parametrize("q_len", [1, 3])
def test_what_is_hidden_may_be_nan(q_len: int, bad: float) -> None:
    assert_hides_what_is_not_finite(q_len, bad, torch.bfloat16, "cuda", 3001)


@pytest.mark.gpu
def test_keys_past_32_bit_offsets() -> None:
    """The last head lies past 2^31 elements."""
    query = torch.randn(1, 8, 1, 128, device="cuda", dtype=torch.bfloat16)
    key, value = (torch.empty(1, 4, 1 << 23, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    key[:, 3].normal_()
    value[:, 3].normal_()
    bounds = torch.where(torch.arange(1 << 23, device="cuda") < (1 << 23) - 1000, 0, 1).int()[None, None, None]
    with torch.inference_mode():
        out = flashmask_attention(query, key, value, bounds)
    last = [tensor[:, 3:, -1000:].float() for tensor in (key, value)]
    expected, _ = reference_attention(query[:, 6:].float(), *last, bounds[..., -1000:])
    assert_near(out[:, 6:], expected)


@pytest.mark.gpu
def test_a_graph_replays_with_new_contents(calls) -> None:
    """The number of parts depends on shapes alone: what bounds hold may change between replays."""
    query = torch.randn(2, 8, 1, 64, device="cuda", dtype=torch.bfloat16)
    key, value = (cached(2, 2, 5000, 64, torch.bfloat16, "cuda") for _ in range(2))
    bounds = masks(1, 5000)["sliding_window"].cuda()
    with torch.inference_mode():
        flashmask_attention(query, key, value, bounds)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = flashmask_attention(query, key, value, bounds)
        for new in (masks(1, 5000)["causal"], torch.zeros_like(bounds), masks(1, 5000)["sliding_window"]):
            bounds.copy_(new)
            query.normal_()
            graph.replay()
            assert torch.equal(captured, flashmask_attention(query, key, value, bounds))
    assert len(calls) == 5


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    ("device", "dtype"), [("cpu", torch.float16), pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu)]
)
def test_compiled(device: str, dtype: torch.dtype, mode: Callable, request: pytest.FixtureRequest, calls) -> None:
    if device == "cpu":
        request.getfixturevalue("interpreted")
    query = torch.randn(2, 8, 1, 64, device=device, dtype=dtype)
    key, value = (cached(2, 2, 1000, 64, dtype, device) for _ in range(2))
    sinks = torch.randn(8, device=device, requires_grad=True)
    bounds = masks(1, 1000)["sliding_window"].to(device)
    backend = "inductor" if device == "cuda" else "eager"
    torch.compiler.reset()
    with mode():
        out = torch.compile(flashmask_attention, fullgraph=True, backend=backend)(
            query, key, value, bounds, sinks=sinks
        )
    assert len(calls) == 1
    wide = [tensor.double() for tensor in (query, key, value)]
    assert_near(out, reference_attention(*wide, bounds, sinks=sinks, dtype=torch.float64)[0])
