"""Launching kernels. Triton derives from all arguments of each launch which compiled kernel is meant, and takes longer
for it than short rows take on the device; `launch` remembers it for arguments of the same kind.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import Tensor
from triton.compiler import CompiledKernel

Kind = tuple[Hashable, ...]

# {(kernel, kind): (what Triton compiled, values of the constants)}. Lengths, and with them kinds, may change with every
# batch: what is full is emptied.
_compiled: dict[tuple[Hashable, Kind], tuple[CompiledKernel, tuple[Any, ...]]] = {}
_MOST_COMPILED = 4096


def kind_of(*tensors: Tensor | None) -> Kind:
    """What a kernel may be compiled for: device, dtypes, shapes, strides, and addresses up to multiples of 16."""
    return tuple(
        None if tensor is None else (tensor.device, tensor.dtype, tensor.shape, tensor.stride(), tensor.data_ptr() % 16)
        for tensor in tensors
    )


def launch(
    kernel: Any, programs: int, kind: Kind, arguments: tuple[Any, ...], constants: dict[str, Any], **options: Any
) -> None:
    """``kernel[(programs,)](*arguments, **constants, **options)``.

    Args:
        kind: decides, with the kernel, on everything that Triton compiles for: `kind_of` every tensor from outside, and
            whatever else ``constants``, ``options`` and integers come from. Memory that was just allocated is aligned
            and needs no kind.
        constants: the last parameters of the kernel, in their order.
    """
    # `kernel` itself would hash its source.
    key = (kernel.fn, kind)
    known = _compiled.get(key)
    if known is not None:
        compiled, values = known
        compiled[(programs, 1, 1)](*arguments, *values)
        return
    assert kernel.arg_names[len(arguments) :] == list(constants)
    compiled = kernel[(programs,)](*arguments, **constants, **options)
    if isinstance(compiled, CompiledKernel):  # the interpreter compiles nothing
        if len(_compiled) >= _MOST_COMPILED:
            _compiled.clear()
        _compiled[key] = compiled, tuple(constants.values())
