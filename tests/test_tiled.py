"""The plain torch path against dense attention."""

from __future__ import annotations

import pytest
import torch
from attention_checks import (
    NOT_FINITE,
    assert_documents_are_alone,
    assert_hides_what_is_not_finite,
    assert_matches_reference,
    masks,
    model_tensor,
    random_intervals,
)
from fuzz_attention import run_case

from flashmask_kernels import flashmask_attention, tiled
from flashmask_kernels.reference import visible_mask


def attend(query, key, value, bounds, **options):
    return flashmask_attention(query, key, value, bounds, return_lse=True, **options)


@pytest.fixture(params=[16, 128])
def _block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles and short runs make many of both out of a short sequence."""
    monkeypatch.setattr(tiled, "BLOCK", request.param)
    monkeypatch.setattr(tiled, "MAX_SCORES", 4 * request.param**2)


@pytest.mark.usefixtures("_block")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mask", masks(8, 8))
def test_masks(mask: str, dtype: torch.dtype) -> None:
    q_len = kv_len = 301
    query, key, value = (model_tensor(2, q_len, heads, 32, dtype, "cpu") for heads in (4, 2, 2))
    assert_matches_reference(attend, query, key, value, masks(q_len, kv_len)[mask])


@pytest.mark.usefixtures("_block")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("q_len", "kv_len", "dim", "dim_v", "heads", "kv_heads", "bounds_shape"),
    [
        (133, 270, 24, 16, 4, 2, (2, 2, 1)),
        (270, 133, 8, 40, 3, 1, (1, 3, 2)),
        (1, 137, 16, 300, 2, 2, (2, 1, 4)),
        (147, 147, 20, 12, 6, 3, (1, 6, 6)),
        (65, 64, 512, 8, 7, 1, (2, 1, 32)),
    ],
)
def test_shapes(dtype, q_len, kv_len, dim, dim_v, heads, kv_heads, bounds_shape) -> None:
    query = model_tensor(2, q_len, heads, dim, dtype, "cpu")
    key, value = (model_tensor(2, kv_len, kv_heads, size, dtype, "cpu") for size in (dim, dim_v))
    assert_matches_reference(attend, query, key, value, random_intervals(*bounds_shape, q_len, kv_len))


@pytest.mark.usefixtures("_block")
@pytest.mark.parametrize(("softcap", "has_sinks"), [(2.0, False), (None, True), (2.0, True)])
def test_softcap_and_sinks(softcap: float | None, has_sinks: bool) -> None:
    query, key, value = (model_tensor(2, 145, heads, 16, torch.float32, "cpu") for heads in (4, 2, 2))
    sinks = torch.randn(4) if has_sinks else None
    assert_matches_reference(attend, query, key, value, random_intervals(1, 4, 2, 145, 145), softcap, sinks)


@pytest.mark.usefixtures("_block")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bad", NOT_FINITE)
@pytest.mark.parametrize("mask", ["causal_document", "document", "sliding_window", "window_in_documents"])
def test_hidden_nan(mask: str, bad: float, dtype: torch.dtype) -> None:
    assert_hides_what_is_not_finite(attend, bad, dtype, 16, masks(301, 301)[mask])


def test_hidden_nan_with_softcap_and_sinks() -> None:
    bounds = masks(301, 301)["sliding_window"]
    assert_hides_what_is_not_finite(attend, float("nan"), torch.float32, 16, bounds, softcap=2.0, sinks=torch.randn(2))


@pytest.mark.parametrize("bad", NOT_FINITE)
def test_document_of_nan(bad: float) -> None:
    query, key, value, d_out = (model_tensor(1, 400, heads, 16, torch.float32, "cpu") for heads in (4, 2, 2, 4))
    for tensor in (query, key, value, d_out):
        tensor[:, :, 121:253] = bad
    bounds = torch.tensor([121] * 121 + [253] * 132 + [400] * 147, dtype=torch.int32)[None, None, None]
    assert_documents_are_alone(attend, query, key, value, d_out, bounds, [(0, 121), (253, 400)])


@pytest.mark.parametrize("planes", [1, 2, 4, 10])
@pytest.mark.parametrize(("q_len", "kv_len"), [(97, 97), (40, 97), (97, 40)])
def test_tile_kinds(planes: int, q_len: int, kv_len: int) -> None:
    """A tile is hidden when no element of it is visible, full when all are."""
    in_blocks = random_intervals(1, 1, planes, q_len, kv_len) // 16 * 16
    for bounds in (random_intervals(1, 1, planes, q_len, kv_len), in_blocks, *masks(q_len, kv_len).values()):
        dense = visible_mask(bounds, q_len)[0, 0]
        hidden, cut = tiled.classify_tiles(bounds[0, 0], q_len, 16, 32)
        for row, rows in enumerate(dense.split(16)):
            for column, tile in enumerate(rows.split(32, 1)):
                assert hidden[row, column] == (not tile.any())
                assert cut[row, column] == (bool(tile.any()) and not tile.all())


def test_packed_rows_skip_hidden_tiles() -> None:
    """Eight documents leave an eighth of the causal tiles, give or take the tiles that their boundaries cut."""
    length, documents = 8192, 8
    ends = (torch.arange(length) // (length // documents) + 1) * (length // documents)
    hidden, _ = tiled.classify_tiles(ends.to(torch.int32)[None], length, 128, 128)
    assert (~hidden).float().mean() == pytest.approx(1 / documents * (1 + 1 / 8) / 2, rel=0.01)


@pytest.mark.parametrize("first", [0, 20, 40])
def test_random_calls(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of up to four tiles and a rest, in runs shorter than they."""
    monkeypatch.setattr(tiled, "MAX_SCORES", 1 << 18)
    for number in range(first, first + 20):
        run_case(number, "cpu")
