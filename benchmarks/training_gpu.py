"""Training on packed documents, end to end on one GPU: tokens per second, memory and the longest row that fits.

    python benchmarks/training_gpu.py                          # Llama 3.2 1B's shape, 8K and 32K: about eight minutes
    python benchmarks/training_gpu.py --shapes 8b              # Llama 3.1 8B's shape with four layers
    python benchmarks/training_gpu.py --longest                # also the longest row, in steps of half a power of two

Random weights, bfloat16, gradient checkpointing, AdamW, Transformers' own model and loss. A batch is one row of packed
documents with log-normal lengths (median 700 tokens), and every batch is different. Rows have two forms: `steps` fills
every row to its last token and cuts the last document; `whole documents` packs as many as fit, so that rows differ in
length, like those of Transformers' DataCollatorWithFlattening. The implementations are

* `flashmask`, `flex_attention` and `sdpa` (dense mask) as Transformers runs them, with the documents in `position_ids`;
* `FA2 varlen`, torch's own FlashAttention-2, with the documents in cumulative lengths;
* `no attention`, a lower limit: everything around attention, with all projections and their gradients.

Before anything is timed, the loss, the hidden states and a gradient of the first batch are compared with those of each
document alone, except for `no attention`. Rows of the same device, versions and kernels are collected in one file, also
from several processes at once, one for each GPU. `--missing` measures only the rows that the file lacks.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from masks import Varlen
from measurement import RESULTS, Deadline, Run, require_gpu
from peers import flash_attention_2
from torch import Tensor, nn
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, set_seed

import hf_flashmask  # noqa: F401 - registers "flashmask"

VOCABULARY = 32768
SHAPES: dict[str, dict[str, Any]] = {
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
}
MEDIAN_DOCUMENT, SPREAD_OF_DOCUMENTS, SHORTEST_DOCUMENT = 700, 1.0, 16
WARM_UP, STEPS = 3, 8  # FlexAttention compiles for the first length, and for any length when the second one comes
SECONDS = 20.0  # of timed steps, after which four steps are enough
ROWS = {"steps": False, "whole documents": True}  # workload: whether documents are never cut
LONGEST_TRIED = 1 << 20
# Between two results in bfloat16. If documents see each other, both tensors are off by more than half.
TOLERANCES = {"loss": 1e-3, "hidden_states": 0.1, "gradient": 0.2}
KEY = ("shape", "length", "implementation", "workload")
Batch = TypeVar("Batch")


def varlen_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """torch's own FlashAttention-2 over one packed row, as Transformers calls it with `cu_seq_lens_q`."""
    assert attention_mask is None
    assert query.shape[0] == 1
    mask = Varlen([kwargs["max_length_q"]], is_causal=True)
    return flash_attention_2(query, key, value, kwargs["cu_seq_lens_q"], mask).transpose(1, 2), None


def no_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Sums that take almost no time, and that need the projections of query, key and value, forward and backward.

    The last keys are those of the queries.
    """
    groups, others = query.shape[1] // key.shape[1], key.shape[2] - query.shape[2]
    sums = key + value
    if others:
        sums = sums[:, :, others:] + sums[:, :, :others].mean(dim=2, keepdim=True)
    return (query + sums.repeat_interleave(groups, dim=1)).transpose(1, 2), None


# Without a mask function of that name, Transformers makes no mask.
AttentionInterface.register("varlen", varlen_attention)
AttentionInterface.register("none", no_attention)
FLOOR = "no attention"
IMPLEMENTATIONS = {
    "flashmask": "flashmask",
    "FA2 varlen": "varlen",
    "flex_attention": "flex_attention",
    "sdpa": "sdpa",
    FLOOR: "none",
}


def document_lengths(length: int, seed: int, is_whole: bool = False) -> list[int]:
    """Log-normal lengths that fill a row, the last one cut at its end; or as many whole ones as fit."""
    choose = random.Random(seed)
    lengths: list[int] = []
    while (left := length - sum(lengths)) > 0:
        drawn = max(round(choose.lognormvariate(math.log(MEDIAN_DOCUMENT), SPREAD_OF_DOCUMENTS)), SHORTEST_DOCUMENT)
        if is_whole and lengths and drawn > left:
            break
        lengths.append(min(drawn, left))
    return lengths


def packed_batch(
    length: int, seed: int, vocabulary: int, device: str = "cuda", is_whole: bool = False
) -> dict[str, Any]:
    """One packed row of random tokens, as Transformers' DataCollatorWithFlattening makes it, and the lengths for it."""
    return batch_of_documents(document_lengths(length, seed, is_whole), seed, vocabulary, device)


