"""Every family of masks against its definition, written down here pair by pair."""

from __future__ import annotations

import doctest
import importlib
import itertools
import warnings
from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np
import pytest
import torch
from dense_masks import assert_mask, dense
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_flashmask.bounds import (
    TooManyIntervalsError,
    anchored_blocks,
    block_diffusion,
    block_diffusion_decoder,
    causal_with_blocks,
    families,
    fork_and_join,
    frame_causal,
    from_prefix_tree,
    from_splits,
    gist_tokens,
    hstu,
    independent_chunks,
    isolated_items,
    parallel_eagle,
    simplify,
    sinks_and_window,
    streaming_chunks,
    teacher_forcing,
    to_dense,
    training_time_test,
)

few = settings(max_examples=60, deadline=None)


@st.composite
def documents(draw, longest: int = 14):
    """`document_ids` of B rows, or None, and the ids of each row; -1 is padding. Ids return after others."""
    batch, length = draw(st.integers(1, 2)), draw(st.integers(1, longest))
    if draw(st.booleans()):
        return None, [[0] * length]
    rows = [draw(runs(length, st.integers(-1, 2))) for _ in range(batch)]
    ids = torch.tensor(rows, dtype=draw(st.sampled_from([torch.int32, torch.int64])))
    if draw(st.booleans()):
        ids = ids.t().contiguous().t()
    return ids, rows


@st.composite
def runs(draw, length: int, values):
    row: list[int] = []
    while len(row) < length:
        row += [draw(values)] * draw(st.integers(1, 6))
    return row[:length]


@st.composite
def described(draw, values, longest: int = 14):
    """Documents, and other ids for the same positions: both as tensors and as lists."""
    document_ids, rows = draw(documents(longest))
    count = draw(st.integers(1, 2)) if document_ids is None else len(rows)
    rows = rows * count if document_ids is None else rows
    others = [draw(runs(len(rows[0]), values)) for _ in range(count)]
    return document_ids, rows, torch.tensor(others), others


def numbers(*rows: Sequence[int]) -> list[int]:
    """The number of each position's run, where a run ends when any of the ids changes."""
    ids = [*zip(*rows)]
    return [*accumulate(int(i > 0 and ids[i] != ids[i - 1]) for i in range(len(ids)))]


def places(run: list[int]) -> list[int]:
    """The place of each position in its run."""
    return [i - run.index(number) for i, number in enumerate(run)]


def within(row: list[int]) -> Callable[[int, int], bool]:
    """Whether query and key are tokens of one document."""
    run = numbers(row)
    return lambda q, k: row[q] >= 0 and row[k] >= 0 and run[q] == run[k]


def stack(masks: Sequence[np.ndarray]) -> np.ndarray:
    return np.stack([mask[None] for mask in masks])


def square(visible: Callable[[int, int], bool], size: int) -> np.ndarray:
    return dense(visible, range(size), range(size))


# Block diffusion


def copies_of(same, block, clean_first, clean_causal, noisy_causal, num_noisy, length):
    clean_copy = 0 if clean_first else num_noisy

    def visible(row, key):
        (q_copy, q), (k_copy, k) = divmod(row, length), divmod(key, length)
        if not same(q, k):
            return False
        if k_copy != clean_copy:  # a noisy key
            return q_copy == k_copy and block[q] == block[k] and (k <= q or not noisy_causal)
        if q_copy != clean_copy:
            return block[q] > block[k]
        return block[q] > block[k] or (block[q] == block[k] and (k <= q or not clean_causal))

    return square(visible, (num_noisy + 1) * length)


