"""That a `Launcher` launches what Triton would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
from triton import knobs
from triton.compiler import CompiledKernel

from flashmask_kernels.launch import launcher as launch
from flashmask_kernels.launch.launcher import Launcher
from flashmask_kernels.launch.layout import Layout

FOLDER = Path(__file__).parent


class Compiled(CompiledKernel):
    """Notes the launches that its driver is given, and those that go through Triton."""

    function, packed_metadata = 11, (4, 1)

    def __init__(self, log: list[Any], watched: list[Any]) -> None:
        self.log, self.watched = log, watched

    @property
    def run(self) -> Any:
        return lambda *arguments: self.log.append(arguments)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.watched.append((grid, arguments))


class Driver:
    """Of a machine whose current device is the second one."""

    def get_current_device(self) -> int:
        return 1

    def get_current_stream(self, device: int) -> int:
        return 100 + device


class Kernel:
    """Compiles at every call, as Triton does until it finds that it has."""

    arg_names: ClassVar = ["source", "length", "BLOCK"]

    def __init__(self, compiles: bool = True) -> None:
        self.fn = object()
        self.compiles, self.calls, self.launched, self.watched = compiles, list[Any](), list[Any](), list[Any]()

    def __getitem__(self, grid: tuple[int]) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            self.calls.append((grid, arguments, options))
            return Compiled(self.launched, self.watched) if self.compiles else None

        return run


@pytest.fixture(autouse=True)
def _driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "driver", mock.Mock(active=Driver()))


def test_only_the_first_launch_goes_through_triton() -> None:
    kernel, tensors = Kernel(), [torch.zeros(4) for _ in range(3)]
    launcher = Launcher(kernel, 5, (7,), {"BLOCK": 16}, num_warps=4)
    for tensor in tensors:
        launcher(tensor)
    assert kernel.calls == [((5,), (tensors[0], 7), {"BLOCK": 16, "num_warps": 4})]
    handed_over = (5, 1, 1, 101, Compiled.function, Compiled.packed_metadata, None, None, None)
    assert kernel.launched == [(*handed_over, tensor.data_ptr(), 7, 16) for tensor in tensors[1:]]


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_profilers_see_every_launch(hook: str) -> None:
    kernel, tensor = Kernel(), torch.zeros(4)
    launcher = Launcher(kernel, 5, (7,), {"BLOCK": 16})
    launcher(tensor)
    watch = mock.Mock()
    getattr(knobs.runtime, hook).add(watch)
    launcher(tensor)
    getattr(knobs.runtime, hook).remove(watch)
    launcher(tensor)
    assert kernel.watched == [((5, 1, 1), (tensor, 7, 16))]
    assert len(kernel.launched) == 1


def test_launchers_are_apart_and_the_interpreter_has_nothing_to_remember() -> None:
    kernels = [Kernel(), Kernel(), Kernel(compiles=False)]
    launchers = [Launcher(kernel, 1, (1,), {"BLOCK": 16}) for kernel in kernels]
    for _ in range(3):
        for launcher in launchers:
            launcher(torch.zeros(1))
    assert [len(kernel.calls) for kernel in kernels] == [1, 1, 3]


def test_untested_releases_of_triton_launch_everything_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_IS_FAST", False)
    kernel = Kernel()
    launcher = Launcher(kernel, 5, (7,), {"BLOCK": 16})
    for _ in range(3):
        launcher(torch.zeros(1))
    assert len(kernel.calls) == 3
    assert kernel.launched == kernel.watched == []


def test_another_thread_never_finds_a_launcher_half_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """It launches at every point of the first launch at which this thread asks for something."""
    kernel, other = Kernel(), [torch.zeros(1)]
    launcher = Launcher(kernel, 5, (7,), {"BLOCK": 16})

    class Switching(Driver):
        def get_current_device(self) -> int:
            if other:
                launcher(other.pop())
            return super().get_current_device()

    monkeypatch.setattr(launch, "driver", mock.Mock(active=Switching()))
    run = Compiled.run.fget
    monkeypatch.setattr(Compiled, "run", property(lambda self: (other and launcher(other.pop()), run(self))[1]))
    for number in range(3):
        launcher(torch.full((1,), number))
    assert len(kernel.calls) == 2
    assert len(kernel.launched) == 2


@pytest.mark.parametrize("shape", [(2, 3, 5, 8), (1, 1, 1, 16), (1, 1, 7, 8), (3, 4, 1, 24)])
def test_layout_of_a_new_tensor(shape: tuple[int, int, int, int]) -> None:
    tensor = Layout.of_model(*shape).new(torch.zeros(1, dtype=torch.float64))
    assert tensor.shape == shape
    assert tensor.dtype == torch.float64
    assert tensor.transpose(1, 2).is_contiguous()


def test_against_triton() -> None:
    """Kinds say all that Triton compiles for, and its driver gets the same arguments in the same order."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, FOLDER / "launch_kinds.py"]
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    found = json.loads(output)
    assert found["launches"] - found["kinds"] > 500  # comparisons
    assert found["conflicts"] == found["differences"] == []
