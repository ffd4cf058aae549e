"""The keys that each row sees, from bounds, which say for each key the rows that do not see it."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_flashmask.bounds import select_rows, to_dense

MOST_INTERVALS = 64  # of one row
PAIRS = 1 << 26  # of rows and keys that are looked at together


def visible_key_intervals(bounds: Tensor, q_len: int, most: int = MOST_INTERVALS) -> Tensor | None:
    """The visible keys of row i are `[0, F0)`, `[F1, F2)`, `[F3, F4)`, ...: the form of cuDNN Frontend's masks.

    Intervals ascend and do not overlap. Unused ones are empty, at S_k; the first one is empty where key 0 is hidden.

    Args:
        bounds: int32 `[B or 1, H or 1, C, S_k]`.
        q_len: S_q.
        most: the intervals of a row, the first one included, that the result may have. Whoever reads the form reads all
            intervals of a row for each of its tiles.

    Returns:
        F, int32 `[B or 1, H or 1, n, S_q]`, n odd; or None where a row needs more intervals than `most`.

    >>> hidden_from = torch.tensor([[[[2, 3, 3]]]], dtype=torch.int32)  # causal, and row 2 does not see key 0
    >>> visible_key_intervals(hidden_from, 3).tolist()
    [[[[1, 2, 0], [3, 3, 1], [3, 3, 3]]]]
    """
    batch, heads, _, kv_len = bounds.shape
    rows_at_once = max(PAIRS // (batch * heads * kv_len), 1)
    pieces = []
    for first in range(0, q_len, rows_at_once):
        rows = min(rows_at_once, q_len - first)
        visible = to_dense(select_rows(bounds, first, rows, of=q_len), rows)
        ends = visible_ends(visible, 2 * most - 1)
        if ends is None:
            return None
        pieces.append(ends)
    planes = max(piece.shape[-1] for piece in pieces)
    pieces = [torch.nn.functional.pad(piece, (0, planes - piece.shape[-1]), value=kv_len) for piece in pieces]
    return torch.cat(pieces, dim=2).transpose(2, 3).contiguous()


def visible_ends(visible: Tensor, most: int) -> Tensor | None:
    """Where visibility changes along the keys, from visible before the first key to hidden after the last one.

    int32 `[B, H, rows, n]`, filled with S_k; None where a row changes more than `most` times.
    """
    kv_len = visible.shape[-1]
    padded = torch.nn.functional.pad(visible, (1, 1))
    padded[..., 0] = True
    changes = (padded[..., 1:] != padded[..., :-1]).flatten(0, -2)
    counts = changes.sum(-1)
    planes = int(counts.max())
    if planes > most:
        return None
    row, position = changes.nonzero(as_tuple=True)
    rank = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    ends = torch.full((len(counts), planes), kv_len, dtype=torch.int32, device=visible.device)
    ends[row, rank] = position.int()
    return ends.unflatten(0, visible.shape[:-1])
