"""The attention kernels written for sm_90, in Gluon: forward and backward in half precision, of head sizes from
33 to 512.
"""

from .backward import AttentionBackward
from .forward import AttentionForward
from .fused_backward import FusedAttentionBackward

__all__ = ["AttentionBackward", "AttentionForward", "FusedAttentionBackward"]
