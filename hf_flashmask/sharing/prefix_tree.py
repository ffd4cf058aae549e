"""Merge the common prefixes of token sequences into prefix trees, laid out as one packed row.

The row holds every shared token once, in depth-first order: causal bounds with LTS = end of the subtree show each token
exactly the tokens before it in its own sequences. The device of the input compares and places the tokens. The host
derives the order of the sequences from a table `[R, R]`, after the only read-back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..integration.documents import are_ids

__all__ = ["PrefixTree", "from_sequences", "merge_prefixes"]

_COMPARED_AT_ONCE = 2**26  # elements of the table that compares all pairs of sequences


@dataclass(frozen=True)
class PrefixTree:
    """Sequences merged into one row of N tokens.

    Attributes:
        input_ids: `[1, N]`, every shared token once.
        position_ids: `[1, N]`, by default `depth`.
        bounds: int32 `[1, 1, 1, N]`, the mask: causal, and LTS = end of the subtree; LTS = own row for tokens that
            `attention_mask` hides between others.
        depth: `[1, N]`, the number of tokens before it in its sequences, hidden ones included. Windows count in it.
        index: `[R, S]`, the place in the row of each token that was given, -1 for padding.
        num_tokens: number of tokens that were given, padding and hidden ones not counted.
        max_branches: the largest number of leaves of one tree.
    """

    input_ids: Tensor
    position_ids: Tensor
    bounds: Tensor
    depth: Tensor
    index: Tensor
    num_tokens: int
    max_branches: int


def from_sequences(
    sequences: Sequence[Sequence[int] | Tensor],
    *,
    one_label_per_token: bool = False,
    max_branches: int | None = None,
    device: torch.device | str | None = None,
) -> PrefixTree:
    """`merge_prefixes` of token sequences of any lengths: prompts with answers, rollouts, paths of a search tree."""
    rows = [torch.as_tensor(sequence, dtype=torch.int64, device=device) for sequence in sequences]
    for number, row in enumerate(rows):
        if row.ndim != 1:
            raise ValueError(f"`sequences[{number}]` must be a sequence of token ids, got shape {list(row.shape)}")
    if not rows:
        raise ValueError("`sequences` is empty: there is nothing to merge")
    lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
    input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    is_token = torch.arange(input_ids.shape[1], device=input_ids.device) < lengths[:, None]
    return merge_prefixes(input_ids, is_token, one_label_per_token=one_label_per_token, max_branches=max_branches)


def merge_prefixes(
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    *,
    one_label_per_token: bool = False,
    max_branches: int | None = None,
) -> PrefixTree:
    """Merge the common prefixes of the rows of a padded batch.

    Args:
        input_ids: integers `[R, S]`.
        attention_mask: `[R, S]`, 0 for padding on either side, which is left out, and for tokens between others that
            nobody sees (a hole), which stay where they are. Default: every token is seen.
        position_ids: integers `[R or 1, S]`. Tokens are merged when their positions agree too. Default: each row counts
            its columns from its first token.
        one_label_per_token: fork one token early: all sequences that share a token then share the next one too, and
            each token predicts one label (a branch begins with a copy of its parent's last token).
        max_branches: the largest number of leaves of a tree; a larger tree is split. A window in a tree needs one
            interval of the bounds for each leaf.

    Returns:
        The sequences in depth-first order; a branch that appears first in the batch comes first.

    Raises:
        ValueError: for wrong shapes, for `position_ids` that do not increase within a row, and for ids of documents in
            `attention_mask`.
    """
    _check_batch_to_merge(input_ids, attention_mask, position_ids)
    num_sequences = input_ids.shape[0]
    is_visible = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    is_token = is_visible if attention_mask is None else _tokens_between_padding(is_visible)
    depth = is_token.cumsum(1) - 1
    # Tokens are the same when their ids, their visibility and, where they matter, their positions agree.
    identity = torch.where(is_visible, input_ids, ~input_ids.long())
    if position_ids is not None:
        identity = identity.long() * 2**32 + position_ids
    common = _lengths_of_common_prefixes(_sequences_left_aligned(identity, is_token, depth))
    packed = _num_position_restarts(position_ids, is_visible), _num_document_ids(attention_mask, is_visible)
    counts = is_token.sum(1), is_visible.sum(1), *packed
    # The only read-back. From here on the tensors are small, and cost less on the host than launches would.
    figures = torch.cat([common, torch.stack(counts, 1)], 1).cpu()
    shared, lengths, num_visible, restarts, document_ids = figures.split([num_sequences, 1, 1, 1, 1], dim=1)
    if restarts.any():
        raise ValueError("`position_ids` must increase within a row: rows of packed documents cannot be merged")
    if document_ids.any():
        raise ValueError(
            "`attention_mask` holds ids of documents: rows of packed documents cannot be merged, pass a mask of 0 and 1"
        )
    shared = torch.minimum(shared, torch.minimum(lengths, lengths.T))
    if one_label_per_token:
        is_same = (shared == lengths) & (shared == lengths.T)
        shared = torch.where(is_same, shared, (shared - 1).clamp(min=0))
    forest = _Forest.of(shared, lengths[:, 0])
    if max_branches is not None and num_sequences > max_branches:
        group = forest.number_in_tree(shared) // max_branches
        forest = _Forest.of(torch.where(group == group[:, None], shared, 0), lengths[:, 0])

    num_rows = int(forest.tail.sum())
    first_row, end_row = forest.rows(depth.clamp(min=0))
    index = torch.where(is_token, first_row, num_rows)

    def in_row(values: Tensor) -> Tensor:
        """`[R, S]` -> `[1, N]`. Merged tokens write the same value to the same place."""
        row = values.new_empty(num_rows + 1)
        row[index] = values
        return row[None, :num_rows]

    row_depth = in_row(depth)
    row_end = in_row(end_row.to(torch.int32))
    if attention_mask is not None:
        row_end = torch.where(in_row(is_visible), row_end, torch.arange(num_rows, device=row_end.device).int())
    return PrefixTree(
        input_ids=in_row(input_ids),
        position_ids=row_depth if position_ids is None else in_row(position_ids.expand_as(input_ids)),
        bounds=row_end[:, None, None].contiguous(),
        depth=row_depth,
        index=first_row.masked_fill_(~is_token, -1),
        num_tokens=int(num_visible.sum()),
        max_branches=int(forest.branches.max()),
    )


def _tokens_between_padding(is_visible: Tensor) -> Tensor:
    """The columns from the first to the last visible token of each row, bool `[R, S]`."""
    begun, remaining = is_visible.cumsum(1), is_visible.flip(1).cumsum(1).flip(1)
    return (begun > 0) & (remaining > 0)


def _sequences_left_aligned(values: Tensor, is_token: Tensor, depth: Tensor) -> Tensor:
    """The tokens of each row from its first column on; what follows them is arbitrary."""
    aligned = values.new_zeros(values.shape[0], values.shape[1] + 1)
    return aligned.scatter_(1, torch.where(is_token, depth, values.shape[1]), values)[:, :-1]


def _lengths_of_common_prefixes(tokens: Tensor) -> Tensor:
    """Of every two rows, `[R, R]`: the first column in which they differ; their length where they do not."""
    num_rows, longest = tokens.shape
    if longest == 0:
        return torch.zeros(num_rows, num_rows, dtype=torch.int64, device=tokens.device)
    column = torch.arange(longest, device=tokens.device)
    step = max(1, _COMPARED_AT_ONCE // (num_rows * longest))
    return torch.cat([torch.where(rows[:, None] == tokens, longest, column).amin(2) for rows in tokens.split(step)])


def _num_document_ids(attention_mask: Tensor | None, is_visible: Tensor) -> Tensor:
    """How many tokens of each row have an id, `[R]`."""
    return (torch.zeros_like(is_visible) if attention_mask is None else are_ids(attention_mask)).sum(1)


def _num_position_restarts(position_ids: Tensor | None, is_visible: Tensor) -> Tensor:
    """How often the positions of each row's visible tokens do not increase, `[R]`."""
    if position_ids is None:
        return is_visible.new_zeros(is_visible.shape[0], dtype=torch.int64)
    position_ids = position_ids.long().expand_as(is_visible)
    highest = torch.where(is_visible, position_ids, -1).cummax(1).values
    return (is_visible[:, 1:] & (position_ids[:, 1:] <= highest[:, :-1])).sum(1)


class _Forest(NamedTuple):
    """The places of the tokens of R sequences in the row, on the host.

    The row stores the tail of each sequence: its tokens from the first one that no earlier sequence has. A tail is
    contiguous. `skipped` and `tail` are in depth-first order.

    Attributes:
        rank: `[R]`, the place of a sequence in depth-first order.
        before: bool `[R, R]`, whether the first sequence goes before the second.
        skipped: `[R]`, number of tokens before the tail: those that a sequence shares with the one before it.
        tail: `[R]`, length of the tail.
        branches: `[R]`, number of leaves of the same tree.
    """

    rank: Tensor
    before: Tensor
    skipped: Tensor
    tail: Tensor
    branches: Tensor

    @classmethod
    def of(cls, shared: Tensor, lengths: Tensor) -> _Forest:
        """`shared` `[R, R]`: number of leading tokens that two sequences store once."""
        number = torch.arange(lengths.shape[0], device=lengths.device)
        # At a fork, the branch that appears first in the batch goes first, and a sequence that ends there goes before
        # all branches. Equal sequences keep their order.
        branch = torch.where(shared < lengths[:, None], _first_sequence_of_branch(shared), -1)
        before = (branch < branch.T) | ((branch == branch.T) & (number[:, None] < number))
        rank = before.sum(0)
        skipped = torch.where(before, shared, 0).amax(0)
        tail = lengths - skipped
        goes_on = (before & (shared >= lengths[:, None])).any(1)
        branches = ((shared > 0) & ~goes_on).sum(1)
        order = rank.argsort()
        return cls(rank, before, skipped[order], tail[order], branches)

    def rows(self, depth: Tensor) -> tuple[Tensor, Tensor]:
        """The row of each sequence's tokens at `depth` `[R, S]`, and the end of their subtree, on its device."""
        num_sequences, length = depth.shape
        end = self.tail.cumsum(0)
        offset = end - self.tail - self.skipped
        # In reverse order of the sequences: how many tokens the next sequence skips, and where its tail begins.
        next_skipped = nn.functional.pad(self.skipped[1:], (0, 1)).flip(0)
        next_start, last_rank = end.flip(0), num_sequences - 1 - self.rank
        vectors = torch.stack([offset, self.skipped, next_skipped, next_start, self.rank, last_rank]).to(depth.device)
        offset, skipped, next_skipped, next_start, rank, last_rank = vectors[..., None].unbind()
        column = torch.arange(length, device=depth.device)
        # The latest tail that begins at a depth or above it holds the token at that depth. Its row is the largest.
        row = (column + offset).masked_fill_(column < skipped, -1).cummax(0).values
        # Its subtree ends where the next sequence that does not share it begins.
        subtree_end = torch.where(next_skipped <= column, next_start, end[-1].item()).cummin(0).values
        return row[rank, depth], subtree_end[last_rank, depth]

    def number_in_tree(self, shared: Tensor) -> Tensor:
        """How many sequences of its own tree go before each one, `[R]`."""
        return (self.before & (shared > 0)).sum(0)


def _first_sequence_of_branch(shared: Tensor) -> Tensor:
    """For two sequences that fork: the first sequence of the batch that continues like the former, `[R, R]`."""
    step = max(1, _COMPARED_AT_ONCE // shared.shape[0] ** 2)
    return torch.cat([(own[:, None] > own[:, :, None]).byte().argmax(2) for own in shared.split(step)])


def _check_batch_to_merge(input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> None:
    if input_ids.ndim != 2 or input_ids.shape[0] == 0 or input_ids.is_floating_point():
        raise ValueError(
            f"`input_ids` must be integers [R, S] with R > 0, got {input_ids.dtype} {list(input_ids.shape)}"
        )
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"`attention_mask` must have the shape of `input_ids`, {list(input_ids.shape)}, got "
            f"{list(attention_mask.shape)}"
        )
    accepted = [(rows, input_ids.shape[1]) for rows in (1, input_ids.shape[0])]
    if position_ids is not None and (tuple(position_ids.shape) not in accepted or position_ids.is_floating_point()):
        raise ValueError(
            f"`position_ids` must be integers [R or 1, S] for `input_ids` {list(input_ids.shape)}, got "
            f"{position_ids.dtype} {list(position_ids.shape)}"
        )
