"""The memory between the layers of a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple, cast
from weakref import ref

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from flashmask_kernels.ops import once_in_graph


class _Built(NamedTuple):
    """Bounds, and the state of the tensors that they were built from."""

    bounds: Tensor | None
    sources: tuple[ref[Tensor], ...]
    versions: tuple[int, ...]


_built_bounds: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""First source tensor -> layer -> the last bounds built for it; it goes when that tensor goes."""


def once_per_forward_pass(
    build: Callable[[], Tensor | None], layer: Hashable, sources: tuple[Tensor, ...]
) -> Tensor | None:
    """`build()`, which reads `sources`, once for all layers that are equal: they share bounds and schedule of tiles."""
    if sources and torch.compiler.is_compiling():
        return once_in_graph(cast(Callable[[], Tensor], build), (layer,), *sources)
    # An inference tensor does not tell whether it was changed.
    if not sources or any(source.is_inference() for source in sources):
        return build()
    versions = tuple(source._version for source in sources)
    built = _built_bounds.setdefault(sources[0], {})
    last: _Built | None = built.get(layer)
    if (
        last is None
        or last.versions != versions
        or len(last.sources) != len(sources)
        or any(known() is not source for known, source in zip(last.sources, sources))
    ):
        last = built[layer] = _Built(build(), tuple(ref(source) for source in sources), versions)
    return last.bounds


_masks_of_users: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Bounds that a model was called with, or that were made of the tree that it was called with."""
