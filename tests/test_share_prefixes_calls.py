"""How `share_prefixes` is switched on and off, which calls it leaves alone, and which it refuses."""

from __future__ import annotations

import copy
import importlib
import inspect
import io
import logging
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from random_trees import padded_batch
from test_shared_prefix import assert_same, build_family
from tiny_models import VOCABULARY, build, eager_twin
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.neftune import neftune_post_forward_hook

from hf_flashmask import share_prefixes
from hf_flashmask.sharing.layer_source import source_of_layer
from hf_flashmask.sharing.shared_prefix import _unpack_hidden_states


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
    """The compiler sees the packed row. It cannot narrow trees to windows, and leaves masks of them to Python."""
    model = build(name)
    input_ids = torch.tensor([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 9, 8]])
    expected = eager_twin(model)(input_ids, use_cache=False).logits
    compiled = torch.compile(model, backend="eager")
    with share_prefixes(compiled) as shared:
        assert_same(compiled(input_ids, use_cache=False).logits, expected)
        assert (shared.given_tokens, shared.computed_tokens) == (12, 8)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_failing_call_leaves_nothing_behind(error: type[BaseException]) -> None:
    model = build("llama")
    input_ids = torch.tensor([[1, 2, 3], [1, 2, 4]])
    expected = model(input_ids).logits

    def fail(*arguments: Any) -> None:
        raise error

    with share_prefixes(model) as shared:
        handle = model.model.layers[0].register_forward_pre_hook(fail)
        with pytest.raises(error):
            model(input_ids)
        handle.remove()
        if error is ZeroDivisionError:  # torch tells hooks of no other failure
            assert not shared._running._packed
        assert model(input_ids[:1]).logits.shape == (1, 3, expected.shape[-1])
        assert not shared._running._packed
        assert_same(model(input_ids).logits, expected)


def test_a_call_does_not_depend_on_what_other_hooks_make_of_it() -> None:
    model = build("llama")
    input_ids = torch.tensor([[1, 2, 3], [1, 2, 4]])
    expected = model(input_ids).logits
    with share_prefixes(model):
        model.model.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "input_ids": kwargs["input_ids"].clone()}), with_kwargs=True
        )
        assert_same(model(input_ids).logits, expected)


