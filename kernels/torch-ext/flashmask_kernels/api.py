"""`flashmask_attention`, as users call it."""

from __future__ import annotations

import functools
from typing import Literal, overload

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .dispatch import DECODING, Plan, family_of, kind_of, plans, remember_for_kind, tiles_of
from .dropout import draw_seed
from .ops import (
    FlashMaskAttention,
    TransformedAttention,
    forward_operator,
    refuse_tangents,
    schedule_operator,
    with_contiguous_dims,
)
from .schedules import Schedules, capture_and_stream

MAX_INTERVALS = 16
MIN_HEAD_DIM, MAX_HEAD_DIM = 8, 512
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@overload
def flashmask_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor | None = None,
    *,
    is_causal: bool = ...,
    scale: float | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    dropout_p: float = ...,
    deterministic: bool = ...,
    return_lse: Literal[False] = False,
    schedules: Schedules | None = ...,
) -> Tensor: ...
@overload
def flashmask_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor | None = None,
    *,
    is_causal: bool = ...,
    scale: float | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    dropout_p: float = ...,
    deterministic: bool = ...,
    return_lse: Literal[True],
    schedules: Schedules | None = ...,
) -> tuple[Tensor, Tensor]: ...
def flashmask_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    deterministic: bool = False,
    return_lse: bool = False,
    schedules: Schedules | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention under a mask given as bounds (FlashMask, arXiv 2410.01359), with gradients.

    Args:
        query: ``[B, H, S_q, D]``; float16, bfloat16 or float32; float64 in plain torch, which is slow on a GPU; inside
            of `torch.autocast` any of them. Any strides; the last dimension is best contiguous.
        key: ``[B, H_kv, S_k, D]``, H a multiple of H_kv.
        value: ``[B, H_kv, S_k, D_v]``.
        bounds: int32 ``[B or 1, H, H_kv or 1, C, S_k]``, the rows hidden from each key: C = 1 (LTS, with the causal
            triangle aligned at the bottom right), 2 (LTS, UTE) or 2n (n intervals of start, end; up to 16). None:
            causal or full attention.
        is_causal: only without ``bounds``, which hold the whole mask: causal, aligned at the bottom right.
        scale: factor of the scores, by default ``D ** -0.5``.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        sinks: ``[H]``, a logit per head that takes part in the softmax and has no value.
        dropout_p: probability with which a weight of the softmax counts for nothing; the others are scaled by
            ``1 / (1 - dropout_p)``. The seed is drawn from the default generator of the device; the same seed drops the
            same weights on every device.
        deterministic: bitwise repeatable gradients; `torch.use_deterministic_algorithms(True)` asks for them too. Only
            the fused backward kernel for sm_90 is not, which then gives way to two slower ones.
        return_lse: also return the log-sum-exp of each row.
        schedules: `Schedules(bounds, S_q)`, which all calls with the same ``bounds`` may share. None: they are made for
            this call and its backward.

    Returns:
        output ``[B, H, S_q, D_v]`` in the query's dtype, laid out as ``[B, S_q, H, D_v]``; with ``return_lse`` also
        float32 ``[B, H, S_q]`` (natural logarithm). A row that sees nothing has output 0, log-sum-exp -inf (the sink,
        if there is one) and gradients 0. What is hidden counts for nothing even if it is NaN or infinite; what sees
        NaN becomes NaN.

    Raises:
        TypeError, ValueError: a wrong dtype, device, shape or combination; named with what came and what is accepted.
    """
    if not query.is_meta and torch.is_autocast_enabled(query.device.type):
        query, key, value = (_autocast(tensor) for tensor in (query, key, value))
        with torch.autocast(query.device.type, enabled=False):  # which would round the float32 steps of plain torch
            return flashmask_attention(
                query, key, value, bounds, is_causal=is_causal, scale=scale, softcap=softcap, sinks=sinks,
                dropout_p=dropout_p, deterministic=deterministic, return_lse=return_lse, schedules=schedules,
            )  # type: ignore[call-overload, misc]  # fmt: skip
    deterministic = deterministic or _torch_is_deterministic()
    arguments = is_causal, scale, softcap, float(dropout_p), deterministic
    if schedules is not None:
        schedules.check(bounds, query.shape[-2])
    refuse_tangents(query, key, value, sinks)
    if _runs_as_operator(query):
        out, lse = _attend_in_graph(query, key, value, bounds, sinks, schedules, *arguments)
        return (out, lse) if return_lse else out
    return _attend_eagerly(query, key, value, bounds, sinks, schedules, *arguments, return_lse)


def _attend_in_graph(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor | None,
    sinks: Tensor | None,
    schedules: Schedules | None,
    is_causal: bool,
    scale: float | None,
    softcap: float | None,
    dropout_p: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    _check_inputs(query, key, value, bounds, is_causal, scale, softcap, sinks, dropout_p)
    query, key, value = (with_contiguous_dims(tensor) for tensor in (query, key, value))
    if bounds is None:
        bounds = _plain_bounds(query.shape[2], key.shape[2], is_causal, query.device)
    bounds = bounds if bounds.is_contiguous() else bounds.contiguous()
    seed = draw_seed(query.device) if dropout_p else None
    scale, softcap = _scale_and_softcap(query, scale, softcap)
    is_transformed = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
    needs_gradients = is_transformed or _needs_gradients(query, key, value, sinks)
    family = family_of(query, value, bounds, scale, softcap, dropout_p, deterministic, needs_gradients)
    tiles = None if family == DECODING else tiles_of("forward", query, value, family)
    if tiles is None:
        schedule = None
    elif schedules is None:
        schedule = schedule_operator(bounds, query.shape[2], *tiles)
    else:
        schedule = schedules.get_in_graph(schedule_operator, tiles)
    attend = TransformedAttention.apply if is_transformed else forward_operator
    return attend(query, key, value, bounds, sinks, schedule, seed, scale, softcap, dropout_p, family)


def _attend_eagerly(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor | None,
    sinks: Tensor | None,
    schedules: Schedules | None,
    is_causal: bool,
    scale: float | None,
    softcap: float | None,
    dropout_p: float,
    deterministic: bool,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    needs_gradients = _needs_gradients(query, key, value, sinks)
    kind = (
        kind_of(query, key, value, bounds, sinks), is_causal, scale, softcap, dropout_p, deterministic, needs_gradients,
    )  # fmt: skip
    plan = plans.get(kind)
    if plan is None:
        _check_inputs(query, key, value, bounds, is_causal, scale, softcap, sinks, dropout_p)
    if bounds is None:
        schedules = _plain_schedules(query.shape[2], key.shape[2], is_causal, query.device)
        bounds = schedules.bounds
    if plan is None:
        given = query, key, value, bounds
        query, key, value = (with_contiguous_dims(tensor) for tensor in (query, key, value))
        bounds = bounds.contiguous()
        if any(copy is not tensor for copy, tensor in zip((query, key, value, bounds), given)):
            if schedules is None:
                schedules = Schedules(bounds, query.shape[2])
            return _attend_eagerly(
                query, key, value, bounds, sinks, schedules,
                is_causal, scale, softcap, dropout_p, deterministic, return_lse,
            )  # fmt: skip
        factors = *_scale_and_softcap(query, scale, softcap), dropout_p
        family = family_of(query, value, bounds, *factors, deterministic, needs_gradients)
        plan = Plan(query, key, value, *factors, family)
        remember_for_kind(plans, kind, plan)
    if plan.family == DECODING:
        out, lse = plan.decode(query, key, value, bounds, sinks)
        return (out, lse) if return_lse else out
    if plan.configs is None:
        schedules = None
    elif schedules is None:
        schedules = Schedules(bounds, query.shape[2])
    seed = draw_seed(query.device) if dropout_p else None
    return FlashMaskAttention.apply(query, key, value, bounds, sinks, seed, schedules, plan, return_lse)


def _torch_is_deterministic() -> bool:
    return torch.are_deterministic_algorithms_enabled()


def _runs_as_operator(query: Tensor) -> bool:
    return (
        torch.compiler.is_compiling()
        or type(query) not in (Tensor, torch.nn.Parameter)
        or _get_current_dispatch_mode() is not None
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or query.is_meta
    )


def _needs_gradients(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _scale_and_softcap(query: Tensor, scale: float | None, softcap: float | None) -> tuple[float, float | None]:
    return query.shape[-1] ** -0.5 if scale is None else float(scale), None if softcap is None else float(softcap)


def _autocast(tensor: Tensor) -> Tensor:
    """To the dtype of the autocast region, as `scaled_dot_product_attention` does."""
    if tensor.dtype == torch.float64 or not tensor.is_floating_point():
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


def _check_inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor | None,
    is_causal: bool,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    dropout_p: float,
) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim != 4:
            raise ValueError(f"`{name}` must be 4-D [B, heads, S, D], got shape {tuple(tensor.shape)}")
        if tensor.dtype not in _DTYPES:
            raise TypeError(
                f"`{name}` must be float16, bfloat16, float32 or (in plain torch) float64, got {tensor.dtype}"
            )
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise TypeError(
                f"`{name}` must have the query's dtype and device, {query.dtype} on {query.device}; "
                f"got {tensor.dtype} on {tensor.device}"
            )
        if not MIN_HEAD_DIM <= tensor.shape[-1] <= MAX_HEAD_DIM:
            raise ValueError(
                f"`{name}` must have a head size from {MIN_HEAD_DIM} to {MAX_HEAD_DIM}, got {tensor.shape[-1]}"
            )
    batch_size, num_heads, _, dim = query.shape
    kv_heads, kv_len = key.shape[1:3]
    if key.shape[0] != batch_size or key.shape[-1] != dim:
        raise ValueError(
            f"`key` must be [B, H_kv, S_k, D] with the query's B = {batch_size} and D = {dim}, got {tuple(key.shape)}"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"`value` must be [B, H_kv, S_k, D_v] like the key, {tuple(key.shape[:3])}, got {tuple(value.shape)}"
        )
    if kv_heads == 0 or num_heads % kv_heads:
        raise ValueError(f"`query` must have a multiple of the key's {kv_heads} heads, got {num_heads}")
    if bounds is not None:
        _check_bounds(bounds, query, batch_size, num_heads, kv_heads, kv_len, is_causal)
    if scale is not None and not scale >= 0:
        raise ValueError(f"`scale` must be at least 0, got {scale}; put a sign into the query")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"`softcap` must be greater than 0, got {softcap}; None turns it off")
    if sinks is not None and (sinks.shape != (num_heads,) or sinks.device != query.device):
        raise ValueError(
            f"`sinks` must be one logit per query head, [{num_heads}] on {query.device}, "
            f"got {tuple(sinks.shape)} on {sinks.device}"
        )
    if not 0 <= dropout_p < 1:
        raise ValueError(f"`dropout_p` must be at least 0 and less than 1, got {dropout_p}")


def _check_bounds(
    bounds: Tensor, query: Tensor, batch_size: int, num_heads: int, kv_heads: int, kv_len: int, is_causal: bool
) -> None:
    if bounds.dtype != torch.int32 or bounds.device != query.device:
        raise TypeError(
            f"`bounds` must be int32 on {query.device}, got {bounds.dtype} on {bounds.device}; a dense mask is not "
            "bounds, hf_flashmask.bounds.from_dense converts it"
        )
    if bounds.ndim != 4 or bounds.shape[3] != kv_len:
        is_transposed = bounds.ndim == 4 and bounds.shape[3] == kv_heads
        hint = "; the key has so many heads: is it [B, S, H, D]? Call .transpose(1, 2) on query, key and value"
        raise ValueError(
            f"`bounds` must be [B or 1, H or 1, C, S_k] with the key length {kv_len} last, got "
            f"{tuple(bounds.shape)}{hint if is_transposed else ''}"
        )
    if bounds.shape[0] not in (1, batch_size) or bounds.shape[1] not in (1, kv_heads, num_heads):
        raise ValueError(
            f"`bounds` must have batch 1 or {batch_size} and heads 1, {kv_heads} or {num_heads}, "
            f"got {tuple(bounds.shape)}"
        )
    num_planes = bounds.shape[2]
    if num_planes != 1 and (num_planes % 2 or not 2 <= num_planes <= 2 * MAX_INTERVALS):
        raise ValueError(
            "`bounds` must have 1 plane (LTS), 2 (LTS, UTE) or n pairs of start and end with "
            f"n <= {MAX_INTERVALS}, got {num_planes}"
        )
    if is_causal and num_planes != 1:
        raise ValueError(
            "`is_causal` is only for `bounds=None`: bounds hold the whole mask. Hide the causal triangle in them (UTE)"
        )


def _plain_bounds(q_len: int, kv_len: int, is_causal: bool, device: torch.device) -> Tensor:
    """Causal or full attention as bounds."""
    lts = torch.full((1, 1, 1, kv_len), q_len, dtype=torch.int32, device=device)
    return lts if is_causal else torch.cat([lts, torch.zeros_like(lts)], dim=2)


def _plain_schedules(q_len: int, kv_len: int, is_causal: bool, device: torch.device) -> Schedules:
    """Of causal or full attention, with their bounds. What is made inside of the capture of a CUDA graph belongs to the
    graph.
    """
    is_capturing, stream = capture_and_stream(device)
    if is_capturing:
        return Schedules(_plain_bounds(q_len, kv_len, is_causal, device), q_len)
    return _plain_schedules_of_stream(stream, q_len, kv_len, is_causal, device)


# Few, because each keeps its tensors alive. One for each stream, because another stream may not wait for what this one
# writes. These bounds are not handed out, so nothing changes them.
@functools.lru_cache(maxsize=4)
def _plain_schedules_of_stream(
    stream: int, q_len: int, kv_len: int, is_causal: bool, device: torch.device
) -> Schedules:
    # Autograd must be able to save the bounds later, which it refuses for a tensor made in inference mode.
    with torch.inference_mode(False):
        return Schedules(_plain_bounds(q_len, kv_len, is_causal, device), q_len)
