"""Random calls of `flashmask_attention` against dense attention, by the criterion of the tests.

    python tests/fuzz_attention.py                             # 10,000 cases on the GPUs
    python tests/fuzz_attention.py --device cpu --cases 500    # plain torch

A case is named by its number alone: `--first 123 --cases 1` repeats one. Lengths, bounds (any int32), values, strides,
scale and seeds are random in every case; what kernels are compiled for (dtype, head sizes, heads, planes, softcap,
sinks, dropout) comes from a number of combinations, because compiling them takes a minute each. A fifth of these are
long rows for the kernels of sm_90, which here take inputs of any size. New memory is filled with NaN and the largest
integer: an element that nobody wrote shows.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import random
import sys
import time
from typing import Any

import torch
from attention_checks import assert_matches_reference, assert_near, random_intervals
from torch import Tensor

from flashmask_kernels import api, dispatch, flashmask_attention, reference_attention
from flashmask_kernels.dropout import draw_seed, kept_elements

SIGNATURES = 60


def signature(number: int) -> dict[str, Any]:
    """What a kernel is compiled for."""
    choose = random.Random(number).choice
    kv_heads = choose([1, 1, 2, 3])
    if number % 5 == 0:
        dim = choose([40, 56, 64, 64, 72, 80, 96, 104, 128, 128, 136, 192, 256, 256, 328, 512])
        return {
            "dtype": choose([torch.float16, torch.bfloat16, torch.bfloat16]),
            "heads": kv_heads * choose([1, 2, 3]),
            "kv_heads": kv_heads,
            "mask_heads": choose([1, 1, kv_heads]),
            "dim": dim,
            "dim_v": choose([dim, dim, dim, 64, 128]),
            "planes": choose([1, 1, 2, 2, 4, 6, 10, 32]),
            "softcap": None,
            "has_sinks": choose([False, False, True]),
            "dropout_p": 0.0,
            "deterministic": choose([False, False, True]),
            "is_long": True,
        }
    heads = kv_heads * choose([1, 2, 3, 5, 7])
    dim = choose([8, 16, 24, 64, 64, 72, 80, 96, 104, 128, 128, 160, 192, 256])
    dtypes = [torch.float16, torch.bfloat16, torch.bfloat16, torch.float32]
    return {
        "dtype": choose(dtypes),
        "heads": heads,
        "kv_heads": kv_heads,
        "mask_heads": choose([1, 1, kv_heads, heads]),
        "dim": dim,
        "dim_v": choose([dim, dim, dim, 64, 128]),
        "planes": choose([1, 1, 2, 2, 4, 6, 10, 32]),
        "softcap": choose([None, None, None, 5.0]),
        "has_sinks": choose([False, False, True]),
        "dropout_p": choose([0.0, 0.0, 0.0, 0.3]),
        "deterministic": False,
        "is_long": False,
    }


def random_length(choose: random.Random, is_long: bool, device: str) -> int:
    if is_long:
        # The kernels of sm_90 take long rows. Plain torch has several tiles of shorter ones.
        fewest = 256 if device == "cpu" else 1024
        longest = fewest * 9 // 4
        return choose.choice(
            [
                fewest,
                choose.randint(fewest, fewest * 3 // 2),
                choose.randint(fewest, longest),
                64 * choose.randint(fewest // 64, longest // 64),
            ]
        )
    return choose.choice([1, choose.randint(1, 40), choose.randint(1, 300), 64 * choose.randint(1, 4)])


def random_tensor(
    batch: int, heads: int, length: int, dim: int, dtype: torch.dtype, device: str, layout: str
) -> Tensor:
    """`[B, heads, S, D]`, contiguous, as models lay it out, or a part of a larger tensor."""
    if layout == "contiguous":
        return torch.randn(batch, heads, length, dim, device=device).to(dtype)
    if layout == "model":
        return torch.randn(batch, length, heads, dim, device=device).to(dtype).transpose(1, 2)
    joined = torch.randn(batch, length, heads, dim + 24, device=device).to(dtype).transpose(1, 2)
    return joined[..., 8 : 8 + dim]


def blocks(bounds: Tensor, size: int) -> Tensor:
    """Intervals in multiples of a size: they hide tiles together, and make full ones."""
    return bounds // size * size


def run_case(number: int, device: str) -> None:
    choose = random.Random(10**6 + number)
    what = signature(number % SIGNATURES)
    torch.manual_seed(number)
    dtype, heads, kv_heads, dropout_p = what["dtype"], what["heads"], what["kv_heads"], what["dropout_p"]
    batch = choose.choice([1, 1, 2] if what["is_long"] else [1, 1, 2, 3])
    q_len = random_length(choose, what["is_long"], device)
    kv_len = choose.choice([q_len, q_len, random_length(choose, what["is_long"], device)])
    layout = choose.choice(["model", "model", "contiguous", "part"])
    query = random_tensor(batch, heads, q_len, what["dim"], dtype, device, layout)
    key = random_tensor(batch, kv_heads, kv_len, what["dim"], dtype, device, layout)
    value = random_tensor(batch, kv_heads, kv_len, what["dim_v"], dtype, device, layout)
    bounds = random_intervals(choose.choice([1, batch]), what["mask_heads"], what["planes"], q_len, kv_len)
    if choose.random() < 0.5:
        bounds = blocks(bounds, choose.choice([16, 64]))
    if choose.random() < 0.3:
        bounds = bounds.sort(-1).values
    bounds = bounds.to(device)
    sinks = torch.randn(heads, device=device).to(dtype) if what["has_sinks"] else None
    scale = choose.choice([None, None, 0.0, 0.37])
    keep = None
    if dropout_p:
        torch.manual_seed(number)
        seed = draw_seed(torch.device(device))
        head = torch.arange(batch * heads, device=device).view(batch, heads, 1, 1)
        rows, columns = torch.arange(q_len, device=device)[:, None], torch.arange(kv_len, device=device)
        keep = kept_elements(seed, head, rows, columns, dropout_p)

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        torch.manual_seed(number)
        return flashmask_attention(
            q, k, v, mask, scale=scale, dropout_p=dropout_p, deterministic=what["deterministic"], return_lse=True,
            **options,
        )  # fmt: skip

    def reference(*args: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        return reference_attention(*args, scale=scale, keep=keep, dropout_p=dropout_p, **options)

    # The gradient of a score is a difference, P * (dP - delta): where a row sees one key, or dropout leaves one, it is
    # 0, and what remains is rounding of the size of dP. So is that of P, times the largest exponent, of some 4 standard
    # deviations. A key and a sink add that of many rows.
    eps, shared = torch.finfo(dtype).eps, heads // kv_heads
    size = what["dim"] ** -0.5 if scale is None else scale
    of_score = what["dim_v"] ** 0.5 / (1.0 - dropout_p)
    slack = (16 + 4 * size * what["dim"] ** 0.5) * eps * max(size * of_score * shared**0.5, 1.0)
    slacks = {
        "d_query": slack,
        "d_key": max(slack, 2 * eps * size * of_score * (shared * q_len) ** 0.5),
        "d_value": slack,
        "d_sinks": max(slack, 0.5 * eps * of_score * (batch * q_len) ** 0.5),
    }
    assert_matches_reference(
        attend, query, key, value, bounds, what["softcap"], sinks, reference=reference, slack=slacks
    )
    with torch.no_grad():  # few rows take other kernels then
        out, lse = attend(query, key, value, bounds, softcap=what["softcap"], sinks=sinks)
    expected, expected_lse = reference(query, key, value, bounds, softcap=what["softcap"], sinks=sinks)
    assert torch.equal(lse == -torch.inf, expected_lse == -torch.inf)
    assert_near(out, expected)
    assert_near(lse, expected_lse)


def failures(arguments: tuple[range, str]) -> list[str]:
    numbers, device = arguments
    torch.set_num_threads(1)
    dispatch.FEWEST_SPECIALIZED_ELEMENTS = 0
    # Only deterministic algorithms fill new memory; the kernels are not told, so that the fused one is among them.
    api._torch_is_deterministic = lambda: False
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    found = []
    for number in numbers:
        # As rows long enough for descriptors, or as short ones.
        fewest = 0 if number % SIGNATURES % 2 else 1 << 60
        dispatch.FEWEST_DESCRIBED_ELEMENTS = dict.fromkeys(dispatch.FEWEST_DESCRIBED_ELEMENTS, fewest)
        dispatch.plans.clear()
        try:
            run_case(number, device)
        except Exception as error:
            found.append(f"case {number} {signature(number % SIGNATURES)}: {type(error).__name__}: {error}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--cases", type=int, default=10000, help="(default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first case (default: %(default)s)")
    parser.add_argument("--device", default="cuda", help="(default: %(default)s)")
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count(), help="(default: %(default)s)")
    arguments = parser.parse_args()
    start, done, failed = time.perf_counter(), 0, []
    # The cases of one signature stay together: nobody compiles what another worker is compiling.
    end = arguments.first + arguments.cases
    starts = range(arguments.first, min(arguments.first + SIGNATURES, end))
    # The device "cuda" stands for all GPUs in turn.
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    devices = itertools.cycle(gpus if arguments.device == "cuda" and gpus else [arguments.device])
    work = [(range(start, end, SIGNATURES), device) for start, device in zip(starts, devices)]
    with multiprocessing.get_context("spawn").Pool(arguments.workers) as pool:
        for (numbers, _), found in zip(work, pool.imap(failures, work)):
            done += len(numbers)
            failed += found
            print(*found, f"{done} of {arguments.cases} done", sep="\n", flush=True)
    print(f"{done - len(failed)} of {done} cases passed in {time.perf_counter() - start:.0f} s")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
