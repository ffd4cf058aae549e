"""Every constructor and set operation of bounds against a dense mask written down here, pair by pair."""

from __future__ import annotations

import doctest
import functools
import importlib
import inspect
import itertools
import re
import warnings
from collections.abc import Callable
from itertools import accumulate, pairwise

import numpy as np
import pytest
import torch
import transformers
from dense_masks import assert_mask, dense, dense_of_bounds
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import (
    BlockMask,
    and_masks,
    create_block_mask,
    create_mask,
    noop_mask,
    or_masks,
)
from transformers import masking_utils, modeling_flash_attention_utils

import hf_flashmask.bounds as bounds_module
from hf_flashmask.bounds import (
    MAX_INTERVALS,
    TooManyIntervalsError,
    algebra,
    bidirectional,
    causal,
    causal_with_blocks,
    check_bounds,
    chunked,
    concatenate_keys,
    document_ends,
    document_ends_of_mask,
    document_starts,
    explain,
    from_block_mask,
    from_cu_seqlens,
    from_dense,
    from_document_ends,
    from_document_ids,
    from_mask_mod,
    from_padding_mask,
    from_position_ids,
    from_prefix_tree,
    from_startend_row_indices,
    from_tiles,
    from_visible_intervals,
    global_and_sliding_window,
    hide_keys,
    intersect,
    limit_depth,
    prefix_lm,
    select_rows,
    simplify,
    sliding_window,
    tile_occupancy,
    to_dense,
    to_startend_row_indices,
    trees,
    union,
    visible_pairs,
)
from hf_flashmask.bounds import dense as bounds_dense

few = settings(max_examples=100, deadline=None)


def dense_to_tensor(visible: Callable[[int, int], bool], size: int) -> torch.Tensor:
    return torch.from_numpy(dense(visible, range(size), range(size)))


lengths = st.integers(0, 13)


def view(draw, tensor: torch.Tensor) -> torch.Tensor:
    """The same values, at times as a view that is not contiguous."""
    if draw(st.booleans()):
        return tensor
    reverse = tuple(reversed(range(tensor.ndim)))
    return tensor.permute(reverse).contiguous().permute(reverse)


@st.composite
def calls(draw):
    """q_len, kv_len, offsets as the constructors take them, and the positions they mean."""
    q_len, kv_len = draw(lengths), draw(lengths)
    if draw(st.booleans()):
        kv_len = max(q_len, kv_len)
        q_start = kv_len - q_len
        return q_len, kv_len, {}, range(q_start, kv_len), range(kv_len)
    q_start, k_start = draw(st.integers(0, 9)), draw(st.integers(0, 9))
    wrap = draw(st.sampled_from([int, torch.tensor, lambda x: torch.tensor(x, dtype=torch.int32)]))
    offsets = {"q_offset": wrap(q_start), "kv_offset": wrap(k_start)}
    return q_len, kv_len, offsets, range(q_start, q_start + q_len), range(k_start, k_start + kv_len)


@st.composite
def sequences(draw, values):
    """Values for B rows of S positions, and a call whose keys may begin late or reach past them, as caches do."""
    batch, length = draw(st.integers(1, 2)), draw(lengths)
    rows = [draw(st.lists(values, min_size=length, max_size=length)) for _ in range(batch)]
    tensor = torch.tensor(rows, dtype=draw(st.sampled_from([torch.int32, torch.int64]))).reshape(batch, length)
    tensor = view(draw, tensor)
    if draw(st.booleans()):
        return rows, tensor, {}, range(length), range(length)
    q_len, kv_len = draw(st.integers(0, length)), draw(lengths)
    q_start, k_start = draw(st.integers(0, length - q_len)), draw(st.integers(0, 3))
    wrap = draw(st.sampled_from([int, torch.tensor]))
    call = {"q_len": q_len, "kv_len": kv_len, "q_offset": wrap(q_start), "kv_offset": wrap(k_start)}
    return rows, tensor, call, range(q_start, q_start + q_len), range(k_start, k_start + kv_len)


@st.composite
def any_bounds(draw, batch: int, heads: int, kv_len: int):
    """Legal bounds of every form: negative, past the end, empty and overlapping intervals."""
    planes = draw(st.sampled_from([1, 2, 4, 6, 8]))
    shape = (draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, heads])), planes, kv_len)
    extremes = [-(2**31), 2**31 - 1]
    count = int(np.prod(shape))
    values = draw(st.lists(st.one_of(st.integers(-3, 14), st.sampled_from(extremes)), min_size=count, max_size=count))
    return view(draw, torch.tensor(values, dtype=torch.int32).reshape(shape))


@st.composite
def several_bounds(draw, count: int):
    q_len, kv_len = draw(st.integers(0, 9)), draw(st.integers(0, 5))
    return q_len, [draw(any_bounds(2, 3, kv_len)) for _ in range(count)]


# Constructors


@few
@given(calls())
def test_causal(call):
    q_len, kv_len, offsets, queries, keys = call
    result = causal(q_len, kv_len, **offsets)
    assert_mask(result, dense(lambda q, k: k <= q, queries, keys), q_len)
    if not offsets:
        assert result.shape[2] == 1


@pytest.mark.parametrize("lengths", [(7, 3), (3, 7), (1, 9), (5, 5)])
def test_causal_triangle_ends_in_the_last_corner(lengths):
    q_len, kv_len = lengths
    expected = dense(lambda q, k: k <= q + kv_len - q_len, range(q_len), range(kv_len))
    assert_mask(causal(q_len, kv_len), expected, q_len)


@few
@given(calls(), st.integers(0, 12), st.booleans())
def test_sliding_window(call, window, is_causal):
    q_len, kv_len, offsets, queries, keys = call
    if is_causal:
        window += 1
        expected = dense(lambda q, k: q - window < k <= q, queries, keys)
    else:
        expected = dense(lambda q, k: abs(q - k) <= window, queries, keys)
    assert_mask(sliding_window(window, q_len, kv_len, is_causal=is_causal, **offsets), expected, q_len)


@few
@given(calls(), st.none() | st.integers(0, 6), st.none() | st.integers(0, 6))
def test_windows_with_two_sides(call, left, right):
    q_len, kv_len, offsets, queries, keys = call

    def visible(q, k):
        return (left is None or q - left <= k) and (right is None or k <= q + right)

    assert_mask(sliding_window((left, right), q_len, kv_len, **offsets), dense(visible, queries, keys), q_len)


def test_lengths_of_more_than_32_bits_reach_everything():
    assert_mask(sliding_window(2**40, 6), dense(lambda q, k: k <= q, range(6), range(6)), 6)
    assert_mask(sliding_window(2**31 - 1, 6, is_causal=False), np.ones((6, 6), dtype=bool), 6)
    assert_mask(chunked(2**40, 6), dense(lambda q, k: k <= q, range(6), range(6)), 6)
    assert_mask(prefix_lm(2**31, 6), np.ones((6, 6), dtype=bool), 6)


@few
@given(calls(), st.integers(1, 6), st.booleans(), st.none() | st.lists(st.integers(0, 7), min_size=1, max_size=3))
def test_chunked(call, chunk_size, is_causal, left_padding):
    q_len, kv_len, offsets, queries, keys = call

    def visible(padding):
        return lambda q, k: (q - padding) // chunk_size == (k - padding) // chunk_size and (k <= q or not is_causal)

    expected = np.stack([dense(visible(padding), queries, keys)[None] for padding in left_padding or [0]])
    padding = None if left_padding is None else torch.tensor(left_padding)
    result = chunked(chunk_size, q_len, kv_len, left_padding=padding, is_causal=is_causal, **offsets)
    assert_mask(result, expected, q_len)


@few
@given(calls(), st.integers(0, 9) | st.lists(st.integers(0, 9), min_size=1, max_size=3))
def test_prefix_lm(call, prefixes):
    q_len, kv_len, offsets, queries, keys = call
    rows = [prefixes] if isinstance(prefixes, int) else prefixes
    expected = np.stack([dense(lambda q, k, p=p: k <= q or k < p, queries, keys)[None] for p in rows])
    prefix_lengths = prefixes if isinstance(prefixes, int) else torch.tensor(prefixes)
    assert_mask(prefix_lm(prefix_lengths, q_len, kv_len, **offsets), expected, q_len)


