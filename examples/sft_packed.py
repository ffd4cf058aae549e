"""Fine-tune a language model on packed documents, and check it against the same training with padding.

Two runs see the same documents in the same batches and the same order, from the same initial weights:

  packed   every batch is one row without padding; attn_implementation="flashmask" keeps its documents apart
  padded   one document per row, padded to the longest of its batch; Transformers' own "eager" attention

Both compute the same loss, so the curves must agree step by step; when they do not, the script says so and fails. At
the end a few batches are computed with "sdpa" as well: padded, and packed beside a 2-D mask of ones, as many collators
make it. There the documents see each other, and the loss is another one.
Nothing is downloaded: the documents are the documentation strings and licence texts of this Python installation, the
tokenizer is a byte-level BPE trained on them, the model a small Llama. --model and --dataset take others.
"""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import json
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _two_runs import (
    StepRecorder,
    conclude,
    describe_speed,
    device_name,
    draw_losses,
    draw_mask,
    hide_progress_bars_in_files,
    print_table,
    record,
    training_arguments,
)
from datasets import Dataset, load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Trainer,
    set_seed,
)

import hf_flashmask  # importing hf_flashmask registers attn_implementation="flashmask"

FILE_FORMATS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
# The largest difference between the two losses of a step that counts as rounding. Measured in float32: 4e-6 on a CPU,
# 1e-4 with the larger model on an H200. In bfloat16 two trainings of one model diverge at this learning rate with any
# attention (sdpa and eager by 0.1 on an H200), so only the steps before that are compared.
TOLERANCE = {"float32": 1e-3 if torch.cuda.is_available() else 1e-4, "bfloat16": 1e-2}
COMPARED_STEPS = {"float32": None, "bfloat16": 10}
LEAK_BATCHES = 3


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    has_gpu = torch.cuda.is_available()
    add("--attn", default="flashmask", help="attention implementation of the packed run (default: %(default)s)")
    add("--model", help="a causal language model on the Hub or in a folder (default: a small Llama from scratch)")
    add("--dataset", help="a dataset on the Hub, a folder or a file (default: the texts of this Python installation)")
    add("--subset", help="which configuration of the dataset")
    add("--split", default="train", help="which split of the dataset (default: %(default)s)")
    add("--text-column", help="the column with the text (default: `text`, or the only one with strings)")
    add("--steps", type=int, default=120, help="training steps of each run (default: %(default)s)")
    add("--batch-size", type=int, default=32 if has_gpu else 8, help="documents per step (default: %(default)s)")
    add("--max-length", type=int, default=512, help="cut documents to this many tokens (default: %(default)s)")
    add("--hidden-size", type=int, default=256 if has_gpu else 128, help="a multiple of 64 (default: %(default)s)")
    add("--layers", type=int, default=6 if has_gpu else 2, help="of the small Llama (default: %(default)s)")
    add("--learning-rate", type=float, default=2e-3, help="decays linearly to 0 (default: %(default)s)")
    add("--dtype", choices=TOLERANCE, default="float32", help="of matrix products (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the weights and of the documents' order (default: %(default)s)")
    add("--output", type=Path, default=Path("runs/sft_packed"), help="folder for the pictures (default: %(default)s)")
    args = parser.parse_args()
    if args.steps < 2:
        parser.error(f"--steps must be at least 2, got {args.steps}: the first one is not timed")
    if args.hidden_size % 64:
        parser.error(f"--hidden-size must be a multiple of 64, got {args.hidden_size}")
    return args


