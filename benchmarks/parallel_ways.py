"""A model that trains on one GPU or on several, and the ways to do so that `parallel_gpu.py` compares.

Every way gets the same rows, and computes the same loss and the same gradients. `flashmask` are the ways of this
project. The others move heads as DeepSpeed's Ulysses does, with torch's own attention on each rank: SDPA, or
FlashAttention-2 for variable lengths. `ring, sdpa` is torch's `context_parallel`, for one document.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from masks import Varlen
from peers import LONGEST_DENSE_MASK, flash_attention_2
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.experimental import context_parallel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from training_gpu import LONGEST_TRIED
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, set_seed

from hf_flashmask import sequence_parallel

IGNORED = -100
TOKENS_OF_LOSS = 8192
"""Tokens whose logits exist at the same time."""

Batch = dict[str, Any]


class TrainedModel(nn.Module):
    """A causal language model with its loss, which is computed in parts: long rows have no room for all logits."""

    def __init__(self, shape: dict[str, Any], vocabulary: int, device: str, dtype: torch.dtype) -> None:
        super().__init__()
        set_seed(0)
        config = LlamaConfig(
            vocab_size=vocabulary,
            max_position_embeddings=LONGEST_TRIED,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
            **shape,
        )
        with torch.device(device):
            self.model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa", dtype=dtype)
        self.model.gradient_checkpointing_enable()
        self.train()

    def forward(self, shift_labels: Tensor, divisor: Tensor | float, **inputs: Any) -> Tensor:
        """The sum of the losses of the tokens over `divisor`."""
        hidden = self.model.model(**inputs, use_cache=False).last_hidden_state
        parts = zip(hidden[0].split(TOKENS_OF_LOSS), shift_labels[0].split(TOKENS_OF_LOSS))
        losses = [checkpoint(self._loss, *part, use_reentrant=False) for part in parts]
        return torch.stack(losses).sum() / divisor

    def _loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        logits = self.model.lm_head(hidden).float()
        return nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")

    def shard_weights(self, mesh: DeviceMesh) -> None:
        for layer in self.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self, mesh=mesh)


class Way(NamedTuple):
    """How to train.

    Attributes:
        attention: its name for Transformers.
        divides_rows: whether the ranks share a row; otherwise each of them has its own.
        shards_weights: by FSDP2, over all ranks.
        part: from the whole row to a context in which the model is called with what it gives, and its loss
            differentiated. The average of the losses over the ranks is that of the row.
    """

    attention: str
    divides_rows: bool
    shards_weights: bool
    part: Callable[[Batch], AbstractContextManager[Batch]]


def whole_row(batch: Batch) -> Batch:
    """What `TrainedModel` is called with."""
    return {
        "input_ids": batch["input_ids"],
        "position_ids": batch["position_ids"],
        "shift_labels": nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED),
        "divisor": batch["num_items_in_batch"],
    }


def alone(model: TrainedModel, mesh: DeviceMesh) -> Way:
    return Way("flashmask", False, False, lambda batch: contextlib.nullcontext(whole_row(batch)))


def data_parallel(model: TrainedModel, mesh: DeviceMesh) -> Way:
    return alone(model, mesh)._replace(shards_weights=True)


def flashmask(mode: str) -> Callable[[TrainedModel, DeviceMesh], Way]:
    def make(model: TrainedModel, mesh: DeviceMesh) -> Way:
        model.model.set_attn_implementation("flashmask")
        parallel = sequence_parallel(model, mesh, mode=mode)  # type: ignore[arg-type]

        def part(batch: Batch) -> AbstractContextManager[Batch]:
            inputs = parallel.shard({name: value for name, value in batch.items() if name != "varlen"})
            inputs["divisor"] = inputs.pop("num_items_in_batch")
            del inputs["labels"]
            return contextlib.nullcontext(inputs)

        return Way("flashmask", True, True, part)

    return make


class _ExchangeHeads(torch.autograd.Function):
    """As DeepSpeed's Ulysses: `[S / P, B, H, D]` -> `[S, B, H / P, D]`, or back."""

    @staticmethod
    def forward(context: Any, part: Tensor, group: dist.ProcessGroup, is_back: bool) -> Tensor:
        context.group, context.is_back = group, is_back
        ranks = dist.get_world_size(group)
        tokens, batch, heads, dim = part.shape
        if is_back:
            pieces = part.reshape(ranks, tokens // ranks, batch, heads, dim).contiguous()
        else:
            pieces = part.reshape(tokens, batch, ranks, heads // ranks, dim).permute(2, 0, 1, 3, 4).contiguous()
        received = torch.empty_like(pieces)
        dist.all_to_all_single(received, pieces, group=group)
        return received.permute(1, 2, 0, 3, 4).flatten(2, 3).contiguous() if is_back else received.flatten(0, 1)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _ExchangeHeads.apply(gradient, context.group, not context.is_back), None, None


def peer_ulysses(attention: str) -> Callable[[TrainedModel, DeviceMesh], Way]:
    attend_with = {"sdpa": _sdpa, "FA2 varlen": _flash_attention_2}[attention]

    def make(model: TrainedModel, mesh: DeviceMesh) -> Way:
        group, ranks, rank = mesh.get_group(), mesh.size(), mesh.get_local_rank()

        def to_heads(part: Tensor) -> Tensor:
            return _ExchangeHeads.apply(part.permute(2, 0, 1, 3), group, False).permute(1, 2, 0, 3)

        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **options: Any
        ) -> tuple[Tensor, None]:
            query, key, value = (to_heads(part) for part in (query, key, value))
            output = attend_with(query, key, value, options)  # [B, H / P, S, D]
            return _ExchangeHeads.apply(output.permute(2, 0, 1, 3), group, True).transpose(0, 1), None

        name = f"ulysses_{attention}".replace(" ", "_")
        AttentionInterface.register(name, attend)  # without a mask function of that name no mask is made

        def part(batch: Batch) -> AbstractContextManager[Batch]:
            inputs = whole_row(batch)
            divisor = inputs.pop("divisor") / ranks
            own = {tensor: value.chunk(ranks, 1)[rank] for tensor, value in inputs.items()}
            documents = batch["varlen"] | {"document_mask": _dense_mask(batch) if attention == "sdpa" else None}
            return contextlib.nullcontext(own | documents | {"divisor": divisor})

        return Way(name, True, True, part)

    return make


def _dense_mask(batch: Batch) -> Tensor | None:
    """bool `[S, S]`; None for one document."""
    ends, length = batch["varlen"]["cu_seq_lens_q"], batch["input_ids"].shape[1]
    if len(ends) == 2:
        return None
    index = torch.arange(length, device=ends.device)
    document = torch.searchsorted(ends, index, right=True)
    return (document[:, None] == document) & (index[:, None] >= index)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
    dense = options["document_mask"]
    return nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=dense, is_causal=dense is None, enable_gqa=query.shape[1] != key.shape[1]
    )


