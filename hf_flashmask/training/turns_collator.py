"""The collator that packs conversations, every turn under the context that inference gives it, as prefix trees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from .. import bounds
from ..integration.layer_types import KEY_RANGE_OF_LAYER_TYPE
from ..sharing.backbone import check_backbone, find_backbone
from ..sharing.prefix_tree import PrefixTree, from_sequences
from ..sharing.traits import Traits
from .branches import check_branches_count_from_zero, check_length_of_branching_row
from .evaluation import GivesPredictionsOfRows, refuse_predictions_of_rows
from .labels import IGNORED
from .option_checks import check_option_at_least, check_option_is_one_of
from .packed_bounds import layer_types_of_packed_bounds
from .packing import PackingStrategy, pack_lengths
from .token_counts import count_tokens_in_trainer
from .turns import Turn, find_turns

__all__ = ["TurnOverflow", "TurnsDataCollator"]

TurnOverflow: TypeAlias = Literal["error", "truncate", "drop"]


@dataclass
class TurnsDataCollator(GivesPredictionsOfRows):
    """Train every turn of the assistant under the context that inference gives it, all turns of a conversation at once.

    Chat templates of reasoning models drop the thinking of earlier turns (Qwen3, gpt-oss): the context of a turn is not
    the beginning of the whole conversation, and each turn would need a row of its own. This collator renders the
    context and the turn of each message of the assistant, and merges them into a prefix tree: a trunk with the
    conversation as later turns see it, and a branch for each turn that they see in another form. Loss and gradients are
    those of a row for each turn, averaged over the tokens of all turns. It is for causal language models with
    attn_implementation="flashmask", `transformers.Trainer` and TRL's `SFTTrainer`.

    An example is `{"messages": [...]}`, with `tools` (a list or its JSON) and `chat_template_kwargs` if it has them;
    other columns are ignored. A message of the assistant with `"train": False` or `"weight": 0` is context only. What
    is trained is what inference would generate: the tokens after the generation prompt, up to the first one that stops
    generation. They are found by rendering the messages before the turn with `add_generation_prompt=True`, and those up
    to it without.

    Set `TrainingArguments(remove_unused_columns=False)`, because Trainer takes all columns for unused. Trainer's
    `per_device_train_batch_size` counts conversations. `SFTTrainer` needs `dataset_kwargs={"skip_prepare_dataset":
    True}` and a model whose layers are all of one type: it adds up `attention_mask` for its metric `num_tokens`, which
    means nothing here, and fails where that is a dict.

    Args:
        tokenizer: with a chat template.
        model: the causal language model that is trained, with attn_implementation="flashmask"; it may have adapters of
            PEFT. It is not kept. The bounds are final: layers with a window or chunks get theirs along the branches.
        max_length: tokens that fit into a row. None: one row with all conversations, however long. The turns of a
            conversation that needs more are distributed over several trees, which changes nothing but the tokens saved.
            So are those of a conversation with more than 15 branches, for a model with windows or chunks.
        eos_token_id: the token or tokens that stop generation. Default: those of `model.generation_config` that are
            special tokens of the tokenizer, and the tokenizer's EOS token.
        overflow: what to do with a turn that is longer than `max_length` with its context. "error" raises; "truncate"
            keeps its first `max_length` tokens, if any of them are its own; "drop" leaves the turn out.
        strategy: how conversations are distributed over rows, see `pack_lengths`.
        pad_to_multiple_of: round the length of rows up.

    Attributes:
        given_tokens: tokens of a row for each turn, over all batches so far.
        computed_tokens: tokens of the trees. The workers of a DataLoader count for themselves.

    Returns:
        When called with a list of examples, a dict with

        * `input_ids`, int64 `[R, S]`, and `position_ids`, int64 `[R, S]`, which count along each branch;
        * `attention_mask`, bounds, int32 `[R, 1, C, S]`, or a dict of them where the layers of the model see different
          keys; padding is hidden, and sees nothing;
        * `labels`, int64 `[R, S]`, which the model shifts, -100 for what no turn generates.

    Raises:
        TypeError, ValueError: for an option or an example that cannot be used, for a message that the chat template
            renders as something else than the continuation of its context; the message names it.
        NotImplementedError: for a model that cannot be called with prefix trees, such as one with recurrent layers.

    >>> collator = TurnsDataCollator(tokenizer, model, max_length=16384)  # doctest: +SKIP
    >>> Trainer(model, args, train_dataset=conversations, data_collator=collator).train()  # doctest: +SKIP
    """

    tokenizer: PreTrainedTokenizerBase
    model: InitVar[nn.Module]
    max_length: int | None = None
    eos_token_id: int | Sequence[int] | None = field(default=None, kw_only=True)
    overflow: TurnOverflow = field(default="error", kw_only=True)
    strategy: PackingStrategy = field(default="first_fit_decreasing", kw_only=True)
    pad_to_multiple_of: int = field(default=1, kw_only=True)
    given_tokens: int = field(default=0, init=False, compare=False)
    computed_tokens: int = field(default=0, init=False, compare=False)

    def __post_init__(self, model: nn.Module) -> None:
        check_option_is_one_of("strategy", self.strategy, PackingStrategy)
        check_option_is_one_of("overflow", self.overflow, TurnOverflow)
        if self.max_length is not None:
            check_option_at_least("max_length", self.max_length, 2)
            refuse_predictions_of_rows()
        check_option_at_least("pad_to_multiple_of", self.pad_to_multiple_of, 1)
        backbone = find_backbone(model, type(self).__name__)
        check_backbone(backbone, type(self).__name__)
        self._key_ranges = _key_ranges_of_turns(backbone.config)
        traits = Traits.of(backbone)
        check_branches_count_from_zero(backbone, traits, type(self).__name__)
        self._longest_row = traits.packs_up_to
        self._stop_ids = _stop_ids_of_collator(self.eos_token_id, model, self.tokenizer)
        count_tokens_in_trainer()

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Pack one batch of conversations."""
        turns = [self._turns(number, example) for number, example in enumerate(examples)]
        pieces = [piece for some in turns for piece in self._pieces(some)]
        if not pieces:
            raise ValueError(
                f"the batch has no turn to train: none of its {len(examples)} examples has a message of the assistant "
                "that is trained and fits into a row; leave such examples out"
            )
        lengths = [len(piece.labels) for piece in pieces]
        rows = pack_lengths(lengths, self.max_length or sum(lengths), self.strategy)
        longest = max(sum(lengths[piece] for piece in row) for row in rows)
        check_length_of_branching_row(longest, self._longest_row)
        shape = len(rows), -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of

        pad_token_id = self.tokenizer.pad_token_id
        input_ids = torch.full(shape, 0 if pad_token_id is None else pad_token_id)
        position_ids, labels = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORED)
        subtree_ends = torch.zeros(shape, dtype=torch.int32)
        for row, numbers in enumerate(rows):
            start = 0
            for piece in (pieces[number] for number in numbers):
                places = slice(start, start + len(piece.labels))
                input_ids[row, places] = piece.tree.input_ids[0]
                position_ids[row, places] = piece.tree.position_ids[0]
                subtree_ends[row, places] = piece.tree.bounds[0, 0, 0] + start
                labels[row, places] = piece.labels
                start = places.stop

        self.given_tokens += sum(len(turn.tokens) for some in turns for turn in some)
        self.computed_tokens += sum(lengths)
        return {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "attention_mask": self._bounds(subtree_ends[:, None, None], position_ids, pieces),
            "labels": labels,
        }

    def _bounds(self, trees: Tensor, depth: Tensor, pieces: Sequence[_PieceOfTurns]) -> Tensor | dict[str, Tensor]:
        """The trees `[R, 1, 1, S]` for each type of layers."""
        max_branches = max(piece.tree.max_branches for piece in pieces)

        def within(key_range: _KeyRangeOfTurns | None) -> Tensor:
            if key_range is None or int(depth.max()) < key_range.limit:
                return trees
            return bounds.limit_depth(trees, depth, key_range.end(depth), max_branches=max_branches)

        masks = {layer_type: within(key_range) for layer_type, key_range in self._key_ranges.items()}
        return masks if len(masks) > 1 else next(iter(masks.values()))

    @property
    def _max_branches(self) -> int | None:
        """A window takes an interval for each branch, and one for what is below the tree."""
        return bounds.MAX_INTERVALS - 1 if any(self._key_ranges.values()) else None

    def _turns(self, number: int, example: Mapping[str, Any]) -> list[Turn]:
        """The turns of an example that are trained and fit into a row."""
        turns = find_turns(number, example, self.tokenizer, self._stop_ids)
        limit = self.max_length or max((len(turn.tokens) for turn in turns), default=0)
        too_long = [turn for turn in turns if len(turn.tokens) > limit]
        if not too_long:
            return turns
        if self.overflow == "error":
            raise ValueError(
                f"message {too_long[0].message} of example {number} of the batch has {len(too_long[0].tokens)} tokens "
                f'with its context, more than `max_length` ({limit}): raise it, or pass overflow="truncate" or '
                'overflow="drop"'
            )
        if self.overflow == "drop":
            return [turn for turn in turns if len(turn.tokens) <= limit]
        return [turn._replace(tokens=turn.tokens[:limit]) for turn in turns if turn.start < limit]

    def _pieces(self, turns: Sequence[Turn]) -> list[_PieceOfTurns]:
        """The turns of a conversation in one tree, or in as many as they need."""
        branches = _branches_of_turns(turns)
        pieces: list[_PieceOfTurns] = []
        first = 0
        while first < len(branches):
            last = len(branches)
            piece = _PieceOfTurns.of(branches[first:last], self._max_branches)
            if not self._fits(piece):  # the most branches that do
                last, piece = first + 1, _PieceOfTurns.of(branches[first : first + 1], self._max_branches)
                while self._fits(larger := _PieceOfTurns.of(branches[first : last + 1], self._max_branches)):
                    last, piece = last + 1, larger
            pieces.append(piece)
            first = last
        return pieces

    def _fits(self, piece: _PieceOfTurns) -> bool:
        is_short = self.max_length is None or len(piece.labels) <= self.max_length
        return is_short and not piece.has_equal_turns


