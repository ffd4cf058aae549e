"""The cells of a drawing, and what a drawing says about the bounds besides."""

from __future__ import annotations

from torch import Tensor

from ..bounds import check_bounds, simplify, tile_occupancy


def select_mask_to_draw(bounds: Tensor, batch: int, head: int) -> Tensor:
    """The bounds of one batch row and head, `[1, 1, C, S_k]`."""
    check_bounds(bounds)
    for name, index, size in (("batch", batch, bounds.shape[0]), ("head", head, bounds.shape[1])):
        if not 0 <= index < size:
            raise IndexError(f"`{name}` is {index}, but the bounds have {size}, counted from 0")
    return bounds[batch, head][None, None]


def cells(bounds: Tensor, q_len: int | None, batch: int, head: int, max_size: int) -> tuple[Tensor, int]:
    """Visible fraction of each cell of the drawing, and how many pairs a cell is wide and high."""
    if max_size < 1:
        raise ValueError(f"`max_size` must be at least 1, got {max_size}")
    selected = select_mask_to_draw(bounds, batch, head)
    kv_len = bounds.shape[3]
    q_len = kv_len if q_len is None else q_len
    if q_len < 1 or kv_len < 1:
        raise ValueError(f"there is nothing to draw in a mask of {q_len} queries and {kv_len} keys")
    tile_size = max(1, -(-max(q_len, kv_len) // max_size))
    return tile_occupancy(selected, q_len, tile_size=tile_size)[0, 0], tile_size


def fewest_planes_for_drawing(bounds: Tensor, q_len: int | None) -> int:
    """C of the same mask after `simplify`; that of the bounds themselves up to 4, which costs little."""
    return bounds.shape[2] if bounds.shape[2] <= 4 else simplify(bounds, q_len).shape[2]
