"""Preference training and scoring of many answers on one GPU: the prompt computed once, and once for every answer.

    python benchmarks/shared_prompts_gpu.py

TRL's own DPOTrainer and GRPOTrainer run with their defaults on a model of Llama 3.2 1B's shape with random weights, in
bfloat16. The vocabulary is 128,256 as in that model, or 32,768. The language model head cannot be shared, and takes
less time with the smaller vocabulary. `dpo` is a whole training step, with reference model and optimizer. `score` is
the pass in which GRPO computes log-probabilities of its completions, `update` the same pass with gradients.
No row has padding, because the other implementations would compute it. The norms of the gradients, or of the
log-probabilities, must agree between all implementations in the first step.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from masks import Varlen
from measurement import RESULTS, time_on_gpu, write_results
from peers import flash_attention_2
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AttentionInterface,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
    set_seed,
)
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from hf_flashmask import share_prefixes
from hf_flashmask.sharing.prefix_tree import merge_prefixes

LENGTH = 2560
PAIRS = 8
ANSWERS, GROUPS = 8, 4
VOCABULARIES = (128256, 32768)
WORDS = 4096
STEPS, WARM_UP = 6, 2
REPEATS = 14  # of measurements shorter than a training step
SHAPE: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": WORDS,
    "pad_token_id": WORDS + 1,
}


def rows_without_padding(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """torch's own FlashAttention-2, as Transformers calls it for rows without padding: one packed row (varlen)."""
    assert attention_mask is None
    batch, _, length, _ = query.shape
    ends = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=query.device)
    return flash_attention_2(query, key, value, ends, Varlen([length], is_causal=True)).transpose(1, 2), None


AttentionInterface.register("varlen", rows_without_padding)  # without a mask function: no mask at all

IMPLEMENTATIONS = {
    "flashmask, shared": "flashmask",
    "flashmask": "flashmask",
    "sdpa": "sdpa",
    "flash_attention_2 varlen": "varlen",
}


def build_model(name: str, vocabulary: int) -> LlamaForCausalLM:
    set_seed(0)
    config = LlamaConfig(vocab_size=vocabulary, **SHAPE)
    with torch.device("cuda"):
        return LlamaForCausalLM._from_config(config, attn_implementation=IMPLEMENTATIONS[name], dtype=torch.bfloat16)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, so that texts have the lengths that are asked for."""
    vocabulary = {f"w{word}": word for word in range(WORDS)} | {"<end>": WORDS, "<pad>": WORDS + 1}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")


def random_text(words: int) -> str:
    return " ".join(f"w{word}" for word in random.choices(range(WORDS), k=words))


def sharing(name: str, *trained: Any) -> Any:
    return share_prefixes(*trained) if name.endswith("shared") else nullcontext()


@contextmanager
def clean_device() -> Iterator[None]:
    """Peak memory counts from here; everything made inside is freed at the end."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    yield
    torch.cuda.synchronize()


