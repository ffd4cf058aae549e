"""What the layers of one forward pass share, and how long it lasts. The package has no other memory between calls.

Nothing announces a forward pass. These rules find where one begins, and in doubt they build again, which takes 0.04 ms:

* A `Memo` belongs to one mask, which the mask function makes anew in every pass, and goes with it.
* `recent` serves callers without such a mask: layers that were called with None or with a tensor, and the functions
  that make masks. It holds a few entries of each thread, no longer than the tensors that they were made from, and no
  longer than until the last layer of a model has asked.
* A caller that asks a second time begins a new pass, and so does a layer that comes before the last one that asked.
  Recomputation under gradient checkpointing is no new pass.
* Layers that do not know their place share only what was made of tensors whose version tells changes.
* An entry is not read across the border of a CUDA graph's capture, in either direction, on another stream, or across
  the border of inference mode.

So no entry is found by the identity of a tensor alone: the contents of a tensor change by `copy_`, through an array of
NumPy that shares its memory, or in the replay of a graph, and its version does not always tell.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar
from weakref import ref

import torch
from torch import Tensor, nn

from flashmask_kernels.schedules import capture_and_stream

__all__ = ["Memo", "recent"]

T = TypeVar("T")
Sources = tuple[Tensor, ...]


class Memo:
    """What layers make of one mask, once for those that are equal."""

    def __init__(self) -> None:
        self._entries: dict[Hashable, tuple[Sources, _Entry]] = {}
        self._is_of_graph = torch.compiler.is_compiling()
        self._made_in_graph: list[tuple[Hashable, Sources, Any]] = []

    def get(
        self, key: Hashable, sources: Sources, module: nn.Module, build: Callable[[], T], device: torch.device
    ) -> T:
        """`build()`, or what it returned to an equal layer of this pass.

        Args:
            key: all that the result depends on besides the mask and `sources`. It holds no lengths: they would
                specialise a graph.
            sources: tensors that are read.
            module: the layer that asks.
            device: where the result is.
        """
        if torch.compiler.is_compiling():
            return self._get_in_graph(key, sources, module, build)
        home = _home(device)
        known_sources, entry = self._entries.get(key, ((), None))
        if entry is None or not _are_same_sources(known_sources, sources) or not entry.serves(module, home):
            entry = _Entry(home, build())
            self._entries[key] = sources, entry
        entry.note(module)
        return entry.value

    def _get_in_graph(self, key: Hashable, sources: Sources, module: nn.Module, build: Callable[[], T]) -> T:
        """One graph is one pass. Checkpointed layers cannot share what they make; with gradients the compiler removes
        common subexpressions itself.
        """
        if not self._is_of_graph or module.training or torch.is_grad_enabled():
            return build()
        for known_key, known_sources, value in self._made_in_graph:
            if known_key == key and _are_same_sources(known_sources, sources):
                return value
        value = build()
        self._made_in_graph.append((key, sources, value))
        return value


class _Entry:
    """A value, where it was made, and who has asked for it in this pass."""

    def __init__(self, home: Hashable, value: Any) -> None:
        self.home, self.value = home, value
        self._callers: set[int] = set()
        self._last_layer = -1

    def serves(self, caller: object, home: Hashable) -> bool:
        if home != self.home:
            return False
        return _is_recomputing() or not (id(caller) in self._callers or 0 <= _layer_number(caller) <= self._last_layer)

    def note(self, caller: object) -> None:
        self._callers.add(id(caller))
        self._last_layer = max(self._last_layer, _layer_number(caller))


class _RecentEntry(NamedTuple):
    key: Hashable
    sources: tuple[ref[Tensor], ...]
    versions: tuple[int, ...]
    entry: _Entry


class _Recent(threading.local):
    """The last entries of this thread for callers without a mask of their own."""

    _MOST = 8  # a pass needs few: its kinds of layers, and what the functions that make their masks share

    def __init__(self) -> None:
        self._entries: list[_RecentEntry] = []

    def get(self, key: Hashable, sources: Sources, caller: object, build: Callable[[], T], device: torch.device) -> T:
        """As `Memo.get`; `key` is all that the result depends on besides `sources`. In a graph nothing is shared."""
        if torch.compiler.is_compiling():
            return build()
        value = self._get(key, sources, caller, build, device)
        if _is_last_layer(caller):
            self._entries.clear()  # a value may hold its sources, which would then never go
        return value

    def _get(self, key: Hashable, sources: Sources, caller: object, build: Callable[[], T], device: torch.device) -> T:
        if isinstance(caller, nn.Module) and _layer_number(caller) < 0 and not all(map(_tells_changes, sources)):
            return build()
        # A recomputation shares with itself alone: the forward pass may have run in another thread.
        home = _home(device), torch._C._current_graph_task_id()
        versions = tuple(0 if source.is_inference() else source._version for source in sources)
        for known in self._entries:
            if (
                known.key == key
                and known.versions == versions
                and _are_same_sources(_alive_sources(known.sources), sources)
            ):
                if known.entry.serves(caller, home):
                    known.entry.note(caller)
                    return known.entry.value
                _remove_entry(self._entries, known)
                break
        entry = _Entry(home, build())
        entry.note(caller)
        forget = functools.partial(_forget_source, self._entries)
        self._entries[: -self._MOST + 1] = []
        self._entries.append(_RecentEntry(key, tuple(ref(source, forget) for source in sources), versions, entry))
        return entry.value


def _remove_entry(entries: list[_RecentEntry], gone: _RecentEntry) -> None:
    entries[:] = [entry for entry in entries if entry is not gone]


def _forget_source(entries: list[_RecentEntry], dead: ref[Tensor]) -> None:
    """Called when a tensor goes, in whatever thread."""
    entries[:] = [entry for entry in entries if all(source is not dead for source in entry.sources)]


recent = _Recent()


def _alive_sources(sources: tuple[ref[Tensor], ...]) -> tuple[Tensor | None, ...]:
    return tuple(source() for source in sources)


def _are_same_sources(known: tuple[Tensor | None, ...], sources: Sources) -> bool:
    return len(known) == len(sources) and all(a is b for a, b in zip(known, sources))


def _layer_number(caller: object) -> int:
    index = getattr(caller, "layer_idx", None)
    return index if isinstance(index, int) else -1


def _tells_changes(source: Tensor) -> bool:
    """Whether the version of a tensor counts what changes it: not so where others own its memory, an array of NumPy."""
    return not source.is_inference() and source.untyped_storage().resizable()


def _is_last_layer(caller: object) -> bool:
    number = getattr(getattr(caller, "config", None), "num_hidden_layers", None)
    return isinstance(number, int) and 0 <= _layer_number(caller) == number - 1


def _is_recomputing() -> bool:
    """Whether this runs within a backward pass: layers run there only under gradient checkpointing."""
    return torch._C._current_graph_task_id() != -1


def _home(device: torch.device) -> Hashable:
    """What the memory of a tensor that is made now depends on."""
    return torch.is_inference_mode_enabled(), *capture_and_stream(device)
