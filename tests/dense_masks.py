"""Dense masks, written pair by pair, and what bounds say in the same form: what bounds are compared with."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from hf_flashmask.bounds import check_bounds, to_dense


def dense(visible: Callable[[int, int], bool], queries: range, keys: range) -> np.ndarray:
    """Dense mask from a statement about the positions of query and key."""
    return np.array([[bool(visible(q, k)) for k in keys] for q in queries], dtype=bool).reshape(len(queries), len(keys))


def dense_of_bounds(bounds: torch.Tensor, q_len: int) -> np.ndarray:
    """The table of DESIGN in plain Python."""
    batch, heads, planes, kv_len = bounds.shape
    mask = np.ones((batch, heads, q_len, kv_len), dtype=bool)
    for b, h, j in np.ndindex(batch, heads, kv_len):
        column = bounds[b, h, :, j].tolist()
        for i in range(q_len):
            if planes == 1:
                hidden = i >= column[0] or i < j - (kv_len - q_len)
            elif planes == 2:
                hidden = i >= column[0] or i < column[1]
            else:
                hidden = any(column[p] <= i < column[p + 1] for p in range(0, planes, 2))
            mask[b, h, i, j] = not hidden
    return mask


def assert_mask(bounds: torch.Tensor, expected: np.ndarray, q_len: int) -> None:
    check_bounds(bounds)
    assert bounds.is_contiguous()
    np.testing.assert_array_equal(
        to_dense(bounds, q_len).numpy(), expected if expected.ndim == 4 else expected[None, None]
    )
