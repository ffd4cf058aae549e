"""The versions of other packages that hf_flashmask was tested with."""

from __future__ import annotations

import torch
import transformers
from packaging.version import Version

from .name import logger

TESTED = {"transformers": ("5.4", "5.24"), "torch": ("2.9", "2.15"), "triton": ("3.5", "3.9")}
"""Package -> the oldest and the newest version; `tests/run_versions.py` runs the tests with both, and some between."""


def describe_tested(package: str) -> str:
    oldest, newest = TESTED[package]
    return f"{oldest} to {newest}"


def warn_of_untested() -> None:
    """One warning for all packages that are newer than the newest version tested; a patch release is not newer."""
    installed = {"transformers": transformers.__version__, "torch": torch.__version__}
    newer = [
        f"{package} {version} (tested: {describe_tested(package)})"
        for package, version in installed.items()
        if Version(version).release[:2] > Version(TESTED[package][1]).release[:2]
    ]
    if newer:
        logger.warning_once(
            f"hf_flashmask was not tested with {' and '.join(newer)}. If something is wrong, please report it with the "
            "output of `python -m hf_flashmask`."
        )
