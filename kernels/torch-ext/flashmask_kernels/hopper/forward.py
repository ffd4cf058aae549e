"""FlashMask's forward pass for sm_90, warp-specialised and persistent.

A consumer issues the scores of the next tile before the product of the last tile's probabilities with V, so that the
softmax of one tile runs beside the matrix products of another (FlashAttention-3, arXiv 2407.08608, section 3.2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.nan_repair import redo_forward
from ..common.tiles import LN_2, LOG2_E
from ..configs import Config
from ..launch.launcher import Launcher
from ..launch.layout import Layout
from ..launch.tile_sources import TileSources, addressable_by_tma
from ..schedule import mask_strides, max_runs_of, tiles_in
from .gluon_api import gl, gluon, hopper, mbarrier
from .masks import hide_by_mask, make_mask_ring, make_masks
from .tiles import (
    Ring,
    TileWidths,
    held_dims,
    hidden_from_compiler,
    make_barriers,
    note_nan,
    product_over_dims,
    store_rows,
    tile_of,
    tma_source,
)
from .work import (
    LAUNCH_OPTIONS,
    REGISTERS_OF_PARTS_WITH_MASKS,
    REGISTERS_WITH_MASKS,
    TILES_LEFT,
    ScheduleLists,
    assign_work,
    heads_at_a_time,
    load_run,
    make_work,
    new_counters,
    num_programs,
)


@gluon.jit
def _produce(
    q, k, v, lists, q_ring, k_ring, v_ring, work,
    NUM_HEADS: gl.constexpr, HEADS_PER_KV_HEAD: gl.constexpr, BLOCK_N: gl.constexpr, Q_TILES: gl.constexpr,
    Q_STAGES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    # V's buffers are one behind K's: a consumer multiplies with the V of one tile beside the K of the next. What is in
    # the first counts for nothing.
    mbarrier.arrive(v_ring.full.index(0), count=1)
    number = 0
    step = 0
    row_tile, batch_head, num_cut, num_full = work.read(number)
    while row_tile >= 0:
        tiles_left = num_cut + num_full
        work.draw_next(tiles_left <= TILES_LEFT)
        batch = batch_head // NUM_HEADS
        head = batch_head % NUM_HEADS
        kv_head = head // HEADS_PER_KV_HEAD
        runs = lists.runs_of(batch_head, row_tile)
        for tile in gl.static_range(Q_TILES):
            buffer = number % Q_STAGES * Q_TILES + tile
            row = (row_tile * Q_TILES + tile) * 64
            q_ring.load(q, [batch, head, row], buffer, (number // Q_STAGES & 1) ^ 1)
        for IS_CUT in gl.static_range(1, -1, -1):
            for run in range(gl.load(runs + (1 - IS_CUT))):
                first_tile, end_tile = load_run(runs, run, lists.max_runs, IS_CUT)
                for column_tile in range(first_tile, end_tile):
                    stage = step % STAGES
                    phase = (step // STAGES & 1) ^ 1
                    k_ring.load(k, [batch, kv_head, column_tile * BLOCK_N], stage, phase)
                    step += 1
                    stage = step % STAGES
                    phase = (step // STAGES & 1) ^ 1
                    v_ring.load(v, [batch, kv_head, column_tile * BLOCK_N], stage, phase)
                    tiles_left -= 1
                    work.draw_next(tiles_left == TILES_LEFT)
        number += 1
        row_tile, batch_head, num_cut, num_full = work.read(number)


@gluon.jit
def _pack(probabilities, dtype: gl.constexpr):
    """``probabilities`` [M, N] in ``dtype``, of 16 bits: two neighbours in each of [M, N / 2] integers.

    A loop that carries them as 16-bit values swaps the halves of each register at its end, and back at its beginning.
    """
    ROWS: gl.constexpr = probabilities.shape[0]
    PAIRS: gl.constexpr = probabilities.shape[1] // 2
    even, odd = gl.split(probabilities.reshape([ROWS, PAIRS, 2]))
    convert: gl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;" if dtype == gl.bfloat16 else "cvt.rn.f16x2.f32 $0, $2, $1;"
    return gl.inline_asm_elementwise(convert, "=r,f,f", [even, odd], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _unpack(pairs, dtype: gl.constexpr, layout: gl.constexpr):
    """What `_pack` packed, for a product that takes it from registers."""
    even = pairs.to(gl.int16).to(dtype, bitcast=True)
    odd = (pairs >> 16).to(gl.int16).to(dtype, bitcast=True)
    return gl.convert_layout(gl.join(even, odd).reshape([pairs.shape[0], 2 * pairs.shape[1]]), layout)


@gluon.jit
def _softmax(scores, row_max, row_sum, factor, IS_CUT: gl.constexpr):
    """Probabilities of a tile, new maximum and sum of its rows, and what the earlier output is multiplied with."""
    new_max = gl.maximum(row_max, gl.max(scores, 1) * factor)
    # A row that has seen nothing yet keeps -inf; subtracting 0 instead avoids inf - inf.
    shift = gl.where(new_max == float("-inf"), 0.0, new_max) if IS_CUT else new_max
    probabilities = gl.exp2(scores * factor - shift[:, None])
    correction = gl.exp2(row_max - shift)
    return probabilities, new_max, row_sum * correction + gl.sum(probabilities, 1), correction


@gluon.jit
def _consume(
    out, lse, has_nan, sinks, q_ring, k_ring, v_ring, masks, work, out_strides, scale, q_len,
    NUM_HEADS: gl.constexpr, HAS_SINKS: gl.constexpr,
    DIM_V: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_DIM_V: gl.constexpr, PARTS: gl.constexpr,
    Q_TILES: gl.constexpr, Q_STAGES: gl.constexpr, STAGES: gl.constexpr, consumer: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_ring.tiles.dtype
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DIM_V, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, scores_layout)
    out_row_layout: gl.constexpr = gl.SliceLayout(1, out_layout)

    # A consumer has rows of its own, or dims of V.
    own_rows: gl.constexpr = consumer % Q_TILES
    own_part: gl.constexpr = consumer % PARTS
    factor = scale * LOG2_E
    number = 0
    step = 0
    mask_step = 0
    pairs = _pack(gl.zeros([64, BLOCK_N], gl.float32, scores_layout), dtype)
    row_tile, batch_head, num_cut, num_full = work.take(number)
    while row_tile >= 0:
        head = batch_head % NUM_HEADS
        first_row = (row_tile * Q_TILES + own_rows) * 64
        rows = first_row + gl.arange(0, 64, row_layout)
        output = gl.zeros([64, BLOCK_DIM_V], gl.float32, out_layout)
        # Scores and their maxima are in base 2.
        if HAS_SINKS:
            row_max = gl.full([64], 1.0, gl.float32, row_layout) * (gl.load(sinks + head).to(gl.float32) * LOG2_E)
            row_sum = gl.full([64], 1.0, gl.float32, row_layout)
        else:
            row_max = gl.full([64], float("-inf"), gl.float32, row_layout)
            row_sum = gl.zeros([64], gl.float32, row_layout)

        buffer = number % Q_STAGES * Q_TILES + own_rows
        q_ring.wait(buffer, number // Q_STAGES & 1)
        # With heads of 65 to 128 the tensor cores are busy anyway.
        q_tile = tile_of(q_ring.tiles, buffer * PARTS)
        held_q = None if q_tile.shape[1] == 128 else held_dims(q_tile, 64 * PARTS, scores_layout)
        first_step = step
        for IS_CUT in gl.static_range(1, -1, -1):
            for _ in range(num_cut if IS_CUT else num_full):
                stage = step % STAGES
                phase = step // STAGES & 1
                own = hidden_from_compiler(buffer) if PARTS == 2 else buffer
                k_ring.wait(stage, phase)
                scores = product_over_dims(q_ring.tiles, own, k_ring.tiles, stage, scores_layout, PARTS, held_q)
                v_ring.wait(stage, phase)
                v_tile = tile_of(v_ring.tiles, stage * PARTS + own_part)
                probabilities = _unpack(pairs, dtype, p_layout)
                # The first tile of a piece has no product beside it. What it computes is dropped by the second.
                has_begun = step > first_step + 1
                output = hopper.warpgroup_mma(probabilities, v_tile, output, use_acc=has_begun, is_async=True)
                scores = hopper.warpgroup_mma_wait(1, [scores])
                k_ring.release(stage)
                if IS_CUT:
                    scores = hide_by_mask(scores, float("-inf"), masks, mask_step, BLOCK_N, own_rows)
                    mask_step += 1
                probabilities, row_max, row_sum, correction = _softmax(scores, row_max, row_sum, factor, IS_CUT)
                output = hopper.warpgroup_mma_wait(0, [output])
                v_ring.release(stage)
                output = output * gl.convert_layout(correction, out_row_layout)[:, None]
                pairs = _pack(probabilities, dtype)
                step += 1
        q_ring.release(buffer)
        if step > first_step:
            stage = step % STAGES
            v_ring.wait(stage, step // STAGES & 1)
            v_tile = tile_of(v_ring.tiles, stage * PARTS + own_part)
            probabilities = _unpack(pairs, dtype, p_layout)
            has_begun = step > first_step + 1
            output = hopper.warpgroup_mma(probabilities, v_tile, output, use_acc=has_begun, is_async=True)
            output = hopper.warpgroup_mma_wait(0, [output])

        # A row that saw nothing: output 0 / 1, log-sum-exp -inf + log 1.
        row_sum = gl.where(row_sum == 0.0, 1.0, row_sum)
        output = output * gl.convert_layout(1.0 / row_sum, out_row_layout)[:, None]
        offsets = batch_head.to(gl.int64) * q_len + rows
        gl.store(lse + offsets, (row_max + gl.log2(row_sum)) * LN_2, mask=rows < q_len)
        note_nan(has_nan, output)
        store_rows(
            out, out_strides, output, batch_head // NUM_HEADS, head, first_row, own_part * BLOCK_DIM_V, q_len,
            DIM_V, BLOCK_DIM_V,
        )  # fmt: skip
        number += 1
        row_tile, batch_head, num_cut, num_full = work.take(number)


@gluon.jit(
    do_not_specialize=[
        "q_len", "kv_len", "num_items", "num_row_tiles", "heads_at_a_time", "mask_stride_b", "max_runs"
    ]
)  # fmt: skip
def attention_forward_kernel(
    q, k, v, out, lse, bounds, schedule, sinks, counter, has_nan, out_strides,
    scale, q_len, kv_len, num_items, num_row_tiles, heads_at_a_time, mask_stride_b, max_runs,
    NUM_HEADS: gl.constexpr, HEADS_PER_KV_HEAD: gl.constexpr, HEADS_PER_MASK: gl.constexpr,
    NUM_PLANES: gl.constexpr, HAS_SINKS: gl.constexpr, DIM_V: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_DIM: gl.constexpr, BLOCK_DIM_V: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    # The consumers divide the rows of a tile, or of heads past 256 the dims of V.
    Q_TILES: gl.constexpr = 2 // PARTS
    # Two buffers for the query of each consumer, so that the query of the next piece of work is loaded early.
    Q_STAGES: gl.constexpr = 2 if BLOCK_DIM <= 128 else 1
    q_tiles = gl.allocate_shared_memory(q.dtype, [2 * Q_STAGES, 1, 1, 64, BLOCK_DIM], q.layout)
    k_tiles = gl.allocate_shared_memory(k.dtype, [STAGES * PARTS, 1, 1, BLOCK_N, BLOCK_DIM], k.layout)
    v_tiles = gl.allocate_shared_memory(v.dtype, [STAGES * PARTS, 1, 1, BLOCK_N, BLOCK_DIM_V], v.layout)
    masks = make_mask_ring(BLOCK_N, 4)
    work = make_work(4)
    q_ring = Ring(q_tiles, make_barriers(Q_TILES * Q_STAGES, 1), make_barriers(Q_TILES * Q_STAGES, PARTS))
    k_ring = Ring(k_tiles, make_barriers(STAGES, 1), make_barriers(STAGES, 2))
    v_ring = Ring(v_tiles, make_barriers(STAGES, 1), make_barriers(STAGES, 2))
    lists = ScheduleLists(schedule, num_row_tiles, mask_stride_b, max_runs, NUM_HEADS, HEADS_PER_MASK)
    hopper.fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (
                out, lse, has_nan, sinks, q_ring, k_ring, v_ring, masks, work, out_strides, scale, q_len,
                NUM_HEADS, HAS_SINKS, DIM_V, BLOCK_N, BLOCK_DIM_V, PARTS, Q_TILES, Q_STAGES, STAGES, 0,
            )),
            (_consume, (
                out, lse, has_nan, sinks, q_ring, k_ring, v_ring, masks, work, out_strides, scale, q_len,
                NUM_HEADS, HAS_SINKS, DIM_V, BLOCK_N, BLOCK_DIM_V, PARTS, Q_TILES, Q_STAGES, STAGES, 1,
            )),
            (_produce, (
                q, k, v, lists, q_ring, k_ring, v_ring, work,
                NUM_HEADS, HEADS_PER_KV_HEAD, BLOCK_N, Q_TILES, Q_STAGES, STAGES,
            )),
            (assign_work, (lists, counter, work, num_items, heads_at_a_time, BLOCK_N, True)),
            (make_masks, (bounds, lists, masks, work, q_len, kv_len, NUM_PLANES, Q_TILES * 64, BLOCK_N)),
        ],
        [4, 1, 1, 2],
        REGISTERS_WITH_MASKS if PARTS == 1 else REGISTERS_OF_PARTS_WITH_MASKS,
    )  # fmt: skip


class AttentionForward:
    """The forward kernel for inputs of one kind, as `portable.AttentionForward`, without dropout and softcap and for
    head sizes to 512.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bounds: Tensor,
        sinks: Tensor | None,
        schedule: Tensor,
        scale: float,
        config: Config,
    ) -> None:
        query, key, value = (addressable_by_tma(tensor) for tensor in (query, key, value))
        batch_size, num_heads, q_len, dim = query.shape
        kv_heads, kv_len, dim_v = value.shape[1:]
        block_dim, block_dim_v, parts = TileWidths.of(dim, dim_v)
        mask_stride_b, heads_per_mask = mask_strides(bounds, num_heads)
        heads_per_kv_head = num_heads // kv_heads
        num_row_tiles = tiles_in(q_len, config.block_m)
        num_items = num_row_tiles * batch_size * num_heads
        self._out_layout = Layout.of_model(batch_size, num_heads, q_len, dim_v)
        self._lse_layout = Layout.of_rows(batch_size, num_heads, q_len)
        blocks = (64, block_dim), (config.block_n, block_dim), (config.block_n, block_dim_v)
        self._sources = TileSources(*map(tma_source, (query, key, value), blocks))
        numbers = (
            self._out_layout.strides[:3],
            scale,
            q_len,
            kv_len,
            num_items,
            num_row_tiles,
            heads_at_a_time(kv_heads, num_row_tiles * heads_per_kv_head, key, value) * heads_per_kv_head,
            mask_stride_b,
            max_runs_of(schedule),
        )
        constants = {
            "NUM_HEADS": num_heads,
            "HEADS_PER_KV_HEAD": heads_per_kv_head,
            "HEADS_PER_MASK": heads_per_mask,
            "NUM_PLANES": bounds.shape[2],
            "HAS_SINKS": sinks is not None,
            "DIM_V": dim_v,
            "BLOCK_N": config.block_n,
            "BLOCK_DIM": block_dim,
            "BLOCK_DIM_V": block_dim_v,
            "PARTS": parts,
            "STAGES": config.num_stages,
        }
        programs = num_programs(query.device, num_items)
        self._launch = Launcher(attention_forward_kernel, programs, numbers, constants, **LAUNCH_OPTIONS)
        tile = config.block_m, config.block_n
        self._redo = redo_forward(query, key, value, bounds, sinks, schedule, scale, tile)

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bounds: Tensor,
        sinks: Tensor | None,
        schedule: Tensor,
        seed: None = None,
    ) -> tuple[Tensor, Tensor]:
        """Arguments and results as of `portable.AttentionForward`."""
        inputs = query, key, value = tuple(addressable_by_tma(tensor) for tensor in (query, key, value))
        out = self._out_layout.new(query)
        lse = self._lse_layout.new(query, torch.float32)
        counter, has_nan = new_counters(2, query.device)
        self._launch(*self._sources(*inputs), out, lse, bounds, schedule, sinks, counter, has_nan)
        self._redo(has_nan, query, key, value, out, lse, bounds, schedule, sinks)
        return out, lse
