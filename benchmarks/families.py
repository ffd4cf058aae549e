"""The masks that people train today, at the shapes of the projects that train them.

`FAMILIES` lists for each mask how `hf_flashmask.bounds` makes it and the `mask_mod` that users of FlexAttention write.
Both are given what a step is given: ids, anchors or lengths on the device. A divisor makes the same mask smaller, for
checks against a dense one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from masks import Mask, random_row
from torch import Tensor

from hf_flashmask import bounds


class Family(NamedTuple):
    """A mask at the shape of a project: its bounds, made anew by each call, and FlexAttention's predicate."""

    q_len: int
    kv_len: int
    bounds: Callable[[], Tensor]
    mask_mod: Callable[..., Tensor]
    heads: int = 32
    kv_heads: int = 8

    def mask(self) -> Mask:
        return Mask(self.bounds, self.mask_mod)


def packed_ids(length: int, document_length: int, device: str) -> Tensor:
    """int32 `[1, length]`: random documents, the same ones for every run."""
    lengths = torch.tensor(random_row(length, max(length // document_length, 2)).lengths)
    return torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(lengths)[None].to(device)


def sees_block_diffusion(document: Tensor, block: Tensor) -> Callable[..., Tensor]:
    """FlexAttention's predicate of a row `[x_t | x_0]`, whose halves have these documents and blocks, int32 `[L]`."""
    count = len(document)

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        q_clean, k_clean = q >= count, k >= count
        q, k = q % count, k % count
        before, same = block[q] > block[k], block[q] == block[k]
        by_noisy = torch.where(k_clean, before, same)
        by_clean = k_clean & (before | same)
        return torch.where(q_clean, by_clean, by_noisy) & (document[q] == document[k])

    return visible


def block_diffusion(length: int, block_size: int, documents: int | None) -> Callable[[int, str], Family]:
    def family(divisor: int, device: str) -> Family:
        count = length // divisor
        ids = None if documents is None else packed_ids(count, documents // divisor, device)
        document = torch.zeros(count, dtype=torch.int32, device=device) if ids is None else ids[0]
        place = torch.arange(count, device=device) - torch.searchsorted(document, document)
        visible = sees_block_diffusion(document, (place // block_size).int())

        def make() -> Tensor:
            return bounds.block_diffusion(block_size, document_ids=ids, length=count, device=device)

        return Family(2 * count, 2 * count, make, visible)

    return family


def block_diffusion_decoder(divisor: int, device: str) -> Family:
    prompt, response, block_size = 6144 // divisor, 2048 // divisor, 256 // divisor
    encoder = prompt + response
    prompts = torch.tensor([prompt], device=device)

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        block = q // block_size
        return torch.where(k < encoder, k < prompts[0] + block * block_size, (k - encoder) // block_size == block)

    def make() -> Tensor:
        return bounds.block_diffusion_decoder(prompts, response, encoder, block_size)

    return Family(response, encoder + response, make, visible)


def sees_anchored_blocks(
    document: Tensor, anchor: Tensor, block_size: int, window: int | None = None
) -> Callable[..., Tensor]:
    """FlexAttention's predicate of blocks after anchors `[N]` in a context of these documents, int32 `[S]`."""
    ctx_len = len(document)

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        block = q // block_size
        at, key = anchor[block], k.clamp(max=ctx_len - 1)
        in_context = (k < at) & (document[at] == document[key])
        if window is not None:
            in_context = in_context & (k >= at - window)
        return torch.where(k < ctx_len, in_context, (k - ctx_len) // block_size == block)

    return visible


def anchored_blocks(anchors: int, block_size: int, window: int | None = None) -> Callable[[int, str], Family]:
    """A context of 4,096 tokens in packed documents; anchors are drawn at random."""

    def family(divisor: int, device: str) -> Family:
        ctx_len, count = 4096 // divisor, anchors // divisor
        ids = packed_ids(ctx_len, 1024 // divisor, device)
        near = None if window is None else window // divisor
        drawn = torch.randperm(ctx_len, generator=torch.Generator().manual_seed(0))[:count].sort().values
        anchor = drawn.int().to(device)

        def make() -> Tensor:
            return bounds.anchored_blocks(anchor[None], block_size, ctx_len, document_ids=ids, sliding_window=near)

        visible = sees_anchored_blocks(ids[0], anchor, block_size, near)
        return Family(count * block_size, ctx_len + count * block_size, make, visible)

    return family


def training_time_test(divisor: int, device: str) -> Family:
    length, step = 4096 // divisor, 6
    ids = packed_ids(length, 1024 // divisor, device)
    document = ids[0]

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return torch.where(k < length, (k <= q) & (document[q] == document[k % length]), k % length == q)

    def make() -> Tensor:
        return bounds.training_time_test(step, document_ids=ids)

    return Family(length, (step + 1) * length, make, visible)


def parallel_eagle(divisor: int, device: str) -> Family:
    """All positions at depth 0, and at each further depth of 8 a random share, 0.75 of the one before."""
    length = 4096 // divisor
    ids = packed_ids(length, 1024 // divisor, device)
    random = torch.rand(length, 8, generator=torch.Generator().manual_seed(0))
    anchor, depth = ((random < 0.75 ** torch.arange(8)).int().cumprod(1) > 0).nonzero().int().to(device).unbind(1)
    document = ids[0]

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        of_trunk = (depth[k] == 0) & (anchor[k] <= anchor[q])
        of_chain = (anchor[k] == anchor[q]) & (depth[k] <= depth[q])
        return (document[anchor[q]] == document[anchor[k]]) & (of_trunk | of_chain)

    def make() -> Tensor:
        return bounds.parallel_eagle(anchor, depth, document_ids=ids)

    return Family(len(anchor), len(anchor), make, visible)


def splits(divisor: int, device: str) -> Family:
    """BAGEL's packed samples: text, an image that is seen, text, an image that is generated."""
    lengths = [256 // divisor, 1024 // divisor, 128 // divisor, 896 // divisor] * 16
    modes = ["causal", "full", "causal", "noise"] * 16
    samples = [sum(lengths[:4])] * 16
    length = sum(lengths)
    split = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(torch.tensor(lengths)).to(device)
    is_text = torch.tensor([mode == "causal" for mode in modes], device=device)[split]
    is_noise = torch.tensor([mode == "noise" for mode in modes], device=device)[split]

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        one = split[q] == split[k]
        return (split[q] // 4 == split[k] // 4) & ((k <= q) | (one & ~is_text[k])) & (~is_noise[k] | one)

    def make() -> Tensor:
        return bounds.from_splits(lengths, modes, document_lens=samples, device=device)

    return Family(length, length, make, visible, 28, 4)


def frames(is_teacher_forcing: bool, window: int | None) -> Callable[[int, str], Family]:
    """Wan's 21 frames of 1,560 tokens, in chunks of 3."""

    def family(divisor: int, device: str) -> Family:
        frame_seqlen, per_chunk = 1560 // divisor, 3
        length = 21 * frame_seqlen
        frame = torch.arange(length, device=device, dtype=torch.int32) // frame_seqlen

        def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            q_frame, k_frame = q % length // frame_seqlen, k % length // frame_seqlen
            q_chunk, k_chunk = q_frame // per_chunk, k_frame // per_chunk
            sees = k_chunk <= q_chunk
            if window is not None:
                sees = sees & (k_frame >= (q_chunk + 1) * per_chunk - window)
            one, q_noisy, k_noisy = q_chunk == k_chunk, q >= length, k >= length
            return torch.where(k_noisy, q_noisy & one, sees & ~(q_noisy & one))

        def make() -> Tensor:
            of_frames = bounds.teacher_forcing if is_teacher_forcing else bounds.frame_causal
            return of_frames(frame, num_frame_per_block=per_chunk, local_attn_size=window)

        rows = (1 + is_teacher_forcing) * length
        return Family(rows, rows, make, visible, 12, 12)

    return family


def image_blocks_in_window(divisor: int, device: str) -> Family:
    """Gemma 3: images of 256 tokens in text, local layers."""
    length, image, window = 32768 // divisor, 256 // divisor, 1024 // divisor
    position = torch.arange(length, device=device, dtype=torch.int32)
    block = torch.where(position // image % 4 == 1, position // image, -1)

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return ((k <= q) | ((block[q] == block[k]) & (block[k] >= 0))) & (q - k < window)

    def make() -> Tensor:
        return bounds.causal_with_blocks(block, window=window, window_limits_blocks=True)

    return Family(length, length, make, visible, 16, 8)


def packed(
    make: Callable[[int, Tensor], Tensor], visible: Callable[..., Tensor], length: int = 32768
) -> Callable[[int, str], Family]:
    """Packed rows. `make` gets the divisor and the document ids, `visible` also q, k and their places in documents."""

    def family(divisor: int, device: str) -> Family:
        count = length // divisor
        ids = packed_ids(count, 2048 // divisor, device)
        document = ids[0]
        place = (torch.arange(count, device=device) - torch.searchsorted(document, document)).int()

        def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (document[q] == document[k]) & visible(divisor, q, k, place[q], place[k])

        return Family(count, count, lambda: make(divisor, ids), mask_mod)

    return family


def streaming_chunks(divisor: int, ids: Tensor) -> Tensor:
    return bounds.streaming_chunks(64 // divisor, left_chunks=8, document_ids=ids)


def sees_streaming_chunks(divisor: int, q: Tensor, k: Tensor, q_place: Tensor, k_place: Tensor) -> Tensor:
    behind = q_place // (64 // divisor) - k_place // (64 // divisor)
    return (behind >= 0) & (behind <= 8)


def sinks_and_window(divisor: int, ids: Tensor) -> Tensor:
    return bounds.sinks_and_window(4, 1024 // divisor, document_ids=ids)


def sees_sinks_and_window(divisor: int, q: Tensor, k: Tensor, q_place: Tensor, k_place: Tensor) -> Tensor:
    return (k <= q) & ((q - k < 1024 // divisor) | (k_place < 4))


def parts(kind: str) -> Callable[[int, str], Family]:
    """One row of 32,768 tokens in parts of 512: chunks and a question, items, chunks with gist tokens, branches."""

    def family(divisor: int, device: str) -> Family:
        length, size = 32768 // divisor, 512 // divisor
        position = torch.arange(length, device=device, dtype=torch.int32)
        part = position // size
        last = length // size - 1
        outside = (part == 0) | (part == last) if kind != "isolated items" else part == 0
        ids = torch.where(outside, -1, part)
        is_gist = position % size >= size - 16 // min(divisor, 16)

        def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            one = (part[q] == part[k]) | (ids[k] < 0)
            if kind == "gist tokens":
                one = one | is_gist[k]
            elif kind != "isolated items":
                one = one | (part[q] == last)
            return (k <= q) & one

        def make() -> Tensor:
            if kind == "gist tokens":
                return bounds.gist_tokens(ids, is_gist)
            if kind == "isolated items":
                return bounds.isolated_items(ids)
            return bounds.independent_chunks(ids) if kind == "independent chunks" else bounds.fork_and_join(ids)

        return Family(length, length, make, visible)

    return family


def hstu(divisor: int, device: str) -> Family:
    """16 histories of 2,048 tokens, each with 16 contexts and 256 targets."""
    size, contexts, targets = 2048 // divisor, 16 // min(divisor, 8), 256 // divisor
    cu_seqlens = torch.arange(0, 17 * size, size, dtype=torch.int32, device=device)
    counts = [torch.full((16,), count, dtype=torch.int32, device=device) for count in (contexts, targets)]

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        q_place, k_place = q % size, k % size
        is_target = k_place >= size - targets
        by_context = (q_place < contexts) & ~is_target
        return (q // size == k // size) & (by_context | ((k <= q) & (~is_target | (q == k))))

    def make() -> Tensor:
        return bounds.hstu(cu_seqlens, 16 * size, num_contexts=counts[0], num_targets=counts[1])

    return Family(16 * size, 16 * size, make, visible, 4, 4)


FAMILIES: dict[str, Callable[[int, str], Family]] = {
    "block diffusion": block_diffusion(4096, 32, None),  # dFactory, dllm
    "block diffusion, packed": block_diffusion(32768, 4, 2048),  # SDAR
    "block diffusion decoder": block_diffusion_decoder,  # DiffusionGemma
    "anchored blocks": anchored_blocks(3072, 8),  # speculators
    "anchored blocks, window": anchored_blocks(512, 16, 2048),
    "training-time test": training_time_test,  # EAGLE-3, last of 7 steps
    "parallel EAGLE": parallel_eagle,
    "splits": splits,  # BAGEL
    "frame-causal, window": frames(False, 9),  # Self-Forcing
    "teacher forcing": frames(True, None),
    "image blocks in a window": image_blocks_in_window,  # Gemma 3
    "streaming chunks": packed(streaming_chunks, sees_streaming_chunks),
    "sinks and window": packed(sinks_and_window, sees_sinks_and_window),
    "independent chunks": parts("independent chunks"),
    "isolated items": parts("isolated items"),
    "gist tokens": parts("gist tokens"),
    "fork and join": parts("fork and join"),
    "HSTU": hstu,
}
