"""Whole models under flashmask against the same models under eager attention on each document alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from random_trees import padded_batch, random_sequences
from tiny_models import (
    MODELS,
    VOCABULARY,
    WINDOW,
    build,
    cumulative_lengths,
    eager_twin,
    logits_alone,
    packed,
    padded,
    random_documents,
)
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from hf_flashmask import bounds
from hf_flashmask.sharing.prefix_tree import from_sequences

LENGTHS = [5, 1, 9, 7, 2]
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def additive(visible: Tensor) -> Tensor:
    """The dense float mask that eager attention adds to its scores."""
    return torch.where(visible, 0.0, torch.finfo(torch.float32).min)


PACKED_CALLS = {
    "training": {"use_cache": False},
    "cache": {"use_cache": True},
    "mask_of_ones": {"attention_mask": torch.ones(1, sum(LENGTHS), dtype=torch.long)},
}


@pytest.mark.parametrize("how", PACKED_CALLS)
@pytest.mark.parametrize("name", MODELS)
def test_packed_logits_equal_each_document_alone(name: str, how: str) -> None:
    model = build(name)
    documents = random_documents(LENGTHS)
    expected = logits_alone(eager_twin(model), documents)
    torch.testing.assert_close(model(**packed(documents), **PACKED_CALLS[how]).logits, expected, **TOLERANCE)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss", "bert"])
def test_documents_from_cu_seq_lens(name: str) -> None:
    model = build(name)
    documents = random_documents(LENGTHS)
    ends = cumulative_lengths(documents)
    lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends.clone(), "max_length_q": 9, "max_length_k": 9}
    expected = logits_alone(eager_twin(model), documents)
    torch.testing.assert_close(model(**packed(documents), **lengths).logits, expected, **TOLERANCE)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss", "bert"])
def test_documents_without_tokens_shift_no_other(name: str) -> None:
    model = build(name)
    documents = random_documents(LENGTHS)
    ends = cumulative_lengths(documents).repeat_interleave(torch.tensor([2, 1, 3, 1, 1, 2]))
    expected = logits_alone(eager_twin(model), documents)
    logits = model(**packed(documents), cu_seq_lens_q=ends, cu_seq_lens_k=ends).logits
    torch.testing.assert_close(logits, expected, **TOLERANCE)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss", "bert"])
def test_rows_of_padding_alone_shift_no_other(name: str, side: str) -> None:
    model = build(name)
    rows: list[list[int]] = [[], [5, 6, 7, 8, 9], [], [5, 3], []]
    input_ids, mask = padded_batch(rows, side)
    logits = model(input_ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    assert logits.isfinite().all()
    for number, row in enumerate(rows):
        if row:
            expected = eager_twin(model)(torch.tensor([row])).logits[0]
            torch.testing.assert_close(logits[number, mask[number] == 1], expected, **TOLERANCE)


def test_cu_seq_lens_need_no_position_ids() -> None:
    # GPT-2 learns its positions, so the row is made of documents whose positions are those of the row.
    model = build("gpt2")
    document = random_documents([13])[0]
    twin = eager_twin(model)
    ends = torch.tensor([0, 6, 13], dtype=torch.int32)
    first, second = document[:, :6], document[:, 6:]
    expected = torch.cat([twin(first).logits, twin(second, position_ids=torch.arange(6, 13)[None]).logits], dim=1)
    torch.testing.assert_close(model(document, cu_seq_lens_q=ends, cu_seq_lens_k=ends).logits, expected, **TOLERANCE)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "bert"])
def test_rows_of_a_batch_hold_different_documents(name: str) -> None:
    model = build(name)
    rows = [random_documents(lengths) for lengths in ([4, 8, 1], [13], [1, 1, 11])]
    batch = {key: torch.cat([packed(row)[key] for row in rows]) for key in ("input_ids", "position_ids")}
    expected = torch.cat([logits_alone(eager_twin(model), row) for row in rows])
    torch.testing.assert_close(model(**batch).logits, expected, **TOLERANCE)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss", "llama4", "bert"])
def test_packed_row_with_padding_at_its_end(name: str) -> None:
    model = build(name)
    documents = random_documents(LENGTHS)
    row = packed([*documents, *[torch.zeros(1, 1, dtype=torch.long)] * 3])
    mask = torch.ones_like(row["input_ids"])
    mask[:, -3:] = 0
    expected = logits_alone(eager_twin(model), documents)
    torch.testing.assert_close(model(**row, attention_mask=mask).logits[:, :-3], expected, **TOLERANCE)


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_packed_gradients_equal_each_document_alone(name: str, use_cache: bool) -> None:
    model = build(name)
    twin = eager_twin(model)
    documents = random_documents(LENGTHS)
    weights = torch.randn(1, sum(LENGTHS), VOCABULARY)
    (model(**packed(documents), use_cache=use_cache).logits * weights).sum().backward()
    (logits_alone(twin, documents) * weights).sum().backward()
    expected = dict(twin.named_parameters())
    largest = max(float(p.grad.abs().max()) for p in twin.parameters() if p.grad is not None)
    assert any("sinks" in parameter for parameter in expected) == (name == "gpt_oss")
    for parameter, value in model.named_parameters():
        reference = expected[parameter].grad
        if reference is None:
            assert value.grad is None, parameter
        else:
            error = (value.grad - reference).abs().max() / reference.abs().max().clamp(min=1e-3 * largest)
            assert error < 2e-5, f"{parameter}: {error}"


@pytest.mark.parametrize("name", ["gpt_oss", "afmoe"])
def test_transformers_own_attention_leaks_where_ours_does_not(name: str) -> None:
    """These models never tell their mask function about `position_ids`."""
    model = build(name)
    twin = eager_twin(model)
    documents = random_documents(LENGTHS)
    expected = logits_alone(twin, documents)
    leaked = (twin(**packed(documents), use_cache=False).logits - expected).abs().max()
    ours = (model(**packed(documents), use_cache=False).logits - expected).abs().max()
    assert leaked > 0.1
    assert ours < 1e-5


@pytest.mark.parametrize("how", PACKED_CALLS)
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss", "bert"])
def test_changing_one_document_leaves_the_others_bitwise_unchanged(name: str, how: str) -> None:
    # An expert multiplies all rows that are sent to it at once, and their number may change how each is rounded.
    one_expert = {"num_local_experts": 1, "num_experts_per_tok": 1} if name == "gpt_oss" else {}
    model = build(name, **one_expert)
    documents = random_documents(LENGTHS)
    before = model(**packed(documents), **PACKED_CALLS[how]).logits
    changed = [*documents]
    changed[2] = (changed[2] + 13) % (VOCABULARY - 1) + 1
    after = model(**packed(changed), **PACKED_CALLS[how]).logits
    start, end = sum(LENGTHS[:2]), sum(LENGTHS[:3])
    assert torch.equal(before[:, :start], after[:, :start])
    assert torch.equal(before[:, end:], after[:, end:])
    assert not torch.equal(before[:, start:end], after[:, start:end])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_padded_logits_equal_each_document_alone(name: str, side: str) -> None:
    model = build(name)
    twin = eager_twin(model)
    documents = random_documents([9, 5, 7, 1])
    batch = padded(documents, side)
    logits = model(**batch).logits
    for row, document in enumerate(documents):
        tokens = batch["attention_mask"][row].bool()
        torch.testing.assert_close(logits[row, tokens], twin(document).logits[0], **TOLERANCE)


@pytest.mark.parametrize("name", ["llama", "qwen3", "deepseek_v3"])
def test_bounds_of_a_prefix_tree_are_final(name: str) -> None:
    """The positions of a tree restart at its branches; they must not be read as documents."""
    model = build(name)
    prompt, *answers = random_documents([6, 4, 5])
    tree = bounds.from_prefix_tree([-1, 0, 0], [6, 4, 5])
    positions = torch.cat([torch.arange(6), torch.arange(6, 10), torch.arange(6, 11)])[None]
    row = {"input_ids": torch.cat([prompt, *answers], dim=1), "position_ids": positions}
    logits = model(**row, attention_mask=tree, use_cache=False).logits
    twin = eager_twin(model)
    branches = [twin(torch.cat([prompt, answer], dim=1)).logits for answer in answers]
    expected = torch.cat([branches[0], branches[1][:, 6:]], dim=1)
    torch.testing.assert_close(logits, expected, **TOLERANCE)
    # Not even when the first tokens of the branches share one position with each other and the last of the prompt.
    torch.testing.assert_close(twin(**row, attention_mask=additive(bounds.to_dense(tree))).logits, logits, **TOLERANCE)


@pytest.mark.parametrize("name", ["gemma2", "llama4", "mistral"])
def test_windows_and_chunks_of_a_user_s_tree_are_counted_along_its_branches(name: str) -> None:
    model = build(name)
    tree = from_sequences(random_sequences(7, 6, VOCABULARY))
    row = {"input_ids": tree.input_ids, "position_ids": tree.position_ids}
    logits = model(**row, attention_mask=tree.bounds, use_cache=False).logits[0]
    twin = eager_twin(model)
    for places in tree.index:
        places = places[places >= 0]
        torch.testing.assert_close(logits[places], twin(tree.input_ids[:, places]).logits[0], **TOLERANCE)


@pytest.mark.parametrize("positions", ["given", "made by the model"])
@pytest.mark.parametrize("what", ["sinks and window", "evictions", "a tree without its positions"])
def test_bounds_of_one_plane_that_are_no_tree_are_final(what: str, positions: str) -> None:
    """A window of the model that is shorter than what they show does not narrow them."""
    model = build("mistral")
    length = 4 * WINDOW + 1
    mask = {
        "sinks and window": bounds.sinks_and_window(2, 2 * WINDOW, length=length),
        "evictions": torch.maximum(torch.randint(length, (length,)), torch.arange(length) + 1).int()[None, None, None],
        "a tree without its positions": bounds.from_prefix_tree([-1, 0, 0], [length - 2 * WINDOW, WINDOW, WINDOW]),
    }[what]
    assert mask.shape[2] == 1
    row = {"input_ids": random_documents([length])[0]}
    if positions == "given":
        row["position_ids"] = torch.arange(length)[None]
    logits = model(**row, attention_mask=mask, use_cache=False).logits
    expected = eager_twin(model)(**row, attention_mask=additive(bounds.to_dense(mask)), use_cache=False).logits
    torch.testing.assert_close(logits, expected, **TOLERANCE)


def test_bounds_of_one_plane_that_are_no_tree_are_refused_for_layers_that_see_different_keys() -> None:
    tokens = random_documents([4 * WINDOW])[0]
    mask = bounds.sinks_and_window(2, 2 * WINDOW, length=4 * WINDOW)
    with pytest.raises(ValueError, match=r"pass a dict .*layer types.*full_attention"):
        build("gemma2")(tokens, attention_mask=mask)


def test_a_tree_is_refused_where_the_mask_is_not_told_the_positions() -> None:
    tree = from_sequences([[1, 2, 3, 4, 5], [1, 2, 3, 6, 7]])
    with pytest.raises(ValueError, match=r"a dict with bounds for each of its layer types.*or, for prefix trees"):
        build("gpt_oss")(tree.input_ids, attention_mask=tree.bounds, position_ids=tree.position_ids, use_cache=False)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_bounds_for_each_layer_type(name: str) -> None:
    model = build(name)
    documents = random_documents([11, 8])
    full = bounds.from_document_ids(torch.tensor([[0] * 11 + [1] * 8]))
    masks = {"full_attention": full, "sliding_attention": bounds.intersect(full, bounds.sliding_window(WINDOW, 19))}
    row = packed(documents)
    logits = model(**row, attention_mask=masks).logits
    torch.testing.assert_close(logits, logits_alone(eager_twin(model), documents), **TOLERANCE)
    dense = {layer_type: additive(bounds.to_dense(mask)) for layer_type, mask in masks.items()}
    torch.testing.assert_close(logits, eager_twin(model)(**row, attention_mask=dense).logits, **TOLERANCE)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "llama4"])
def test_one_tensor_of_bounds_for_different_layers_is_refused(name: str) -> None:
    model = build(name)
    tokens = torch.cat(random_documents([2 * WINDOW]), dim=1)
    with pytest.raises(ValueError, match=r"pass a dict .*layer types.*full_attention"):
        model(tokens, attention_mask=bounds.intersect(bounds.causal(2 * WINDOW), bounds.bidirectional(2 * WINDOW)))
    # Where the window reaches everything nothing is lost.
    short = tokens[:, :WINDOW]
    expected = eager_twin(model)(short).logits
    torch.testing.assert_close(model(short, attention_mask=bounds.causal(WINDOW)).logits, expected, **TOLERANCE)


def test_bounds_of_a_batch_and_of_heads() -> None:
    model = build("llama")
    tokens = torch.cat(random_documents([12] * 3))
    visible = torch.rand(3, 4, 12, 12) < 0.4
    # Few enough intervals for any column, and a row that sees nothing but itself.
    visible |= torch.eye(12, dtype=torch.bool)
    logits = model(tokens, attention_mask=bounds.from_dense(visible)).logits
    torch.testing.assert_close(logits, eager_twin(model)(tokens, attention_mask=additive(visible)).logits, **TOLERANCE)


def test_models_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = build("gemma3")
        row = {"input_ids": torch.ones(1, 9, dtype=torch.long), "position_ids": torch.arange(9)[None]}
    assert model(**row).logits.shape == (1, 9, VOCABULARY)


def test_cross_attention_ignores_the_documents_of_the_decoder() -> None:
    model = build("bert", is_decoder=True, add_cross_attention=True)
    batch = padded(random_documents([9, 4]), "left")
    tokens = batch["attention_mask"].bool()
    for padding in (0, 3):
        encoder_mask = torch.ones(2, 9, dtype=torch.long)
        encoder_mask[0, 9 - padding :] = 0
        encoder = {"encoder_hidden_states": torch.randn(2, 9, 32), "encoder_attention_mask": encoder_mask}
        expected = eager_twin(model)(**batch, **encoder).logits
        torch.testing.assert_close(model(**batch, **encoder).logits[tokens], expected[tokens], **TOLERANCE)


def test_vision_tower_with_cu_seq_lens() -> None:
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

    config = Qwen2VLVisionConfig(depth=2, embed_dim=32, hidden_size=32, num_heads=4, mlp_ratio=2, patch_size=4)
    tower = Qwen2VisionTransformerPretrainedModel._from_config(config, attn_implementation="flashmask").eval()
    grids = torch.tensor([[1, 4, 6], [2, 2, 4]])
    patches = torch.randn(int(grids.prod(-1).sum()), 3 * 2 * 4 * 4)
    output = tower(patches, grid_thw=grids)
    expected = eager_twin(tower)(patches, grid_thw=grids)
    torch.testing.assert_close(output.pooler_output, expected.pooler_output, **TOLERANCE)


def test_float32_norms_in_a_bfloat16_model() -> None:
    """Qwen3's norms of queries and keys are often kept in float32: attention runs in the dtype of its weights."""
    documents = random_documents(LENGTHS)
    model = build("qwen3").to(torch.bfloat16)
    for layer in model.model.layers:
        layer.self_attn.q_norm.float()
        layer.self_attn.k_norm.float()
    expected = logits_alone(eager_twin(build("qwen3")), documents)
    logits = model(**packed(documents)).logits
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), expected, rtol=0.05, atol=0.1)