@few
@given(calls())
def test_bidirectional(call):
    q_len, kv_len = call[:2]
    assert_mask(bidirectional(q_len, kv_len), np.ones((q_len, kv_len), dtype=bool), q_len)


def runs_of(row: list[int], same: Callable[[int, int], bool]) -> list[int]:
    """Number of the run of each position; `same(previous, this)` says whether a run goes on."""
    return list(accumulate((0 if i == 0 or same(row[i - 1], x) else 1) for i, x in enumerate(row)))


@few
@given(sequences(st.integers(-1, 2)), st.booleans())
def test_from_document_ids(drawn, is_causal):
    rows, document_ids, call, queries, keys = drawn
    expected = []
    for row in rows:
        run = runs_of(row, lambda before, this: before == this)

        def visible(q, k, row=row, run=run):
            return k < len(row) and row[k] >= 0 and run[q] == run[k] and (k <= q or not is_causal)

        expected.append(dense(visible, queries, keys)[None])
    result = from_document_ids(document_ids, is_causal=is_causal, **call)
    assert_mask(result, np.stack(expected), len(queries))


def documents_of(row: list[float]) -> list[int]:
    """Number of the document of each position: one starts wherever a run that does not decrease repeats its start."""
    documents: list[int] = []
    for index, position in enumerate(row):
        if index == 0 or position < row[index - 1]:
            start_of_run = position
        documents.append((documents[-1] if documents else -1) + (position == start_of_run))
    return documents


@few
@given(sequences(st.integers(0, 4)), st.booleans(), st.sampled_from([None, torch.float16, torch.float64]))
def test_from_position_ids(drawn, is_causal, float_type):
    rows, position_ids, call, queries, keys = drawn
    if float_type is not None:
        position_ids = position_ids.to(float_type) / 4
    expected = []
    for row in rows:
        document = documents_of(row)

        def visible(q, k, row=row, document=document):
            return k < len(row) and document[q] == document[k] and (k <= q or not is_causal)

        expected.append(dense(visible, queries, keys)[None])
    assert_mask(from_position_ids(position_ids, is_causal=is_causal, **call), np.stack(expected), len(queries))


def test_position_ids_may_start_anywhere_have_gaps_and_be_constant_in_padding():
    position_ids = torch.tensor([2, 3, 4, 2, 3, 9, 10, 0, 0, 0])
    document = [0, 0, 0, 1, 1, 1, 1, 2, 3, 4]
    expected = dense(lambda q, k: document[q] == document[k] and k <= q, range(10), range(10))
    assert_mask(from_position_ids(position_ids), expected, 10)


# Lengths of the documents that position ids mean: here, to the masks of Transformers 5.23, to its FlashAttention path.
REPEATS = {
    "restarts": ([0, 1, 2, 0, 1], [3, 2], [3, 2], [3, 2]),
    "documents of one token": ([0, 0, 1, 2, 0, 0, 1], [1, 3, 1, 2], [1, 3, 1, 2], [1, 3, 1, 2]),
    "the same, of RoBERTa": ([2, 2, 3, 2, 3], [1, 2, 2], [1, 2, 2], [1, 2, 2]),
    "padding of zeros": ([0, 1, 2, 0, 0, 0], [3, 1, 1, 1], [3, 1, 1, 1], [3, 1, 1, 1]),
    "a position repeats": ([0, 1, 1, 2, 2, 3], [6], [2, 2, 2], [6]),
    "positions of pairs": ([0, 0, 1, 1, 2, 2], [1, 5], [1, 2, 2, 1], [1, 5]),
    "a gap": ([0, 1, 2, 9, 10], [5], [3, 2], [5]),
    # FlashAttention's path looks for the smallest position of the row.
    "other first positions": ([5, 6, 7, 0, 1, 5, 5, 6], [3, 5], [3, 2, 1, 2], [3, 5]),
    "the rest of a document first": ([7, 8, 3, 4, 3, 3, 4], [2, 2, 1, 2], [2, 2, 1, 2], [2, 2, 1, 2]),
    "each lower than the one before": ([4, 4, 5, 2, 3], [1, 2, 2], [1, 2, 2], [3, 2]),
}


@pytest.mark.parametrize("name", REPEATS)
def test_repeated_positions_beside_what_transformers_makes_of_them(name):
    positions, ours, of_masks, of_flash_attention = REPEATS[name]
    position_ids = torch.tensor([positions])
    ends = document_ends(position_ids)
    assert ends[0].unique().diff(prepend=torch.zeros(1)).tolist() == ours
    assert torch.equal(document_ends(position_ids / 8), ends)
    assert torch.equal(document_ends(position_ids, torch.ones_like(position_ids, dtype=torch.bool)), ends)
    if Version(transformers.__version__) < Version("5.23"):
        return
    ids = masking_utils.find_packed_sequence_indices(position_ids)
    assert ids.unique(return_counts=True)[1].tolist() == of_masks
    assert modeling_flash_attention_utils._is_packed_sequence(position_ids, 1)
    (cu_seqlens, _), _ = modeling_flash_attention_utils.prepare_fa_kwargs_from_position_ids(position_ids)
    # What comes before the first smallest position is in no document there; here it counts as the first one.
    borders = [0, *cu_seqlens.tolist()] if cu_seqlens[0] else cu_seqlens.tolist()
    assert [end - start for start, end in pairwise(borders)] == of_flash_attention


def test_positions_that_are_floats_are_compared_as_they_are():
    position_ids = torch.tensor([[0.0, 0.25, 0.5, 0.5, 0.75, 0.0, 0.0, 1e-30]], dtype=torch.float64)
    assert document_ends(position_ids).tolist() == [[5, 5, 5, 5, 5, 6, 8, 8]]
    is_token = torch.tensor([[False, True, True, True, False, True, True, True]])
    assert document_ends(position_ids, is_token)[0, 1:].tolist() == [5, 5, 5, 5, 6, 8, 8]


@few
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=5), st.booleans(), st.booleans(), lengths)
def test_from_cu_seqlens(documents, is_causal, cross, padding):
    q_lengths = [q for q, _ in documents]
    k_lengths = [k if cross else q for q, k in documents]
    cu_q, cu_k = [0, *accumulate(q_lengths)], [0, *accumulate(k_lengths)]
    q_len, kv_len = cu_q[-1] + padding, cu_k[-1] + padding
    expected = np.zeros((q_len, kv_len), dtype=bool)
    for document, (queries, keys) in enumerate(zip(q_lengths, k_lengths)):
        for i, j in np.ndindex(queries, keys):
            visible = not is_causal or j - (keys - queries) <= i
            expected[cu_q[document] + i, cu_k[document] + j] = visible
    result = from_cu_seqlens(
        torch.tensor(cu_q, dtype=torch.int32),
        q_len,
        cu_seqlens_k=torch.tensor(cu_k, dtype=torch.int32) if cross else None,
        kv_len=kv_len if cross else None,
        is_causal=is_causal,
    )
    assert_mask(result, expected, q_len)


def test_ends_of_documents_are_cut_to_any_call():
    ends = torch.tensor([[3, 3, 3, 5, 5, 8, 8, 8]], dtype=torch.int32)
    ids = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    for call in ({"q_offset": 2}, {"kv_offset": 3}, {"q_len": 5}, {"kv_len": 6, "kv_offset": torch.tensor(2)}):
        for is_causal in (False, True):
            ours = from_document_ends(ends, is_causal=is_causal, **call)
            expected = from_document_ids(ids, is_causal=is_causal, **call)
            q_len = call.get("q_len", 8)
            np.testing.assert_array_equal(to_dense(ours, q_len).numpy(), to_dense(expected, q_len).numpy())


@pytest.mark.parametrize("wrong", [[5, 7], [0, 7, 5], [-1, 5]])
def test_lengths_that_are_not_cumulative_are_refused(wrong):
    got = rf"must hold cumulative lengths: a leading 0, .*, got {re.escape(str(wrong))}\."
    with pytest.raises(ValueError, match=rf"`cu_seqlens_q` \(of a model: `cu_seq_lens_q`\) {got}"):
        from_cu_seqlens(torch.tensor(wrong), 12)
    right = torch.tensor([0, *[12] * (len(wrong) - 1)])
    with pytest.raises(ValueError, match=rf"`cu_seqlens_k` .*{got}"):
        from_cu_seqlens(right, 12, cu_seqlens_k=torch.tensor(wrong))


