"""Bounds from a description of the mask: causal, windows, chunks, prefixes, blocks, the paper's masks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from .algebra import fewest_planes, hide_keys
from .form import (
    FAR,
    MAX_INTERVALS,
    NO_END,
    Offset,
    TooManyIntervalsError,
    check_int_tensor,
    check_integer,
    check_integer_lists,
    check_per_position,
    check_q_len_and_kv_len,
    check_size,
    default_kv_len,
    default_lengths_and_offsets,
    dtype_or_type,
    is_triangle_at_bottom_right,
    own_rows_of_keys,
    planes_from_blocks,
    previous_values,
    run_edges_at_keys,
    run_ends,
    run_numbers,
    stack_planes,
)


def causal(
    q_len: int,
    kv_len: int | None = None,
    *,
    q_offset: Offset | None = None,
    kv_offset: Offset = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Every query sees the keys up to its own position.

    Returns:
        int32 `[1, 1, C, S_k]`, C = 1 when aligned at the bottom right, else 2.

    Raises:
        ValueError: when a length is negative.

    >>> causal(2, 4).tolist()
    [[[[2, 2, 2, 2]]]]
    """
    kv_len = q_len if kv_len is None else kv_len
    check_q_len_and_kv_len(q_len, kv_len)
    if is_triangle_at_bottom_right(q_len, kv_len, q_offset, kv_offset):
        return torch.full((1, 1, 1, kv_len), q_len, dtype=torch.int32, device=device)
    diagonal = own_rows_of_keys(q_len, kv_len, q_offset, kv_offset, device)
    return stack_planes(torch.full_like(diagonal, q_len), diagonal, q_len)


def bidirectional(q_len: int, kv_len: int | None = None, *, device: torch.device | str | None = None) -> Tensor:
    """Every query sees every key.

    Returns:
        int32 `[1, 1, 2, S_k]`.

    Raises:
        ValueError: when a length is negative.
    """
    kv_len = q_len if kv_len is None else kv_len
    lts = causal(q_len, kv_len, device=device)
    return torch.cat([lts, torch.zeros_like(lts)], dim=2)


