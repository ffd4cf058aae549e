"""`python -m hf_flashmask`, as a user calls it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from typer.testing import CliRunner, Result

import hf_flashmask
from flashmask_kernels import configs, environment
from flashmask_kernels.launch import launcher
from flashmask_kernels.report import describe_kernels
from hf_flashmask.command_line.app import app


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


# The report


def test_the_report_names_versions_with_the_tested_range_and_what_is_installed() -> None:
    printed = call().output
    for expected in (hf_flashmask.__version__, torch.__version__, transformers.__version__, "is registered", "cpu"):
        assert expected in printed
    for line in (r"triton +[0-9.]+.* \(tested: 3.5 to 3.9\)", "accelerate [0-9]", "magi-attention "):
        assert re.search(line, printed), line


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """Makes "cuda" a device of a compute capability."""
    configs.architecture.cache_clear()

    def of_capability(*capability: int) -> list[str]:
        configs.architecture.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return describe_kernels(torch.device("cuda"))

    yield of_capability
    configs.architecture.cache_clear()


def test_the_report_says_why_the_kernels_for_a_gpu_do_not_run(gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "_HAS_GLUON", True)
    assert "kernels for sm_90: 16-bit heads of" in gpu(9, 0)[0]
    assert "NOT used: there are none for this GPU" in gpu(8, 0)[0]
    assert "served as sm_86" in gpu(12, 0)[0]

    monkeypatch.setattr(configs, "_HAS_GLUON", False)
    monkeypatch.setattr(configs, "TRITON_VERSION", (4, 1))
    assert "NOT used: they are tested with Triton 3.6 to" in gpu(9, 0)[0]
    assert "this is 4.1" in gpu(9, 0)[0]

    monkeypatch.setattr(environment, "PORTABLE", True)
    assert gpu(9, 0)[0].endswith("NOT used: FLASHMASK_PORTABLE is 1")


def test_the_report_says_why_launches_are_slow(gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "NOT" not in gpu(8, 0)[-1]
    monkeypatch.setattr(launcher, "_IS_FAST", False)
    assert gpu(8, 0)[-1].endswith("NOT used: it is tested with Triton 3.5 to 3.9")
    monkeypatch.setattr(environment, "FAST_LAUNCH", False)
    assert gpu(8, 0)[-1].endswith("NOT used: FLASHMASK_FAST_LAUNCH is 0")


def test_the_report_of_a_gpu_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashmask_kernels.configs", None)
    monkeypatch.delattr("flashmask_kernels.configs")
    (line,) = describe_kernels(torch.device("cuda"))
    assert "install triton" in line


# run

PROGRAM = """
import subprocess, sys
if sys.argv[1] == "launch":  # as `accelerate launch` does
    sys.exit(subprocess.run([sys.executable, __file__, *sys.argv[2:]]).returncode)
assert "torch" not in sys.modules  # most processes never import Transformers
import sitecustomize_of_the_user
from transformers import AutoModelForCausalLM, LlamaConfig
config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
model = AutoModelForCausalLM.from_config(config, attn_implementation="flashmask")
print(sys.argv[1:], model.config._attn_implementation)
"""


def test_run_registers_in_the_processes_that_the_program_starts(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, types; sys.modules['sitecustomize_of_the_user'] = types.ModuleType('found')"
    )
    command = [sys.executable, "-m", "hf_flashmask", "run", str(tmp_path / "program.py")]
    process = subprocess.run(
        [*command, "launch", "-m", "--help"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout == "['-m', '--help'] flashmask\n"


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that would replace this process."""
    commands: list[list[str]] = []
    monkeypatch.setattr(os, "execvpe", lambda file, command, environment: commands.append(command))
    return commands


def test_run_takes_modules_and_commands(executed: list[list[str]], tmp_path: Path) -> None:
    assert call("run", "-m", "trl.cli.main", "sft", "--help").exit_code == 0
    assert call("run", Path(sys.executable).name, "-m", "x", "--config=a b").exit_code == 0
    assert executed[0] == [sys.executable, "-m", "trl.cli.main", "sft", "--help"]
    assert Path(executed[1][0]).samefile(sys.executable)
    assert executed[1][1:] == ["-m", "x", "--config=a b"]


def test_run_refuses_what_is_not_there(executed: list[list[str]]) -> None:
    result = call("run", "trian.py")
    assert result.exit_code == 2
    assert "'trian.py' is neither a Python file nor a command" in " ".join(result.output.split())
    assert not executed
