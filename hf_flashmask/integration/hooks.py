"""Hooks that models keep as long as they use flashmask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["set_hook"]


def set_hook(model: nn.Module, hook: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any], *, is_needed: bool) -> None:
    """Have a model call the hook before its forward, once, or no longer. Pickles of a model hold its hooks."""
    known = [number for number, other in model._forward_pre_hooks.items() if other is hook]
    if is_needed and not known:
        model.register_forward_pre_hook(hook, with_kwargs=True)
    elif not is_needed:
        for number in known:
            del model._forward_pre_hooks[number], model._forward_pre_hooks_with_kwargs[number]
