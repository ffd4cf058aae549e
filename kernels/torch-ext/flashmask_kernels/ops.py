"""The operators in ``torch.ops.flashmask_kernels``, and their gradients.

Eager calls go through an autograd.Function, which costs a third of an operator's dispatch. Under `torch.compile`,
`torch.export`, fake tensors and dispatch modes the same steps are operators of a graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Size, Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from .dispatch import DECODING, Family, Plan, plan_of, tiles_of
from .schedules import Schedules, build_schedule
from .tiled import tiled_backward, tiled_forward

_is_batched = torch._C._functorch.is_batchedtensor
_is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor


def with_contiguous_dims(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    sinks: Tensor | None,
    schedule: Tensor | None,
    seed: Tensor | None,
    scale: float,
    softcap: float | None,
    dropout_p: float,
    family: Family,
) -> tuple[Tensor, Tensor]:
    if query.numel() == 0 or key.numel() == 0:
        out, lse = _new_outputs(query, value)
        lse.fill_(-torch.inf)
        return out.zero_(), lse if sinks is None else torch.maximum(lse, sinks.to(lse.dtype)[:, None])
    if family == DECODING:
        return plan_of(query, key, value, bounds, sinks, scale, softcap, dropout_p, family).decode(
            query, key, value, bounds, sinks
        )
    if schedule is None:
        return tiled_forward(query, key, value, bounds, sinks, seed, scale, softcap, dropout_p)
    plan = plan_of(query, key, value, bounds, sinks, scale, softcap, dropout_p, family)
    return plan.forward(query, key, value, bounds, sinks, schedule, seed)


def _backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    out: Tensor,
    lse: Tensor,
    by_column: Tensor | None,
    by_row: Tensor | None,
    seed: Tensor | None,
    scale: float,
    softcap: float | None,
    dropout_p: float,
    family: Family,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if query.numel() == 0 or key.numel() == 0:
        d_query, d_key, d_value = (_new_gradient(tensor).zero_() for tensor in (query, key, value))
        return d_query, d_key, d_value, torch.zeros_like(lse).sub_(0 if d_lse is None else d_lse)
    if by_column is None or by_row is None:
        return tiled_backward(d_out, d_lse, query, key, value, bounds, out, lse, seed, scale, softcap, dropout_p)
    plan = plan_of(query, key, value, bounds, None, scale, softcap, dropout_p, family)
    arguments = d_out, d_lse, query, key, value, bounds, out, lse, by_column, by_row, seed
    d_query, d_key, d_value, delta = plan.backward(*arguments)
    return d_query, d_key, d_value, delta[..., : lse.shape[2]]


def _new_outputs(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    batch_size, num_heads, q_len, _ = query.shape
    out = query.new_empty(batch_size, q_len, num_heads, value.shape[-1]).transpose(1, 2)
    return out, query.new_empty(batch_size, num_heads, q_len, dtype=torch.promote_types(query.dtype, torch.float32))


def _new_gradient(tensor: Tensor) -> Tensor:
    batch_size, heads, length, dim = tensor.shape
    return tensor.new_empty(batch_size, length, heads, dim).transpose(1, 2)

    # Autograd


def _gradients(
    saved: tuple[Tensor, ...],
    d_out: Tensor | None,
    d_lse: Tensor | None,
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]],
) -> tuple[Tensor | None, ...]:
    """Of query, key, value, bounds and sinks."""
    query, key, value, bounds, sinks, seed, out, lse = saved
    d_out = torch.zeros_like(out) if d_out is None else with_contiguous_dims(d_out)
    d_lse = None if d_lse is None else d_lse.contiguous()
    d_query, d_key, d_value, delta = backward(d_out, d_lse, query, key, value, bounds, out, lse, seed)
    d_sinks = None
    if sinks is not None:
        # The sink's probability exp(sink - lse) times its score gradient 0 - delta, summed over the rows of its head.
        probabilities = torch.exp(sinks.to(lse.dtype)[:, None] - lse).masked_fill(lse == -torch.inf, 0.0)
        d_sinks = -(probabilities * delta[..., : lse.shape[2]]).sum((0, 2)).to(sinks.dtype)
    return d_query, d_key, d_value, None, d_sinks


class FlashMaskAttention(torch.autograd.Function):
    """Profilers show it under this name."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bounds: Tensor,
        sinks: Tensor | None,
        seed: Tensor | None,
        schedules: Schedules | None,
        plan: Plan,
        return_lse: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        # With a `setup_context` of its own the class would bind the arguments by signature, most of 90 us per call.
        if schedules is None:
            output = _forward(query, key, value, bounds, sinks, None, seed, *plan.factors, plan.family)
        else:
            output = plan.forward(query, key, value, bounds, sinks, schedules.get(plan.forward_tiles), seed)
        ctx.plan, ctx.schedules = plan, schedules
        ctx.save_for_backward(query, key, value, bounds, sinks, seed, *output)
        ctx.set_materialize_grads(False)
        return output if return_lse else output[0]  # autograd takes 3 us for one more

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None = None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        _refuse_batches(d_out, d_lse)
        refuse_tangents(d_out, d_lse)
        if torch.is_grad_enabled():  # somebody may differentiate the gradients
            return _refusing_gradients(saved, d_out, d_lse, lambda: _planned_gradients(ctx, saved, d_out, d_lse))
        return _planned_gradients(ctx, saved, d_out, d_lse)


