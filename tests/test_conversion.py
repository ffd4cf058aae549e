"""Bounds of Transformers' mask functions against the dense masks that Transformers makes of the same functions."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, MistralConfig, PreTrainedConfig, StaticCache, masking_utils

import hf_flashmask  # noqa: F401  (registers the implementation)
from hf_flashmask import bounds
from hf_flashmask.conversion import from_mask_function
from hf_flashmask.integration import _is_marked, _unmark

BATCH, LENGTH, WINDOW = 3, 14, 5


def dense(mask_function: Callable, q_len: int, kv_len: int, q_offset: Any = 0, kv_offset: int = 0) -> Tensor:
    return masking_utils.sdpa_mask(
        batch_size=BATCH,
        q_length=q_len,
        kv_length=kv_len,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        allow_is_causal_skip=False,
    )


def assert_same(mask_function: Callable, q_len: int, kv_len: int, q_offset: Any = 0, kv_offset: int = 0) -> Tensor:
    converted = from_mask_function(
        mask_function, batch_size=BATCH, q_len=q_len, kv_len=kv_len, q_offset=q_offset, kv_offset=kv_offset
    )
    expected = dense(mask_function, q_len, kv_len, q_offset, kv_offset)
    assert torch.equal(bounds.to_dense(converted, q_len).expand_as(expected), expected)
    return converted


def random_ids(length: int, *, negative: bool) -> Tensor:
    """Runs of increasing ids `[BATCH, length]`; with `negative` some runs are -1."""
    ids = (torch.rand(BATCH, length) < 0.3).cumsum(-1)
    return torch.where(torch.rand(BATCH, int(ids.max()) + 1).gather(1, ids) < 0.4, -1, ids) if negative else ids


def random_leaf(total: int) -> Callable:
    """One of Transformers' own mask functions, valid for indices below `total`."""
    return random.choice(
        [
            lambda: masking_utils.causal_mask_function,
            lambda: masking_utils.bidirectional_mask_function,
            lambda: masking_utils.sliding_window_overlay(random.randint(1, total)),
            lambda: masking_utils.sliding_window_bidirectional_overlay(random.randint(0, total)),
            lambda: masking_utils.chunked_overlay(random.randint(1, total), torch.randint(0, 6, (BATCH,))),
            lambda: masking_utils.packed_sequence_mask_function(random_ids(total, negative=False)),
            lambda: masking_utils.blockwise_overlay(random_ids(total, negative=True)),
        ]
    )()


def random_mask_function(total: int, depth: int) -> Callable:
    if depth == 0 or random.random() < 0.2:
        return random_leaf(total)
    join = random.choice([masking_utils.and_masks, masking_utils.and_masks, masking_utils.or_masks])
    return join(*(random_mask_function(total, depth - 1) for _ in range(random.randint(1, 3))))


@pytest.mark.parametrize("seed", range(60))
def test_random_compositions(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)
    q_len, kv_len = random.randint(1, 17), random.randint(1, 17)
    q_offset, kv_offset = random.randint(0, 9), random.randint(0, 9)
    mask_function = random_mask_function(max(q_len + q_offset, kv_len + kv_offset), depth=2)
    assert_same(mask_function, q_len, kv_len, q_offset, kv_offset)


def test_causal_masks_stay_one_plane() -> None:
    documents = masking_utils.packed_sequence_mask_function(random_ids(LENGTH, negative=False))
    for mask_function in (
        masking_utils.causal_mask_function,
        masking_utils.sliding_window_causal_mask_function(WINDOW),
        masking_utils.chunked_causal_mask_function(WINDOW, torch.zeros(BATCH, dtype=torch.long)),
        masking_utils.and_masks(documents, masking_utils.sliding_window_causal_mask_function(WINDOW)),
    ):
        assert assert_same(mask_function, LENGTH, LENGTH).shape[2] == 1
        assert assert_same(masking_utils.causal_mask_function, 3, LENGTH, LENGTH - 3).shape[2] == 1


def test_window_of_nothing() -> None:
    for q_len, q_offset in ((LENGTH, 0), (3, LENGTH - 3), (3, 2)):
        assert_same(masking_utils.sliding_window_causal_mask_function(0), q_len, LENGTH, q_offset)


def packed_positions() -> Tensor:
    lengths = [[4, 1, 9], [14], [6, 6, 2]]
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])


