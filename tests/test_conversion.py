"""Bounds of Transformers' mask functions against the dense masks that Transformers makes of the same functions."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from host_operations import HostOperations
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from transformers import DynamicCache, MistralConfig, PreTrainedConfig, StaticCache, masking_utils
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.moonshine_streaming import modeling_moonshine_streaming
from transformers.models.t5gemma2 import modeling_t5gemma2

import hf_flashmask  # noqa: F401  (registers the implementation)
from hf_flashmask import bounds
from hf_flashmask.integration import Mask, closures, conversion, flashmask_mask
from hf_flashmask.integration.closures import closure_holds_whole_rows
from hf_flashmask.integration.conversion import from_dense_mask, from_mask_function, from_mask_function_in_tree
from hf_flashmask.integration.mask import Tree

SINCE_5_13 = Version(transformers.__version__) >= Version("5.13")
HAS_BLOCKS = hasattr(masking_utils, "blockwise_overlay")  # since Transformers 5.9
CACHE = "cache" if "cache" in inspect.signature(masking_utils.create_causal_mask).parameters else "past_key_values"
needs_blocks = pytest.mark.skipif(not HAS_BLOCKS, reason="this version of Transformers has no blocks")
if SINCE_5_13:
    from transformers.models.nemotron_asr_streaming import modeling_nemotron_asr_streaming

BATCH, LENGTH, WINDOW = 3, 14, 5

moonshine_window = modeling_moonshine_streaming.sliding_window_mask_function


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


def visible_in(mask: Mask, q_len: int, kv_len: int) -> Tensor:
    """What the mask function returned, dense."""
    if mask.bounds is not None:
        return bounds.to_dense(mask.bounds, q_len)
    everything = torch.ones(1, 1, q_len, kv_len, dtype=torch.bool)
    return everything.tril() if mask.is_causal else everything


def random_ids(length: int, *, negative: bool) -> Tensor:
    """Runs of increasing ids `[BATCH, length]`; with `negative` some runs are -1."""
    ids = (torch.rand(BATCH, length) < 0.3).cumsum(-1)
    return torch.where(torch.rand(BATCH, int(ids.max()) + 1).gather(1, ids) < 0.4, -1, ids) if negative else ids


# Compositions


def tensors(total: int, values: st.SearchStrategy) -> st.SearchStrategy[Tensor]:
    """`[BATCH, total]`."""
    row = st.lists(values, min_size=total, max_size=total)
    return st.lists(row, min_size=BATCH, max_size=BATCH).map(torch.tensor)


def transformers_functions(total: int) -> st.SearchStrategy[Callable]:
    """Mask functions of Transformers, valid for indices below `total`."""
    sizes = st.integers(1, total)
    left_padding = st.lists(st.integers(0, 5), min_size=BATCH, max_size=BATCH).map(torch.tensor)
    leaves = [
        st.just(masking_utils.causal_mask_function),
        st.just(masking_utils.bidirectional_mask_function),
        st.builds(masking_utils.sliding_window_overlay, st.integers(0, total)),
        st.builds(masking_utils.sliding_window_bidirectional_overlay, st.integers(0, total)),
        st.builds(masking_utils.chunked_overlay, sizes, left_padding),
        st.builds(masking_utils.padding_mask_function, tensors(total, st.booleans())),
        st.builds(
            lambda starts: masking_utils.packed_sequence_mask_function(starts.cumsum(-1)), tensors(total, st.booleans())
        ),
        st.builds(modeling_gemma3._bidirectional_window_overlay, sizes),
        st.builds(modeling_t5gemma2.sliding_window_mask_function, sizes, st.booleans()),
        st.builds(moonshine_window, st.tuples(sizes, sizes)),
    ]
    if SINCE_5_13:
        chunked_limited = modeling_nemotron_asr_streaming.chunked_limited_mask_function
        leaves.append(st.builds(chunked_limited, st.integers(-1, 9), st.integers(0, 4)))
    if HAS_BLOCKS:
        leaves.append(st.builds(masking_utils.blockwise_overlay, tensors(total, st.integers(-1, 2))))
    return st.one_of(leaves)


def functions_of_users(total: int) -> st.SearchStrategy[Callable]:
    """What `or_mask_function` and `and_mask_function` may be: valid with scalars only, or of a constant result."""

    def looks_up(visible: Tensor) -> Callable:
        return lambda batch_idx, head_idx, q_idx, kv_idx: visible[batch_idx][(q_idx + kv_idx) % total]

    def any_of(offsets: list[int]) -> Callable:
        def mask_function(batch_idx: Tensor, head_idx: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return (q_idx - kv_idx == torch.tensor(offsets)).any() | (head_idx == 1)

        return mask_function

    return st.one_of(
        st.builds(lambda visible: lambda *_: torch.tensor(visible), st.booleans()),
        st.builds(looks_up, tensors(total, st.booleans())),
        st.builds(any_of, st.lists(st.integers(-total, total), min_size=1, max_size=4)),
        st.builds(
            lambda lengths: lambda batch_idx, head_idx, q_idx, kv_idx: kv_idx < torch.tensor(lengths)[batch_idx],
            st.lists(st.integers(0, total), min_size=BATCH, max_size=BATCH),
        ),
        st.builds(lambda function: functools.partial(function), transformers_functions(total)),
    )


def compositions(leaves: st.SearchStrategy[Callable]) -> st.SearchStrategy[Callable]:
    def join(parts: st.SearchStrategy[Callable]) -> st.SearchStrategy[Callable]:
        some = st.lists(parts, min_size=1, max_size=3)
        and_masks, or_masks = masking_utils.and_masks, masking_utils.or_masks
        return some.map(lambda masks: and_masks(*masks)) | some.map(lambda masks: or_masks(*masks))

    return st.recursive(leaves, join, max_leaves=6)


@pytest.mark.parametrize("has_user_functions", [False, True])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_random_compositions(has_user_functions: bool, data: st.DataObject) -> None:
    """The mask function does all that Transformers' `sdpa_mask` does."""
    q_length, kv_length = (data.draw(st.integers(1, 20)) for _ in range(2))
    q_offset, kv_offset = (data.draw(st.integers(0, 9) | st.just(0)) for _ in range(2))
    total = max(q_length + q_offset, kv_length + kv_offset)
    leaves = transformers_functions(total)
    if has_user_functions:
        leaves |= functions_of_users(total)
    arguments = {
        "batch_size": BATCH,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": torch.tensor(q_offset) if data.draw(st.booleans()) else q_offset,
        "kv_offset": kv_offset,
        "mask_function": data.draw(compositions(leaves)),
        "attention_mask": data.draw(st.none() | tensors(data.draw(st.integers(1, total)), st.booleans())),
        "allow_is_causal_skip": False,
        "use_vmap": has_user_functions,
    }
    expected = masking_utils.sdpa_mask(**arguments)
    made = visible_in(flashmask_mask(**arguments), q_length, kv_length)
    assert torch.equal(made.expand_as(expected), expected)


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
    ids, ends = masking_utils.find_packed_sequence_indices(position_ids), bounds.document_ends(position_ids)

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
            mask_function, document_ends=ends, batch_size=BATCH, q_len=LENGTH, kv_len=LENGTH, has_user_functions=False
        )
        assert torch.equal(bounds.to_dense(by_ids), dense(each_document_alone, LENGTH, LENGTH))