def _refuse_batches(*gradients: Tensor | None) -> None:
    for gradient in gradients:
        if gradient is not None and (_is_batched(gradient) or _is_legacy_batched(gradient)):
            raise RuntimeError(
                "flashmask_attention computes one gradient at a time, not those of `is_grads_batched=True`, "
                "`vectorize=True` or torch.vmap over torch.autograd.grad: use torch.func.vjp or torch.func.jacrev"
            )


def _planned_gradients(
    ctx: Any, saved: tuple[Tensor, ...], d_out: Tensor | None, d_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    gradients = _gradients(saved, d_out, d_lse, functools.partial(_planned_backward, ctx))
    return *gradients, *[None] * 4


def _refusing_gradients(
    saved: tuple[Tensor, ...],
    d_out: Tensor | None,
    d_lse: Tensor | None,
    compute: Callable[[], tuple[Tensor | None, ...]],
) -> tuple[Tensor | None, ...]:
    """`compute()`, whose results depend on all that they are made of and refuse to be differentiated."""
    with torch.no_grad():
        gradients = compute()
    query, key, value, _, sinks, *_ = saved
    sources = [source for source in (d_out, d_lse, query, key, value, sinks) if source is not None]
    return _SecondDerivative.apply(gradients, *sources)


class _SecondDerivative(torch.autograd.Function):
    """Gradients as a function of all that they depend on. `once_differentiable` connects its error to none of that:
    `torch.autograd.grad` never comes to it, and leaves the second derivative out.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(gradients: tuple[Tensor | None, ...], *sources: Tensor) -> tuple[Tensor | None, ...]:
        return gradients

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> Any:
        _refuse_second_derivative()


def _refuse_second_derivative(*_: Any) -> NoReturn:
    raise RuntimeError(
        "flashmask_attention has no second derivative. To differentiate its gradients, as a gradient penalty does, use "
        "attn_implementation='eager' or reference_attention"
    )


def refuse_tangents(*arguments: Any) -> None:
    """Of forward mode, which kernels and operators would lose; in a graph, forward mode itself."""
    if forward_ad._current_level < 0:
        return
    if torch.compiler.is_compiling():
        _refuse_forward_mode()
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    if torch._C._are_functorch_transforms_active():
        return  # `TransformedAttention` refuses them
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        _refuse_forward_mode()


def _refuse_forward_mode() -> NoReturn:
    raise NotImplementedError(
        "flashmask_attention has no derivative in forward mode, got tensors with tangents (torch.func.jvp, jacfwd, "
        "linearize, torch.autograd.forward_ad). Use torch.func.vjp or jacrev, which go backward, or "
        "attn_implementation='eager' or reference_attention"
    )


def _planned_backward(
    ctx: Any,
    d_out: Tensor,
    d_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    out: Tensor,
    lse: Tensor,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    plan: Plan = ctx.plan
    arguments = d_out, d_lse, query, key, value, bounds, out, lse
    schedules: Schedules | None = ctx.schedules
    if schedules is None:
        return _backward(*arguments, None, None, seed, *plan.factors, plan.family)
    by_column, by_row = schedules.get(plan.key_value_gradient_tiles), schedules.get(plan.query_gradient_tiles)
    return plan.backward(*arguments, by_column, by_row, seed)


# Operators


# A second version of this package in the process, loaded under another name, must not replace these operators.
_NAMESPACE = __package__.replace(".", "_")
schedule_operator = torch.library.custom_op(f"{_NAMESPACE}::schedule", build_schedule, mutates_args=())
forward_operator = torch.library.custom_op(f"{_NAMESPACE}::forward", _forward, mutates_args=())
backward_operator = torch.library.custom_op(f"{_NAMESPACE}::backward", _backward, mutates_args=())


@schedule_operator.register_fake
def _(bounds: Tensor, q_len: int, block_m: int, block_n: int, by_column: bool, extrema: Tensor | None = None) -> Tensor:
    from .schedule import schedule_shape

    num_masks, kv_len = bounds.shape[0] * bounds.shape[1], bounds.shape[3]
    return bounds.new_empty(schedule_shape(num_masks, q_len, kv_len, block_m, block_n, by_column))


@forward_operator.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    sinks: Tensor | None,
    schedule: Tensor | None,
    seed: Tensor | None,
    scale: float,
    softcap: float | None,
    dropout_p: float,
    family: Family,
) -> tuple[Tensor, Tensor]:
    return _new_outputs(query, value)


@backward_operator.register_fake
def _(
    d_out: Tensor,
    d_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    out: Tensor,
    lse: Tensor,
    by_column: Tensor | None,
    by_row: Tensor | None,
    seed: Tensor | None,
    scale: float,
    softcap: float | None,
    dropout_p: float,
    family: Family,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _new_gradient(query), _new_gradient(key), _new_gradient(value), torch.empty_like(lse)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, bounds, sinks, _, seed, *ctx.choices = inputs
    ctx.save_for_backward(query, key, value, bounds, sinks, seed, *output)
    ctx.set_materialize_grads(False)


def _backward_in_graph(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    refuse_tangents(d_out, d_lse)
    *_, family = ctx.choices

    def backward(
        d_out: Tensor, d_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, *others: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        out, lse, seed = others
        by_column, by_row = (
            None if tiles is None else schedule_operator(bounds, query.shape[2], *tiles)
            for tiles in (
                tiles_of("key_value_gradient", query, value, family),
                tiles_of("query_gradient", query, value, family),
            )
        )
        return backward_operator(
            d_out, d_lse, query, key, value, bounds, out, lse, by_column, by_row, seed, *ctx.choices
        )

    *gradients, d_sinks = _gradients(ctx.saved_tensors, d_out, d_lse, backward)
    return *gradients, d_sinks, *[None] * 6


forward_operator.register_autograd(_backward_in_graph, setup_context=_setup_context)
backward_operator.register_autograd(_refuse_second_derivative)


class TransformedAttention(torch.autograd.Function):
    """The forward operator for the transforms of `torch.func`, which do not see the gradient of an operator that is
    defined in Python. `vmap` calls the operators once for each element.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        return forward_operator(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _setup_context(ctx, inputs, output)
        query, key, value, bounds, sinks, _, seed, *_ = inputs
        ctx.save_for_forward(query, key, value, bounds, sinks, seed, *output)  # else `vmap` fails before it calls `jvp`

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> NoReturn:
        _refuse_forward_mode()

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        return _refusing_gradients(ctx.saved_tensors, d_out, d_lse, lambda: _backward_in_graph(ctx, d_out, d_lse))


# FLOPs


def _count_forward(query: Size, key: Size, value: Size, *_: Any, **__: Any) -> int:
    """Of all pairs of query and key, as torch counts attention with a mask: to count what the bounds leave visible
    would wait for the device.
    """
    batch_size, num_heads, q_len, dim = query
    return 2 * batch_size * num_heads * q_len * key[2] * (dim + value[3])


def _count_backward(_d_out: Size, _d_lse: Size | None, query: Size, key: Size, value: Size, *_: Any, **__: Any) -> int:
    """Five products: scores and the gradients of probabilities, queries, keys and values. Kernels that compute the
    scores twice do not count for more.
    """
    batch_size, num_heads, q_len, dim = query
    return 2 * batch_size * num_heads * q_len * key[2] * (3 * dim + 2 * value[3])


_operators = getattr(torch.ops, _NAMESPACE)
register_flop_formula(_operators.forward)(_count_forward)
register_flop_formula(_operators.backward)(_count_backward)
