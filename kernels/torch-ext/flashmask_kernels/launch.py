"""Launching kernels. Triton derives from all arguments of each launch which compiled kernel is meant, and takes longer
for it than short rows take on the device: a `Launcher` asks it once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from triton.compiler import CompiledKernel


class Launcher:
    """Launches a kernel on tensors of one kind: all that Triton compiles for, their device, dtypes, shapes, strides and
    addresses up to multiples of 16, must be what it was at the first launch.

    Args:
        numbers: the parameters of the kernel after the tensors.
        constants: its last parameters, in their order.
        options: of Triton's compiler.
    """

    def __init__(
        self, kernel: Any, programs: int, numbers: tuple[Any, ...], constants: dict[str, Any], **options: Any
    ) -> None:
        self._kernel, self._programs, self._numbers = kernel, programs, numbers
        self._constants, self._options = constants, options
        self._run: Callable[..., None] | None = None
        self._values = (*numbers, *constants.values())

    def __call__(self, *tensors: Any) -> None:
        if self._run is not None:
            self._run(*tensors, *self._values)
            return
        assert self._kernel.arg_names[len(tensors) + len(self._numbers) :] == list(self._constants)
        compiled = self._kernel[(self._programs,)](*tensors, *self._numbers, **self._constants, **self._options)
        if isinstance(compiled, CompiledKernel):  # the interpreter compiles nothing
            self._run = compiled[(self._programs, 1, 1)]


def strides_of(*shape: int) -> tuple[int, ...]:
    """Of batch, heads and rows of a new tensor of shape `[B, S, H, D]` that is used as `[B, H, S, D]`."""
    return torch.empty(shape, device="meta").transpose(1, 2).stride()[:3]
