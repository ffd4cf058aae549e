"""A mask as a page for a browser, to look into down to single pairs."""

from __future__ import annotations

import base64
import html
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..bounds import check_bounds
from ..bounds.views import named_intervals
from .cells import fewest_planes_for_drawing
from .sides import both_sides

_TEMPLATE = Path(__file__).with_suffix(".html")
_HEIGHT = 960  # pixels in a notebook


@dataclass(frozen=True)
class MaskPage:
    """A page that `to_html` has made. Notebooks show it, `str(page)` is its text.

    Attributes:
        title: of the page.
        html: the whole page. It loads nothing: no script, style or font of another file.
    """

    title: str
    html: str = field(repr=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the page to a file, which any browser opens."""
        Path(path).write_text(self.html, encoding="utf-8")

    def __str__(self) -> str:
        return self.html

    def _repr_html_(self) -> str:
        style = f"width: 100%; height: {_HEIGHT}px; border: 0"
        return f'<iframe srcdoc="{html.escape(self.html)}" sandbox="allow-scripts" style="{style}"></iframe>'


def to_html(
    bounds: Tensor | Mapping[str, Tensor],
    q_len: int | None = None,
    *,
    tokens: Sequence[str] | Sequence[Sequence[str]] | None = None,
    query_tokens: Sequence[str] | Sequence[Sequence[str]] | None = None,
    document_ids: Tensor | None = None,
    query_document_ids: Tensor | None = None,
    branch_ids: Tensor | None = None,
    query_branch_ids: Tensor | None = None,
    title: str = "Attention mask",
) -> MaskPage:
    """The mask as one HTML file: point at a cell to read what hides it, click or scroll to zoom into a tile.

    A cell of a long mask is a square tile: visible, partly visible or hidden. Zooming in ends at single pairs, with
    their tokens, documents and branches, and the sentence of `bounds.explain`. The file holds the bounds, and the
    browser reads them: its size grows with the number of keys, not of pairs. Batch rows, heads and masks are chosen in
    the page.

    Args:
        bounds: int32 `[B or 1, H or 1, C, S_k]`, or several such masks by name, as `masks_of` returns them.
        q_len: number of query rows, S_k by default.
        tokens: texts of the S_k keys, for all batch rows or for each of them.
        query_tokens: texts of the S_q queries; those of the keys by default, where there are as many.
        document_ids: integers `[B or 1, S_k]` or `[S_k]`, the document of each key; negative for padding.
        query_document_ids: the same of the queries, `[B or 1, S_q]` or `[S_q]`; those of the keys by default, where
            there are as many.
        branch_ids: integers `[B or 1, S_k]` or `[S_k]`, the branch of each key, as in `bounds.fork_and_join`; negative
            outside of branches, such as in a shared prompt.
        query_branch_ids: the same of the queries; those of the keys by default, where there are as many.
        title: of the page.

    Returns:
        A `MaskPage`: `.save(path)` writes the file, notebooks show it.

    Raises:
        TypeError, ValueError: when `bounds` do not have the form of bounds, or there is nothing to draw.
        TypeError: when `tokens` or `query_tokens` are not texts.
        ValueError: when there are more or fewer texts or ids than keys, queries or batch rows, or masks differ in
            their numbers of heads.

    ```python
    to_html(mask, document_ids=(position_ids == 0).cumsum(1) - 1).save("mask.html")
    ```
    """
    masks = bounds if isinstance(bounds, Mapping) else {"mask": bounds}
    if not masks:
        raise ValueError("`bounds` holds no mask")
    drawn = [_mask_on_page(name, mask, q_len) for name, mask in masks.items()]
    queries, keys = both_sides(
        [(mask["queries"], mask["keys"]) for mask in drawn],
        tokens=tokens,
        query_tokens=query_tokens,
        document_ids=document_ids,
        query_document_ids=query_document_ids,
        branch_ids=branch_ids,
        query_branch_ids=query_branch_ids,
    )
    content = {
        "masks": drawn,
        "rows": _common_size_on_page("batch rows", [*(mask["start"] for mask in drawn), *keys, *queries]),
        "heads": _common_size_on_page("heads", [mask["start"][0] for mask in drawn]),
        "keys": keys._asdict(),
        "queries": queries._asdict(),
    }
    packed = base64.b64encode(zlib.compress(json.dumps(content, separators=(",", ":")).encode(), 9)).decode()
    page = _TEMPLATE.read_text(encoding="utf-8").replace("{{ data }}", packed)
    return MaskPage(title, page.replace("{{ title }}", html.escape(title)))


def _mask_on_page(name: str, bounds: Tensor, q_len: int | None) -> dict[str, Any]:
    check_bounds(bounds)
    kv_len = bounds.shape[3]
    q_len = kv_len if q_len is None else q_len
    if q_len < 1 or not bounds.numel():
        raise ValueError(f"there is nothing to draw in bounds {list(bounds.shape)} for {q_len} queries")
    names, start, end = named_intervals(bounds, q_len)
    return {
        "name": name,
        "queries": q_len,
        "keys": kv_len,
        "planes": bounds.shape[2],
        "suffice": fewest_planes_for_drawing(bounds, q_len),
        "names": names,
        "start": start.tolist(),
        "end": end.tolist(),
    }


def _common_size_on_page(what: str, lists: Sequence[Sequence[Any] | None]) -> int:
    """How many batch rows or heads there are, where one entry may stand for all of them."""
    sizes = {len(entries) for entries in lists if entries is not None} - {1}
    if len(sizes) > 1:
        raise ValueError(f"masks, tokens and documents have different numbers of {what}: {sorted(sizes)}")
    return max(sizes, default=1)
