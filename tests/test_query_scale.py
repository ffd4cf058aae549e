"""Llama 4, whose layers without rotary embeddings scale queries by their column, against each document alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import build, cumulative_lengths, eager_twin, logits_alone, packed, padded, random_documents
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from hf_flashmask import bounds

LENGTHS = (11, 7, 9)
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def llama4(**changes: Any) -> PreTrainedModel:
    scale = {"attn_temperature_tuning": True, "floor_scale": 4, "attn_scale": 1.0, "no_rope_layers": [1, 0]}
    return build("llama4", **(scale | {"attention_chunk_size": 64} | changes))


def calls_of(model: PreTrainedModel, documents: list[Tensor]) -> dict[str, dict[str, Any]]:
    batch, lengths = packed(documents), cumulative_lengths(documents)
    ids = torch.repeat_interleave(torch.arange(1, 4), torch.tensor(LENGTHS))[None]
    tokens = {"input_ids": batch["input_ids"]}
    cache = StaticCache(config=model.config, max_cache_len=40)
    return {
        "positions": batch | {"use_cache": False},
        "positions, new cache": batch,
        "positions, static cache": batch | {"past_key_values": cache},
        "positions, mask of ones": batch | {"attention_mask": torch.ones_like(ids)},
        "lengths": tokens
        | {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": 11, "max_length_k": 11},
        "ids": tokens | {"attention_mask": ids},
    }


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"attention_chunk_size": 4}], ids=["long chunks", "short chunks"])
def test_documents_are_scaled_as_if_they_were_alone(changes: dict[str, Any]) -> None:
    model = llama4(**changes)
    twin, documents = eager_twin(model), random_documents(LENGTHS)
    alone = logits_alone(twin, documents)
    assert (twin(**packed(documents), use_cache=False).logits - alone).abs().max() > 0.01
    for name, call in calls_of(model, documents).items():
        torch.testing.assert_close(
            model(**call).logits, alone, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_gradients_are_those_of_documents_alone() -> None:
    model, documents = llama4(), random_documents(LENGTHS)
    twin = eager_twin(model)
    logits_alone(twin, documents).square().mean().backward()
    model(**packed(documents), use_cache=False).logits.square().mean().backward()
    for ours, expected in zip(model.parameters(), twin.parameters()):
        if expected.grad is not None:
            torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-4, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"attention_chunk_size": 4}], ids=["long chunks", "short chunks"])
def test_padding_on_the_left_is_not_counted(changes: dict[str, Any]) -> None:
    model, documents = llama4(**changes), random_documents(LENGTHS)
    twin, batch = eager_twin(model), padded(documents, "left")
    logits = model(**batch).logits
    for row, document in enumerate(documents):
        alone = twin(document).logits[0]
        torch.testing.assert_close(logits[row, -len(alone) :], alone, **TOLERANCE)


@torch.no_grad()
def test_generated_tokens_are_scaled_as_if_they_had_no_padding() -> None:
    model, documents = llama4(), random_documents(LENGTHS)
    twin, batch = eager_twin(model), padded(documents, "left")
    del batch["position_ids"]
    generated = model.generate(
        **batch, max_new_tokens=9, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    for row, document in enumerate(documents):
        new = generated.sequences[row : row + 1, batch["input_ids"].shape[1] :]
        expected = twin(torch.cat([document, new], dim=1)).logits[0, document.shape[1] - 1 : -1]
        torch.testing.assert_close(torch.stack([step[row] for step in generated.logits]), expected, **TOLERANCE)


@torch.no_grad()
def test_documents_behind_a_cached_prefix() -> None:
    """Two continue it, one is alone."""
    model = llama4()
    twin, cache = eager_twin(model), DynamicCache(config=model.config)
    prefix, first, second, alone = random_documents((10, 5, 9, 12))
    model(prefix, past_key_values=cache)
    positions = torch.cat([torch.arange(10, 15), torch.arange(10, 19), torch.arange(12)])[None]
    tokens = torch.cat([first, second, alone], dim=1)
    logits = model(tokens, position_ids=positions, past_key_values=cache).logits
    continued = [twin(torch.cat([prefix, part], dim=1)).logits[:, 10:] for part in (first, second)]
    torch.testing.assert_close(logits, torch.cat([*continued, twin(alone).logits], dim=1), **TOLERANCE)


@torch.no_grad()
def test_a_document_that_goes_on_behind_others_by_its_id() -> None:
    model, documents = llama4(), random_documents(LENGTHS)
    alone, batch = logits_alone(eager_twin(model), documents), packed(documents)
    ids = torch.repeat_interleave(torch.arange(1, 4), torch.tensor(LENGTHS))[None]
    cache, logits = DynamicCache(config=model.config), []
    for start, end in ((0, 20), (20, 24), (24, 25), (25, 26), (26, 27)):
        part = {name: tokens[:, start:end] for name, tokens in batch.items()}
        logits.append(model(**part, attention_mask=ids[:, :end], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), alone, **TOLERANCE)


@torch.no_grad()
def test_compiled_models_scale_by_documents() -> None:
    model = llama4()
    twin, compiled = eager_twin(model), torch.compile(model, fullgraph=True, backend="eager")
    for lengths in (LENGTHS, (5, 17, 20)):
        documents = random_documents(lengths)
        logits = compiled(**packed(documents), use_cache=False).logits
        torch.testing.assert_close(logits, logits_alone(twin, documents), **TOLERANCE)


@torch.no_grad()
def test_one_document_keeps_its_bits() -> None:
    """Factors of equal columns are 1. Under bounds of users, which do not tell documents, the scale is eager's."""
    model = llama4()
    (tokens,) = random_documents([25])
    positions = torch.arange(25)[None]
    expected = model(tokens, attention_mask=bounds.causal(25)).logits
    assert torch.equal(model(tokens, position_ids=positions, use_cache=False).logits, expected)