def test_threads_share_each_for_itself() -> None:
    model = build("llama")
    batches = [torch.tensor([[1, 2, 3], [1, 2, token]]) for token in range(4, 12)]
    with torch.no_grad():
        expected = [model(batch).logits for batch in batches]
    barrier = threading.Barrier(len(batches))
    actual: dict[int, Tensor] = {}

    def wait_for_all(*arguments: Any) -> None:
        barrier.wait()

    @torch.no_grad()
    def compute(number: int) -> None:
        actual[number] = model(batches[number]).logits

    with share_prefixes(model):
        # All are inside of the model at the same time.
        model.model.layers[0].register_forward_pre_hook(wait_for_all)
        threads = [threading.Thread(target=compute, args=(number,)) for number in range(len(batches))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number, logits in enumerate(expected):
        assert_same(actual[number], logits)


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt"])
@pytest.mark.parametrize("return_dict", [True, False])
def test_hidden_states(name: str, return_dict: bool) -> None:
    """TRL's value heads ask for all of them and read the last."""
    model = build_family(name)
    input_ids, mask = padded_batch([[1, 2, 3, 4, 5], [1, 2, 3, 7], [9, 8]])
    batch = {"input_ids": input_ids, "attention_mask": mask, "output_hidden_states": True, "return_dict": return_dict}
    expected = eager_twin(model)(**batch, use_cache=False)
    with share_prefixes(model) as shared:
        actual = model(**batch)
    assert 0 < shared.computed_tokens < shared.given_tokens
    ours, truth = (output.hidden_states if return_dict else output[-1] for output in (actual, expected))
    assert len(ours) == len(truth) == 3
    for one, other in zip(ours, truth):
        assert_same(one, other * mask[..., None])


def test_a_saved_model_does_not_share() -> None:
    model = build("llama")
    counts = embedded_tokens(model)
    input_ids = torch.tensor([[1, 2, 3], [1, 2, 4]])
    file = io.BytesIO()
    with share_prefixes(model):
        expected = model(input_ids).logits
        model.model.embed_tokens._forward_pre_hooks.clear()  # this test's own, a function that cannot be pickled
        torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    counts = embedded_tokens(loaded)
    assert_same(loaded(input_ids).logits, expected)
    assert counts == [6]


class SameDevice(TorchDispatchMode):
    """Operations on tensors of several devices fail, as they do on GPUs; only copies may cross."""

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        devices = {value.device for value in args if isinstance(value, Tensor) and value.ndim}
        assert len(devices) <= 1 or "copy" in str(function), (function, devices)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("has_padding", [False, True])
def test_hidden_states_on_another_device(has_padding: bool) -> None:
    with SameDevice():
        batch = _unpack_hidden_states(
            torch.zeros(1, 5, 3, device="meta"), torch.tensor([[0, 1], [2, -has_padding]]), has_padding
        )
    assert batch.device.type == "meta"
    assert batch.shape == (2, 2, 3)


class Bypass(nn.Module):
    """Calls the forward method of the backbone, past its hooks."""

    def __init__(self, model: transformers.PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.model.forward(*args, **kwargs)


def test_a_warning_says_that_nothing_was_shared(caplog: pytest.LogCaptureFixture) -> None:
    transformers.logging.enable_propagation()
    model = build("llama")
    with caplog.at_level(logging.WARNING), share_prefixes(Bypass(model)):
        Bypass(model)(torch.tensor([[1, 2], [1, 2]]))
    assert not caplog.records
    bypass = Bypass(model)
    with caplog.at_level(logging.WARNING), share_prefixes(bypass):
        bypass(torch.tensor([[1, 2], [1, 2]]))
        bypass(torch.tensor([[1, 2], [1, 2]]), use_cache=True)
    assert "share_prefixes shared nothing in 1 calls" in caplog.text
    caplog.clear()
    shared = share_prefixes(bypass)
    with caplog.at_level(logging.WARNING), torch.no_grad():
        for _ in range(101):
            bypass(torch.tensor([[1, 2], [1, 2]]))
        assert caplog.text.count("share_prefixes shared nothing in 100 calls") == 1
        shared.remove()
    assert len(caplog.records) == 1
    caplog.clear()
    with caplog.at_level(logging.WARNING), share_prefixes(model):
        model(torch.tensor([[1, 2], [1, 2]]))
    with caplog.at_level(logging.WARNING):
        refused(model, NotImplementedError, "`inputs_embeds`", input_ids=None, inputs_embeds=torch.zeros(2, 3, 32))
    assert not caplog.records


def generate(model: nn.Module, num_rows: int, **options: Any) -> None:
    prompts = torch.tensor([[5, 6, 7]]).repeat(num_rows, 1)
    options = {"attention_mask": torch.ones_like(prompts), "max_new_tokens": 3, "pad_token_id": 0, **options}
    model.generate(prompts, do_sample=False, **options)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 2}])
def test_a_warning_says_that_generation_shares_nothing(
    options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    transformers.logging.enable_propagation()
    model = build("llama").eval()
    with caplog.at_level(logging.WARNING), share_prefixes(model) as shared:
        for _ in range(2):
            generate(model, 2, **options)
        assert not [record for record in caplog.records if "share_prefixes" in record.message]
    assert shared.given_tokens == 0
    (message,) = [record.message for record in caplog.records if "share_prefixes" in record.message]
    assert "shared nothing in 2 calls with a cache" in message
    assert "use_cache=False" in message


def test_generation_that_is_never_switched_off_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    transformers.logging.enable_propagation()
    model = build("llama").eval()
    shared = share_prefixes(model)
    with caplog.at_level(logging.WARNING), torch.no_grad():
        for _ in range(101):
            model(torch.tensor([[1, 2], [1, 2]]), use_cache=True)
        assert caplog.text.count("share_prefixes shared nothing in 100 calls with a cache") == 1
        shared.remove()
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    "call",
    [
        lambda model: generate(model, 1),  # a single row
        lambda model: generate(model, 2, use_cache=False),  # shares
        lambda model: [generate(model, 2), model.train()(torch.tensor([[1, 2], [1, 2]]))],  # generation beside training
        lambda model: [model.train()(torch.tensor([[1, 2], [1, 2]]), use_cache=None) for _ in range(3)],
        lambda model: model(torch.tensor([[1], [1]]), use_cache=True),  # no token could be shared
    ],
)
def test_where_something_or_nothing_can_be_shared_there_is_no_warning(
    call: Callable[[nn.Module], Any], caplog: pytest.LogCaptureFixture
) -> None:
    transformers.logging.enable_propagation()
    model = build("llama").eval()
    with caplog.at_level(logging.WARNING), share_prefixes(model):
        call(model)
    assert "share_prefixes" not in caplog.text


