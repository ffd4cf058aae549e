"""What `launch` remembers, and that what it launches is what Triton would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from triton.compiler import CompiledKernel

from flashmask_kernels import launch as module
from flashmask_kernels.launch import Launch, kind_of, launch

FOLDER = Path(__file__).parent


class Compiled(CompiledKernel):
    def __init__(self, log: list[Any]) -> None:
        self.log = log

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.log.append((grid, arguments))


class Kernel:
    """Compiles at every call, as Triton does until it finds that it has."""

    arg_names: ClassVar = ["source", "length", "BLOCK"]

    def __init__(self, compiles: bool = True) -> None:
        self.fn = object()
        self.compiles, self.calls, self.launched = compiles, 0, list[Any]()

    def __getitem__(self, grid: tuple[int]) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            return Compiled(self.launched) if self.compiles else None

        return run


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_known", {})


def described(length: int) -> Callable[[], Launch]:
    return lambda: Launch(length, (length,), {"BLOCK": 16}, {"num_warps": 4})


def test_the_same_kind_is_launched_without_triton() -> None:
    kernel, tensors = Kernel(), [torch.zeros(4) for _ in range(3)]
    for tensor in tensors:
        launch(kernel, kind_of(tensor), (tensor,), described(5))
    assert kernel.calls == 1
    assert [grid for grid, _ in kernel.launched] == [(5, 1, 1)] * 2
    for tensor, (_, arguments) in zip(tensors[1:], kernel.launched):
        assert arguments[0] is tensor
        assert arguments[1:] == (5, 16)


@pytest.mark.parametrize(
    "other",
    [
        torch.zeros(33, dtype=torch.int32)[:32],
        torch.zeros(33)[1:],
        torch.zeros(64)[::2],
        torch.zeros(31),
        torch.zeros(2, 16),
        torch.zeros(32, device="meta"),
        None,
    ],
)
def test_another_kind(other: torch.Tensor | None) -> None:
    kernel, tensor = Kernel(), torch.zeros(33)[:32]
    for source in (tensor, other, tensor, other):
        launch(kernel, kind_of(source), (source,), described(32))
    assert kernel.calls == 2
    assert len(kernel.launched) == 2


def test_kernels_are_told_apart_and_the_interpreter_has_none() -> None:
    kernels = [Kernel(), Kernel(), Kernel(compiles=False)]
    for _ in range(3):
        for kernel in kernels:
            launch(kernel, (), (torch.zeros(1),), described(1))
    assert [kernel.calls for kernel in kernels] == [1, 1, 3]


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_KNOWN", 10)
    kernel = Kernel()
    for length in range(35):
        launch(kernel, (length,), (None,), described(length))
        assert len(module._known) <= 10


def test_against_triton() -> None:
    """Kinds say all that Triton compiles for, and its driver gets the same arguments in the same order."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, FOLDER / "launch_kinds.py"]
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    found = json.loads(output)
    assert found["launches"] - found["kinds"] > 500  # comparisons
    assert found["conflicts"] == found["differences"] == []
