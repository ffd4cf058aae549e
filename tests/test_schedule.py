"""The schedule that the Triton kernels follow, against the dense mask."""

from __future__ import annotations

import pytest
import torch
from attention_checks import masks, random_intervals
from torch import Tensor

from flashmask_kernels.reference import visible_mask
from flashmask_kernels.schedule import build_schedule, column_extrema


def listed_tiles(schedule: Tensor) -> list[list[tuple[set[int], set[int]]]]:
    """Per mask and list: the cut tiles and the full tiles."""

    def tiles_of(runs: list[int]) -> set[int]:
        tiles = [tile for first, end in zip(runs[0::2], runs[1::2]) for tile in range(first, end)]
        assert len(set(tiles)) == len(tiles) >= len(runs) // 2
        return set(tiles)

    result = []
    for mask in schedule.tolist():
        lists = []
        for num_cut, num_full, *runs in mask:
            assert num_cut + num_full <= len(runs) // 2
            lists.append((tiles_of(runs[: 2 * num_cut]), tiles_of(runs[len(runs) - 2 * num_full :])))
        result.append(lists)
    return result


def tile_kinds(mask: Tensor, block_m: int, block_n: int) -> list[list[str]]:
    """The kind of every tile by looking at all its elements. A tile over the last key must be masked element by
    element.
    """
    kinds = []
    for rows in mask.split(block_m):
        kinds.append([])
        for tile in rows.split(block_n, 1):
            is_full = tile.all() and tile.shape[1] == block_n
            kinds[-1].append("hidden" if not tile.any() else "full" if is_full else "cut")
    return kinds


def check(bounds: Tensor, q_len: int, block_m: int, block_n: int) -> None:
    extrema = column_extrema(bounds, block_n)
    by_row = listed_tiles(build_schedule(bounds, q_len, block_m, block_n, False, extrema))
    by_column = listed_tiles(build_schedule(bounds, q_len, block_m, block_n, True, extrema))
    for mask, rows, columns in zip(visible_mask(bounds, q_len).flatten(0, 1), by_row, by_column):
        for row, kinds in enumerate(tile_kinds(mask, block_m, block_n)):
            for column, kind in enumerate(kinds):
                assert (column in rows[row][0]) == (row in columns[column][0]) == (kind == "cut")
                assert (column in rows[row][1]) == (row in columns[column][1]) == (kind == "full")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("q_len", "kv_len"), [(61, 61), (30, 75), (75, 30)])
def test_schedule_agrees_with_the_dense_mask(q_len: int, kv_len: int, device: str) -> None:
    for bounds in masks(q_len, kv_len).values():
        check(bounds.to(device), q_len, 16, 32)
    for planes in (1, 2, 4, 6):
        check(random_intervals(2, 2, planes, q_len, kv_len).to(device), q_len, 32, 16)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("q_len", "kv_len"), [(2048, 64), (64, 2048), (75, 2041)])
def test_runs_over_several_chunks_of_tiles(q_len: int, kv_len: int, device: str) -> None:
    """Tiles are classified in chunks. Runs of 128 tiles cross their ends, or end there."""
    for name in ("full", "causal", "document"):
        check(masks(q_len, kv_len)[name].to(device), q_len, 16, 16)


def block_sparse(length: int, block: int, planes: int) -> Tensor:
    """Intervals that begin and end at multiples of `block`, so that several of them cover a tile together, or none."""
    bounds = torch.randint(0, length // block + 1, (1, 1, planes, length // block), dtype=torch.int32) * block
    return bounds.repeat_interleave(block, 3)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("planes", "length"), [(2, 192), (4, 192), (6, 192), (32, 96)])
def test_intervals_cover_a_tile_together(planes: int, length: int, device: str) -> None:
    check(block_sparse(length, 8, planes).to(device), length, 32, 16)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_columns_are_hidden_by_different_intervals(device: str) -> None:
    """The even columns belong to a document that ended, the odd ones are not yet to be seen: nothing to visit."""
    lts, ute = torch.full((64,), 16), torch.zeros(64)
    lts[1::2], ute[1::2] = 64, 64
    schedule = build_schedule(torch.stack([lts, ute]).int()[None, None].to(device), 64, 16, 16, False)
    assert schedule[0, 1:, :2].sum() == 0


@pytest.mark.gpu
def test_a_million_tokens() -> None:
    """The schedule takes a few bytes per key. A list of more runs than it holds is one cut run, which loses nothing."""
    length, document, stripe = 1 << 20, 1024, 128
    column = torch.arange(length, device="cuda")
    ends = (column // document + 1) * document
    bounds = ends.int().view(1, 1, 1, length)
    for by_column in (False, True):
        schedule = build_schedule(bounds, length, 64, 64, by_column)[0].tolist()
        assert sum(map(len, schedule)) <= 4 * length
        for tile, (num_cut, num_full, first, end, *runs) in enumerate(schedule):
            start = tile // 16 * 16
            others = [start, tile] if not by_column else [tile + 1, start + 16]
            has_full = others[0] < others[1]
            assert (num_cut, first, end, num_full) == (1, tile, tile + 1, has_full)
            assert not has_full or runs[-2:] == others
    stripes = torch.where(column // stripe % 2 == 0, 0, length).int().view(1, 1, 1, length)
    schedule = build_schedule(stripes, length, 64, 64, by_column=False)[0].tolist()
    assert schedule[2][:4] == [1, 0, 2, 3]
    num_cut, num_full, first, end, *_ = schedule[-1]
    assert (num_cut, num_full, end) == (1, 0, length // 64)
    assert 0 <= first <= 2
