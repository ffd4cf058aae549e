"""`python -m hf_flashmask`: versions, devices, and which implementation of the attention runs on each, and why."""

from __future__ import annotations

import importlib.util
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from . import __version__
from .integration import NAME
from .integration.attention import asks_for_determinism
from .integration.versions import TESTED, describe_tested


def report() -> str:
    """The environment as lines of text, to be pasted into an issue."""
    rows = [("hf_flashmask", __version__), ("python", f"{platform.python_version()} on {platform.platform()}")]
    # torch says which CUDA it was built for, the version of wheels from PyPI does not
    rows += [("torch", f"{torch.__version__} (tested: {describe_tested('torch')})")]
    rows += [(package, _version_of(package)) for package in ("transformers", "triton", "accelerate")]
    rows += [("implementation", f'attn_implementation="{NAME}" is registered')]
    rows += [("cpu", "tiled PyTorch: exact, skips hidden tiles")]
    if torch.cuda.is_available():
        rows += [(f"gpu {index}", _gpu(index)) for index in range(torch.cuda.device_count())]
    else:
        rows += [("gpu", "none that torch can use")]
    rows += [("gradients", _repeatability())]
    return "\n".join(f"{name:<16}{value}" for name, value in rows)


def _version_of(package: str) -> str:
    try:
        installed = version(package)
    except PackageNotFoundError:
        return "not installed"
    return f"{installed} (tested: {describe_tested(package)})" if package in TESTED else installed


def _gpu(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    name = f"{properties.name}, compute capability {properties.major}.{properties.minor}"
    if importlib.util.find_spec("triton") is None:
        return f"{name}: tiled PyTorch, because triton is not installed"
    return f"{name}: Triton kernels"


def _repeatability() -> str:
    if asks_for_determinism():
        return "bitwise repeatable"
    return (
        "bitwise repeatable, but for queries with heads of 33 to 64 on GPUs of compute capability 9.0; there too with "
        "torch.use_deterministic_algorithms(True) or FLASH_ATTENTION_DETERMINISTIC=1"
    )


if __name__ == "__main__":
    print(report())
