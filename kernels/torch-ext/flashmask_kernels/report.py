"""Which kernels compute on a device, in words, and why not faster ones."""

from __future__ import annotations

import torch

from . import environment

_TILES = {
    "sm_80": "tiles by the compiler's report",
    "sm_86": "tiles for 99 KiB of shared memory, by the compiler's report",
    "sm_90": "tiles measured on an H200",
    "sm_100": "tiles by the compiler's report",
    "gfx942": "tiles for gfx942, which the tests compile and nobody has run",
}
_HEAD_SIZES = range(8, 513)


def describe_kernels(device: torch.device) -> list[str]:
    """A line for each family of kernels, the fastest first: what it computes on this device, or why it does not."""
    if device.type != "cuda":
        return ["tiled PyTorch: exact, skips hidden tiles"]
    try:
        from . import configs
    except ImportError as error:
        return [f"tiled PyTorch, exact but slow, because Triton does not import ({error}): install triton"]
    return [
        _describe_specialized(device),
        f"portable Triton kernels, {_TILES[configs.architecture(device)]}",
        "tiled PyTorch for float64, and for float32 with heads larger than 256",
        _describe_launch(),
    ]


def _describe_specialized(device: torch.device) -> str:
    from .configs import reason_against_hopper, select_specialized_configs
    from .dispatch import FEWEST_SPECIALIZED_ELEMENTS

    if reason := "FLASHMASK_PORTABLE is 1" if environment.PORTABLE else reason_against_hopper(device):
        return f"special kernels NOT used: {reason}"
    sizes = [size for size in _HEAD_SIZES if select_specialized_configs(device, torch.bfloat16, size) is not None]
    return (
        f"kernels for sm_90: 16-bit heads of {sizes[0]} to {sizes[-1]} from {FEWEST_SPECIALIZED_ELEMENTS:,} elements "
        "of the query, without softcap and dropout"
    )


def _describe_launch() -> str:
    from .launch.launcher import reason_against_fast_launch

    reason = reason_against_fast_launch()
    return "fast launch of the portable kernels" + ("" if reason is None else f" NOT used: {reason}")
