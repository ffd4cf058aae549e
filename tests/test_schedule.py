"""The schedule that the Triton kernels follow, against the dense mask."""

from __future__ import annotations

import pytest
import torch
from attention_checks import masks, random_intervals
from torch import Tensor

from flashmask_kernels.reference import visible_mask
from flashmask_kernels.schedule import build_schedule


def listed_tiles(schedule: Tensor) -> list[list[tuple[set[int], set[int]]]]:
    """Per mask and list: the cut tiles and the full tiles."""
    num_tiles = schedule.shape[-1] - 2
    result = []
    for mask in schedule.tolist():
        lists = []
        for num_cut, num_full, *tiles in mask:
            cut, full = tiles[:num_cut], tiles[num_tiles - num_full :]
            assert len(cut + full) == len(set(cut + full)) <= num_tiles
            lists.append((set(cut), set(full)))
        result.append(lists)
    return result


def check(bounds: Tensor, q_len: int, block_m: int, block_n: int) -> None:
    dense = visible_mask(bounds, q_len).flatten(0, 1)
    by_row = listed_tiles(build_schedule(bounds, q_len, block_m, block_n, by_column=False))
    by_column = listed_tiles(build_schedule(bounds, q_len, block_m, block_n, by_column=True))
    for mask, rows, columns in zip(dense, by_row, by_column):
        for row, (cut, full) in enumerate(rows):
            for column in range(len(columns)):
                tile = mask[row * block_m : (row + 1) * block_m, column * block_n : (column + 1) * block_n]
                assert (column in cut) == (row in columns[column][0])
                assert (column in full) == (row in columns[column][1])
                # A tile over the last key must be masked element by element.
                is_whole = tile.shape[1] == block_n
                assert column not in full or (tile.all() and is_whole)
                assert column in cut or column in full or not tile.any()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("q_len", "kv_len"), [(61, 61), (30, 75), (75, 30)])
def test_schedule_agrees_with_the_dense_mask(q_len: int, kv_len: int, device: str) -> None:
    for bounds in masks(q_len, kv_len).values():
        check(bounds.to(device), q_len, 16, 32)
    for planes in (1, 2, 4, 6):
        check(random_intervals(2, 2, planes, q_len, kv_len).to(device), q_len, 32, 16)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_easy_masks_visit_no_more_than_they_must(device: str) -> None:
    def visits(bounds: Tensor) -> tuple[int, int]:
        schedule = build_schedule(bounds.to(device), 128, 16, 16, by_column=False)[0]
        return int(schedule[:, 0].sum()), int(schedule[:, 1].sum())

    easy = masks(128, 128)
    assert visits(easy["full"]) == (0, 64)
    assert visits(easy["causal"]) == (8, 28)
    assert visits(easy["nothing"]) == (0, 0)
    documents = torch.arange(128) // 32 * 32
    assert visits(torch.stack([documents + 32, documents]).int()[None, None]) == (0, 16)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_columns_hidden_by_their_own_bounds_keep_no_tile_alive(device: str) -> None:
    """Half of the columns see nothing (UTE >= LTS), the others belong to a document that ended: nothing to visit."""
    lower_start, upper_end = torch.full((64,), 16), torch.zeros(64)
    lower_start[::2], upper_end[::2] = 50, 50
    schedule = build_schedule(torch.stack([lower_start, upper_end]).int()[None, None].to(device), 64, 16, 16, False)
    assert schedule[0, 1:, :2].sum() == 0
