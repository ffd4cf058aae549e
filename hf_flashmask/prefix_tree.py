"""Merge the common prefixes of token sequences into prefix trees, laid out as one packed row.

The row holds every shared token once, in depth-first order, so that causal bounds with LTS = end of the subtree show
each token exactly the tokens before it in its own sequences. Everything happens on the device of the input, with
tensor operations over sequences and positions, and one read-back for the length of the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["PrefixTree", "from_sequences", "merge_prefixes"]

_COMPARED_AT_ONCE = 2**26  # elements of the table that compares every sequence with every other one


@dataclass(frozen=True)
class PrefixTree:
    """Sequences merged into one row of N tokens.

    Attributes:
        input_ids: `[1, N]`, every shared token once.
        position_ids: `[1, N]`, by default the number of tokens before it in its sequences.
        bounds: int32 `[1, 1, 1, N]`, the mask.
        depth: `[1, N]`, the number of tokens before it in its sequences: distances between tokens count in these.
        index: `[R, S]`, the place in the row of each token that was given, -1 for padding.
        num_tokens: number of tokens that were given, padding not counted.
        max_branches: the largest number of sequences that end in leaves of one tree.
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
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
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
        attention_mask: `[R, S]`, 0 for padding, on either side. Default: no padding.
        position_ids: integers `[R or 1, S]`. Tokens are merged when their positions agree too. Default: each row counts
            its tokens from 0.
        one_label_per_token: fork one token early, so that all sequences that share a token also share the next one, and
            each token predicts one label (a branch begins with a copy of its parent's last token).
        max_branches: keep trees apart that would have more leaves than this. Windows in trees need one interval of the
            bounds for each.

    Returns:
        The sequences in depth-first order; a branch that appears first in the batch comes first.

    Raises:
        ValueError: for wrong shapes, and for `position_ids` that do not increase within a row.
    """
    _check_batch(input_ids, attention_mask, position_ids)
    is_token = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    depth = is_token.cumsum(1) - 1
    lengths = is_token.sum(1)
    # Which tokens are the same: their ids and, where they matter, their positions.
    identity = input_ids if position_ids is None else input_ids.long() * 2**32 + position_ids
    shared = _common_prefixes(_left_aligned(identity, is_token), lengths)
    if one_label_per_token:
        is_same = (shared == lengths) & (shared == lengths[:, None])
        shared = torch.where(is_same, shared, (shared - 1).clamp(min=0))
    forest = _Forest.of(shared, lengths, input_ids.shape[1])
    if max_branches is not None and input_ids.shape[0] > max_branches:
        group = forest.number_in_tree(shared) // max_branches
        forest = _Forest.of(torch.where(group == group[:, None], shared, 0), lengths, input_ids.shape[1])

    figures = torch.stack([forest.tail.sum(), forest.branches.max(), lengths.sum(), _restarts(position_ids, is_token)])
    num_rows, branches, num_tokens, restarts = figures.tolist()  # the only read-back
    if restarts:
        raise ValueError("`position_ids` must increase within a row: rows of packed documents cannot be merged")
    first_row, end_row = forest.rows(depth.clamp(min=0))
    index = torch.where(is_token, first_row, num_rows)

    def in_row(values: Tensor) -> Tensor:
        """`[R, S]` -> `[1, N]`. Tokens that were merged write the same value to the same place."""
        row = values.new_empty(num_rows + 1)
        row[index.flatten()] = values.flatten()
        return row[None, :num_rows]

    row_depth = in_row(depth)
    return PrefixTree(
        input_ids=in_row(input_ids),
        position_ids=row_depth if position_ids is None else in_row(position_ids.expand_as(input_ids)),
        bounds=in_row(end_row.to(torch.int32))[:, None, None].contiguous(),
        depth=row_depth,
        index=torch.where(is_token, first_row, -1),
        num_tokens=num_tokens,
        max_branches=branches,
    )


def _left_aligned(values: Tensor, is_token: Tensor) -> Tensor:
    """The tokens of each row from its first column on; what follows them is arbitrary."""
    place = torch.where(is_token, is_token.cumsum(1) - 1, values.shape[1])
    aligned = values.new_zeros(values.shape[0], values.shape[1] + 1)
    return aligned.scatter_(1, place, values)[:, :-1]


def _common_prefixes(tokens: Tensor, lengths: Tensor) -> Tensor:
    """Number of leading tokens that every two rows have in common, `[R, R]`."""
    num_rows, longest = tokens.shape
    if longest == 0:
        return lengths.new_zeros(num_rows, num_rows)
    column = torch.arange(longest, dtype=torch.int32, device=tokens.device)
    step = max(1, _COMPARED_AT_ONCE // (num_rows * longest))
    first_difference = [torch.where(rows[:, None] == tokens, longest, column).amin(2) for rows in tokens.split(step)]
    return torch.minimum(torch.cat(first_difference).long(), torch.minimum(lengths[:, None], lengths))


def _restarts(position_ids: Tensor | None, is_token: Tensor) -> Tensor:
    """How often the positions of a row's tokens do not increase."""
    if position_ids is None:
        return is_token.new_zeros((), dtype=torch.int64)
    position_ids = position_ids.long().expand_as(is_token)
    highest = torch.where(is_token, position_ids, -1).cummax(1).values
    return (is_token[:, 1:] & (position_ids[:, 1:] <= highest[:, :-1])).sum()


class _Forest(NamedTuple):
    """Where the tokens of R sequences go. A sequence is stored from the first token that no earlier sequence has: its
    tail, consecutive tokens of the row.

    Attributes:
        owner: `[R, S + 1]`, the sequence that stores the token at a depth, R past the end of the sequence.
        subtree_end: `[R, S + 1]`, the row's end of that token's subtree.
        start: `[R]`, where the tail begins in the row.
        skipped: `[R]`, number of tokens before the tail.
        tail: `[R]`, its length.
        order: bool `[R, R]`, whether the first sequence goes before the second.
        branches: `[R]`, number of tails in the same tree.
    """

    owner: Tensor
    subtree_end: Tensor
    start: Tensor
    skipped: Tensor
    tail: Tensor
    order: Tensor
    branches: Tensor

    @classmethod
    def of(cls, shared: Tensor, lengths: Tensor, longest: int) -> _Forest:
        """`shared` `[R, R]`: number of leading tokens that two sequences store once."""
        num_rows = lengths.shape[0]
        number = torch.arange(num_rows, device=lengths.device)
        owner = _over_sharers(shared, number.expand(num_rows, -1), longest, "amin", num_rows)
        skipped = (owner < number[:, None]).sum(1)
        tail = lengths - skipped
        # Where two sequences part, the one whose branch was stored first goes first, and one that ends there before
        # both. Sequences that are the same keep their order.
        branch = torch.where(shared < lengths[:, None], owner.gather(1, shared), -1)
        order = (branch < branch.T) | ((branch == branch.T) & (number[:, None] < number))
        start = (order * tail[:, None]).sum(0)
        subtree_end = _over_sharers(shared, (start + tail).expand(num_rows, -1), longest, "amax", 0)
        branches = ((shared > 0) & (tail > 0)).sum(1)
        return cls(owner, subtree_end, start, skipped, tail, order, branches)

    def rows(self, depth: Tensor) -> tuple[Tensor, Tensor]:
        """For each sequence's tokens at `depth` `[R, S]`: their row, and the end of their subtree."""
        owner = self.owner.gather(1, depth).clamp(max=self.tail.shape[0] - 1)
        return self.start[owner] + depth - self.skipped[owner], self.subtree_end.gather(1, depth)

    def number_in_tree(self, shared: Tensor) -> Tensor:
        """How many sequences of its own tree go before each one, `[R]`."""
        return (self.order & (shared > 0)).sum(0)


def _over_sharers(shared: Tensor, values: Tensor, longest: int, reduce: str, nothing: int) -> Tensor:
    """Minimum or maximum of `values` `[R, R]` over the sequences that share the token at a depth, `[R, S + 1]`."""
    table = values.new_full((shared.shape[0], longest + 2), nothing)
    table.scatter_reduce_(1, shared, values, reduce)
    table = table.flip(1)
    table = table.cummin(1).values if reduce == "amin" else table.cummax(1).values
    return table.flip(1)[:, 1:]


def _check_batch(input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> None:
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
