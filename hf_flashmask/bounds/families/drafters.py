"""Training of draft models for speculative decoding: DFlash and its kin, EAGLE-3, P-EAGLE."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..algebra import hide_keys, intersect
from ..constructors import causal
from ..constructors import sliding_window as window_before
from ..form import (
    FAR,
    MAX_INTERVALS,
    TooManyIntervalsError,
    check_flags,
    check_int_tensor,
    check_per_position,
    check_size,
    refuse_without_waiting,
)
from ..intervals import concatenate_keys, from_ordered_intervals
from .runs import check_rows_of_runs, document_runs_of


def anchored_blocks(
    anchor_positions: Tensor,
    block_size: int,
    ctx_len: int,
    *,
    block_keep_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    is_causal: bool = False,
    sliding_window: int | None = None,
    window_from: Literal["anchor", "query"] = "anchor",
) -> Tensor:
    """Parallel drafters (DFlash and DSpark in SpecForge, JetSpec): each block sees the context before its anchor.

    Queries are N blocks of `block_size` draft tokens. Keys are `[context | blocks]`: `ctx_len` hidden states of the
    target model, and the draft tokens. A query of a block with anchor p sees the context keys k < p of p's document,
    and its own block.

    Without a window, DFlash's blocks see themselves whole. With one, they are causal in SpecForge, and in speculators
    unless its `sliding_window_non_causal` is True: pass `is_causal=True` for such layers.

    Args:
        anchor_positions: integers `[B, N]`, ascending in each row.
        block_keep_mask: bool `[B, N]`, False for blocks that see nothing and that nothing sees: the last ones of a row.
        document_ids: integers `[B, ctx_len]` or `[ctx_len]` of the context, see `bounds.families`.
        is_causal: a query sees no later key of its own block (JetSpec; layers with a window, see above).
        sliding_window: of local layers, W. From the anchor, a block sees the context keys `k >= p - W`. From the query,
            the draft token at offset o of its block sees the context keys `k > p + o - W`.
        window_from: which of the two.

    Returns:
        int32 `[B, 1, C, ctx_len + N block_size]` for `N block_size` queries. C = 2, or `2 block_size` for a window from
        the query over blocks of more than two tokens: `bounds.simplify` needs fewer where anchors are far apart.

    Raises:
        TypeError: when an argument is not a tensor of the right type.
        ValueError: when shapes or sizes are others, anchors do not ascend, or one is not in the context; on a device
            the last two are assertions there.
        TooManyIntervalsError: for a window from the query when `block_size` is more than `MAX_INTERVALS`.

    >>> from hf_flashmask.bounds import to_dense
    >>> to_dense(anchored_blocks(torch.tensor([[1, 3]]), 2, 4), 4)[0, 0].int()
    tensor([[1, 0, 0, 0, 1, 1, 0, 0],
            [1, 0, 0, 0, 1, 1, 0, 0],
            [1, 1, 1, 0, 0, 0, 1, 1],
            [1, 1, 1, 0, 0, 0, 1, 1]], dtype=torch.int32)
    """
    check_int_tensor("anchor_positions", anchor_positions, (2,), "[B, N]")
    check_size("block_size", block_size)
    check_size("ctx_len", ctx_len, least=0)
    if sliding_window is not None:
        sliding_window = check_size("sliding_window", sliding_window)
    if window_from not in ("anchor", "query"):
        raise ValueError(f"`window_from` must be 'anchor' or 'query', got {window_from!r}")
    anchors = anchor_positions.to(torch.int32)
    last = ctx_len if document_ids is None else ctx_len - 1  # after the context there is no document
    is_outside = (anchors < 0) | (anchors > last)
    if block_keep_mask is not None:
        check_flags("block_keep_mask", block_keep_mask, anchors)
        anchors, is_outside = anchors.masked_fill(~block_keep_mask, FAR), is_outside & block_keep_mask
    refuse_without_waiting(
        anchors[:, 1:] < anchors[:, :-1],
        ValueError("`anchor_positions` must ascend in each row, and blocks that are not kept must be the last ones"),
    )
    refuse_without_waiting(
        is_outside,
        ValueError(
            "`anchor_positions` of blocks that are kept must be 0 or more, and at most `ctx_len`, with `document_ids` "
            "`ctx_len - 1`"
        ),
    )
    q_len = anchors.shape[1] * block_size
    row = torch.arange(q_len, dtype=torch.int32, device=anchors.device)
    start = row - row % block_size
    own = from_ordered_intervals([(row if is_causal else start, start + block_size)], q_len)
    if block_keep_mask is not None:
        own = hide_keys(own, ~block_keep_mask.repeat_interleave(block_size, dim=1))

    documents = document_runs_of(document_ids, ctx_len, anchors.device)
    check_rows_of_runs(documents, len(anchors))
    batch = max(len(anchors), len(documents.runs.end) if documents.are_packed else 1)
    anchors = anchors.expand(batch, -1).contiguous()
    key = documents.position.expand(batch, -1).contiguous()
    end = documents.runs.end if documents.are_packed else torch.full_like(documents.position, FAR)
    end = end.expand_as(key).contiguous()
    first_row = torch.searchsorted(anchors, key, right=True, out_int32=True) * block_size
    if sliding_window is None or window_from == "anchor" or q_len == 0:
        past = end if sliding_window is None else torch.minimum(end, key + (sliding_window + 1))
        end_row = torch.searchsorted(anchors, past, out_int32=True) * block_size
        context = from_ordered_intervals([(first_row, end_row)], q_len)
    else:
        context = _window_of_drafter(anchors, block_size, key, end, key + sliding_window, first_row)
    return concatenate_keys(documents.hide_padding(context), own, q_len=q_len)


def _window_of_drafter(
    anchors: Tensor, block_size: int, key: Tensor, end: Tensor, limit: Tensor, first_row: Tensor
) -> Tensor:
    """Blocks see a key until the position of their queries reaches `limit`: the last blocks see it with a part of them.

    A block with the anchor `limit - c` sees it with its first c queries. The rest of the last such block joins what
    lies below, so c = 1 takes no interval of its own.
    """
    if block_size > MAX_INTERVALS:
        raise TooManyIntervalsError(
            f"a window from the query needs `block_size` ({block_size}) hidden intervals, bounds hold at most "
            f"{MAX_INTERVALS}: use window_from='anchor', or bounds.from_mask_mod, which finds out how many it needs"
        )
    refuse_without_waiting(
        (anchors[:, 1:] == anchors[:, :-1]) & (anchors[:, 1:] < FAR),
        ValueError("`anchor_positions` must differ from each other under a window from the query"),
    )
    q_len = anchors.shape[1] * block_size
    blocks = torch.searchsorted(anchors, torch.minimum(end, limit), out_int32=True)
    last_block = blocks.sub(1).clamp(min=0)
    seen_by_last = (limit - anchors.gather(1, last_block.long())).clamp(0, block_size)
    below = torch.maximum(last_block * block_size + seen_by_last, first_row)
    below = torch.where(blocks * block_size > first_row, below, first_row)
    hidden = [(below, torch.full_like(below, q_len))]
    if block_size > 2:
        part = torch.arange(2, block_size, dtype=torch.int32, device=anchors.device)[:, None]
        wanted = limit[:, None] - part
        block = torch.searchsorted(anchors, wanted.flatten(1), out_int32=True).view_as(wanted)
        anchor = anchors.gather(1, block.flatten(1).long().clamp(max=anchors.shape[1] - 1)).view_as(wanted)
        is_cut = (anchor == wanted) & (wanted > key[:, None]) & (wanted < end[:, None])
        starts = (block * block_size + part).masked_fill(~is_cut, 0)
        ends = ((block + 1) * block_size).masked_fill(~is_cut, 0)
        hidden += [*zip(starts.unbind(1), ends.unbind(1))]
    if len(hidden) == 1:
        return torch.stack([below, first_row], dim=1)[:, None]
    hidden.append((torch.zeros_like(first_row), first_row))
    return torch.stack([edge for interval in hidden for edge in interval], dim=1)[:, None]


def training_time_test(
    step: int,
    *,
    document_ids: Tensor | None = None,
    length: int | None = None,
    sliding_window: int | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """EAGLE-3's training-time test (arXiv 2503.01840): S queries, and the keys of all steps so far.

    Keys are `[S of step 0 | S of step 1 | ... | S of this step]`. The first S are causal, in each document; of the keys
    of a later step, a query sees the one at its own position.

    Args:
        step: 0 for the first one, which is plain causal.
        document_ids, length, device: see `bounds.families`.
        sliding_window: a query sees the last `sliding_window` keys of step 0, its own included.

    Returns:
        int32 `[B or 1, 1, C, (step + 1) S]` for S queries; C = 1 for step 0, else 2.

    Raises:
        TypeError: when `document_ids` is not an integer tensor.
        ValueError: when it has another shape, or `step` or `sliding_window` is too small.

    >>> from hf_flashmask.bounds import to_dense
    >>> to_dense(training_time_test(1, length=3), 3)[0, 0].int()
    tensor([[1, 0, 0, 1, 0, 0],
            [1, 1, 0, 0, 1, 0],
            [1, 1, 1, 0, 0, 1]], dtype=torch.int32)
    """
    check_size("step", step, least=0)
    documents = document_runs_of(document_ids, length, device)
    length, device = documents.position.shape[0], documents.position.device
    is_packed = documents.are_packed
    base = documents.hide_padding(documents.runs.end[:, None, None]) if is_packed else causal(length, device=device)
    if sliding_window is not None:
        base = intersect(base, window_before(sliding_window, length, device=device))
    if step == 0:
        return base
    itself = documents.hide_padding(from_ordered_intervals([(documents.position, documents.position + 1)], length))
    return concatenate_keys(base, *[itself] * step, q_len=length)


def parallel_eagle(anchors: Tensor, depths: Tensor, *, document_ids: Tensor | None = None) -> Tensor:
    """P-EAGLE (vLLM's speculators): tokens drafted in parallel, sorted by anchor and depth, which makes them a tree.

    An element is a token at some depth after an anchor. It sees the elements of depth 0 at anchors up to its own, in
    the same document, and those of its anchor up to its own depth. The loss does not depend on the order of the
    elements. As published, by depth and then anchor, a key has 9 hidden intervals at 8 depths; sorted, it has the
    triangle and one:

        order = (anchors * num_depths + depths).argsort()

    Args:
        anchors, depths: integers `[B, E]` or `[E]`, ascending by anchor and, at one anchor, by depth. Elements with a
            negative depth are padding, at the end of a row.
        document_ids: integers `[B, S]` or `[S]` of the sequence that anchors are positions of, see `bounds.families`.

    Returns:
        int32 `[B, 1, 1, E]`.

    Raises:
        TypeError: when an argument is not an integer tensor.
        ValueError: when shapes differ, elements are not sorted, or an anchor is no position of `document_ids`; on a
            device the last two are assertions there.

    >>> from hf_flashmask.bounds import to_dense
    >>> to_dense(parallel_eagle(torch.tensor([0, 0, 1, 2, 2]), torch.tensor([0, 1, 0, 0, 1])))[0, 0].int()
    tensor([[1, 0, 0, 0, 0],
            [1, 1, 0, 0, 0],
            [1, 0, 1, 0, 0],
            [1, 0, 1, 1, 0],
            [1, 0, 1, 1, 1]], dtype=torch.int32)
    """
    anchors, depths = check_per_position("anchors", anchors), check_per_position("depths", depths)
    if anchors.shape != depths.shape:
        raise ValueError(
            f"`anchors` and `depths` must have the same shape, got {list(anchors.shape)} and {list(depths.shape)}"
        )
    is_padding = depths < 0
    sorted_by = anchors.to(torch.int32).masked_fill(is_padding, FAR).contiguous()
    same = (sorted_by[:, 1:] == sorted_by[:, :-1]) & ~is_padding[:, 1:]
    refuse_without_waiting(
        (sorted_by[:, 1:] < sorted_by[:, :-1]) | (same & (depths[:, 1:] <= depths[:, :-1])),
        ValueError("elements must be sorted by `anchors`, then by `depths`, and padding must be last"),
    )
    past = torch.full_like(sorted_by, FAR)
    if document_ids is not None:
        documents = document_runs_of(document_ids)
        check_rows_of_runs(documents, len(sorted_by))
        (document_ids,) = documents.ids
        refuse_without_waiting(
            ((anchors < 0) | (anchors >= document_ids.shape[1])) & ~is_padding,
            ValueError("`anchors` must be positions of `document_ids`: 0 or more, and less than their length"),
        )
        batch = max(len(sorted_by), len(document_ids))
        sorted_by, is_padding = sorted_by.expand(batch, -1).contiguous(), is_padding.expand(batch, -1)
        position = sorted_by.clamp(0, document_ids.shape[1] - 1).long()
        past = documents.runs.end.expand(batch, -1).gather(1, position)
        is_padding = is_padding | (document_ids.expand(batch, -1).gather(1, position) < 0)
    chain_end = torch.searchsorted(sorted_by, sorted_by, right=True, out_int32=True)
    document_end = torch.searchsorted(sorted_by, past.contiguous(), out_int32=True)
    lts = torch.where(depths == 0, document_end, chain_end)
    return lts.masked_fill(is_padding, 0)[:, None, None]