def _flash_attention_2(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
    mask = Varlen([options["max_length_q"]], is_causal=True)
    return flash_attention_2(query, key, value, options["cu_seq_lens_q"], mask)


def ring(model: TrainedModel, mesh: DeviceMesh) -> Way:
    ranks = mesh.size()

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **_: Any
    ) -> tuple[Tensor, None]:
        copies = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(copies, dim=1) for part in (key, value))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # one that the ring replaces
            output = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return output.transpose(1, 2), None

    AttentionInterface.register("ring", attend)

    @contextlib.contextmanager
    def part(batch: Batch) -> Iterator[Batch]:
        inputs = whole_row(batch)
        divisor = inputs.pop("divisor") / ranks
        inputs = {name: value.clone() for name, value in inputs.items()}  # the context cuts them in place
        with context_parallel(mesh, buffers=list(inputs.values()), buffer_seq_dims=[1] * len(inputs)):
            yield inputs | {"divisor": divisor}

    return Way("ring", True, True, part)


ONE_GPU = "one GPU"
SDPA, RING = "Ulysses with sdpa", "ring with sdpa"
WAYS: dict[str, Callable[[TrainedModel, DeviceMesh], Way]] = {
    ONE_GPU: alone,
    "data parallel": data_parallel,
    "ulysses": flashmask("ulysses"),
    "all_gather": flashmask("all_gather"),
    "Ulysses with FA2 varlen": peer_ulysses("FA2 varlen"),
    SDPA: peer_ulysses("sdpa"),
    RING: ring,
}


def is_possible(way: str, length: int, documents: int) -> bool:
    """Whether a way can compute such a row: SDPA needs a dense mask for documents, and the ring knows none."""
    return documents == 1 or not (way == RING or (way == SDPA and length > LONGEST_DENSE_MASK))
