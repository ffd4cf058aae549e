"""The figures that the project publishes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

REPORT = Path(__file__).parents[1] / "benchmarks/report.py"


def test_the_readme_says_what_the_results_say() -> None:
    check = subprocess.run([sys.executable, str(REPORT), "--check"], capture_output=True, text=True)
    assert check.returncode == 0, check.stderr
