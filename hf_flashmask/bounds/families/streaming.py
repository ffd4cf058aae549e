"""Streaming models of sound: chunks with left context and look-ahead."""

from __future__ import annotations

import torch
from torch import Tensor

from ..form import FAR, check_size
from ..intervals import from_ordered_intervals
from .runs import document_runs_of


def streaming_chunks(
    chunk_size: int,
    *,
    left_chunks: int | None = None,
    look_ahead_chunks: int = 0,
    document_ids: Tensor | None = None,
    length: int | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """A query sees its chunk, some chunks before it and some after it: NeMo's and SpeechBrain's streaming Conformers.

    A window that moves with each frame instead is `bounds.sliding_window((left, right), length)`, intersected with
    documents with `is_causal=False`.

    Args:
        chunk_size: positions of a chunk, counted from the start of each document.
        left_chunks: so many chunks before its own. Default: all.
        look_ahead_chunks: so many chunks after its own.
        document_ids, length, device: see `bounds.families`.

    Returns:
        int32 `[B or 1, 1, 2, S]`.

    Raises:
        TypeError: when `document_ids` is not an integer tensor.
        ValueError: when it has another shape, or a number is too small.

    >>> from hf_flashmask.bounds import to_dense
    >>> to_dense(streaming_chunks(2, left_chunks=1, length=6))[0, 0].int()
    tensor([[1, 1, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [1, 1, 1, 1, 0, 0],
            [1, 1, 1, 1, 0, 0],
            [0, 0, 1, 1, 1, 1],
            [0, 0, 1, 1, 1, 1]], dtype=torch.int32)
    """
    chunk_size = check_size("chunk_size", chunk_size)
    look_ahead = check_size("look_ahead_chunks", look_ahead_chunks, least=0) * chunk_size
    documents = document_runs_of(document_ids, length, device)
    position, (first, end) = documents.position, documents.runs
    chunk_start = position - (position - first) % chunk_size
    start = torch.maximum(chunk_start - min(look_ahead, FAR), first)
    if left_chunks is not None:
        reach = (check_size("left_chunks", left_chunks, least=0) + 1) * chunk_size
        end = torch.minimum(chunk_start + min(reach, FAR), end)
    return documents.hide_padding(from_ordered_intervals([(start, end)], position.shape[0]))
