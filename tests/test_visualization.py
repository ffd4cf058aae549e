"""Drawings of masks: the text against masks drawn by hand, the pictures by their pixels."""

from __future__ import annotations

import sys
from itertools import pairwise

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import pyplot

from hf_flashmask.bounds import (
    causal,
    from_document_ids,
    from_position_ids,
    from_prefix_tree,
    intersect,
    prefix_lm,
    simplify,
    sliding_window,
    to_dense,
    union,
)
from hf_flashmask.visualization import plot, to_text

PACKED = torch.tensor([0, 1, 2, 0, 1, 0])


def test_text_of_packed_documents():
    assert to_text(from_position_ids(PACKED)) == "\n".join(
        [
            "██··········",
            "████········",
            "██████······",
            "······██····",
            "······████··",
            "··········██",
        ]
    )


def test_text_of_queries_after_a_cache():
    assert to_text(sliding_window(2, 3, 5), q_len=3) == "\n".join(
        [
            "··████····",
            "····████··",
            "······████",
        ]
    )


def test_text_of_a_long_mask_shades_its_tiles():
    """Tiles of 9 x 9 pairs, the last ones of 8; on the diagonal 45 of 81 and 36 of 64 pairs are visible."""
    assert to_text(causal(35), max_size=4).splitlines() == [
        "▒▒······",
        "██▒▒····",
        "████▒▒··",
        "██████▒▒",
        "each cell 9 x 9 pairs: █ visible, ▓▒░ partly, · hidden",
    ]


def test_text_tells_nearly_full_and_nearly_empty_tiles_from_full_and_empty():
    one_visible = from_document_ids(torch.tensor([-1, 0, *[-1] * 98]))
    one_hidden = prefix_lm(100, 100)
    one_hidden[0, 0, 1, 7] = 1
    assert to_text(one_visible, max_size=1).splitlines()[0] == "░░"
    assert to_text(one_hidden, max_size=1).splitlines()[0] == "▓▓"


def test_text_of_one_head_of_one_row_of_a_batch():
    bounds = causal(3).repeat(2, 2, 1, 1)
    bounds[1, 0] = from_position_ids(torch.tensor([0, 0, 1]))[0, 0]
    assert to_text(bounds, batch=1, head=0) == "██····\n··██··\n··████"
    assert to_text(bounds, batch=0, head=1) == "██····\n████··\n██████"


@pytest.mark.usefixtures("_headless")
def test_drawings_say_that_fewer_planes_suffice():
    documents = from_position_ids(torch.tensor([0, 1, 2, 3, 0, 1, 2, 3]))
    composed = intersect(documents, union(sliding_window(3, 8), prefix_lm(3, 8)))
    assert composed.shape[2] == 10
    assert to_text(composed).splitlines()[-1] == "C = 10 planes; simplify(bounds, q_len) says the same with C = 1"
    assert to_text(composed).splitlines()[:-1] == to_text(simplify(composed)).splitlines()
    assert plot(composed).get_title(loc="right") == "31.2% visible, C = 10 (1 suffice)"


class Picture:
    """The pixels of a drawing, by query and key position."""

    def __init__(self, ax):
        ax.figure.canvas.draw()
        self.to_pixel = ax.transData.transform
        self.image = np.asarray(ax.figure.canvas.buffer_rgba())

        self.ax = ax
        self.points = ax.figure.dpi / 72

    def color(self, query: float, key: float, left: float = 0, below: float = 0) -> tuple[int, ...]:
        """At a place of the mask, or as many points from it."""
        x, y = self.to_pixel((key, query)) - np.array([left, below]) * self.points
        return tuple(self.image[self.image.shape[0] - 1 - int(y), int(x), :3].tolist())

    def is_dark(self, query: float, key: float) -> bool:
        return np.mean(self.color(query, key)) < 128

    def strip_below(self, key: int, strip: int = 0) -> tuple[int, ...]:
        return self.color(self.ax.get_ylim()[0], key + 0.5, below=5 + 8 * strip)

    def strip_beside(self, query: int, strip: int = 0) -> tuple[int, ...]:
        return self.color(query + 0.5, 0, left=5 + 8 * strip)

    def labels(self, axis) -> dict[int, str]:
        """The texts beside the mask, by the row or column that they stand at."""
        place = 0 if axis is self.ax.xaxis else 1
        boxes = {label.get_text(): box for label, box in zip(axis.get_ticklabels(), self.boxes(axis))}
        to_data = self.ax.transData.inverted().transform
        return {
            int(to_data((box.x0 + box.width / 2, box.y0 + box.height / 2))[place]): text for text, box in boxes.items()
        }

    def boxes(self, axis):
        return [label.get_window_extent() for label in axis.get_ticklabels()]

    def holds_all_it_shows(self) -> bool:
        figure = self.ax.figure
        all_of_it = figure.get_tightbbox().transformed(figure.dpi_scale_trans)
        return (
            figure.bbox.x0 <= all_of_it.x0
            and all_of_it.x1 <= figure.bbox.x1
            and (figure.bbox.y0 <= all_of_it.y0 and all_of_it.y1 <= figure.bbox.y1)
        )


