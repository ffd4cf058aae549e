"""Examples of many lengths on several replicas: as many on each, and as many tokens as can be."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

__all__ = ["BalancedSampler", "balanced_batches"]


def balanced_batches(tokens: Sequence[int], replicas: int) -> list[list[int]]:
    """Deal examples to replicas, as many to each, so that all compute about as many tokens.

    The longest one that is left goes to the replica that has the fewest tokens so far and is not full yet (longest
    processing time first, Graham 1969). For groups of answers that were gathered after they were generated, say.

    Args:
        tokens: of each example, those that are computed: of a prompt with answers that share it, the prompt once.
        replicas: how many; they divide the number of examples.

    Returns:
        For each replica the numbers of its examples, rising.

    Raises:
        ValueError: when the replicas do not divide the examples.

    >>> balanced_batches([900, 100, 500, 600], replicas=2)
    [[0, 1], [2, 3]]
    """
    if replicas < 1 or len(tokens) % replicas:
        raise ValueError(
            f"`replicas` must divide the examples, so that every replica takes as many steps, got {replicas} for "
            f"{len(tokens)} examples"
        )
    batches: list[list[int]] = [[] for _ in range(replicas)]
    open_batches = [(0, replica) for replica in range(replicas)]
    for example in sorted(range(len(tokens)), key=lambda example: -tokens[example]):
        total, replica = heapq.heappop(open_batches)
        batches[replica].append(example)
        if len(batches[replica]) < len(tokens) // replicas:
            heapq.heappush(open_batches, (total + tokens[example], replica))
    return [sorted(batch) for batch in batches]


class BalancedSampler(Sampler[int]):
    """Shuffles a dataset, and deals the examples of each forward pass to the replicas by `balanced_batches`.

    Every replica gets `batch_size` examples, and all of them together those that they would get anyway: losses that
    are averaged over examples, and then over replicas, remain what they are. The order is that in which accelerate,
    and so Trainer, hands batches out, one replica after the other::

        class BalancedTrainer(DPOTrainer):
            def _get_train_sampler(self, dataset=None):
                args = self.args
                return BalancedSampler(tokens, args.world_size, args.per_device_train_batch_size, seed=args.seed)

    The examples at the end that do not fill a batch for each replica remain in the order of shuffling.

    Args:
        tokens: of each example of the dataset, see `balanced_batches`.
        replicas: how many there are.
        batch_size: the examples of each replica in a forward pass.
        seed: of the shuffling, the same on all replicas.

    Raises:
        ValueError: when `replicas` or `batch_size` is less than 1.
    """

    def __init__(self, tokens: Sequence[int], replicas: int, batch_size: int, *, seed: int = 0) -> None:
        for name, value in (("replicas", replicas), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")
        self.tokens, self.replicas, self.batch_size = list(tokens), replicas, batch_size
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Another order; loaders call it at the start of each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.tokens), generator=generator).tolist()
        size = self.replicas * self.batch_size
        for start in range(0, len(order), size):
            window = order[start : start + size]
            if len(window) == size:
                batches = balanced_batches([self.tokens[example] for example in window], self.replicas)
                window = [window[place] for batch in batches for place in batch]
            yield from window

    def __len__(self) -> int:
        return len(self.tokens)