def test_too_many_intervals_name_the_function_and_the_key() -> None:
    def keys_of_even_rows(batch_idx: int, head_idx: int, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (q_idx % 2 == 0) | (kv_idx < 3)

    composed = masking_utils.and_masks(masking_utils.causal_mask_function, keys_of_even_rows)
    assert_same(composed, 35, 35)
    with pytest.raises(
        NotImplementedError, match=r"keys_of_even_rows.* of `.*test_conversion`: key column 3 .*needs 17 .*sdpa"
    ):
        from_mask_function(composed, batch_size=1, q_len=36, kv_len=36)


@pytest.mark.parametrize(
    ("factory", "ids"),
    [
        pytest.param("blockwise_overlay", [[0, 0, -1, 0]], marks=needs_blocks),
        ("packed_sequence_mask_function", [[0, 1, 0, 1]]),
        ("packed_sequence_mask_function", [[0, 0, -1, -1]]),
    ],
)
def test_ids_that_are_not_runs(factory: str, ids: list[list[int]]) -> None:
    mask_function = getattr(masking_utils, factory)(torch.tensor(ids * BATCH))
    for q_len, q_offset in ((4, 0), (1, 1)):
        assert_same(mask_function, q_len, 4, q_offset)


def test_known_functions_are_never_read_on_the_host() -> None:
    ids = packed_positions().eq(0).cumsum(-1)
    left_padding = torch.zeros(BATCH, dtype=torch.long)
    for mask_function in (
        masking_utils.sliding_window_causal_mask_function(WINDOW),
        masking_utils.chunked_causal_mask_function(WINDOW, left_padding),
        masking_utils.sliding_window_bidirectional_mask_function(WINDOW),
        masking_utils.and_masks(
            masking_utils.packed_sequence_mask_function(ids), masking_utils.sliding_window_causal_mask_function(WINDOW)
        ),
    ):
        for document_ends in (None, bounds.document_ends(packed_positions())):
            with HostOperations() as operations:
                from_mask_function(
                    mask_function,
                    document_ends=document_ends,
                    batch_size=BATCH,
                    q_len=LENGTH,
                    kv_len=LENGTH,
                    has_user_functions=False,
                )
            assert operations.reads == 0


def test_evaluation_takes_little_memory_and_few_reads() -> None:
    def images_of_every_length(batch_idx: Tensor, head_idx: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (q_idx // 1000 == kv_idx // 1000) & (kv_idx % 1000 > 900) & (q_idx % 1000 > 900)

    length = 8192
    mask_function = masking_utils.or_masks(masking_utils.causal_mask_function, images_of_every_length)
    with HostOperations() as operations:
        made = from_mask_function(mask_function, batch_size=4, q_len=length, kv_len=length)
    assert made.shape == (1, 1, 2, length)  # no row of the batch differs
    assert operations.largest < length**2 // 8
    assert operations.reads <= 4
    position = torch.arange(length)
    first_of_image = position // 1000 * 1000 + 901
    assert torch.equal(made[0, 0, 1].long(), torch.where(position >= first_of_image, first_of_image, position))
    assert (made[0, 0, 0] == length).all()

    with HostOperations() as operations:
        from_mask_function(mask_function, batch_size=4, q_len=1, kv_len=length, q_offset=torch.tensor(5000))
    assert operations.reads == 0  # a decoding step


# Dense masks


@pytest.mark.parametrize("hidden", [None, -1e4, float("-inf"), torch.finfo(torch.float32).min])
@pytest.mark.parametrize("shape", [(1, 1), (BATCH, 1), (BATCH, 2)])
@pytest.mark.parametrize("is_one_row", [False, True])
def test_dense_masks(is_one_row: bool, shape: tuple[int, int], hidden: float | None) -> None:
    """bool, or added to the scores."""
    visible = torch.rand(*shape, 1 if is_one_row else 9, LENGTH) < 0.5
    visible[0, 0, 0, 3:] = False
    mask = visible if hidden is None else torch.zeros(visible.shape).masked_fill(~visible, hidden)
    made = from_dense_mask(mask.transpose(2, 3).contiguous().transpose(2, 3), 9)
    assert torch.equal(bounds.to_dense(made, 9), visible.expand(-1, -1, 9, -1))


def test_dense_masks_that_are_refused() -> None:
    stripes = (torch.arange(36) % 2 == 0)[None, None, :, None].expand(1, 1, 36, 36)
    with pytest.raises(NotImplementedError, match=r"`attention_mask`.*key column 0 .*needs 18 .*sdpa"):
        from_dense_mask(stripes, 36)
    for bias in (0.5, -3.0, float("nan")):
        with pytest.raises(NotImplementedError, match=r"cannot add a bias.*`attention_mask`.*sdpa"):
            from_dense_mask(torch.zeros(1, 1, 4, 4).index_fill(3, torch.tensor([2]), bias), 4)
    with pytest.raises(Exception, match=r"`attention_mask`.*before with hf_flashmask\.bounds\.from_dense"):
        torch.compile(from_dense_mask, backend="eager", fullgraph=True)(torch.zeros(1, 1, 4, 4), 4)
    torch._dynamo.reset()


# Every creator of Transformers, with every cache


CREATORS = {
    "causal": masking_utils.create_causal_mask,
    "sliding": masking_utils.create_sliding_window_causal_mask,
    "chunked": masking_utils.create_chunked_causal_mask,
    "bidirectional": masking_utils.create_bidirectional_mask,
    "bidirectional_sliding": masking_utils.create_bidirectional_sliding_window_mask,
    "hybrid": masking_utils.create_masks_for_generate,
}


def takes(creator: str, argument: str) -> bool:
    """Blocks came with Transformers 5.9, in chunks with 5.20."""
    return argument in inspect.signature(CREATORS[creator]).parameters


def config_for(creator: str, attn_implementation: str) -> PreTrainedConfig:
    config = MistralConfig(
        num_hidden_layers=2 if creator == "hybrid" else 1, sliding_window=WINDOW if "sliding" in creator else None
    )
    config.sliding_window = WINDOW
    config.attention_chunk_size = WINDOW
    if creator == "causal":
        config.layer_types = ["full_attention"]
    elif creator in ("sliding", "chunked"):
        config.layer_types = [f"{creator}_attention"]
    elif creator == "hybrid":
        config.layer_types = ["sliding_attention", "full_attention"]
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
            for layer in range(config.num_hidden_layers):
                cache.update(states, states, layer)
    return cache


@pytest.mark.parametrize("kind", ["none", "dynamic", "static"])
@pytest.mark.parametrize("creator", CREATORS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_creators_and_caches(creator: str, kind: str, data: st.DataObject) -> None:
    """With overlays, and padding anywhere. Caches of sliding and chunked layers keep less than they have seen."""
    past = 0 if kind == "none" else data.draw(st.integers(0, 11))
    q_len = data.draw(st.integers(1, 9))
    padding = data.draw(st.sampled_from(["none", "ones", "left", "right", "anywhere"]))
    mask_2d = torch.ones(BATCH, past + q_len, dtype=torch.long)
    if padding == "left":
        mask_2d[1, :4] = mask_2d[2, :1] = 0
    elif padding == "right":
        mask_2d[1, -3:] = 0
    elif padding == "anywhere":
        mask_2d = data.draw(tensors(past + q_len, st.integers(0, 1)))
    overlays: dict[str, Any] = {}
    if data.draw(st.booleans()):
        for name in ("or_mask_function", "and_mask_function"):
            overlays[name] = data.draw(st.none() | compositions(transformers_functions(20) | functions_of_users(20)))
        if takes(creator, "block_sequence_ids"):
            overlays["block_sequence_ids"] = data.draw(st.none() | tensors(past + q_len, st.integers(-1, 2)))
    masks = {}
    for attn_implementation in ("flashmask", "eager"):
        config = config_for(creator, attn_implementation)
        masks[attn_implementation] = CREATORS[creator](
            config=config,
            inputs_embeds=torch.zeros(BATCH, q_len, 4),
            attention_mask=None if padding == "none" else mask_2d,
            **{CACHE: cache_with(kind, past, config)},
            **overlays,
        )
    if creator == "hybrid":
        assert set(masks["flashmask"]) == {"full_attention", "sliding_attention"}
        pairs = [(masks["flashmask"][layer_type], expected) for layer_type, expected in masks["eager"].items()]
    else:
        pairs = [(masks["flashmask"], masks["eager"])]
    for converted, expected in pairs:
        if converted.is_token is not None and converted.shape[-1] == past + q_len:
            assert torch.equal(converted.is_token.expand(BATCH, -1), mask_2d.bool())
        # A cache of sliding layers has fewer keys than there were tokens.
        visible = visible_in(converted, q_len, past + q_len if expected is None else expected.shape[-1])
        assert visible.all() if expected is None else torch.equal(visible.expand_as(expected), expected == 0)


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
    mask = CREATORS[creator](
        config=config,
        inputs_embeds=torch.zeros(len(PADDED_ROWS), LENGTH, 4),
        attention_mask=mask_2d,
        **{CACHE: DynamicCache(config=config) if use_cache else None},
        position_ids=position_ids,
    )
    visible = bounds.to_dense(mask.bounds)[:, 0]
    tokens = mask_2d.bool()
    assert torch.equal(visible[tokens], expected[tokens])
    assert not visible.transpose(1, 2)[~tokens].any()


# Overlays in packed rows


def gemma3(layer_type: str) -> Callable:
    def create(token_types: Tensor, **arguments: Any) -> Tensor:
        block_ids = modeling_gemma3.get_block_sequence_ids_for_mask(token_types)
        return modeling_gemma3.create_masks_for_vision_model(block_sequence_ids=block_ids, **arguments)[layer_type]

    return create


def image_ids(token_types: Tensor) -> Tensor:
    """A number for each run of 1, and -1 elsewhere."""
    starts = torch.diff(token_types, prepend=torch.zeros_like(token_types[:, :1])) == 1
    return torch.where(token_types == 1, starts.cumsum(-1), -1)


def gemma3_before_blocks(token_types: Tensor, **arguments: Any) -> Tensor:
    """Transformers 5.4 lets the tokens of an image see each other like this."""
    block_ids = image_ids(token_types)

    def same_image(batch_idx: Tensor, head_idx: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        q_idx, kv_idx = (torch.where(index < block_ids.shape[1], index, 0) for index in (q_idx, kv_idx))
        q_block, kv_block = block_ids[batch_idx, q_idx], block_ids[batch_idx][kv_idx]
        return (q_block == kv_block) & (q_block >= 0)

    return masking_utils.create_causal_mask(or_mask_function=same_image, **arguments)


def blocks_of(token_type: int) -> Callable:
    """PaliGemma's prefixes, hrm_text's prompts and all images of Molmo2 are block 0."""

    def create(token_types: Tensor, **arguments: Any) -> Tensor:
        block_ids = torch.where(token_types == token_type, 0, -1)
        return masking_utils.create_causal_mask(block_sequence_ids=block_ids, **arguments)

    return create


def next_to_type_1(token_types: Tensor, **arguments: Any) -> Tensor:
    def mask_function(batch_idx: Tensor, head_idx: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        before, after = torch.clamp(kv_idx - 1, min=0), torch.clamp(kv_idx + 1, max=token_types.shape[1] - 1)
        return ((token_types[batch_idx, before] | token_types[batch_idx, after]) == 1) | (q_idx == kv_idx)

    return masking_utils.create_causal_mask(and_mask_function=mask_function, **arguments)


def table_of_distances(token_types: Tensor, **arguments: Any) -> Tensor:
    is_visible = torch.arange(50) % 3 == 0

    def mask_function(batch_idx: Tensor, head_idx: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return is_visible[(q_idx - kv_idx).abs()]

    return masking_utils.create_causal_mask(or_mask_function=mask_function, **arguments)


def llama4_with_images(token_types: Tensor, **arguments: Any) -> Tensor:
    return masking_utils.create_chunked_causal_mask(
        or_mask_function=masking_utils.blockwise_overlay(image_ids(token_types)), **arguments
    )


OVERLAYS = {
    "gemma3_before_blocks": gemma3_before_blocks,
    "next_to_type_1": next_to_type_1,
    "distances": table_of_distances,
}
if HAS_BLOCKS:
    OVERLAYS |= {"paligemma": blocks_of(0), "molmo2": blocks_of(1), "chunks_with_images": llama4_with_images}
if SINCE_5_13:
    OVERLAYS |= {"gemma3": gemma3("full_attention"), "gemma3_sliding": gemma3("sliding_attention")}


@pytest.mark.parametrize("name", OVERLAYS)
@settings(max_examples=15, deadline=None)
@given(first_position=st.integers(0, 1), data=st.data())
def test_overlays_in_packed_rows(name: str, first_position: int, data: st.DataObject) -> None:
    """Each document sees what Transformers shows it alone."""
    length = 18
    borders = data.draw(st.lists(st.sets(st.integers(1, length - 1), max_size=4), min_size=2, max_size=2))
    token_types = torch.tensor(
        data.draw(st.lists(st.lists(st.integers(0, 1), min_size=length, max_size=length), min_size=2, max_size=2))
    )
    config = {implementation: config_for("chunked", implementation) for implementation in ("flashmask", "sdpa")}

    def create(implementation: str, token_types: Tensor, position_ids: Tensor) -> Tensor:
        return OVERLAYS[name](
            token_types=token_types,
            config=config[implementation],
            inputs_embeds=torch.zeros(*token_types.shape, 4),
            attention_mask=None,
            **{CACHE: None},
            position_ids=position_ids,
        )

    expected = torch.zeros(2, 1, length, length, dtype=torch.bool)
    position_ids = torch.zeros(2, length, dtype=torch.long)
    for row, inner in enumerate(borders):
        edges = [0, *sorted(inner), length]
        for start, end in itertools.pairwise(edges):
            positions = torch.arange(end - start)
            position_ids[row, start:end] = positions + first_position
            alone = create("sdpa", token_types[row : row + 1, start:end], positions[None])
            expected[row, :, start:end, start:end] = (
                torch.ones(len(positions), len(positions)).tril() if alone is None else alone
            )
    made = visible_in(create("flashmask", token_types, position_ids), length, length)
    assert torch.equal(made.expand_as(expected), expected)


# Inside torch.compile


@pytest.mark.parametrize("creator", CREATORS)
def test_compiled_creators(creator: str) -> None:
    """Closures cannot be read there, nothing may be read from the device, and new lengths compile nothing."""
    config = config_for(creator, "flashmask")
    takes_positions = takes(creator, "position_ids") or takes(creator, "kwargs")

    def create(embeddings: Tensor, mask_2d: Tensor | None, position_ids: Tensor | None) -> dict[str, Tensor | None]:
        masks = CREATORS[creator](
            config=config,
            inputs_embeds=embeddings,
            attention_mask=mask_2d,
            **{CACHE: None},
            **({"position_ids": position_ids} if takes_positions else {}),
        )
        return masks if creator == "hybrid" else {creator: masks}

    for is_packed in (False, True):
        counter = CompileCounter()
        compiled = torch.compile(create, fullgraph=True, backend=counter)
        graphs = []
        for length in (LENGTH, 20, 300):
            mask_2d = torch.ones(BATCH, length, dtype=torch.bool)
            mask_2d[0, :3] = mask_2d[1, -2:] = False
            positions = torch.arange(length)
            borders = (torch.rand(BATCH, length) < 0.03) | (positions == length // 2)
            position_ids = positions - torch.where(borders, positions, 0).cummax(-1).values
            arguments = (
                torch.zeros(BATCH, length, 4),
                mask_2d,
                position_ids if is_packed else None,
            )
            made, expected = compiled(*arguments), create(*arguments)
            graphs.append(counter.frame_count)
            assert made.keys() == expected.keys()
            for name in made:
                visible = [visible_in(each[name], length, length) for each in (made, expected)]
                assert torch.equal(*(each.expand(BATCH, 1, length, length) for each in visible))
        assert graphs[-1] == graphs[1]
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


@needs_blocks
def test_compiled_overlays() -> None:
    """They are read outside of the graph; with `fullgraph=True` the error says so."""
    ids = torch.tensor([[0, 0, 1, 1, -1, -1, 2, 2, 2]])

    def convert(ids: Tensor) -> Tensor:
        overlay = masking_utils.blockwise_overlay(ids)
        mask_function = masking_utils.or_masks(masking_utils.causal_mask_function, overlay)
        return from_mask_function(mask_function, batch_size=1, q_len=9, kv_len=9, has_user_functions=False) + 0

    assert torch.equal(torch.compile(convert, backend="eager")(ids), convert(ids))
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"image blocks.*compile without fullgraph=True"):
        torch.compile(convert, fullgraph=True, backend="eager")(ids)
    torch._dynamo.reset()


def test_what_a_prefix_tree_cannot_hold_is_named() -> None:
    tree = Tree(bounds.from_prefix_tree([-1, 0], [2, 2]), torch.arange(4)[None])
    assert torch.equal(from_mask_function_in_tree(masking_utils.causal_mask_function, tree), tree.bounds)
    with pytest.raises(NotImplementedError, match=r"bidirectional_mask_function.*must be causal"):
        from_mask_function_in_tree(masking_utils.bidirectional_mask_function, tree)
    for factory in ["packed_sequence_mask_function"] + ["blockwise_overlay"] * HAS_BLOCKS:
        overlay = getattr(masking_utils, factory)(torch.zeros(1, 4, dtype=torch.long))
        with pytest.raises(NotImplementedError, match=r"or_mask.*must be causal"):
            from_mask_function_in_tree(masking_utils.or_masks(masking_utils.causal_mask_function, overlay), tree)
        with pytest.raises(NotImplementedError, match=rf"{factory}.*windows and chunks only"):
            from_mask_function_in_tree(masking_utils.and_masks(masking_utils.causal_mask_function, overlay), tree)


# Another version of Transformers


OTHERWISE = {
    "and_masks": ("result & ", "result | "),
    "or_masks": ("result | mask", "result & mask"),
    "sliding_window_overlay": ("kv_idx > q_idx", "kv_idx >= q_idx"),
    "sliding_window_bidirectional_overlay": ("<= sliding_window", "< sliding_window"),
    "chunked_overlay": ("q_idx - left_padding[batch_idx]", "q_idx - left_padding[batch_idx] * 0"),
    "blockwise_overlay": (" & (q_group >= 0)", ""),
    "packed_sequence_mask_function": (
        "packed_sequence_mask[batch_idx, q_idx] ==",
        "packed_sequence_mask[batch_idx, q_idx] >=",
    ),
    "remap_positions_for_packed_sequence": ("position_ids[batch_idx, kv_idx])", "position_ids[batch_idx, kv_idx] - 1)"),
}


def count_otherwise(factory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another version of `transformers.masking_utils` might have under this name."""
    before, after = OTHERWISE[factory]
    source = inspect.getsource(getattr(masking_utils, factory))
    assert before in source
    namespace = dict(vars(masking_utils))
    exec(source.replace(before, after), namespace)
    monkeypatch.setattr(masking_utils, factory, namespace[factory])


def function_with(factory: str) -> Callable:
    """A mask with something of the factory's, in a row with the documents `[0, 5)`, `[5, 9)` and `[9, 14)`."""
    ids = torch.tensor([[0] * 5 + [1] * 4 + [2] * 5]).expand(BATCH, -1)
    position_ids = torch.arange(LENGTH) - torch.tensor([0, 5, 9])[ids]
    functions = {
        "and_masks": lambda: masking_utils.and_masks(
            masking_utils.bidirectional_mask_function, masking_utils.causal_mask_function
        ),
        "or_masks": lambda: masking_utils.or_masks(
            masking_utils.bidirectional_mask_function, masking_utils.causal_mask_function
        ),
        "sliding_window_overlay": lambda: masking_utils.sliding_window_causal_mask_function(4),
        "sliding_window_bidirectional_overlay": lambda: masking_utils.sliding_window_bidirectional_mask_function(4),
        "chunked_overlay": lambda: masking_utils.chunked_causal_mask_function(4, torch.tensor([0, 1, 2])),
        "blockwise_overlay": lambda: masking_utils.or_masks(
            masking_utils.causal_mask_function, masking_utils.blockwise_overlay(ids - 1)
        ),
        "packed_sequence_mask_function": lambda: masking_utils.and_masks(
            masking_utils.causal_mask_function, masking_utils.packed_sequence_mask_function(ids)
        ),
        "remap_positions_for_packed_sequence": lambda: masking_utils.and_masks(
            masking_utils.packed_sequence_mask_function(ids),
            masking_utils.remap_positions_for_packed_sequence(
                masking_utils.chunked_causal_mask_function(2, torch.zeros(BATCH, dtype=torch.long)), position_ids
            ),
        ),
    }
    return functions[factory]()


@pytest.mark.parametrize("factory", [name for name in OTHERWISE if hasattr(masking_utils, name)])
def test_a_factory_that_counts_otherwise_is_evaluated(
    factory: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usual = dense(function_with(factory), LENGTH, LENGTH)
    monkeypatch.setattr(closures, "_is_correct", {})
    closures.logger.warning_once.cache_clear()
    transformers.logging.enable_propagation()
    count_otherwise(factory, monkeypatch)
    assert not torch.equal(dense(function_with(factory), LENGTH, LENGTH), usual)
    for _ in range(2):
        assert_same(function_with(factory), LENGTH, LENGTH)
    warning = f"masking_utils.{factory}` of transformers {transformers.__version__} makes other masks than"
    assert caplog.text.count(warning) == 1


def test_the_factories_of_this_version_are_read(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    closures.logger.warning_once.cache_clear()
    transformers.logging.enable_propagation()
    monkeypatch.setattr(closures, "_is_correct", {})
    closures.check_factories()
    assert not caplog.text
    evaluated = []
    monkeypatch.setattr(conversion, "evaluate", lambda *args: evaluated.append(args) or iter(()))
    for factory in OTHERWISE:
        if hasattr(masking_utils, factory):
            from_mask_function(function_with(factory), batch_size=BATCH, q_len=LENGTH, kv_len=LENGTH)
    assert not evaluated


def test_prefix_trees_refuse_a_window_that_counts_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closures, "_is_correct", {})
    count_otherwise("sliding_window_overlay", monkeypatch)
    tree = Tree(bounds.causal(6), torch.arange(6)[None])
    with pytest.raises(NotImplementedError, match=r"sliding_window_overlay.*prefix trees hold windows and chunks only"):
        from_mask_function_in_tree(masking_utils.sliding_window_causal_mask_function(3), tree)


def test_what_counts_otherwise_is_searched_for_in_a_compiled_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closures, "_is_correct", {})
    count_otherwise("sliding_window_overlay", monkeypatch)
    torch._dynamo.reset()

    def make(tokens: Tensor) -> Tensor:
        function = masking_utils.sliding_window_causal_mask_function(4)
        length = tokens.shape[1]
        return from_mask_function(
            function, batch_size=1, q_len=length, kv_len=length, device=tokens.device, has_user_functions=False
        )

    made = torch.compile(make, fullgraph=True, backend="eager")(torch.zeros(1, LENGTH))
    expected = dense(masking_utils.sliding_window_causal_mask_function(4), LENGTH, LENGTH)
    assert torch.equal(bounds.to_dense(made, LENGTH).expand_as(expected), expected)


# Tokens of a part of a sequence


def test_what_mask_functions_look_up() -> None:
    """Functions of users may look up what nobody sees."""
    ids = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    window, causal = masking_utils.sliding_window_overlay(WINDOW), masking_utils.causal_mask_function
    packed = masking_utils.packed_sequence_mask_function(ids)
    assert closure_holds_whole_rows(masking_utils.and_masks(window, causal), None)
    in_window = masking_utils.or_masks(masking_utils.and_masks(packed, window), causal)
    assert [closure_holds_whole_rows(in_window, length) for length in (LENGTH, LENGTH + 1, None)] == [
        True,
        False,
        False,
    ]
    assert not closure_holds_whole_rows(
        masking_utils.or_masks(causal, lambda b, h, q, k: ids[b, q] == ids[b, k]), LENGTH
    )
    assert not closure_holds_whole_rows(masking_utils.or_masks(causal, functools.partial(causal)), LENGTH)
