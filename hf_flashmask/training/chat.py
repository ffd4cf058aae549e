"""Chat messages as token ids, by the template of a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase


def template_options(example: Mapping[str, Any]) -> dict[str, Any]:
    """What an example says to the chat template: its `tools`, a list or its JSON, and its `chat_template_kwargs`."""
    tools = example.get("tools")
    if isinstance(tools, str):  # as TRL takes them: a dataset cannot store structures that differ from row to row
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise ValueError(
                f"`tools` of an example is a string, but no JSON: {error}; give a list, or its JSON"
            ) from error
    return {"tools": tools, **(example.get("chat_template_kwargs") or {})}


def encode_messages(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Any],
    options: Mapping[str, Any],
    *,
    add_generation_prompt: bool,
) -> list[int]:
    encoding: Any = tokenizer.apply_chat_template(
        list(messages), tokenize=True, return_dict=True, add_generation_prompt=add_generation_prompt, **options
    )
    return encoding["input_ids"]
