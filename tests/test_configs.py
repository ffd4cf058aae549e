"""Which kernels and which tiles a device gets, and what the environment says about it."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flashmask_kernels import configs, dispatch, environment

# Bytes of shared memory that a thread block may have (CUDA C++ programming guide, table of compute capabilities).
SHARED_MEMORY = {
    (7, 5): 65536, (8, 0): 166912, (8, 6): 101376, (8, 7): 166912, (8, 9): 101376, (9, 0): 232448, (10, 0): 232448,
    (10, 3): 232448, (11, 0): 232448, (12, 0): 101376, (12, 1): 101376,
}  # fmt: skip
OF_ROW = {"sm_80": 166912, "sm_86": 101376, "sm_90": 232448, "sm_100": 232448}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """Makes the device "cuda" one of a compute capability."""
    configs.architecture.cache_clear()

    def of_capability(capability: tuple[int, int]) -> torch.device:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return torch.device("cuda")

    yield of_capability
    configs.architecture.cache_clear()


@pytest.mark.parametrize("capability", [*SHARED_MEMORY, (9, 9), (13, 0), (14, 3), (20, 0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_gpu_has_a_row(capability: tuple[int, int], dtype: torch.dtype, gpu) -> None:
    device = gpu(capability)
    row = configs.architecture(device)
    if capability in SHARED_MEMORY and capability >= (8, 0):
        assert OF_ROW[row] <= SHARED_MEMORY[capability]
    assert configs.select_configs(device, dtype, 128) is not None
    chosen = configs.select_specialized_configs(device, torch.bfloat16, 128)
    assert (chosen is not None) == (row == "sm_90" and configs._HAS_GLUON)


def test_the_rows_of_measured_gpus(gpu) -> None:
    found = {}
    for capability in SHARED_MEMORY:
        configs.architecture.cache_clear()
        found[capability] = configs.architecture(gpu(capability))
    assert found[8, 0] == "sm_80"
    assert found[9, 0] == "sm_90"
    assert found[10, 0] == found[10, 3] == found[11, 0] == "sm_100"
    assert found[8, 9] == found[12, 0] == "sm_86"


@pytest.mark.parametrize(("version", "warns"), [((3, 5), False), ((3, 10), True), ((4, 0), True)])
def test_a_triton_newer_than_tested_is_said_once(
    version: tuple[int, int], warns: bool, gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configs, "TRITON_VERSION", version)
    monkeypatch.setattr(configs, "_HAS_GLUON", False)
    configs._warn_of_new_triton.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            for head_dim in (32, 64, 128):  # the first has no kernel for sm_90 in any case
                assert configs.select_specialized_configs(gpu((9, 0)), torch.bfloat16, head_dim) is None
    assert ["does not use its kernels for sm_90" in str(warning.message) for warning in caught] == [True] * warns
    configs._warn_of_new_triton.cache_clear()


@pytest.mark.skipif(not configs._HAS_GLUON, reason="the kernels for sm_90 need Triton 3.6 to 3.9")
@pytest.mark.parametrize("is_portable", [False, True])
def test_the_environment_forces_portable_kernels(is_portable: bool, gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu((9, 0))
    monkeypatch.setattr(environment, "PORTABLE", is_portable)
    with FakeTensorMode():
        query = torch.empty(1, 32, 8192, 128, device="cuda", dtype=torch.bfloat16)
    assert dispatch.specializes(query, query, torch.empty(1, 1, 1, 8192), None, 0.0) == (not is_portable)


@pytest.mark.parametrize(("value", "expected"), [(None, True), ("", True), ("0", False), ("1", True)])
def test_switches(value: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if value is not None:
        monkeypatch.setenv("FLASHMASK_TEST", value)
    assert environment._read_switch("FLASHMASK_TEST", default=True) == expected
    monkeypatch.setenv("FLASHMASK_TEST", "off")
    with pytest.raises(ValueError, match="FLASHMASK_TEST must be 0 or 1, got 'off'"):
        environment._read_switch("FLASHMASK_TEST", default=True)