@few
@given(documents(9), st.integers(1, 4), st.booleans(), st.booleans(), st.booleans(), st.integers(1, 3))
def test_block_diffusion(drawn, block_size, clean_first, clean_causal, noisy_causal, num_noisy):
    document_ids, rows = drawn
    length = len(rows[0])
    options = {"clean_first": clean_first, "clean_causal": clean_causal}
    options.update(noisy_causal=noisy_causal, num_noisy=num_noisy)
    expected = []
    for row in rows:
        block = [place // block_size for place in places(numbers(row))]
        expected.append(copies_of(within(row), block, **options, length=length))
    result = block_diffusion(block_size, document_ids=document_ids, length=length, **options)
    assert result.shape[2] == 2 * (num_noisy + 1 + (document_ids is not None))
    assert_mask(result, stack(expected), (num_noisy + 1) * length)


@few
@given(described(st.integers(-1, 2), 9), st.booleans(), st.integers(1, 2))
def test_block_diffusion_with_ragged_blocks(drawn, clean_first, num_noisy):
    document_ids, rows, block_ids, blocks = drawn
    expected = [
        copies_of(within(row), numbers(ids, row), clean_first, False, False, num_noisy, len(row))
        for row, ids in zip(rows, blocks)
    ]
    result = block_diffusion(
        block_ids=block_ids, document_ids=document_ids, clean_first=clean_first, num_noisy=num_noisy
    )
    assert_mask(result, stack(expected), (num_noisy + 1) * len(rows[0]))


@few
@given(
    st.integers(0, 6) | st.lists(st.integers(0, 6), min_size=1, max_size=2),
    st.integers(1, 9),
    st.integers(0, 5),
    st.integers(1, 4),
    st.none() | st.integers(1, 7),
)
def test_the_decoder_of_block_diffusion(prompts, response, padding, block_size, window):
    lengths = [prompts] if isinstance(prompts, int) else prompts
    encoder = max(lengths) + response + padding
    expected = []
    for prompt in lengths:

        def visible(q, key, prompt=prompt):
            block = q // block_size
            if key >= encoder:
                return (key - encoder) // block_size == block
            first = prompt + block * block_size
            return key < first and key < prompt + response and (window is None or first - key < window)

        expected.append(dense(visible, range(response), range(encoder + response)))
    prompts = prompts if isinstance(prompts, int) else torch.tensor(prompts)
    result = block_diffusion_decoder(prompts, response, encoder, block_size, sliding_window=window)
    assert result.shape[2] == 2
    assert_mask(result, stack(expected), response)


# Drafters


@few
@given(documents(), st.integers(1, 5), st.booleans(), st.none() | st.integers(1, 6), st.booleans(), st.data())
def test_anchored_blocks(drawn, block_size, is_causal, window, from_query, data):
    document_ids, rows = drawn
    ctx_len, count = len(rows[0]), data.draw(st.integers(1, 6))
    anchor_rows, keep_rows, expected = [], [], []
    for row in rows:
        unique = window is not None and from_query
        last = ctx_len if document_ids is None else ctx_len - 1
        anchors = sorted(data.draw(st.lists(st.integers(0, last), min_size=1, max_size=count, unique=unique)))
        keep = [True] * len(anchors) + [False] * (count - len(anchors))
        anchors += [0] * (count - len(anchors))
        same = within(row)

        def visible(q, key, anchors=anchors, keep=keep, same=same):
            block, offset = divmod(q, block_size)
            if not keep[block]:
                return False
            if key >= ctx_len:
                of_block, key_offset = divmod(key - ctx_len, block_size)
                return of_block == block and (key_offset <= offset or not is_causal)
            anchor = anchors[block]
            inside = same(anchor, key) if document_ids is not None else True
            if window is not None and from_query and anchor + offset - key >= window:
                return False
            if window is not None and not from_query and key < anchor - window:
                return False
            return key < anchor and inside

        anchor_rows.append(anchors)
        keep_rows.append(keep)
        expected.append(dense(visible, range(count * block_size), range(ctx_len + count * block_size)))
    result = anchored_blocks(
        torch.tensor(anchor_rows),
        block_size,
        ctx_len,
        block_keep_mask=torch.tensor(keep_rows),
        document_ids=document_ids,
        is_causal=is_causal,
        sliding_window=window,
        window_from="query" if from_query else "anchor",
    )
    assert result.shape[2] == (2 * block_size if window is not None and from_query and block_size > 2 else 2)
    assert_mask(result, stack(expected), count * block_size)


def test_a_window_from_the_query_at_full_density():
    anchors, block_size, window = torch.arange(1, 60)[None], 16, 20
    result = anchored_blocks(anchors, block_size, 60, sliding_window=window, window_from="query")
    row, key = torch.arange(59 * block_size)[:, None], torch.arange(60)
    anchor, offset = 1 + row // block_size, row % block_size
    assert torch.equal(to_dense(result, len(row))[0, 0, :, :60], (key < anchor) & (anchor + offset - key < window))
    assert simplify(result, len(row)).shape[2] == result.shape[2] == 32
    with pytest.raises(TooManyIntervalsError, match=r"`block_size` .17."):
        anchored_blocks(anchors, 17, 60, sliding_window=window, window_from="query")


@few
@given(documents(), st.integers(0, 3), st.none() | st.integers(1, 5))
def test_training_time_test(drawn, step, window):
    document_ids, rows = drawn
    length = len(rows[0])
    expected = []
    for row in rows:
        same = within(row)

        def visible(q, key, same=same):
            of_step, k = divmod(key, length)
            in_base = k <= q and (window is None or q - k < window)
            return same(q, k) and (q == k if of_step else in_base)

        expected.append(dense(visible, range(length), range((step + 1) * length)))
    result = training_time_test(step, document_ids=document_ids, length=length, sliding_window=window)
    assert result.shape[2] == (2 if step else 1)
    assert_mask(result, stack(expected), length)


@few
@given(documents(7), st.data())
def test_parallel_eagle(drawn, data):
    document_ids, rows = drawn
    pairs = [*itertools.product(range(len(rows[0])), range(4))]
    chosen = [sorted(data.draw(st.sets(st.sampled_from(pairs), min_size=1, max_size=12))) for _ in rows]
    size = max(map(len, chosen)) + data.draw(st.integers(0, 2))
    expected = []
    for row, elements in zip(rows, chosen):
        same = within(row)

        def visible(q, k, elements=elements, same=same):
            if max(q, k) >= len(elements):
                return False
            (q_anchor, q_depth), (k_anchor, k_depth) = elements[q], elements[k]
            if q_anchor == k_anchor:
                return same(q_anchor, k_anchor) and k_depth <= q_depth
            return k_depth == 0 and k_anchor < q_anchor and same(q_anchor, k_anchor)

        expected.append(square(visible, size))
    padded = torch.tensor([elements + [(0, -1)] * (size - len(elements)) for elements in chosen])
    result = parallel_eagle(padded[..., 0], padded[..., 1], document_ids=document_ids)
    assert result.shape[2] == 1
    assert_mask(result, stack(expected), size)


# Images, text and video


@few
@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 4), st.sampled_from(["causal", "full", "noise"]), st.booleans()), max_size=5),
        min_size=1,
        max_size=2,
    ),
    st.integers(0, 2),
)
def test_from_splits(drawn, padding):
    size = max(sum(length for length, _, _ in row) for row in drawn) + padding
    expected, document_lens = [], []
    for row in drawn:
        splits = [number for number, (length, _, _) in enumerate(row) for _ in range(length)]
        modes = [mode for length, mode, _ in row for _ in range(length)]
        sample = [*accumulate(int(begins) for _, _, begins in row)]
        document_lens.append(
            [sum(n for n, s in zip([r[0] for r in row], sample) if s == one) for one in sorted(set(sample))]
        )

        def visible(q, k, splits=splits, modes=modes, sample=sample):
            if max(q, k) >= len(splits) or sample[splits[q]] != sample[splits[k]]:
                return False
            is_one = splits[q] == splits[k]
            sees = k <= q or (is_one and modes[k] != "causal")
            return sees and (modes[k] != "noise" or is_one)

        expected.append(square(visible, size))
    result = from_splits(
        [[length for length, _, _ in row] for row in drawn],
        [[mode for _, mode, _ in row] for row in drawn],
        document_lens=document_lens,
        kv_len=size,
    )
    assert_mask(result, stack(expected), size)


