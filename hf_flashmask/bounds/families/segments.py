"""Rows with parts that only some of the later tokens see: chunks, items, branches, summaries, histories."""

from __future__ import annotations

import torch
from torch import Tensor

from ..form import check_flags, check_int_tensor, check_per_position, check_size, refuse_without_waiting, stack_planes
from ..intervals import from_ordered_intervals
from .runs import document_runs_beside, document_runs_of, runs_of


def independent_chunks(chunk_ids: Tensor, *, document_ids: Tensor | None = None) -> Tensor:
    """Passages that do not see each other, then a question that sees all (Block-Attention, arXiv 2409.15355; TurboRAG).

    Causal. Keys outside of chunks, such as a system prompt, are seen by all later tokens. Keys of a chunk are seen by
    the chunk, and by what comes after the document's last chunk.

    Args:
        chunk_ids: integers `[B, S]` or `[S]`; a chunk is a run of *adjacent* equal ids that are not negative.
        document_ids: see `bounds.families`.

    Returns:
        int32 `[B, 1, C, S]`, C = 6 with `document_ids`, else 4.

    Raises:
        TypeError: when ids are not integer tensors.
        ValueError: when they have other shapes.

    >>> from hf_flashmask.bounds import to_dense
    >>> to_dense(independent_chunks(torch.tensor([-1, 0, 0, 1, -1])))[0, 0].int()
    tensor([[1, 0, 0, 0, 0],
            [1, 1, 0, 0, 0],
            [1, 1, 1, 0, 0],
            [1, 0, 0, 1, 0],
            [1, 1, 1, 1, 1]], dtype=torch.int32)
    """
    chunk_ids = check_per_position("chunk_ids", chunk_ids)
    documents = document_runs_beside(chunk_ids, document_ids)
    chunk_ids, document_end = torch.broadcast_tensors(chunk_ids, documents.runs.end)
    chunk_end = runs_of(chunk_ids, *documents.ids).end
    is_outside = chunk_ids < 0
    # The end of the last chunk up to each position; at the last position of a document, the end of its last chunk.
    last_chunk_end = chunk_end.masked_fill(is_outside, 0).cummax(1).values
    question = last_chunk_end.gather(1, (document_end - 1).long())
    position = documents.position.expand_as(chunk_ids)
    visible = [
        (position, torch.where(is_outside, document_end, chunk_end)),
        (torch.where(is_outside, document_end, question), document_end),
    ]
    mask = from_ordered_intervals(visible, position.shape[1], to_the_last=not documents.are_packed)
    return documents.hide_padding(mask)


def isolated_items(item_ids: Tensor, *, document_ids: Tensor | None = None, is_causal: bool = True) -> Tensor:
    """Items that see the context and themselves, not each other: multi-item scoring, rerankers, PFNs.

    Args:
        item_ids: integers `[B, S]` or `[S]`; an item is a run of *adjacent* equal ids that are not negative. The other
            tokens are context: a query, the training data of a PFN (arXiv 2112.10510).
        document_ids: see `bounds.families`.
        is_causal: whether every key after a query's own position is hidden as well.

    Returns:
        int32 `[B, 1, C, S]`, C = 1 when causal, else 2.

    Raises:
        TypeError: when ids are not integer tensors.
        ValueError: when they have other shapes.

    >>> from hf_flashmask.bounds import to_dense
    >>> to_dense(isolated_items(torch.tensor([-1, -1, 0, 1]), is_causal=False))[0, 0].int()
    tensor([[1, 1, 0, 0],
            [1, 1, 0, 0],
            [1, 1, 1, 0],
            [1, 1, 0, 1]], dtype=torch.int32)
    """
    item_ids = check_per_position("item_ids", item_ids)
    documents = document_runs_beside(item_ids, document_ids)
    items, is_context = runs_of(item_ids, *documents.ids), item_ids < 0
    lts = torch.where(is_context, documents.runs.end, items.end)
    if is_causal:
        return documents.hide_padding(lts[:, None, None])
    ute = torch.where(is_context, documents.runs.start, items.start)
    return documents.hide_padding(torch.stack([lts, ute], dim=1)[:, None])


