"""Fine-tune on conversations with thinking and tools, all turns in one row, and check it against a row for each turn.

The chat template drops the thinking of earlier questions, as those of reasoning models do. Two runs train every turn
under the context that inference gives it, on the same conversations in the same order, from the same initial weights:

  tree     a conversation is a prefix tree in a row of many; attn_implementation="flashmask"
  rows     a padded row for each turn, with its context; Transformers' own "eager" attention

Both compute the same loss, so the curves must agree step by step; when they do not, the script says so and fails.
Nothing is downloaded: the conversations ask for functions of this Python's standard library. A tool shows their source,
the thinking and the answers are their documentation strings. The tokenizer is a byte-level BPE trained on them, the
model a small Llama.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
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
    print_table,
    record,
    training_arguments,
)
from datasets import Dataset
from sft_packed import build_model, train_tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer

from hf_flashmask import TurnsDataCollator

# The largest difference between the two losses of a step that counts as rounding. Measured in float32 on a CPU: 1e-6.
TOLERANCE = 1e-3 if torch.cuda.is_available() else 1e-4

TEMPLATE = """
{{- '<|system|>You can call: ' + tools | tojson + '<|end|>' -}}
{%- set state = namespace(last_question=0) -%}
{%- for message in messages -%}
    {%- if message.role == 'user' %}{% set state.last_question = loop.index0 %}{% endif -%}
{%- endfor -%}
{%- for message in messages -%}
    {{- '<|' + message.role + '|>' -}}
    {%- if message.role == 'assistant' and loop.index0 > state.last_question -%}
        {{- '<think>' + message.reasoning_content + '</think>' -}}
    {%- endif -%}
    {{- message.content -}}
    {%- for call in message.tool_calls or [] -%}
        {{- '<tool_call>' + call.function.name + ' ' + call.function.arguments | tojson -}}
    {%- endfor -%}
    {{- '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif -%}
"""
SPECIAL_TOKENS = ["<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<think>", "</think>", "<tool_call>"]
TOOL = {
    "type": "function",
    "function": {
        "name": "source",
        "description": "The source code of a function.",
        "parameters": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
    },
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    has_gpu = torch.cuda.is_available()
    add("--model", help="a causal language model on the Hub or in a folder (default: a small Llama from scratch)")
    add("--steps", type=int, default=80 if has_gpu else 20, help="training steps of each run (default: %(default)s)")
    add("--batch-size", type=int, default=16 if has_gpu else 3, help="conversations per step (default: %(default)s)")
    add("--questions", type=int, default=3, help="of a conversation (default: %(default)s)")
    add("--hidden-size", type=int, default=256 if has_gpu else 128, help="a multiple of 64 (default: %(default)s)")
    add("--layers", type=int, default=6 if has_gpu else 2, help="of the small Llama (default: %(default)s)")
    add("--learning-rate", type=float, default=1e-3, help="decays linearly to 0 (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the weights and of the conversations (default: %(default)s)")
    add("--output", type=Path, default=Path("runs/sft_turns"), help="folder for the pictures (default: %(default)s)")
    args = parser.parse_args()
    args.max_length = 8192  # positions of the small Llama
    if args.steps < 2:
        parser.error(f"--steps must be at least 2, got {args.steps}: the first one is not timed")
    return args


# Conversations


def documented_functions() -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    """Modules of the standard library with the name, the source and the documentation of their functions."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if {"site-packages", "test", "tests", "lib2to3", "idlelib"}.isdisjoint(parts):
            functions = []
            for node in ast.walk(ast.parse(path.read_bytes())):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    documentation = ast.get_docstring(node)
                    if documentation and 100 < len(documentation) < 600:
                        functions.append((node.name, ast.unparse(node)[:240], documentation))
            yield ".".join(parts), functions


def make_conversations(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A few questions about the functions of a module. `tools` are JSON, as TRL takes them from a dataset."""
    generator = random.Random(args.seed)
    conversations = []
    for module, functions in documented_functions():
        generator.shuffle(functions)
        for start in range(0, len(functions) - args.questions + 1, args.questions):
            messages = []
            for name, source, documentation in functions[start : start + args.questions]:
                messages += ask(f"{module}.{name}", source, documentation)
            conversations.append({"messages": messages, "tools": json.dumps([TOOL])})
    generator.shuffle(conversations)
    return conversations[: args.steps * args.batch_size]


def ask(name: str, source: str, documentation: str) -> list[dict[str, Any]]:
    """A question, a call of the tool, what it returns, and the answer, with thinking before the call and the answer."""
    call = {"type": "function", "function": {"name": "source", "arguments": {"name": name}}}
    answer, _, details = documentation.partition("\n\n")
    return [
        {"role": "user", "content": f"What does {name} do?"},
        {
            "role": "assistant",
            "reasoning_content": f"I should read the source of {name} before I answer.",
            "content": "",
            "tool_calls": [call],
        },
        {"role": "tool", "content": source},
        {"role": "assistant", "reasoning_content": f"{source.splitlines()[0]}\n{details}", "content": answer},
    ]


def make_tokenizer(conversations: list[dict[str, Any]]) -> Any:
    texts = [message["content"] for conversation in conversations for message in conversation["messages"]]
    tokenizer = train_tokenizer(Dataset.from_dict({"text": texts}))
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL_TOKENS})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


class RowPerTurn:
    """The collator without sharing: each turn of the assistant is a row with its context, padded to the longest."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        rows = [row for example in examples for row in self.rows(example)]
        ids = [torch.tensor(ids) for ids, _ in rows]
        labels = [torch.tensor([-100] * start + ids[start:]) for ids, start in rows]
        return {
            "input_ids": pad_sequence(ids, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        }

    def rows(self, example: dict[str, Any]) -> Iterator[tuple[list[int], int]]:
        messages, tools = example["messages"], json.loads(example["tools"])
        for place, message in enumerate(messages):
            if message["role"] == "assistant":
                context, turn = (
                    self.tokenizer.apply_chat_template(
                        messages[:length], tools=tools, add_generation_prompt=length == place, return_dict=True
                    )["input_ids"]
                    for length in (place, place + 1)
                )
                yield turn, len(context)


# Training


def train(args: argparse.Namespace, model: Any, dataset: list[dict[str, Any]], collator: Any) -> StepRecorder:
    arguments = training_arguments(args, max_steps=args.steps, remove_unused_columns=False)
    trainer = Trainer(model=model, args=arguments, train_dataset=dataset, data_collator=collator)
    return record(trainer, f"Training with {model.config._attn_implementation}")


# Report


def compare(tree: StepRecorder, rows: StepRecorder) -> dict[str, Any]:
    def figures(run: StepRecorder) -> dict[str, Any]:
        return {"positions": run.positions[-1], "seconds_per_step": run.seconds_per_step, "loss": run.loss}

    return {
        "device": device_name(),
        "tree": figures(tree),
        "rows": figures(rows),
        "largest_difference": max(abs(a - b) for a, b in zip(tree.loss, rows.loss)),
        "tolerance": TOLERANCE,
    }


def print_report(report: dict[str, Any]) -> None:
    runs = report["tree"], report["rows"]
    rows = {
        report["device"]: ["flashmask, trees", "eager, a row per turn"],
        "tokens of all turns": [f"{run['tokens']:,}" for run in runs],
        "tokens computed, with padding": [f"{run['positions']:,}" for run in runs],
        "seconds per step": [f"{run['seconds_per_step']:.2f}" for run in runs],
        "loss of the first step": [f"{run['loss'][0]:.4f}" for run in runs],
        "loss of the last step": [f"{run['loss'][-1]:.4f}" for run in runs],
    }
    print_table(rows, width=24)
    print(f"Tokens saved: {report['tokens_saved']:.0%}. {describe_speed(report)}")


def draw(report: dict[str, Any], batch: dict[str, Any], folder: Path) -> None:
    """The losses; the mask of a conversation, and beside it, which of its tokens are trained."""

    def curve(name: str, label: str) -> tuple[str, list[float]]:
        return f"{label}: {report[name]['seconds_per_step']:.2f} s per step", report[name]["loss"]

    draw_losses(
        curve("rows", "eager, a row per turn"),
        curve("tree", "flashmask, trees"),
        folder / "loss.png",
        title=f"Losses at most {report['largest_difference']:.1e} apart",
        saved=f"{report['tokens_saved']:.0%} of all tokens saved",
        unit="loss per token (nats)",
    )
    figure = draw_mask(batch["attention_mask"], folder / "mask.png", title="The mask of a conversation")
    is_trained = (batch["labels"][0] != -100).float()[:, None].numpy()
    strip = figure.axes[0].inset_axes((1.02, 0, 0.04, 1))
    strip.imshow(is_trained, aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    strip.set(xticks=[], yticks=[])
    strip.yaxis.set_label_position("right")
    strip.set_ylabel("trained")
    strip.spines[:].set_visible(False)
    figure.savefig(folder / "mask.png", dpi=150)


def main() -> None:
    # One process, one GPU: with several GPUs, Trainer would cut batches into pieces (DataParallel).
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    args = parse_arguments()
    conversations = make_conversations(args)
    tokenizer = make_tokenizer(conversations)
    turns = args.questions * 2
    print(f"{len(conversations):,} conversations of {turns} turns about the standard library", flush=True)

    model = build_model(args, len(tokenizer), "flashmask")
    collator = TurnsDataCollator(tokenizer, model)
    tree = train(args, model, conversations, collator)
    rows = train(args, build_model(args, len(tokenizer), "eager"), conversations, RowPerTurn(tokenizer))

    report = compare(tree, rows)
    report["tree"]["tokens"], report["rows"]["tokens"] = collator.computed_tokens, collator.given_tokens
    report["tokens_saved"] = 1 - collator.computed_tokens / collator.given_tokens
    report["speedup"] = report["rows"]["seconds_per_step"] / report["tree"]["seconds_per_step"]
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(report, collator(conversations[:1]), args.output)
    print_report(report)
    print(f"Pictures: {args.output / 'loss.png'} and {args.output / 'mask.png'}")
    conclude({f"the losses of {args.steps} steps": (report["largest_difference"], TOLERANCE)})


if __name__ == "__main__":
    main()
