"""Losses over answers in a model's own forward pass: `set_loss`, `compute_log_probs`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification

from ..integration import NAME, register_tree
from ..integration.conversion import Tree
from ..integration.support import KEY_RANGE_OF_LAYER_TYPE
from .losses import answer_log_probs, answer_scores
from .preference_collator import NOTHING, AnswerLabels, SharedPromptDataCollator


def set_loss(model: nn.Module, loss: Callable[..., Tensor], **options: Any) -> None:
    """Make `model(**batch).loss` the given loss over the answers of a batch from `SharedPromptDataCollator`.

    Causal language models give the loss their `answer_log_probs`, sequence classifiers with one label, the usual reward
    models, their `answer_scores`: scores at the last token of every answer, although the `logits` that they return are
    still one for each row. Windows and chunks of the model's layers are counted along the branches. Nothing else about
    the model changes, checkpoints neither. Trainer averages losses of several batches when it accumulates gradients.
    Call it before the model is compiled; a model with adapters of PEFT may be passed as it is.

    Args:
        model: a causal language model, or a sequence classifier made of Transformers' own `score` head.
        loss: called with values `[B, A]`, the `AnswerLabels`, and `options`: `dpo_loss`, `reward_loss` or your own.

    Raises:
        ValueError: when the model does not use attn_implementation="flashmask", does not ask its `loss_function` for
            the loss, or has more than one label.
    """
    base = _base_model(model)
    if not _asks_for_loss(type(base)):
        raise ValueError(
            f"{type(base).__name__} does not compute its loss with `self.loss_function`, which set_loss replaces: call "
            "answer_log_probs or answer_scores on its outputs in a loss of your own"
        )
    if isinstance(base, GenericForSequenceClassification):
        if base.config.num_labels != 1:
            raise ValueError(f"a reward model has one label, got `num_labels` {base.config.num_labels}")
        reduce: Callable[..., Tensor] = answer_scores
    elif base.get_output_embeddings() is not None:
        reduce = answer_log_probs
    else:
        raise ValueError(f"set_loss needs a causal language model or a sequence classifier, got {type(base).__name__}")
    base.base_model.register_forward_pre_hook(_follow_branches, with_kwargs=True)
    base.loss_function = functools.partial(_loss_of_answers, reduce=reduce, loss=functools.partial(loss, **options))
    # The loss is the mean over a batch: Trainer divides it by the number of batches of a step.
    base.accepts_loss_kwargs = False  # type: ignore[assignment]


def _loss_of_answers(
    logits: Tensor,
    labels: AnswerLabels,
    *args: Any,
    reduce: Callable[..., Tensor],
    loss: Callable[..., Tensor],
    **kwargs: Any,
) -> Tensor:
    """In the form of a `loss_function` of Transformers, which also gets what the model knows and was called with."""
    return loss(reduce(logits, labels), labels)


def _base_model(model: nn.Module) -> PreTrainedModel:
    """The model without the wrapper of PEFT."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    if not isinstance(base, PreTrainedModel):
        raise ValueError(f"a model of Transformers, or one with adapters of PEFT, is needed, got {type(base).__name__}")
    implementation = base.config.get_text_config()._attn_implementation
    if implementation != NAME:
        raise ValueError(
            f'rows with shared prompts need attn_implementation="{NAME}", {type(base).__name__} uses '
            f'"{implementation}": call model.set_attn_implementation("{NAME}") first'
        )
    return base


def _follow_branches(
    backbone: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A forward pre-hook: bounds that a user passes are final, those of trees are narrowed to windows and chunks."""
    mask, position_ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if not isinstance(mask, Tensor) or mask.ndim != 4 or position_ids is None:
        return args, kwargs
    if not torch.compiler.is_compiling():
        return args, {**kwargs, "attention_mask": register_tree(Tree(mask, position_ids, end_depth=mask.shape[-1]))}
    _refuse_windows(backbone, mask)
    return args, kwargs


@torch.compiler.disable  # the compiler would catch the error and go on without the window
def _refuse_windows(backbone: PreTrainedModel, bounds: Tensor) -> None:
    config = backbone.config.get_text_config()
    limits = [getattr(config, limit, None) for limit in KEY_RANGE_OF_LAYER_TYPE.values()]
    if any(limit is not None and limit < bounds.shape[-1] for limit in limits):
        raise NotImplementedError(
            "rows with shared prompts do not work under torch.compile for models with sliding windows or chunks that "
            f"are shorter than a row, here {bounds.shape[-1]} tokens: train without it"
        )


def _asks_for_loss(model_class: type) -> bool:
    for forward in (vars(base)["forward"] for base in model_class.__mro__ if "forward" in vars(base)):
        try:
            if "self.loss_function(" in inspect.getsource(inspect.unwrap(forward)):
                return True
        except OSError:  # a class from a notebook, whose source is not found
            return True
    return False


@torch.no_grad()
def compute_log_probs(
    model: nn.Module,
    dataset: Sequence[Mapping[str, Any]],
    data_collator: SharedPromptDataCollator,
    *,
    batch_size: int = 8,
) -> list[list[float]]:
    """The log-probability of every answer of a dataset under a model in evaluation mode, without gradients.

    Computed once before training, those of the reference model spare a second model in memory and its forward passes:

        dataset = dataset.add_column("ref_logps", compute_log_probs(model, dataset, data_collator))

    With adapters, call it within `model.disable_adapter()`; when training under autocast, within the same.

    Args:
        dataset: examples of `data_collator`, which should be the one of the training: it decides what is truncated.
        batch_size: examples computed at a time.

    Returns:
        For each example one number for each answer, in the given order; the chosen answer comes before the rejected.
    """
    device, training = next(model.parameters()).device, model.training
    hook = _base_model(model).base_model.register_forward_pre_hook(_follow_branches, with_kwargs=True)
    model.eval()
    try:
        return [
            values
            for first in range(0, len(dataset), batch_size)
            for values in _log_probs_by_example(
                model, data_collator([dataset[i] for i in range(first, min(first + batch_size, len(dataset)))]), device
            )
        ]
    finally:
        model.train(training)
        hook.remove()


def _log_probs_by_example(model: nn.Module, batch: dict[str, Any], device: torch.device) -> Iterator[list[float]]:
    labels = AnswerLabels(**{name: value.to(device) for name, value in batch.pop("labels").items()})
    inputs = {name: value.to(device) for name, value in batch.items()}
    log_probs = answer_log_probs(model(**inputs, use_cache=False).logits, labels)
    values: dict[int, list[float]] = {}
    for example, value in zip(labels["example"].flatten().tolist(), log_probs.flatten().tolist()):
        values.setdefault(example, []).append(value)
    values.pop(NOTHING, None)
    return (values[example] for example in sorted(values))
