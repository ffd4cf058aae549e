"""The attention function: one layer's call of the kernels."""

from __future__ import annotations

import contextlib
import functools
import os
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.profiler import record_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from flashmask_kernels import flashmask_attention

from .adapters import refuse_adapters_that_see_rows
from .decoding import are_few_rows, attend_few_rows
from .dense_rows import attend_dense_rows, sees_most_keys
from .documents import documents_of_cross_attention, documents_of_layer
from .engines import refuse_cut_call, refuse_dropped_mask, refuse_gathered_tokens, refuse_ring
from .inspection import note_mask_of_layer
from .layer_mask import layer_mask
from .mask import Mask
from .name import NAME, logger
from .query_scale import scale_by_document, scales_by_column
from .refused_documents import refuse_ids_as_weights
from .whole_sequence import check_tokens_of_rank, refuse_part_alone, stand_in_for_whole_sequence

__all__ = ["RANGE_OF_SDPA", "flashmask_attention_forward"]

RANGE_OF_SDPA = "flashmask_attention by SDPA"
"""What SDPA computes of flashmask goes by this name in torch's profiler, beside the SDPA of other layers."""


def flashmask_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Mask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    kept_mask: Mask | None = None,
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
        cu_seq_lens_q, cu_seq_lens_k: `[documents + 1]`, cumulative lengths of one packed row. Without a `Mask`, and
            beside a cache, they go before `position_ids`; else documents are apart by either.
        kept_mask: the mask that an engine has dropped from `attention_mask`, see `keep_masks`.

    Returns:
        output `[B, S_q, H, D_v]`, and None for the attention weights, which are never computed.

    Raises:
        NotImplementedError, TypeError, ValueError: for whatever would otherwise change the result silently.
    """
    attention_mask = kept_mask if attention_mask is None else attention_mask
    exchange = attention_mask.exchange if isinstance(attention_mask, Mask) else None
    _refuse_unsupported_arguments(module, kwargs)
    refuse_ring()
    if isinstance(attention_mask, Mask) and kwargs.get("output_router_logits"):
        _refuse_router_losses(attention_mask, module)
    of_user = _mask_of_user(attention_mask)
    sinks_of_layer = s_aux if exchange is None else None  # an exchange takes those of its heads
    refuse_cut_call(module, query, of_user, cu_seq_lens_q, sinks_of_layer)
    is_causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if exchange is None:
        refuse_part_alone(module)
        if isinstance(attention_mask, Mask):
            refuse_gathered_tokens(attention_mask, module, query, key)
        is_cross = _is_cross_attention(module, is_causal, kwargs)
        if is_cross:
            documents = documents_of_cross_attention(
                module, query, key, of_user is not None, cu_seq_lens_q, cu_seq_lens_k
            )
        else:
            documents = documents_of_layer(query, position_ids, cu_seq_lens_q, cu_seq_lens_k, attention_mask)
        refuse_adapters_that_see_rows(module, query, attention_mask, documents)
        of_queries, of_keys = query, key
        # Whether an engine has put a function of its own in the place of this one.
        is_wrapped = attention_mask is None and ALL_ATTENTION_FUNCTIONS[NAME] is not flashmask_attention_forward
        if is_wrapped and not is_cross:
            refuse_dropped_mask(module, query, documents, is_causal=is_causal, sliding_window=sliding_window or None)
    else:  # the mask was made of the documents of the whole sequence; the layer is told about its own tokens
        check_tokens_of_rank(exchange, query, key)
        documents, of_queries, of_keys = (
            None,
            stand_in_for_whole_sequence(query, exchange),
            stand_in_for_whole_sequence(key, exchange),
        )
    mask = layer_mask(
        attention_mask,
        module,
        of_queries,
        of_keys,
        documents,
        is_causal=is_causal,
        sliding_window=sliding_window or None,
    )
    if exchange is None and scales_by_column(module):
        query = scale_by_document(module, query, attention_mask, documents, mask)
    if not torch.compiler.is_compiling():
        note_mask_of_layer(module, of_queries, of_keys, mask)
    target_dtype = _target_dtype(module, query)
    if target_dtype != query.dtype:
        query, key, value = query.to(target_dtype), key.to(target_dtype), value.to(target_dtype)
    if exchange is not None:
        mask = exchange.mask_of_rank(mask, of_queries.shape[1])
        query, key, value, s_aux = exchange.bring(query, key, value, s_aux)
    if scaling is not None and scaling < 0:  # the kernels refuse it, and SDPA on the CPU turns what it hides into NaN
        query, scaling = -query, -scaling
    output: Tensor | None = None
    may_be_sdpa = softcap is None and s_aux is None and dropout == 0 and not _layer_may_have_tangents()
    if may_be_sdpa and are_few_rows(query, key, value, mask):
        with _name_sdpa_for_profilers():
            output = attend_few_rows(query, key, value, mask, scaling)
    elif may_be_sdpa and not module.training and sees_most_keys(query, key, value, mask):
        with _name_sdpa_for_profilers():
            output = attend_dense_rows(query, key, value, mask, scaling)
    if output is None:
        output = flashmask_attention(
            query,
            key,
            value,
            mask.bounds,
            is_causal=mask.is_causal,
            scale=scaling,
            softcap=softcap,
            sinks=s_aux,
            dropout_p=dropout,
            deterministic=asks_for_determinism(kwargs.get("deterministic")),
            schedules=mask.schedules,
        )
    if exchange is not None:
        output = exchange.take_back(output)
    return output.transpose(1, 2).contiguous(), None


def asks_for_determinism(argument: bool | None = None) -> bool:
    """Whether gradients must be bitwise repeatable. As Transformers decides for FlashAttention: by the argument of the
    call, or else by the environment.
    """
    return os.getenv("FLASH_ATTENTION_DETERMINISTIC", "0") == "1" if argument is None else argument


def _is_cross_attention(module: nn.Module, is_causal: bool, kwargs: dict[str, Any]) -> bool:
    """Whether keys come from elsewhere. `position_ids` then describe the queries only, even if the lengths agree."""
    return (
        kwargs.get("encoder_hidden_states") is not None
        or bool(getattr(module, "is_cross_attention", False))
        or "CrossAttention" in type(module).__name__
        or (bool(getattr(module, "is_decoder", False)) and not is_causal)
    )


def _layer_may_have_tangents() -> bool:
    """Whether this is in forward mode, which SDPA and the kernels refuse: the latter say what to do."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def _name_sdpa_for_profilers() -> contextlib.AbstractContextManager[Any]:
    """A name costs microseconds, which only a profiler that runs is to pay. Compiled graphs have none."""
    is_profiled = not torch.compiler.is_compiling() and torch.autograd._profiler_enabled()
    return record_function(RANGE_OF_SDPA) if is_profiled else contextlib.nullcontext()


def _mask_of_user(mask: Mask | Tensor | None) -> Tensor | None:
    """A tensor reaches a layer past the mask function: a user's dict of bounds, or a model's own mask."""
    if isinstance(mask, Mask):
        return mask.bounds if mask.is_users else None
    return mask


def _target_dtype(module: nn.Module, query: Tensor) -> torch.dtype:
    """float32 queries are cast as Transformers casts them for FlashAttention.

    Under autocast to its dtype; otherwise to that of the layer's weights, which differs where norms stay in float32.
    """
    if query.dtype != torch.float32:
        return query.dtype
    if not query.is_meta and torch.is_autocast_enabled(query.device.type):
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


def _refuse_router_losses(mask: Mask, module: nn.Module) -> None:
    """Models read the mask that they were called with as the weights of tokens in the losses of their routers."""
    if mask.is_users:
        raise NotImplementedError(
            "with bounds as `attention_mask`, `output_router_logits=True` would weigh tokens by the bounds in the "
            "auxiliary loss: set it to False, or let `position_ids` tell the documents apart instead"
        )
    if mask.document_ids is not None:
        refuse = functools.partial(refuse_ids_as_weights, mask.document_ids)
        mask.memo.get("weights of tokens", (), module, refuse, mask.device)
