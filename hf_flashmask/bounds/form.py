"""The form of bounds: limits, checks, and the planes and intervals that the other modules build with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from operator import index
from typing import TypeAlias

import torch
from torch import Tensor

from flashmask_kernels.api import MAX_INTERVALS

Offset: TypeAlias = "int | Tensor"

NO_END = torch.iinfo(torch.int32).max

FAR = 2**30  # farther than any two positions are apart, and safe to add to one


class TooManyIntervalsError(ValueError):
    """A mask needs more than `MAX_INTERVALS` hidden intervals for a key."""


def check_bounds(
    bounds: Tensor,
    *,
    name: str = "bounds",
    batch: int | None = None,
    heads: int | None = None,
    kv_len: int | None = None,
    device: torch.device | None = None,
) -> None:
    """Check that `bounds` have the form of bounds, and that they fit an attention call.

    Args:
        bounds: what the user gave: int32 `[B or 1, H or 1, C, S_k]`, C = 1 or an even number up to
            `2 * MAX_INTERVALS`.
        name: the argument to name in the message.
        batch, heads, kv_len, device: of the call; each is checked where given. `heads` are the query heads.

    Raises:
        TypeError: when `bounds` are not an int32 tensor.
        ValueError: when their shape is not that of bounds, or shape or device do not fit the call.
    """
    if (came := dtype_or_type(bounds)) != torch.int32:
        is_dense = came == torch.bool or (isinstance(came, torch.dtype) and came.is_floating_point)
        way = (
            "bounds.from_dense converts a dense bool mask" if is_dense else "integers become bounds by .to(torch.int32)"
        )
        raise TypeError(f"`{name}` must be an int32 tensor [B or 1, H or 1, C, S_k], got {came}; {way}")
    planes = bounds.shape[2] if bounds.ndim == 4 else 0
    if planes != 1 and (planes % 2 or not 2 <= planes <= 2 * MAX_INTERVALS):
        raise ValueError(
            f"`{name}` must have shape [B or 1, H or 1, C, S_k] with C = 1 or an even number up to "
            f"{2 * MAX_INTERVALS}, got {list(bounds.shape)}"
        )
    for dimension, (what, expected) in enumerate((("batch", batch), ("number of query heads", heads))):
        # Not `size in (1, expected)`: the compiler finds no number equal to a symbolic one there (torch 2.13).
        size = bounds.shape[dimension]
        if expected is not None and size != 1 and size != expected:
            raise ValueError(
                f"`{name}` has shape {list(bounds.shape)}: dimension {dimension} must be 1 or the {what}, {expected}"
            )
    if kv_len is not None and bounds.shape[3] != kv_len:
        raise ValueError(
            f"`{name}` has shape {list(bounds.shape)}: the last dimension must be the key length, {kv_len}"
        )
    if device is not None and bounds.device != device:
        raise ValueError(f"`{name}` is on {bounds.device}, the queries are on {device}; move it there with .to()")


def refuse_without_waiting(refused: Tensor, error: Exception) -> None:
    """Raise `error` where `refused` is true anywhere. Off the CPU nothing waits: the device asserts it."""
    if refused.is_cpu and type(refused) is Tensor and not torch.compiler.is_compiling():
        if bool(refused.any()):
            raise error
    else:
        torch._assert_async(~refused.any(), str(error))


def own_rows_of_keys(
    q_len: int,
    kv_len: int,
    q_offset: Offset | None,
    kv_offset: Offset,
    device: torch.device | str | None,
    below: int = 0,
) -> Tensor:
    """The row of each key's own position, plus `below`: int32 `[S_k]`. May lie outside of `[0, q_len)`."""
    check_q_len_and_kv_len(q_len, kv_len)
    check_q_offset_and_kv_offset(q_offset, kv_offset)
    if device is None:
        device = next((offset.device for offset in (q_offset, kv_offset) if isinstance(offset, Tensor)), None)
    shift = below + (q_len - kv_len if q_offset is None else kv_offset - q_offset)
    if isinstance(shift, Tensor):
        return torch.arange(kv_len, dtype=torch.int32, device=device) + shift
    return torch.arange(shift, shift + kv_len, dtype=torch.int32, device=device)


def is_triangle_at_bottom_right(q_len: int, kv_len: int, q_offset: Offset | None, kv_offset: Offset) -> bool:
    """Whether the causal triangle is the implied one of C = 1. Offsets on a device are never read to find out."""
    if q_offset is None:
        return True
    if isinstance(q_offset, Tensor) or isinstance(kv_offset, Tensor):
        return False
    return q_offset - kv_offset == kv_len - q_len


