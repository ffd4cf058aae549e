"""Packed documents: bounds from document ids, position ids, cumulative lengths."""

from __future__ import annotations

import torch
from torch import Tensor

from .form import (
    FAR,
    Offset,
    check_int_tensor,
    check_lengths,
    check_per_position,
    from_runs,
    previous,
    resolve_call,
    run_ends,
    stack_planes,
)


def from_document_ids(
    document_ids: Tensor,
    *,
    q_len: int | None = None,
    kv_len: int | None = None,
    is_causal: bool = True,
    q_offset: Offset | None = None,
    kv_offset: Offset = 0,
) -> Tensor:
    """Packed documents from one id for each position: a query sees the keys of its own document.

    A document is a run of *adjacent* equal ids; the same id further on is another document (`from_dense` takes what
    is not made of runs). Positions with a negative id are padding, hidden from every query.

    Args:
        document_ids: integers `[B, S]` or `[S]`, for the positions 0 to S - 1 of the sequence. Keys past them (the
            unused slots of a static cache) are hidden. `q_len` and `kv_len` default to S, `q_offset` to S - q_len.

    Returns:
        `[B, 1, C, S_k]`, C = 1 when causal and aligned at the bottom right, else 2.
    """
    document_ids = check_per_position("document_ids", document_ids)
    ends = run_ends(document_ids != previous(document_ids))
    call = resolve_call(document_ids.shape[-1], q_len, kv_len, q_offset, kv_offset)
    return from_runs(ends, document_ids < 0, call, is_causal)


def from_position_ids(
    position_ids: Tensor,
    *,
    q_len: int | None = None,
    kv_len: int | None = None,
    is_causal: bool = True,
    q_offset: Offset | None = None,
    kv_offset: Offset = 0,
) -> Tensor:
    """Packed documents from position ids: a document starts wherever the position does not increase.

    That finds every restart, whatever number documents start from (RoBERTa's start at 2), and keeps a document with
    gaps in its positions (PoSE) in one piece. Padding whose positions are all 0 becomes documents of one token.
    The position ids of a prefix tree restart at every branch and must not be read as documents.

    Args:
        position_ids: integers `[B, S]` or `[S]`, for the positions 0 to S - 1 of the sequence. Keys past them (the
            unused slots of a static cache) are hidden. `q_len` and `kv_len` default to S, `q_offset` to S - q_len.

    Returns:
        `[B, 1, C, S_k]`, C = 1 when causal and aligned at the bottom right, else 2.
    """
    ends = document_ends(position_ids)
    call = resolve_call(ends.shape[-1], q_len, kv_len, q_offset, kv_offset)
    return from_runs(ends, None, call, is_causal)


def document_ends(position_ids: Tensor, is_token: Tensor | None = None) -> Tensor:
    """Where the document of each position ends, its last position + 1: int32 `[B, S]`, the LTS of `from_position_ids`.

    Args:
        position_ids: integers `[B or 1, S]` or `[S]`, below 2^30. A document starts wherever they do not increase.
        is_token: bool `[B, S]`, False for padding. Padding starts no document, and belongs to the one before it.
    """
    position_ids = check_per_position("position_ids", position_ids)
    if is_token is None:
        return run_ends(position_ids <= previous(position_ids))
    # Tokens come before all padding. Each position is compared with the last token before it; before the first token
    # that is padding, so that a document starts there.
    position_ids = torch.add(position_ids, is_token, alpha=-FAR)
    tokens = is_token.cumsum(-1, dtype=torch.int32).contiguous()
    last_token = torch.searchsorted(tokens, tokens).expand_as(position_ids)
    return run_ends(position_ids <= previous(position_ids.gather(1, last_token)))


def document_starts(document_ends: Tensor) -> Tensor:
    """Where the document of each position starts: int32 `[B, S]`, from `document_ends`."""
    return torch.searchsorted(document_ends, document_ends, out_int32=True)


def from_document_ends(document_ends: Tensor, *, is_causal: bool = True) -> Tensor:
    """Packed documents from what `bounds.document_ends` found.

    Args:
        document_ends: int32 `[B or 1, S]`, S_q = S_k = S.

    Returns:
        `[B or 1, 1, C, S]`, C = 1 when causal, else 2.
    """
    if is_causal:
        return document_ends[:, None, None].contiguous()
    return torch.stack([document_ends, document_starts(document_ends)], dim=1)[:, None]


def from_cu_seqlens(
    cu_seqlens_q: Tensor,
    q_len: int,
    *,
    cu_seqlens_k: Tensor | None = None,
    kv_len: int | None = None,
    is_causal: bool = True,
) -> Tensor:
    """Packed documents from cumulative lengths, as FlashAttention's varlen functions take them.

    Args:
        cu_seqlens_q: integers `[n + 1]`, from 0 on, not decreasing. Document `d` has the rows
            `cu_seqlens_q[d] <= i < cu_seqlens_q[d + 1]`. Empty documents are legal. Keys past the last document are
            hidden, and rows past it see nothing.
        q_len: number of rows, a Python int so that nothing is read from the device.
        cu_seqlens_k: the same for the keys when they differ (cross-attention); document `d` of the queries then sees
            document `d` of the keys, its causal triangle aligned at the bottom right.
        kv_len: number of keys, `q_len` by default.

    Returns:
        `[1, 1, C, S_k]`, C = 1 when causal with the same lengths for queries and keys, else 2.
    """
    kv_len = q_len if kv_len is None else kv_len
    check_lengths(q_len, kv_len)
    check_int_tensor("cu_seqlens_q", cu_seqlens_q, (1,), "[n + 1]")
    if cu_seqlens_q.shape[0] < 1:
        raise ValueError("`cu_seqlens_q` must hold at least the leading 0, got an empty tensor")
    if cu_seqlens_k is not None:
        check_int_tensor("cu_seqlens_k", cu_seqlens_k, (1,), "[n + 1]")
        if cu_seqlens_k.shape != cu_seqlens_q.shape:
            raise ValueError(
                "`cu_seqlens_q` and `cu_seqlens_k` must describe the same number of documents, got "
                f"{cu_seqlens_q.shape[0] - 1} and {cu_seqlens_k.shape[0] - 1}"
            )
    rows = cu_seqlens_q.to(torch.int32)
    keys = rows if cu_seqlens_k is None else cu_seqlens_k.to(torch.int32)
    key = torch.arange(kv_len, dtype=torch.int32, device=rows.device)
    document_end = torch.searchsorted(keys, key, right=True)  # int64: an index of int32 would be converted to it
    # Keys past the last document end where the first one starts: nothing sees them.
    lts = torch.cat([rows, rows[:1]])[document_end]
    if is_causal and cu_seqlens_k is None and kv_len == q_len:
        return stack_planes(lts, None, q_len)
    ute = torch.cat([rows[:1], rows])[document_end]
    if is_causal:
        ute = torch.maximum(ute, key + torch.cat([rows - keys, rows[:1]])[document_end])
    return stack_planes(lts, ute, q_len)
