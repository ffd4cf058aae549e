"""What every test relies on. The environment must be set before anything imports torch, Triton or Transformers."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path

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
def _interpreter_in_less_time() -> None:
    if "TRITON_INTERPRET" in os.environ:
        import interpreter

        interpreter.speed_up()


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


def pytest_collection_finish() -> None:
    """Trainer and the compiler collect garbage in every call. What is imported until now needs no search for it."""
    import hypothesis  # noqa: F401  (pytest imports it later on; plugins of others then search for what they imported)

    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # extensions complain of what is not collected at exit


def pytest_runtest_setup(item: pytest.Item) -> None:
    import torch

    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.fail("this test is marked `gpu` and torch finds no GPU", pytrace=False)
