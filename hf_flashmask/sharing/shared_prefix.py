"""`share_prefixes(model)`: compute the common prefixes of a padded batch once.

Two hooks on the model's backbone do it. Before its forward pass the rows of the batch are merged into prefix trees,
packed into one row; afterwards the hidden states are gathered back to the padded shape. Heads, losses and trainers see
what they always see, and autograd adds up the gradients of what was shared.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from logging import INFO, WARNING
from types import TracebackType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.utils import ModelOutput, logging

from ..bounds import MAX_INTERVALS
from ..integration import register_tree
from ..integration.arguments import by_name
from ..integration.mask import Tree
from .backbone import check_backbone, find_backbone
from .call import call_has_cache, check_call, is_padded_batch, positions_of_call
from .prefix_tree import PrefixTree, merge_prefixes
from .traits import Traits

__all__ = ["share_prefixes"]

logger = logging.get_logger(__name__)

_CALLS_BEFORE_A_WARNING = 100
_CALLS_OF_A_TRAINING = 20
"""From so many calls on, the summary is for everybody to see; a loop may open a `with` block for a call or two."""


class share_prefixes:
    """Compute every common prefix of the rows of a batch once, from now on or inside a `with` block::

        with share_prefixes(trainer.model, trainer.ref_model):
            trainer.train()

    Hidden states, and with them logits, losses and gradients, are those of the padded batch to rounding; at padding on
    either side of a row they are 0. Tokens between others that the 2-D mask hides are computed like the rest, and
    counted by windows and positions as the model counts them. Calls with a cache, and so generation, are left alone, as
    are single rows, 4-D masks, batches with nothing to save, and rows of Llama 4's `floor_scale` tokens and more. Rows
    padded on the left share prefixes in models with rotary embeddings, which only see distances; in models with learned
    positions they need `position_ids` that agree. A warning says so where all calls were left alone.

    Copies of a model share as the model does. A model that is pickled (`torch.save`) does not share once it is loaded.

    Args:
        *models: causal language models, sequence classifiers or value heads with `attn_implementation="flashmask"`,
            also wrapped by peft or DDP. None is skipped, so that `trainer.ref_model` can always be given.

    Attributes:
        summary: what was saved, in a sentence; logged when sharing ends.
        given_tokens: tokens of all batches so far, padding not counted.
        computed_tokens: tokens that were computed for them. Both are 0 until a call was shared.

    Raises:
        TypeError: for what is no model, such as a trainer.
        ValueError: for a model that does not use flashmask, or is no decoder.
        NotImplementedError: here or when the model is called, for what cannot be shared exactly: dropout and noise in
            training mode, recurrent or convolutional layers, router logits, inputs besides token ids, documents packed
            in rows; of PEFT prompt learning, aLoRA, Lily, PVeRA and an adapter for each row.
    """

    def __init__(self, *models: nn.Module | None) -> None:
        given = [model for model in models if model is not None]
        backbones = {id(backbone): backbone for backbone in map(find_backbone, given)}.values()
        for backbone in backbones:
            check_backbone(backbone)
        self.given_tokens = 0
        self.computed_tokens = 0
        self._num_calls = 0
        self._num_calls_with_cache = 0
        self._has_warned = False
        self._running = _PackedCallsOfThread()
        self._handles: list[RemovableHandle] = []
        for model in given:
            self._handles.append(model.register_forward_pre_hook(_SharingHook(self._count_call), with_kwargs=True))
        for backbone in backbones:
            merge = _SharingHook(self._merge, Traits.of(backbone))
            self._handles.append(backbone.register_forward_pre_hook(merge, with_kwargs=True))
            gather = _SharingHook(self._gather)
            self._handles.append(backbone.register_forward_hook(gather, with_kwargs=True, always_call=True))

    def remove(self) -> None:
        """Switch sharing off again, also for copies of the models."""
        if self._handles and self.given_tokens:
            logger.log(WARNING if self._num_calls >= _CALLS_OF_A_TRAINING else INFO, self.summary)
        elif self._handles:
            self._warn_when_nothing_was_shared()
        while self._handles:
            self._handles.pop().remove()

    @property
    def summary(self) -> str:
        """What was saved so far, in a sentence."""
        saved = 1 - self.computed_tokens / self.given_tokens if self.given_tokens else 0.0
        return (
            f"share_prefixes computed {self.computed_tokens:,} of {self.given_tokens:,} tokens in {self._num_calls:,} "
            f"calls: {saved:.1%} saved, padding not counted"
        )

    def _warn_when_nothing_was_shared(self) -> None:
        if self.given_tokens or self._has_warned:
            return
        if self._num_calls:
            logger.warning(
                f"share_prefixes shared nothing in {self._num_calls} calls without a cache (`given_tokens` is 0): they "
                "had a single row or a 4-D mask, or computed hidden states without calling the backbone as a module"
            )
        elif self._num_calls_with_cache:
            logger.warning(
                f"share_prefixes shared nothing in {self._num_calls_with_cache} calls with a cache (`given_tokens` is "
                "0): it leaves them alone, and so `generate`. Train, or compute log-probabilities, without a cache "
                "(use_cache=False); generation needs no share_prefixes"
            )
        self._has_warned = self._num_calls + self._num_calls_with_cache > 0

    def __enter__(self) -> share_prefixes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._num_calls = self._num_calls_with_cache = 0  # the error says more than a warning
        self.remove()

    def _count_call(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._handles and kwargs.get("adapter_names") is not None:
            raise NotImplementedError(
                "share_prefixes cannot share tokens of rows that have an adapter each (`adapter_names` of PEFT): call "
                "the model without share_prefixes, or with rows of one adapter, chosen by `set_adapter`"
            )
        if self._handles and not call_has_cache(kwargs):
            self._num_calls += 1
            if self._num_calls == _CALLS_BEFORE_A_WARNING:  # sharing may never be switched off
                self._warn_when_nothing_was_shared()

    def _count_call_with_cache(self, arguments: Mapping[str, Any]) -> None:
        """If its rows could have a prefix in common: those of one token, as in a step of generation, have none."""
        input_ids = arguments.get("input_ids")
        if input_ids is not None and input_ids.ndim == 2 and min(input_ids.shape) > 1:
            self._num_calls_with_cache += 1
            if self._num_calls_with_cache == _CALLS_BEFORE_A_WARNING:
                self._warn_when_nothing_was_shared()

    def _merge(
        self, backbone: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], traits: Traits
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._running.take(backbone)
        arguments = by_name(backbone, args, kwargs)
        if not self._handles:
            return None
        if call_has_cache(arguments):
            self._count_call_with_cache(arguments)
            return None
        if not is_padded_batch(arguments):
            return None
        tree = self.merge(backbone, arguments, traits)
        if tree is None:
            return None
        self._running.put(backbone, _PackedCall(tree.index, has_padding=tree.num_tokens < tree.index.numel()))
        arguments.update(
            input_ids=tree.input_ids,
            position_ids=tree.position_ids,
            attention_mask=register_tree(
                Tree(tree.bounds, tree.depth, arguments["input_ids"].shape[1], tree.max_branches)
            ),
            use_cache=False,
        )
        return (), arguments

    def merge(self, backbone: PreTrainedModel, arguments: Mapping[str, Any], traits: Traits) -> PrefixTree | None:
        """The rows of a padded batch as one row, or None where that has no fewer tokens, or none at all."""
        check_call(backbone, arguments)
        input_ids = arguments["input_ids"]
        length = input_ids.shape[1]
        # Unlike the bounds of full attention, those of a window need an interval for every branch of a tree.
        has_windows = any(limit < length for limit in traits.key_ranges)
        tree = merge_prefixes(
            input_ids,
            arguments.get("attention_mask"),
            positions_of_call(arguments, traits, type(backbone).__name__),
            max_branches=MAX_INTERVALS - 1 if has_windows else None,
        )
        num_rows = tree.input_ids.shape[1]
        # Models do not take a row without tokens, which padding alone would be merged into.
        is_shared = 0 < num_rows < input_ids.numel() and max(num_rows, length) <= traits.packs_up_to
        self.given_tokens += tree.num_tokens
        self.computed_tokens += num_rows if is_shared else tree.num_tokens
        return tree if is_shared else None

    def _gather(self, backbone: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        packed = self._running.take(backbone)
        # There is no output when the forward pass has failed.
        return None if packed is None or output is None else packed.to_batch(output)


class _SharingHook:
    """A hook on a model that belongs to a `share_prefixes`: copies of the model have it too, pickled ones do not."""

    def __init__(self, function: Callable[..., Any], *options: Any) -> None:
        self._function, self.options = function, options

    @property
    def sharing(self) -> share_prefixes | None:
        """Whose it is, if it merges."""
        owner = getattr(self._function, "__self__", None)
        is_merging = isinstance(owner, share_prefixes) and self._function == owner._merge and owner._handles
        return owner if is_merging else None

    @torch.compiler.disable
    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments, *self.options)

    def __deepcopy__(self, memo: dict[int, Any]) -> _SharingHook:
        return self

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _get_nothing, ()


def merge_by_share_prefixes(model: nn.Module, arguments: Mapping[str, Any]) -> PrefixTree | None:
    """What `share_prefixes` would make of a call of this model; None where it would leave the call alone."""
    for part in model.modules():
        for hook in part._forward_pre_hooks.values():
            if isinstance(hook, _SharingHook) and (sharing := hook.sharing) is not None and is_padded_batch(arguments):
                return sharing.merge(cast(PreTrainedModel, part), arguments, *hook.options)
    return None


def _get_nothing() -> Callable[..., None]:
    return _do_nothing


def _do_nothing(*arguments: Any) -> None:
    """What is left of a hook in a pickled model."""


class _PackedCall(NamedTuple):
    """How to undo the packing of one call.

    Attributes:
        place: `[R, S]`, the place of each token in the packed row, -1 for padding.
        has_padding: whether there can be any.
    """

    place: Tensor
    has_padding: bool

    def to_batch(self, output: Any) -> Any:
        """The output of the backbone with all hidden states in the shape of the batch."""
        if not isinstance(output, ModelOutput):
            return (_unpack_hidden_states(output[0], *self), *(self._in_batch(part) for part in output[1:]))
        for name in ("last_hidden_state", "hidden_states"):
            if output.get(name) is not None:
                output[name] = self._in_batch(output[name])
        return output

    def _in_batch(self, hidden_states: Any) -> Any:
        if isinstance(hidden_states, tuple):
            return tuple(map(self._in_batch, hidden_states))
        return _unpack_hidden_states(hidden_states, *self) if isinstance(hidden_states, Tensor) else hidden_states


class _PackedCallsOfThread(threading.local):
    """The packed call that each backbone is in, in this thread. The next call drops what a failed one has left."""

    def __init__(self) -> None:
        self._packed: dict[int, _PackedCall] = {}

    def put(self, backbone: nn.Module, packed: _PackedCall) -> None:
        self._packed[id(backbone)] = packed

    def take(self, backbone: nn.Module) -> _PackedCall | None:
        return self._packed.pop(id(backbone), None)


def _unpack_hidden_states(hidden_states: Tensor, place: Tensor, has_padding: bool) -> Tensor:
    """`[1, N, D]` -> `[R, S, D]`, 0 at padding. Models on several GPUs return another one than that of tokens."""
    place = place.to(hidden_states.device)
    # The gradient of an embedding adds up equal indices in float32 and in a fixed order.
    if not has_padding:
        return nn.functional.embedding(place, hidden_states[0])
    gathered = nn.functional.embedding(place.clamp(min=0), hidden_states[0])
    return gathered.masked_fill((place < 0)[..., None], 0)
