"""Tile sizes, warps and stages of the kernels: a fixed table, so that no result depends on a tuner."""

from __future__ import annotations

import functools
import re
import warnings
from typing import NamedTuple

import torch
import triton

TRITON_VERSION = tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:2])


class Config(NamedTuple):
    """How one kernel is launched.

    Attributes:
        use_descriptors: load tiles by TMA descriptors where the tensors allow it.
        query_in_registers: of the forward kernel.
        of_short_rows: ``block_m``, ``block_n``, ``num_warps`` and ``num_stages`` for rows too short for descriptors;
            None: the same as for long rows.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    use_descriptors: bool = False
    query_in_registers: bool = False
    of_short_rows: tuple[int, int, int, int] | None = None

    @property
    def options(self) -> dict[str, int]:
        """What Triton compiles a portable kernel with."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


class Configs(NamedTuple):
    """The configurations of the kernels. Where forward and dQ have the same tiles, they share one schedule."""

    forward: Config
    key_value_gradient: Config
    query_gradient: Config

    def without_descriptors(self, *kernels: str) -> Configs:
        """For short rows, where the host takes longer to make the descriptors of ``kernels`` than they save."""
        return self._replace(**{kernel: getattr(self, kernel)._replace(use_descriptors=False) for kernel in kernels})

    def for_short_rows(self, *kernels: str) -> Configs:
        """`without_descriptors`, with tiles that suit pointers."""
        own = {kernel: Config(*tile) for kernel in kernels if (tile := getattr(self, kernel).of_short_rows)}
        return self.without_descriptors(*kernels)._replace(**own)


def _same(block_m: int, block_n: int, num_warps: int, num_stages: int) -> Configs:
    return Configs(*[Config(block_m, block_n, num_warps, num_stages)] * 3)


# {architecture: {largest head size: configs}} for float16 and bfloat16. The rows of sm_90 were measured (H200, Triton
# 3.6, bfloat16, 32 query and 8 key heads; 32K tokens, causal / documents of 4K / of 800 tokens). The others follow them
# as far as shared memory and registers allow, by what the compiler reports.
#
# Forward in ms, D = 128: 64 x 64 with 4 warps, the query in registers and 3 stages 16.3 / 6.0 / 0.90; with 2 stages
# 18.1 / 6.4 / 0.88; from shared memory with 2 stages 18.3 / 6.4 / 0.82, with 3 stages 21.1 / 7.6 / 1.40; 128 x 64 with
# 4 warps 17.9 / 6.6 / 0.90, with 8 warps and 3 stages 17.8 / 6.6 / 1.07; 128 x 128 with 8 warps 18.5 / 6.6 / 1.05.
# D = 64: 64 x 64 with 2 stages 9.4 / 3.4 / 0.43, with 3 stages 9.8 / 3.8 / 0.53, with the query in registers
# 10.5 / 3.8 / 0.51; 64 x 128 9.0 / 3.3 / 0.51; tiles of 128 rows 10.1 or more.
# Backward in all, D = 128: 53.4 / 19.3 / 2.07; dK/dV by 64 x 128 with 8 warps 58.9 / 19.7 / 2.43, with one stage 65.9;
# dQ by 128 x 128 with 8 warps 53.3 / 18.9 / 2.41, with 3 stages 55.7. D = 64: 28.1 / 9.8 / 1.24; dK/dV by 64 x 64
# 34.4 / 11.7 / 1.34; dQ by 128 x 64 28.2 / 10.3 / 1.38. Without TMA descriptors dQ took 6.2 ms instead of 5.4 and dK/dV
# 12.3 instead of 8.2; sm_80 has none. At 1K tokens and D = 128, dK/dV by pointers took 52 / 96 / 90 us (packed, causal,
# bidirectional documents) by 32 x 64 with 3 stages, 68 / 112 / 125 by 64 x 64.
_HOPPER = {
    64: Configs(Config(64, 64, 4, 2, True), Config(128, 64, 4, 2, True), Config(64, 64, 4, 2, True)),
    128: Configs(
        Config(64, 64, 4, 3, True, True),
        Config(64, 64, 4, 2, True, of_short_rows=(32, 64, 4, 3)),
        Config(64, 64, 4, 2, True),
    ),
    256: Configs(
        Config(128, 64, 8, 2, True),
        Config(64, 64, 8, 2, True, of_short_rows=(32, 32, 8, 2)),
        Config(64, 64, 4, 2, True),
    ),
    512: Configs(Config(64, 32, 8, 2), Config(32, 32, 8, 1), Config(32, 32, 8, 1)),
}
_HALF = {
    "sm_80": {64: _same(64, 64, 4, 2), 128: _same(64, 64, 4, 2), 256: _same(64, 32, 4, 2), 512: _same(32, 32, 8, 1)},
    # 99 KiB of shared memory: sm_86, sm_89, sm_120.
    "sm_86": {64: _same(64, 64, 4, 2), 128: _same(64, 64, 4, 2), 256: _same(32, 32, 4, 2), 512: _same(16, 16, 4, 1)},
    "sm_90": _HOPPER,
    # By the compiler's report: these fit into shared memory and spill least.
    "sm_100": {
        64: Configs(*[Config(64, 64, 4, 2, True)] * 3),
        128: Configs(
            Config(64, 64, 4, 2, True),
            Config(64, 64, 4, 2, True, of_short_rows=(32, 64, 8, 3)),
            Config(64, 64, 4, 2, True),
        ),
        256: Configs(
            Config(128, 64, 8, 1, True),
            Config(32, 64, 8, 2, True, of_short_rows=(32, 32, 8, 2)),
            Config(64, 64, 8, 2, True),
        ),
        512: _same(32, 32, 8, 1),
    },
    "gfx942": {64: _same(64, 64, 4, 1), 128: _same(64, 32, 4, 1), 256: _same(32, 32, 4, 1), 512: _same(16, 16, 4, 1)},
}

