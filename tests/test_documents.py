"""2-D masks whose values are ids of documents, against each document alone under eager attention."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
import transformers
from tiny_models import VOCABULARY, build, eager_twin, logits_alone
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

import hf_flashmask

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
# 0 is padding, on either side and between tokens. An id may come back, and need not be the next number.
ROWS = [
    [0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 2, 3, 4, 4, 4, 4, 4, 0, 0],
    [7, 7, 0, 7, 7, 0, 3, 0, 3, 3, 3, 3, 3, 7, 7, 7, 7, 7, 7],
    [0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 0, 0],
]
DECODERS = ["llama", "mistral", "gemma2", "gpt_oss", "llama4", "gpt2"]
ENCODERS = ["modernbert", "bert"]


def model_of(name: str) -> PreTrainedModel:
    if name != "modernbert":
        return build(name)
    torch.manual_seed(1)
    config = transformers.ModernBertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        local_attention=6,
        global_attn_every_n_layers=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
        initializer_range=0.3,
        initializer_cutoff_factor=2.0,
        reference_compile=False,
    )
    model = transformers.ModernBertForMaskedLM._from_config(config, attn_implementation="flashmask").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def random_mask(length: int = 19) -> Tensor:
    """Random ids in every second row, a mask of 0 and 1 in the others."""
    ids = torch.randint(0, 4, (4, length)).repeat_interleave(torch.randint(1, 4, (length,)), dim=1)[:, :length]
    ids[1::2] = ids[1::2].clamp(max=1)
    ids[:, length // 2] = 1  # every row has a token
    return ids


def documents_of(row: Tensor) -> Iterator[Tensor]:
    """The columns of the tokens of each document, by the definition."""
    columns: list[int] = []
    for column in row.double().nonzero().flatten().tolist():
        if columns and row[column] != row[columns[-1]]:
            yield torch.tensor(columns)
            columns = []
        columns.append(column)
    yield torch.tensor(columns)


def batch_of(mask: Tensor) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(1, VOCABULARY, mask.shape), "attention_mask": mask}


def with_positions(name: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The columns as positions, which tell no documents apart. ModernBERT takes none that are packed."""
    columns = torch.arange(batch["input_ids"].shape[1])[None]
    return batch if name == "modernbert" else {**batch, "position_ids": columns}


def check_documents(name: str, twin: PreTrainedModel, batch: dict[str, Tensor], logits: Tensor) -> None:
    for row, ids in enumerate(batch["attention_mask"]):
        for columns in documents_of(ids):
            place = slice(int(columns[0]), int(columns[-1]) + 1)
            alone = {
                "input_ids": batch["input_ids"][row, None, place],
                "attention_mask": (ids[place] != 0).long()[None],
            }
            if name != "modernbert":
                alone["position_ids"] = torch.arange(place.start, place.stop)[None]
            expected = twin(**alone).logits[0, columns - columns[0]]
            torch.testing.assert_close(logits[row, columns], expected, **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.uint16])
def test_documents_do_not_see_each_other(dtype: torch.dtype) -> None:
    model = model_of("llama")
    batch = with_positions("llama", batch_of(torch.tensor(ROWS, dtype=dtype)))
    check_documents("llama", eager_twin(model), batch, model(**batch).logits)


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_every_kind_of_mask_keeps_documents_apart(name: str) -> None:
    model = model_of(name)
    twin = eager_twin(model)
    for mask in (torch.tensor(ROWS), random_mask(), random_mask(33)):
        batch = with_positions(name, batch_of(mask))
        for options in ({"use_cache": False}, {}) if name in DECODERS else ({},):
            check_documents(name, twin, batch, model(**batch, **options).logits)


