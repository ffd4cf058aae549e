"""All that touches Transformers: registration, how a mask travels to the layers, which models are refused."""

from .attention import flashmask_attention_forward
from .mask import flashmask_mask, register_tree
from .name import NAME
from .registration import register

__all__ = ["NAME", "flashmask_attention_forward", "flashmask_mask", "register", "register_tree"]
