"""`flashmask_attention` as users call it: arguments, autograd, operators, errors."""

from __future__ import annotations

import contextlib
import gc
import sys
import warnings
import weakref
from typing import Any

import pytest
import torch
from attention_checks import (
    assert_inductor_computes_as_eager,
    assert_replays_as_eager,
    masks,
    model_tensor,
    random_intervals,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from flashmask_kernels import configs, dispatch, flashmask_attention, ops, reference_attention


def tensors(length: int = 37, heads: int = 4, kv_heads: int = 2, dim: int = 16, dtype: torch.dtype = torch.float32):
    return [model_tensor(2, length, count, dim, dtype, "cpu") for count in (heads, kv_heads, kv_heads)]


@pytest.mark.parametrize(("q_len", "kv_len"), [(37, 37), (20, 37), (37, 20)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_without_bounds(q_len: int, kv_len: int, is_causal: bool) -> None:
    query, key, value = tensors(q_len)[0], *tensors(kv_len)[1:]
    visible = torch.ones(q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len if is_causal else kv_len)
    repeated = (tensor.repeat_interleave(2, dim=1) for tensor in (key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(query, *repeated, attn_mask=visible).nan_to_num(0.0)
    assert_close(flashmask_attention(query, key, value, is_causal=is_causal), expected)


@pytest.mark.parametrize("scale", [0.7, 0.0])
def test_scale_and_layout(scale: float) -> None:
    query, key, value = tensors()
    bounds = random_intervals(2, 2, 2, 37, 37)
    expected, expected_lse = reference_attention(query, key, value, bounds, scale=scale)
    out, lse = flashmask_attention(query, key, value, bounds, scale=scale, return_lse=True)
    assert_close(out, expected)
    assert_close(lse, expected_lse)
    assert out.transpose(1, 2).is_contiguous(), "a model reshapes [B, S, H, D] without a copy"


def test_any_strides() -> None:
    query, key, value = (tensor[..., ::2] for tensor in tensors(dim=32))
    bounds = random_intervals(2, 4, 4, 74, 74)[..., ::2]
    expected, _ = reference_attention(query, key, value, bounds)
    assert_close(flashmask_attention(query, key, value, bounds), expected)


def test_autocast() -> None:
    """Computes in the dtype of the region, from inputs of any, and gives gradients in theirs."""
    query, key, value = (tensor.requires_grad_() for tensor in tensors())
    bounds = masks(37, 37)["causal_document"]
    low = [tensor.detach().bfloat16().requires_grad_() for tensor in (query, key, value)]
    expected = flashmask_attention(*low, bounds)
    expected.float().square().sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        out = flashmask_attention(query, key, value, bounds)
        mixed = flashmask_attention(low[0], key, value, bounds)
        wide = flashmask_attention(*(tensor.double() for tensor in (query, key, value)), bounds)
        compiled = torch.compile(flashmask_attention, fullgraph=True, backend="aot_eager")(query, key, value, bounds)
    assert torch.equal(out, expected)
    assert torch.equal(mixed, expected)
    assert torch.equal(compiled, expected)
    assert wide.dtype == torch.float64
    out.float().square().sum().backward()
    for tensor, twin in zip((query, key, value), low):
        assert tensor.grad.dtype == torch.float32
        assert_close(tensor.grad, twin.grad.float())


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck(dropout_p: float) -> None:
    inputs = [tensor.double().requires_grad_() for tensor in tensors(length=5, dim=8)]
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
    bounds = torch.tensor([5, 2, 5, 4, 5], dtype=torch.int32).view(1, 1, 1, 5)

    def attend(query, key, value, sinks):
        torch.manual_seed(0)
        return flashmask_attention(
            query, key, value, bounds, softcap=3.0, sinks=sinks, dropout_p=dropout_p, return_lse=True
        )

    assert torch.autograd.gradcheck(attend, (*inputs, sinks))


@pytest.mark.parametrize("wants_gradient", ["out", "lse"])
def test_one_output_alone(wants_gradient: str) -> None:
    inputs = [tensor.requires_grad_() for tensor in tensors()]
    bounds = masks(37, 37)["causal_document"]
    results = []
    for attend in (flashmask_attention, reference_attention):
        options = {"return_lse": True} if attend is flashmask_attention else {}
        outputs = dict(zip(("out", "lse"), attend(*inputs, bounds, **options)))
        results.append(torch.autograd.grad(outputs[wants_gradient].square().sum(), inputs, allow_unused=True))
    for ours, truth in zip(*results):
        assert_close(ours, torch.zeros_like(ours) if truth is None else truth, rtol=1e-4, atol=1e-5)


def test_gradients_are_bitwise_repeatable_and_survive_reuse_of_the_graph() -> None:
    inputs = [tensor.requires_grad_() for tensor in tensors()]
    loss = flashmask_attention(*inputs, random_intervals(1, 1, 2, 37, 37), deterministic=True).square().sum()
    first, second = (torch.autograd.grad(loss, inputs, retain_graph=True) for _ in range(2))
    assert all(torch.equal(one, two) for one, two in zip(first, second))


def test_compiled_equals_eager() -> None:
    bounds, sinks = random_intervals(2, 1, 2, 37, 37), torch.randn(4)

    def step(query, key, value):
        out, lse = flashmask_attention(query, key, value, bounds, sinks=sinks, return_lse=True)
        return out.sum() + out.square().sum() + lse.nan_to_num(0.0, neginf=0.0).sum()

    inputs = [tensor.requires_grad_() for tensor in tensors()]
    expected = torch.autograd.grad(step(*inputs), inputs)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for ours, truth in zip(torch.autograd.grad(compiled(*inputs), inputs), expected):
        assert_close(ours, truth)


def test_exported_graphs_are_told_from_compiled_ones() -> None:
    class Choice(torch.nn.Module):
        def forward(self, values: torch.Tensor) -> torch.Tensor:
            return values + 1 if dispatch.is_traced_for_export() else values

    values = torch.zeros(1)
    assert torch.compile(Choice(), fullgraph=True, backend="eager")(values) == 0
    for strict in (False, True):
        assert torch.export.export(Choice(), (values,), strict=strict).module()(values) == 1


@pytest.mark.skipif(not configs._HAS_GLUON, reason="the kernels for sm_90 need Triton 3.6 to 3.9")
def test_compiled_graphs_choose_kernels_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large inputs take the kernels for sm_90, in one graph for all lengths. Fake tensors stand for those on a GPU."""
    monkeypatch.setattr(configs, "architecture", lambda device: "sm_90")
    chosen = []

    def note_choice(module: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        forward = torch.ops.flashmask_kernels.forward.default
        chosen.extend(node.args[-1] for node in module.graph.nodes if node.target == forward)
        return lambda *inputs: (torch.empty(0),)

    compiled = torch.compile(flashmask_attention, fullgraph=True, dynamic=True, backend=note_choice)
    for length in (8192, 9001, 4096, 1000, 300, 2048, 20000):
        with FakeTensorMode():
            query, key = (torch.empty(1, heads, length, 128, device="cuda").bfloat16() for heads in (32, 8))
            bounds = torch.empty(1, 1, 1, length, device="cuda", dtype=torch.int32)
        compiled(query, key, key, bounds)
    assert chosen == [dispatch.HOPPER, dispatch.PORTABLE]


@pytest.mark.skipif(not configs._HAS_GLUON, reason="the kernels for sm_90 need Triton 3.6 to 3.9")
@pytest.mark.parametrize(
    ("dim", "options", "algorithms", "family"),
    [
        (64, {}, False, dispatch.FUSED_HOPPER),
        (40, {}, False, dispatch.FUSED_HOPPER),
        (64, {"deterministic": True}, False, dispatch.HOPPER),
        (64, {}, True, dispatch.HOPPER),
        (64, {"scale": 0.0}, False, dispatch.PORTABLE),
        (128, {}, False, dispatch.HOPPER),
        (64, {"softcap": 5.0}, False, dispatch.PORTABLE),
        (32, {}, False, dispatch.PORTABLE),
    ],
)
def test_only_repeatable_kernels_compute_deterministic_calls(
    dim: int, options: dict[str, Any], algorithms: bool, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fused backward adds in an order that changes. Fake tensors stand for those on a GPU."""
    monkeypatch.setattr(configs, "architecture", lambda device: "sm_90")
    chosen = []

    def note_choice(module: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        forward = torch.ops.flashmask_kernels.forward.default
        chosen.extend(node.args[-1] for node in module.graph.nodes if node.target == forward)
        return lambda *inputs: (torch.empty(0),)

    with FakeTensorMode():
        query, key = (torch.empty(1, heads, 16384, dim, device="cuda").bfloat16() for heads in (32, 8))
        bounds = torch.empty(1, 1, 1, 16384, device="cuda", dtype=torch.int32)
    torch.compiler.reset()  # so that this function is never compiled too often
    torch.use_deterministic_algorithms(algorithms)
    try:
        torch.compile(flashmask_attention, fullgraph=True, backend=note_choice)(query, key, key, bounds, **options)
    finally:
        torch.use_deterministic_algorithms(False)
    assert chosen == [family]


@pytest.mark.parametrize("in_graph", [False, True])
def test_short_rows_do_without_descriptors(in_graph: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The schedules of a graph are made for the tiles of the table, at any length."""
    monkeypatch.setattr(configs, "architecture", lambda device: "sm_90")
    table = configs.select_configs(torch.device("cuda"), torch.bfloat16, 128)
    for length, is_described in ((1024, [False] * 3), (1536, [False, True, False]), (2048, [True] * 3)):
        with FakeTensorMode():
            query = torch.empty(1, 32, length, 128, dtype=torch.bfloat16, device="cuda")
            chosen = dispatch.launched_configs(query, query, dispatch.PORTABLE, in_graph)
        assert [config.use_descriptors for config in chosen] == is_described
        has_tiles_of_table = all(config[:2] == of_table[:2] for config, of_table in zip(chosen, table))
        assert has_tiles_of_table == (in_graph or length > 1024)


def test_operator_contract() -> None:
    query, key, value = (tensor.requires_grad_() for tensor in tensors())
    bounds = random_intervals(1, 1, 2, 37, 37)
    sinks, seed = torch.randn(4), torch.tensor([5])
    torch.library.opcheck(
        ops.forward_operator, (query, key, value, bounds, sinks, None, seed, 0.3, 5.0, 0.1, dispatch.PORTABLE)
    )


def test_dispatch_modes_see_the_operator() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    names = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    with Recorder():
        flashmask_attention(*tensors(), is_causal=True)
    assert any("flashmask_kernels.forward" in name for name in names)


def test_empty_inputs() -> None:
    query, key, value = tensors()
    out, lse = flashmask_attention(query, key[:, :, :0], value[:, :, :0], return_lse=True)
    assert out.eq(0).all()
    assert lse.eq(-torch.inf).all()
    assert flashmask_attention(query[:, :, :0], key, value).shape == (2, 4, 0, 16)
    assert flashmask_attention(query[:0], key[:0], value[:0]).shape == (0, 4, 37, 16)
    query.requires_grad_()
    flashmask_attention(query, key[:, :, :0], value[:, :, :0]).sum().backward()
    assert query.grad.eq(0).all()
    sinks = torch.randn(4, requires_grad=True)  # alone in the log-sum-exp of every row
    _, lse = flashmask_attention(query, key[:, :, :0], value[:, :, :0], sinks=sinks, return_lse=True)
    weights = torch.randn_like(lse)
    (lse * weights).sum().backward()
    torch.testing.assert_close(sinks.grad, weights.sum((0, 2)))


def test_inference_mode_then_training() -> None:
    """Nothing that inference caches may reach autograd, which refuses inference tensors."""
    query, key, value = tensors(length=29)
    with torch.inference_mode():
        expected = flashmask_attention(query, key, value, is_causal=True)
    out = flashmask_attention(query.requires_grad_(), key, value, is_causal=True)
    out.sum().backward()
    assert torch.equal(out, expected)


def moved(tensor: torch.Tensor) -> torch.Tensor:
    """As a hook that keeps saved tensors elsewhere gives them back: other strides, an odd address."""
    elsewhere = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)
    return elsewhere.copy_(tensor)


def test_plans_fit_inputs_of_every_kind_in_turn(interpreted) -> None:
    """Strides, addresses, sinks, gradients and saved tensors change from call to call, shapes do not."""
    interpreted()
    bounds = random_intervals(1, 1, 2, 19, 19)
    layouts = [
        lambda tensor: tensor,
        lambda tensor: tensor.contiguous(),
        moved,
        lambda tensor: torch.cat([tensor, tensor], -1)[..., : tensor.shape[-1]],
        lambda tensor: tensor.transpose(-1, -2).contiguous().transpose(-1, -2),
    ]
    for number in range(15):
        layout, of_gradient = layouts[number % 5], layouts[number * 7 // 3 % 5]
        leaves = [layout(tensor).detach().requires_grad_() for tensor in tensors(19, 2, 1)]
        sinks = torch.randn(2).requires_grad_() if number % 3 == 0 else None
        leaves += [sinks] if sinks is not None else []
        d_out, scale = of_gradient(tensors(19, 2, 1)[0]), 0.2 + number % 2
        expected, expected_lse = reference_attention(*leaves[:3], bounds, scale=scale, sinks=sinks)
        unpack = moved if number % 4 == 0 else lambda tensor: tensor
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
            out, lse = flashmask_attention(*leaves[:3], bounds, scale=scale, sinks=sinks, return_lse=True)
        assert_close(out, expected)
        losses = [(out * d_out).sum(), (expected * d_out).sum()]
        if number % 2:
            losses = [loss + of.nan_to_num(neginf=0.0).sum() for loss, of in zip(losses, (lse, expected_lse))]
        for ours, truth in zip(*(torch.autograd.grad(loss, leaves) for loss in losses)):
            assert_close(ours, truth, rtol=1e-4, atol=1e-5)
    assert len(dispatch.plans) > 10


def test_plans_are_bounded_and_hold_no_tensors(interpreted, monkeypatch: pytest.MonkeyPatch) -> None:
    interpreted()
    monkeypatch.setattr(dispatch, "MOST_REMEMBERED", 4)
    for length in range(3, 10):
        leaves = [tensor.requires_grad_() for tensor in tensors(length, 2, 1)]
        flashmask_attention(*leaves, is_causal=True).sum().backward()
        assert 1 <= len(dispatch.plans) <= 4
    known = [weakref.ref(tensor) for tensor in leaves]
    del leaves
    gc.collect()
    assert [reference() for reference in known] == [None] * 3


def test_a_mistake_after_a_plan_is_still_an_error() -> None:
    query, key, value = tensors()
    for _ in range(2):
        flashmask_attention(query, key, value, random_intervals(1, 1, 1, 37, 37))
    for options in (
        {"is_causal": True, "bounds": random_intervals(1, 1, 2, 37, 37)},
        {"scale": -1.0},
        {"softcap": 0.0},
    ):
        for _ in range(2):
            with pytest.raises(ValueError, match=next(iter(options))):
                flashmask_attention(query, key, value, **options)


def test_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    current, switches = [0], []

    class DeviceOf:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.index = tensor.device.index

        def __enter__(self) -> None:
            switches.append(self.index)
            current.append(self.index)

        def __exit__(self, *_: object) -> None:
            current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device_of", DeviceOf)
    monkeypatch.setattr(dispatch, "kind_of", lambda *_: "kind")
    plan = object.__new__(dispatch.Plan)
    plan._forward = lambda *_: current[-1]
    plan._backwards = {"kind": lambda *_: current[-1]}
    for index in (0, 1, 0):
        with FakeTensorMode():
            query = torch.empty(1, 2, 4, 16, device=f"cuda:{index}")
        assert plan.forward(query, *[None] * 6) == index
        assert plan.backward(None, None, query, *[None] * 8) == index
    assert switches == [1, 1]
    assert current == [0]


@pytest.mark.gpu
@pytest.mark.parametrize("has_bounds", [False, True])
def test_cuda_graph_of_forward_and_backward(has_bounds: bool) -> None:
    """Nothing of the graph's memory is cached."""

    def random_inputs() -> list[torch.Tensor]:
        return [*(tensor.cuda() for tensor in tensors(300, dim=64)), masks(300, 300)["random"].cuda()]

    def attend(*inputs: torch.Tensor) -> torch.Tensor:
        return flashmask_attention(*inputs) if has_bounds else flashmask_attention(*inputs[:3], is_causal=True)

    assert_replays_as_eager(attend, random_inputs)


@pytest.mark.gpu
def test_streams_share_bounds() -> None:
    inputs = [tensor.cuda() for tensor in tensors(2000, dim=64)]
    bounds = masks(2000, 2000)["causal_document"].cuda()
    expected = flashmask_attention(*inputs, bounds.clone())
    torch.cuda.synchronize()
    results = []
    for _ in range(4):
        with torch.cuda.stream(torch.cuda.Stream()):
            results.append(flashmask_attention(*inputs, bounds))
    torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in results)


@pytest.mark.gpu
def test_every_gpu_of_the_process() -> None:
    """The current device stays the first one."""
    inputs = [tensor.requires_grad_() for tensor in tensors(300, dim=64)]
    bounds = masks(300, 300)["causal_document"]
    out, _ = reference_attention(*inputs, bounds)
    expected = [out, *torch.autograd.grad(out.square().sum(), inputs)]
    for device in range(torch.cuda.device_count()):
        leaves = [tensor.detach().cuda(device).requires_grad_() for tensor in inputs]
        out = flashmask_attention(*leaves, bounds.cuda(device))
        for ours, truth in zip([out, *torch.autograd.grad(out.square().sum(), leaves)], expected):
            assert_close(ours.cpu(), truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.zeros(4, 37, 16)}, ValueError, r"`query` must be 4-D"),
        ({"query": torch.zeros(2, 4, 37, 16).int()}, TypeError, r"`query` must be float16.*got torch.int32"),
        ({"key": torch.zeros(2, 2, 37, 16).half()}, TypeError, r"`key` must have the query's dtype"),
        ({"key": torch.zeros(2, 2, 37, 24)}, ValueError, r"`key` must be .* D = 16, got \(2, 2, 37, 24\)"),
        ({"value": torch.zeros(2, 2, 36, 16)}, ValueError, r"`value` must be .* like the key"),
        ({"value": torch.zeros(2, 2, 37, 4)}, ValueError, r"`value` must have a head size from 8 to 512, got 4"),
        ({"query": torch.zeros(2, 3, 37, 16)}, ValueError, r"a multiple of the key's 2 heads, got 3"),
        ({"bounds": torch.zeros(1, 1, 2, 37)}, TypeError, r"`bounds` must be int32 on cpu, got torch.float32"),
        ({"bounds": torch.zeros(1, 1, 37, 2).int()}, ValueError, r"the key length 37 last"),
        (
            {name: torch.zeros(2, 37, 4, 16) for name in ("query", "key", "value")}
            | {"bounds": torch.zeros(1, 1, 1, 37).int()},
            ValueError,
            r"the key length 4 last, .*is it \[B, S, H, D\]\? Call \.transpose\(1, 2\)",
        ),
        ({"bounds": torch.zeros(3, 1, 2, 37).int()}, ValueError, r"batch 1 or 2 and heads 1, 2 or 4"),
        ({"bounds": torch.zeros(1, 3, 2, 37).int()}, ValueError, r"batch 1 or 2 and heads 1, 2 or 4"),
        ({"bounds": torch.zeros(1, 1, 3, 37).int()}, ValueError, r"n pairs of start and end .* got 3"),
        ({"bounds": torch.zeros(1, 1, 34, 37).int()}, ValueError, r"n <= 16, got 34"),
        ({"bounds": torch.zeros(1, 1, 2, 37).int(), "is_causal": True}, ValueError, r"bounds hold the whole"),
        ({"scale": -1.0}, ValueError, r"`scale` must be at least 0"),
        ({"softcap": 0.0}, ValueError, r"`softcap` must be greater than 0"),
        ({"sinks": torch.zeros(2)}, ValueError, r"`sinks` must be one logit per query head, \[4\]"),
        ({"dropout_p": 1.0}, ValueError, r"`dropout_p` must be at least 0 and less than 1, got 1.0"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = dict(zip(("query", "key", "value"), tensors())) | change
    with pytest.raises(error, match=message):
        flashmask_attention(**arguments)


@pytest.mark.gpu
def test_compiled_by_inductor_equals_eager() -> None:
    assert_inductor_computes_as_eager(1000, 64)


@pytest.mark.gpu
def test_head_sizes_without_a_kernel_take_the_torch_path() -> None:
    query, key, value = (model_tensor(1, 100, heads, 320, torch.float32, "cuda") for heads in (2, 1, 1))
    bounds = masks(100, 100)["causal_document"].cuda()
    with pytest.warns(UserWarning, match="no kernel for head size 320 in torch.float32"):
        out = flashmask_attention(query, key, value, bounds)
    assert_close(out, reference_attention(query, key, value, bounds)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_float64_takes_the_torch_path_on_a_gpu() -> None:
    query, key, value = (tensor.double().cuda() for tensor in tensors(100))
    bounds = masks(100, 100)["causal_document"].cuda()
    with pytest.warns(UserWarning, match="no kernel for float64"):
        out = flashmask_attention(query, key, value, bounds)
    assert_close(out, reference_attention(query, key, value, bounds, dtype=torch.float64)[0])


def test_a_gpu_has_no_kernel_for_float64() -> None:
    """Fake tensors stand for those on a GPU. On a CPU plain torch is what is expected: no warning."""
    with FakeTensorMode():
        query = torch.empty(1, 2, 64, 16, dtype=torch.float64, device="cuda")
    with pytest.warns(UserWarning, match="no kernel for float64"):
        assert dispatch.configs_of(query, query, False) is None
    with warnings.catch_warnings(action="error") if sys.version_info >= (3, 11) else contextlib.nullcontext():
        assert dispatch.configs_of(torch.empty(1, 2, 64, 16), torch.empty(1, 2, 64, 16), False) is None