def python_texts() -> Iterator[str]:
    """Documentation strings of the standard library, and licences of the installed packages."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        if {"site-packages", "test", "tests", "lib2to3"}.isdisjoint(path.relative_to(library).parts):
            for node in ast.walk(ast.parse(path.read_bytes())):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    yield ast.get_docstring(node) or ""
    for distribution in importlib.metadata.distributions():
        for file in distribution.files or ():
            if file.name.upper().startswith(("LICENSE", "LICENCE", "COPYING", "NOTICE")):
                path = Path(str(file.locate()))
                if path.is_file():
                    yield path.read_text(encoding="utf-8", errors="ignore")


def load_texts(args: argparse.Namespace) -> Dataset:
    """The documents that the run needs, in a random order, in the column `text`."""
    if args.dataset is None:
        dataset = Dataset.from_dict({"text": sorted({text for text in python_texts() if len(text) >= 40})})
    elif Path(args.dataset).is_file():
        suffix = Path(args.dataset).suffix
        if suffix not in FILE_FORMATS:
            sys.exit(f"--dataset: cannot read {args.dataset}, only files ending in {', '.join(FILE_FORMATS)}")
        dataset = load_dataset(FILE_FORMATS[suffix], data_files=args.dataset, split="train")
    else:
        dataset = load_dataset(args.dataset, args.subset, split=args.split)

    strings = [name for name, kind in dataset.features.items() if getattr(kind, "dtype", "").endswith("string")]
    column = args.text_column or ("text" if "text" in strings else strings[0] if len(strings) == 1 else None)
    if column not in strings:
        sys.exit(f"--dataset: cannot tell which column holds the text, pass --text-column with one of {strings}")
    dataset = dataset.shuffle(seed=args.seed).select(range(min(len(dataset), args.steps * args.batch_size)))
    return Dataset.from_dict({"text": dataset[column]})


def train_tokenizer(texts: Dataset) -> PreTrainedTokenizerFast:
    end, pad, byte_level = "<|end|>", "<|pad|>", pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=[end, pad], initial_alphabet=byte_level.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts["text"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=pad)


def tokenize(texts: Dataset, tokenizer: Any, max_length: int) -> Dataset:
    """Token ids and labels. Nothing comes before the first token of a document, so it is not a label."""

    def encode(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        ids = [[*ids[: max_length - 1], tokenizer.eos_token_id] for ids in tokenizer(rows["text"])["input_ids"]]
        return {"input_ids": ids, "labels": [[-100, *row[1:]] for row in ids]}

    return texts.map(encode, batched=True, remove_columns="text").filter(lambda row: len(row["input_ids"]) > 1)


def build_model(args: argparse.Namespace, vocab_size: int, attention: str) -> Any:
    """The same initial weights in every call, and no dropout: with it no two runs could be compared."""
    set_seed(args.seed)
    if args.model is None:
        config = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=args.hidden_size,
            intermediate_size=3 * args.hidden_size,
            num_hidden_layers=args.layers,
            num_attention_heads=args.hidden_size // 32,
            num_key_value_heads=args.hidden_size // 64,
            max_position_embeddings=args.max_length,
        )
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    names = AutoConfig.from_pretrained(args.model).to_dict()
    no_dropout = {name: 0.0 for name in names if name.endswith(("dropout", "dropout_prob", "pdrop"))}
    return AutoModelForCausalLM.from_pretrained(
        args.model, attn_implementation=attention, dtype=torch.float32, **no_dropout
    )


def train(args: argparse.Namespace, tokenizer: Any, dataset: Dataset, attention: str, collator: Any) -> StepRecorder:
    trainer = Trainer(
        model=build_model(args, len(tokenizer), attention),
        args=training_arguments(args, num_train_epochs=1, bf16=args.dtype == "bfloat16"),
        train_dataset=dataset,
        data_collator=collator,
    )
    return record(trainer, f"Training with {attention}")


@torch.no_grad()
def losses_with_sdpa(args: argparse.Namespace, tokenizer: Any, dataset: Dataset, model: Any) -> dict[str, list[float]]:
    """Losses of the first batches with the trained weights: padded with sdpa, and packed with both implementations."""
    starts = range(0, min(LEAK_BATCHES * args.batch_size, len(dataset)), args.batch_size)
    batches = [[dataset[i] for i in range(start, min(start + args.batch_size, len(dataset)))] for start in starts]

    def losses(attention: str, collate: Any) -> list[float]:
        model.set_attn_implementation(attention)
        found = []
        for batch in map(collate, batches):
            # The mask that most collators and tokenizers make. Padding has it already.
            batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
            inputs = {name: value.to(model.device) for name, value in batch.items() if isinstance(value, torch.Tensor)}
            found.append(model(**inputs).loss.item())
        return found

    model.eval()
    return {
        "sdpa, padded": losses("sdpa", DataCollatorForSeq2Seq(tokenizer)),
        f"{args.attn}, packed": losses(args.attn, DataCollatorWithFlattening()),
        "sdpa, packed": losses("sdpa", DataCollatorWithFlattening()),
    }


def compare(args: argparse.Namespace, packed: StepRecorder, padded: StepRecorder) -> dict[str, Any]:
    """Speed counts the tokens of documents only, and leaves out the first step, which warms up."""
    tokens = packed.positions
    differences = [abs(a - b) for a, b in zip(packed.loss, padded.loss)][: COMPARED_STEPS[args.dtype]]

    def figures(name: str, run: StepRecorder) -> dict[str, Any]:
        speed = (tokens[-1] - tokens[0]) / (run.seconds[-1] - run.seconds[0])
        return {"name": name, "padding": run.positions[-1] - tokens[-1], "tokens_per_second": speed, "loss": run.loss}

    return {
        "device": device_name(),
        "dtype": args.dtype,
        "tokens": tokens[-1],
        "packed": figures(f"{args.attn}, packed", packed),
        "padded": figures("eager, padded", padded),
        "padding_saved": 1 - tokens[-1] / padded.positions[-1],
        "speedup": (padded.seconds[-1] - padded.seconds[0]) / (packed.seconds[-1] - packed.seconds[0]),
        "compared_steps": len(differences),
        "largest_difference": max(differences),
        "tolerance": TOLERANCE[args.dtype],
    }


def print_report(report: dict[str, Any]) -> None:
    runs = report["packed"], report["padded"]
    print_table(
        {
            f"{report['device']}, {report['dtype']}": [run["name"] for run in runs],
            "tokens of documents": [f"{report['tokens']:,}" for _ in runs],
            "tokens of padding": [f"{run['padding']:,}" for run in runs],
            "tokens of documents per second": [f"{run['tokens_per_second']:,.0f}" for run in runs],
            "loss of the first step": [f"{run['loss'][0]:.4f}" for run in runs],
            "loss of the last step": [f"{run['loss'][-1]:.4f}" for run in runs],
        }
    )
    print(f"Padding saved: {report['padding_saved']:.0%}. {describe_speed(report)}")
    print("\nLosses of a few batches with the trained weights:", end="")
    print_table({name: [f"{loss:.6f}" for loss in losses] for name, losses in report["sdpa"].items()})
    print(f"Packed with sdpa, documents see each other: its losses are off by up to {report['leak']:.1e}.\n")


def draw(report: dict[str, Any], batch: dict[str, torch.Tensor], folder: Path) -> None:
    def curve(run: dict[str, Any]) -> tuple[str, list[float]]:
        return f"{run['name']}: {run['tokens_per_second']:,.0f} tokens/s", run["loss"]

    draw_losses(
        curve(report["padded"]),
        curve(report["packed"]),
        folder / "loss.png",
        title=f"Losses of {report['compared_steps']} steps at most {report['largest_difference']:.1e} apart",
        saved=f"{report['padding_saved']:.0%} padding saved",
        unit="loss per token (nats)",
    )
    bounds = hf_flashmask.bounds.from_position_ids(batch["position_ids"])
    draw_mask(bounds, folder / "mask.png", title="The mask of one packed row")


def main() -> None:
    # One process, one GPU: with several GPUs, Trainer would cut the packed row into pieces (DataParallel).
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    args = parse_arguments()
    hide_progress_bars_in_files()
    texts = load_texts(args)
    tokenizer = train_tokenizer(texts) if args.model is None else AutoTokenizer.from_pretrained(args.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    dataset = tokenize(texts, tokenizer, args.max_length)
    lengths = sorted(map(len, dataset["input_ids"]))
    median = lengths[len(lengths) // 2]
    print(f"{len(lengths):,} documents of {lengths[0]} to {lengths[-1]:,} tokens, median {median}", flush=True)

    flattening = DataCollatorWithFlattening()
    packed = train(args, tokenizer, dataset, args.attn, flattening)
    padded = train(args, tokenizer, dataset, "eager", DataCollatorForSeq2Seq(tokenizer))

    report = compare(args, packed, padded)
    report["sdpa"] = losses_with_sdpa(args, tokenizer, dataset, packed.model)
    alone, leaking = report["sdpa"]["sdpa, padded"], report["sdpa"]["sdpa, packed"]
    report["leak"] = max(abs(a - b) for a, b in zip(alone, leaking))
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(report, flattening([dataset[i] for i in range(min(args.batch_size, len(dataset)))]), args.output)
    print_report(report)
    print(f"Pictures: {args.output / 'loss.png'} and {args.output / 'mask.png'}")
    losses = f"the losses of the first {report['compared_steps']} steps"
    conclude({losses: (report["largest_difference"], report["tolerance"])})


if __name__ == "__main__":
    main()
