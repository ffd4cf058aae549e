"""Finds tile sizes, warps and stages of the portable kernels for this GPU. They go into configs.py.

    python benchmarks/tune.py                                      # all kernels at D = 64, 128 and 256
    python benchmarks/tune.py --kernels forward --head-dims 128    # in pieces; --missing goes on with a run

First, every candidate is compiled and compared with float32 attention, in parallel, and its registers and spills are
recorded. Correct candidates are timed on packed documents of 32K tokens, the fastest of these also on plain causal
attention and at 8K. The geometric mean over all workloads decides. bfloat16, 32 query and 8 key heads. The time of a
candidate for dK/dV or dQ is that of the whole backward, in which the other kernel has the configuration of the table.

Writes results/tuning_<architecture>-<run>.json and prints the rows for the table. Nothing reads the JSON at run time.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from masks import mask_forms, random_row, rows_of
from measurement import RESULTS, Deadline, Run, require_gpu, time_on_gpu
from torch import Tensor
from truth import Attended, Truth

from flashmask_kernels import Schedules, dispatch, flashmask_attention
from flashmask_kernels import configs as table
from flashmask_kernels.configs import Config, Configs

HEADS, KV_HEADS, DTYPE = 32, 8, torch.bfloat16
# Every field of Config that has an entry here is varied; others keep their default.
GRID: dict[str, tuple[Any, ...]] = {
    "block_m": (32, 64, 128),
    "block_n": (32, 64, 128),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4),
    "use_descriptors": (True, False),
}
CHECKED_LENGTH = 1001
FIRST = ("causal_document", 32768)
THEN = (("causal", 32768), ("causal_document", 8192), ("causal", 8192))
FINALISTS = 6
KEY = ("kernel", "head_dim", "config", "mask", "length")


class Candidate(NamedTuple):
    kernel: str
    head_dim: int
    config: Config

    @property
    def row(self) -> dict[str, Any]:
        return {"kernel": self.kernel, "head_dim": self.head_dim, "config": self.config._asdict()}


def candidates(kernels: list[str], head_dims: list[int], grid: dict[str, tuple[Any, ...]]) -> list[Candidate]:
    values = [grid[name] if name in grid else (Config._field_defaults[name],) for name in Config._fields]
    configs = [Config(*combination) for combination in itertools.product(*values)]
    return [Candidate(kernel, dim, config) for dim in head_dims for kernel in kernels for config in configs]


@contextmanager
def launched_with(candidate: Candidate) -> Iterator[None]:
    """Inside, the candidate stands for its portable kernel's configuration; raises if nothing has asked for it."""
    original, specialized, asked = table.select_configs, table.select_specialized_configs, 0
    usual = original(torch.device("cuda"), DTYPE, candidate.head_dim)
    assert usual is not None
    configs = usual._replace(**{candidate.kernel: candidate.config})

    def select_configs(*_: Any, **__: Any) -> Configs:
        nonlocal asked
        asked += 1
        return configs

    table.select_configs, table.select_specialized_configs = select_configs, lambda *_: None
    dispatch.plans.clear()
    try:
        yield
    finally:
        table.select_configs, table.select_specialized_configs = original, specialized
        dispatch.plans.clear()
    if not asked:
        raise RuntimeError("flashmask_kernels no longer looks up configs.select_configs for every plan")


@contextmanager
def loaded_kernels() -> Iterator[dict[str, dict[str, int]]]:
    """Registers and spills of the kernels that Triton loads inside, by name."""
    import triton

    utilities = triton.runtime.driver.active.utils
    original, found = utilities.load_binary, {}

    def load_binary(name: str, *arguments: Any) -> Any:
        loaded = original(name, *arguments)
        found[name] = {"registers": loaded[2], "spills": loaded[3]}
        return loaded

    utilities.load_binary = load_binary
    try:
        yield found
    finally:
        utilities.load_binary = original


def inputs_of(length: int, head_dim: int) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)

    def tensor(heads: int) -> Tensor:
        size = (1, length, heads, head_dim)
        return torch.randn(size, generator=generator, device="cuda", dtype=DTYPE).transpose(1, 2)

    query, key, value = (tensor(heads).requires_grad_() for heads in (HEADS, KV_HEADS, KV_HEADS))
    return (query, key, value), tensor(HEADS)


