"""The paper's mask types, as benchmarks/masks.py makes them, and the official generators of `startend_row_indices`.

The truth is a statement about each pair of positions, a column of the paper's figure, or the tensor that FlashMask's
own generators make, written down here again from their description.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from host_operations import HostOperations
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import pyplot
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

from flashmask_kernels import flashmask_attention
from hf_flashmask.bounds import (
    MAX_INTERVALS,
    TooManyIntervalsError,
    bidirectional,
    causal,
    causal_with_blocks,
    check_bounds,
    from_block_mask,
    from_cu_seqlens,
    from_position_ids,
    from_prefix_tree,
    from_startend_row_indices,
    global_and_sliding_window,
    hash_sparse,
    intersect,
    prefix_lm,
    simplify,
    sliding_window,
    to_dense,
    to_startend_row_indices,
)

ROOT = Path(__file__).parents[1]


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


masks = load("benchmarks/masks.py")

few = settings(max_examples=60, deadline=None)


def dense(visible: Callable[[int, int], bool], q_len: int, kv_len: int | None = None) -> np.ndarray:
    """Dense mask from a statement about query and key."""
    keys = range(q_len if kv_len is None else kv_len)
    rows = [[bool(visible(q, k)) for k in keys] for q in range(q_len)]
    return np.array(rows, dtype=bool).reshape(q_len, len(keys))


def assert_mask(bounds: torch.Tensor, expected: np.ndarray, q_len: int | None = None) -> None:
    check_bounds(bounds)
    assert bounds.is_contiguous()
    shape = (1,) * (4 - expected.ndim) + expected.shape
    np.testing.assert_array_equal(to_dense(bounds, q_len).numpy(), expected.reshape(shape))


# Constructors


@few
@given(st.data(), st.integers(0, 12), st.integers(0, 15), st.integers(0, 6), st.integers(0, 5), st.booleans())
def test_global_and_sliding_window(data, q_len, kv_len, num_global, window, is_causal):
    window += is_causal
    q_start, k_start, offsets = kv_len - q_len, 0, {}
    if data.draw(st.booleans()):
        q_start, k_start = data.draw(st.integers(0, 9)), data.draw(st.integers(0, 4))
        wrap = data.draw(st.sampled_from([int, torch.tensor, lambda x: torch.tensor(x, dtype=torch.int32)]))
        offsets = {"q_offset": wrap(q_start), "kv_offset": wrap(k_start)}

    def visible(row, column):
        q, k = row + q_start, column + k_start
        if is_causal:
            return k <= q and (q - k < window or k < num_global)
        return abs(q - k) <= window or k < num_global or q < num_global

    result = global_and_sliding_window(num_global, window, q_len, kv_len, is_causal=is_causal, **offsets)
    assert_mask(result, dense(visible, q_len, kv_len), q_len)
    if not is_causal or not offsets:
        assert result.shape[2] == (1 if is_causal else 4)


def test_global_tokens_and_window_may_be_more_than_32_bits():
    assert_mask(global_and_sliding_window(2, 2**40, 6), dense(lambda q, k: k <= q, 6))
    assert_mask(global_and_sliding_window(2, 2**40, 6, is_causal=False), np.ones((6, 6), dtype=bool))
    assert_mask(global_and_sliding_window(2**31, 2, 6), dense(lambda q, k: k <= q, 6))
    assert_mask(global_and_sliding_window(2**31, 2, 6, is_causal=False), np.ones((6, 6), dtype=bool))


@st.composite
def hashes(draw, length: int, heads: int):
    values = st.sampled_from([-(2**40), -1, 0, 1, 2, 2**62]) if draw(st.booleans()) else st.integers(-1, 3)
    rows = draw(st.lists(st.lists(values, min_size=length, max_size=length), min_size=heads, max_size=heads))
    tensor = torch.tensor(rows, dtype=torch.int64).reshape(1, heads, length)
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


@few
@given(st.data(), st.integers(0, 9), st.integers(0, 9), st.booleans())
def test_hash_sparse(data, q_len, kv_len, is_causal):
    """Rows and columns are sorted by hash; what sees what goes by hash and by the position before sorting."""
    query_hashes, key_hashes = (
        data.draw(hashes(q_len, 2)),
        data.draw(hashes(kv_len, data.draw(st.sampled_from([1, 2])))),
    )
    expected = []
    for head in range(2):
        of_query, of_key = query_hashes[0, head].tolist(), key_hashes[0, head % key_hashes.shape[1]].tolist()
        rows = sorted(range(q_len), key=lambda i: (of_query[i], i))
        columns = sorted(range(kv_len), key=lambda j: (of_key[j], j))

        def visible(row, column, of_query=of_query, of_key=of_key, rows=rows, columns=columns):
            q, k = rows[row], columns[column]
            same = of_query[q] == of_key[k] >= 0
            return same and (not is_causal or k <= q + kv_len - q_len)

        expected.append(dense(visible, q_len, kv_len))
    assert_mask(hash_sparse(query_hashes, key_hashes, is_causal=is_causal), np.stack(expected), q_len)


def test_attention_among_sorted_tokens_is_attention_within_buckets():
    torch.manual_seed(0)
    heads, length, size = 3, 61, 16
    query, key, value = torch.randn(3, 1, heads, length, size).unbind()
    query_hashes, key_hashes = torch.randint(-1, 4, (2, 1, heads, length)).unbind()
    query_order, key_order = (
        h.argsort(dim=-1, stable=True)[..., None].expand(query.shape) for h in (query_hashes, key_hashes)
    )
    bounds = hash_sparse(query_hashes, key_hashes)
    out = flashmask_attention(
        query.gather(2, query_order), key.gather(2, key_order), value.gather(2, key_order), bounds
    )
    out = torch.empty_like(out).scatter_(2, query_order, out)

    same = (query_hashes[..., :, None] == key_hashes[..., None, :]) & (query_hashes[..., None] >= 0)
    scores = (query @ key.mT / size**0.5).masked_fill(~same.tril(), float("-inf"))
    expected = scores.softmax(-1).nan_to_num(0.0) @ value
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@few
@given(st.data(), st.integers(0, 4), st.integers(1, 2), st.integers(1, 2), st.booleans())
def test_from_block_mask(data, blocks, batch, heads, is_causal):
    rows = data.draw(st.sampled_from([1, batch]))
    lengths = data.draw(
        st.lists(st.lists(st.integers(0, 4), min_size=blocks, max_size=blocks), min_size=rows, max_size=rows)
    )
    seed, padding = data.draw(st.integers(0, 2**32 - 1)), data.draw(st.integers(0, 2))
    batch_of_mask = data.draw(st.sampled_from([1, batch])) if rows == batch else batch
    mask = np.random.default_rng(seed).random((batch_of_mask, heads, blocks, blocks)) < 0.5
    kv_len = max(sum(row) for row in lengths) + padding
    expected = np.zeros((batch, heads, kv_len, kv_len), dtype=bool)
    for b, h in np.ndindex(batch, heads):
        block = [index for index, length in enumerate(lengths[b % rows]) for _ in range(length)]
        seen = mask[b % mask.shape[0], h]

        def visible(q, k, block=block, seen=seen):
            return max(q, k) < len(block) and seen[block[q], block[k]] and (k <= q or not is_causal)

        expected[b, h] = dense(visible, kv_len)
    result = from_block_mask(torch.from_numpy(mask), lengths, is_causal=is_causal, kv_len=kv_len)
    assert_mask(result, expected)
    assert torch.equal(simplify(result), result)


def test_a_block_mask_of_two_dimensions_and_one_list_of_lengths():
    mask = torch.tensor([[True, False], [True, True]])
    expected = dense(lambda q, k: q >= 3 or k < 3, 5)
    assert_mask(from_block_mask(mask, [3, 2], is_causal=False), expected)
    assert_mask(from_block_mask(mask, torch.tensor([3, 2]), is_causal=False), expected)


@pytest.mark.parametrize("is_causal", [False, True])
def test_masks_of_blocks_and_trees_are_made_on_their_device(is_causal):
    """Blocks and nodes are few and read on the host; the columns of keys are many, and made where they are wanted."""
    with HostOperations() as host:
        of_blocks = from_block_mask(
            torch.tensor([[True, False, True], [True, False, True], [False, True, True]]),
            [300, 200, 100],
            is_causal=is_causal,
            device="meta",
        )
        of_tree = from_prefix_tree([-1, 0, 0], [300, 200, 100], device="meta")
    assert of_blocks.device.type == of_tree.device.type == "meta"
    assert of_blocks.shape[3] == of_tree.shape[3] == 600
    assert 0 < host.largest < 100


@contextlib.contextmanager
def no_waiting_for_the_gpu() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("is_causal", [False, True])
def test_masks_of_blocks_and_trees_on_a_gpu(is_causal):
    mask, lengths = (
        torch.tensor([[True, False, True], [True, True, False], [True, True, True]]),
        [[70, 0, 131], [60, 71, 70]],
    )
    with no_waiting_for_the_gpu():
        of_blocks = from_block_mask(mask, lengths, is_causal=is_causal, device="cuda")
        of_trees = from_prefix_tree([[-1, 0, 0]] * 2, lengths, device="cuda")
    assert of_blocks.device.type == of_trees.device.type == "cuda"
    block = torch.stack([torch.arange(3).repeat_interleave(torch.tensor(row)) for row in lengths])
    visible = mask[block[:, :, None], block[:, None, :]]
    assert_mask(of_blocks.cpu(), (visible.tril() if is_causal else visible)[:, None])
    same_or_root = (block[:, :, None] == block[:, None, :]) | (block[:, None, :] == 0)
    assert_mask(of_trees.cpu(), same_or_root.tril()[:, None])


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_block_mask_holds_sixteen_intervals_and_refuses_more(is_causal):
    """Every other block hides the first one, so its keys have one interval for each of them."""
    for hidden in (MAX_INTERVALS - 1, MAX_INTERVALS, MAX_INTERVALS + 3):
        mask = torch.ones(2 * hidden + 1, 2 * hidden + 1, dtype=torch.bool)
        mask[1::2, 0] = False
        lengths = [2] * len(mask)
        if hidden + is_causal <= MAX_INTERVALS:
            visible = dense(lambda q, k: (k > 1 or q // 2 % 2 == 0) and (k <= q or not is_causal), sum(lengths))
            assert_mask(from_block_mask(mask, lengths, is_causal=is_causal), visible)
        else:
            with pytest.raises(
                TooManyIntervalsError, match=rf"`mask` needs {hidden + is_causal} hidden intervals.*at most 16"
            ):
                from_block_mask(mask, lengths, is_causal=is_causal)


def traceable(position_ids, block_ids, hashes, offset):
    size = position_ids.shape[1]
    documents = from_position_ids(position_ids, is_causal=False)
    return [
        global_and_sliding_window(2, 3, size),
        global_and_sliding_window(2, 3, size, is_causal=False),
        global_and_sliding_window(2, 3, 1, size, q_offset=offset, kv_offset=0),
        global_and_sliding_window(2, 3, 2, size, is_causal=False, q_offset=offset, kv_offset=0),
        hash_sparse(hashes, hashes),
        hash_sparse(hashes[:, :, :2], hashes, is_causal=False),
        intersect(documents, causal_with_blocks(block_ids)),
        intersect(documents, causal_with_blocks(position_ids // 3)),
    ]


def traceable_inputs(size):
    generator = torch.Generator().manual_seed(size)
    return (
        torch.arange(size).remainder(5).expand(2, -1),
        torch.randint(-1, 2, (2, size), generator=generator),
        torch.randint(-1, 4, (2, 3, size), generator=generator),
        torch.tensor(4),
    )


def test_constructors_trace_in_one_graph_and_read_nothing_back_to_the_host():
    counter = CompileCounter()
    compiled = torch.compile(traceable, fullgraph=True, backend=counter, dynamic=True)
    for size in (11, 17, 24):
        inputs = traceable_inputs(size)
        for got, expected in zip(compiled(*inputs), traceable(*inputs)):
            assert got.shape == expected.shape
            assert torch.equal(got, expected)
    assert counter.frame_count == 1
    with FakeTensorMode() as mode:
        results = traceable(*(mode.from_tensor(value) for value in inputs))
    assert [result.shape for result in results] == [expected.shape for expected in traceable(*inputs)]


some_hashes = torch.zeros(1, 2, 5, dtype=torch.int64)
two_blocks = torch.ones(2, 2, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: global_and_sliding_window(2, 0, 5),
            ValueError,
            "`window` must be at least 1 in a causal mask, got 0",
        ),
        (lambda: global_and_sliding_window(2, -1, 5, is_causal=False), ValueError, "`window` must be at least 0"),
        (lambda: global_and_sliding_window(-1, 2, 5), ValueError, "`num_global` must be at least 0, got -1"),
        (lambda: global_and_sliding_window(1, 2, -5), ValueError, "must not be negative, got -5"),
        (
            lambda: hash_sparse(some_hashes.float(), some_hashes),
            TypeError,
            "`query_hashes` must be an integer.*float32",
        ),
        (lambda: hash_sparse(some_hashes, some_hashes[0]), ValueError, r"`key_hashes` must be .*got shape \[2, 5\]"),
        (
            lambda: from_block_mask(two_blocks.int(), [1, 2]),
            TypeError,
            "bool tensor with True = visible, got torch.int32",
        ),
        (lambda: from_block_mask([[True]], [1]), TypeError, "got list"),
        (lambda: from_block_mask(two_blocks[:1], [1, 2]), ValueError, r"must be \[n, n\].*got shape \[1, 2\]"),
        (lambda: from_block_mask(two_blocks[None], [1, 2]), ValueError, r"got shape \[1, 2, 2\]"),
        (lambda: from_block_mask(two_blocks, [1, 2, 3]), ValueError, r"each of 2 blocks, got \[1, 2, 3\]"),
        (lambda: from_block_mask(two_blocks, [1, -2]), ValueError, r"of 0 or more .*got \[1, -2\]"),
        (lambda: from_block_mask(two_blocks, [3, 2], kv_len=4), ValueError, "`kv_len` is 4, but the longest row has 5"),
        (
            lambda: from_block_mask(two_blocks.expand(3, 1, 2, 2), [[1, 2], [2, 1]]),
            ValueError,
            "`mask` has a batch of 3, but `lengths` has 2 rows",
        ),
    ],
)
def test_errors_name_the_argument_and_what_came(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_hashes_must_agree_in_batch_and_heads():
    with pytest.raises(ValueError, match=r"agree in batch and heads.*\[1, 2, 5\] and \[1, 3, 5\]"):
        hash_sparse(some_hashes, some_hashes[:, :1].expand(1, 3, 5))


# The table of benchmarks/masks.py


@pytest.mark.parametrize(("length", "documents", "seed"), [(301, 4, 0), (149, 1, 1), (263, 9, 2)])
def test_each_mask_of_the_table_pair_by_pair(length, documents, seed):
    row = masks.random_row(length, documents, seed)
    start = [end - n for end, n in zip(accumulate(row.lengths), row.lengths)]
    document = [index for index, n in enumerate(row.lengths) for _ in range(n)]
    last = len(row.lengths) - 1
    window, global_tokens, block = length // 16, 16, 128
    parents, parts = masks.questions_and_answers(row.lengths, seed)
    part = [index for index, n in enumerate(parts) for _ in range(n)]

    def position(token):
        return token - start[document[token]]

    def in_prefix(token):
        return position(token) < row.prefix_lengths[document[token]]

    def same_document(q, k):
        return document[q] == document[k]

    definitions = {
        "full": lambda q, k: True,
        "causal": lambda q, k: k <= q,
        "sliding_window": lambda q, k: 0 <= q - k < window,
        "causal_document": lambda q, k: k <= q and same_document(q, k),
        "document": same_document,
        "share_question": lambda q, k: (
            k <= q and same_document(q, k) and (part[q] == part[k] or parents[part[k]] == -1)
        ),
        "global_sliding_window": lambda q, k: abs(q - k) <= window or min(q, k) < global_tokens,
        "causal_blockwise": lambda q, k: k <= q and (same_document(q, k) or document[q] == last),
        "prefix_lm_document": lambda q, k: same_document(q, k) and (k <= q or in_prefix(k)),
        "prefix_lm_causal": lambda q, k: k <= q or k < length // 2,
        "qk_sparse": lambda q, k: k <= q and not (same_document(q, k) and row.qk_sparse[document[k]]),
        "block_causal_document": lambda q, k: same_document(q, k) and position(k) // block <= position(q) // block,
    }
    table = masks.paper_masks(row, heads=2, seed=seed)
    for name, visible in definitions.items():
        assert_mask(table[name], dense(visible, length))
    assert set(table) - set(definitions) == {"hash_sparse", "random_eviction", "random_intervals"}
    for bounds in table.values():
        check_bounds(bounds, batch=1, heads=2, kv_len=length)


def test_hash_sparse_of_the_table_is_one_causal_bucket_after_the_other():
    visible = to_dense(masks.paper_masks(masks.random_row(203, 3), heads=3)["hash_sparse"]).numpy()
    assert visible.shape == (1, 3, 203, 203)
    for head in visible[0]:
        first = head.argmax(1)
        np.testing.assert_array_equal(head, dense(lambda q, k, first=first: first[q] <= k <= q, 203))
        assert 8 < len(set(first)) <= 16


@pytest.mark.parametrize(("cache_size", "length"), [(50, 101), (1, 17), (30, 30)])
def test_random_eviction_keeps_the_cache_full_and_never_brings_a_key_back(cache_size, length):
    bounds = masks.random_eviction(cache_size, length, 4, torch.Generator().manual_seed(3))
    visible = to_dense(bounds).numpy()
    assert visible.shape == (1, 4, length, length)
    np.testing.assert_array_equal(
        visible.sum(-1), np.minimum(np.arange(length) + 1, cache_size)[None, None].repeat(4, 1)
    )
    assert visible.diagonal(axis1=2, axis2=3).all()
    assert not visible[..., np.triu_indices(length, 1)[0], np.triu_indices(length, 1)[1]].any()
    came_back = visible[:, :, 1:] & ~visible[:, :, :-1] & ~np.eye(length, dtype=bool)[1:]
    assert not came_back.any()
    if cache_size > 1 and length > cache_size:
        assert len({head.tobytes() for head in visible[0]}) == 4


def test_random_intervals_are_any_intervals():
    bounds = masks.random_intervals(5, 97, 2, torch.Generator().manual_seed(0))
    check_bounds(bounds, heads=2, kv_len=97)
    assert bounds.shape == (1, 2, 10, 97)
    start, end = bounds[:, :, 0::2], bounds[:, :, 1::2]
    assert (start >= end).any()
    assert (start < end).any()
    assert (bounds.min(), bounds.max()) == (0, 97)


def test_questions_and_answers_split_each_document():
    lengths = [40, 3, 1, 77]
    parents, parts = masks.questions_and_answers(lengths, seed=5)
    roots = [index for index, parent in enumerate(parents) if parent == -1]
    for length, first, end in zip(lengths, roots, [*roots[1:], len(parents)]):
        assert sum(parts[first:end]) == length
        assert min(parts[first:end]) >= 1
        assert parents[first + 1 : end] == [first] * (end - first - 1)
        assert end - first == 1 or 2 <= end - first - 1 <= 6
    assert (parents, parts) == masks.questions_and_answers(lengths, seed=5)


def test_rows_from_a_file(tmp_path):
    file = tmp_path / "rows.json"
    sample = {"documents": [[2, 5], [0, 4]], "qk_sparse": [0, 1]}
    file.write_text(json.dumps({"9": [sample, sample]}))
    row = masks.PackedRow([5, 4], [2, 0], [False, True])
    assert masks.read_rows(file) == {9: [row, row]}
    assert row.length == 9
    file.write_text(json.dumps({"10": [sample]}))
    with pytest.raises(ValueError, match="a row of 10 tokens has 9 in 2 documents"):
        masks.read_rows(file)


# The paper's figure: ten keys


def documents_of(lengths: list[int], is_causal: bool = True) -> torch.Tensor:
    return from_cu_seqlens(torch.tensor([0, *accumulate(lengths)]), sum(lengths), is_causal=is_causal)


def blockwise(lengths: list[int]) -> torch.Tensor:
    mask = torch.eye(len(lengths), dtype=torch.bool)
    mask[-1] = True
    return from_block_mask(mask, lengths)


def prefix_lm_documents(prefixes: list[int], lengths: list[int]) -> torch.Tensor:
    ids = [i if p < prefix else -1 for i, (prefix, n) in enumerate(zip(prefixes, lengths)) for p in range(n)]
    return intersect(documents_of(lengths, is_causal=False), causal_with_blocks(torch.tensor(ids)))


def without_own_block(lengths: list[int], hidden: list[int]) -> torch.Tensor:
    return from_block_mask(~torch.diag(torch.tensor([index in hidden for index in range(len(lengths))])), lengths)


FIGURE = {
    "causal": (lambda: causal(10), True, [[10] * 10]),
    "sliding window": (lambda: sliding_window(3, 10), True, [[3, 4, 5, 6, 7, 8, 9, 10, 10, 10]]),
    "causal document": (lambda: documents_of([4, 3, 3]), True, [[4] * 4 + [7] * 3 + [10] * 3]),
    "document": (
        lambda: documents_of([4, 3, 3], is_causal=False),
        False,
        [[4] * 4 + [7] * 3 + [10] * 3, [0] * 4 + [4] * 3 + [7] * 3],
    ),
    "share question": (lambda: from_prefix_tree([-1, 0, 0], [4, 3, 3]), True, [[10] * 4 + [7] * 3 + [10] * 3]),
    "global + sliding window": (
        lambda: global_and_sliding_window(2, 1, 10, is_causal=False),
        False,
        [[10, 10, 4, 5, 6, 7, 8, 9, 10, 10], [10] * 10, [0] * 4 + [2] * 6, [0, 0, 0, 0, 3, 4, 5, 6, 7, 8]],
    ),
    "causal blockwise": (lambda: blockwise([4, 3, 3]), True, [[4] * 4 + [10] * 6, [7] * 4 + [10] * 6]),
    "prefix-LM document": (
        lambda: prefix_lm_documents([2, 2, 2], [3, 2, 5]),
        False,
        [[3, 3, 3, 5, 5, 10, 10, 10, 10, 10], [0, 0, 2, 3, 3, 5, 5, 7, 8, 9]],
    ),
    "prefix-LM causal": (lambda: prefix_lm(5, 10), False, [[10] * 10, [0] * 5 + [5, 6, 7, 8, 9]]),
    "QK-sparse": (
        lambda: without_own_block([2, 3, 1, 2, 2], [1, 3]),
        True,
        [[10, 10, 2, 3, 4, 5, 6, 7, 10, 10], [10, 10, 5, 5, 5, 5, 8, 8, 10, 10]],
    ),
    "random eviction": (
        lambda: torch.tensor([10, 4, 8, 6, 10, 7, 10, 9, 10, 10], dtype=torch.int32)[None, None, None],
        True,
        [[10, 4, 8, 6, 10, 7, 10, 9, 10, 10]],
    ),
}


@pytest.mark.parametrize("name", FIGURE)
def test_columns_of_the_papers_figure(name):
    ours, is_causal, columns = FIGURE[name]
    indices = torch.tensor(columns, dtype=torch.int32).T[None, None]
    assert torch.equal(simplify(from_startend_row_indices(indices, is_causal)), simplify(ours()))


# The official generators


def scaled(values: list[int], length: int) -> list[int]:
    """The generators are written for 8192 keys."""
    return [int(value * length / 8192) for value in values]


def evictions(start: int, length: int, heads: int) -> np.ndarray:
    """LTS `[heads, S_k]`: one key a row from `start` on, those drawn from far enough back first."""
    random = np.random.default_rng(start)
    lts = np.full((heads, length), length + 1)
    for head in lts:
        rows = np.arange(start, length)
        drawn = random.permutation(length - 1)[: length - start]
        head[np.concatenate([drawn[drawn < rows - 1], drawn[drawn >= rows - 1]])] = rows
    return lts


def official_generators(q_len: int, kv_len: int) -> dict[str, tuple[np.ndarray, bool, Callable[[], torch.Tensor], int]]:
    """For each: `startend_row_indices` [H, S_k, C], causal or not, our mask, and how many tokens are not padding."""
    column = np.arange(kv_len)
    everything = np.full(kv_len, kv_len)
    lengths = scaled([2538, 1742, 3213], kv_len)
    ends = np.cumsum(lengths)
    tokens = int(ends[-1])
    padding = kv_len - tokens

    def by_document(values, of_padding):
        return np.concatenate([np.repeat(values, lengths), np.full(padding, of_padding)])

    end, start = by_document(ends, tokens), by_document(ends - lengths, ends[-2])
    window = int(1024 * kv_len / 8192)
    side = int(512 * kv_len / 8192)
    far = column >= 16 + side + 1
    prefixes, with_prefix = scaled([1024, 1742, 512], kv_len), scaled([2538, 1742, 3213], kv_len)
    in_prefix = column - start < by_document(prefixes, 0)
    half_prefix = int(1024 * kv_len / 8192)
    (first, second), (first_len, second_len) = scaled([1024, 2358], kv_len), scaled([538, 1700], kv_len)
    masked_end = np.select(
        [(column >= first) & (column < first + first_len), (column >= second) & (column < second + second_len)],
        [first + first_len, second + second_len],
        kv_len,
    )
    pairs = [first, first_len, second - first - first_len, second_len, kv_len - second - second_len]
    block = 7

    def stack(*channels):
        return np.stack(np.broadcast_arrays(*channels), axis=-1).reshape(-1, kv_len, len(channels)).clip(max=q_len)

    evicted = evictions(int(4096 * kv_len / 8192), kv_len, 4)
    return {
        "full": (stack(everything, 0), False, lambda: bidirectional(kv_len), kv_len),
        "causal": (stack(everything), True, lambda: causal(kv_len), kv_len),
        "sliding_window": (stack(column + window), True, lambda: sliding_window(window, kv_len), kv_len),
        "bidirectional_window": (
            stack(np.minimum(column + side + 1, kv_len), np.maximum(column - side, 0)),
            False,
            lambda: sliding_window(side, kv_len, is_causal=False),
            kv_len,
        ),
        "causal_document": (
            stack(np.where(column < ends[-2], end, kv_len)),
            True,
            lambda: documents_of([*lengths[:-1], lengths[-1] + padding]),
            kv_len,
        ),
        "document": (stack(end, start), False, lambda: documents_of(lengths, is_causal=False), tokens),
        "share_question": (
            stack(np.where(column < lengths[0], tokens, end)),
            True,
            lambda: from_prefix_tree([-1, 0, 0], lengths, kv_len=kv_len),
            kv_len,
        ),
        "global_sliding_window": (
            stack(
                np.where(column < 16, q_len, column + side + 1),
                np.full(kv_len, q_len),
                np.where(far, 16, 0),
                np.where(far, column - side, 0),
            ),
            False,
            lambda: global_and_sliding_window(16, side, kv_len, is_causal=False),
            kv_len,
        ),
        "causal_blockwise": (
            stack(end, by_document([ends[-2]] * (len(ends) - 1) + [ends[-1]], kv_len)),
            True,
            lambda: blockwise([*lengths[:-1], lengths[-1] + padding]),
            tokens,
        ),
        "prefix_lm_document": (
            stack(end, np.where(column >= tokens, tokens, np.where(in_prefix, start, column))),
            False,
            lambda: prefix_lm_documents(prefixes, with_prefix),
            tokens,
        ),
        "prefix_lm_causal": (
            stack(everything, np.where(column < half_prefix, 0, column)),
            False,
            lambda: prefix_lm(half_prefix, kv_len),
            kv_len,
        ),
        "qk_sparse": (
            stack(np.where(masked_end < kv_len, column, kv_len), masked_end),
            True,
            lambda: without_own_block(pairs, [1, 3]),
            kv_len,
        ),
        "random_eviction": (
            stack(evicted),
            True,
            lambda: torch.from_numpy(evicted).int()[None, :, None],
            kv_len,
        ),
        "block_causal_document": (
            stack(end, start + (column - start) // block * block),
            False,
            lambda: intersect(
                documents_of(lengths, is_causal=False),
                causal_with_blocks(torch.tensor([p // block for n in lengths for p in range(n)])),
            ),
            tokens,
        ),
        "empty": (stack(np.zeros(kv_len, dtype=int)), True, lambda: causal(kv_len).zero_(), kv_len),
    }


GENERATORS = list(official_generators(64, 64))


def dense_of_indices(indices: np.ndarray, is_causal: bool, q_len: int) -> np.ndarray:
    """What `startend_row_indices` [H, S_k, C] hides, by the paper's definition of its channels."""
    _, kv_len, channels = indices.shape
    row, column = np.arange(q_len)[:, None], np.arange(kv_len)
    values = [indices[:, None, :, channel] for channel in range(channels)]
    if is_causal:
        lower = (row >= values[0]) & (row < (values[1] if channels == 2 else q_len))
        return ~(lower | (row < column - (kv_len - q_len)))
    if channels == 2:
        return ~((row >= values[0]) | (row < values[1]))
    return ~(((row >= values[0]) & (row < values[1])) | ((row >= values[2]) & (row < values[3])))


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize(("q_len", "kv_len"), [(300, 300), (113, 211), (239, 203), (1, 127), (128, 127)])
def test_official_indices_become_bounds_and_come_back(name, q_len, kv_len):
    indices, is_causal, _, _ = official_generators(q_len, kv_len)[name]
    expected = dense_of_indices(indices, is_causal, q_len)
    official = torch.from_numpy(indices).int()[None]
    bounds = from_startend_row_indices(official, is_causal, q_len=q_len)
    assert_mask(bounds, expected, q_len)
    again, again_causal = to_startend_row_indices(bounds)
    if is_causal and indices.shape[2] == 2:  # holds its triangle in two channels of its own
        assert not again_causal
        assert torch.equal(again[..., :2], official)
    else:
        assert again_causal == is_causal
        assert torch.equal(again, official)
    np.testing.assert_array_equal(dense_of_indices(again[0].numpy(), again_causal, q_len), expected)


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("length", [300, 239, 127])
def test_our_masks_are_those_of_the_official_generators(name, length):
    """Padding aside: some generators let it take part in attention."""
    indices, is_causal, ours, tokens = official_generators(length, length)[name]
    expected = dense_of_indices(indices, is_causal, length)[:, :tokens, :tokens]
    bounds = ours()
    np.testing.assert_array_equal(to_dense(bounds)[0, :, :tokens, :tokens].numpy(), expected)
    exported, exported_causal = to_startend_row_indices(bounds)
    ours_dense = dense_of_indices(exported[0].numpy(), exported_causal, bounds.shape[3])
    np.testing.assert_array_equal(ours_dense[:, :tokens, :tokens], expected)


