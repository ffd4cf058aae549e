"""The implementations that the benchmarks compare: how each one makes a mask, and the function that it calls."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from masks import Mask, Varlen
from measurement import build_schedules
from row_intervals import visible_key_intervals
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from flashmask_kernels import Schedules, flashmask_attention
from hf_flashmask.bounds import to_dense

LONGEST_DENSE_MASK = 32768


class Case(NamedTuple):
    """One mask on one shape. There are `length` queries and `kv_length` keys, as many by default."""

    mask: Mask
    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"
    kv_length: int | None = None

    @property
    def keys(self) -> int:
        return self.length if self.kv_length is None else self.kv_length


class Attention(NamedTuple):
    """How to build the mask, once for all layers of a step, and what a layer calls with query, key, value and it.

    ``build`` is None where there is nothing to build.
    """

    build: Callable[[], Any] | None
    attend: Callable[[Tensor, Tensor, Tensor, Any], Tensor]


def flashmask(case: Case, *, deterministic: bool = False) -> Attention:
    element = torch.empty(1, dtype=case.dtype, device=case.device)
    query = element.expand(case.batch, case.heads, case.length, case.head_dim)
    value = element.expand(case.batch, case.kv_heads, case.keys, case.head_dim)

    def build() -> Schedules:
        """Bounds, and the schedules that the kernels make of them: all of it once a step."""
        return build_schedules(case.mask.bounds(), query, value, deterministic=deterministic)

    def attend(query: Tensor, key: Tensor, value: Tensor, schedules: Schedules) -> Tensor:
        bounds = schedules.bounds
        return flashmask_attention(query, key, value, bounds, deterministic=deterministic, schedules=schedules)

    return Attention(build, attend)


def flex(case: Case, kernel_options: Any = None) -> Attention:
    compiled = torch.compile(flex_attention, dynamic=False)
    grouped = case.heads != case.kv_heads

    def attend(query: Tensor, key: Tensor, value: Tensor, block_mask: Any) -> Tensor:
        return compiled(query, key, value, block_mask=block_mask, enable_gqa=grouped, kernel_options=kernel_options)

    mask_mod = case.mask.mask_mod
    if mask_mod is None:
        return Attention(None, attend)
    return Attention(
        lambda: create_block_mask(mask_mod, None, None, case.length, case.keys, case.device, _compile=True), attend
    )


def flex_small_tiles(case: Case) -> Attention | None:
    """With a smaller forward tile. The default for small heads spills registers under some masks."""
    tile = {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64, "fwd_num_warps": 4, "fwd_num_stages": 3}
    return flex(case, tile) if case.head_dim <= 64 else None


def sdpa_dense(case: Case) -> Attention | None:
    if max(case.length, case.keys) > LONGEST_DENSE_MASK:
        return None

    def attend(query: Tensor, key: Tensor, value: Tensor, dense: Tensor) -> Tensor:
        grouped = case.heads != case.kv_heads
        return scaled_dot_product_attention(query, key, value, attn_mask=dense, enable_gqa=grouped)

    return Attention(lambda: to_dense(case.mask.bounds(), case.length), attend)


def cudnn(case: Case) -> Attention | None:
    varlen = case.mask.varlen
    if varlen is None or len(varlen.lengths) > 1 or varlen.window is not None:
        return None

    def attend(query: Tensor, key: Tensor, value: Tensor, _: None) -> Tensor:
        grouped = case.heads != case.kv_heads
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(query, key, value, is_causal=varlen.is_causal, enable_gqa=grouped)

    return Attention(None, attend)


def cudnn_flex(case: Case, *, deterministic: bool = False) -> Attention | None:
    """cuDNN Frontend's `flex_attention`, in CuTe DSL. The table of visible keys is given, its plan is built."""
    table = visible_key_intervals(case.mask.bounds(), case.length)
    if table is None or table.shape[1] not in (1, case.heads):
        return None
    table = table.expand(case.batch, -1, -1, -1).permute(1, 2, 0, 3).flatten(2).contiguous()  # [H or 1, n, B * S_q]
    row = torch.empty(case.head_dim, dtype=case.dtype, device=case.device)
    query = row.expand(case.batch, case.length, case.heads, case.head_dim)
    key = row.expand(case.batch, case.keys, case.kv_heads, case.head_dim)

    def build() -> Any:
        create_mask_plan = import_module("cudnn.flex_attention").create_mask_plan
        return create_mask_plan(table, query, key, key, build_backward=True)

    def attend(query: Tensor, key: Tensor, value: Tensor, plan: Any) -> Tensor:
        q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
        flex_attn_func = import_module("cudnn.flex_attention").flex_attn_func
        return flex_attn_func(q, k, v, mask_plan=plan, deterministic=deterministic).transpose(1, 2)

    return Attention(build, attend)


