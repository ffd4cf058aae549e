"""Packed rows on the CPU: forward plus backward of flashmask compared with SDPA with a dense mask.

python benchmarks/attention_cpu.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measurement import RESULTS, time_on_cpu, write_results
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close

from flashmask_kernels import flashmask_attention
from hf_flashmask import bounds as bounds_of

LENGTH, DOCUMENTS, HEADS, KV_HEADS, HEAD_DIM = 8192, 8, 8, 2, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON (default: %(default)s)")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(1, LENGTH, heads, HEAD_DIM).transpose(1, 2).requires_grad_()
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    d_out = torch.randn(1, LENGTH, HEADS, HEAD_DIM).transpose(1, 2)
    cu_seqlens = torch.arange(0, LENGTH + 1, LENGTH // DOCUMENTS, dtype=torch.int32)
    bounds = bounds_of.from_cu_seqlens(cu_seqlens, LENGTH)
    dense = bounds_of.to_dense(bounds, LENGTH)

    def gradients_of(out: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: torch.autograd.grad(out, (query, key, value), d_out, retain_graph=True)

    implementations: dict[str, Callable[[], Tensor]] = {
        "flashmask": lambda: flashmask_attention(query, key, value, bounds),
        "sdpa, dense mask": lambda: scaled_dot_product_attention(query, key, value, attn_mask=dense, enable_gqa=True),
    }
    assert_close(*(attend() for attend in implementations.values()), rtol=1e-4, atol=1e-5)

    rows: list[dict[str, Any]] = []
    for name, attend in implementations.items():
        forward = time_on_cpu(attend)
        backward = time_on_cpu(gradients_of(attend()))
        total = forward["milliseconds"] + backward["milliseconds"]
        rows.append({"implementation": name, "forward": forward, "backward": backward, "milliseconds": round(total, 1)})
        print(f"{name:18} forward {forward['milliseconds']:8.1f} ms  backward {backward['milliseconds']:8.1f} ms")
    settings = {
        "dtype": "float32",
        "length": LENGTH,
        "documents": DOCUMENTS,
        "heads": HEADS,
        "kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
    }
    print(f"flashmask is {rows[1]['milliseconds'] / rows[0]['milliseconds']:.1f} times as fast")
    print("wrote", write_results("attention_cpu", "cpu", settings, rows, arguments.output))


if __name__ == "__main__":
    main()
