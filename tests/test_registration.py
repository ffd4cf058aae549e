"""Registration: how the implementation is named, and what Transformers and others are told of it."""

from __future__ import annotations

import importlib
import json
import pickle
import re
import types
from pathlib import Path
from typing import Any

import pytest
import run_versions
import tiny_vision
import torch
import transformers
from processes import run_python
from tiny_models import build, config_of, eager_twin, random_documents
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, GenerationConfig
from transformers.generation import utils as generation_utils
from transformers.models.kosmos2_5 import modeling_kosmos2_5
from transformers.utils import generic

import hf_flashmask
from hf_flashmask import integration
from hf_flashmask.integration import flashmask_attention_forward, flashmask_mask, predicate, versions

_TRAINING_NAMES = ["SharedPromptDataCollator", "compute_log_probs", "dpo_loss", "reward_loss", "set_loss"]

# Every way to name the implementation


def implementation_in_use(model: nn.Module) -> str:
    """Asked of the layer that computes attention, not of what was requested."""
    seen = []
    layers = (module for module in model.modules() if type(module).__name__.endswith("Attention"))
    layer = next(layer for layer in layers if hasattr(layer, "config"))
    original = AttentionInterface._global_mapping[integration.NAME]

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append("flashmask")
        return original(*args, **kwargs)

    AttentionInterface.register(integration.NAME, spy)
    try:
        model(torch.ones(1, 5, dtype=torch.long))
    finally:
        AttentionInterface.register(integration.NAME, original)
    return seen[0] if seen else layer.config._attn_implementation


# Those with lists of compatible flash implementations would be swapped silently for one of them.
@pytest.mark.parametrize("name", ["llama", "gpt_oss", "bert", "gpt2", "llama4"])
def test_from_config_and_set_attn_implementation(name: str) -> None:
    assert implementation_in_use(build(name)) == "flashmask"
    model = build(name, "eager")
    assert implementation_in_use(model) == "eager"
    model.set_attn_implementation("flashmask")
    assert implementation_in_use(model) == "flashmask"
    model.set_attn_implementation("sdpa" if name != "gpt_oss" else "eager")
    assert implementation_in_use(model) != "flashmask"


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_from_pretrained(name: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path)
    assert "flashmask" not in (tmp_path / "config.json").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="flashmask")
    assert model.config._attn_implementation == "flashmask"
    assert implementation_in_use(model) == "flashmask"
    tokens = random_documents([11])[0]
    torch.testing.assert_close(model(tokens).logits, eager_twin(model)(tokens).logits, rtol=1e-4, atol=1e-5)


def llava_config() -> transformers.LlavaConfig:
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=4
    )
    return transformers.LlavaConfig(vision_config=vision, text_config=config_of("llama"), image_token_id=3)


def test_parts_of_a_composite_model() -> None:
    parts = {"text_config": "flashmask", "vision_config": "eager"}
    model = transformers.LlavaForConditionalGeneration._from_config(llava_config(), attn_implementation=parts)
    assert model.config.text_config._attn_implementation == "flashmask"
    assert model.config.vision_config._attn_implementation == "eager"
    model.set_attn_implementation({"text_config": "sdpa", "vision_config": "flashmask"})
    assert model.config.text_config._attn_implementation == "sdpa"
    assert model.config.vision_config._attn_implementation == "flashmask"
    model.set_attn_implementation("flashmask")
    inputs = {"input_ids": torch.tensor([[1, 3, 3, 3, 3, 9, 4]]), "pixel_values": torch.randn(1, 3, 8, 8)}
    logits = model.eval()(**inputs).logits
    torch.testing.assert_close(logits, eager_twin(model)(**inputs).logits, rtol=1e-4, atol=1e-5)


# Nothing else changes


