"""Other engines for sequence parallelism, where they would be silently wrong.

Some engines wrap the attention function, exchange heads against tokens and pass no mask: what `position_ids` say
reaches the layers all the same, bounds do not. A layer sees it by its rows, which are more than the model was called
with. The ring of torch's context parallelism replaces SDPA alone, and leaves other attention within its rank.
"""

from __future__ import annotations

import threading
from typing import Any
from weakref import ref

from torch import Tensor, nn

__all__ = ["called_with_bounds", "refuse_ring"]


class _CalledWithBounds(threading.local):
    """The configuration of the model that this thread has last called with bounds, and the tokens of its rows."""

    def __init__(self) -> None:
        self._config: ref[Any] | None = None
        self._length = 0

    def note(self, config: Any, length: int) -> None:
        self._config, self._length = ref(config), length

    def forget(self, config: Any) -> None:
        if self._config is not None and self._config() is config:
            self._config = None

    def refuse_without_mask(self, module: nn.Module, query: Tensor) -> None:
        """Raise for a layer that gets no mask and more rows than its model, which was called with bounds."""
        config = None if self._config is None else self._config()
        if config is None or query.shape[2] <= self._length:
            return
        if getattr(module, "config", None) is config:
            raise ValueError(
                f"the model was called with bounds for {self._length} tokens as `attention_mask`, but "
                f"{type(module).__name__} is called with {query.shape[2]} tokens and without a mask: an engine for "
                "sequence parallelism, such as DeepSpeed Ulysses, has dropped it. Use hf_flashmask.sequence_parallel, "
                "which keeps bounds, or tell documents apart by `position_ids` instead of bounds"
            )


called_with_bounds = _CalledWithBounds()


def refuse_ring(module: nn.Module) -> None:
    """Raise inside of torch's `context_parallel`."""
    if "_distribute_function" in getattr(nn.functional.scaled_dot_product_attention, "__qualname__", ""):
        raise NotImplementedError(
            "torch's context_parallel (the ring, also as accelerate's `cp_size`) replaces SDPA alone: with flashmask "
            f"{type(module).__name__} would attend only to the tokens of its rank. Use hf_flashmask.sequence_parallel"
        )
