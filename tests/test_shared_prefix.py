"""Models under `share_prefixes`, against the same padded batches under Transformers' eager attention."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from random_trees import padded_batch, random_sequences
from tiny_families import tiny_config
from tiny_models import DECODERS, VOCABULARY, WINDOW, build, config_of, eager_twin
from torch import Tensor, nn

from hf_flashmask import share_prefixes

RELATIVE = 1e-5


def assert_same(ours: Tensor, expected: Tensor, scale: Tensor | float = 0.0, name: str = "") -> None:
    error = float((ours - expected).detach().norm() / torch.clamp(expected.detach().norm(), min=scale))
    assert error < RELATIVE, f"{name}: {error:.1e}"


def assert_same_logits_and_gradients(
    model: nn.Module, twin: nn.Module, batch: dict[str, Tensor], is_token: Tensor
) -> share_prefixes:
    """Logits at tokens, and the gradients of a random function of them."""
    with share_prefixes(model) as shared:
        logits = model(**batch).logits
    expected = twin(**batch, use_cache=False).logits
    assert logits.shape == expected.shape
    weights = torch.randn(expected.shape)
    if expected.ndim == 3:
        weights = weights * is_token[..., None]
    assert_same(logits * (weights != 0), expected * (weights != 0))
    (logits * weights).sum().backward()
    (expected * weights).sum().backward()
    gradients = {name: value.grad for name, value in twin.named_parameters() if value.grad is not None}
    largest = max(float(value.norm()) for value in gradients.values())
    for name, value in model.named_parameters():
        if name in gradients:
            assert_same(value.grad, gradients[name], 1e-3 * largest, name)
    return shared


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", DECODERS)
def test_random_trees(name: str, side: str) -> None:
    model = build(name)
    rows = random_sequences(len(name), 13, VOCABULARY)
    input_ids, mask = padded_batch(rows, side, extra=1)
    batch = {"input_ids": input_ids, "attention_mask": mask}
    shared = assert_same_logits_and_gradients(model, eager_twin(model), batch, mask)
    assert shared.given_tokens == mask.sum()
    if name != "gpt2" or side == "right":  # learned positions differ in rows that are padded on the left
        assert shared.computed_tokens < shared.given_tokens


@pytest.mark.parametrize("count", [2, 8, 16, 23])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "mistral"])
def test_answers_to_one_prompt(name: str, count: int) -> None:
    """The window (4) cuts all branches; more than 15 of them need a second tree."""
    model = build(name)
    prompt = torch.randint(1, VOCABULARY, (11,)).tolist()
    answers = [torch.randint(1, VOCABULARY, (length,)).tolist() for length in torch.randint(1, 12, (count,))]
    input_ids, mask = padded_batch([prompt + answer for answer in answers])
    assert input_ids.shape[1] > WINDOW
    batch = {"input_ids": input_ids, "attention_mask": mask}
    shared = assert_same_logits_and_gradients(model, eager_twin(model), batch, mask)
    trees = -(-count // 15) if name in ("gemma2", "mistral") else 1
    assert shared.computed_tokens <= trees * len(prompt) + sum(map(len, answers))


def test_prompts_padded_left_and_answers_right() -> None:
    """What GRPO scores."""
    model = build("llama")
    prompts, prompt_mask = padded_batch([[5, 6, 7, 8], [9, 3]], "left")
    answers, answer_mask = padded_batch([[1, 2], [4], [1, 2, 3, 4, 5], [6, 6, 6]])
    batch = {
        "input_ids": torch.cat([prompts.repeat_interleave(2, 0), answers], 1),
        "attention_mask": torch.cat([prompt_mask.repeat_interleave(2, 0), answer_mask], 1),
    }
    shared = assert_same_logits_and_gradients(model, eager_twin(model), batch, batch["attention_mask"])
    assert shared.computed_tokens == 4 + 2 + 2 + 1 + 5 + 3


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_rows_of_padding_alone(name: str) -> None:
    """The other rows keep their places, whose logits and gradients are those of eager attention."""
    model = build(name)
    twin = eager_twin(model)
    rows: list[list[int]] = [[], [5, 6, 7, 8, 9], [], [5, 6, 7, 3], []]
    for side in ("left", "right"):
        input_ids, mask = padded_batch(rows, side)
        batch = {"input_ids": input_ids, "attention_mask": mask}
        shared = assert_same_logits_and_gradients(model, twin, batch, mask)
        assert (shared.given_tokens, shared.computed_tokens) == (9, 6)
        model.zero_grad()
        twin.zero_grad()


def test_a_batch_of_padding_alone_is_left_as_it_is() -> None:
    model = build("llama")
    batch = {"input_ids": torch.ones(3, 4, dtype=torch.long), "attention_mask": torch.zeros(3, 4, dtype=torch.long)}
    with share_prefixes(model) as shared:
        logits = model(**batch, use_cache=False).logits
    torch.testing.assert_close(logits, model(**batch, use_cache=False).logits)
    assert (shared.given_tokens, shared.computed_tokens) == (0, 0)


def batch_with_holes() -> tuple[dict[str, Tensor], Tensor]:
    """Padding between prompt and answer, hidden turns, padding on both sides; and where that on the sides is not."""
    prompt = [11, 12, 13, 14, 15, 16, 17, 18, 19]
    rows = [
        (0, [*prompt, 0, 0, 0, 21, 22, 23, 24], [9, 3, 4]),
        (0, [*prompt, 0, 0, 0, 21, 22, 31], [9, 3, 3]),
        (1, [*prompt, 41, 42, 21, 22], [9, 2, 2]),
        (3, [*prompt, 41, 42, 21, 51, 52], [9, 2, 3]),
        (4, [*prompt, 21, 22, 23], [12]),
    ]
    input_ids = torch.zeros(len(rows), 18, dtype=torch.long)
    mask, is_inside = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
    for number, (start, tokens, runs) in enumerate(rows):
        place = slice(start, start + len(tokens))
        input_ids[number, place], is_inside[number, place] = torch.tensor(tokens), 1
        visible = [(index + 1) % 2 for index, length in enumerate(runs) for _ in range(length)]
        mask[number, place] = torch.tensor(visible)
    return {"input_ids": input_ids, "attention_mask": mask}, is_inside


@pytest.mark.parametrize("name", DECODERS)
def test_holes_in_the_mask(name: str) -> None:
    """Eager attention counts holes in positions, windows and chunks. Hidden states at holes are the same too."""
    model = build(name)
    batch, is_inside = batch_with_holes()
    shared = assert_same_logits_and_gradients(model, eager_twin(model), batch, is_inside)
    assert shared.given_tokens == batch["attention_mask"].sum()
    assert shared.computed_tokens < is_inside.sum()


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_holes_that_the_positions_leave_out(name: str) -> None:
    """Windows still count columns."""
    model = build(name)
    batch, is_inside = batch_with_holes()
    mask = batch["attention_mask"]
    batch["position_ids"] = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    assert_same_logits_and_gradients(model, eager_twin(model), batch, is_inside)


@pytest.mark.parametrize(
    ("name", "is_shared_when_padded_left"),
    [("opt", True), ("biogpt", False), ("hunyuan_v1_dense", False), ("gpt_bigcode", False)],
)
def test_models_that_count_positions_in_their_own_way(name: str, is_shared_when_padded_left: bool) -> None:
    """OPT counts visible tokens, and its head calls the decoder directly. Hunyuan's positions are not relative."""
    model = build_family(name)
    batch, is_inside = batch_with_holes()
    shared = assert_same_logits_and_gradients(model, eager_twin(model), batch, is_inside)
    model.zero_grad()
    input_ids, mask = padded_batch([[5, 6, 7, 8], [5, 6, 7, 9, 9]], "left")
    batch = {"input_ids": input_ids, "attention_mask": mask}
    shared = assert_same_logits_and_gradients(model, eager_twin(model), batch, mask)
    assert shared.computed_tokens == (6 if is_shared_when_padded_left else 9)


