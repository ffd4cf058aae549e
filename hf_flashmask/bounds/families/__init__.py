"""Masks that people train today, one call each. They are made on the device, from ids or lengths, and wait for nothing.

Shared arguments:

* `document_ids`: integers `[B, S]` or `[S]`. A document is a run of *adjacent* equal ids. Positions with a negative id
  are padding: hidden from every query, and their rows see nothing. None is one document. Position ids that restart with
  each document become ids by `bounds.document_ends(position_ids)`.
* `length`, `device`: S and where the bounds are made, for calls without ids, which bring both.

Functions return the mask of all rows. `bounds.select_rows` and slices of the last dimension make rectangles of it.
"""

from .diffusion import block_diffusion, block_diffusion_decoder
from .drafters import anchored_blocks, parallel_eagle, training_time_test
from .multimodal import from_splits
from .segments import fork_and_join, gist_tokens, hstu, independent_chunks, isolated_items, sinks_and_window
from .streaming import streaming_chunks
from .video import frame_causal, teacher_forcing

__all__ = [
    "anchored_blocks",
    "block_diffusion",
    "block_diffusion_decoder",
    "fork_and_join",
    "frame_causal",
    "from_splits",
    "gist_tokens",
    "hstu",
    "independent_chunks",
    "isolated_items",
    "parallel_eagle",
    "sinks_and_window",
    "streaming_chunks",
    "teacher_forcing",
    "training_time_test",
]
