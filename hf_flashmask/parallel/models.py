"""Which models can be cut along the sequence, and which exchange costs a model less."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, cast

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_layers import GenericForSequenceClassification

from ..integration import NAME
from ..integration.mrope import takes_text_positions
from ..sharing.backbone import backbone_takes_position_ids, find_backbone, mixing_outside_attention
from ..sharing.layer_source import source_of_layer
from ..sharing.traits import Traits
from .exchanges import kv_heads_on_the_wire
from .media import media_arguments_of

__all__ = [
    "TOKEN_TYPES",
    "Mode",
    "ModelTokenTraits",
    "check_model",
    "check_model_loss",
    "check_model_positions",
    "choose_mode",
    "find_model",
    "refuse_classifier_model",
]

Mode = Literal["ulysses", "all_gather", "all_gather_across_ulysses"]


def find_model(model: nn.Module) -> PreTrainedModel:
    """The model of Transformers, without what wraps it (DDP, PEFT)."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            return part
    raise TypeError(f"`model` must be or hold a model of Transformers, got {type(model).__name__}")


def check_model(base: PreTrainedModel) -> Traits:
    """Refuse models that mix tokens elsewhere than in attention layers that run flashmask; the traits of others."""
    name, config = type(base).__name__, base.config.get_text_config()
    if config._attn_implementation != NAME:
        raise ValueError(
            f'sequence_parallel needs attn_implementation="{NAME}", {name} uses "{config._attn_implementation}": call '
            f'model.set_attn_implementation("{NAME}") first'
        )
    if base.config.is_encoder_decoder:
        raise NotImplementedError(f"sequence_parallel cuts one sequence, {name} has two: an encoder's and a decoder's")
    if found := mixing_outside_attention(base):
        raise NotImplementedError(
            f"sequence_parallel cannot cut {name} along the sequence: tokens meet elsewhere than in attention ({found})"
        )
    if getattr(base.base_model, "pooler", None) is not None:
        raise NotImplementedError(
            f"sequence_parallel does not serve the pooler of {name}, which reads the first token of a row: build the "
            "model without it (add_pooling_layer=False)"
        )
    if found := _model_heads_that_read_one_token(base):
        raise NotImplementedError(
            f"sequence_parallel does not serve {found} of {name}, which reads one token of a row, that one rank has: "
            "train this model without it"
        )
    backbone = cast(PreTrainedModel, base.base_model)
    traits = Traits.of(find_backbone(base, "sequence_parallel"))
    if not backbone_takes_position_ids(backbone):
        raise NotImplementedError(
            f"sequence_parallel cannot tell {name} the positions of its tokens: its forward takes no `position_ids`"
        )
    has_known_head = name.endswith("Model") or isinstance(base, GenericForSequenceClassification)
    if not has_known_head and base.get_output_embeddings() is None:
        raise NotImplementedError(
            f"sequence_parallel does not know how the head of {name} reads the tokens of a row, which are on several "
            "ranks: use a causal language model, or the model without a head"
        )
    if getattr(config, "output_router_logits", False):
        raise NotImplementedError(
            "with `output_router_logits=True` each rank would balance the experts over its own tokens, which is not "
            "the loss of one process: set it to False"
        )
    return traits


def _model_heads_that_read_one_token(base: PreTrainedModel) -> str:
    """What computes an output from one token of each row, by name; empty if nothing does."""
    for model in (base, base.base_model):
        returned = inspect.signature(inspect.unwrap(type(model).forward)).return_annotation
        if "Pooling" in str(returned) and not hasattr(model, "pooler"):  # text models of CLIP
            return "the `pooler_output`"
    return next((type(part).__name__ for part in base.modules() if type(part).__name__.endswith("SequenceSummary")), "")


