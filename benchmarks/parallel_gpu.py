"""Training steps of long rows on several GPUs: tokens per second, memory, balance, and what the exchanges cost.

    python benchmarks/parallel_gpu.py --gpus 2                                   # all of it: about five minutes
    python benchmarks/parallel_gpu.py --gpus 2 --workloads 8b:4:131072:packed --ways ulysses all_gather
    python benchmarks/parallel_gpu.py --smoke                                    # two processes on the CPU, tiny

A workload is a shape of `training_gpu.py`, its number of layers, the tokens of a row and its documents: `one`, or
`packed` ones with log-normal lengths. Random weights, bfloat16, gradient checkpointing, AdamW, a loss in parts.
`parallel_ways.py` has the ways to train on several GPUs; all but `one GPU` shard the weights by FSDP2. With `one GPU`
each process trains for itself, and with `data parallel` each has rows of its own.

Before anything is timed, the loss, the norm of all gradients and a gradient of a short row are compared with one GPU
that computes each document alone under `sdpa`. One more step is profiled: the time of attention's kernels on each rank
(`balance` is the largest over the mean), and the time in which collectives run and nothing else does (`exposed`; it
holds the wait for the slower rank).

One set of processes measures one case after the other. When a process fails or a case takes too long, it is recorded
as such and a new set goes on. `--missing` measures only what the file lacks.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import json
import os
import re
import socket
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from measurement import RESULTS, Deadline, Run, require_gpu
from parallel_ways import ONE_GPU, WAYS, Batch, TrainedModel, Way, is_possible, whole_row
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from training_gpu import SHAPES, VOCABULARY, batch_of_documents, document_lengths

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
ALL_SHAPES = {**SHAPES, "tiny": TINY}
DOCUMENTS = ("one", "packed")
WORKLOADS = (
    "8b:4:131072:packed",
    "8b:2:131072:one",
    "1b:16:32768:packed",
    "8b:1:524288:packed",
)
SMOKE_WORKLOADS = ("tiny:2:2100:packed", "tiny:2:192:one")
SMOKE_WAYS = (ONE_GPU, "data parallel", "ulysses", "all_gather", "Ulysses with sdpa")
CHECKED_TOKENS = 8192
MOST_STEPS, SECONDS = 4, 5.0  # timed steps: as many as fit, two at least
TOLERANCES = {"loss": 1e-3, "norm": 2e-2, "gradient": 0.2}  # relative, between two results in bfloat16
KEY = ("workload", "way", "gpus")
BANDWIDTH = "bandwidth"
MIB_ON_THE_WIRE = 256
START_UP = 60.0  # seconds until processes have begun
# Attention's kernels: Triton's of this project, torch's FlashAttention-2, cuDNN and memory-efficient ones.
ATTENTION = re.compile("attention_forward|value_gradient|query_gradient|row_statistics|flash|fmha|sdpa", re.IGNORECASE)
COLLECTIVE = re.compile("^nccl", re.IGNORECASE)

Json = dict[str, Any]


class Workload(NamedTuple):
    shape: str
    layers: int
    length: int
    documents: str

    @classmethod
    def parse(cls, text: str) -> Workload:
        try:
            shape, layers, length, documents = text.split(":")
            if shape not in ALL_SHAPES or documents not in DOCUMENTS:
                raise ValueError
            return cls(shape, int(layers), int(length), documents)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r} is no workload: shape:layers:tokens:documents is expected, with a shape of "
                f"{list(ALL_SHAPES)} and documents of {list(DOCUMENTS)}"
            ) from None

    def __str__(self) -> str:
        return ":".join(map(str, self))

    @property
    def model(self) -> dict[str, Any]:
        return {**ALL_SHAPES[self.shape], "num_hidden_layers": self.layers}

    def lengths(self, seed: int) -> list[int]:
        """The documents of a row."""
        return [self.length] if self.documents == "one" else document_lengths(self.length, seed)


class Setting(NamedTuple):
    """What all processes are told."""

    gpus: int
    is_smoke: bool
    vocabulary: int
    port: int

    @property
    def device(self) -> str:
        return "cpu" if self.is_smoke else "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.is_smoke else torch.bfloat16


# What a process does


class Trained(NamedTuple):
    """What a step computes: the loss, the norm of all gradients, and the gradient of the first keys' projection."""

    loss: float
    norm: float
    gradient: Tensor

    def check(self, truth: Trained) -> dict[str, float]:
        """Relative errors, or a ValueError that names them where one is too large."""
        difference = (self.gradient - truth.gradient).norm() / truth.gradient.norm()
        errors = {
            "loss": abs(self.loss / truth.loss - 1),
            "norm": abs(self.norm / truth.norm - 1),
            "gradient": float(difference),
        }
        rounded = {name: float(f"{error:.1e}") for name, error in errors.items()}
        if not all(rounded[name] < tolerance for name, tolerance in TOLERANCES.items()):
            raise ValueError(f"wrong result: relative errors {rounded}; {TOLERANCES} are accepted")
        return rounded


