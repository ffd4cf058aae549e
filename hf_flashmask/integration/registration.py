"""What is registered with Transformers, and what is wrapped in it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, masking_utils
from transformers.generation import utils as generation_utils
from transformers.utils import generic
from transformers.utils.import_utils import is_tracing

from flashmask_kernels.ops import share_in_graph

from .attention import flashmask_attention_forward
from .conversion import check_factories
from .mask import (
    _are_of_tokens,
    _find_documents,
    _is_marked,
    _is_square,
    _mask_of_keys,
    _send_tree,
    _tree_of_user,
    _unwrap_tree_for_compiler,
    flashmask_mask,
)
from .memo import _masks_of_users
from .name import NAME, is_misspelled, logger
from .predicate import wrap_is_flash, wrap_max_seqlen
from .support import _check_padding_mask, _check_support, _keeps_eager, _refuse_bounds_shared_by_layer_types
from .versions import warn_of_untested


def register() -> None:
    """Make `attn_implementation="flashmask"` known to Transformers. Importing hf_flashmask does it; again is harmless.

    Besides the two public registries, a few other functions are wrapped, because Transformers takes every name that
    contains "flash" for FlashAttention. The wrappers pass everything on unless the name is "flashmask", or resembles it
    and is no implementation.

    Raises:
        ImportError: when this Transformers does not have what is wrapped; the message names its version.
    """
    AttentionInterface.register(NAME, flashmask_attention_forward)
    AttentionMaskInterface.register(NAME, flashmask_mask)
    for owner, name, wrap in _WRAPPERS:
        original = getattr(owner, name, None)
        if original is None and name in _MISSING_IN_OLD_VERSIONS:
            continue
        if not callable(original):
            raise ImportError(
                f"hf_flashmask needs transformers >= 5.4; version {transformers.__version__} has no "
                f"`{owner.__name__}.{name}`. Please report it with this version number."
            )
        if not hasattr(original, _OURS):
            wrapper = functools.wraps(original)(wrap(original, owner.__name__))
            setattr(wrapper, _OURS, True)
            _replace(owner, name, original, wrapper)
    check_factories()
    warn_of_untested()


def _replace(owner: Any, name: str, original: Callable, wrapper: Callable) -> None:
    """Replace a function in its owner; where it is defined there, also in the modules that have imported it."""
    setattr(owner, name, wrapper)
    if original.__module__ == owner.__name__:
        for module in list(sys.modules.values()):
            if getattr(module, "__dict__", {}).get(name) is original:
                setattr(module, name, wrapper)


def _wrap_dispatch(original: Callable, _: str) -> Callable:
    """For `PreTrainedModel.get_correct_attn_implementation`, which all models and parts of models come through.

    It knows which models support Transformers' own implementations, and takes a custom one for every model.
    """

    def get_correct(self: PreTrainedModel, requested_attention: Any, *args: Any, **kwargs: Any) -> str:
        if is_misspelled(requested_attention):
            raise ValueError(
                f'attn_implementation={requested_attention!r} is not known. Did you mean attn_implementation="{NAME}"?'
            )
        if requested_attention == NAME:
            _check_support(self)
            if _keeps_eager(self):
                logger.warning_once(f"{type(self).__name__} supports only eager attention, and keeps it.")
                return "eager"
        implementation = original(self, requested_attention, *args, **kwargs)
        _import_when_unpickled(self, implementation)
        return implementation

    return get_correct


def _import_when_unpickled(model: PreTrainedModel, implementation: str) -> None:
    """Let pickles of a model refer to `register`. To load them, Python imports this module, which registers."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and part.config is model.config:
            if implementation == NAME:
                part.__dict__[_REGISTERED_BY] = register
            else:
                part.__dict__.pop(_REGISTERED_BY, None)


_REGISTERED_BY = "_registered_by"


def _wrap_preprocess(original: Callable, _: str) -> Callable:
    """Here, and nowhere else, one sees that the user gave one mask for all layers, and `position_ids` beside a cache.

    Transformers looks for packed documents only without a cache and without a 2-D mask, even of ones. Here they are
    always found, and take the place of the 2-D mask on the way to `flashmask_mask`.
    """

    def preprocess_mask_arguments(
        config: Any,
        inputs_embeds: Tensor,
        attention_mask: Any,
        past_key_values: Any = None,
        position_ids: Tensor | None = None,
        *args: Any,
        cache: Any = None,  # the name of `past_key_values` since Transformers 5.24
        **kwargs: Any,
    ) -> tuple:
        past_key_values = cache if past_key_values is None else past_key_values
        if config._attn_implementation != NAME:
            return original(config, inputs_embeds, attention_mask, past_key_values, position_ids, *args, **kwargs)
        if isinstance(attention_mask, dict):  # models with several types of layers take theirs before this
            raise TypeError(
                f"`attention_mask` is a dict of masks for {', '.join(map(repr, attention_mask))}, but all layers of "
                f"{config.model_type} see the same keys: pass the tensor itself"
            )
        attention_mask = _unwrap_tree_for_compiler(config, attention_mask)
        tree = _tree_of_user(config, attention_mask, position_ids)
        if tree is not None:
            _, _, _, *sizes = original(config, inputs_embeds, None, past_key_values, None, *args, **kwargs)
            return False, _send_tree(tree), None, *sizes
        arguments = original(config, inputs_embeds, attention_mask, past_key_values, None, *args, **kwargs)
        early_exit, mask, _, *sizes = arguments
        if early_exit and mask is not None and not _is_marked(mask):
            _refuse_bounds_shared_by_layer_types(config, mask)
            if not is_tracing(mask):
                _masks_of_users[mask] = True
        if early_exit and mask is not None and torch.compiler.is_compiling():
            mask = share_in_graph(mask.view(mask.shape))
        if not early_exit and mask is not None and _is_square(*sizes):
            _check_padding_mask(mask, *inputs_embeds.shape[:2])
        if not early_exit and _is_square(*sizes) and _are_of_tokens(position_ids, *inputs_embeds.shape[:2]):
            documents = _find_documents(position_ids, attention_mask, _mask_of_keys(mask, *sizes[1::2]))
            mask = documents.expand(inputs_embeds.shape[0], -1)
        return early_exit, mask, None, *sizes

    return preprocess_mask_arguments


_OURS = "_knows_flashmask"


_WRAPPERS = (
    (PreTrainedModel, "get_correct_attn_implementation", _wrap_dispatch),
    (masking_utils, "_preprocess_mask_arguments", _wrap_preprocess),
    # Two modules have an answer of their own; the third line is for all others.
    (masking_utils, "is_flash_attention_requested", wrap_is_flash),
    (generation_utils, "is_flash_attention_requested", wrap_is_flash),
    (generic, "is_flash_attention_requested", wrap_is_flash),
    (generic, "get_max_seqlen", wrap_max_seqlen),
)


_MISSING_IN_OLD_VERSIONS = {"get_max_seqlen"}
