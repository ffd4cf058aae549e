"""Float32 attention over rows of any length: the truth that every implementation is compared with before it is timed.

Heads are independent of each other. Only two groups of heads are computed, the first of the first row and the last of
the last row, but with every query, every key and all gradients.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from flashmask_kernels import reference_attention

TOLERANCE = 1e-2  # relative error of float16 and bfloat16; correct results have about 3e-3
SCORES = 1 << 26  # scores of one head that are alive at a time


class Attended(NamedTuple):
    """Output and gradients, each `[B, H, S, D]`."""

    out: Tensor
    d_query: Tensor
    d_key: Tensor
    d_value: Tensor


def attend_in_float32(query: Tensor, key: Tensor, value: Tensor, d_out: Tensor, bounds: Tensor) -> Attended:
    """Dense attention in IEEE float32, `SCORES` of each head at a time."""
    length, planes = query.shape[2], bounds.shape[2]
    if planes == 1:  # with the triangle as a plane, rows can be counted from any row
        triangle = torch.arange(key.shape[2], dtype=torch.int32, device=bounds.device) - (key.shape[2] - length)
        bounds = torch.cat([bounds, triangle.expand_as(bounds)], 2)
    key, value = (tensor.detach().float().requires_grad_() for tensor in (key, value))
    d_key, d_value = torch.zeros_like(key), torch.zeros_like(value)
    outs, d_queries = [], []
    rows = max(SCORES // key.shape[2], 1)
    for first in range(0, length, rows):
        chunk = slice(first, first + rows)
        wide = query[:, :, chunk].detach().float().requires_grad_()
        out, _ = reference_attention(wide, key, value, bounds - first)
        d_wide, *d_pair = torch.autograd.grad(out, (wide, key, value), d_out[:, :, chunk].float())
        outs.append(out.detach())
        d_queries.append(d_wide)
        d_key += d_pair[0]
        d_value += d_pair[1]
    return Attended(torch.cat(outs, 2), torch.cat(d_queries, 2), d_key, d_value)


class Truth:
    """The expected results of two groups of heads, for one mask and one set of inputs."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, d_out: Tensor, bounds: Tensor) -> None:
        self.kv_heads = key.shape[1]
        self.groups = sorted({(0, 0), (key.shape[0] - 1, key.shape[1] - 1)})
        self.expected = []
        for row, head in self.groups:
            q, k, v, d_o, mask = self._group(row, head, (query, key, value, d_out, bounds))
            self.expected.append(attend_in_float32(q, k, v, d_o, mask))

    def errors(self, attended: Attended) -> dict[str, float]:
        """Relative errors, the larger of the two groups'; nan where something is not finite."""
        worst = dict.fromkeys(Attended._fields, 0.0)
        for (row, head), expected in zip(self.groups, self.expected):
            for name, ours, truth in zip(Attended._fields, self._group(row, head, attended), expected):
                error = float((ours.float() - truth).norm() / truth.norm())
                worst[name] = max(worst[name], error) if error == error else error
        return worst

    def check(self, attended: Attended) -> dict[str, float]:
        """`errors`, or a ValueError that names them where one is too large."""
        errors = self.errors(attended)
        if not all(error < TOLERANCE for error in errors.values()):
            found = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
            raise ValueError(f"wrong result: relative errors against float32 {found}; {TOLERANCE:.0e} is accepted")
        return {name: float(f"{error:.1e}") for name, error in errors.items()}

    def _group(self, row: int, head: int, tensors: Iterable[Tensor]) -> list[Tensor]:
        """One key head of one row, and the query heads that share it. A tensor with one row or head has it for all."""
        group = []
        for tensor in tensors:
            heads = tensor.shape[1] // self.kv_heads
            if heads:
                tensor = tensor[:, head * heads : (head + 1) * heads]
            group.append(tensor[row : row + 1] if tensor.shape[0] > 1 else tensor)
        return group
