"""Training: collators that pack rows, losses over answers that share prompts, and how a model computes them."""

from .balance import BalancedSampler, balanced_batches
from .callback import FlashMaskCallback
from .labels import AnswerLabels, LabelsOfRank
from .log_probs import compute_log_probs
from .loss_hooks import reset_loss, set_loss
from .losses import (
    answer_log_probs,
    answer_scores,
    dpo_loss,
    reference_log_probs,
    reward_loss,
    split_pairs,
    token_log_probs,
)
from .packing import Overflow, PackedDataCollator, PackingStrategy, pack_lengths
from .preference_collator import SharedPromptDataCollator
from .turns_collator import TurnOverflow, TurnsDataCollator

__all__ = [
    "AnswerLabels",
    "BalancedSampler",
    "FlashMaskCallback",
    "LabelsOfRank",
    "Overflow",
    "PackedDataCollator",
    "PackingStrategy",
    "SharedPromptDataCollator",
    "TurnOverflow",
    "TurnsDataCollator",
    "answer_log_probs",
    "answer_scores",
    "balanced_batches",
    "compute_log_probs",
    "dpo_loss",
    "pack_lengths",
    "reference_log_probs",
    "reset_loss",
    "reward_loss",
    "set_loss",
    "split_pairs",
    "token_log_probs",
]
