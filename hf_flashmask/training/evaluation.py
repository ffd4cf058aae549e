"""Evaluation by Trainer on several processes, which gathers predictions example by example: packed rows are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .trainer_methods import wrap_in_trainer

__all__ = ["GivesPredictionsOfRows", "refuse_predictions_of_rows"]


class GivesPredictionsOfRows:
    """A collator that packs examples into rows of at most `max_length` tokens, of which each batch has as many as it
    needs: what a model predicts of them belongs to rows, not to examples.
    """

    max_length: int | None


def refuse_predictions_of_rows() -> None:
    """Make Trainer raise on every process before it gathers predictions of `GivesPredictionsOfRows`. Again is harmless.

    Batches of the ranks have different numbers of rows. Collectives of such tensors fail or wait forever.
    """
    wrap_in_trainer("evaluation_loop", _refusing_predictions)


def _refusing_predictions(original: Callable[..., Any]) -> Callable[..., Any]:
    def evaluation_loop(
        self: Any,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        is_loss_alone = self.args.prediction_loss_only if prediction_loss_only is None else prediction_loss_only
        if self.args.world_size > 1 and not is_loss_alone:
            _check_collator_of_evaluation(getattr(dataloader, "collate_fn", None), self.args.world_size)
        return original(self, dataloader, description, prediction_loss_only, *args, **kwargs)

    return evaluation_loop


def _check_collator_of_evaluation(collator: Any, processes: int) -> None:
    collator = getattr(collator, "data_collator", collator)  # Trainer wraps it to remove columns
    if isinstance(collator, GivesPredictionsOfRows) and collator.max_length is not None:
        raise NotImplementedError(
            f"{type(collator).__name__} with `max_length` may give each of the {processes} processes a different "
            "number of rows, and Trainer cannot gather such predictions. For the loss alone, evaluate without "
            "`compute_metrics` or set `TrainingArguments(prediction_loss_only=True)`. For predictions, evaluate in one "
            "process, or set `trainer.data_collator` to one that pads each example to a row of its own (this one "
            "without `max_length` makes one row of a batch)"
        )