class _BranchOfTurns(NamedTuple):
    """Turns one after the other. `spans` are where the tokens of each turn start and end."""

    tokens: list[int]
    spans: list[tuple[int, int]]


def _branches_of_turns(turns: Sequence[Turn]) -> list[_BranchOfTurns]:
    """A turn whose context begins with all of the turn before it continues its branch."""
    branches: list[_BranchOfTurns] = []
    for turn in turns:
        span = turn.start, len(turn.tokens)
        last = branches[-1] if branches else None
        if last is not None and turn.tokens[: turn.start][: len(last.tokens)] == last.tokens:
            branches[-1] = _BranchOfTurns(turn.tokens, [*last.spans, span])
        else:
            branches.append(_BranchOfTurns(turn.tokens, [span]))
    return branches


class _PieceOfTurns(NamedTuple):
    """A tree as a part of a row.

    Attributes:
        tree: its tokens.
        labels: `[L]`, those that turns generate; the place before a label predicts it.
        has_equal_turns: whether two turns generate the same tokens in the same context, which no label can count twice.
            Only templates that leave out whole messages make such turns.
    """

    tree: PrefixTree
    labels: Tensor
    has_equal_turns: bool

    @classmethod
    def of(cls, branches: Sequence[_BranchOfTurns], max_branches: int | None) -> _PieceOfTurns:
        tree = from_sequences(
            [branch.tokens for branch in branches], one_label_per_token=True, max_branches=max_branches
        )
        labels = torch.full_like(tree.input_ids[0], IGNORED)
        num_labels = 0
        for index, branch in zip(tree.index, branches):
            for start, end in branch.spans:
                start = max(start, 1)  # nothing predicts the first token of a row
                # What a place predicts stands right after it: a branch begins with a copy of its parent's last token.
                labels[index[start - 1 : end - 1] + 1] = torch.tensor(branch.tokens[start:end])
                num_labels += end - start
        return cls(tree, labels, int((labels != IGNORED).sum()) < num_labels)


