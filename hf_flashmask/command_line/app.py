"""The commands and their options."""

from __future__ import annotations

from typing import Annotated

import typer

from .environment import report
from .running import run as run_program

app = typer.Typer(
    name="python -m hf_flashmask",
    help="Without a command: versions, devices, and which kernels run on each of them, to be pasted into an issue.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Run the command line. Mistakes of the user end in one line, not in a traceback."""
    app()


@app.callback(invoke_without_command=True)
def _report(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(report())


@app.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
def run(
    target: Annotated[str, typer.Argument(metavar="SCRIPT|COMMAND", help="a Python file or a command")],
    arguments: Annotated[list[str] | None, typer.Argument(metavar="ARGUMENTS", help="of the program")] = None,
    is_module: Annotated[bool, typer.Option("-m", help="the target is the name of a module")] = False,
) -> None:
    """Run a program in which attn_implementation="flashmask" is registered, in all its processes.

    For example: run train.py --lr 1e-4; run trl sft --attn_implementation flashmask ...; run -m torch.distributed.run
    --nproc-per-node 8 train.py
    """
    try:
        run_program(target, arguments or [], is_module=is_module)
    except FileNotFoundError as error:
        raise typer.BadParameter(str(error)) from error
