"""Shapes and strides of the tensors that kernels write."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """Shape and strides of new tensors."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of_model(cls, batch_size: int, heads: int, length: int, dim: int) -> Layout:
        """A tensor ``[B, H, S, D]`` that is laid out like a model's ``[B, S, H, D]``."""
        return cls((batch_size, heads, length, dim), (length * heads * dim, dim, heads * dim, 1))

    @classmethod
    def of_rows(cls, batch_size: int, heads: int, length: int) -> Layout:
        """A contiguous ``[B, H, S]``."""
        return cls((batch_size, heads, length), (heads * length, length, 1))

    def repeated(self, times: int) -> Layout:
        """So many such tensors, one after the other, in a new first dimension."""
        return Layout((times, *self.shape), (math.prod(self.shape), *self.strides))

    def new(self, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return like.new_empty_strided(*self, dtype=dtype)  # half the time of `new_empty` and `transpose`


def gradient_layouts(query: Tensor, value: Tensor) -> tuple[Layout, Layout, Layout]:
    """The layouts of the gradients of query, key and value."""
    batch_size, num_heads, q_len, dim = query.shape
    kv_heads, kv_len, dim_v = value.shape[1:]
    return (
        Layout.of_model(batch_size, num_heads, q_len, dim),
        Layout.of_model(batch_size, kv_heads, kv_len, dim),
        Layout.of_model(batch_size, kv_heads, kv_len, dim_v),
    )
