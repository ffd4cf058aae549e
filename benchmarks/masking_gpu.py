"""Making masks: flashmask compared with Transformers' `flex_attention` and `sdpa`.

    python benchmarks/masking_gpu.py               # a few minutes
    python benchmarks/masking_gpu.py --lengths     # only families; each is left out without any
    python benchmarks/masking_gpu.py --device cpu --lengths 512 --families     # checks itself without a GPU

Making is all work on masks in one training step for a row of packed documents. It includes Transformers' mask functions
as models call them. For flashmask it also includes the documents that the attention function adds, and the kernels'
schedules of tiles, forward and backward. `device` is the time from the first to the last kernel. The device is kept
busy until the host has gone ahead, so an implementation that reads a value back waits for the host in this time. `host`
is the time until the call returns. The profiler counts `launches` and `reads`, the waits of the host for the device.
`peak_mib` is the memory above the positions.

Families (families.py) have a file of their own: the masks that people train today, at the shapes of their projects.
They are made by `hf_flashmask.bounds` with the kernels' schedules, and by FlexAttention's `create_block_mask`,
compiled (its first call, which compiles, is not timed) and as it is. The latter has no row where it would evaluate
more than 2^30 pairs.

Before anything is timed, all implementations must show the same pairs.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from families import FAMILIES, Family
from masks import random_row
from measurement import RESULTS, build_schedules, peak_memory, require_gpu, time_on_cpu, time_on_gpu, write_results
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask
from torch.profiler import ProfilerActivity, profile
from transformers import MistralConfig, masking_utils

from hf_flashmask import bounds as bounds_of
from hf_flashmask import integration
from hf_flashmask.integration import flashmask_attention_forward

HEADS, KV_HEADS, HEAD_DIM, DTYPE = 32, 8, 128, torch.bfloat16
DOCUMENT_LENGTH = 2048  # on average
WINDOW = 4096
LONGEST_DENSE_MASK = 32768
LAYER = nn.Module()
MASKS: dict[str, tuple[str, ...]] = {
    "packed documents": ("full",),
    "packed documents, sliding window": ("sliding",),
    "packed documents, layers of both kinds": ("sliding", "full"),  # Gemma 3, gpt-oss
}
CREATORS = {
    "full": masking_utils.create_causal_mask,
    "sliding": masking_utils.create_sliding_window_causal_mask,
}


# Making masks


def packed_position_ids(length: int, device: str) -> Tensor:
    """`[1, length]`: random documents, the same ones for every run."""
    lengths = random_row(length, max(length // DOCUMENT_LENGTH, 2)).lengths
    return torch.cat([torch.arange(document) for document in lengths])[None].to(device)


@functools.cache
def config_for(implementation: str, window: int) -> MistralConfig:
    config = MistralConfig(sliding_window=window)
    config._attn_implementation = implementation
    return config


def create_masks(implementation: str, layers: tuple[str, ...], position_ids: Tensor, window: int) -> list[Any]:
    """What a model's forward pass asks Transformers for."""
    embeddings = torch.empty(*position_ids.shape, 1, dtype=DTYPE, device=position_ids.device)
    return [
        CREATORS[layer](
            config=config_for(implementation, window),
            inputs_embeds=embeddings,
            attention_mask=None,
            past_key_values=None,
            position_ids=position_ids,
        )
        for layer in layers
    ]


def make_bounds(layers: tuple[str, ...], position_ids: Tensor, window: int) -> list[Tensor]:
    """`create_masks` for flashmask, what its attention function adds to them, and the kernels' schedules."""
    made: list[Tensor] = []

    def only_schedule(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, **_: Any) -> Tensor:
        build_schedules(bounds, query, value)
        made.append(bounds)
        return query[:, :, :0]

    # Masks are kept as long as the tensor that they were made from, so each step has positions of its own.
    position_ids = position_ids.view_as(position_ids)
    one_head = torch.empty(1, 1, position_ids.shape[1], HEAD_DIM, dtype=DTYPE, device=position_ids.device)
    with (
        mock.patch.object(integration.attention, "flashmask_attention", only_schedule),
        mock.patch.object(integration.attention, "sees_most_keys", return_value=False),  # on the CPU
    ):
        for mask in create_masks("flashmask", layers, position_ids, window):
            flashmask_attention_forward(LAYER, one_head, one_head, one_head, mask, position_ids=position_ids)
    return made


