"""Shared parts of block_diffusion.py and draft_model.py: packed texts, a training loop, two runs side by side."""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _two_runs import conclude, device_name, draw_losses, print_table
from datasets import Dataset
from sft_packed import python_texts, train_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Differences that count as rounding: of the losses of a step, and of the gradients of the first step, relative to their
# length.
LOSS_TOLERANCE = 1e-3 if torch.cuda.is_available() else 1e-4
GRADIENT_TOLERANCE = 1e-2 if torch.cuda.is_available() else 1e-4


def parser_of(description: str | None, name: str, *, steps: int, learning_rate: float) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--steps", type=int, default=steps, help="training steps (default: %(default)s)")
    add("--dense-steps", type=int, default=20, help="of them with a dense mask as well (default: %(default)s)")
    add("--batch-size", type=int, default=2, help="packed rows per step (default: %(default)s)")
    add("--length", type=int, default=256, help="tokens of a packed row (default: %(default)s)")
    add("--hidden-size", type=int, default=128, help="of the model, a multiple of 64 (default: %(default)s)")
    add("--layers", type=int, default=3, help="of the model (default: %(default)s)")
    add(
        "--learning-rate",
        type=float,
        default=3e-3,
        help="rises for a tenth of the steps, then decays to 0 (default: %(default)s)",
    )
    add("--seed", type=int, default=0, help="of the weights and of the batches (default: %(default)s)")
    add("--output", type=Path, default=Path("runs") / name, help="folder for the pictures (default: %(default)s)")
    return parser


# Data


@dataclass(frozen=True)
class Rows:
    """Documents one after the other, in rows of one length.

    Attributes:
        input_ids, document_ids, position_ids: int64 `[R, L]`; positions restart with each document.
    """

    input_ids: Tensor
    document_ids: Tensor
    position_ids: Tensor

    def __getitem__(self, rows: Tensor | slice) -> Rows:
        return Rows(*(field[rows].to(DEVICE) for field in (self.input_ids, self.document_ids, self.position_ids)))


def load_documents(args: argparse.Namespace, count: int) -> tuple[list[list[int]], Any]:
    """Texts of this Python installation, `count` tokens or a few more, and their tokenizer, with a mask token.

    Documents are cut to half a row.
    """
    texts = sorted({text for text in python_texts() if len(text) >= 40})
    random.Random(args.seed).shuffle(texts)
    tokenizer = train_tokenizer(Dataset.from_dict({"text": texts}))
    tokenizer.add_special_tokens({"mask_token": "<|mask|>"})
    encoded = tokenizer(texts)["input_ids"]
    documents = [[*ids[: args.length // 2 - 1], tokenizer.eos_token_id] for ids in encoded]
    ends = itertools.accumulate(map(len, documents))
    return [ids for ids, end in zip(documents, ends) if end - len(ids) < count], tokenizer


def pack(documents: list[list[int]], length: int) -> Rows:
    """What a row cannot hold of its last document begins the next row, as a document of its own."""
    count = sum(map(len, documents)) // length * length
    ids = torch.tensor([token for ids in documents for token in ids][:count]).view(-1, length)
    lengths = torch.tensor([len(ids) for ids in documents])
    owner = torch.arange(len(documents)).repeat_interleave(lengths)[:count].view(-1, length)
    place = torch.arange(length).expand_as(owner)
    is_first = torch.ones_like(owner, dtype=torch.bool)
    is_first[:, 1:] = owner[:, 1:] != owner[:, :-1]
    return Rows(ids, owner, place - place.masked_fill(~is_first, 0).cummax(1).values)


def small_llama(args: argparse.Namespace, tokenizer: Any, attention: str) -> Any:
    """The same initial weights in every call."""
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=3 * args.hidden_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden_size // 32,
        num_key_value_heads=args.hidden_size // 64,
        max_position_embeddings=2048,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(DEVICE)


# Training


@dataclass
class Run:
    """What the report needs of a training run.

    Attributes:
        loss: of every step.
        seconds: when each step ended.
        gradients: of the first step, in one vector.
    """

    loss: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    gradients: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def milliseconds_per_step(self) -> float:
        """Of the median step: other programs on the machine slow some steps down."""
        return 1e3 * statistics.median(end - start for start, end in itertools.pairwise(self.seconds))


def train(
    title: str,
    args: argparse.Namespace,
    model: nn.Module,
    rows: Rows,
    loss_of: Callable[[Rows, torch.Generator], Tensor],
    *,
    steps: int | None = None,
    warm_up: int = 1,
    stop_after: int | None = None,
) -> Run:
    """Random batches of rows, for `steps` steps, by default those of `args`; `stop_after` ends the run before.

    The learning rate rises for `warm_up` steps.

    Runs of one seed see the same batches, and `loss_of` draws the same numbers in them.
    """
    steps = args.steps if steps is None else steps
    generator = torch.Generator().manual_seed(args.seed)
    # A smaller epsilon turns rounding errors of tiny gradients into different steps.
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, eps=1e-5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / warm_up, 1 - step / steps))
    run = Run()
    end = steps if stop_after is None else min(steps, stop_after)
    for step in range(end):
        chosen = torch.randint(len(rows.input_ids), (args.batch_size,), generator=generator)
        loss = loss_of(rows[chosen], generator)
        loss.backward()
        if step == 0:
            run.gradients = torch.cat(
                [weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]
            )
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        run.loss.append(loss.item())
        run.seconds.append(time.perf_counter())
        if step % max(steps // 10, 1) == 0 or step == end - 1:
            print(f"{title}: step {step}, loss {run.loss[-1]:.3f}", flush=True)
    return run


def next_token_loss(model: Any, rows: Rows) -> Tensor:
    """The first token of a document is not predicted."""
    logits = model(input_ids=rows.input_ids, position_ids=rows.position_ids, use_cache=False).logits
    label = rows.input_ids[:, 1:].masked_fill(rows.position_ids[:, 1:] == 0, -100)
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), label.flatten())


