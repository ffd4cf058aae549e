"""`python -m hf_flashmask`: versions, devices, and which implementation of the attention runs on each, and why."""

from __future__ import annotations

import importlib.util
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from . import __version__
from .integration import NAME


def report() -> str:
    """The environment as lines of text, to be pasted into an issue."""
    rows = [("hf_flashmask", __version__), ("python", f"{platform.python_version()} on {platform.platform()}")]
    rows += [("torch", torch.__version__)]  # says which CUDA it was built for, wheels from PyPI do not
    rows += [(package, _version_of(package)) for package in ("transformers", "triton", "accelerate")]
    rows += [("implementation", f'attn_implementation="{NAME}" is registered')]
    rows += [("cpu", "tiled PyTorch: exact, skips hidden tiles")]
    if torch.cuda.is_available():
        rows += [(f"gpu {index}", _gpu(index)) for index in range(torch.cuda.device_count())]
    else:
        rows += [("gpu", "none that torch can use")]
    return "\n".join(f"{name:<16}{value}" for name, value in rows)


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _gpu(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    name = f"{properties.name}, compute capability {properties.major}.{properties.minor}"
    if importlib.util.find_spec("triton") is None:
        return f"{name}: tiled PyTorch, because triton is not installed"
    return f"{name}: Triton kernels"


if __name__ == "__main__":
    print(report())
