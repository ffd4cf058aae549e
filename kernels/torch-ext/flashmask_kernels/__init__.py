"""FlashMask attention (arXiv 2410.01359): masks as O(N) bounds, and Triton kernels that skip what they hide."""

from .api import MAX_INTERVALS, flashmask_attention
from .reference import reference_attention
from .schedules import Schedules

__all__ = ["MAX_INTERVALS", "Schedules", "flashmask_attention", "reference_attention"]
