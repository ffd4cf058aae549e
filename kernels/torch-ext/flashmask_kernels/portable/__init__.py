"""The attention operators in Triton, for every GPU that Triton compiles for."""

from .backward import attention_backward
from .forward import attention_forward

__all__ = ["attention_backward", "attention_forward"]
