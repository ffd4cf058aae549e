"""Drawings of masks: the text against masks drawn by hand, the pictures by their pixels."""

from __future__ import annotations

import sys

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import pyplot

from hf_flashmask.bounds import (
    causal,
    from_document_ids,
    from_position_ids,
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

    def is_dark(self, query: float, key: float) -> bool:
        x, y = self.to_pixel((key, query))
        return self.image[self.image.shape[0] - 1 - int(y), int(x), :3].mean() < 128


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