# What cannot be exact


def refused(model: nn.Module, error: type[Exception], message: str, **call: Any) -> None:
    with pytest.raises(error, match=message), share_prefixes(model):
        model(**{"input_ids": torch.tensor([[1, 2, 3], [1, 2, 4]]), **call})


def test_models_that_cannot_share() -> None:
    refused(eager_twin(build("llama")), ValueError, 'LlamaModel uses "eager".*set_attn_implementation')
    refused(build("bert"), ValueError, "causal model; in BertModel a token sees the ones after it")
    refused(nn.Linear(2, 2), ValueError, "Transformers model, Linear holds none")
    trainer: Any = types.SimpleNamespace(model=build("llama"))
    refused(trainer, TypeError, r"takes models, got SimpleNamespace; of a trainer pass trainer\.model")
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
        ({"input_ids": None, "inputs_embeds": torch.zeros(2, 3, 32)}, "`inputs_embeds`"),
        ({"cu_seq_lens_q": torch.tensor([0, 3])}, "`cu_seq_lens_q` differs"),
        ({"s_aux": [torch.zeros(2)]}, "`s_aux` differs"),
        ({"position_ids": torch.zeros(3, 2, 3, dtype=torch.long)}, r"got \[3, 2, 3\]"),
    ],
)
def test_calls_that_cannot_be_shared(call: dict[str, Any], message: str) -> None:
    refused(build("llama"), NotImplementedError, message, **call)


def test_a_model_that_was_switched_to_other_attention_is_refused() -> None:
    """Eager attention would add the bounds to the scores."""
    model = build("llama")
    with share_prefixes(model):
        model.set_attn_implementation("eager")
        with pytest.raises(ValueError, match='LlamaModel uses "eager"'):
            model(torch.tensor([[1, 2, 3], [1, 2, 4]]))


def test_router_losses_are_refused() -> None:
    refused(build("gpt_oss"), NotImplementedError, "`output_router_logits=True`", output_router_logits=True)


def test_documents_in_rows_are_refused() -> None:
    refused(build("llama"), ValueError, "packed documents", position_ids=torch.tensor([[0, 1, 0]]))
    for ids in ([1, 1, 2], [1, 1, -1]):
        refused(build("llama"), ValueError, "holds ids of documents", attention_mask=torch.tensor([ids, [1, 1, 1]]))


