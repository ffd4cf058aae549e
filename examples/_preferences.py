"""Shared parts of the two examples on preference data: texts, the unshared batches, the report and its pictures."""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
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
from sft_packed import FILE_FORMATS, python_texts, train_tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoTokenizer,
    LlamaConfig,
    Trainer,
    set_seed,
)

from hf_flashmask.training import SharedPromptDataCollator

# The largest difference between the two losses of a step that counts as rounding. Measured in float32 on a CPU, with
# three seeds: 7e-7 for DPO, 2e-5 for the reward model; on an H200, with its larger model, 4e-4 for the reward model.
TOLERANCE = 1e-3 if torch.cuda.is_available() else 2e-4


def parse_arguments(description: str | None, name: str) -> argparse.Namespace:
    # One process, one GPU: with several GPUs, Trainer would cut batches into pieces (DataParallel).
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    has_gpu = torch.cuda.is_available()
    add("--model", help="a language model on the Hub or in a folder (default: a small Llama from scratch)")
    add("--dataset", help="strings `prompt`, `chosen`, `rejected`, on the Hub or in a file (default: texts of Python)")
    add("--split", default="train", help="which split of the dataset (default: %(default)s)")
    add("--steps", type=int, default=80 if has_gpu else 60, help="training steps of each run (default: %(default)s)")
    add("--batch-size", type=int, default=32 if has_gpu else 4, help="pairs per step (default: %(default)s)")
    add("--max-prompt", type=int, default=512 if has_gpu else 320, help="tokens of a prompt (default: %(default)s)")
    add("--max-answer", type=int, default=64 if has_gpu else 32, help="tokens of an answer (default: %(default)s)")
    add("--hidden-size", type=int, default=256 if has_gpu else 192, help="a multiple of 64 (default: %(default)s)")
    add("--layers", type=int, default=6 if has_gpu else 2, help="of the small Llama (default: %(default)s)")
    # At 1e-3 the larger model of the GPU amplifies rounding, to 2e-3 after 120 steps of DPO.
    rate = 3e-4 if has_gpu else 1e-3
    add("--learning-rate", type=float, default=rate, help="decays linearly to 0 (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the weights and of the pairs (default: %(default)s)")
    add("--output", type=Path, default=Path("runs") / name, help="folder for the pictures (default: %(default)s)")
    args = parser.parse_args()
    if args.steps < 2:
        parser.error(f"--steps must be at least 2, got {args.steps}: the first one is not timed")
    hide_progress_bars_in_files()
    return args


# Data


def load_pairs(args: argparse.Namespace) -> tuple[Dataset, Any]:
    """The pairs that the run needs, as token ids `prompt`, `chosen`, `rejected`, and their tokenizer."""
    if args.dataset is not None:
        return load_dataset_of_pairs(args)
    texts = sorted({text for text in python_texts() if len(text) >= 40})
    tokenizer: Any
    if args.model is None:
        tokenizer = train_tokenizer(Dataset.from_dict({"text": texts}))
    else:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    return pairs_from_texts(args, tokenizer(texts, add_special_tokens=False)["input_ids"]), tokenizer


