"""Families of models that cover what attention can be asked for, flashmask against eager; the rest: `make sweep`."""

from __future__ import annotations

import copy
import functools
import json
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from sweep_models import DOCS, SCENARIOS, Family, ImagePair, Outcome, Pair, TextPair, families, judge, pair_of, render
from tiny_families import IMAGE_TOKEN, TEXT_TOKENS, tiny_config
from tiny_models import packed
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

RIGHT_IN_ALL = [
    "decoder/cohere2",  # windowed layers with positions, full ones without
    "decoder/gemma3n_text",  # layers that share keys and values
    "decoder/gemma4_text",  # two head sizes
    "decoder/mimo_v2_flash",  # sinks, values narrower than keys
    "decoder/minicpm3",  # MLA
    "decoder/modernbert-decoder",
    "multimodal/paligemma",  # causal attention of layers that call themselves bidirectional
    "decoder/phi3",
    "decoder/vaultgemma",  # softcap
    "decoder/xlm-roberta",  # positions that do not start at 0
    "encoder/eurobert",
    "encoder-decoder/t5gemma",
]
IMAGES_IN_TEXT = [
    "images/gemma3",  # images see themselves, in windows too
    "images/gemma4",
    "images/idefics3",
    "images/mistral3",
    "images/molmo2",  # the images of a document see each other
    "images/paligemma",  # everything before the answer sees itself
    "images/qwen2_5_vl",  # positions with axes
]
EYES_AND_EARS = [
    "image encoder/gemma4_vision",  # padded patches
    "image encoder/pixtral",
    "image encoder/qwen2_5_vl_vision",  # windows in images
    "image encoder/qwen3_vl_vision",
    "image encoder/siglip_vision_model",
    "sound encoder/whisper",
]


@functools.cache
def all_families() -> dict[str, Family]:
    """Not when tests are collected: finding them imports every model of Transformers."""
    return {f"{family.kind}/{family.name}": family for family in families()}


def outcomes_of(pair: Pair) -> dict[str, Outcome]:
    outcomes = {}
    for scenario in SCENARIOS[pair.family.kind]:
        runs = pair.runs(scenario)
        if runs is not None:
            outcomes[scenario] = judge(runs)
    return outcomes


@pytest.mark.parametrize("name", RIGHT_IN_ALL)
def test_family_is_right(name: str) -> None:
    pair = pair_of(all_families()[name])
    assert isinstance(pair, TextPair)
    outcomes = outcomes_of(pair)
    assert all(outcome.status == "exact" for outcome in outcomes.values()), outcomes
    assert len(outcomes) >= 5
    if pair.takes_positions:  # documents that see each other would show
        whole_row = pair.logits(pair.eager, **packed([torch.cat(pair.documents, dim=1)]))
        assert (whole_row - pair.runs("packed").truth()).abs().max() > 0.01


@pytest.mark.parametrize("name", IMAGES_IN_TEXT)
def test_images_in_text_are_right(name: str) -> None:
    pair = pair_of(all_families()[name])
    outcomes = outcomes_of(pair)
    assert outcomes.keys() == set(SCENARIOS["images"])
    assert all(outcome.status == "exact" for outcome in outcomes.values()), outcomes


@pytest.mark.parametrize("name", ["images/gemma3", "images/molmo2", "images/paligemma"])
def test_images_see_more_than_what_came_before_and_nothing_of_other_documents(name: str) -> None:
    pair = pair_of(all_families()[name])
    assert isinstance(pair, ImagePair)
    document = pair.documents[0]
    changed = {**document, "input_ids": document["input_ids"].clone()}
    types = next(name for name in document if name.endswith("token_type_ids"))
    with torch.no_grad():
        before = pair.ours(**document).logits
        changed[types] = torch.zeros_like(document[types])
        assert (pair.ours(**changed).logits - before).abs().max() > 0.01
    packed_row = judge(pair.runs("packed"))
    assert packed_row.status == "exact"
    # Transformers' own mask of a packed row shows images those of the other document, until 5.23, or hides parts of
    # their own in windows.
    is_fixed = Version(transformers.__version__) >= Version("5.24") and name != "images/gemma3"
    assert packed_row.eager_is_exact == is_fixed


@pytest.mark.parametrize("name", EYES_AND_EARS)
def test_encoder_of_images_or_sound_is_right(name: str) -> None:
    outcomes = outcomes_of(pair_of(all_families()[name]))
    assert outcomes.keys() >= {"plain", "gradients"}
    assert all(outcome.status == "exact" for outcome in outcomes.values()), outcomes