def sliding_window(
    window: int | tuple[int | None, int | None],
    q_len: int,
    kv_len: int | None = None,
    *,
    is_causal: bool | None = None,
    q_offset: Offset | None = None,
    kv_offset: Offset = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """A band around the diagonal, as Transformers counts it.

    Args:
        window: a number or a pair. A number, causal: a query sees `window` keys, its own included
            (`q - window < k <= q`). A number, bidirectional: it sees the keys at most `window` away on either side
            (`|q - k| <= window`). A pair `(left, right)`, as in FlashAttention: it sees `left` keys before its own,
            and `right` after it (`q - left <= k <= q + right`); None is unlimited.
        is_causal: of a window that is a number, True by default. A pair says it itself.

    Returns:
        int32 `[1, 1, C, S_k]`, C = 1 when causal and aligned at the bottom right, else 2.

    Raises:
        TypeError: when `window` is neither an integer nor a tuple of such and None.
        ValueError: when `window` is less than 1 (causal) or 0 (bidirectional, or in a pair), `is_causal` is given
            beside a pair, or a length is negative.

    >>> sliding_window(2, 5).tolist()
    [[[[2, 3, 4, 5, 5]]]]
    >>> sliding_window((None, 1), 5).tolist()  # all keys before a query, and one after it
    [[[[5, 5, 5, 5, 5], [0, 0, 1, 2, 3]]]]
    """
    kv_len = q_len if kv_len is None else kv_len
    left, right = _left_and_right(window, is_causal)
    if right == 0 and is_triangle_at_bottom_right(q_len, kv_len, q_offset, kv_offset):
        return stack_planes(own_rows_of_keys(q_len, kv_len, q_offset, kv_offset, device, below=left + 1), None, q_len)
    diagonal = own_rows_of_keys(q_len, kv_len, q_offset, kv_offset, device)
    return stack_planes(diagonal + (left + 1), diagonal - right, q_len)


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

    Args:
        chunk_size: 1 or more.
        left_padding: integers `[B]` shift the chunk borders of each batch row: the first chunk begins after that many
            positions. `[B, S_k]` shift them for each key: packed documents have chunks of their own from their first
            position on.

    Returns:
        int32 `[B or 1, 1, C, S_k]`, C = 1 when causal and aligned at the bottom right, else 2.

    Raises:
        TypeError: when `left_padding` is not an integer tensor, or `chunk_size` no integer.
        ValueError: when it has another shape, `chunk_size` is less than 1, or a length is negative.

    >>> chunked(2, 5).tolist()
    [[[[2, 2, 4, 4, 5]]]]
    """
    kv_len = q_len if kv_len is None else kv_len
    chunk_size = check_size("chunk_size", chunk_size)
    if left_padding is not None:
        check_int_tensor("left_padding", left_padding, (1, 2), "[B] or [B, S_k]")
        if left_padding.ndim == 2 and left_padding.shape[1] != kv_len:
            raise ValueError(f"`left_padding` must be [B] or [B, {kv_len}], got shape {list(left_padding.shape)}")
        device = left_padding.device if device is None else device
    diagonal = own_rows_of_keys(q_len, kv_len, q_offset, kv_offset, device)
    position = own_rows_of_keys(q_len, kv_len, 0, kv_offset, diagonal.device)
    if left_padding is not None:
        position = position - (left_padding[:, None] if left_padding.ndim == 1 else left_padding)
    chunk_start = diagonal - position.remainder(chunk_size).to(torch.int32)
    if not is_causal:
        return stack_planes(chunk_start + chunk_size, chunk_start, q_len)
    aligned = is_triangle_at_bottom_right(q_len, kv_len, q_offset, kv_offset)
    return stack_planes(chunk_start + chunk_size, None if aligned else diagonal, q_len)


def prefix_lm(
    prefix_lengths: int | Tensor,
    q_len: int,
    kv_len: int | None = None,
    *,
    q_offset: Offset | None = None,
    kv_offset: Offset = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Causal, but every query sees the first `prefix_lengths` positions.

    Args:
        prefix_lengths: an `int`, or integers `[B]` with one length for each batch row.

    Returns:
        int32 `[B or 1, 1, 2, S_k]`.

    Raises:
        TypeError: when `prefix_lengths` is no integer, or a tensor of other values.
        ValueError: when it has another shape, or a length is negative.

    >>> prefix_lm(2, 4).tolist()
    [[[[4, 4, 4, 4], [0, 0, 2, 3]]]]
    """
    kv_len = q_len if kv_len is None else kv_len
    if isinstance(prefix_lengths, Tensor):
        check_int_tensor("prefix_lengths", prefix_lengths, (1,), "[B]")
        device = prefix_lengths.device if device is None else device
        prefix_lengths = prefix_lengths[:, None]
    else:
        prefix_lengths = check_size("prefix_lengths", prefix_lengths, least=0)
    diagonal = own_rows_of_keys(q_len, kv_len, q_offset, kv_offset, device)
    position = own_rows_of_keys(q_len, kv_len, 0, kv_offset, diagonal.device)
    ute = diagonal.masked_fill(position < prefix_lengths, 0)
    return stack_planes(torch.full_like(ute, q_len), ute, q_len)


def from_padding_mask(
    padding_mask: Tensor,
    *,
    q_len: int | None = None,
    is_causal: bool = False,
    q_offset: Offset | None = None,
    kv_offset: Offset = 0,
) -> Tensor:
    """Keys where a 2-D mask is 0 are hidden from every query. Rows of padding are not hidden, as in Transformers.

    Args:
        padding_mask: bool or numbers `[B, S_k]` or `[S_k]`, 0 for padding, on either side.
        q_len: S_q, by default S_k.

    Returns:
        int32 `[B, 1, C, S_k]`, C = 1 when causal and aligned at the bottom right, else 2.

    Raises:
        TypeError: when `padding_mask` is not a tensor of bool or numbers.
        ValueError: when it has another shape.

    >>> from_padding_mask(torch.tensor([[0, 1, 1]]), is_causal=True).tolist()
    [[[[0, 3, 3]]]]
    """
    padding_mask = check_per_position("padding_mask", padding_mask)
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
    window_limits_blocks: bool = False,
    q_len: int | None = None,
    kv_len: int | None = None,
    q_offset: Offset | None = None,
    kv_offset: Offset = 0,
) -> Tensor:
    """Causal, and bidirectional inside each block: images in a stream of text.

    Args:
        block_ids: integers `[B, S]` or `[S]`, for the positions 0 to S - 1 of the sequence. A block is a run of
            *adjacent* equal ids that are not negative. `q_len` and `kv_len` default to S, `q_offset` to S - q_len.
        window: outside its block a query sees only the last `window` keys, its own included (the first rule of
            Gemma 3's local layers).
        window_limits_blocks: whether the window hides keys of a query's own block as well, if they are that far before
            it. This is the rule of Gemma 3 and 4 today.

    Returns:
        int32 `[B, 1, 2, S_k]`.

    Raises:
        TypeError: when `block_ids` is not an integer tensor.
        ValueError: when it is neither `[B, S]` nor `[S]`, `window` is less than 1, or missing where it limits blocks.

    >>> causal_with_blocks(torch.tensor([-1, 0, 0, -1])).tolist()
    [[[[4, 4, 4, 4], [0, 1, 1, 3]]]]
    """
    if window is None and window_limits_blocks:
        raise ValueError("`window_limits_blocks` needs a `window`")
    window = None if window is None else _checked_window(window, is_causal=True)
    block_ids = check_per_position("block_ids", block_ids)
    ends = run_ends(run_numbers(torch.ne, block_ids, previous_values(block_ids)))
    q_len, kv_len, q_offset, kv_offset = default_lengths_and_offsets(
        block_ids.shape[-1], q_len, kv_len, q_offset, kv_offset
    )
    is_text = block_ids < 0
    start = run_edges_at_keys(torch.searchsorted(ends, ends, out_int32=True), is_text, FAR, kv_len, kv_offset)
    diagonal = own_rows_of_keys(q_len, kv_len, q_offset, kv_offset, block_ids.device)
    ute = torch.minimum(diagonal, start - q_offset)
    if window is None:
        return stack_planes(torch.full_like(ute, q_len), ute, q_len)
    lts, _ = _band(diagonal, window, is_causal=True)
    if window_limits_blocks:
        return stack_planes(lts, ute, q_len)
    end = run_edges_at_keys(ends, is_text, -FAR, kv_len, kv_offset)
    return stack_planes(torch.maximum(lts, end - q_offset), ute, q_len)


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
    """A sliding window, and global tokens that every query sees and that see every key.

    Causal, these are attention sinks (StreamingLLM, arXiv 2309.17453). Bidirectional, they are the masks of Longformer
    (arXiv 2004.05150) and of the FlashMask paper.

    Args:
        num_global: the first `num_global` positions are global tokens.
        window: counts as in `sliding_window`.

    Returns:
        int32 `[1, 1, C, S_k]`: C = 4 when bidirectional, C = 1 when causal and aligned at the bottom right, else 2.

    Raises:
        TypeError: when `num_global` or `window` is no integer.
        ValueError: when `num_global` is negative, `window` is too small, or a length is negative.

    >>> global_and_sliding_window(1, 2, 5).tolist()
    [[[[5, 3, 4, 5, 5]]]]
    """
    kv_len = q_len if kv_len is None else kv_len
    window = _checked_window(window, is_causal)
    num_global = check_size("num_global", num_global, least=0)
    diagonal = own_rows_of_keys(q_len, kv_len, q_offset, kv_offset, device)
    lts, ute = _band(diagonal, window, is_causal)
    # The rows before this one are those of global tokens.
    first_local_row = num_global - (kv_offset + kv_len - q_len if q_offset is None else q_offset)
    is_global = diagonal < first_local_row
    if is_causal:
        aligned = is_triangle_at_bottom_right(q_len, kv_len, q_offset, kv_offset)
        return stack_planes(lts.masked_fill(is_global, q_len), None if aligned else ute, q_len)
    lts = lts.clamp(min=first_local_row).masked_fill(is_global, q_len)
    ute = ute.masked_fill(is_global, 0)
    uts = torch.zeros_like(ute) + first_local_row
    planes = torch.stack([lts, torch.full_like(lts, q_len), uts, ute])
    return planes.clamp(0, q_len).to(torch.int32)[None, None]


