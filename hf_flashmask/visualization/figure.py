"""A mask as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..bounds import visible_pairs
from .cells import cells, planes_that_suffice, select

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS = ("#eceff1", "#08519c")  # hidden, visible; cut tiles in between. They differ in lightness, for every eye.
_LARGEST_GRID = 40


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

    occupancy, tile_size = cells(bounds, q_len, batch, head, max_size)
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
    share = visible_pairs(select(bounds, batch, head), q_len).item() / (q_len * kv_len)
    fewest = planes_that_suffice(bounds, q_len)
    planes = f", C = {bounds.shape[2]} ({fewest} suffice)" if fewest < bounds.shape[2] else ""
    ax.set_title(f"{share:.1%} visible{planes}", loc="right", fontsize="small", color="#546e7a")
    if title is not None:
        ax.set_title(title, loc="left")
    return ax
