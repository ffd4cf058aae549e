"""Attention forward and backward on one GPU: flashmask compared with every other implementation that is installed.

    python benchmarks/attention_gpu.py                     # twelve masks, 32K tokens, D = 128: about five minutes
    python benchmarks/attention_gpu.py --lengths 8192 32768 --head-dims 64 128 --heads 32/8 32/32    # over half an hour
    python benchmarks/attention_gpu.py --protocol paper    # the kernel tables of the FlashMask paper, about an hour
    python benchmarks/attention_gpu.py --protocol sparsity # its figure of time over sparsity, a minute
    python benchmarks/attention_gpu.py --protocol families # the masks of families.py, about ten minutes

Protocols: `bar` has one row of tokens. `families` has the masks that people train today at the shapes of their
projects (`--masks` names some of them), in a file of its own. `paper` is the protocol of arXiv 2410.01359: 128K tokens
in all, a hidden size of 4096, no grouped heads. `sparsity` is the paper's three document masks with a growing number
of documents. A mask is the same for all heads. `--documents` is a folder with JSON files of document lists (see
masks.read_rows). Without it, the lists are random.

The benchmark can run in pieces. Rows of the same device, versions and kernels are collected in one file, also from
several processes at once, one for each GPU. `--missing` measures only the rows that the file lacks. `--minutes` starts
nothing new after that time.

Every implementation computes the same mask on the same inputs in the same process. Before it is timed, its output and
gradients are compared with float32 attention at the full length (truth.py). An implementation that cannot express a
mask has no row. One that fails has a row with the error. TFLOP/s count visible pairs (`tflops`) and, as in the paper,
all pairs of every tile of 128 x 128 that is not hidden (`tflops_tiles`). Forward is timed as in training and saves what
the backward needs. Making the mask is timed separately: on the device (`mask`), and on host and device one after the
other (`mask_host`). Short rows, where launches take time, also have `end_to_end`: the wall-clock time per layer of
forward and backward through a stack of layers. The query of each layer is the output of the layer before it, and all
implementations are measured in turns. Peak memory is that of mask, forward and backward, above the inputs.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from families import FAMILIES, Family
from masks import Mask, PackedRow, mask_forms, random_row, rows_of, tile_sparsity
from measurement import (
    RESULTS,
    Deadline,
    Run,
    peak_memory,
    require_gpu,
    tflops,
    time_in_turns,
    time_on_cpu,
    time_on_gpu,
    visible_flops,
)
from peers import PEERS, Attention, Case, missing_peers
from torch import Tensor
from truth import Attended, Truth

from hf_flashmask.bounds import visible_pairs

PAPER_MASKS = (
    "full",
    "causal",
    "sliding_window",
    "causal_document",
    "document",
    "share_question",
    "global_sliding_window",
    "causal_blockwise",
    "prefix_lm_document",
    "prefix_lm_causal",
    "qk_sparse",
    "random_eviction",
)
MORE_MASKS = ("hash_sparse", "block_causal_document", "random_intervals")
WITHOUT_DOCUMENTS = {
    "full",
    "causal",
    "sliding_window",
    "global_sliding_window",
    "prefix_lm_causal",
    "hash_sparse",
    "random_eviction",
    "random_intervals",
}
SPARSITY_DOCUMENTS = (1, 2, 3, 5, 8, 12, 20)
TOKENS, HIDDEN_SIZE = 131072, 4096  # of the paper
SHORT = 4096  # tokens; up to this length the host's launches are timed too
LAYERS = 8  # in the stack that times them
SECONDS = 0.5  # of measured time per figure, unless `FEWEST_REPEATS` take longer, see --seconds
KEY = ("protocol", "mask", "sample", "length", "batch", "heads", "kv_heads", "head_dim", "implementation")


class Shape(NamedTuple):
    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    kv_length: int | None = None  # if it is not the length

    @property
    def keys(self) -> int:
        return self.length if self.kv_length is None else self.kv_length

    def named(self) -> dict[str, int]:
        return {name: size for name, size in self._asdict().items() if size is not None}


def shapes(protocol: str, lengths: list[int], head_dims: list[int], heads: list[tuple[int, int]]) -> list[Shape]:
    if protocol == "paper":
        counts = [(HIDDEN_SIZE // dim, dim) for dim in head_dims]
        return [Shape(max(TOKENS // n, 1), n, count, count, dim) for n in lengths for count, dim in counts]
    return [Shape(1, n, count, kv, dim) for n in lengths for dim in head_dims for count, kv in heads]


def document_rows(protocol: str, mask: str, length: int, samples: int, documents: Path | None) -> dict[int, PackedRow]:
    """Rows by the number of their sample; of the protocol `sparsity`, by the number of their documents."""
    if protocol == "sparsity":
        return {count: random_row(length, count, seed=count) for count in SPARSITY_DOCUMENTS}
    return dict(enumerate(rows_of(length, 1 if mask in WITHOUT_DOCUMENTS else samples, documents)))


def random_inputs(shape: Shape) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """query, key and value laid out as models have them, `[B, S, H, D]`, and the gradient of the output."""
    generator = torch.Generator("cuda").manual_seed(0)

    def tensor(heads: int, length: int) -> Tensor:
        size = (shape.batch, length, heads, shape.head_dim)
        return torch.randn(size, generator=generator, device="cuda", dtype=torch.bfloat16).transpose(1, 2)

    query = tensor(shape.heads, shape.length).requires_grad_()
    key, value = (tensor(shape.kv_heads, shape.keys).requires_grad_() for _ in range(2))
    return (query, key, value), tensor(shape.heads, shape.length)


def measure(
    attention: Attention, inputs: tuple[Tensor, Tensor, Tensor], d_out: Tensor, truth: Truth, seconds: float = SECONDS
) -> dict[str, Any]:
    """Times, memory and errors. Raises what the implementation raises, and a ValueError where it is wrong."""

    def build() -> Any:
        return attention.build() if attention.build else None

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(attended, inputs, d_out, retain_graph=True)

    mask = build()
    attended = attention.attend(*inputs, mask)
    errors = truth.check(Attended(attended.detach(), *gradients()))
    times = {
        "forward": time_on_gpu(lambda: attention.attend(*inputs, mask), max_seconds=seconds),
        "backward": time_on_gpu(gradients, max_seconds=seconds),
    }
    if attention.build:
        times["mask"] = time_on_gpu(build, max_seconds=seconds)
        times["mask_host"] = time_on_cpu(build, repeats=15)
    milliseconds = {part: summary["milliseconds"] for part, summary in times.items()}
    return {
        "milliseconds": {**milliseconds, "total": round(milliseconds["forward"] + milliseconds["backward"], 4)},
        "spread": {part: summary["spread"] for part, summary in times.items()},
        "peak_mib": peak_memory(lambda: torch.autograd.grad(attention.attend(*inputs, build()), inputs, d_out)),
        "relative_error": errors,
    }


def measure_mask(
    what: dict[str, Any], mask: Mask, shape: Shape, peers: list[str], seconds: float = SECONDS
) -> Iterator[dict[str, Any]]:
    """Rows of all peers for one mask on one shape. ``what`` goes into each."""
    # Otherwise FlexAttention would compile kernels for any length at the second length. These are slower.
    torch._dynamo.reset()
    case = Case(mask, **shape._asdict())
    attentions = {peer: attention for peer in peers if (attention := PEERS[peer](case)) is not None}
    if not attentions:
        return
    bounds = mask.bounds()
    inputs, d_out = random_inputs(shape)
    truth = Truth(*inputs, d_out, bounds)
    pairs = int(visible_pairs(bounds, shape.length))
    sparsity = tile_sparsity(bounds, q_len=shape.length)
    all_pairs = shape.length * shape.keys
    heads = shape.batch * shape.heads
    flops = visible_flops(pairs, heads, shape.head_dim)
    tile_flops = visible_flops(round((1 - sparsity) * all_pairs), heads, shape.head_dim)

    def rows() -> Iterator[dict[str, Any]]:
        for peer, attention in attentions.items():
            row = {**what, "implementation": peer, "visible": round(pairs / all_pairs, 4)}
            row["tile_sparsity"] = round(sparsity, 4)
            try:
                row |= measure(attention, inputs, d_out, truth, seconds)
            except Exception as error:  # whatever a peer raises is its result
                row["error"] = f"{type(error).__name__}: {error}"[:500]
            else:
                row["tflops"] = tflops(flops, row["milliseconds"])
                row["tflops_tiles"] = tflops(tile_flops, row["milliseconds"])
            yield row
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.synchronize()  # raises here if the error has left the device unusable

    yield from with_end_to_end(rows(), attentions, inputs, d_out) if max(shape.length, shape.keys) <= SHORT else rows()


def with_end_to_end(
    rows: Iterator[dict[str, Any]],
    attentions: dict[str, Attention],
    inputs: tuple[Tensor, Tensor, Tensor],
    d_out: Tensor,
) -> list[dict[str, Any]]:
    """The rows, all measured, with the wall-clock time per layer of a stack of layers, measured in turns."""

    def stack_of(attention: Attention) -> Callable[[], tuple[Tensor, ...]]:
        mask = attention.build() if attention.build else None

        def stack() -> tuple[Tensor, ...]:
            query, key, value = inputs
            for _ in range(LAYERS):
                query = attention.attend(query, key, value, mask)
            return torch.autograd.grad(query, inputs, d_out)

        return stack

    measured = list(rows)
    working = {row["implementation"]: row for row in measured if "error" not in row}
    times = time_in_turns({peer: stack_of(attentions[peer]) for peer in working}, repeats=200)
    for peer, row in working.items():
        row["milliseconds"]["end_to_end"] = round(times[peer]["milliseconds"] / LAYERS, 4)
        row["spread"]["end_to_end"] = times[peer]["spread"]
    return measured


def line(row: dict[str, Any]) -> str:
    shape = f"{row['heads']}/{row['kv_heads']} x {row['head_dim']}"
    name = f"{row['length']:7} {shape:>11} {row['mask']:24} {row['implementation']:22}"
    if "error" in row:
        return f"{name} {row['error'].splitlines()[0][:160]}"
    speed, time = row["tflops"], row["milliseconds"]
    mask = f"mask {time['mask']:7.3f} ms" if "mask" in time else ""
    mask += f" end to end {time['end_to_end']:7.3f} ms" if "end_to_end" in time else ""
    parts = "  ".join(f"{part} {speed[part]:6.1f}" for part in ("forward", "backward", "total"))
    return f"{name} {parts} TFLOP/s {mask}"


def head_counts(text: str) -> tuple[int, int]:
    heads, _, kv_heads = text.partition("/")
    return int(heads), int(kv_heads or heads)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--protocol", choices=["bar", "paper", "sparsity", "families"], default="bar")
    parser.add_argument("--masks", nargs="+", help="default: the paper's; all families")
    parser.add_argument("--lengths", type=int, nargs="+", help="default: 32768; all three of the paper")
    parser.add_argument("--head-dims", type=int, nargs="+", help="default: 128; 64 and 128 of the paper")
    parser.add_argument("--heads", type=head_counts, nargs="+", help="as 32/8; not for `paper`")
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), help="default: all that are installed")
    parser.add_argument("--samples", type=int, default=1, help="document lists of each length (default: %(default)s)")
    parser.add_argument("--documents", type=Path, help="folder with document lists; default: draw them")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="of measured time per figure (default: %(default)s)"
    )
    parser.add_argument("--missing", action="store_true", help="only what the file of this run lacks")
    parser.add_argument("--minutes", type=float, help="begin nothing new after so long")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON (default: %(default)s)")
    arguments = parser.parse_args()
    is_paper, is_sparsity = arguments.protocol == "paper", arguments.protocol == "sparsity"
    arguments.lengths = arguments.lengths or ([8192, 32768, 131072] if is_paper else [32768])
    arguments.head_dims = arguments.head_dims or ([64, 128] if is_paper else [128])
    arguments.heads = arguments.heads or [(32, 32) if is_sparsity else (32, 8)]
    if is_sparsity:
        arguments.masks = arguments.masks or ["causal_document", "document", "share_question"]
        arguments.peers = arguments.peers or ["flashmask"]
    known = list(FAMILIES) if arguments.protocol == "families" else [*PAPER_MASKS, *MORE_MASKS]
    arguments.masks = arguments.masks or (known if arguments.protocol == "families" else list(PAPER_MASKS))
    if "all" in arguments.masks:
        arguments.masks = known
    if unknown := set(arguments.masks) - set(known):
        parser.error(f"unknown masks {sorted(unknown)}; there are {known}")
    missing = missing_peers()
    arguments.peers = arguments.peers or [peer for peer in PEERS if peer not in missing]
    return arguments


def cases(arguments: argparse.Namespace) -> Iterator[tuple[dict[str, Any], Callable[[], Mask], Shape]]:
    """What is measured: the values that name it, how its mask is drawn, and its shape."""
    protocol = arguments.protocol
    if protocol == "families":
        for mask in arguments.masks:
            family = FAMILIES[mask](1, "cuda")
            for head_dim in arguments.head_dims:
                shape = family_shape(family, head_dim)
                yield {"protocol": protocol, "mask": mask, "sample": 0, **shape.named()}, family.mask, shape
        return
    for shape in shapes(protocol, arguments.lengths, arguments.head_dims, arguments.heads):
        for mask in arguments.masks:
            rows = document_rows(protocol, mask, shape.length, arguments.samples, arguments.documents)
            for sample, documents in rows.items():
                what = {"protocol": protocol, "mask": mask, "sample": sample, **shape.named()}
                yield what, mask_forms(documents, seed=sample, device="cuda")[mask], shape


def family_shape(family: Family, head_dim: int) -> Shape:
    kv_length = None if family.kv_len == family.q_len else family.kv_len
    return Shape(1, family.q_len, family.heads, family.kv_heads, head_dim, kv_length)


def main() -> None:
    arguments = parse_arguments()
    require_gpu()
    # Otherwise FlexAttention's compiled backward would free tensors that a second timed run needs.
    torch._functorch.config.donated_buffer = False
    for peer, reason in missing_peers().items():
        print(f"no {peer}: {reason}")
    settings = {
        "dtype": "bfloat16",
        "documents": "given" if arguments.documents else "drawn",
        "not_installed": missing_peers(),
        **({} if arguments.seconds == SECONDS else {"seconds": arguments.seconds}),
    }
    name = "attention_families_gpu" if arguments.protocol == "families" else "attention_gpu"
    run = Run(name, settings, KEY, arguments.output)
    deadline = Deadline(arguments.minutes)
    failed = 0
    for what, draw, shape in cases(arguments):
        if deadline.is_over():
            print("out of time: go on with --missing")
            return
        peers = [
            peer for peer in arguments.peers if not (arguments.missing and run.has({**what, "implementation": peer}))
        ]
        if not peers:
            continue
        for row in measure_mask(what, draw(), shape, peers, arguments.seconds):
            run.add(row)
            print(line(row), flush=True)
            failed += row["implementation"] == "flashmask" and "error" in row
    print("wrote", run.path)
    if failed:
        sys.exit(f"flashmask itself failed {failed} times")


if __name__ == "__main__":
    main()
