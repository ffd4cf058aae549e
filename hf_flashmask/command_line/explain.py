"""A mask, or the mask of a batch, in words and as a drawing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import BatchEncoding

from .. import bounds as bounds_of
from ..training.labels import AnswerLabels
from ..visualization import plot, to_html, to_text
from .sequences import load_tokenizer

_TILE = 64


def read_file(path: Path) -> Any:
    """What is in a file: a tensor, or a batch.

    Raises:
        ValueError: for a file of another kind, and for one that holds something else.
    """
    if path.suffix not in _READERS:
        raise ValueError(f"cannot read {path}: a mask or a batch is a file ending in .pt, .npy or .safetensors")
    try:
        return _READERS[path.suffix](path)
    except Exception as error:  # each format has errors of its own
        raise ValueError(
            f"cannot read {path}: a tensor, or a dict of tensors such as the batch of a collator, was expected: "
            f"torch.save(dict(batch), path). {type(error).__name__}: {str(error) or 'no message':.160}"
        ) from error


def _read_torch(path: Path) -> Any:
    with torch.serialization.safe_globals([AnswerLabels, BatchEncoding]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _read_numpy(path: Path) -> Tensor:
    return torch.from_numpy(numpy.load(path))


_READERS: dict[str, Callable[[Path], Any]] = {
    ".npy": _read_numpy,
    ".safetensors": load_file,
    **dict.fromkeys((".pt", ".pth", ".bin"), _read_torch),
}


def masks_in_file(content: Any) -> dict[str, Tensor]:
    """The bounds that a model gets of a tensor or a batch, by name.

    Raises:
        ValueError: for what is no mask, and for a batch that says nothing of one.
    """
    if isinstance(content, Tensor):
        return {"mask": _bounds_of_tensor_in_file(content)}
    if not isinstance(content, Mapping):
        raise ValueError(f"a mask is a tensor and a batch a dict of tensors, this is {type(content).__name__}")
    mask, positions, ends = (content.get(name) for name in ("attention_mask", "position_ids", "cu_seq_lens_q"))
    if isinstance(mask, Mapping):
        return {str(name): _bounds_of_tensor_in_file(tensor) for name, tensor in mask.items()}
    if isinstance(mask, Tensor) and mask.ndim == 4:
        return {"attention_mask": _bounds_of_tensor_in_file(mask)}
    parts: dict[str, Tensor] = {}
    if isinstance(positions, Tensor) and positions.ndim == 2:
        is_alike = isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] == positions.shape[1]
        of_tokens = (mask != 0, mask) if is_alike else ()  # padding starts no document
        parts["position_ids"] = bounds_of.from_document_ends(bounds_of.document_ends(positions, *of_tokens))
    if isinstance(ends, Tensor):
        parts["cu_seq_lens_q"] = bounds_of.from_cu_seqlens(ends, int(ends[-1]))
    if isinstance(mask, Tensor):
        parts["attention_mask"] = _bounds_of_2d_in_file(mask)
    if not parts:
        others = [name for name, value in content.items() if isinstance(value, Tensor) and value.ndim == 4]
        if others:
            return {name: _bounds_of_tensor_in_file(content[name]) for name in others}
        raise ValueError(
            f"the batch has {', '.join(content) or 'nothing'}: a mask is in tensors `attention_mask`, `position_ids` "
            "[B, S] or `cu_seq_lens_q`. Without them the model's own mask is all there is"
        )
    if [*parts] == ["attention_mask"]:
        return {"attention_mask (a causal model hides later keys besides)": parts["attention_mask"]}
    whole = next(iter(parts.values()))
    for other in list(parts.values())[1:]:
        whole = bounds_of.intersect(whole, other)
    return {" and ".join(parts): whole}


def _bounds_of_2d_in_file(mask: Tensor) -> Tensor:
    """0 is padding; other values are ids of documents."""
    documents = bounds_of.from_document_ends(bounds_of.document_ends_of_mask(mask), is_causal=False)
    return bounds_of.intersect(documents, bounds_of.from_padding_mask(mask != 0))


def _bounds_of_tensor_in_file(tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.int32 and tensor.ndim == 4:
        bounds_of.check_bounds(tensor)
        return tensor
    if tensor.ndim == 2 and tensor.is_floating_point():
        raise ValueError(
            f"the mask is {tensor.dtype} {list(tensor.shape)}: a dense mask [S_q, S_k] is bool (`mask == 0` for 0 and "
            "-inf), a 2-D mask [B, S], 0 for padding, is of integers"
        )
    if tensor.ndim == 2 and tensor.dtype != torch.bool:
        return _bounds_of_2d_in_file(tensor)
    if tensor.is_floating_point():  # an additive mask
        tensor = tensor == 0
    while tensor.ndim < 4:
        tensor = tensor[None]
    return bounds_of.from_dense(tensor.bool())


def describe_mask_of_file(name: str, bounds: Tensor, q_len: int | None, row: int) -> Iterator[str]:
    """The mask as lines of text; `q_len` rows, as many as keys by default."""
    q_len = bounds.shape[3] if q_len is None else q_len
    planes = bounds.shape[2]
    visible = bounds_of.visible_pairs(bounds, q_len).sum().item()
    pairs = bounds.shape[0] * bounds.shape[1] * q_len * bounds.shape[3]
    if pairs == 0:
        raise ValueError(f"{name} is empty: its shape is {list(bounds.shape)}")
    fewest = bounds_of.simplify(bounds, q_len).shape[2]
    occupancy = bounds_of.tile_occupancy(bounds, q_len, tile_size=_TILE)
    full, hidden = ((occupancy == value).float().mean().item() for value in (1, 0))
    yield f"{name}: int32 {list(bounds.shape)}, {bounds.numel() * 4:,} bytes; dense it would take {pairs:,}"
    yield f"planes    C = {planes}" + (f", {fewest} suffice: bounds.simplify" if fewest < planes else "")
    yield f"visible   {visible:,} of {pairs:,} pairs, {visible / pairs:.1%}"
    cut = 1 - full - hidden
    yield f"tiles     of {_TILE} x {_TILE}: {hidden:.1%} skipped, {full:.1%} computed without a mask, {cut:.1%} cut"
    yield f"batch row {row} of {bounds.shape[0]}, head 0 of {bounds.shape[1]}; queries downwards, keys to the right:"
    yield to_text(bounds, q_len, batch=row if bounds.shape[0] > 1 else 0)


class TokensInFile(NamedTuple):
    """What a drawing says of the tokens of a batch: their texts, `[B, S]`, and their documents, int64 `[B, S]`."""

    tokens: list[list[str]] | None
    document_ids: Tensor | None

    @classmethod
    def of(cls, content: Any, tokenizer: str | None) -> TokensInFile:
        """Of what is in a file. Documents are found in positions.

        Args:
            tokenizer: a name or a folder; without it there are no texts.

        Raises:
            ValueError: when there is a tokenizer, but no `input_ids`.
        """
        batch = content if isinstance(content, Mapping) else {}
        return cls(
            None if tokenizer is None else _texts_of_tokens_in_file(batch, tokenizer), _document_ids_in_file(batch)
        )

    def row(self, row: int) -> TokensInFile:
        tokens, ids = self
        return TokensInFile(
            None if tokens is None else [tokens[row if len(tokens) > 1 else 0]],
            None if ids is None else ids[row if len(ids) > 1 else 0],
        )


def draw_mask_of_file(name: str, bounds: Tensor, q_len: int | None, labels: TokensInFile, row: int, path: Path) -> None:
    """The mask as a picture. Needs matplotlib."""
    from matplotlib.figure import Figure

    side = 5.5 if labels.tokens is None else 8
    figure = Figure(figsize=(side, side), layout="constrained")
    batch = row if bounds.shape[0] > 1 else 0
    plot(bounds, q_len, batch=batch, ax=figure.subplots(), title=name, **labels.row(row)._asdict())
    figure.savefig(path, dpi=150)


def write_page_of_file(masks: Mapping[str, Tensor], q_len: int | None, labels: TokensInFile, path: Path) -> None:
    """The masks as a page for a browser."""
    to_html(masks, q_len, **labels._asdict(), title=path.stem).save(path)


def _texts_of_tokens_in_file(batch: Mapping[str, Any], tokenizer: str) -> list[list[str]]:
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise ValueError("--tokenizer is for a batch with `input_ids` [B, S], and this file has none")
    loaded: Any = load_tokenizer(tokenizer)
    return [[loaded.decode(token) for token in row] for row in ids.tolist()]


def _document_ids_in_file(batch: Mapping[str, Any]) -> Tensor | None:
    """From positions. Beside bounds they may mean something else, as those of prefix trees do."""
    positions, mask = batch.get("position_ids"), batch.get("attention_mask")
    has_bounds = isinstance(mask, Mapping) or (isinstance(mask, Tensor) and mask.ndim == 4)
    if has_bounds or not isinstance(positions, Tensor) or positions.ndim != 2:
        return None
    starts = bounds_of.document_starts(bounds_of.document_ends(positions))
    return (starts == torch.arange(starts.shape[1])).cumsum(1) - 1
