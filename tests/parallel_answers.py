"""Cases of `parallel_cases.py` with losses over answers that share prompts.

The truth is one process with eager attention: each prompt with one of its answers alone, and the losses written out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

BETA = 0.3


@dataclass(frozen=True)
class AnswerCase:
    """A training step on all ranks with batches of `SharedPromptDataCollator`."""

    name: str
    model: str
    loss: str = "dpo"
    mode: str = "ulysses"
    ranks: int = 4
    max_length: int | None = None
    nodes: int = 1
    engine: str | None = None
    by_hand: bool = False
    """Whether the loss is computed of the model's logits at all tokens, without `set_loss`."""
    lengths: tuple[tuple[int, int, int], ...] = ((40, 5, 7), (9, 3, 12), (1, 1, 4), (6, 9, 2), (3, 1, 1))
    """Of each prompt and its answers. The first prompt is so long that some ranks hold no token of an answer."""


def _cases() -> Iterator[AnswerCase]:
    for mode in ("ulysses", "all_gather"):
        yield AnswerCase(f"{mode}-dpo", "llama", mode=mode)
        yield AnswerCase(f"{mode}-dpo_in_rows", "llama", mode=mode, ranks=2, max_length=60)
        yield AnswerCase(f"{mode}-dpo_in_windows", "gpt_oss", mode=mode, max_length=60)
        yield AnswerCase(f"{mode}-dpo_by_hand", "gemma3", mode=mode, by_hand=True)
        for by_hand in (False, True):  # some ranks hold nothing but tokens that predict answers
            name = f"{mode}-dpo_long_answers{'_by_hand' if by_hand else ''}"
            yield AnswerCase(name, "llama", mode=mode, by_hand=by_hand, lengths=((1, 30, 33),))
        yield AnswerCase(f"{mode}-dpo_fsdp2", "llama", mode=mode, ranks=2, engine="fsdp2")
        yield AnswerCase(f"{mode}-reward", "llama", "reward", mode)
        yield AnswerCase(f"{mode}-reward_in_windows", "mistral", "reward", mode, ranks=2, max_length=60)
        yield AnswerCase(f"{mode}-groups", "llama", "groups", mode, max_length=60)
    yield AnswerCase("nodes-dpo", "llama", mode="auto", nodes=2)
    yield AnswerCase("nodes-reward", "llama", "reward", "auto", nodes=2)


ANSWER_CASES = list(_cases())


def build_model(case: AnswerCase) -> Any:
    import tiny_models
    from transformers import AutoModelForSequenceClassification

    if case.loss != "reward":
        return tiny_models.build(case.model)
    torch.manual_seed(1)
    config = tiny_models.config_of(case.model, num_labels=1)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="flashmask").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def make_examples(case: AnswerCase) -> list[dict[str, Any]]:
    def tokens(length: int) -> list[int]:
        return torch.randint(1, 97, (length,)).tolist()

    examples: list[dict[str, Any]] = []
    for prompt, *answers in case.lengths:
        example: dict[str, Any] = {"prompt": tokens(prompt)}
        if case.loss == "groups":
            example["answers"] = [tokens(length) for length in (*answers, 4)]
            example["ref_logps"] = torch.randn(3).tolist()
        else:
            example["chosen"], example["rejected"] = map(tokens, answers)
            example["ref_logps"] = (torch.randn(2) - 20).tolist()
            example["margin"] = float(torch.rand(()))
        examples.append(example)
    return examples


def loss_of_groups(log_probs: Tensor, labels: Any) -> Tensor:
    """A loss of a user: the answers of all examples, each weighted by its `ref_logps`."""
    from hf_flashmask.training import reference_log_probs

    return (log_probs.exp() * reference_log_probs(labels)).sum() + log_probs.square().mean()


def truth(model: nn.Module, batches: list[list[dict[str, Any]]], case: AnswerCase) -> Tensor:
    """The mean over the batches of their losses."""
    losses = []
    for examples in batches:
        if case.loss == "groups":
            log_probs = torch.stack([value for example in examples for value in _values(model, example, case)])
            weights = torch.tensor([value for example in examples for value in example["ref_logps"]])
            rows = _padded_size(examples, case)
            losses.append((log_probs.exp() * weights).sum() + log_probs.square().sum() / rows)
            continue
        terms = []
        for example in examples:
            chosen, rejected = _values(model, example, case)
            if case.loss == "reward":
                terms.append(-nn.functional.logsigmoid(chosen - rejected - example["margin"]))
            else:
                reference = example["ref_logps"][0] - example["ref_logps"][1]
                terms.append(-nn.functional.logsigmoid(BETA * (chosen - rejected - reference)))
        losses.append(torch.stack(terms).mean())
    return torch.stack(losses).mean()


def _padded_size(examples: list[dict[str, Any]], case: AnswerCase) -> int:
    from hf_flashmask import SharedPromptDataCollator

    return SharedPromptDataCollator(max_length=case.max_length)(examples)["labels"]["last"].numel()


def _values(model: nn.Module, example: dict[str, Any], case: AnswerCase) -> list[Tensor]:
    """The score or the log-probability of each answer, alone with its prompt."""
    answers = example["answers"] if "answers" in example else [example["chosen"], example["rejected"]]
    values = []
    for answer in answers:
        input_ids = torch.tensor([example["prompt"] + answer])
        logits = model(input_ids).logits
        if case.loss == "reward":
            values.append(logits[0, 0])
        else:
            log_probs = logits[0, len(example["prompt"]) - 1 : -1].log_softmax(-1)
            values.append(log_probs.gather(1, torch.tensor(answer)[:, None]).sum())
    return values


def train_step(model: nn.Module, called: nn.Module, parallel: Any, batch: dict[str, Any], case: AnswerCase) -> Tensor:
    """The loss of this rank."""
    from hf_flashmask import dpo_loss, reset_loss, reward_loss, set_loss
    from hf_flashmask.training import answer_log_probs

    if case.by_hand:
        part = parallel.shard(batch)
        labels = part.pop("labels")
        part.pop("logits_to_keep", None)
        return dpo_loss(answer_log_probs(called(**part).logits, labels), labels, beta=BETA)
    loss, options = {"dpo": (dpo_loss, {"beta": BETA}), "reward": (reward_loss, {}), "groups": (loss_of_groups, {})}[
        case.loss
    ]
    set_loss(model, loss, **options)
    found = called(**parallel.shard(batch)).loss
    reset_loss(model)
    return found
