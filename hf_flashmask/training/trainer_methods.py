"""Methods of `transformers.Trainer` that are wrapped, for all its subclasses."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

__all__ = ["wrap_in_trainer"]

_OURS = "_wrapped_by_flashmask"


def wrap_in_trainer(name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put `wrap(method)` in the place of a method, in releases that have it. Again is harmless."""
    try:
        from transformers import Trainer
    except ImportError:  # without accelerate there is no Trainer
        return
    method = getattr(Trainer, name, None)
    if method is not None and not hasattr(method, _OURS):
        wrapper = functools.wraps(method)(wrap(method))
        setattr(wrapper, _OURS, True)
        setattr(Trainer, name, wrapper)