@pytest.mark.parametrize("name", ["llama", "modernbert"])
def test_without_positions(name: str) -> None:
    """Models with rotary embeddings see distances alone."""
    model = model_of(name)
    batch = batch_of(torch.tensor(ROWS))
    check_documents(name, eager_twin(model), batch, model(**batch).logits)


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_a_mask_of_0_and_1_hides_what_it_hides_as_bool(name: str) -> None:
    """Rows of padding see the same too."""
    model = model_of(name)
    mask = random_mask(21).clamp(max=1)
    batch = with_positions(name, batch_of(mask))
    kinds = hf_flashmask.masks_of(model, {**batch, "attention_mask": mask.bool()})
    for kind, expected in kinds.items():
        found = hf_flashmask.masks_of(model, batch)[kind]
        assert torch.equal(
            *(hf_flashmask.bounds.to_dense(part, 21).expand(4, -1, -1, -1) for part in (found, expected))
        )


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "bert"])
@pytest.mark.parametrize("lengths", [None, [4, 9, 6]])
def test_documents_of_positions_and_lengths_are_apart_as_well(name: str, lengths: list[int] | None) -> None:
    model = model_of(name)
    ids = torch.tensor([[1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3]])
    batch = batch_of(ids)
    of_both = torch.tensor([[1, 1, 1, 1, 2, 3, 3, 3, 3, 3, 3, 3, 3, 4, 4, 4, 4, 4, 4]])
    if lengths is None:
        batch["position_ids"] = torch.tensor([[*range(4), *range(9), *range(6)]])
    else:
        ends = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
        batch |= {"position_ids": torch.arange(19)[None], "cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
    logits = model(**batch).logits
    for columns in documents_of(of_both[0]):
        alone = {"input_ids": batch["input_ids"][:, columns], "position_ids": batch["position_ids"][:, columns]}
        expected = eager_twin(model)(**alone).logits
        torch.testing.assert_close(logits[:, columns], expected, **TOLERANCE)


@pytest.mark.parametrize("name", ["llama", "modernbert"])
def test_compiled_without_graph_breaks(name: str) -> None:
    torch._dynamo.reset()
    model = model_of(name)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    batch = with_positions(name, batch_of(torch.tensor(ROWS)))
    options = {"use_cache": False} if name == "llama" else {}
    check_documents(name, eager_twin(model), batch, compiled(**batch, **options).logits)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradients_under_checkpointing(use_reentrant: bool) -> None:
    model = model_of("mistral").train()
    twin = eager_twin(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    batch = with_positions("mistral", batch_of(torch.tensor(ROWS)))
    weights = torch.randn(*batch["input_ids"].shape, VOCABULARY) * (batch["attention_mask"] != 0)[..., None]
    (model(**batch, use_cache=False).logits * weights).sum().backward()
    for row, ids in enumerate(batch["attention_mask"]):
        for columns in documents_of(ids):
            place = slice(int(columns[0]), int(columns[-1]) + 1)
            alone = {name: part[row, None, place] for name, part in batch.items() if name == "input_ids"}
            alone["position_ids"] = torch.arange(place.start, place.stop)[None]
            alone["attention_mask"] = (ids[place] != 0).long()[None]
            (twin(**alone, use_cache=False).logits * weights[row, None, place]).sum().backward()
    largest = max(float(parameter.grad.abs().max()) for parameter in twin.parameters())
    for ours, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-3, atol=1e-5 * largest)


# Beside a cache


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss", "llama4"])
def test_new_tokens_see_the_cached_ones_of_their_document(name: str, new: int) -> None:
    """The queries are the last columns of the mask. A document may begin among them, and a row may be padded."""
    model = model_of(name)
    ends = {1: [[4], [2], [1]], 3: [[4, 5, 5], [2, 2, 2], [1, 1, 1]]}[new]
    mask = torch.cat([torch.tensor(ROWS)[:, :17], torch.tensor(ends)], dim=1)
    mask[1, 13:17] = 2
    batch = with_positions(name, batch_of(mask))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        past = {key: part[:, :17] for key, part in batch.items()}
        first = model(**past, past_key_values=cache).logits
        rest = {key: part[:, 17:] for key, part in batch.items()} | {"attention_mask": mask}
        second = model(**rest, past_key_values=cache).logits
        check_documents(name, eager_twin(model), batch, torch.cat([first, second], dim=1))


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("positions", [None, "columns", "restarting"])
@pytest.mark.parametrize("lengths", [[2, 5, 1, 3], [4, 4, 3], [9, 2]])
def test_chunks_start_with_each_document_of_lengths(
    lengths: list[int], positions: str | None, is_compiled: bool
) -> None:
    """Chunks of 4 tokens. The mask function is not told the lengths."""
    model = build("llama4")
    documents = [torch.randint(1, VOCABULARY, (1, length)) for length in lengths]
    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    batch = {"input_ids": torch.cat(documents, dim=1), "cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
    if positions == "columns":
        batch["position_ids"] = torch.arange(sum(lengths))[None]
    elif positions == "restarting":
        batch["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
    alone = logits_alone(eager_twin(model), documents)
    if is_compiled:
        torch._dynamo.reset()
        model = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(model(**batch, use_cache=False).logits, alone, **TOLERANCE)


def test_compiled_chunks_start_with_each_document_beside_a_cache() -> None:
    """By ids, and by positions: a document that starts below those of the call is alone."""
    torch._dynamo.reset()
    model = build("llama4", num_hidden_layers=1, layer_types=["chunked_attention"])
    compiled = torch.compile(model, backend="eager", dynamic=True)
    ids = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2], [1] * 9 + [2] * 6])
    columns_as_positions = torch.arange(15).expand(2, -1)
    for mask, positions in (
        (ids, columns_as_positions),
        (ids.clamp(max=1), columns_as_positions - 8 * (ids == 2)),
    ):
        tokens, cache = torch.randint(1, VOCABULARY, ids.shape), DynamicCache(config=model.config)
        pieces = []
        with torch.no_grad():
            for called, new in ((model, slice(0, 5)), (compiled, slice(5, 15))):
                part = {"position_ids": positions[:, new], "attention_mask": mask[:, : new.stop]}
                pieces.append(called(tokens[:, new], **part, past_key_values=cache).logits)
        logits = torch.cat(pieces, dim=1)
        for row in range(2):
            for columns in documents_of(ids[row]):
                expected = eager_twin(model)(tokens[row, None, columns], position_ids=positions[row, None, columns])
                torch.testing.assert_close(logits[row, None, columns], expected.logits, **TOLERANCE)


