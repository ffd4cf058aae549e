"""Train a reward model on packed rows that hold every prompt once, and check it against training without sharing.

Two runs see the same pairs in the same batches and the same order, from the same initial weights:

  shared    rows of many prompts, each with its two answers as branches; attn_implementation="flashmask"
  unshared  a padded row for every answer, with its prompt; Transformers' own "eager" attention

Both compute the same loss, so the curves must agree step by step; when they do not, the script says so and fails.
Nothing is downloaded: a prompt is the beginning of a documentation string or licence text of this Python installation,
the chosen answer its continuation, the rejected one the continuation of another text. The tokenizer is a byte-level BPE
trained on them, the model a small Llama. --model and --dataset take others. What is trained is an ordinary sequence
classifier with one label: it is saved, loads and scores a single text like any other.
"""

from __future__ import annotations

from typing import Any

from _preferences import build_model, load_pairs, pad_pairs, parse_arguments, report, train
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, Trainer

from hf_flashmask.training import AnswerLabels, SharedPromptDataCollator, reward_loss, set_loss, split_pairs

CENTERING = 0.01


def loss_and_accuracy(scores: Tensor, labels: AnswerLabels, *, accuracy: list[Tensor]) -> Tensor:
    chosen, rejected, is_pair = split_pairs(scores.detach(), labels)
    accuracy.append((chosen > rejected)[is_pair].float().mean())
    return reward_loss(scores, labels, center_rewards_coefficient=CENTERING)


class UnsharedReward(Trainer):
    """The usual training of a reward model on padded rows, the chosen answers before the rejected ones."""

    accuracy: list[Tensor]

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        del inputs["labels"]
        chosen, rejected = model(**inputs).logits[:, 0].chunk(2)
        self.accuracy.append((chosen > rejected).float().mean())
        return (-nn.functional.logsigmoid(chosen - rejected) + CENTERING * (chosen + rejected) ** 2).mean()


def main() -> None:
    args = parse_arguments(__doc__, "reward_shared_prompt")
    dataset, tokenizer = load_pairs(args)
    collator = SharedPromptDataCollator(tokenizer)
    settings = {"num_labels": 1, "pad_token_id": tokenizer.pad_token_id}

    model = build_model(args, AutoModelForSequenceClassification, tokenizer, "flashmask", **settings)
    accuracy: list[Tensor] = []
    set_loss(model, loss_and_accuracy, accuracy=accuracy)
    shared = train(args, Trainer, "shared prompts", model=model, train_dataset=dataset, data_collator=collator)

    model = build_model(args, AutoModelForSequenceClassification, tokenizer, "eager", **settings)
    UnsharedReward.accuracy = []
    unshared = train(args, UnsharedReward, "unshared", model=model, train_dataset=dataset, data_collator=pad_pairs)

    runs = {"shared": (shared, accuracy), "unshared": (unshared, UnsharedReward.accuracy)}
    report(args, dataset, collator, runs)


if __name__ == "__main__":
    main()
