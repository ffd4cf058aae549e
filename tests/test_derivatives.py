"""Derivatives in other forms than a backward pass: second ones and forward mode, which are refused, and the transforms
of torch.func.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from attention_checks import model_tensor
from torch import Tensor
from torch.autograd import forward_ad
from torch.testing import assert_close
from torch.utils._python_dispatch import BaseTorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from flashmask_kernels import flashmask_attention, reference_attention

LENGTH = 37
REFUSAL = "flashmask_attention has no second derivative"
FORWARD_REFUSAL = "flashmask_attention has no derivative in forward mode"


def inputs(dtype: torch.dtype = torch.float32, length: int = LENGTH, is_interpreted: bool = False) -> list[Tensor]:
    """Few heads for Triton's interpreter, which takes a time for each of them."""
    return [model_tensor(2, length, heads, 16, dtype, "cpu") for heads in ((2, 1, 1) if is_interpreted else (4, 2, 2))]


def bounds(length: int = LENGTH) -> Tensor:
    """Two documents, causal."""
    return torch.where(torch.arange(length) < 15, 15, length).to(torch.int32)[None, None, None]


FORMS = ["eager", "float64", "lse", "sinks", "dispatch mode", "compiled", "interpreted"]


def form_of(name: str, interpreted: Callable[..., None]) -> tuple[Callable[..., Tensor], list[Tensor], Any]:
    """A loss of query, key, value and sinks, these, and what it is called in."""
    mode: Any = BaseTorchDispatchMode() if name == "dispatch mode" else contextlib.nullcontext()
    if name == "interpreted":
        interpreted()

    def loss(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None = None) -> Tensor:
        out, lse = flashmask_attention(query, key, value, bounds(), sinks=sinks, return_lse=True)
        return out.square().sum() + (lse.sum() if name == "lse" else 0.0)

    tensors = inputs(torch.float64 if name == "float64" else torch.float32, is_interpreted=name == "interpreted")
    if name == "sinks":
        tensors.append(torch.randn(4))
    attend = torch.compile(loss, fullgraph=True, backend="eager") if name == "compiled" else loss
    return attend, tensors, mode


@pytest.mark.parametrize("differentiated", [(0,), (1,), (2,), (0, 1, 2), (-1,)])
@pytest.mark.parametrize("name", FORMS)
def test_second_derivatives_are_refused(
    name: str, differentiated: tuple[int, ...], interpreted: Callable[..., None]
) -> None:
    """By `torch.autograd.grad`, which goes only where the tensors that it is asked for are, and by `backward`."""
    loss, tensors, mode = form_of(name, interpreted)
    leaves = [tensors[index].requires_grad_() for index in differentiated]
    with mode:
        gradients = torch.autograd.grad(loss(*tensors), leaves, create_graph=True)
        penalty = sum(gradient.square().sum() for gradient in gradients)
        for leaf in leaves:
            with pytest.raises(RuntimeError, match=REFUSAL):
                torch.autograd.grad(penalty, leaf, retain_graph=True)
        with pytest.raises(RuntimeError, match=REFUSAL):
            penalty.backward()


@pytest.mark.parametrize("name", FORMS)
def test_a_penalty_on_other_gradients_is_right(name: str, interpreted: Callable[..., None]) -> None:
    """What does not differentiate the gradients of attention works beside them, create_graph or not."""
    loss, tensors, mode = form_of(name, interpreted)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    scale = torch.tensor(3.0, requires_grad=True, dtype=tensors[0].dtype)
    with mode:
        expected = torch.autograd.grad(loss(*tensors), leaves)
        total = loss(*tensors) + scale**3
        *gradients, of_scale = torch.autograd.grad(total, (*leaves, scale), create_graph=True)
        (second,) = torch.autograd.grad(of_scale, scale, retain_graph=True)
        again = torch.autograd.grad(total, leaves, retain_graph=True)
    assert second.item() == 18.0
    for ours, repeated, truth in zip(gradients, again, expected):
        assert torch.equal(ours, truth)
        assert torch.equal(repeated, truth)


