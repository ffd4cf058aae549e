"""A mask as text."""

from __future__ import annotations

from torch import Tensor

from .cells import cells, fewest_planes_for_drawing

_HIDDEN, _PARTLY, _FULL = "·", "░▒▓", "█"


def to_text(bounds: Tensor, q_len: int | None = None, *, batch: int = 0, head: int = 0, max_size: int = 40) -> str:
    """The mask as text, one line for each query, two characters for each key.

    Masks longer than `max_size` are drawn in square tiles, shaded by how much of them is visible; a last line says so.

    Args:
        bounds: int32 `[B or 1, H or 1, C, S_k]`.
        q_len: number of query rows, S_k by default.
        batch, head: which mask to draw.
        max_size: most cells along a side; 40 fill a terminal of 80 columns.
    """
    occupancy, tile_size = cells(bounds, q_len, batch, head, max_size)
    lines = ["".join(2 * _shade(fraction) for fraction in row) for row in occupancy.tolist()]
    if tile_size > 1:
        lines.append(
            f"each cell {tile_size} x {tile_size} pairs: {_FULL} visible, {_PARTLY[::-1]} partly, {_HIDDEN} hidden"
        )
    fewest = fewest_planes_for_drawing(bounds, q_len)
    if fewest < bounds.shape[2]:
        lines.append(f"C = {bounds.shape[2]} planes; simplify(bounds, q_len) says the same with C = {fewest}")
    return "\n".join(lines)


def _shade(fraction: float) -> str:
    if fraction == 0:
        return _HIDDEN
    if fraction == 1:
        return _FULL
    return _PARTLY[int(fraction * len(_PARTLY))]
