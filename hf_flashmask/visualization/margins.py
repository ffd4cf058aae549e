"""What stands beside a picture: tokens or positions, strips of documents and branches. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import LineCollection
from matplotlib.font_manager import FontProperties
from matplotlib.ticker import Formatter, Locator, MaxNLocator
from matplotlib.transforms import ScaledTranslation

from .sides import RowOfSide

_TEXT_COLOR, _BORDER_COLOR = "#546e7a", "#fb8c00"
# Unlike each other for every eye, and unlike the borders and the mask.
_DOCUMENT_COLORS = ("#56b4e9", "#009e73", "#cc79a7", "#f0e442", "#785ef0")
_BRANCH_COLORS = ("#882255", "#ddcc77", "#44aa99", "#999933", "#aa4499")
_STRIP_WIDTH, _GAP = 6, 2  # points
_POINTS_PER_INCH = 72
_TOKEN_SIZE, _STRIP_NAME_SIZE = "x-small", "xx-small"
_LONGEST_TEXT = 14  # characters
_MOST_BORDERS = 64


class _Strips(NamedTuple):
    """A strip on the left of a mask and one below: of each token an id, negative for none."""

    name: str
    palette: tuple[str, ...]
    query_ids: Sequence[int] | None
    key_ids: Sequence[int] | None


def draw_margins(ax: Axes, queries: RowOfSide, keys: RowOfSide) -> None:
    """Label both sides of a mask whose limits are set, draw strips beside it, and over it where documents begin."""
    strips = (
        _Strips("branch", _BRANCH_COLORS, queries.branches, keys.branches),
        _Strips("document", _DOCUMENT_COLORS, queries.documents, keys.documents),
    )
    shown = [strip for strip in strips if strip.query_ids is not None or strip.key_ids is not None]
    pitch = _STRIP_WIDTH + _GAP
    for place, strip in enumerate(shown):
        _draw_strips(ax, strip, distance=place * pitch + _GAP + _STRIP_WIDTH / 2)
    ax.tick_params(length=0, colors=_TEXT_COLOR, pad=3.5 + pitch * len(shown))
    for axis, tokens, name in ((ax.xaxis, keys.tokens, "key"), (ax.yaxis, queries.tokens, "query")):
        axis.set_label_text(name)
        if tokens is None:
            axis.set_major_locator(MaxNLocator(nbins=5, integer=True, steps=[1, 2, 4, 5, 8, 10]))
        else:
            _write_tokens(axis, tokens)
    if keys.tokens is not None:
        ax.tick_params(axis="x", labelrotation=90)
    ax.vlines(_document_borders_in_picture(keys.documents), *ax.get_ylim(), color=_BORDER_COLOR, linewidth=1.2)
    ax.hlines(_document_borders_in_picture(queries.documents), *ax.get_xlim(), color=_BORDER_COLOR, linewidth=1.2)


def _document_borders_in_picture(documents: Sequence[int] | None) -> list[int]:
    """Where documents begin after others; nowhere where they would cover the mask."""
    begins = [start for start, _, _ in _runs_on_strip(documents or []) if start > 0]
    return begins if len(begins) <= _MOST_BORDERS else []


def _runs_on_strip(ids: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Start, end and id of each run of adjacent equal ids."""
    end = 0
    for id_, run in groupby(ids):
        start, end = end, end + sum(1 for _ in run)
        yield start, end, id_


def _draw_strips(ax: Axes, strips: _Strips, distance: float) -> None:
    """As many points away from the mask. Lines keep their width in points at any zoom."""
    name, palette, query_ids, key_ids = strips
    ids = sorted({*(query_ids or []), *(key_ids or [])})
    colors = dict(zip([id_ for id_ in ids if id_ >= 0], palette * len(ids)))
    for side_ids, is_left in ((query_ids, True), (key_ids, False)):
        runs = [run for run in _runs_on_strip(side_ids or []) if run[2] >= 0]
        ends = [((0, start), (0, end)) if is_left else ((start, 0), (end, 0)) for start, end, _ in runs]
        along_axis = ax.get_yaxis_transform() if is_left else ax.get_xaxis_transform()
        inches = -distance / _POINTS_PER_INCH
        shift = (inches, 0.0) if is_left else (0.0, inches)
        lines = LineCollection(
            ends,
            colors=[colors[id_] for _, _, id_ in runs],
            linewidths=_STRIP_WIDTH,
            capstyle="butt",
            transform=along_axis + ScaledTranslation(shift[0], shift[1], ax.figure.dpi_scale_trans),
            clip_on=False,
        )
        ax.add_collection(lines, autolim=False)
    where, offset, rotation = ((0, 1), (-distance, 3), 90) if key_ids is None else ((1, 0), (3, -distance), 0)
    ax.annotate(
        name,
        where,
        offset,
        xycoords="axes fraction",
        textcoords="offset points",
        rotation=rotation,
        horizontalalignment="center" if rotation else "left",
        verticalalignment="bottom" if rotation else "center",
        fontsize=_STRIP_NAME_SIZE,
        color=_TEXT_COLOR,
    )


def _write_tokens(axis: Axis, tokens: Sequence[str]) -> None:
    locator = _TokenLocator(axis, len(tokens))
    axis.set_major_locator(locator)
    axis.set_major_formatter(_TokenFormatter(tokens, locator))
    axis.set_tick_params(labelsize=_TOKEN_SIZE)


class _TokenLocator(Locator):
    """The middle of every n-th token, n as small as their texts allow in the size that the axes have when drawn."""

    def __init__(self, labelled: Axis, num_tokens: int) -> None:
        self.labelled, self.num_tokens = labelled, num_tokens

    def step(self) -> int:
        axes = self.labelled.axes
        first, last = self.labelled.get_view_interval()
        length = axes.bbox.width if self.labelled is axes.xaxis else axes.bbox.height
        points = length / axes.figure.dpi * _POINTS_PER_INCH
        needed = 1.1 * FontProperties(size=_TOKEN_SIZE).get_size_in_points() * abs(last - first) / max(points, 1)
        return next(step for power in range(20) for step in (10**power, 2 * 10**power, 5 * 10**power) if step >= needed)

    def __call__(self) -> Sequence[float]:
        first, last = sorted(self.labelled.get_view_interval())
        middles = (index + 0.5 for index in range(0, self.num_tokens, self.step()))
        return [middle for middle in middles if first <= middle <= last]

    def tick_values(self, vmin: float, vmax: float) -> Sequence[float]:
        return self()


class _TokenFormatter(Formatter):
    """The text of a token, and its position where some are left out."""

    def __init__(self, tokens: Sequence[str], locator: _TokenLocator) -> None:
        self.tokens, self.locator = tokens, locator

    def __call__(self, x: float, pos: int | None = None) -> str:
        index = int(x)
        if not 0 <= index < len(self.tokens):
            return ""
        text = _short_margin_text(self.tokens[index])
        return text if self.locator.step() == 1 else f"{text} {index:,}"


def _short_margin_text(token: str) -> str:
    """One line, which matplotlib does not read as a formula."""
    text = token.replace("\n", "↵").strip() or "␣"
    text = text if len(text) <= _LONGEST_TEXT else f"{text[: _LONGEST_TEXT - 1]}…"
    return "".join(character if character.isprintable() else "�" for character in text).replace("$", r"\$")
