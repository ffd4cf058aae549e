"""FlashMask attention for Hugging Face Transformers: importing it registers `attn_implementation="flashmask"`."""

from . import bounds
from .integration import register

__all__ = ["__version__", "bounds", "register"]

__version__ = "0.1.0"

register()
