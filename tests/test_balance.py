"""Examples dealt to replicas: as many on each, about as many tokens, and the examples of a step remain those it had."""

from __future__ import annotations

import statistics
from itertools import combinations

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from hf_flashmask.training import BalancedSampler, balanced_batches


def random_tokens(examples: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(examples).log_normal_(6.5, 1.0, generator=generator).int().tolist()


def totals(tokens: list[int], batches: list[list[int]]) -> list[int]:
    return [sum(tokens[example] for example in batch) for batch in batches]


@pytest.mark.parametrize("seed", range(20))
def test_two_replicas_are_nearly_as_even_as_they_can_be(seed: int) -> None:
    tokens = random_tokens(8, seed)
    batches = balanced_batches(tokens, 2)
    assert [len(batch) for batch in batches] == [4, 4]
    assert sorted(example for batch in batches for example in batch) == list(range(8))
    best = min(
        max(sum(part), sum(tokens) - sum(part))
        for part in (tuple(tokens[example] for example in chosen) for chosen in combinations(range(8), 4))
    )
    assert max(totals(tokens, batches)) <= 1.15 * best


def least_possible(tokens: list[int], replicas: int) -> float:
    """The mean, or the longest example beside the shortest ones: below that no replica with the longest one can be."""
    others = sorted(tokens)[: len(tokens) // replicas - 1]
    return max(sum(tokens) / replicas, max(tokens) + sum(others))


def test_eight_replicas_are_much_more_even_than_in_the_order_of_shuffling() -> None:
    dealt, shuffled, least = [], [], []
    for seed in range(50):
        tokens = random_tokens(8 * 8, seed)
        mean = sum(tokens) / 8
        dealt.append(max(totals(tokens, balanced_batches(tokens, 8))) / mean)
        shuffled.append(max(sum(tokens[start : start + 8]) for start in range(0, 64, 8)) / mean)
        least.append(least_possible(tokens, 8) / mean)
    assert statistics.mean(dealt) < 1.02 * statistics.mean(least)
    assert statistics.mean(dealt) < 1.25
    assert statistics.mean(shuffled) > 1.8


def test_replicas_get_other_examples_of_the_same_steps() -> None:
    """Through accelerate's loaders, which Trainer uses."""
    examples, replicas, batch_size = 41, 2, 4
    tokens = random_tokens(examples, seed=1)
    loaders = [
        prepare_data_loader(
            DataLoader(range(examples), batch_size, sampler=BalancedSampler(tokens, replicas, batch_size, seed=3)),
            num_processes=replicas,
            process_index=rank,
            put_on_device=False,
            rng_types=[],
        )
        for rank in range(replicas)
    ]
    orders = []
    for epoch in range(2):
        steps: list[list[list[int]]] = []
        for loader in loaders:
            loader.set_epoch(epoch)
            steps.append([batch.tolist() for batch in loader.base_dataloader])
        assert [len(batches) for batches in steps] == [len(loaders[0])] * replicas
        shuffled = torch.randperm(examples, generator=torch.Generator().manual_seed(3 + epoch)).tolist()
        for number, batches in enumerate(zip(*steps)):
            if number < examples // (replicas * batch_size):
                window = shuffled[number * replicas * batch_size :][: replicas * batch_size]
                assert sorted(example for batch in batches for example in batch) == sorted(window)
                assert [len(batch) for batch in batches] == [batch_size] * replicas
                least = least_possible([tokens[example] for example in window], replicas)
                assert max(totals(tokens, list(batches))) <= 1.1 * least
        assert {example for batches in steps for batch in batches for example in batch} == set(range(examples))
        orders.append(steps)
    assert orders[0] != orders[1]


def test_what_does_not_come_out_even_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`replicas` must divide the examples.*got 3 for 8"):
        balanced_batches([1] * 8, 3)
    with pytest.raises(ValueError, match="`replicas` must be at least 1"):
        BalancedSampler([1, 2], 0, 1)
    with pytest.raises(ValueError, match="`batch_size` must be at least 1"):
        BalancedSampler([1, 2], 1, 0)


def test_rows_that_do_not_fill_a_step_keep_their_order() -> None:
    sampler = BalancedSampler([5, 1, 4], 2, 2)
    assert len(sampler) == 3
    assert list(sampler) == torch.randperm(3, generator=torch.Generator().manual_seed(0)).tolist()