class _KeyRangeOfTurns(NamedTuple):
    """The keys that layers see: those in a window of `limit` tokens, or in the same chunk."""

    limit: int
    is_chunk: bool

    def end(self, depth: Tensor) -> Tensor:
        """The depth from which a key at `depth` is hidden."""
        return (depth // self.limit + 1) * self.limit if self.is_chunk else depth + self.limit


def _key_ranges_of_turns(config: Any) -> dict[str, _KeyRangeOfTurns | None]:
    """Layer type -> the keys that it sees, None for all."""
    ranges: dict[str, _KeyRangeOfTurns | None] = {}
    for layer_type in layer_types_of_packed_bounds(config, "TurnsDataCollator"):
        setting = KEY_RANGE_OF_LAYER_TYPE.get(layer_type)
        is_chunk = layer_type == "chunked_attention"
        ranges[layer_type] = (
            None if setting is None else _KeyRangeOfTurns(getattr(config.get_text_config(), setting), is_chunk)
        )
    return ranges


def _stop_ids_of_collator(
    given: int | Sequence[int] | None, model: Any, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    if given is None:
        stated = _as_list_of_stop_ids(getattr(getattr(model, "generation_config", None), "eos_token_id", None))
        # A model from scratch has an id from the defaults of its configuration, which may be that of a word.
        added: Any = tokenizer.added_tokens_decoder
        special = [token for token in stated if token in added and added[token].special]
        ids = list(dict.fromkeys([*special, *_as_list_of_stop_ids(tokenizer.eos_token_id)]))
    else:
        ids = _as_list_of_stop_ids(given)
    if not ids:
        raise ValueError(
            "neither the model's `generation_config` nor the tokenizer has an EOS token: pass `eos_token_id`, the "
            "tokens that stop generation"
        )
    for token in ids:
        check_option_at_least("eos_token_id", token, 0)
    return ids


def _as_list_of_stop_ids(ids: Any) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
