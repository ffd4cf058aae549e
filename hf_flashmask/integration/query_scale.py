"""Llama 4 scales the queries of some layers by their column in the row. In packed rows it should be the one in the
document, and with padding on the left the one behind it.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from .documents import Documents, first_columns_of_documents
from .layer_mask import LayerMask
from .mask import Mask

__all__ = ["scale_by_document", "scales_by_column"]


def scales_by_column(module: nn.Module) -> bool:
    """Whether the queries of an attention layer come to it scaled by their column (`attn_temperature_tuning`)."""
    settings = module.__dict__  # `getattr` takes ten times as long where there is none
    return bool(settings.get("attn_temperature_tuning")) and not settings.get("use_rope", True)


def scale_by_document(
    module: nn.Module, query: Tensor, mask: Mask | Tensor | None, documents: Documents | None, shared: LayerMask
) -> Tensor:
    """The queries as Llama 4 scales them where each document is alone.

    From `floor_scale` columns on, that is by `1 + attn_scale * log(1 + floor((column + 1) / floor_scale))`
    (arXiv 2501.19399). The factors of equal columns cancel out exactly. Bounds of users do not tell documents: under
    them the scale stays that of the columns.

    Args:
        module: the layer, one that `scales_by_column`.
        query: `[B, H, S_q, D]`.
        mask, documents: what the layer was told.
        shared: what is made of both, once for equal layers.
    """
    place = mask.place if isinstance(mask, Mask) else None
    settings = cast(Any, module)
    floor, strength = settings.floor_scale, settings.attn_scale
    # A graph is not to be one of short rows alone.
    if place is None or (place.kv_len < floor and not torch.compiler.is_compiling()):
        return query

    def scale(column: Tensor) -> Tensor:
        return torch.log1p(torch.floor((column.float() + 1) / floor)) * strength + 1

    def factor() -> Tensor | None:
        first = first_columns_of_documents(mask, documents, place.q_len)
        if first is None:
            return None
        column = torch.arange(place.q_len, device=query.device) + place.q_offset
        return (scale(column - first) / scale(column))[:, None, :, None]

    factors = shared.once(("scale of queries", floor, strength), factor)
    return query if factors is None else (query * factors).to(query.dtype)
