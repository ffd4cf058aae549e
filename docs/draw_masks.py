"""Draws the pictures of masks in the README: `python docs/draw_masks.py` writes docs/masks/*.png."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from matplotlib import pyplot
from torch import Tensor

from hf_flashmask.bounds import (
    bidirectional,
    causal,
    causal_with_blocks,
    chunked,
    from_block_mask,
    from_document_ids,
    from_padding_mask,
    from_prefix_tree,
    global_and_sliding_window,
    hash_sparse,
    intersect,
    prefix_lm,
    sliding_window,
)
from hf_flashmask.visualization import plot

LENGTH = 20
PIXELS = 320  # shown at half that size, for sharp screens


def masks() -> dict[str, Tensor]:
    token = torch.arange(LENGTH)
    lengths = [6, 4, 10]
    documents = torch.arange(3).repeat_interleave(torch.tensor(lengths))
    position = torch.cat([torch.arange(length) for length in lengths])
    each_document = from_document_ids(documents, is_causal=False)
    prefix = position < torch.tensor([2, 3, 4])[documents]
    images = torch.tensor([-1] * 3 + [0] * 5 + [-1] * 4 + [1] * 6 + [-1] * 2)
    window = sliding_window(4, LENGTH)
    itself_and_by_the_last = torch.tensor([[True, False, False], [False, True, False], [True, True, True]])
    not_the_second_itself = ~torch.diag(torch.tensor([False, True, False]))
    draw = random.Random(2).choices  # the same in every version of Python
    query_hashes, key_hashes = torch.tensor(draw(range(4), k=2 * LENGTH)).view(2, 1, 1, LENGTH)
    evicted_at = token + torch.tensor(draw(range(3, LENGTH), k=LENGTH))
    return {
        "causal": causal(LENGTH),
        "packed_documents": from_document_ids(documents),
        "sliding_window": window,
        "packed_sliding_window": intersect(from_document_ids(documents), window),
        "bidirectional_documents": each_document,
        "prefix_lm": prefix_lm(7, LENGTH),
        "image_blocks": causal_with_blocks(images),
        "chunked": chunked(5, LENGTH),
        "padding": from_padding_mask(token >= 5, is_causal=True),
        "global_and_sliding_window": global_and_sliding_window(2, 2, LENGTH, is_causal=False),
        "attention_sinks": global_and_sliding_window(3, 4, LENGTH),
        "shared_prompt": from_prefix_tree([-1, 0, 0], [8, 5, 7]),
        "prefix_tree": from_prefix_tree([-1, 0, 1, 1, 0, 4, 4], [4, 3, 2, 3, 2, 4, 2]),
        "bidirectional": bidirectional(LENGTH),
        "prefix_lm_documents": intersect(each_document, causal_with_blocks(torch.where(prefix, documents, -1))),
        "block_causal_documents": intersect(each_document, causal_with_blocks(position // 2)),
        "causal_blockwise": from_block_mask(itself_and_by_the_last, lengths),
        "qk_sparse": from_block_mask(not_the_second_itself, lengths),
        "hash_sparse": hash_sparse(query_hashes, key_hashes),
        "random_eviction": evicted_at.int()[None, None, None],
        "random_intervals": torch.tensor(draw(range(LENGTH + 1), k=4 * LENGTH)).int().view(1, 1, 4, LENGTH),
    }


def main() -> None:
    folder = Path(__file__).parent / "masks"
    folder.mkdir(exist_ok=True)
    for name, bounds in masks().items():
        figure = pyplot.figure(figsize=(PIXELS / 100, PIXELS / 100), dpi=100)
        ax = plot(bounds, ax=figure.add_axes((0, 0, 1, 1)))
        ax.set_axis_off()
        ax.set_title("", loc="right")
        figure.savefig(folder / f"{name}.png", transparent=True)
        pyplot.close(figure)


if __name__ == "__main__":
    main()
