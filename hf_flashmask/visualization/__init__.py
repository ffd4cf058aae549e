"""Draw a mask from its bounds, as text, with matplotlib or as a page to look into, at any length: tile by tile."""

from .figure import plot
from .page import MaskPage, to_html
from .text import to_text

__all__ = ["MaskPage", "plot", "to_html", "to_text"]
