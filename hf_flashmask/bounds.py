"""An attention mask as one int32 tensor of bounds: for every key, the query rows that may not see it.

`bounds` is `int32 [B or 1, H or 1, C, S_k]`, keys last. Rows are counted from the first query of the call.

| C          | planes             | rows hidden from key `j`                             |
|------------|--------------------|------------------------------------------------------|
| 1          | LTS                | `i >= LTS`, and the causal triangle                  |
| 2          | LTS, UTE           | `i >= LTS`, or `i < UTE`                             |
| 4          | LTS, LTE, UTS, UTE | `LTS <= i < LTE`, or `UTS <= i < UTE`                |
| 2n, n > 2  | n pairs            | inside any of the n intervals `start <= i < end`     |

The first three are FlashMask's (arXiv 2410.01359). The causal triangle of C = 1 is aligned at the bottom right:
key `j` is hidden from the rows `i < j - (S_k - S_q)`. An interval with `start >= end` is empty, intervals may
overlap, and values below 0 or above S_q act as if clamped. A row that sees no key is legal.

Unless its docstring says otherwise, a function here needs O(S_k) memory, works with a handful of tensor
operations, never reads a value back to the host, and can be traced by `torch.compile(fullgraph=True)`.

Shared arguments of the constructors:

* `q_len`, `kv_len`: numbers of query rows and of keys, S_q and S_k.
* `q_offset`, `kv_offset`: position of the first query and of the first key in the sequence, as `int` or as 0-d
  tensor (static caches). `q_offset=None` means that the queries are the last `q_len` positions.
* `is_causal`: whether a query is also kept from every key after its own position.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from itertools import accumulate
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

__all__ = [
    "MAX_INTERVALS",
    "TooManyIntervalsError",
    "bidirectional",
    "causal",
    "causal_with_blocks",
    "check_bounds",
    "chunked",
    "document_ends",
    "document_starts",
    "from_block_mask",
    "from_cu_seqlens",
    "from_dense",
    "from_document_ends",
    "from_document_ids",
    "from_padding_mask",
    "from_position_ids",
    "from_prefix_tree",
    "from_startend_row_indices",
    "from_tiles",
    "global_and_sliding_window",
    "hash_sparse",
    "hide_keys",
    "intersect",
    "limit_depth",
    "prefix_lm",
    "simplify",
    "sliding_window",
    "tile_occupancy",
    "to_dense",
    "to_startend_row_indices",
    "union",
    "visible_pairs",
]

MAX_INTERVALS = 16
"""The largest number of hidden intervals per key that the format holds (C = 32)."""

Offset: TypeAlias = "int | Tensor"

_NO_END = torch.iinfo(torch.int32).max
_FAR = 2**30  # farther than any two positions are apart, and safe to add to one


class TooManyIntervalsError(ValueError):
    """A mask needs more than `MAX_INTERVALS` hidden intervals for a key."""


# Constructors


def causal(
    q_len: int,
    kv_len: int | None = None,
    *,
    q_offset: Offset | None = None,
    kv_offset: Offset = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Every query sees the keys up to its own position.

    `[1, 1, C, S_k]`, C = 1 when aligned at the bottom right, else 2.
    """
    kv_len = q_len if kv_len is None else kv_len
    _check_lengths(q_len, kv_len)
    if _is_bottom_right(q_len, kv_len, q_offset, kv_offset):
        return torch.full((1, 1, 1, kv_len), q_len, dtype=torch.int32, device=device)
    diagonal = _diagonal(q_len, kv_len, q_offset, kv_offset, device)
    return _planes(torch.full_like(diagonal, q_len), diagonal, q_len)


def bidirectional(q_len: int, kv_len: int | None = None, *, device: torch.device | str | None = None) -> Tensor:
    """Every query sees every key. `[1, 1, 2, S_k]`."""
    kv_len = q_len if kv_len is None else kv_len
    lts = causal(q_len, kv_len, device=device)
    return torch.cat([lts, torch.zeros_like(lts)], dim=2)


