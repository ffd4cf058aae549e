"""Balance and volumes of sequence parallelism on more GPUs than were measured: a simulation, on the CPU.

    python benchmarks/parallel_scaling.py                        # about five minutes
    python benchmarks/parallel_scaling.py --documents FOLDER     # long documents as the paper's benchmark draws them

Rows of up to 1M tokens with real documents are cut for up to 64 ranks: in contiguous parts, in zigzag (each rank has a
part from the front and one from the back), and dealt by `hf_flashmask.parallel.deal`. The tiles of 128 x 128 that each
rank visits are counted, full ones and cut ones. What a tile takes is fitted to the attention measured on a GPU. The
deal itself is timed, and its operations are counted.

`report.py` makes tables of it, and with `parallel_cost.py` says what steps should take; nothing of that is measured.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from masks import mask_forms, random_row, read_rows, rows_of
from measurement import RESULTS, latest_run, time_on_cpu, write_results
from parallel_cost import TileCost, solve
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from training_gpu import document_lengths

from hf_flashmask.bounds import causal, from_cu_seqlens, from_prefix_tree, sliding_window
from hf_flashmask.bounds.algebra import disjoint
from hf_flashmask.bounds.form import hidden_intervals
from hf_flashmask.parallel.deal import block_length_to_deal, count_tiles_to_deal, deal

Json = dict[str, Any]

LENGTHS = (32768, 131072, 262144, 524288, 1048576)
RANKS = (2, 4, 8, 64)
TILE = 128
ROWS_AT_ONCE = 64  # of tiles, while they are counted
WINDOW = 4096
ANSWERS, PROMPT_TOKENS, ANSWER_TOKENS = 8, (500, 4000), (100, 1500)  # of shared prompts: fewest and most
FITTED: Json = {
    "protocol": "bar",
    "length": 32768,
    "heads": 32,
    "kv_heads": 8,
    "implementation": "flashmask",
    "sample": 0,
}
WITHOUT_HEADS = ("hash_sparse", "random_intervals")  # drawn for each head
PASSES = {"forward": 2, "backward": 1}  # under checkpointing


class Tiles(NamedTuple):
    """Of each row of tiles, int64 `[S / TILE]`: those that are visited, and the cut ones among them."""

    visible: Tensor
    cut: Tensor


def count_exactly(bounds: Tensor) -> Tiles:
    """As the kernels classify tiles, for masks of one head whose rows are whole tiles."""
    length = bounds.shape[3]
    edges = disjoint(*(edge.clamp(0, length) for edge in hidden_intervals(bounds, length)))
    (first_start, last_start), (first_end, last_end) = (
        edge[0, 0].unflatten(1, (-1, TILE)).aminmax(dim=2) for edge in edges
    )
    visible, cut = [], []
    for rows in torch.arange(0, length, TILE, dtype=torch.int32)[:, None, None].split(ROWS_AT_ONCE):
        is_hidden = ((last_start <= rows) & (first_end >= rows + TILE)).any(1)
        is_touched = ((first_start < rows + TILE) & (last_end > rows)).any(1)
        visible.append((~is_hidden).sum(1))
        cut.append((is_touched & ~is_hidden).sum(1))
    return Tiles(torch.cat(visible), torch.cat(cut))


# Masks


def masks_of(length: int, documents: Path | None) -> dict[str, Callable[[], Tensor]]:
    return {
        "one document": lambda: causal(length),
        "packed documents": lambda: of_documents(document_lengths(length, seed=0)),
        "long documents": lambda: of_documents(long_documents(length, documents)),
        "sliding window": lambda: sliding_window(WINDOW, length),
        "shared prompts": lambda: shared_prompts(length),
    }


def of_documents(lengths: list[int]) -> Tensor:
    return from_cu_seqlens(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), sum(lengths))


def long_documents(length: int, documents: Path | None) -> list[int]:
    """Of the paper's benchmark where a file has such a row, else as many as it has."""
    for file in sorted(documents.glob("*.json")) if documents else ():
        if found := read_rows(file).get(length):
            return found[0].lengths
    return random_row(length, 12).lengths


def shared_prompts(length: int) -> Tensor:
    """Prompts with eight answers each, the last ones cut at the end of the row."""
    choose = random.Random(0)
    parents: list[int] = []
    lengths: list[int] = []
    while (left := length - sum(lengths)) > 0:
        prompt = len(lengths)
        drawn = [choose.randint(*PROMPT_TOKENS), *(choose.randint(*ANSWER_TOKENS) for _ in range(ANSWERS))]
        for number, part in enumerate(drawn):
            if left > 0:
                parents.append(prompt if number else -1)
                lengths.append(min(part, left))
                left -= part
    return from_prefix_tree(parents, lengths)


# Cuts


def contiguous(bounds: Tensor, blocks: int, ranks: int) -> Tensor:
    """The blocks of each rank, `[ranks, blocks / ranks]`; the same for the other cuts."""
    return torch.arange(blocks).unflatten(0, (ranks, -1))


