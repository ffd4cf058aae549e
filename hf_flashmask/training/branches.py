"""Models that are called with rows of shared prompts: windows and chunks of their layers follow the branches."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..integration import NAME, register_tree
from ..integration.layer_types import layer_types_have_key_ranges
from ..integration.mask import Tree
from ..sharing.backbone import check_backbone, find_backbone, refuse_prompt_learning
from ..sharing.traits import Traits


def unwrap_model_for_branches(model: nn.Module) -> PreTrainedModel:
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


def follow_branches(model: nn.Module, asking: str) -> RemovableHandle:
    """Narrow the trees that the model is called with to the windows and chunks of its layers, until it is removed.

    Bounds that a user passes are final otherwise. `asking` is who needs it, for the messages of errors.

    Raises:
        ValueError, NotImplementedError: for a model that computes something else for an answer in such a row than
            alone; there, or when it is called.
    """
    refuse_prompt_learning(model, asking)
    backbone = find_backbone(unwrap_model_for_branches(model), asking)
    check_backbone(backbone, asking)
    traits = Traits.of(backbone)
    check_branches_count_from_zero(backbone, traits, asking)
    hook = functools.partial(_narrow_trees_along_branches, longest_row=traits.packs_up_to)
    return backbone.register_forward_pre_hook(hook, with_kwargs=True)


def check_branches_count_from_zero(backbone: PreTrainedModel, traits: Traits, asking: str) -> None:
    if traits.counts_by_token_ids:
        raise NotImplementedError(
            f"{asking} counts positions from 0, but {type(backbone).__name__} counts them from the one after "
            "`padding_idx`: use a row for each sequence with this model"
        )


def check_length_of_branching_row(length: int, longest_row: float) -> None:
    if length > longest_row:
        raise ValueError(
            f"a row of the batch has {length} tokens, and this model scales scores by the column of a token from "
            f"{longest_row} on: set `max_length` to at most that"
        )


def _narrow_trees_along_branches(
    backbone: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], *, longest_row: float
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    mask, position_ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
    # A mask that another hook has narrowed has more planes than one, or is no tensor.
    if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[1:3] != (1, 1) or position_ids is None:
        return args, kwargs
    check_length_of_branching_row(mask.shape[-1], longest_row)
    if not torch.compiler.is_compiling():
        return args, {**kwargs, "attention_mask": register_tree(Tree(mask, position_ids, end_depth=mask.shape[-1]))}
    _refuse_windows_along_branches(backbone, mask)
    return args, kwargs


@torch.compiler.disable  # the compiler would catch the error and go on without the window
def _refuse_windows_along_branches(backbone: PreTrainedModel, bounds: Tensor) -> None:
    if layer_types_have_key_ranges(backbone.config.get_text_config(), bounds):
        raise NotImplementedError(
            "rows with shared prompts do not work under torch.compile for models with sliding windows or chunks that "
            f"are shorter than a row, here {bounds.shape[-1]} tokens: train without it"
        )
