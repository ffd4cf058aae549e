"""That a `Launcher` launches what Triton would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from triton.compiler import CompiledKernel

from flashmask_kernels.launch import Launcher, strides_of

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
        self.compiles, self.calls, self.launched = compiles, list[Any](), list[Any]()

    def __getitem__(self, grid: tuple[int]) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            self.calls.append((grid, arguments, options))
            return Compiled(self.launched) if self.compiles else None

        return run


def test_only_the_first_launch_goes_through_triton() -> None:
    kernel, tensors = Kernel(), [torch.zeros(4) for _ in range(3)]
    launch = Launcher(kernel, 5, (7,), {"BLOCK": 16}, num_warps=4)
    for tensor in tensors:
        launch(tensor)
    assert kernel.calls == [((5,), (tensors[0], 7), {"BLOCK": 16, "num_warps": 4})]
    assert [grid for grid, _ in kernel.launched] == [(5, 1, 1)] * 2
    for tensor, (_, arguments) in zip(tensors[1:], kernel.launched):
        assert arguments[0] is tensor
        assert arguments[1:] == (7, 16)


def test_launchers_are_apart_and_the_interpreter_has_nothing_to_remember() -> None:
    kernels = [Kernel(), Kernel(), Kernel(compiles=False)]
    launchers = [Launcher(kernel, 1, (1,), {"BLOCK": 16}) for kernel in kernels]
    for _ in range(3):
        for launch in launchers:
            launch(torch.zeros(1))
    assert [len(kernel.calls) for kernel in kernels] == [1, 1, 3]


@pytest.mark.parametrize("shape", [(2, 5, 3, 8), (1, 1, 1, 16), (1, 7, 1, 8), (3, 1, 4, 24)])
def test_strides_of_a_new_tensor(shape: tuple[int, ...]) -> None:
    assert strides_of(*shape) == torch.zeros(shape).transpose(1, 2).stride()[:3]


def test_against_triton() -> None:
    """Kinds say all that Triton compiles for, and its driver gets the same arguments in the same order."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, FOLDER / "launch_kinds.py"]
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    found = json.loads(output)
    assert found["launches"] - found["kinds"] > 500  # comparisons
    assert found["conflicts"] == found["differences"] == []
