"""Models that are called with rows of shared prompts: windows and chunks of their layers follow the branches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..integration import NAME, register_tree
from ..integration.conversion import Tree
from ..integration.support import has_key_ranges
from ..sharing.backbone import find_backbone


def unwrap_model(model: nn.Module) -> PreTrainedModel:
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


def follow_branches(base: PreTrainedModel) -> RemovableHandle:
    """Narrow the trees that the model is called with to the windows and chunks of its layers, until it is removed.

    Bounds that a user passes are final otherwise.
    """
    return find_backbone(base).register_forward_pre_hook(_narrow_trees, with_kwargs=True)


def _narrow_trees(
    backbone: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    mask, position_ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
    # A mask that another hook has narrowed has more planes than one, or is no tensor.
    if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[1:3] != (1, 1) or position_ids is None:
        return args, kwargs
    if not torch.compiler.is_compiling():
        return args, {**kwargs, "attention_mask": register_tree(Tree(mask, position_ids, end_depth=mask.shape[-1]))}
    _refuse_windows(backbone, mask)
    return args, kwargs


@torch.compiler.disable  # the compiler would catch the error and go on without the window
def _refuse_windows(backbone: PreTrainedModel, bounds: Tensor) -> None:
    if has_key_ranges(backbone.config.get_text_config(), bounds):
        raise NotImplementedError(
            "rows with shared prompts do not work under torch.compile for models with sliding windows or chunks that "
            f"are shorter than a row, here {bounds.shape[-1]} tokens: train without it"
        )
