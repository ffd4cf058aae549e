"""Adapters of PEFT that see other tokens of a row, where rows hold one document and where they hold several."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import build, cumulative_lengths, eager_twin, packed, padded, random_documents
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from hf_flashmask import bounds

LENGTHS = (7, 5, 9)
INVOCATION = 5
ADAPTED = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
ALORA = LoraConfig(**ADAPTED, alora_invocation_tokens=[INVOCATION])
MESSAGE = "packs documents into a row under the aLoRA adapter 'default' of PEFT"


def adapted(name: str = "llama", config: peft.PeftConfig = ALORA) -> PeftModel:
    model = get_peft_model(build(name), config).eval()
    for parameter_name, parameter in model.named_parameters():
        if "lora_" in parameter_name:
            nn.init.normal_(parameter, std=0.5)
    return model


def invoking_documents() -> list[Tensor]:
    documents = random_documents(LENGTHS)
    for document in documents:
        document[document == INVOCATION] = 1
        document[0, 2] = INVOCATION
    return documents


def ids_of(documents: list[Tensor]) -> Tensor:
    lengths = torch.tensor([document.shape[1] for document in documents])
    return torch.repeat_interleave(torch.arange(1, len(lengths) + 1), lengths)[None]


def packed_calls(model: PeftModel) -> dict[str, dict[str, Any]]:
    documents = invoking_documents()
    batch, lengths = packed(documents), cumulative_lengths(documents)
    tokens = {"input_ids": batch["input_ids"]}
    return {
        "positions": batch | {"use_cache": False},
        "positions, new cache": batch,
        "positions, static cache": batch | {"past_key_values": StaticCache(config=model.config, max_cache_len=30)},
        "positions, mask of ones": batch | {"attention_mask": torch.ones_like(batch["input_ids"])},
        "lengths": tokens | {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": 9, "max_length_k": 9},
        "ids": tokens | {"attention_mask": ids_of(documents)},
    }


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma3", "llama4", "gpt_oss"])
def test_alora_is_refused_in_packed_rows(name: str) -> None:
    model = adapted(name)
    for call in packed_calls(model).values():
        with pytest.raises(NotImplementedError, match=MESSAGE):
            model(**call)


@torch.no_grad()
def test_alora_is_refused_beside_positions_and_bounds() -> None:
    model, batch = adapted(), packed(invoking_documents())
    with pytest.raises(NotImplementedError, match=MESSAGE):
        model(**batch, attention_mask=bounds.from_position_ids(batch["position_ids"]))


@torch.no_grad()
@pytest.mark.parametrize("told_by", ["position_ids", "attention_mask"])
def test_alora_is_refused_behind_a_cached_prefix(told_by: str) -> None:
    model, (prefix, first, second) = adapted(), invoking_documents()
    cache = DynamicCache(config=model.config)
    model(prefix, past_key_values=cache)
    batch = packed([first, second]) | {"attention_mask": ids_of([prefix, first, second]) + 1}
    call = {name: batch[name] for name in ("input_ids", told_by)}
    with pytest.raises(NotImplementedError, match=MESSAGE):
        model(**call, past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma3", "llama4"])
def test_alora_works_in_rows_of_one_document(name: str) -> None:
    model, documents = adapted(name), invoking_documents()
    twin = eager_twin(model)
    for side in ("left", "right"):
        batch = padded(documents, side)
        logits = model(**batch).logits
        for row, document in enumerate(documents):
            if side == "left":  # PEFT counts from the end of the row, padding among it
                alone = twin(document).logits[0]
                torch.testing.assert_close(logits[row, -len(alone) :], alone, rtol=1e-4, atol=1e-5)
        expected = twin(**batch).logits[batch["attention_mask"].bool()]
        torch.testing.assert_close(logits[batch["attention_mask"].bool()], expected, rtol=1e-4, atol=1e-5)
    batch = {name: padded(documents, "left")[name] for name in ("input_ids", "attention_mask")}
    expected = twin.generate(**batch, max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(**batch, max_new_tokens=4, do_sample=False), expected)


@torch.no_grad()
def test_other_adapters_and_disabled_ones_work_in_packed_rows() -> None:
    documents = invoking_documents()
    batch = packed(documents)
    lora, alora = adapted(config=LoraConfig(**ADAPTED)), adapted()
    for model, twin in ((lora, eager_twin(lora)), (alora, eager_twin(build("llama")))):
        alone = torch.cat([twin(document).logits for document in documents], dim=1)
        with alora.disable_adapter():
            torch.testing.assert_close(model(**batch).logits, alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.skipif(not hasattr(peft, "LilyConfig"), reason="this release of PEFT has no Lily")
def test_lily_is_refused_in_packed_rows() -> None:
    model, documents = get_peft_model(build("llama"), peft.LilyConfig(**ADAPTED)), invoking_documents()
    with pytest.raises(NotImplementedError, match="the Lily adapter 'default' of PEFT"):
        model(**packed(documents))
    model(documents[0])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with pytest.raises(RuntimeError, match="the Lily adapter 'default' of PEFT"):
        compiled(**packed(documents), use_cache=False)


@torch.no_grad()
def test_lora_compiles_into_one_graph() -> None:
    model, documents = adapted(config=LoraConfig(**ADAPTED)), invoking_documents()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    expected = model(**packed(documents), use_cache=False).logits
    torch.testing.assert_close(compiled(**packed(documents), use_cache=False).logits, expected)
