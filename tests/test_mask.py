"""How what a mask knows travels through Transformers and through the engines around it: nothing is lost on the way."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from inspect import signature
from typing import Any

import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from random_trees import random_sequences
from tiny_models import build, cumulative_lengths, eager_twin, logits_alone, packed, padded, random_documents
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, StaticCache, masking_utils

from hf_flashmask import bounds
from hf_flashmask.bounds.trees import depth_in_prefix_trees
from hf_flashmask.integration import Mask, flashmask_attention_forward, flashmask_mask
from hf_flashmask.integration.mask import Hints, Place, register_tree
from hf_flashmask.sharing.prefix_tree import from_sequences

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
LENGTHS = [5, 1, 9]
# A mask function that is told about documents, one that is not, one that is bidirectional, layers of two kinds.
KINDS = ["llama", "gpt_oss", "bert", "gemma3"]


def mask_of_documents(**changes: Any) -> Mask:
    arguments = {"batch_size": 1, "q_length": 6, "kv_length": 6, "mask_function": masking_utils.causal_mask_function}
    ends = torch.tensor([[2, 2, 6, 6, 6, 6]], dtype=torch.int32)
    is_token = torch.tensor([[True] * 5 + [False]])
    hints = Hints((1, 6), torch.device("cpu"), is_token=is_token, document_ends=ends)
    return flashmask_mask(**arguments, attention_mask=hints, **changes)


# What Transformers asks of a mask


def test_it_answers_as_a_mask_of_four_dimensions() -> None:
    mask = mask_of_documents()
    assert (mask.ndim, mask.dtype, tuple(mask.shape), mask.device.type) == (4, torch.int32, (1, 1, 1, 6), "cpu")
    assert mask.contiguous() is mask
    assert mask.to(torch.float16) is mask
    assert mask.to("cpu", non_blocking=True) is mask
    with pytest.raises(TypeError, match="slices its mask as if it were dense"):
        mask[:, :, :, :3]


def test_pickled_and_copied_masks_know_what_they_knew() -> None:
    mask = mask_of_documents()
    buffer = io.BytesIO()
    torch.save(mask, buffer)
    buffer.seek(0)
    for twin in (pickle.loads(pickle.dumps(mask)), copy.deepcopy(mask), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin.bounds, mask.bounds)
        assert torch.equal(twin.is_token, mask.is_token)
        assert (twin.has_documents, twin.is_final, twin.place) == (True, False, Place(6, 6))
        assert twin.memo is not mask.memo


def test_a_device_gets_one_copy() -> None:
    mask = mask_of_documents()
    moved = mask.to("meta")
    assert moved is mask.to(torch.device("meta"))
    assert moved.bounds.device.type == moved.is_token.device.type == "meta"
    assert (moved.has_documents, moved.place) == (True, mask.place)
    query = torch.randn(1, 2, 6, 8)
    with pytest.raises(ValueError, match=r"`attention_mask` is on meta, the queries are on cpu"):
        flashmask_attention_forward(nn.Module(), query, query, query, moved)


def test_hints_answer_as_a_mask_of_two_dimensions() -> None:
    """The creator of chunked masks counts left padding, where documents are not known."""
    is_token = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]]).bool()
    hints = Hints((2, 4), torch.device("cpu"), is_token=is_token, position_ids=torch.arange(4)[None])
    assert (hints.ndim, tuple(hints.shape)) == (2, (2, 4))
    assert (hints.cumsum(dim=-1) == torch.zeros_like(hints)).sum(-1).tolist() == [2, 0]
    known = Hints((2, 4), torch.device("cpu"), document_ends=torch.full((2, 4), 4))
    assert (known.cumsum(dim=-1) == torch.zeros_like(known)).sum(-1).tolist() == [0, 0]
    with pytest.raises(TypeError, match="hints of a mask"):
        torch.ones_like(hints)


# Through engines


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_checkpointing(name: str, use_reentrant: bool) -> None:
    """Two forward passes with other documents, then the backward passes of both."""
    model, documents = build(name).train(), [random_documents(LENGTHS), random_documents([8, 7])]
    twin = eager_twin(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    no_cache = {} if name == "bert" else {"use_cache": False}
    weights = torch.randn(1, 15, 97)
    logits = [model(**packed(some), **no_cache).logits for some in documents]
    for ours, some in zip(logits, documents):
        expected = logits_alone(twin, some)
        torch.testing.assert_close(ours, expected, **TOLERANCE)
        (expected * weights).sum().backward()
    sum((ours * weights).sum() for ours in reversed(logits)).backward()
    largest = max(float(parameter.grad.abs().max()) for parameter in twin.parameters() if parameter.grad is not None)
    for ours, expected in zip(model.parameters(), twin.parameters(), strict=True):
        if expected.grad is not None:
            torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-3, atol=1e-5 * largest)


class CopyInputs:
    """A forward pre-hook that gives a layer copies of all tensors, as device maps and engines of shards do."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return torch.utils._pytree.tree_map_only(Tensor, torch.clone, (args, kwargs))


