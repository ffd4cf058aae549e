"""What packing and shared prefixes would save on a dataset, counted from its sequences.

A step is taken to last as long as its floating-point operations: 6 for each position and each parameter that is not an
input embedding, and 12 for each pair of positions that is computed, each element of the heads and each layer (forward
and backward; the rule of Kaplan et al., arXiv 2001.08361, with attention counted by pairs). That leaves out how
efficient a kernel is, what the host and the optimizer take, and that small batches fill a GPU badly.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..training import pack_lengths
from .sequences import SequenceGroup, Sequences


class Cost(NamedTuple):
    """Floating-point operations of a training step for each position and for each pair, in all layers."""

    per_position: float
    per_pair: float

    @classmethod
    def of(cls, config: Any) -> Cost:
        """Counted on a model of that configuration without weights. Of experts, those that a token is sent to count."""
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        text = config.get_text_config()
        experts = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None) or 1
        share = (getattr(text, "num_experts_per_tok", None) or experts) / experts
        sizes = {name: weight.numel() for name, weight in model.named_parameters(remove_duplicate=False)}
        embedding = model.get_input_embeddings().weight.numel()
        parameters = sum(size * (share if ".experts." in name else 1.0) for name, size in sizes.items()) - embedding
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return cls(6.0 * parameters, 12.0 * text.num_hidden_layers * text.num_attention_heads * head_dim)


class WayToTrain(NamedTuple):
    """A way to train on the data.

    Attributes:
        positions: that are computed, padding included.
        pairs: of positions whose scores are computed.
    """

    name: str
    positions: int
    pairs: int

    def operations(self, cost: Cost) -> float:
        return self.positions * cost.per_position + self.pairs * cost.per_pair


@dataclass(frozen=True)
class Estimate:
    """Figures of a dataset; `ways` begin with what the others are compared to."""

    sequences: Sequences
    lengths: list[int]
    num_tokens: int
    num_rows: int
    fill: float
    visible: float
    padding: float
    shared: float
    ways: list[WayToTrain]


def estimate_ways_to_train(sequences: Sequences, max_length: int, batch_size: int, *, seed: int = 0) -> Estimate:
    """Count positions and pairs of each way to train.

    Args:
        max_length: tokens of a packed row.
        batch_size: examples of a padded batch, in a random order.
    """
    groups = list(sequences.groups)
    random.Random(seed).shuffle(groups)
    lengths = [len(sequence) for group in groups for sequence in group]
    num_tokens = sum(lengths)
    documents = sum(length * (length + 1) // 2 for length in lengths)
    padded = _padded_way_to_train("padded, sdpa", groups, batch_size)
    is_paired = max(map(len, groups)) > 1
    trees = [_tokens_and_pairs_of_tree(group) for group in groups]
    tree = WayToTrain(
        "prefixes shared, flashmask", sum(tokens for tokens, _ in trees), sum(pairs for _, pairs in trees)
    )
    rows = pack_lengths(lengths, max_length)
    packed = WayToTrain("packed, flashmask", num_tokens, documents)
    by_length = sorted(groups, key=lambda group: max(map(len, group)))
    ways = [padded, _padded_way_to_train("padded, batches of like lengths, sdpa", by_length, batch_size)]
    if is_paired:
        ways += [WayToTrain("without padding, flashmask", num_tokens, documents), tree]
    else:
        row_pairs = sum(sum(lengths[index] for index in row) ** 2 for row in rows)
        ways += [WayToTrain("packed, sdpa (a dense mask of each row)", num_tokens, row_pairs), packed]
    return Estimate(
        sequences,
        lengths,
        num_tokens,
        len(rows),
        num_tokens / (len(rows) * max_length),
        documents / sum(sum(lengths[index] for index in row) ** 2 for row in rows),
        1 - num_tokens / padded.positions,
        1 - tree.positions / num_tokens,
        ways,
    )


def _padded_way_to_train(name: str, groups: Sequence[SequenceGroup], batch_size: int) -> WayToTrain:
    """Every row is as long as the longest of its batch, and its mask is dense."""
    batches = [groups[start : start + batch_size] for start in range(0, len(groups), batch_size)]
    shapes = [(sum(map(len, batch)), max(len(row) for group in batch for row in group)) for batch in batches]
    return WayToTrain(
        name, sum(rows * length for rows, length in shapes), sum(rows * length**2 for rows, length in shapes)
    )


def _tokens_and_pairs_of_tree(group: SequenceGroup) -> tuple[int, int]:
    """Tokens and visible pairs of the prefix tree of some sequences: in order, each adds what its neighbour lacks."""
    tokens = pairs = 0
    before: list[int] = []
    for sequence in sorted(group):
        shared = next(
            (place for place, (a, b) in enumerate(zip(before, sequence)) if a != b), min(len(before), len(sequence))
        )
        tokens += len(sequence) - shared
        pairs += (len(sequence) * (len(sequence) + 1) - shared * (shared + 1)) // 2
        before = sequence
    return tokens, pairs


def describe_estimate(result: Estimate, cost: Cost | None, max_length: int) -> Iterable[str]:
    """The figures as lines of text."""
    lengths = sorted(result.lengths)
    columns = " + ".join(result.sequences.columns)
    yield (
        f"{len(result.sequences.groups):,} examples ({columns}), {len(lengths):,} sequences of {lengths[0]:,} to "
        f"{lengths[-1]:,} tokens, median {lengths[len(lengths) // 2]:,}, {result.num_tokens:,} in all"
    )
    if result.sequences.num_truncated:
        yield f"{result.sequences.num_truncated:,} sequences were cut to {max_length:,} tokens"
    yield f"padding          {result.padding:6.1%} of the positions of padded batches"
    yield f"fill             {result.fill:6.1%} of {result.num_rows:,} packed rows of {max_length:,}"
    yield f"visible pairs    {result.visible:6.1%} of the pairs of packed rows"
    yield f"shared prefixes  {result.shared:6.1%} of the tokens are in a prefix that their example has computed before"
    yield ""
    is_paired = "rejected" in result.sequences.columns
    yield f"A step of {'DPOTrainer or RewardTrainer' if is_paired else 'Trainer or SFTTrainer'}:"
    unit = "operations" if cost is not None else "positions"
    yield f"{'':40}{'positions':>14}{'pairs':>18}{'speed by ' + unit:>22}"
    for way, speed in zip(result.ways, expected_speeds(result.ways, cost)):
        yield f"{way.name:40}{way.positions:>14,}{way.pairs:>18,}{speed:>20.2f} x"
    if cost is None:
        yield "Without a model, attention is left out: pass --model, a folder or a name on the Hub"


def expected_speeds(ways: Sequence[WayToTrain], cost: Cost | None) -> list[float]:
    cost = Cost(1.0, 0.0) if cost is None else cost
    return [ways[0].operations(cost) / way.operations(cost) for way in ways]


def draw_estimate(result: Estimate, cost: Cost | None, path: Path) -> None:
    """Lengths of the sequences, and the speed of each way, as a picture. Needs matplotlib."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.hist(result.lengths, bins=40, range=(0, max(result.lengths)), color="#6baed6")
    left.yaxis.set_major_locator(MaxNLocator(integer=True))
    left.set(xlabel="tokens of a sequence", ylabel="sequences")
    left.set_title(f"{result.padding:.0%} of padded batches is padding", loc="left", fontsize="medium")
    found = expected_speeds(result.ways, cost)
    bars = right.barh(range(len(found)), found, color=["#bdbdbd"] * 2 + ["#6baed6", "#08519c"])
    right.bar_label(bars, labels=[f"{speed:.2f} x" for speed in found], padding=3)
    names = [way.name.replace(" (", "\n(").replace(" like lengths", "\nlike lengths") for way in result.ways]
    right.set_yticks(range(len(found)), names)
    right.invert_yaxis()
    right.set_xlim(0, 1.2 * max(found))
    right.set_xlabel("expected speed, by floating-point operations" if cost else "expected speed, by positions")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
