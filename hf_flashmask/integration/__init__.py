"""All that touches Transformers: registration, how a mask travels to the layers, which models are refused."""

from .attention import flashmask_attention_forward
from .inspection import masks_of
from .mask import Mask, register_tree
from .mask_function import flashmask_mask
from .name import NAME
from .registration import register

__all__ = ["NAME", "Mask", "flashmask_attention_forward", "flashmask_mask", "masks_of", "register", "register_tree"]