@pytest.fixture
def _headless():
    matplotlib.use("Agg")
    yield
    pyplot.close("all")


@pytest.mark.usefixtures("_headless")
@pytest.mark.parametrize(("q_len", "kv_len"), [(16, 16), (5, 16), (1, 9)])
def test_every_pair_of_a_short_mask_is_dark_where_visible(q_len, kv_len):
    bounds = sliding_window(4, q_len, kv_len)
    picture = Picture(plot(bounds, q_len))
    visible = to_dense(bounds, q_len)[0, 0]
    for row, column in np.ndindex(q_len, kv_len):
        assert picture.is_dark(row + 0.5, column + 0.5) == visible[row, column].item()


@pytest.mark.usefixtures("_headless")
def test_a_long_mask_is_drawn_tile_by_tile():
    lengths = [9_000, 1_000, 22_768]
    ax = plot(from_position_ids(torch.cat([torch.arange(n) for n in lengths])), max_size=100)
    assert max(ax.images[0].get_array().shape) <= 100
    picture = Picture(ax)
    assert picture.is_dark(8_000, 1_000)
    assert not picture.is_dark(9_800, 8_000)
    assert picture.is_dark(32_000, 11_000)
    assert not picture.is_dark(32_000, 9_500)
    assert ax.get_xlim() == (0, 32_768)


@pytest.mark.usefixtures("_headless")
def test_plot_draws_on_given_axes_and_writes_a_file(tmp_path):
    figure, (left, right) = pyplot.subplots(1, 2)
    assert plot(causal(16), ax=left, title="causal") is left
    plot(from_position_ids(torch.arange(4).repeat(4)), ax=right)
    assert left.get_title(loc="left") == "causal"
    assert left.get_title(loc="right") == "53.1% visible"
    figure.savefig(tmp_path / "masks.png")
    assert (tmp_path / "masks.png").stat().st_size > 1000
    assert not np.array_equal(left.images[0].get_array(), right.images[0].get_array())


WHITE = (255, 255, 255)
LENGTHS = [4, 3, 6]
DOCUMENT_IDS = torch.arange(3).repeat_interleave(torch.tensor(LENGTHS))
TOKENS = [f"w{index}" for index in range(13)]


@pytest.mark.usefixtures("_headless")
def test_tokens_stand_at_their_rows_and_columns():
    ax = plot(from_document_ids(DOCUMENT_IDS), tokens=TOKENS)
    picture = Picture(ax)
    assert picture.labels(ax.xaxis) == picture.labels(ax.yaxis) == dict(enumerate(TOKENS))
    assert picture.holds_all_it_shows()


