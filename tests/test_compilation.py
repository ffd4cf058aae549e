"""Every shipped configuration compiles for every architecture, fits its shared memory and spills within budget; ptxas
gave its matrix products the operands they ask for, and LLVM left the tests of masks as they are."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from compile_kernels import TARGETS, resources
from triton.backends.nvidia.compiler import CUDABackend

FOLDER = Path(__file__).parent
# Bytes of shared memory per thread block (CUDA C++ programming guide, CDNA 3 ISA guide).
SHARED_MEMORY = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376, "gfx942": 65536}
# Bytes per thread (gfx942: registers) of spills that were accepted when the configuration was chosen. All others must
# have none. Other releases of Triton spill more here and less there.
SPILL_BUDGETS = json.loads((FOLDER / "spill_budgets.json").read_text())
HAS_BUDGETS = metadata.version("triton").startswith("3.7.")


@pytest.mark.parametrize("architecture", SHARED_MEMORY)
def test_kernels_compile_within_their_budgets(architecture: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, FOLDER / "compile_kernels.py", architecture]
    compilation = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert compilation.returncode == 0, compilation.stderr
    kernels = json.loads(compilation.stdout)
    assert len(kernels) > 20
    too_much = {
        name: used
        for name, used in kernels.items()
        if (HAS_BUDGETS and used["spills"] > SPILL_BUDGETS[architecture].get(name, 0))
        or used["shared"] > SHARED_MEMORY[architecture]
        or used["serialized"]
        or used["unwritten"]
        or (used["packed_tests"] and re.search("hopper (attention|key|query|fused)", name))
    }
    assert not too_much


PTX = """
.version 8.7
.target sm_100a
.address_size 64
.visible .entry kernel() { ret; }
"""


def test_ptxas_reports_of_what_triton_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its registers and spills depend on its options, and releases of Triton pass others."""
    commands: list[list[str]] = []
    run = subprocess.run

    def note(command: Any, **options: Any) -> Any:
        if "-v" in command:
            commands.append([str(part) for part in command if not str(part).startswith("/")])
        return run(command, **options)

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", note)
    how = SimpleNamespace(enable_fp_fusion=False, ptx_options="--maxrregcount 40", instrumentation_mode="")
    kernel, target = SimpleNamespace(asm={"ptx": PTX}, metadata=how), TARGETS["sm_100"]
    CUDABackend(target).make_cubin(PTX, {}, how, target.arch)
    resources(kernel, target)
    of_triton, of_report = commands
    assert of_triton == of_report
    resources(kernel, target)
    assert len(commands) == 2, "the report is remembered"
