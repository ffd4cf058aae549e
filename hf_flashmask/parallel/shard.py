"""A batch -> the part of it that one rank holds, and the mask of the whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import bounds as _bounds
from ..bounds.documents import check_cumulative_lengths
from ..integration import Mask
from ..integration.mrope import with_text_positions
from ..integration.whole_sequence import Exchange, WholeSequence
from ..training.labels import IGNORED, AnswerLabels
from ..training.preference_collator import SELECTS_BY_ROW
from .answers import answers_of_rank
from .group import Group
from .merged_batch import LabelsOfMergedBatch, MergedBatch
from .models import TOKEN_TYPES, ModelTokenTraits

__all__ = ["BatchToShard", "read_batch_to_shard", "read_merged_batch_to_shard", "shard_batch"]

_DROPPED = {"max_length_q", "max_length_k", "seq_idx"}
"""What collators of packed rows say beside the cumulative lengths, which flashmask does not read."""
_OPTIONS = {"num_items_in_batch", "use_cache", "return_dict", "output_hidden_states", "output_attentions"}


class BatchToShard(NamedTuple):
    """A batch of the whole sequence, padded to the length that the ranks share out.

    Attributes:
        by_token: `[B, S]` and `[B, S, D]`, what is cut as it is.
        of_mask: `[B, S]`, what the model makes its mask of, which is that of the whole row: not cut.
        labels: `[B, S]`, for each token the label of the next one; None without labels.
        answers: the labels of SharedPromptDataCollator, or None.
        labels_in_tree: labels of the rows that were merged into one, or None.
        selects_logits: whether the model computes only the logits that predict tokens of answers.
        position_ids: `[B or 1, S]` or `[4, B or 1, S]`, what the model counts; no larger than those of the batch.
        document_positions: `[B or 1, S]`, what tells documents apart, beside bounds what counts along the branches of
            prefix trees; None for one document in each row.
        mask: 2-D, bounds, a dict of bounds for each type of layer, or None.
        media: images, and what describes them: not cut.
        options: what is handed on.
        length: S.
        device: of all of them.
    """

    by_token: dict[str, Tensor]
    of_mask: dict[str, Tensor]
    labels: Tensor | None
    answers: AnswerLabels | None
    labels_in_tree: LabelsOfMergedBatch | None
    selects_logits: bool
    position_ids: Tensor
    document_positions: Tensor | None
    mask: Tensor | dict[str, Tensor] | None
    media: dict[str, Any]
    options: dict[str, Any]
    length: int
    device: torch.device

    @property
    def label_count(self) -> Tensor | int:
        """The labels that a loss of causal language models is computed of."""
        if self.labels_in_tree is not None:
            return len(self.labels_in_tree.tokens)
        return 0 if self.labels is None else (self.labels != IGNORED).sum()


def read_merged_batch_to_shard(
    merged: MergedBatch, length_of: Callable[[int], int], device: torch.device, traits: ModelTokenTraits
) -> BatchToShard:
    """The same as `read_batch_to_shard`, of rows that were merged into one."""
    whole = read_batch_to_shard(merged.arguments, length_of, device, traits)
    depth = merged.depth.to(device)
    tail = torch.arange(whole.length - depth.shape[1], device=device)
    labels = LabelsOfMergedBatch(*(part.to(device) for part in merged.labels))
    return whole._replace(document_positions=torch.cat([depth, tail[None]], dim=1), labels_in_tree=labels)


def read_batch_to_shard(
    batch: Mapping[str, Any], length_of: Callable[[int], int], device: torch.device, traits: ModelTokenTraits
) -> BatchToShard:
    """Check what a collator returns, and pad it.

    Args:
        batch: the arguments that the model would be called with in one process.
        length_of: the length that rows of this length are padded to.
        device: where the model computes.
        traits: of the model.
    """
    kept = {name: value for name, value in batch.items() if value is not None and name not in _DROPPED}
    given = _batch_on_device(kept, device)
    answers = given.pop("labels") if isinstance(given.get("labels"), AnswerLabels) else None
    selects = answers is not None and given.pop("logits_to_keep", None) is not None
    tokens = given.get("input_ids", given.get("inputs_embeds"))
    if not isinstance(tokens, Tensor) or tokens.ndim < 2:
        raise ValueError(
            f"`batch` must hold `input_ids` [B, S] or `inputs_embeds` [B, S, D], got {sorted(batch) or 'nothing'}"
        )
    shape = rows, short = tokens.shape[0], tokens.shape[1]
    if short == 0:
        raise ValueError("the batch has no token: its rows have length 0")
    length = length_of(short)
    tail = length - short

    def padded(name: str, value: float = 0) -> Tensor:
        tensor = given.pop(name)
        if not isinstance(tensor, Tensor) or tuple(tensor.shape[:2]) != shape:
            came = f"{list(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"`{name}` must have the sizes of the tokens, {list(shape)}, got {came}")
        return nn.functional.pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, tail), value=value)

    of_mask = {name: padded(name) for name in traits.types_of_mask if name in given}
    by_token = {name: padded(name) for name in ("input_ids", "inputs_embeds", *TOKEN_TYPES) if name in given}
    labels = None
    if "shift_labels" in given:
        labels = padded("shift_labels", IGNORED)
        given.pop("labels", None)
    elif "labels" in given:
        labels = padded("labels", IGNORED)
        labels = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)

    mask = _pad_mask_to_shard(given.pop("attention_mask", None), shape, length)
    index = torch.arange(length, device=tokens.device)
    tail_positions = index[:tail]
    documents = None
    positions = index.clamp(max=short - 1)[None]
    if "position_ids" in given:
        position_ids = given.pop("position_ids")
        _check_positions_of_batch(position_ids, rows, short, has_dimensions=traits.has_dimensions)
        if position_ids.ndim == 3 and len(position_ids) == 3:
            position_ids = with_text_positions(position_ids, _tokens_of_batch_mask(mask, short))
        tail_positions = torch.minimum(tail_positions.to(position_ids), position_ids.amax())
        tail_positions = tail_positions.expand(*position_ids.shape[:-1], -1)
        positions = torch.cat([position_ids, tail_positions], dim=-1)
        documents = positions[0] if positions.ndim == 3 else positions
    cu_seq_lens, of_keys = given.pop("cu_seq_lens_q", None), given.pop("cu_seq_lens_k", None)
    if batch.get("cu_seq_lens_k") is batch.get("cu_seq_lens_q"):
        of_keys = None  # else they are compared, which waits for the device
    if cu_seq_lens is not None:
        by_lengths = _read_cu_seq_lens_of_batch(cu_seq_lens, of_keys, rows, index, short)
        documents = (
            by_lengths
            if documents is None
            else _join_documents_of_batch(by_lengths, documents, _tokens_of_batch_mask(mask, length))
        )
    if isinstance(mask, Tensor) and mask.ndim == 4:  # bounds are final; positions tell whether they are prefix trees
        documents = positions[0] if positions.ndim == 3 else positions
    if mask is None and tail and documents is None:
        mask = (index < short).expand(rows, -1).contiguous()
    media = {name: given.pop(name) for name in traits.media if name in given}
    _refuse_unknown_in_batch(given)
    return BatchToShard(
        by_token, of_mask, labels, answers, None, selects, positions, documents, mask, media, given, length, device
    )


def shard_batch(
    batch: BatchToShard, exchange: Exchange, label_count: Tensor | float, groups: Sequence[Group]
) -> dict[str, Any]:
    """The arguments of the model on one rank.

    Args:
        exchange: that of this batch.
        label_count: what the sum of the losses of all ranks is divided by.
        groups: of this rank, the dimensions of the mesh.
    """
    given = slice(None) if exchange.takes_whole_rows else exchange.rows
    part: dict[str, Any] = {name: tensor[:, given].contiguous() for name, tensor in batch.by_token.items()}
    part |= batch.of_mask | batch.media | batch.options
    part["position_ids"] = batch.position_ids[..., given].contiguous()
    if batch.labels is not None:
        # Models compute a loss where there are labels, and read those that are shifted.
        part["labels"] = part["shift_labels"] = batch.labels[:, exchange.rows].contiguous()
        part["num_items_in_batch"] = label_count
    rows = torch.arange(batch.length, device=batch.device)[exchange.rows]
    if batch.labels_in_tree is not None:
        part["logits_to_keep"], labels = batch.labels_in_tree.of_rank(rows)
        part["labels"] = part["shift_labels"] = labels[None]
        part["num_items_in_batch"] = label_count
    elif batch.answers is not None:
        part["labels"] = answers = answers_of_rank(batch.answers, rows, groups)
        if batch.selects_logits:
            part["logits_to_keep"] = answers.positions if SELECTS_BY_ROW else answers.positions[0]
    if isinstance(batch.mask, dict):
        masks = {name: Mask.of_user(bounds) for name, bounds in batch.mask.items()}
        for mask in masks.values():
            mask.exchange = exchange
        part["attention_mask"] = masks
    else:
        part["attention_mask"] = WholeSequence(
            batch.mask, batch.document_positions, exchange, has_token_types=bool(batch.of_mask)
        )
    return part


def _batch_on_device(given: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    moved: dict[str, Any] = {}
    for name, value in given.items():
        if isinstance(value, AnswerLabels):
            moved[name] = AnswerLabels(_batch_on_device(value, device))
        elif isinstance(value, Mapping):
            moved[name] = _batch_on_device(value, device)
        else:
            moved[name] = value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
    return moved


def _check_positions_of_batch(position_ids: Any, rows: int, length: int, *, has_dimensions: bool) -> None:
    shapes = f"[{rows} or 1, {length}]" + (f" or [3 or 4, {rows} or 1, {length}]" if has_dimensions else "")
    if not isinstance(position_ids, Tensor):
        raise TypeError(f"`position_ids` must be a tensor {shapes}, got {type(position_ids).__name__}")
    planes, *sizes = position_ids.shape if position_ids.ndim == 3 else (None, *position_ids.shape)
    is_known = planes is None or (has_dimensions and planes in (3, 4))
    if not is_known or len(sizes) != 2 or sizes[0] not in (1, rows) or sizes[1] != length:
        raise NotImplementedError(
            f"`position_ids` must be {shapes} for these tokens and this model, got {list(position_ids.shape)}"
        )


def _tokens_of_batch_mask(mask: Tensor | dict[str, Tensor] | None, length: int) -> Tensor | None:
    return mask[:, :length].ne(0) if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _read_cu_seq_lens_of_batch(
    cu_seq_lens: Tensor, of_keys: Tensor | None, rows: int, index: Tensor, length: int
) -> Tensor:
    """Positions `[1, S]` that restart with every document, and with the padding behind `length` tokens."""
    if rows != 1:
        raise ValueError(
            f"`cu_seq_lens_q` describes the documents of one packed row, but the batch has {rows} rows; pass "
            "`position_ids` that restart with every document instead"
        )
    if of_keys is not None and not torch.equal(of_keys, cu_seq_lens):
        raise ValueError("`cu_seq_lens_k` must be `cu_seq_lens_q`: queries and keys are the same tokens")
    check_cumulative_lengths("cu_seq_lens_q", cu_seq_lens)
    starts = cu_seq_lens.to(index).clamp(max=length)
    document = torch.searchsorted(starts, index, right=True) - 1
    return (index - starts[document])[None]


def _join_documents_of_batch(by_lengths: Tensor, position_ids: Tensor, is_token: Tensor | None) -> Tensor:
    """Positions `[1, S]` that restart with every document of either."""
    index = torch.arange(by_lengths.shape[1], device=by_lengths.device)
    starts = _bounds.document_starts(_bounds.document_ends(position_ids, is_token))
    return torch.minimum(by_lengths, index - starts)


def _pad_mask_to_shard(mask: Any, shape: tuple[int, int], length: int) -> Tensor | dict[str, Tensor] | None:
    rows, short = shape
    if mask is None:
        return None
    if isinstance(mask, Mapping):
        return {name: _pad_bounds_to_shard(bounds, rows, short, length) for name, bounds in mask.items()}
    if isinstance(mask, Tensor) and mask.ndim == 4:
        return _pad_bounds_to_shard(mask, rows, short, length)
    if not isinstance(mask, Tensor) or tuple(mask.shape) != shape:
        came = f"{list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"`attention_mask` must be that of the whole sequence, 2-D {list(shape)} or bounds [{rows} or 1, H or 1, "
            f"C, {short}], got {came}"
        )
    return nn.functional.pad(mask, (0, length - short))


def _pad_bounds_to_shard(bounds: Any, rows: int, short: int, length: int) -> Tensor:
    if isinstance(bounds, Tensor) and bounds.dtype != torch.int32:
        raise TypeError(
            f"`attention_mask` is {bounds.dtype} {list(bounds.shape)}: sequence_parallel takes int32 bounds; a dense "
            "mask is converted with hf_flashmask.bounds.from_dense"
        )
    _bounds.check_bounds(bounds, name="attention_mask", batch=rows, kv_len=short)
    if length == short:
        return bounds
    planes, tail = bounds.shape[2], length - short
    if planes == 1:  # padding, which does not even see itself: prefix trees stay trees beside it
        return nn.functional.pad(bounds, (0, tail))
    is_tail = torch.arange(length, device=bounds.device)[None] >= short
    return _bounds.hide_keys(nn.functional.pad(bounds, (0, tail)), is_tail)


def _refuse_unknown_in_batch(given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        is_harmless = isinstance(value, bool) and not (value and name == "output_router_logits")
        if name not in _OPTIONS and not is_harmless:
            what = f"{type(value).__name__} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise NotImplementedError(
                f"`{name}` ({what}) is not known to sequence_parallel, which would have to cut it: take it out of the "
                "batch if the model can do without it"
            )