def test_cross_attention_to_images_is_right() -> None:
    """Mllama: rows that see no image, and tiles of an image that are padding."""
    config = tiny_config(
        transformers.MllamaConfig,
        text_config={"cross_attention_layers": [1]},
        vision_config={"intermediate_layers_indices": [0, 1], "vision_output_dim": 96, "max_num_tiles": 2}
        | {"num_global_layers": 1, "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]]},
    )
    model_class = transformers.MllamaForConditionalGeneration
    torch.manual_seed(1)
    eager = model_class._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in eager.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    ours = copy.deepcopy(eager)
    ours.set_attn_implementation("flashmask")
    input_ids = torch.randint(3, TEXT_TOKENS, (2, 9))
    input_ids[:, 2] = IMAGE_TOKEN
    sees_tile = torch.ones(2, 9, 1, 2, dtype=torch.long)
    sees_tile[:, :2], sees_tile[1, :, :, 1] = 0, 0
    inputs = {
        "input_ids": input_ids,
        "attention_mask": torch.tensor([[0, 0] + [1] * 7, [1] * 9]),
        "pixel_values": torch.randn(2, 1, 2, 3, 32, 32),
        "aspect_ratio_ids": torch.tensor([[2], [1]]),
        "aspect_ratio_mask": torch.tensor([[[1, 1]], [[1, 0]]]),
        "cross_attention_mask": sees_tile,
    }
    tokens = inputs["attention_mask"].bool()
    with torch.no_grad():
        truth = eager(**inputs).logits[tokens]
        other_image = eager(**{**inputs, "pixel_values": inputs["pixel_values"].flip(0)}).logits[tokens]
        assert (truth - other_image).abs().max() > 0.01
        torch.testing.assert_close(ours(**inputs).logits[tokens], truth, atol=1e-5, rtol=1e-4)


def test_parts_that_flashmask_would_compute_wrongly_keep_eager_attention() -> None:
    config = tiny_config(transformers.Phi4MultimodalConfig)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="flashmask")
    implementations = {
        type(module).__name__: module.config._attn_implementation
        for module in model.modules()
        if isinstance(module, transformers.PreTrainedModel)
    }
    assert implementations.pop("Phi4MultimodalVisionModel") == "eager"
    assert implementations.pop("Phi4MultimodalAudioModel") == "eager"
    assert set(implementations.values()) == {"flashmask"}


def test_recurrent_layers_mix_documents_and_attention_does_not() -> None:
    outcomes = outcomes_of(pair_of(all_families()["decoder/qwen3_next"]))
    assert {name for name, outcome in outcomes.items() if outcome.status != "exact"} == {"packed", "packed, cache"}


@pytest.mark.parametrize(
    ("config_class", "settings", "reason"),
    [
        ("DeepseekV32Config", {}, "attends only to keys that it selects"),
        ("DeepseekV4Config", {}, "attends only to keys that it selects"),
        ("MiniMaxM3VLTextConfig", {"layer_types": ["minimax_m3_sparse"] * 2}, "attends only to keys that it selects"),
        ("InklingTextConfig", {}, "adds a bias"),
        ("DogeConfig", {}, "dense mask"),
        ("T5Config", {}, "adds a bias"),
        ("NllbMoeConfig", {}, "only eager attention"),
        ("T5Gemma2Config", {}, "joins the masks"),
        ("SwinConfig", {}, "adds a bias"),
        ("BeitConfig", {"use_relative_position_bias": True}, "adds a bias"),
        ("Siglip2VisionConfig", {}, "dense mask"),
        ("ParakeetEncoderConfig", {}, "adds a bias"),
        ("Wav2Vec2BertConfig", {}, "adds a bias"),
    ],
)
def test_refused_before_any_forward_pass(config_class: str, settings: dict[str, Any], reason: str) -> None:
    config = tiny_config(getattr(transformers, config_class), **settings)
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not config.is_encoder_decoder:
        auto_class = AutoModel
    with pytest.raises(
        ValueError, match=f'does not work with attn_implementation="flashmask": .*{reason}.*Use .*eager'
    ):
        auto_class.from_config(config, attn_implementation="flashmask")


def test_the_published_table_shows_the_published_results() -> None:
    results = json.loads((DOCS / "models.json").read_text())
    assert (DOCS / "models.md").read_text() == render(results)