@pytest.mark.parametrize("name", KINDS)
def test_engines_that_copy_the_inputs_of_each_layer(name: str) -> None:
    model, documents = build(name), random_documents(LENGTHS)
    for module in model.modules():
        if type(module).__name__.endswith(("DecoderLayer", "BertLayer")):
            module.register_forward_pre_hook(CopyInputs(), with_kwargs=True)
    no_cache = {} if name == "bert" else {"use_cache": False}
    torch.testing.assert_close(
        model(**packed(documents), **no_cache).logits, logits_alone(eager_twin(build(name)), documents), **TOLERANCE
    )


@pytest.mark.parametrize("name", KINDS)
def test_device_hooks_of_accelerate(name: str) -> None:
    model, documents = build(name), random_documents(LENGTHS)
    for module in list(model.modules()):
        if type(module).__name__.endswith(("DecoderLayer", "BertLayer")):
            add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    torch.testing.assert_close(
        model(**packed(documents)).logits, logits_alone(eager_twin(build(name)), documents), **TOLERANCE
    )


@pytest.mark.parametrize("name", KINDS)
def test_threads_and_failures_do_not_disturb_each_other(name: str) -> None:
    model = build(name)
    twin = eager_twin(model)
    packings = [random_documents(lengths) for lengths in (LENGTHS, [15], [7, 8], [1] * 15)]
    expected = [logits_alone(twin, documents) for documents in packings]
    outputs: list[Tensor | None] = [None] * len(packings)
    handle = model.get_input_embeddings().register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**packed(packings[0]))
    handle.remove()

    def compute(index: int) -> None:
        with torch.no_grad():
            for _ in range(3):
                outputs[index] = model(**packed(packings[index])).logits

    threads = [threading.Thread(target=compute, args=(index,)) for index in range(len(packings))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, theirs in zip(outputs, expected):
        torch.testing.assert_close(ours, theirs, **TOLERANCE)


def test_layers_called_directly() -> None:
    model, documents = build("llama"), random_documents(LENGTHS)
    row = packed(documents)
    hidden = model.model.embed_tokens(row["input_ids"])
    cache = "cache" if "cache" in signature(masking_utils.create_causal_mask).parameters else "past_key_values"
    call = {"attention_mask": None, cache: None, "position_ids": row["position_ids"]}
    mask = masking_utils.create_causal_mask(config=model.config, inputs_embeds=hidden, **call)
    angles = model.model.rotary_emb(hidden, row["position_ids"])
    for layer in model.model.layers:
        hidden = checkpoint(layer, hidden, attention_mask=mask, position_embeddings=angles, use_reentrant=False)
    logits = model.lm_head(model.model.norm(hidden))
    torch.testing.assert_close(logits, logits_alone(eager_twin(model), documents), **TOLERANCE)


def test_masks_made_before_are_good_for_many_calls() -> None:
    """A dict of masks, whose memo must not outlive the call: positions that the mask function is not told about."""
    model, first, second = build("gpt_oss"), random_documents([4, 11]), random_documents([10, 5])
    twin = eager_twin(model)
    embeds = torch.zeros(1, 15, 32)
    masks = masking_utils.create_masks_for_generate(model.config, embeds, None, None, position_ids=None)
    position_ids = torch.zeros(1, 15, dtype=torch.long)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        for documents in (first, second, first):
            row = packed(documents)
            position_ids.numpy()[:] = row["position_ids"].numpy()
            with mode():
                call = {"attention_mask": masks, "position_ids": position_ids, "use_cache": False}
                logits = model(row["input_ids"], **call).logits
                torch.testing.assert_close(logits, logits_alone(twin, documents), **TOLERANCE)


def test_an_exported_program_takes_bounds_of_the_user() -> None:
    model, documents = build("llama"), random_documents(LENGTHS)
    row = packed(documents)
    mask = bounds.from_position_ids(row["position_ids"])
    call = {"input_ids": row["input_ids"], "attention_mask": mask, "use_cache": False}
    program = torch.export.export(model, (), call)
    torch.testing.assert_close(program.module()(**call).logits, logits_alone(eager_twin(model), documents), **TOLERANCE)
    call["attention_mask"] = bounds.causal(15)
    torch.testing.assert_close(program.module()(**call).logits, eager_twin(model)(row["input_ids"]).logits, **TOLERANCE)


def test_a_tree_keeps_its_windows_through_a_copy() -> None:
    model, input_ids = build("mistral"), torch.arange(1, 13)[None]
    mask = bounds.from_prefix_tree([-1, 0, 0], [5, 4, 3])
    depth = torch.tensor([[*range(9), 5, 6, 7]])
    expected = model(input_ids, position_ids=depth, attention_mask=mask, use_cache=False).logits
    branches = [input_ids[:, :9], torch.cat([input_ids[:, :5], input_ids[:, 9:]], 1)]
    alone = [eager_twin(model)(branch).logits for branch in branches]
    torch.testing.assert_close(expected, torch.cat([alone[0], alone[1][:, 5:]], 1), **TOLERANCE)
    from hf_flashmask.integration.mask import Tree

    tree = pickle.loads(pickle.dumps(register_tree(Tree(mask, depth))))
    torch.testing.assert_close(
        model.model(input_ids, position_ids=depth, attention_mask=tree, use_cache=False).last_hidden_state,
        model.model(input_ids, position_ids=depth, attention_mask=mask, use_cache=False).last_hidden_state,
    )


# Documents beside a cache


CACHES: dict[str, Callable[..., Any]] = {
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config, max_cache_len=32),
}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss", "llama4"])
def test_documents_that_fill_a_new_cache(name: str, cache: str) -> None:
    model, documents = build(name), random_documents([5, 1, 8])
    logits = model(**packed(documents), past_key_values=CACHES[cache](model.config), use_cache=True).logits
    torch.testing.assert_close(logits, logits_alone(eager_twin(model), documents), **TOLERANCE)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "afmoe"])
