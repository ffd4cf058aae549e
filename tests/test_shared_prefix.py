"""`share_prefixes` against the same padded batches without it, under Transformers' eager attention."""

from __future__ import annotations

import copy
import gc
import inspect
from typing import Any

import pytest
import torch
import transformers
from random_trees import padded_batch, random_sequences
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
    """All branches are cut by the window (4); more than 15 of them need a second tree."""
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
    """As TRL wraps a model."""

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


def embedded_tokens(model: transformers.PreTrainedModel) -> list[int]:
    """Numbers of tokens that reach the model's embedding from now on."""
    counts: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, args: counts.append(args[0].numel()))
    return counts


def test_switched_on_and_off() -> None:
    model = build("llama")
    counts = embedded_tokens(model)
    input_ids = torch.tensor([[1, 2, 3], [1, 2, 4]])
    model(input_ids)
    shared = share_prefixes(model, None)
    model(input_ids)
    duplicate = copy.deepcopy(model)
    copied_counts = embedded_tokens(duplicate)
    duplicate(input_ids)
    shared.remove()
    model(input_ids)
    duplicate(input_ids)
    assert copied_counts == [4, 6]
    assert counts == [6, 4, 4, 6, 6]  # the copy has this hook as well
    assert (shared.given_tokens, shared.computed_tokens) == (12, 8)


def test_calls_with_nothing_to_share_are_passed_on() -> None:
    model = build("llama")
    counts = embedded_tokens(model)
    with share_prefixes(model):
        model(torch.tensor([[1, 2, 3], [4, 5, 6]]))  # nothing in common, no padding
        model(torch.tensor([[1, 2, 3]]))
        model(torch.tensor([[1, 2, 3], [1, 2, 3]]), use_cache=True)
    assert counts == [6, 3, 6]


def test_a_call_with_a_cache_is_passed_on() -> None:
    """Also if `use_cache` is left to the configuration: without the cache it would not see the tokens before it."""
    forward = inspect.signature(transformers.LlamaForCausalLM.forward).parameters
    name = "cache" if "cache" in forward else "past_key_values"
    model = build("llama").eval()
    tokens = torch.randint(1, VOCABULARY, (2, 9))
    tokens[1, :6] = tokens[0, :6]
    expected = eager_twin(model)(tokens).logits[:, 5:]
    with share_prefixes(model):
        cache = model(tokens[:, :5], use_cache=True)[1]
        logits = model(tokens[:, 5:], **{name: cache}).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_generation_is_untouched(side: str) -> None:
    model = build("gemma2")
    input_ids, mask = padded_batch([[1, 2, 3, 4, 5, 6], [1, 2, 3], [1, 2, 3]], side)
    options = {"max_new_tokens": 7, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(input_ids, attention_mask=mask, **options)
    with share_prefixes(model) as shared:
        generated = model.generate(input_ids, attention_mask=mask, **options)
    assert torch.equal(generated.sequences, expected.sequences)
    assert all(torch.equal(one, other) for one, other in zip(generated.logits, expected.logits))
    assert shared.given_tokens == 0


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_compiled_models(name: str) -> None:
    """The compiler sees the packed row. It cannot narrow trees to windows: that must not go unnoticed."""
    model = build(name)
    input_ids = torch.tensor([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 9, 8]])
    expected = eager_twin(model)(input_ids, use_cache=False).logits
    compiled = torch.compile(model, backend="eager")
    with share_prefixes(compiled) as shared:
        if name == "llama":
            assert_same(compiled(input_ids, use_cache=False).logits, expected)
            assert (shared.given_tokens, shared.computed_tokens) == (12, 8)
        else:
            with pytest.raises(Exception, match=r"inside prefix trees do not work in torch.compile"):
                compiled(input_ids, use_cache=False)


def test_a_failing_call_leaves_nothing_behind() -> None:
    model = build("llama")
    input_ids = torch.tensor([[1, 2, 3], [1, 2, 4]])
    expected = model(input_ids).logits
    with share_prefixes(model) as shared:
        handle = model.model.layers[0].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(input_ids)
        handle.remove()
        assert_same(model(input_ids).logits, expected)
        gc.collect()
        assert len(shared._running) == 0


# What cannot be exact


def refused(model: nn.Module, error: type[Exception], message: str, **call: Any) -> None:
    with pytest.raises(error, match=message), share_prefixes(model):
        model(**{"input_ids": torch.tensor([[1, 2, 3], [1, 2, 4]]), **call})


def test_models_that_cannot_share() -> None:
    refused(eager_twin(build("llama")), ValueError, 'LlamaModel uses "eager".*set_attn_implementation')
    refused(build("bert"), ValueError, "causal model; in BertModel a token sees the ones after it")
    refused(nn.Linear(2, 2), ValueError, "Transformers model, Linear holds none")
    small = {"vocab_size": 9, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0}
    lfm = transformers.Lfm2Config(**small, **heads, layer_types=["conv", "full_attention"])
    model = transformers.Lfm2ForCausalLM._from_config(lfm, attn_implementation="flashmask")
    refused(model, NotImplementedError, "other than by attention: Lfm2Model has Conv1d, conv")
    bart = transformers.BartConfig(vocab_size=9, d_model=16, encoder_layers=1, decoder_layers=1, pad_token_id=0)
    model = transformers.BartForConditionalGeneration._from_config(bart, attn_implementation="flashmask")
    refused(model, ValueError, "BartModel")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"output_hidden_states": True}, "`output_hidden_states=True`"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(2, 3, 32)}, "`inputs_embeds`"),
        ({"token_type_ids": torch.zeros(2, 3, dtype=torch.long)}, "`token_type_ids` differs"),
        ({"position_ids": torch.zeros(3, 2, 3, dtype=torch.long)}, r"got \[3, 2, 3\]"),
    ],
)
def test_calls_that_cannot_be_shared(call: dict[str, Any], message: str) -> None:
    refused(build("llama"), NotImplementedError, message, **call)


def test_router_losses_are_refused() -> None:
    refused(build("gpt_oss"), NotImplementedError, "`output_router_logits=True`", output_router_logits=True)


def test_documents_in_rows_are_refused() -> None:
    refused(build("llama"), ValueError, "packed documents", position_ids=torch.tensor([[0, 1, 0]]))


@pytest.mark.parametrize(("name", "setting"), [("gpt2", "resid_pdrop"), ("llama", "attention_dropout")])
def test_active_dropout_is_refused(name: str, setting: str) -> None:
    model = build(name, **{setting: 0.5})
    refused(model.train(), NotImplementedError, r"under dropout.*set the one of `.*` \(")
    with share_prefixes(model.eval()):
        model(torch.tensor([[1, 2, 3], [1, 2, 4]]))