# IEEE float32 products run on the vector units: only small tiles keep their operands in registers. dQ at D = 128 is the
# exception on sm_90, 4.1 ms with 32 x 32 and 7.2 ms with 16 x 16 (H200, 4K); sm_100 would spill 1 KiB a thread.
# Larger heads keep nothing in registers at any size: plain torch is as fast.
_FLOAT = {64: _same(32, 32, 4, 2), 128: _same(16, 16, 4, 2), 256: _same(16, 16, 4, 2)}
_FLOAT_HOPPER = _FLOAT | {128: _FLOAT[128]._replace(query_gradient=Config(32, 32, 4, 2))}


# Few rows against many keys: `block_m` is the most rows of a tile, which fewer rows do not fill. Tiles of 16 KiB.
_DECODING = {64: Config(32, 128, 4, 3), 128: Config(32, 64, 4, 3), 256: Config(32, 32, 4, 3), 512: Config(16, 16, 4, 3)}
_DECODING_FLOAT = {64: Config(16, 64, 4, 2), 128: Config(16, 32, 4, 2), 256: Config(16, 16, 4, 2)}


# `hopper`'s tiles are what two consumers of 64 rows or columns take; stages are what shared memory holds. Forward and
# backward in ms at D = 128 against the portable kernels in one run (H200, Triton 3.6, bfloat16, 32 query and 8 key
# heads, 32K tokens): causal 13.8 / 45.3 against 15.9 / 50.0, full 27.0 / 92.1 against 32.3 / 103.5, documents of 3200
# tokens 1.38 / 4.54 against 1.73 / 5.17, of 800 0.77 / 1.76 against 0.81 / 1.93, of 400 0.76 / 1.47 against
# 0.67 / 1.42.
# At D = 64, with the fused backward: causal 9.7 / 22.8 against 10.7 / 27.6, full 20.4 / 44.4 against 20.4 / 54.2,
# documents of 2.7K 1.71 / 3.71 against 1.72 / 4.34, of 800 0.63 / 1.10 against 0.50 / 1.23, a window of 2K 1.38 / 3.13
# against 1.44 / 3.41; two kernels for the gradients are as fast as the portable ones, causal 27.4. A forward with three
# consumers, 192 x 128, took 9.7, 18.3, 1.92, 0.97 and 1.53: less only where nearly all tiles are full. Statistics of
# the next step loaded while products run gained nothing in the backward, 22.9, 45.0, 3.97, 1.16 and 3.19.
# Heads of 256 and 512: docs/hopper.md.
_SMALLEST_SPECIALIZED_DIM = 33
_SPECIALIZED = {
    64: Configs(Config(128, 128, 8, 4, True), Config(64, 128, 8, 3, True), Config(128, 128, 8, 2, True)),
    128: Configs(Config(128, 128, 8, 2, True), Config(64, 128, 8, 3, True), Config(128, 128, 8, 2, True)),
    256: Configs(Config(128, 64, 8, 2, True), Config(64, 64, 8, 2, True), Config(128, 64, 8, 2, True)),
    512: Configs(Config(64, 32, 8, 2, True), Config(16, 64, 8, 2, True), Config(64, 32, 8, 2, True)),
}
LARGEST_FUSED_DIM = 64
# dQ's tiles are those in which rows are computed again after NaN: the forward's, whose schedule they share.
_FUSED = _SPECIALIZED[64]._replace(
    key_value_gradient=Config(64, 128, 12, 2, True), query_gradient=_SPECIALIZED[64].forward
)
# Gluon promises no stability. They compile with all of these (`make tritons`); an H200 tests 3.6, 3.8 and 3.9.
_OLDEST_GLUON, _NEWEST_GLUON = (3, 6), (3, 9)
_HAS_GLUON = _OLDEST_GLUON <= TRITON_VERSION <= _NEWEST_GLUON


