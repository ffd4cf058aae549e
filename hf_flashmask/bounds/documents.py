"""Packed documents: bounds from document ids, position ids, cumulative lengths."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .form import (
    FAR,
    Offset,
    check_int_tensor,
    check_per_position,
    check_q_len_and_kv_len,
    default_lengths_and_offsets,
    is_triangle_at_bottom_right,
    own_rows_of_keys,
    previous_values,
    run_edges_at_keys,
    run_ends,
    run_numbers,
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

    A document is a run of *adjacent* equal ids. The same id further on is another document (`from_dense` takes masks
    that are not made of runs). Positions with a negative id are padding, hidden from every query.

    Args:
        document_ids: integers `[B, S]` or `[S]`, for the positions 0 to S - 1 of the sequence. Keys past them (the
            unused slots of a static cache) are hidden. `q_len` and `kv_len` default to S, `q_offset` to S - q_len.

    Returns:
        int32 `[B, 1, C, S_k]`, C = 1 when causal and aligned at the bottom right, else 2.

    Raises:
        TypeError: when `document_ids` is not an integer tensor.
        ValueError: when it is neither `[B, S]` nor `[S]`.

    >>> from_document_ids(torch.tensor([0, 0, 0, 1, 1, -1])).tolist()
    [[[[3, 3, 3, 5, 5, 0]]]]
    """
    document_ids = check_per_position("document_ids", document_ids)
    ends = run_ends(run_numbers(torch.ne, document_ids, previous_values(document_ids)))
    call = default_lengths_and_offsets(document_ids.shape[-1], q_len, kv_len, q_offset, kv_offset)
    return _from_runs(ends, document_ids < 0, call, is_causal)


def from_position_ids(
    position_ids: Tensor,
    *,
    q_len: int | None = None,
    kv_len: int | None = None,
    is_causal: bool = True,
    q_offset: Offset | None = None,
    kv_offset: Offset = 0,
) -> Tensor:
    """Packed documents from position ids, by the rule of `document_ends`.

    The rule finds every restart, whatever number documents start from (RoBERTa's start at 2). It keeps a document in
    one piece when its positions have gaps (PoSE) or repeat (Self-Extend). Padding whose positions are all 0 becomes
    documents of one token. The position ids of a prefix tree restart at every branch and must not be read as documents.

    Args:
        position_ids: integers or floats `[B, S]` or `[S]`, for the positions 0 to S - 1 of the sequence. Keys past them
            (the unused slots of a static cache) are hidden. `q_len` and `kv_len` default to S, `q_offset` to S - q_len.

    Returns:
        int32 `[B, 1, C, S_k]`, C = 1 when causal and aligned at the bottom right, else 2.

    Raises:
        TypeError: when `position_ids` is not a tensor of numbers.
        ValueError: when it is neither `[B, S]` nor `[S]`.

    >>> from_position_ids(torch.tensor([0, 1, 2, 0, 1])).tolist()
    [[[[3, 3, 3, 5, 5]]]]
    """
    ends = document_ends(position_ids)
    call = default_lengths_and_offsets(ends.shape[-1], q_len, kv_len, q_offset, kv_offset)
    return _from_runs(ends, None, call, is_causal)


