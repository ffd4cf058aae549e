"""Which rank holds which rows of a sequence, so that all compute as many tiles."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..bounds.algebra import disjoint
from ..bounds.form import hidden_intervals

__all__ = ["TilesToDeal", "block_length_to_deal", "count_tiles_to_deal", "deal", "padded_length_to_deal"]

_BLOCK = 128
"""Rows of a block: those of the largest tiles of the kernels. A tile of several blocks sees what each of them sees."""
_FEWEST_BLOCKS = 4
"""Blocks that each rank gets at least, of shorter rows: padding to longer ones would cost more than it saves."""
_MOST_SWAPPED = 64
"""Blocks of a rank up to which some are swapped: of more, the heaviest one weighs little."""
_ROUNDS_OF_SWAPS = 4
"""After which nothing was gained any more, on up to 64 ranks (benchmarks/parallel_scaling.py)."""


def block_length_to_deal(length: int, ranks: int) -> int:
    """Rows that stay together: 128, or a lower power of two where the sequence is short."""
    longest = max(1, length // (ranks * _FEWEST_BLOCKS))
    return min(_BLOCK, 1 << (longest.bit_length() - 1))


def padded_length_to_deal(length: int, ranks: int) -> int:
    """The next length whose blocks the ranks share out; the blocks of that length, if they are longer, as well."""
    unit = ranks * block_length_to_deal(length, ranks)
    return -(-length // unit) * unit


class TilesToDeal(NamedTuple):
    """What the kernels visit for each block of rows, over batch and heads: int64 `[S / block]`.

    Attributes:
        visible: tiles of `block` rows by `block` keys that are not skipped. A tile is skipped where one interval hides
            it from end to end.
        cut: those among them in which an interval begins or ends; a tile in which two do may count twice.
    """

    visible: Tensor
    cut: Tensor

    @property
    def work(self) -> Tensor:
        """What they cost: a cut tile takes 1.2 (heads of 128) to 1.5 times (64) as long as a full one on an H200."""
        return 3 * self.visible + torch.minimum(self.cut, self.visible)


def count_tiles_to_deal(bounds: Tensor, block: int) -> TilesToDeal:
    length = bounds.shape[3]
    start, end = disjoint(*(edge.clamp(0, length) for edge in hidden_intervals(bounds, length)))
    first_start, last_start = start.unflatten(3, (-1, block)).aminmax(dim=4)
    first_end, last_end = end.unflatten(3, (-1, block)).aminmax(dim=4)

    def blocks_between(first: Tensor, last: Tensor) -> Tensor:
        one = torch.ones((), dtype=torch.int64, device=bounds.device).expand(first.numel())
        change = torch.zeros(length // block + 1, dtype=torch.int64, device=bounds.device)
        return change.index_add_(0, first.flatten(), one).index_add_(0, last.flatten(), -one)[:-1].cumsum(0)

    hidden_from = last_start.add(block - 1).div(block, rounding_mode="floor")
    hidden_to = first_end.div(block, rounding_mode="floor")
    hidden = blocks_between(hidden_from, torch.maximum(hidden_from, hidden_to))
    cut = blocks_between(first_start.div(block, rounding_mode="floor"), hidden_from)
    cut += blocks_between(hidden_to, last_end.add(block - 1).div(block, rounding_mode="floor"))
    return TilesToDeal(bounds.shape[0] * bounds.shape[1] * (length // block) - hidden, cut)


def deal(work: Tensor, ranks: int, block: int) -> Tensor:
    """The rows in the order of the ranks, int64 `[S]`, rising on each rank. The host does not wait for it.

    Blocks are sorted by their work and dealt to the ranks to and fro. Where each gets few, some are then swapped.

    Args:
        work: `[S / block]`, of each block of rows; a multiple of `ranks` of them.
        block: rows that stay together.
    """
    hands = work.argsort(descending=True, stable=True).unflatten(0, (-1, ranks))
    is_back = torch.arange(len(hands), device=work.device)[:, None] % 2 == 1
    hands = torch.where(is_back, hands.flip(1), hands)
    blocks = hands.T
    if 1 < len(hands) <= _MOST_SWAPPED:
        for _ in range(_ROUNDS_OF_SWAPS):
            blocks = _swap_dealt_blocks(blocks, work)
    blocks = blocks.sort(dim=1).values.flatten()
    return (blocks[:, None] * block + torch.arange(block, device=work.device)).flatten()


def _swap_dealt_blocks(blocks: Tensor, work: Tensor) -> Tensor:
    """`blocks` `[ranks, n]`, after the rank with most work has swapped one with that with least, and so on inwards.

    Each pair swaps the two blocks that bring it closest to equal work, or none.
    """
    blocks = blocks[work[blocks].sum(1).argsort(descending=True, stable=True)]
    pairs = len(blocks) // 2
    most, least = blocks[:pairs], blocks[len(blocks) - pairs :].flip(0)
    gap = work[most].sum(1, keepdim=True) - work[least].sum(1, keepdim=True)
    left = (gap[:, None] - 2 * (work[most][:, :, None] - work[least][:, None])).abs()
    smallest, best = left.flatten(1).min(1, keepdim=True)
    given, taken = best // blocks.shape[1], best % blocks.shape[1]
    one, other = most.gather(1, given), least.gather(1, taken)
    one, other = torch.where(smallest < gap, other, one), torch.where(smallest < gap, one, other)
    most, least = most.scatter(1, given, one), least.scatter(1, taken, other)
    return torch.cat([most, blocks[pairs : len(blocks) - pairs], least])
