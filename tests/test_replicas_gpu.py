"""Replicas and shards of models on two GPUs, connected by NCCL: cases of `test_replicas`, with compiled kernels."""

from __future__ import annotations

import pytest
import test_replicas
from replica_cases import Results

GPUS = 2
pytestmark = [pytest.mark.gpu, pytest.mark.gpus(GPUS)]

ENGINES = ("ddp", "fsdp1", "fsdp2", "zero2", "zero3")
NAMES = [
    *(f"{engine} {model} packed" for engine in ENGINES for model in ("llama", "gpt_oss", "gemma3")),
    *(f"{engine}_bf16 {model} packed" for engine in ENGINES for model in ("llama", "gpt_oss_all_experts", "gemma3")),
    *(f"{engine} gpt_oss bounds" for engine in ENGINES if engine != "zero2"),
    *(f"{engine} gemma3 tree" for engine in ENGINES if engine != "zero2"),
    *(f"{engine} gemma3_images images reentrant" for engine in ("ddp", "fsdp1", "fsdp2")),
    "fsdp2_bf16 gemma3_images images reentrant",
    "fsdp2_bf16 llama tree reentrant",
    *(f"{engine} llama_one_kv_head packed" for engine in ("ddp", "fsdp1", "fsdp2")),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    folder = tmp_path_factory.mktemp("gpus")
    test_replicas.compute(folder, *NAMES, gpus=GPUS)
    return test_replicas.read(folder, GPUS)[GPUS]


@pytest.mark.parametrize("name", [test_replicas.with_marks(name) for name in NAMES])
def test_two_gpus_equal_one_process(results: list[Results], name: str) -> None:
    for of_rank in results:
        test_replicas.assert_equals_one_process(of_rank[name], 1e-5, 1e-3)  # where documents leak: 1e-2 and 1
