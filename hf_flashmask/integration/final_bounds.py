"""What is said about bounds that users pass: they are final, and mean what the user put in, in the place it is for."""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

import numpy
import torch
import transformers
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from .. import bounds as _bounds
from .documents import positions_tell_documents
from .layer_types import layer_types_have_key_ranges
from .name import logger
from .reading import may_be_read

__all__ = [
    "refuse_bounds_of_encoder",
    "refuse_bounds_shared_by_layer_types",
    "refuse_mask_as_array",
    "refuse_mask_of_flex_attention",
    "warn_of_meeting_documents",
]

_MOST_STARTS = 64
"""Documents that are looked at in a call. All of them leak, or none does, if bounds and positions do not match."""

_looked_at: WeakValueDictionary[int, Any] = WeakValueDictionary()
"""Configurations of models whose calls were looked at: reading a value from a GPU in every step would slow it down."""


_of_self_attention: WeakValueDictionary[int, Tensor] = WeakValueDictionary()
"""The bounds that models were called with for attention within one sequence, as long as they exist."""


def refuse_bounds_of_encoder(mask: Tensor, num_rows: int, *, is_cross_attention: bool) -> None:
    """Models with an encoder and a decoder use one `attention_mask` in the encoder and in cross-attention.

    Bounds count the rows of one of them, unless both have as many. Between 2-D masks there is no such difference.

    Raises:
        ValueError: for cross-attention under the tensor that the encoder was called with.
    """
    if torch.compiler.is_compiling():
        return
    if not is_cross_attention:
        _of_self_attention[id(mask)] = mask
    elif id(mask) in _of_self_attention and num_rows != mask.shape[-1]:
        raise ValueError(
            "`attention_mask` holds bounds of the encoder, but the model also uses them in cross-attention, where rows "
            "are the tokens of the decoder: run the encoder by itself with them, and pass `encoder_outputs` and, as "
            "`attention_mask`, bounds [B or 1, 1, C, S_encoder] whose rows are those of the decoder, or a 2-D mask. "
            "Bounds that are right for both are passed as a copy"
        )


def _layers_see_different_keys(config: transformers.PreTrainedConfig, bounds: Tensor) -> bool:
    """Whether one tensor of final bounds for full and windowed layers would silently widen the windows."""
    return len(set(getattr(config, "layer_types", None) or ())) > 1 and layer_types_have_key_ranges(config, bounds)


def refuse_bounds_shared_by_layer_types(config: transformers.PreTrainedConfig, bounds: Tensor) -> None:
    if _layers_see_different_keys(config, bounds):
        raise ValueError(
            "`attention_mask` is one tensor of bounds, but this model has layers that see different keys: pass a dict "
            f"with bounds for each of its layer types, {sorted(set(config.layer_types))}, or, for prefix trees (bounds "
            "[B, 1, 1, S_k]) outside of torch.compile, `position_ids` [B or 1, S] that count along the branches, if "
            "the model hands them to its mask functions"
        )


def refuse_mask_as_array(mask: Any) -> None:
    if isinstance(mask, (numpy.ndarray, list, tuple)):
        raise TypeError(
            f"`attention_mask` is a {type(mask).__name__}, not a tensor: pass torch.as_tensor(mask); bounds "
            "[B or 1, H or 1, C, S_k] are int32"
        )


def refuse_mask_of_flex_attention(mask: Any) -> None:
    if callable(mask) or isinstance(mask, BlockMask):
        raise TypeError(
            f"`attention_mask` is a {type(mask).__name__}, as FlexAttention takes it: convert it once with "
            "bounds.from_mask_mod, and pass the bounds"
        )


def warn_of_meeting_documents(config: Any, bounds: Tensor, position_ids: Tensor | None) -> None:
    """Warn once where positions restart and the bounds of a user's let the new document see an earlier one.

    The positions of prefix trees restart as well, at every branch: there a token sees earlier ones at lower positions
    only, those of its own path. On a GPU the first call of each model is looked at.

    Args:
        bounds: int32 `[B or 1, H or 1, C, S_k]`.
        position_ids: what the model was called with.
    """
    length = bounds.shape[-1]
    if bounds.dtype != torch.int32 or bounds.ndim != 4 or not may_be_read(bounds) or position_ids is None:
        return
    if (
        not positions_tell_documents(position_ids, position_ids.shape[0], length)
        or position_ids.device != bounds.device
    ):
        return
    if bounds.is_cuda and id(config) in _looked_at:
        return
    _looked_at[id(config)] = config
    row = _first_row_that_sees_another_document(bounds, position_ids)
    if row is not None:
        logger.warning_once(
            f"`attention_mask` holds bounds, which are final, and they let documents meet: `position_ids` restart at "
            f"row {row}, which sees tokens before it. If that is not meant, pass bounds.intersect(attention_mask, "
            "bounds.from_position_ids(position_ids))."
        )


def _first_row_that_sees_another_document(bounds: Tensor, position_ids: Tensor) -> int | None:
    length = bounds.shape[-1]
    ends = _bounds.document_ends(position_ids)
    row = torch.arange(length, device=bounds.device)
    batch, start = (ends[:, :-1] == row[1:]).nonzero(as_tuple=True)
    if not len(batch):
        return None
    chosen = torch.arange(0, len(batch), -(-len(batch) // _MOST_STARTS), device=bounds.device)
    batch, start = batch[chosen], start[chosen] + 1
    masks = bounds if bounds.shape[0] == 1 else bounds[batch if position_ids.shape[0] > 1 else start * 0]
    planes, at = masks[:, 0], start[:, None]
    if planes.shape[1] == 1:
        hidden = planes[:, 0] <= at
    elif planes.shape[1] == 2:
        hidden = (planes[:, 0] <= at) | (planes[:, 1] > at)
    else:
        hidden = ((planes[:, 0::2] <= at[:, None]) & (planes[:, 1::2] > at[:, None])).any(1)
    position = position_ids[batch if position_ids.shape[0] > 1 else batch * 0]
    meets = ~hidden & (row < at) & (position >= position.gather(1, at))
    rows = start[meets.any(1)]
    return int(rows[0]) if len(rows) else None