class Clock(TrainerCallback):
    """Seconds from the beginning to the end of every step, the device's work included; and norms of gradients."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.norms: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        torch.cuda.synchronize()
        self.begin = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.begin)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "grad_norm" in logs:
            self.norms.append(logs["grad_norm"])


def figures(seconds: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(seconds, n=4)
    peak = torch.cuda.max_memory_allocated() / 2**20
    return {
        "milliseconds": round(1e3 * median, 2),
        "spread": round((high - low) / median, 4),
        "peak_mib": round(peak),
    }


def dpo(name: str, prompt: int, vocabulary: int) -> dict[str, Any]:
    """Training steps of DPOTrainer on pairs of `LENGTH` tokens, of which the first `prompt` are shared."""
    random.seed(prompt)
    answer = LENGTH - prompt - 1  # the trainer adds an end token
    examples = [
        {"prompt": random_text(prompt), "chosen": " " + random_text(answer), "rejected": " " + random_text(answer)}
        for _ in range(STEPS * PAIRS)
    ]
    with tempfile.TemporaryDirectory() as folder, clean_device():
        clock = Clock()
        trainer = DPOTrainer(
            model=build_model(name, vocabulary),
            ref_model=build_model(name, vocabulary),
            args=DPOConfig(
                output_dir=folder,
                per_device_train_batch_size=PAIRS,
                max_length=None,
                max_steps=STEPS,
                logging_steps=1,
                learning_rate=1e-6,
                bf16=True,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(examples),
            processing_class=build_tokenizer(),
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        with sharing(name, trainer.model, trainer.ref_model) as shared:
            trainer.train()
        tokens = STEPS * PAIRS * 2 * LENGTH
        return {
            "workload": "dpo",
            "prompt": prompt,
            "answers": 2,
            "answer": LENGTH - prompt,
            "vocabulary": vocabulary,
            "implementation": name,
            **figures(clock.seconds[WARM_UP:]),
            "computed": round(shared.computed_tokens / shared.given_tokens, 4) if shared else 1.0,
            "tokens_per_second": round(tokens / STEPS / statistics.median(clock.seconds[WARM_UP:])),
            "norm": clock.norms[0],
        }


def no_reward(completions: list[str], **kwargs: Any) -> list[float | None]:
    return [0.0] * len(completions)


def group_scoring(name: str, prompt: int, vocabulary: int) -> Iterator[dict[str, Any]]:
    """GRPOTrainer's log-probabilities of `ANSWERS` answers to each of `GROUPS` prompts, without and with gradients."""
    random.seed(prompt)
    answer = LENGTH - prompt
    with tempfile.TemporaryDirectory() as folder, clean_device():
        trainer = GRPOTrainer(
            model=build_model(name, vocabulary),
            reward_funcs=no_reward,
            args=GRPOConfig(
                output_dir=folder,
                per_device_train_batch_size=ANSWERS,
                num_generations=ANSWERS,
                bf16=True,
                report_to="none",
            ),
            train_dataset=Dataset.from_list([{"prompt": random_text(8)}]),
            processing_class=build_tokenizer(),
        )
        torch.manual_seed(prompt)
        prompts = torch.randint(WORDS, (GROUPS, prompt), device="cuda").repeat_interleave(ANSWERS, 0)
        input_ids = torch.cat([prompts, torch.randint(WORDS, (GROUPS * ANSWERS, answer), device="cuda")], 1)
        mask = torch.ones_like(input_ids)
        model: Any = trainer.model.train()  # type: ignore[union-attr]
        model.gradient_checkpointing_enable()  # as the trainer does when it trains

        def log_probabilities() -> Tensor:
            return trainer._get_per_token_logps_and_entropies(model, input_ids, mask, answer)[0]

        @torch.no_grad()
        def score() -> Tensor:
            return log_probabilities()

        def update() -> Tensor:
            model.zero_grad()
            (-log_probabilities().mean()).backward()
            gradient: Tensor = model.lm_head.weight.grad
            return gradient

        workloads: dict[str, Callable[[], Tensor]] = {"score": score, "update": update}
        for workload, function in workloads.items():
            torch.cuda.reset_peak_memory_stats()
            with sharing(name, model) as shared:
                seconds = []
                for _ in range(WARM_UP + REPEATS):
                    torch.cuda.synchronize()
                    begin = time.perf_counter()
                    result = function()
                    torch.cuda.synchronize()
                    seconds.append(time.perf_counter() - begin)
            yield {
                "workload": workload,
                "prompt": prompt,
                "answers": ANSWERS,
                "answer": answer,
                "vocabulary": vocabulary,
                "implementation": name,
                **figures(seconds[WARM_UP:]),
                "computed": round(shared.computed_tokens / shared.given_tokens, 4) if shared else 1.0,
                "tokens_per_second": round(input_ids.numel() / statistics.median(seconds[WARM_UP:])),
                "norm": float(result.float().norm()),
            }


def merging() -> dict[str, Any]:
    """Time to find the tree of a batch, on the device and on the host, which waits for the length of the row."""
    input_ids = torch.randint(WORDS, (2 * PAIRS, LENGTH), device="cuda")
    input_ids[PAIRS:, :2048] = input_ids[:PAIRS, :2048]

    def merge() -> None:
        merge_prefixes(input_ids, torch.ones_like(input_ids))

    device = time_on_gpu(merge)
    seconds = []
    for _ in range(20):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        merge()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return {
        "workload": "merge",
        "rows": 2 * PAIRS,
        "device_milliseconds": device["milliseconds"],
        "host_milliseconds": round(1e3 * statistics.median(seconds), 3),
    }


def check(rows: list[dict[str, Any]]) -> None:
    """All implementations must compute the same from the same weights, up to the rounding of bfloat16."""
    for row in rows[1:]:
        assert abs(row["norm"] / rows[0]["norm"] - 1) < 0.01, (row, rows[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, nargs="*", default=[16, 1024, 2304], help="further shared lengths")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON (default: %(default)s)")
    arguments = parser.parse_args()
    rows = [merging()]
    print(rows[0], flush=True)

    def add(*found: dict[str, Any]) -> None:
        what = ("workload", "prompt", "vocabulary")
        for row in found:
            check([row, *(other for other in rows[1:] if all(row[key] == other[key] for key in what))])
            rows.append(row)
            print(row, flush=True)

    for vocabulary in VOCABULARIES:
        for name in IMPLEMENTATIONS if vocabulary == VOCABULARIES[0] else ("flashmask, shared", "sdpa"):
            add(dpo(name, 2048, vocabulary))
            add(*group_scoring(name, 2048, vocabulary))
    for prompt in arguments.prompts:
        for name in ("flashmask, shared", "sdpa"):
            add(dpo(name, prompt, VOCABULARIES[0]))
    settings = {"shape": SHAPE, "length": LENGTH, "pairs": PAIRS, "groups": GROUPS, "dtype": "bfloat16"}
    print("wrote", write_results("shared_prompts_gpu", "cuda", settings, rows, arguments.output))


if __name__ == "__main__":
    main()