# Not the models with experts: one rounding error sends a token to another expert.
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma2", "gemma3", "gpt2", "bert"])
def test_autocast_is_as_exact_as_eager_attention(name: str) -> None:
    model = build(name)
    twin = eager_twin(model)
    documents = random_documents([31, 7, 28, 1, 18])
    weights = torch.randn(1, 85, VOCABULARY)

    def computed(logits: Tensor, source: torch.nn.Module) -> dict[str, Tensor]:
        source.zero_grad()
        (logits * weights).sum().backward()
        gradients = {key: value.grad.clone() for key, value in source.named_parameters() if value.grad is not None}
        return {"logits": logits.detach().float(), **gradients}

    truth = computed(logits_alone(twin, documents), twin)
    with torch.autocast("cpu", torch.bfloat16):
        logits, expected = model(**packed(documents), use_cache=False).logits, logits_alone(twin, documents)
    assert logits.dtype == expected.dtype
    ours, eager = computed(logits, model), computed(expected, twin)
    largest = max(float(value.norm()) for value in truth.values())
    for key, exact in truth.items():
        allowed = 1.5 * (eager[key] - exact).norm() + 1e-3 * largest
        assert (ours[key] - exact).norm() <= allowed, key


def test_autocast_computes_attention_in_its_dtype() -> None:
    model = build("llama")
    seen = []
    attention = model.model.layers[0].self_attn
    attention.o_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(**packed(random_documents(LENGTHS)))
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize("checkpointing", [None, "reentrant", "non_reentrant"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_lora_on_packed_documents(name: str, checkpointing: str | None) -> None:
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj"], lora_dropout=0.0, init_lora_weights=False)
    model = get_peft_model(build(name), adapter).train()
    twin = eager_twin(model)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        model.enable_input_require_grads()
        assert any(layer.gradient_checkpointing for layer in model.base_model.model.model.layers)
    documents = random_documents(LENGTHS)
    logits, expected = model(**packed(documents), use_cache=False).logits, logits_alone(twin, documents)
    torch.testing.assert_close(logits, expected, **TOLERANCE)
    weights = torch.randn_like(expected)
    (logits * weights).sum().backward()
    (expected * weights).sum().backward()
    adapters = [(key, value) for key, value in model.named_parameters() if value.requires_grad]
    references = dict(twin.named_parameters())
    assert len(adapters) == 12
    for parameter, value in adapters:
        reference = references[parameter].grad
        error = (value.grad - reference).abs().max() / reference.abs().max()
        assert error < 2e-5, f"{parameter}: {error}"


@pytest.mark.parametrize("placement", ["one_device", "disk"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_device_map(name: str, placement: str, tmp_path: Path) -> None:
    """With half of the layers on the disk, the hooks of accelerate bring weights and copy what the layers are given."""
    source = build(name)
    source.save_pretrained(tmp_path)
    twin = eager_twin(source)
    device_map = {"": "cpu"}
    if placement == "disk":
        parts = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "disk", "lm_head": "cpu"}
        device_map = {**parts, "model.layers.0": "cpu", "model.layers.1": "disk"}
    model = type(source).from_pretrained(
        tmp_path, attn_implementation="flashmask", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    where = "meta" if placement == "disk" else "cpu"
    assert model.model.layers[1].self_attn.q_proj.weight.device.type == where
    documents = random_documents(LENGTHS)
    with torch.no_grad():
        logits = model(**packed(documents), use_cache=False).logits
    torch.testing.assert_close(logits, logits_alone(twin, documents), **TOLERANCE)
    batch = padded(random_documents([9, 3, 7]), "left")
    del batch["position_ids"]
    greedy = {"max_new_tokens": 2 * WINDOW, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**batch, **greedy), twin.generate(**batch, **greedy))


def tiny_t5gemma() -> transformers.PreTrainedModel:
    part = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 64,
        "layer_types": ["full_attention", "full_attention"],
        "query_pre_attn_scalar": 8,
    }
    config = transformers.T5GemmaConfig(encoder=part, decoder={**part, "cross_attention_hidden_size": 32})
    torch.manual_seed(1)
    model = transformers.T5GemmaForConditionalGeneration._from_config(config, attn_implementation="flashmask").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def pairs_alone(model: transformers.PreTrainedModel, texts: list[Tensor], targets: list[Tensor]) -> Tensor:
    twin = eager_twin(model)
    logits = [twin(input_ids=text, decoder_input_ids=target).logits for text, target in zip(texts, targets)]
    return torch.cat(logits, dim=1)


def test_cu_seq_lens_keep_the_documents_of_an_encoder_and_its_decoder_apart() -> None:
    model = tiny_t5gemma()
    texts, targets = random_documents(LENGTHS), random_documents(LENGTHS)
    row = {"input_ids": torch.cat(texts, 1), "decoder_input_ids": torch.cat(targets, 1)}
    logits = model(**row, cu_seq_lens_q=cumulative_lengths(texts)).logits
    torch.testing.assert_close(logits, pairs_alone(model, texts, targets), **TOLERANCE)


def test_bounds_that_are_right_for_an_encoder_and_its_decoder() -> None:
    model = tiny_t5gemma()
    texts, targets = random_documents(LENGTHS), random_documents(LENGTHS)
    ends, length = cumulative_lengths(texts), sum(LENGTHS)
    mask = bounds.from_cu_seqlens(ends, length, is_causal=False)
    row = {"input_ids": torch.cat(texts, 1), "decoder_input_ids": torch.cat(targets, 1)}
    causal = bounds.from_cu_seqlens(ends, length)
    logits = model(**row, attention_mask=mask, decoder_attention_mask=causal).logits
    torch.testing.assert_close(logits, pairs_alone(model, texts, targets), **TOLERANCE)


def test_lengths_of_keys_that_differ_are_refused_in_cross_attention() -> None:
    row = {"input_ids": torch.ones(1, 8, dtype=torch.long), "decoder_input_ids": torch.ones(1, 8, dtype=torch.long)}
    for of_keys in ([0, 5, 8], [0, 8]):
        lengths = {"cu_seq_lens_q": torch.tensor([0, 3, 8]), "cu_seq_lens_k": torch.tensor(of_keys)}
        with pytest.raises((NotImplementedError, ValueError), match="cu_seq"):
            tiny_t5gemma()(**row, **lengths)


def test_documents_of_other_lengths_in_the_decoder_need_bounds_of_their_own() -> None:
    model = tiny_t5gemma()
    texts, targets = random_documents(LENGTHS), random_documents([3, 2, 4, 1, 6])
    row = {"input_ids": torch.cat(texts, 1), "decoder_input_ids": torch.cat(targets, 1)}
    of_encoder, of_decoder = cumulative_lengths(texts), cumulative_lengths(targets)
    text_length, target_length = sum(LENGTHS), int(of_decoder[-1])
    with pytest.raises(NotImplementedError, match="which of them belong together is not known"):
        model(**row, cu_seq_lens_q=of_encoder)
    within = bounds.from_cu_seqlens(of_encoder, text_length, is_causal=False)
    causal = bounds.from_cu_seqlens(of_decoder, target_length)
    with pytest.raises(ValueError, match="bounds of the encoder"):
        model(**row, attention_mask=within, decoder_attention_mask=causal)
    between = bounds.from_cu_seqlens(
        of_decoder, target_length, cu_seqlens_k=of_encoder, kv_len=text_length, is_causal=False
    )
    del row["input_ids"]
    encoded = model.model.encoder(torch.cat(texts, 1), attention_mask=within)
    logits = model(**row, encoder_outputs=encoded, attention_mask=between, decoder_attention_mask=causal).logits
    torch.testing.assert_close(logits, pairs_alone(model, texts, targets), **TOLERANCE)


@pytest.mark.parametrize("kind", ["BlockMask", "function"])
def test_masks_of_flex_attention_are_refused_with_the_way_out(kind: str) -> None:
    def causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    mask = create_block_mask(causal, None, None, 16, 16, device="cpu") if kind == "BlockMask" else causal
    with pytest.raises(TypeError, match=rf"`attention_mask` is a {kind}, .* bounds\.from_mask_mod"):
        build("llama")(torch.ones(1, 16, dtype=torch.long), attention_mask=mask)
    with pytest.raises(TypeError, match=r"bounds\.from_mask_mod"):  # past the mask function
        build("gemma2")(
            torch.ones(1, 16, dtype=torch.long),
            attention_mask=dict.fromkeys(("full_attention", "sliding_attention"), mask),
        )
