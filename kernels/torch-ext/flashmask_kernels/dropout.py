"""Which attention weights dropout keeps: the counters of Philox are key, query row, and head, so that every kernel and
every tile size draws the same numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def draw_seed(device: torch.device) -> Tensor:
    """int64 ``[1]`` from the device's default generator, which `torch.manual_seed` sets and checkpointing restores."""
    return torch.randint(2**63 - 1, (1,), device=device)


def drop_below(dropout_p: float) -> int:
    """Weights whose 24 random bits are below this number are dropped."""
    return round(dropout_p * 2**24)


def kept_elements(seed: Tensor, batch_head: Tensor, rows: Tensor, columns: Tensor, dropout_p: float) -> Tensor:
    """Where dropout keeps a weight.

    Args:
        seed: int64 ``[1]``.
        batch_head: batch * H + head.
        rows, columns: query rows and keys; int64 tensors that broadcast with ``batch_head``.

    Returns:
        bool, True for kept weights, in the shape that the three broadcast to.
    """
    return (random_bits(seed, columns, rows, batch_head) >> 8) >= drop_below(dropout_p)


def random_bits(seed: Tensor, *counters: Tensor) -> Tensor:
    """The first of the four numbers that Philox4x32-10 makes from three counters and 0, in int64 (Salmon et al. 2011,
    "Parallel random numbers: as easy as 1, 2, 3").
    """
    key, other_key = seed & _LOW, (seed >> 32) & _LOW
    counter = [*counters, torch.zeros_like(seed)]
    for _ in range(10):
        # The high half of a product that overflows 63 bits is right after masking.
        right, left = counter[2] * 0xCD9E8D57, counter[0] * 0xD2511F53
        counter = [
            (right >> 32 & _LOW) ^ counter[1] ^ key,
            right & _LOW,
            (left >> 32 & _LOW) ^ counter[3] ^ other_key,
            left & _LOW,
        ]
        key, other_key = (key + 0x9E3779B9) & _LOW, (other_key + 0xBB67AE85) & _LOW
    return counter[0]