def test_columns_that_no_layer_reads_are_passed_on() -> None:
    """TRL's reward trainer passes the margins of the pairs to the model."""
    model = build("llama")
    input_ids = torch.tensor([[1, 2, 3], [1, 2, 4]])
    expected = eager_twin(model)(input_ids, use_cache=False).logits
    with share_prefixes(model) as shared:
        assert_same(model(input_ids, margin=torch.ones(2)).logits, expected)
    assert shared.computed_tokens == 4


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_prompt_learning_is_refused(config: type) -> None:
    model = get_peft_model(build("llama"), config(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(
        NotImplementedError, match=rf"prompt learning of PEFT: the adapter 'default' \({config.__name__}"
    ):
        share_prefixes(model)


ADAPTED = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@pytest.mark.skipif(not hasattr(peft, "LilyConfig"), reason="this release of PEFT has no Lily")
def test_adapters_that_average_over_tokens_are_refused() -> None:
    message = "the Lily adapter 'default' of PEFT"
    refused(get_peft_model(build("llama"), peft.LilyConfig(**ADAPTED)), NotImplementedError, message)
    model = build("llama")
    with share_prefixes(model), pytest.raises(NotImplementedError, match=message):  # an adapter that comes later
        get_peft_model(model, peft.LilyConfig(**ADAPTED))(torch.tensor([[1, 2, 3], [1, 2, 4]]))


def test_adapters_that_begin_within_a_row_are_refused() -> None:
    model = get_peft_model(build("llama"), LoraConfig(**ADAPTED, alora_invocation_tokens=[2]))
    refused(model, NotImplementedError, "the aLoRA adapter 'default' of PEFT")
    input_ids = torch.tensor([[1, 2, 3], [1, 2, 4]])
    with model.disable_adapter(), share_prefixes(model) as shared:  # a reference model
        logits = model(input_ids=input_ids).logits
    assert_same(logits, eager_twin(build("llama"))(input_ids).logits)
    assert shared.computed_tokens == 4


def test_an_adapter_for_each_row_is_refused() -> None:
    model = get_peft_model(build("llama"), LoraConfig(**ADAPTED)).eval()
    refused(model, NotImplementedError, "`adapter_names` of PEFT", adapter_names=["default", "__base__"])


# Randomness

RANDOM = {
    "gpt2": (
        {"attn_pdrop": 0.1, "resid_pdrop": 0.2, "embd_pdrop": 0.3},
        "embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0",
    ),
    "llama": ({"attention_dropout": 0.5}, "attention_dropout=0.0"),
    "seed_oss": ({"attention_dropout": 0.1, "residual_dropout": 0.2}, "attention_dropout=0.0, residual_dropout=0.0"),
    "gpt_bigcode": ({"attn_pdrop": 0.1, "resid_pdrop": 0.0, "embd_pdrop": 0.0}, "attn_pdrop=0.0"),
    "mixtral": ({"router_jitter_noise": 0.1}, "router_jitter_noise=0.0"),
    "minimax_m2": ({"router_jitter_noise": 0.1}, "router_jitter_noise=0.0"),
    "starcoder2": ({"residual_dropout": 0.1, "embedding_dropout": 0.2}, "residual_dropout=0.0, embedding_dropout=0.0"),
    "persimmon": ({"attention_dropout": 0.3, "hidden_dropout": 0.0}, "attention_dropout=0.0"),
    "opt": ({"dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.2}, "layerdrop=0.0"),
}


@pytest.mark.parametrize("name", RANDOM)
def test_everything_random_is_refused_in_training(name: str) -> None:
    """The message names every setting, so that one reading is enough."""
    changes, advice = RANDOM[name]
    quiet = dict.fromkeys(("attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout"), 0.0)
    quiet |= dict.fromkeys(("residual_dropout", "embedding_dropout", "router_jitter_noise", "dropout"), 0.0)
    default = transformers.AutoConfig.for_model(name)
    settings = {key: value for key, value in quiet.items() if hasattr(default, key)}
    model = build_family(name, **{**settings, **changes})
    with pytest.raises(NotImplementedError, match="under dropout or noise") as error, share_prefixes(model.train()):
        model(torch.tensor([[1, 2, 3], [1, 2, 4]]))
    named = str(error.value).partition(": set ")[2].partition(" in the config before")[0]
    assert set(named.split(", ")) == set(advice.split(", "))
    with share_prefixes(model.eval()) as shared:
        model(torch.tensor([[1, 2, 3], [1, 2, 4]]))
    assert shared.computed_tokens == 4
    calm = build_family(name, **settings).train()
    with share_prefixes(calm) as shared:
        calm(torch.tensor([[1, 2, 3], [1, 2, 4]]))
    assert shared.computed_tokens == 4


def test_dbrx_names_its_nested_settings() -> None:
    model = build_family("dbrx", resid_pdrop=0.1)
    refused(model.train(), NotImplementedError, r"set (resid_pdrop=0\.0|.*resid_pdrop=0\.0)")


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.10"), reason="Transformers 5.4 cannot create a PhimoeConfig"
)
def test_phi_moe_is_random_whatever_its_settings() -> None:
    model = build_family("phimoe", router_jitter_noise=0.0, input_jitter_noise=0.0)
    refused(model.train(), NotImplementedError, "while Phi-MoE trains")


def test_a_layer_in_training_mode_is_enough() -> None:
    model = build("llama", attention_dropout=0.5)
    model.model.layers[1].train()
    advice = r"set attention_dropout=0\.0 in the config before the model is made, as from_pretrained\(\.\.\., "
    refused(model, NotImplementedError, advice + r"attention_dropout=0\.0\) does")


def test_noisy_embeddings_are_refused() -> None:
    model = build("llama").train()
    embeddings = model.get_input_embeddings()
    embeddings.neftune_noise_alpha = 5
    embeddings.register_forward_hook(neftune_post_forward_hook)
    refused(model, NotImplementedError, "set neftune_noise_alpha=None in the training arguments")


def test_dropout_of_adapters_is_refused() -> None:
    lora = LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj"], task_type="CAUSAL_LM")
    refused(get_peft_model(build("llama"), lora).train(), NotImplementedError, "set lora_dropout=0.0 in the LoraConfig")


@pytest.mark.skipif(not hasattr(peft, "PveraConfig"), reason="this release of PEFT has no PVeRA")
def test_adapters_that_sample_are_refused() -> None:
    sampling = "PVeRA of PEFT, which draws random numbers"
    model = get_peft_model(build("llama"), peft.PveraConfig(**ADAPTED))
    refused(model.train(), NotImplementedError, sampling)
    with share_prefixes(model.eval()) as shared:
        model(torch.tensor([[1, 2, 3], [1, 2, 4]]))
    assert shared.computed_tokens == 4
    model = get_peft_model(build("llama"), peft.PveraConfig(**ADAPTED, sample_at_inference=True))
    refused(model.eval(), NotImplementedError, sampling)


@pytest.mark.parametrize("is_training", [False, True])
def test_layers_are_looked_at_wherever_they_are(is_training: bool) -> None:
    """Shared by two owners, in a list, beside a part that is left out, and apart from others of their class."""
    model = build("llama").train(is_training)
    layers = model.model.layers
    layers[0].mlp.register_module("gate", None)
    layers[1].mlp.parts = nn.ModuleList([nn.Identity(), nn.Sequential(nn.Dropout(0.0), nn.Dropout(0.25))])
    layers[0].mlp.part = layers[1].mlp.parts[1]
    message = r"set `layers\.0\.mlp\.part\.1` = 0 in the model \(Sequential\)"
    model.model.layers[1].mlp.parts.train()
    refused(model, NotImplementedError, message)


def test_random_layers_of_the_users_own_are_named() -> None:
    model = build("llama").train()
    model.model.layers[1].mlp.my_noise = 0.25
    refused(model, NotImplementedError, r"set `layers\.1\.mlp\.my_noise` = 0 in the model \(LlamaMLP\)")


def test_a_form_feed_does_not_shift_the_source_of_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends a line for `str.splitlines`, not for Python."""
    (tmp_path / "with_form_feed.py").write_text("from torch import nn\n\f\nclass Model(nn.Module):\n    layers = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    model = importlib.import_module("with_form_feed").Model()
    assert source_of_layer(model).strip() == "class Model(nn.Module):\n    layers = 1"


def test_a_module_that_was_reloaded_gives_its_new_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook edits a model, and reloads it."""
    path, source = tmp_path / "edited_model.py", "class Model(nn.Module):\n    noise = {}"
    path.write_text("from torch import nn\n\n" + source.format("0"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    module = importlib.import_module("edited_model")
    assert source_of_layer(module.Model()).strip() == source.format("0")
    path.write_text("from torch import nn\n\n" + source.format("0.25"))
    assert source_of_layer(importlib.reload(module).Model()).strip() == source.format("0.25")


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
