"""Tile sizes, warps and stages of the portable kernels: a fixed table, so that no result depends on a tuner."""

from __future__ import annotations

from typing import NamedTuple

import torch

MAX_HEAD_DIM = 256


class Config(NamedTuple):
    """How one kernel is launched. ``use_descriptors``: load tiles by TMA descriptors where the tensors allow it."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    use_descriptors: bool = False


class Configs(NamedTuple):
    """The configurations of the kernels. Where forward and dQ have the same tiles, they share one schedule."""

    forward: Config
    key_value_gradient: Config
    query_gradient: Config


def _same(block_m: int, block_n: int, num_warps: int, num_stages: int) -> Configs:
    return Configs(*[Config(block_m, block_n, num_warps, num_stages)] * 3)


# {architecture: {largest head size: configs}} for float16 and bfloat16. The rows of sm_90 were measured (H200, Triton
# 3.6, packed causal documents, 32 query and 8 key heads). The others follow them as far as shared memory and
# registers allow, by what the compiler reports.
#
# Small thread blocks share a processor: each computes softmax while another multiplies. At D = 128 and 32K, 64 x 64
# with 4 warps reached 446 TFLOP/s forward, 128 x 128 with 8 warps 421, 128 x 64 with 8 warps 360; 128 x 64 with 4 warps
# 435, in a second run no less than 64 x 64. For dK/dV 64 x 64 took 8.2 ms where 64 x 128 with 8 warps took 10.2 and
# 128 x 128 11.6. At D = 64 two stages reached 409 TFLOP/s forward, three 392, 64 x 128 401, tiles of 128 rows 343. With
# pointers instead of TMA descriptors dQ took 6.2 ms instead of 5.4 and dK/dV 12.3 instead of 8.2; sm_80 has no
# descriptors.
_HOPPER = {
    64: Configs(Config(64, 64, 4, 2, True), Config(128, 64, 4, 2, True), Config(64, 64, 4, 2, True)),
    128: Configs(Config(64, 64, 4, 3, True), Config(64, 64, 4, 2, True), Config(64, 64, 4, 2, True)),
    256: Configs(Config(128, 64, 8, 2, True), Config(64, 64, 8, 2, True), Config(64, 64, 4, 2, True)),
}
_HALF = {
    "sm_80": {64: _same(64, 64, 4, 2), 128: _same(64, 64, 4, 2), 256: _same(64, 32, 4, 2)},
    # 99 KiB of shared memory: sm_86, sm_89, sm_120.
    "sm_86": {64: _same(64, 64, 4, 2), 128: _same(64, 64, 4, 2), 256: _same(32, 32, 4, 2)},
    "sm_90": _HOPPER,
    # dK/dV at 256 keeps more in shared memory here than on sm_90, more than there is with 64 rows.
    "sm_100": _HOPPER | {256: _HOPPER[256]._replace(key_value_gradient=Config(32, 64, 8, 2, True))},
    "gfx942": {64: _same(64, 64, 4, 1), 128: _same(64, 32, 4, 1), 256: _same(32, 32, 4, 1)},
}

# IEEE float32 products run on the vector units: only small tiles keep their operands in registers. dQ at D = 128 is the
# exception on sm_90, 4.1 ms with 32 x 32 and 7.2 ms with 16 x 16 (H200, 4K); sm_100 would spill 1 KiB a thread.
_FLOAT = {64: _same(32, 32, 4, 2), 128: _same(16, 16, 4, 2), 256: _same(16, 16, 4, 2)}
_FLOAT_HOPPER = _FLOAT | {128: _FLOAT[128]._replace(query_gradient=Config(32, 32, 4, 2))}


def architecture(device: torch.device) -> str:
    """The row of the table for a device; a GPU that is not in it gets the nearest row with no more shared memory."""
    if device.type != "cuda" or torch.version.hip:
        return "gfx942"
    capability = torch.cuda.get_device_capability(device)
    if capability >= (12, 0) or capability < (8, 0) or (8, 0) < capability < (9, 0):
        return "sm_86"
    return f"sm_{capability[0]}0"


def select_configs(device: torch.device, dtype: torch.dtype, head_dim: int) -> Configs | None:
    """The configurations for a dtype and the larger head size ``head_dim``; None if there is no kernel for it."""
    if head_dim > MAX_HEAD_DIM:
        return None
    row = architecture(device)
    table = _HALF[row] if dtype != torch.float32 else _FLOAT_HOPPER if row == "sm_90" else _FLOAT
    return next(configs for largest, configs in table.items() if head_dim <= largest)
