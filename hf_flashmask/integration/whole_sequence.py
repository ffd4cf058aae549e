"""Calls of a model whose tokens are a part of a sequence: each rank of a group of GPUs holds another part.

The mask is that of the whole sequence on every rank, and is made where the model makes its masks: `WholeSequence` takes
the place of `attention_mask` and tells `prepare` what it is made of. An `Exchange` travels with the mask to the layers
and moves what attention needs between the ranks. Both belong to one batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol
from weakref import ref

from torch import Tensor, nn

if TYPE_CHECKING:
    from .layer_mask import LayerMask

__all__ = ["Exchange", "PartMarker", "WholeSequence", "mark_part", "refuse_part_alone", "unmark_part"]


class Exchange(Protocol):
    """How the ranks of a group attend together: a rank calls the kernels with what `bring` returns."""

    local_length: int
    """The tokens of a row that this rank holds."""
    length: int
    """The tokens of a row of the whole sequence."""
    takes_whole_rows: bool
    """Whether the model is called with all tokens of a row, and its text model cuts their embeddings."""
    layer_length: int
    """The tokens of a row that attention is called with: those of this rank, or all where an engine has moved them."""
    head_parts: int
    """Into how many parts an engine has shared the heads out, of which attention is called with one."""

    @property
    def rows(self) -> Tensor | slice:
        """Which tokens of a row this rank holds."""

    def mask_of_rank(self, mask: LayerMask, heads: int) -> LayerMask:
        """The part of the whole sequence's mask that this rank computes; `heads` of the query, those of all parts."""

    def bring(
        self, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """From the tokens of this rank to the queries, keys and values that it computes with."""

    def take_back(self, output: Tensor) -> Tensor:
        """From what this rank has computed to the tokens that it holds, `[B, H, S / ranks, D_v]`."""


class WholeSequence:
    """What a model that gets a part of each row is called with in the place of `attention_mask`.

    Attributes:
        mask: of the whole sequence: 2-D, bounds, or None.
        position_ids: `[B or 1, S]`, of the whole sequence, that tell its documents apart; None for one document.
        exchange: how its layers attend.
        has_token_types: whether the model is called with the token types of the whole sequence, of which it makes image
            blocks.
    """

    ndim = 4

    def __init__(
        self, mask: Tensor | None, position_ids: Tensor | None, exchange: Exchange, *, has_token_types: bool
    ) -> None:
        self.mask, self.position_ids, self.exchange = mask, position_ids, exchange
        self.has_token_types = has_token_types
        self._last: tuple[ref[Tensor], Tensor] | None = None

    def stand_in(self, inputs_embeds: Tensor) -> Tensor:
        """A tensor with the sizes of the whole sequence's embeddings, of which nothing else is read: it has no memory.

        The same one for all masks of a pass, by which they find what they share.
        """
        exchange = self.exchange
        is_whole = exchange.takes_whole_rows and inputs_embeds.shape[1] == exchange.length
        if inputs_embeds.shape[1] != exchange.local_length and not is_whole:
            raise ValueError(
                f"the model was called with rows of {inputs_embeds.shape[1]} tokens, but its `attention_mask` belongs "
                f"to a batch of which each rank holds {exchange.local_length}: call the model with all that "
                "`shard(batch)` returns"
            )
        if self._last is None or self._last[0]() is not inputs_embeds:
            batch, _, width = inputs_embeds.shape
            self._last = ref(inputs_embeds), inputs_embeds.new_empty(()).expand(batch, exchange.length, width)
        return self._last[1]

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"this model reads `attention_mask.{name}` itself, but the tokens of the whole sequence are on several "
            "ranks: it cannot be trained with sequence_parallel"
        )


class PartMarker:
    """Marks an attention layer whose calls are always a part of a sequence. Copies and pickles are not marked."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


_MARKER = "_is_sequence_parallel"


def mark_part(module: nn.Module, marker: PartMarker) -> None:
    module.__dict__[_MARKER] = marker


def unmark_part(module: nn.Module, marker: PartMarker) -> None:
    if module.__dict__.get(_MARKER) is marker:
        del module.__dict__[_MARKER]


def is_part(module: nn.Module) -> bool:
    return vars(module).get(_MARKER) is not None


def refuse_part_alone(module: nn.Module) -> None:
    """Raise when a layer of a sequence-parallel model is called without the mask of the whole sequence."""
    if is_part(module):
        raise ValueError(
            f"{type(module).__name__} is part of a model under sequence_parallel, but was not given the mask of the "
            "whole sequence: its tokens would attend only to those of the same rank. Call the model with "
            "`parallel.shard(batch)`, or switch it off with `parallel.remove()`. Trainer and accelerate do not call "
            "`shard`: use `keep_masks` with them, see docs/many_gpus.md"
        )


def stand_in_for_whole_sequence(heads_and_tokens: Tensor, exchange: Exchange) -> Tensor:
    """`[B, H, S, D]` with all heads and the whole sequence, from those of a layer; only its sizes are read."""
    batch, heads, _, dim = heads_and_tokens.shape
    one = heads_and_tokens.detach()[:, :1, :1]
    return one.expand(batch, heads * exchange.head_parts, exchange.length, dim)


def check_tokens_of_rank(exchange: Exchange, query: Tensor, key: Tensor) -> None:
    expected = exchange.layer_length
    if query.shape[2] != expected or key.shape[2] != expected:
        raise ValueError(
            f"the mask is that of {exchange.length} tokens, of which each rank holds {exchange.local_length}; a layer "
            f"should be called with {expected} of them, but was with {query.shape[2]} queries and {key.shape[2]} keys. "
            "sequence_parallel works neither with a cache of earlier tokens nor beside another engine that exchanges "
            "heads or gathers keys; keep_masks needs an engine that exchanges the heads of this layer"
        )
