"""A mask as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ..bounds import visible_pairs
from .cells import cells, fewest_planes_for_drawing, select_mask_to_draw
from .sides import RowOfSide, both_sides

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS = ("#eceff1", "#08519c")  # hidden, visible; cut tiles in between. They differ in lightness, for every eye.
_LARGEST_GRID = 40
_SMALLEST_SIDE, _LARGEST_SIDE, _MARGIN, _INCHES_PER_TOKEN = 3.0, 8.5, 1.5, 0.13


def plot(
    bounds: Tensor,
    q_len: int | None = None,
    *,
    batch: int = 0,
    head: int = 0,
    tokens: Sequence[str] | Sequence[Sequence[str]] | None = None,
    query_tokens: Sequence[str] | Sequence[Sequence[str]] | None = None,
    document_ids: Tensor | None = None,
    query_document_ids: Tensor | None = None,
    branch_ids: Tensor | None = None,
    query_branch_ids: Tensor | None = None,
    ax: Axes | None = None,
    title: str | None = None,
    max_size: int = 512,
) -> Axes:
    """The mask as a picture: queries downwards, keys to the right, dark = visible. Needs matplotlib.

    Masks longer than `max_size` are drawn in square tiles, the darker the more of a tile is visible. Tokens stand
    beside the mask where all have room, else every n-th one with its position. Documents and branches are coloured
    strips beside the mask, without colour for padding and outside of branches. Orange lines show where documents begin,
    unless there are more than 64, which would cover the mask.

    Args:
        bounds: int32 `[B or 1, H or 1, C, S_k]`.
        q_len: number of query rows, S_k by default.
        batch, head: which mask to draw.
        tokens: texts of the S_k keys, for all batch rows or for each of them.
        query_tokens: texts of the S_q queries; those of the keys by default, where there are as many.
        document_ids: integers `[B or 1, S_k]` or `[S_k]`, the document of each key; negative for padding.
        query_document_ids: the same of the queries, `[B or 1, S_q]` or `[S_q]`; those of the keys by default, where
            there are as many.
        branch_ids: integers `[B or 1, S_k]` or `[S_k]`, the branch of each key, as in `bounds.fork_and_join`; negative
            outside of branches, such as in a shared prompt.
        query_branch_ids: the same of the queries; those of the keys by default, where there are as many.
        ax: axes to draw on; by default a new figure, larger for more tokens.
        title: text above the picture, beside the share of visible pairs.
        max_size: most cells along a side.

    Returns:
        The axes; `.figure.savefig(path)` writes the picture.

    Raises:
        TypeError, ValueError: when `bounds` do not have the form of bounds, or there is nothing to draw.
        ValueError: when there are more or fewer texts or ids than keys, queries or batch rows.

    ```python
    lengths = torch.tensor([3, 2, 4, 2])  # a prompt and three answers
    answers = torch.arange(4).repeat_interleave(lengths) - 1
    plot(bounds.from_prefix_tree([-1, 0, 0, 0], lengths), branch_ids=answers)
    ```
    """
    try:
        from matplotlib import pyplot
        from matplotlib.colors import LinearSegmentedColormap

        from .margins import draw_margins
    except ImportError as error:
        raise ImportError(
            "plot() needs matplotlib: pip install 'hf-flashmask[viz]'. to_text() draws without it"
        ) from error

    occupancy, tile_size = cells(bounds, q_len, batch, head, max_size)
    kv_len = bounds.shape[3]
    q_len = kv_len if q_len is None else q_len
    rows, columns = occupancy.shape
    queries, keys = both_sides(
        [(q_len, kv_len)],
        tokens=tokens,
        query_tokens=query_tokens,
        document_ids=document_ids,
        query_document_ids=query_document_ids,
        branch_ids=branch_ids,
        query_branch_ids=query_branch_ids,
    )
    query_row, key_row = (side.row(batch, bounds.shape[0]) for side in (queries, keys))
    if ax is None:
        _, ax = pyplot.subplots(figsize=_figure_size(query_row, key_row, q_len, kv_len), layout="constrained")
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
    ax.spines[:].set_visible(False)
    draw_margins(ax, query_row, key_row)
    share = visible_pairs(select_mask_to_draw(bounds, batch, head), q_len).item() / (q_len * kv_len)
    fewest = fewest_planes_for_drawing(bounds, q_len)
    planes = f", C = {bounds.shape[2]} ({fewest} suffice)" if fewest < bounds.shape[2] else ""
    ax.set_title(f"{share:.1%} visible{planes}", loc="right", fontsize="small", color="#546e7a")
    if title is not None:
        ax.set_title(title, loc="left")
    return ax


def _figure_size(queries: RowOfSide, keys: RowOfSide, q_len: int, kv_len: int) -> tuple[float, float]:
    """Inches: room for the tokens of each side, up to what fits on a screen."""
    longest = max(len(row.tokens or []) for row in (queries, keys))
    pair = min(max(_SMALLEST_SIDE, _INCHES_PER_TOKEN * longest), _LARGEST_SIDE) / max(q_len, kv_len)
    return max(pair * kv_len, _SMALLEST_SIDE) + _MARGIN, pair * q_len + _MARGIN
