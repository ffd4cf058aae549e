"""What a training step on several GPUs should cost: the work of one GPU, the visible tiles and the bytes on the wire.

A step of one GPU has a part that attends and a part that does not. Sequence parallelism divides both by the number of
ranks; attention takes as long as on the rank with the most work, and nothing hides what the ranks exchange. The
weights, which FSDP gathers twice and whose gradients it scatters, travel beside the computation.

The step of one GPU is measured, or follows from `Constants`: what a tile takes, and how fast the matrix products of the
layers and of the loss are. Both, and the memory of a step, are fitted to rows of one GPU alone; `report.py` compares
them with those of several.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_flashmask.bounds import causal, from_cu_seqlens
from hf_flashmask.parallel.deal import block_length_to_deal, count_tiles_to_deal, deal, padded_length_to_deal
from hf_flashmask.parallel.exchanges import kv_heads_on_the_wire

PASSES = 3
"""How often a layer's exchange is done: forward, forward again under checkpointing, backward."""
PASSES_OF_PRODUCTS = 4
"""How often a matrix product is done: the same, where backward has two."""
BYTES = 2
GPUS_OF_A_NODE = 8
ACROSS_NODES = 50.0
"""GB/s that each GPU sends to other nodes: 400 Gb/s. An assumption."""
ACROSS_ULYSSES = "all_gather across ulysses"


class Model(NamedTuple):
    """A causal language model in bfloat16, whose embeddings are its head as well."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @classmethod
    def of(cls, shape: dict[str, Any], layers: int, vocabulary: int) -> Model:
        return cls(
            shape["hidden_size"],
            shape["intermediate_size"],
            layers,
            shape["num_attention_heads"],
            shape["num_key_value_heads"],
            shape["head_dim"],
            vocabulary,
        )

    @property
    def weights_of_layer(self) -> int:
        of_attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return of_attention + 3 * self.hidden * self.intermediate

    @property
    def bytes_of_weights(self) -> int:
        return BYTES * (self.layers * self.weights_of_layer + self.vocabulary * self.hidden)

    def products(self, length: int) -> tuple[float, float]:
        """TFLOP of a step in the layers and in the loss, without attention."""
        of_each = 2e-12 * PASSES_OF_PRODUCTS * length
        return of_each * self.layers * self.weights_of_layer, of_each * self.vocabulary * self.hidden


class Step(NamedTuple):
    """A training step of one row on one GPU.

    Attributes:
        milliseconds, attention: of the whole step and of its attention kernels.
        balance: the work of the busiest rank over the mean, where the row is dealt to so many ranks.
    """

    milliseconds: float
    attention: float
    length: int
    model: Model
    balance: Callable[[int], float]


class Links(NamedTuple):
    """GB/s that each GPU sends to the GPUs of its node, and to those of others."""

    inside: float
    across: float = ACROSS_NODES


class Prediction(NamedTuple):
    """Of a step: milliseconds, those of the exchanges among them, and attention's largest rank over the mean."""

    milliseconds: float
    exchanges: float
    balance: float


