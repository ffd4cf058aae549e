"""Fine-tune on rows that several GPUs share, and check it against one process.

    pip install ".[train,viz]"
    torchrun --nproc-per-node 8 examples/sft_long_context.py --sp 8 --row-length 131072 --dtype bfloat16

The processes form a mesh dp x sp: FSDP2 shards the weights over all of them, and each group of `--sp` processes shares
the tokens of one packed row out (hf_flashmask.sequence_parallel). Without torchrun the script starts two processes
itself, on GPUs if there are as many.

The first steps are compared with one process that trains the same weights on the same documents, each of them alone,
with Transformers' own "sdpa" attention: nothing is packed there, and nothing is cut. Losses, gradients and weights must
agree; when they do not, the script says so and fails. A picture, which needs matplotlib, shows which rank computes what
of the mask.

Nothing is downloaded: the documents are the source of the standard library, a token is a byte, the model is a
small Llama.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import random
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

import hf_flashmask
from hf_flashmask.training import PackedDataCollator, pack_lengths

END = 256
"""The token after a document; the others are bytes."""
TOLERANCE = {
    "float32": dict.fromkeys(("losses", "gradients"), 1e-3 if torch.cuda.is_available() else 1e-4),
    # On a CPU, gradients of embeddings are added up in bfloat16: measured 7e-2, and 6e-6 between losses.
    "bfloat16": {"losses": 2e-3, "gradients": 1e-1},
}
"""The largest difference that counts as rounding: between losses, and between gradients as a part of their norm."""
COMPARED_STEPS = {"float32": 3, "bfloat16": 1}
"""From the first step on, AdamW turns the rounding of tiny gradients into other weights."""
HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None

Document = dict[str, list[int]]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    has_gpu = torch.cuda.is_available()
    add("--sp", type=int, default=2, help="processes that share a row (default: %(default)s)")
    add("--mode", choices=("auto", "ulysses", "all_gather"), default="auto", help="how they do (default: %(default)s)")
    add("--row-length", type=int, default=32768 if has_gpu else 8192, help="tokens of a row (default: %(default)s)")
    add("--steps", type=int, default=20 if has_gpu else 8, help="training steps (default: %(default)s)")
    add("--compared-steps", type=int, help="how many of them one process repeats (default: 3, in bfloat16 1)")
    add("--texts", type=Path, help="folder whose Python files are the documents (default: the standard library)")
    documents = "files" if has_gpu else "definitions"
    add("--documents", choices=("files", "definitions"), default=documents, help="of Python (default: %(default)s)")
    add("--hidden-size", type=int, default=1024 if has_gpu else 64, help="of the small Llama (default: %(default)s)")
    add("--layers", type=int, default=8 if has_gpu else 2, help="of the small Llama (default: %(default)s)")
    add("--heads", type=int, default=8 if has_gpu else 4, help="query heads (default: %(default)s)")
    add("--kv-heads", type=int, default=2, help="key and value heads (default: %(default)s)")
    add("--checkpointing", action="store_true", help="compute activations again in the backward pass")
    add("--dtype", choices=TOLERANCE, default="float32", help="of matrix products (default: %(default)s)")
    add("--learning-rate", type=float, default=1e-3, help="of AdamW (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the weights and of the documents' order (default: %(default)s)")
    add("--output", type=Path, default=Path("runs/sft_long_context"), help="folder of results (default: %(default)s)")
    args = parser.parse_args()
    if args.compared_steps is None:
        args.compared_steps = COMPARED_STEPS[args.dtype]
    if args.steps < 2:
        parser.error(f"--steps must be at least 2, got {args.steps}: the first one is not timed")
    return args


def packed_rows(args: argparse.Namespace, count: int) -> list[list[Document]]:
    """So many rows of documents, at most `row_length` tokens each. Longer documents are cut into several."""
    folder = args.texts or Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "test", "tests", "encodings"}  # code of others, long classes, tables of numbers
    paths = sorted(path for path in folder.rglob("*.py") if left_out.isdisjoint(path.relative_to(folder).parts))
    random.Random(args.seed).shuffle(paths)
    documents: list[list[int]] = []
    while sum(map(len, documents)) < 2 * count * args.row_length:  # small folders are read again
        for path in paths:
            content = path.read_bytes()
            for text in content.split(b"\n\n\n") if args.documents == "definitions" else [content]:
                tokens = [*text.strip(), END]
                documents += [tokens[i : i + args.row_length] for i in range(0, len(tokens), args.row_length)]
    rows = pack_lengths([len(tokens) for tokens in documents], args.row_length, "in_order")[:count]
    return [[{"input_ids": documents[index]} for index in row] for row in rows]


def build_model(args: argparse.Namespace) -> Any:
    set_seed(args.seed)
    config = LlamaConfig(
        vocab_size=END + 1,
        hidden_size=args.hidden_size,
        intermediate_size=3 * args.hidden_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=args.row_length,
        use_cache=False,
    )
    return LlamaForCausalLM._from_config(config, attn_implementation="flashmask")


def shard_weights(args: argparse.Namespace, model: Any, everyone: DeviceMesh) -> None:
    policy = MixedPrecisionPolicy()
    if args.dtype == "bfloat16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mesh=everyone, mp_policy=policy)
    fully_shard(model, mesh=everyone, mp_policy=policy)


def optimizer_of(args: argparse.Namespace, model: Any) -> torch.optim.Optimizer:
    # A smaller `eps` turns rounding errors of tiny gradients into different steps.
    return torch.optim.AdamW(model.parameters(), lr=args.learning_rate, eps=1e-5)


class OneProcess:
    """The same training on one process. It exists on rank 0; what it compares with comes from all ranks."""

    def __init__(self, args: argparse.Namespace, model: Any) -> None:
        alone = dist.new_group([0])  # to round as the processes do
        self.model: Any = None
        if dist.get_rank() == 0:
            self.model = copy.deepcopy(model)
            self.model.set_attn_implementation("sdpa")
            shard_weights(args, self.model, DeviceMesh.from_group(alone, model.device.type))
            self.optimizer = optimizer_of(args, self.model)
        self.differences = {"losses": 0.0, "gradients": 0.0, "weights": 0.0}

    def compare_gradients(self, rows: list[list[Document]], loss: float, model: Any) -> None:
        """Each document alone: the mean over all labels, as the processes have it together."""
        if self.model is not None:
            documents = [document["input_ids"] for row in rows for document in row if len(document["input_ids"]) > 1]
            num_labels = sum(len(tokens) - 1 for tokens in documents)
            expected = 0.0
            for tokens in documents:
                input_ids = torch.tensor([tokens], device=self.model.device)
                part = self.model(input_ids, labels=input_ids, num_items_in_batch=num_labels).loss
                part.backward()
                expected += part.item()
            self._note("losses", abs(loss - expected))
        difference, norm = 0.0, 0.0
        for name, parameter in model.named_parameters():
            gradient = parameter.grad.full_tensor()
            if self.model is not None:
                own = self.model.get_parameter(name).grad.full_tensor()
                difference += (gradient - own).square().sum().item()
                norm += own.square().sum().item()
        if self.model is not None:
            self._note("gradients", (difference / norm) ** 0.5)

    def compare_weights(self, model: Any) -> None:
        if self.model is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        for name, parameter in model.named_parameters():
            weight = parameter.detach().full_tensor()
            if self.model is not None:
                own = self.model.get_parameter(name).detach().full_tensor()
                self._note("weights", (weight - own).abs().max().item())

    def _note(self, name: str, difference: float) -> None:
        self.differences[name] = max(self.differences[name], difference)


def train(args: argparse.Namespace) -> None:
    """On every process."""
    device = torch.device("cpu")
    if torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]):
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if device.type == "cpu" else "nccl")
    world = dist.get_world_size()
    if world % args.sp:
        sys.exit(f"--sp must divide the {world} processes, got {args.sp}")
    everyone = init_device_mesh(device.type, (world,))
    mesh = init_device_mesh(device.type, (world // args.sp, args.sp), mesh_dim_names=("dp", "sp"))
    groups, group = mesh["dp"].size(), mesh["dp"].get_local_rank()

    model = build_model(args).to(device)
    one_process = OneProcess(args, model)
    if args.checkpointing:
        is_renamed = hasattr(model, "activation_checkpointing_enable")  # since Transformers 5.23
        (model.activation_checkpointing_enable if is_renamed else model.gradient_checkpointing_enable)()
    shard_weights(args, model, everyone)
    optimizer = optimizer_of(args, model)
    parallel = hf_flashmask.sequence_parallel(model, mesh["sp"], mode=args.mode, data_mesh=mesh["dp"])

    rows, collate = packed_rows(args, args.steps * groups), PackedDataCollator()
    shares = share_out(args, parallel, collate(max(rows, key=len)))
    report: dict[str, Any] = {"mode": parallel.mode, "world": world, "loss": [], "seconds": [], **shares}
    for step in range(args.steps):
        start = time.perf_counter()
        of_step = rows[step * groups : (step + 1) * groups]
        loss = model(**parallel.shard(collate(of_step[group]))).loss
        loss.backward()
        average = loss.detach() / world  # the loss of the batch is the average over the ranks
        dist.all_reduce(average)
        report["loss"].append(average.item())
        if step < args.compared_steps:
            one_process.compare_gradients(of_step, average.item(), model)
        optimizer.step()
        optimizer.zero_grad()
        if step < args.compared_steps:
            one_process.compare_weights(model)
        report["seconds"].append(time.perf_counter() - start)
    report["tokens"] = sum(len(document["input_ids"]) for row in rows for document in row)
    report["largest_difference"], report["tolerance"] = one_process.differences, TOLERANCE[args.dtype]
    dist.destroy_process_group()
    if int(os.environ["RANK"]) == 0:
        print_report(args, report, parallel.reason)


# Which rank computes what


def share_out(args: argparse.Namespace, parallel: Any, batch: dict[str, Tensor]) -> dict[str, Any]:
    """The shares of a row's visible pairs that the ranks of the first group compute. Draws them as well."""
    length = batch["input_ids"].shape[1]
    # `shard` cuts the numbers of the tokens as it cuts the tokens; 0 is what it pads with.
    numbers = parallel.shard({**batch, "input_ids": torch.arange(1, length + 1)[None]})["input_ids"]
    held: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(held, numbers[0].tolist())
    held = [[number - 1 for number in numbers if number] for numbers in held[: args.sp]]
    if dist.get_rank() != 0:
        return {}
    pairs = batch["position_ids"][0] + 1  # a token sees itself and all tokens of its document before it
    total = pairs.sum().item()
    shares = [pairs[rows].sum().item() / total for rows in held]
    if parallel.mode == "ulysses":
        shares = [1 / args.sp] * args.sp
    in_order = [part.sum().item() / total for part in pairs.tensor_split(args.sp)]
    args.output.mkdir(parents=True, exist_ok=True)
    if HAS_MATPLOTLIB:
        draw(args, batch["position_ids"], held, shares, by_heads=parallel.mode == "ulysses")
    return {"shares": shares, "shares_of_a_cut_in_order": in_order, "documents": int((pairs == 1).sum())}