@pytest.mark.parametrize("has_mask", [False, True])
def test_documents_behind_a_continuation(name: str, cache: str, has_mask: bool) -> None:
    """A static cache has counted the tokens of the call when the first layer makes bounds of the documents."""
    model, documents = build(name), random_documents([10, 1, 4])
    row, filled, parts = packed(documents), CACHES[cache](model.config), []
    for part in (slice(0, 3), slice(3, 15)):
        call = {key: tensor[:, part] for key, tensor in row.items()}
        if has_mask:
            call["attention_mask"] = torch.ones(1, part.stop, dtype=torch.long)
        parts.append(model(**call, past_key_values=filled, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(parts, 1), logits_alone(eager_twin(model), documents), **TOLERANCE)


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "afmoe"])
@pytest.mark.parametrize("how", ["position_ids", "cu_seq_lens_q"])
def test_documents_that_fill_a_static_cache_again(name: str, how: str) -> None:
    model, documents = build(name), random_documents([5, 1, 8])
    row, filled = packed(documents), StaticCache(model.config, max_cache_len=32)
    if how == "cu_seq_lens_q":
        row["cu_seq_lens_q"] = cumulative_lengths(documents)
    for _ in range(2):
        with torch.no_grad():
            logits = model(**row, past_key_values=filled, use_cache=True).logits
        torch.testing.assert_close(logits, logits_alone(eager_twin(model), documents), **TOLERANCE)
        filled.reset()


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_several_continuations_of_a_cached_prefix(name: str, cache: str) -> None:
    """Behind them documents of their own, which do not see the prefix."""
    model, prefix = build(name), random_documents([4])[0]
    twin = eager_twin(model)
    continuations, others = random_documents([3, 1, 5]), random_documents([6, 2])
    filled = CACHES[cache](model.config)
    model(prefix, past_key_values=filled, use_cache=True)
    positions = [torch.arange(4, 4 + part.shape[1]) for part in continuations]
    positions += [torch.arange(part.shape[1]) for part in others]
    logits = model(
        torch.cat([*continuations, *others], 1),
        position_ids=torch.cat(positions)[None],
        past_key_values=filled,
        use_cache=True,
    ).logits
    expected = [twin(torch.cat([prefix, part], 1)).logits[:, 4:] for part in continuations]
    torch.testing.assert_close(logits, torch.cat([*expected, logits_alone(twin, others)], 1), **TOLERANCE)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "llama4", "llama"])
