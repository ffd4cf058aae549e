"""Packed documents that a call cannot keep apart: by ids, by lengths or by positions, where these do not work."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import bounds as _bounds
from .documents import are_ids, document_ids_of_call
from .mask import Place
from .reading import read_and_refuse

__all__ = [
    "refuse_documents_in_generation",
    "refuse_dropped_lengths",
    "refuse_fractions_as_ids",
    "refuse_ids_as_factors",
    "refuse_ids_as_weights",
    "refuse_ids_in_generation",
    "refuse_lengths_beside_cache",
]


def refuse_lengths_beside_cache(place: Place) -> None:
    """Refuse `cu_seq_lens_q` alone where keys are in a cache: it does not say whose they are.

    Raises:
        NotImplementedError: in a graph it is an assertion on the device.
    """
    if not isinstance(place.q_offset, int) or place.q_offset > 0:
        read_and_refuse(
            torch.as_tensor(place.q_offset) > 0,
            "`cu_seq_lens_q` does not say which document the keys in the cache belong to: pass `cu_seq_lens_k` with "
            "the lengths of all keys, or `position_ids` alone",
        )


def refuse_ids_as_factors(ids: Tensor, model_type: str) -> None:
    """Refuse ids in a model that computes with the numbers of the 2-D mask."""
    read_and_refuse(
        are_ids(ids),
        f"`attention_mask` holds document ids, and {model_type} computes with the mask (multiplies states by it, or "
        "adds it up to positions): pass a mask of 0 and 1, and `position_ids` that restart with every document",
    )


def refuse_dropped_lengths(lengths: Tensor, position_ids: Tensor | None, model_type: str) -> None:
    """Refuse `cu_seq_lens_q` in a model that does not hand it on, unless positions tell the same documents apart."""
    reason = (
        f"`cu_seq_lens_q` does not reach the attention of {model_type}, whose documents would see each other: pass "
        "`position_ids` [B, S] that restart with every document"
    )
    if position_ids is None:
        raise NotImplementedError(reason)
    by_lengths = _bounds.from_cu_seqlens(lengths, position_ids.shape[-1])[:, 0, 0]
    read_and_refuse(_bounds.document_ends(position_ids) > by_lengths, reason)


def refuse_fractions_as_ids(attention_mask: Tensor) -> None:
    """Refuse a 2-D mask of floats that holds more than 0 and 1.

    Prompt learning of PEFT puts ones of floats before the mask, which makes floats of ids: its virtual tokens, which
    are for all documents, would belong to one of them. Others may mean weights, or what is added to the scores.
    """
    if attention_mask.is_floating_point():
        read_and_refuse(
            are_ids(attention_mask),
            "`attention_mask` [B, S] is of floats and holds more than 0 and 1: ids of documents are integers. Prompt "
            "learning of PEFT (prompt tuning, prefix tuning) makes floats of them, and gives the virtual tokens to one "
            "document alone: use an adapter of another kind (for example LoRA), or give each document a row of the "
            "batch, with a mask of 0 and 1",
        )


def refuse_ids_as_weights(ids: Tensor) -> None:
    """Refuse ids where a model reads the 2-D mask as the weights of tokens in the losses of its routers."""
    read_and_refuse(
        are_ids(ids),
        "`attention_mask` holds document ids, and `output_router_logits=True` would weigh tokens by them in the "
        "auxiliary loss: set it to False, or pass a mask of 0 and 1, and `position_ids` that restart with every "
        "document",
    )


def refuse_ids_in_generation(attention_mask: Any) -> None:
    """Refuse ids in a mask that `generate` appends 1 to, and adds up to count positions."""
    ids = document_ids_of_call(attention_mask, attention_mask.device) if isinstance(attention_mask, Tensor) else None
    if ids is not None:
        read_and_refuse(
            are_ids(ids),
            "`attention_mask` holds document ids, and generate appends 1 to it, and adds it up to count positions: "
            "give each prompt a row of the batch, with a mask of 0 and 1; in a loop of your own append the id of the "
            "document that goes on",
        )


def refuse_documents_in_generation(position_ids: Any, attention_mask: Any) -> None:
    """Refuse positions of several documents: new tokens would see all of them, as nothing tells in a step of one token.

    Args:
        position_ids: `[B or 1, S]`, or `[4, B or 1, S]`, of which the first plane counts tokens. Others pass.
        attention_mask: the 2-D mask of all tokens so far. Without it, padding on the left may have the position of the
            first token.
    """
    if isinstance(position_ids, Tensor) and position_ids.ndim == 3 and position_ids.shape[0] == 4:
        position_ids = position_ids[0]
    if not isinstance(position_ids, Tensor) or position_ids.ndim != 2:
        return
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        is_token = attention_mask[:, attention_mask.shape[1] - position_ids.shape[1] :].bool()
        ends, first = _bounds.document_ends(position_ids.to(is_token.device), is_token), is_token.byte().argmax(1, True)
        row = torch.arange(1, ends.shape[1], device=ends.device)
        restarts = (ends[:, :-1] == row) & (row > first) & is_token[:, 1:]
    else:
        restarts = position_ids[:, 1:] < position_ids[:, :-1]
    read_and_refuse(
        restarts,
        "`position_ids` pack several documents into a row, and the tokens that generate appends would see all of them: "
        "give each prompt a row of the batch, padded on the left, with an `attention_mask` of 0 and 1",
    )