def draw(
    args: argparse.Namespace, position_ids: Tensor, held: list[list[int]], shares: list[float], *, by_heads: bool
) -> None:
    """The mask, rows by keys, in the colours of the ranks. Where they share out heads, a panel for each rank."""
    import matplotlib.pyplot as plt
    from matplotlib.colors import to_rgb

    length = position_ids.shape[1]
    tile = -(-length // 512)
    visible = hf_flashmask.bounds.tile_occupancy(hf_flashmask.bounds.from_position_ids(position_ids), tile_size=tile)
    colors = [to_rgb(f"C{rank % 10}") for rank in range(args.sp)]
    owner = torch.empty(length, dtype=torch.int64)
    for rank, rows in enumerate(held):
        owner[rows] = rank
    panels = [torch.full((length,), rank) for rank in range(args.sp)] if by_heads else [owner]

    columns = min(len(panels), 4)
    lines = -(-len(panels) // columns)
    size = (5.5, 5.5) if columns == 1 else (3 * columns, 3.3 * lines + 0.3)
    figure, axes = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    for panel, ax in zip(panels, axes.flat):
        color_of_row = torch.tensor(colors)[panel[::tile]][:, None]
        image = 1 - visible[0, 0].sqrt()[..., None] * (1 - color_of_row)
        ax.imshow(image.numpy(), extent=(0, length, length, 0), interpolation="nearest")
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
        ax.label_outer()
    heads = args.heads // args.sp
    for rank, (color, share) in enumerate(zip(colors, shares)):
        if by_heads:
            axes.flat[rank].set_title(f"rank {rank}: heads {rank * heads} to {(rank + 1) * heads - 1}", loc="left")
        else:
            axes[0, 0].plot([], [], "s", color=color, label=f"rank {rank}: {share:.1%} of the visible pairs")
    if not by_heads:
        axes[0, 0].legend(frameon=False, loc="upper right")
        axes[0, 0].set_title("Who computes which rows of the mask, all heads", loc="left")
    figure.supxlabel("key")
    figure.supylabel("query")
    figure.savefig(args.output / "mask.png", dpi=150)


def print_report(args: argparse.Namespace, report: dict[str, Any], reason: str) -> None:
    (args.output / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    seconds = report["seconds"][max(args.compared_steps, 1) :] or report["seconds"][1:]
    speed = report["tokens"] / args.steps * len(seconds) / sum(seconds)
    groups = report["world"] // args.sp
    print(f'{report["world"]} processes, {groups} x {args.sp}, mode="{report["mode"]}" ({reason})')
    print(f"{report['tokens'] / args.steps:,.0f} tokens a step in {groups} rows, {speed:,.0f} tokens per second")
    print(f"loss of the first step {report['loss'][0]:.4f}, of the last {report['loss'][-1]:.4f}")
    print(f"Shares of the visible pairs of a row of {report['documents']} documents:")
    for rank, (share, in_order) in enumerate(zip(report["shares"], report["shares_of_a_cut_in_order"])):
        print(f"  rank {rank}: {share:.1%}, where a cut into consecutive rows would give {in_order:.1%}")
    print(f"Picture: {args.output / 'mask.png'}" if HAS_MATPLOTLIB else "No picture: matplotlib is not installed")
    if not args.compared_steps:
        return
    found, allowed = report["largest_difference"], report["tolerance"]
    verdict = (
        f"in {min(args.compared_steps, args.steps)} steps losses differ by at most {found['losses']:.1e} (allowed is "
        f"{allowed['losses']:.0e}), gradients by {found['gradients']:.1e} of their norm (allowed is "
        f"{allowed['gradients']:.0e}), weights by {found['weights']:.1e}"
    )
    if not all(found[name] <= limit for name, limit in allowed.items()):  # written so that nan fails
        sys.exit(f"The processes and one process DO NOT AGREE: {verdict}.")
    print(f"The processes and one process agree: {verdict}.")


def main() -> None:
    args = parse_arguments()
    if "RANK" in os.environ:
        train(args)
        return
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(max(2, args.sp))]
    sys.exit(subprocess.run([*launch, *sys.argv], env={"OMP_NUM_THREADS": "1", **os.environ}).returncode)


if __name__ == "__main__":
    main()