def pairs_from_texts(args: argparse.Namespace, texts: list[list[int]]) -> Dataset:
    """The prompt is the beginning of a text, the chosen answer its continuation, the rejected one that of another."""
    count = min(number_of_pairs(args), len(texts) // 2)
    texts = sorted(texts, key=len, reverse=True)[: 2 * count]
    random.Random(args.seed).shuffle(texts)
    starts = [min(args.max_prompt, len(ids) // 2) for ids in texts]
    prompts = [ids[:start] for ids, start in zip(texts, starts)]
    answers = [ids[start : start + args.max_answer] for ids, start in zip(texts, starts)]
    return Dataset.from_dict({"prompt": prompts[:count], "chosen": answers[:count], "rejected": answers[count:]})


def number_of_pairs(args: argparse.Namespace) -> int:
    """Every pair is seen four times."""
    return max(args.steps * args.batch_size // 4, args.batch_size)


def load_dataset_of_pairs(args: argparse.Namespace) -> tuple[Dataset, Any]:
    suffix = Path(args.dataset).suffix
    if Path(args.dataset).is_file():
        if suffix not in FILE_FORMATS:
            sys.exit(f"--dataset: cannot read {args.dataset}, only files ending in {', '.join(FILE_FORMATS)}")
        dataset = load_dataset(FILE_FORMATS[suffix], data_files=args.dataset, split="train")
    else:
        dataset = load_dataset(args.dataset, split=args.split)
    names = ["prompt", "chosen", "rejected"]
    strings = [name for name, kind in dataset.features.items() if getattr(kind, "dtype", "").endswith("string")]
    if not set(names) <= set(strings):
        sys.exit(f"--dataset: needs columns of strings {names}, these are {strings}")
    dataset = dataset.shuffle(seed=args.seed)
    dataset = dataset.select(range(min(len(dataset), number_of_pairs(args)))).select_columns(names)
    tokenizer: Any
    if args.model is None:
        tokenizer = train_tokenizer(Dataset.from_dict({"text": [*dataset["prompt"], *dataset["chosen"]]}))
    else:
        tokenizer = AutoTokenizer.from_pretrained(args.model)

    def encode(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        ids = {name: tokenizer(rows[name], add_special_tokens=False)["input_ids"] for name in names}
        prompts = [prompt[-args.max_prompt :] for prompt in ids["prompt"]]
        end = tokenizer.eos_token_id
        answers = {name: [[*row[: args.max_answer - 1], end] for row in ids[name]] for name in names[1:]}
        return {"prompt": prompts, **answers}

    return dataset.map(encode, batched=True).filter(lambda row: len(row["prompt"]) > 0), tokenizer


def pad_pairs(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The batch without sharing: a row for each answer, the chosen ones first. All rows end in the last column.

    `labels` are the tokens of the answers, -100 elsewhere, as long as the longest answer.
    """
    rows = [(example["prompt"], example[name]) for name in ("chosen", "rejected") for example in examples]

    def pad(sequences: list[list[int]], value: int) -> Tensor:
        tensors = [torch.tensor(sequence) for sequence in sequences]
        return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side="left")

    attention_mask = pad([[1] * len(prompt + answer) for prompt, answer in rows], 0)
    batch = {
        "input_ids": pad([prompt + answer for prompt, answer in rows], 0),
        "attention_mask": attention_mask,
        "position_ids": (attention_mask.cumsum(1) - 1).clamp(min=0),
        "labels": pad([answer for _, answer in rows], -100),
    }
    if "ref_logps" in examples[0]:
        batch["ref_logps"] = torch.tensor([example["ref_logps"] for example in examples]).T.flatten()
    return batch


# Training


def build_model(args: argparse.Namespace, auto_class: Any, tokenizer: Any, attention: str, **settings: Any) -> Any:
    """The same initial weights in every call, and no dropout: with it no two runs could be compared."""
    set_seed(args.seed)
    if args.model is not None:
        names = AutoConfig.from_pretrained(args.model).to_dict()
        settings |= {name: 0.0 for name in names if name.endswith(("dropout", "dropout_prob", "pdrop"))}
        return auto_class.from_pretrained(args.model, attn_implementation=attention, dtype=torch.float32, **settings)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=3 * args.hidden_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden_size // 32,
        num_key_value_heads=args.hidden_size // 64,
        max_position_embeddings=args.max_prompt + args.max_answer,
        **settings,
    )
    return auto_class.from_config(config, attn_implementation=attention)


def train(args: argparse.Namespace, trainer_class: type[Trainer], title: str, **options: Any) -> StepRecorder:
    arguments = training_arguments(args, max_steps=args.steps, remove_unused_columns=False)
    return record(trainer_class(args=arguments, **options), f"Training, {title}")


# Report


def report(
    args: argparse.Namespace,
    dataset: Dataset,
    collator: SharedPromptDataCollator,
    runs: dict[str, tuple[StepRecorder, list[Tensor]]],
) -> None:
    """Print the table, write the pictures, and fail unless the two runs have the same losses.

    Args:
        runs: "shared" and "unshared", each with the accuracy of every step, 0-d.
    """
    figures = {name: figures_of(args, run, accuracy) for name, (run, accuracy) in runs.items()}
    shared, unshared = figures["shared"], figures["unshared"]
    difference = max(abs(a - b) for a, b in zip(shared["loss"], unshared["loss"]))
    shared["tokens"] = sum(collator([example])["input_ids"].shape[1] for example in dataset)
    unshared["tokens"] = sum(int(pad_pairs([example])["attention_mask"].sum()) for example in dataset)
    content = {
        "device": device_name(),
        **figures,
        "tokens_saved": 1 - shared["tokens"] / unshared["tokens"],
        "speedup": shared["pairs_per_second"] / unshared["pairs_per_second"],
        "largest_difference": difference,
        "tolerance": TOLERANCE,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "report.json").write_text(json.dumps(content, indent=1) + "\n")
    mask = collator([dataset[i] for i in range(min(3, len(dataset)))])["attention_mask"]
    show(args, content, mask)


def show(args: argparse.Namespace, content: dict[str, Any], mask: Tensor) -> None:
    """What the two runs have found."""
    print_figures(content)
    draw_loss(content, args.output / "loss.png")
    draw_mask(mask, args.output / "mask.png", title="The mask of a packed row")
    print(f"Pictures: {args.output / 'loss.png'} and {args.output / 'mask.png'}")
    conclude({f"the losses of {args.steps} steps": (content["largest_difference"], content["tolerance"])})


def figures_of(args: argparse.Namespace, run: StepRecorder, accuracy: list[Tensor]) -> dict[str, Any]:
    return {
        "positions": run.positions[-1],
        "pairs_per_second": args.batch_size / run.seconds_per_step,
        "loss": run.loss,
        "accuracy": [value.item() for value in accuracy],
    }


def print_figures(content: dict[str, Any]) -> None:
    runs = content["shared"], content["unshared"]
    last = max(len(runs[0]["loss"]) // 4, 1)

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    rows = {
        content["device"]: ["flashmask, shared", "eager, padded"],
        "tokens of all pairs": [f"{run['tokens']:,}" for run in runs],
        "tokens computed, with padding": [f"{run['positions']:,}" for run in runs],
        "pairs per second": [f"{run['pairs_per_second']:,.1f}" for run in runs],
        "loss of the first step": [f"{run['loss'][0]:.4f}" for run in runs],
        f"loss of the last {last} steps": [f"{mean(run['loss'][-last:]):.4f}" for run in runs],
        f"accuracy of the last {last} steps": [f"{mean(run['accuracy'][-last:]):.1%}" for run in runs],
    }
    print_table(rows)
    print(f"Tokens saved: {content['tokens_saved']:.0%}. {describe_speed(content)}")


def draw_loss(content: dict[str, Any], path: Path) -> None:
    def curve(name: str, label: str) -> tuple[str, list[float]]:
        return f"{label}: {content[name]['pairs_per_second']:,.1f} pairs/s", content[name]["loss"]

    draw_losses(
        curve("unshared", "eager, padded"),
        curve("shared", "flashmask, shared prompts"),
        path,
        title=f"Losses at most {content['largest_difference']:.1e} apart",
        saved=f"{content['tokens_saved']:.0%} of all tokens saved",
        unit="loss per pair (nats)",
    )