def test_gradients_of_a_created_graph_can_be_clipped() -> None:
    leaves = [tensor.requires_grad_() for tensor in inputs()]
    flashmask_attention(*leaves, bounds()).square().sum().backward(create_graph=True)
    torch.nn.utils.clip_grad_norm_(leaves, 0.1)
    assert all(leaf.grad.norm() < 0.11 for leaf in leaves)


@pytest.mark.parametrize("is_interpreted", [False, True])
def test_transforms_of_functions(is_interpreted: bool, interpreted: Callable[..., None]) -> None:
    if is_interpreted:
        interpreted()
    query, key, value = inputs(is_interpreted=is_interpreted)
    mask, sinks = bounds(), torch.randn(query.shape[1])

    def loss(attend: Callable[..., Any], *tensors: Tensor) -> Tensor:
        out, lse = attend(*tensors[:3], mask, sinks=tensors[3])
        return out.square().sum() + lse.sum()

    def ours(*tensors: Tensor) -> Tensor:
        return loss(lambda *args, **kw: flashmask_attention(*args, return_lse=True, **kw), *tensors)

    def truth(*tensors: Tensor) -> Tensor:
        return loss(reference_attention, *tensors)

    tensors = (query, key, value, sinks)
    for one, other in zip(*(torch.func.grad(of, argnums=(0, 1, 2, 3))(*tensors) for of in (ours, truth))):
        assert_close(one, other, rtol=1e-4, atol=1e-5)
    queries = torch.randn(2, *query.shape)
    for transform in (
        torch.vmap,
        lambda of: torch.vmap(torch.func.grad(of)),
        lambda of: torch.func.grad(lambda queries: torch.vmap(of)(queries).sum()),
    ):
        one, other = (transform(lambda query, of=of: of(query, *tensors[1:]))(queries) for of in (ours, truth))
        assert_close(one, other, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match=REFUSAL):
        torch.func.grad(lambda query: torch.func.grad(ours)(query, *tensors[1:]).sum())(query)


