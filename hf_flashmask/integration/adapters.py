"""Adapters of PEFT whose effect on a token depends on other tokens of the call."""

from __future__ import annotations

import functools
from collections.abc import Iterable

from torch import Tensor, nn

from .documents import Documents, refuse_documents_under
from .mask import Mask
from .memo import recent

__all__ = ["adapters_that_see_rows", "refuse_adapters_that_see_rows"]


def adapters_that_see_rows(layers: Iterable[nn.Module | None]) -> set[str]:
    """The active ones among `layers`, by name.

    Lily averages its routing over all tokens; aLoRA begins at the last invocation sequence of each row.
    """
    found = set()
    for layer in layers:
        if layer is None:
            continue
        variants = layer.__dict__.get("lora_variant")  # `getattr` takes ten times as long where there is none
        is_lily = "lily_router" in layer._modules
        if (not is_lily and not variants) or getattr(layer, "disable_adapters", False):
            continue
        for name in getattr(layer, "active_adapters", ()):
            if is_lily or type((variants or {}).get(name)).__name__ == "ALoraLinearVariant":
                found.add(f"the {'Lily' if is_lily else 'aLoRA'} adapter {name!r} of PEFT")
    return found


def refuse_adapters_that_see_rows(
    module: nn.Module, query: Tensor, mask: Mask | Tensor | None, documents: Documents | None
) -> None:
    """Refuse rows of several documents where a projection of an attention layer has such an adapter.

    Only its own projections are looked at, which takes a microsecond in each layer and pass. A walk through the model
    takes milliseconds.

    Raises:
        NotImplementedError: in a graph it is an assertion on the device.
    """
    found = adapters_that_see_rows(module._modules.values())
    if not found:
        return
    check = functools.partial(refuse_documents_under, ", ".join(sorted(found)), mask, documents, query.shape[2])
    sources = () if documents is None else documents.tensors
    if isinstance(mask, Mask):
        mask.memo.get("adapters", sources, module, check, query.device)
    else:
        recent.get(("adapters", query.shape[2]), sources, module, check, query.device)