def hash_sparse(query_hashes: Tensor, key_hashes: Tensor, *, is_causal: bool = True) -> Tensor:
    """A query sees the keys with its own hash, among queries and keys that are sorted by their hashes.

    After sorting, the queries of one bucket are neighbours, and a causal mask between original positions stays one
    interval of rows for each key. This is the hash-sparse mask of the FlashMask paper and of arXiv 2306.01160. Queries
    and keys are in the order `hashes.argsort(dim=-1, stable=True)`: gather query, key and value by it before attention.

    Args:
        query_hashes: integers `[B or 1, H or 1, S_q]` in the order of the sequence, of its last S_q positions. Tokens
            with a negative hash are dropped: such a query sees nothing, such a key is hidden.
        key_hashes: integers `[B or 1, H or 1, S_k]`, likewise.

    Returns:
        int32 `[B, H, 2, S_k]` for the sorted rows and columns.

    Raises:
        TypeError: when the hashes are not integer tensors.
        ValueError: when their shapes are others, or do not broadcast over batch and heads.

    >>> hashes = torch.tensor([[[7, 3, 7]]])  # sorted: position 1, then positions 0 and 2
    >>> hash_sparse(hashes, hashes).tolist()
    [[[[1, 3, 3], [0, 1, 2]]]]
    """
    check_int_tensor("query_hashes", query_hashes, (3,), "[B or 1, H or 1, S_q]")
    check_int_tensor("key_hashes", key_hashes, (3,), "[B or 1, H or 1, S_k]")
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
        # Bucket and position in one number. The first row of a bucket stands for the bucket, so that no hash overflows.
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
    """Which block of tokens sees which. Blocks are documents, turns, images, or a fixed number of tokens each.

    Args:
        mask: bool `[n, n]` or `[B or 1, H or 1, n, n]`: `mask[a, b]` says whether the queries of block a see the keys
            of block b. The arguments are read on the host.
        lengths: for each of the n blocks its number of tokens, 0 or more. A list of such lists makes a batch.
        kv_len: length to pad to; padding is hidden, and its rows see nothing. Default: the longest row.
        device: of the bounds; default: of `mask`.

    Returns:
        int32 `[B, H or 1, C, S_k]`, the fewest planes that say the same. O(S_k + n^2) memory.

    Raises:
        TypeError: when `mask` is not a bool tensor.
        ValueError: when `mask` and `lengths` do not match, a length is negative, or `kv_len` is too small.
        TooManyIntervalsError: when the keys of a block need more than `MAX_INTERVALS` hidden intervals.

    >>> sees = torch.tensor([[True, False, False], [False, True, False], [True, True, True]])
    >>> from_block_mask(sees, [2, 2, 1]).tolist()  # two documents, and a question about both
    [[[[2, 2, 5, 5, 5], [4, 4, 0, 0, 0], [5, 0, 0, 0, 0], [0, 1, 2, 3, 4]]]]
    """
    if dtype_or_type(mask) != torch.bool:
        raise TypeError(f"`mask` must be a bool tensor with True = visible, got {dtype_or_type(mask)}")
    if mask.ndim not in (2, 4) or mask.shape[-1] != mask.shape[-2]:
        raise ValueError(f"`mask` must be [n, n] or [B or 1, H or 1, n, n], got shape {list(mask.shape)}")
    device = mask.device if device is None else device
    mask = mask.cpu() if mask.ndim == 4 else mask.cpu()[None, None]
    length_rows = check_integer_lists("lengths", lengths)
    for row in length_rows:
        if len(row) != mask.shape[3] or min(row, default=0) < 0:
            raise ValueError(f"`lengths` must hold a length of 0 or more for each of {mask.shape[3]} blocks, got {row}")
    if 1 not in (mask.shape[0], len(length_rows)) and mask.shape[0] != len(length_rows):
        raise ValueError(f"`mask` has a batch of {mask.shape[0]}, but `lengths` has {len(length_rows)} rows")
    kv_len = default_kv_len(length_rows, kv_len)

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
    planes = fewest_planes(start, end, kv_len, (first_key if is_causal else end_key - 1)[:, 0])
    _check_block_intervals(planes.shape[2] // 2)
    bounds = planes_from_blocks(planes, edges[:, 1:-1].contiguous(), kv_len, device)
    if is_causal and planes.shape[2] > 1:
        # What hides row 0 ends with the triangle of each key, or further down if its block does not see itself.
        upper_end = bounds[:, :, 3 if planes.shape[2] == 4 else 1]
        upper_end.clamp_(min=torch.arange(kv_len, dtype=torch.int32, device=bounds.device))
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
        startend_row_indices: integers `[B, H_m, S_k, C]`, with C = 1 (LTS) or 2 (LTS, LTE) when causal, and C = 2
            (LTS, UTE) or 4 (LTS, LTE, UTS, UTE) when not. The causal form with two channels becomes C = 4.
        is_causal: whether the indices are to be read as causal.
        q_len: S_q when it differs from S_k; only the causal triangle of that form depends on it.
        num_heads: number of query heads; needed when H_m is the number of key heads, each standing for
            `num_heads / H_m` neighbouring query heads.

    Returns:
        int32 `[B, 1 or num_heads, C, S_k]`.

    Raises:
        TypeError: when `startend_row_indices` is not an integer tensor.
        ValueError: when its shape or its number of channels is another, or `num_heads` is not a multiple of H_m.

    >>> from_startend_row_indices(torch.tensor([[[[2], [3], [3]]]]), is_causal=True).tolist()
    [[[[2, 3, 3]]]]
    """
    check_int_tensor("startend_row_indices", startend_row_indices, (4,), "[B, H_m, S_k, C]")
    batch, heads, kv_len, channels = startend_row_indices.shape
    if channels not in ((1, 2) if is_causal else (2, 4)):
        accepted = "1 (LTS) or 2 (LTS, LTE)" if is_causal else "2 (LTS, UTE) or 4 (LTS, LTE, UTS, UTE)"
        raise ValueError(
            f"`startend_row_indices` with is_causal={is_causal} must have {accepted} channels in its last dimension, "
            f"got shape {list(startend_row_indices.shape)}"
        )
    planes = startend_row_indices.transpose(2, 3)
    if planes.element_size() > 4:  # "never" may be a number that int32 does not hold
        planes = planes.clamp(-NO_END, NO_END)
    planes = planes.to(torch.int32)
    if is_causal and channels == 2:
        q_len = kv_len if q_len is None else q_len
        ute = own_rows_of_keys(q_len, kv_len, None, 0, planes.device).clamp(0, q_len).expand(batch, heads, 1, kv_len)
        planes = torch.cat([planes, torch.zeros_like(ute), ute], dim=2)
    if num_heads is not None and heads not in (1, num_heads):
        if num_heads % heads:
            raise ValueError(f"`num_heads` ({num_heads}) must be a multiple of the {heads} heads of the indices")
        planes = planes.repeat_interleave(num_heads // heads, dim=1)
    return planes.contiguous()


def _checked_window(window: int, is_causal: bool) -> int:
    smallest, kind = (1, "causal") if is_causal else (0, "bidirectional")
    check_integer("window", window)
    if window < smallest:
        raise ValueError(f"`window` must be at least {smallest} in a {kind} mask, got {window}")
    return min(window, FAR)


def _left_and_right(window: int | tuple[int | None, int | None], is_causal: bool | None) -> tuple[int, int]:
    """How many keys before and after its own a query sees; FAR is unlimited."""
    if not isinstance(window, tuple):
        is_causal = True if is_causal is None else is_causal
        window = _checked_window(window, is_causal)
        return (window - 1, 0) if is_causal else (window, window)
    if is_causal is not None:
        raise ValueError("`is_causal` belongs to a `window` that is a number: a pair (left, 0) is causal")
    sides: tuple[int | None, ...] = window
    for side in sides:
        if side is not None:
            check_integer("window", side)
    if len(sides) != 2 or any(side is not None and side < 0 for side in window):
        raise ValueError(f"`window` must be (left, right), each 0 or more, or None for unlimited, got {window}")
    left, right = (FAR if side is None else min(side, FAR) for side in window)
    return left, right


def _band(diagonal: Tensor, window: int, is_causal: bool) -> tuple[Tensor, Tensor]:
    """LTS and UTE of a window around the row of each key's own position, as `sliding_window` counts it."""
    return (diagonal + window, diagonal) if is_causal else (diagonal + (window + 1), diagonal - window)


def _check_block_intervals(intervals: int) -> None:
    if intervals > MAX_INTERVALS:
        raise TooManyIntervalsError(
            f"`mask` needs {intervals} hidden intervals for the keys of a block, bounds hold at most {MAX_INTERVALS}. "
            "Use attn_implementation='sdpa' for such a mask"
        )
