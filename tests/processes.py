"""Python programs in processes of their own, which are forked from one that has imported torch and Transformers.

That saves the five seconds of CPU time that a new process needs for these imports. hf_flashmask is not among them.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch.distributed.fsdp", "transformers.masking_utils", "transformers.modeling_utils"])
_MOST_SECONDS = 420


def run_python(code: str, *arguments: object, cwd: Path | None = None) -> str:
    """What a program prints, which must end well."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "program.py"
        script.write_text(code)
        return run_at_once(script, [str(argument) for argument in arguments], [{}], cwd or Path(folder))[0]


def run_at_once(
    script: Path, arguments: Sequence[str], environments: Sequence[Mapping[str, str]], cwd: Path
) -> list[str]:
    """What processes print that run the same file, each with some environment variables of its own."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / str(number) for number in range(len(environments))]
        processes = [
            CONTEXT.Process(target=_run, args=(script, arguments, environment, cwd, output))
            for environment, output in zip(environments, outputs)
        ]
        for process in processes:
            process.start()
        last = time.monotonic() + _MOST_SECONDS
        for process in processes:
            process.join(max(0.0, last - time.monotonic()))
        for process in processes:
            process.kill()  # one that waits for another, which has failed
            process.join()
        codes = [process.exitcode for process in processes]
        errors = [output.with_suffix(".err") for output in outputs]
        assert not any(codes), f"{codes}\n" + "\n".join(path.read_text() for path in errors if path.exists())
        return [output.read_text() for output in outputs]


def run_on_ranks(script: Path, arguments: Sequence[str], ranks: int, cwd: Path) -> list[str]:
    """What the processes of one machine print that find each other as `torchrun` lets them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    shared = {**world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environments = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    return run_at_once(script, arguments, environments, cwd)


def compute_once(factory: pytest.TempPathFactory, name: str, compute: Callable[[Path], object]) -> Path:
    """A folder that `compute` has filled. The workers of pytest-xdist share it: the first one that asks computes."""
    root = factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / name
    finished, failure = folder / "finished", folder / "failure"
    try:
        folder.mkdir()
    except FileExistsError:
        end = time.monotonic() + _MOST_SECONDS + 60
        while not finished.exists() and time.monotonic() < end:
            time.sleep(0.5)
    else:
        try:
            compute(folder)
        except Exception as error:
            failure.write_text(str(error))
        finally:
            finished.touch()
    assert not failure.exists(), failure.read_text()[-5000:]
    return folder


def _run(script: Path, arguments: Sequence[str], environment: Mapping[str, str], cwd: Path, output: Path) -> None:
    for descriptor, path in ((1, output), (2, output.with_suffix(".err"))):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(cwd)
    os.environ.update(environment)
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")
