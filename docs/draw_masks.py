"""Draws the pictures of masks in the README: `python docs/draw_masks.py` writes docs/masks/*.png."""

from __future__ import annotations

import random
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib import pyplot
from torch import Tensor

from hf_flashmask.bounds import (
    anchored_blocks,
    bidirectional,
    block_diffusion,
    block_diffusion_decoder,
    causal,
    causal_with_blocks,
    chunked,
    fork_and_join,
    frame_causal,
    from_block_mask,
    from_document_ids,
    from_padding_mask,
    from_prefix_tree,
    from_splits,
    gist_tokens,
    global_and_sliding_window,
    hash_sparse,
    hstu,
    independent_chunks,
    intersect,
    isolated_items,
    parallel_eagle,
    prefix_lm,
    sinks_and_window,
    sliding_window,
    streaming_chunks,
    teacher_forcing,
    training_time_test,
)
from hf_flashmask.visualization import plot

LENGTH = 20
PIXELS = 320  # shown at half that size, for sharp screens


class Picture(NamedTuple):
    """What is drawn: bounds, and the number of rows where it differs from that of the keys."""

    bounds: Tensor
    q_len: int = LENGTH


def pictures() -> dict[str, Picture]:
    return {name: Picture(bounds) for name, bounds in {**masks(), **families()}.items()} | rectangles()


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


def families() -> dict[str, Tensor]:
    position = torch.arange(LENGTH)
    documents = torch.arange(3).repeat_interleave(torch.tensor([6, 4, 10]))
    images = torch.tensor([-1] * 2 + [0] * 7 + [-1] * 2 + [1] * 7 + [-1] * 2)
    chunks = torch.tensor([-1] * 3 + [0] * 4 + [1] * 4 + [2] * 4 + [-1] * 5)
    branches = torch.tensor([-1] * 2 + [0] * 8 + [1] * 7 + [-1] * 3)
    inner = torch.tensor([-1] * 4 + [0] * 2 + [1] * 2 + [-1] * 12)
    depths = [4, 1, 3, 2, 4, 2, 1, 3]
    anchors = torch.arange(len(depths)).repeat_interleave(torch.tensor(depths))
    depth = torch.cat([torch.arange(count) for count in depths])
    ends, three, eight = torch.tensor([0, LENGTH]), torch.tensor([3]), torch.tensor([8])
    return {
        "window_of_two_sides": sliding_window((4, 2), LENGTH),
        "image_blocks_in_window": causal_with_blocks(images, window=5, window_limits_blocks=True),
        "block_diffusion": block_diffusion(2, length=LENGTH // 2),
        "parallel_eagle": parallel_eagle(anchors, depth),
        "splits": from_splits([3, 5, 3, 4, 5], ["causal", "full", "causal", "noise", "causal"]),
        "frame_causal": frame_causal(position // 2, local_attn_size=3, sink_size=1),
        "teacher_forcing": teacher_forcing(position[: LENGTH // 2] // 2),
        "streaming_chunks": streaming_chunks(4, left_chunks=1, look_ahead_chunks=1, length=LENGTH),
        "independent_chunks": independent_chunks(chunks),
        "isolated_items": isolated_items(torch.where(position < 8, -1, position // 4)),
        "gist_tokens": gist_tokens(position // 5, position % 5 == 4),
        "sinks_and_window": sinks_and_window(1, 3, document_ids=documents),
        "hstu": hstu(ends, LENGTH, num_contexts=three, num_targets=eight, target_group_size=2),
        "fork_and_join": fork_and_join(torch.stack([branches, inner])[None]),
    }


def rectangles() -> dict[str, Picture]:
    anchors = torch.tensor([[3, 6, 10]])
    return {
        "block_diffusion_decoder": Picture(block_diffusion_decoder(4, 8, 12, 4), 8),
        "anchored_blocks": Picture(anchored_blocks(anchors, 3, 11), 9),
        "training_time_test": Picture(training_time_test(1, length=LENGTH // 2), LENGTH // 2),
    }


def main() -> None:
    folder = Path(__file__).parent / "masks"
    folder.mkdir(exist_ok=True)
    for name, (bounds, q_len) in pictures().items():
        height = round(PIXELS * q_len / bounds.shape[3])
        figure = pyplot.figure(figsize=(PIXELS / 100, height / 100), dpi=100)
        ax = plot(bounds, q_len, ax=figure.add_axes((0, 0, 1, 1)))
        ax.set_axis_off()
        ax.set_title("", loc="right")
        figure.savefig(folder / f"{name}.png", transparent=True)
        pyplot.close(figure)


if __name__ == "__main__":
    main()
