"""What a mask knows, and the two objects in which it travels through Transformers.

    model(attention_mask, position_ids)            what the user gives: 2-D padding, bounds, a tree, positions
      -> `_preprocess_mask_arguments`, wrapped     `prepare` finds the documents and makes `Hints`
      -> `flashmask_mask`                          makes a `Mask` of the mask function and the hints
      -> attention layers                          `layer_mask` adds what only they are told, once for equal layers

Both are plain objects. Transformers and the engines around it pass such objects on untouched, where they copy, cast,
detach or rebuild tensors, dataclasses and named tuples: a subclass of `Tensor` loses what it knows under reentrant
checkpointing and cannot be made in a compiled graph, an attribute of a tensor is lost where tensors are copied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from .memo import Memo
from .whole_sequence import Exchange

__all__ = ["Hints", "Mask", "Place", "Tree", "register_tree"]


@dataclass
class Place:
    """Where the queries and keys of a call are in the sequence. A static cache gives `q_offset` as a 0-d tensor.

    No named tuple: the compiler of torch 2.9 does not trace their properties.
    """

    q_len: int
    kv_len: int
    q_offset: int | Tensor = 0
    kv_offset: int = 0

    @property
    def sizes(self) -> tuple[int, int, int | Tensor, int]:
        return self.q_len, self.kv_len, self.q_offset, self.kv_offset

    @property
    def is_square(self) -> bool:
        """Whether queries and keys are the same tokens. The offset of a static cache is not read to find out."""
        return self.q_len == self.kv_len and isinstance(self.q_offset, int) and self.q_offset == self.kv_offset == 0


class Tree(NamedTuple):
    """The prefix trees that the rows of a batch hold.

    Attributes:
        bounds: `[B, 1, 1, S]`, causal and LTS = end of the subtree.
        depth: `[B, S]`, the number of tokens before each one on its path from the root.
        end_depth: what no depth reaches, if known.
        max_branches: the largest number of leaves in one tree, if known.
    """

    bounds: Tensor
    depth: Tensor
    end_depth: int | None = None
    max_branches: int | None = None


class Mask:
    """A mask on its way from the mask function to the attention layers.

    It answers what Transformers asks of a mask: its four sizes, its dtype, `contiguous` and `to`.

    Attributes:
        bounds: int32 `[B or 1, H or 1, C, S_k]`. None stands for attention without a mask, as `is_causal` says.
            A mask of the user's may be dense instead, and is then converted by the layers.
        is_causal: without bounds, whether a query sees no key after its own position.
        is_final: nothing is added to it: neither documents nor windows. The masks of users are final.
        is_users: whether the model was called with it: models read that mask as weights of tokens as well.
        has_ranges: whether more than the causal triangle hides keys: windows, chunks, functions of users.
        has_documents: whether the documents that `position_ids` tell apart are in it.
        is_token: bool `[B, S_k]`, False for padding. None without padding.
        document_ids: numbers `[B, S_k]`, the 2-D mask, where its values may tell documents apart.
        document_ends: `[B or 1, S]`, for all tokens so far: past-the-last token of the document of each, as far as the
            mask function knows.
        position_ids: `[B or 1, S_q]`, which tell the documents among the queries beside a cache.
        place: of queries and keys; None in final masks, which no documents are added to.
        tree: the prefix tree that each layer narrows to its own window or chunk.
        exchange: how layers attend that hold a part of the sequence; the mask is that of the whole sequence.
        memo: what the layers share.
    """

    ndim = 4
    dtype = torch.int32

    def __init__(
        self,
        bounds: Tensor | None,
        *,
        kv_len: int,
        device: torch.device,
        is_causal: bool = False,
        is_final: bool = False,
        is_users: bool = False,
        has_ranges: bool = False,
        has_documents: bool = False,
        is_token: Tensor | None = None,
        document_ids: Tensor | None = None,
        document_ends: Tensor | None = None,
        position_ids: Tensor | None = None,
        place: Place | None = None,
        tree: Tree | None = None,
        exchange: Exchange | None = None,
    ) -> None:
        self.bounds, self.is_causal, self.is_final, self.is_users = bounds, is_causal, is_final, is_users
        self.has_ranges, self.has_documents, self.is_token, self.place, self.tree = (
            has_ranges,
            has_documents,
            is_token,
            place,
            tree,
        )
        self.shape = torch.Size((1, 1, 1, kv_len)) if bounds is None else bounds.shape
        self.device, self.document_ids = device, document_ids
        self.document_ends, self.position_ids = document_ends, position_ids
        self.exchange = exchange
        self.memo = Memo()
        self._moved: dict[torch.device, Mask] = {}

    @classmethod
    def of_user(cls, mask: Tensor, tree: Tree | None = None) -> Mask:
        return cls(mask, kv_len=mask.shape[-1], device=mask.device, is_final=True, is_users=True, tree=tree)

    def for_this_pass(self) -> Mask:
        """The same mask with a memo of its own: callers may hand one mask to several calls of a model."""
        return self._with(lambda part: part, self.device)

    def contiguous(self) -> Mask:
        return self

    def to(self, device: Any = None, *args: Any, **kwargs: Any) -> Mask:
        """The mask on another device, the same object for all layers there. Its dtype stays."""
        if not isinstance(device, (torch.device, str, int)):
            return self
        target = torch.empty(0, device=device).device
        if target == self.device:
            return self
        if target not in self._moved:
            self._moved[target] = self._with(lambda part: part.to(target, **kwargs), target)
        return self._moved[target]

    def _with(self, move: Callable[[Tensor], Tensor], device: torch.device) -> Mask:
        tree = self.tree
        return Mask(
            None if self.bounds is None else move(self.bounds),
            kv_len=self.shape[-1],
            device=device,
            is_causal=self.is_causal,
            is_final=self.is_final,
            is_users=self.is_users,
            has_ranges=self.has_ranges,
            has_documents=self.has_documents,
            is_token=None if self.is_token is None else move(self.is_token),
            document_ids=None if self.document_ids is None else move(self.document_ids),
            document_ends=None if self.document_ends is None else move(self.document_ends),
            position_ids=None if self.position_ids is None else move(self.position_ids),
            place=self.place,
            tree=None if tree is None else tree._replace(bounds=move(tree.bounds), depth=move(tree.depth)),
            exchange=self.exchange,
        )

    def __getitem__(self, index: Any) -> NoReturn:
        raise TypeError(
            'this model slices its mask as if it were dense, which attn_implementation="flashmask" does not make: use '
            '"sdpa" or "eager" for it'
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle, (
            {
                name: getattr(self, name)
                for name in (
                    "bounds",
                    "device",
                    "is_causal",
                    "is_final",
                    "is_users",
                    "has_ranges",
                    "has_documents",
                    "is_token",
                    "document_ids",
                    "document_ends",
                    "position_ids",
                )
            }
            | {"kv_len": self.shape[-1], "place": self.place, "tree": self.tree},
        )


def _unpickle(arguments: dict[str, Any]) -> Mask:
    return Mask(arguments.pop("bounds"), **arguments)


class Hints:
    """What the model was called with, in the place of the 2-D mask that Transformers hands to the mask function.

    It answers what the functions in between ask of a 2-D mask: its sizes, its device, and how much left padding there
    is, which nothing depends on where documents are known: 0.

    Attributes:
        is_token: bool `[B, S]`, False for padding, for all tokens so far. None without padding.
        document_ends: int32 `[B or 1, S]`, where queries and keys are the same tokens: past-the-last row of the
            document of each.
        position_ids: `[B or 1, S_q]`. Beside a cache the documents among the queries are not yet found.
        document_ids: numbers `[B, S]`, the 2-D mask, where its values may tell documents apart.
        ends_of_ids: int32 `[B, S]`, past-the-last token of the document of each token so far, by its values, where
            `document_ends` does not hold it.
        tree: the prefix tree of the row.
        exchange: where the tokens of the call are a part of the sequence that the hints describe.
        has_token_types: whether the model was called with token types of that sequence all the same.
    """

    ndim = 2

    def __init__(
        self,
        shape: tuple[int, int],
        device: torch.device,
        *,
        is_token: Tensor | None = None,
        document_ends: Tensor | None = None,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        ends_of_ids: Tensor | None = None,
        tree: Tree | None = None,
        exchange: Exchange | None = None,
        has_token_types: bool = False,
    ) -> None:
        self.exchange, self.has_token_types = exchange, has_token_types
        self.shape, self.device = torch.Size(shape), device
        self.is_token, self.document_ends, self.position_ids, self.tree = is_token, document_ends, position_ids, tree
        self.document_ids, self.ends_of_ids = document_ids, ends_of_ids

    def cumsum(self, dim: int) -> Tensor:
        if self.is_token is None or self.document_ends is not None:
            return torch.ones(self.shape, dtype=torch.int64, device=self.device)
        return self.is_token.cumsum(dim)

    @classmethod
    def __torch_function__(
        cls, function: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Tensor:
        if function is torch.zeros_like:
            return torch.zeros(args[0].shape, dtype=torch.int64, device=args[0].device)
        raise TypeError(f"{function} is not known to take the hints of a mask")


def register_tree(tree: Tree) -> Mask:
    """What to pass as `attention_mask`: every layer narrows the tree to its own window or chunk along the branches."""
    return Mask.of_user(tree.bounds, tree)