def gist_tokens(chunk_ids: Tensor, is_gist: Tensor, *, document_ids: Tensor | None = None) -> Tensor:
    """What comes after a chunk sees only its summary tokens (gist tokens, arXiv 2304.08467; Activation Beacon).

    Causal. Later chunks see the gist tokens of earlier ones, and tokens outside of chunks.

    Args:
        chunk_ids: integers `[B, S]` or `[S]`; a chunk is a run of *adjacent* equal ids that are not negative, with its
            gist tokens.
        is_gist: bool, of the same shape.
        document_ids: see `bounds.families`.

    Returns:
        int32 `[B, 1, 1, S]`.

    Raises:
        TypeError: when ids are not integer tensors.
        ValueError: when they have other shapes, or `is_gist` is not a bool tensor of the shape of `chunk_ids`.

    >>> gist_tokens(torch.tensor([0, 0, 0, 1, 1]), torch.tensor([False, False, True, False, False])).tolist()
    [[[[3, 3, 5, 5, 5]]]]
    """
    check_flags("is_gist", is_gist, chunk_ids)
    chunk_ids = check_per_position("chunk_ids", chunk_ids)
    documents = document_runs_beside(chunk_ids, document_ids)
    chunks = runs_of(chunk_ids, *documents.ids)
    lts = torch.where(is_gist.view_as(chunk_ids) | (chunk_ids < 0), documents.runs.end, chunks.end)
    return documents.hide_padding(lts[:, None, None])