def check(candidate: Candidate) -> dict[str, Any]:
    """Compile a candidate and compare it with float32 attention; what went wrong is under `error`."""
    inputs, d_out = inputs_of(CHECKED_LENGTH, candidate.head_dim)
    bounds = mask_forms(random_row(CHECKED_LENGTH, 4), device="cuda")["causal_document"]().bounds()
    truth = Truth(*inputs, d_out, bounds)
    row = candidate.row
    try:
        with loaded_kernels() as loaded, launched_with(candidate):
            out = flashmask_attention(*inputs, bounds)
            row["relative_error"] = truth.check(Attended(out, *torch.autograd.grad(out, inputs, d_out)))
    except Exception as error:  # whatever a candidate raises is its result
        return {**row, "error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
    return row | next((figures for name, figures in loaded.items() if candidate.kernel in name), {})


def time(candidate: Candidate, mask: str, length: int) -> dict[str, Any]:
    inputs, d_out = inputs_of(length, candidate.head_dim)
    bounds = mask_forms(rows_of(length, 1)[0], device="cuda")[mask]().bounds()
    schedules = Schedules(bounds, length)
    with launched_with(candidate):
        out = flashmask_attention(*inputs, bounds, schedules=schedules)
        if candidate.kernel == "forward":
            timed = time_on_gpu(lambda: flashmask_attention(*inputs, bounds, schedules=schedules), repeats=9)
        else:
            timed = time_on_gpu(lambda: torch.autograd.grad(out, inputs, d_out, retain_graph=True), repeats=9)
    return {**candidate.row, "mask": mask, "length": length, **timed}


def ranking(
    rows: list[dict[str, Any]], kernel: str, head_dim: int, workloads: Sequence[tuple[str, int]]
) -> list[tuple[float, Config]]:
    """Geometric means of the milliseconds of those that were timed on all these workloads, fastest first."""
    times: dict[Config, list[float]] = {}
    for row in rows:
        is_asked = (row["kernel"], row["head_dim"]) == (kernel, head_dim)
        if is_asked and (row.get("mask"), row.get("length")) in workloads:
            times.setdefault(Config(**row["config"]), []).append(row["milliseconds"])
    means = [
        (statistics.geometric_mean(found), config) for config, found in times.items() if len(found) == len(workloads)
    ]
    return sorted(means, key=lambda pair: pair[0])


def table_rows(rows: list[dict[str, Any]]) -> list[str]:
    """Source for configs.py: the fastest configuration of each kernel that was timed on everything."""
    lines = []
    for head_dim in sorted({row["head_dim"] for row in rows}):
        best = {}
        for kernel in Configs._fields:
            if ranked := ranking(rows, kernel, head_dim, (FIRST, *THEN)):
                best[kernel] = f"Config({', '.join(map(repr, ranked[0][1]))})"
        if best:
            lines.append(f"{head_dim}: Configs({', '.join(f'{kernel}={config}' for kernel, config in best.items())}),")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", nargs="+", choices=Configs._fields, default=list(Configs._fields))
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--pointers", action="store_true", help="also without TMA descriptors where there are some")
    parser.add_argument("--workers", type=int, default=8, help="that compile and check (default: %(default)s)")
    parser.add_argument("--missing", action="store_true", help="only what the file of this run lacks")
    parser.add_argument("--minutes", type=float, help="begin nothing new after so long")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON (default: %(default)s)")
    arguments = parser.parse_args()
    require_gpu()
    has_descriptors = not torch.version.hip and torch.cuda.get_device_capability() >= (9, 0)
    grid = {**GRID, "use_descriptors": (True, False) if arguments.pointers else (has_descriptors,)}
    architecture = table.architecture(torch.device("cuda"))
    settings = {"heads": HEADS, "kv_heads": KV_HEADS, "dtype": str(DTYPE).removeprefix("torch.")}
    run = Run(f"tuning_{architecture}", settings, KEY, arguments.output)
    deadline = Deadline(arguments.minutes)

    wanted = candidates(arguments.kernels, arguments.head_dims, grid)
    unchecked = [candidate for candidate in wanted if not (arguments.missing and run.has(candidate.row))]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.workers, mp_context=context) as pool:
        for row in pool.map(check, unchecked):
            run.add(row)
            if "error" in row or row.get("spills"):
                print(row["kernel"], row["head_dim"], row["config"], row.get("error", f"spills {row.get('spills')}"))
            if deadline.is_over():
                pool.shutdown(cancel_futures=True)
                break
    right = [candidate for candidate in wanted if run.has(candidate.row)]

    def add_times(timed: list[Candidate], mask: str, length: int) -> None:
        for candidate in timed:
            row = {**candidate.row, "mask": mask, "length": length}
            if not deadline.is_over() and not (arguments.missing and run.has(row)):
                run.add(time(candidate, mask, length))

    for head_dim, kernel in itertools.product(arguments.head_dims, arguments.kernels):
        add_times([one for one in right if (one.kernel, one.head_dim) == (kernel, head_dim)], *FIRST)
        finalists = [config for _, config in ranking(run.rows, kernel, head_dim, [FIRST])[:FINALISTS]]
        for mask, length in THEN:
            add_times([Candidate(kernel, head_dim, config) for config in finalists], mask, length)
        print(kernel, head_dim)
        for mean, config in ranking(run.rows, kernel, head_dim, (FIRST, *THEN)):
            print(f"  {mean:8.3f} ms  {config}", flush=True)
    print("\n".join(table_rows(run.rows)))
    print("out of time: go on with --missing" if deadline.is_over() else f"wrote {run.path}")


if __name__ == "__main__":
    main()