def batch_of_documents(lengths: list[int], seed: int, vocabulary: int, device: str = "cuda") -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(vocabulary, (1, sum(lengths)), generator=generator)
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    return {
        "input_ids": input_ids.to(device),
        "labels": input_ids.masked_fill(position_ids == 0, -100).to(device),
        "position_ids": position_ids.to(device),
        "num_items_in_batch": sum(lengths) - len(lengths),
        "varlen": {
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "max_length_q": max(lengths),
            "max_length_k": max(lengths),
        },
    }


class FirstStep(NamedTuple):
    """What the attention of a batch shows in: loss, last hidden states `[S, hidden]`, gradient of the first keys."""

    loss: float
    hidden_states: Tensor
    gradient: Tensor

    def errors(self, truth: FirstStep) -> dict[str, float]:
        def relative(ours: Tensor, expected: Tensor) -> float:
            return float((ours.float() - expected.float()).norm() / expected.float().norm())

        return {
            "loss": abs(self.loss / truth.loss - 1),
            "hidden_states": relative(self.hidden_states, truth.hidden_states),
            "gradient": relative(self.gradient, truth.gradient),
        }

    def check(self, truth: FirstStep) -> dict[str, float]:
        """`errors`, or a ValueError that names them where one is too large."""
        errors = {name: float(f"{error:.1e}") for name, error in self.errors(truth).items()}
        if not all(errors[name] < tolerance for name, tolerance in TOLERANCES.items()):
            raise ValueError(f"wrong result: relative errors {errors}; {TOLERANCES} are accepted")
        return errors


class Trainee:
    """A model with its optimizer, whose attention can be exchanged."""

    def __init__(
        self,
        shape: dict[str, Any],
        vocabulary: int,
        device: str = "cuda",
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        set_seed(0)
        config = LlamaConfig(
            vocab_size=vocabulary,
            max_position_embeddings=LONGEST_TRIED,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
            **shape,
        )
        with torch.device(device):
            self.model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa", dtype=dtype)
        self.model.gradient_checkpointing_enable()
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=device == "cuda")

    def use(self, implementation: str) -> None:
        self.model.set_attn_implementation(IMPLEMENTATIONS[implementation])

    def gradients(self, batch: dict[str, Any]) -> float:
        """Loss of a batch, over its number of tokens; adds the gradients to those of the parameters."""
        inputs = {name: value for name, value in batch.items() if name != "varlen"}
        if self.model.config._attn_implementation == "varlen":
            inputs |= batch["varlen"]
        loss = self.model(**inputs, use_cache=False).loss
        loss.backward()
        return loss.detach()

    def step(self, batch: dict[str, Any]) -> None:
        self.gradients(batch)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def first_step(self, batches: list[dict[str, Any]]) -> FirstStep:
        """Results of batches of one row, one after the other, without a change of the weights."""
        hidden: list[Tensor] = []
        hook = self.model.model.register_forward_hook(lambda _, __, out: hidden.append(out.last_hidden_state.detach()))
        try:
            loss = sum(float(self.gradients(batch)) for batch in batches)
            gradient = self.model.model.layers[0].self_attn.k_proj.weight.grad
            assert gradient is not None
            return FirstStep(loss, torch.cat(hidden, dim=1)[0], gradient.clone())
        finally:
            hook.remove()
            self.optimizer.zero_grad(set_to_none=True)

    def each_document_alone(self, batch: dict[str, Any]) -> FirstStep:
        """The truth: no packing and no mask but the causal one, under `sdpa`."""
        self.model.set_attn_implementation("sdpa")
        ends = batch["varlen"]["cu_seq_lens_q"].tolist()
        documents = [
            {
                **{name: batch[name][:, start:end] for name in ("input_ids", "labels", "position_ids")},
                "num_items_in_batch": batch["num_items_in_batch"],
            }
            for start, end in pairwise(ends)
        ]
        return self.first_step(documents)


def free_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def relative_error(trainee: Trainee, implementation: str, batch: dict[str, Any]) -> dict[str, float]:
    """Of an implementation's first step; raises where it is wrong."""
    truth = trainee.each_document_alone(batch)
    trainee.use(implementation)
    return trainee.first_step([batch]).check(truth)


