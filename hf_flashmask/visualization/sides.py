"""What a drawing is told of the queries and of the keys: texts of tokens, documents, branches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any, NamedTuple, TypeAlias, TypeVar

from torch import Tensor

from ..bounds.form import check_per_position

_Texts: TypeAlias = Sequence[str] | Sequence[Sequence[str]] | None
_Ids: TypeAlias = Tensor | None
_Entry = TypeVar("_Entry", str, int)


class Side(NamedTuple):
    """What is known of the queries, or of the keys: a list for each batch row, or one for all."""

    tokens: list[list[str]] | None
    documents: list[list[int]] | None
    branches: list[list[int]] | None

    @classmethod
    def of(
        cls, prefix: str, dimension: str, lengths: Sequence[int], tokens: _Texts, documents: _Ids, branches: _Ids
    ) -> Side:
        """Checked against the lengths of all masks that are drawn. The options begin with `prefix` in messages."""
        side = cls(
            _texts_of_side(f"{prefix}tokens", tokens),
            _ids_of_side(f"{prefix}document_ids", documents),
            _ids_of_side(f"{prefix}branch_ids", branches),
        )
        given: Sequence[Sequence[Sequence[object]] | None] = side
        for name, lists in zip(("tokens", "document_ids", "branch_ids"), given):
            for values, length in product(lists or [], lengths):
                if len(values) != length:
                    raise ValueError(
                        f"`{prefix}{name}` has {len(values)} entries in a row, the mask has {dimension} = {length}"
                    )
        return side

    def row(self, batch: int, rows: int) -> RowOfSide:
        """What is known of one of the batch rows that the bounds have."""
        for lists in self:
            if lists is not None and len(lists) not in (1, rows):
                raise ValueError(
                    f"tokens, documents or branches are of {len(lists)} batch rows, the bounds of {rows}: give one"
                )
        return RowOfSide(
            _row_of_side(self.tokens, batch), _row_of_side(self.documents, batch), _row_of_side(self.branches, batch)
        )


class RowOfSide(NamedTuple):
    """What is known of the queries, or of the keys, of one batch row."""

    tokens: list[str] | None
    documents: list[int] | None
    branches: list[int] | None


def both_sides(
    sizes: Sequence[tuple[int, int]],
    *,
    tokens: _Texts,
    query_tokens: _Texts,
    document_ids: _Ids,
    query_document_ids: _Ids,
    branch_ids: _Ids,
    query_branch_ids: _Ids,
) -> tuple[Side, Side]:
    """The queries and the keys; what is not said of the queries is that of the keys, where there are as many.

    Args:
        sizes: S_q and S_k of each mask that is drawn.

    Raises:
        TypeError, ValueError: when tokens are no texts, ids are no integers `[B, S]` or `[S]`, or there are more or
            fewer than positions.
    """
    keys = Side.of("", "S_k", [kv_len for _, kv_len in sizes], tokens, document_ids, branch_ids)
    queries = Side.of(
        "query_", "S_q", [q_len for q_len, _ in sizes], query_tokens, query_document_ids, query_branch_ids
    )
    if any(q_len != kv_len for q_len, kv_len in sizes):
        return queries, keys
    completed = Side(
        queries.tokens or keys.tokens, queries.documents or keys.documents, queries.branches or keys.branches
    )
    return completed, keys


def _row_of_side(lists: list[list[_Entry]] | None, batch: int) -> list[_Entry] | None:
    return None if lists is None else lists[batch if len(lists) > 1 else 0]


def _texts_of_side(name: str, tokens: _Texts) -> list[list[str]] | None:
    if tokens is None:
        return None
    rows = [tokens] if _are_texts_of_tokens(tokens) else tokens
    for row in rows:
        if not _are_texts_of_tokens(row):
            raise TypeError(
                f"`{name}` must be texts, or a list of texts for each batch row, got {type(row).__name__} among them; "
                "of ids, tokenizer.decode(token) makes texts"
            )
    return [[str(token) for token in row] for row in rows]


def _are_texts_of_tokens(tokens: Any) -> bool:
    is_list = isinstance(tokens, Iterable) and not isinstance(tokens, (str, Tensor))
    return is_list and all(isinstance(token, str) for token in tokens)


def _ids_of_side(name: str, ids: _Ids) -> list[list[int]] | None:
    return None if ids is None else check_per_position(name, ids).tolist()
