"""Prefixes that several sequences share are computed once."""

from . import prefix_tree
from .shared_prefix import share_prefixes
from .tree_attention import register_tree_attention

__all__ = ["prefix_tree", "register_tree_attention", "share_prefixes"]
