"""The mask types of the FlashMask paper (arXiv 2410.01359), with the parameters of its kernel benchmark.

`mask_forms` lists for each mask the paper's name, the constructor or set operations that build it, and the form that
other implementations take.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
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

WINDOW = 1 / 16  # of the length: so many keys before a query, and as many after it if the window is bidirectional
GLOBAL_TOKENS = 16
ANSWERS = (2, 6)  # fewest and most to a shared question
HASHES = 16
BLOCK_SIZE = 128


class PackedRow(NamedTuple):
    """The documents of one row: their lengths, the length of each prefix, and the ones that QK-sparse drops."""

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


def rows_of(length: int, samples: int, documents: Path | None = None) -> list[PackedRow]:
    """Document lists for rows of that length: from the first file in ``documents`` that has some, or else drawn.

    Drawn rows have as many documents as those of the paper's benchmark: 3 to 7 in 8K tokens, 10 to 14 in 32K, 11 to 15
    in 128K.
    """
    if documents is not None:
        for file in sorted(documents.glob("*.json")):
            if found := read_rows(file).get(length):
                return found[:samples]
        raise ValueError(f"no file in {documents} has document lists of {length} tokens")
    fewest = 3 if length < 16384 else 10 if length < 65536 else 11
    return [random_row(length, random.Random(seed).randint(fewest, fewest + 4), seed) for seed in range(samples)]


def random_row(length: int, documents: int, seed: int = 0) -> PackedRow:
    """Documents of random lengths, each with a random prefix of up to half its length; about every third is dropped."""
    choose = random.Random(seed)
    cuts = sorted(choose.sample(range(1, length), documents - 1))
    lengths = [end - start for start, end in zip([0, *cuts], [*cuts, length])]
    return PackedRow(lengths, [choose.randint(0, n // 2) for n in lengths], [choose.random() < 1 / 3 for _ in lengths])


class Varlen(NamedTuple):
    """A mask as variable-length kernels take it: documents, the causal triangle, a window of keys up to the query."""

    lengths: list[int]
    is_causal: bool
    window: int | None = None


class Mask(NamedTuple):
    """One mask in the forms that implementations take.

    Args:
        bounds: makes them from what describes the mask: documents, parts, tables, all drawn before.
        mask_mod: FlexAttention's predicate `(batch, head, query, key)`, the way its users write it. None: sees all.
        varlen: None where variable-length kernels cannot express the mask.
    """

    bounds: Callable[[], Tensor]
    mask_mod: Callable[..., Tensor] | None
    varlen: Varlen | None = None


def paper_masks(
    row: PackedRow, *, heads: int = 1, seed: int = 0, device: torch.device | str | None = None
) -> dict[str, Tensor]:
    """Bounds by the paper's name of the mask, see `mask_forms`."""
    return {name: form().bounds() for name, form in mask_forms(row, heads=heads, seed=seed, device=device).items()}


