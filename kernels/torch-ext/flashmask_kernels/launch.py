"""Launching kernels. Triton derives from all arguments of each launch which compiled kernel is meant, and takes longer
for it than short rows take on the device; `launch` remembers it for inputs of the same kind.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

from torch import Tensor
from triton.compiler import CompiledKernel

Kind = tuple[Hashable, ...]


class Launch(NamedTuple):
    """What a launch needs beside tensors.

    Attributes:
        numbers: the parameters of the kernel between tensors and constants.
        constants: the last parameters of the kernel, in their order.
        options: of Triton's compiler.
    """

    programs: int
    numbers: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, Any] = {}  # noqa: RUF012


# {(kernel, kind): (what launches the compiled kernel, its parameters after the tensors)}. Lengths, and with them kinds,
# may change with every batch: what is full is emptied.
_known: dict[tuple[Hashable, Kind], tuple[Callable[..., None], tuple[Any, ...]]] = {}
_MOST_KNOWN = 4096


def kind_of(first: Tensor | None, *others: Tensor | None) -> Kind:
    """What a kernel may be compiled for: shapes, strides, and addresses up to multiples of 16; of ``first``, which
    decides on those of ``others``, also device and dtype.
    """
    parts = [
        None if tensor is None else (tensor.shape, tensor.stride(), tensor.data_ptr() % 16)
        for tensor in (first, *others)
    ]
    return (*parts, None if first is None else (first.device, first.dtype))


def launch(kernel: Any, kind: Kind, tensors: tuple[Any, ...], describe: Callable[[], Launch]) -> None:
    """Launch a kernel on ``tensors``, its first parameters.

    Args:
        kind: decides, with the kernel, on all that ``describe`` returns and on everything that Triton compiles for:
            `kind_of` every tensor from outside and what else ``describe`` uses. Memory that was just allocated is
            aligned and needs no kind.
        describe: called for the first launch of a kind.
    """
    # `kernel` itself would hash its source.
    key = (kernel.fn, kind)
    known = _known.get(key)
    if known is not None:
        run, others = known
        run(*tensors, *others)
        return
    programs, numbers, constants, options = describe()
    assert kernel.arg_names[len(tensors) + len(numbers) :] == list(constants)
    compiled = kernel[(programs,)](*tensors, *numbers, **constants, **options)
    if isinstance(compiled, CompiledKernel):  # the interpreter compiles nothing
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        _known[key] = compiled[(programs, 1, 1)], (*numbers, *constants.values())
