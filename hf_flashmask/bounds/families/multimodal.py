"""Unified multimodal models: packed samples of text, images that are seen, and images that are generated."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TypeAlias

import torch
from torch import Tensor

from ..form import check_integer_lists, default_kv_len, planes_from_blocks

Rows: TypeAlias = "Sequence[int] | Sequence[Sequence[int]] | Tensor"

_MODES = ("causal", "full", "noise")


def from_splits(
    split_lens: Rows,
    attn_modes: Sequence[str] | Sequence[Sequence[str]],
    *,
    document_lens: Rows | None = None,
    kv_len: int | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Packed samples of splits, as BAGEL (arXiv 2505.14683) and Transfusion have them.

    A query sees the keys of its sample up to its own, except those of other noise splits, and all keys of its own split
    if that is full or noise. The arguments are BAGEL's.

    Args:
        split_lens: tokens of each split. A list of lists makes a batch. The arguments are read on the host, and the
            copy to the device does not wait. In a graph of `torch.compile` lists are constants.
        attn_modes: "causal", "full" or "noise" for each split, as in `split_lens`.
        document_lens: tokens of each sample, which ends where a split ends. Default: one sample for each row.
        kv_len: length to pad to; padding is hidden, and its rows see nothing. Default: the longest row.
        device: of the bounds; default: the CPU.

    Returns:
        int32 `[B, 1, 2, S_k]`.

    Raises:
        ValueError: when lists do not match, a length is negative, a mode is another one, a sample ends inside of a
            split, or `kv_len` is too small.

    >>> from hf_flashmask.bounds import to_dense
    >>> to_dense(from_splits([2, 2, 1], ["causal", "noise", "causal"]))[0, 0].int()
    tensor([[1, 0, 0, 0, 0],
            [1, 1, 0, 0, 0],
            [1, 1, 1, 1, 0],
            [1, 1, 1, 1, 0],
            [1, 1, 0, 0, 1]], dtype=torch.int32)
    """
    length_rows = check_integer_lists("split_lens", split_lens)
    is_batch = any(not isinstance(modes, str) for modes in attn_modes)
    mode_rows = [[str(mode) for mode in modes] for modes in (attn_modes if is_batch else [attn_modes])]
    document_rows = (
        [[sum(row)] for row in length_rows]
        if document_lens is None
        else check_integer_lists("document_lens", document_lens)
    )
    if not len(length_rows) == len(mode_rows) == len(document_rows):
        raise ValueError(
            "`split_lens`, `attn_modes` and `document_lens` must have as many rows, got "
            f"{len(length_rows)}, {len(mode_rows)} and {len(document_rows)}"
        )
    kv_len = default_kv_len(length_rows, kv_len)
    splits = max([0, *(len(row) for row in length_rows)])
    planes = torch.tensor(
        [_planes_of_splits(*row, splits, kv_len) for row in zip(length_rows, mode_rows, document_rows)],
        dtype=torch.int32,
    ).transpose(1, 2)[:, None]
    ends = torch.tensor([[*accumulate(row), *[kv_len] * (splits - len(row))] for row in length_rows], dtype=torch.int32)
    lts, ute, causal_up_to = planes_from_blocks(planes.contiguous(), ends, kv_len, device).unbind(2)
    key = torch.arange(kv_len, dtype=torch.int32, device=lts.device)
    return torch.stack([lts, torch.maximum(ute, torch.minimum(key, causal_up_to))], dim=2)


def _planes_of_splits(
    lengths: list[int], modes: list[str], documents: list[int], splits: int, kv_len: int
) -> list[tuple[int, int, int]]:
    """LTS, UTE and up to which key the triangle hides rows, for each split and for padding."""
    if len(lengths) != len(modes) or min([0, *lengths]) < 0 or not set(modes) <= set(_MODES):
        raise ValueError(
            f"`attn_modes` must be one of {_MODES} for each length of 0 or more, got {modes} for the lengths {lengths}"
        )
    ends = [*accumulate(lengths)]
    document_ends = [*accumulate(documents)]
    is_ascending = min([0, *documents]) >= 0
    if not is_ascending or (ends or [0])[-1] != (document_ends or [0])[-1] or not set(document_ends) <= {0, *ends}:
        raise ValueError(
            f"`document_lens` must not be negative and must end where splits end, got {documents} for {lengths}"
        )
    planes = []
    for length, mode, end in zip(lengths, modes, ends):
        document_end = next((border for border in document_ends if border >= end), end)
        lts = end if mode == "noise" else document_end
        planes.append((lts, 0 if mode == "causal" else end - length, kv_len if mode == "causal" else 0))
    return planes + [(0, kv_len, 0)] * (splits + 1 - len(planes))