def test_lengths_may_hold_empty_documents_and_leave_padding():
    row = torch.arange(12)
    document = torch.tensor([0] * 5 + [1] * 4 + [-1] * 3)
    expected = (row[:, None] >= row) & (document[:, None] == document) & (document >= 0)
    assert_mask(from_cu_seqlens(torch.tensor([0, 5, 5, 9]), 12), expected[None, None], 12)


def test_cu_seqlens_and_a_static_cache_longer_than_the_documents():
    expected = np.zeros((5, 9), dtype=bool)
    expected[:3, :3] = np.tri(3)
    expected[3:, 3:5] = np.tri(2)
    assert_mask(from_cu_seqlens(torch.tensor([0, 3, 5]), 5, kv_len=9), expected, 5)


@few
@given(calls(), st.integers(1, 3), st.booleans(), st.randoms())
def test_from_padding_mask(call, batch, is_causal, random):
    q_len, kv_len, offsets, queries, keys = call
    real = [[random.random() < 0.6 for _ in keys] for _ in range(batch)]
    expected = np.stack(
        [
            dense(lambda q, k, row=row: row[k - keys.start] and (k <= q or not is_causal), queries, keys)[None]
            for row in real
        ]
    )
    for dtype in (torch.bool, torch.int64, torch.float32):
        mask = torch.tensor(real, dtype=dtype).reshape(batch, kv_len)
        assert_mask(from_padding_mask(mask, q_len=q_len, is_causal=is_causal, **offsets), expected, q_len)


@few
@given(sequences(st.integers(-1, 2)), st.none() | st.integers(1, 5), st.booleans())
def test_causal_with_blocks(drawn, window, limits_blocks):
    limits_blocks = limits_blocks and window is not None
    rows, block_ids, call, queries, keys = drawn
    expected = []
    for row in rows:
        run = runs_of(row, lambda before, this: before == this)

        def visible(q, k, row=row, run=run):
            in_block = k < len(row) and row[k] >= 0 and run[q] == run[k]
            in_window = window is None or k > q - window
            if limits_blocks:
                return (in_block or k <= q) and in_window
            return in_block or (k <= q and in_window)

        expected.append(dense(visible, queries, keys)[None])
    result = causal_with_blocks(block_ids, window=window, window_limits_blocks=limits_blocks, **call)
    assert_mask(result, np.stack(expected), len(queries))


@st.composite
def forests(draw):
    """parents and lengths of a random forest in depth-first order."""
    parents: list[int] = []
    path: list[int] = []
    for node in range(draw(st.integers(0, 7))):
        depth = draw(st.integers(0, len(path)))
        path = path[:depth]
        parents.append(path[-1] if path else -1)
        path.append(node)
    return parents, [draw(st.integers(0, 3)) for _ in parents]


def dense_of_tree(parents: list[int], lengths: list[int], size: int) -> np.ndarray:
    node_of = [node for node, length in enumerate(lengths) for _ in range(length)]

    def sees(node: int, other: int) -> bool:
        while node != -1:
            if node == other:
                return True
            node = parents[node]
        return False

    def visible(q: int, k: int) -> bool:
        return max(q, k) < len(node_of) and k <= q and sees(node_of[q], node_of[k])

    return dense(visible, range(size), range(size))


@few
@given(st.lists(forests(), min_size=1, max_size=3), st.integers(0, 3))
def test_from_prefix_tree(trees, padding):
    size = max(sum(lengths) for _, lengths in trees) + padding
    expected = np.stack([dense_of_tree(parents, lengths, size)[None] for parents, lengths in trees])
    result = from_prefix_tree([p for p, _ in trees], [n for _, n in trees], kv_len=size)
    assert result.shape[2] == 1
    assert_mask(result, expected, size)
    assert_mask(from_prefix_tree(*trees[0], kv_len=size), expected[:1], size)


def test_prefix_tree_takes_tensors():
    expected = dense_of_tree([-1, 0, 0], [3, 2, 2], 7)
    assert_mask(from_prefix_tree(torch.tensor([-1, 0, 0]), torch.tensor([3, 2, 2])), expected, 7)


@few
@given(st.lists(forests(), min_size=1, max_size=3), st.integers(0, 3))
def test_prefix_trees_whose_values_the_host_does_not_know(drawn, padding):
    nodes, size = max(len(p) for p, _ in drawn), max(sum(lengths) for _, lengths in drawn) + padding
    parents = torch.tensor([p + [-1] * (nodes - len(p)) for p, _ in drawn], dtype=torch.long).reshape(len(drawn), nodes)
    lengths = torch.tensor([n + [0] * (nodes - len(n)) for _, n in drawn], dtype=torch.long).reshape(len(drawn), nodes)
    expected = np.stack([dense_of_tree(*tree, size)[None] for tree in drawn])
    assert_mask(trees._from_prefix_tree_on_device(parents, lengths, size), expected, size)


@few
@given(st.lists(st.integers(-2, 6), min_size=1, max_size=7), st.integers(-1, 0))
def test_wrong_trees_are_refused_wherever_they_are(parents, length):
    lengths = [1] * (len(parents) - 1) + [1 + length]
    try:
        expected = from_prefix_tree(parents, lengths)
    except ValueError:
        with pytest.raises(ValueError, match="are not in depth-first order, or `lengths` are negative"):
            trees._from_prefix_tree_on_device(torch.tensor(parents), torch.tensor(lengths), 9)
    else:
        result = trees._from_prefix_tree_on_device(torch.tensor(parents), torch.tensor(lengths), expected.shape[3])
        assert torch.equal(result, expected)


def test_a_million_tokens_take_linear_memory():
    document_lengths = np.random.default_rng(0).integers(1, 5000, size=2**9)
    position_ids = torch.from_numpy(np.concatenate([np.arange(n) for n in document_lengths]))
    ends = np.repeat(np.cumsum(document_lengths), document_lengths)
    packed = from_position_ids(position_ids)
    np.testing.assert_array_equal(packed[0, 0, 0].numpy(), ends)
    assert visible_pairs(packed).item() == sum(int(n) * (int(n) + 1) // 2 for n in document_lengths)
    windowed = intersect(packed, sliding_window(1000, len(ends)))
    expected = sum(sum(min(i + 1, 1000) for i in range(n)) for n in document_lengths)
    assert visible_pairs(windowed).item() == expected


# Set operations and views


@few
@given(several_bounds(1))
def test_to_dense_and_visible_pairs(drawn):
    q_len, (bounds,) = drawn
    expected = dense_of_bounds(bounds, q_len)
    np.testing.assert_array_equal(to_dense(bounds, q_len).numpy(), expected)
    np.testing.assert_array_equal(visible_pairs(bounds, q_len).numpy(), expected.sum((2, 3)))


@few
@given(several_bounds(1), st.data())
def test_explain(drawn, data):
    q_len, (bounds,) = drawn
    if not q_len or not bounds.shape[3]:
        return
    query, key = data.draw(st.integers(0, q_len - 1)), data.draw(st.integers(0, bounds.shape[3] - 1))
    batch, head = bounds.shape[0] - 1, bounds.shape[1] - 1
    sentence = explain(bounds, query, key, q_len, batch=batch, head=head)
    column = dense_of_bounds(bounds, q_len)[batch, head, :, key]
    assert sentence.startswith(f"query {query} {'sees' if column[query] else 'does not see'} key {key}")
    # The rows that it names are hidden, and where it names what hides others, all that are hidden are named.
    named = np.zeros(q_len, dtype=bool)
    for first, last in re.findall(r"the rows (\d+) to (\d+)", sentence):
        named[int(first) : int(last) + 1] = True
    for first in re.findall(r"the rows (\d+) and after", sentence):
        named[int(first) :] = True
    for end in re.findall(r"the rows before (\d+)", sentence):
        named[: int(end)] = True
    named |= "from all rows" in sentence
    assert not (named & column).any()
    assert named[query] if not column[query] else (named == ~column).all()


def test_explain_names_what_it_was_not_given():
    with pytest.raises(IndexError, match="`key` is 5, but the mask has 5"):
        explain(causal(5), 0, 5)
    with pytest.raises(IndexError, match="`batch` is 2, but the bounds have 2"):
        explain(causal(5).expand(2, -1, -1, -1), 0, 0, batch=2)
    assert explain(bidirectional(3), 0, 2) == "query 0 sees key 2, which is hidden from no row"
    assert explain(nine_intervals, 0, 0).endswith("no row")


@few
@given(several_bounds(1), st.integers(1, 6))
def test_tile_occupancy(drawn, tile_size):
    q_len, (bounds,) = drawn
    mask = dense_of_bounds(bounds, q_len)
    result = tile_occupancy(bounds, q_len, tile_size=tile_size)
    for b, h, row, column in np.ndindex(*result.shape):
        tile = mask[b, h, row * tile_size : (row + 1) * tile_size, column * tile_size : (column + 1) * tile_size]
        assert tile.size
        assert result[b, h, row, column].item() == tile.mean()
    assert result.shape == (*bounds.shape[:2], -(-q_len // tile_size), -(-bounds.shape[3] // tile_size))


def test_one_hidden_pair_keeps_a_large_tile_from_being_full():
    bounds = bidirectional(2**14)
    bounds[0, 0, 0, 17] -= 1
    assert 0 < 1 - tile_occupancy(bounds, tile_size=2**14).item() < 1e-8


@few
@given(several_bounds(3), st.integers(1, 3))
@pytest.mark.filterwarnings("ignore:.*of these masks has C =")
def test_intersect(drawn, count):
    q_len, masks = drawn
    expected = np.logical_and.reduce(np.broadcast_arrays(*(dense_of_bounds(mask, q_len) for mask in masks[:count])))
    assert_mask(intersect(*masks[:count], q_len=q_len), expected, q_len)


@few
@given(several_bounds(3), st.integers(1, 3))
@pytest.mark.filterwarnings("ignore:.*of these masks has C =")
def test_union(drawn, count):
    q_len, masks = drawn
    expected = np.logical_or.reduce(np.broadcast_arrays(*(dense_of_bounds(mask, q_len) for mask in masks[:count])))
    assert_mask(union(*masks[:count], q_len=q_len), expected, q_len)


@pytest.mark.parametrize("operation", [intersect, union])
def test_set_operations_keep_the_cheap_forms(operation):
    documents = from_position_ids(torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]]))
    assert operation(documents, sliding_window(2, 5)).shape == (2, 1, 1, 5)
    assert intersect(documents, bidirectional(5), prefix_lm(2, 5)).shape == (2, 1, 2, 5)


