"""Two statistics of each row that the backward kernels read: the log-sum-exp in base 2, and delta.

The portable kernel of dQ computes both for the rows that it visits anyway. `RowStatistics` is a kernel of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch.launcher import Launcher
from ..launch.layout import Layout
from ..schedule import tiles_in
from .tiles import LOG2_E, head_dim_blocks, load_rows

# Statistics are padded to a multiple of this, which no tile exceeds: a row past the end has delta 0 and log-sum-exp
# inf, so that P = exp(-inf) = 0.
STATISTICS_BLOCK = tl.constexpr(128)


@triton.jit
def statistics_offset(batch_head, q_len):
    return batch_head.to(tl.int64) * tl.cdiv(q_len, STATISTICS_BLOCK) * STATISTICS_BLOCK


@triton.jit(noinline=True)  # so that it does not add to the registers of the caller
def write_row_statistics(
    out, d_out, lse, d_lse, lse_2, delta, out_strides, d_out_strides, q_len, batch_head, start_m,
    NUM_HEADS: tl.constexpr, HAS_D_LSE: tl.constexpr, DIM_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_DIM_V: tl.constexpr,
):  # fmt: skip
    """Write the statistics of BLOCK_M rows. delta = rowsum(out * d_out) - d_lse, so that P * (dP - delta) includes the
    gradient of the log-sum-exp.
    """
    batch = batch_head // NUM_HEADS
    head = batch_head % NUM_HEADS
    rows = start_m + tl.arange(0, BLOCK_M)
    out_tile = load_rows(out, out_strides, batch, head, start_m, q_len, DIM_V, BLOCK_M, BLOCK_DIM_V, True, False)
    d_out_tile = load_rows(d_out, d_out_strides, batch, head, start_m, q_len, DIM_V, BLOCK_M, BLOCK_DIM_V, True, False)
    row_delta = tl.sum(out_tile.to(tl.float32) * d_out_tile.to(tl.float32), 1)
    offsets = batch_head.to(tl.int64) * q_len + rows
    if HAS_D_LSE:
        row_delta -= tl.load(d_lse + offsets, mask=rows < q_len, other=0.0)
    padded_offsets = statistics_offset(batch_head, q_len) + rows
    tl.store(delta + padded_offsets, row_delta)
    tl.store(lse_2 + padded_offsets, tl.load(lse + offsets, mask=rows < q_len, other=float("inf")) * LOG2_E)


@triton.jit(do_not_specialize=["q_len"])
def row_statistics_kernel(
    out, d_out, lse, d_lse, lse_2, delta, out_strides, d_out_strides, q_len,
    NUM_HEADS: tl.constexpr, HAS_D_LSE: tl.constexpr, DIM_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_DIM_V: tl.constexpr,
):  # fmt: skip
    num_row_tiles = tl.cdiv(q_len, STATISTICS_BLOCK) * STATISTICS_BLOCK // BLOCK_M
    write_row_statistics(
        out, d_out, lse, d_lse, lse_2, delta, out_strides, d_out_strides, q_len,
        tl.program_id(0) // num_row_tiles, tl.program_id(0) % num_row_tiles * BLOCK_M,
        NUM_HEADS, HAS_D_LSE, DIM_V, BLOCK_M, BLOCK_DIM_V,
    )  # fmt: skip


def padded_rows(q_len: int) -> int:
    """Number of rows that the statistics of one head have."""
    return tiles_in(q_len, STATISTICS_BLOCK.value) * STATISTICS_BLOCK.value


class RowStatistics:
    """The statistics of inputs of one kind: float32 ``[B, H, padded_rows(S)]`` each.

    Attributes:
        layout: of each.
    """

    def __init__(self, out: Tensor, d_out: Tensor, d_lse: Tensor | None) -> None:
        batch_size, num_heads, q_len, dim_v = out.shape
        self.layout = Layout.of_rows(batch_size, num_heads, padded_rows(q_len))
        block_m = 64
        constants = {
            "NUM_HEADS": num_heads,
            "HAS_D_LSE": d_lse is not None,
            "DIM_V": dim_v,
            "BLOCK_M": block_m,
            "BLOCK_DIM_V": head_dim_blocks(dim_v, dim_v)[1],
        }
        programs = padded_rows(q_len) // block_m * batch_size * num_heads
        numbers = out.stride()[:3], d_out.stride()[:3], q_len
        self._launch = Launcher(row_statistics_kernel, programs, numbers, constants)

    def __call__(self, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor | None) -> tuple[Tensor, Tensor]:
        """The log-sum-exp in base 2 and delta."""
        lse_2, delta = self.layout.new(lse), self.layout.new(lse)
        self._launch(out, d_out, lse, d_lse, lse_2, delta)
        return lse_2, delta
