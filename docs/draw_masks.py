"""Draws the pictures of masks in the README: `python docs/draw_masks.py` writes docs/masks/*.png."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib import pyplot
from torch import Tensor

from hf_flashmask.bounds import (
    bidirectional,
    causal,
    causal_with_blocks,
    chunked,
    from_document_ids,
    from_padding_mask,
    from_prefix_tree,
    hide_keys,
    intersect,
    prefix_lm,
    sliding_window,
    union,
)
from hf_flashmask.visualization import plot

LENGTH = 20
PIXELS = 320  # shown at half that size, for sharp screens


def masks() -> dict[str, Tensor]:
    token = torch.arange(LENGTH)
    documents = torch.tensor([0] * 6 + [1] * 4 + [2] * 10)
    images = torch.tensor([-1] * 3 + [0] * 5 + [-1] * 4 + [1] * 6 + [-1] * 2)
    window = sliding_window(4, LENGTH)
    return {
        "causal": causal(LENGTH),
        "packed_documents": from_document_ids(documents),
        "sliding_window": window,
        "packed_sliding_window": intersect(from_document_ids(documents), window),
        "bidirectional_documents": from_document_ids(documents, is_causal=False),
        "prefix_lm": prefix_lm(7, LENGTH),
        "image_blocks": causal_with_blocks(images),
        "chunked": chunked(5, LENGTH),
        "padding": from_padding_mask(token >= 5, is_causal=True),
        "global_and_sliding_window": intersect(
            causal(LENGTH), union(window, hide_keys(causal(LENGTH), token[None] > 2))
        ),
        "shared_prompt": from_prefix_tree([-1, 0, 0], [8, 5, 7]),
        "prefix_tree": from_prefix_tree([-1, 0, 1, 1, 0, 4, 4], [4, 3, 2, 3, 2, 4, 2]),
        "bidirectional": bidirectional(LENGTH),
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