@st.composite
def clips(draw):
    document_ids, rows = draw(documents(12))
    frame_rows = []
    for row in rows:
        frame, frames, run = 0, [], numbers(row)
        for i, number in enumerate(run):
            frame = 0 if i and run[i - 1] != number else frame + draw(st.integers(0, 1)) * bool(i)
            frames.append(frame)
        frame_rows.append(frames)
    return document_ids, rows, frame_rows


def sees_frames(frames, per_chunk, is_first_alone, window, sinks):
    def chunk_of(frame):
        return (0 if frame == 0 else 1 + (frame - 1) // per_chunk) if is_first_alone else frame // per_chunk

    def end_of(chunk):
        return 1 + chunk * per_chunk if is_first_alone else (chunk + 1) * per_chunk

    def sees(q, k):
        q_chunk, frame = chunk_of(frames[q]), frames[k]
        near = window is None or frame >= end_of(q_chunk) - window or frame < sinks
        return chunk_of(frame) <= q_chunk and near

    return chunk_of, sees


options_of_clips = (st.integers(1, 3), st.booleans(), st.none() | st.integers(1, 4), st.integers(0, 2))


@few
@given(clips(), *options_of_clips)
@pytest.mark.parametrize("is_teacher_forcing", [False, True])
def test_video(is_teacher_forcing, drawn, per_chunk, is_first_alone, window, sinks):
    document_ids, rows, frame_rows = drawn
    length, expected = len(rows[0]), []
    window = window and max(window, per_chunk)
    for row, frames in zip(rows, frame_rows):
        same = within(row)
        chunk_of, sees = sees_frames(frames, per_chunk, is_first_alone, window, sinks)

        def visible(row, key, same=same, chunk_of=chunk_of, sees=sees, frames=frames):
            (is_noisy, q), (key_is_noisy, k) = divmod(row, length), divmod(key, length)
            is_one = chunk_of(frames[q]) == chunk_of(frames[k])
            if key_is_noisy:
                return same(q, k) and is_noisy and is_one
            return same(q, k) and sees(q, k) and not (is_noisy and is_one)

        expected.append(square(visible, 2 * length if is_teacher_forcing else length))
    result = (teacher_forcing if is_teacher_forcing else frame_causal)(
        torch.tensor(frame_rows),
        num_frame_per_block=per_chunk,
        independent_first_frame=is_first_alone,
        local_attn_size=window,
        sink_size=sinks,
        document_ids=document_ids,
    )
    planes = 4 if document_ids is None and window is None else 6
    assert result.shape[2] == (planes if is_teacher_forcing else 2)
    assert_mask(result, stack(expected), expected[0].shape[0])


def test_the_mask_of_self_forcing_in_closed_form():
    """Facts of its repository: 21 frames, chunks of 3, a window: [s, n g floor((f + W) / g))."""
    frame_seqlen, frames, per_chunk, window = 4, 21, 3, 6
    position = torch.arange(frames * frame_seqlen)
    result = frame_causal(position // frame_seqlen, num_frame_per_block=per_chunk, local_attn_size=window)
    size = frame_seqlen * per_chunk
    start = position // size * size
    end = (size * ((position // frame_seqlen + window) // per_chunk)).clamp(max=len(position))
    assert torch.equal(result[0, 0], torch.stack([end, start]).int())


@few
@given(documents(), st.integers(1, 4), st.none() | st.integers(0, 2), st.integers(0, 2))
def test_streaming_chunks(drawn, size, left, ahead):
    document_ids, rows = drawn
    expected = []
    for row in rows:
        same, chunk = within(row), [place // size for place in places(numbers(row))]

        def visible(q, k, same=same, chunk=chunk):
            behind = chunk[q] - chunk[k]
            return same(q, k) and -ahead <= behind and (left is None or behind <= left)

        expected.append(square(visible, len(row)))
    result = streaming_chunks(
        size, left_chunks=left, look_ahead_chunks=ahead, document_ids=document_ids, length=len(rows[0])
    )
    assert_mask(result, stack(expected), len(rows[0]))


# Parts of rows


@few
@given(described(st.integers(-1, 2)))
def test_independent_chunks(drawn):
    document_ids, rows, chunk_ids, chunks = drawn
    expected = []
    for row, ids in zip(rows, chunks):
        same, chunk, document = within(row), numbers(ids, row), numbers(row)

        def visible(q, k, same=same, chunk=chunk, ids=ids, document=document):
            is_question = all(ids[i] < 0 for i in range(q, len(ids)) if document[i] == document[q])
            return same(q, k) and k <= q and (ids[k] < 0 or chunk[q] == chunk[k] or is_question)

        expected.append(square(visible, len(row)))
    result = independent_chunks(chunk_ids, document_ids=document_ids)
    assert result.shape[2] == (4 if document_ids is None else 6)
    assert_mask(result, stack(expected), len(rows[0]))


@few
@given(described(st.integers(-1, 2)), st.booleans())
def test_isolated_items(drawn, is_causal):
    document_ids, rows, item_ids, items = drawn
    expected = []
    for row, ids in zip(rows, items):
        same, item = within(row), numbers(ids, row)

        def visible(q, k, same=same, item=item, ids=ids):
            return same(q, k) and (ids[k] < 0 or item[q] == item[k]) and (k <= q or not is_causal)

        expected.append(square(visible, len(row)))
    result = isolated_items(item_ids, document_ids=document_ids, is_causal=is_causal)
    assert_mask(result, stack(expected), len(rows[0]))


@few
@given(described(st.integers(-1, 2)), st.randoms())
def test_gist_tokens(drawn, random):
    document_ids, rows, chunk_ids, chunks = drawn
    gist = [[random.random() < 0.3 for _ in row] for row in rows]
    expected = []
    for row, ids, is_gist in zip(rows, chunks, gist):
        same, chunk = within(row), numbers(ids, row)

        def visible(q, k, same=same, chunk=chunk, ids=ids, is_gist=is_gist):
            return same(q, k) and k <= q and (chunk[q] == chunk[k] or is_gist[k] or ids[k] < 0)

        expected.append(square(visible, len(row)))
    assert_mask(gist_tokens(chunk_ids, torch.tensor(gist), document_ids=document_ids), stack(expected), len(rows[0]))


@few
@given(documents(), st.integers(0, 3), st.integers(1, 5))
def test_sinks_and_window(drawn, sinks, window):
    document_ids, rows = drawn
    expected = []
    for row in rows:
        same, place = within(row), places(numbers(row))

        def visible(q, k, same=same, place=place):
            return same(q, k) and k <= q and (q - k < window or place[k] < sinks)

        expected.append(square(visible, len(row)))
    result = sinks_and_window(sinks, window, document_ids=document_ids, length=len(rows[0]))
    assert_mask(result, stack(expected), len(rows[0]))


@few
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 5)), max_size=3),
    st.booleans(),
    st.booleans(),
    st.integers(1, 3),
    st.integers(0, 2),
)
def test_hstu(sequences, has_contexts, has_targets, group, padding):
    rows = [
        (number, kind, place)
        for number, counts in enumerate(sequences)
        for kind, count in zip("cht", counts)
        for place in range(count)
    ]
    size = len(rows) + padding

    def visible(q, k):
        if max(q, k) >= len(rows) or rows[q][0] != rows[k][0]:
            return False
        (_, q_kind, q_place), (_, k_kind, k_place) = rows[q], rows[k]
        if q_kind == "c" and has_contexts and (k_kind != "t" or not has_targets):
            return True
        if k_kind == "t" and has_targets:
            return k <= q and q_place // group == k_place // group
        return k <= q

    cu_seqlens = torch.tensor([0, *accumulate(map(sum, sequences))])
    contexts, targets = (torch.tensor([counts[kind] for counts in sequences], dtype=torch.int32) for kind in (0, 2))
    result = hstu(
        cu_seqlens,
        size,
        num_contexts=contexts if has_contexts else None,
        num_targets=targets if has_targets else None,
        target_group_size=group,
    )
    assert result.shape[2] == (6 if has_contexts else 2)
    assert_mask(result, square(visible, size), size)


@few
@given(documents(), st.integers(1, 3), st.booleans(), st.data())
def test_fork_and_join(drawn, levels, is_flat, data):
    document_ids, rows = drawn
    length = len(rows[0])
    levels = 1 if is_flat else levels
    branches = [[data.draw(runs(length, st.integers(-3, 2))) for _ in range(levels)] for _ in rows]
    expected = []
    for row, of_levels in zip(rows, branches):
        same = within(row)
        outer, told_apart = [row], []
        for ids in of_levels:
            inside = [int(value >= 0) for value in ids]
            told_apart.append((ids, numbers(inside, *outer), numbers(ids, *outer)))
            outer.append([max(value, -1) for value in ids])

        def visible(q, k, same=same, told_apart=told_apart):
            parallel = any(
                ids[q] >= 0 and region[q] == region[k] and branch[q] != branch[k] for ids, region, branch in told_apart
            )
            return same(q, k) and k <= q and not parallel

        expected.append(square(visible, length))
    branch_ids = torch.tensor(branches)
    result = fork_and_join(branch_ids[:, 0] if is_flat else branch_ids, document_ids=document_ids)
    assert result.shape[2] == 2 * (levels + 1 + (document_ids is not None))
    assert_mask(result, stack(expected), length)


# Sizes that say "unlimited"

MANY = 2**31 - 1
POSITION = torch.arange(4)
PACKED = torch.tensor([0, 0, 1, 1])
ANCHORS = torch.tensor([[1, 3]])


def from_query(window):
    return anchored_blocks(ANCHORS, 3, 4, sliding_window=window, window_from="query")


@pytest.mark.parametrize("many", [MANY - 1, MANY, 2**40])
@pytest.mark.parametrize(
    "of",
    [
        lambda many: anchored_blocks(ANCHORS, 2, 4, sliding_window=many),
        from_query,
        lambda many: sinks_and_window(0, many, length=4),
        lambda many: sinks_and_window(many, 1, length=4),
        lambda many: block_diffusion_decoder(1, 4, 5, 2, sliding_window=many),
        lambda many: block_diffusion_decoder(1, 4, 5, many, sliding_window=many),
        lambda many: streaming_chunks(1, length=4, left_chunks=many),
        lambda many: streaming_chunks(many, length=4, left_chunks=many, look_ahead_chunks=many),
        lambda many: block_diffusion(many, document_ids=PACKED),
        lambda many: hstu(torch.tensor([0, 5]), 5, num_targets=torch.tensor([2]), target_group_size=many),
        lambda many: frame_causal(POSITION, num_frame_per_block=many, local_attn_size=many),
        lambda many: frame_causal(POSITION, num_frame_per_block=many, local_attn_size=many, sink_size=many),
        lambda many: frame_causal(
            POSITION, num_frame_per_block=many, local_attn_size=many, independent_first_frame=True
        ),
        lambda many: training_time_test(1, length=4, sliding_window=many),
    ],
)
def test_a_huge_size_is_unlimited(of, many):
    assert torch.equal(of(many), of(100))


@pytest.mark.parametrize(
    ("size", "chunks"),
    [(2**16, {"left_chunks": 2**15 - 1}), (2**20, {"look_ahead_chunks": 2**11 + 1}), (2**30, {"left_chunks": 3})],
)
def test_a_huge_number_of_positions_in_chunks_is_unlimited(size, chunks):
    assert to_dense(streaming_chunks(size, length=4, **chunks)).all()


@pytest.mark.parametrize(
    "of",
    [
        lambda ids, **documents: independent_chunks(ids, **documents),
        lambda ids, **documents: fork_and_join(ids, **documents),
        lambda ids, **documents: fork_and_join(torch.stack([ids, ids], dim=-2).view(-1, 2, 4), **documents),
        lambda ids, **documents: parallel_eagle(POSITION.expand(ids.shape), 0 * ids, **documents),
        lambda ids, **documents: anchored_blocks(
            POSITION[1:3].view(1, 2).expand(ids[..., 0].numel(), -1), 2, 4, **documents
        ),
    ],
)
def test_ids_of_one_row_serve_the_documents_of_all(of):
    ids, document_ids = torch.tensor([-1, 0, 1, -1]), torch.stack([PACKED, -PACKED])
    result = of(ids, document_ids=document_ids)
    assert torch.equal(result, of(ids.expand(2, -1), document_ids=document_ids))


@pytest.mark.parametrize(
    "of",
    [
        lambda ids, **documents: block_diffusion(block_ids=ids, **documents),
        lambda ids, **documents: independent_chunks(ids, **documents),
        lambda ids, **documents: isolated_items(ids, **documents),
        lambda ids, **documents: gist_tokens(ids, ids > 0, **documents),
        lambda ids, **documents: fork_and_join(ids, **documents),
        lambda ids, **documents: frame_causal(ids, **documents),
        lambda ids, **documents: teacher_forcing(ids, **documents),
        lambda ids, **documents: parallel_eagle(ids[:, :1], ids[:, :1], **documents),
        lambda ids, **documents: anchored_blocks(ids[:, :1], 2, 4, **documents),
    ],
)
def test_documents_of_another_number_of_rows_are_refused(of):
    with pytest.raises(ValueError, match="`document_ids` have 2 rows, the other arguments have 3"):
        of(torch.zeros(3, 4, dtype=torch.int64), document_ids=torch.stack([PACKED, PACKED]))


def test_frames_that_are_a_view_cost_no_copy_that_torch_warns_of():
    frames = torch.tensor([[0, 0], [0, 1], [1, 1]]).mT
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = frame_causal(frames, local_attn_size=1)
    finally:
        torch.set_warn_always(False)
    assert torch.equal(result, frame_causal(frames.contiguous(), local_attn_size=1))


@pytest.mark.parametrize("document_ids", [None, torch.tensor([[0, -1], [0, 0], [1, 0]]).mT])
def test_bounds_of_ids_that_are_a_view_are_contiguous(document_ids):
    ids = torch.tensor([[0, 0], [0, 1], [1, 1]]).mT
    for made in (isolated_items(ids, document_ids=document_ids), gist_tokens(ids, ids > 0, document_ids=document_ids)):
        assert made.is_contiguous()


def test_nothing_is_no_special_case():
    assert sinks_and_window(1, 2, length=0).shape == (1, 1, 1, 0)
    none = torch.zeros(1, 0, dtype=torch.int64)
    result = anchored_blocks(none, 2, 4, sliding_window=2, window_from="query")
    assert to_dense(result, 0).shape == (1, 1, 0, 4)


# Tracing


def traceable(document_ids, ids, anchors, keep, frames):
    size = document_ids.shape[1]
    packed = {"document_ids": document_ids}
    return [
        block_diffusion(3, length=size, device=ids.device),
        block_diffusion(3, **packed, num_noisy=2, clean_causal=True),
        block_diffusion(block_ids=ids, **packed, clean_first=True),
        block_diffusion_decoder(anchors[:, 0], size, 3 * size, 4, sliding_window=5),
        anchored_blocks(anchors, 4, size, block_keep_mask=keep, **packed),
        anchored_blocks(anchors, 4, size, sliding_window=3, window_from="query"),
        training_time_test(2, **packed, sliding_window=4),
        parallel_eagle(ids.cumsum(1) // 3, ids.new_zeros(ids.shape) + torch.arange(size, device=ids.device)),
        frame_causal(frames, local_attn_size=2, sink_size=1),
        teacher_forcing(frames, num_frame_per_block=2),
        streaming_chunks(4, left_chunks=1, **packed),
        independent_chunks(ids - 1, **packed),
        isolated_items(ids - 1, **packed),
        gist_tokens(ids, ids > 1, **packed),
        sinks_and_window(2, 5, **packed),
        hstu(anchors[0], size, num_contexts=anchors[0, :2] // 2, num_targets=anchors[0, :2], target_group_size=2),
        fork_and_join(torch.stack([ids - 1, ids], dim=1), **packed),
        causal_with_blocks(ids - 1, window=4, window_limits_blocks=True),
    ]


def traceable_inputs(size, seed=0):
    generator = torch.Generator().manual_seed(size + seed)
    document_ids = torch.arange(size).div(5 + seed, rounding_mode="floor").expand(2, -1).clone()
    document_ids[1, -3:] = -1
    anchors = torch.tensor([[0, 2, 5], [1, 4, 9]])
    keep = torch.tensor([[True, True, True], [True, True, False]])
    ids = torch.randint(0, 3, (2, size), generator=generator)
    return document_ids, ids, anchors, keep, torch.arange(size) // 3


def test_families_trace_in_one_graph_for_every_length():
    counter = CompileCounter()
    compiled = torch.compile(traceable, fullgraph=True, backend=counter, dynamic=True)
    for size in (11, 17, 24):
        inputs = traceable_inputs(size)
        for got, expected in zip(compiled(*inputs), traceable(*inputs), strict=True):
            assert torch.equal(got, expected)
    assert counter.frame_count == 1


def test_lists_are_constants_of_a_graph():
    def make():
        splits = from_splits([[2, 3, 1], [4]], [["causal", "full", "noise"], ["full"]], document_lens=[[5, 1], [4]])
        return splits, from_prefix_tree([-1, 0, 0], [2, 2, 1])

    compiled = torch.compile(make, fullgraph=True, backend="eager")
    for got, expected in zip(compiled(), make(), strict=True):
        assert torch.equal(got, expected)


def test_families_read_nothing_back_to_the_host():
    inputs = traceable_inputs(11)
    expected = traceable(*inputs)
    with FakeTensorMode() as mode:
        results = traceable(*(mode.from_tensor(value) for value in inputs))
    assert [tuple(result.shape) for result in results] == [tuple(result.shape) for result in expected]
    assert {result.dtype for result in results} == {torch.int32}


@pytest.mark.gpu
def test_on_the_gpu_families_wait_for_nothing_and_follow_replays():
    static = [value.cuda() for value in traceable_inputs(24)]
    traceable(*static)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        traceable(*static)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = traceable(*static)
    for seed in range(3):
        inputs = traceable_inputs(24, seed)
        for value, new in zip(static, inputs):
            value.copy_(new)
        graph.replay()
        for got, expected in zip(replayed, traceable(*inputs), strict=True):
            assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("module", ["diffusion", "drafters", "multimodal", "segments", "streaming", "video"])
def test_examples_in_docstrings(module):
    results = doctest.testmod(importlib.import_module(f"hf_flashmask.bounds.families.{module}"))
    assert results.attempted
    assert results.failed == 0


def test_every_family_names_what_it_takes_and_returns():
    for name in families.__all__:
        documentation = getattr(families, name).__doc__
        assert all(part in documentation for part in ("Args:", "Returns:", "Raises:", ">>> ")), name


# Errors

ids = torch.zeros(2, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: block_diffusion(2), ValueError, "pass `document_ids` or `length`"),
        (lambda: block_diffusion(length=4), ValueError, "one of `block_size` and `block_ids`"),
        (lambda: block_diffusion(2, block_ids=ids), ValueError, "one of `block_size` and `block_ids`"),
        (lambda: block_diffusion(0, length=4), ValueError, "`block_size` must be at least 1, got 0"),
        (lambda: block_diffusion(2, length=4, num_noisy=0), ValueError, "`num_noisy` must be at least 1, got 0"),
        (lambda: block_diffusion(2, length=4, num_noisy=16), TooManyIntervalsError, "needs 17 hidden intervals"),
        (lambda: block_diffusion(2, length=4, document_ids=ids), ValueError, "have 5 positions, the other .* say 4"),
        (lambda: block_diffusion_decoder(1, 4, 5, 0), ValueError, "`block_size` must be at least 1"),
        (lambda: anchored_blocks(ids[0], 2, 4), ValueError, r"`anchor_positions` must be \[B, N\]"),
        (lambda: anchored_blocks(torch.tensor([[3, 1]]), 2, 4), ValueError, "`anchor_positions` must ascend"),
        (lambda: anchored_blocks(ids, 2, 4, window_from="key"), ValueError, "must be 'anchor' or 'query', got 'key'"),
        (lambda: anchored_blocks(ids, 2, 4, block_keep_mask=ids), ValueError, r"must be a bool tensor \[2, 5\]"),
        (
            lambda: anchored_blocks(ids, 2, 4, sliding_window=2, window_from="query"),
            ValueError,
            "must differ from each other",
        ),
        (lambda: anchored_blocks(ids + 5, 2, 4), ValueError, "must be 0 or more, and at most `ctx_len`"),
        (lambda: anchored_blocks(ids - 1, 2, 4), ValueError, "must be 0 or more, and at most `ctx_len`"),
        (lambda: anchored_blocks(ids, 2, 4, block_keep_mask=[True]), ValueError, r"bool tensor \[2, 5\], got list"),
        (lambda: block_diffusion_decoder(1, -4, 5, 2), ValueError, "must not be negative, got -4 and 5"),
        (lambda: block_diffusion_decoder(2, 4, 5, 2), ValueError, "at most `encoder_len`, got 2 and 4 of 5"),
        (lambda: block_diffusion_decoder(torch.tensor([1, 2]), 4, 5, 2), ValueError, "at most `encoder_len`"),
        (lambda: training_time_test(-1, length=4), ValueError, "`step` must be at least 0, got -1"),
        (lambda: parallel_eagle(ids, ids), ValueError, "must be sorted by `anchors`"),
        (lambda: from_splits([2], ["full", "full"]), ValueError, "`attn_modes` must be one of"),
        (lambda: from_splits([2], ["image"]), ValueError, r"got \['image'\]"),
        (lambda: from_splits([2, 2], ["full"] * 2, document_lens=[3, 1]), ValueError, "must end where splits end"),
        (lambda: from_splits([4, 2], ["full"] * 2, document_lens=[4, -2, 4]), ValueError, "must not be negative and"),
        (lambda: from_splits([2, 2], ["full"] * 2, kv_len=3), ValueError, "the longest row has 4 tokens"),
        (lambda: frame_causal(torch.tensor([0, 1, 0])), ValueError, "not decrease inside of a clip"),
        (lambda: frame_causal(ids, local_attn_size=0), ValueError, "must be at least 1"),
        (lambda: frame_causal(ids, num_frame_per_block=3, local_attn_size=2), ValueError, "smaller than the 3 frames"),
        (lambda: teacher_forcing(ids, num_frame_per_block=2**40, local_attn_size=2), ValueError, "must not be smaller"),
        (lambda: block_diffusion(2.5, length=4), TypeError, "`block_size` must be an integer, got float"),
        (lambda: streaming_chunks(2, left_chunks=-1, length=3), ValueError, "`left_chunks` must be at least 0, got -1"),
        (lambda: gist_tokens(ids, ids), ValueError, r"`is_gist` must be a bool tensor \[2, 5\]"),
        (lambda: gist_tokens(ids, [True]), ValueError, r"`is_gist` must be a bool tensor \[2, 5\], got list"),
        (lambda: hstu(ids[0, :0], 5), ValueError, "at least the 0 that it begins with"),
        (lambda: hstu(torch.tensor([1, 5]), 5), ValueError, "must begin with 0"),
        (lambda: hstu(torch.tensor([0, 5, 3]), 5), ValueError, "must not decrease"),
        (
            lambda: hstu(torch.tensor([0, 5]), 5, num_targets=-ids[0, :1] - 1),
            ValueError,
            "`num_targets` must not be neg",
        ),
        (lambda: hstu(torch.tensor([0, 6]), 5), ValueError, "`cu_seqlens` must not end past `length`"),
        (
            lambda: hstu(
                torch.tensor([0, 2, 5]), 5, num_contexts=torch.tensor([1, 0]), num_targets=torch.tensor([2, 0])
            ),
            ValueError,
            "as many tokens as `num_contexts` and `num_targets` are together",
        ),
        (lambda: hstu(torch.tensor([0, 5]), 5.0), TypeError, "`length` must be an integer, got float"),
        (lambda: streaming_chunks(2, length="4"), TypeError, "`length` must be an integer, got str"),
        (lambda: anchored_blocks(ids, 2, 4.0), TypeError, "`ctx_len` must be an integer, got float"),
        (lambda: block_diffusion_decoder(1, "4", 5, 2), TypeError, "`response_len` must be an integer, got str"),
        (lambda: block_diffusion_decoder(1.5, 4, 7, 2), TypeError, "`prompt_lengths` must be an integer, got float"),
        (
            lambda: parallel_eagle(ids[0, :1] + 5, ids[0, :1], document_ids=ids),
            ValueError,
            "positions of `document_ids`",
        ),
        (
            lambda: parallel_eagle(ids[0, :1] - 1, ids[0, :1], document_ids=ids),
            ValueError,
            "positions of `document_ids`",
        ),
        (lambda: fork_and_join(ids[:, None][:, :0]), ValueError, "at least one level"),
        (lambda: hstu(ids[0], 5, num_targets=ids[0]), ValueError, "`num_targets` must have 4 values, got 5"),
        (lambda: fork_and_join(ids[:, None].expand(-1, 16, -1)), TooManyIntervalsError, "needs 17 hidden intervals"),
        (lambda: isolated_items(ids.float()), TypeError, "`item_ids` must be an integer tensor"),
        (lambda: from_splits([1.5, 2], ["causal", "full"]), TypeError, "`split_lens` must hold integers"),
        (lambda: block_diffusion(block_ids=ids, length=4), ValueError, "have 5 positions, `length` says 4"),
    ],
)
def test_errors_name_the_argument_and_what_came(call, error, message):
    with pytest.raises(error, match=message):
        call()
