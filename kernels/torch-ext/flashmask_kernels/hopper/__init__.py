"""The attention kernels written for sm_90, in Gluon: forward and backward in half precision, of head sizes from
65 to 128."""

from .backward import attention_backward
from .forward import attention_forward

__all__ = ["attention_backward", "attention_forward"]
