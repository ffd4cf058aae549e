"""Kernel arguments from which tiles are loaded: tensors or TMA descriptors of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


class TileSources:
    """Makes the kernel arguments from which `load_rows` reads tensors ``[B, H, S, D]`` of the same kinds as
    ``tensors``: TMA descriptors for ``tiles`` of rows and head sizes, or without these the tensors themselves.
    """

    def __init__(self, tensors: tuple[Tensor, ...], tiles: tuple[tuple[int, int], ...] | None) -> None:
        # Most of the time to make a descriptor goes into checking its arguments, which are checked once here.
        self._descriptors = [
            {**vars(TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [1, 1, *tile])), "base": None}
            for tensor, tile in zip(tensors, tiles or ())
        ]

    def __call__(self, *tensors: Tensor) -> tuple[Any, ...]:
        if not self._descriptors:
            return tensors
        sources = []
        for tensor, descriptor in zip(tensors, self._descriptors):
            source = object.__new__(TensorDescriptor)
            vars(source).update(descriptor, base=tensor)
            sources.append(source)
        return tuple(sources)


def descriptors_can_address(*tensors: Tensor) -> bool:
    """TMA wants a 16-byte aligned base, 16-byte strides, and at least one element."""
    return all(
        tensor.numel() > 0
        and tensor.data_ptr() % 16 == 0
        and all(stride > 0 and stride * tensor.element_size() % 16 == 0 for stride in tensor.stride()[:-1])
        for tensor in tensors
    )
