"""Timing on a CPU or a GPU, and the record that goes into `benchmarks/results/`."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import math
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

import flashmask_kernels
from flashmask_kernels import Schedules, dispatch

RESULTS = Path(__file__).parent / "results"
FEWEST_REPEATS = 5


def require_gpu() -> None:
    """Leave with an explanation where there is no GPU to measure."""
    if not torch.cuda.is_available():
        sys.exit("this benchmark measures a CUDA or ROCm GPU, and torch finds none")


def time_on_gpu(function: Callable[[], Any], repeats: int = 15, max_seconds: float = math.inf) -> dict[str, float]:
    """Milliseconds on the device: the median of event-timed runs with a flushed L2 cache, and their spread.

    Args:
        max_seconds: after so much measured time, `FEWEST_REPEATS` runs are enough; after so much time, one to warm up.

    Returns:
        ``milliseconds`` (median) and ``spread``, the interquartile range over the median.
    """
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    first = time.perf_counter()
    for _ in range(3):
        begin = time.perf_counter()
        function()
        host_seconds = time.perf_counter() - begin
        torch.cuda.synchronize()
        if time.perf_counter() - first > max_seconds:
            break
    # Keeps the device, at up to 2 GHz, busy while the host prepares the launches: only the device's work is timed.
    busy_cycles = int(1e6 + 4e9 * min(host_seconds, 0.01))
    times = []
    for _ in range(repeats):
        flush.zero_()
        torch.cuda._sleep(busy_cycles)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
        if len(times) >= FEWEST_REPEATS and sum(times) > 1e3 * max_seconds:
            break
    return _summary(times)


def time_on_cpu(function: Callable[[], Any], repeats: int = 5) -> dict[str, float]:
    """Milliseconds of wall-clock time: the median after one warm-up run, and the spread as for the GPU.

    Work that ``function`` launches on a GPU is included to its end.
    """
    return time_in_turns({"": function}, repeats)[""]


def time_in_turns(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, float]]:
    """`time_on_cpu` of each, one run of all after the other: the speed of a host that others use too changes by the
    second.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            _synchronize()
            start = time.perf_counter()
            function()
            _synchronize()
            if repeat > 0:  # the first one warms up
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: _summary(of_function) for name, of_function in times.items()}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


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


def build_schedules(
    bounds: torch.Tensor, query: torch.Tensor, value: torch.Tensor, *, deterministic: bool = False
) -> Schedules:
    """The schedules that the kernels build from bounds once for all layers, forward and backward."""
    schedules = Schedules(bounds, query.shape[2])
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    family = dispatch.family_of(query, value, bounds, 1.0, None, 0.0, deterministic, True)
    for kernel in ("forward", "key_value_gradient", "query_gradient"):
        if tiles := dispatch.tiles_of(kernel, query, value, family):
            schedules.get(tiles)
    return schedules


def environment(device: str) -> dict[str, str]:
    """Device, versions and date, on which the figures depend."""
    cpu = f"{_cpu_name()}, {torch.get_num_threads()} threads"
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "date": str(datetime.date.today()),
        "python": platform.python_version(),
        **_versions("torch", "triton", "transformers", "flash-attn-4", "nvidia-cudnn-frontend"),
    }


def _versions(*packages: str) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _cpu_name() -> str:
    """The processor's name where Linux tells it."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def kernels_hash() -> str:
    """Identifies the source of the measured kernels. Any change to it starts a new run."""
    folder = Path(flashmask_kernels.__file__).parent
    source = b"".join(file.read_bytes() for file in sorted(folder.rglob("*.py")))
    return hashlib.sha256(source).hexdigest()[:12]


def write_results(name: str, device: str, settings: dict[str, Any], rows: list[dict[str, Any]], folder: Path) -> Path:
    """Write one benchmark's rows to ``folder / name.json``, with their environment and settings."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    result = {"environment": environment(device), "settings": settings, "rows": rows}
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


class Run:
    """The rows of one run, measured in any number of pieces.

    A run is what can be compared: one device, one set of versions, one source of the kernels and the same settings. Its
    file, ``folder / name-<id>.json``, is named after these, so that a later command goes on with it and another run
    never overwrites it. Rows are told apart by the values under ``key``; measured again, a row takes the place of the
    old one. Every row is on disk as soon as it is added: processes that measure at the same time, one for each GPU, add
    to the same file.
    """

    def __init__(self, name: str, settings: dict[str, Any], key: Sequence[str], folder: Path = RESULTS) -> None:
        self.key, self.settings = key, settings
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.environment = {**environment(device), "kernels": kernels_hash()}
        what = {**self.environment, "date": None, "settings": settings}
        run_id = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]
        self.path = folder / f"{name}-{run_id}.json"
        # Not in the folder of the results, where it would remain.
        self._lock = FileLock(Path(tempfile.gettempdir()) / f"{self.path.name}.lock")

    @property
    def rows(self) -> list[dict[str, Any]]:
        """As they are on disk."""
        return json.loads(self.path.read_text())["rows"] if self.path.exists() else []

    def has(self, row: dict[str, Any]) -> bool:
        """Whether this row was measured before, and not with an error."""
        with self._lock:
            return any(self._same(row, other) and "error" not in other for other in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        with self._lock:
            rows = self.rows
            places = [index for index, other in enumerate(rows) if self._same(row, other)]
            if places:
                rows[places[0]] = row
            else:
                rows.append(row)
            self._write(rows)

    def _write(self, rows: list[dict[str, Any]]) -> None:
        now = datetime.datetime.now(datetime.timezone.utc)
        environment = {**self.environment, "updated": now.isoformat(timespec="seconds")}
        parts = {"environment": environment, "settings": self.settings}
        head = ",\n".join(f'"{name}": {json.dumps(part, indent=1)}' for name, part in parts.items())
        lines = ",\n".join(json.dumps(row) for row in rows)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(f'{{{head},\n"rows": [\n{lines}\n]}}\n')

    def _same(self, row: dict[str, Any], other: dict[str, Any]) -> bool:
        return all(row.get(name) == other.get(name) for name in self.key)


def runs_of(name: str, folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The runs of that name, the one that was added to last at the end."""
    found = [json.loads(path.read_text()) for path in folder.glob(f"{name}-*.json")]
    return sorted(found, key=lambda run: run["environment"]["updated"])


def latest_run(name: str, folder: Path = RESULTS, **values: Any) -> dict[str, Any] | None:
    """The run of that name that was added to last, of those with a row that has these values; or None."""
    runs = runs_of(name, folder)
    having = [run for run in runs if any(all(row.get(key) == values[key] for key in values) for row in run["rows"])]
    return having[-1] if having else None


def visible_flops(pairs: int, heads: int, head_dim: int) -> dict[str, float]:
    """Floating-point operations for that many visible pairs of one head: 4 D each forward, 2.5 times that backward."""
    forward = 4.0 * pairs * heads * head_dim
    return {"forward": forward, "backward": 2.5 * forward, "total": 3.5 * forward}


def tflops(flops: dict[str, float], milliseconds: dict[str, float]) -> dict[str, float]:
    """TFLOP/s of every part that has a time."""
    return {part: round(flops[part] / milliseconds[part] / 1e9, 1) for part in flops if part in milliseconds}


class Deadline:
    """The time after which nothing new starts, for machines that are lent by the minute."""

    def __init__(self, minutes: float | None) -> None:
        self.end = math.inf if minutes is None else time.monotonic() + 60 * minutes

    def is_over(self) -> bool:
        return time.monotonic() > self.end
