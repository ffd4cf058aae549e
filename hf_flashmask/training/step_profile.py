"""How much of a training step attention takes, by torch's profiler."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ..integration.attention import RANGE_OF_SDPA

__all__ = ["StepProfile"]

# The autograd function of eager calls, the operators under the compiler, and what SDPA computes.
_ATTENTION = ("FlashMaskAttention", "flashmask_kernels::", RANGE_OF_SDPA)


class StepProfile:
    """It is made where the step begins, and waits for the device there and at the end."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        self._profile = profile(activities=activities)
        self._profile.start()
        self._begin = self._now()

    def end(self) -> list[float]:
        """The fraction of the step that attention took; empty where attention was not called."""
        seconds = self._now() - self._begin
        self._profile.stop()
        calls = [
            event
            for event in self._profile.events() or ()
            if _is_attention_event(event) and not _is_inside_attention_event(event)
        ]
        is_gpu = self._device.type == "cuda"
        microseconds = sum(call.device_time_total if is_gpu else call.cpu_time_total for call in calls)
        return [microseconds / 1e6 / seconds] if calls else []

    def drop(self) -> None:
        """Stop after an error. Where the error is the device's, the profiler cannot wait for it."""
        with contextlib.suppress(RuntimeError):
            self._profile.stop()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def _is_attention_event(event: Any) -> bool:
    # Named ranges come once more as those of the device.
    return event.device_type == DeviceType.CPU and event.name.startswith(_ATTENTION)


def _is_inside_attention_event(event: Any) -> bool:
    """Whether another call of attention counts its time: that of a schedule, or of gradients."""
    parent = event.cpu_parent
    return parent is not None and (_is_attention_event(parent) or _is_inside_attention_event(parent))
