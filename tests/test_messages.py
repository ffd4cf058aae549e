"""The index of messages on the page about troubleshooting: it is complete, and finds what is raised."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import build, packed, random_documents

from flashmask_kernels import flashmask_attention
from hf_flashmask import PackedDataCollator, SharedPromptDataCollator, bounds, prefix_tree, share_prefixes

sys.path.append(str(Path(__file__).parents[1] / "docs"))

import messages

INTERNAL = {"UnknownFunctionError", "typer.BadParameter", "typer.Exit"}
"""Caught where functions are evaluated instead; of the command line, which repeats the message of another error."""


def test_every_message_can_be_read_off_the_source() -> None:
    assert {ast.unparse(ast.parse(found.code).body[0].exc.func) for found in messages.unreadable()} <= INTERNAL  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def found() -> list[messages.Message]:
    return messages.messages()


def test_every_message_has_an_entry_and_an_advice(found: list[messages.Message]) -> None:
    section = messages.section()
    for message in found:
        heading, advice = message.area()
        assert section.count(f"### {heading}\n\n{advice}\n") == 1
        assert f"- {message.kind}: `` {message.text} ``\n" in section


def test_the_page_holds_the_index() -> None:
    page = messages.PAGE.read_text()
    assert messages.updated(page) == page, "run `python docs/messages.py`"


def test_every_place_that_is_named_raises_something(found: list[messages.Message]) -> None:
    used = {message.area() for message in found}
    assert used == set(messages.AREAS.values())
    assert all((messages.ROOT / place).exists() for place in messages.AREAS)


def test_nothing_is_raised_without_a_message() -> None:
    """`raise ValueError` and `raise ValueError()` tell nobody what to do; what is caught or abstract is left out."""
    allowed = {"NotImplementedError", "AttributeError"}
    for package in messages.PACKAGES:
        for path in package.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Raise) and node.exc is not None:
                    name = ast.unparse(node.exc).removesuffix("()")
                    is_bare = name.endswith("Error") and "(" not in name and name[0].isupper()
                    assert not is_bare or name in allowed, f"{path}:{node.lineno}"


QUERY = torch.randn(1, 4, 8, 16)
CALLS: dict[str, Callable[[], object]] = {
    "a kernel, wrong bounds": lambda: flashmask_attention(QUERY, QUERY, QUERY, torch.zeros(1, 1, 3, 8).int()),
    "a kernel, wrong heads": lambda: flashmask_attention(QUERY, QUERY[:, :3], QUERY[:, :3]),
    "bounds, int64": lambda: bounds.to_dense(torch.zeros(1, 1, 1, 8, dtype=torch.int64)),
    "a window of 0": lambda: bounds.sliding_window(0, 8),
    "a tree out of order": lambda: bounds.from_prefix_tree([-1, -1, 0], [1, 1, 1]),
    "too many intervals": lambda: bounds.from_dense(torch.arange(80)[:, None] % 2 == torch.zeros(80)),
    "a mask_mod of two arguments": lambda: bounds.from_mask_mod(lambda q, k: q >= k, 8),
    "a mask_mod that branches": lambda: bounds.from_mask_mod(lambda b, h, q, k: q >= k and k < 3, 8),
    "a mask_mod of numbers": lambda: bounds.from_mask_mod(lambda b, h, q, k: q - k, 8),
    "a mask_mod of nothing": lambda: bounds.from_mask_mod(lambda b, h, q, k: None, 8),
    "no sequences": lambda: prefix_tree.from_sequences([]),
    "a misspelled name": lambda: build("llama", "flash_mask"),
    "a dense mask of 0 and 1": lambda: build("llama")(
        torch.ones(1, 6).long(), attention_mask=torch.ones(1, 1, 6, 6).int().tril()
    ),
    "lengths of a batch": lambda: build("llama")(
        torch.ones(2, 6).long(), cu_seq_lens_q=torch.tensor([0, 2, 6]).int(), use_cache=False
    ),
    "sharing with another attention": lambda: share_prefixes(build("llama", "eager")),
    "a document that is too long": lambda: PackedDataCollator(max_length=2)([{"input_ids": [1, 2, 3]}]),
    "examples of one column": lambda: SharedPromptDataCollator()([{"prompt": [1]}]),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_index_finds_what_is_raised(call: Callable[[], object], found: list[messages.Message]) -> None:
    with pytest.raises(Exception) as raised:  # noqa: PT011
        call()
    text = " ".join(str(raised.value).split())
    kinds = [message.kind.rpartition(".")[2] for message in found if message.pattern().fullmatch(text)]
    assert kinds, text
    assert not {type(raised.value).__name__, "error"}.isdisjoint(kinds)


def test_the_index_finds_a_warning(found: list[messages.Message], monkeypatch: pytest.MonkeyPatch) -> None:
    documents = random_documents([3, 4])
    warnings: list[str] = []
    monkeypatch.setattr("hf_flashmask.integration.final_bounds.logger.warning_once", warnings.append)
    build("llama")(**packed(documents), attention_mask=bounds.causal(7))
    assert len(warnings) == 1
    patterns = [message.pattern() for message in found if message.kind == "warning"]
    assert any(pattern.fullmatch(" ".join(warnings[0].split())) for pattern in patterns)
