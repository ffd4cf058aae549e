"""`sequence_parallel`: a model whose rows are shared out to the ranks of a group."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from .. import bounds as _bounds
from ..integration.layer_types import KEY_RANGE_OF_LAYER_TYPE
from ..integration.name import logger
from ..integration.whole_sequence import Exchange, PartMarker, is_part, mark_part, unmark_part
from ..training.labels import IGNORED
from .agreement import check_agreement
from .deal import TilesToDeal, block_length_to_deal, count_tiles_to_deal, deal, padded_length_to_deal
from .exchanges import AllGatherExchange, GatherAcrossUlyssesExchange, UlyssesExchange
from .group import check_groups_apart, groups_of
from .media import cut_text_model_call, find_text_model, with_positions_of_media
from .merged_batch import merge_batch
from .models import (
    Mode,
    ModelTokenTraits,
    check_model,
    check_model_loss,
    check_model_positions,
    choose_mode,
    find_model,
    refuse_classifier_model,
)
from .rotary import share_largest_position
from .shard import BatchToShard, read_batch_to_shard, read_merged_batch_to_shard, shard_batch

__all__ = ["SequenceParallel", "sequence_parallel"]


def sequence_parallel(
    model: nn.Module,
    mesh: DeviceMesh | dist.ProcessGroup,
    *,
    mode: Literal["auto", "ulysses", "all_gather"] = "auto",
    data_mesh: DeviceMesh | dist.ProcessGroup | None = None,
    check_batches: bool = True,
) -> SequenceParallel:
    """Share the tokens of each row out to the ranks of a group, from now on or inside a `with` block::

        mesh = init_device_mesh("cuda", (dp, sp), mesh_dim_names=("dp", "sp"))
        parallel = hf_flashmask.sequence_parallel(model, mesh["sp"], data_mesh=mesh["dp"])
        loss = model(**parallel.shard(batch)).loss

    Losses and gradients, averaged over all ranks of the mesh, are those of one process with the whole batch. This is
    the average that DDP and FSDP2 take when they are given the whole mesh.

    Args:
        model: a causal language model or a backbone with `attn_implementation="flashmask"`, also wrapped by DDP, FSDP2
            or PEFT.
        mesh: of the ranks that share a sequence. With two dimensions the ranks of the last one exchange heads, as
            inside of a node, and those of the first one gather keys and values.
        mode: "ulysses" exchanges heads, which the number of ranks must divide; "all_gather" gathers keys and values,
            and deals the rows out by what they see. "auto" takes the one that moves less; the attributes `mode` and
            `reason` say which.
        data_mesh: of the ranks that hold other batches. With it the loss is the mean over the labels of all batches,
            without it that of the batch, as in one process of data parallelism.
        check_batches: whether the ranks compare their batches in each `shard`, which waits for the device once.

    Raises:
        NotImplementedError, TypeError, ValueError: for a model or a mesh that this does not work with.
    """
    return SequenceParallel(model, mesh, mode=mode, data_mesh=data_mesh, check_batches=check_batches)


class SequenceParallel:
    """What `sequence_parallel` returns.

    Attributes:
        mode: "ulysses", "all_gather", or of a mesh of two dimensions "all_gather_across_ulysses".
        reason: why it was chosen.
        size: the number of ranks that share a row.
    """

    def __init__(
        self,
        model: nn.Module,
        mesh: DeviceMesh | dist.ProcessGroup,
        *,
        mode: str = "auto",
        data_mesh: DeviceMesh | dist.ProcessGroup | None = None,
        check_batches: bool = True,
    ) -> None:
        if mode not in ("auto", "ulysses", "all_gather"):
            raise ValueError(f'`mode` must be "auto", "ulysses" or "all_gather", got {mode!r}')
        self._model = find_model(model)
        self._traits = check_model(self._model)
        self._token_traits = ModelTokenTraits.of(self._model)
        self._text_model = find_text_model(self._model)
        if is_part(self._model):
            raise ValueError("the model is under sequence_parallel already: call remove() on what it returned first")
        self._groups = groups_of(mesh, "mesh", 2)
        self.size = math.prod(group.size for group in self._groups)
        self._data_group = None if data_mesh is None else groups_of(data_mesh, "data_mesh", 1)[0]
        if self._data_group is not None:
            check_groups_apart(self._groups, self._data_group)
        of_model = next(self._model.parameters()).device.type
        self._device_type = mesh.device_type if isinstance(mesh, DeviceMesh) else of_model
        self._check_batches = check_batches
        self.mode: Mode
        if mode == "auto":
            if len(self._groups) > 1:
                self.mode, self.reason = "all_gather_across_ulysses", "the mesh has two dimensions"
            else:
                self.mode, self.reason = choose_mode(self._model, self.size)
            logger.info(f'sequence_parallel: mode="{self.mode}" ({self.reason})')
        elif len(self._groups) > 1:
            raise ValueError(f'`mode` must be "auto" for a mesh of two dimensions, which names both, got {mode!r}')
        else:
            self.mode, self.reason = mode, "asked for"  # type: ignore[assignment]
        self._check_mode()
        self._hooks = share_largest_position(self._text_model, self._groups)
        if self._token_traits.media:
            self._hooks.append(self._text_model.register_forward_pre_hook(cut_text_model_call, with_kwargs=True))
        self._marker = PartMarker()
        for part in (self._model, *self._text_model.modules()):
            mark_part(part, self._marker)

    def _check_mode(self) -> None:
        heads, ranks = self._model.config.get_text_config().num_attention_heads, self._groups[0].size
        if self.mode != "all_gather" and isinstance(heads, int) and heads % ranks:
            raise ValueError(
                f'mode="{self.mode}" shares the heads of a layer out, but {ranks} ranks do not divide {heads} query '
                'heads: use mode="all_gather" or a group whose size divides them'
            )

    def __repr__(self) -> str:
        return f'SequenceParallel({type(self._model).__name__}, {self.size} ranks, mode="{self.mode}": {self.reason})'

    def shard(self, batch: Mapping[str, Any], *, num_items: Tensor | float | None = None) -> dict[str, Any]:
        """The part of a batch that this rank calls the model with. All ranks of the group give the same batch.

        Rows are padded until the ranks can share them out. Labels are shifted before they are cut; the loss is divided
        such that its average over the ranks is that of the whole batch.

        Args:
            batch: what a collator returns: `input_ids` or `inputs_embeds`, `labels` or `shift_labels`, `position_ids`,
                `cu_seq_lens_q`, `token_type_ids` or `mm_token_type_ids` (which stay whole for a model that makes its
                mask of them), `attention_mask` (2-D, bounds of the whole sequence, or a dict of them for the types of
                layers), `num_items_in_batch` (labels that the loss of the group's batch is divided by; with a
                `data_mesh` those of all groups are added up), `pixel_values`, `pixel_values_videos` and what the model
                takes beside them, such as `image_grid_thw`: with these, tokens and positions stay whole until the model
                calls its text model.
            num_items: labels of all groups, each counted once, that the losses are divided by instead. With what
                `count_labels` returns, the losses of several batches add up to the mean over all their labels.

        Raises:
            NotImplementedError, TypeError, ValueError: for what cannot be cut, and on every rank of the group when the
                ranks are given different batches.
        """
        part, error = None, None
        try:
            part = self._shard(batch, num_items)
        except Exception as refused:  # whatever it is, the other ranks must learn of it
            if not self._check_batches:
                raise
            error = refused
        if self._check_batches:
            settings = f'mode "{self.mode}"' + ("" if num_items is None else f", num_items {float(num_items)}")
            check_agreement(self._groups, self._device_on_the_wire(), batch, settings, error)
        assert part is not None
        if "shift_labels" in part:
            total = self._over_groups(part["num_items_in_batch"]) if num_items is None else float(num_items)
            # A number: engines of mixed precision round tensors that a model is called with, FSDP2 to three digits.
            part["num_items_in_batch"] = total / (self.size * self._num_groups)
        return part

    def count_labels(self, *batches: Mapping[str, Any]) -> int:
        """The labels that losses are computed of, of these batches of all groups, each counted once.

        All ranks call it, with the batches of a step of the optimizer over which gradients are accumulated.
        """
        counts = [(batch["shift_labels"] if "shift_labels" in batch else batch["labels"][:, 1:]) for batch in batches]
        return round(self._over_groups(sum((labels != IGNORED).sum() for labels in counts)))

    def _shard(self, batch: Mapping[str, Any], num_items: Tensor | float | None) -> dict[str, Any]:
        if not is_part(self._model):
            raise ValueError("`shard` was called after `remove()`: the model takes the whole batch again")
        if not isinstance(batch, Mapping):
            raise TypeError(f"`batch` must be a mapping of the model's arguments, got {type(batch).__name__}")
        batch = with_positions_of_media(self._model, self._token_traits.media, batch)
        merged = merge_batch(self._model, batch)
        if merged is None:
            whole = read_batch_to_shard(batch, self._padded_length, self._device(), self._token_traits)
        else:
            whole = read_merged_batch_to_shard(merged, self._padded_length, self._device(), self._token_traits)
        check_model_positions(self._traits, whole.length, batch if merged is None else merged.arguments)
        if whole.answers is not None and (num_items is not None or "num_items_in_batch" in whole.options):
            raise ValueError(
                "losses over answers are the mean over a batch: call `shard` without `num_items`, and take "
                "`num_items_in_batch` out of the batch"
            )
        if num_items is not None:
            self._check_num_items(whole)
        if whole.answers is None:
            refuse_classifier_model(self._model)
        if whole.labels is not None or whole.labels_in_tree is not None:
            check_model_loss(self._model)
        exchange = self._exchange(whole)
        exchange.takes_whole_rows = bool(whole.media)
        given = whole.options.get("num_items_in_batch")
        return shard_batch(whole, exchange, whole.label_count if given is None else given, self._groups)

    def _exchange(self, batch: BatchToShard) -> Exchange:
        inside, across = self._groups[0], self._groups[-1]
        if self.mode == "ulysses":
            return UlyssesExchange(inside, batch.length)
        gather = AllGatherExchange(across, self._deal(batch, across.size))
        return gather if self.mode == "all_gather" else GatherAcrossUlyssesExchange(gather, inside)

    def _check_num_items(self, batch: BatchToShard) -> None:
        if "num_items_in_batch" in batch.options:
            raise ValueError("`num_items` and `num_items_in_batch` in the batch: give one of them")
        if self._data_group is None and dist.get_world_size() != self.size:
            raise ValueError(
                f"`num_items` counts the labels of all groups, but {dist.get_world_size()} processes may be more than "
                f"this group of {self.size}, and their batches are not known: pass `data_mesh` to sequence_parallel"
            )

    @property
    def _num_groups(self) -> int:
        return 1 if self._data_group is None else self._data_group.size

    def _over_groups(self, count: Tensor | float) -> float:
        """The sum over the ranks of `data_mesh`. Those of a group are not added up: they have the same labels."""
        if self._data_group is None:
            return float(count)
        total = torch.as_tensor(count, dtype=torch.float64).to(self._device_on_the_wire(), copy=True)
        dist.all_reduce(total, group=self._data_group.handle)
        return total.item()

    def _padded_length(self, length: int) -> int:
        if self.mode == "ulysses":
            return -(-length // self.size) * self.size
        return padded_length_to_deal(length, self.size)

    def _deal(self, batch: BatchToShard, ranks: int) -> Tensor:
        """The rows of the sequence in the order of the ranks: blocks of them, dealt by what their layers see."""
        block = block_length_to_deal(batch.length, self.size)
        work = torch.zeros(batch.length // block, dtype=torch.int64, device=batch.device)
        config: Any = self._model.config.get_text_config()
        types = getattr(config, "layer_types", None) or [None]
        for kind in sorted(set(types)):
            bounds = self._estimate(batch, kind)
            masks = bounds.shape[0] * bounds.shape[1]
            visible, cut = (tiles // masks for tiles in count_tiles_to_deal(bounds, block))
            limits = [KEY_RANGE_OF_LAYER_TYPE.get(kind)] if kind else KEY_RANGE_OF_LAYER_TYPE.values()
            key_ranges = [getattr(config, limit, None) for limit in limits if limit is not None]
            key_range = min([batch.length, *filter(None, key_ranges)])
            work += types.count(kind) * TilesToDeal(visible.clamp(max=-(-key_range // block) + 1), cut).work
        return deal(work, ranks, block)

    def _estimate(self, batch: BatchToShard, kind: str | None) -> Tensor:
        """Bounds close to those that the model will make for a type of layers; windows are not in them."""
        if isinstance(batch.mask, dict):
            return batch.mask[kind] if kind in batch.mask else next(iter(batch.mask.values()))
        if batch.mask is not None and batch.mask.ndim == 4:
            return batch.mask
        is_causal = all(getattr(part, "is_causal", True) for part in self._text_model.modules())
        if batch.document_positions is not None:
            return _bounds.from_position_ids(batch.document_positions, is_causal=is_causal)
        make = _bounds.causal if is_causal else _bounds.bidirectional
        return make(batch.length, batch.length, device=batch.device)

    def _device_on_the_wire(self) -> torch.device:
        """Where the group communicates from, beside what the layers exchange: from the host, if it can."""
        backend = dist.get_backend(self._groups[0].handle)
        return torch.device("cpu") if "gloo" in backend or backend in ("mpi", "undefined") else self._device()

    def _device(self) -> torch.device:
        """Where the model computes; batches may still be on the host, and offloaded weights as well."""
        if self._device_type == "cpu":
            return torch.device("cpu")
        return torch.device(self._device_type, torch.accelerator.current_device_index())

    def remove(self) -> None:
        """Switch it off: the model takes whole batches again."""
        for part in (self._model, *self._text_model.modules()):
            unmark_part(part, self._marker)
        for hook in self._hooks:
            hook.remove()

    def __enter__(self) -> SequenceParallel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()
