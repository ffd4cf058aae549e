"""`masks_of` against dense masks written from the definition of each layer type."""

from __future__ import annotations

import pytest
import torch
from tiny_models import VOCABULARY, WINDOW, build, packed, padded, random_documents
from torch import nn

import hf_flashmask
from hf_flashmask.bounds import from_prefix_tree, to_dense


@pytest.mark.parametrize("name", ["gemma3", "llama", "gpt_oss"])
def test_packed_documents_and_windows_of_each_layer_type(name: str) -> None:
    lengths = [7, 5, 9]
    masks = hf_flashmask.masks_of(build(name), packed(random_documents(lengths)))
    document = torch.arange(3).repeat_interleave(torch.tensor(lengths))
    position = torch.arange(sum(lengths))
    full = (document[:, None] == document) & (position[:, None] >= position)
    if name == "llama":
        assert list(masks) == ["LlamaAttention"]
        assert torch.equal(to_dense(masks["LlamaAttention"])[0, 0], full)
        return
    assert set(masks) == {"full_attention", "sliding_attention"}
    assert torch.equal(to_dense(masks["full_attention"])[0, 0], full)
    sliding = full & (position[:, None] - position < WINDOW)
    assert torch.equal(to_dense(masks["sliding_attention"])[0, 0], sliding)


def test_padding_and_bounds_of_the_user() -> None:
    model = build("llama")
    batch = padded(random_documents([4, 6]), "left")
    (mask,) = hf_flashmask.masks_of(model, batch).values()
    expected = batch["attention_mask"].bool()[:, None, None] & torch.ones(6, 6, dtype=torch.bool).tril()
    is_token = batch["attention_mask"].bool()[:, None, :, None]
    assert torch.equal(to_dense(mask).expand_as(expected) & is_token, expected & is_token)
    tree = from_prefix_tree([-1, 0, 0], [3, 2, 2])
    (mask,) = hf_flashmask.masks_of(model, {"input_ids": torch.arange(7)[None], "attention_mask": tree}).values()
    assert torch.equal(to_dense(mask), to_dense(tree))


def test_a_plain_call_has_a_causal_mask_and_nothing_stays_behind() -> None:
    model = build("llama")
    input_ids = torch.randint(VOCABULARY, (2, 5))
    (mask,) = hf_flashmask.masks_of(model, {"input_ids": input_ids}).values()
    assert torch.equal(to_dense(mask)[0, 0], torch.ones(5, 5, dtype=torch.bool).tril())
    with pytest.raises(AttributeError):
        hf_flashmask.masks_of(model, {"inputs_embeds": 3})
    assert hf_flashmask.integration.inspection._inspected.get() is None


def test_a_model_without_flashmask_is_refused() -> None:
    with pytest.raises(ValueError, match="no layer of this model attends with flashmask"):
        hf_flashmask.masks_of(nn.Identity(), {"input": torch.zeros(1)})


def test_random_numbers_stay_as_they_are() -> None:
    model = build("llama").train()
    model.model.layers[0].mlp.register_forward_hook(
        lambda module, _, output: torch.dropout(output, 0.5, module.training)
    )
    state = torch.get_rng_state()
    hf_flashmask.masks_of(model, {"input_ids": torch.arange(5)[None]})
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