@pytest.mark.parametrize(
    ("name", "side", "settings"),
    [
        ("llama4_text", "right", {"floor_scale": 4, "attn_temperature_tuning": True, "attn_scale": 2.0}),
        (
            "ministral3",
            "left",
            {"rope_parameters": {"llama_4_scaling_beta": 0.5, "original_max_position_embeddings": 4}},
        ),
    ],
)
def test_scores_that_grow_with_positions(name: str, side: str, settings: dict[str, Any]) -> None:
    """From position 4 on Ministral 3 scales scores, and Llama 4 from column 4 on, which packing would move. Eager
    attention counts padding on the left as columns; flashmask does not, with or without shared prefixes.
    """
    if "rope_parameters" in settings:
        default = transformers.AutoConfig.for_model(name).rope_parameters
        settings = {"rope_parameters": {**default, **settings["rope_parameters"]}}
    model = build_family(name, **settings)
    for rows in ([[5, 6, 7, 8, 1, 2, 3], [5, 6, 7, 8, 1]], [[5, 6, 7], [5, 6]]):
        model.zero_grad()
        input_ids, mask = padded_batch(rows, side)
        batch = {"input_ids": input_ids, "attention_mask": mask}
        shared = assert_same_logits_and_gradients(model, eager_twin(model), batch, mask)
        assert shared.computed_tokens == (12 if len(rows[0]) > 4 else 3)
        assert shared.given_tokens == mask.sum()


