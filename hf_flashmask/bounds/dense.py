"""Bounds from a mask that is given pair by pair: a dense tensor, tiles of it, a function of query and key."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from torch.nn.attention.flex_attention import BlockMask
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .algebra import fewest_planes
from .form import MAX_INTERVALS, TooManyIntervalsError, check_q_len_and_kv_len, dtype_or_type

MaskMod: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

PAIRS_OF_A_TILE = 2**22
"""Number of pairs of a query and a key that are evaluated at once."""


def from_dense(mask: Tensor) -> Tensor:
    """A dense mask as the fewest planes that say the same. Exact; waits for the device; O(S_q x S_k) memory.

    Args:
        mask: bool `[S_q, S_k]` or `[B or 1, H or 1, S_q, S_k]`, True = visible.

    Returns:
        int32 `[B or 1, H or 1, C, S_k]`.

    Raises:
        TypeError: when `mask` is not a bool tensor.
        ValueError: when it has another shape.
        TooManyIntervalsError: when a column needs more than `MAX_INTERVALS` hidden intervals; the message names the
            first.

    >>> from_dense(torch.ones(3, 3, dtype=torch.bool).tril()).tolist()
    [[[[3, 3, 3]]]]
    """
    if dtype_or_type(mask) != torch.bool:
        raise TypeError(
            f"`mask` must be a bool tensor with True = visible, got {dtype_or_type(mask)}; for an additive mask of 0 "
            "and -inf pass `mask == 0`"
        )
    if mask.ndim not in (2, 4):
        raise ValueError(f"`mask` must be [S_q, S_k] or [B or 1, H or 1, S_q, S_k], got shape {list(mask.shape)}")
    if mask.ndim == 2:
        mask = mask[None, None]
    return from_tiles([mask])


def from_tiles(tiles: Iterable[Tensor]) -> Tensor:
    """`from_dense` for a mask that comes in tiles of columns. O(S_q x tile) memory; waits once for the device.

    Args:
        tiles: one or more bool tensors `[B or 1, H or 1, S_q, columns]`, from the first column to the last.

    Returns:
        int32 `[B or 1, H or 1, C, S_k]`, S_k being the number of all columns.

    Raises:
        ValueError: when there is no tile, or tiles are of another type or shape.
        TooManyIntervalsError: when a column needs more than `MAX_INTERVALS` hidden intervals; the message names the
            first.
    """
    edges, counts = [], []
    shape: list[int] = []
    for visible in tiles:
        shape = shape or [*visible.shape[:-1]]
        if dtype_or_type(visible) != torch.bool or visible.ndim != 4 or [*visible.shape[:3]] != shape:
            raise ValueError(
                "`tiles` must be bool tensors [B or 1, H or 1, S_q, columns] that agree in all but the columns, got "
                f"{dtype_or_type(visible)} {list(visible.shape)}"
            )
        q_len = visible.shape[2]
        hidden = torch.nn.functional.pad(~visible.transpose(2, 3), (1, 1), value=False)
        # The k-th edge of a hidden interval lies where the number of edges reaches k. One interval too many is kept.
        count = (hidden[..., 1:] != hidden[..., :-1]).cumsum(-1, dtype=torch.int32)
        wanted = torch.arange(1, 2 * MAX_INTERVALS + 3, dtype=torch.int32, device=visible.device)
        wanted = wanted.expand(*count.shape[:3], -1).contiguous()
        edges.append(torch.searchsorted(count, wanted, out_int32=True))
        counts.append(count[..., -1])
    if not edges:
        raise ValueError("`tiles` holds no tile: from_tiles() needs at least one")
    start, end = torch.cat(edges, dim=2).transpose(2, 3).unflatten(2, (-1, 2)).unbind(3)
    bounds = fewest_planes(start, end, q_len)
    if bounds.shape[2] > 2 * MAX_INTERVALS:
        intervals = torch.cat(counts, dim=2) // 2
        batch, head, column = (intervals > MAX_INTERVALS).nonzero()[0].tolist()
        raise TooManyIntervalsError(
            f"key column {column} (batch {batch}, head {head}) needs {int(intervals[batch, head, column])} hidden "
            f"intervals; bounds hold at most {MAX_INTERVALS}. Use attn_implementation='sdpa' for such a mask"
        )
    return bounds


def from_mask_mod(
    mask_mod: MaskMod | BlockMask,
    q_len: int | None = None,
    kv_len: int | None = None,
    *,
    batch_size: int | None = None,
    num_heads: int | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """A `mask_mod` of FlexAttention, or a `BlockMask`, as the fewest planes that say the same. Exact.

    The function is evaluated for all pairs, in tiles of keys: O(S_q x S_k) time, O(S_q + S_k) memory. It waits once for
    the device, and cannot be traced. Constructors that know the mask need neither.

    Args:
        mask_mod: a function of `(batch, head, query, key)`, 0-d integer tensors, that returns a bool: True = visible.
            A `BlockMask` brings its lengths, its device, and its numbers of batch rows and heads. As in FlexAttention,
            its function decides in partial blocks only.
        q_len, kv_len: S_q and S_k; S_k is S_q by default. Not to be given with a `BlockMask`.
        batch_size, num_heads: B and H; needed where the function computes with its first or second argument, unless a
            `BlockMask` has more than 1 of them. Default: 1.
        device: where the function is evaluated, and the bounds are made: where the tensors are that it looks up. Not to
            be given with a `BlockMask`.

    Returns:
        int32 `[B, H, C, S_k]`.

    Raises:
        TypeError: for `q_len` or `device` beside a `BlockMask`, a function without `q_len`, or what is neither; for a
            function of other arguments, or one that returns something else.
        ValueError: when a length is negative; `batch_size` or `num_heads` is needed, or not that of the `BlockMask`; or
            the function reads the value of an argument, as `if`, `and` and `.item()` do, or, on the CPU, looks beyond
            the end of a tensor.
        TooManyIntervalsError: when a key needs more than `MAX_INTERVALS` hidden intervals; the message names the first.

    >>> from_mask_mod(lambda batch, head, query, key: (query >= key) & (query - key < 2), 5).tolist()
    [[[[2, 3, 4, 5, 5]]]]
    """
    block_mask = mask_mod if isinstance(mask_mod, BlockMask) else None
    if block_mask is not None:
        if q_len is not None or kv_len is not None or device is not None:
            raise TypeError("a `BlockMask` brings `q_len`, `kv_len` and `device`, leave them out")
        q_len, kv_len = block_mask.seq_lengths
        device = block_mask.kv_num_blocks.device
    function: object = mask_mod if block_mask is None else block_mask.mask_mod
    if not callable(function):
        raise TypeError(
            f"`mask_mod` must be a function or a `BlockMask`, got {type(function).__name__}; bounds.from_dense takes a "
            "dense mask"
        )
    _check_arguments_of_mask_mod(function)
    if q_len is None:
        raise TypeError("`q_len` must be given with a `mask_mod`")
    kv_len = q_len if kv_len is None else kv_len
    check_q_len_and_kv_len(q_len, kv_len)
    own_sizes = (1, 1) if block_mask is None else block_mask.kv_num_blocks.shape[:2]
    sizes = [own if given is None else given for given, own in zip((batch_size, num_heads), own_sizes)]
    if block_mask is not None and any(own not in (1, size) for own, size in zip(own_sizes, sizes)):
        raise ValueError(
            f"`batch_size` and `num_heads` must be those of the `BlockMask`, {own_sizes[0]} and {own_sizes[1]}, or any "
            f"number where it has 1, got {sizes[0]} and {sizes[1]}"
        )
    if q_len == 0 or kv_len == 0:
        return torch.zeros(*sizes, 1, kv_len, dtype=torch.int32, device=device)
    are_known = [given is not None or own > 1 for given, own in zip((batch_size, num_heads), own_sizes)]
    visible = _watch_mask_mod(function, *are_known)
    if block_mask is not None:
        visible = _as_flex_attention_reads(block_mask, visible, *sizes)
    batch, head, query, key = (torch.arange(count, device=device) for count in (*sizes, q_len, kv_len))
    return from_tiles(evaluate_in_tiles(_mask_mod_with_clear_errors(visible, q_len, kv_len), batch, head, query, key))


_OF_ALL_VALUES = {getattr(Tensor, name).__get__ for name in ("device", "dtype", "ndim", "shape")}


class _WatchMaskMod(TorchFunctionMode):
    """Refuse to compute with some arguments: `refused` are these, their names, and the name of what says how many."""

    def __init__(self, refused: Sequence[tuple[Tensor, str, str]]) -> None:
        super().__init__()
        self.refused = refused

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _OF_ALL_VALUES and not func.__name__.startswith("new_") and not func.__name__.endswith("_like"):
            leaves = tree_leaves((args, kwargs))
            for tensor, argument, needed in self.refused:
                if any(leaf is tensor for leaf in leaves):
                    raise ValueError(
                        f"`mask_mod` computes with its argument `{argument}`, and nothing says how many there are: "
                        f"pass `{needed}`, that of the attention call (1 for one mask that serves all)"
                    )
        return func(*args, **kwargs)


def _watch_mask_mod(mask_mod: MaskMod, is_batch_known: bool, is_heads_known: bool) -> MaskMod:
    """The function, which raises where it computes with `batch` or `head` and their number is not known."""
    if is_batch_known and is_heads_known:
        return mask_mod

    @functools.wraps(mask_mod)
    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        refused = [] if is_batch_known else [(batch, "batch", "batch_size")]
        refused += [] if is_heads_known else [(head, "head", "num_heads")]
        with _WatchMaskMod(refused):
            return mask_mod(batch, head, query, key)

    return visible


def _check_arguments_of_mask_mod(mask_mod: Callable) -> None:
    try:
        signature = inspect.signature(mask_mod)
    except ValueError:  # of a builtin
        return
    try:
        signature.bind(*"bhqk")
    except TypeError:
        raise TypeError(
            f"`mask_mod` must be a function of `(batch, head, query, key)`, got one of `{signature}`; name those that "
            "it does not need too, and bind others with functools.partial"
        ) from None


def _mask_mod_with_clear_errors(mask_mod: MaskMod, q_len: int, kv_len: int) -> MaskMod:
    @functools.wraps(mask_mod)
    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        try:
            result: object = mask_mod(batch, head, query, key)
        except IndexError as error:
            raise ValueError(
                f"`mask_mod` is asked for queries below `q_len` = {q_len} and keys below `kv_len` = {kv_len}, and "
                f"looks beyond the end of a tensor: {error}. Pass the lengths of what it looks up, or pad that"
            ) from error
        except RuntimeError as error:
            if not str(error).startswith("vmap:"):
                raise
            reason = str(error).removeprefix("vmap:").split(". ")[0].strip()
            raise ValueError(
                "`mask_mod` must compute with tensors that stand for all queries and keys at once, got a function that "
                f'needs the value of one (torch: "{reason}"); write &, |, ~ and torch.where for `and`, `or`, `not` and '
                "`if`, look up in tensors and not in lists, and draw random numbers before"
            ) from error
        if not isinstance(result, Tensor):
            raise TypeError(
                f"`mask_mod` must return a bool tensor, True = visible, got {type(result).__name__}; compute it from "
                "the arguments, such as `query >= key`"
            )
        if result.dtype != torch.bool or result.ndim:
            raise TypeError(
                f"`mask_mod` must return a bool tensor `[]` for a pair, True = visible, got {result.dtype} "
                f"{list(result.shape)}; compare what is not bool, such as `result != 0`, and reduce dimensions"
            )
        return result

    return visible


def evaluate_in_tiles(mask_mod: MaskMod, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Iterator[Tensor]:
    """The mask of a function of 0-d tensors in tiles of columns, bool `[B, H, S_q, columns]`."""
    for dimensions in ((None, None, 0, None), (None, None, None, 0), (None, 0, None, None), (0, None, None, None)):
        mask_mod = torch.vmap(mask_mod, in_dims=dimensions)
    for columns in key.split(max(PAIRS_OF_A_TILE // max(len(batch) * len(head) * len(query), 1), 1)):
        with TransformGetItemToIndex():
            visible = mask_mod(batch, head, query, columns)
        yield visible.to(query.device, torch.bool).transpose(2, 3)


def _as_flex_attention_reads(block_mask: BlockMask, function: MaskMod, batch_size: int, num_heads: int) -> MaskMod:
    """Full blocks are visible, and the function is asked in partial blocks. One row or head serves all."""
    rows, columns = block_mask.BLOCK_SIZE
    blocks = -(-block_mask.seq_lengths[1] // columns)
    partial = _listed_blocks(block_mask.kv_num_blocks, block_mask.kv_indices, blocks)
    full = torch.zeros_like(partial)
    if block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None:
        full = _listed_blocks(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, blocks)
    partial, full = (blocks.expand(batch_size, num_heads, -1, -1) for blocks in (partial, full))

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        block = (batch, head, query // rows, key // columns)
        return (function(batch, head, query, key) & partial[block]) | full[block]

    return visible


def _listed_blocks(counts: Tensor, indices: Tensor, blocks: int) -> Tensor:
    """bool `[B, H, n, blocks]`: whether the first `counts` of `indices`, int32 `[B, H, n, m]`, name a block of keys."""
    is_listed = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    named = torch.zeros(*indices.shape[:3], max(blocks, indices.shape[3]), dtype=torch.int32, device=indices.device)
    # What comes after the listed ones may be anything.
    return named.scatter_reduce(3, indices.long().masked_fill(~is_listed, 0), is_listed.int(), "amax").bool()