@pytest.fixture
def forgotten_by_dynamo() -> Iterator[None]:
    """Dynamo does not trace a function again in which an error was raised."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("forgotten_by_dynamo")
@pytest.mark.parametrize("has_gradients", [False, True])
@pytest.mark.parametrize("differentiated", [0, 1, 2, -1])
@pytest.mark.parametrize("name", FORMS)
def test_tangents_are_refused(
    name: str, differentiated: int, has_gradients: bool, interpreted: Callable[..., None]
) -> None:
    loss, tensors, mode = form_of(name, interpreted)
    for tensor in tensors:
        tensor.requires_grad_(has_gradients)
    with forward_ad.dual_level(), mode:
        if name != "compiled":  # where forward mode is refused as a whole
            assert forward_ad.unpack_dual(loss(*tensors)).tangent is None
        tensors[differentiated] = forward_ad.make_dual(
            tensors[differentiated], torch.ones_like(tensors[differentiated])
        )
        # What dynamo makes of an error in a full graph is a RuntimeError that quotes it.
        with pytest.raises((NotImplementedError, RuntimeError), match=FORWARD_REFUSAL):
            loss(*tensors)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_tangents_of_output_gradients_are_refused(
    name: str, create_graph: bool, interpreted: Callable[..., None]
) -> None:
    loss, tensors, mode = form_of(name, interpreted)
    with mode:
        total = loss(*[tensor.requires_grad_() for tensor in tensors])
        with forward_ad.dual_level():
            weight = forward_ad.make_dual(torch.ones_like(total), torch.ones_like(total))
            with pytest.raises(NotImplementedError, match=FORWARD_REFUSAL):
                torch.autograd.grad(total, tensors, weight, create_graph=create_graph)


def compiled_jvp(of: Callable[..., Tensor], backend: str) -> Callable[[Tensor], Tensor]:
    return torch.compile(lambda query: torch.func.jvp(of, (query,), (query,))[1], backend=backend)


TRANSFORMS: dict[str, Callable[[Callable[..., Tensor], Tensor], Any]] = {
    "jvp": lambda of, query: torch.func.jvp(of, (query,), (query,)),
    "jacfwd": lambda of, query: torch.func.jacfwd(of)(query),
    "linearize": lambda of, query: torch.func.linearize(of, query)[1](query),
    "jvp of vmap": lambda of, query: torch.func.jvp(torch.vmap(of), (query[None],), (query[None],)),
    "vmap of jvp": lambda of, query: torch.vmap(lambda row: torch.func.jvp(of, (row,), (row,)))(query[None]),
    "jvp of grad": lambda of, query: torch.func.jvp(torch.func.grad(of), (query,), (query,)),
    "grad of jvp": lambda of, query: torch.func.grad(lambda row: torch.func.jvp(of, (row,), (row,))[1])(query),
    "compiled": lambda of, query: compiled_jvp(of, "eager")(query),
    "compiled by AOT": lambda of, query: compiled_jvp(of, "aot_eager")(query),
}


@pytest.mark.usefixtures("forgotten_by_dynamo")
@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, about constants of `linearize`
@pytest.mark.parametrize("q_len", [1, LENGTH])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_in_forward_mode_are_refused(name: str, q_len: int) -> None:
    query, key, value = inputs()

    def loss(query: Tensor) -> Tensor:
        return flashmask_attention(query, key, value, bounds()).square().sum()

    with pytest.raises(NotImplementedError, match=FORWARD_REFUSAL):
        TRANSFORMS[name](loss, query[:, :, :q_len])


def test_forward_mode_beside_attention_is_right() -> None:
    tensors, factor = inputs(), torch.tensor(2.0)
    out, _ = reference_attention(*tensors, bounds())
    _, ours = torch.func.jvp(
        lambda factor: factor**2 * flashmask_attention(*tensors, bounds()), (factor,), (torch.ones(()),)
    )
    assert_close(ours, 4 * out)


def test_batches_of_gradients_are_refused() -> None:
    query, key, value = (tensor.requires_grad_() for tensor in inputs())
    out = flashmask_attention(query, key, value, bounds())
    gradients = torch.stack([torch.ones_like(out)] * 2)
    with pytest.raises(RuntimeError, match="one gradient at a time"):
        torch.autograd.grad(out, query, gradients, is_grads_batched=True, retain_graph=True)
    with pytest.raises(RuntimeError, match="one gradient at a time"):
        torch.vmap(lambda gradient: torch.autograd.grad(out, query, gradient, retain_graph=True)[0])(gradients)


@pytest.mark.parametrize("has_bounds", [False, True])
def test_meta_tensors_have_shapes(has_bounds: bool) -> None:
    query, key, value = (tensor.to("meta").requires_grad_() for tensor in inputs(torch.bfloat16))
    mask = bounds().to("meta") if has_bounds else None
    out, lse = flashmask_attention(query, key, value, mask, is_causal=not has_bounds, return_lse=True)
    assert (out.shape, out.dtype, out.device.type) == (query.shape, torch.bfloat16, "meta")
    assert (lse.shape, lse.dtype) == (query.shape[:3], torch.float32)
    assert out.transpose(1, 2).is_contiguous()
    out.sum().backward()
    assert key.grad.shape == key.shape
    with pytest.raises(ValueError, match="`key` must be"):
        flashmask_attention(query, key[:1], value[:1])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_traced_by_jit() -> None:
    """The trace holds the operator: it computes other values, and other lengths."""
    traced = torch.jit.trace(lambda *tensors: flashmask_attention(*tensors), (*inputs(), bounds()))
    for length in (LENGTH, 53):
        tensors = [tensor.requires_grad_() for tensor in inputs(length=length)]
        expected, _ = reference_attention(*tensors, bounds(length))
        out = traced(*tensors, bounds(length))
        assert_close(out, expected)
        for ours, truth in zip(*(torch.autograd.grad(of.square().sum(), tensors) for of in (out, expected))):
            assert_close(ours, truth, rtol=1e-4, atol=1e-5)


def test_flops_are_those_of_dense_attention() -> None:
    query, key = (torch.randn(2, heads, length, 16, requires_grad=True) for heads, length in ((4, 20), (2, 30)))
    value = torch.randn(2, 2, 30, 24, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        out = flashmask_attention(query, key, value)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    pairs = 2 * 4 * 20 * 30
    assert forward.get_total_flops() == 2 * pairs * (16 + 24)
    assert backward.get_total_flops() == 2 * pairs * (3 * 16 + 2 * 24)
