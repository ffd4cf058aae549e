"""What the ranks exchange in every layer: heads against tokens (Ulysses), or all keys and values (all-gather).

Tokens come first on the wire, `[tokens, B, H, D]`: what arrives is read in place, through a transposed view.
"""

from __future__ import annotations

import math
from operator import index

import torch
from torch import Tensor

from ..bounds import causal
from ..bounds.form import lower_and_upper
from ..integration.layer_mask import LayerMask
from .group import Group, exchange_pieces, gather_with_gradients

__all__ = [
    "AllGatherExchange",
    "EngineExchange",
    "GatherAcrossUlyssesExchange",
    "UlyssesExchange",
    "kv_heads_on_the_wire",
]


def kv_heads_on_the_wire(kv_heads: int, ranks: int) -> int:
    """The number of key heads that Ulysses sends: each repeated until the ranks can share them out evenly."""
    # In a graph, `index` makes constants of symbols, which a second number of ranks becomes, and which lcm refuses.
    return math.lcm(index(kv_heads), index(ranks))


class UlyssesExchange:
    """Each rank attends with some of the heads, over the whole sequence.

    Tokens are held in order: rank r has those from `r * S / P` on.
    """

    head_parts, takes_whole_rows = 1, False

    def __init__(self, group: Group, length: int) -> None:
        self.group, self.length = group, length
        self.local_length = self.layer_length = length // group.size
        self.rows = slice(group.rank * self.local_length, (group.rank + 1) * self.local_length)

    def mask_of_rank(self, mask: LayerMask, heads: int) -> LayerMask:
        bounds = mask.bounds
        if bounds is None or bounds.shape[1] == 1:
            return mask
        own = self._own_heads(heads)
        return mask.once(("heads of rank", heads), lambda: LayerMask(bounds[:, own].contiguous(), self.length))

    def bring(
        self, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        heads, kv_heads = query.shape[1], key.shape[1]
        if heads % self.group.size:
            raise ValueError(
                f'mode="ulysses" shares the {heads} query heads of a layer out to {self.group.size} ranks, which does '
                'not come out even: use mode="all_gather" or a group whose size divides them'
            )
        copies = kv_heads_on_the_wire(kv_heads, self.group.size) // kv_heads
        if copies > 1:
            key, value = (part.repeat_interleave(copies, dim=1) for part in (key, value))
        own_sinks = None if sinks is None else sinks[self._own_heads(heads)]
        return self._to_heads(query), self._to_heads(key), self._to_heads(value), own_sinks

    def take_back(self, output: Tensor) -> Tensor:
        pieces = output.permute(2, 0, 1, 3).unflatten(0, (self.group.size, -1))  # [P, S / P, B, H / P, D]
        return exchange_pieces(pieces, self.group).permute(2, 0, 3, 1, 4).flatten(1, 2)

    def _to_heads(self, part: Tensor) -> Tensor:
        """`[B, H, S / P, D]` -> `[B, H / P, S, D]`."""
        pieces = part.unflatten(1, (self.group.size, -1)).permute(1, 3, 0, 2, 4)
        return exchange_pieces(pieces, self.group).flatten(0, 1).permute(1, 2, 0, 3)

    def _own_heads(self, heads: int) -> slice:
        number = heads // self.group.size
        return slice(self.group.rank * number, (self.group.rank + 1) * number)


class AllGatherExchange:
    """Each rank attends with the queries that it holds, to the keys of all ranks, in the order of the ranks.

    Args:
        order: `[S]`, the tokens of the sequence in the order of the ranks, rising on each of them.
    """

    head_parts, takes_whole_rows = 1, False

    def __init__(self, group: Group, order: Tensor) -> None:
        self.group, self.order = group, order
        self.length = len(order)
        self.local_length = self.layer_length = len(order) // group.size
        self.rows = order.unflatten(0, (group.size, -1))[group.rank]

    def mask_of_rank(self, mask: LayerMask, heads: int) -> LayerMask:
        if mask.bounds is None and not mask.is_causal:
            return mask if self.group.size == 1 else LayerMask(None, self.local_length)
        return mask.once(("rows of rank",), lambda: LayerMask(self._of_rows(mask.bounds), self.local_length))

    def _of_rows(self, bounds: Tensor | None) -> Tensor:
        """Hidden intervals of all rows -> those of the rows of this rank, for keys in the order of the ranks."""
        if bounds is None:
            bounds = causal(self.length, self.length, device=self.order.device)
        if bounds.shape[2] == 1:
            bounds = torch.stack(torch.broadcast_tensors(*lower_and_upper(bounds, self.length)), dim=2)
        edges = bounds.index_select(3, self.order)
        return torch.searchsorted(self.rows.to(edges.dtype), edges, out_int32=True)

    def bring(
        self, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        return query, self._of_all_ranks(key), self._of_all_ranks(value), sinks

    def take_back(self, output: Tensor) -> Tensor:
        return output

    def _of_all_ranks(self, part: Tensor) -> Tensor:
        """`[B, H, S / P, D]` -> `[B, H, S, D]`."""
        return gather_with_gradients(part.permute(2, 0, 1, 3), self.group).permute(1, 2, 0, 3)


class GatherAcrossUlyssesExchange:
    """Groups exchange heads inside, and gather keys and values of their heads across: nodes, and GPUs of a node.

    Args:
        across: between the groups, each of which holds the rows of one rank of `AllGatherExchange`.
        inside: a group, for these rows.
    """

    head_parts, takes_whole_rows = 1, False

    def __init__(self, across: AllGatherExchange, inside: Group) -> None:
        self.across, self.inside = across, UlyssesExchange(inside, across.local_length)
        self.length, self.rows = across.length, across.rows[self.inside.rows]
        self.local_length = self.layer_length = self.inside.local_length

    def mask_of_rank(self, mask: LayerMask, heads: int) -> LayerMask:
        return self.inside.mask_of_rank(self.across.mask_of_rank(mask, heads), heads)

    def bring(
        self, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        return self.across.bring(*self.inside.bring(query, key, value, sinks))

    def take_back(self, output: Tensor) -> Tensor:
        return self.inside.take_back(output)


class EngineExchange(UlyssesExchange):
    """An engine exchanges the heads: attention is called with those of this rank, over the whole sequence."""

    def __init__(self, group: Group, length: int) -> None:
        super().__init__(group, length)
        self.layer_length, self.head_parts = length, group.size

    def bring(
        self, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        heads = query.shape[1] * self.head_parts
        if sinks is not None and sinks.shape[0] == heads:  # the engine has not cut them
            sinks = sinks[self._own_heads(heads)]
        return query, key, value, sinks

    def take_back(self, output: Tensor) -> Tensor:
        return output