class Group(NamedTuple):
    """The ranks that share a row: of each node some, which exchange heads where there are several nodes."""

    way: str
    nodes: int
    inside: int

    @classmethod
    def of(cls, way: str, ranks: int, inside: int = GPUS_OF_A_NODE) -> Group:
        """`inside`: ranks that exchange heads, where the others gather keys and values across."""
        return cls(way, ranks // inside, inside) if way == ACROSS_ULYSSES else cls(way, 1, ranks)

    @property
    def ranks(self) -> int:
        return self.nodes * self.inside

    @property
    def dealing_ranks(self) -> int:
        """The ranks that rows are dealt to; 1 where all of them compute all rows."""
        return {"ulysses": 1, "all_gather": self.ranks}.get(self.way, self.nodes)

    @property
    def is_in_one_node(self) -> bool:
        return self.ranks <= GPUS_OF_A_NODE

    def sent(self, model: Model, length: int) -> Sent:
        """Bytes of a rank in a layer in one direction, forward or backward."""
        shape = model.heads, model.kv_heads, model.head_dim
        if self.way != ACROSS_ULYSSES:
            sent = bytes_on_the_wire(self.way, self.ranks, length, *shape)
            return Sent(sent, 0.0) if self.is_in_one_node else Sent(0.0, sent)
        inside = bytes_on_the_wire("ulysses", self.inside, length / self.nodes, *shape)
        kv_heads = kv_heads_on_the_wire(model.kv_heads, self.inside) // self.inside
        across = bytes_on_the_wire("all_gather", self.nodes, length, model.heads, kv_heads, model.head_dim)
        return Sent(inside + across, 0.0) if self.is_in_one_node else Sent(inside, across)


class Sent(NamedTuple):
    """Bytes to the GPUs of the node, and to those of others."""

    inside: float
    across: float


def predict(step: Step, group: Group, links: Links) -> Prediction:
    """The step on several ranks. `"data parallel"` takes as many rows as there are ranks."""
    ranks, model = group.ranks, step.model
    slowest = links.inside if group.is_in_one_node else links.across
    of_weights = PASSES * model.bytes_of_weights * (ranks - 1) / ranks / slowest / 1e6
    if group.way == "data parallel":
        return Prediction(max(step.milliseconds, of_weights), 0.0, 1.0)
    sent = group.sent(model, step.length)
    exchanges = model.layers * PASSES * (sent.inside / links.inside + sent.across / links.across) / 1e6
    balance = step.balance(group.dealing_ranks)
    computed = (step.milliseconds - step.attention + balance * step.attention) / ranks
    return Prediction(max(computed + exchanges, of_weights), exchanges, balance)


def bytes_on_the_wire(way: str, ranks: int, length: float, heads: int, kv_heads: int, head_dim: int) -> float:
    """What a rank sends in a layer in one direction, forward or backward: the page on many GPUs has the formulas."""
    tokens = length / ranks
    if way == "ulysses":
        on_the_wire = heads + kv_heads_on_the_wire(kv_heads, ranks)
        return 2 * BYTES * head_dim * on_the_wire * tokens * (ranks - 1) / ranks
    return 2 * BYTES * head_dim * kv_heads * tokens * (ranks - 1)


def imbalance(lengths: list[int], ranks: int) -> float:
    """The work of the busiest rank over the mean, with rows of these documents dealt to the ranks."""
    if ranks == 1:
        return 1.0
    work, block = work_of_blocks(lengths, ranks)
    dealt = work[deal(work, ranks, block)[::block] // block].unflatten(0, (ranks, -1)).sum(1).double()
    return float(dealt.max() / dealt.mean())


def work_of_blocks(lengths: list[int], ranks: int) -> tuple[Tensor, int]:
    """The work of each block of rows, and the rows of a block."""
    length = padded_length_to_deal(sum(lengths), ranks)
    tail = [length - sum(lengths)] if length > sum(lengths) else []
    if len(lengths) == 1 and not tail:
        bounds = causal(length, length)
    else:
        bounds = from_cu_seqlens(torch.tensor([0, *accumulate([*lengths, *tail])], dtype=torch.int32), length)
    block = block_length_to_deal(length, ranks)
    return count_tiles_to_deal(bounds, block).work, block


# Rows that nobody has measured


class TileCost(NamedTuple):
    """Microseconds of one head's tile of 128 x 128 in a step: twice forward, once backward."""

    full: float
    cut: float


class Measured(NamedTuple):
    """A step of one GPU: milliseconds without attention, and MiB at the peak."""

    shape: str
    model: Model
    length: int
    rest: float
    peak: float


class Constants(NamedTuple):
    """What `calibrate` finds.

    Attributes:
        layers: milliseconds for a TFLOP of the layers' products, and of what goes with them, by shape.
        loss: the same of the loss, in parts.
        intermediate, hidden: MiB for a million elements of that size that a token holds while a layer is computed.
    """

    layers: dict[str, float]
    loss: float
    intermediate: float
    hidden: float

    def step(self, shape: str, model: Model, length: int, attention: float, balance: Callable[[int], float]) -> Step:
        in_layers, in_loss = model.products(length)
        rest = in_layers * self.layers[shape] + in_loss * self.loss
        return Step(rest + attention, attention, length, model, balance)

    def peak(self, model: Model, length: int, group: Group, shards_weights: bool = True) -> float:
        """MiB of the rank at its peak: in the last layer before gradients exist, or in the first one, with all."""
        ranks = group.ranks
        rows = 1 if group.way == "data parallel" else ranks
        of_weights = model.bytes_of_weights / 2**20 / (ranks if shards_weights else 1)
        checkpoints = model.layers * BYTES * model.hidden * length / rows / 2**20
        gathered = 0.0
        if shards_weights:  # a layer, the next one and its gradient; the embeddings and theirs
            gathered = BYTES * (3 * model.weights_of_layer + 2 * model.vocabulary * model.hidden) / 2**20
        layer = (self.intermediate * model.intermediate + self.hidden * model.hidden) * length / rows / 1e6
        layer = max(layer, keys_and_values(model, length, group))
        return 3 * of_weights + max(checkpoints, of_weights) + gathered + layer


def keys_and_values(model: Model, length: int, group: Group) -> float:
    """MiB of the whole row's in the backward pass of all-gather: with gradients, and one of them on the wire twice.

    Counted, not measured: in rows of up to 128K tokens on two GPUs other parts of a layer need more.
    """
    if group.way not in ("all_gather", ACROSS_ULYSSES):
        return 0.0
    kv_heads = model.kv_heads
    if group.way == ACROSS_ULYSSES:
        kv_heads = kv_heads_on_the_wire(kv_heads, group.inside) // group.inside
    return 6 * BYTES * kv_heads * model.head_dim * length / 2**20


def calibrate(measured: Iterable[Measured]) -> Constants:
    """The constants that are nearest to what one GPU has measured: three steps of two shapes at least."""
    rows = list(measured)
    shapes = sorted({row.shape for row in rows})
    products, rest, memory, layer = [], [], [], []
    for row in rows:
        in_layers, in_loss = row.model.products(row.length)
        products.append([in_layers * (row.shape == shape) for shape in shapes] + [in_loss])
        rest.append(row.rest)
        without = Constants({}, 0, 0, 0).peak(row.model, row.length, Group("one GPU", 1, 1), shards_weights=False)
        memory.append([row.model.intermediate * row.length / 1e6, row.model.hidden * row.length / 1e6])
        layer.append(row.peak - without)
    *layers, loss = solve(products, rest)
    intermediate, hidden = solve(memory, layer)
    return Constants(dict(zip(shapes, layers)), loss, intermediate, hidden)


def solve(factors: list[list[float]], values: list[float]) -> list[float]:
    """Least squares of relative errors."""
    a, b = torch.tensor(factors, dtype=torch.float64), torch.tensor(values, dtype=torch.float64)
    return torch.linalg.lstsq(a / b[:, None], torch.ones_like(b)[:, None]).solution[:, 0].tolist()