def sinks_and_window(
    num_sinks: int,
    window: int,
    *,
    document_ids: Tensor | None = None,
    length: int | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """A causal sliding window, and the first tokens of each document (StreamingLLM, arXiv 2309.17453, packed).

    Args:
        num_sinks: so many first tokens that all of their document see.
        window: a query sees the last `window` keys, its own included.
        document_ids, length, device: see `bounds.families`.

    Returns:
        int32 `[B or 1, 1, 1, S]`.

    Raises:
        TypeError: when `document_ids` is not an integer tensor.
        ValueError: when it has another shape, or a number is too small.

    >>> sinks_and_window(1, 2, document_ids=torch.tensor([0, 0, 0, 0, 1, 1])).tolist()
    [[[[4, 3, 4, 4, 6, 6]]]]
    """
    num_sinks, window = check_size("num_sinks", num_sinks, least=0), check_size("window", window)
    documents = document_runs_of(document_ids, length, device)
    position, (start, end) = documents.position, documents.runs
    is_sink = position - start < num_sinks
    lts = torch.where(is_sink, end, torch.minimum(position + window, end))
    return documents.hide_padding(stack_planes(lts, None, lts.shape[-1]))


def hstu(
    cu_seqlens: Tensor,
    length: int,
    *,
    num_contexts: Tensor | None = None,
    num_targets: Tensor | None = None,
    target_group_size: int = 1,
) -> Tensor:
    """HSTU's mask (arXiv 2402.17152): contexts, a history, and targets in groups that do not see each other.

    Contexts see all contexts and the whole history; the rest is causal. A target sees its own group and no other one.
    HSTU's scores are not a softmax: this is the mask alone, with the arguments of NVIDIA's `hstu_attn_varlen_func`.

    Args:
        cu_seqlens: integers `[n + 1]`, the cumulative lengths of n sequences. Keys past the last one are hidden.
        length: S.
        num_contexts, num_targets: integers `[n]`, the first and the last tokens of each sequence that are contexts and
            targets, together no more than the sequence has. Default: none.
        target_group_size: targets of a group.

    Returns:
        int32 `[1, 1, C, S]`, C = 6 with `num_contexts`, else 2.

    Raises:
        TypeError: when an argument is not an integer tensor.
        ValueError: when shapes are others, a number is too small, `cu_seqlens` do not ascend from 0 to at most
            `length`, or a sequence has fewer tokens than contexts and targets; on a device, of the numbers in tensors,
            this is an assertion there.

    >>> from hf_flashmask.bounds import to_dense
    >>> ends, one, two = torch.tensor([0, 5]), torch.tensor([1]), torch.tensor([2])
    >>> to_dense(hstu(ends, 5, num_contexts=one, num_targets=two))[0, 0].int()
    tensor([[1, 1, 1, 0, 0],
            [1, 1, 0, 0, 0],
            [1, 1, 1, 0, 0],
            [1, 1, 1, 1, 0],
            [1, 1, 1, 0, 1]], dtype=torch.int32)
    """
    check_int_tensor("cu_seqlens", cu_seqlens, (1,), "[n + 1]")
    if cu_seqlens.shape[0] == 0:
        raise ValueError("`cu_seqlens` must hold at least the 0 that it begins with, got shape [0]")
    target_group_size = check_size("target_group_size", target_group_size)
    check_size("length", length, least=0)
    borders = cu_seqlens.to(torch.int32)
    unused = borders.diff()
    for name, counts in (("num_contexts", num_contexts), ("num_targets", num_targets)):
        if counts is not None:
            check_int_tensor(name, counts, (1,), "[n]")
            if counts.shape[0] != unused.shape[0]:
                raise ValueError(f"`{name}` must have {unused.shape[0]} values, got {counts.shape[0]}")
            refuse_without_waiting(counts < 0, ValueError(f"`{name}` must not be negative"))
            unused = unused - counts
    refuse_without_waiting(borders[:1] != 0, ValueError("`cu_seqlens` must begin with 0"))
    refuse_without_waiting(borders[-1:] > length, ValueError("`cu_seqlens` must not end past `length`"))
    refuse_without_waiting(
        unused < 0,
        ValueError(
            "`cu_seqlens` must not decrease, and must leave each sequence as many tokens as `num_contexts` and "
            "`num_targets` are together"
        ),
    )
    position = torch.arange(length, dtype=torch.int32, device=cu_seqlens.device)
    sequence = torch.searchsorted(borders, position, right=True)
    # Keys past the last sequence end at row 0, and are seen by none.
    start, end = torch.cat([borders[:1], borders])[sequence], torch.cat([borders, borders[:1]])[sequence]

    def of_sequence(counts: Tensor) -> Tensor:
        return torch.nn.functional.pad(counts.to(torch.int32), (1, 1))[sequence]

    lts = end
    is_target = torch.zeros_like(position, dtype=torch.bool)
    if num_targets is not None:
        first_target = end - of_sequence(num_targets)
        is_target = position >= first_target
        group_end = position - (position - first_target) % target_group_size + target_group_size
        lts = torch.where(is_target, torch.minimum(group_end, end), end)
    if num_contexts is None:
        return from_ordered_intervals([(position, lts)], length)
    past_contexts = start + of_sequence(num_contexts)
    by_contexts = (start, torch.where(is_target, start, past_contexts))
    return from_ordered_intervals([by_contexts, (torch.maximum(position, past_contexts), lts)], length)


def fork_and_join(branch_ids: Tensor, *, document_ids: Tensor | None = None) -> Tensor:
    """Branches that do not see each other, and what comes after them that sees them all (Multiverse, arXiv 2506.09991).

    Causal. Branches that follow each other directly are parallel. Tokens outside of branches fork them and join them.

    Args:
        branch_ids: integers `[B, S]` or `[S]`; a branch is a run of *adjacent* equal ids that are not negative.
            `[B, levels, S]` for branches inside of branches, the outermost first.
        document_ids: see `bounds.families`.

    Returns:
        int32 `[B, 1, C, S]`, C = 2 (levels + 2) with `document_ids`, else 2 (levels + 1).

    Raises:
        TypeError: when ids are not integer tensors.
        ValueError: when they have other shapes.
        TooManyIntervalsError: when there are too many levels.

    >>> from hf_flashmask.bounds import to_dense
    >>> to_dense(fork_and_join(torch.tensor([-1, 0, 0, 1, -1])))[0, 0].int()
    tensor([[1, 0, 0, 0, 0],
            [1, 1, 0, 0, 0],
            [1, 1, 1, 0, 0],
            [1, 0, 0, 1, 0],
            [1, 1, 1, 1, 1]], dtype=torch.int32)
    """
    check_int_tensor("branch_ids", branch_ids, (1, 2, 3), "[B, S], [S] or [B, levels, S]")
    if branch_ids.ndim == 3 and branch_ids.shape[1] == 0:
        raise ValueError(f"`branch_ids` must hold at least one level, got shape {list(branch_ids.shape)}")
    branch_ids = branch_ids if branch_ids.ndim == 3 else check_per_position("branch_ids", branch_ids)[:, None]
    documents = document_runs_beside(branch_ids[:, 0], document_ids)
    branch_ids, _ = torch.broadcast_tensors(branch_ids, documents.runs.end.unsqueeze(-2))
    # All that is outside of branches has one id.
    levels = branch_ids.long().clamp(min=-1).unbind(1)
    gaps, outer = [], documents.ids
    for level in levels:
        branches, regions = runs_of(level, *outer), runs_of((level >= 0).int(), *outer)
        gaps.append((branches.end, torch.where(level < 0, branches.end, regions.end)))
        outer = (*outer, level)
    # Inner gaps come before outer ones. Between them the rows see a key.
    position = documents.position.expand_as(levels[0])
    edges = [position, *(edge for gap in reversed(gaps) for edge in gap), documents.runs.end.expand_as(levels[0])]
    visible = [*zip(edges[0::2], edges[1::2])]
    mask = from_ordered_intervals(visible, position.shape[1], to_the_last=not documents.are_packed)
    return documents.hide_padding(mask)
