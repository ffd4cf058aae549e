"""Timing on a CPU or a GPU, and the record that goes into `benchmarks/results/`."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def time_on_gpu(function: Callable[[], Any], repeats: int = 15) -> dict[str, float]:
    """Milliseconds on the device: the median of event-timed runs with a flushed L2 cache, and their spread.

    Returns:
        ``milliseconds`` (median) and ``spread``, the interquartile range over the median.
    """
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        flush.zero_()
        # Keep the device busy while the host prepares the launch: what is timed is the device's work.
        torch.cuda._sleep(1_000_000)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return _summary(times)


def time_on_cpu(function: Callable[[], Any], repeats: int = 5) -> dict[str, float]:
    """Milliseconds of wall-clock time: the median after one warm-up run, and the spread as for the GPU."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return _summary(times)


def _summary(times: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(times, n=4)
    return {"milliseconds": round(median, 4), "spread": round((high - low) / median, 4)}


def peak_memory(function: Callable[[], Any]) -> float:
    """MiB that ``function`` takes on the GPU above what was allocated before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def environment(device: str) -> dict[str, str]:
    """What the figures depend on: device, versions, date."""
    packages = ("torch", "triton", "transformers")
    cpu = f"{_cpu_name()}, {torch.get_num_threads()} threads"
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "date": str(datetime.date.today()),
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
    }


def _cpu_name() -> str:
    """The processor's name where Linux tells it."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write_results(name: str, device: str, settings: dict[str, Any], rows: list[dict[str, Any]], folder: Path) -> Path:
    """Write one benchmark's rows to ``folder / name.json``, with their environment and settings."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    result = {"environment": environment(device), "settings": settings, "rows": rows}
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path
