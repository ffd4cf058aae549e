"""Shared parts of the examples: what a training records, and two of them in a table, a picture and a verdict."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from datasets import disable_progress_bars
from matplotlib.figure import Figure
from torch import Tensor
from transformers import ProgressCallback, Trainer, TrainingArguments
from transformers.utils import logging

import hf_flashmask.visualization  # importing hf_flashmask registers attn_implementation="flashmask"

IS_TERMINAL = sys.stderr.isatty()
LINES_IN_A_FILE = 10


# Training


class StepRecorder(ProgressCallback):
    """Keeps what the report needs of every step. Shows Trainer's progress bar, or in a file a line now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.loss: list[float] = []
        self.seconds: list[float] = []
        self.positions: list[int] = []  # computed up to this step, padding included
        self.model: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.model = kwargs["model"]
        if IS_TERMINAL:
            super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if IS_TERMINAL:
            super().on_step_end(args, state, control, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if IS_TERMINAL:
            super().on_train_end(args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" not in logs:
            return
        self.loss.append(logs["loss"])
        self.seconds.append(time.perf_counter())
        self.positions.append(state.num_input_tokens_seen)
        if IS_TERMINAL:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}")  # type: ignore[attr-defined]
        elif state.global_step % -(-state.max_steps // LINES_IN_A_FILE) == 0 or state.global_step == state.max_steps:
            print(f"step {state.global_step} of {state.max_steps}, loss {logs['loss']:.3f}", flush=True)

    @property
    def seconds_per_step(self) -> float:
        """Of the median step: other programs on the machine slow some steps down."""
        return statistics.median(end - start for start, end in pairwise(self.seconds))


def hide_progress_bars_in_files() -> None:
    """A bar that is not on a terminal is hundreds of lines in a log."""
    if not IS_TERMINAL:
        disable_progress_bars()
        logging.disable_progress_bar()


def training_arguments(args: argparse.Namespace, **others: Any) -> TrainingArguments:
    """Those that the trainings of the examples have in common, and `others`."""
    return TrainingArguments(
        output_dir=str(args.output),
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        adam_epsilon=1e-5,  # a smaller one turns rounding errors of tiny gradients into different steps
        seed=args.seed,
        use_cpu=not torch.cuda.is_available(),
        include_num_input_tokens_seen=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        **others,
    )


def record(trainer: Trainer, title: str) -> StepRecorder:
    """Train, and return what happened in each step."""
    recorder = StepRecorder()
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(recorder)
    print(f"\n{title}", flush=True)
    trainer.train()
    return recorder


# Report


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"


def describe_speed(report: Mapping[str, Any]) -> str:
    """How the two runs compare, and what that says on this device."""
    compared = f"Speed: {report['speedup']:.1f} times."
    if torch.cuda.is_available():
        return compared
    return f"{compared} That says little: this is a CPU, and the kernels are made for GPUs (tables in README.md)."


def print_table(rows: Mapping[str, Sequence[str]], *, label_width: int = 36, width: int = 18) -> None:
    print()
    for label, columns in rows.items():
        print(f"{label:<{label_width}}{''.join(f'{column:>{width}}' for column in columns)}")


def draw_losses(
    reference: tuple[str, list[float]],
    ours: tuple[str, list[float]],
    path: Path,
    *,
    title: str,
    saved: str | None = None,
    unit: str,
) -> None:
    """Two curves, each with its label, one on top of the other."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for (label, loss), style in (
        (reference, {"color": "tab:orange", "linewidth": 5, "alpha": 0.5}),
        (ours, {"color": "tab:blue"}),
    ):
        axes.plot(range(1, len(loss) + 1), loss, label=label, **style)
    axes.set_title(title, loc="left")
    if saved is not None:
        axes.set_title(saved, loc="right", fontsize="small")
    axes.set(xlabel="step", ylabel=unit)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def draw_mask(bounds: Tensor, path: Path, *, title: str, q_len: int | None = None) -> Figure:
    """Writes the picture, and returns it, to add something and write it again."""
    height = 5.5 if q_len is None else 0.8 + 5 * q_len / bounds.shape[3]
    figure, axes = plt.subplots(figsize=(5.5, height), layout="constrained")
    hf_flashmask.visualization.plot(bounds, q_len, ax=axes, title=title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return figure


def conclude(differences: Mapping[str, tuple[float, float]]) -> None:
    """Fail unless the two runs agree.

    Args:
        differences: by what differs, by how much, and how much counts as rounding.
    """
    verdict = "; ".join(
        f"{what} differ by at most {found:.1e}, allowed is {allowed:.0e}"
        for what, (found, allowed) in differences.items()
    )
    if not all(found <= allowed for found, allowed in differences.values()):  # written so that nan fails
        sys.exit(f"The two runs DO NOT AGREE: {verdict}.")
    print(f"The two runs agree: {verdict}.")