def varlen(case: Case, function: Callable[[Tensor, Tensor, Tensor, Tensor, Varlen], Tensor]) -> Attention | None:
    """Rows as one packed row, if the kernel can express the mask. The cumulative lengths are given, not built."""
    mask = case.mask.varlen
    if mask is None:
        return None
    ends = torch.tensor([0, *accumulate(mask.lengths * case.batch)], dtype=torch.int32, device=case.device)
    return Attention(None, lambda query, key, value, _: function(query, key, value, ends, mask))


def flash_attention_2(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, mask: Varlen) -> Tensor:
    """torch's own FlashAttention-2 over ``[B, H, S, D]``; ``ends`` are cumulative lengths of all rows together."""
    longest = max(mask.lengths)
    window = {} if mask.window is None else {"window_size_left": mask.window - 1, "window_size_right": 0}
    q, k, v = (_packed(tensor) for tensor in (query, key, value))
    attend = torch.ops.aten._flash_attention_forward
    out = attend(q, k, v, ends, ends, longest, longest, 0.0, mask.is_causal, False, **window)[0]
    return out.unflatten(0, (query.shape[0], -1)).transpose(1, 2)


def flash_attention_4(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, mask: Varlen) -> Tensor:
    """Like `flash_attention_2`, in CuTe DSL."""
    out = import_module("flash_attn.cute").flash_attn_varlen_func(
        _packed(query),
        _packed(key),
        _packed(value),
        cu_seqlens_q=ends,
        cu_seqlens_k=ends,
        max_seqlen_q=max(mask.lengths),
        max_seqlen_k=max(mask.lengths),
        causal=mask.is_causal,
        window_size=(None, None) if mask.window is None else (mask.window - 1, 0),
    )
    out = out[0] if isinstance(out, tuple) else out
    return out.unflatten(0, (query.shape[0], -1)).transpose(1, 2)


def _packed(tensor: Tensor) -> Tensor:
    """`[B, H, S, D]` as `[B * S, H, D]`, a view of what models make."""
    return tensor.transpose(1, 2).flatten(0, 1)


# A peer that cannot express a mask returns None and gets no entry.
PEERS: dict[str, Callable[[Case], Attention | None]] = {
    "flashmask": flashmask,
    "flashmask, deterministic": lambda case: flashmask(case, deterministic=True),
    "flex_attention": flex,
    "flex_attention, 64 x 64": flex_small_tiles,
    "flex_attention on FA4": lambda case: flex(case, {"BACKEND": "FLASH"}),
    "FA2 varlen": lambda case: varlen(case, flash_attention_2),
    "FA4 varlen": lambda case: varlen(case, flash_attention_4),
    "cuDNN": cudnn,
    "cuDNN flex_attention": cudnn_flex,
    "cuDNN flex_attention, deterministic": lambda case: cudnn_flex(case, deterministic=True),
    "sdpa, dense mask": sdpa_dense,
}


# The modules that peers import beside torch, with the packages that have them.
NEEDED = {
    "flex_attention on FA4": ("flash_attn.cute", "flash-attn-4"),
    "FA4 varlen": ("flash_attn.cute", "flash-attn-4"),
    "cuDNN flex_attention": ("cudnn.flex_attention", "nvidia-cudnn-frontend"),
    "cuDNN flex_attention, deterministic": ("cudnn.flex_attention", "nvidia-cudnn-frontend"),
}


def missing_peers() -> dict[str, str]:
    """Peers that are not installed, and what is missing."""
    return {
        peer: f"{module} ({package}) is not installed"
        for peer, (module, package) in NEEDED.items()
        if find_spec(module.partition(".")[0]) is None or find_spec(module) is None
    }
