"""FlashMask attention (arXiv 2410.01359): masks as O(N) bounds, and Triton kernels that skip what they hide."""

from .ops import flashmask_attention
from .reference import reference_attention

__all__ = ["flashmask_attention", "reference_attention"]
