"""The page of a mask: what it holds, what it refuses, and what a browser shows of it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_masks import dense, dense_of_bounds
from selenium import webdriver
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.actions.wheel_input import ScrollOrigin
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.select import Select

from hf_flashmask import bounds
from hf_flashmask.visualization import MaskPage, to_html

LENGTHS = [7, 1, 9, 4]
DOCUMENT_IDS = torch.arange(4).repeat_interleave(torch.tensor(LENGTHS))
WINDOW = 5
TOKENS = [f"<{'&' * (index % 3)}word {index}>" for index in range(21)]


def sees(query: int, key: int) -> bool:
    return bool(DOCUMENT_IDS[query] == DOCUMENT_IDS[key]) and 0 <= query - key < WINDOW


def packed_window() -> torch.Tensor:
    return bounds.intersect(bounds.from_document_ids(DOCUMENT_IDS), bounds.sliding_window(WINDOW, 21))


# What the page is


def test_the_page_is_one_file_that_grows_with_the_keys(tmp_path: Path) -> None:
    page = to_html(bounds.causal(512), title="Causal <b>&amp;")
    page.save(tmp_path / "mask.html")
    assert (tmp_path / "mask.html").read_text(encoding="utf-8") == str(page) == page.html
    assert "<title>Causal &lt;b&gt;&amp;amp;</title>" in page.html
    assert not re.search(r"https?:|\bsrc=|\bhref=|@import|url\(", page.html)
    assert len(to_html(bounds.causal(32_768)).html) < 15 * 32_768
    assert repr(page) == "MaskPage(title='Causal <b>&amp;')"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": ["a", "b"]}, r"`tokens` has 2 entries in a row, the mask has S_k = 3"),
        ({"tokens": [["a", "b", "c"], ["a"]]}, r"`tokens` has 1 entries in a row, the mask has S_k = 3"),
        ({"q_len": 2, "query_tokens": ["a"] * 3}, r"`query_tokens` has 3 entries in a row, the mask has S_q = 2"),
        ({"document_ids": torch.zeros(1, 4, dtype=torch.int64)}, r"`document_ids` has 4 entries"),
        ({"branch_ids": torch.arange(2)}, r"`branch_ids` has 2 entries in a row, the mask has S_k = 3"),
        ({"q_len": 0}, r"nothing to draw in bounds \[2, 1, 1, 3\] for 0 queries"),
        ({"tokens": [["a", "b", "c"]] * 3}, r"different numbers of batch rows: \[2, 3\]"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_html(bounds.causal(3).repeat(2, 1, 1, 1), **options)


def test_what_are_no_masks_of_one_call_is_refused() -> None:
    with pytest.raises(TypeError, match="int32 tensor"):
        to_html(bounds.causal(3).long())
    with pytest.raises(TypeError, match="`document_ids` must be an integer tensor"):
        to_html(bounds.causal(3), document_ids=torch.zeros(3))
    for ids in ([1, 2, 3], [[1, 2, 3]], torch.ones(3), torch.ones(1, 3)):
        with pytest.raises(TypeError, match=r"`query_tokens` must be texts.*tokenizer.decode"):
            to_html(bounds.causal(3), query_tokens=ids)
    with pytest.raises(ValueError, match=r"different numbers of heads: \[2, 3\]"):
        to_html({"a": bounds.causal(3).repeat(1, 2, 1, 1), "b": bounds.causal(3).repeat(1, 3, 1, 1)})
    with pytest.raises(ValueError, match="`bounds` holds no mask"):
        to_html({})


# What a browser shows of it


class Reader:
    """A browser that shows a page, used through what a reader sees: the picture, the lines around it, the pointer."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def element(self, name: str) -> WebElement:
        return self.driver.find_element("id", name)

    def view(self) -> tuple[range, range, int]:
        """The queries and keys that are shown, and the pairs along a side of a cell."""
        text = self.element("view").text.replace(",", "")
        queries, keys = (range(int(first), int(last) + 1) for first, last in re.findall(r"(\d+) to (\d+)", text))
        tile = re.search(r"a cell is (\d+) x", text)
        return queries, keys, int(tile[1]) if tile else 1

    def point(self, query: int, key: int) -> str:
        """What the page says beside the pointer when it is on this pair."""
        queries, keys, tile = self.view()
        mask = self.element("mask")
        cell = mask.size["width"] / -(-len(keys) // tile)
        x, y = (((index - first) // tile + 0.5) * cell for index, first in ((key, keys[0]), (query, queries[0])))
        offset = round(x - mask.size["width"] / 2), round(y - mask.size["height"] / 2)
        ActionChains(self.driver, duration=0).move_to_element_with_offset(mask, *offset).perform()
        return self.element("tip").text

    def click(self, query: int, key: int) -> None:
        self.point(query, key)
        ActionChains(self.driver, duration=0).click().perform()

    def choose(self, name: str, option: str) -> None:
        Select(self.element(name)).select_by_visible_text(option)

    def picture(self) -> np.ndarray:
        """The colour in the middle of each cell, `[rows, columns, 3]`."""
        queries, keys, tile = self.view()
        rows, columns = -(-len(queries) // tile), -(-len(keys) // tile)
        colors = self.driver.execute_script(
            """
            const [rows, columns] = arguments, mask = document.getElementById("mask");
            const { data } = mask.getContext("2d").getImageData(0, 0, mask.width, mask.height);
            const middle = (index, count, length) => Math.floor(((index + 0.5) * length) / count);
            return Array.from({ length: rows }, (_, row) => Array.from({ length: columns }, (_, column) => {
              const at = 4 * (middle(row, rows, mask.height) * mask.width + middle(column, columns, mask.width));
              return Array.from(data.slice(at, at + 3));
            }));
            """,
            rows,
            columns,
        )
        return np.array(colors)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    path = shutil.which("chromedriver")
    assert path is not None, "these tests need chromium and chromedriver: make browser"
    options = webdriver.ChromeOptions()
    for flag in (
        "headless",
        "no-sandbox",  # chromium refuses to run as root with it
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "force-device-scale-factor=1",
        "window-size=1000,1000",
        f"user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options, Service(path))
    yield driver
    driver.quit()


@pytest.fixture
def show(driver: webdriver.Chrome, tmp_path: Path) -> Iterator[Callable[[MaskPage | str], Reader]]:
    def show(page: MaskPage | str) -> Reader:
        path = tmp_path / "page.html"
        path.write_text(str(page), encoding="utf-8")
        driver.get(path.as_uri())
        return Reader(driver)

    yield show
    # No error, and nothing that the page's own policy has refused.
    assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []
    assert driver.execute_script("return performance.getEntriesByType('resource').length") == 0


def random_pairs(queries: int, keys: int, count: int) -> list[tuple[int, int]]:
    generator = np.random.default_rng(0)
    return [(int(generator.integers(queries)), int(generator.integers(keys))) for _ in range(count)]


def says(sentence: str, query: int, key: int) -> bool:
    """Whether a sentence about a pair says that it is visible."""
    found = re.match(r"query (\d+) (sees|does not see) key (\d+)[,:]", sentence)
    assert found is not None, sentence
    assert (int(found[1]), int(found[3])) == (query, key)
    return found[2] == "sees"


@pytest.mark.browser
def test_every_cell_says_what_the_definition_says(show: Callable[..., Reader], tmp_path: Path) -> None:
    mask = packed_window()
    branch_ids = torch.arange(21) // 3 - 2
    reader = show(to_html(mask, tokens=TOKENS, document_ids=DOCUMENT_IDS, branch_ids=branch_ids))
    expected = dense(sees, range(21), range(21))
    assert ((reader.picture().mean(2) < 128) == expected).all()
    for query, key in random_pairs(21, 21, 40):
        sentence, *sides = reader.point(query, key).split("\n")
        assert says(sentence, query, key) == expected[query, key]
        assert sentence == bounds.explain(mask, query, key)
        assert sides == [
            f'{name} {index}: "{TOKENS[index]}", document {DOCUMENT_IDS[index]}, '
            + ("no branch" if branch_ids[index] < 0 else f"branch {branch_ids[index]}")
            for name, index in (("query", query), ("key", key))
        ]
    assert f"C = 1, {expected.mean():.1%} visible" in reader.element("summary").text
    reader.driver.save_screenshot(str(tmp_path / "page.png"))
    assert (tmp_path / "page.png").stat().st_size > 10_000


@pytest.mark.browser
@pytest.mark.parametrize("planes", [1, 2, 4, 6])
def test_a_rectangle_of_any_form_for_each_row_and_head(show: Callable[..., Reader], planes: int) -> None:
    mask = torch.randint(-3, 16, (2, 3, planes, 17), dtype=torch.int32)
    expected = dense_of_bounds(mask, 11)
    reader = show(
        to_html(
            {"other": bounds.bidirectional(11, 17), "random": mask}, 11, tokens=[list("abcdefghijklmnopq"), ["z"] * 17]
        )
    )
    reader.choose("name", "random")
    for row, head in ((0, 0), (1, 0), (1, 2)):
        reader.choose("row", str(row))
        reader.choose("head", str(head))
        assert ((reader.picture().mean(2) < 128) == expected[row, head]).all()
        for query, key in random_pairs(11, 17, 8):
            sentence, side = reader.point(query, key).split("\n")
            assert sentence == bounds.explain(mask, query, key, 11, batch=row, head=head)
            assert side == f'key {key}: "{"z" if row else "abcdefghijklmnopq"[key]}"'


@pytest.mark.browser
def test_a_long_mask_is_read_from_tiles_down_to_pairs(show: Callable[..., Reader]) -> None:
    lengths = torch.tensor([9_000, 1_000, 5_000, 700, 17_068])
    document = torch.arange(5).repeat_interleave(lengths)
    position = torch.arange(32_768)
    reader = show(to_html(bounds.from_document_ids(document), document_ids=document, title="32,768 tokens"))
    query, key = 9_137, 9_051
    tiles = []
    while True:
        queries, keys, tile = reader.view()
        tiles.append(tile)
        assert query in queries
        assert key in keys
        if tile == 1:
            break
        q, k = (slice(index // tile * tile, (index // tile + 1) * tile) for index in (query, key))
        visible = (document[q, None] == document[k]) & (position[q, None] >= position[k])
        said = reader.point(query, key)
        assert said.startswith(f"queries {q.start:,} to {q.stop - 1:,}, keys {k.start:,} to {k.stop - 1:,}: ")
        share = visible.float().mean().item()
        words = {0.0: "hidden", 1.0: "visible"}.get(share, f"{visible.sum():,} of {visible.numel():,} pairs visible")
        assert said.endswith(f": {words}")
        reader.click(query, key)
    assert tiles == [256, 64, 16, 4, 1]
    for pair, is_visible in (((9_137, 9_051), True), ((9_100, 9_110), False), ((9_100, 8_999), False)):
        assert says(reader.point(*pair), *pair) == is_visible
    reader.element("whole").click()
    assert reader.view() == (range(32_768), range(32_768), 256)


@pytest.mark.browser
def test_the_overview_tells_full_cut_and_hidden_tiles(show: Callable[..., Reader]) -> None:
    reader = show(to_html(bounds.causal(256)))
    assert reader.view()[2] == 2
    brightness = reader.picture().mean(2)
    row, column = np.indices(brightness.shape)
    hidden, full = brightness[row < column], brightness[row > column]
    assert (hidden == hidden[0]).all()
    assert (full == full[0]).all()
    cut = brightness[row == column]
    assert ((full[0] < cut) & (cut < hidden[0])).all()


@pytest.mark.browser
def test_the_wheel_zooms_and_dragging_moves(show: Callable[..., Reader]) -> None:
    reader = show(to_html(bounds.causal(1024)))
    mask = reader.element("mask")
    ActionChains(reader.driver, duration=0).scroll_from_origin(ScrollOrigin.from_element(mask), 0, -100).perform()
    queries, keys, tile = reader.view()
    assert (len(queries), len(keys), tile) == (512, 512, 4)
    assert (queries[0], keys[0]) == (256, 256)  # around the middle
    drag = ActionChains(reader.driver, duration=0).click_and_hold(mask).move_by_offset(50, 0)
    drag.release().perform()
    moved, sideways, _ = reader.view()
    assert moved == queries
    assert sideways[0] == 256 - 40  # 5 pixels of a cell of 4 pairs
    mask.send_keys(Keys.ARROW_UP)
    assert reader.view()[0][0] == 256 - 128
    mask.send_keys("0")
    assert reader.view() == (range(1024), range(1024), 8)


@pytest.mark.browser
def test_a_notebook_shows_the_page(show: Callable[..., Reader]) -> None:
    reader = show(f"<!DOCTYPE html><p>Out[1]:</p>{to_html(packed_window())._repr_html_()}")
    reader.driver.switch_to.frame(0)
    assert says(reader.point(3, 1), 3, 1)
    assert not says(reader.point(8, 6), 8, 6)
    reader.driver.switch_to.default_content()
