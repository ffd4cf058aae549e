"""Adapters of PEFT whose effect on a token depends on other tokens of the call."""

from __future__ import annotations

import functools
from collections.abc import Iterable

from torch import Tensor, nn

from .documents import Documents, first_columns_of_documents
from .mask import Mask
from .memo import recent
from .reading import read_and_refuse

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
    check = functools.partial(
        _refuse_documents_under_adapters, ", ".join(sorted(found)), mask, documents, query.shape[2]
    )
    sources = () if documents is None else documents.tensors
    if isinstance(mask, Mask):
        mask.memo.get("adapters", sources, module, check, query.device)
    else:
        recent.get(("adapters", query.shape[2]), sources, module, check, query.device)


def _refuse_documents_under_adapters(
    adapters: str, mask: Mask | Tensor | None, documents: Documents | None, q_len: int
) -> None:
    """Refuse rows of several documents under adapters that see whole rows."""
    first = first_columns_of_documents(mask, documents, q_len)
    if first is not None and q_len > 1:
        read_and_refuse(
            first[:, 1:] != first[:, :-1],
            f"this call packs documents into a row under {adapters}, and what it makes of a token depends on other "
            "tokens of the call: aLoRA begins at the last invocation sequence of a row, Lily averages its routing over "
            "all tokens. Give each document a row of the batch, for Lily a call of its own; or use another adapter, "
            "such as LoRA without `alora_invocation_tokens`",
        )