@pytest.mark.parametrize("ids", [[1, 1, 2, 2], [2, 2, 2, 2], [3, 3, 1, 1]])
@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": False}, {"num_beams": 2}, {"max_new_tokens": 1}, {"cache_implementation": "static"}],
)
def test_generate_refuses_ids(ids: list[int], options: dict[str, Any]) -> None:
    """It would append 1, and count positions by adding the ids up."""
    call = batch_of(torch.tensor([ids])) | {"max_new_tokens": 3, "do_sample": False} | options
    with pytest.raises(NotImplementedError, match="generate appends 1 to it"):
        model_of("llama").generate(**call)


def test_a_new_token_of_id_1_after_another_id_is_refused() -> None:
    """As loops like that of `generate` append it."""
    model, mask = model_of("llama"), torch.tensor([[0, 1, 1, 2, 2, 1]])
    batch, cache = batch_of(mask), DynamicCache()
    model(input_ids=batch["input_ids"][:, :5], attention_mask=mask[:, :5], past_key_values=cache)
    with pytest.raises(NotImplementedError, match="append the id of the document that goes on"):
        model(input_ids=batch["input_ids"][:, 5:], attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize("new", [1, 3])
def test_negative_ids_beside_a_static_cache_are_refused(new: int) -> None:
    """They are ids as well: a static cache would take them for one document."""
    model = model_of("llama")
    ids = torch.tensor([[1, 1, 1, 1, -1, -1, -1, -1, -1]])
    cache = StaticCache(config=model.config, max_cache_len=16)
    model(torch.randint(1, VOCABULARY, (1, 9 - new)), past_key_values=cache)
    with pytest.raises(NotImplementedError, match="do not work beside a static cache"):
        model(torch.randint(1, VOCABULARY, (1, new)), attention_mask=ids, past_key_values=cache)


def test_generation_of_one_document_in_each_row_goes_on() -> None:
    model = model_of("mistral")
    batch = batch_of(torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]))
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(**batch, **options), eager_twin(model).generate(**batch, **options))


# Masks of floats


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_of_floats_hold_0_and_1_only(dtype: torch.dtype) -> None:
    model, mask = model_of("llama"), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    batch = batch_of(mask)
    expected = model(**batch).logits
    torch.testing.assert_close(model(**batch | {"attention_mask": mask.to(dtype)}).logits, expected)
    for other in (2 * mask, mask / 2, (1 - mask) * -1e4):
        with pytest.raises(NotImplementedError, match="is of floats and holds more than 0 and 1"):
            model(**batch | {"attention_mask": other.to(dtype)})


