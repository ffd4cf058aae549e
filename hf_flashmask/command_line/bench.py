"""Attention over packed documents on this machine: us and peers, each checked before it is timed."""

from __future__ import annotations

import importlib
import importlib.util
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flashmask_kernels import flashmask_attention

from .. import bounds as bounds_of

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Inputs = tuple[Tensor, Tensor, Tensor]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""The largest error of outputs and gradients, as a fraction of the largest value of the truth."""

ROUNDS = 9
LARGE_SPREAD = 0.1
"""From here on, the report says that times vary."""


class BenchShape(NamedTuple):
    """One row of equal documents, and the heads: q `[1, num_heads, length, head_dim]`."""

    length: int
    documents: int
    num_heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device


class BenchResult(NamedTuple):
    """Of one implementation: the error, and milliseconds unless it was wrong or failed.

    `spread` is the interquartile range over the median, from round to round, of the pass that varies more.
    """

    name: str
    error: float | None
    forward: float | None = None
    backward: float | None = None
    spread: float | None = None
    remark: str = ""


class _ImplementationToTime(NamedTuple):
    """An implementation that was checked, and its passes to be timed: none when it was wrong or failed."""

    checked: BenchResult
    passes: dict[str, Callable[[], Any]]


def measure_implementations(
    shape: BenchShape, seconds: float, note: Callable[[str], None] = lambda text: None
) -> list[BenchResult]:
    """Check each implementation that is installed, then time all of them in turn, round by round.

    What else the machine does then slows all of them in a round, not the one that has its turn.

    Args:
        seconds: time to measure, for all implementations; compiling comes on top.
        note: is told in words what has been done.
    """
    generator = torch.Generator().manual_seed(0)
    query, key, value, d_out = (
        torch.randn(1, heads, shape.length, shape.head_dim, generator=generator).to(shape.device, shape.dtype)
        for heads in (shape.num_heads, shape.kv_heads, shape.kv_heads, shape.num_heads)
    )
    ends = torch.linspace(0, shape.length, shape.documents + 1).round().int()
    exact = (query.float(), key.float(), value.float())
    truth = _outputs_and_gradients(_attend_each_document_alone(ends), exact, d_out.float())
    candidates = []
    for name, build in _implementations(shape, ends.to(shape.device)).items():
        try:
            candidates.append(_check_against_truth(name, build(), (query, key, value), d_out, truth))
        except Exception as error:  # peers have limits of their own: sizes, compilers, memory
            remark = f"{type(error).__name__}: {error}".splitlines()[0]
            candidates.append(_ImplementationToTime(BenchResult(name, None, remark=remark[:100]), {}))
        note(f"{name} checked")
    times = _time_in_turn([run for candidate in candidates for run in candidate.passes.values()], seconds)
    note("all timed")
    return [_result_with_times(candidate, times) for candidate in candidates]


def _check_against_truth(
    name: str, attend: Attend, inputs: Inputs, d_out: Tensor, truth: list[Tensor]
) -> _ImplementationToTime:
    try:
        found, remark = _outputs_and_gradients(attend, inputs, d_out), ""
    except NotImplementedError:  # FlexAttention has no backward on the CPU
        found, remark = [attend(*inputs)], "it has no backward here"
    error = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, truth))
    if not error <= TOLERANCE[d_out.dtype]:  # written so that nan fails
        return _ImplementationToTime(BenchResult(name, error, remark="WRONG, and so not timed"), {})
    checked = BenchResult(name, error, remark=remark)
    if remark:
        return _ImplementationToTime(checked, {"forward": lambda: attend(*inputs)})
    leaves = _inputs_with_gradients(inputs)
    out = attend(*leaves)
    return _ImplementationToTime(
        checked,
        {
            "forward": lambda: attend(*leaves),
            "backward": lambda: torch.autograd.grad(out, leaves, d_out, retain_graph=True),
        },
    )


def _result_with_times(candidate: _ImplementationToTime, times: Iterator[list[float]]) -> BenchResult:
    """Takes the times of its passes, one for each round."""
    of_passes = {name: next(times) for name in candidate.passes}
    medians = {name: 1e3 * statistics.median(seconds) for name, seconds in of_passes.items()}
    return candidate.checked._replace(
        forward=medians.get("forward"),
        backward=medians.get("backward"),
        spread=max(map(_spread_of_times, of_passes.values()), default=None),
    )


def _spread_of_times(seconds: list[float]) -> float:
    lower, median, upper = statistics.quantiles(seconds, n=4)
    return (upper - lower) / median


def _inputs_with_gradients(inputs: Inputs) -> Inputs:
    query, key, value = (tensor.detach().requires_grad_() for tensor in inputs)
    return query, key, value


def _outputs_and_gradients(attend: Attend, inputs: Inputs, d_out: Tensor) -> list[Tensor]:
    leaves = _inputs_with_gradients(inputs)
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]


def _time_in_turn(functions: list[Callable[[], Any]], seconds: float) -> Iterator[list[float]]:
    """The seconds that each function takes, one figure for each round; every round calls all of them."""
    from torch.utils.benchmark import Timer  # warns of a missing GPU where it is imported beside a CUDA toolkit

    timers = [
        Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
        for function in functions
    ]
    share = seconds / (ROUNDS * max(len(timers), 1))
    calls = [max(1, int(share / timer.timeit(1).median)) for timer in timers]
    rounds = [[timer.timeit(count).median for timer, count in zip(timers, calls)] for _ in range(ROUNDS)]
    return iter([list(of_function) for of_function in zip(*rounds)])


# Implementations


def _attend_each_document_alone(ends: Tensor) -> Attend:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        parts = zip(*(tensor.split(ends.diff().tolist(), dim=2) for tensor in (query, key, value)))
        alone = [scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True) for q, k, v in parts]
        return torch.cat(alone, dim=2)

    return attend


def _implementations(shape: BenchShape, ends: Tensor) -> dict[str, Callable[[], Attend]]:
    """Name -> what builds its mask and returns it."""
    found: dict[str, Callable[[], Attend]] = {
        "flashmask": lambda: _flashmask(shape, ends),
        "flex_attention": lambda: _flex_attention(shape, ends),
        "sdpa, dense mask": lambda: _sdpa(shape, ends),
    }
    if shape.device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None:
        found["FlashAttention, varlen"] = lambda: _flash_attention(ends)
    return found


def _flashmask(shape: BenchShape, ends: Tensor) -> Attend:
    bounds = bounds_of.from_cu_seqlens(ends, shape.length)
    return lambda query, key, value: flashmask_attention(query, key, value, bounds)


def _sdpa(shape: BenchShape, ends: Tensor) -> Attend:
    mask = bounds_of.to_dense(bounds_of.from_cu_seqlens(ends, shape.length), shape.length)
    return lambda query, key, value: scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


def _flex_attention(shape: BenchShape, ends: Tensor) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    document = torch.searchsorted(ends[1:].contiguous(), torch.arange(shape.length, device=shape.device), right=True)

    def visible(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return (row >= column) & (document[row] == document[column])

    mask = create_block_mask(visible, None, None, shape.length, shape.length, device=str(shape.device))
    compiled = torch.compile(flex_attention)
    return lambda query, key, value: compiled(query, key, value, block_mask=mask, enable_gqa=True)


def _flash_attention(ends: Tensor) -> Attend:
    varlen = importlib.import_module("flash_attn").flash_attn_varlen_func
    longest = int(ends.diff().max())

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
        return varlen(*rows, ends, ends, longest, longest, causal=True).transpose(0, 1)[None]

    return attend


# The report


def describe_bench(shape: BenchShape, results: list[BenchResult]) -> Iterator[str]:
    """The results as lines of text."""
    yield f"{'':24}{'forward':>10}{'backward':>10}{'spread':>8}{'times flashmask':>17}{'error':>10}"
    total = _total_time(results[0])
    for result in results:
        times = [f"{time:.2f} ms" if time is not None else "-" for time in (result.forward, result.backward)]
        own = _total_time(result)
        ratio = f"{own / total:.2f}" if own is not None and total is not None else "-"
        error = "-" if result.error is None else f"{result.error:.0e}"
        spread = "-" if result.spread is None else f"{result.spread:.0%}"
        line = f"{result.name:24}{times[0]:>10}{times[1]:>10}{spread:>8}{ratio:>17}{error:>10}  {result.remark}"
        yield line.rstrip()
    yield f"Times: medians of {ROUNDS} rounds in which all take turns; spread is their interquartile range."
    largest = max((result.spread for result in results if result.spread is not None), default=0.0)
    if largest > LARGE_SPREAD:
        yield f"Times vary by up to {largest:.0%}: is the machine busy? Do not trust them, or give it more --seconds."
    allowed = TOLERANCE[shape.dtype]
    yield f"Errors: against float32, each document alone, over the largest value; allowed is {allowed:.0e}."


def _total_time(result: BenchResult) -> float | None:
    return None if result.forward is None or result.backward is None else result.forward + result.backward


def draw_bench(shape: BenchShape, results: list[BenchResult], title: str, path: Path) -> None:
    """Forward and backward of each implementation as a picture. Needs matplotlib."""
    from matplotlib.figure import Figure

    timed = [result for result in results if result.forward is not None]
    figure = Figure(figsize=(8, 1.4 + 0.5 * len(timed)), layout="constrained")
    axes = figure.subplots()
    forward = [result.forward or 0.0 for result in timed]
    backward = [result.backward or 0.0 for result in timed]
    axes.barh(range(len(timed)), forward, color="#08519c", label="forward")
    bars = axes.barh(range(len(timed)), backward, left=forward, color="#6baed6", label="backward")
    labels = [f"{a + b:.2f} ms" + ("" if b else ", forward only") for a, b in zip(forward, backward)]
    axes.bar_label(bars, labels=labels, padding=3)
    axes.set_yticks(range(len(timed)), [result.name for result in timed])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * max(a + b for a, b in zip(forward, backward)))
    axes.set_xlabel("milliseconds")
    axes.set_title(title, loc="left", fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside upper right", ncols=2)
    figure.savefig(path, dpi=150)
