"""What a training step on several GPUs should cost: one GPU's figures, the visible tiles and the bytes on the wire.

A step of one GPU has a part that attends and a part that does not. Sequence parallelism divides both by the number of
ranks; attention takes as long as on the rank with the most visible tiles, and nothing hides what the ranks exchange.
The weights, which FSDP gathers twice and whose gradients it scatters, travel beside the computation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from hf_flashmask.bounds import causal, from_cu_seqlens
from hf_flashmask.parallel.deal import block_length, deal, padded_length, visible_tiles
from hf_flashmask.parallel.exchanges import kv_heads_on_the_wire

PASSES = 3
"""How often a layer's exchange is done: forward, forward again under checkpointing, backward."""
BYTES = 2
GPUS_OF_A_NODE = 8
ACROSS_NODES = 50.0
"""GB/s that each GPU sends to other nodes: 400 Gb/s. An assumption."""


class Step(NamedTuple):
    """A training step of one row, as one GPU has measured it.

    Attributes:
        milliseconds, attention: of the whole step and of its attention kernels.
        lengths: the documents of the row.
        bytes_of_weights: of all parameters.
    """

    milliseconds: float
    attention: float
    lengths: list[int]
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    bytes_of_weights: int


class Links(NamedTuple):
    """GB/s that each GPU sends to the GPUs of its node, and to those of others."""

    inside: float
    across: float = ACROSS_NODES


class Prediction(NamedTuple):
    """Of a step: milliseconds, those of the exchanges among them, and attention's largest rank over the mean."""

    milliseconds: float
    exchanges: float
    balance: float


def predict(way: str, step: Step, ranks: int, links: Links) -> Prediction:
    """The step of a way on so many ranks. `"data parallel"` takes as many rows as there are ranks.

    Raises:
        KeyError: for a way that the model does not describe.
    """
    rest = step.milliseconds - step.attention
    of_weights = PASSES * step.bytes_of_weights * (ranks - 1) / ranks / _slowest(ranks, links) / 1e6
    if way == "data parallel":
        return Prediction(max(step.milliseconds, of_weights), 0.0, 1.0)
    sent = {"ulysses": _ulysses, "all_gather": _all_gather, "all_gather across ulysses": _both}[way](step, ranks)
    exchanges = step.layers * PASSES * (sent.inside / links.inside + sent.across / links.across) / 1e6
    balance = imbalance(step.lengths, dealing_ranks(way, ranks))
    computed = rest / ranks + balance * step.attention / ranks
    return Prediction(max(computed + exchanges, of_weights), exchanges, balance)


def bytes_on_the_wire(way: str, ranks: int, length: int, heads: int, kv_heads: int, head_dim: int) -> float:
    """What a rank sends in a layer in one direction, forward or backward: the page on many GPUs has the formulas."""
    tokens = length / ranks
    if way == "ulysses":
        on_the_wire = heads + kv_heads_on_the_wire(kv_heads, ranks)
        return 2 * BYTES * head_dim * on_the_wire * tokens * (ranks - 1) / ranks
    return 2 * BYTES * head_dim * kv_heads * tokens * (ranks - 1)


def dealing_ranks(way: str, ranks: int) -> int:
    """The ranks that rows are dealt to; 1 where all of them compute all rows."""
    return {"ulysses": 1, "all_gather": ranks}.get(way, ranks // GPUS_OF_A_NODE)


def imbalance(lengths: list[int], ranks: int) -> float:
    """The visible tiles of the busiest rank over the mean, with rows dealt to them."""
    work, block = tiles_of_blocks(lengths, ranks)
    dealt = work[deal(work, ranks, block)[::block] // block].unflatten(0, (ranks, -1)).sum(1).double()
    return float(dealt.max() / dealt.mean())


def tiles_of_blocks(lengths: list[int], ranks: int) -> tuple[Tensor, int]:
    """The visible tiles of each block of rows, and the rows of a block."""
    length = padded_length(sum(lengths), ranks)
    tail = [length - sum(lengths)] if length > sum(lengths) else []
    if len(lengths) == 1 and not tail:
        bounds = causal(length, length)
    else:
        bounds = from_cu_seqlens(torch.tensor([0, *accumulate([*lengths, *tail])], dtype=torch.int32), length)
    block = block_length(length, ranks)
    return visible_tiles(bounds, block), block


class _Sent(NamedTuple):
    inside: float
    across: float


def _ulysses(step: Step, ranks: int) -> _Sent:
    return _on_one_fabric(step, ranks, "ulysses")


def _all_gather(step: Step, ranks: int) -> _Sent:
    return _on_one_fabric(step, ranks, "all_gather")


def _on_one_fabric(step: Step, ranks: int, way: str) -> _Sent:
    sent = bytes_on_the_wire(way, ranks, sum(step.lengths), step.heads, step.kv_heads, step.head_dim)
    return _Sent(sent, 0.0) if ranks <= GPUS_OF_A_NODE else _Sent(0.0, sent)


def _both(step: Step, ranks: int) -> _Sent:
    """Each node has a part of the row, whose heads its GPUs exchange; the nodes gather the keys of these heads."""
    nodes, length = ranks // GPUS_OF_A_NODE, sum(step.lengths)
    shape = step.heads, step.kv_heads, step.head_dim
    inside = bytes_on_the_wire("ulysses", GPUS_OF_A_NODE, math.ceil(length / nodes), *shape)
    kv_heads = kv_heads_on_the_wire(step.kv_heads, GPUS_OF_A_NODE) // GPUS_OF_A_NODE
    return _Sent(inside, bytes_on_the_wire("all_gather", nodes, length, step.heads, kv_heads, step.head_dim))


def _slowest(ranks: int, links: Links) -> float:
    return links.inside if ranks <= GPUS_OF_A_NODE else links.across


def larger_groups(step: Step) -> Iterator[tuple[int, str]]:
    """The groups that nobody has measured: a node, and eight nodes."""
    for way in ("ulysses", "all_gather"):
        if way == "all_gather" or step.heads % GPUS_OF_A_NODE == 0:
            yield GPUS_OF_A_NODE, way
    yield 8 * GPUS_OF_A_NODE, "all_gather across ulysses"
