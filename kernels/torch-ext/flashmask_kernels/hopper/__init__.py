"""The attention kernels written for sm_90, in Gluon: forward and backward in half precision, of head sizes from
65 to 128."""

from .backward import AttentionBackward
from .forward import AttentionForward

__all__ = ["AttentionBackward", "AttentionForward"]
