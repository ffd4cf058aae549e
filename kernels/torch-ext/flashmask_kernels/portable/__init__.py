"""The attention operators in Triton, for every GPU that Triton compiles for."""

from .backward import AttentionBackward
from .decoding import DecodingForward
from .forward import AttentionForward

__all__ = ["AttentionBackward", "AttentionForward", "DecodingForward"]