OTHER_IMPLEMENTATIONS = """
import json, sys, torch, transformers
from transformers import LlamaConfig, LlamaForCausalLM, GptOssConfig, GptOssForCausalLM, Llama4TextConfig
from transformers import masking_utils

def outcome(function):
    try:
        return function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"

def results():
    sizes = dict(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
                 num_key_value_heads=2)
    found = {}
    tokens = torch.arange(12)[None]
    for name in ("eager", "sdpa", "flash_attention_2", "flash_attention_9", "my_flash", "nonsense"):
        def load(model_class, config):
            torch.manual_seed(0)
            model = model_class._from_config(config, attn_implementation=name).eval()
            position_ids = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
            ones = torch.ones_like(tokens)
            calls = [{}, {"position_ids": position_ids, "use_cache": False}, {"attention_mask": ones}]
            return [model.config._attn_implementation, [model(tokens, **call).logits.tolist() for call in calls]]
        found[name] = outcome(lambda: load(LlamaForCausalLM, LlamaConfig(**sizes)))
        found[name + " gpt_oss"] = outcome(
            lambda: load(GptOssForCausalLM, GptOssConfig(**sizes, head_dim=8, num_local_experts=2, sliding_window=4))
        )
        config = Llama4TextConfig(**sizes, attention_chunk_size=4)
        config._attn_implementation = name
        found[name + " chunked"] = outcome(
            lambda: str(masking_utils.create_chunked_causal_mask(
                config=config, inputs_embeds=torch.zeros(1, 8, 4), attention_mask=None, past_key_values=None
            ))
        )
    return found

results()  # some of it depends on what was loaded before
before = results()
import hf_flashmask
after = results()
assert before == after, [name for name in before if before[name] != after[name]]
print(json.dumps({name: value if isinstance(value, str) else "loaded" for name, value in after.items()}))
"""


def test_other_implementations_are_untouched() -> None:
    """Bitwise the same logits and word for word the same errors before and after the import, in one process."""
    outcomes = json.loads(run_python(OTHER_IMPLEMENTATIONS).splitlines()[-1])
    assert outcomes["eager"] == outcomes["sdpa"] == "loaded"
    assert "Error" in outcomes["my_flash"]
    assert "Flash attention cannot handle chunked attention" in outcomes["flash_attention_2 chunked"]


def test_registering_again_changes_nothing() -> None:
    hooks = {(owner, name): getattr(owner, name, None) for owner, name, _ in integration.registration._WRAPPERS}
    hf_flashmask.register()
    importlib.reload(hf_flashmask)
    for (owner, name), hook in hooks.items():
        assert getattr(owner, name, None) is hook
        assert not hasattr(getattr(hook, "__wrapped__", None), integration.registration._OURS)
    assert AttentionInterface()["flashmask"] is flashmask_attention_forward
    assert AttentionMaskInterface()["flashmask"] is flashmask_mask


@pytest.mark.parametrize("index", range(len(integration.registration._WRAPPERS)))
def test_a_transformers_without_the_hooks_is_named(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, _ = integration.registration._WRAPPERS[index]
    if name in integration.registration._MISSING_IN_OLD_VERSIONS:
        monkeypatch.delattr(owner, name, raising=False)
        hf_flashmask.register()
        return
    monkeypatch.delattr(owner, name)
    with pytest.raises(ImportError, match=rf"transformers >= 5.4; version {transformers.__version__} has no .*{name}"):
        hf_flashmask.register()


# Names that resemble ours


@pytest.mark.parametrize("model", ["llama", "gpt_oss"])
@pytest.mark.parametrize(
    "name",
    [
        "flash_mask",
        "FlashMask",
        "flash-mask",
        "flashmask2",
        "Flash Mask",
        "flashmask_attention",
        "hf_flashmask",
        "hf-flashmask",
        "flashmas",
        "flashmsk",
        "flashmsak",
    ],
)
def test_misspelled_names_are_corrected(name: str, model: str, tmp_path: Path) -> None:
    """GPT-OSS replaces unknown names with "flash" in them by implementations that it lists."""
    expected = rf"attn_implementation='{name}' is not known. Did you mean attn_implementation=\"flashmask\"\?"
    with pytest.raises(ValueError, match=expected):
        build(model, name)
    built = build(model)
    with pytest.raises(ValueError, match=expected):
        built.set_attn_implementation(name)
    built.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=expected):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)


def test_a_misspelled_name_of_a_part_is_corrected() -> None:
    parts = {"text_config": "flash_mask", "vision_config": "eager"}
    with pytest.raises(ValueError, match=r'Did you mean attn_implementation="flashmask"'):
        transformers.LlavaForConditionalGeneration._from_config(llava_config(), attn_implementation=parts)
    model = transformers.LlavaForConditionalGeneration._from_config(llava_config(), attn_implementation="eager")
    with pytest.raises(ValueError, match=r'Did you mean attn_implementation="flashmask"'):
        model.set_attn_implementation(parts)


OTHERS = """eager sdpa flex_attention flash_attention_2 flash_attention_4 paged|flash_attention_2 flash_mla flash
kernels-community/flash-attn3 kernels-community/flash-mla someone/flashmask flashinfer fla"""


@pytest.mark.parametrize("name", OTHERS.split())
def test_other_names_are_not_taken_for_ours(name: str) -> None:
    assert not integration.name.is_misspelled(name)


