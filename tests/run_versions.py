"""Run the core of the tests with other versions of Transformers, torch and Triton than the pinned ones.

`make versions` runs all of them, `python tests/run_versions.py oldest torch-2.15` those that are named. Each has its
own environment on top of this one, which holds only the packages that differ. These environments are created in the
folder `versions` of this environment, or in `--folder`. One with torch for GPUs takes about 7 GB.

The core is the tests that depend on Transformers: conversion, integration, models, training, TRL. With another torch
and Triton, it includes the tests that depend on these alone: bounds, and kernels in Triton's interpreter. It leaves out
the tests of what was made with the pinned versions: the package, the pages, the examples, the table of models, the
budgets of compiled kernels.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

TESTS = Path(__file__).resolve().parent
NOT_OF_THE_CORE = {
    "benchmarks",
    "compilation",
    "docs",
    "examples",
    "messages",
    "packaging",
    "page",
    "paper_masks",
    "sweep",
    "visualization",
}
WITHOUT_TRANSFORMERS = {
    "bounds",
    "configs",
    "derivatives",
    "families",
    "ops",
    "portable",
    "schedule",
    "schedules",
    "tiled",
}
NEEDS_TRL = {"tree_attention", "trl"}


class Version(NamedTuple):
    """The packages to install, and whether torch and Triton are among them."""

    requirements: tuple[str, ...]
    has_other_torch: bool = False


_BEFORE_HUB_2 = ("huggingface-hub==1.33.0", "httpx==0.28.1")
VERSIONS = {
    "transformers-5.4": Version(("transformers==5.4.0", "tokenizers==0.22.2", *_BEFORE_HUB_2)),
    "transformers-5.10": Version(("transformers==5.10.4", "tokenizers==0.22.2", *_BEFORE_HUB_2)),
    "transformers-5.17": Version(("transformers==5.17.0", *_BEFORE_HUB_2)),
    "transformers-5.23": Version(("transformers==5.23.0; python_version >= '3.11'",)),
    "transformers-5.24": Version(("transformers==5.24.0; python_version >= '3.11'",)),
    "torch-2.9": Version(
        ("torch==2.9.0", "triton==3.5.0", "transformers==5.4.0", "tokenizers==0.22.2", *_BEFORE_HUB_2), True
    ),
    "torch-2.15": Version(("torch==2.15.0", "triton==3.9.0"), True),
}
ALIASES = {"oldest": "transformers-5.4", "newest": "torch-2.15"}


def list_core(has_other_torch: bool) -> list[str]:
    """The test files that are run."""
    left_out = NOT_OF_THE_CORE | (set() if has_other_torch else WITHOUT_TRANSFORMERS)
    if importlib.util.find_spec("trl") is None:  # TRL needs Python 3.11
        left_out = left_out | NEEDS_TRL
    return [str(path) for path in sorted(TESTS.glob("test_*.py")) if path.stem.removeprefix("test_") not in left_out]


def make_environment(folder: Path, requirements: tuple[str, ...]) -> Path:
    """The interpreter of an environment that holds the requirements, and finds everything else in this environment."""
    if not (folder / "pyvenv.cfg").exists():
        venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    (site_packages,) = folder.glob("lib/python*/site-packages")
    below = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
    (site_packages / "environment_below.pth").write_text(below)
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--quiet", "--disable-pip-version-check"]
    # With hf-flashmask and peft among the requirements, pip chooses versions that are compatible with them.
    subprocess.run([*pip, "install", "hf-flashmask[train]", "peft", *requirements], check=True)
    return python


class Result(NamedTuple):
    """A row of the table."""

    installed: str
    passed: int
    failed: int
    seconds: float


def run(version: Version, folder: Path, workers: str) -> Result:
    """Create the environment and run the tests in it; pytest prints the failures."""
    start = time.perf_counter()
    python = make_environment(folder, version.requirements)
    code = "import torch, transformers, triton; print(transformers.__version__, torch.__version__, triton.__version__)"
    imported = subprocess.run([python, "-c", code], cwd=folder, check=True, capture_output=True, text=True).stdout
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    options = ["-q", "-n", workers, "-p", "no:cacheprovider", "--disable-warnings", f"--junitxml={report}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(
        [python, "-m", "pytest", *options, *list_core(version.has_other_torch)], cwd=TESTS.parent, env=environment
    )
    suite = ElementTree.parse(report).find("testsuite")
    assert suite is not None
    total, skipped, *bad = (int(suite.attrib[name]) for name in ("tests", "skipped", "failures", "errors"))
    failed = sum(bad)
    return Result(" | ".join(imported.split()), total - skipped - failed, failed, time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    names = [*ALIASES, *VERSIONS]
    parser.add_argument("versions", nargs="*", metavar="version", help=f"of {', '.join(names)}; all without any")
    parser.add_argument("--folder", type=Path, default=Path(sys.prefix, "versions"), help="of the environments")
    parser.add_argument("--workers", default="2", help="of pytest")
    arguments = parser.parse_args()
    unknown = set(arguments.versions).difference(names)
    if unknown:
        parser.error(f"no version {min(unknown)!r}; there are {', '.join(names)}")
    rows = ["| | transformers | torch | triton | passed | failed | seconds |", "|---|---|---|---|--:|--:|--:|"]
    is_good = True
    for name in dict.fromkeys(ALIASES.get(name, name) for name in arguments.versions or VERSIONS):
        print(f"\n{name}", flush=True)
        try:
            result = run(VERSIONS[name], arguments.folder / name, arguments.workers)
        except (subprocess.CalledProcessError, OSError) as error:
            rows.append(f"| {name} | could not be run: {error} |")
            is_good = False
        else:
            rows.append(f"| {name} | {result.installed} | {result.passed} | {result.failed} | {result.seconds:.0f} |")
            is_good &= result.failed == 0 < result.passed
    print("", *rows, sep="\n")
    sys.exit(not is_good)


if __name__ == "__main__":
    main()
