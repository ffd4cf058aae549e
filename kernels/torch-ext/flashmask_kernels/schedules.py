"""How long schedules live."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


def stream_of(device: torch.device) -> int | None:
    """The current stream, or None while it is captured into a CUDA graph: a graph owns the memory that is made in it,
    and makes it anew, from what its inputs are then, in every replay.
    """
    if device.type != "cuda":
        return 0
    if torch.cuda.is_current_stream_capturing():
        return None
    return torch._C._cuda_getCurrentRawStream(device.index)  # a Stream object takes ten times as long


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


class Schedules:
    """Those of one bounds tensor as it is now, on one stream, by the arguments of `build_schedule`."""

    def __init__(self, stream: int | None, version: int) -> None:
        self.stream, self.version = stream, version
        self._built: dict[tuple[Any, ...], Tensor] = {}
        self._extrema: dict[int, Tensor] = {}  # by the columns of a tile, which forward and backward often share

    def get(self, bounds: Tensor, q_len: int, block_m: int, block_n: int, by_column: bool) -> Tensor:
        arguments = q_len, block_m, block_n, by_column
        schedule = self._built.get(arguments)
        if schedule is None:
            extrema = self._extrema.get(block_n)
            if extrema is None:
                extrema = self._extrema[block_n] = column_extrema(bounds, block_n)
            schedule = self._built[arguments] = build_schedule(bounds, *arguments, extrema)
        return schedule


# The layers of one forward pass share their bounds tensor, and so its schedules: {bounds: {stream: schedules}}.
_schedules: WeakIdKeyDictionary = WeakIdKeyDictionary()


def schedules_of(bounds: Tensor) -> Schedules:
    stream = stream_of(bounds.device)
    version = 0 if bounds.is_inference() else bounds._version
    if stream is None:
        return Schedules(stream, version)
    of_streams = _schedules.setdefault(bounds, {})
    schedules = of_streams.get(stream)
    if schedules is None or schedules.version != version:
        schedules = of_streams[stream] = Schedules(stream, version)
    return schedules


def cached_schedule(bounds: Tensor, *arguments: Any) -> Tensor:
    return schedules_of(bounds).get(bounds, *arguments)
