"""Attention of few rows against a cache."""

from __future__ import annotations

import functools
from typing import cast

import torch
from torch import Tensor, nn

from .. import bounds as _bounds
from .memo import once_per_forward_pass

_FEW_ROWS = 16
"""Up to this many queries against a cache, a dense mask is small, and SDPA no slower than a kernel for it."""


def _attend_few_rows(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor | None, scaling: float | None) -> Tensor:
    """A decoding step, `[B, H, S_q, D_v]`.

    Without bounds there is one row, the last one, which sees every key. With a mask or large heads, no fast backend of
    SDPA lets heads share keys: query heads that share a key head become rows, so that no key is copied.
    """
    attend = functools.partial(nn.functional.scaled_dot_product_attention, scale=scaling)
    kv_heads, group, q_len = key.shape[1], query.shape[1] // key.shape[1], query.shape[2]
    if bounds is None and query.shape[-1] == value.shape[-1] <= 256:
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

    visible = cast(Tensor, once_per_forward_pass(dense, ("visible", q_len, group), (bounds,)))
    mask = once_per_forward_pass(additive, ("additive", query.dtype), (visible,))
    output = attend(rows, key, value, attn_mask=mask)
    # A row that sees nothing is 0 everywhere else too; backends of SDPA differ about it.
    sees_nothing = once_per_forward_pass(lambda: ~visible.any(-1, keepdim=True), "sees_nothing", (visible,))
    output = output.masked_fill(cast(Tensor, sees_nothing), 0.0)
    return output.unflatten(2, (group, q_len)).flatten(1, 2)
