"""Attention forward and backward on one GPU: flashmask beside FlexAttention and SDPA with a dense mask.

    python benchmarks/attention_gpu.py

Every implementation computes the same mask on the same inputs in the same process and is compared with float32
attention before it is timed. TFLOP/s count the visible (query, key) pairs only: 4 * H * D per pair forward, 2.5 times
that backward. Building the mask is timed apart, and so is what flashmask and FlexAttention cache between calls.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measurement import RESULTS, peak_memory, time_on_gpu, write_results
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from flashmask_kernels import flashmask_attention, ops, reference_attention
from hf_flashmask import bounds as bounds_of

HEADS, KV_HEADS, HEAD_DIM, DTYPE = 32, 8, 128, torch.bfloat16
DOCUMENTS = 8


class Mask(NamedTuple):
    """One mask in the forms that the implementations take."""

    bounds: Tensor
    mask_mod: Callable[..., Tensor]


class Inputs(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor


class Attention(NamedTuple):
    """How to build the mask (milliseconds apart) and what to call then."""

    build: Callable[[], Any]
    attend: Callable[[Tensor, Tensor, Tensor, Any], Tensor]


def document_lengths(length: int) -> Tensor:
    """Lengths of DOCUMENTS random documents, the same ones for every run."""
    generator = torch.Generator().manual_seed(length)
    cuts = torch.randperm(length - 1, generator=generator)[: DOCUMENTS - 1].sort().values + 1
    return torch.diff(torch.cat([torch.zeros(1, dtype=torch.long), cuts, torch.tensor([length])]))


def masks(length: int) -> dict[str, Mask]:
    lengths = document_lengths(length).cuda()
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
    document = torch.arange(DOCUMENTS, device="cuda").repeat_interleave(lengths)
    # Each document is a question, half of it, and two answers that do not see each other.
    start = cu_seqlens[:-1].long()
    question, answer = lengths // 2, (lengths - lengths // 2) // 2
    ends = torch.stack([start + lengths, start + question + answer, start + lengths], 1)
    parts = torch.stack([question, answer, lengths - question - answer], 1)
    subtree_end = ends.flatten().repeat_interleave(parts.flatten())
    everything = torch.full((length,), length, device="cuda")

    def table(ends: Tensor) -> Callable[..., Tensor]:
        return lambda b, h, q, k: (q >= k) & (q < ends[k])

    def lower(ends: Tensor) -> Tensor:
        return ends.int().view(1, 1, 1, length)

    return {
        "causal": Mask(lower(everything), lambda b, h, q, k: q >= k),
        "causal_document": Mask(
            bounds_of.from_cu_seqlens(cu_seqlens, length),
            lambda b, h, q, k: (q >= k) & (document[q] == document[k]),
        ),
        "shared_question": Mask(lower(subtree_end), table(subtree_end)),
    }


def implementations(mask: Mask, length: int) -> dict[str, Attention]:
    # Without this the second length would get a kernel for any length, which is slower.
    torch._dynamo.reset()
    compiled_flex = torch.compile(flex_attention, dynamic=False)

    def bounds_and_schedule() -> Tensor:
        """A fresh bounds tensor and what the kernels make of it once per forward pass: their schedules."""
        bounds = mask.bounds.clone()
        query = torch.empty(1, 1, length, HEAD_DIM, device="cuda", dtype=DTYPE)
        for kernel in ("forward", "key_value_gradient", "query_gradient"):
            ops._schedule(kernel, bounds, query, query, ops._cached_schedule)
        return bounds

    def flex(query: Tensor, key: Tensor, value: Tensor, block_mask: Any) -> Tensor:
        return compiled_flex(query, key, value, block_mask=block_mask, enable_gqa=True)

    def sdpa(query: Tensor, key: Tensor, value: Tensor, dense: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=dense, enable_gqa=True)

    found = {
        "flashmask": Attention(bounds_and_schedule, flashmask_attention),
        "flex_attention": Attention(
            lambda: create_block_mask(mask.mask_mod, 1, 1, length, length, device="cuda", _compile=True), flex
        ),
    }
    if length <= 8192:
        found["sdpa, dense mask"] = Attention(lambda: bounds_of.to_dense(mask.bounds, length), sdpa)
    return found


def check(attention: Attention, mask: Mask, inputs: Inputs, d_out: Tensor) -> dict[str, float]:
    """Relative errors of output and gradients against float32, in a row short enough for dense attention."""
    wide = Inputs(*(tensor.detach().float().requires_grad_() for tensor in inputs))
    expected, _ = reference_attention(*wide, mask.bounds)
    out = attention.attend(*inputs, attention.build())
    pairs = zip(
        ("out", "d_query", "d_key", "d_value"),
        (out, *torch.autograd.grad(out, inputs, d_out)),
        (expected, *torch.autograd.grad(expected, wide, d_out.float())),
    )
    errors = {name: float((ours.float() - truth).norm() / truth.norm()) for name, ours, truth in pairs}
    assert all(error < 1e-2 for error in errors.values()), errors
    return errors


def random_inputs(length: int) -> tuple[Inputs, Tensor]:
    def tensor(heads: int) -> Tensor:
        return torch.randn(1, length, heads, HEAD_DIM, device="cuda", dtype=DTYPE).transpose(1, 2)

    inputs = (tensor(count).requires_grad_() for count in (HEADS, KV_HEADS, KV_HEADS))
    return Inputs(*inputs), tensor(HEADS)


def measure(name: str, mask_name: str, length: int) -> dict[str, Any]:
    short = 2048
    short_mask = masks(short)[mask_name]
    errors = check(implementations(short_mask, short)[name], short_mask, *random_inputs(short))

    mask = masks(length)[mask_name]
    attention = implementations(mask, length)[name]
    inputs, d_out = random_inputs(length)
    built = attention.build()

    def forward() -> Tensor:
        with torch.no_grad():
            return attention.attend(*inputs, built)

    out = attention.attend(*inputs, built)
    times = {
        "forward": time_on_gpu(forward),
        "backward": time_on_gpu(lambda: torch.autograd.grad(out, inputs, d_out, retain_graph=True)),
        "mask": time_on_gpu(attention.build),
    }
    memory = peak_memory(lambda: torch.autograd.grad(attention.attend(*inputs, attention.build()), inputs, d_out))
    pairs = int(bounds_of.visible_pairs(mask.bounds, length))
    flops = {"forward": 4.0 * pairs * HEADS * HEAD_DIM, "backward": 10.0 * pairs * HEADS * HEAD_DIM}
    return {
        "mask": mask_name,
        "length": length,
        "visible": round(pairs / length**2, 4),
        "implementation": name,
        "milliseconds": {part: summary["milliseconds"] for part, summary in times.items()},
        "spread": {part: summary["spread"] for part, summary in times.items()},
        "tflops": {part: round(flops[part] / times[part]["milliseconds"] / 1e9, 1) for part in flops},
        "peak_mib": memory,
        "relative_error": {part: float(f"{error:.1e}") for part, error in errors.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON (default: %(default)s)")
    arguments = parser.parse_args()
    torch._dynamo.config.cache_size_limit = 64
    # FlexAttention's compiled backward would otherwise free what a second timed run needs.
    torch._functorch.config.donated_buffer = False
    rows = []
    for length in arguments.lengths:
        for mask_name, mask in masks(length).items():
            for name in implementations(mask, length):
                torch.manual_seed(0)
                rows.append(measure(name, mask_name, length))
                row = rows[-1]
                print(
                    f"{length:7} {mask_name:16} {name:18} forward {row['tflops']['forward']:6.1f}  backward "
                    f"{row['tflops']['backward']:6.1f} TFLOP/s  mask {row['milliseconds']['mask']:7.3f} ms",
                    flush=True,
                )
    settings = {
        "dtype": str(DTYPE).removeprefix("torch."),
        "heads": HEADS,
        "kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "documents": DOCUMENTS,
    }
    print("wrote", write_results("attention_gpu", "cuda", settings, rows, arguments.output))


if __name__ == "__main__":
    main()