@pytest.mark.parametrize("config", [peft.PromptTuningConfig, peft.PrefixTuningConfig])
def test_virtual_tokens_are_not_given_to_one_document(config: Any) -> None:
    """Prompt learning puts ones before the ids. Without ids it is as under eager attention."""
    model = peft.get_peft_model(model_of("llama"), config(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    batch = batch_of(torch.tensor([[1, 1, 1, 2, 2]]))
    with pytest.raises(NotImplementedError, match="gives the virtual tokens to one document alone"):
        model(**batch)
    batch["attention_mask"].clamp_(max=1)
    twin = copy.deepcopy(model)
    twin.base_model.set_attn_implementation("eager")
    torch.testing.assert_close(model(**batch).logits, twin(**batch).logits, **TOLERANCE)


# Models that take the mask for factors


def test_models_that_multiply_states_by_the_mask_refuse_ids() -> None:
    """Recurrent layers, and the embeddings of ESM. Masks of 0 and 1 remain."""
    small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": VOCABULARY}
    hybrid = transformers.Qwen3NextConfig(
        **small,
        num_hidden_layers=2,
        num_key_value_heads=2,
        head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )
    proteins = transformers.EsmConfig(
        **small, num_hidden_layers=1, pad_token_id=0, mask_token_id=1, position_embedding_type="rotary"
    )
    positions = transformers.OPTConfig(**small, num_hidden_layers=1, ffn_dim=32, word_embed_proj_dim=32)
    for model_class, config in (
        (transformers.Qwen3NextForCausalLM, hybrid),
        (transformers.EsmForMaskedLM, proteins),
        (transformers.OPTForCausalLM, positions),
    ):
        model = model_class._from_config(config, attn_implementation="flashmask").eval()
        batch = batch_of(torch.tensor([[1, 1, 1, 2, 2, 2, 0], [1] * 7]))
        with pytest.raises(NotImplementedError, match="computes with the mask"):
            model(**batch)
        batch["attention_mask"].clamp_(max=1)
        torch.testing.assert_close(model(**batch).logits[0, :6], eager_twin(model)(**batch).logits[0, :6], **TOLERANCE)


def test_ids_are_not_taken_for_the_weights_of_tokens_in_router_losses() -> None:
    model = model_of("gpt_oss")
    batch = batch_of(torch.tensor([[1, 1, 1, 2, 2, 2, 0], [1] * 7])) | {"output_router_logits": True}
    batch["position_ids"] = torch.arange(7)[None]
    with pytest.raises(NotImplementedError, match="would weigh tokens by them in the auxiliary loss"):
        model(**batch)
    assert model(**batch | {"output_router_logits": False}).logits.isfinite().all()
    batch["attention_mask"].clamp_(max=1)
    torch.testing.assert_close(model(**batch).aux_loss, eager_twin(model)(**batch).aux_loss)


# Encoder and decoder


def test_cross_attention_sees_all_documents_of_the_encoder() -> None:
    """The ids of the encoder name no documents of the decoder."""
    torch.manual_seed(2)
    config = transformers.BartConfig(
        vocab_size=VOCABULARY,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        init_std=0.5,
    )
    model = transformers.BartModel._from_config(config, attn_implementation="flashmask").eval()
    batch = batch_of(torch.tensor([[1, 1, 1, 2, 2, 0, 0]]))
    decoder_input_ids = torch.randint(3, VOCABULARY, (1, 7))
    output = model(**batch, decoder_input_ids=decoder_input_ids)
    states = [
        model.encoder(input_ids=batch["input_ids"][:, :3]).last_hidden_state,
        output.encoder_last_hidden_state[:, 3:5],
    ]
    torch.testing.assert_close(output.encoder_last_hidden_state[:, :3], states[0], **TOLERANCE)
    expected = eager_twin(model)(encoder_outputs=(torch.cat(states, 1),), decoder_input_ids=decoder_input_ids)
    torch.testing.assert_close(output.last_hidden_state, expected.last_hidden_state, **TOLERANCE)
