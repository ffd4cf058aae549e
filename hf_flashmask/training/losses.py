"""Losses over answers that share prompts: functions of tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .labels import IGNORED, AnswerLabels, LabelsOfRank

_LABELS_AT_ONCE = 1024  # rows of logits whose float32 log-softmax exists at the same time


def token_log_probs(logits: Tensor, labels: AnswerLabels | LabelsOfRank) -> Tensor:
    """The log-probability of every token of the answers, given the tokens before it in its branch.

    Only the positions that predict an answer are computed, in float32 and in parts: neither forward nor backward keeps
    a log-softmax.

    Args:
        logits: `[B, N, V]` of whole rows, or `[B, L, V]` of the positions in the collator's `logits_to_keep`.

    Returns:
        float32 `[B, E]`, one answer after the other as in `labels["answers"]`, 0 for padding.
    """
    if isinstance(labels, LabelsOfRank):
        log_probs = labels.gather_labels(_log_probs_of_positions(logits, labels.positions, labels.tokens))
    else:
        log_probs = _log_probs_of_positions(logits, labels["positions"], labels["tokens"])
    answers = labels["answers"]
    return log_probs.gather(1, answers.clamp(min=0)).masked_fill(answers < 0, 0.0)


def answer_log_probs(logits: Tensor, labels: AnswerLabels | LabelsOfRank) -> Tensor:
    """The log-probability of each answer given its prompt, the sum of `token_log_probs`.

    Returns:
        float32 `[B, A]`, 0 for padding.
    """
    ends = labels["ends"]
    # Differences of cumulative sums in float64 are as exact as a sum for each answer, for which there is no operation.
    sums = nn.functional.pad(token_log_probs(logits, labels).double().cumsum(1), (1, 0)).gather(1, ends.clamp(min=0))
    log_probs = sums.diff(dim=1, prepend=torch.zeros_like(sums[:, :1]))
    return log_probs.float().masked_fill(ends < 0, 0.0)


def answer_scores(scores: Tensor, labels: AnswerLabels | LabelsOfRank) -> Tensor:
    """The score at each answer's last token.

    Args:
        scores: `[B, N, 1]` or `[B, N]`, of whole rows: the output of a reward model's head at every position.

    Returns:
        float32 `[B, A]`, 0 for padding.
    """
    if scores.ndim == 3 and scores.shape[2] == 1:
        scores = scores[..., 0]
    last = labels.last if isinstance(labels, LabelsOfRank) else labels["last"]
    if scores.ndim != 2 or scores.shape[0] != last.shape[0]:
        raise ValueError(
            f"`scores` must be [B, N, 1] or [B, N], a score for each position of {last.shape[0]} rows, got "
            f"{list(scores.shape)}; the `logits` that a sequence classifier returns are one for each row"
        )
    own = scores.float().gather(1, last.clamp(min=0)).masked_fill(last < 0, 0.0)
    return labels.add_up(own) if isinstance(labels, LabelsOfRank) else own


def _log_probs_of_positions(logits: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """float32 `[B, L]`, 0 for padding."""
    selected = _select_logits(logits, positions)
    parts = zip(selected.flatten(0, 1).split(_LABELS_AT_ONCE), tokens.flatten().split(_LABELS_AT_ONCE))
    log_probs = torch.cat([checkpoint(_log_probs_of_tokens, *part, use_reentrant=False) for part in parts])
    return log_probs.view_as(tokens)


def _select_logits(logits: Tensor, positions: Tensor) -> Tensor:
    """`[B, L, V]`. L is less than N: the last token of an answer predicts nothing."""
    if logits.ndim == 4:  # a model that selects the positions of all rows in each row
        logits = logits.diagonal(dim1=0, dim2=1).movedim(-1, 0)
    if logits.ndim != 3 or logits.shape[0] != positions.shape[0] or logits.shape[1] < positions.shape[1]:
        raise ValueError(
            f"`logits` must be [B, N, V] of {positions.shape[0]} rows, or [B, L, V] of the {positions.shape[1]} "
            f"positions in `logits_to_keep`, got {list(logits.shape)}"
        )
    if logits.shape[1] == positions.shape[1]:
        return logits
    return logits.take_along_dim(positions.clamp(min=0)[..., None], dim=1)


def _log_probs_of_tokens(logits: Tensor, tokens: Tensor) -> Tensor:
    """`[R, V]`, `[R]` -> float32 `[R]`, 0 where there is no token."""
    return -nn.functional.cross_entropy(logits.float(), tokens, ignore_index=IGNORED, reduction="none")


def split_pairs(values: Tensor, labels: AnswerLabels | LabelsOfRank) -> tuple[Tensor, Tensor, Tensor]:
    """Values of answers `[B, A]` -> values of the chosen and of the rejected ones, `[B, P]` each, and bool, is a pair.

    Raises:
        ValueError: when the examples were lists of answers.
    """
    if "pairs" not in labels:
        raise ValueError(
            "the examples of this batch are lists of answers, not pairs: give them `chosen` and `rejected`, or use a "
            "loss of your own over the answers of each example, labels['example']"
        )
    pairs = labels["pairs"]
    chosen, rejected = (values.gather(1, pairs[..., side].clamp(min=0)) for side in (0, 1))
    return chosen, rejected, pairs[..., 0] >= 0


def reference_log_probs(labels: AnswerLabels | LabelsOfRank) -> Tensor:
    """The `ref_logps` of the examples, float32 `[B, A]`, 0 for padding.

    Raises:
        ValueError: when the examples have none.
    """
    if "ref_logps" not in labels:
        raise ValueError(
            "the examples have no `ref_logps`: add what compute_log_probs(reference_model, dataset, data_collator) "
            "returns to the dataset as a column of that name"
        )
    return labels["ref_logps"].view(torch.float32).masked_fill(labels["last"] < 0, 0.0)


def dpo_loss(
    log_probs: Tensor,
    labels: AnswerLabels | LabelsOfRank,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    ref_log_probs: Tensor | None = None,
) -> Tensor:
    """Direct preference optimization (arXiv 2305.18290, equation 7), averaged over the pairs of the batch.

    With the log-ratios r = log p(answer) - log p_reference(answer) and d = beta * (r_chosen - r_rejected), the loss of
    a pair is -log sigmoid(d); with label smoothing e, the probability that a pair is labelled the wrong way round,
    -(1 - e) log sigmoid(d) - e log sigmoid(-d) (conservative DPO, https://ericmitchell.ai/cdpo.pdf).

    Args:
        log_probs: `[B, A]`, from `answer_log_probs`.
        beta: above 0, how strongly the loss holds the model to the reference.
        label_smoothing: from 0 to less than 0.5.
        ref_log_probs: `[B, A]`, those of the reference model. Default: `ref_logps` of the examples.

    Returns:
        The loss, 0-d.
    """
    check_dpo_options(beta=beta, label_smoothing=label_smoothing)
    if ref_log_probs is None:
        ref_log_probs = reference_log_probs(labels)
    chosen, rejected, is_pair = split_pairs(log_probs - ref_log_probs, labels)
    difference = beta * (chosen - rejected)
    log_sigmoid = nn.functional.logsigmoid
    losses = -(1 - label_smoothing) * log_sigmoid(difference) - label_smoothing * log_sigmoid(-difference)
    return _mean_loss_of_pairs(losses, is_pair)


def check_dpo_options(*, beta: Any = 0.1, label_smoothing: float = 0.0, **options: Any) -> None:
    if not isinstance(beta, int | float) or not beta > 0:
        raise ValueError(f"`beta` must be a number above 0, got {beta!r}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"`label_smoothing` must be from 0 to less than 0.5, got {label_smoothing}")


def reward_loss(
    scores: Tensor, labels: AnswerLabels | LabelsOfRank, *, center_rewards_coefficient: float = 0.0
) -> Tensor:
    """The Bradley-Terry loss of a reward model (arXiv 2203.02155, equation 1), averaged over the pairs of the batch.

    The loss of a pair is -log sigmoid(s_chosen - s_rejected - margin) + c * (s_chosen + s_rejected)^2. The examples may
    have a margin (arXiv 2307.09288, equation 2), which is 0 otherwise. The second term keeps scores near 0, with the
    coefficient c = `center_rewards_coefficient` (arXiv 2312.09244).

    Args:
        scores: `[B, A]`, from `answer_scores`.

    Returns:
        The loss, 0-d.
    """
    chosen, rejected, is_pair = split_pairs(scores, labels)
    difference = chosen - rejected
    if "margin" in labels:
        difference = difference - labels["margin"]
    losses = -nn.functional.logsigmoid(difference) + center_rewards_coefficient * (chosen + rejected) ** 2
    return _mean_loss_of_pairs(losses, is_pair)


def _mean_loss_of_pairs(losses: Tensor, is_pair: Tensor) -> Tensor:
    return losses.masked_fill(~is_pair, 0.0).sum() / is_pair.sum()