def test_union_counts_causal_masks_once():
    masks = [sliding_window(2, 9), from_position_ids(torch.tensor([0, 1, 2, 0, 1, 2, 3, 0, 1])), prefix_lm(2, 9)]
    expected = np.logical_or.reduce([dense_of_bounds(mask, 9) for mask in masks])
    result = union(*masks)
    assert result.shape[2] == 6
    assert_mask(result, expected, 9)


def test_composing_more_than_four_planes_warns_once_where_fewer_suffice(monkeypatch):
    monkeypatch.setattr(algebra, "_suggested", set())
    documents, prefix = from_position_ids(torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])), prefix_lm(5, 8)
    with pytest.warns(UserWarning, match=r"union.. of these masks has C = 6 planes, .*with C = 2") as caught:
        composed = union(sliding_window(3, 8), prefix)
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match=r"intersect.. of these masks has C = 10 planes, .*with C = 1"):
        intersect(documents, composed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        intersect(documents, union(sliding_window(3, 8), prefix))
    # An intersection inside the union has fewer planes.
    inside = union(intersect(documents, sliding_window(3, 8)), intersect(documents, prefix))
    assert inside.shape[2] == 6
    np.testing.assert_array_equal(to_dense(inside).numpy(), to_dense(intersect(documents, composed)).numpy())


def test_composing_says_nothing_where_all_planes_are_needed(monkeypatch):
    monkeypatch.setattr(algebra, "_suggested", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        union(sliding_window(1, 9), from_dense(dense_to_tensor(lambda q, k: q == k + 3, 9)))


@few
@given(several_bounds(1), st.randoms())
def test_hide_keys(drawn, random):
    q_len, (bounds,) = drawn
    hidden = torch.tensor([random.random() < 0.5 for _ in range(2 * bounds.shape[3])], dtype=torch.bool)
    hidden = hidden.reshape(2, bounds.shape[3])
    expected = dense_of_bounds(bounds, q_len) & ~hidden.numpy()[:, None, None, :]
    if bounds.shape[0] == 1:
        assert_mask(hide_keys(bounds, hidden[:1]), expected[:1], q_len)
    result = hide_keys(bounds, hidden)
    assert result.shape[2] == bounds.shape[2]
    assert_mask(result, expected, q_len)


def fewest_planes(mask: np.ndarray) -> int:
    """How many planes a dense mask [B, H, S_q, S_k] needs."""
    batch, heads, q_len, kv_len = mask.shape
    triangle_and_one_bound, two_bounds, most = True, True, 1
    for b, h, j in np.ndindex(batch, heads, kv_len):
        column = mask[b, h, :, j]
        shown = np.flatnonzero(column)
        hidden_runs = int(np.sum(~column & np.concatenate([[True], column[:-1]])))
        most = max(most, hidden_runs)
        if len(shown):
            one_run = shown[-1] - shown[0] + 1 == len(shown)
            two_bounds &= bool(one_run)
            triangle_and_one_bound &= bool(one_run) and shown[0] == max(0, j - (kv_len - q_len))
    return 1 if triangle_and_one_bound else 2 if two_bounds else 2 * max(most, 2)


@few
@given(several_bounds(1))
def test_simplify_and_from_dense(drawn):
    q_len, (bounds,) = drawn
    expected = dense_of_bounds(bounds, q_len)
    for result in (simplify(bounds, q_len), from_dense(torch.from_numpy(expected))):
        assert_mask(result, expected, q_len)
        assert result.shape[2] == fewest_planes(expected)
        assert not result.numel() or (result.min() >= 0 and result.max() <= q_len)


@few
@given(st.integers(0, 40), st.integers(0, 6), st.integers(0, 2**32 - 1))
def test_from_dense_of_random_masks(q_len, kv_len, seed):
    mask = np.random.default_rng(seed).random((2, 2, q_len, kv_len)) < 0.8
    if fewest_planes(mask) > 2 * MAX_INTERVALS:
        with pytest.raises(ValueError, match="hidden intervals"):
            from_dense(torch.from_numpy(mask))
    else:
        assert_mask(from_dense(torch.from_numpy(mask)), mask, q_len)
        assert_mask(from_dense(torch.from_numpy(mask[0, 0])), mask[0, 0], q_len)


@few
@given(several_bounds(1), st.integers(-1, 2))
def test_simplify_that_is_told_the_planes(drawn, more):
    q_len, (bounds,) = drawn
    expected = dense_of_bounds(bounds, q_len)
    needed = fewest_planes(expected)
    planes = [1, *range(2, 2 * MAX_INTERVALS + 1, 2)]
    given_planes = planes[max(planes.index(needed) + more, 0)]
    if given_planes < needed:
        with pytest.raises(TooManyIntervalsError, match=f"{given_planes} planes are enough, but a key needs more"):
            simplify(bounds, q_len, planes=given_planes)
        return
    result = simplify(bounds, q_len, planes=given_planes)
    assert result.shape[2] == given_planes
    assert_mask(result, expected, q_len)


@few
@given(st.integers(0, 9), st.integers(0, 5), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_from_visible_intervals(q_len, kv_len, intervals, seed):
    edges = np.random.default_rng(seed).integers(-2, q_len + 3, size=(2, 2, 3, intervals, kv_len))
    starts, ends = torch.from_numpy(edges)
    row = np.arange(q_len)[:, None, None]
    expected = ((edges[0][:, :, None] <= row) & (row < edges[1][:, :, None])).any(3)
    result = from_visible_intervals(starts.int(), ends, q_len)
    assert result.shape[2] == (2 if intervals == 1 else 2 * (intervals + 1))
    assert_mask(result, expected, q_len)
    assert torch.equal(from_visible_intervals(starts.to(torch.int8), ends.to(torch.int16), q_len), result)


def test_rows_that_small_integers_do_not_hold():
    edges = torch.tensor([[[[0, 2, 100]]]], dtype=torch.int8)
    result = from_visible_intervals(edges, edges + 27, 300)
    assert result.tolist() == [[[[27, 29, 127], [0, 2, 100]]]]


def test_too_many_visible_intervals_are_refused():
    edges = torch.zeros(1, 1, 16, 3, dtype=torch.int32)
    with pytest.raises(TooManyIntervalsError, match="hold 16 visible intervals for each key, bounds hold at most 15"):
        from_visible_intervals(edges, edges, 3)


@few
@given(st.integers(0, 7), st.data())
def test_concatenate_keys(q_len, data):
    masks = [data.draw(any_bounds(2, 3, data.draw(st.integers(0, 4)))) for _ in range(data.draw(st.integers(1, 3)))]
    parts = [np.broadcast_to(dense_of_bounds(mask, q_len), (2, 3, q_len, mask.shape[3])) for mask in masks]
    result = concatenate_keys(*masks, q_len=q_len)
    check_bounds(result)
    shown = np.broadcast_to(to_dense(result, q_len).numpy(), (2, 3, q_len, result.shape[3]))
    np.testing.assert_array_equal(shown, np.concatenate(parts, axis=3))


@few
@given(several_bounds(1), st.data())
def test_select_rows(drawn, data):
    of, (bounds,) = drawn
    first = data.draw(st.integers(0, of))
    q_len = data.draw(st.integers(0, of - first))
    expected = dense_of_bounds(bounds, of)[:, :, first : first + q_len]
    for row in (first, torch.tensor(first)):
        assert_mask(select_rows(bounds, row, q_len, of=of), expected, q_len)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: select_rows(causal(5), 3, 4), ValueError, "select rows of the 5 .* got `q_len` = 4 from 3 on"),
        (lambda: select_rows(causal(5), -2, 2), ValueError, "`first` must be at least 0, got -2"),
        (lambda: select_rows(causal(5), 0, -1), ValueError, "got `q_len` = -1"),
        (lambda: select_rows(causal(5), torch.tensor(1), 6), ValueError, "got `q_len` = 6"),
        (lambda: select_rows(causal(5), torch.tensor(1.0), 2), TypeError, "`first` must be an integer tensor"),
        (lambda: select_rows(causal(5), 1.5, 2), TypeError, "`first` must be an integer, got float"),
        (lambda: sliding_window((1.5, 0), 4), TypeError, "`window` must be an integer, got float"),
        (lambda: sliding_window([1, 2], 4), TypeError, "`window` must be an integer, got list"),
        (lambda: sliding_window(None, 4), TypeError, "`window` must be an integer, got NoneType"),
        (lambda: sliding_window((1, 2, 3), 4), ValueError, r"`window` must be \(left, right\)"),
        (lambda: from_mask_mod(torch.ones(4, 4), 4), TypeError, "must be a function or a `BlockMask`, got Tensor"),
        (
            lambda: concatenate_keys(causal(4).expand(2, -1, -1, -1), causal(4).expand(3, -1, -1, -1), q_len=4),
            ValueError,
            "agree in batch and heads",
        ),
    ],
)
def test_what_is_no_mask_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("width", [1, 2])
def test_a_block_mask_is_read_up_to_its_counts(width):
    """Of three blocks of keys, row 0 sees block 2, row 1 sees none; what comes after the counts is anything."""
    indices = torch.tensor([[[[2, 99][:width], [-1, 99][:width]]]], dtype=torch.int32)
    counts = torch.tensor([[[1, 0]]], dtype=torch.int32)
    mask = BlockMask.from_kv_blocks(
        counts, indices.clamp(0, 2), BLOCK_SIZE=2, seq_lengths=(4, 6), compute_q_blocks=False
    )
    mask.kv_indices = indices
    expected = torch.zeros(4, 6, dtype=torch.bool)
    expected[:2, 4:] = True
    assert torch.equal(to_dense(from_mask_mod(mask), 4)[0, 0], expected)


