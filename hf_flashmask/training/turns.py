"""Conversations as turns: what inference generates for each message of the assistant, and from which context."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from .chat import encode_messages, template_options


class Turn(NamedTuple):
    """A message of the assistant.

    Attributes:
        message: its place in the conversation.
        tokens: the context with its generation prompt, then what inference generates, up to the token that stops it.
        start: number of tokens of the context.
    """

    message: int
    tokens: list[int]
    start: int


def find_turns(
    number: int, example: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int]
) -> list[Turn]:
    """The turns of an example that are trained, in their order.

    Raises:
        ValueError: for an example that is no conversation; for a turn that cannot be located; the message names it.
    """
    messages = _messages_of_conversation(number, example)
    options = template_options(example)
    trained = [place for place, message in enumerate(messages) if _is_trained_turn(number, place, message)]
    messages = [_message_without_switches(message) for message in messages]

    def encode(place: int, length: int, *, add_generation_prompt: bool) -> list[int]:
        try:
            return encode_messages(tokenizer, messages[:length], options, add_generation_prompt=add_generation_prompt)
        except Exception as error:  # what a template raises is up to it
            raise ValueError(
                f"{_name_of_turn(number, place)} cannot be rendered: {_template_of_turns(tokenizer)} raised "
                f"{type(error).__name__}: {error}"
            ) from error

    turns = []
    for place in trained:
        context = encode(place, place, add_generation_prompt=True)
        tokens = encode(place, place + 1, add_generation_prompt=False)
        if tokens[: len(context)] != context:
            _raise_turn_not_located(_name_of_turn(number, place), tokenizer, context, tokens)
        end = _end_of_turn(_name_of_turn(number, place), tokenizer, tokens[len(context) :], stop_ids)
        turns.append(Turn(place, tokens[: len(context) + end], len(context)))
    return turns


_SWITCHES = ("train", "weight")
"""Keys of a message that exclude it from training. They are not for the template."""


def _messages_of_conversation(number: int, example: Any) -> list[Mapping[str, Any]]:
    messages = example.get("messages") if isinstance(example, Mapping) else None
    if not isinstance(messages, list | tuple):
        keys = sorted(example) if isinstance(example, Mapping) else type(example).__name__
        raise ValueError(
            f"example {number} of the batch must have `messages`, a list of chat messages, got {keys}. If it is a "
            "column of your dataset, set TrainingArguments(remove_unused_columns=False)"
        )
    for place, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"{_name_of_turn(number, place)} must be a dict with a `role`, got {message!r:.200}")
    return list(messages)


def _is_trained_turn(number: int, place: int, message: Mapping[str, Any]) -> bool:
    values = [message[key] for key in _SWITCHES if message.get(key) is not None]
    unknown = [value for value in values if value not in (0, 1)]
    if unknown:
        raise ValueError(
            f"`train` and `weight` of {_name_of_turn(number, place)} must be True or 1 to train it, False or 0 to "
            f"leave it out, got {unknown[0]!r}"
        )
    return message["role"] == "assistant" and all(values)


def _message_without_switches(message: Mapping[str, Any]) -> dict[str, Any]:
    """Without the keys that a dataset adds with None, because other messages and other calls of tools have them:
    templates ask whether they are there. `content` is None beside calls of tools."""
    return {
        key: _without_none_in_message(value)
        for key, value in message.items()
        if key not in _SWITCHES and (value is not None or key == "content")
    }


def _without_none_in_message(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none_in_message(part) for key, part in value.items() if part is not None}
    return [_without_none_in_message(part) for part in value] if isinstance(value, list) else value


def _end_of_turn(name: str, tokenizer: PreTrainedTokenizerBase, tokens: list[int], stop_ids: Collection[int]) -> int:
    """Number of tokens up to the first one that stops inference, that one included."""
    end = next((place + 1 for place, token in enumerate(tokens) if token in stop_ids), None)
    stops = tokenizer.convert_ids_to_tokens(list(stop_ids))
    if end is None:
        raise ValueError(
            f"{name} has no end: {_template_of_turns(tokenizer)} writes {_quote_tokens(tokenizer, tokens[-8:])} at its "
            f"end, and none of {stops}; pass `eos_token_id`, the tokens that stop generation"
        )
    following: Any = tokenizer.decode(tokens[end:], skip_special_tokens=True)
    if following.strip():
        raise ValueError(
            f"{name} has {tokenizer.convert_ids_to_tokens(tokens[end - 1])!r} before its end, where generation stops "
            f"(`eos_token_id`: {stops}), and goes on with {_quote_tokens(tokenizer, tokens[end : end + 8])} by "
            f"{_template_of_turns(tokenizer)}: inference would never generate that"
        )
    return end


def _raise_turn_not_located(
    name: str, tokenizer: PreTrainedTokenizerBase, context: list[int], tokens: list[int]
) -> None:
    differences = (place for place, pair in enumerate(zip(context, tokens)) if pair[0] != pair[1])
    place = next(differences, min(len(context), len(tokens)))
    raise ValueError(
        f"{name} cannot be located: {_template_of_turns(tokenizer)} renders the conversation up to it in another way "
        f"than the context that inference starts from. After {place} equal tokens, ending in "
        f"{_quote_tokens(tokenizer, context[max(place - 8, 0) : place])}, the context goes on with "
        f"{_quote_tokens(tokenizer, context[place : place + 8])}, the conversation with "
        f"{_quote_tokens(tokenizer, tokens[place : place + 8])}. The last message of a conversation must be rendered "
        "as it was generated after the generation prompt: its thinking kept, and no white space that joins the "
        "prompt's last token; change the template or the message, or leave it out with `train`: False"
    )


def _name_of_turn(number: int, place: int) -> str:
    return f"message {place} of example {number} of the batch"


def _template_of_turns(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"the chat template of {tokenizer.name_or_path or type(tokenizer).__name__}"


def _quote_tokens(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    return repr(tokenizer.decode(tokens)) if tokens else "nothing"
