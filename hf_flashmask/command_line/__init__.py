"""`python -m hf_flashmask`: what runs here, and what it would save, before a line of code is written."""

from .app import main

__all__ = ["main"]
