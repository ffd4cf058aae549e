"""Launching kernels. Triton derives from all arguments of each launch which compiled kernel is meant, and takes longer
for it than short rows take on the device: a `Launcher` asks it once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver


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
        self._compiled: CompiledKernel | None = None
        self._run: Callable[..., None]
        self._device: int
        self._values = (*numbers, *self._constants.values())

    def __call__(self, *tensors: Any) -> None:
        if self._compiled is None:
            self._compile_and_launch(tensors)
        elif _profilers_watch():
            self._compiled[(self._programs, 1, 1)](*tensors, *self._values)
        else:
            # What the line above comes to, less the profilers, which take as long as all the rest if they do nothing.
            # Of a tensor, Triton would ask the driver whether its address is one.
            self._run(
                driver.active.get_current_stream(self._device),
                self._compiled.function,
                self._compiled.packed_metadata,
                None,
                None,
                None,
                *[_addresses(tensor) for tensor in tensors],
                *self._values,
            )

    def _compile_and_launch(self, tensors: tuple[Any, ...]) -> None:
        compiled = self._kernel[(self._programs,)](*tensors, *self._numbers, **self._constants, **self._options)
        if isinstance(compiled, CompiledKernel):  # the interpreter compiles nothing
            self._compiled = compiled
            self._device = driver.active.get_current_device()
            self._run = functools.partial(compiled.run, self._programs, 1, 1)


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
