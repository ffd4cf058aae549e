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

from .attention import flashmask_attention_forward
from .mask_function import flashmask_mask, prepare
from .mrope import keep_documents
from .name import NAME, logger
from .support import (
    _PARTS_THAT_KEEP_EAGER,
    _family_of,
    _reason_against,
    _supports_more_than_eager,
)


def register() -> None:
    """Make `attn_implementation="flashmask"` known to Transformers. Importing hf_flashmask does it; again is harmless.

    Besides the two public registries, three private functions are wrapped, because Transformers takes every name that
    contains "flash" for FlashAttention. The wrappers pass everything on unless the name is exactly "flashmask".

    Raises:
        ImportError: when this Transformers does not have what is wrapped; the message names its version.
    """
    AttentionInterface.register(NAME, flashmask_attention_forward)
    AttentionMaskInterface.register(NAME, flashmask_mask)
    for owner, name, wrap in _WRAPPERS:
        original = getattr(owner, name, None)
        if not callable(original):
            raise ImportError(
                f"hf_flashmask needs transformers >= 5.4; version {transformers.__version__} has no "
                f"`{owner.__name__}.{name}`. Please report it with this version number."
            )
        if not hasattr(original, _OURS):
            wrapper = functools.wraps(original)(wrap(original))
            setattr(wrapper, _OURS, True)
            setattr(owner, name, wrapper)


def _wrap_check(original: Callable) -> Callable:
    """FlashAttention's checks would import a package called flashmask, or swap the name for another implementation."""

    def check_and_adjust(self: PreTrainedModel, attn_implementation: Any, *args: Any, **kwargs: Any) -> str:
        if attn_implementation == NAME:
            return self.get_correct_attn_implementation(NAME)
        return original(self, attn_implementation, *args, **kwargs)

    return check_and_adjust


def _wrap_dispatch(original: Callable) -> Callable:
    """Transformers asks no model whether it supports a custom implementation."""

    def get_correct(self: PreTrainedModel, requested_attention: Any, *args: Any, **kwargs: Any) -> str:
        if requested_attention != NAME:
            return original(self, requested_attention, *args, **kwargs)
        reason = _reason_against(self)
        if reason is not None:
            others = '"sdpa" or "eager"' if self._supports_sdpa else '"eager"'
            raise ValueError(
                f'{type(self).__name__} does not work with attn_implementation="flashmask": {reason}. Use {others} for '
                "it; in a composite model the other parts can still use flashmask, as in "
                'attn_implementation={"": "eager", "text_config": "flashmask"}.'
            )
        supports_less = _supports_more_than_eager(_family_of(type(self))) and not _supports_more_than_eager(type(self))
        if supports_less or self.config.model_type in _PARTS_THAT_KEEP_EAGER:
            # The audio encoder of Gemma 4, for example.
            logger.warning_once(f"{type(self).__name__} supports only eager attention, and keeps it.")
            return "eager"
        keep_documents(self)
        return original(self, requested_attention, *args, **kwargs)

    return get_correct


def _wrap_is_flash(original: Callable) -> Callable:
    """`masking_utils` refuses chunked masks (Llama 4) for FlashAttention; bounds hold them."""

    def is_flash_attention_requested(config: Any = None, *args: Any, **kwargs: Any) -> bool:
        if config is not None and config._attn_implementation == NAME:
            return False
        return original(config, *args, **kwargs)

    return is_flash_attention_requested


def _wrap_preprocess(original: Callable) -> Callable:
    """Every function of `masking_utils` that makes a mask calls it first: `mask_function.prepare` says what for."""

    def preprocess_mask_arguments(
        config: Any, inputs_embeds: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
    ) -> tuple:
        if config._attn_implementation != NAME:
            return original(config, inputs_embeds, attention_mask, *args, **kwargs)
        # The argument after the cache, whose name differs between versions. Transformers shall not read it.
        if len(args) > 1:
            cache, position_ids, *others = args
            args = cache, None, *others
        else:
            position_ids, kwargs["position_ids"] = kwargs.get("position_ids"), None
        creator = None if torch.compiler.is_compiling() else sys._getframe(1).f_code

        def find_sizes(mask: Tensor | None) -> tuple:
            return original(config, inputs_embeds, mask, *args, **kwargs)

        return prepare(find_sizes, creator, config, inputs_embeds, attention_mask, position_ids)

    return preprocess_mask_arguments


_OURS = "_knows_flashmask"


_WRAPPERS = (
    (PreTrainedModel, "_check_and_adjust_attn_implementation", _wrap_check),
    (PreTrainedModel, "get_correct_attn_implementation", _wrap_dispatch),
    (masking_utils, "is_flash_attention_requested", _wrap_is_flash),
    (masking_utils, "_preprocess_mask_arguments", _wrap_preprocess),
)
