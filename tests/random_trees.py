"""Random batches whose rows share prefixes."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor


def random_sequences(seed: int, count: int, vocabulary: int, max_new: int = 9, depth: int = 6) -> list[list[int]]:
    """Sequences of token ids from 1 on. Each continues a prefix of an earlier one, up to `depth` times."""
    choose = random.Random(seed)

    def new_tokens(at_least: int) -> list[int]:
        return [choose.randint(1, vocabulary - 1) for _ in range(choose.randint(at_least, max_new))]

    rows, depths = [new_tokens(1)], [1]
    while len(rows) < count:
        parent = choose.choice([index for index, value in enumerate(depths) if value < depth])
        shared = choose.randint(0, len(rows[parent]))
        rows.append(rows[parent][:shared] + new_tokens(0 if shared else 1))
        depths.append(depths[parent] + 1 if shared else 1)
    return rows


def padded_batch(rows: Sequence[Sequence[int]], side: str = "right", extra: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids and 2-D mask `[R, S]`, padded with 0 on `side`."""
    length = max(map(len, rows)) + extra
    input_ids = torch.zeros(len(rows), length, dtype=torch.long)
    for number, row in enumerate(rows):
        start = length - len(row) if side == "left" else 0
        input_ids[number, start : start + len(row)] = torch.tensor(row, dtype=torch.long)
    return input_ids, (input_ids != 0).long()