def mask_forms(
    row: PackedRow, *, heads: int = 1, seed: int = 0, device: torch.device | str | None = None
) -> dict[str, Callable[[], Mask]]:
    """Masks by the paper's name: its twelve types and Full, then two more that are asked for. A call draws the mask.

    `heads` is the number of heads of the masks that differ from head to head: those that are drawn at random.
    """
    length = row.length
    window = max(int(length * WINDOW), 1)
    lengths = torch.tensor(row.lengths, device=device)
    # int32, like all tables here, because FlexAttention loads them in its kernels.
    document = torch.arange(len(row.lengths), dtype=torch.int32, device=device).repeat_interleave(lengths)
    cu_seqlens = torch.tensor([0, *accumulate(row.lengths)], dtype=torch.int32, device=device)
    position = torch.arange(length, dtype=torch.int32, device=device) - cu_seqlens[document]
    in_prefix = position < torch.tensor(row.prefix_lengths, device=device)[document]
    left_out = torch.tensor(row.qk_sparse, device=device)[document]
    last = len(row.lengths) - 1
    block = position // BLOCK_SIZE

    def each_document() -> Tensor:
        return from_cu_seqlens(cu_seqlens, length, is_causal=False)

    def blockwise() -> Tensor:
        itself_and_by_the_last = torch.eye(last + 1, dtype=torch.bool)
        itself_and_by_the_last[-1] = True
        return from_block_mask(itself_and_by_the_last, row.lengths, device=device)

    def share_question() -> Mask:
        parents, part_lengths = questions_and_answers(row.lengths, seed)
        end = from_prefix_tree(parents, part_lengths, device=device).flatten()
        return Mask(
            lambda: from_prefix_tree(parents, part_lengths, device=device), lambda b, h, q, k: (q >= k) & (q < end[k])
        )

    def sparse_by_hashes() -> Mask:
        hashes = torch.randint(HASHES, (1, heads, length), generator=_generator(seed)).to(device or "cpu")
        hashed, order = (table.int() for table in hashes[0].sort(stable=True))
        return Mask(
            lambda: hash_sparse(hashes, hashes),
            _for_each_head(heads, lambda h, q, k: (hashed[h, q] == hashed[h, k]) & (order[h, q] >= order[h, k])),
        )

    def eviction() -> Mask:
        bounds = random_eviction(max(length // 2, 1), length, heads, _generator(seed)).to(device or "cpu")
        evicted_at = bounds[0, :, 0]
        return Mask(bounds.clone, _for_each_head(heads, lambda h, q, k: (q >= k) & (q < evicted_at[h, k])))

    def four_intervals() -> Mask:
        bounds = random_intervals(4, length, heads, _generator(seed)).to(device or "cpu")
        start, end = bounds[0, :, 0::2].contiguous(), bounds[0, :, 1::2].contiguous()

        def visible(h: Tensor | int, q: Tensor, k: Tensor) -> Tensor:
            hidden = (q >= start[h, 0, k]) & (q < end[h, 0, k])
            for interval in range(1, 4):
                hidden = hidden | ((q >= start[h, interval, k]) & (q < end[h, interval, k]))
            return ~hidden

        return Mask(bounds.clone, _for_each_head(heads, visible))

    return {
        "full": lambda: Mask(lambda: bidirectional(length, device=device), None, Varlen([length], False)),
        "causal": lambda: Mask(
            lambda: causal(length, device=device), lambda b, h, q, k: q >= k, Varlen([length], True)
        ),
        "sliding_window": lambda: Mask(
            lambda: sliding_window(window, length, device=device),
            lambda b, h, q, k: (q >= k) & (q - k < window),
            Varlen([length], True, window),
        ),
        "causal_document": lambda: Mask(
            lambda: from_cu_seqlens(cu_seqlens, length),
            lambda b, h, q, k: (q >= k) & (document[q] == document[k]),
            Varlen(row.lengths, True),
        ),
        "document": lambda: Mask(
            each_document, lambda b, h, q, k: document[q] == document[k], Varlen(row.lengths, False)
        ),
        "share_question": share_question,
        "global_sliding_window": lambda: Mask(
            lambda: global_and_sliding_window(GLOBAL_TOKENS, window, length, is_causal=False, device=device),
            lambda b, h, q, k: ((q - k <= window) & (k - q <= window)) | (q < GLOBAL_TOKENS) | (k < GLOBAL_TOKENS),
        ),
        "causal_blockwise": lambda: Mask(
            blockwise,
            lambda b, h, q, k: (q >= k) & ((document[q] == document[k]) | (document[q] == last)),
        ),
        "prefix_lm_document": lambda: Mask(
            lambda: intersect(each_document(), causal_with_blocks(torch.where(in_prefix, document, -1))),
            lambda b, h, q, k: (document[q] == document[k]) & ((q >= k) | in_prefix[k]),
        ),
        "prefix_lm_causal": lambda: Mask(
            lambda: prefix_lm(length // 2, length, device=device), lambda b, h, q, k: (q >= k) | (k < length // 2)
        ),
        "qk_sparse": lambda: Mask(
            lambda: from_block_mask(~torch.diag(torch.tensor(row.qk_sparse)), row.lengths, device=device),
            lambda b, h, q, k: (q >= k) & ~(left_out[k] & (document[q] == document[k])),
        ),
        "hash_sparse": sparse_by_hashes,
        "random_eviction": eviction,
        "block_causal_document": lambda: Mask(
            lambda: intersect(each_document(), causal_with_blocks(block)),
            lambda b, h, q, k: (document[q] == document[k]) & ((q >= k) | (block[q] == block[k])),
        ),
        "random_intervals": four_intervals,
    }


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _for_each_head(heads: int, visible: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A mask_mod from a predicate of tables by head, which one head stands for where they are the same for all."""
    if heads == 1:
        return lambda b, h, q, k: visible(0, q, k)
    return lambda b, h, q, k: visible(h, q, k)


def tile_sparsity(bounds: Tensor, tile_size: int = 128, q_len: int | None = None) -> float:
    """The paper's block sparsity, as its benchmark counts it: the fraction of hidden tiles. `q_len` is S_k by default.

    A tile is hidden when one interval hides it: two intervals that hide it only together leave it counted as work.
    """
    _, _, planes, kv_len = bounds.shape
    length = kv_len if q_len is None else q_len
    column = torch.arange(kv_len, device=bounds.device, dtype=torch.int32) - (kv_len - length)
    if planes == 1:
        start, end = bounds, torch.full_like(bounds, length)
        start, end = (torch.cat([a, b.expand_as(a)], 2) for a, b in ((start, 0 * column), (end, column)))
    elif planes == 2:
        lts, ute = bounds.split(1, dim=2)
        start, end = torch.cat([lts, torch.zeros_like(ute)], 2), torch.cat([torch.full_like(lts, length), ute], 2)
    else:
        start, end = bounds[:, :, 0::2], bounds[:, :, 1::2]
    padding = -kv_len % tile_size  # columns past the last one are hidden from all rows
    start = torch.nn.functional.pad(start, (0, padding), value=0).unflatten(3, (-1, tile_size)).amax(4)
    end = torch.nn.functional.pad(end, (0, padding), value=length).unflatten(3, (-1, tile_size)).amin(4)
    first_row = torch.arange(0, length, tile_size, device=bounds.device)[:, None]
    last_row = (first_row + tile_size).clamp(max=length)
    hidden = (start[:, :, :, None] <= first_row) & (end[:, :, :, None] >= last_row)
    return float(hidden.any(2).float().mean())


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
