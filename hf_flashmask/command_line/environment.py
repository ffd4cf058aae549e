"""The environment as text: versions, which kernels run on each device and why not others, and what is installed."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version

import torch
from packaging.version import Version

from flashmask_kernels.report import describe_kernels
from hf_flashmask import __version__

from ..integration import NAME
from ..integration.attention import asks_for_determinism
from ..integration.versions import TESTED, describe_tested

EXTRAS = {
    "train": ("accelerate", "datasets"),
    "trl": ("trl",),
    "viz": ("matplotlib",),
    "others": ("peft", "deepspeed", "liger-kernel", "sentence-transformers", "lm_eval", "kernels"),
}
"""Extra of this package -> what it installs."""
PEERS = ("flash-attn", "flash-attn-3", "flash-attn-4", "xformers", "magi-attention")
"""Packages with other implementations of attention. FlexAttention comes with torch."""


def describe_environment() -> str:
    """The environment as lines of text, to be pasted into an issue."""
    return "\n".join(f"{name:<16}{value}" for name, value in _rows_of_environment())


def _rows_of_environment() -> Iterator[tuple[str, str]]:
    yield "hf_flashmask", __version__
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    # torch says which CUDA it was built for, the version of wheels from PyPI does not
    yield "torch", _against_tested("torch", torch.__version__)
    for package in ("transformers", "triton"):
        yield package, _describe_package(package)
    yield "implementation", f'attn_implementation="{NAME}" is registered'
    yield from _rows_under_title("cpu", describe_kernels(torch.device("cpu")))
    for index in range(torch.cuda.device_count()):
        yield from _rows_under_title(
            f"gpu {index}", [_describe_gpu(index), *describe_kernels(torch.device("cuda", index))]
        )
    if not torch.cuda.is_available():
        yield "gpu", "none that torch can use"
    yield "gradients", _describe_repeatability_here()
    for extra, packages in EXTRAS.items():
        yield from _rows_under_title(extra, map(_package_with_version, packages))
    yield from _rows_under_title(
        "peers", [f"FlexAttention of torch {torch.__version__}", *map(_package_with_version, PEERS)]
    )


def _rows_under_title(title: str, lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    for line in lines:
        yield title, line
        title = ""


def _describe_repeatability_here() -> str:
    if asks_for_determinism():
        return "bitwise repeatable"
    return (
        "bitwise repeatable, but for queries with heads of 33 to 64 on GPUs of compute capability 9.0; there too with "
        "torch.use_deterministic_algorithms(True) or FLASH_ATTENTION_DETERMINISTIC=1"
    )


def _describe_gpu(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    return f"{properties.name}, compute capability {properties.major}.{properties.minor}"


def _describe_package(package: str) -> str:
    try:
        return _against_tested(package, version(package))
    except PackageNotFoundError:
        return "not installed"


def _against_tested(package: str, installed: str) -> str:
    if package not in TESTED:
        return installed
    oldest, newest = (Version(text).release for text in TESTED[package])
    release = Version(installed).release[:2]
    verdict = " NOT TESTED:" if not oldest <= release <= newest else ""
    return f"{installed}{verdict} (tested: {describe_tested(package)})"


def _package_with_version(package: str) -> str:
    return f"{package} {_describe_package(package)}"