def time_steps(
    step: Callable[[Batch], None], batches: list[Batch], tokens: Callable[[Batch], int], warm_up: int = WARM_UP
) -> dict[str, Any]:
    for batch in batches[:warm_up]:
        step(batch)
    torch.cuda.reset_peak_memory_stats()
    seconds: list[float] = []
    speeds: list[float] = []
    for batch in batches[warm_up:]:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        step(batch)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
        speeds.append(tokens(batch) / seconds[-1])
        if len(seconds) >= 4 and sum(seconds) > SECONDS:
            break
    low, median, high = statistics.quantiles(seconds, n=4)
    return {
        "milliseconds": round(1e3 * median, 2),
        "spread": round((high - low) / median, 4),
        "tokens_per_second": round(statistics.median(speeds)),
        "peak_mib": round(torch.cuda.max_memory_allocated() / 2**20),
    }


def fits(trainee: Trainee, length: int, vocabulary: int) -> bool:
    torch._dynamo.reset()
    try:
        trainee.step(packed_batch(length, 0, vocabulary))
    except torch.OutOfMemoryError:
        return False
    finally:
        trainee.optimizer.zero_grad(set_to_none=True)
        free_memory()
    return True


def longest_row(trainee: Trainee, vocabulary: int, start: int = 16384) -> int:
    """The longest row of 2^n or 3/4 of 2^n tokens that trains; 0 if not even ``start`` does."""
    length = 0
    while start <= LONGEST_TRIED and fits(trainee, start, vocabulary):
        length, start = start, 2 * start
    return (
        3 * length // 2 if length and start <= LONGEST_TRIED and fits(trainee, 3 * length // 2, vocabulary) else length
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["1b"])
    parser.add_argument("--lengths", type=int, nargs="*", default=[8192, 32768])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--peers", nargs="+", choices=list(IMPLEMENTATIONS), default=list(IMPLEMENTATIONS))
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, help="default: %(default)s")
    parser.add_argument("--longest", action="store_true", help="also find the longest row that fits")
    parser.add_argument("--missing", action="store_true", help="only what the file of this run lacks")
    parser.add_argument("--minutes", type=float, help="begin nothing new after so long")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON (default: %(default)s)")
    arguments = parser.parse_args()
    require_gpu()
    settings = {
        "dtype": "bfloat16",
        "vocabulary": arguments.vocabulary,
        "median_document": MEDIAN_DOCUMENT,
        "shapes": SHAPES,
    }
    run = Run("training_gpu", settings, KEY, arguments.output)
    deadline = Deadline(arguments.minutes)

    def wanted(shape: str, length: int, workload: str) -> dict[str, dict[str, Any]]:
        rows = {
            peer: {"shape": shape, "length": length, "implementation": peer, "workload": workload}
            for peer in arguments.peers
        }
        return {peer: row for peer, row in rows.items() if not (arguments.missing and run.has(row))}

    def add(row: dict[str, Any]) -> None:
        run.add(row)
        print(row, flush=True)

    for shape in arguments.shapes:
        trainee = Trainee(SHAPES[shape], arguments.vocabulary)
        for length, workload in itertools.product(arguments.lengths, arguments.rows):
            # Otherwise FlexAttention would run kernels for any length from the second length on. These are slower.
            torch._dynamo.reset()
            batches = [
                packed_batch(length, seed, arguments.vocabulary, is_whole=ROWS[workload])
                for seed in range(WARM_UP + STEPS)
            ]
            for peer, row in wanted(shape, length, workload).items():
                if deadline.is_over():
                    break
                try:
                    if peer != FLOOR:
                        row["relative_error"] = relative_error(trainee, peer, batches[0])
                    trainee.use(peer)
                    row |= time_steps(trainee.step, batches, lambda batch: batch["input_ids"].numel())
                except Exception as error:  # whatever a peer raises is its result
                    row["error"] = f"{type(error).__name__}: {error}"[:500]
                    trainee.optimizer.zero_grad(set_to_none=True)
                add(row)
                free_memory()
                torch.cuda.synchronize()  # raises here if the error has left the device unusable
        for peer, row in wanted(shape, 0, "longest").items() if arguments.longest else ():
            if deadline.is_over():
                break
            trainee.use(peer)
            try:
                row["longest"] = longest_row(trainee, arguments.vocabulary)
            except Exception as error:  # see above; out of memory is no error here
                row["error"] = f"{type(error).__name__}: {error}"[:500]
            add(row)
        del trainee
    print("out of time: go on with --missing" if deadline.is_over() else f"wrote {run.path}")


if __name__ == "__main__":
    main()