def sliding_window(
    window: int,
    q_len: int,
    kv_len: int | None = None,
    *,
    is_causal: bool = True,
    q_offset: Offset | None = None,
    kv_offset: Offset = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """A band around the diagonal, as Transformers counts it.

    Causal: a query sees `window` keys, its own included (`q - window < k <= q`). Bidirectional: it sees the keys at
    most `window` away on either side (`|q - k| <= window`). `[1, 1, C, S_k]`, C = 1 when causal and aligned at the
    bottom right, else 2.
    """
    kv_len = q_len if kv_len is None else kv_len
    smallest = 1 if is_causal else 0
    if window < smallest:
        raise ValueError(f"`window` must be at least {smallest} when is_causal={is_causal}, got {window}")
    window = min(window, _FAR)
    if is_causal and _is_bottom_right(q_len, kv_len, q_offset, kv_offset):
        return _planes(_diagonal(q_len, kv_len, q_offset, kv_offset, device, below=window), None, q_len)
    diagonal = _diagonal(q_len, kv_len, q_offset, kv_offset, device)
    if is_causal:
        return _planes(diagonal + window, diagonal, q_len)
    return _planes(diagonal + (window + 1), diagonal - window, q_len)


def chunked(
    chunk_size: int,
    q_len: int,
    kv_len: int | None = None,
    *,
    left_padding: Tensor | None = None,
    is_causal: bool = True,
    q_offset: Offset | None = None,
    kv_offset: Offset = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """A query sees the keys of its own chunk of `chunk_size` positions (Llama 4).

    `left_padding` `[B]` shifts the chunk borders of each batch row: the first chunk begins after that many positions.
    `[B, S_k]` shifts them for each key: packed documents have chunks of their own from their first position on.
    `[B or 1, 1, C, S_k]`, C = 1 when causal and aligned at the bottom right, else 2.
    """
    kv_len = q_len if kv_len is None else kv_len
    if chunk_size < 1:
        raise ValueError(f"`chunk_size` must be at least 1, got {chunk_size}")
    if left_padding is not None:
        dims = (1, 2) if left_padding.shape[-1:] == (kv_len,) else (1,)
        _check_int_tensor("left_padding", left_padding, dims, "[B] or [B, S_k]")
        device = left_padding.device if device is None else device
    chunk_size = min(chunk_size, _FAR)
    diagonal = _diagonal(q_len, kv_len, q_offset, kv_offset, device)
    position = _diagonal(q_len, kv_len, 0, kv_offset, diagonal.device)
    if left_padding is not None:
        position = position - (left_padding[:, None] if left_padding.ndim == 1 else left_padding)
    chunk_start = diagonal - position.remainder(chunk_size).to(torch.int32)
    if not is_causal:
        return _planes(chunk_start + chunk_size, chunk_start, q_len)
    aligned = _is_bottom_right(q_len, kv_len, q_offset, kv_offset)
    return _planes(chunk_start + chunk_size, None if aligned else diagonal, q_len)


def prefix_lm(
    prefix_lengths: int | Tensor,
    q_len: int,
    kv_len: int | None = None,
    *,
    q_offset: Offset | None = None,
    kv_offset: Offset = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Causal, but the first `prefix_lengths` positions are seen by every query. `[B or 1, 1, 2, S_k]`.

    `prefix_lengths` is an `int`, or an integer tensor `[B]` with one length for each batch row.
    """
    kv_len = q_len if kv_len is None else kv_len
    if isinstance(prefix_lengths, Tensor):
        _check_int_tensor("prefix_lengths", prefix_lengths, (1,), "[B]")
        device = prefix_lengths.device if device is None else device
        prefix_lengths = prefix_lengths[:, None]
    else:
        prefix_lengths = min(prefix_lengths, _FAR)
    diagonal = _diagonal(q_len, kv_len, q_offset, kv_offset, device)
    position = _diagonal(q_len, kv_len, 0, kv_offset, diagonal.device)
    ute = diagonal.masked_fill(position < prefix_lengths, 0)
    return _planes(torch.full_like(ute, q_len), ute, q_len)


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
    document_ids = _check_per_position("document_ids", document_ids)
    ends = _run_ends(document_ids != _previous(document_ids))
    call = _resolve_call(document_ids.shape[-1], q_len, kv_len, q_offset, kv_offset)
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
    call = _resolve_call(ends.shape[-1], q_len, kv_len, q_offset, kv_offset)
    return _from_runs(ends, None, call, is_causal)


def document_ends(position_ids: Tensor, is_token: Tensor | None = None) -> Tensor:
    """Where the document of each position ends, its last position + 1: int32 `[B, S]`, the LTS of `from_position_ids`.

    Args:
        position_ids: integers `[B or 1, S]` or `[S]`, below 2^30. A document starts wherever they do not increase.
        is_token: bool `[B, S]`, False for padding. Padding starts no document, and belongs to the one before it.
    """
    position_ids = _check_per_position("position_ids", position_ids)
    if is_token is None:
        return _run_ends(position_ids <= _previous(position_ids))
    # Tokens come before all padding. Each position is compared with the last token before it; before the first token
    # that is padding, so that a document starts there.
    position_ids = torch.add(position_ids, is_token, alpha=-_FAR)
    tokens = is_token.cumsum(-1, dtype=torch.int32).contiguous()
    last_token = torch.searchsorted(tokens, tokens).expand_as(position_ids)
    return _run_ends(position_ids <= _previous(position_ids.gather(1, last_token)))


def document_starts(document_ends: Tensor) -> Tensor:
    """Where the document of each position starts: int32 `[B, S]`, from `document_ends` of either sign."""
    ends = document_ends.abs()
    return torch.searchsorted(ends, ends, out_int32=True)


def from_document_ends(document_ends: Tensor, *, is_causal: bool = True) -> Tensor:
    """Packed documents from what `bounds.document_ends` found, with a minus for padding, whose keys are hidden.

    Args:
        document_ends: int32 `[B, S]`, S_q = S_k = S.

    Returns:
        `[B, 1, C, S]`, C = 1 when causal, else 2.
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
    _check_lengths(q_len, kv_len)
    _check_int_tensor("cu_seqlens_q", cu_seqlens_q, (1,), "[n + 1]")
    if cu_seqlens_q.shape[0] < 1:
        raise ValueError("`cu_seqlens_q` must hold at least the leading 0, got an empty tensor")
    if cu_seqlens_k is not None:
        _check_int_tensor("cu_seqlens_k", cu_seqlens_k, (1,), "[n + 1]")
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
        return _planes(lts, None, q_len)
    ute = torch.cat([rows[:1], rows])[document_end]
    if is_causal:
        ute = torch.maximum(ute, key + torch.cat([rows - keys, rows[:1]])[document_end])
    return _planes(lts, ute, q_len)


def from_padding_mask(
    padding_mask: Tensor,
    *,
    q_len: int | None = None,
    is_causal: bool = False,
    q_offset: Offset | None = None,
    kv_offset: Offset = 0,
) -> Tensor:
    """Keys where `padding_mask` `[B, S_k]` (bool or integer, on either side) is 0 are hidden from every query.

    `q_len` defaults to S_k. Rows of padding are not hidden, as in Transformers. `[B, 1, C, S_k]`, C = 1 when causal
    and aligned at the bottom right, else 2.
    """
    padding_mask = _check_per_position("padding_mask", padding_mask)
    kv_len = padding_mask.shape[-1]
    q_len = kv_len if q_len is None else q_len
    device = padding_mask.device
    if is_causal:
        every_key = causal(q_len, kv_len, q_offset=q_offset, kv_offset=kv_offset, device=device)
    else:
        every_key = bidirectional(q_len, kv_len, device=device)
    return hide_keys(every_key, padding_mask == 0)


def causal_with_blocks(
    block_ids: Tensor,
    *,
    window: int | None = None,
    q_len: int | None = None,
    kv_len: int | None = None,
    q_offset: Offset | None = None,
    kv_offset: Offset = 0,
) -> Tensor:
    """Causal, and bidirectional inside each block: images in a stream of text.

    Args:
        block_ids: integers `[B, S]` or `[S]`, for the positions 0 to S - 1 of the sequence. A block is a run of
            *adjacent* equal ids that are not negative. `q_len` and `kv_len` default to S, `q_offset` to S - q_len.
        window: outside its block a query sees only the last `window` keys, its own included (Gemma 3's local layers).

    Returns:
        `[B, 1, 2, S_k]`.
    """
    if window is not None and window < 1:
        raise ValueError(f"`window` must be at least 1, got {window}")
    block_ids = _check_per_position("block_ids", block_ids)
    ends = _run_ends(block_ids != _previous(block_ids))
    q_len, kv_len, q_offset, kv_offset = _resolve_call(block_ids.shape[-1], q_len, kv_len, q_offset, kv_offset)
    is_text = block_ids < 0
    start = _of_keys(torch.searchsorted(ends, ends, out_int32=True), is_text, _FAR, kv_len, kv_offset)
    diagonal = _diagonal(q_len, kv_len, q_offset, kv_offset, block_ids.device)
    ute = torch.minimum(diagonal, start - q_offset)
    if window is None:
        return _planes(torch.full_like(ute, q_len), ute, q_len)
    end = _of_keys(ends, is_text, -_FAR, kv_len, kv_offset)
    return _planes(torch.maximum(diagonal + min(window, _FAR), end - q_offset), ute, q_len)


def from_prefix_tree(
    parents: Sequence[int] | Sequence[Sequence[int]] | Tensor,
    lengths: Sequence[int] | Sequence[Sequence[int]] | Tensor,
    *,
    kv_len: int | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """A forest of shared prefixes in depth-first order: a token sees its node up to itself, and all nodes above.

    One row of bounds says it: causal, and LTS = end of the subtree. A list of roots is packed documents, a root with
    two leaves a preference pair, a root with many leaves a group of answers.

    Args:
        parents: for each node the index of its parent, or -1 for a root, in depth-first order. A list of such lists,
            with one of lengths for each, makes a batch.
        lengths: for each node its number of tokens, 0 or more.
        kv_len: length to pad to; padding is hidden, and its rows see nothing. Default: the longest row.

    Returns:
        `[B, 1, 1, S_k]`. The arguments are read on the host.

    Raises:
        ValueError: when the nodes are not in depth-first order; the message names the node.
    """
    parent_rows = _host_lists(parents)
    length_rows = _host_lists(lengths)
    if len(parent_rows) != len(length_rows):
        raise ValueError(
            f"`parents` and `lengths` must have as many rows, got {len(parent_rows)} and {len(length_rows)}"
        )
    ends = [_subtree_ends(parent_row, length_row) for parent_row, length_row in zip(parent_rows, length_rows)]
    longest = max((sum(row) for row in length_rows), default=0)
    kv_len = longest if kv_len is None else kv_len
    if kv_len < longest:
        raise ValueError(f"`kv_len` is {kv_len}, but the longest row has {longest} tokens")
    # After the last token comes padding, in place of the nodes that other rows have more.
    lts = pad_sequence([torch.tensor([*row, 0], dtype=torch.int32) for row in ends], batch_first=True)
    token_ends = pad_sequence(
        [torch.tensor(list(accumulate(row)), dtype=torch.int32) for row in length_rows],
        batch_first=True,
        padding_value=kv_len,
    )
    return _of_blocks(lts[:, None, None], token_ends, kv_len, device)


def global_and_sliding_window(
    num_global: int,
    window: int,
    q_len: int,
    kv_len: int | None = None,
    *,
    is_causal: bool = True,
    q_offset: Offset | None = None,
    kv_offset: Offset = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """A sliding window, and global tokens: the first `num_global` positions, which every query sees and which see all.

    The window counts as in `sliding_window`. Causal, these are attention sinks (StreamingLLM, arXiv 2309.17453);
    bidirectional, the masks of Longformer (arXiv 2004.05150) and of the FlashMask paper. `[1, 1, C, S_k]`: C = 4 when
    bidirectional, C = 1 when causal and aligned at the bottom right, else 2.
    """
    kv_len = q_len if kv_len is None else kv_len
    smallest = 1 if is_causal else 0
    if window < smallest:
        raise ValueError(f"`window` must be at least {smallest} when is_causal={is_causal}, got {window}")
    if num_global < 0:
        raise ValueError(f"`num_global` must not be negative, got {num_global}")
    num_global, window = min(num_global, _FAR), min(window, _FAR)
    diagonal = _diagonal(q_len, kv_len, q_offset, kv_offset, device)
    # The rows before this one are those of global tokens.
    first_local_row = num_global - (kv_offset + kv_len - q_len if q_offset is None else q_offset)
    is_global = diagonal < first_local_row
    if is_causal:
        lts = (diagonal + window).masked_fill(is_global, q_len)
        return _planes(lts, None if _is_bottom_right(q_len, kv_len, q_offset, kv_offset) else diagonal, q_len)
    lts = (diagonal + (window + 1)).clamp(min=first_local_row).masked_fill(is_global, q_len)
    ute = (diagonal - window).masked_fill(is_global, 0)
    uts = torch.zeros_like(ute) + first_local_row
    planes = torch.stack([lts, torch.full_like(lts, q_len), uts, ute])
    return planes.clamp(0, q_len).to(torch.int32)[None, None]


def hash_sparse(query_hashes: Tensor, key_hashes: Tensor, *, is_causal: bool = True) -> Tensor:
    """A query sees the keys with its own hash, among queries and keys that have been sorted by their hashes.

    Sorted, the queries of one bucket are neighbours, and a causal mask between original positions stays one interval
    of rows for each key: the hash-sparse mask of the FlashMask paper and of arXiv 2306.01160. The order, for queries
    and for keys, is that of `hashes.argsort(dim=-1, stable=True)`: gather query, key and value by it before attention.

    Args:
        query_hashes: integers `[B or 1, H or 1, S_q]` in the order of the sequence, of its last S_q positions. Tokens
            with a negative hash are dropped: such a query sees nothing, such a key is hidden.
        key_hashes: integers `[B or 1, H or 1, S_k]`, likewise.

    Returns:
        `[B, H, 2, S_k]` for the sorted rows and columns.
    """
    _check_int_tensor("query_hashes", query_hashes, (3,), "[B or 1, H or 1, S_q]")
    _check_int_tensor("key_hashes", key_hashes, (3,), "[B or 1, H or 1, S_k]")
    if any(1 not in sizes and len(set(sizes)) > 1 for sizes in zip(query_hashes.shape[:2], key_hashes.shape[:2])):
        raise ValueError(
            "`query_hashes` and `key_hashes` must agree in batch and heads or have 1 of them, got shapes "
            f"{list(query_hashes.shape)} and {list(key_hashes.shape)}"
        )
    batch, heads = torch.broadcast_shapes(query_hashes.shape[:2], key_hashes.shape[:2])
    queries, query_order = query_hashes.long().expand(batch, heads, -1).contiguous().sort(stable=True)
    keys, key_order = key_hashes.long().expand(batch, heads, -1).contiguous().sort(stable=True)
    q_len, kv_len = queries.shape[2], keys.shape[2]
    ute = torch.searchsorted(queries, keys)
    lts = torch.searchsorted(queries, keys, right=True)
    if is_causal:
        # Bucket and position in one number; the first row of a bucket stands for it, so that no hash overflows.
        span = q_len + kv_len
        position = torch.searchsorted(queries, queries) * span + query_order + kv_len
        ute = torch.searchsorted(position, ute * span + key_order + q_len)
    dropped = keys < 0
    return torch.stack([lts.masked_fill(dropped, 0), ute.masked_fill(dropped, q_len)], dim=2).to(torch.int32)


def from_block_mask(
    mask: Tensor,
    lengths: Sequence[int] | Sequence[Sequence[int]] | Tensor,
    *,
    is_causal: bool = True,
    kv_len: int | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Which block of tokens sees which: blocks are documents, turns, images, or so many tokens each.

    Args:
        mask: bool `[n, n]` or `[B or 1, H or 1, n, n]`: `mask[a, b]` says whether the queries of block a see the keys
            of block b.
        lengths: for each of the n blocks its number of tokens, 0 or more. A list of such lists makes a batch.
        kv_len: length to pad to; padding is hidden, and its rows see nothing. Default: the longest row.
        device: of the bounds; default: of `mask`.

    Returns:
        `[B, H or 1, C, S_k]`, the fewest planes that say the same. The arguments are read on the host; O(S_k + n^2)
        memory.

    Raises:
        TooManyIntervalsError: when the keys of a block need more than `MAX_INTERVALS` hidden intervals.
    """
    if _dtype_or_type(mask) != torch.bool:
        raise TypeError(f"`mask` must be a bool tensor with True = visible, got {_dtype_or_type(mask)}")
    if mask.ndim not in (2, 4) or mask.shape[-1] != mask.shape[-2]:
        raise ValueError(f"`mask` must be [n, n] or [B or 1, H or 1, n, n], got shape {list(mask.shape)}")
    device = mask.device if device is None else device
    mask = mask.cpu() if mask.ndim == 4 else mask.cpu()[None, None]
    length_rows = _host_lists(lengths)
    for row in length_rows:
        if len(row) != mask.shape[3] or min(row, default=0) < 0:
            raise ValueError(f"`lengths` must hold a length of 0 or more for each of {mask.shape[3]} blocks, got {row}")
    if 1 not in (mask.shape[0], len(length_rows)) and mask.shape[0] != len(length_rows):
        raise ValueError(f"`mask` has a batch of {mask.shape[0]}, but `lengths` has {len(length_rows)} rows")
    longest = max((sum(row) for row in length_rows), default=0)
    kv_len = longest if kv_len is None else kv_len
    if kv_len < longest:
        raise ValueError(f"`kv_len` is {kv_len}, but the longest row has {longest} tokens")

    # Padding is one more block, and so is key 0, the only key without rows before it. Within a block, all keys have
    # then as many hidden intervals, which differ by the triangle alone.
    edges = torch.tensor([[0, *accumulate(row), kv_len] for row in length_rows], dtype=torch.int32, device="cpu")
    first = (edges[:, 1:-1] == 0).sum(1, keepdim=True)
    order = torch.cat([first, torch.arange(edges.shape[1] - 1, device="cpu").expand(len(first), -1)], dim=1)
    edges = torch.nn.functional.pad(edges.clamp(min=min(1, kv_len)), (1, 0))
    visible = torch.nn.functional.pad(mask, (0, 1, 0, 1), value=False)
    visible = visible.take_along_dim(order[:, None, :, None], 2).take_along_dim(order[:, None, None], 3)

    first_key, end_key = edges[:, None, None, :-1], edges[:, None, None, 1:]
    visible = (visible.tril() if is_causal else visible) & (first_key < end_key)
    start, end = torch.where(visible, 0, first_key.mT), torch.where(visible, 0, end_key.mT)
    planes = _fewest_planes(start, end, kv_len, (first_key if is_causal else end_key - 1)[:, 0])
    _check_block_intervals(planes.shape[2] // 2)
    bounds = _of_blocks(planes, edges[:, 1:-1].contiguous(), kv_len, device)
    if is_causal and planes.shape[2] > 1:
        # What hides row 0 ends with the triangle of each key, or further down if its block does not see itself.
        upper_end = bounds[:, :, 3 if planes.shape[2] == 4 else 1]
        upper_end.clamp_(min=torch.arange(kv_len, dtype=torch.int32, device=bounds.device))
    return bounds


def from_dense(mask: Tensor) -> Tensor:
    """Read a dense mask off as the fewest planes that say the same. Exact; synchronises; O(S_q x S_k) memory.

    Args:
        mask: bool `[S_q, S_k]` or `[B or 1, H or 1, S_q, S_k]`, True = visible.

    Raises:
        TooManyIntervalsError: when a column needs more than `MAX_INTERVALS` hidden intervals; the message names the
            first.
    """
    if _dtype_or_type(mask) != torch.bool:
        raise TypeError(
            f"`mask` must be a bool tensor with True = visible, got {_dtype_or_type(mask)}; for an additive mask of 0 "
            "and -inf pass `mask == 0`"
        )
    if mask.ndim not in (2, 4):
        raise ValueError(f"`mask` must be [S_q, S_k] or [B or 1, H or 1, S_q, S_k], got shape {list(mask.shape)}")
    if mask.ndim == 2:
        mask = mask[None, None]
    return from_tiles([mask])


def from_tiles(tiles: Iterable[Tensor]) -> Tensor:
    """`from_dense` for a mask that comes in tiles of columns. O(S_q x tile) memory; synchronises once.

    Args:
        tiles: one or more bool tensors `[B or 1, H or 1, S_q, columns]`, from the first column to the last.

    Raises:
        TooManyIntervalsError: when a column needs more than `MAX_INTERVALS` hidden intervals; the message names the
            first.
    """
    edges, counts = [], []
    for visible in tiles:
        q_len = visible.shape[2]
        hidden = torch.nn.functional.pad(~visible.transpose(2, 3), (1, 1), value=False)
        # The k-th edge of a hidden interval lies where the number of edges reaches k. One interval too many is kept.
        count = (hidden[..., 1:] != hidden[..., :-1]).cumsum(-1, dtype=torch.int32)
        wanted = torch.arange(1, 2 * MAX_INTERVALS + 3, dtype=torch.int32, device=visible.device)
        wanted = wanted.expand(*count.shape[:3], -1).contiguous()
        edges.append(torch.searchsorted(count, wanted, out_int32=True))
        counts.append(count[..., -1])
    start, end = torch.cat(edges, dim=2).transpose(2, 3).unflatten(2, (-1, 2)).unbind(3)
    bounds = _fewest_planes(start, end, q_len)
    if bounds.shape[2] > 2 * MAX_INTERVALS:
        intervals = torch.cat(counts, dim=2) // 2
        batch, head, column = (intervals > MAX_INTERVALS).nonzero()[0].tolist()
        raise TooManyIntervalsError(
            f"key column {column} (batch {batch}, head {head}) needs {int(intervals[batch, head, column])} hidden "
            f"intervals; bounds hold at most {MAX_INTERVALS}. Use attn_implementation='sdpa' for such a mask"
        )
    return bounds


def from_startend_row_indices(
    startend_row_indices: Tensor,
    is_causal: bool,
    *,
    q_len: int | None = None,
    num_heads: int | None = None,
) -> Tensor:
    """Bounds from the `startend_row_indices` of FlashMask's paper and of PaddlePaddle.

    Args:
        startend_row_indices: int32 `[B, H_m, S_k, C]`, with C = 1 (LTS) or 2 (LTS, LTE) when causal, and C = 2
            (LTS, UTE) or 4 (LTS, LTE, UTS, UTE) when not. The causal form with two channels becomes C = 4.
        q_len: S_q when it differs from S_k; only the causal triangle of that form depends on it.
        num_heads: number of query heads; needed when H_m is the number of key heads, each standing for
            `num_heads / H_m` neighbouring query heads.

    Returns:
        `[B, 1 or num_heads, C, S_k]`.
    """
    _check_int_tensor("startend_row_indices", startend_row_indices, (4,), "[B, H_m, S_k, C]")
    batch, heads, kv_len, channels = startend_row_indices.shape
    if channels not in ((1, 2) if is_causal else (2, 4)):
        accepted = "1 (LTS) or 2 (LTS, LTE)" if is_causal else "2 (LTS, UTE) or 4 (LTS, LTE, UTS, UTE)"
        raise ValueError(
            f"`startend_row_indices` with is_causal={is_causal} must have {accepted} channels in its last dimension, "
            f"got shape {list(startend_row_indices.shape)}"
        )
    planes = startend_row_indices.transpose(2, 3).to(torch.int32)
    if is_causal and channels == 2:
        q_len = kv_len if q_len is None else q_len
        ute = _diagonal(q_len, kv_len, None, 0, planes.device).clamp(0, q_len).expand(batch, heads, 1, kv_len)
        planes = torch.cat([planes, torch.zeros_like(ute), ute], dim=2)
    if num_heads is not None and heads not in (1, num_heads):
        if num_heads % heads:
            raise ValueError(f"`num_heads` ({num_heads}) must be a multiple of the {heads} heads of the indices")
        planes = planes.repeat_interleave(num_heads // heads, dim=1)
    return planes.contiguous()


# Set operations


def intersect(*bounds: Tensor, q_len: int | None = None) -> Tensor:
    """What is visible in every mask. Shapes broadcast over batch and heads.

    C = 1 and C = 2 collapse to one lower and one upper bound; the intervals of other masks are put side by side.
    `q_len` is needed to place the causal triangle of C = 1 beside other forms when S_q differs from S_k.
    """
    _check_operands("intersect", bounds)
    planes = {mask.shape[2] for mask in bounds}
    if planes == {1}:
        return reduce(torch.minimum, bounds).contiguous()
    simple = [_lower_upper(mask, q_len) for mask in bounds if mask.shape[2] <= 2]
    others = [mask for mask in bounds if mask.shape[2] > 2]
    if simple:
        lts, ute = simple[0]
        for other_lts, other_ute in simple[1:]:
            lts, ute = torch.minimum(lts, other_lts), torch.maximum(ute, other_ute)
        lts, ute = torch.broadcast_tensors(lts, ute)
        if not others:
            return torch.stack([lts, ute], dim=2)
        others.append(torch.stack([lts, torch.full_like(lts, _NO_END), torch.zeros_like(ute), ute], dim=2))
    _check_intervals("intersect", sum(mask.shape[2] // 2 for mask in others))
    return torch.cat(_broadcast(others), dim=2).contiguous()


def union(*bounds: Tensor, q_len: int | None = None) -> Tensor:
    """What is visible in any of the masks. Shapes broadcast over batch and heads.

    Masks of C = 1 stay C = 1. Otherwise m masks with n_1 ... n_m hidden intervals (C = 1 and 2 have two) give
    n_1 + ... + n_m - m + 1 intervals, many of them usually empty: `simplify` removes those.
    `q_len` is needed to place the causal triangle of C = 1 beside other forms when S_q differs from S_k.
    """
    _check_operands("union", bounds)
    if len(bounds) == 1:
        return bounds[0].contiguous()
    if all(mask.shape[2] == 1 for mask in bounds):
        return reduce(torch.maximum, bounds).contiguous()
    families = [torch.stack(_disjoint(*_hidden_intervals(mask, q_len)), dim=0) for mask in bounds]
    count = sum(family.shape[3] for family in families)
    _check_intervals("union", count - len(bounds) + 1)
    batch, heads = torch.broadcast_shapes(*(family.shape[1:3] for family in families))
    start, end = torch.cat([family.expand(-1, batch, heads, -1, -1) for family in families], dim=3).unbind(0)
    # Intervals of one mask are disjoint, so a row is hidden by all m masks where it lies in m intervals at once: from
    # the (k + m)-th smallest start on, before the (k + 1)-th smallest end.
    start = start.sort(dim=2).values[:, :, len(bounds) - 1 :]
    end = end.sort(dim=2).values[:, :, : count - len(bounds) + 1]
    return torch.stack([start, end], dim=3).flatten(2, 3)


def hide_keys(bounds: Tensor, hidden: Tensor, *, start: int = 0) -> Tensor:
    """Hide the keys where bool `hidden` `[B or 1, S_k]` is True from every query. C stays as it is.

    `start`, 0 or less, is where the hidden rows of such a key begin.
    """
    _check_form(bounds)
    if hidden.dtype != torch.bool or hidden.ndim != 2 or hidden.shape[1] != bounds.shape[3]:
        raise ValueError(
            f"`hidden` must be bool [B or 1, {bounds.shape[3]}] for these bounds, got {hidden.dtype} "
            f"{list(hidden.shape)}"
        )
    hidden = hidden[:, None, None, :]
    if bounds.shape[2] == 1:
        return bounds.masked_fill(hidden, start)
    # Plane 0 starts an interval and plane 1 ends one in every form, also in C = 2, where the column is then hidden by
    # LTS and by UTE alike: the kernels can skip it from either side.
    starts = bounds[:, :, 0::2].masked_fill(hidden, start)
    ends = bounds[:, :, 1::2].masked_fill(hidden, _NO_END)
    return torch.stack([starts, ends], dim=3).flatten(2, 3)


def limit_depth(bounds: Tensor, depth: Tensor, end_depth: Tensor, *, max_branches: int | None = None) -> Tensor:
    """Hide each key of a prefix tree from the rows of its subtree that are at `end_depth` or deeper.

    A window of W tokens along each branch is `end_depth = depth + W`, chunks of W are `(depth // W + 1) * W`.

    Args:
        bounds: `[B, 1, 1, S]`, trees in depth-first order (`from_prefix_tree`), S_q = S_k.
        depth: integers `[B, S]`, the number of tokens before each one on its path from the root. They go up one by one,
            except where a branch or a tree begins.
        end_depth: integers `[B, S]`, more than `depth`.
        max_branches: the largest number of leaves in one tree, when it is known. Otherwise it is read from the device.

    Returns:
        `[B, 1, C, S]`, C = 4 for trees without branches, else 2 (max_branches + 1): each branch has an end of its own.

    Raises:
        ValueError: when a tree has more than `MAX_INTERVALS - 1` branches.
    """
    _check_form(bounds)
    if bounds.shape[1] != 1 or bounds.shape[2] != 1:
        raise ValueError(f"`bounds` must be those of a prefix tree, [B, 1, 1, S], got {list(bounds.shape)}")
    if bounds.numel() == 0:
        return bounds.expand(-1, -1, 4, -1).contiguous()
    subtree_end = bounds[:, 0, 0]
    length = subtree_end.shape[1]
    row = torch.arange(length, dtype=torch.int32, device=bounds.device).expand_as(subtree_end)
    depth, end_depth = (values.to(torch.int32).expand_as(subtree_end) for values in (depth, end_depth))
    # The row is a sequence of runs, in which depth goes up one by one. `run_end[i]` is where the run of row i ends.
    begins_run = torch.nn.functional.pad(depth[:, 1:] != depth[:, :-1] + 1, (1, 0), value=True)
    next_run = torch.where(begins_run, row, length).flip(1).cummin(1).values.flip(1)
    run_end = torch.nn.functional.pad(next_run[:, 1:], (0, 1), value=length)
    if max_branches is None:
        run = begins_run.cumsum(1)
        last_row = torch.maximum(subtree_end - 1, row).clamp(max=length - 1).long()
        max_branches = int((run.gather(1, last_row) - run).max()) + 1
    _check_intervals("limit_depth", max_branches + 1)

    # In every run of the subtree the rows before `end_depth` see the key. What is hidden after the last one joins what
    # lies below the subtree, so that neighbouring keys say it in the same plane.
    branches = []
    lower_start = torch.minimum(subtree_end, run_end)
    start, end = row, torch.minimum(run_end, subtree_end)
    for _ in range(max_branches):
        first_depth = depth.gather(1, start.clamp(max=length - 1).long())
        hidden_from = torch.minimum(start + (end_depth - first_depth).clamp(min=0), end)
        lower_start = torch.where(start < subtree_end, hidden_from, lower_start)
        branches.append((hidden_from, torch.where(end < subtree_end, end, hidden_from)))
        start = end
        end = torch.minimum(run_end.gather(1, start.clamp(max=length - 1).long()), subtree_end)
    planes = [lower_start, torch.full_like(row, _NO_END), torch.zeros_like(row), row]
    planes += [plane for branch in branches[:-1] for plane in branch]
    return torch.stack(planes, dim=1)[:, None]


def simplify(bounds: Tensor, q_len: int | None = None) -> Tensor:
    """The fewest planes that say the same. Synchronises once.

    Values are clamped to `[0, q_len]`, overlapping and adjacent intervals merged, empty ones dropped; C = 1 when every
    column is the causal triangle and one lower bound. `q_len` defaults to S_k.
    """
    _check_form(bounds)
    q_len = bounds.shape[3] if q_len is None else q_len
    return _fewest_planes(*_hidden_intervals(bounds, q_len), q_len)


# Views


def to_dense(bounds: Tensor, q_len: int | None = None) -> Tensor:
    """The mask as bool `[B or 1, H or 1, S_q, S_k]`, True = visible. The definition of bounds; O(S_q x S_k) memory.

    `q_len` (S_q) defaults to S_k.
    """
    _check_form(bounds)
    kv_len = bounds.shape[3]
    q_len = kv_len if q_len is None else q_len
    row = torch.arange(q_len, device=bounds.device)[:, None]
    column = torch.arange(kv_len, device=bounds.device)
    planes = bounds.unsqueeze(3).unbind(2)
    if len(planes) == 1:
        hidden = (row >= planes[0]) | (row < column - (kv_len - q_len))
    elif len(planes) == 2:
        hidden = (row >= planes[0]) | (row < planes[1])
    else:
        hidden = torch.zeros((), dtype=torch.bool, device=bounds.device)
        for start, end in zip(planes[0::2], planes[1::2]):
            hidden = hidden | ((row >= start) & (row < end))
    return ~hidden


def to_startend_row_indices(bounds: Tensor) -> tuple[Tensor, bool]:
    """The paper's and PaddlePaddle's form: int32 `[B, H, S_k, C]`, and whether it is to be read as causal.

    Raises:
        ValueError: when `bounds` has more than two intervals, which that form cannot hold.
    """
    _check_form(bounds)
    if bounds.shape[2] > 4:
        raise ValueError(
            f"`startend_row_indices` holds two hidden intervals per key, these bounds have {bounds.shape[2] // 2}; "
            "simplify(bounds, q_len) may need fewer"
        )
    return bounds.transpose(2, 3).contiguous(), bounds.shape[2] == 1


def visible_pairs(bounds: Tensor, q_len: int | None = None) -> Tensor:
    """Number of visible (query, key) pairs, int64 `[B or 1, H or 1]`. `q_len` defaults to S_k."""
    _check_form(bounds)
    kv_len = bounds.shape[3]
    q_len = kv_len if q_len is None else q_len
    start, end = _disjoint(*(edge.clamp(0, q_len) for edge in _hidden_intervals(bounds, q_len)))
    return q_len * kv_len - (end - start).sum((2, 3), dtype=torch.int64)


def tile_occupancy(bounds: Tensor, q_len: int | None = None, *, tile_size: int) -> Tensor:
    """Fraction of visible pairs in each tile of `tile_size` rows by `tile_size` columns.

    Float64 `[B or 1, H or 1, ceil(S_q / tile_size), ceil(S_k / tile_size)]`: 0 = hidden tile, 1 = full, between = cut.
    The last tiles may be smaller and count by their own size. O(S_k) memory besides the result, one pass over the keys
    for each row of tiles. `q_len` defaults to S_k.
    """
    _check_form(bounds)
    if tile_size < 1:
        raise ValueError(f"`tile_size` must be at least 1, got {tile_size}")
    batch, heads, _, kv_len = bounds.shape
    q_len = kv_len if q_len is None else q_len
    start, end = _disjoint(*(edge.clamp(0, q_len) for edge in _hidden_intervals(bounds, q_len)))
    columns = -(-kv_len // tile_size)
    width = torch.full((columns,), tile_size, device=bounds.device)
    width[-1:] -= columns * tile_size - kv_len
    occupancy = torch.empty(batch, heads, -(-q_len // tile_size), columns, dtype=torch.float64, device=bounds.device)
    for tile, first in enumerate(range(0, q_len, tile_size)):
        last = min(first + tile_size, q_len)
        hidden = (end.clamp(first, last) - start.clamp(first, last)).sum(2)
        padded = torch.nn.functional.pad(last - first - hidden, (0, columns * tile_size - kv_len))
        visible = padded.unflatten(-1, (columns, tile_size)).sum(-1)
        occupancy[:, :, tile] = visible.double() / (width * (last - first))
    return occupancy


def check_bounds(
    bounds: Tensor,
    *,
    name: str = "bounds",
    batch: int | None = None,
    heads: int | None = None,
    kv_len: int | None = None,
    device: torch.device | None = None,
) -> None:
    """Raise a `TypeError` or `ValueError` that says what is wrong if `bounds` do not fit an attention call.

    Args:
        bounds: what the user gave.
        name: the argument to name in the message.
        batch, heads, kv_len, device: of the call; each is checked where given. `heads` are the query heads.
    """
    _check_form(bounds, name)
    for dimension, (what, expected) in enumerate((("batch", batch), ("number of query heads", heads))):
        if expected is not None and bounds.shape[dimension] not in (1, expected):
            raise ValueError(
                f"`{name}` has shape {list(bounds.shape)}: dimension {dimension} must be 1 or the {what}, {expected}"
            )
    if kv_len is not None and bounds.shape[3] != kv_len:
        raise ValueError(
            f"`{name}` has shape {list(bounds.shape)}: the last dimension must be the key length, {kv_len}"
        )
    if device is not None and bounds.device != device:
        raise ValueError(f"`{name}` is on {bounds.device}, the queries are on {device}; move it there with .to()")


# Building blocks


def _diagonal(
    q_len: int,
    kv_len: int,
    q_offset: Offset | None,
    kv_offset: Offset,
    device: torch.device | str | None,
    below: int = 0,
) -> Tensor:
    """The row `below` that at which each key's own position lies, int32 `[S_k]`; rows before it come before the key."""
    _check_lengths(q_len, kv_len)
    if device is None:
        device = next((offset.device for offset in (q_offset, kv_offset) if isinstance(offset, Tensor)), None)
    shift = below + (q_len - kv_len if q_offset is None else kv_offset - q_offset)
    if isinstance(shift, Tensor):
        return torch.arange(kv_len, dtype=torch.int32, device=device) + shift
    return torch.arange(shift, shift + kv_len, dtype=torch.int32, device=device)


def _is_bottom_right(q_len: int, kv_len: int, q_offset: Offset | None, kv_offset: Offset) -> bool:
    """Whether the causal triangle is the implied one of C = 1. Offsets on a device are never read to find out."""
    if q_offset is None:
        return True
    if isinstance(q_offset, Tensor) or isinstance(kv_offset, Tensor):
        return False
    return q_offset - kv_offset == kv_len - q_len


def _planes(lts: Tensor, ute: Tensor | None, q_len: int) -> Tensor:
    """`[B or 1, 1, 1 or 2, S_k]` from local rows `[S_k]` or `[B, S_k]`; no UTE means C = 1."""
    planes = lts.unsqueeze(-2) if ute is None else torch.stack(torch.broadcast_tensors(lts, ute), dim=-2)
    planes = planes.clamp(0, q_len).to(torch.int32)
    return planes[None, None] if planes.ndim == 2 else planes[:, None]


def _resolve_call(
    positions: int, q_len: int | None, kv_len: int | None, q_offset: Offset | None, kv_offset: Offset
) -> tuple[int, int, Offset, Offset]:
    q_len = positions if q_len is None else q_len
    kv_len = positions if kv_len is None else kv_len
    return q_len, kv_len, positions - q_len if q_offset is None else q_offset, kv_offset


def _previous(values: Tensor) -> Tensor:
    """The value before each one, and the first one before itself: `[B, S]`."""
    return torch.cat([values[:, :1], values], dim=1)[:, :-1]


def _run_ends(starts: Tensor) -> Tensor:
    """Past-the-last position of each position's run, int32 `[B, S]`, from bool `[B, S]`: whether a run starts here."""
    runs = starts.cumsum(-1, dtype=torch.int32).contiguous()
    return torch.searchsorted(runs, runs, right=True, out_int32=True)


def _of_keys(edge: Tensor, outside: Tensor | None, nowhere: int, kv_len: int, kv_offset: Offset) -> Tensor:
    """The edge of each key's run, `[B, S_k]`, from that of each position; `nowhere` for keys in none."""
    if outside is not None:
        edge = edge.masked_fill(outside, nowhere)
    positions = edge.shape[-1]
    if kv_len == positions and not isinstance(kv_offset, Tensor) and kv_offset == 0:
        return edge
    # One more position stands for all those that the ids do not reach.
    edge = torch.nn.functional.pad(edge, (0, 1), value=nowhere)
    key = torch.arange(kv_len, device=edge.device) + kv_offset
    return edge[:, torch.where((key < 0) | (key > positions), positions, key)]


def _from_runs(ends: Tensor, hidden: Tensor | None, call: tuple[int, int, Offset, Offset], is_causal: bool) -> Tensor:
    q_len, kv_len, q_offset, kv_offset = call
    lts = _of_keys(ends, hidden, -_FAR, kv_len, kv_offset) - q_offset
    if not is_causal:
        starts = torch.searchsorted(ends, ends, out_int32=True)
        return _planes(lts, _of_keys(starts, hidden, _FAR, kv_len, kv_offset) - q_offset, q_len)
    if _is_bottom_right(*call):
        return _planes(lts, None, q_len)
    return _planes(lts, _diagonal(*call, ends.device), q_len)


def _lower_upper(bounds: Tensor, q_len: int | None) -> tuple[Tensor, Tensor]:
    """LTS and UTE of bounds with C = 1 or 2, each `[B or 1, H or 1, S_k]`."""
    if bounds.shape[2] == 2:
        return bounds[:, :, 0], bounds[:, :, 1]
    kv_len = bounds.shape[3]
    diagonal = _diagonal(kv_len if q_len is None else q_len, kv_len, None, 0, bounds.device)
    return bounds[:, :, 0], diagonal.clamp(min=0)[None, None]


def _hidden_intervals(bounds: Tensor, q_len: int | None) -> tuple[Tensor, Tensor]:
    """Starts and ends of the hidden rows of each key, each `[B or 1, H or 1, n, S_k]`."""
    if bounds.shape[2] > 2:
        return bounds[:, :, 0::2], bounds[:, :, 1::2]
    lts, ute = torch.broadcast_tensors(*_lower_upper(bounds, q_len))
    start = torch.stack([torch.zeros_like(ute), lts], dim=2)
    end = torch.stack([ute, torch.full_like(lts, _NO_END)], dim=2)
    return start, end


def _disjoint(start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """As many intervals that hide the same rows, sorted and without overlap; empty ones have start = end."""
    start, order = start.sort(dim=2)
    end = end.gather(2, order)
    reached = _shift_down(end.cummax(dim=2).values, fill=torch.iinfo(torch.int32).min)
    start = torch.maximum(start, reached)
    return start, torch.maximum(start, end)


def _fewest_planes(start: Tensor, end: Tensor, q_len: int, triangle: Tensor | None = None) -> Tensor:
    """Bounds from the hidden intervals of each key, `[B, H, n >= 2, S_k]` in any order, with or without overlap.

    `triangle`, `[B or 1, 1, S_k]`: before which row the causal triangle hides each key, by default that of S_k keys.
    """
    if start.numel() == 0:
        return torch.empty_like(start[:, :, :1])
    start, end = start.clamp(0, q_len), end.clamp(0, q_len)
    empty = start >= end
    start, end = start.masked_fill(empty, q_len), end.masked_fill(empty, 0)
    start, order = start.sort(dim=2)
    end = end.gather(2, order)
    reached = _shift_down(end.cummax(dim=2).values, fill=-1)
    merged = (((start > reached) & (start < end)).cumsum(2) - 1).clamp(min=0)
    start = torch.full_like(start, q_len).scatter_reduce(2, merged, start, "amin")
    end = torch.zeros_like(end).scatter_reduce(2, merged, end, "amax")

    # Now sorted and apart, an empty interval being (q_len, 0).
    some = start < end
    inner = some & (start > 0) & (end < q_len)
    lts = torch.where(end == q_len, start, q_len).amin(2)
    ute = torch.where(start == 0, end, 0).amax(2)
    if triangle is None:
        triangle = _diagonal(q_len, start.shape[3], None, 0, start.device).clamp(0, q_len)
    not_causal = (ute != triangle) & (ute != q_len)
    intervals, has_inner, is_not_causal = torch.stack(
        [some.sum(2).amax(), inner.any().long(), not_causal.any().long()]
    ).tolist()
    if not has_inner:
        return (lts.unsqueeze(2) if not is_not_causal else torch.stack([lts, ute], dim=2)).contiguous()
    if intervals <= 2:
        start, end = start[:, :, :2], end[:, :, :2]
        # A lone interval goes to the side of the diagonal on which it lies, so that neighbouring columns agree.
        lone_lower = ~(start[:, :, 1] < end[:, :, 1]) & (start[:, :, 0] > triangle)
        order = torch.stack([~lone_lower, lone_lower], dim=2).long()
        start, end = start.gather(2, order), end.gather(2, order)
    intervals = max(intervals, 2)
    return torch.stack([start[:, :, :intervals], end[:, :, :intervals]], dim=3).flatten(2, 3)


def _shift_down(planes: Tensor, fill: int) -> Tensor:
    """Plane k becomes plane k + 1, the first one `fill`."""
    return torch.cat([torch.full_like(planes[:, :, :1], fill), planes[:, :, :-1]], dim=2)


def _broadcast(bounds: Sequence[Tensor]) -> list[Tensor]:
    batch, heads = torch.broadcast_shapes(*(mask.shape[:2] for mask in bounds))
    return [mask.expand(batch, heads, -1, -1) for mask in bounds]


def _host_lists(values: Sequence[int] | Sequence[Sequence[int]] | Tensor) -> list[list[int]]:
    rows = list(values.tolist() if isinstance(values, Tensor) else values)
    if rows and isinstance(rows[0], (Sequence, Tensor)):
        return [[int(value) for value in row] for row in rows]
    return [[int(value) for value in rows]]


def _of_blocks(planes: Tensor, ends: Tensor, kv_len: int, device: torch.device | str | None) -> Tensor:
    """Bounds of each key, `[B, H, C, S_k]`, on `device`, without waiting for it.

    Args:
        planes: those of each of n blocks of keys and of padding, int32 `[B or 1, H, C, n + 1]`, contiguous.
        ends: past-the-last key of each block, int32 `[B or 1, n]`, contiguous.
    """
    if planes.is_cpu and torch.device(device or "cpu").type == "cuda":
        planes, ends = planes.pin_memory(), ends.pin_memory()  # copies of other memory wait for the device
    planes, ends = planes.to(device, non_blocking=True), ends.to(device, non_blocking=True)
    key = torch.arange(kv_len, dtype=torch.int32, device=planes.device).expand(len(ends), -1)
    block = torch.searchsorted(ends, key.contiguous(), right=True)
    return planes.take_along_dim(block[:, None, None], 3)


def _subtree_ends(parents: list[int], lengths: list[int]) -> list[int]:
    """Past-the-last token of each node's subtree, after checking the depth-first order."""
    if len(parents) != len(lengths):
        raise ValueError(f"`parents` and `lengths` must name as many nodes, got {len(parents)} and {len(lengths)}")
    path: list[int] = []
    for node, (parent, length) in enumerate(zip(parents, lengths)):
        if length < 0:
            raise ValueError(f"`lengths` must not be negative, node {node} has {length}")
        while path and path[-1] != parent:
            path.pop()
        if parent != -1 and not path:
            raise ValueError(
                f"`parents` must be in depth-first order, every node right after its parent's earlier subtrees: node "
                f"{node} has parent {parent}, which is not an ancestor-or-self of node {node - 1}"
            )
        path.append(node)
    ends = list(accumulate(lengths))
    for node in reversed(range(len(parents))):
        if parents[node] != -1:
            ends[parents[node]] = max(ends[parents[node]], ends[node])
    return ends


# Checks


def _check_lengths(q_len: int, kv_len: int) -> None:
    if q_len < 0 or kv_len < 0:
        raise ValueError(f"`q_len` and `kv_len` must not be negative, got {q_len} and {kv_len}")


def _dtype_or_type(value: object) -> torch.dtype | str:
    return value.dtype if isinstance(value, Tensor) else type(value).__name__


def _check_int_tensor(name: str, value: Tensor, dims: tuple[int, ...], shape: str, allow_bool: bool = False) -> None:
    dtype = _dtype_or_type(value)
    if (
        isinstance(dtype, str)
        or dtype.is_floating_point
        or dtype.is_complex
        or (dtype == torch.bool and not allow_bool)
    ):
        raise TypeError(f"`{name}` must be an integer tensor {shape}, got {dtype}")
    if value.ndim not in dims:
        raise ValueError(f"`{name}` must be {shape}, got shape {list(value.shape)}")


def _check_per_position(name: str, value: Tensor) -> Tensor:
    _check_int_tensor(name, value, (1, 2), "[B, S] or [S]", allow_bool=name == "padding_mask")
    return value if value.ndim == 2 else value[None]


def _check_form(bounds: Tensor, name: str = "bounds") -> None:
    if _dtype_or_type(bounds) != torch.int32:
        raise TypeError(
            f"`{name}` must be an int32 tensor [B or 1, H or 1, C, S_k], got {_dtype_or_type(bounds)}; a tensor is "
            "converted with .to(torch.int32)"
        )
    planes = bounds.shape[2] if bounds.ndim == 4 else 0
    if planes != 1 and (planes % 2 or not 2 <= planes <= 2 * MAX_INTERVALS):
        raise ValueError(
            f"`{name}` must have shape [B or 1, H or 1, C, S_k] with C = 1 or an even number up to "
            f"{2 * MAX_INTERVALS}, got {list(bounds.shape)}"
        )


def _check_operands(operation: str, bounds: tuple[Tensor, ...]) -> None:
    if not bounds:
        raise ValueError(f"{operation}() needs at least one mask")
    for mask in bounds:
        _check_form(mask)
    if any(mask.shape[3] != bounds[0].shape[3] for mask in bounds):
        raise ValueError(f"{operation}() needs masks of one key length, got {[mask.shape[3] for mask in bounds]}")


def _check_intervals(operation: str, intervals: int) -> None:
    if intervals > MAX_INTERVALS:
        raise TooManyIntervalsError(
            f"{operation}() of these masks needs {intervals} hidden intervals per key, bounds hold at most "
            f"{MAX_INTERVALS}: call simplify(bounds, q_len) on the arguments first, or on part of the result"
        )


def _check_block_intervals(intervals: int) -> None:
    if intervals > MAX_INTERVALS:
        raise TooManyIntervalsError(
            f"`mask` needs {intervals} hidden intervals for the keys of a block, bounds hold at most {MAX_INTERVALS}. "
            "Use attn_implementation='sdpa' for such a mask"
        )
