"""Sequence parallelism: the tokens of a row on several GPUs, the mask of the whole row on each of them."""

from .handle import SequenceParallel, sequence_parallel
from .kept_masks import KeptMasks, keep_masks

__all__ = ["KeptMasks", "SequenceParallel", "keep_masks", "sequence_parallel"]
