"""Draw a mask from its bounds, as text or with matplotlib, at any length: long masks are drawn tile by tile."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..bounds import check_bounds, tile_occupancy, visible_pairs

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot", "to_text"]

_HIDDEN, _PARTLY, _FULL = "·", "░▒▓", "█"
_COLORS = ("#eceff1", "#08519c")  # hidden, visible; cut tiles between them. Apart in lightness, so for every eye.
_LARGEST_GRID = 40


def to_text(bounds: Tensor, q_len: int | None = None, *, batch: int = 0, head: int = 0, max_size: int = 40) -> str:
    """The mask as text, one line for each query, two characters for each key.

    Masks longer than `max_size` are drawn in square tiles, shaded by how much of them is visible; a last line says so.

    Args:
        bounds: int32 `[B or 1, H or 1, C, S_k]`.
        q_len: number of query rows, S_k by default.
        batch, head: which mask to draw.
        max_size: most cells along a side; 40 fill a terminal of 80 columns.
    """
    occupancy, tile_size = _cells(bounds, q_len, batch, head, max_size)
    lines = ["".join(2 * _shade(fraction) for fraction in row) for row in occupancy.tolist()]
    if tile_size > 1:
        lines.append(
            f"each cell {tile_size} x {tile_size} pairs: {_FULL} visible, {_PARTLY[::-1]} partly, {_HIDDEN} hidden"
        )
    return "\n".join(lines)


def plot(
    bounds: Tensor,
    q_len: int | None = None,
    *,
    batch: int = 0,
    head: int = 0,
    ax: Axes | None = None,
    title: str | None = None,
    max_size: int = 512,
) -> Axes:
    """The mask as a picture: queries downwards, keys to the right, dark = visible. Needs matplotlib.

    Masks longer than `max_size` are drawn in square tiles, the darker the more of a tile is visible.

    Args:
        bounds: int32 `[B or 1, H or 1, C, S_k]`.
        q_len: number of query rows, S_k by default.
        batch, head: which mask to draw.
        ax: axes to draw on; a new figure by default.
        title: text above the picture, beside the share of visible pairs.
        max_size: most cells along a side.

    Returns:
        The axes; `.figure.savefig(path)` writes the picture.
    """
    try:
        from matplotlib import pyplot
        from matplotlib.colors import LinearSegmentedColormap
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError(
            "plot() needs matplotlib: pip install 'hf-flashmask[viz]'. to_text() draws without it"
        ) from error

    occupancy, tile_size = _cells(bounds, q_len, batch, head, max_size)
    kv_len = bounds.shape[3]
    q_len = kv_len if q_len is None else q_len
    rows, columns = occupancy.shape
    if ax is None:
        _, ax = pyplot.subplots(figsize=(4.5, 4.5), layout="constrained")
    ax.imshow(
        occupancy.cpu().numpy(),
        cmap=LinearSegmentedColormap.from_list("bounds", _COLORS),
        vmin=0,
        vmax=1,
        interpolation="nearest",
        extent=(0, columns * tile_size, rows * tile_size, 0),
    )
    ax.set_xlim(0, kv_len)
    ax.set_ylim(q_len, 0)
    if max(q_len, kv_len) <= _LARGEST_GRID:
        ax.hlines(range(1, q_len), 0, kv_len, color="white", linewidth=0.8)
        ax.vlines(range(1, kv_len), 0, q_len, color="white", linewidth=0.8)
    for axis, name in ((ax.xaxis, "key"), (ax.yaxis, "query")):
        axis.set_major_locator(MaxNLocator(nbins=5, integer=True, steps=[1, 2, 4, 5, 8, 10]))
        axis.set_label_text(name)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0, colors="#546e7a")
    share = visible_pairs(_select(bounds, batch, head), q_len).item() / (q_len * kv_len)
    ax.set_title(f"{share:.1%} visible", loc="right", fontsize="small", color="#546e7a")
    if title is not None:
        ax.set_title(title, loc="left")
    return ax


def _select(bounds: Tensor, batch: int, head: int) -> Tensor:
    """The bounds of one batch row and head, `[1, 1, C, S_k]`."""
    check_bounds(bounds)
    for name, index, size in (("batch", batch, bounds.shape[0]), ("head", head, bounds.shape[1])):
        if not 0 <= index < size:
            raise IndexError(f"`{name}` is {index}, but the bounds have {size}")
    return bounds[batch, head][None, None]


def _cells(bounds: Tensor, q_len: int | None, batch: int, head: int, max_size: int) -> tuple[Tensor, int]:
    """Visible fraction of each cell of the drawing, and how many pairs a cell is wide and high."""
    if max_size < 1:
        raise ValueError(f"`max_size` must be at least 1, got {max_size}")
    selected = _select(bounds, batch, head)
    kv_len = bounds.shape[3]
    q_len = kv_len if q_len is None else q_len
    if q_len < 1 or kv_len < 1:
        raise ValueError(f"there is nothing to draw in a mask of {q_len} queries and {kv_len} keys")
    tile_size = max(1, -(-max(q_len, kv_len) // max_size))
    return tile_occupancy(selected, q_len, tile_size=tile_size)[0, 0], tile_size


def _shade(fraction: float) -> str:
    if fraction == 0:
        return _HIDDEN
    if fraction == 1:
        return _FULL
    return _PARTLY[int(fraction * len(_PARTLY))]