@pytest.mark.filterwarnings("ignore:.*of these masks has C =")
def test_simplify_finds_the_named_forms_again():
    size = 23
    documents = from_position_ids(torch.tensor([0, 1, 2, 3, 0, 1, 2, *range(16)]))
    assert simplify(union(causal(size), documents)).shape[2] == 1
    assert simplify(intersect(bidirectional(size), causal(size))).shape[2] == 1
    assert simplify(intersect(bidirectional(size), documents)).shape[2] == 1
    assert simplify(union(prefix_lm(4, size), documents)).shape[2] == 2


def test_an_interval_below_the_diagonal_is_the_lower_one():
    """Neighbouring columns agree on LT and UT, so that the minima and maxima over a tile stay tight."""
    size, window, sinks = 40, 6, 3
    mask = dense(lambda q, k: abs(q - k) <= window or k < sinks or q < sinks, range(size), range(size))
    lts, lte, uts, ute = from_dense(torch.from_numpy(mask))[0, 0]
    column = torch.arange(size)
    assert ((lts > column) | (lts >= lte)).all()
    assert ((ute <= column) | (uts >= ute)).all()


def official_dense(indices: torch.Tensor, is_causal: bool, q_len: int) -> np.ndarray:
    """FlashMask's own reference: what `startend_row_indices` [B, H, S_k, C] hides (values already within [0, S_q])."""
    batch, heads, kv_len, channels = indices.shape
    mask = np.ones((batch, heads, q_len, kv_len), dtype=bool)
    has_end = (is_causal and channels == 2) or (not is_causal and channels == 4)
    for b, h, j in np.ndindex(batch, heads, kv_len):
        values = indices[b, h, j].tolist()
        mask[b, h, values[0] : values[1] if has_end else q_len, j] = False
        if is_causal:
            mask[b, h, : max(0, j - (kv_len - q_len)), j] = False
        elif has_end:
            mask[b, h, values[2] : values[3], j] = False
        else:
            mask[b, h, : values[1], j] = False
    return mask


@few
@given(st.sampled_from([(True, 1), (True, 2), (False, 2), (False, 4)]), lengths, lengths, st.integers(0, 2**32 - 1))
def test_startend_row_indices_both_ways(form, q_len, kv_len, seed):
    is_causal, channels = form
    values = np.random.default_rng(seed).integers(0, q_len + 1, size=(2, 3, kv_len, channels))
    indices = torch.from_numpy(values).to(torch.int32)
    expected = official_dense(indices, is_causal, q_len)
    bounds = from_startend_row_indices(indices, is_causal, q_len=q_len)
    assert_mask(bounds, expected, q_len)
    again, again_causal = to_startend_row_indices(bounds)
    np.testing.assert_array_equal(official_dense(again, again_causal, q_len), expected)
    if (is_causal, channels) != (True, 2):
        assert torch.equal(again, indices)
        assert again_causal == is_causal
    for_heads = from_startend_row_indices(indices, is_causal, q_len=q_len, num_heads=6)
    assert_mask(for_heads, np.repeat(expected, 2, axis=1), q_len)
    never = torch.iinfo(torch.int64).max - q_len  # int32 would hold another number
    far = torch.where(indices == q_len, never, indices.long())
    assert_mask(from_startend_row_indices(far, is_causal, q_len=q_len), expected, q_len)


@pytest.mark.parametrize(
    ("mask_mod", "error", "message"),
    [
        (lambda q, k: q >= k, TypeError, r"of `\(batch, head, query, key\)`, got one of `\(q, k\)`"),
        (lambda score, b, h, q, k: score, TypeError, r"got one of `\(score, b, h, q, k\)`"),
        (lambda b, h, q, k: q >= k and q - k < 3, ValueError, "got a function that needs the value of one .*write &"),
        (lambda b, h, q, k: k < 2 if k < 3 else q >= k, ValueError, "got a function that needs the value of one"),
        (lambda b, h, q, k: torch.tensor(q.item() >= k.item()), ValueError, r"one .*\.item\(\)"),
        (lambda b, h, q, k: k < [1, 2, 3, 4, 5][q], ValueError, "one .*look up in tensors and not in lists"),
        (lambda b, h, q, k: torch.rand(()) < 0.5, ValueError, "one .*random.*draw random numbers before"),
        (lambda b, h, q, k: q - k, TypeError, r"must return a bool tensor .*got torch.int64 \[\]; compare"),
        (lambda b, h, q, k: (q >= k).float(), TypeError, r"got torch.float32 \[\]; compare what is not bool"),
        (lambda b, h, q, k: torch.stack([q >= k, q < k]), TypeError, r"got torch.bool \[2\]; .* reduce dimensions"),
        (lambda b, h, q, k: True, TypeError, "must return a bool tensor, True = visible, got bool; compute it"),
        (lambda b, h, q, k: None, TypeError, "got NoneType"),
        (lambda b, h, q, k: (q >= k, q < k), TypeError, "got tuple"),
        (lambda b, h, q, k: {}["documents"], KeyError, "documents"),
        (
            lambda b, h, q, k: torch.arange(3)[k] <= q,
            ValueError,
            "below `kv_len` = 5, .* index 3 is out of bounds .*pad",
        ),
    ],
)
def test_a_mask_mod_that_cannot_be_evaluated_is_told_why(mask_mod, error, message):
    """An error of its own is passed on."""
    with pytest.raises(error, match=message):
        from_mask_mod(mask_mod, 5)


