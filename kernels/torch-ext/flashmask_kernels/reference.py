"""Dense float32 attention: the truth that the kernels are compared with. O(S_q * S_k) memory, any device."""

from __future__ import annotations

import torch


def visible_mask(bounds: torch.Tensor, q_len: int) -> torch.Tensor:
    """Expand bounds to a dense mask.

    Args:
        bounds: int32 ``[B or 1, H or 1, C, S_k]`` with C = 1 (LTS, causal), 2 (LTS, UTE) or 2n (n pairs of start, end).
        q_len: number of query rows S_q.

    Returns:
        bool ``[B or 1, H or 1, S_q, S_k]``, True where the row sees the column.
    """
    num_planes, kv_len = bounds.shape[-2:]
    rows = torch.arange(q_len, device=bounds.device)[:, None]
    planes = [plane[..., None, :] for plane in bounds.unbind(-2)]
    if num_planes == 1:
        columns = torch.arange(kv_len, device=bounds.device)
        hidden = (rows >= planes[0]) | (columns - (kv_len - q_len) > rows)
    elif num_planes == 2:
        hidden = (rows >= planes[0]) | (rows < planes[1])
    else:
        hidden = torch.zeros((), dtype=torch.bool, device=bounds.device)
        for start, end in zip(planes[0::2], planes[1::2]):
            hidden = hidden | ((rows >= start) & (rows < end))
    return ~hidden


def reference_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    keep: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with an N x N mask, computed in ``dtype`` and differentiable by autograd.

    With ``dtype`` equal to the inputs' low-precision dtype this is the "naive" version of FlashMask's acceptance
    criterion.

    Args:
        query: ``[B, H, S_q, D]``.
        key: ``[B, H_kv, S_k, D]``.
        value: ``[B, H_kv, S_k, D_v]``.
        bounds: int32 ``[B or 1, H, H_kv or 1, C, S_k]``.
        scale: factor of the scores, by default ``D ** -0.5``.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        sinks: ``[H]``, a logit per head that takes part in the softmax and has no value.
        keep: bool ``[B, H, S_q, S_k]``, the weights that dropout with probability ``dropout_p`` keeps.

    Returns:
        output ``[B, H, S_q, D_v]`` in ``dtype`` and log-sum-exp ``[B, H, S_q]`` (natural logarithm). A row that sees
        nothing has output 0 and, without sinks, log-sum-exp -inf.
    """
    num_heads, kv_heads = query.shape[1], key.shape[1]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    key = key.to(dtype).repeat_interleave(num_heads // kv_heads, dim=1)
    value = value.to(dtype).repeat_interleave(num_heads // kv_heads, dim=1)
    scores = (query.to(dtype) * scale) @ key.transpose(-1, -2)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    visible = visible_mask(bounds, query.shape[2])
    visible = visible.repeat_interleave(num_heads // visible.shape[1], dim=1)
    # Rows that see nothing get finite scores, so that softmax and its gradient stay finite, and are zeroed afterwards.
    row_sees = visible.any(-1, keepdim=True)
    scores = scores.masked_fill(~visible & row_sees, -torch.inf)
    if sinks is None:
        probabilities = torch.softmax(scores, -1)
        lse = torch.logsumexp(scores, -1).masked_fill(~row_sees[..., 0], -torch.inf)
    else:
        scores = scores.masked_fill(~row_sees, -torch.inf)
        logits = torch.cat([scores, sinks.to(dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)], -1)
        probabilities = torch.softmax(logits, -1)[..., :-1]
        lse = torch.logsumexp(logits, -1)
    probabilities = probabilities.masked_fill(~row_sees, 0.0)
    if keep is not None:
        probabilities = probabilities.masked_fill(~keep, 0.0) / (1 - dropout_p)
    return probabilities @ value, lse
