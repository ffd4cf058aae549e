"""Attention of few rows against many keys, as in a step of generation: FlashAttention-2 with the keys split over
programs ("Flash-Decoding for long-context inference", 2023, https://pytorch.org/blog/flash-decoding).

The forward kernel would run one program a head here, and leave most of a GPU idle. Here the query heads that share a
key head are rows of one tile, so that keys are read once, and the keys are dealt to several programs, the parts. Each
part is an attention of its own; `merge_parts_kernel` weighs their outputs by their log-sum-exps. No schedule is made:
a part finds its first and its last visible tile by itself. Tiles are dealt in turn, so that the parts share evenly what
a window, padding or a static cache that is not full leave of the keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.tiles import LN_2, LOG2_E, SMALL_BLOCK, head_dim_blocks, hidden_elements, load_rows, soft_capped
from ..configs import Config
from ..launch.launcher import Launcher, num_processors
from ..launch.layout import Layout
from ..schedule import classify_columns, mask_strides, tiles_in

FEWEST_TILES = 4
"""Of a part: with fewer, merging costs more than it saves."""
PROGRAMS_PER_PROCESSOR = 2

_MERGED_DIMS, _MERGED_PARTS = 64, 64


@triton.jit
def visible_tiles(
    bounds, part, num_parts, q_len, kv_len, NUM_PLANES: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """The first tile of a part in which a row sees a key, and the end of the last one. The tiles of a part are
    ``part``, ``part + num_parts`` and so on.
    """
    num_tiles = tl.cdiv(kv_len, BLOCK_N)
    first_tile = part
    end_tile = 0
    for start in range(part, num_tiles, num_parts * CHUNK):
        tiles = start + num_parts * tl.arange(0, CHUNK)
        columns = tiles[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        hidden, _ = classify_columns(bounds, columns, 0, q_len, q_len, kv_len, NUM_PLANES)
        is_visible = tl.min(hidden.to(tl.int32), 1) == 0
        end_in_chunk = tl.max(tl.where(is_visible, tiles + 1, 0))
        if end_in_chunk > 0:
            if end_tile == 0:
                first_tile = tl.min(tl.where(is_visible, tiles, num_tiles))
            end_tile = end_in_chunk
    return first_tile, end_tile


@triton.jit
def in_base_2(products, factors, HAS_SOFTCAP: tl.constexpr):
    """Scores in base 2 of products of queries and keys."""
    scale, softcap = factors
    return soft_capped(products * scale, softcap) * LOG2_E if HAS_SOFTCAP else products * (scale * LOG2_E)


@triton.jit
def row_offsets(strides, batch, heads, rows):
    """Where rows of ``[B, H, S, D]`` begin, in 64 bits. ``heads`` and ``rows`` are numbers or vectors."""
    return batch.to(tl.int64) * strides[0] + heads.to(tl.int64) * strides[1] + rows.to(tl.int64) * strides[2]


@triton.jit
def decode_tile(
    q, k, v, out, lse, bounds, sinks, strides, factors, sizes, place, visible,
    HEADS_PER_KV_HEAD: tl.constexpr, NUM_PLANES: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_DIM_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write output and log-sum-exp that BLOCK_M rows have of the keys of one part. Returns whether the output holds
    NaN. Rows are counted through the heads that share a key head: row r is query row r % q_len of the head r // q_len.

    Keys and their values are the rows of the matrix products, queries the columns: products of 64 rows take few
    columns at no loss, and warps need not repeat each other's work.
    """
    q_strides, k_strides, v_strides, out_strides = strides
    q_len, kv_len, num_parts = sizes
    part, batch, kv_head, first_row, first_lse = place
    first_tile, end_tile = visible
    all_rows = first_row + tl.arange(0, BLOCK_M)
    exists = all_rows < q_len * HEADS_PER_KV_HEAD
    rows = all_rows % q_len
    heads = kv_head * HEADS_PER_KV_HEAD + all_rows // q_len
    dims = tl.arange(0, BLOCK_DIM)
    q_rows = row_offsets(q_strides, batch, heads, rows)
    q_tile = tl.load(q + q_rows[:, None] + dims[None, :], mask=exists[:, None] & (dims < DIM)[None, :], other=0.0)

    output = tl.zeros([BLOCK_DIM_V, BLOCK_M], dtype=tl.float32)
    # Scores and the maxima of rows, [BLOCK_M], are in base 2.
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    if HAS_SINKS:
        # A sink is a score that a row has seen before its first key, which is in the first part.
        sink = tl.load(sinks + heads, mask=exists, other=0.0).to(tl.float32) * LOG2_E
        row_max = tl.where(part == 0, sink, row_max)
        row_sum = tl.where(part == 0, 1.0, row_sum)

    for tile in range(first_tile, end_tile, num_parts):
        start_n = tile * BLOCK_N
        columns = start_n + tl.arange(0, BLOCK_N)
        k_tile = load_rows(k, k_strides, batch, kv_head, start_n, kv_len, DIM, BLOCK_N, BLOCK_DIM, True, False)
        products = tl.dot(k_tile, q_tile.T, input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        hidden = hidden_elements(bounds, rows[None, :], columns[:, None], q_len, kv_len, NUM_PLANES)
        scores = tl.where(hidden, float("-inf"), in_base_2(products, factors, HAS_SOFTCAP))
        new_max = tl.maximum(row_max, tl.max(scores, 0))
        # A row that has seen nothing yet keeps -inf; subtracting 0 instead avoids inf - inf.
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        probabilities = tl.exp2(scores - shift[None, :])
        correction = tl.exp2(row_max - shift)
        row_sum = row_sum * correction + tl.sum(probabilities, 0)
        row_max = new_max
        v_tile = load_rows(v, v_strides, batch, kv_head, start_n, kv_len, DIM_V, BLOCK_N, BLOCK_DIM_V, True, False)
        output = output * correction[None, :]
        output = tl.dot(v_tile.T, probabilities.to(v_tile.dtype), output, input_precision=PRECISION)

    # A row that saw nothing gets output 0 / 1 and log-sum-exp -inf + log 1.
    row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
    output = (output / row_sum[None, :]).T
    dims_v = tl.arange(0, BLOCK_DIM_V)
    out_rows = row_offsets(out_strides, batch, heads, rows)
    mask = exists[:, None] & (dims_v < DIM_V)[None, :]
    tl.store(out + out_rows[:, None] + dims_v[None, :], output.to(out.dtype.element_ty), mask=mask)
    tl.store(lse + first_lse + heads * q_len + rows, (row_max + tl.log2(row_sum)) * LN_2, mask=exists)
    # Flattened: two reductions of this output are more than Triton 3.7 compiles for sm_100.
    return tl.max((output != output).to(tl.int32).reshape(BLOCK_M * BLOCK_DIM_V), 0) > 0


@triton.jit
def decode_row(
    q, k, v, out, lse, bounds, sinks, strides, factors, sizes, place, visible,
    HEADS_PER_KV_HEAD: tl.constexpr, NUM_PLANES: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_DIM_V: tl.constexpr,
):  # fmt: skip
    """`decode_tile` for one row by vector arithmetic, which reads only what the row sees."""
    q_strides, k_strides, v_strides, out_strides = strides
    q_len, kv_len, num_parts = sizes
    part, batch, kv_head, row_in_heads, first_lse = place
    first_tile, end_tile = visible
    row = row_in_heads % q_len
    head = kv_head * HEADS_PER_KV_HEAD + row_in_heads // q_len
    dims, dims_v = tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK_DIM_V)
    k += row_offsets(k_strides, batch, kv_head, 0 * batch)
    v += row_offsets(v_strides, batch, kv_head, 0 * batch)
    q_row = tl.load(q + row_offsets(q_strides, batch, head, row) + dims, mask=dims < DIM, other=0.0).to(tl.float32)
    output = tl.zeros([BLOCK_DIM_V], dtype=tl.float32)
    row_max = float("-inf")
    row_sum = 0.0
    if HAS_SINKS:
        row_max = tl.where(part == 0, tl.load(sinks + head).to(tl.float32) * LOG2_E, row_max)
        row_sum = tl.where(part == 0, 1.0, row_sum)
    STEPS: tl.constexpr = BLOCK_N // SMALL_BLOCK
    for tile in range(first_tile, end_tile, num_parts):
        for step in range(STEPS):
            columns = (tile * STEPS + step) * SMALL_BLOCK + tl.arange(0, SMALL_BLOCK)
            seen = hidden_elements(bounds, row, columns, q_len, kv_len, NUM_PLANES) == 0
            in_k = columns.to(tl.int64)[:, None] * k_strides[2] + dims[None, :]
            k_tile = tl.load(k + in_k, mask=seen[:, None] & (dims < DIM)[None, :], other=0.0)
            products = tl.sum(k_tile.to(tl.float32) * q_row[None, :], 1)
            scores = tl.where(seen, in_base_2(products, factors, HAS_SOFTCAP), float("-inf"))
            new_max = tl.maximum(row_max, tl.max(scores, 0))
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
            probabilities = tl.exp2(scores - shift)
            correction = tl.exp2(row_max - shift)
            row_sum = row_sum * correction + tl.sum(probabilities, 0)
            row_max = new_max
            in_v = columns.to(tl.int64)[:, None] * v_strides[2] + dims_v[None, :]
            v_tile = tl.load(v + in_v, mask=seen[:, None] & (dims_v < DIM_V)[None, :], other=0.0)
            output = output * correction + tl.sum(probabilities[:, None] * v_tile.to(tl.float32), 0)
    row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
    output = output / row_sum
    out += row_offsets(out_strides, batch, head, row)
    tl.store(out + dims_v, output.to(out.dtype.element_ty), mask=dims_v < DIM_V)
    tl.store(lse + first_lse + head * q_len + row, (row_max + tl.log2(row_sum)) * LN_2)