def stack_planes(lts: Tensor, ute: Tensor | None, q_len: int) -> Tensor:
    """`[B or 1, 1, 1 or 2, S_k]` from local rows `[S_k]` or `[B, S_k]`; no UTE means C = 1."""
    planes = lts.unsqueeze(-2) if ute is None else torch.stack(torch.broadcast_tensors(lts, ute), dim=-2)
    planes = planes.clamp(0, q_len).to(torch.int32)
    return planes[None, None] if planes.ndim == 2 else planes[:, None]


def default_lengths_and_offsets(
    positions: int, q_len: int | None, kv_len: int | None, q_offset: Offset | None, kv_offset: Offset
) -> tuple[int, int, Offset, Offset]:
    check_q_offset_and_kv_offset(q_offset, kv_offset)
    q_len = positions if q_len is None else q_len
    kv_len = positions if kv_len is None else kv_len
    return q_len, kv_len, positions - q_len if q_offset is None else q_offset, kv_offset


def previous_values(values: Tensor) -> Tensor:
    """The value before each one, and the first one before itself: `[B, S]`."""
    return torch.cat([values[:, :1], values], dim=1)[:, :-1]


def run_numbers(starts: Callable[..., Tensor], values: Tensor, others: Tensor) -> Tensor:
    """Number of each position's run, int32 `[B, S]`, where a run starts wherever the comparison `starts` is true."""
    # The comparison writes integers: sums of bool are sums of a copy.
    flags = torch.empty(values.shape, dtype=torch.int32, device=values.device)
    return starts(values, others, out=flags).cumsum(-1, dtype=torch.int32)


def run_ends(runs: Tensor) -> Tensor:
    """Past-the-last position of each position's run, int32 `[B, S]`, from `run_numbers`."""
    return torch.searchsorted(runs, runs, right=True, out_int32=True)


def run_edges_at_keys(edge: Tensor, outside: Tensor | None, nowhere: int, kv_len: int, kv_offset: Offset) -> Tensor:
    """The edge of each key's run, `[B, S_k]`, from the edge of each position's run; `nowhere` for keys in no run."""
    if outside is not None:
        edge = edge.masked_fill(outside, nowhere)
    positions = edge.shape[-1]
    if kv_len == positions and not isinstance(kv_offset, Tensor) and kv_offset == 0:
        return edge
    # One more position stands for all positions past the ids.
    edge = torch.nn.functional.pad(edge, (0, 1), value=nowhere)
    key = torch.arange(kv_len, device=edge.device) + kv_offset
    return edge[:, torch.where((key < 0) | (key > positions), positions, key)]


def lower_and_upper(bounds: Tensor, q_len: int | None) -> tuple[Tensor, Tensor]:
    """LTS and UTE of bounds with C = 1 or 2, each `[B or 1, H or 1, S_k]`."""
    if bounds.shape[2] == 2:
        return bounds[:, :, 0], bounds[:, :, 1]
    kv_len = bounds.shape[3]
    diagonal = own_rows_of_keys(kv_len if q_len is None else q_len, kv_len, None, 0, bounds.device)
    return bounds[:, :, 0], diagonal.clamp(min=0)[None, None]


def hidden_intervals(bounds: Tensor, q_len: int | None) -> tuple[Tensor, Tensor]:
    """Starts and ends of the hidden rows of each key, each `[B or 1, H or 1, n, S_k]`."""
    if bounds.shape[2] > 2:
        return bounds[:, :, 0::2], bounds[:, :, 1::2]
    lts, ute = torch.broadcast_tensors(*lower_and_upper(bounds, q_len))
    start = torch.stack([torch.zeros_like(ute), lts], dim=2)
    end = torch.stack([ute, torch.full_like(lts, NO_END)], dim=2)
    return start, end


def broadcast_masks(bounds: Sequence[Tensor]) -> list[Tensor]:
    batch, heads = torch.broadcast_shapes(*(mask.shape[:2] for mask in bounds))
    return [mask.expand(batch, heads, -1, -1) for mask in bounds]


def check_integer_lists(name: str, values: Sequence[int] | Sequence[Sequence[int]] | Tensor) -> list[list[int]]:
    rows = list(values.tolist() if isinstance(values, Tensor) else values)
    is_batch = bool(rows) and isinstance(rows[0], (Sequence, Tensor))
    try:
        return [[index(value) for value in row] for row in (rows if is_batch else [rows])]
    except TypeError:
        raise TypeError(f"`{name}` must hold integers, or lists of integers for a batch, got {values!r:.200}") from None


