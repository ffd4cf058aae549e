"""Families of models that cover what attention can be asked for, flashmask against eager; the rest: `make sweep`."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers
from sweep_models import DOCS, SCENARIOS, Outcome, Pair, build, families, judge, render
from tiny_families import tiny_config
from tiny_models import packed
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

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
ALL = {f"{family.kind}/{family.name}": family for family in families()}


def pair_of(name: str) -> Pair:
    return Pair(ALL[name], build(ALL[name]))


def outcomes_of(pair: Pair) -> dict[str, Outcome]:
    outcomes = {}
    for scenario in SCENARIOS:
        runs = pair.runs(scenario)
        if runs is not None:
            outcomes[scenario] = judge(runs)
    return outcomes


@pytest.mark.parametrize("name", RIGHT_IN_ALL)
def test_family_is_right(name: str) -> None:
    pair = pair_of(name)
    outcomes = outcomes_of(pair)
    assert all(outcome.status == "exact" for outcome in outcomes.values()), outcomes
    assert len(outcomes) >= 5
    if pair.takes_positions:  # documents that see each other would show
        whole_row = pair.logits(pair.eager, **packed([torch.cat(pair.documents, dim=1)]))
        assert (whole_row - pair.runs("packed").truth()).abs().max() > 0.01


def test_recurrent_layers_mix_documents_and_attention_does_not() -> None:
    outcomes = outcomes_of(pair_of("decoder/qwen3_next"))
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
    ],
)
def test_refused_before_any_forward_pass(config_class: str, settings: dict[str, Any], reason: str) -> None:
    config = tiny_config(getattr(transformers, config_class), **settings)
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with pytest.raises(
        ValueError, match=f'does not work with attn_implementation="flashmask": .*{reason}.*Use .*eager'
    ):
        auto_class.from_config(config, attn_implementation="flashmask")


def test_the_published_table_shows_the_published_results() -> None:
    results = json.loads((DOCS / "models.json").read_text())
    assert (DOCS / "models.md").read_text() == render(results)
