"""Losses over answers in a model's own forward pass: `set_loss` and `reset_loss`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification

from .branches import follow_branches, unwrap_model_for_branches
from .labels import AnswerLabels, LabelsOfRank
from .losses import answer_log_probs, answer_scores, check_dpo_options, dpo_loss, reward_loss

Loss = Callable[..., Tensor]


def set_loss(model: nn.Module, loss: Loss, **options: Any) -> None:
    """Make `model(**batch).loss` the given loss over the answers of a batch from `SharedPromptDataCollator`.

    The loss of a causal language model gets its `answer_log_probs`. The loss of a sequence classifier with one label, a
    reward model, gets its `answer_scores`, one at the last token of every answer; the model still returns one of its
    `logits` for each row. Windows and chunks of the layers follow the branches. Nothing else about the model changes,
    and its checkpoints stay the same. Trainer averages the losses of the batches that it accumulates gradients over.

    A second call replaces the loss; `reset_loss(model)` restores the model's own. Call it before the model is compiled.
    The model may have adapters of PEFT.

    Args:
        model: a causal language model, or a sequence classifier made of Transformers' own `score` head.
        loss: called with values `[B, A]`, the `AnswerLabels`, and `options`: `dpo_loss`, `reward_loss` or your own.
            Under `sequence_parallel` the labels are `LabelsOfRank`, which read alike, and every rank gets all values.

    Raises:
        TypeError: when the loss does not take these options, or takes others that are missing.
        ValueError: when the model does not use attn_implementation="flashmask", does not ask its `loss_function` for
            the loss, has more than one label, or is not what the loss is for; for an option out of range.
        NotImplementedError: when the answers would see each other through recurrent or convolutional layers or an
            adapter of PEFT; for a model that counts positions from another number than 0.
    """
    base = unwrap_model_for_branches(model)
    _check_asks_for_loss(base)
    values_of = _values_for_loss(base)
    _check_loss(base, loss, values_of, options)
    hook = follow_branches(model, "set_loss")
    reset_loss(model)
    replaced = {name: vars(base)[name] for name in _REPLACED if name in vars(base)}
    base.loss_function = _LossOfAnswers(values_of, functools.partial(loss, **options), replaced, hook)
    # The loss is the mean over a batch: Trainer divides it by the number of batches of a step.
    base.accepts_loss_kwargs = False  # type: ignore[assignment]


def reset_loss(model: nn.Module) -> None:
    """Undo `set_loss`: the model computes its own loss again. Harmless for a model without."""
    base = unwrap_model_for_branches(model)
    current = vars(base).get("_loss_function")
    if not isinstance(current, _LossOfAnswers):
        return
    current.hook.remove()
    for name in _REPLACED:
        vars(base).pop(name, None)
    vars(base).update(current.replaced)


_REPLACED = ("_loss_function", "accepts_loss_kwargs")
"""Attributes of a model that `set_loss` sets."""


@dataclass
class _LossOfAnswers:
    """A `loss_function` of Transformers.

    Attributes:
        values_of: computes the argument of the loss from the logits.
        loss: with its options.
        replaced: the model's own attributes.
        hook: of `follow_branches`.
    """

    values_of: Callable[[Tensor, AnswerLabels | LabelsOfRank], Tensor]
    loss: Loss
    replaced: dict[str, Any]
    hook: RemovableHandle

    def __call__(self, logits: Tensor, labels: AnswerLabels | LabelsOfRank, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(labels, Mapping | LabelsOfRank):
            raise TypeError(
                f"this model has a loss over answers (set_loss), but its `labels` are {type(labels).__name__}: pass "
                "the labels that SharedPromptDataCollator makes, or call reset_loss(model) to train with its own loss"
            )
        return self.loss(self.values_of(logits, labels), labels)


def _values_for_loss(base: PreTrainedModel) -> Callable[[Tensor, AnswerLabels | LabelsOfRank], Tensor]:
    if isinstance(base, GenericForSequenceClassification):
        if base.config.num_labels != 1:
            raise ValueError(f"a reward model has one label, got `num_labels` {base.config.num_labels}")
        return answer_scores
    if base.get_output_embeddings() is None:
        raise ValueError(f"set_loss needs a causal language model or a sequence classifier, got {type(base).__name__}")
    return answer_log_probs


_VALUES_OF_LOSS: dict[Loss, Callable[[Tensor, AnswerLabels | LabelsOfRank], Tensor]] = {
    dpo_loss: answer_log_probs,
    reward_loss: answer_scores,
}
_MODEL_OF_VALUES: dict[Any, str] = {
    answer_log_probs: "log-probabilities of a causal language model",
    answer_scores: "scores of a sequence classifier with one label",
}


def _check_loss(base: PreTrainedModel, loss: Loss, values_of: Callable[..., Tensor], options: dict[str, Any]) -> None:
    function = loss
    while isinstance(function, functools.partial):
        options, function = {**function.keywords, **options}, function.func
    name = getattr(function, "__name__", repr(function))
    wanted = _VALUES_OF_LOSS.get(function, values_of)
    if wanted is not values_of:
        raise ValueError(f"{name} takes {_MODEL_OF_VALUES[wanted]}, but the model is a {type(base).__name__}")
    try:
        signature = inspect.signature(function)
    except ValueError:  # a builtin
        return
    parameters = list(signature.parameters.values())
    named = [parameter for parameter in parameters[2:] if parameter.kind in (_BY_NAME, _BY_NAME_ONLY)]
    accepted = [parameter.name for parameter in named]
    takes_all = any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    unknown = [] if takes_all else [option for option in options if option not in accepted]
    missing = [
        parameter.name for parameter in named if parameter.default is parameter.empty and parameter.name not in options
    ]
    if unknown or missing:
        what = f"has no option {', '.join(unknown)}" if unknown else f"needs the option {', '.join(missing)}"
        raise TypeError(f"set_loss: {name} {what}; its options are: {', '.join(accepted) or 'none'}")
    if function is dpo_loss:
        check_dpo_options(**options)


_BY_NAME, _BY_NAME_ONLY = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY


def _check_asks_for_loss(base: PreTrainedModel) -> None:
    forwards = [vars(owner)["forward"] for owner in type(base).__mro__ if "forward" in vars(owner)]
    current = inspect.unwrap(vars(base).get("forward", forwards[0]))
    if getattr(current, "__module__", "").startswith("liger_kernel"):
        raise ValueError(
            f"the forward method of {type(base).__name__} is Liger's, which computes a loss of its own instead of that "
            "of set_loss: load the model without Liger's kernels (`use_liger_kernel=False`)"
        )
    if not any(map(_asks_for_loss, forwards)):
        raise ValueError(
            f"{type(base).__name__} does not compute its loss with `self.loss_function`, which set_loss replaces: call "
            "answer_log_probs or answer_scores on its outputs in a loss of your own"
        )


def _asks_for_loss(forward: Callable[..., Any]) -> bool:
    try:
        return "self.loss_function(" in inspect.getsource(inspect.unwrap(forward))
    except OSError:  # a class from a notebook, whose source is not found
        return True
