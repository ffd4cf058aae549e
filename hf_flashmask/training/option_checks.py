"""Checks of the options that users give collators."""

from __future__ import annotations

from numbers import Integral
from typing import Any, get_args


def check_option_is_one_of(name: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise ValueError(f"`{name}` must be one of {list(get_args(choices))}, got {value!r}")


def check_option_at_least(name: str, value: Any, smallest: int) -> None:
    if not isinstance(value, Integral) or value < smallest:
        is_short = value is None or isinstance(value, (int, float, str))  # models and tokenizers print pages
        got = repr(value) if is_short else type(value).__name__
        raise ValueError(f"`{name}` must be an integer of at least {smallest}, got {got}")
