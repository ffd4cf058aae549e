"""Run a program that knows nothing of hf_flashmask, with the implementation registered in all its processes."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

_STARTUP = Path(__file__).parent / "startup"


def run_program(target: str, arguments: Sequence[str], *, is_module: bool) -> NoReturn:
    """Replace this process by the program.

    Launchers start more processes (`trl sft` runs `accelerate launch`, `swift sft` runs Python): all of them inherit
    PYTHONPATH, whose first folder has the module that Python imports at its start.

    Args:
        target: a Python file, the name of a module, or a command.
        arguments: of the program.
        is_module: whether `target` is the name of a module.

    Raises:
        FileNotFoundError: when `target` is neither a file nor a command.
    """
    command = _command_to_run(target, is_module=is_module)
    paths = [str(_STARTUP), *filter(None, [os.environ.get("PYTHONPATH")])]
    sys.stdout.flush()
    os.execvpe(command[0], [*command, *arguments], os.environ | {"PYTHONPATH": os.pathsep.join(paths)})


def _command_to_run(target: str, *, is_module: bool) -> list[str]:
    if is_module:
        return [sys.executable, "-m", target]
    if Path(target).suffix == ".py":
        if not Path(target).is_file():
            raise FileNotFoundError(f"there is no file {target}")
        return [sys.executable, target]
    # Commands of an environment that is not activated lie beside its Python.
    found = shutil.which(target, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if found is None:
        raise FileNotFoundError(f"{target!r} is neither a Python file nor a command; give a module as `-m {target}`")
    return [found]