def train(model: TrainedModel, way: Way, batch: Batch) -> Tensor:
    """The loss of this rank; adds the gradients to those of the parameters."""
    with way.part(batch) as inputs:
        loss = model(**inputs)
        loss.backward()
    return loss.detach()


def trained(model: TrainedModel, losses: list[Tensor], is_mean: bool) -> Trained:
    """Takes the gradients of the parameters away. `is_mean`: the loss is the average over the ranks."""
    loss = torch.stack(losses).sum().float()
    if is_mean:
        dist.all_reduce(loss)
        loss /= dist.get_world_size()
    gradients = [_whole(part.grad) for part in model.parameters() if part.grad is not None]
    norm = torch.stack([gradient.float().square().sum() for gradient in gradients]).sum().sqrt()
    first = _whole(model.model.model.layers[0].self_attn.k_proj.weight.grad).float().clone()
    model.zero_grad(set_to_none=True)
    return Trained(float(loss), float(norm), first)


def _whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def each_document_alone(model: TrainedModel, batch: Batch) -> Trained:
    """The truth, on one GPU: no packing and no mask but the causal one, under `sdpa`."""
    model.model.set_attn_implementation("sdpa")
    inputs = whole_row(batch)
    losses = []
    for start, end in pairwise(batch["varlen"]["cu_seq_lens_q"].tolist()):
        names = ("input_ids", "position_ids", "shift_labels")
        document = {name: inputs[name][:, start:end] for name in names}
        loss = model(**document, divisor=inputs["divisor"])
        loss.backward()
        losses.append(loss.detach())
    return trained(model, losses, is_mean=False)