def default_kv_len(lengths: list[list[int]], kv_len: int | None) -> int:
    """`kv_len`, by default the sum of the lengths in the longest row."""
    longest = max([0, *map(sum, lengths)])
    if kv_len is not None and kv_len < longest:
        raise ValueError(f"`kv_len` is {kv_len}, but the longest row has {longest} tokens")
    return longest if kv_len is None else kv_len


def check_q_len_and_kv_len(q_len: int, kv_len: int) -> None:
    if q_len < 0 or kv_len < 0:
        raise ValueError(f"`q_len` and `kv_len` must not be negative, got {q_len} and {kv_len}")


def check_q_offset_and_kv_offset(q_offset: Offset | None, kv_offset: Offset) -> None:
    for name, offset in (("q_offset", q_offset), ("kv_offset", kv_offset)):
        if isinstance(offset, Tensor):
            check_int_tensor(name, offset, (0, 1), "[]")
            if offset.numel() != 1:
                raise ValueError(f"`{name}` must be one number for all rows of a batch, got shape {list(offset.shape)}")
        elif offset is not None:
            check_integer(name, offset)


def check_integer(name: str, value: object) -> None:
    if not isinstance(value, (Integral, torch.SymInt)):
        raise TypeError(f"`{name}` must be an integer, got {dtype_or_type(value)}")


def check_size(name: str, size: int, least: int = 1) -> int:
    """The size, or `FAR` for a greater one, which says the same of positions and fits in int32 when added to one.

    Raises:
        TypeError: when it is not an integer.
        ValueError: when it is less than `least`.
    """
    check_integer(name, size)
    if size < least:
        raise ValueError(f"`{name}` must be at least {least}, got {size}")
    return min(size, FAR)


def dtype_or_type(value: object) -> torch.dtype | str:
    return value.dtype if isinstance(value, Tensor) else type(value).__name__


def check_int_tensor(
    name: str,
    value: Tensor,
    dims: tuple[int, ...],
    shape: str,
    allow_bool: bool = False,
    allow_float: bool = False,
) -> None:
    dtype = dtype_or_type(value)
    if (
        isinstance(dtype, str)
        or (dtype.is_floating_point and not allow_float)
        or dtype.is_complex
        or (dtype == torch.bool and not allow_bool)
    ):
        kind = "an integer or float tensor" if allow_float else "an integer tensor"
        raise TypeError(f"`{name}` must be {kind} {shape}, got {dtype}")
    if value.ndim not in dims:
        raise ValueError(f"`{name}` must be {shape}, got shape {list(value.shape)}")


def check_per_position(name: str, value: Tensor) -> Tensor:
    check_int_tensor(
        name,
        value,
        (1, 2),
        "[B, S] or [S]",
        allow_bool=name == "padding_mask",
        allow_float=name in ("position_ids", "padding_mask"),
    )
    return value if value.ndim == 2 else value[None]


def check_flags(name: str, flags: object, ids: Tensor) -> None:
    if not isinstance(flags, Tensor) or flags.dtype != torch.bool or flags.shape != ids.shape:
        shape = list(flags.shape) if isinstance(flags, Tensor) else ""
        raise ValueError(f"`{name}` must be a bool tensor {list(ids.shape)}, got {dtype_or_type(flags)} {shape}")


def check_max_intervals(operation: str, intervals: int) -> None:
    if intervals > MAX_INTERVALS:
        raise TooManyIntervalsError(
            f"{operation}() of these masks needs {intervals} hidden intervals per key, bounds hold at most "
            f"{MAX_INTERVALS}: call simplify(bounds, q_len) on the arguments first, or on part of the result"
        )


def planes_from_blocks(planes: Tensor, ends: Tensor, kv_len: int, device: torch.device | str | None) -> Tensor:
    """Bounds of each key, `[B, H, C, S_k]`, on `device`, without waiting for it.

    Args:
        planes: those of each of n blocks of keys and of padding, int32 `[B or 1, H, C, n + 1]`, contiguous.
        ends: past-the-last key of each block, int32 `[B or 1, n]`, contiguous.
    """
    if planes.is_cpu and torch.device(device or "cpu").type == "cuda":
        planes, ends = planes.pin_memory(), ends.pin_memory()  # copies from unpinned memory wait for the device
    planes, ends = planes.to(device, non_blocking=True), ends.to(device, non_blocking=True)
    key = torch.arange(kv_len, dtype=torch.int32, device=planes.device).expand(len(ends), -1)
    block = torch.searchsorted(ends, key.contiguous(), right=True)
    return planes.take_along_dim(block[:, None, None], 3)
