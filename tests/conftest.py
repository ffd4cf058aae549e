"""What every test relies on. The environment must be set before anything imports torch, Triton or Transformers."""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent

# `python -m pytest` puts the working directory on the path. When Hugging Face's library `kernels` is not installed, the
# folder of that name passes for it, and Transformers releases that do not expect this fail to import. So the tests see
# the installed packages and nothing else of the repository.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

# No test reaches the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# There is no trl for Python 3.10.
collect_ignore = [] if sys.version_info >= (3, 11) else ["test_trl.py", "test_tree_attention.py"]


def pytest_configure(config: pytest.Config) -> None:
    """`-m gpu` compiles the Triton kernels; every other run is on the CPU, in Triton's interpreter, GPU or not."""
    if config.option.markexpr != "gpu":
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ["HIP_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session", autouse=True)
def _language_patched_once() -> None:
    """Triton's interpreter searches `triton.language` for what it replaces whenever a kernel calls a function, a third
    of the time that a kernel takes. All of a module is replaced, and put back, at once: one name tells whether it is.
    """
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    patch, known = interpreter._patch_builtin, dict[Any, str | None]()

    def patch_unless_patched(module: Any, *others: Any) -> None:
        if module not in known:
            known[module] = next((name for name, member in inspect.getmembers(module) if is_builtin(member)), None)
        name = known[module]
        if name is not None and is_builtin(getattr(module, name)):
            patch(module, *others)

    interpreter._patch_builtin = patch_unless_patched


@pytest.fixture(autouse=True)
def _seed() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nothing_planned() -> None:
    """What a test replaces must not miss what was planned before it."""
    if (dispatch := sys.modules.get("flashmask_kernels.dispatch")) is not None:
        dispatch.plans.clear()


@pytest.fixture
def by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows take the kernels where SDPA would be faster on the CPU: so they do on a GPU."""
    if (attention := sys.modules.get("hf_flashmask.integration.attention")) is not None:
        monkeypatch.setattr(attention, "sees_most_keys", lambda *arguments: False)


@pytest.fixture
def interpreted(by_kernels: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make CPU tensors go through the Triton kernels, with small tiles: short sequences have many of them."""

    def use(use_descriptors: bool = False, of_short_rows: tuple[int, int, int, int] | None = None) -> None:
        from flashmask_kernels import dispatch
        from flashmask_kernels.configs import Config, Configs

        tiles = (32, 16), (16, 32), (16, 16)
        configs = Configs(*(Config(*tile, 4, 2, use_descriptors, of_short_rows=of_short_rows) for tile in tiles))
        monkeypatch.setattr(dispatch, "configs_of", lambda *arguments: configs)
        monkeypatch.setattr(dispatch, "FEWEST_DESCRIBED_ELEMENTS", {})

    return use


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect, as `-m "not gpu"` does, what needs more GPUs than there are, or libraries that are not installed; one
    GPU must be there.
    """
    import torch

    def lacks(item: pytest.Item) -> bool:
        has_too_few = any(torch.cuda.device_count() < marker.args[0] for marker in item.iter_markers("gpus"))
        modules = [name for marker in item.iter_markers("needs") for name in marker.args]
        return has_too_few or any(importlib.util.find_spec(name) is None for name in modules)

    if deselected := [item for item in items if lacks(item)]:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if item not in deselected]


def pytest_runtest_setup(item: pytest.Item) -> None:
    import torch

    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.fail("this test is marked `gpu` and torch finds no GPU", pytrace=False)
