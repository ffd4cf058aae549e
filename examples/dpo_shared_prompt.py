"""Train with DPO on packed rows that hold every prompt once, and check it against the same training without sharing.

Two runs see the same pairs in the same batches and the same order, from the same initial weights:

  shared    rows of many prompts, each with its two answers as branches; attn_implementation="flashmask"
  unshared  a padded row for every answer, with its prompt; Transformers' own "eager" attention

Both compute the same loss, so the curves must agree step by step; when they do not, the script says so and fails.
Nothing is downloaded: a prompt is the beginning of a documentation string or licence text of this Python installation,
the chosen answer its continuation, the rejected one the continuation of another text. The tokenizer is a byte-level BPE
trained on them, the model a small Llama. --model and --dataset take others.
"""

from __future__ import annotations

from typing import Any

from _preferences import build_model, load_pairs, pad_pairs, parse_arguments, report, train
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer

from hf_flashmask.training import (
    AnswerLabels,
    SharedPromptDataCollator,
    compute_log_probs,
    dpo_loss,
    reference_log_probs,
    set_loss,
    split_pairs,
)

BETA = 0.1


def loss_and_accuracy(log_probs: Tensor, labels: AnswerLabels, *, accuracy: list[Tensor]) -> Tensor:
    """DPO's loss. A pair counts as right when training has raised the chosen answer more than the rejected one."""
    chosen, rejected, is_pair = split_pairs(log_probs.detach() - reference_log_probs(labels), labels)
    accuracy.append((chosen > rejected)[is_pair].float().mean())
    return dpo_loss(log_probs, labels, beta=BETA)


class UnsharedDPO(Trainer):
    """The usual DPO on padded rows, the chosen answers before the rejected ones."""

    accuracy: list[Tensor]

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels, reference = inputs.pop("labels"), inputs.pop("ref_logps")
        logits = model(**inputs, logits_to_keep=labels.shape[1] + 1).logits[:, :-1]
        log_probs = logits.log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
        log_ratios = log_probs.masked_fill(labels == -100, 0.0).sum(1) - reference
        chosen, rejected = log_ratios.chunk(2)
        self.accuracy.append((chosen > rejected).float().mean())
        return -nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()


def main() -> None:
    args = parse_arguments(__doc__, "dpo_shared_prompt")
    dataset, tokenizer = load_pairs(args)
    collator = SharedPromptDataCollator()

    model = build_model(args, AutoModelForCausalLM, tokenizer, "flashmask")
    dataset = dataset.add_column("ref_logps", compute_log_probs(model, dataset, collator, batch_size=args.batch_size))
    accuracy: list[Tensor] = []
    set_loss(model, loss_and_accuracy, accuracy=accuracy)
    shared = train(args, Trainer, "shared prompts", model=model, train_dataset=dataset, data_collator=collator)

    model = build_model(args, AutoModelForCausalLM, tokenizer, "eager")
    UnsharedDPO.accuracy = []
    unshared = train(args, UnsharedDPO, "unshared", model=model, train_dataset=dataset, data_collator=pad_pairs)

    runs = {"shared": (shared, accuracy), "unshared": (unshared, UnsharedDPO.accuracy)}
    report(args, dataset, collator, runs)


if __name__ == "__main__":
    main()