# Report


def report(
    args: argparse.Namespace, ours: Run, dense: Run, masks: tuple[Tensor, Tensor], figures: dict[str, Any], loss: str
) -> None:
    """Print the table, write the pictures, and fail unless the two runs agree.

    Args:
        ours, dense: the runs with flashmask, and with sdpa and a dense mask.
        masks: bounds and the dense mask of the same batch.
        figures: what the example adds to the report.
        loss: what the loss counts.
    """
    compared = len(dense.loss)
    gradient_difference = (ours.gradients - dense.gradients).norm() / dense.gradients.norm()
    content = {
        "loss": {"flashmask": ours.loss, "dense": dense.loss},
        "milliseconds_per_step": {"flashmask": ours.milliseconds_per_step, "dense": dense.milliseconds_per_step},
        "mask_bytes": {"flashmask": masks[0].nbytes, "dense": masks[1].nbytes},
        "largest_loss_difference": max(abs(a - b) for a, b in zip(ours.loss, dense.loss)),
        "gradient_difference": gradient_difference.item(),
        **figures,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "report.json").write_text(json.dumps(content, indent=1) + "\n")
    draw_losses(
        ("sdpa, dense mask", dense.loss),
        ("flashmask", ours.loss),
        args.output / "loss.png",
        title=f"First {compared} losses at most {content['largest_loss_difference']:.1e} apart",
        unit=loss,
    )
    table = {
        device_name(): ("flashmask", "sdpa, dense mask"),
        "bytes of the mask of a batch": tuple(f"{mask.nbytes:,}" for mask in masks),
        "milliseconds per step": tuple(f"{run.milliseconds_per_step:,.0f}" for run in (ours, dense)),
        "loss of the first step": tuple(f"{run.loss[0]:.4f}" for run in (ours, dense)),
        f"loss of step {compared}": tuple(f"{run.loss[compared - 1]:.4f}" for run in (ours, dense)),
        f"mean loss of the last {len(ours.loss) // 10 + 1} of {len(ours.loss)} steps": (
            f"{statistics.mean(ours.loss[-(len(ours.loss) // 10 + 1) :]):.4f}",
            "",
        ),
    }
    print_table(table, label_width=40)
    print(f"Pictures: {args.output / 'loss.png'} and {args.output / 'mask.png'}")
    conclude(
        {
            f"the losses of {compared} steps": (content["largest_loss_difference"], LOSS_TOLERANCE),
            "the first gradients": (content["gradient_difference"], GRADIENT_TOLERANCE),
        }
    )