@triton.jit(do_not_specialize=["q_len", "kv_len", "mask_stride_b", "batch_size", "num_parts"])
def decoding_kernel(
    q, k, v, out, lse, bounds, sinks, q_strides, k_strides, v_strides, out_strides, scale, softcap, q_len, kv_len,
    mask_stride_b, batch_size, num_parts,
    NUM_HEADS: tl.constexpr, HEADS_PER_KV_HEAD: tl.constexpr, HEADS_PER_MASK: tl.constexpr, NUM_PLANES: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_DIM_V: tl.constexpr,
    CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program attends from BLOCK_M rows of the heads that share a key head to one part of the keys."""
    KV_HEADS: tl.constexpr = NUM_HEADS // HEADS_PER_KV_HEAD
    num_row_tiles = tl.cdiv(q_len * HEADS_PER_KV_HEAD, BLOCK_M)
    part = tl.program_id(0) % num_parts
    first_row = tl.program_id(0) // num_parts % num_row_tiles * BLOCK_M
    batch_head = tl.program_id(0) // (num_parts * num_row_tiles)
    batch = batch_head // KV_HEADS
    kv_head = batch_head % KV_HEADS
    mask = (batch * mask_stride_b + kv_head * HEADS_PER_KV_HEAD // HEADS_PER_MASK).to(tl.int64)
    bounds += mask * NUM_PLANES * kv_len
    # Each part has an output and a log-sum-exp of its own for every row.
    out += part.to(tl.int64) * batch_size * q_len * NUM_HEADS * DIM_V
    first_lse = (part.to(tl.int64) * batch_size + batch) * NUM_HEADS * q_len
    visible = visible_tiles(bounds, part, num_parts, q_len, kv_len, NUM_PLANES, BLOCK_N, CHUNK)
    has_nan = decode_tile(
        q, k, v, out, lse, bounds, sinks, (q_strides, k_strides, v_strides, out_strides), (scale, softcap),
        (q_len, kv_len, num_parts), (part, batch, kv_head, first_row, first_lse), visible,
        HEADS_PER_KV_HEAD, NUM_PLANES, HAS_SOFTCAP, HAS_SINKS, DIM, DIM_V, BLOCK_M, BLOCK_N, BLOCK_DIM, BLOCK_DIM_V,
        PRECISION,
    )  # fmt: skip
    if has_nan:
        # 0 x NaN is NaN, so NaN of a hidden value may be in the output. The barrier separates the two stores.
        tl.debug_barrier()
        for row in range(first_row, tl.minimum(first_row + BLOCK_M, q_len * HEADS_PER_KV_HEAD)):
            decode_row(
                q, k, v, out, lse, bounds, sinks, (q_strides, k_strides, v_strides, out_strides), (scale, softcap),
                (q_len, kv_len, num_parts), (part, batch, kv_head, row, first_lse), visible,
                HEADS_PER_KV_HEAD, NUM_PLANES, HAS_SOFTCAP, HAS_SINKS, DIM, DIM_V, BLOCK_N, BLOCK_DIM, BLOCK_DIM_V,
            )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "q_len", "num_parts"])
def merge_parts_kernel(
    parts_out, parts_lse, out, lse, out_strides, num_rows, q_len, num_parts,
    NUM_HEADS: tl.constexpr, DIM_V: tl.constexpr, BLOCK_PARTS: tl.constexpr, BLOCK_DIM_V: tl.constexpr,
):  # fmt: skip
    """One program merges BLOCK_DIM_V elements of one row: the outputs of the parts, weighted by exp(log-sum-exp)."""
    num_dim_tiles = tl.cdiv(DIM_V, BLOCK_DIM_V)
    dim_tile = tl.program_id(0) % num_dim_tiles
    row = (tl.program_id(0) // num_dim_tiles).to(tl.int64)
    batch_head = row // q_len
    dims = dim_tile * BLOCK_DIM_V + tl.arange(0, BLOCK_DIM_V)
    in_row = batch_head // NUM_HEADS * out_strides[0] + batch_head % NUM_HEADS * out_strides[1]
    in_row = in_row + row % q_len * out_strides[2] + dims
    total_max = -float("inf")
    total = 0.0
    output = tl.zeros([BLOCK_DIM_V], dtype=tl.float32)
    for start in range(0, num_parts, BLOCK_PARTS):
        parts = (start + tl.arange(0, BLOCK_PARTS)).to(tl.int64)
        part_lse = tl.load(parts_lse + parts * num_rows + row, mask=parts < num_parts, other=-float("inf"))
        new_max = tl.maximum(total_max, tl.max(part_lse, 0))
        shift = tl.where(new_max == -float("inf"), 0.0, new_max)
        weights = tl.exp2((part_lse - shift) * LOG2_E)
        correction = tl.exp2((total_max - shift) * LOG2_E)
        # A part in which the row saw nothing is not read.
        mask = (part_lse != -float("inf"))[:, None] & (dims < DIM_V)[None, :]
        outputs = tl.load(parts_out + parts[:, None] * num_rows * DIM_V + in_row[None, :], mask=mask, other=0.0)
        output = output * correction + tl.sum(weights[:, None] * outputs, 0)
        total = total * correction + tl.sum(weights, 0)
        total_max = new_max
    output = output / tl.where(total == 0.0, 1.0, total)
    tl.store(out + in_row, output.to(out.dtype.element_ty), mask=dims < DIM_V)
    if dim_tile == 0:
        tl.store(lse + row, total_max + tl.log2(tl.where(total == 0.0, 1.0, total)) * LN_2)


def parts_of_keys(kv_len: int, programs_of_part: int, block_n: int, processors: int) -> int:
    """How many programs share the keys: by shapes alone, so that no graph depends on what a mask holds."""
    most = tiles_in(tiles_in(kv_len, block_n), FEWEST_TILES)
    return max(1, min(most, PROGRAMS_PER_PROCESSOR * processors // programs_of_part))


def _can_be_copied_ahead(tensor: Tensor) -> bool:
    """Whether Triton copies tiles while others are computed with. What it compiles for tells it of multiples of 16."""
    return tensor.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in tensor.stride()[:3])


class DecodingForward:
    """The forward kernels of few rows for inputs of one kind, that of the inputs it is made from (see `Launcher`).

    Args:
        query, key, value: ``[B, H, S_q, D]``, ``[B, H_kv, S_k, D]``, ``[B, H_kv, S_k, D_v]``, last dimension
            contiguous.
        bounds: int32 ``[B or 1, H_kv or 1, C, S_k]``, contiguous.
        sinks: ``[H]``, or None.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bounds: Tensor,
        sinks: Tensor | None,
        scale: float,
        softcap: float | None,
        config: Config,
    ) -> None:
        batch_size, num_heads, q_len, dim = query.shape
        kv_heads, kv_len, dim_v = value.shape[1:]
        group = num_heads // kv_heads
        block_m = min(config.block_m, max(16, triton.next_power_of_2(q_len * group)))
        programs_of_part = batch_size * kv_heads * tiles_in(q_len * group, block_m)
        num_parts = parts_of_keys(kv_len, programs_of_part, config.block_n, num_processors(query.device))
        block_dim, block_dim_v = head_dim_blocks(dim, dim_v)
        # Where Triton copied the values alone ahead, of 128 dims, ptxas left descriptors of products without a value.
        are_copied_ahead = _can_be_copied_ahead(key) and _can_be_copied_ahead(value)
        mask_stride_b, heads_per_mask = mask_strides(bounds, num_heads)
        self._out_layout = Layout.of_model(batch_size, num_heads, q_len, dim_v)
        self._lse_layout = Layout.of_rows(batch_size, num_heads, q_len)
        self._parts_out_layout = self._out_layout.repeated(num_parts)
        self._parts_lse_layout = self._lse_layout.repeated(num_parts)
        self._launch = Launcher(
            decoding_kernel,
            programs_of_part * num_parts,
            (
                *(tensor.stride()[:3] for tensor in (query, key, value)), self._out_layout.strides[:3], scale,
                0.0 if softcap is None else softcap, q_len, kv_len, mask_stride_b, batch_size, num_parts,
            ),
            {
                "NUM_HEADS": num_heads, "HEADS_PER_KV_HEAD": group, "HEADS_PER_MASK": heads_per_mask,
                "NUM_PLANES": bounds.shape[2], "HAS_SOFTCAP": softcap is not None, "HAS_SINKS": sinks is not None,
                "DIM": dim, "DIM_V": dim_v, "BLOCK_M": block_m, "BLOCK_N": config.block_n,
                "BLOCK_DIM": block_dim, "BLOCK_DIM_V": block_dim_v, "CHUNK": max(1, 2048 // config.block_n),
                "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
            },
            **config.options | ({} if are_copied_ahead else {"num_stages": 1}),
        )  # fmt: skip
        num_rows = batch_size * num_heads * q_len
        merged_dims = min(block_dim_v, _MERGED_DIMS)
        self._merge = None
        if num_parts > 1:
            self._merge = Launcher(
                merge_parts_kernel,
                num_rows * tiles_in(dim_v, merged_dims),
                (self._out_layout.strides[:3], num_rows, q_len, num_parts),
                {
                    "NUM_HEADS": num_heads, "DIM_V": dim_v, "BLOCK_PARTS": _MERGED_PARTS, "BLOCK_DIM_V": merged_dims,
                },
            )  # fmt: skip

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, sinks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """
        Returns:
            output ``[B, H, S_q, D_v]`` in the query's dtype, laid out like a model's ``[B, S_q, H, D_v]``; log-sum-exp
            ``[B, H, S_q]`` in float32.
        """
        out = self._out_layout.new(query)
        lse = self._lse_layout.new(query, torch.float32)
        if self._merge is None:
            self._launch(query, key, value, out, lse, bounds, sinks)
            return out, lse
        parts_out = self._parts_out_layout.new(query, torch.float32)
        parts_lse = self._parts_lse_layout.new(query, torch.float32)
        self._launch(query, key, value, parts_out, parts_lse, bounds, sinks)
        self._merge(parts_out, parts_lse, out, lse)
        return out, lse
