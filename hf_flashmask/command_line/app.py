"""The commands and their options."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer

from .. import bounds as bounds_of
from . import bench as benchmark
from . import estimate as estimation
from . import explain as explanation
from .environment import describe_environment
from .running import run_program
from .sequences import load_tokenizer, read_sequences

app = typer.Typer(
    name="python -m hf_flashmask",
    help="Without a command: versions, devices, and which kernels run on each of them, to be pasted into an issue.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class DTypeOption(str, Enum):
    """Of queries, keys and values."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def main() -> None:
    """Run the command line."""
    app()


@contextmanager
def _mistakes_in_one_line() -> Iterator[None]:
    """What the user can mend ends without a traceback."""
    try:
        yield
    except (ValueError, TypeError, IndexError, OSError) as error:
        raise typer.BadParameter(str(error)) from error


@app.callback(invoke_without_command=True)
def _print_environment(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(describe_environment())


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def run(
    target: Annotated[str, typer.Argument(metavar="SCRIPT|COMMAND", help="a Python file or a command")],
    arguments: Annotated[list[str] | None, typer.Argument(metavar="ARGUMENTS", help="of the program")] = None,
    is_module: Annotated[bool, typer.Option("-m", help="the target is the name of a module")] = False,
) -> None:
    """Run a program that does not import hf_flashmask.

    attn_implementation="flashmask" is registered in all its processes. For example: run train.py --lr 1e-4; run trl sft
    --attn_implementation flashmask ...; run -m torch.distributed.run --nproc-per-node 8 train.py
    """
    with _mistakes_in_one_line():
        run_program(target, arguments or [], is_module=is_module)


@app.command()
def estimate(
    data: Annotated[
        str, typer.Argument(help="csv, json, jsonl, parquet, arrow or txt, a folder, or a name on the Hub")
    ],
    max_length: Annotated[int, typer.Option(min=1, help="tokens of a packed row; longer sequences are cut")],
    tokenizer: Annotated[str | None, typer.Option(help="a name or a folder; not needed for `input_ids`")] = None,
    model: Annotated[str | None, typer.Option(help="whose operations count; default: that of the tokenizer")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="examples of a padded batch")] = 8,
    split: Annotated[str, typer.Option(help="of a dataset on the Hub")] = "train",
    examples: Annotated[int, typer.Option(min=1, help="how many to read")] = 5000,
    plot: Annotated[Path, typer.Option(help="the picture")] = Path("estimate.png"),
) -> None:
    """What packing and shared prefixes would save on a dataset.

    It prints padding, fill, visible pairs and the expected speed.
    """
    with _mistakes_in_one_line():
        from transformers import AutoConfig

        loaded = None if tokenizer is None else load_tokenizer(tokenizer)
        sequences = read_sequences(data, loaded, max_length, split=split, most_examples=examples)
        result = estimation.estimate_ways_to_train(sequences, max_length, batch_size)
        name = model or tokenizer
        try:
            cost = None if name is None else estimation.Cost.of(AutoConfig.from_pretrained(name))
        except (OSError, ValueError):
            if model is not None:
                raise
            cost = None  # a tokenizer without a model
        typer.echo("\n".join(estimation.describe_estimate(result, cost, max_length)))
        if _command_can_draw():
            estimation.draw_estimate(result, cost, plot)
            typer.echo(f"Picture: {plot}")


@app.command()
def explain(
    file: Annotated[Path, typer.Argument(help="a mask or a batch: .pt, .npy or .safetensors", exists=True)],
    q_len: Annotated[int | None, typer.Option(min=1, help="query rows; default: as many as keys")] = None,
    row: Annotated[int, typer.Option(min=0, help="of the batch, to draw")] = 0,
    pair: Annotated[
        tuple[int, int] | None, typer.Option(help="a query and a key: what hides the key, if it is")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="a picture of each mask, if wanted")] = None,
    html: Annotated[
        Path | None, typer.Option(help="a page to look into with a browser, if wanted: all rows, heads and masks")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="a name or a folder: picture and page show the texts of the batch's `input_ids`"),
    ] = None,
) -> None:
    """A mask, or the mask of a batch, in words and as a drawing."""
    with _mistakes_in_one_line():
        content = explanation.read_file(file)
        masks = explanation.masks_in_file(content)
        labels = explanation.TokensInFile.of(content, tokenizer)
        for name, bounds in masks.items():
            if row >= max(bounds.shape[0], 1):
                raise ValueError(f"--row is {row}, but the mask has {bounds.shape[0]} rows of a batch")
            typer.echo("\n".join(explanation.describe_mask_of_file(name, bounds, q_len, row)))
            if pair is not None:
                typer.echo(bounds_of.explain(bounds, *pair, q_len, batch=row))
            if plot is not None:
                picture = plot if len(masks) == 1 else plot.with_stem(f"{plot.stem}_{name}")
                explanation.draw_mask_of_file(name, bounds, q_len, labels, row, picture)
                typer.echo(f"Picture: {picture}")
        if html is not None:
            explanation.write_page_of_file(masks, q_len, labels, html)
            typer.echo(f"Page: {html}")


