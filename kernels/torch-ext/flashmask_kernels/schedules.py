"""How long schedules live: as long as the object that holds them, which the caller owns."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Tiles = tuple[int, int, bool]
"""What a schedule is made for: ``block_m``, ``block_n`` and ``by_column`` of `schedule.build_schedule`."""


class Schedules:
    """The tiles to visit of one bounds tensor, made lazily, shared by all calls that are handed this object: the layers
    of one forward pass and their backward. The bounds must not change while it is used.

    A schedule is never read on another stream than the one that it was made on, nor across the border of the capture of
    a CUDA graph: there it is made anew. As for tensors, what is made inside of a capture belongs to it: an object from
    outside keeps nothing of what a capture makes.

    Under `torch.compile` in inference, an object made in the graph has each schedule made once. This writes to the
    object, which Dynamo refuses inside of a checkpointed region: hand over none where a model computes without
    gradients in training mode. With gradients nothing is written.

    Args:
        bounds: as of `flashmask_attention`, which takes this object only together with the same tensor.
        q_len: number of query rows S_q.
    """

    def __init__(self, bounds: Tensor, q_len: int) -> None:
        self.bounds, self.q_len = bounds, q_len
        self._made: dict[tuple[tuple[bool, int], Tiles], Tensor] = {}
        # By home and columns of a tile, which forward and backward often share.
        self._extrema: dict[tuple[tuple[bool, int], int], Tensor] = {}
        is_traced = torch.compiler.is_compiling()
        # Only an object that is made in a graph keeps what a graph makes.
        self._made_in_graph: dict[Tiles, Tensor] | None = {} if is_traced else None
        # A fake tensor may be on a device that does not exist.
        self._is_of_capture = not is_traced and type(bounds) is Tensor and capture_and_stream(bounds.device)[0]

    def check(self, bounds: Tensor | None, q_len: int) -> None:
        if self.bounds is not bounds:
            raise ValueError("`schedules` must be made from the `bounds` of this call, got those of another tensor")
        if self.q_len != q_len:
            raise ValueError(f"`schedules` must be made for {q_len} query rows, the query's; got {self.q_len}")

    def get(self, tiles: Tiles) -> Tensor:
        home = capture_and_stream(self.bounds.device)
        schedule = self._made.get((home, tiles))
        if schedule is None:
            block_m, block_n, by_column = tiles
            bounds = self.bounds.contiguous()
            extrema = self._extrema.get((home, block_n))
            if extrema is None:
                extrema = column_extrema(bounds, block_n)
            schedule = build_schedule(bounds, self.q_len, block_m, block_n, by_column, extrema)
            if self._is_of_capture or not home[0]:
                self._extrema[home, block_n], self._made[home, tiles] = extrema, schedule
        return schedule

    def get_in_graph(self, build: Callable[..., Tensor], tiles: Tiles) -> Tensor:
        """Called while a graph is traced, or by a dispatch mode. `build` is the operator of `build_schedule`.

        An inference graph keeps equal calls of an operator, so they are made once here. In training they are common
        subexpressions that the compiler removes.
        """
        bounds = self.bounds if self.bounds.is_contiguous() else self.bounds.contiguous()
        made = None if torch.is_grad_enabled() else self._made_in_graph
        schedule = None if made is None else made.get(tiles)
        if schedule is None:
            schedule = build(bounds, self.q_len, *tiles)
            if made is not None:
                made[tiles] = schedule
        return schedule


def capture_and_stream(device: torch.device) -> tuple[bool, int]:
    """Whether the current stream is captured into a CUDA graph, and that stream."""
    if device.type != "cuda":
        return False, 0
    # A Stream object takes ten times as long.
    return torch.cuda.is_current_stream_capturing(), torch._C._cuda_getCurrentRawStream(device.index)


def column_extrema(bounds: Tensor, block_n: int) -> Tensor:
    from . import schedule

    with torch.cuda.device_of(bounds):
        return schedule.column_extrema(bounds, block_n)


def build_schedule(
    bounds: Tensor, q_len: int, block_m: int, block_n: int, by_column: bool, extrema: Tensor | None = None
) -> Tensor:
    from . import schedule

    with torch.cuda.device_of(bounds):
        return schedule.build_schedule(bounds, q_len, block_m, block_n, by_column, extrema)
