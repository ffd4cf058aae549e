"""Draw a mask from its bounds, as text or with matplotlib, at any length: long masks are drawn tile by tile."""

from .figure import plot
from .text import to_text

__all__ = ["plot", "to_text"]