def build_family(name: str, **settings: Any) -> transformers.PreTrainedModel:
    torch.manual_seed(1)
    config = tiny_config(type(transformers.AutoConfig.for_model(name)), **settings)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="flashmask").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.12)
    return model


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_positions_of_the_caller(name: str) -> None:
    model = build(name)
    input_ids, mask = padded_batch(random_sequences(5, 7, VOCABULARY), "left")
    positions = (mask.cumsum(-1) - 1).clamp(min=0) * 2 + 3
    batch = {"input_ids": input_ids, "attention_mask": mask, "position_ids": positions}
    shared = assert_same_logits_and_gradients(model, eager_twin(model), batch, mask)
    assert shared.computed_tokens < shared.given_tokens


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant: bool) -> None:
    model = build("gemma2")
    twin = eager_twin(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    input_ids, mask = padded_batch(random_sequences(1, 6, VOCABULARY))
    assert_same_logits_and_gradients(model.train(), twin, {"input_ids": input_ids, "attention_mask": mask}, mask)


@pytest.mark.parametrize("side", ["left", "right"])
def test_sequence_classifier(side: str) -> None:
    config = config_of("llama", num_labels=1)
    torch.manual_seed(0)
    model = transformers.LlamaForSequenceClassification._from_config(config, attn_implementation="flashmask").eval()
    rows = random_sequences(2, 9, VOCABULARY)
    input_ids, mask = padded_batch(rows, side)
    shared = assert_same_logits_and_gradients(
        model, eager_twin(model), {"input_ids": input_ids, "attention_mask": mask}, mask
    )
    assert shared.computed_tokens < shared.given_tokens


class ValueHead(nn.Module):
    """A wrapper like TRL's."""

    def __init__(self, model: transformers.PreTrainedModel) -> None:
        super().__init__()
        self.pretrained_model = model
        self.v_head = nn.Linear(model.config.vocab_size, 1)

    def forward(self, **batch: Any) -> Any:
        output = self.pretrained_model(**batch)
        output.logits = self.v_head(output.logits)
        return output


@pytest.mark.parametrize("wrap", [ValueHead, nn.DataParallel, torch.nn.Identity])
def test_wrapped_models(wrap: type[nn.Module]) -> None:
    model = build("qwen3")
    torch.manual_seed(0)
    wrapped: nn.Module = model if wrap is nn.Identity else wrap(model)
    twin = copy.deepcopy(wrapped)
    next(part for part in twin.modules() if isinstance(part, type(model))).set_attn_implementation("eager")
    input_ids, mask = padded_batch(random_sequences(8, 5, VOCABULARY))
    batch = {"input_ids": input_ids, "attention_mask": mask}
    shared = assert_same_logits_and_gradients(wrapped, twin, batch, mask)
    assert 0 < shared.computed_tokens < shared.given_tokens
