"""Kernel arguments from which tiles are loaded: TMA descriptors of tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class TileSources:
    """Makes descriptors, of Triton or Gluon, like ``descriptors`` but of other tensors of the same kinds."""

    def __init__(self, *descriptors: Any) -> None:
        # Most of the time to make a descriptor goes into checking its arguments, which these did.
        self._kinds = [(type(descriptor), {**vars(descriptor), "base": None}) for descriptor in descriptors]

    def __call__(self, *tensors: Tensor) -> tuple[Any, ...]:
        sources = []
        for tensor, (cls, fields) in zip(tensors, self._kinds):
            source = object.__new__(cls)
            vars(source).update(fields, base=tensor)
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


def addressable_by_tma(tensor: Tensor) -> Tensor:
    """``tensor``, copied if TMA cannot read it where it is: expanded, or at an odd address."""
    return tensor if descriptors_can_address(tensor) else tensor.clone(memory_format=torch.contiguous_format)
