"""What is said once about bounds that users pass: they are final, and hold documents only if the user put them in."""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from transformers.utils.import_utils import is_tracing

from .. import bounds as _bounds
from .documents import are_of_tokens
from .name import logger

__all__ = ["warn_of_meeting_documents"]

_MOST_STARTS = 64
"""Documents that are looked at in a call. All of them leak, or none does, if bounds and positions do not match."""

_seen: WeakValueDictionary[int, Any] = WeakValueDictionary()
"""Configurations of models whose calls were looked at: reading a value from a GPU in every step would slow it down."""


def warn_of_meeting_documents(config: Any, bounds: Tensor, position_ids: Tensor | None) -> None:
    """Warn once where positions restart and the bounds of a user's let the new document see an earlier one.

    The positions of prefix trees restart as well, at every branch: there a token sees earlier ones at lower positions
    only, those of its own path. On a GPU the first call of each model is looked at.

    Args:
        bounds: int32 `[B or 1, H or 1, C, S_k]`.
        position_ids: what the model was called with.
    """
    length = bounds.shape[-1]
    if bounds.dtype != torch.int32 or bounds.ndim != 4 or is_tracing(bounds) or position_ids is None:
        return
    if not are_of_tokens(position_ids, position_ids.shape[0], length) or position_ids.device != bounds.device:
        return
    if bounds.is_cuda and (id(config) in _seen or torch.cuda.is_current_stream_capturing()):
        return
    _seen[id(config)] = config
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