@pytest.mark.parametrize("chunk_size", [1, 3, 4, 20])
def test_packed_documents_as_transformers_composes_them(chunk_size: int) -> None:
    position_ids = packed_positions()
    ids = masking_utils.find_packed_sequence_indices(position_ids)

    def intersect_with_documents(mask_function: Callable, position_ids: Tensor, ids: Tensor) -> Callable:
        return masking_utils.and_masks(mask_function, masking_utils.packed_sequence_mask_function(ids))

    # Older Transformers count chunks from the start of the row, not of the document.
    compose = getattr(masking_utils, "packed_sequence_compatibility_function", intersect_with_documents)
    for mask_function in (
        masking_utils.causal_mask_function,
        masking_utils.sliding_window_causal_mask_function(WINDOW),
        masking_utils.chunked_causal_mask_function(chunk_size, torch.zeros(BATCH, dtype=torch.long)),
    ):
        assert_same(compose(mask_function, position_ids, ids), LENGTH, LENGTH)

        def each_document_alone(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
            shown = mask_function(batch, head, position_ids[batch, row], position_ids[batch, key])  # noqa: B023
            return shown & (ids[batch, row] == ids[batch, key])

        by_ids = from_mask_function(
            mask_function, document_ids=ids, batch_size=BATCH, q_len=LENGTH, kv_len=LENGTH, has_user_functions=False
        )
        assert torch.equal(bounds.to_dense(by_ids), dense(each_document_alone, LENGTH, LENGTH))


def test_unknown_function_is_named() -> None:
    def keys_of_even_rows(batch_idx: int, head_idx: int, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return q_idx % 2 == 0

    composed = masking_utils.and_masks(masking_utils.causal_mask_function, keys_of_even_rows)
    with pytest.raises(NotImplementedError, match=r"keys_of_even_rows.* of `.*test_conversion`.*sdpa"):
        from_mask_function(composed, batch_size=1, q_len=4, kv_len=4)


@pytest.mark.parametrize(
    ("factory", "ids"),
    [
        ("blockwise_overlay", [[0, 0, -1, 0]]),
        ("packed_sequence_mask_function", [[0, 1, 0, 1]]),
        ("packed_sequence_mask_function", [[0, 0, -1, -1]]),
    ],
)
def test_ids_that_bounds_cannot_hold_are_refused(factory: str, ids: list[list[int]]) -> None:
    mask_function = getattr(masking_utils, factory)(torch.tensor(ids))
    with pytest.raises(NotImplementedError, match=factory):
        from_mask_function(mask_function, batch_size=1, q_len=4, kv_len=4)


# Every creator of Transformers, with every cache


CREATORS = {
    "causal": masking_utils.create_causal_mask,
    "sliding": masking_utils.create_sliding_window_causal_mask,
    "chunked": masking_utils.create_chunked_causal_mask,
    "bidirectional": masking_utils.create_bidirectional_mask,
    "bidirectional_sliding": masking_utils.create_bidirectional_sliding_window_mask,
}


def config_for(creator: str, attn_implementation: str) -> PreTrainedConfig:
    config = MistralConfig(num_hidden_layers=1, sliding_window=WINDOW if "sliding" in creator else None)
    config.sliding_window = WINDOW
    config.attention_chunk_size = WINDOW
    if creator == "causal":
        config.layer_types = ["full_attention"]
    elif creator in ("sliding", "chunked"):
        config.layer_types = [f"{creator}_attention"]
    config._attn_implementation = attn_implementation
    return config


def cache_with(kind: str, past: int, config: PreTrainedConfig) -> DynamicCache | StaticCache | None:
    """A cache that holds `past` tokens, filled in two steps as prefill and decoding do."""
    if kind == "none":
        return None
    cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=20)
    for tokens in (past - past // 3, past // 3):
        if tokens:
            states = torch.zeros(BATCH, 1, tokens, 4)
            cache.update(states, states, 0)
    return cache


@pytest.mark.parametrize("padding", ["none", "ones", "left", "right"])
@pytest.mark.parametrize(
    ("kind", "past", "q_len"),
    [
        ("none", 0, LENGTH),
        *[(kind, *step) for kind in ("dynamic", "static") for step in [(0, 9), (0, 3), (3, 1), (9, 1), (8, 4)]],
    ],
)
@pytest.mark.parametrize("creator", CREATORS)
def test_creators_and_caches(creator: str, kind: str, past: int, q_len: int, padding: str) -> None:
    masks = {}
    mask_2d = torch.ones(BATCH, past + q_len, dtype=torch.long)
    if padding == "left":
        mask_2d[1, :4] = mask_2d[2, :1] = 0
    elif padding == "right":
        mask_2d[1, -3:] = 0
    for attn_implementation in ("flashmask", "eager"):
        config = config_for(creator, attn_implementation)
        arguments: dict[str, Any] = {
            "config": config,
            "inputs_embeds": torch.zeros(BATCH, q_len, 4),
            "attention_mask": None if padding == "none" else mask_2d,
            "past_key_values": cache_with(kind, past, config),
        }
        masks[attn_implementation] = CREATORS[creator](**arguments)
    is_causal = not creator.startswith("bidirectional")
    expected, converted = masks["eager"], masks["flashmask"]
    if converted is None:
        # The attention function rebuilds this: the plain mask over keys that are the queries' own.
        assert creator in ("causal", "bidirectional")
        assert padding in ("none", "ones")
        assert past == 0
        converted = bounds.causal(q_len) if is_causal else bounds.bidirectional(q_len)
    elif _is_marked(converted):
        assert past == 0
        converted, is_token = _unmark(converted)
        assert torch.equal(is_token.expand(BATCH, -1), mask_2d.bool())
    assert converted.dtype == torch.int32
    visible = bounds.to_dense(converted, q_len)
    if expected is None:
        assert visible.all()
    else:
        expected = expected == 0
        assert torch.equal(visible.expand_as(expected), expected)


# (padding on the left, lengths of the documents, padding on the right) of each row of a batch of 14 tokens
PADDED_ROWS = [(0, [4, 1, 9], 0), (3, [11], 0), (2, [1, 5, 2], 4), (0, [7, 6], 1), (0, [14], 0)]


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("padding_position", [0, 1, 50])
@pytest.mark.parametrize("creator", ["causal", "sliding", "chunked"])
def test_documents_beside_padding(creator: str, padding_position: int, use_cache: bool) -> None:
    position_ids = torch.full((len(PADDED_ROWS), LENGTH), padding_position)
    mask_2d = torch.zeros(len(PADDED_ROWS), LENGTH, dtype=torch.long)
    expected = torch.zeros(len(PADDED_ROWS), LENGTH, LENGTH, dtype=torch.bool)
    for row, (start, lengths, _) in enumerate(PADDED_ROWS):
        for length in lengths:
            document = slice(start, start + length)
            position_ids[row, document] = torch.arange(length)
            mask_2d[row, document] = 1
            query, key = torch.arange(length)[:, None], torch.arange(length)
            visible = key <= query
            if creator == "sliding":
                visible &= query - key < WINDOW
            if creator == "chunked":
                visible &= query // WINDOW == key // WINDOW
            expected[row, document, document] = visible
            start += length
    config = config_for(creator, "flashmask")
    marked = CREATORS[creator](
        config=config,
        inputs_embeds=torch.zeros(len(PADDED_ROWS), LENGTH, 4),
        attention_mask=mask_2d,
        past_key_values=DynamicCache(config=config) if use_cache else None,
        position_ids=position_ids,
    )
    visible = bounds.to_dense(_unmark(marked)[0])[:, 0]
    tokens = mask_2d.bool()
    assert torch.equal(visible[tokens], expected[tokens])
    assert not visible.transpose(1, 2)[~tokens].any()


# Inside torch.compile


@pytest.mark.parametrize("creator", CREATORS)
def test_compiled_creators(creator: str) -> None:
    """Closures cannot be read there, and nothing may be read from the device."""
    config = config_for(creator, "flashmask")
    mask_2d = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    mask_2d[0, :3] = False
    position_ids = packed_positions()

    def create(embeddings: Tensor, mask_2d: Tensor | None, position_ids: Tensor | None) -> Tensor:
        return CREATORS[creator](
            config=config,
            inputs_embeds=embeddings,
            attention_mask=mask_2d,
            past_key_values=None,
            position_ids=position_ids,
        )

    compiled = torch.compile(create, fullgraph=True, backend="eager")
    for arguments in ((None, None), (mask_2d, None), (None, position_ids), (mask_2d, position_ids)):
        made, expected = (function(torch.zeros(BATCH, LENGTH, 4), *arguments) for function in (compiled, create))
        if expected is None:
            assert made is None
            continue
        assert torch.equal(*(bounds.to_dense(_unmark(mask)[0]).expand(BATCH, 1, -1, -1) for mask in (made, expected)))
    torch._dynamo.reset()


@pytest.mark.parametrize("creator", ["causal", "sliding", "chunked"])
def test_compiled_static_cache(creator: str) -> None:
    """A static cache keeps the offset of the queries on the device."""
    config = config_for(creator, "flashmask")
    mask_function = {
        "causal": masking_utils.causal_mask_function,
        "sliding": masking_utils.sliding_window_causal_mask_function(WINDOW),
        "chunked": masking_utils.chunked_causal_mask_function(WINDOW, torch.tensor([0, 2, 4])),
    }[creator]
    assert config.sliding_window == WINDOW

    def convert(q_offset: Tensor) -> Tensor:
        return from_mask_function(
            mask_function, batch_size=BATCH, q_len=2, kv_len=20, q_offset=q_offset, has_user_functions=False
        )

    compiled = torch.compile(convert, fullgraph=True, backend="eager")
    for q_offset in (0, 7, 18):
        expected = dense(mask_function, 2, 20, q_offset)
        assert torch.equal(bounds.to_dense(compiled(torch.tensor(q_offset)), 2).expand_as(expected), expected)
    torch._dynamo.reset()


def test_compiled_overlays_are_refused() -> None:
    ids = torch.tensor([[0, 0, 1, 1]])

    def convert(ids: Tensor) -> Tensor:
        overlay = masking_utils.blockwise_overlay(ids)
        mask_function = masking_utils.or_masks(masking_utils.causal_mask_function, overlay)
        return from_mask_function(mask_function, batch_size=1, q_len=4, kv_len=4, has_user_functions=False)

    compiled = torch.compile(convert, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="or_mask"):
        compiled(ids)
    torch._dynamo.reset()
