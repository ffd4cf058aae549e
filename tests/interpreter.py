"""Triton's interpreter in half of its time.

It makes Python objects for each operation of a kernel, most of them over and over. What is replaced here computes the
same, and has been alike in Triton 3.5 to 3.9.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def speed_up() -> None:
    _patch_modules_once()
    _look_dtypes_up()
    _check_no_overflows()
    _share_shapes()


def _patch_modules_once() -> None:
    """The interpreter searches `triton.language` for what it replaces whenever a kernel calls a function. All of a
    module is replaced, and put back, at once: one name tells whether it is.
    """
    patch, known = interpreter._patch_builtin, dict[Any, str | None]()

    def patch_unless_patched(module: Any, *others: Any) -> None:
        if module not in known:
            members = inspect.getmembers(module)
            known[module] = next((name for name, member in members if core.is_builtin(member)), None)
        name = known[module]
        if name is not None and core.is_builtin(getattr(module, name)):
            patch(module, *others)

    interpreter._patch_builtin = patch_unless_patched


def _look_dtypes_up() -> None:
    """The interpreter makes a table of all dtypes whenever it needs one. Blocks have the dtype of their elements."""
    find, known = interpreter._get_np_dtype, dict[str, np.dtype]()

    def find_once(dtype: Any) -> np.dtype:
        name = dtype.scalar.name
        if name not in known:
            known[name] = find(dtype)
        return known[name]

    interpreter._get_np_dtype = find_once


def _check_no_overflows() -> None:
    """The interpreter computes sums, differences and products of integers again to see whether they overflow, and then
    says so to nobody: that takes `debug`, which it has not.
    """
    TritonSemantic.binary_op_sanitize_overflow_impl = lambda self, lhs, rhs, operation: None


def _share_shapes() -> None:
    """A shape is checked and wrapped once, and not for each tensor and type."""
    make_type, make_tensor = core.block_type.__init__, core.tensor.__init__
    of_types, of_tensors = dict[tuple[int, ...], tuple[Any, int]](), dict[tuple[int, ...], tuple[Any, Any]]()

    def init_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = tuple([size.value if isinstance(size, core.constexpr) else size for size in shape])
        if key not in of_types:
            make_type(self, element_ty, shape)
            of_types[key] = self.shape, self.numel
        self.element_ty = element_ty
        self.shape, self.numel = of_types[key]
        self.name = f"<{self.shape}, {element_ty}>"

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        key = tuple(type.shape) if type.is_block() else ()
        if key not in of_tensors:
            make_tensor(self, handle, type)
            of_tensors[key] = self.numel, self.shape
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = of_tensors[key]

    core.block_type.__init__, core.tensor.__init__ = init_type, init_tensor