def makers(layers: tuple[str, ...], position_ids: Tensor, window: int) -> dict[str, Callable[[], list[Any]]]:
    found: dict[str, Callable[[], list[Any]]] = {
        "flashmask": functools.partial(make_bounds, layers, position_ids, window),
        "flex_attention": functools.partial(create_masks, "flex_attention", layers, position_ids, window),
    }
    if position_ids.shape[1] <= LONGEST_DENSE_MASK:
        found["sdpa"] = functools.partial(create_masks, "sdpa", layers, position_ids, window)
    return found


def to_dense(made: Any, length: int) -> Tensor:
    """bool `[1, 1, length, length]` of any implementation's mask."""
    if isinstance(made, BlockMask):
        dense = create_mask(made.mask_mod, 1, 1, length, length, device=made.kv_num_blocks.device)
        rows, columns = made.BLOCK_SIZE
        blocks = made.to_dense().bool().repeat_interleave(rows, -2).repeat_interleave(columns, -1)
        assert not (dense & ~blocks[..., :length, :length]).any(), "a block that is visible is not in the block mask"
        return dense
    return bounds_of.to_dense(made) if made.dtype == torch.int32 else made


def check_makers(layers: tuple[str, ...], device: str) -> None:
    """The masks of every implementation, and the mask of each document."""
    length, window = 1100, 200
    position_ids = packed_position_ids(length, device)
    index = torch.arange(length, device=device)
    start = index - position_ids[0]
    expected = {"full": (start[:, None] == start) & (index[:, None] >= index)}
    expected["sliding"] = expected["full"] & (index[:, None] - index < window)
    for name, make in makers(layers, position_ids, window).items():
        for layer, made in zip(layers, make(), strict=True):
            assert torch.equal(to_dense(made, length)[0, 0], expected[layer]), f"{name} makes another {layer} mask"


def measure_making(name: str, layers: str, length: int, device: str) -> dict[str, Any]:
    make = makers(MASKS[layers], packed_position_ids(length, device), WINDOW)[name]
    row: dict[str, Any] = {"mask": layers, "length": length, "implementation": name}
    row["milliseconds"], row["spread"] = times(make, device)
    if device == "cuda":
        row.update(count_launches(make), peak_mib=peak_memory(make))
    return row


# Families of masks


MOST_PAIRS = 2**30  # that are evaluated without a compiler
CHECKED_DIVISOR = 32


def family_makers(family: Family, device: str) -> dict[str, Callable[[], Any]]:
    q_len, kv_len = family.q_len, family.kv_len
    element = torch.empty(1, dtype=DTYPE, device=device)
    query = element.expand(1, family.heads, q_len, HEAD_DIM)
    value = element.expand(1, family.kv_heads, kv_len, HEAD_DIM)

    def make_bounds_of_family() -> Tensor:
        made = family.bounds()
        build_schedules(made, query, value)
        return made

    def make_block_mask(is_compiled: bool) -> BlockMask:
        return create_block_mask(family.mask_mod, None, None, q_len, kv_len, device, _compile=is_compiled)

    found: dict[str, Callable[[], Any]] = {
        "flashmask": make_bounds_of_family,
        "create_block_mask, compiled": functools.partial(make_block_mask, True),
    }
    if q_len * kv_len <= MOST_PAIRS:
        found["create_block_mask"] = functools.partial(make_block_mask, False)
    return found


