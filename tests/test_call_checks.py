"""Models that drop what tells documents apart, compute with it, or hand it to what it does not describe."""

from __future__ import annotations

import pytest
import tiny_vision
import torch
import transformers
from tiny_families import tiny_config
from tiny_models import VOCABULARY, cumulative_lengths, eager_twin, logits_alone, packed, random_documents
from transformers import PreTrainedModel
from transformers.models.nemotron import modeling_nemotron

LENGTHS = (5, 3, 6)
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
IDS = torch.repeat_interleave(torch.tensor([1, 3, 2]), torch.tensor(LENGTHS))[None]


def build(model_class: type[PreTrainedModel]) -> PreTrainedModel:
    torch.manual_seed(1)
    config = tiny_config(model_class.config_class, vocab_size=VOCABULARY)
    model = model_class._from_config(config, attn_implementation="flashmask").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


# Nemotron has an attention of its own in old releases of Transformers.
DROP_LENGTHS = ["StableLm", *(["Nemotron"] if hasattr(modeling_nemotron, "ALL_ATTENTION_FUNCTIONS") else [])]


@torch.no_grad()
@pytest.mark.parametrize("name", DROP_LENGTHS)
def test_lengths_that_layers_drop_are_refused(name: str) -> None:
    model, documents = build(getattr(transformers, f"{name}ForCausalLM")), random_documents(LENGTHS)
    twin, batch = eager_twin(model), packed(documents)
    lengths = {"cu_seq_lens_q": cumulative_lengths(documents), "cu_seq_lens_k": cumulative_lengths(documents)}
    alone = logits_alone(twin, documents)
    torch.testing.assert_close(model(**batch, **lengths, use_cache=False).logits, alone, **TOLERANCE)
    twin(batch["input_ids"], **lengths)  # eager attention is not told either
    twin.set_attn_implementation("flashmask")
    for of_users in (model, twin):
        for positions in ({}, {"position_ids": torch.arange(sum(LENGTHS))[None]}):
            with pytest.raises(NotImplementedError, match="does not reach the attention of"):
                of_users(batch["input_ids"], **lengths, **positions)


@torch.no_grad()
def test_lengths_beside_images_that_get_them_are_refused() -> None:
    model = tiny_vision.build("llava")
    documents = [tiny_vision.with_image_tokens(model.config, document) for document in random_documents((3, 12))]
    call = packed(documents) | tiny_vision.with_image(model.config, documents[1])
    lengths = cumulative_lengths(documents)
    twin = eager_twin(model)
    alone = twin(documents[0]).logits, twin(documents[1], pixel_values=call["pixel_values"]).logits
    torch.testing.assert_close(model(**call).logits, torch.cat(alone, dim=1), **TOLERANCE)
    with pytest.raises(NotImplementedError, match="also reaches the encoder of images of llava"):
        model(**call, cu_seq_lens_q=lengths, cu_seq_lens_k=lengths)
    texts = packed(random_documents((3, 12)))
    assert model(**texts, cu_seq_lens_q=lengths, cu_seq_lens_k=lengths).logits.isfinite().all()


@torch.no_grad()
@pytest.mark.skipif(not hasattr(transformers, "PegasusXForConditionalGeneration"), reason="no Pegasus-X")
def test_ids_are_refused_where_an_encoder_takes_1_alone_for_a_token() -> None:
    model = build(transformers.PegasusXForConditionalGeneration)
    batch = {"input_ids": torch.cat(random_documents(LENGTHS), dim=1), "decoder_input_ids": torch.tensor([[5, 6, 7]])}
    with pytest.raises(NotImplementedError, match="document ids, and pegasus_x computes with the mask"):
        model(**batch, attention_mask=IDS)
    model(**batch, attention_mask=(IDS < 3).long())


def qwen2_5_omni() -> PreTrainedModel:
    model = build(transformers.Qwen2_5OmniThinkerForConditionalGeneration)
    for name in ("vision_start", "vision_end", "audio_start", "audio_end"):
        setattr(model.config, f"{name}_token_id", 0)
    return model


@torch.no_grad()
def test_ids_are_refused_where_they_are_added_up_to_positions() -> None:
    model, documents = qwen2_5_omni(), random_documents(LENGTHS)
    call = {**packed(documents), "use_cache": False}
    positions = call.pop("position_ids")
    ones = torch.ones_like(IDS)
    expected = model(**call, attention_mask=ones, position_ids=torch.arange(sum(LENGTHS))[None]).logits
    torch.testing.assert_close(model(**call, attention_mask=ones).logits, expected, **TOLERANCE)
    alone = logits_alone(eager_twin(model), documents)
    torch.testing.assert_close(model(**call, attention_mask=IDS, position_ids=positions).logits, alone, **TOLERANCE)
    with pytest.raises(NotImplementedError, match="document ids, and qwen2_5_omni_thinker computes with the mask"):
        model(**call, attention_mask=IDS)


@torch.no_grad()
def test_ids_are_refused_where_they_are_added_up_after_a_call_with_images() -> None:
    """Of embeddings, the model takes the positions from the last call with images, and adds the mask up."""
    model, documents = tiny_vision.build("qwen2_vl"), random_documents(LENGTHS)
    tokens, alone = torch.cat(documents, dim=1), logits_alone(eager_twin(model), documents)
    embeddings = model.get_input_embeddings()(tokens)
    for call in ({"input_ids": tokens}, {"inputs_embeds": embeddings}):
        torch.testing.assert_close(model(**call, attention_mask=IDS).logits, alone, **TOLERANCE)
    model.model.rope_deltas = torch.zeros(1, 1, dtype=torch.long)
    torch.testing.assert_close(model(tokens, attention_mask=IDS).logits, alone, **TOLERANCE)
    with pytest.raises(NotImplementedError, match="document ids, and qwen2_vl computes with the mask"):
        model(inputs_embeds=embeddings, attention_mask=IDS)
    model(inputs_embeds=embeddings, attention_mask=torch.ones_like(IDS))