def test_a_registered_name_that_resembles_ours_is_none_of_our_business(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AttentionInterface._global_mapping, "flashmask_of_mine", flashmask_attention_forward)
    model = build("llama", "eager")
    assert model.get_correct_attn_implementation("flashmask_of_mine") == "flashmask_of_mine"


# What SDPA does not return either


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "bert"])
def test_output_attentions_returns_what_sdpa_returns(name: str) -> None:
    tokens = random_documents([6])[0]
    outputs = [build(name, implementation)(tokens, output_attentions=True) for implementation in ("sdpa", "flashmask")]
    assert outputs[0].attentions == outputs[1].attentions
    lengths = [
        len(build(name, implementation)(tokens, output_attentions=True, return_dict=False))
        for implementation in ("sdpa", "flashmask")
    ]
    assert lengths[0] == lengths[1]


def test_output_attentions_of_cross_attention_and_generation_are_those_of_sdpa() -> None:
    sizes = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in _BART.items()}
    config = transformers.BartConfig(vocab_size=97, d_model=32, **sizes)
    tokens, found = random_documents([6])[0], []
    for implementation in ("sdpa", "flashmask"):
        model = transformers.BartForConditionalGeneration._from_config(config, attn_implementation=implementation)
        outputs = model.eval()(tokens, decoder_input_ids=tokens, output_attentions=True)
        generated = build("llama", implementation).generate(
            tokens, max_new_tokens=2, do_sample=False, output_attentions=True, return_dict_in_generate=True
        )
        found.append((outputs.encoder_attentions, outputs.cross_attentions, generated.attentions))
    assert found[0] == found[1]


_BART = {"layers": 1, "attention_heads": 4, "ffn_dim": 32}


# Pickled models


UNPICKLE = """
import sys, pickle, torch
model = torch.load(sys.argv[1], weights_only=False)
print("hf_flashmask" in sys.modules)
tokens, expected = torch.load(sys.argv[2])
torch.testing.assert_close(model(tokens).logits, expected)
"""


def test_a_pickled_model_imports_what_it_needs(tmp_path: Path) -> None:
    model, tokens = build("llama"), random_documents([9])[0]
    torch.save(model, tmp_path / "model.pt")
    torch.save((tokens, model(tokens).logits), tmp_path / "expected.pt")
    assert run_python(UNPICKLE, tmp_path / "model.pt", tmp_path / "expected.pt").split() == ["True"]


@pytest.mark.parametrize("part", ["model", "vision_tower"])
def test_so_does_a_part_of_a_model(part: str) -> None:
    model = transformers.LlavaForConditionalGeneration._from_config(llava_config(), attn_implementation="eager")
    model.set_attn_implementation("flashmask")
    held = pickle.dumps(getattr(model.model, part) if part != "model" else model.model)
    assert b"hf_flashmask" in held
    model.set_attn_implementation("sdpa")
    assert b"hf_flashmask" not in pickle.dumps(model)
    assert b"hf_flashmask" not in pickle.dumps(build("llama", "sdpa"))
    model = build("llama")
    model.set_attn_implementation("sdpa")
    assert b"hf_flashmask" not in pickle.dumps(model)
    model.set_attn_implementation("flashmask")
    assert b"hf_flashmask" in pickle.dumps(model.model)


@pytest.mark.parametrize("name", ["qwen2_vl", "llava"])
def test_models_that_have_used_flashmask_keep_no_hooks(name: str) -> None:
    model = tiny_vision.build(name)
    hooked = [part for part in model.modules() if part._forward_pre_hooks]
    assert hooked
    model.set_attn_implementation("sdpa")
    assert not any(part._forward_pre_hooks or part._forward_pre_hooks_with_kwargs for part in hooked)
    assert b"hf_flashmask" not in pickle.dumps(model)
    model.set_attn_implementation("flashmask")
    model.set_attn_implementation("flashmask")
    assert [len(part._forward_pre_hooks) for part in hooked] == [1] * len(hooked)


# Who asks whether FlashAttention is requested


CALL = re.compile(r"(?<!def )is_flash_attention_requested\(")


def callers_in_transformers() -> set[str]:
    """Modules of this Transformers, models by their folders."""
    root, found = Path(transformers.__file__).parent, set()
    for path in root.rglob("*.py"):
        if CALL.search(path.read_text(encoding="utf-8")):
            *folders, stem = path.relative_to(root).with_suffix("").parts
            found.add(".".join(folders if folders[0] == "models" else (*folders, stem)) if folders else stem)
    return found


def test_every_caller_has_an_answer() -> None:
    callers = {f"{name}.get_max_seqlen" if name == "utils.generic" else name for name in callers_in_transformers()}
    assert not callers.difference(predicate._IS_FLASH)