def document_ends(position_ids: Tensor, is_token: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
    """Past-the-last position of each position's document, the LTS of `from_position_ids`.

    Positions that do not decrease form a run. A document starts at every position of a run that equals its first one,
    so that leading repeats are documents of one token each, and a later repeat belongs to the document it is in:

    | position ids       | documents            |
    |--------------------|----------------------|
    | `0 1 2 0 1`        | `0 1 2`, `0 1`       |
    | `0 0 1 2 0 1`      | `0`, `0 1 2`, `0 1`  |
    | `0 1 1 2 2 3`      | one                  |
    | `0 0 1 1 2 2`      | `0`, `0 1 1 2 2`     |

    In the last row, positions that count pairs (Self-Extend) look like a document of one token before another one.
    Transformers' FlashAttention path decides the same. A document that starts at or above the last position of the one
    before it is found only if that one is a single token at the same position, and starts a run. For such documents use
    `from_document_ids` or `from_cu_seqlens`.

    Args:
        position_ids: integers below 2^30, or floats, `[B or 1, S]` or `[S]`.
        is_token: bool `[B, S]`, False for padding. Padding starts no document, and belongs to the one before it.
        document_ids: numbers `[B, S]`, beside `is_token`: a document also starts at a token whose id is not that of the
            token before it, as in `document_ends_of_mask`.

    Returns:
        int32 `[B, S]`.

    Raises:
        TypeError: when `position_ids` is not a tensor of numbers.
        ValueError: when it is neither `[B, S]` nor `[S]`.

    >>> document_ends(torch.tensor([0, 0, 1, 2, 0, 1])).tolist()
    [[1, 4, 4, 4, 6, 6]]
    """
    position_ids = check_per_position("position_ids", position_ids)
    of_token, ids = position_ids, None
    if is_token is not None:
        # Tokens get smaller numbers than all padding, which takes the number of the last token before it. Padding
        # before the first token keeps a larger one, so that a document starts at that token.
        if position_ids.is_floating_point():
            position_ids = torch.where(is_token, position_ids, torch.inf)
        else:
            if position_ids.element_size() < 4:  # too small for such numbers
                position_ids = position_ids.to(torch.int32)
            position_ids = torch.add(position_ids, is_token, alpha=-FAR)
        last = _last_token_up_to_each(is_token)
        of_token = position_ids.gather(1, last.expand_as(position_ids))
        if document_ids is not None:
            ids = document_ids.gather(1, last)
    runs = run_numbers(torch.lt, of_token, previous_values(of_token))
    first_of_run = of_token.gather(1, torch.searchsorted(runs, runs))

    def is_start(positions: Tensor, first: Tensor, out: Tensor) -> Tensor:
        torch.eq(positions, first, out=out)
        if ids is not None:
            out[:, 1:].logical_or_(ids[:, 1:] != ids[:, :-1])
        return out

    # On the left side padding has its own number, which no token has: it starts no document.
    return run_ends(run_numbers(is_start, position_ids, first_of_run))


def document_ends_of_mask(attention_mask: Tensor, is_token: Tensor | None = None) -> Tensor:
    """Past-the-last position of each position's document, by the values of a 2-D mask that holds document ids.

    A document starts at a token whose value is not that of the token before it. Padding belongs to the document before
    it, and before the first token to the first one: a mask of 0 and 1 is one document.

    Args:
        attention_mask: numbers `[B, S]`, 0 for padding.
        is_token: bool `[B, S]`, where the mask is not 0, if that is known.

    Returns:
        int32 `[B, S]`.

    Raises:
        TypeError: when `attention_mask` is not a tensor of numbers.
        ValueError: when it is not `[B, S]`.

    >>> document_ends_of_mask(torch.tensor([[0, 1, 1, 2, 0, 2, 3, 0]])).tolist()
    [[3, 3, 3, 6, 6, 6, 8, 8]]
    """
    check_int_tensor("attention_mask", attention_mask, (2,), "[B, S]", allow_bool=True, allow_float=True)
    ids = attention_mask.gather(1, _last_token_up_to_each(attention_mask != 0 if is_token is None else is_token))

    def is_start(ids: Tensor, before: Tensor, out: Tensor) -> Tensor:
        return torch.ne(ids, before, out=out).logical_and_(before)  # before the first token ids are 0

    return run_ends(run_numbers(is_start, ids, previous_values(ids)))


def _last_token_up_to_each(is_token: Tensor) -> Tensor:
    """The place of the last token up to each position, 0 where there is none, `[B, S]`."""
    tokens = is_token.cumsum(-1, dtype=torch.int32).contiguous()
    return torch.searchsorted(tokens, tokens)


def document_starts(document_ends: Tensor) -> Tensor:
    """First position of each position's document.

    Args:
        document_ends: int32 `[B, S]` from `bounds.document_ends`.

    Returns:
        int32 `[B, S]`.

    >>> document_starts(torch.tensor([[3, 3, 3, 5, 5]]))
    tensor([[0, 0, 0, 3, 3]], dtype=torch.int32)
    """
    return torch.searchsorted(document_ends, document_ends, out_int32=True)


def from_document_ends(
    document_ends: Tensor,
    *,
    q_len: int | None = None,
    kv_len: int | None = None,
    is_causal: bool = True,
    q_offset: Offset | None = None,
    kv_offset: Offset = 0,
) -> Tensor:
    """Packed documents from the result of `bounds.document_ends`.

    Args:
        document_ends: int32 `[B or 1, S]`, for the positions 0 to S - 1 of the sequence, as in `from_document_ids`.

    Returns:
        int32 `[B or 1, 1, C, S_k]`, C = 1 when causal and aligned at the bottom right, else 2.

    >>> from_document_ends(torch.tensor([[3, 3, 3, 5, 5]], dtype=torch.int32), is_causal=False).tolist()
    [[[[3, 3, 3, 5, 5], [0, 0, 0, 3, 3]]]]
    """
    is_whole = q_len is None and kv_len is None and q_offset is None and isinstance(kv_offset, int) and kv_offset == 0
    if not is_whole:
        call = default_lengths_and_offsets(document_ends.shape[-1], q_len, kv_len, q_offset, kv_offset)
        return _from_runs(document_ends, None, call, is_causal)
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
        cu_seqlens_k: the cumulative lengths of the keys when they differ (cross-attention). Document `d` of the queries
            then sees document `d` of the keys, with a causal triangle aligned at the bottom right.
        kv_len: number of keys, `q_len` by default.

    Returns:
        int32 `[1, 1, C, S_k]`, C = 1 when causal with the same lengths for queries and keys, else 2.

    Raises:
        TypeError: when the cumulative lengths are not integer tensors.
        ValueError: when they are not `[n + 1]` with one n for queries and keys, do not start at 0 or decrease; or
            `q_len` or `kv_len` is negative. Values on a GPU are not looked at.

    >>> from_cu_seqlens(torch.tensor([0, 3, 5]), 5).tolist()
    [[[[3, 3, 3, 5, 5]]]]
    """
    kv_len = q_len if kv_len is None else kv_len
    check_q_len_and_kv_len(q_len, kv_len)
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
    check_cumulative_lengths("cu_seqlens_q", cu_seqlens_q)
    if cu_seqlens_k is not None:
        check_cumulative_lengths("cu_seqlens_k", cu_seqlens_k)
    rows = cu_seqlens_q.to(torch.int32)
    keys = rows if cu_seqlens_k is None else cu_seqlens_k.to(torch.int32)
    key = torch.arange(kv_len, dtype=torch.int32, device=rows.device)
    document_end = torch.searchsorted(keys, key, right=True)  # int64: an index of int32 would be converted to it
    # Keys past the last document get the end 0, where the first document starts: nothing sees them.
    lts = torch.cat([rows, rows[:1]])[document_end]
    if is_causal and cu_seqlens_k is None and kv_len == q_len:
        return stack_planes(lts, None, q_len)
    ute = torch.cat([rows[:1], rows])[document_end]
    if is_causal:
        ute = torch.maximum(ute, key + torch.cat([rows - keys, rows[:1]])[document_end])
    return stack_planes(lts, ute, q_len)


def _from_runs(ends: Tensor, hidden: Tensor | None, call: tuple[int, int, Offset, Offset], is_causal: bool) -> Tensor:
    q_len, kv_len, q_offset, kv_offset = call
    lts = run_edges_at_keys(ends, hidden, -FAR, kv_len, kv_offset) - q_offset
    if not is_causal:
        starts = torch.searchsorted(ends, ends, out_int32=True)
        return stack_planes(lts, run_edges_at_keys(starts, hidden, FAR, kv_len, kv_offset) - q_offset, q_len)
    if is_triangle_at_bottom_right(*call):
        return stack_planes(lts, None, q_len)
    return stack_planes(lts, own_rows_of_keys(*call, ends.device), q_len)


def check_cumulative_lengths(name: str, cumulative: Tensor) -> None:
    """Check that cumulative lengths start at 0 and do not decrease, where that can be seen without a wait.

    Raises:
        ValueError: when lengths on the CPU do not.
    """
    if not cumulative.is_cpu or type(cumulative) is not Tensor or torch.compiler.is_compiling():
        return
    values = cumulative.tolist()
    if values[0] != 0 or any(end < start for start, end in itertools.pairwise(values)):
        got = f"[{', '.join(map(str, values[:8]))}{', ...' if len(values) > 8 else ''}]"
        raise ValueError(
            f"`{name}` (of a model: `{name.replace('seqlens', 'seq_lens')}`) must hold cumulative lengths: a leading "
            f"0, then where each document ends, not decreasing, got {got}. Lengths become such by "
            "torch.nn.functional.pad(lengths.cumsum(0), (1, 0))"
        )
