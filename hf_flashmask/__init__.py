"""FlashMask attention for Hugging Face Transformers: importing it registers `attn_implementation="flashmask"`."""

from . import bounds
from ._old_paths import keep_old_paths
from .integration import masks_of, register
from .parallel import keep_masks, sequence_parallel
from .sharing import prefix_tree, register_tree_attention, share_prefixes
from .training import (
    FlashMaskCallback,
    PackedDataCollator,
    SharedPromptDataCollator,
    TurnsDataCollator,
    compute_log_probs,
    dpo_loss,
    reset_loss,
    reward_loss,
    set_loss,
)

__all__ = [
    "FlashMaskCallback",
    "PackedDataCollator",
    "SharedPromptDataCollator",
    "TurnsDataCollator",
    "__version__",
    "bounds",
    "compute_log_probs",
    "dpo_loss",
    "keep_masks",
    "masks_of",
    "prefix_tree",
    "register",
    "register_tree_attention",
    "reset_loss",
    "reward_loss",
    "sequence_parallel",
    "set_loss",
    "share_prefixes",
]

__version__ = "0.2.0"

keep_old_paths()
register()