def test_continuations_that_a_cache_cannot_hold_are_refused(name: str, cache: str) -> None:
    model = build(name)
    filled = CACHES[cache](model.config)
    model(random_documents([6])[0], past_key_values=filled, use_cache=True)
    parts = [(6, 8), (0, 9), (6, 8)] if name == "llama" else [(6, 8), (6, 8)]
    positions = torch.cat([torch.arange(*part) for part in parts])[None]
    message = "put the continuations first" if name == "llama" else "windows or chunks cannot tell apart"
    with pytest.raises(NotImplementedError, match=message):
        model(torch.ones_like(positions), position_ids=positions, past_key_values=filled, use_cache=True)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss", "llama4"])
@pytest.mark.parametrize("size", [2, 6])
def test_padded_prompts_in_parts(name: str, cache: str, size: int) -> None:
    """Rows whose padding fills parts, and reaches into another one."""
    model, documents = build(name), random_documents([11, 3, 7])
    batch, twin = padded(documents, "left"), eager_twin(model)
    filled, parts = CACHES[cache](model.config), []
    for part in (slice(start, min(start + size, 11)) for start in range(0, 11, size)):
        parts.append(
            model(
                batch["input_ids"][:, part],
                attention_mask=batch["attention_mask"][:, : part.stop],
                position_ids=batch["position_ids"][:, part],
                past_key_values=filled,
                use_cache=True,
            ).logits
        )
    logits = torch.cat(parts, 1)[batch["attention_mask"].bool()][None]
    torch.testing.assert_close(logits, logits_alone(twin, documents), **TOLERANCE)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "llama4"])
def test_a_2_d_mask_as_long_as_a_static_cache(name: str) -> None:
    model, documents = build(name), random_documents([11, 3, 7])
    batch, twin = padded(documents, "left"), eager_twin(model)
    mask, filled = nn.functional.pad(batch["attention_mask"], (0, 21)), StaticCache(model.config, max_cache_len=32)
    logits = model(**{**batch, "attention_mask": mask}, past_key_values=filled, use_cache=True).logits
    logits = logits[batch["attention_mask"].bool()][None]
    torch.testing.assert_close(logits, logits_alone(twin, documents), **TOLERANCE)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "llama4"])
def test_cu_seq_lens_beside_a_cache(name: str, cache: str) -> None:
    """Those of the keys count all of them, also the ones that the cache of a window has dropped."""
    model, documents = build(name), random_documents([12, 4])
    rest = torch.cat([documents[0][:, 10:], documents[1]], 1)
    call = {"position_ids": torch.tensor([[10, 11, 0, 1, 2, 3]]), "cu_seq_lens_q": torch.tensor([0, 2, 6])}
    filled = CACHES[cache](model.config)
    first = model(documents[0][:, :10], past_key_values=filled, use_cache=True).logits
    of_keys = torch.tensor([0, 12, 16])
    second = model(rest, **call, cu_seq_lens_k=of_keys, past_key_values=filled, use_cache=True).logits
    torch.testing.assert_close(torch.cat([first, second], 1), logits_alone(eager_twin(model), documents), **TOLERANCE)
    with pytest.raises(NotImplementedError, match="pass `cu_seq_lens_k`"):
        model(rest, **call, past_key_values=filled, use_cache=True)


