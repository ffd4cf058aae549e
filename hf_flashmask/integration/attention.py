"""The attention function: one layer's call of the kernels."""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.utils.import_utils import is_tracing

from flashmask_kernels import flashmask_attention

from .. import bounds as _bounds
from .conversion import from_dense_mask
from .decoding import _FEW_ROWS, _attend_few_rows
from .mask import _WITH_DOCUMENTS, _build_bounds, _document_tensors, _is_marked, _is_plain_causal, _Layer
from .memo import _masks_of_users, once_per_forward_pass
from .name import logger


def flashmask_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, as Transformers' attention interface calls it.

    Args:
        module: the attention layer.
        query: `[B, H, S_q, D]`.
        key: `[B, H_kv, S_k, D]`.
        value: `[B, H_kv, S_k, D_v]`.
        attention_mask: None, or int32 bounds `[B or 1, H or 1, C, S_k]`: those of `flashmask_mask`, or the user's own.
            The user's are final: nothing is added to them, neither documents nor the layer's sliding window.
        dropout: probability with which a weight is dropped. Models pass 0 unless they are in training mode.
        scaling: factor of the scores, by default `D ** -0.5`.
        is_causal: by default `module.is_causal`, or True without it. Used when `attention_mask` is None.
        sliding_window: a query sees keys at most `sliding_window - 1` away, None and 0 mean no window. Used when
            `attention_mask` is None.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        s_aux: `[H]`, the attention sinks.
        position_ids: `[B or 1, S]`; in self-attention a document starts wherever they do not increase.
        cu_seq_lens_q, cu_seq_lens_k: `[documents + 1]`, cumulative lengths of one packed row. They go before
            `position_ids`.

    Returns:
        output `[B, S_q, H, D_v]`, and None for the attention weights, which are never computed.

    Raises:
        NotImplementedError, TypeError, ValueError: for whatever would otherwise change the result silently.
    """
    _refuse_unsupported_arguments(module, kwargs)
    is_causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    bounds = attention_mask
    if bounds is not None and module.training and torch.compiler.is_compiling():
        # Each layer its own tensor: checkpointed layers cannot share what they make. With gradients the compiler
        # removes common subexpressions itself.
        bounds = bounds.view(bounds.shape)
    is_causal = is_causal or (bounds is not None and _is_plain_causal(bounds))
    if bounds is None or _is_marked(bounds):
        documents: tuple[Tensor, ...] = ()
        if query.shape[2] == key.shape[2] and not _is_cross_attention(module, is_causal, kwargs):
            documents = _document_tensors(query, position_ids, cu_seq_lens_q, cu_seq_lens_k)
        if bounds is not None and bounds.shape[1] == _WITH_DOCUMENTS and cu_seq_lens_q is None:
            documents = ()
        layer = _Layer(query.shape[2], key.shape[2], is_causal, sliding_window or None, cu_seq_lens_q is not None)
        sources = documents if bounds is None else (bounds, *documents)
        build = functools.partial(_build_bounds, bounds, documents, layer, query.device)
        bounds = once_per_forward_pass(build, layer, sources)
    else:
        _refuse_router_losses(bounds, kwargs)
        if bounds.dtype == torch.bool or bounds.is_floating_point():
            _check_dense_mask(bounds, query, key)
            convert = functools.partial(from_dense_mask, bounds, query.shape[2])
            bounds = once_per_forward_pass(convert, "dense", (bounds,))
        _check_final_bounds(cast(Tensor, bounds), query, key)

    target_dtype = _target_dtype(module, query)
    if target_dtype != query.dtype:
        query, key, value = query.to(target_dtype), key.to(target_dtype), value.to(target_dtype)
    few_rows = query.shape[2] < key.shape[2] and query.shape[2] <= _FEW_ROWS and not torch.is_grad_enabled()
    is_small_mask = query.shape[2] == 1 if bounds is None else bounds.shape[1] == 1
    if few_rows and is_small_mask and softcap is None and s_aux is None and dropout == 0:
        output = _attend_few_rows(query, key, value, bounds, scaling)
    else:
        output = flashmask_attention(
            query,
            key,
            value,
            bounds,
            is_causal=bounds is None and is_causal,
            scale=scaling,
            softcap=softcap,
            sinks=s_aux,
            dropout_p=dropout,
            deterministic=bool(kwargs.get("deterministic")),
        )
    return output.transpose(1, 2).contiguous(), None


def _is_cross_attention(module: nn.Module, is_causal: bool, kwargs: dict[str, Any]) -> bool:
    """Whether keys come from elsewhere. `position_ids` then describe the queries only, even if the lengths agree."""
    return (
        kwargs.get("encoder_hidden_states") is not None
        or bool(getattr(module, "is_cross_attention", False))
        or "CrossAttention" in type(module).__name__
        or (bool(getattr(module, "is_decoder", False)) and not is_causal)
    )


def _target_dtype(module: nn.Module, query: Tensor) -> torch.dtype:
    """float32 queries are cast as Transformers casts them for FlashAttention.

    Under autocast to its dtype; otherwise to that of the layer's weights, which differs where norms stay in float32.
    """
    if query.dtype != torch.float32:
        return query.dtype
    if torch.is_autocast_enabled(query.device.type):
        return torch.get_autocast_dtype(query.device.type)
    if hasattr(getattr(module, "config", None), "_is_quantized"):
        return cast(torch.dtype, cast(Any, module).config.dtype)
    weights = (weight.dtype for weight in module.parameters() if weight.ndim == 2 and weight.is_floating_point())
    return next(weights, query.dtype)


_UNSUPPORTED_ARGUMENTS = {
    "position_bias": "a bias added to the scores",
    "indices": "keys selected for each query",
    "block_indices": "blocks of keys selected for each query",
    "sinks": "attention sinks in a form of the model's own",
    "cache": "the paged cache of continuous batching",
}


def _refuse_unsupported_arguments(module: nn.Module, kwargs: dict[str, Any]) -> None:
    for argument, meaning in _UNSUPPORTED_ARGUMENTS.items():
        if kwargs.get(argument) is not None:
            raise NotImplementedError(
                f'attn_implementation="flashmask" does not support `{argument}` ({meaning}), which '
                f"{type(module).__name__} passes; use another implementation for this model."
            )
    if kwargs.get("output_attentions"):
        logger.warning_once(
            'attn_implementation="flashmask" never computes the attention weights: `output_attentions=True` returns '
            'none of them. Use attn_implementation="eager" to get them.'
        )


def _refuse_router_losses(bounds: Tensor, kwargs: dict[str, Any]) -> None:
    """Models read the mask that they were called with as the weights of tokens in the losses of their routers."""
    if kwargs.get("output_router_logits") and not is_tracing(bounds) and bounds in _masks_of_users:
        raise NotImplementedError(
            "with bounds as `attention_mask`, `output_router_logits=True` would weigh tokens by the bounds in the "
            "auxiliary loss: set it to False, or let `position_ids` tell the documents apart instead"
        )


def _check_dense_mask(attention_mask: Tensor, query: Tensor, key: Tensor) -> None:
    batch, heads, q_len, _ = query.shape
    kv_len, shape = key.shape[2], attention_mask.shape
    fits = all(size in (1, expected) for size, expected in zip(shape, (batch, heads, q_len)))
    if attention_mask.ndim != 4 or not fits or shape[3] != kv_len:
        raise ValueError(
            f"`attention_mask` is a dense mask of shape {list(shape)}; expected [B or 1, H or 1, S_q or 1, S_k] with "
            f"B = {batch}, H = {heads}, S_q = {q_len} and S_k = {kv_len}"
        )
    if attention_mask.device != query.device:
        raise ValueError(
            f"`attention_mask` is on {attention_mask.device}, the queries are on {query.device}; move it there with "
            ".to()"
        )


def _check_final_bounds(attention_mask: Tensor, query: Tensor, key: Tensor) -> None:
    _bounds.check_bounds(
        attention_mask,
        name="attention_mask",
        batch=query.shape[0],
        heads=query.shape[1],
        kv_len=key.shape[2],
        device=query.device,
    )