def test_a_mask_mod_may_bind_arguments_and_take_any_number():
    documents = torch.tensor([0, 0, 1, 1, 1])

    def same(documents, b, h, q, k):
        return documents[q] == documents[k]

    for mask_mod in (functools.partial(same, documents), lambda *pair: same(documents, *pair)):
        assert_mask(from_mask_mod(mask_mod, 5), (documents[:, None] == documents)[None, None], 5)


@few
@given(st.integers(0, 20), st.integers(0, 7), st.integers(0, 2**32 - 1))
def test_from_mask_mod(q_len, kv_len, seed):
    table = torch.from_numpy(np.random.default_rng(seed).random((2, 3, q_len, kv_len)) < 0.8)
    result = from_mask_mod(lambda b, h, q, k: table[b, h, q, k], q_len, kv_len, batch_size=2, num_heads=3)
    assert_mask(result, table.numpy(), q_len)


def test_a_mask_mod_in_several_tiles(monkeypatch):
    monkeypatch.setattr(bounds_dense, "PAIRS_OF_A_TILE", 100)
    documents = torch.arange(50).div(7, rounding_mode="floor")
    result = from_mask_mod(lambda b, h, q, k: (q >= k) & (documents[q] == documents[k]), 50)
    assert torch.equal(result, from_document_ids(documents))


def test_a_block_mask_means_what_flex_attention_computes():
    length = 300
    documents = torch.arange(length).div(77, rounding_mode="floor")
    made = create_block_mask(
        lambda b, h, q, k: (documents[q] == documents[k]) & (q >= k), 2, None, length, length, "cpu"
    )
    assert torch.equal(from_mask_mod(made), from_document_ids(documents).expand(2, -1, -1, -1))
    # Its function says less than its blocks do: a full block is visible whole, one that is not listed is hidden.
    counts, indices = torch.ones(1, 1, 3, dtype=torch.int32), torch.zeros(1, 1, 3, 3, dtype=torch.int32)
    full_indices = torch.tensor([1, 0, 2]).int().expand(1, 1, 3, 3)
    by_hand = BlockMask.from_kv_blocks(
        counts, indices, counts, full_indices, BLOCK_SIZE=4, mask_mod=lambda b, h, q, k: q >= k, seq_lengths=(12, 12)
    )
    expected = dense(lambda q, k: (k // 4 == 0 and q >= k) or k // 4 == 1, range(12), range(12))
    assert_mask(from_mask_mod(by_hand), expected, 12)


@pytest.mark.parametrize("block_size", [4, 128])
def test_a_block_mask_for_all_rows_and_heads_whose_function_looks_at_them(block_size):
    documents = torch.tensor([[0, 0, 1, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 2]])
    windows = torch.tensor([1, 2, 5])

    def mask_mod(b, h, q, k):
        return (q >= k) & (documents[b, q] == documents[b, k]) & (q - k < windows[h])

    expected = create_mask(mask_mod, 2, 3, 7, 7, "cpu").numpy()
    blocks = -(-7 // block_size)
    for batch, heads in ((1, 1), (2, 3), (1, 3), (2, 1)):
        counts = torch.full((batch, heads, blocks), blocks, dtype=torch.int32)  # all blocks are partial
        indices = torch.arange(blocks, dtype=torch.int32).expand(batch, heads, blocks, blocks)
        made = BlockMask.from_kv_blocks(
            counts, indices, BLOCK_SIZE=block_size, mask_mod=mask_mod, seq_lengths=(7, 7), compute_q_blocks=False
        )
        assert_mask(from_mask_mod(made, batch_size=2, num_heads=3), expected, 7)
    with pytest.raises(ValueError, match=r"must be those of the `BlockMask`, 2 and 1, or .*got 4 and 3"):
        from_mask_mod(made, batch_size=4, num_heads=3)
    with pytest.raises(ValueError, match=r"computes with its argument `head`.*pass `num_heads`"):
        from_mask_mod(made)
    with pytest.raises(TypeError, match="brings `q_len`, `kv_len` and `device`"):
        from_mask_mod(made, device="cpu")


def test_a_mask_mod_that_looks_at_rows_or_heads_needs_their_number():
    """The mask of row 0 for all rows would let documents of the others meet."""
    documents = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 2]])

    def same(b, h, q, k):
        return documents[b, q] == documents[b, k]

    for mask_mod in (same, and_masks(noop_mask, same), lambda b, h, q, k: documents[b][q] == documents[b][k]):
        with pytest.raises(ValueError, match=r"computes with its argument `batch`.*pass `batch_size`"):
            from_mask_mod(mask_mod, 5, num_heads=1)
        expected = (documents[:, None, :, None] == documents[:, None, None]).numpy()
        assert_mask(from_mask_mod(mask_mod, 5, batch_size=2), expected, 5)
    with pytest.raises(ValueError, match=r"computes with its argument `head`.*pass `num_heads`"):
        from_mask_mod(lambda b, h, q, k: torch.where(h < 1, q >= k, q == k), 5)
    for mask_mod in (and_masks(noop_mask), or_masks(same_key := lambda b, h, q, k: q == k, same_key)):
        from_mask_mod(mask_mod, 5)  # which ask `batch` for its device


def test_a_mask_mod_that_does_not_fit_is_refused_by_its_first_key():
    with pytest.raises(TooManyIntervalsError, match=r"key column 5 \(batch 0, head 0\) needs 50 hidden intervals"):
        from_mask_mod(lambda b, h, q, k: (k < 5) | (q % 2 == 0), 100, 9)


# Tracing


