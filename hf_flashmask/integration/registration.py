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

from .attention import flashmask_attention_forward
from .call_checks import check_calls
from .closures import check_factories
from .final_bounds import refuse_mask_as_array
from .mask_function import flashmask_mask, prepare
from .mrope import keep_documents_under_mrope
from .name import NAME, is_misspelled, logger
from .predicate import wrap_is_flash
from .refused_documents import refuse_documents_in_generation, refuse_ids_in_generation
from .support import check_support, keeps_eager
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
            check_support(self)
            if keeps_eager(self):
                logger.warning_once(f"{type(self).__name__} supports only eager attention, and keeps it.")
                return "eager"
        implementation = original(self, requested_attention, *args, **kwargs)
        _import_when_unpickled(self, implementation)
        keep_documents_under_mrope(self, implementation)
        check_calls(self, implementation)
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
    """Every function of `masking_utils` that makes a mask calls it first: `mask_function.prepare` says what for."""

    def preprocess_mask_arguments(
        config: Any, inputs_embeds: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
    ) -> tuple:
        if config._attn_implementation != NAME:
            return original(config, inputs_embeds, attention_mask, *args, **kwargs)
        refuse_mask_as_array(attention_mask)
        # The argument after the cache, whose name differs between versions. Transformers shall not read it.
        if len(args) > 1:
            cache, position_ids, *others = args
            args = cache, None, *others
        else:
            cache = args[0] if args else kwargs.get("cache", kwargs.get("past_key_values"))
            position_ids, kwargs["position_ids"] = kwargs.get("position_ids"), None
        of_encoder = args[3] if len(args) > 3 else kwargs.get("encoder_hidden_states")
        creator = None if torch.compiler.is_compiling() else sys._getframe(1).f_code

        def find_sizes(embeds: Tensor, mask: Tensor | None) -> tuple:
            return original(config, embeds, mask, *args, **kwargs)

        has_static_cache = getattr(cache, "is_compileable", False)
        return prepare(
            find_sizes,
            creator,
            config,
            inputs_embeds,
            attention_mask,
            position_ids,
            has_static_cache=has_static_cache,
            is_cross_attention=of_encoder is not None,
        )

    return preprocess_mask_arguments


def _wrap_generation(original: Callable, _: str) -> Callable:
    """For `GenerationMixin._validate_model_kwargs`, which `generate` calls with all that it was given."""

    def validate(self: Any, model_kwargs: dict[str, Any]) -> None:
        if getattr(self.config.get_text_config(decoder=True), "_attn_implementation", None) == NAME:
            is_encoder_decoder = self.config.is_encoder_decoder
            mask = model_kwargs.get("decoder_attention_mask" if is_encoder_decoder else "attention_mask")
            refuse_ids_in_generation(mask)
            if not is_encoder_decoder:
                refuse_documents_in_generation(model_kwargs.get("position_ids"), mask)
        original(self, model_kwargs)

    return validate


def _wrap_max_seqlen(original: Callable, _: str) -> Callable:
    """For `get_max_seqlen` of `transformers.utils.generic`, which asks the predicate on behalf of models."""

    def get_max_seqlen(
        cu_seqlens: Tensor, config: Any, kwargs: dict | None = None, kwarg_name: str = "max_seqlen"
    ) -> int | None:
        if config._attn_implementation != NAME:
            return original(cu_seqlens, config, kwargs, kwarg_name)
        return None if kwargs is None else kwargs.pop(kwarg_name, None)

    return get_max_seqlen


_OURS = "_knows_flashmask"


_WRAPPERS = (
    (PreTrainedModel, "get_correct_attn_implementation", _wrap_dispatch),
    (masking_utils, "_preprocess_mask_arguments", _wrap_preprocess),
    (generation_utils.GenerationMixin, "_validate_model_kwargs", _wrap_generation),
    # Two modules have an answer of their own; the third line is for all others.
    (masking_utils, "is_flash_attention_requested", wrap_is_flash),
    (generation_utils, "is_flash_attention_requested", wrap_is_flash),
    (generic, "is_flash_attention_requested", wrap_is_flash),
    (generic, "get_max_seqlen", _wrap_max_seqlen),
)


_MISSING_IN_OLD_VERSIONS = {"get_max_seqlen"}
