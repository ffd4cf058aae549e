"""What packing and sharing save, in the logs of Trainer."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from .. import bounds
from ..integration.documents import document_ids_of_call
from ..sharing import share_prefixes
from ..sharing.call import call_has_cache
from .labels import AnswerLabels
from .step_profile import StepProfile
from .token_counts import num_given_tokens, padding_of_counted_batch
from .trainer_methods import wrap_in_trainer

__all__ = ["FlashMaskCallback"]

_KEYS_OF_TRAINING = ("loss", "train_loss")
"""Trainer logs one of them for steps and at the end; evaluations are entries of their own."""


class FlashMaskCallback(TrainerCallback):
    """Log how full the rows of a training are, for `transformers.Trainer` and the trainers of TRL::

        sharing = share_prefixes(model)
        trainer = DPOTrainer(model, ..., callbacks=[FlashMaskCallback(sharing)])

    Each entry of the training's log gets, over the training batches of this process since the last one:

    * `flashmask/fill`: fraction of positions that hold tokens; the rest is padding.
    * `flashmask/padding`: positions of padding.
    * `flashmask/tokens_per_document`: tokens over documents, by `position_ids` and ids in a 2-D mask. A row without
      them is one document.
    * `flashmask/shared`: with `sharing`, or rows of `SharedPromptDataCollator`, the fraction of tokens that needed no
      computation because another sequence shares them. Evaluation is not counted.
    * `flashmask/attention`: with `attention_every`, the fraction of a step's time that attention takes, forward and
      backward, over the steps that were profiled. It counts what flashmask computes, by its kernels or by SDPA, also in
      a reference model or in generation within the step; not what SDPA computes in a compiled graph, and not other
      implementations. Without calls of flashmask there is none.

    Batches are counted on their device and read once for each entry of the log. Trackers (wandb, TensorBoard) come
    before callbacks that are given to a Trainer and see its logs first. `trainer.callback_handler.callbacks.insert(0,
    callback)` puts it before them.

    Args:
        sharing: the `share_prefixes` of the model.
        attention_every: profile one step of so many. That step waits for the device, and takes longer. The time of
            attention is that of its kernels on a GPU, and that of its calls on a CPU.

    Raises:
        ValueError: for `attention_every` below 1.
    """

    def __init__(self, sharing: share_prefixes | None = None, attention_every: int | None = None) -> None:
        if attention_every is not None and attention_every < 1:
            raise ValueError(f"`attention_every` must be a number of steps from 1 on, or None, got {attention_every}")
        self._sharing = sharing
        self._attention_every = attention_every
        self._profile: StepProfile | None = None
        self._handle: RemovableHandle | None = None
        self._counts_at_step = (0, 0)
        self._forget()
        _clear_after_failures()

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        assert model is not None, "Trainer gives its model to every callback"
        self._clear()
        self._forget()
        self._handle = model.register_forward_pre_hook(self._count, with_kwargs=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._clear()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._sharing is not None:
            self._counts_at_step = _counts_of_sharing(self._sharing)
        every = self._attention_every
        # The step that ends a round: kernels are compiled in the first ones. A program has one profiler at a time.
        if every is not None and (state.global_step + 1) % every == 0 and not torch.autograd._profiler_enabled():
            self._profile = StepProfile(args.device)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._sharing is not None:
            given, computed = (now - then for now, then in zip(_counts_of_sharing(self._sharing), self._counts_at_step))
            self._given_to_sharing += given
            self._computed_by_sharing += computed
        if self._profile is not None:
            self._shares_of_attention += self._profile.end()
            self._profile = None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs is None or self._num_positions == 0 or logs.keys().isdisjoint(_KEYS_OF_TRAINING):
            return
        figures = {name: round(figure, 4) for name, figure in self._figures().items()}
        logs.update(figures)
        if state.log_history:  # Trainer has put a copy of the logs there
            state.log_history[-1].update(figures)
        self._forget()

    def _figures(self) -> dict[str, float]:
        num_tokens, num_documents, given = int(self._num_tokens), int(self._num_documents), int(self._num_given)
        computed = num_tokens
        if self._sharing is not None:
            given, computed = self._given_to_sharing, self._computed_by_sharing
        figures = {
            "flashmask/fill": num_tokens / self._num_positions,
            "flashmask/padding": float(self._num_positions - num_tokens),
            "flashmask/tokens_per_document": num_tokens / max(num_documents, 1),
        }
        if given:
            figures["flashmask/shared"] = 1 - computed / given
        if self._shares_of_attention:
            figures["flashmask/attention"] = statistics.mean(self._shares_of_attention)
        return figures

    def _forget(self) -> None:
        self._num_positions = 0
        self._num_tokens: Tensor | int = 0
        self._num_documents: Tensor | int = 0
        self._num_given: Tensor | int = 0
        self._given_to_sharing = self._computed_by_sharing = 0
        self._shares_of_attention: list[float] = []

    def _clear(self) -> None:
        """An error may have ended the training within a step."""
        if self._profile is not None:
            self._profile.drop()
            self._profile = None
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    @torch.compiler.disable
    def _count(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        input_ids = kwargs.get("input_ids")
        # Trainers that generate answers within a step do it in training mode, token by token.
        if not model.training or not isinstance(input_ids, Tensor) or call_has_cache(kwargs):
            return
        is_token = ~_padding_to_log(kwargs, input_ids)
        self._num_positions += input_ids.numel()
        self._num_tokens += is_token.sum()
        self._num_documents += _num_documents_to_log(kwargs, is_token)
        if isinstance(kwargs.get("labels"), AnswerLabels):
            self._num_given += num_given_tokens(kwargs, ~is_token)


def _clear_after_failures() -> None:
    """Trainer tells callbacks of the end of a training that succeeds only. Again is harmless."""
    wrap_in_trainer("train", _clearing_callbacks)


def _clearing_callbacks(original: Callable[..., Any]) -> Callable[..., Any]:
    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, *args, **kwargs)
        except BaseException:  # KeyboardInterrupt too
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, FlashMaskCallback):
                    callback._clear()
            raise

    return train


def _counts_of_sharing(sharing: share_prefixes) -> tuple[int, int]:
    return sharing.given_tokens, sharing.computed_tokens


def _padding_to_log(batch: Mapping[str, Any], input_ids: Tensor) -> Tensor:
    """Where the batch has padding, bool `[B, S]`."""
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    if (is_padding := padding_of_counted_batch(batch)) is not None:
        return is_padding
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask == 0
    if not isinstance(positions, Tensor) or positions.shape != input_ids.shape:
        return torch.zeros_like(input_ids, dtype=torch.bool)
    # Padding ends a row, each position of it at 0. A document of one token looks alike there; it trains nothing either.
    return positions.flip(1).cumsum(1).flip(1) == 0


def _num_documents_to_log(batch: Mapping[str, Any], is_token: Tensor) -> Tensor | int:
    positions, ids = batch.get("position_ids"), document_ids_of_call(batch.get("attention_mask"), is_token.device)
    if not isinstance(positions, Tensor) or positions.shape != is_token.shape:
        positions = None
    if ids is None:
        return len(is_token) if positions is None else ((positions == 0) & is_token).sum()
    ends = bounds.document_ends_of_mask(ids) if positions is None else bounds.document_ends(positions, is_token, ids)
    return is_token.any(1).sum() + (ends[:, 1:] != ends[:, :-1]).sum()