@app.command()
def bench(
    length: Annotated[
        int | None, typer.Option(min=16, help="tokens of the row; default: 16,384, 2,048 on a CPU")
    ] = None,
    documents: Annotated[int, typer.Option(min=1, help="in the row, of equal lengths")] = 8,
    heads: Annotated[int | None, typer.Option(min=1, help="of queries; default: 32, 8 on a CPU")] = None,
    kv_heads: Annotated[int | None, typer.Option(min=1, help="of keys and values; default: a quarter")] = None,
    head_size: Annotated[int | None, typer.Option(min=8, help="default: 128, 64 on a CPU")] = None,
    dtype: Annotated[DTypeOption | None, typer.Option(help="default: bfloat16, float32 on a CPU")] = None,
    device: Annotated[str | None, typer.Option(help="default: the GPU if there is one")] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="to measure, compiling not counted")] = 20.0,
    plot: Annotated[Path, typer.Option(help="the picture")] = Path("bench.png"),
) -> None:
    """Time attention over packed documents on this machine.

    flashmask, FlexAttention, SDPA, and FlashAttention if it is installed, each checked before it is timed.
    """
    with _mistakes_in_one_line():
        place = _device_of_option(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        on_gpu = place.type == "cuda"
        num_heads = heads or (32 if on_gpu else 8)
        num_kv_heads = kv_heads or max(1, num_heads // 4)
        if num_heads % num_kv_heads:
            raise ValueError(f"--heads ({num_heads}) must be a multiple of --kv-heads ({num_kv_heads})")
        shape = benchmark.BenchShape(
            length or (16384 if on_gpu else 2048),
            documents,
            num_heads,
            num_kv_heads,
            head_size or (128 if on_gpu else 64),
            getattr(torch, dtype.value if dtype is not None else "bfloat16" if on_gpu else "float32"),
            place,
        )
        if shape.documents > shape.length:
            raise ValueError(f"--documents ({documents}) must not be more than --length ({shape.length})")
    name = torch.cuda.get_device_name(place) if on_gpu else f"{torch.get_num_threads()} CPU threads"
    title = (
        f"{name}, {str(shape.dtype).removeprefix('torch.')}: {shape.length:,} tokens in {documents} documents,\n"
        f"{shape.num_heads} query and {shape.kv_heads} key heads of {shape.head_dim}, torch {torch.__version__}"
    )
    typer.echo(title)
    results = benchmark.measure_implementations(shape, seconds, note=lambda text: typer.echo(f"  {text}", err=True))
    typer.echo("\n".join(benchmark.describe_bench(shape, results)))
    if _command_can_draw() and any(result.forward is not None for result in results):
        benchmark.draw_bench(shape, results, title, plot)
        typer.echo(f"Picture: {plot}")
    if results[0].forward is None:
        raise typer.Exit(1)


def _device_of_option(device: str) -> torch.device:
    """
    Raises:
        ValueError: for a device that attention cannot be timed on here.
    """
    found = {"cpu": 1, "cuda": torch.cuda.device_count()}
    kind, _, index = device.partition(":")
    if not (index or "0").isdecimal() or int(index or 0) >= found.get(kind, 0):
        known = ["cpu", *(f"cuda:{number}" for number in range(found["cuda"]))]
        raise ValueError(f"--device is {device!r}; here it may be {', '.join(known)}")
    return torch.device(device)


def _command_can_draw() -> bool:
    if importlib.util.find_spec("matplotlib") is not None:
        return True
    typer.echo("No picture, because matplotlib is not installed: pip install 'hf-flashmask[viz]'")
    return False
