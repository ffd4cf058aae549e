"""Every error and warning that the packages raise, read off their source, and what to do about each group of them.

python docs/messages.py          # write them into docs/troubleshooting.md, between its markers
python docs/messages.py --check  # fail when the page does not hold them

A file in a place that `AREAS` does not name needs a line there.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "troubleshooting.md"
BEGIN, END = "<!-- messages:begin -->", "<!-- messages:end -->"
PACKAGES = (ROOT / "hf_flashmask", ROOT / "kernels/torch-ext/flashmask_kernels")
VALUE = "…"
"""Stands for what a message says of the case at hand."""
WARNS = ("warn", "warning", "warning_once")

AREAS = {
    "hf_flashmask/bounds": (
        "Making and composing masks",
        "Compare the shape and dtype that the message names with [the format of bounds](concepts/bounds.md). "
        "`bounds.simplify(mask, q_len)` helps where there are too many intervals or planes.",
    ),
    "hf_flashmask/visualization": ("Drawing masks", "See [debugging a mask](how_to/debugging.md)."),
    "hf_flashmask/integration": (
        "Calling a model",
        "Pass one of: a 2-D mask `[B, S]` of 0 and 1, or of [ids](concepts/documents.md#ids-in-a-2-d-mask), "
        "[bounds](concepts/bounds.md), `position_ids` that restart, or "
        "`cu_seq_lens_q`. What cannot be expressed needs `attn_implementation=\"sdpa\"` or `\"eager\"`.",
    ),
    "hf_flashmask/integration/engines.py": (
        "Engines for several GPUs",
        "The engine changes what the mask means. [Many GPUs](many_gpus.md) lists what works.",
    ),
    "hf_flashmask/integration/support.py": (
        "Models that are refused",
        "[Models](models.md) lists them with the reason. Use `sdpa` or `eager` for such a model, or a part of it.",
    ),
    "hf_flashmask/integration/registration.py": (
        "Importing, and names of attention",
        "Check the versions with `python -m hf_flashmask`, and the spelling: the name is `flashmask`.",
    ),
    "hf_flashmask/integration/versions.py": (
        "Importing, and names of attention",
        "Check the versions with `python -m hf_flashmask`, and the spelling: the name is `flashmask`.",
    ),
    "hf_flashmask/integration/whole_sequence.py": (
        "`sequence_parallel`",
        "Call the model with all of `parallel.shard(batch)`, the same batch on each rank of a group. "
        "[Many GPUs](many_gpus.md) lists what works and what is refused.",
    ),
    "hf_flashmask/parallel": (
        "`sequence_parallel`",
        "Call the model with all of `parallel.shard(batch)`, the same batch on each rank of a group. "
        "[Many GPUs](many_gpus.md) lists what works and what is refused.",
    ),
    "hf_flashmask/sharing": (
        "`share_prefixes`, prefix trees, tree attention",
        "Leave sharing out for what cannot be shared: the results are the same without it. "
        "[Preference training](how_to/preferences.md) has the conditions.",
    ),
    "hf_flashmask/training": (
        "Collators and losses",
        "The message names the example or the option. [SFT](how_to/sft.md) and "
        "[preference training](how_to/preferences.md) show the form of examples.",
    ),
    "hf_flashmask/command_line": (
        "The command line",
        "`python -m hf_flashmask COMMAND --help` shows the options. [The command line](command_line.md) has examples.",
    ),
    "kernels/torch-ext/flashmask_kernels": (
        "Calling the kernels",
        "Tensors are `[B, H, S, D]`: heads before tokens. Every argument is described in the "
        "[API](api/kernels.md).",
    ),
}  # fmt: skip
"""Place -> a heading, and what to do. The most exact place counts; places with one heading are one group."""


class Message(NamedTuple):
    place: str
    kind: str
    text: str

    def pattern(self) -> re.Pattern[str]:
        """Matches what is raised."""
        return re.compile(re.escape(self.text).replace(re.escape(VALUE), ".*"), re.DOTALL)

    def area(self) -> tuple[str, str]:
        places = [place for place in AREAS if self.place == place or self.place.startswith(f"{place}/")]
        if not places:
            raise LookupError(f"{self.place} raises {self.kind}, and no place in AREAS of docs/messages.py names it")
        return AREAS[max(places, key=len)]


class Unreadable(NamedTuple):
    """Something that is raised whose message the source does not tell."""

    place: str
    code: str


def messages() -> list[Message]:
    return [message for message in _all() if isinstance(message, Message)]


def unreadable() -> list[Unreadable]:
    return [message for message in _all() if isinstance(message, Unreadable)]


def _all() -> list[Message | Unreadable]:
    paths = [path for package in PACKAGES for path in sorted(package.rglob("*.py"))]
    modules = {path: ast.parse(path.read_text()) for path in paths}
    functions = {
        node.name: node for module in modules.values() for node in module.body if isinstance(node, ast.FunctionDef)
    }
    sources: list[_Source] = []
    sources.extend(_Source(path, module, functions, sources) for path, module in modules.items())
    return list(dict.fromkeys(message for source in sources for message in source.messages()))


class _Source(NamedTuple):
    """A file, the functions of all files by name, and all files."""

    path: Path
    module: ast.Module
    functions: dict[str, ast.FunctionDef]
    files: list[_Source]

    def messages(self) -> Iterator[Message | Unreadable]:
        place = self.path.relative_to(ROOT).as_posix()
        scopes = [node for node in ast.walk(self.module) if isinstance(node, ast.FunctionDef)]
        for node in ast.walk(self.module):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                kind, value = ast.unparse(node.exc.func), node.exc.args[0]
            elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in WARNS and node.args:
                kind, value = "warning", node.args[0]
            else:
                continue
            around = [scope for scope in scopes if scope.lineno <= node.lineno <= (scope.end_lineno or 0)]
            texts = [text for text in self.texts(value, around) if re.search("[a-z]{3} ", text)]
            yield from (Message(place, kind, _tidy(text)) for text in texts)
            if not texts:
                yield Unreadable(place, ast.unparse(node))

    def texts(self, value: ast.expr, scopes: list[ast.FunctionDef]) -> Iterator[str]:
        """What the expression can say, in these functions around it."""
        match value:
            case ast.Constant(value=str(text)):
                yield text
            case ast.JoinedStr(values=parts):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else VALUE for part in parts)
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                for first in self.texts(left, scopes):
                    yield from (first + second for second in self.texts(right, scopes))
            case ast.IfExp(body=body, orelse=orelse):
                yield from self.texts(body, scopes)
                yield from self.texts(orelse, scopes)
            case ast.Name(id=name):
                for node in (node for scope in (*scopes, self.module) for node in ast.walk(scope)):
                    if isinstance(node, ast.Assign) and name in map(ast.unparse, node.targets):
                        yield from self.texts(node.value, scopes)
                yield from self.handed_over(name, scopes)
            case ast.Call(func=ast.Name(id=name)) if name in self.functions:
                for node in ast.walk(self.functions[name]):
                    if isinstance(node, ast.Return) and node.value:
                        yield from self.texts(node.value, [])
            case _:
                yield VALUE

    def handed_over(self, name: str, scopes: list[ast.FunctionDef]) -> Iterator[str]:
        """What callers say for an argument of the functions around: of private ones those in this file."""
        for scope in scopes:
            names = [argument.arg for argument in scope.args.args]
            if name in names:
                for file in [self] if scope.name.startswith("_") else self.files:
                    for node in ast.walk(file.module):
                        if isinstance(node, ast.Call) and ast.unparse(node.func) == scope.name:
                            for value in node.args[names.index(name) : names.index(name) + 1]:
                                yield from file.texts(value, [])


def _tidy(text: str) -> str:
    return re.sub(f"{VALUE}( ?{VALUE})+", VALUE, re.sub(r"\s+", " ", text)).strip()


def section() -> str:
    """The page's index, in Markdown: a heading for each group, what to do, and the messages."""
    groups: dict[tuple[str, str], list[Message]] = {}
    for message in messages():
        groups.setdefault(message.area(), []).append(message)
    lines = []
    for (heading, advice), found in sorted(groups.items()):
        lines += [f"### {heading}", "", advice, ""]
        entries = {(message.text, message.kind) for message in found}
        in_order = sorted(entries, key=lambda entry: (entry[0].lower(), entry))
        lines += [f"- {kind}: {_code(text)}" for text, kind in in_order] + [""]
    return "\n".join(lines)


def _code(text: str) -> str:
    return f"`` {text} ``"


def updated(page: str) -> str:
    """The page with today's index between its markers."""
    return f"{page.split(BEGIN)[0]}{BEGIN}\n{section()}{END}{page.split(END)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    text = PAGE.read_text()
    if not parser.parse_args().check:
        PAGE.write_text(updated(text))
    elif updated(text) != text:
        sys.exit(f"{PAGE.name} differs from the messages in the source: run python docs/messages.py")


if __name__ == "__main__":
    main()
