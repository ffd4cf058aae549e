"""Sequence parallelism on two GPUs, connected by NCCL: some cases of `test_parallel`, with compiled kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import test_parallel
from parallel_cases import CASES

GPUS = 2
pytestmark = [pytest.mark.gpu, pytest.mark.gpus(GPUS)]

KINDS = (
    "2-llama-packed",
    "2-gpt_oss-packed",
    "2-gemma3-packed",
    "2-one_kv_head",
    "2-left_padding",
    "2-long",
    "pixels_gemma3_images",
    "pixels_qwen3_vl",
    "2-compiled",
    "ddp",
    "fsdp2",
)
NAMES = [f"{mode}-{kind}" for mode in ("ulysses", "all_gather") for kind in KINDS]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the first GPU has found."""
    folder: Path = tmp_path_factory.mktemp("gpus")
    test_parallel.compute(folder, *NAMES, gpus=GPUS)
    return test_parallel.read(folder, GPUS)[0]


@pytest.mark.parametrize("name", NAMES)
def test_averaged_losses_and_gradients_are_those_of_one_process(results: dict[str, Any], name: str) -> None:
    assert any(case.name == name and case.ranks == GPUS for case in CASES)
    loss, expected = results[name]["loss"]
    assert loss == pytest.approx(expected, rel=1e-5)
    assert results[name]["gradients"] < 1e-3  # where documents leak, these are 1