def test_the_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("llama")
    config._attn_implementation = "flashmask"
    assert generic.is_flash_attention_requested(config)
    assert not generic.is_flash_attention_requested(config, version=[2, 3])
    assert not generation_utils.is_flash_attention_requested(config)
    assert not transformers.masking_utils.is_flash_attention_requested(config)
    bigcode = transformers.GPTBigCodeConfig()
    bigcode._attn_implementation = "flashmask"
    assert not generic.is_flash_attention_requested(bigcode)
    for asks in (generic, generation_utils, transformers.masking_utils):
        assert not asks.is_flash_attention_requested(requested_attention_implementation="flashmask")
        for name, expected in {"flash_attention_2": True, "my_flash": True, "sdpa": False, None: False}.items():
            config._attn_implementation = name
            assert asks.is_flash_attention_requested(config) is expected
            assert asks.is_flash_attention_requested(requested_attention_implementation=name) is expected
            assert asks.is_flash_attention_requested(None, name, 2) is (name == "flash_attention_2")
        with pytest.raises(ValueError, match="ambiguous"):
            asks.is_flash_attention_requested(config, "flashmask")


def test_a_model_that_was_imported_before_gets_the_same_answer() -> None:
    code = """
from transformers.models.gpt_bigcode import modeling_gpt_bigcode
from transformers.models.qwen2_vl import modeling_qwen2_vl
import hf_flashmask
from transformers.models.pixtral import modeling_pixtral
answers = []
for module, config in ((modeling_gpt_bigcode, "GPTBigCodeConfig"), (modeling_qwen2_vl, "Qwen2VLConfig"),
                       (modeling_pixtral, "PixtralVisionConfig")):
    config = getattr(module, config)()
    config._attn_implementation = "flashmask"
    answers.append(module.is_flash_attention_requested(config))
print(answers)
"""
    assert run_python(code).strip() == "[False, True, True]"


def test_libraries_that_ask_by_name_do_not_load_flash_attention() -> None:
    """As sentence-transformers 6.2 does when a model is loaded: it would load what it is told is FlashAttention."""
    model = build("bert")
    from transformers.utils.generic import is_flash_attention_requested

    assert not is_flash_attention_requested(requested_attention_implementation=model.config._attn_implementation)


def test_continuous_batching_is_refused_before_it_starts() -> None:
    """It has a paged cache. With FlashAttention installed, it would switch to that, and say so."""
    from transformers.generation.continuous_batching import continuous_api

    manager = continuous_api.ContinuousBatchingManager
    if not hasattr(manager, "switch_to_cb_friendly_attn"):  # older versions ask nobody: the layers refuse the cache
        return
    with pytest.raises(ValueError, match="flashmask is not supported for continuous batching"):
        manager.switch_to_cb_friendly_attn(None, build("llama"), auto_switch_to_flash=False)


def test_compiled_decoding_stays_one_graph() -> None:
    model = build("llama")
    options = transformers.CompileConfig(fullgraph=True)
    options._compile_all_devices = True
    settings = GenerationConfig(compile_config=options)
    cache = transformers.StaticCache(model.config, max_cache_len=8)
    assert model._valid_auto_compile_criteria({"cache": cache, "past_key_values": cache}, settings)
    assert settings.compile_config.fullgraph


@pytest.mark.skipif(not hasattr(generic, "get_max_seqlen"), reason="this version of Transformers has no such function")
def test_the_longest_document_is_not_read_from_the_device() -> None:
    config = config_of("llama")
    lengths = torch.tensor([0, 3, 8])
    config._attn_implementation = "flash_attention_2"
    assert generic.get_max_seqlen(lengths, config) == 5
    config._attn_implementation = "flashmask"
    assert generic.get_max_seqlen(lengths, config) is None
    known: dict[str, Any] = {"max_seqlen": 7, "longest": 8}
    assert generic.get_max_seqlen(lengths, config, known) == 7
    assert generic.get_max_seqlen(lengths, config, known, "longest") == 8
    assert not known


def test_the_predicate_is_traced_into_one_graph() -> None:
    config = config_of("llama")
    config._attn_implementation = "flashmask"

    def step(values: torch.Tensor) -> torch.Tensor:
        return values + 1 if generic.is_flash_attention_requested(config) else values - 1

    assert torch.compile(step, fullgraph=True, backend="eager")(torch.zeros(1)).item() == 1