@pytest.mark.usefixtures("_headless")
def test_each_side_of_a_rectangle_has_its_own_tokens_and_documents():
    query_documents = torch.tensor([1, 1, 2])
    ax = plot(
        sliding_window(4, 3, 13),
        3,
        tokens=TOKENS,
        query_tokens=["a", "b", "a token that is long"],
        document_ids=DOCUMENT_IDS,
        query_document_ids=query_documents,
    )
    picture = Picture(ax)
    assert picture.labels(ax.xaxis) == dict(enumerate(TOKENS))
    assert picture.labels(ax.yaxis) == {0: "a", 1: "b", 2: "a token that …"}
    for query, key in np.ndindex(3, 13):
        is_same = (query_documents[query] == DOCUMENT_IDS[key]).item()
        assert (picture.strip_beside(query) == picture.strip_below(key)) == is_same
    assert picture.holds_all_it_shows()

    alone = Picture(plot(sliding_window(4, 3, 13), 3, document_ids=DOCUMENT_IDS))
    assert {alone.strip_beside(query) for query in range(3)} == {WHITE}
    assert WHITE not in {alone.strip_below(key) for key in range(13)}


@pytest.mark.usefixtures("_headless")
@pytest.mark.parametrize("size", [2, 4.5, 9])
def test_tokens_of_a_long_mask_are_thinned_out_to_what_fits(size):
    tokens = [f"word{index}" for index in range(2048)]
    _, ax = pyplot.subplots(figsize=(size, size), layout="constrained")
    picture = Picture(plot(causal(2048), tokens=tokens, document_ids=torch.arange(2048) // 500, ax=ax))
    for axis, edge in ((ax.xaxis, "x0"), (ax.yaxis, "y0")):
        sides = sorted((getattr(box, edge), getattr(box, edge.replace("0", "1"))) for box in picture.boxes(axis))
        assert all(end <= start for (_, end), (start, _) in pairwise(sides))
        assert len(sides) > size
        for label, position in zip(axis.get_ticklabels(), axis.get_ticklocs()):
            assert label.get_text() == f"word{int(position)} {int(position):,}"
    assert picture.holds_all_it_shows()


@pytest.mark.usefixtures("_headless")
def test_zooming_in_shows_every_token():
    ax = plot(causal(2048), tokens=[f"word{index}" for index in range(2048)])
    ax.set_xlim(1000, 1010)
    ax.set_ylim(1010, 1000)
    assert Picture(ax).labels(ax.xaxis) == {index: f"word{index}" for index in range(1000, 1010)}


@pytest.mark.usefixtures("_headless")
def test_a_token_is_one_line_and_no_formula():
    ax = plot(causal(6), tokens=["$x$", "a\nb", " ", " the", "\\$", "nothing but long"])
    Picture(ax)
    shown = [label.get_text().replace(r"\$", "$") for label in ax.get_xticklabels()]  # matplotlib's own escape
    assert shown == ["$x$", "a↵b", "␣", "the", "\\$", "nothing but l…"]
    assert not any(label._preprocess_math(label.get_text())[1] for label in ax.get_xticklabels())


@pytest.mark.usefixtures("_headless")
def test_documents_are_strips_of_one_colour_with_borders_between_them():
    document_ids = torch.cat([DOCUMENT_IDS, torch.tensor([-1, -1])])
    picture = Picture(plot(from_document_ids(document_ids), document_ids=document_ids))
    below = [picture.strip_below(key) for key in range(15)]
    assert below == [picture.strip_beside(query) for query in range(15)]
    assert [color == WHITE for color in below] == (document_ids < 0).tolist()
    for one, other in np.ndindex(13, 13):
        assert (below[one] == below[other]) == (DOCUMENT_IDS[one] == DOCUMENT_IDS[other]).item()

    def is_orange(color):
        red, green, blue = color
        return red > green + 50 > blue + 100

    begins = {4, 7, 13}
    for edge, cell in np.ndindex(14, 15):
        assert is_orange(picture.color(cell + 0.5, edge + 1)) == (edge + 1 in begins)
        assert is_orange(picture.color(edge + 1, cell + 0.5)) == (edge + 1 in begins)


@pytest.mark.usefixtures("_headless")
def test_borders_of_very_many_documents_do_not_cover_the_mask():
    document_ids = torch.arange(1000) // 2
    bounds = from_document_ids(document_ids, is_causal=False)
    with_strips = plot(
        bounds, document_ids=document_ids, ax=pyplot.figure(figsize=(9, 9)).add_axes((0.2, 0.2, 0.7, 0.7))
    )
    plain = plot(bounds, ax=pyplot.figure(figsize=(9, 9)).add_axes((0.2, 0.2, 0.7, 0.7)))
    pictures = [Picture(ax) for ax in (with_strips, plain)]
    for place in range(10, 990, 7):
        assert pictures[0].color(place + 0.5, 500.5) == pictures[1].color(place + 0.5, 500.5)


@pytest.mark.usefixtures("_headless")
def test_branches_of_a_shared_prompt_are_a_strip_of_their_own():
    lengths = torch.tensor([5, 3, 2, 4])
    branch_ids = torch.arange(4).repeat_interleave(lengths) - 1
    ax = plot(
        from_prefix_tree([-1, 0, 0, 0], lengths), branch_ids=branch_ids, document_ids=torch.zeros(14, dtype=torch.int64)
    )
    picture = Picture(ax)
    for strip in (picture.strip_below, picture.strip_beside):
        branches = [strip(token) for token in range(14)]
        assert [color == WHITE for color in branches] == (branch_ids < 0).tolist()
        for one, other in np.ndindex(14, 14):
            assert (branches[one] == branches[other]) == (branch_ids[one] == branch_ids[other]).item()
        documents = {strip(token, strip=1) for token in range(14)}
        assert len(documents) == 1
        assert WHITE not in documents
    assert {text.get_text() for text in ax.texts} == {"branch", "document"}
    assert picture.holds_all_it_shows()


@pytest.mark.usefixtures("_headless")
def test_each_batch_row_has_its_own_tokens_and_documents():
    document_ids = torch.tensor([[0, 0, 0, 1], [0, 1, 1, 1]])
    bounds = from_document_ids(document_ids)
    for batch, tokens in enumerate(("abcd", "efgh")):
        ax = plot(bounds, batch=batch, tokens=[list("abcd"), list("efgh")], document_ids=document_ids)
        picture = Picture(ax)
        assert picture.labels(ax.yaxis) == dict(enumerate(tokens))
        colors = [picture.strip_below(key) for key in range(4)]
        assert [color == colors[0] for color in colors] == (document_ids[batch] == 0).tolist()


@pytest.mark.usefixtures("_headless")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": ["a", "b"]}, r"`tokens` has 2 entries in a row, the mask has S_k = 3"),
        ({"query_tokens": ["a"] * 3}, r"`query_tokens` has 3 entries in a row, the mask has S_q = 2"),
        ({"document_ids": torch.zeros(1, 4, dtype=torch.int64)}, r"`document_ids` has 4 entries"),
        ({"query_document_ids": torch.arange(3)}, r"`query_document_ids` has 3 entries in a row, the mask has S_q = 2"),
        ({"branch_ids": torch.arange(5)}, r"`branch_ids` has 5 entries in a row, the mask has S_k = 3"),
        ({"query_branch_ids": torch.arange(1)}, r"`query_branch_ids` has 1 entries"),
        ({"tokens": [["a", "b", "c"]] * 3}, r"of 3 batch rows, the bounds of 2: give one"),
    ],
)
def test_tokens_and_ids_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        plot(causal(3).repeat(2, 1, 1, 1), 2, **options)
    with pytest.raises(TypeError, match="`branch_ids` must be an integer tensor"):
        plot(causal(3), branch_ids=torch.zeros(3))
    assert pyplot.get_fignums() == []


def test_without_matplotlib_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'hf-flashmask\[viz\]'.*to_text"):
        plot(causal(4))


@pytest.mark.parametrize("draw", [to_text, plot])
def test_errors(draw):
    with pytest.raises(IndexError, match="`batch` is 1, but the bounds have 1"):
        draw(causal(4), batch=1)
    with pytest.raises(IndexError, match="`head` is -1, but the bounds have 1"):
        draw(causal(4), head=-1)
    with pytest.raises(ValueError, match="`max_size` must be at least 1, got 0"):
        draw(causal(4), max_size=0)
    with pytest.raises(ValueError, match="nothing to draw in a mask of 0 queries and 4 keys"):
        draw(causal(4), 0)
    with pytest.raises(TypeError, match="int32 tensor"):
        draw(causal(4).long())
