"""TRL's unchanged DPOTrainer with shared prefixes, against the same training without sharing.

Two runs see the same pairs in the same batches and the same order, from the same initial weights:

  shared    attn_implementation="flashmask", and `with share_prefixes(trainer.model, trainer.ref_model):`
  unshared  Transformers' own "eager" attention

Both compute the same loss, so the curves must agree step by step; when they do not, the script says so and fails.
Nothing is downloaded: a prompt is the beginning of a documentation string or licence text of this Python installation,
the chosen answer its continuation, the rejected one the same words in another order. The tokenizer is a byte-level BPE
trained on them, the model a small Llama. --model and --dataset take others.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
from pathlib import Path
from typing import Any

import torch
from _preferences import figures_of, show
from _two_runs import device_name, hide_progress_bars_in_files, record
from datasets import Dataset, load_dataset
from sft_packed import (
    FILE_FORMATS,
    build_model,
    python_texts,
    train_tokenizer,
)
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

from hf_flashmask import share_prefixes
from hf_flashmask.sharing.prefix_tree import merge_prefixes

COLUMNS = ["prompt", "chosen", "rejected"]
# The largest difference between the two losses of a step that counts as rounding.
TOLERANCE = 1e-3


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    has_gpu = torch.cuda.is_available()
    add("--model", help="a causal language model on the Hub or in a folder (default: a small Llama from scratch)")
    add("--dataset", help="strings `prompt`, `chosen`, `rejected`, on the Hub or in a file (default: texts of Python)")
    add("--split", default="train", help="which split of the dataset (default: %(default)s)")
    add("--steps", type=int, default=60 if has_gpu else 24, help="training steps of each run (default: %(default)s)")
    add("--batch-size", type=int, default=16 if has_gpu else 8, help="pairs per step (default: %(default)s)")
    add("--max-prompt", type=int, default=400 if has_gpu else 100, help="words of a prompt (default: %(default)s)")
    add("--max-answer", type=int, default=40 if has_gpu else 16, help="words of an answer (default: %(default)s)")
    add("--max-length", type=int, default=1024, help="tokens that TRL leaves of a row (default: %(default)s)")
    add("--hidden-size", type=int, default=512 if has_gpu else 128, help="a multiple of 64 (default: %(default)s)")
    add("--layers", type=int, default=8 if has_gpu else 2, help="of the small Llama (default: %(default)s)")
    # At 1e-3 the larger model of the GPU amplifies rounding: two equal runs diverge after 14 steps.
    rate = 1e-4 if has_gpu else 1e-3
    add("--learning-rate", type=float, default=rate, help="decays linearly to 0 (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the weights and of the pairs (default: %(default)s)")
    add("--output", type=Path, default=Path("runs/trl_dpo"), help="folder for the pictures (default: %(default)s)")
    args = parser.parse_args()
    if args.steps < 2:
        parser.error(f"--steps must be at least 2, got {args.steps}: the first one is not timed")
    if args.hidden_size % 64:
        parser.error(f"--hidden-size must be a multiple of 64, got {args.hidden_size}")
    return args


def load_pairs(args: argparse.Namespace) -> Dataset:
    """The pairs of texts that the run needs."""
    if args.dataset is None:
        dataset = Dataset.from_list(pairs_from_texts(args))
    elif Path(args.dataset).is_file():
        suffix = Path(args.dataset).suffix
        if suffix not in FILE_FORMATS:
            sys.exit(f"--dataset: cannot read {args.dataset}, only files ending in {', '.join(FILE_FORMATS)}")
        dataset = load_dataset(FILE_FORMATS[suffix], data_files=args.dataset, split="train")
    else:
        dataset = load_dataset(args.dataset, split=args.split)
    if not set(COLUMNS) <= set(dataset.column_names):
        sys.exit(f"--dataset: needs the columns {COLUMNS}, these are {dataset.column_names}")
    return dataset.select_columns(COLUMNS).select(range(min(len(dataset), args.steps * args.batch_size)))


def pairs_from_texts(args: argparse.Namespace) -> list[dict[str, str]]:
    """The prompt is the beginning of a text, the chosen answer its continuation, the rejected one a jumble of that."""
    generator, pairs = random.Random(args.seed), []
    for text in sorted(set(python_texts())):
        words = re.split(r"(?<=\S)(?= \S)", text)  # where a token begins in any byte-level vocabulary
        length = min(args.max_answer, len(words) // 4)
        start = min(args.max_prompt, len(words) - length)
        answer = words[start : start + length]
        if length >= 5:
            pair = {"prompt": words[:start], "chosen": answer, "rejected": generator.sample(answer, length)}
            pairs.append({name: "".join(part) for name, part in pair.items()})
    generator.shuffle(pairs)
    return pairs


def make_trainer(args: argparse.Namespace, attention: str, dataset: Dataset, tokenizer: Any) -> DPOTrainer:
    config = DPOConfig(
        output_dir=str(args.output),
        max_steps=args.steps,
        max_length=args.max_length,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        adam_epsilon=1e-5,  # a smaller one turns rounding errors of tiny gradients into different steps
        seed=args.seed,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        include_num_input_tokens_seen=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    model, reference = (build_model(args, len(tokenizer), attention) for _ in range(2))
    return DPOTrainer(model, reference, args=config, train_dataset=dataset, processing_class=tokenizer)


def main() -> None:
    # One process, one GPU: with several GPUs, Trainer would cut batches into pieces (DataParallel).
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    args = parse_arguments()
    hide_progress_bars_in_files()
    dataset = load_pairs(args)
    tokenizer: Any
    if args.model is None:
        tokenizer = train_tokenizer(Dataset.from_dict({"text": [*dataset["prompt"], *dataset["chosen"]]}))
    else:
        tokenizer = AutoTokenizer.from_pretrained(args.model)

    trainer = make_trainer(args, "flashmask", dataset, tokenizer)
    with share_prefixes(trainer.model, trainer.ref_model) as sharing:
        shared = record(trainer, "Training, flashmask, shared prompts")

    unshared_trainer = make_trainer(args, "eager", dataset, tokenizer)
    unshared = record(unshared_trainer, "Training, eager")

    figures = {
        "shared": figures_of(args, shared, accuracies(trainer)),
        "unshared": figures_of(args, unshared, accuracies(unshared_trainer)),
    }
    # The policy and its reference model have seen the same batches.
    figures["shared"]["positions"] = figures["shared"]["tokens"] = sharing.computed_tokens // 2
    figures["unshared"]["tokens"] = sharing.given_tokens // 2
    report = {
        "device": device_name(),
        **figures,
        "tokens_saved": 1 - sharing.computed_tokens / sharing.given_tokens,
        "speedup": figures["shared"]["pairs_per_second"] / figures["unshared"]["pairs_per_second"],
        "largest_difference": max(abs(a - b) for a, b in zip(shared.loss, unshared.loss)),
        "tolerance": TOLERANCE,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    batch = next(iter(trainer.get_train_dataloader()))
    tree = merge_prefixes(batch["input_ids"], batch["attention_mask"])
    show(args, report, tree.bounds)


def accuracies(trainer: DPOTrainer) -> list[torch.Tensor]:
    """For each step, the fraction of pairs whose chosen answer was raised more than the rejected one."""
    log = trainer.state.log_history
    return [torch.tensor(entry["rewards/accuracies"]) for entry in log if "rewards/accuracies" in entry]


if __name__ == "__main__":
    main()
