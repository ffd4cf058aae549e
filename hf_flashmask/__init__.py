"""FlashMask attention for Hugging Face Transformers: importing it registers `attn_implementation="flashmask"`."""

from . import bounds, prefix_tree
from .integration import register
from .packing import PackedDataCollator
from .preference import SharedPromptDataCollator, compute_log_probs, dpo_loss, reward_loss, set_loss
from .shared_prefix import share_prefixes
from .tree_attention import register_tree_attention

__all__ = [
    "PackedDataCollator",
    "SharedPromptDataCollator",
    "__version__",
    "bounds",
    "compute_log_probs",
    "dpo_loss",
    "prefix_tree",
    "register",
    "register_tree_attention",
    "reward_loss",
    "set_loss",
    "share_prefixes",
]

__version__ = "0.1.0"

register()