class Process:
    """One of the processes that measure together, with a GPU of its own."""

    def __init__(self, rank: int, setting: Setting) -> None:
        self.rank, self.setting = rank, setting
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(setting.port)}
        patience = datetime.timedelta(minutes=9)
        if setting.is_smoke:
            torch.set_num_threads(1)
            dist.init_process_group("gloo", rank=rank, world_size=setting.gpus, timeout=patience)
        else:
            torch.cuda.set_device(rank)
            device = torch.device("cuda", rank)
            dist.init_process_group("nccl", rank=rank, world_size=setting.gpus, timeout=patience, device_id=device)
        self.mesh: DeviceMesh = init_device_mesh(setting.device, (setting.gpus,))

    def measure(self, workload: Workload | None, name: str) -> Json:
        """The figures of this rank."""
        if workload is None:
            return self.bandwidth()
        model = TrainedModel(workload.model, self.setting.vocabulary, self.setting.device, self.setting.dtype)
        short = workload._replace(length=min(CHECKED_TOKENS, workload.length))
        checked = self.batch(short, seed=0)
        truth = each_document_alone(model, checked)
        way = WAYS[name](model, self.mesh)
        model.model.set_attn_implementation(way.attention)
        if way.shards_weights:
            model.shard_weights(self.mesh)
        errors = trained(model, [train(model, way, checked)], is_mean=way.shards_weights).check(truth)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=not self.setting.is_smoke)

        def step(number: int) -> None:
            own = 0 if way.divides_rows or name == ONE_GPU else self.rank
            train(model, way, self.batch(workload, seed=number * self.setting.gpus + own))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        del truth, checked
        self.free_memory()
        rows = self.setting.gpus if name == "data parallel" else 1
        return {
            "relative_error": errors,
            "tokens": rows * workload.length,
            "bytes_of_weights": sum(part.numel() * part.element_size() for part in model.parameters()),
            **self.time_steps(step),
            **({} if self.setting.is_smoke else times_of_kernels(lambda: step(0))),
        }

    def batch(self, workload: Workload, seed: int) -> Batch:
        return batch_of_documents(workload.lengths(seed), seed, self.setting.vocabulary, self.setting.device)

    def time_steps(self, step: Callable[[int], None]) -> Json:
        first = self.seconds_of(lambda: step(0))  # a step to warm up, by which the first rank counts the others
        count = torch.tensor(max(2, min(MOST_STEPS, int(SECONDS / first))), device=self.setting.device)
        dist.broadcast(count, src=0)
        if not self.setting.is_smoke:
            torch.cuda.reset_peak_memory_stats()
        seconds = [self.seconds_of(partial(step, number)) for number in range(int(count))]
        peak = 0 if self.setting.is_smoke else torch.cuda.max_memory_allocated()
        return {"milliseconds": round(1e3 * statistics.median(seconds), 2), "peak_mib": round(peak / 2**20)}

    def seconds_of(self, function: Callable[[], None]) -> float:
        self.synchronize()
        begin = time.perf_counter()
        function()
        self.synchronize()
        return time.perf_counter() - begin

    def synchronize(self) -> None:
        if not self.setting.is_smoke:
            torch.cuda.synchronize()

    def bandwidth(self) -> Json:
        """GB/s that a rank sends to the others."""
        size = (1 if self.setting.is_smoke else MIB_ON_THE_WIRE) << 20
        ranks = self.setting.gpus
        source = torch.zeros(size // ranks * ranks, dtype=torch.int8, device=self.setting.device)
        target = torch.empty_like(source)
        own = source[: size // ranks]
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name since torch 2.13

        def gb_per_second(function: Callable[[], Any]) -> float:
            function()
            seconds = statistics.median([self.seconds_of(function) for _ in range(5)])
            return round((size - size // ranks) / seconds / 1e9, 1)

        return {
            "all_to_all": gb_per_second(lambda: dist.all_to_all_single(target, source)),
            "all_gather": gb_per_second(lambda: gather(target, own)),
        }

    def free_memory(self) -> None:
        gc.collect()
        if not self.setting.is_smoke:
            torch.cuda.empty_cache()


def times_of_kernels(step: Callable[[], None]) -> Json:
    """Milliseconds of one step on the device: of attention, of collectives, and of collectives that nothing hides."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    kernels = [
        (event.name, (event.time_range.start, event.time_range.end))
        for event in profile.events() or ()
        if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    attention = [span for name, span in kernels if ATTENTION.search(name)]
    collectives = [span for name, span in kernels if COLLECTIVE.search(name)]
    others = [span for name, span in kernels if not COLLECTIVE.search(name)]
    return {
        "attention": round(sum(end - start for start, end in attention) / 1e3, 2),
        "collectives": round(covered(collectives) / 1e3, 2),
        "exposed": round((covered([*collectives, *others]) - covered(others)) / 1e3, 2),
    }


def covered(spans: list[tuple[float, float]]) -> float:
    """The length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


Case = tuple[Workload | None, str]


def work(rank: int, setting: Setting, cases: list[Case], parent: Connection) -> None:
    process = Process(rank, setting)
    for workload, way in cases:
        torch._dynamo.reset()
        try:
            parent.send(process.measure(workload, way))
        except Exception as error:  # the parent ends all processes: the others may wait for this one
            parent.send({"error": f"{type(error).__name__}: {error}"[:500], "trace": traceback.format_exc()})
            return
        process.free_memory()
    dist.barrier()
    dist.destroy_process_group()


# What the parent does


def measure_all(setting: Setting, cases: list[Case], seconds_of_case: float) -> Iterator[tuple[Case, Json]]:
    """Each case with its figures, or with its error."""
    left = list(cases)
    while left:
        seconds = seconds_of_case + START_UP
        with processes(setting, left) as ranks:
            while left:
                row = gather(ranks, seconds)
                yield left.pop(0), row
                if "error" in row:
                    break
                seconds = seconds_of_case


@contextlib.contextmanager
def processes(setting: Setting, cases: list[Case]) -> Iterator[list[Connection]]:
    """What the ranks of a new set of processes send."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        setting = setting._replace(port=probe.getsockname()[1])
    # A process that is forked from a server need not import anything again, but CUDA may not survive the fork.
    context: Any = multiprocessing.get_context("forkserver" if setting.is_smoke else "spawn")
    started, ranks = [], []
    for rank in range(setting.gpus):
        receiver, sender = context.Pipe(duplex=False)
        started.append(context.Process(target=work, args=(rank, setting, cases, sender), daemon=True))
        started[-1].start()
        sender.close()  # so that the end of the process is the end of what can be received
        ranks.append(receiver)
    try:
        yield ranks
    finally:
        for process in started:
            process.kill()
            process.join()


def gather(ranks: list[Connection], seconds: float) -> Json:
    """The figures of all ranks in one row: those that all have, and lists of the others. Or the first error."""
    end = time.monotonic() + seconds
    found: dict[int, Json] = {}
    while len(found) < len(ranks):
        waiting = {rank: number for number, rank in enumerate(ranks) if number not in found}
        ready = [rank for rank in wait(list(waiting), timeout=max(0.0, end - time.monotonic())) if rank in waiting]
        if not ready:
            return {"error": f"TimeoutError: not done after {seconds:.0f} s"}
        for number in (waiting[rank] for rank in ready):
            try:
                found[number] = ranks[number].recv()
            except EOFError:
                found[number] = {"error": f"RuntimeError: process {number} has ended", "trace": ""}
            if "error" in found[number]:
                print(found[number].pop("trace"))
                return found[number]
    return merged([found[number] for number in range(len(ranks))])


def merged(found: list[Json]) -> Json:
    of_ranks = ("peak_mib", "attention", "collectives", "exposed")
    row: Json = {
        name: [rank[name] for rank in found] if name in of_ranks else value for name, value in found[0].items()
    }
    if "milliseconds" in row:
        row["milliseconds"] = max(rank["milliseconds"] for rank in found)
        row["tokens_per_second"] = round(1e3 * row.pop("tokens") / row["milliseconds"])
    if any(row.get("attention", ())):
        row["balance"] = round(max(row["attention"]) / statistics.mean(row["attention"]), 3)
    return row


def chosen_cases(workloads: list[Workload], ways: list[str]) -> list[Case]:
    cases: list[Case] = [(None, BANDWIDTH)]
    for workload in workloads:
        documents = 1 if workload.documents == "one" else 2
        cases += [(workload, way) for way in ways if is_possible(way, workload.length, documents)]
    return cases


def name_of(case: Case, gpus: int) -> Json:
    workload, way = case
    names = {"workload": str(workload), **workload._asdict()} if workload else {"workload": BANDWIDTH}
    return {**names, "way": way, "gpus": gpus}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--workloads", nargs="+", type=Workload.parse, help=f"default: {' '.join(WORKLOADS)}")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), help="default: all")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, help="default: %(default)s")
    parser.add_argument("--smoke", action="store_true", help="tiny models on the CPU, connected by gloo")
    parser.add_argument("--missing", action="store_true", help="only what the file of this run lacks")
    parser.add_argument("--minutes", type=float, help="begin nothing new after so long")
    parser.add_argument("--seconds-of-case", type=float, default=75.0, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.vocabulary = 97
    else:
        require_gpu()
        if arguments.gpus > torch.cuda.device_count():
            parser.error(f"--gpus {arguments.gpus}: torch finds {torch.cuda.device_count()}")
    default = SMOKE_WORKLOADS if arguments.smoke else WORKLOADS
    workloads = arguments.workloads or [Workload.parse(text) for text in default]
    ways = arguments.ways or list(SMOKE_WAYS if arguments.smoke else WAYS)
    setting = Setting(arguments.gpus, arguments.smoke, arguments.vocabulary, port=0)
    settings = {
        "dtype": str(setting.dtype).removeprefix("torch."),
        "vocabulary": setting.vocabulary,
        "shapes": ALL_SHAPES,
        "nccl": None if arguments.smoke else ".".join(map(str, torch.cuda.nccl.version())),
    }
    run = Run("parallel_gpu", settings, KEY, arguments.output)
    deadline = Deadline(arguments.minutes)
    cases = chosen_cases(workloads, ways)
    if arguments.missing:
        cases = [case for case in cases if not run.has(name_of(case, setting.gpus))]
    for case, figures in measure_all(setting, cases, arguments.seconds_of_case):
        row = {**name_of(case, setting.gpus), **figures}
        run.add(row)
        print(json.dumps(row), flush=True)
        if deadline.is_over():
            print("out of time: go on with --missing")
            break
    print(f"wrote {run.path}")


if __name__ == "__main__":
    main()
