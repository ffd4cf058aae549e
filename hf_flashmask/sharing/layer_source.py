"""The source of layers, which is read for what they compute."""

from __future__ import annotations

import ast
import functools
import inspect
import sys

from torch import nn
from transformers import PreTrainedModel


def source_of_layer(layer: nn.Module) -> str:
    """The source of a layer's class and its bases, without those of torch; empty where it is not found."""
    return _source_of_class(type(layer))  # type: ignore[arg-type]


@functools.cache
def _source_of_class(layer_class: type) -> str:
    sources = []
    for base in layer_class.__mro__:
        if base not in (object, PreTrainedModel) and not base.__module__.startswith("torch."):
            try:
                of_module = _sources_of_classes(inspect.getsource(sys.modules[base.__module__]))
                sources.append(of_module.get(base.__qualname__) or inspect.getsource(base))
            except (KeyError, OSError, TypeError):  # a class from a notebook
                continue
    return "\n".join(sources)


@functools.cache
def _sources_of_classes(text: str) -> dict[str, str]:
    """Of the classes that the text of a module defines at its top. Before Python 3.13, `inspect` parses it again for
    each class.
    """
    lines = text.split("\n")  # as `ast` counts them: `splitlines` also ends them at form feeds
    classes = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
    starts = [min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) for node in classes]
    return {node.name: "\n".join(lines[start - 1 : node.end_lineno]) for node, start in zip(classes, starts)}