def check_model_positions(traits: Traits, length: int, batch: Mapping[str, Any]) -> None:
    """Refuse rows in which a layer would count positions by the tokens of its rank, beside `position_ids`.

    Args:
        traits: of the model.
        length: of the whole rows.
        batch: the arguments that the model would be called with in one process.
    """
    if length > traits.packs_up_to:
        raise NotImplementedError(
            f"the layers of this model scale scores by the place of a token in the row, from {traits.packs_up_to + 1} "
            f"on (`attn_temperature_tuning`), but a rank has the tokens of a part of the row: rows of {length} tokens "
            "are too long for sequence_parallel"
        )
    mask = batch.get("attention_mask")
    has_padding_mask = isinstance(mask, Tensor) and mask.ndim == 2
    if batch.get("position_ids") is None and (
        traits.counts_by_token_ids or (traits.counts_visible_tokens and has_padding_mask)
    ):
        raise ValueError(
            "this model counts positions by the tokens that are no padding, of which each rank has a part: add "
            "`position_ids` [B, S] to the batch, counted as the model does"
        )


TOKEN_TYPES = frozenset({"token_type_ids", "mm_token_type_ids"})
"""Arguments `[B, S]` that tell what kind of token each one is."""


class ModelTokenTraits(NamedTuple):
    """How a model reads what it is told of each token.

    Attributes:
        types_of_mask: the arguments that it makes image blocks of, or prefixes that see themselves, and nothing else.
            The mask is that of whole rows on every rank, and so are they. Other models look embeddings up by the types.
        has_dimensions: whether its positions may have three dimensions, and before them one that counts tokens.
        media: the arguments that are images and videos, or describe them.
    """

    types_of_mask: frozenset[str]
    has_dimensions: bool
    media: frozenset[str]

    @classmethod
    def of(cls, base: PreTrainedModel) -> ModelTokenTraits:
        models = [part for part in base.modules() if isinstance(part, PreTrainedModel)]
        makes_blocks = any(_MAKES_BLOCKS.search(source_of_layer(part)) for part in models)
        names = set(inspect.signature(type(base).forward).parameters) if makes_blocks else set()
        return cls(TOKEN_TYPES & names, any(map(takes_text_positions, models)), media_arguments_of(base))


_MAKES_BLOCKS = re.compile("block_sequence_ids|create_causal_mask_mapping")  # the second until Transformers 5.8


def refuse_classifier_model(base: PreTrainedModel) -> None:
    """A sequence classifier takes the last token of a row, which one rank has. With labels of answers it may differ."""
    if isinstance(base, GenericForSequenceClassification):
        raise NotImplementedError(
            f"{type(base).__name__} takes the last token of each row, but under sequence_parallel each rank has some "
            "tokens: train it with set_loss(model, reward_loss) on batches of SharedPromptDataCollator, which name the "
            "tokens that are scored"
        )


def check_model_loss(base: PreTrainedModel) -> None:
    """Refuse labels where the model's loss would not be that of the whole batch."""
    name = type(base).__name__
    if base.loss_function is not ForCausalLMLoss:
        raise NotImplementedError(
            f"`labels`: {name} does not compute the loss of causal language models, which is the one that `shard` can "
            "cut: leave the labels out, and compute a loss of the model's outputs"
        )
    forward = inspect.unwrap(type(base).forward)
    try:
        source = inspect.getsource(forward)
    except (OSError, TypeError):  # a class from a notebook
        return
    if not re.search(r"self\.loss_function\([^#]{0,400}?\*\*\w*kwargs", source):
        raise NotImplementedError(
            f"`labels`: {name} does not hand `shift_labels` and `num_items_in_batch` to its loss function: leave the "
            "labels out, and compute the loss from the model's logits"
        )


def choose_mode(base: PreTrainedModel, ranks: int) -> tuple[Mode, str]:
    """The exchange that moves less, and why."""
    config: Any = base.config.get_text_config()
    heads, kv_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    kv_heads = heads if kv_heads is None else kv_heads
    if not isinstance(heads, int) or not isinstance(kv_heads, int):
        return "all_gather", "its layers differ in their number of heads"
    if heads % ranks:
        return "all_gather", f"{ranks} ranks do not divide {heads} query heads"
    ratio = kv_heads * ranks / (heads + kv_heads_on_the_wire(kv_heads, ranks))
    described = f"{heads} query heads, {kv_heads} key heads, {ranks} ranks: all-gather moves {ratio:.2f} times as much"
    return ("all_gather" if ratio < 1 else "ulysses"), described
