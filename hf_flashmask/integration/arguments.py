"""The arguments of a call by their names, for hooks on models."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["by_name"]


def by_name(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {**(dict(zip(inspect.signature(model.forward).parameters, args)) if args else {}), **kwargs}
