"""`keep_masks`: the masks of whole sequences under an engine that exchanges heads and drops masks.

Such an engine (DeepSpeed's Ulysses, which Trainer and accelerate offer) puts a function of its own in the place of the
one that is registered as "flashmask", and calls that with the heads of this rank, all tokens of the row, and no mask.
The model gets the mask of the whole row in the place of its own part; around the engine's function the mask takes a way
that the engine leaves alone.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..integration import NAME, Mask, flashmask_attention_forward
from ..integration.whole_sequence import WholeSequence
from .exchanges import EngineExchange
from .group import Group, all_gather, groups_of
from .models import ModelTokenTraits, check_model, find_model
from .rotary import share_largest_position

__all__ = ["KeptMasks", "keep_masks"]


def keep_masks(model: nn.Module, mesh: DeviceMesh | dist.ProcessGroup, *, exchanges_in_eval: bool = False) -> KeptMasks:
    """Keep what an engine for sequence parallelism would drop, from now on or inside a `with` block::

        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)  # with sp_size > 1
        kept = hf_flashmask.keep_masks(model, deepspeed.utils.groups._get_sequence_parallel_group())

    The model is called as the engine has it: each rank with its tokens of the row. `position_ids`, a 2-D mask and the
    token types that a model makes image blocks of are gathered once in each forward pass; bounds are those of the whole
    row, and the same on all ranks. The masks are made once for each type of layers, instead of in each layer, and
    attention sinks are those of the rank's heads.

    Args:
        model: with `attn_implementation="flashmask"`, after the engine has prepared it.
        mesh: of the ranks that share a sequence.
        exchanges_in_eval: whether the engine exchanges heads in evaluation too. DeepSpeed under accelerate does not:
            there each rank has rows of its own.

    Raises:
        NotImplementedError, TypeError, ValueError: for a model that this does not work with, and when no engine has
            replaced the attention function.
    """
    return KeptMasks(model, mesh, exchanges_in_eval=exchanges_in_eval)


class KeptMasks:
    """What `keep_masks` returns. `remove` switches it off."""

    def __init__(
        self, model: nn.Module, mesh: DeviceMesh | dist.ProcessGroup, *, exchanges_in_eval: bool = False
    ) -> None:
        self._model = find_model(model)
        check_model(self._model)
        self._token_types = ModelTokenTraits.of(self._model).types_of_mask
        self._group: Group = groups_of(mesh, "mesh", 1)[0]
        self._exchanges_in_eval = exchanges_in_eval
        engine = ALL_ATTENTION_FUNCTIONS[NAME]
        if engine is flashmask_attention_forward:
            raise ValueError(
                "no engine has replaced the attention function: call keep_masks after the engine has prepared the "
                "model (accelerator.prepare, register_with_transformers), or use hf_flashmask.sequence_parallel, which "
                "needs no engine"
            )

        call_engine = torch.compiler.disable(engine, reason="the exchange of an engine may not be held by a graph")

        def attend(
            module: nn.Module,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Any,
            *args: Any,
            **options: Any,
        ) -> Any:
            if isinstance(attention_mask, Mask):
                options["kept_mask"], attention_mask = attention_mask, None
            return call_engine(module, query, key, value, attention_mask, *args, **options)

        self._engine, self._attend = engine, attend
        ALL_ATTENTION_FUNCTIONS[NAME] = attend
        self._hooks = share_largest_position(self._model, [self._group], self._has_part)
        self._hooks.append(self._model.register_forward_pre_hook(self._make_whole, with_kwargs=True))

    def _has_part(self) -> bool:
        return self._model.training or self._exchanges_in_eval

    def _make_whole(self, model: nn.Module, args: tuple, call: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """The arguments of the model, with what its mask is made of for all tokens of the row."""
        if not self._has_part():
            return None
        tokens = next(given for given in (call.get("input_ids"), call.get("inputs_embeds"), *args) if given is not None)
        position_ids, mask = call.get("position_ids"), call.get("attention_mask")
        local = tokens.shape[1]
        if not isinstance(position_ids, Tensor) or position_ids.ndim != 2 or position_ids.shape[1] != local:
            raise ValueError(
                f"under an engine for sequence parallelism `position_ids` [B or 1, {local}] must say where the tokens "
                f"of this rank are in the row, got {_describe_given_tensor(position_ids)}"
            )
        if call.get("cu_seq_lens_q") is not None:
            raise NotImplementedError(
                "`cu_seq_lens_q` of one rank's tokens cannot be gathered: let `position_ids` tell the documents apart, "
                "and take the cumulative lengths out of the batch"
            )
        types = {name: call[name] for name in self._token_types if call.get(name) is not None}
        call = call | {name: self._gather(part) for name, part in types.items()}
        exchange = EngineExchange(self._group, local * self._group.size)
        if isinstance(mask, dict):
            masks = {kind: self._final(bounds, exchange) for kind, bounds in mask.items()}
            return args, {**call, "attention_mask": masks}
        if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] == local:
            mask = self._gather(mask)
        self._check_whole(mask, exchange)
        whole = WholeSequence(mask, self._gather(position_ids), exchange, has_token_types=bool(types))
        return args, {**call, "attention_mask": whole}

    def _final(self, bounds: Mask | Tensor, exchange: EngineExchange) -> Mask:
        self._check_whole(bounds, exchange)
        mask = bounds.for_this_pass() if isinstance(bounds, Mask) else Mask.of_user(bounds)
        mask.exchange = exchange
        return mask

    def _check_whole(self, mask: Any, exchange: EngineExchange) -> None:
        is_known = isinstance(mask, (Tensor, Mask))
        if mask is not None and not (is_known and mask.shape[-1] == exchange.length):
            raise ValueError(
                f"`attention_mask` must be 2-D with the {exchange.local_length} tokens of this rank, or bounds of the "
                f"whole row [B or 1, H or 1, C, {exchange.length}] on all ranks, got {_describe_given_tensor(mask)}"
            )

    def _gather(self, part: Tensor) -> Tensor:
        """`[B or 1, S / P]` of each rank -> `[B or 1, S]`."""
        return torch.cat(all_gather(part, self._group).unbind(), dim=1)

    def remove(self) -> None:
        """Switch it off: the engine drops masks again."""
        for hook in self._hooks:
            hook.remove()
        if ALL_ATTENTION_FUNCTIONS[NAME] is self._attend:
            ALL_ATTENTION_FUNCTIONS[NAME] = self._engine

    def __enter__(self) -> KeptMasks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def _describe_given_tensor(value: Any) -> str:
    return f"{list(value.shape)}" if isinstance(value, (Tensor, Mask)) else type(value).__name__
