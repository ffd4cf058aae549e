"""Attention on the CPU by SDPA, where it is faster than the kernels in plain torch: rows that are short, and rows that
see most of their keys. Not where gradients are needed: there SDPA would carry NaN of one document into others. Nor in
training: reentrant checkpointing computes a layer without gradients first and then with them, which must be the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .. import bounds as _bounds
from .layer_mask import LayerMask
from .reading import may_be_read

__all__ = ["attend_dense_rows", "sees_most_keys"]

_MOST_PAIRS = 1 << 24
"""Of a dense mask, 64 MiB in float32."""
_TILE = 128
# SDPA computes all pairs of a row and a key. The kernels take so many times as long for each pair that they visit, and
# for a row as long as SDPA for so many keys. AMD EPYC, one thread, 8 heads of 64 in float32, a layer's forward in ms,
# kernels / SDPA: causal 11.7 / 8.8 at 512 tokens, 34 / 38 at 1K, 118 / 145 at 2K; a window of a quarter 9.4 / 8.9,
# 25 / 33, 73 / 135; four documents 6.8 / 7.8, 16 / 34, 49 / 135.
_TIMES_A_PAIR, _KEYS_A_ROW = 1.6, 256


def sees_most_keys(query: Tensor, key: Tensor, value: Tensor, mask: LayerMask) -> bool:
    """Whether `attend_dense_rows` computes this call in less time, unless it has what SDPA has not."""
    if (
        query.device.type != "cpu"
        or not may_be_read(query)
        or _is_for_an_operator()
        or not _sdpa_takes(query, key, value)
    ):
        return False
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value)):
        return False
    q_len, kv_len, bounds = query.shape[2], key.shape[2], mask.bounds
    if bounds is None:
        return not mask.is_causal or q_len == kv_len
    if bounds.shape[1] != 1 or not 0 < bounds.shape[0] * q_len * kv_len <= _MOST_PAIRS:
        return False
    if kv_len <= _KEYS_A_ROW:
        return True

    def visited() -> float:
        return float((_bounds.tile_occupancy(bounds, q_len, tile_size=_TILE) > 0).float().mean())

    return _TIMES_A_PAIR * mask.once(("visited",), visited) * kv_len + _KEYS_A_ROW >= kv_len


def _is_for_an_operator() -> bool:
    """Whether `torch.func` transforms the call, so that no value can be read, or a mode, such as one that counts FLOPs,
    is to see attention.
    """
    return torch._C._are_functorch_transforms_active() or _get_current_dispatch_mode() is not None


def _sdpa_takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether SDPA takes them as they are. The kernels take values of another size too, and say what is wrong."""
    batch, heads, _, dim = query.shape
    kv_heads, kv_len = key.shape[1:3]
    is_alike = query.dtype == key.dtype == value.dtype
    return is_alike and key.shape == value.shape == (batch, kv_heads, kv_len, dim) and heads % kv_heads == 0


def attend_dense_rows(
    query: Tensor, key: Tensor, value: Tensor, mask: LayerMask, scaling: float | None
) -> Tensor | None:
    """Attention `[B, H, S_q, D_v]`, or None where NaN is in it, which may be that of a hidden key."""
    attend = nn.functional.scaled_dot_product_attention
    bounds, q_len, is_grouped = mask.bounds, query.shape[2], query.shape[1] != key.shape[1]
    if bounds is None:
        output = attend(query, key, value, is_causal=mask.is_causal, scale=scaling, enable_gqa=is_grouped)
        return None if bool(output.isnan().any()) else output

    def dense() -> tuple[Tensor, Tensor | None]:
        """What SDPA adds to the scores, and the rows that see nothing, if there are any. Those see everything instead,
        and their output is 0.
        """
        visible = _bounds.to_dense(bounds, q_len)
        sees_nothing = ~visible.any(-1, keepdim=True)
        added = torch.zeros(visible.shape, dtype=query.dtype).masked_fill_(~(visible | sees_nothing), float("-inf"))
        return added, sees_nothing if bool(sees_nothing.any()) else None

    added, sees_nothing = mask.once(("dense", query.dtype), dense)
    output = attend(query, key, value, attn_mask=added, scale=scaling, enable_gqa=is_grouped)
    if sees_nothing is not None:
        output = output.masked_fill(sees_nothing, 0.0)
    return None if bool(output.isnan().any()) else output