@pytest.mark.parametrize("name", ["causal", "sliding_window", "causal_document", "share_question", "random_eviction"])
def test_a_causal_mask_written_without_the_causal_flag(name):
    """The generators' `simu` variants: UTE = min(column, LTS) in place of the flag."""
    indices, is_causal, ours, _ = official_generators(211, 211)[name]
    assert is_causal
    assert indices.shape[2] == 1
    simulated = np.concatenate([indices, np.minimum(np.arange(211)[None, :, None], indices)], axis=2)
    bounds = from_startend_row_indices(torch.from_numpy(simulated).int()[None], is_causal=False)
    assert_mask(bounds, dense_of_indices(indices, True, 211))
    assert torch.equal(simplify(bounds), simplify(ours()))
    assert bounds.shape[2] == 2
    assert simplify(bounds).shape[2] == 1


# The pictures


def test_every_picture_shows_its_mask():
    drawn = load("docs/draw_masks.py").pictures()
    folder = ROOT / "docs/masks"
    assert {path.stem for path in folder.glob("*.png")} == set(drawn)
    for name, (bounds, q_len) in drawn.items():
        picture = pyplot.imread(folder / f"{name}.png")[..., :3].mean(-1)
        visible = to_dense(bounds, q_len)[0, 0].numpy()
        middle = [
            ((np.arange(cells) + 0.5) * pixels / cells).astype(int)
            for cells, pixels in zip(visible.shape, picture.shape)
        ]
        np.testing.assert_array_equal(picture[np.ix_(*middle)] < 0.5, visible, err_msg=name)
