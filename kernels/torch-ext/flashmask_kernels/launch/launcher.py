"""Launching kernels. At each launch Triton finds the compiled kernel by all arguments, which takes longer than short
rows take on the device. A `Launcher` has it found once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

from .. import environment
from ..configs import TRITON_VERSION

# The releases for which tests/launch_kinds.py finds that the driver gets from here what it gets from Triton.
FAST_RELEASES = (3, 5), (3, 9)
_IS_FAST = environment.FAST_LAUNCH and FAST_RELEASES[0] <= TRITON_VERSION <= FAST_RELEASES[1]


class _Compiled(NamedTuple):
    """A compiled kernel, and how its driver is called."""

    kernel: CompiledKernel
    device: int
    run: Callable[..., None]


class Launcher:
    """Launches a kernel on tensors of one kind: all that Triton compiles for, their device, dtypes, shapes, strides and
    addresses up to multiples of 16, must be what it was at the first launch.

    Args:
        numbers: the parameters of the kernel after the tensors.
        constants: its last parameters, by name.
        options: of Triton's compiler.
    """

    def __init__(
        self, kernel: Any, programs: int, numbers: tuple[Any, ...], constants: dict[str, Any], **options: Any
    ) -> None:
        self._kernel, self._programs, self._numbers = kernel, programs, numbers
        self._constants = {name: constants[name] for name in kernel.arg_names[-len(constants) :]}
        self._options = options
        # None: every launch goes through Triton. Assigned once it is complete, because other threads may launch.
        self._compiled: _Compiled | None = None
        self._values = (*numbers, *self._constants.values())

    def __call__(self, *tensors: Any) -> None:
        compiled = self._compiled
        if compiled is None:
            self._launch_by_triton(tensors)
        elif _profilers_watch():
            compiled.kernel[(self._programs, 1, 1)](*tensors, *self._values)
        else:
            # What the line above comes to, without the calls of profilers, which take as long as all the rest even if
            # they do nothing. Of a tensor, Triton would ask the driver whether its address is on the device.
            kernel, device, run = compiled
            run(
                driver.active.get_current_stream(device),
                kernel.function,
                kernel.packed_metadata,
                None,
                None,
                None,
                *[_addresses(tensor) for tensor in tensors],
                *self._values,
            )

    def _launch_by_triton(self, tensors: tuple[Any, ...]) -> None:
        compiled = self._kernel[(self._programs,)](*tensors, *self._numbers, **self._constants, **self._options)
        if _IS_FAST and isinstance(compiled, CompiledKernel):  # the interpreter compiles nothing
            run = functools.partial(compiled.run, self._programs, 1, 1)
            self._compiled = _Compiled(compiled, driver.active.get_current_device(), run)


def _profilers_watch() -> bool:
    """Whether somebody wants to be called at each launch."""
    enter, exit = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(exit, "calls", exit))


def _addresses(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    return tuple([_addresses(part) for part in argument]) if type(argument) is tuple else argument


@functools.lru_cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; for tests without one, a few."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def reason_against_fast_launch() -> str | None:
    """Why every launch goes through Triton; None where it does not."""
    if _IS_FAST:
        return None
    oldest, newest = (".".join(map(str, version)) for version in FAST_RELEASES)
    return f"it is tested with Triton {oldest} to {newest}" if environment.FAST_LAUNCH else "FLASHMASK_FAST_LAUNCH is 0"
