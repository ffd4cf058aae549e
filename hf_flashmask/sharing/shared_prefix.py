"""`share_prefixes(model)`: compute the common prefixes of a padded batch once.

Two hooks on the model's backbone do it. Before its forward pass the rows of the batch are merged into prefix trees,
packed into one row; afterwards the hidden states are gathered back to the padded shape. Heads, losses and trainers see
what they always see, and autograd adds up the gradients of what was shared.
"""

from __future__ import annotations

import functools
import inspect
import sys
from types import TracebackType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel
from transformers.utils import ModelOutput, logging

from ..bounds import MAX_INTERVALS
from ..integration import NAME, register_tree
from ..integration.conversion import Tree
from ..integration.support import KEY_RANGE_OF_LAYER_TYPE
from .prefix_tree import merge_prefixes

__all__ = ["share_prefixes"]

logger = logging.get_logger(__name__)


class share_prefixes:
    """Compute every common prefix of the rows of a batch once, from now on or inside a `with` block::

        with share_prefixes(trainer.model, trainer.ref_model):
            trainer.train()

    Hidden states, and with them logits, losses and gradients, are those of the padded batch to rounding; at padding
    they are 0. Calls with a cache, and so generation, are left alone, as are single rows, 4-D masks and batches with
    nothing to save. Without `position_ids`, models with rotary embeddings, which only see distances, count the
    positions of left-padded rows from their first token.

    Args:
        *models: causal language models, sequence classifiers or value heads with `attn_implementation="flashmask"`,
            also wrapped by peft or DDP. None is skipped, so that `trainer.ref_model` can always be given.

    Attributes:
        given_tokens: tokens of all batches so far, padding not counted.
        computed_tokens: tokens that were computed for them.

    Raises:
        ValueError: for a model that does not use flashmask, or is no decoder.
        NotImplementedError: here or when the model is called, for what cannot be shared exactly: active dropout,
            recurrent or convolutional layers, router logits, inputs besides token ids, `output_hidden_states`,
            documents packed in rows.
    """

    def __init__(self, *models: nn.Module | None) -> None:
        found = [_backbone(model) for model in models if model is not None]
        backbones = {id(backbone): backbone for backbone in found}.values()
        for backbone in backbones:
            _check_model(backbone)
        self.given_tokens = 0
        self.computed_tokens = 0
        # Packed input_ids of a running call -> how to undo it. It does not hold them: a call that fails leaves nothing.
        self._running: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._handles: list[RemovableHandle] = []
        for backbone in backbones:
            merge = functools.partial(self._merge, _traits(backbone))
            self._handles.append(backbone.register_forward_pre_hook(merge, with_kwargs=True))
            self._handles.append(backbone.register_forward_hook(self._gather, with_kwargs=True))

    def remove(self) -> None:
        """Switch sharing off again, also for copies of the models."""
        while self._handles:
            self._handles.pop().remove()

    def __enter__(self) -> share_prefixes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> share_prefixes:
        """A copy of a model has the hooks of the model."""
        return self

    @torch.compiler.disable
    def _merge(
        self, traits: _Traits, backbone: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        arguments = {**dict(zip(traits.arguments, args)), **kwargs}
        if not self._handles or not _can_share(arguments):
            return None
        _check_call(backbone, arguments)
        input_ids = arguments["input_ids"]
        length = input_ids.shape[1]
        # Unlike the bounds of full attention, those of a window need an interval for every branch of a tree.
        has_windows = any(limit < length for limit in traits.key_ranges)
        tree = merge_prefixes(
            input_ids,
            arguments.get("attention_mask"),
            _position_ids(arguments, traits.has_relative_positions),
            max_branches=MAX_INTERVALS - 1 if has_windows else None,
        )
        is_shorter = tree.input_ids.shape[1] < input_ids.numel()
        self.given_tokens += tree.num_tokens
        self.computed_tokens += tree.input_ids.shape[1]
        if not is_shorter:
            return None
        has_padding = tree.num_tokens < tree.index.numel()
        self._running[tree.input_ids] = functools.partial(_to_batch, index=tree.index, has_padding=has_padding)
        arguments.update(
            input_ids=tree.input_ids,
            position_ids=tree.position_ids,
            attention_mask=register_tree(Tree(tree.bounds, tree.depth, length, tree.max_branches)),
            use_cache=False,
        )
        return (), arguments

    @torch.compiler.disable
    def _gather(self, backbone: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        input_ids = kwargs.get("input_ids")
        to_batch = None if input_ids is None else self._running.pop(input_ids, None)
        if to_batch is None:
            return None
        if isinstance(output, ModelOutput):
            output["last_hidden_state"] = to_batch(output["last_hidden_state"])
            return output
        return (to_batch(output[0]), *output[1:])


def _to_batch(hidden_states: Tensor, index: Tensor, has_padding: bool) -> Tensor:
    """`[1, N, D]` -> `[R, S, D]`, 0 at padding."""
    # The gradient of an embedding adds up equal indices in float32 and in a fixed order.
    if not has_padding:
        return nn.functional.embedding(index, hidden_states[0])
    gathered = nn.functional.embedding(index.clamp(min=0), hidden_states[0])
    return gathered.masked_fill((index < 0)[..., None], 0)


# Models


def _backbone(model: nn.Module) -> PreTrainedModel:
    """The model without its head, out of all wrappers."""
    inner: Any = model
    while not isinstance(inner, PreTrainedModel):
        # DDP and FSDP, torch.compile, TRL's value heads, peft and its tuners.
        names = ("module", "_orig_mod", "pretrained_model", "base_model", "model")
        inner = next((part for name in names if isinstance(part := getattr(inner, name, None), nn.Module)), None)
        if inner is None:
            raise ValueError(f"share_prefixes needs a Transformers model, {type(model).__name__} holds none")
    if inner.base_model is not inner:
        return cast(PreTrainedModel, inner.base_model)
    # Either a backbone itself, or a model whose `base_model_prefix` names nothing (Llama 4's language model).
    parts = [part for part in inner.children() if isinstance(part, PreTrainedModel)]
    return parts[0] if len(parts) == 1 and inner.get_output_embeddings() is not None else inner


_ATTENTION_LAYER_TYPES = {"full_attention", *KEY_RANGE_OF_LAYER_TYPE}
_MASK_CREATORS = ("create_causal_mask", "create_sliding_window_causal_mask", "create_chunked_causal_mask")


def _check_model(backbone: PreTrainedModel) -> None:
    name, config = type(backbone).__name__, backbone.config.get_text_config()
    if config._attn_implementation != NAME:
        raise ValueError(
            f'share_prefixes needs attn_implementation="flashmask", {name} uses "{config._attn_implementation}": call '
            'model.set_attn_implementation("flashmask") first'
        )
    if any(getattr(module, "is_causal", True) is False for module in backbone.modules()):
        raise ValueError(f"share_prefixes needs a causal model; in {name} a token sees the ones after it")
    if backbone.config.is_encoder_decoder:
        raise ValueError(f"share_prefixes needs a decoder, {name} has an encoder as well")
    other_layers = set(getattr(config, "layer_types", None) or ()) - _ATTENTION_LAYER_TYPES
    convolutions = {type(module).__name__ for module in backbone.modules() if isinstance(module, nn.Conv1d)}
    if backbone._is_stateful or other_layers or convolutions:
        found = ", ".join(sorted(other_layers | convolutions)) or "a recurrent state"
        raise NotImplementedError(
            f"share_prefixes cannot share what goes from token to token other than by attention: {name} has {found}"
        )
    modules = [sys.modules[base.__module__] for base in type(backbone).__mro__ if issubclass(base, PreTrainedModel)]
    if not any(hasattr(module, creator) for module in modules for creator in _MASK_CREATORS):
        raise NotImplementedError(f"share_prefixes cannot give {name} a mask: it makes its own")


class _Traits(NamedTuple):
    """What a forward pass needs to know of a model.

    Attributes:
        arguments: names of the arguments of the forward method, in order.
        key_ranges: how many keys a query sees at most in layers that do not see all.
        has_relative_positions: whether attention depends on distances only.
    """

    arguments: tuple[str, ...]
    key_ranges: tuple[int, ...]
    has_relative_positions: bool


def _traits(backbone: PreTrainedModel) -> _Traits:
    config = backbone.config.get_text_config()
    limits = [getattr(config, limit, None) for limit in KEY_RANGE_OF_LAYER_TYPE.values()]
    rotary = [module for module in backbone.modules() if "Rotary" in type(module).__name__]
    # Some rotary embeddings change with the largest position, or from layer type to layer type.
    kinds = [getattr(module, "rope_type", "default") for module in rotary]
    names = {name for kind in kinds for name in (kind.values() if isinstance(kind, dict) else [kind])}
    return _Traits(
        arguments=tuple(inspect.signature(type(backbone).forward).parameters)[1:],
        key_ranges=tuple(limit for limit in limits if limit is not None),
        has_relative_positions=bool(rotary) and names.isdisjoint({"dynamic", "longrope"}),
    )


# Calls


def _can_share(arguments: dict[str, Any]) -> bool:
    """Whether this is a padded batch of token ids, seen for the first time."""
    input_ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
    return (
        arguments.get("past_key_values") is None
        and arguments.get("cache") is None  # its name since Transformers 5.24
        and not arguments.get("use_cache")
        and (input_ids is None or (input_ids.ndim == 2 and input_ids.shape[0] > 1))
        and (mask is None or (isinstance(mask, Tensor) and mask.ndim == 2))
    )


def _check_call(backbone: PreTrainedModel, arguments: dict[str, Any]) -> None:
    config = backbone.config.get_text_config()
    for flag in ("output_hidden_states", "output_router_logits"):
        given = arguments.get(flag)
        if given or (given is None and getattr(config, flag, False)):
            raise NotImplementedError(
                f"share_prefixes cannot honour `{flag}=True`: it would count shared tokens once and padding never"
            )
    for name, value in arguments.items():
        is_known = name in ("input_ids", "attention_mask", "position_ids") or "labels" in name
        if isinstance(value, Tensor) and value.ndim > 0 and not is_known:
            raise NotImplementedError(
                f"share_prefixes compares rows by their token ids and cannot tell where `{name}` differs; call the "
                "model without it, or without share_prefixes"
            )
    if arguments.get("input_ids") is None:
        raise NotImplementedError("share_prefixes compares rows by their token ids: pass `input_ids`")
    if backbone.training:
        dropped = next(filter(_drops, backbone.modules()), None)
        if dropped is not None:
            name = next(name for name, module in backbone.named_modules() if module is dropped)
            raise NotImplementedError(
                "share_prefixes cannot share tokens under dropout, which differs from row to row: set the one of "
                f"`{name}` ({type(dropped).__name__}) to 0"
            )


def _drops(module: nn.Module) -> bool:
    """Whether a module drops activations of its own, or with the function, whose probability is then an attribute."""
    if not module.training:
        return False
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    attributes = module.__dict__
    return any(isinstance(attributes.get(name), float) and attributes[name] > 0 for name in _DROPOUT_ATTRIBUTES)


_DROPOUT_ATTRIBUTES = ("dropout", "activation_dropout", "attention_dropout", "hidden_dropout")


def _position_ids(arguments: dict[str, Any], has_relative_positions: bool) -> Tensor | None:
    """The positions that the padded batch has, or None where counting from each row's first token is the same."""
    position_ids: Tensor | None = arguments.get("position_ids")
    if position_ids is None and not has_relative_positions:
        input_ids = arguments["input_ids"]
        return torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    if position_ids is not None and position_ids.ndim != 2:
        raise NotImplementedError(
            f"share_prefixes needs `position_ids` [B or 1, S], got {list(position_ids.shape)}: leave them out"
        )
    return position_ids
