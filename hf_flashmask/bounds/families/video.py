"""Video and world models: causal from frame to frame, and teacher forcing beside clean frames."""

from __future__ import annotations

import torch
from torch import Tensor

from ..form import check_per_position, check_size, previous_values, refuse_without_waiting
from ..intervals import from_ordered_intervals
from .diffusion import beside_clean
from .runs import DocumentRuns, Runs, document_runs_beside, runs_of


def frame_causal(
    frame_ids: Tensor,
    *,
    num_frame_per_block: int = 1,
    independent_first_frame: bool = False,
    local_attn_size: int | None = None,
    sink_size: int = 0,
    document_ids: Tensor | None = None,
) -> Tensor:
    """Chunks of frames see themselves and the chunks before (CausVid, arXiv 2412.07772; Self-Forcing, 2506.08009).

    Args:
        frame_ids: integers `[B, S]` or `[S]`, the frame of each token, counted from 0 in each clip and not decreasing
            there: `torch.arange(S) // frame_seqlen`.
        num_frame_per_block: frames of a chunk.
        independent_first_frame: the first frame is a chunk alone (image to video).
        local_attn_size: so many frames that a chunk sees, its own included, which must fit in. Default: all.
        sink_size: so many first frames that every later chunk sees as well, in addition to the window. For code that
            counts them in the window, pass `local_attn_size - sink_size`.
        document_ids: packed clips, see `bounds.families`.

    Returns:
        int32 `[B, 1, 2, S]`.

    Raises:
        TypeError: when ids are not integer tensors.
        ValueError: when they have other shapes, sizes are too small, the window is smaller than a chunk, or frames
            decrease inside of a clip; on a device the latter is an assertion there.

    >>> from hf_flashmask.bounds import to_dense
    >>> to_dense(frame_causal(torch.arange(6) // 2, local_attn_size=2))[0, 0].int()
    tensor([[1, 1, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [1, 1, 1, 1, 0, 0],
            [1, 1, 1, 1, 0, 0],
            [0, 0, 1, 1, 1, 1],
            [0, 0, 1, 1, 1, 1]], dtype=torch.int32)
    """
    documents, chunks, reach = _chunks_of_frames(
        frame_ids, num_frame_per_block, independent_first_frame, local_attn_size, sink_size, document_ids
    )
    mask = from_ordered_intervals([(chunks.start, reach)], documents.position.shape[0])
    return documents.hide_padding(mask)


def teacher_forcing(
    frame_ids: Tensor,
    *,
    num_frame_per_block: int = 1,
    independent_first_frame: bool = False,
    local_attn_size: int | None = None,
    sink_size: int = 0,
    document_ids: Tensor | None = None,
) -> Tensor:
    """Clean and noisy frames, `[clean | noisy]`: a noisy chunk sees itself and the clean chunks before it.

    Clean frames are `frame_causal` among themselves, and see nothing noisy. A noisy query sees the clean keys that a
    clean query of its chunk sees, without those of the chunk itself. This is teacher forcing in Self-Forcing, CausVid,
    FastVideo and Causal-Forcing.

    Args:
        frame_ids, num_frame_per_block, independent_first_frame, local_attn_size, sink_size, document_ids: as in
            `frame_causal`, for the L tokens of one copy.

    Returns:
        int32 `[B, 1, C, 2 L]`, C = 6 with `document_ids` or `local_attn_size`, else 4.

    Raises:
        TypeError, ValueError: as `frame_causal`.

    >>> from hf_flashmask.bounds import to_dense
    >>> to_dense(teacher_forcing(torch.tensor([0, 1, 2])))[0, 0].int()
    tensor([[1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0],
            [0, 0, 0, 1, 0, 0],
            [1, 0, 0, 0, 1, 0],
            [1, 1, 0, 0, 0, 1]], dtype=torch.int32)
    """
    documents, chunks, reach = _chunks_of_frames(
        frame_ids, num_frame_per_block, independent_first_frame, local_attn_size, sink_size, document_ids
    )
    is_seen_to_the_last = document_ids is None and local_attn_size is None
    return beside_clean(documents, chunks, reach, clean_first=True, is_seen_to_the_last=is_seen_to_the_last)


def _chunks_of_frames(
    frame_ids: Tensor,
    frames: int,
    is_first_alone: bool,
    window: int | None,
    sinks: int,
    document_ids: Tensor | None,
) -> tuple[DocumentRuns, Runs, Tensor]:
    """The clips, the chunk of each position, and past-the-last position that sees it, `[B, S]`."""
    frames, sinks = check_size("num_frame_per_block", frames), check_size("sink_size", sinks, least=0)
    if window is not None:
        window = check_size("local_attn_size", window)
        if window < frames:
            raise ValueError(
                f"`local_attn_size` ({window}) must not be smaller than the {frames} frames of a chunk "
                "(`num_frame_per_block`), which would hide frames of a chunk from itself"
            )
    frame_ids = check_per_position("frame_ids", frame_ids).to(torch.int32).contiguous()
    documents = document_runs_beside(frame_ids, document_ids)
    clips = documents.runs
    if documents.is_padding is not None:
        frame_ids = frame_ids.masked_fill(documents.is_padding, 0)
    refuse_without_waiting(
        (frame_ids < 0) | ((frame_ids < previous_values(frame_ids)) & (documents.position > clips.start)),
        ValueError(
            "`frame_ids` must not be negative, and not decrease inside of a clip: pass `document_ids` for packed clips"
        ),
    )
    chunk = (frame_ids + (frames - 1 if is_first_alone else 0)).div(frames, rounding_mode="floor")
    chunks = runs_of(chunk, *documents.ids)
    if window is None:
        return documents, chunks, clips.end
    # The last frame of a chunk says what it sees. Clips are told apart by where they start.
    past_chunk = chunk * frames + (1 if is_first_alone else frames)
    of_clip = clips.start.long() << 32
    reach = torch.searchsorted(of_clip + past_chunk, of_clip + frame_ids + window, right=True, out_int32=True)
    return documents, chunks, torch.where(frame_ids < sinks, clips.end, reach)
