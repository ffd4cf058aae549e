"""Sequence parallelism: the tokens of a row on several GPUs, the mask of the whole row on each of them."""

from .handle import SequenceParallel, sequence_parallel

__all__ = ["SequenceParallel", "sequence_parallel"]