@pytest.mark.parametrize("cache", CACHES)
def test_chunks_of_lengths_beside_a_cache(cache: str) -> None:
    """Of 4 tokens. Beside a cache they start with the documents that positions tell apart."""
    model, (first, rest, other) = build("llama4"), random_documents([6, 5, 9])
    twin, restarting = eager_twin(model), torch.cat([torch.arange(6, 11), torch.arange(9)])[None]
    expected = torch.cat([twin(torch.cat([first, rest], 1)).logits[:, 6:], twin(other).logits], 1)
    lengths = {"cu_seq_lens_q": torch.tensor([0, 5, 14]), "cu_seq_lens_k": torch.tensor([0, 11, 20])}
    for positions in (restarting, torch.arange(6, 20)[None], None):
        filled = CACHES[cache](model.config)
        model(first, past_key_values=filled, use_cache=True)
        call = {**lengths, "position_ids": positions, "past_key_values": filled, "use_cache": True}
        if positions is restarting:
            torch.testing.assert_close(model(torch.cat([rest, other], 1), **call).logits, expected, **TOLERANCE)
            continue
        with pytest.raises(NotImplementedError, match="layers with chunks are not told where they start"):
            model(torch.cat([rest, other], 1), **call)


# Positions of other kinds


@pytest.mark.parametrize("name", KINDS)
def test_positions_of_floats(name: str) -> None:
    model, documents = build(name), random_documents(LENGTHS)
    row = packed(documents)
    for dtype in (torch.float32, torch.float64):
        logits = model(row["input_ids"], position_ids=row["position_ids"].to(dtype)).logits if name != "bert" else None
        if logits is not None:
            torch.testing.assert_close(logits, logits_alone(eager_twin(model), documents), **TOLERANCE)


@pytest.mark.parametrize("cache", CACHES)
def test_positions_of_floats_beside_a_cache(cache: str) -> None:
    model, (prefix, rest, other) = build("llama"), random_documents([4, 3, 6])
    twin, filled = eager_twin(model), CACHES[cache](model.config)
    model(prefix, past_key_values=filled, use_cache=True)
    positions = torch.cat([torch.arange(4.0, 7), torch.arange(6.0)])[None]
    logits = model(torch.cat([rest, other], 1), position_ids=positions, past_key_values=filled, use_cache=True).logits
    expected = torch.cat([twin(torch.cat([prefix, rest], 1)).logits[:, 4:], twin(other).logits], 1)
    torch.testing.assert_close(logits, expected, **TOLERANCE)


MULTIMODAL = [("qwen2_vl", "Qwen2VL"), ("qwen2_5_vl", "Qwen2_5_VL"), ("qwen3_vl", "Qwen3VL")]