def zigzag(bounds: Tensor, blocks: int, ranks: int) -> Tensor:
    parts = torch.arange(blocks).unflatten(0, (2 * ranks, -1))
    return torch.cat([parts[:ranks], parts[ranks:].flip(0)], dim=1)


def dealt(bounds: Tensor, blocks: int, ranks: int) -> Tensor:
    if block_length_to_deal(blocks * TILE, ranks) != TILE:
        raise ValueError(f"rows of {blocks * TILE} tokens are too short for {ranks} ranks: their blocks are no tiles")
    order = deal(count_tiles_to_deal(bounds, TILE).work, ranks, TILE)
    return order[::TILE].div(TILE, rounding_mode="floor").unflatten(0, (ranks, -1))


CUTS = {"contiguous": contiguous, "zigzag": zigzag, "dealt": dealt}


def balance_of(tiles: Tiles, of_ranks: Tensor, costs: dict[int, TileCost]) -> Json:
    """Each over the mean of the ranks: the most tiles, and the most time by what tiles of heads of a size take."""

    def largest(work: Tensor) -> float:
        of_rank = work[of_ranks].sum(1).double()
        return round(float(of_rank.max() / of_rank.mean()), 4)

    full = tiles.visible - tiles.cut
    in_time = {dim: largest(full * cost.full + tiles.cut * cost.cut) for dim, cost in costs.items()}
    return {"tiles": largest(tiles.visible), **{f"time_{dim}": found for dim, found in in_time.items()}}


# What tiles take


def fitted_costs(head_dim: int) -> tuple[TileCost, Json]:
    """Of heads of a size, from the attention that a GPU has measured under all masks of that length."""
    run = latest_run("attention_gpu", **FITTED, head_dim=head_dim)
    assert run is not None
    wanted = {**FITTED, "head_dim": head_dim}
    rows = [row for row in run["rows"] if "error" not in row and all(row[name] == wanted[name] for name in wanted)]
    rows = [row for row in rows if row["mask"] not in WITHOUT_HEADS]
    documents = rows_of(FITTED["length"], 1)[0]
    counts, times = [], []
    for row in rows:
        tiles = count_exactly(mask_forms(documents)[row["mask"]]().bounds())
        cut, visible = int(tiles.cut.sum()), int(tiles.visible.sum())
        counts.append([row["heads"] * float(number) for number in (visible - cut, cut)])
        times.append(1e3 * sum(row["milliseconds"][part] * passes for part, passes in PASSES.items()))
    full, cut_tile = solve(counts, times)
    errors = [(full * count[0] + cut_tile * count[1]) / time - 1 for count, time in zip(counts, times)]
    note = {
        "what": "tile",
        "head_dim": head_dim,
        "full_us": round(full, 5),
        "cut_us": round(cut_tile, 5),
        "largest_error": round(max(map(abs, errors)), 3),
        "masks": len(rows),
        "device": run["environment"]["device"],
        "measured": run["environment"]["date"],
    }
    return TileCost(full, cut_tile), note


# What the deal takes


class CountOperations(TorchDispatchMode):
    """The operations of torch, those included that only make views."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return function(*args, **(kwargs or {}))


def cost_of_deal(bounds: Tensor, ranks: int) -> Json:
    def work() -> Tensor:
        return deal(count_tiles_to_deal(bounds, TILE).work, ranks, TILE)

    with CountOperations() as operations:
        work()
    return {"milliseconds": time_on_cpu(work)["milliseconds"], "operations": operations.number}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="default: %(default)s")
    parser.add_argument("--documents", type=Path, help="folder with document lists; default: draw them")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON (default: %(default)s)")
    arguments = parser.parse_args()
    rows: list[Json] = []

    def add(row: Json) -> None:
        rows.append(row)
        print(row, flush=True)

    costs = {}
    for head_dim in (64, 128):
        costs[head_dim], row = fitted_costs(head_dim)
        add(row)
    for length in arguments.lengths:
        for name, make in masks_of(length, arguments.documents).items():
            bounds = make()
            tiles = count_exactly(bounds)
            what = {"mask": name, "length": length}
            add({"what": "row", **what, "visible": int(tiles.visible.sum()), "cut": int(tiles.cut.sum())})
            for ranks in RANKS:
                for cut, blocks_of_ranks in CUTS.items():
                    of_ranks = blocks_of_ranks(bounds, length // TILE, ranks)
                    add({"what": "balance", **what, "ranks": ranks, "cut": cut, **balance_of(tiles, of_ranks, costs)})
        for ranks in RANKS:
            bounds = masks_of(length, None)["packed documents"]()
            add({"what": "deal", "length": length, "ranks": ranks, **cost_of_deal(bounds, ranks)})
    settings = {"tile": TILE, "window": WINDOW, "documents": "given" if arguments.documents else "drawn"}
    print(f"wrote {write_results('parallel_scaling', 'cpu', settings, rows, arguments.output)}")


if __name__ == "__main__":
    main()
