"""Prefix trees against tries built in plain Python."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_trees import padded_batch, random_sequences
from torch import Tensor

from hf_flashmask import bounds
from hf_flashmask.sharing.prefix_tree import PrefixTree, from_sequences, merge_prefixes

few_tokens = st.lists(st.lists(st.integers(1, 3), max_size=10), min_size=1, max_size=8)


def check_tree(tree: PrefixTree, index: list[list[int]], sequences: list[list[int]]) -> None:
    """The row contains every sequence, and each token sees exactly the tokens before it in its sequence."""
    visible = bounds.to_dense(tree.bounds)[0, 0]
    for places, sequence in zip(index, sequences):
        assert tree.input_ids[0, places].tolist() == sequence
        assert tree.depth[0, places].tolist() == list(range(len(sequence)))
        for depth, place in enumerate(places):
            assert visible[place].nonzero().flatten().tolist() == sorted(places[: depth + 1])
    assert {place for places in index for place in places} == set(range(tree.input_ids.shape[1]))
    assert tree.num_tokens == sum(map(len, sequences))


def places_of_tokens(tree: PrefixTree, mask: Tensor) -> list[list[int]]:
    assert (tree.index[~mask.bool()] == -1).all()
    return [row[keep.bool()].tolist() for row, keep in zip(tree.index, mask)]


def distinct_prefixes(sequences: list[list]) -> int:
    return len({tuple(row[: end + 1]) for row in sequences for end in range(len(row))})


@given(few_tokens, st.sampled_from(["left", "right"]), st.integers(0, 2))
@settings(deadline=None, max_examples=150)
def test_every_prefix_is_stored_once(rows: list[list[int]], side: str, extra: int) -> None:
    input_ids, mask = padded_batch(rows, side, extra)
    tree = merge_prefixes(input_ids, mask)
    check_tree(tree, places_of_tokens(tree, mask), rows)
    assert tree.input_ids.shape[1] == distinct_prefixes(rows)
    assert torch.equal(tree.position_ids, tree.depth)


@given(few_tokens)
@settings(deadline=None, max_examples=100)
def test_one_label_per_token(rows: list[list[int]]) -> None:
    tree = from_sequences(rows, one_label_per_token=True)
    check_tree(tree, [row[: len(given)].tolist() for row, given in zip(tree.index, rows)], rows)
    labelled = [list(zip(row, [*row[1:], None])) for row in rows]
    assert tree.input_ids.shape[1] == distinct_prefixes(labelled)
    following: dict[int, int | None] = {}
    for places, row in zip(tree.index.tolist(), labelled):
        for place, (_, label) in zip(places, row):
            assert following.setdefault(place, label) == label


@given(few_tokens, st.integers(1, 4))
@settings(deadline=None, max_examples=100)
def test_no_tree_has_more_branches_than_asked(rows: list[list[int]], max_branches: int) -> None:
    input_ids, mask = padded_batch(rows)
    tree = merge_prefixes(input_ids, mask, max_branches=max_branches)
    check_tree(tree, places_of_tokens(tree, mask), rows)
    assert tree.max_branches <= max_branches


@given(few_tokens, st.data())
@settings(deadline=None, max_examples=100)
def test_tokens_at_different_positions_stay_apart(rows: list[list[int]], data: st.DataObject) -> None:
    shifts = data.draw(st.lists(st.integers(0, 1), min_size=len(rows), max_size=len(rows)))
    input_ids, mask = padded_batch(rows)
    position_ids = torch.arange(input_ids.shape[1]) + torch.tensor(shifts)[:, None]
    tree = merge_prefixes(input_ids, mask, position_ids)
    index = places_of_tokens(tree, mask)
    check_tree(tree, index, rows)
    for places, row, shift in zip(index, rows, shifts):
        assert tree.position_ids[0, places].tolist() == list(range(shift, shift + len(row)))
    with_shift = [[(shift, token) for token in row] for shift, row in zip(shifts, rows)]
    assert tree.input_ids.shape[1] == distinct_prefixes(with_shift)


def test_tokens_that_the_mask_hides_between_others_keep_their_place() -> None:
    """Two rows that hide the same token share it; a token that is hidden in one row only is another one."""
    input_ids = torch.tensor([[0, 5, 6, 7, 0], [0, 5, 6, 8, 0], [5, 6, 7, 0, 0]])
    mask = torch.tensor([[0, 1, 0, 1, 0], [0, 1, 0, 1, 0], [1, 1, 1, 0, 0]])
    tree = merge_prefixes(input_ids, mask)
    assert tree.input_ids.tolist() == [[5, 6, 7, 8, 6, 7]]
    assert tree.index.tolist() == [[-1, 0, 1, 2, -1], [-1, 0, 1, 3, -1], [0, 4, 5, -1, -1]]
    assert tree.depth.tolist() == [[0, 1, 2, 2, 1, 2]]
    assert tree.num_tokens == 7
    visible = bounds.to_dense(tree.bounds)[0, 0].int()
    expected = {0: [0], 1: [0], 2: [0, 2], 3: [0, 3], 4: [0, 4], 5: [0, 4, 5]}
    assert {row: keys.nonzero().flatten().tolist() for row, keys in enumerate(visible)} == expected


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_token_ids_of_any_dtype(dtype: torch.dtype) -> None:
    """A hidden token is no other token, whatever the dtype holds."""
    input_ids = torch.tensor([[1, 0, 3], [1, 255, 4]]).to(dtype)
    tree = merge_prefixes(input_ids, torch.tensor([[1, 0, 1], [1, 1, 1]]))
    assert tree.index.tolist() == [[0, 1, 2], [0, 3, 4]]
    assert tree.input_ids.dtype == dtype


def test_order_of_a_nested_tree() -> None:
    tree = from_sequences([[1, 2, 3], [9], [1, 2, 4, 5], [1, 7], [1, 2, 4, 5], [1, 2]])
    assert tree.input_ids.tolist() == [[1, 2, 3, 4, 5, 7, 9]]
    assert tree.bounds.flatten().tolist() == [6, 5, 3, 5, 5, 6, 7]
    assert tree.index[5].tolist() == [0, 1, -1, -1]
    assert tree.max_branches == 3


def test_many_rows_are_compared_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_sequences(3, 40, 5)
    whole = from_sequences(rows)
    monkeypatch.setattr("hf_flashmask.sharing.prefix_tree._COMPARED_AT_ONCE", 100)
    assert torch.equal(from_sequences(rows).index, whole.index)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.zeros(4, dtype=torch.long)}, r"`input_ids` must be integers \[R, S\]"),
        ({"input_ids": torch.zeros(2, 4)}, "torch.float32"),
        ({"input_ids": torch.zeros(0, 4, dtype=torch.long)}, "R > 0"),
        ({"attention_mask": torch.ones(2, 3)}, r"`attention_mask` must have the shape of `input_ids`, \[2, 4\]"),
        ({"position_ids": torch.zeros(3, 4, dtype=torch.long)}, r"`position_ids` must be integers \[R or 1, S\]"),
        ({"position_ids": torch.tensor([[0, 1, 0, 1]])}, "packed documents"),
    ],
)
def test_bad_input(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merge_prefixes(**{"input_ids": torch.ones(2, 4, dtype=torch.long), **arguments})


def test_bad_sequences() -> None:
    with pytest.raises(ValueError, match=r"`sequences\[1\]` must be a sequence of token ids"):
        from_sequences([[1], [[2]]])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="`sequences` is empty"):
        from_sequences([])
