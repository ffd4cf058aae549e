"""The mask types of the FlashMask paper (arXiv 2410.01359), with the parameters of its kernel benchmark.

`paper_masks` is the list: what the paper calls each mask, and the constructor or the set operations that make it.
"""

from __future__ import annotations

import json
import random
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from hf_flashmask.bounds import (
    bidirectional,
    causal,
    causal_with_blocks,
    from_block_mask,
    from_cu_seqlens,
    from_prefix_tree,
    global_and_sliding_window,
    hash_sparse,
    intersect,
    prefix_lm,
    sliding_window,
)

WINDOW = 1 / 16  # of the length; that many keys before a query, and after it where the window looks both ways
GLOBAL_TOKENS = 16
ANSWERS = (2, 6)  # fewest and most to a shared question
HASHES = 16
BLOCK_SIZE = 128


class PackedRow(NamedTuple):
    """The documents of one row: their lengths, how much of each is a prefix, which ones QK-sparse leaves out."""

    lengths: list[int]
    prefix_lengths: list[int]
    qk_sparse: list[bool]

    @property
    def length(self) -> int:
        return sum(self.lengths)


def read_rows(path: Path) -> dict[int, list[PackedRow]]:
    """Rows by their length, from JSON: `{"8192": [{"documents": [[prefix, length], ...], "qk_sparse": [0, 1]}]}`."""
    rows: dict[int, list[PackedRow]] = {}
    for length, samples in json.loads(path.read_text()).items():
        for sample in samples:
            prefix_lengths, lengths = (list(column) for column in zip(*sample["documents"]))
            if sum(lengths) != int(length) or len(sample["qk_sparse"]) != len(lengths):
                raise ValueError(f"{path}: a row of {length} tokens has {sum(lengths)} in {len(lengths)} documents")
            row = PackedRow(lengths, prefix_lengths, [bool(flag) for flag in sample["qk_sparse"]])
            rows.setdefault(int(length), []).append(row)
    return rows


def random_row(length: int, documents: int, seed: int = 0) -> PackedRow:
    """Documents of random lengths, each with a random prefix of up to half of it; about every third is left out."""
    choose = random.Random(seed)
    cuts = sorted(choose.sample(range(1, length), documents - 1))
    lengths = [end - start for start, end in zip([0, *cuts], [*cuts, length])]
    return PackedRow(lengths, [choose.randint(0, n // 2) for n in lengths], [choose.random() < 1 / 3 for _ in lengths])


def paper_masks(
    row: PackedRow, *, heads: int = 1, seed: int = 0, device: torch.device | str | None = None
) -> dict[str, Tensor]:
    """Bounds by the paper's name of the mask: its twelve types and Full, then three more that are asked for.

    `heads` is the number of heads of the masks that differ from head to head: those that are drawn at random.
    """
    length = row.length
    window = max(int(length * WINDOW), 1)
    documents = torch.arange(len(row.lengths), device=device).repeat_interleave(
        torch.tensor(row.lengths, device=device)
    )
    cu_seqlens = torch.tensor([0, *accumulate(row.lengths)], dtype=torch.int32, device=device)
    position = torch.arange(length, device=device) - cu_seqlens[documents]
    in_prefix = position < torch.tensor(row.prefix_lengths, device=device)[documents]
    each_document = from_cu_seqlens(cu_seqlens, length, is_causal=False)
    itself_and_by_the_last = torch.eye(len(row.lengths), dtype=torch.bool)
    itself_and_by_the_last[-1] = True
    not_itself = ~torch.diag(torch.tensor(row.qk_sparse))
    generator = torch.Generator().manual_seed(seed)
    hashes = torch.randint(HASHES, (1, heads, length), generator=generator).to(device or "cpu")
    return {
        "full": bidirectional(length, device=device),
        "causal": causal(length, device=device),
        "sliding_window": sliding_window(window, length, device=device),
        "causal_document": from_cu_seqlens(cu_seqlens, length),
        "document": each_document,
        "share_question": from_prefix_tree(*questions_and_answers(row.lengths, seed), device=device),
        "global_sliding_window": global_and_sliding_window(
            GLOBAL_TOKENS, window, length, is_causal=False, device=device
        ),
        "causal_blockwise": from_block_mask(itself_and_by_the_last, row.lengths, device=device),
        "prefix_lm_document": intersect(each_document, causal_with_blocks(torch.where(in_prefix, documents, -1))),
        "prefix_lm_causal": prefix_lm(length // 2, length, device=device),
        "qk_sparse": from_block_mask(not_itself, row.lengths, device=device),
        "hash_sparse": hash_sparse(hashes, hashes),
        "random_eviction": random_eviction(max(length // 2, 1), length, heads, generator).to(device or "cpu"),
        "block_causal_document": intersect(each_document, causal_with_blocks(position // BLOCK_SIZE)),
        "random_intervals": random_intervals(4, length, heads, generator).to(device or "cpu"),
    }


def questions_and_answers(lengths: list[int], seed: int) -> tuple[list[int], list[int]]:
    """A prefix tree that splits each document at random into a question and its answers: parents and lengths.

    The rule of the paper's benchmark: a random number of answers, one token for each part, and every other token to a
    part drawn at random. A document too short for that stays whole.
    """
    choose = random.Random(seed)
    parents: list[int] = []
    part_lengths: list[int] = []
    for length in lengths:
        question = len(parents)
        answers = choose.randint(*ANSWERS)
        parts = [1] * (answers + 1) if length > answers else [length]
        for _ in range(length - sum(parts)):
            parts[choose.randrange(len(parts))] += 1
        parents += [-1] + [question] * (len(parts) - 1)
        part_lengths += parts
    return parents, part_lengths


def random_eviction(cache_size: int, length: int, heads: int, generator: torch.Generator) -> Tensor:
    """Causal with a cache of `cache_size` keys: each row past that evicts one key at random. `[1, heads, 1, length]`.

    The row that evicts a key is its LTS. A query sees what is left, its own key among it.
    """
    evicted_at = torch.full((heads, length), length, dtype=torch.int32)
    cache = torch.arange(cache_size).repeat(heads, 1)
    head = torch.arange(heads)
    slots = torch.randint(cache_size, (max(length - cache_size, 0), heads), generator=generator)
    for row, slot in enumerate(slots, start=cache_size):
        evicted_at[head, cache[head, slot]] = row
        cache[head, slot] = row
    return evicted_at[None, :, None]


def random_intervals(intervals: int, length: int, heads: int, generator: torch.Generator) -> Tensor:
    """Every key hidden from so many random intervals of rows; they may overlap or be empty. `[1, heads, C, length]`."""
    shape = (1, heads, 2 * intervals, length)
    return torch.randint(length + 1, shape, generator=generator, dtype=torch.int32)
