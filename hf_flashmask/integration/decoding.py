"""Attention of few rows against a cache, as in a step of generation, where SDPA is as fast as a kernel for it: without
a mask, and on the CPU with a small dense one. On a GPU the kernels split the keys, and read only those that are seen.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from .. import bounds as _bounds
from .layer_mask import LayerMask

__all__ = ["are_few_rows", "attend_few_rows"]

_FEW_ROWS = 16
"""Up to this many queries against a cache, a dense mask is small."""


def are_few_rows(query: Tensor, key: Tensor, value: Tensor, mask: LayerMask) -> bool:
    """Whether `attend_few_rows` computes this call, unless it has what SDPA has not."""
    q_len = query.shape[2]
    if q_len >= key.shape[2] or q_len > _FEW_ROWS or torch.is_grad_enabled():
        return False
    if query.is_cuda and query.element_size() == 2 and not _needs_no_mask(query, value, mask):
        return False
    return q_len == 1 if mask.bounds is None else mask.bounds.shape[1] == 1


def _needs_no_mask(query: Tensor, value: Tensor, mask: LayerMask) -> bool:
    """Whether fast backends of SDPA take the call as it is."""
    return mask.bounds is None and query.shape[-1] == value.shape[-1] <= 256


def attend_few_rows(query: Tensor, key: Tensor, value: Tensor, mask: LayerMask, scaling: float | None) -> Tensor:
    """A decoding step, `[B, H, S_q, D_v]`.

    Without bounds there is one row, the last one, which sees every key. With a mask or large heads, SDPA copies keys
    that heads share: query heads that share a key head become rows.
    """
    attend = functools.partial(nn.functional.scaled_dot_product_attention, scale=scaling)
    kv_heads, group, q_len = key.shape[1], query.shape[1] // key.shape[1], query.shape[2]
    bounds = mask.bounds
    if _needs_no_mask(query, value, mask):
        return attend(query, key, value, enable_gqa=group > 1)
    rows = query.unflatten(1, (kv_heads, group)).flatten(2, 3)
    if bounds is None:
        return attend(rows, key, value).unflatten(2, (group, q_len)).flatten(1, 2)

    def dense() -> Tensor:
        visible = _bounds.to_dense(bounds, q_len)
        return visible.repeat(1, 1, group, 1) if q_len > 1 else visible

    def additive() -> Tensor:
        # As SDPA would make it of `visible` in every layer: its fast backend asks for rows of whole 16 elements.
        shape = *visible.shape[:-1], -(-visible.shape[-1] // 16) * 16
        padded = torch.zeros(shape, dtype=query.dtype, device=query.device)
        return padded[..., : visible.shape[-1]].masked_fill_(~visible, float("-inf"))

    visible = mask.once(("visible", group), dense)
    output = attend(rows, key, value, attn_mask=mask.once(("additive", group, query.dtype), additive))
    # A row that sees nothing is 0 everywhere else too; backends of SDPA differ about it.
    sees_nothing = mask.once(("sees nothing", group), lambda: ~visible.any(-1, keepdim=True))
    return output.masked_fill(sees_nothing, 0.0).unflatten(2, (group, q_len)).flatten(1, 2)