def traceable(position_ids, document_ids, cu_seqlens, padding_mask, offset, left_padding):
    """One call of everything that the forward pass of a model may use."""
    size = position_ids.shape[1]
    cached = {"q_offset": offset, "kv_offset": 0}
    documents = from_position_ids(position_ids)
    return [
        causal(size),
        causal(1, size, **cached),
        bidirectional(size),
        sliding_window(3, 2, size, **cached),
        sliding_window(3, size, is_causal=False),
        chunked(4, size, left_padding=left_padding),
        chunked(4, 1, size, left_padding=left_padding, **cached),
        prefix_lm(left_padding, 1, size, **cached),
        documents,
        from_position_ids(position_ids, q_len=2, kv_len=size + 3, is_causal=False, **cached),
        from_document_ids(document_ids),
        from_cu_seqlens(cu_seqlens, size),
        from_cu_seqlens(cu_seqlens, size, is_causal=False),
        from_padding_mask(padding_mask, q_len=1, is_causal=True, **cached),
        causal_with_blocks(document_ids, window=3),
        intersect(documents, sliding_window(3, size), from_padding_mask(padding_mask, is_causal=True)),
        intersect(documents, from_padding_mask(padding_mask), chunked(4, size)),
        union(documents, from_document_ids(document_ids, is_causal=False)),
        hide_keys(union(causal(size), bidirectional(size)), padding_mask == 0),
        sliding_window((3, 2), size),
        causal_with_blocks(document_ids, window=3, window_limits_blocks=True),
        concatenate_keys(documents, chunked(4, size), q_len=size),
        from_visible_intervals(cu_seqlens[:3, None].expand(1, 1, 3, 1), cu_seqlens[1:, None].expand(1, 1, 3, 1), size),
        select_rows(documents, offset, 2),
        simplify(intersect(documents, bidirectional(size)), planes=1),
        simplify(union(chunked(3, size, is_causal=False), sliding_window(2, size)), planes=6),
        from_prefix_tree(left_padding[None] // 2 - 1, left_padding[None] + 1, kv_len=size),
        limit_depth(documents, position_ids, position_ids + 2, max_branches=1),
    ]


def traceable_inputs(size):
    generator = torch.Generator().manual_seed(size)
    return (
        torch.arange(size).remainder(5).expand(2, -1),
        torch.randint(-1, 2, (2, size), generator=generator),
        torch.tensor([0, 3, 3, size - 1], dtype=torch.int32),
        torch.randint(0, 2, (2, size), generator=generator),
        torch.tensor(4),
        torch.tensor([0, 2]),
    )


def test_constructors_trace_in_one_graph_for_every_length():
    counter = CompileCounter()
    compiled = torch.compile(traceable, fullgraph=True, backend=counter, dynamic=True)
    for size in (11, 17, 24):
        inputs = traceable_inputs(size)
        for got, expected in zip(compiled(*inputs), traceable(*inputs)):
            assert got.shape == expected.shape
            assert torch.equal(got, expected)
    assert counter.frame_count == 1


def test_constructors_read_nothing_back_to_the_host():
    """Fake tensors have no values, so any read fails; the shapes must come out all the same."""
    inputs = traceable_inputs(11)
    expected = traceable(*inputs)
    with FakeTensorMode() as mode:
        results = traceable(*(mode.from_tensor(value) for value in inputs))
    assert [tuple(result.shape) for result in results] == [tuple(result.shape) for result in expected]
    assert {result.dtype for result in results} == {torch.int32}


# Documentation


@pytest.mark.parametrize(
    "module", ["", ".algebra", ".constructors", ".dense", ".documents", ".form", ".intervals", ".trees", ".views"]
)
def test_examples_in_docstrings(module):
    results = doctest.testmod(importlib.import_module(f"hf_flashmask.bounds{module}"))
    assert results.failed == 0
    assert results.attempted or module == ".form"


def test_every_public_function_says_what_it_returns():
    for name in bounds_module.__all__:
        function = getattr(bounds_module, name)
        if inspect.isfunction(function) and name != "check_bounds":
            assert "Returns:" in function.__doc__, name


# Errors


ids = torch.zeros(2, 5, dtype=torch.int64)
nine_intervals = torch.zeros(1, 1, 18, 4, dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: causal(-1), ValueError, "must not be negative, got -1"),
        (lambda: sliding_window(0, 5), ValueError, "`window` must be at least 1 in a causal mask, got 0"),
        (lambda: sliding_window(-1, 5, is_causal=False), ValueError, "at least 0"),
        (lambda: chunked(0, 5), ValueError, "`chunk_size` must be at least 1, got 0"),
        (lambda: chunked(2, 5, left_padding=torch.zeros(2, 1).int()), ValueError, r"`left_padding` must be \[B\]"),
        (lambda: chunked(2.5, 5), TypeError, "`chunk_size` must be an integer, got float"),
        (lambda: chunked(2, 5, left_padding=[1]), TypeError, "`left_padding` must be an integer tensor.*list"),
        (lambda: chunked(2, 5, left_padding=torch.zeros(2, 4).int()), ValueError, r"\[B, 5\], got shape \[2, 4\]"),
        (lambda: prefix_lm(torch.tensor([1.0]), 5), TypeError, "`prefix_lengths` must be an integer tensor"),
        (lambda: prefix_lm(1.5, 5), TypeError, "`prefix_lengths` must be an integer, got float"),
        (lambda: prefix_lm(-1, 5), ValueError, "`prefix_lengths` must be at least 0, got -1"),
        (lambda: global_and_sliding_window(0.5, 2, 5), TypeError, "`num_global` must be an integer, got float"),
        (lambda: causal(5, q_offset=0.5), TypeError, "`q_offset` must be an integer, got float"),
        (lambda: causal(5, q_offset=torch.tensor(0.5)), TypeError, "`q_offset` must be an integer tensor"),
        (lambda: sliding_window(2, 5, q_offset=ids[0]), ValueError, r"`q_offset` must be one number .*got shape \[5\]"),
        (lambda: from_document_ids(ids, kv_offset=ids[0, :2]), ValueError, "`kv_offset` must be one number"),
        (
            lambda: causal_with_blocks(ids, window=0),
            ValueError,
            "`window` must be at least 1 in a causal mask, got 0",
        ),
        (lambda: from_position_ids(ids.bool()), TypeError, "`position_ids` must be an integer or float tensor.*bool"),
        (lambda: from_position_ids(ids.cfloat()), TypeError, "`position_ids` must be an integer or float.*complex64"),
        (lambda: from_position_ids(ids[None]), ValueError, r"`position_ids` must be \[B, S\] or \[S\].*\[1, 2, 5\]"),
        (lambda: from_document_ids([0, 1]), TypeError, "`document_ids` must be an integer tensor.*list"),
        (lambda: from_padding_mask(ids.tolist()), TypeError, "`padding_mask` must be an integer or float tensor"),
        (lambda: from_cu_seqlens(ids, 5), ValueError, r"`cu_seqlens_q` must be \[n \+ 1\], got shape \[2, 5\]"),
        (lambda: from_cu_seqlens(ids[0, :0], 5), ValueError, "at least the leading 0"),
        (lambda: from_cu_seqlens(ids[0], 5, cu_seqlens_k=ids[0, 1:]), ValueError, "same number of documents"),
        (lambda: from_prefix_tree([-1, 0], [1]), ValueError, "as many nodes, got 2 and 1"),
        (lambda: from_prefix_tree([[-1], [-1]], [[1]]), ValueError, "as many rows, got 2 and 1"),
        (lambda: from_prefix_tree([-1, 0, 0, 1], [1, 1, 1, 1]), ValueError, "node 3 has parent 1"),
        (lambda: from_prefix_tree([1, -1], [1, 1]), ValueError, "node 0 has parent 1"),
        (lambda: from_prefix_tree([-1], [-2]), ValueError, "node 0 has -2"),
        (lambda: from_prefix_tree([-1, 0], [2, 1.5]), TypeError, r"`lengths` must hold integers.*\[2, 1.5\]"),
        (lambda: from_prefix_tree(ids[:1] - 1.0, ids[:1]), TypeError, "`parents` must hold integers"),
        (lambda: from_block_mask(torch.ones(1, 1) > 0, [2.5]), TypeError, "`lengths` must hold integers"),
        (lambda: from_prefix_tree([-1], [5], kv_len=4), ValueError, "`kv_len` is 4, but the longest row has 5 tokens"),
        (lambda: from_dense(torch.zeros(3, 3)), TypeError, "bool tensor with True = visible.*pass `mask == 0`"),
        (lambda: from_dense(torch.zeros(1, 3, 3).bool()), ValueError, r"got shape \[1, 3, 3\]"),
        (lambda: from_tiles([]), ValueError, "`tiles` holds no tile"),
        (
            lambda: from_tiles([torch.ones(1, 1, 3, 2).int()]),
            ValueError,
            "`tiles` must be bool tensors .*got torch.int32",
        ),
        (
            lambda: from_tiles([torch.ones(1, 1, q, 2) > 0 for q in (3, 4)]),
            ValueError,
            r"got torch.bool \[1, 1, 4, 2\]",
        ),
        (lambda: from_visible_intervals(ids[None, None], ids[None, None, :1, :2], 5), ValueError, "the same shape"),
        (lambda: intersect(), ValueError, "at least one mask"),
        (lambda: intersect(causal(3), causal(4)), ValueError, r"one key length, got \[3, 4\]"),
        (lambda: intersect(nine_intervals, nine_intervals), ValueError, "needs 18 hidden intervals.*simplify"),
        (lambda: union(nine_intervals, nine_intervals), ValueError, "needs 17 hidden intervals.*simplify"),
        (lambda: hide_keys(causal(3), torch.zeros(1, 4).bool()), ValueError, r"must be bool \[B or 1, 3\]"),
        (lambda: to_startend_row_indices(nine_intervals), ValueError, "these bounds have 9"),
        (lambda: from_startend_row_indices(ids[None, None].int(), True), ValueError, "1 .LTS. or 2 .LTS, LTE."),
        (lambda: from_startend_row_indices(ids.int(), True), ValueError, r"must be \[B, H_m, S_k, C\]"),
        (
            lambda: from_startend_row_indices(torch.zeros(1, 3, 5, 1).int(), True, num_heads=4),
            ValueError,
            "`num_heads` .4. must be a multiple of the 3 heads",
        ),
        (lambda: tile_occupancy(causal(3), tile_size=0), ValueError, "`tile_size` must be at least 1, got 0"),
        (
            lambda: check_bounds(causal(3).long()),
            TypeError,
            r"`bounds` must be an int32 tensor.*int64; .*to\(torch.int32",
        ),
        (lambda: intersect(causal(3), torch.ones(1, 1, 3, 3) > 0), TypeError, "int32 tensor.*bool; bounds.from_dense"),
        (lambda: check_bounds(torch.zeros(1, 1, 3, 3)), TypeError, "int32 tensor.*float32; bounds.from_dense"),
        (lambda: check_bounds("flash"), TypeError, "int32 tensor.*got str"),
        (lambda: check_bounds(causal(3)[0]), ValueError, r"must have shape .*got \[1, 1, 3\]"),
        (lambda: check_bounds(torch.zeros(1, 1, 3, 4).int()), ValueError, r"even number up to 32, got \[1, 1, 3, 4\]"),
        (lambda: check_bounds(torch.zeros(1, 1, 34, 4).int()), ValueError, "even number up to 32"),
        (lambda: check_bounds(from_position_ids(ids), batch=3), ValueError, "dimension 0 must be 1 or the batch, 3"),
        (lambda: check_bounds(nine_intervals.expand(1, 2, -1, -1), heads=4), ValueError, "number of query heads, 4"),
        (lambda: check_bounds(causal(3), kv_len=4, name="attention_mask"), ValueError, "`attention_mask`.*length, 4"),
        (lambda: check_bounds(causal(3), device=torch.device("meta")), ValueError, "on cpu.*queries are on meta"),
    ],
)
def test_errors_name_the_argument_and_what_came(call, error, message):
    with pytest.raises(error, match=message):
        call()


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(0, 6)), min_size=1, max_size=7), st.integers(1, 6))
@settings(deadline=None, max_examples=150)
@pytest.mark.parametrize("chunked_by", [False, True])
@pytest.mark.parametrize("is_known", [False, True])
def test_windows_and_chunks_along_the_branches_of_a_tree(is_known, chunked_by, nodes, size):
    # Each node hangs on a node of the path to the node before it, or is a root.
    parents, path = [], []
    for number, (choice, _) in enumerate(nodes):
        path = path[: choice % (len(path) + 1)]
        parents.append(path[-1] if path else -1)
        path.append(number)
    lengths = [length for _, length in nodes]
    end = {-1: 0}
    for number, (parent, length) in enumerate(zip(parents, lengths)):
        end[number] = end[parent] + length
    positions = [range(end[parent], end[node]) for node, parent in enumerate(parents)]
    depth = torch.tensor([[place for node in positions for place in node]], dtype=torch.long)
    depth = torch.nn.functional.pad(depth, (0, 2))
    tree = from_prefix_tree(parents, lengths, kv_len=depth.shape[1])
    if chunked_by:
        end_depth, together = (depth // size + 1) * size, depth[0, :, None] // size == depth[0] // size
    else:
        end_depth, together = depth + size, depth[0, :, None] - depth[0] < size
    limited = limit_depth(tree, depth, end_depth, max_branches=len(nodes) if is_known else None)
    assert torch.equal(to_dense(limited), to_dense(tree) & together)


@pytest.mark.parametrize("of_padding", [0, -1, -7])
def test_padding_of_a_tree_may_hold_any_number_that_hides_it(of_padding):
    tree = torch.nn.functional.pad(from_prefix_tree([-1, 0, 0], [3, 2, 3]), (1, 2), value=of_padding)
    tree[..., 1:-2] += 1
    depth = torch.tensor([[0, 0, 1, 2, 3, 4, 3, 4, 5, 0, 0]])
    expected = to_dense(tree) & (depth[0, :, None] - depth[0] < 2)
    assert torch.equal(to_dense(limit_depth(tree, depth, depth + 2)), expected)


def test_limit_depth_refuses_what_it_cannot_hold():
    tree = from_prefix_tree([-1, *[0] * 16], [1] * 17)
    depth = torch.tensor([[0, *[1] * 16]])
    with pytest.raises(ValueError, match=r"limit_depth.*needs 17 hidden intervals"):
        limit_depth(tree, depth, depth + 1)
    with pytest.raises(ValueError, match=r"`bounds` must be those of a prefix tree, .*got \[1, 1, 2, 17\]"):
        limit_depth(bidirectional(17), depth, depth + 1)
    with pytest.raises(ValueError, match="`max_branches` is less than the number of leaves"):
        limit_depth(tree[..., :5].clamp(max=5), depth[:, :5], depth[:, :5] + 1, max_branches=3)


def test_from_dense_names_the_first_column_that_needs_too_many_intervals():
    mask = torch.ones(2, 1, 70, 5, dtype=torch.bool)
    mask[1, 0, ::2, 3] = False
    mask[1, 0, ::4, 4] = False
    with pytest.raises(ValueError, match=r"key column 3 \(batch 1, head 0\) needs 35 hidden intervals.*at most 16"):
        from_dense(mask)


@given(
    st.lists(st.lists(st.tuples(st.integers(-1, 3), st.booleans()), min_size=7, max_size=7), min_size=1, max_size=3),
    st.sampled_from([torch.int64, torch.int32, torch.int16, torch.int8, torch.float32]),
)
def test_document_ends_beside_padding(rows, dtype):
    """A document starts at a token where it does among the tokens alone, never at padding."""
    position_ids = torch.tensor([[position for position, _ in row] for row in rows], dtype=dtype)
    is_token = torch.tensor([[token for _, token in row] for row in rows])
    ends = document_ends(position_ids, is_token)
    starts = document_starts(ends)
    assert ends.dtype == starts.dtype == torch.int32
    for row, row_ends, row_starts in zip(rows, ends.tolist(), starts.tolist(), strict=True):
        tokens = [index for index, (_, token) in enumerate(row) if token]
        documents = documents_of([row[index][0] for index in tokens])
        borders = [tokens[index] for index in range(1, len(tokens)) if documents[index] > documents[index - 1]]
        for index in range(tokens[0] if tokens else 7, 7):
            assert row_ends[index] == min((border for border in borders if border > index), default=7)
            assert row_starts[index] == max((border for border in borders if border <= index), default=tokens[0])
    made = hide_keys(from_document_ends(ends, is_causal=False), ~is_token)
    same = (ends[:, :, None] == ends[:, None, :]) & is_token[:, None, :]
    assert_mask(made, same[:, None].numpy(), 7)
    assert_mask(hide_keys(from_document_ends(ends), ~is_token), same.tril()[:, None].numpy(), 7)


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=7, max_size=7), min_size=1, max_size=3),
    st.lists(st.integers(0, 3), min_size=7, max_size=7),
    st.sampled_from([torch.int64, torch.int32, torch.uint8, torch.float32]),
)
def test_document_ends_of_a_mask_of_ids(rows, positions, dtype):
    """A document starts at a token whose id is not that of the token before it, and where the positions say so."""
    mask = torch.tensor(rows, dtype=dtype)
    padded = torch.nn.functional.pad(mask, (1, 2), value=1)[:, 1:-2]  # not contiguous
    position_ids = torch.tensor([positions])
    ends = document_ends_of_mask(padded)
    both = document_ends(position_ids, mask != 0, mask)
    of_positions = document_ends(position_ids, mask != 0)
    assert ends.dtype == both.dtype == torch.int32
    for row, row_ends, row_both, row_positions in zip(rows, ends.tolist(), both.tolist(), of_positions.tolist()):
        tokens = [index for index in range(7) if row[index]]
        borders = [now for before, now in itertools.pairwise(tokens) if row[now] != row[before]]
        assert row_ends == [min((border for border in borders if border > index), default=7) for index in range(7)]
        first = tokens[0] if tokens else 7
        assert row_both[first:] == [min(pair) for pair in zip(row_ends[first:], row_positions[first:])]