def test_a_mask_that_flash_attention_would_get_in_another_form() -> None:
    """Kosmos-2.5 gives FlashAttention the 2-D mask of its patches as it is, and others one that broadcasts."""
    config = modeling_kosmos2_5.Kosmos2_5VisionConfig(
        hidden_size=32,
        patch_embed_hidden_size=48,
        intermediate_size=32,
        head_dim=8,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_num_patches=16,
        attention_dropout=0.0,
    )
    model = modeling_kosmos2_5.Kosmos2_5VisionModel._from_config(config, attn_implementation="flashmask").eval()
    patches = torch.rand(2, 10, 50)
    patches[:, :, 0], patches[:, :, 1] = torch.arange(10) // 5, torch.arange(10) % 5
    patches[1, 6:] = 0
    expected = eager_twin(model)(patches).last_hidden_state
    is_patch = patches.sum(-1) != 0
    torch.testing.assert_close(model(patches).last_hidden_state[is_patch], expected[is_patch], rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not hasattr(transformers, "EsmcModel"), reason="this version of Transformers has no ESM C")
def test_a_row_of_several_proteins_is_refused_to_flash_attention_only() -> None:
    config = transformers.EsmcConfig(
        vocab_size=40, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4
    )
    model = transformers.EsmcModel._from_config(config, attn_implementation="flashmask").eval()
    call = {"input_ids": torch.randint(4, 40, (1, 9)), "sequence_id": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2]])}
    expected = eager_twin(model)(**call).last_hidden_state
    torch.testing.assert_close(model(**call).last_hidden_state, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not hasattr(transformers, "HrmTextConfig"), reason="this version of Transformers has no HRM-Text")
def test_prefixes_that_see_themselves_are_refused_to_flash_attention_only() -> None:
    config = transformers.HrmTextConfig(
        vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8
    )
    assert config.prefix_lm
    model = transformers.HrmTextForCausalLM._from_config(config, attn_implementation="flashmask").eval()
    call = {"input_ids": random_documents([9])[0], "token_type_ids": torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0, 0]])}
    torch.testing.assert_close(model(**call).logits, eager_twin(model)(**call).logits, rtol=1e-4, atol=1e-5)


# The package


def test_versions_newer_than_the_tested_ones_are_named_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    integration.name.logger.warning_once.cache_clear()
    transformers.logging.enable_propagation()
    oldest, newest = versions.TESTED["transformers"]
    for version in (f"{oldest}.0", f"{newest}.0", f"{newest}.7", "5.9.3"):
        monkeypatch.setattr(versions.transformers, "__version__", version)
        versions.warn_of_untested()
    assert not caplog.text
    major, minor = newest.split(".")
    monkeypatch.setattr(versions.transformers, "__version__", f"{major}.{int(minor) + 1}.0.dev0")
    monkeypatch.setattr(versions.torch, "__version__", "3.0.1+cpu")
    hf_flashmask.register()
    hf_flashmask.register()
    expected = rf"transformers \S+ \(tested: {oldest} to {newest}\) and torch 3.0.1\+cpu \(tested: 2.9 to "
    assert len(re.findall(f"hf_flashmask was not tested with {expected}", caplog.text)) == 1


@pytest.mark.parametrize("package", versions.TESTED)
def test_the_tested_versions_are_those_that_the_tests_are_run_with(package: str) -> None:
    text = " ".join(requirement for version in run_versions.VERSIONS.values() for requirement in version.requirements)
    found = sorted(tuple(map(int, release)) for release in re.findall(rf"\b{package}==(\d+)\.(\d+)", text))
    assert tuple(".".join(map(str, release)) for release in (found[0], found[-1])) == versions.TESTED[package]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("conversion.from_mask_function", "integration.conversion.from_mask_function"),
        ("integration.flashmask_mask", "integration.mask_function.flashmask_mask"),
        ("integration.flashmask_attention_forward", "integration.attention.flashmask_attention_forward"),
        ("packing.PackedDataCollator", "PackedDataCollator"),
        ("packing.pack_lengths", "training.packing.pack_lengths"),
        *((f"preference.{name}", f"training.{name}") for name in (*_TRAINING_NAMES, "answer_scores", "split_pairs")),
        ("prefix_tree.PrefixTree", "sharing.prefix_tree.PrefixTree"),
        ("shared_prefix.share_prefixes", "share_prefixes"),
        ("tree_attention.register_tree_attention", "register_tree_attention"),
    ],
)
def test_old_paths_lead_to_the_same_objects(old: str, new: str) -> None:
    objects = []
    for path in (old, new):
        module, _, name = f"hf_flashmask.{path}".rpartition(".")
        objects.append(getattr(importlib.import_module(module), name))
    assert objects[0] is objects[1]


def test_package_names() -> None:
    assert isinstance(hf_flashmask.bounds, types.ModuleType)
    assert hf_flashmask.__version__.count(".") == 2