def multimodal_text_model(folder: str, prefix: str) -> transformers.PreTrainedModel:
    package = getattr(transformers.models, folder)
    config = getattr(package, f"{prefix}TextConfig")(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = getattr(transformers, f"{prefix}TextModel")._from_config(config, attn_implementation="flashmask").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize(("folder", "prefix"), MULTIMODAL)
def test_documents_of_multimodal_positions(folder: str, prefix: str, use_cache: bool) -> None:
    model = multimodal_text_model(folder, prefix)
    twin = eager_twin(model)
    image_first = torch.tensor([[0, 0, 0, 0, 2, 3], [0, 0, 1, 1, 2, 3], [0, 1, 0, 1, 2, 3]])
    image_inside = torch.tensor([[0, 1, 1, 1, 1, 3], [0, 1, 1, 2, 2, 3], [0, 1, 2, 1, 2, 3]])
    parts = [image_first, torch.zeros(3, 1, dtype=torch.long), image_inside, image_first, torch.arange(4).expand(3, 4)]
    positions = torch.cat(parts, 1)[:, None]
    documents = random_documents([part.shape[1] for part in parts])
    expected = [
        twin(document, position_ids=part[:, None]).last_hidden_state for document, part in zip(documents, parts)
    ]
    row = torch.cat(documents, 1)
    for args, call in (((), {"input_ids": row, "position_ids": positions}), ((row, None, positions), {})):
        hidden = model(*args, **call, use_cache=use_cache).last_hidden_state
        torch.testing.assert_close(hidden, torch.cat(expected, 1), **TOLERANCE)


@pytest.mark.parametrize("planes", [None, 3, 4])
@pytest.mark.parametrize(("folder", "prefix"), MULTIMODAL)
def test_text_documents_in_multimodal_models(folder: str, prefix: str, planes: int | None) -> None:
    model, documents = multimodal_text_model(folder, prefix), random_documents(LENGTHS)
    twin, row = eager_twin(model), packed(documents)
    position_ids = row["position_ids"] if planes is None else row["position_ids"].expand(planes, 1, -1)
    expected = torch.cat([twin(document).last_hidden_state for document in documents], 1)
    model = pickle.loads(pickle.dumps(model))  # the hook that finds documents goes with the model
    hidden = model(row["input_ids"], position_ids=position_ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(hidden, expected, **TOLERANCE)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize(("folder", "prefix"), MULTIMODAL)
def test_multimodal_positions_beside_a_cache(folder: str, prefix: str, cache: str) -> None:
    model = multimodal_text_model(folder, prefix)
    twin, (prompt, other) = eager_twin(model), random_documents([12, 4])
    filled = CACHES[cache](model.config)
    first = model(prompt[:, :10], past_key_values=filled, use_cache=True).last_hidden_state
    positions = torch.tensor([10, 11, 0, 1, 2, 3]).expand(3, 1, -1)
    rest = torch.cat([prompt[:, 10:], other], 1)
    second = model(rest, position_ids=positions, past_key_values=filled, use_cache=True).last_hidden_state
    expected = torch.cat([twin(prompt).last_hidden_state, twin(other).last_hidden_state], 1)
    torch.testing.assert_close(torch.cat([first, second], 1), expected, **TOLERANCE)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize(("folder", "prefix"), MULTIMODAL)
def test_padded_multimodal_prompts_in_parts(folder: str, prefix: str, cache: str) -> None:
    """Transformers gives padding the position 1, which a token has as well."""
    model, documents = multimodal_text_model(folder, prefix), random_documents([11, 3, 7])
    batch, twin = padded(documents, "left"), eager_twin(model)
    is_token = batch["attention_mask"].bool()
    positions = batch["position_ids"].masked_fill(~is_token, 1).expand(3, -1, -1)
    filled, parts = CACHES[cache](model.config), []
    for part in (slice(0, 5), slice(5, 11)):
        parts.append(
            model(
                batch["input_ids"][:, part],
                attention_mask=batch["attention_mask"][:, : part.stop],
                position_ids=positions[..., part],
                past_key_values=filled,
                use_cache=True,
            ).last_hidden_state
        )
    expected = torch.cat([twin(document).last_hidden_state[0] for document in documents])
    torch.testing.assert_close(torch.cat(parts, 1)[is_token], expected, **TOLERANCE)


# Bounds of users


def test_bounds_that_let_documents_meet_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    transformers.logging.enable_propagation()
    model, documents = build("llama"), random_documents(LENGTHS)
    row = packed(documents)
    apart = bounds.from_position_ids(row["position_ids"])
    model(**row, attention_mask=apart)
    tree = bounds.from_prefix_tree([-1, 0, 0], [5, 4, 6])
    model(row["input_ids"], position_ids=torch.tensor([[*range(9), *range(5, 11)]]), attention_mask=tree)
    assert "documents meet" not in caplog.text
    logits = model(**row, attention_mask=bounds.causal(15)).logits
    model(**row, attention_mask=bounds.causal(15))
    assert caplog.text.count("bounds.intersect(attention_mask, bounds.from_position_ids(position_ids))") == 1
    twin = eager_twin(model)
    everything = torch.zeros(1, 1, 15, 15).masked_fill(~torch.ones(15, 15, dtype=torch.bool).tril(), -torch.inf)
    torch.testing.assert_close(logits, twin(**row, attention_mask=everything).logits, **TOLERANCE)
    mended = bounds.intersect(bounds.causal(15), bounds.from_position_ids(row["position_ids"]))
    torch.testing.assert_close(model(**row, attention_mask=mended).logits, logits_alone(twin, documents), **TOLERANCE)


@pytest.mark.parametrize("length", [2, 4, 6, 32])
def test_dense_masks_of_integers_are_no_bounds(length: int) -> None:
    model, tokens = build("llama"), random_documents([length])[0]
    visible = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    for mask, error in ((visible.int(), ValueError), (visible.long(), TypeError)):
        with pytest.raises(error, match=r"dense mask.*\.bool\(\)"):
            model(tokens, attention_mask=mask, use_cache=False)
    torch.testing.assert_close(
        model(tokens, attention_mask=visible.int().bool(), use_cache=False).logits,
        eager_twin(model)(tokens).logits,
        **TOLERANCE,
    )


def test_a_dense_mask_of_integers_that_all_queries_share_is_no_bounds() -> None:
    model, batch = build("bert"), padded(random_documents([7, 3]), "right")
    visible = batch["attention_mask"][:, None, None]
    with pytest.raises(ValueError, match=r"dense mask.*\.bool\(\)"):
        model(batch["input_ids"], attention_mask=visible.int())
    torch.testing.assert_close(
        model(batch["input_ids"], attention_mask=visible.bool()).logits,
        eager_twin(model)(batch["input_ids"], attention_mask=batch["attention_mask"]).logits,
        **TOLERANCE,
    )


@pytest.mark.parametrize("seed", range(20))
def test_prefix_trees_are_told_from_other_bounds(seed: int) -> None:
    """By what each token sees: a path on which its positions count, from any start, with padding around."""
    tree = from_sequences(random_sequences(seed, 7, 50))
    padded = torch.nn.functional.pad(tree.bounds, (seed % 3, seed % 4))
    shift = (torch.arange(padded.shape[3]) < seed % 3 + tree.bounds.shape[3]) * (seed % 3)
    mask = (padded + shift).int()
    mask[..., : seed % 3] = 0
    counted = torch.nn.functional.pad(tree.position_ids, (seed % 3, seed % 4))
    positions = counted + 5 * (seed % 2)
    depth = depth_in_prefix_trees(mask, positions)
    assert depth is not None
    assert torch.equal(*(numbers[mask[:, 0, 0] > torch.arange(mask.shape[3])] for numbers in (depth, counted)))
    has_parent = bounds.to_dense(mask)[0, 0].sum(1) > 1
    token = int(has_parent.nonzero()[seed % 2])
    assert depth_in_prefix_trees(mask, positions.index_add(1, torch.tensor([token]), torch.tensor([[100]]))) is None
    length = 12 + seed
    row = torch.arange(length)[None]
    assert depth_in_prefix_trees(bounds.causal(length), row) is not None
    assert depth_in_prefix_trees(bounds.sliding_window(3 + seed % 5, length), row) is None
    assert depth_in_prefix_trees(bounds.sinks_and_window(1, 3 + seed % 5, length=length), row) is None


def test_only_paths_from_a_root_are_prefix_trees() -> None:
    """All bounds of four places, under positions that count the tokens seen. Each of those must see all before it."""
    ends = torch.cartesian_prod(*[torch.arange(5)] * 4).int()
    visible = bounds.to_dense(ends[:, None, None], 4)[:, 0]
    for mask, seen in zip(ends, visible):
        pairs = (seen & seen.diagonal()[:, None]).nonzero().tolist()  # rows of padding may see anything
        are_paths = [seen[key, : key + 1].equal(seen[row, : key + 1]) for row, key in pairs]
        count = (seen.tril(-1).sum(1) + 3)[None]
        assert (depth_in_prefix_trees(mask[None, None, None], count) is not None) == all(are_paths), mask


@pytest.mark.parametrize("name", ["mistral", "llama4"])
def test_trees_count_from_any_position(name: str) -> None:
    """Chunks begin with the sequence, whatever number its positions start from. One tree serves all rows."""
    model = build(name)
    tree = from_sequences(random_sequences(3, 4, 12))
    tokens = torch.randint(1, 97, (2, tree.input_ids.shape[1]))
    positions = torch.stack([tree.position_ids[0], tree.position_ids[0] + 3])
    logits = model(tokens, position_ids=positions, attention_mask=tree.bounds, use_cache=False).logits
    seen = bounds.to_dense(tree.bounds)[0, 0]
    for row in range(2):
        for token in range(tokens.shape[1]):
            path = seen[token].nonzero().flatten()
            alone = eager_twin(model)(tokens[row, path][None], position_ids=positions[row, path][None], use_cache=False)
            torch.testing.assert_close(logits[row, token], alone.logits[0, -1], **TOLERANCE)