def check_family(name: str, device: str) -> None:
    """A small mask pair by pair, and at the full size the tiles that each implementation visits."""
    small = FAMILIES[name](CHECKED_DIVISOR, device)
    dense = create_mask(small.mask_mod, 1, 1, small.q_len, small.kv_len, device=device)
    assert torch.equal(bounds_of.to_dense(small.bounds(), small.q_len), dense), f"{name}: another mask"
    if device == "cpu":
        return
    family = FAMILIES[name](1, device)
    block_mask = family_makers(family, device)["create_block_mask, compiled"]()
    occupancy = bounds_of.tile_occupancy(family.bounds(), family.q_len, tile_size=block_mask.BLOCK_SIZE[0])
    rows, columns = occupancy.shape[2:]
    visited = block_mask.to_dense().bool()[..., :rows, :columns]
    assert torch.equal(visited, occupancy > 0), f"{name}: other tiles at the full size"


def measure_family(name: str, device: str) -> Iterator[dict[str, Any]]:
    torch._dynamo.reset()  # otherwise later masks would be compiled for any length
    check_family(name, device)
    family = FAMILIES[name](1 if device == "cuda" else CHECKED_DIVISOR, device)
    for implementation, make in family_makers(family, device).items():
        row: dict[str, Any] = {"mask": name, "q_len": family.q_len, "kv_len": family.kv_len}
        row["implementation"] = implementation
        row["milliseconds"], row["spread"] = times(make, device)
        if device == "cuda":
            row.update(count_launches(make), peak_mib=peak_memory(make))
        yield row


# Measuring


def times(function: Callable[[], Any], device: str) -> tuple[dict[str, float], dict[str, float]]:
    """Milliseconds, and their spread where they come with one."""
    measured = (time_on_gpu if device == "cuda" else time_on_cpu)(function)
    return (
        {"device": measured["milliseconds"], "host": host_time(function, device)},
        {"device": measured["spread"]},
    )


def host_time(function: Callable[[], Any], device: str, repeats: int = 30) -> float:
    """Milliseconds until the call returns, with nothing before it on the device."""
    elapsed = []
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        elapsed.append(1e3 * (time.perf_counter() - start))
    return round(median(elapsed), 4)


def count_launches(function: Callable[[], Any]) -> dict[str, int]:
    """Kernels, fills and copies on the device, and how often the host waits for it."""
    for _ in range(2):  # the first profile of a process is not complete
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            function()
            torch.cuda.synchronize()
    events = profiler.events() or []
    return {
        "launches": sum(event.device_type == DeviceType.CUDA for event in events),
        "reads": sum(event.name in ("cudaStreamSynchronize", "hipStreamSynchronize") for event in events),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="*", default=[8192, 32768, 131072])
    parser.add_argument("--families", nargs="*", choices=FAMILIES, default=list(FAMILIES), metavar="FAMILY")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON (default: %(default)s)")
    arguments = parser.parse_args()
    device = arguments.device
    if device == "cuda":
        require_gpu()
    settings = {
        "dtype": str(DTYPE).removeprefix("torch."),
        "heads": HEADS,
        "kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
    }
    making = []
    for mask, layers in MASKS.items() if arguments.lengths else ():
        check_makers(layers, device)
        for length in arguments.lengths:
            for name in makers(layers, packed_position_ids(length, device), WINDOW):
                making.append(measure_making(name, mask, length, device))
                print(making[-1], flush=True)
    if making:
        of_masks = settings | {"document_length": DOCUMENT_LENGTH, "window": WINDOW}
        print("wrote", write_results("masking_gpu", device, of_masks, making, arguments.output))
    families = []
    for name in arguments.families:
        for row in measure_family(name, device):
            families.append(row)
            print(row, flush=True)
        path = write_results("families_masking_gpu", device, settings, families, arguments.output)
    if families:
        print("wrote", path)


if __name__ == "__main__":
    main()