@functools.lru_cache
def architecture(device: torch.device) -> str:
    """The row of the table for a device; a GPU that is not in it gets the nearest row with no more shared memory."""
    return "gfx942" if torch.version.hip else _row_of(torch.cuda.get_device_capability(device))


def _row_of(capability: tuple[int, int]) -> str:
    if capability == (8, 0):
        return "sm_80"
    if capability[0] == 9:
        return "sm_90"
    if capability[0] in (10, 11):  # both have as much shared memory
        return "sm_100"
    return "sm_86"


def select_configs(device: torch.device, dtype: torch.dtype, head_dim: int) -> Configs | None:
    """The configurations for a dtype and the larger head size ``head_dim``; None if there is no kernel for it."""
    row = architecture(device)
    table = _HALF[row] if dtype != torch.float32 else _FLOAT_HOPPER if row == "sm_90" else _FLOAT
    return next((configs for largest, configs in table.items() if head_dim <= largest), None)


def select_decoding_config(device: torch.device, dtype: torch.dtype, head_dim: int) -> Config | None:
    """The configuration of the kernel for few rows; None if there is none for this dtype and head size."""
    table = _DECODING if dtype != torch.float32 else _DECODING_FLOAT
    chosen = next((config for largest, config in table.items() if head_dim <= largest), None)
    if chosen is not None and architecture(device) == "gfx942":  # 64 KiB of shared memory
        return chosen._replace(num_stages=2)
    return chosen


def select_specialized_configs(device: torch.device, dtype: torch.dtype, head_dim: int) -> Configs | None:
    """The configurations of the kernels of `hopper`; None where these have none."""
    if dtype == torch.float32 or head_dim < _SMALLEST_SPECIALIZED_DIM or architecture(device) != "sm_90":
        return None
    chosen = next((configs for largest, configs in _SPECIALIZED.items() if head_dim <= largest), None)
    if chosen is not None and not _HAS_GLUON:
        _warn_of_new_triton()
    return chosen if _HAS_GLUON else None


def select_fused_configs(device: torch.device, dtype: torch.dtype, head_dim: int) -> Configs | None:
    """`select_specialized_configs`, where one kernel makes all gradients: its tiles are those of dK and dV."""
    chosen = select_specialized_configs(device, dtype, head_dim)
    return None if chosen is None or head_dim > LARGEST_FUSED_DIM else _FUSED


@functools.lru_cache(maxsize=1)
def _warn_of_new_triton() -> None:
    if TRITON_VERSION > _NEWEST_GLUON:
        warnings.warn(
            f"flashmask_kernels does not use its kernels for sm_90: they are tested with Triton 3.6 to 3.9, this is "
            f"{triton.__version__}. The portable kernels compute the same in more time",
            stacklevel=2,
        )


def reason_against_hopper(device: torch.device) -> str | None:
    """Why no input on this GPU is computed by the kernels of `hopper`; None where some are."""
    row = architecture(device)
    if row != "sm_90":
        return f"there are none for this GPU, only for sm_90; it is served as {row}"
    if _HAS_GLUON:
        return None
    oldest, newest, installed = (
        ".".join(map(str, version)) for version in (_OLDEST_GLUON, _NEWEST_GLUON, TRITON_VERSION)
    )
    return f"they are tested with Triton {oldest} to {newest}, this is {installed}: install the torch of one of those"
