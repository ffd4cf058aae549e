"""Sequence parallelism on several processes: `parallel_cases.py` computes, once for all tests here."""

from __future__ import annotations

import contextlib
import inspect
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import processes
import pytest
import tiny_models
import tiny_vision
import torch
import torch.distributed as dist
import transformers
from parallel_answers import ANSWER_CASES
from parallel_cases import CASES, FAULTS, LOST, WORLD, Case
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import experimental
from transformers import AttentionInterface, masking_utils
from transformers.masking_utils import create_causal_mask

import hf_flashmask
from hf_flashmask import bounds
from hf_flashmask.integration.layer_mask import LayerMask
from hf_flashmask.parallel.deal import block_length_to_deal, count_tiles_to_deal, deal, padded_length_to_deal
from hf_flashmask.parallel.exchanges import AllGatherExchange
from hf_flashmask.parallel.group import Group
from hf_flashmask.parallel.models import choose_mode
from hf_flashmask.parallel.rotary import share_largest_position

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = Path(__file__).with_name("parallel_cases.py")


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process has found."""
    return read(processes.compute_once(tmp_path_factory, "parallel", compute), WORLD)


def read(folder: Path, ranks: int) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


def compute(folder: Path, *names: str, gpus: int = 0) -> None:
    """All cases, or those named, on processes whose collectives fail after some minutes."""
    processes.run_at_once(SCRIPT, [str(folder), *names, str(gpus)], [{}], folder)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_averaged_losses_and_gradients_are_those_of_one_process(results: list[dict[str, Any]], case: Case) -> None:
    found = results[0][case.name]
    exact, close = (2e-3, 3e-2) if case.dtype == "bfloat16" else (1e-6, 1e-5)
    loss, expected = found["loss"]
    assert loss == pytest.approx(expected, rel=exact)
    assert found["gradients"] < close
    assert found["worst"] < close


@pytest.mark.parametrize("name", [case.name for case in ANSWER_CASES])
def test_averaged_losses_over_answers_are_those_of_one_process(results: list[dict[str, Any]], name: str) -> None:
    found = results[0][name]
    loss, expected = found["loss"]
    assert loss == pytest.approx(expected, rel=1e-5)
    assert found["gradients"] < 1e-5
    assert found["worst"] < 1e-5


def test_the_page_names_cases() -> None:
    page = (ROOT / "docs" / "many_gpus.md").read_text()
    table = page.partition("| | cases |")[2].partition("\n\n")[0]
    for pattern in re.findall("`([^`]+)`", re.sub(r"by `[a-z_]+`|without `[a-z_]+`", "", table)):
        for ranks in ("2", "4") if "{2,4}" in pattern else ("",):
            name = re.escape(pattern.replace("{2,4}", ranks)).replace(r"\*", ".*")
            assert any(re.search(f"(^|-){name}$", case.name) for case in (*CASES, *ANSWER_CASES)), pattern


def test_masks_are_made_once_for_each_type_of_layers(results: list[dict[str, Any]]) -> None:
    for case in CASES:
        is_given = "bounds" in case.batch or case.batch.startswith(("tree", "prefixes"))
        expected = 0 if is_given else results[0][case.name]["layer_types"]
        assert results[0][case.name]["masks"] == expected, case.name


def test_shared_prefixes_are_computed_once(results: list[dict[str, Any]]) -> None:
    for case in CASES:
        if case.batch.startswith("prefixes"):
            computed, given = results[0][case.name]["shared"]
            assert (given - computed) == 2 * 19, case.name  # two more copies of the prompt


def test_auto_says_what_it_chose(results: list[dict[str, Any]]) -> None:
    found = results[0]["auto-heads_not_divided"]
    assert (found["mode"], found["reason"]) == ("all_gather", "4 ranks do not divide 6 query heads")
    found = results[0]["auto-one_kv_head"]
    assert (found["mode"], "0.50 times" in found["reason"]) == ("all_gather", True)


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_errors_on_every_rank(results: list[dict[str, Any]], name: str) -> None:
    _, message = FAULTS[name]
    errors = results[0][name]["errors"]
    assert len(errors) == WORLD
    for error in errors:
        assert re.search(message, error), error


@pytest.mark.parametrize("way", LOST)
def test_a_lost_rank_is_an_error_on_the_one_that_waits(results: list[dict[str, Any]], way: str) -> None:
    found = results[0 if way == "raises" else 2]["lost"][way]
    assert found["error"] != "none"
    assert re.search(LOST[way][1], found["error"]), found["error"]
    assert found["seconds"] < 60


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ranks", "mode"),
    [(32, 8, 8, "ulysses"), (32, 8, 2, "all_gather"), (32, 32, 8, "ulysses"), (28, 4, 8, "all_gather")],
)
def test_the_mode_that_moves_less(heads: int, kv_heads: int, ranks: int, mode: str) -> None:
    model = tiny_models.build("llama")
    model.config.num_attention_heads, model.config.num_key_value_heads = heads, kv_heads
    assert choose_mode(model, ranks)[0] == mode


@pytest.mark.parametrize("kind", ["one document", "short documents", "long documents"])
@pytest.mark.parametrize("ranks", [2, 8])
def test_dealt_rows_balance(kind: str, ranks: int) -> None:
    """By the tiles that the kernels visit, at most 1.05 times the mean; contiguous parts are at 1.9 to 2.5."""
    length = 32768
    if kind == "one document":
        mask = bounds.causal(length)
    else:
        longest = 1400 if kind == "short documents" else 8000
        lengths = torch.randint(longest // 16, longest, (length // 40,)).cumsum(0)
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths[lengths < length]])
        mask = bounds.from_document_ids(torch.searchsorted(starts, torch.arange(length), right=True))
    block = block_length_to_deal(length, ranks)
    assert block == 128
    order = deal(count_tiles_to_deal(mask, block).work, ranks, block)
    assert order.sort().values.tolist() == list(range(length))
    rows = order.unflatten(0, (ranks, -1))
    assert (rows.diff(dim=1) > 0).all()
    tiles = (bounds.tile_occupancy(mask, tile_size=block)[0, 0] > 0).sum(1)
    of_rank = tiles[rows[:, ::block] // block].sum(1).double()
    assert of_rank.max() / of_rank.mean() < 1.05


@pytest.mark.parametrize(("length", "most"), [(32768, 1.2), (65536, 1.05)])
def test_dealt_rows_of_many_ranks_balance_and_visit_no_more_tiles(length: int, most: float) -> None:
    """By the tiles of each rank's own mask, of which cut ones cost more. Blocks smaller than a tile would make up tiles
    that see several documents; dealt to and fro alone, the longest document would leave a rank with 1.2 times the mean.
    The shorter row has four blocks for a rank.
    """
    ranks, tile = 64, 128
    torch.manual_seed(0)
    ends = torch.empty(length // 100).log_normal_(6.5, 1.0).clamp(16, 2500).long().cumsum(0)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), ends[ends < length]])
    mask = bounds.from_document_ids(torch.searchsorted(starts, torch.arange(length), right=True))
    block = block_length_to_deal(length, ranks)
    order = deal(count_tiles_to_deal(mask, block).work, ranks, block)
    visited, costs = 0, []
    for rank in range(ranks):
        own = AllGatherExchange(Group(None, rank, ranks), order).mask_of_rank(LayerMask(mask, length), heads=1)
        occupancy = bounds.tile_occupancy(own.bounds, length // ranks, tile_size=tile)
        visited += int((occupancy > 0).sum())
        costs.append(float((occupancy > 0).sum() + 0.2 * ((occupancy > 0) & (occupancy < 1)).sum()))
    assert visited == int((bounds.tile_occupancy(mask, tile_size=tile) > 0).sum())
    assert max(costs) <= most * sum(costs) / ranks


@pytest.mark.parametrize(("ranks", "blocks"), [(2, 3), (5, 4), (8, 1), (3, 65)])
def test_every_rank_is_dealt_as_many_blocks(ranks: int, blocks: int) -> None:
    work = torch.randint(100, (ranks * blocks,))
    rows = deal(work, ranks, 4).unflatten(0, (ranks, -1))
    assert rows.flatten().sort().values.tolist() == list(range(4 * len(work)))
    assert (rows.diff(dim=1) > 0).all()
    assert (rows.unflatten(1, (-1, 4)).diff(dim=2) == 1).all()


@pytest.mark.parametrize("block", [1, 2, 4])
def test_tiles_are_those_of_the_dense_mask(block: int) -> None:
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2], [0, 1, 0, 1, 2, 3, 4, 5]])
    documents = bounds.from_position_ids(position_ids)
    for mask in (
        documents,
        bounds.intersect(documents, bounds.sliding_window(2, 8, is_causal=False)),
        bounds.sliding_window(5, 8),
        bounds.causal(8),
    ):
        occupancy = bounds.tile_occupancy(mask, tile_size=block)
        tiles = count_tiles_to_deal(mask, block)
        assert tiles.visible.tolist() == (occupancy > 0).sum((0, 1, 3)).tolist()
        cut = ((occupancy > 0) & (occupancy < 1)).sum((0, 1, 3))
        assert (tiles.cut >= cut).all()
        assert (tiles.cut <= 2 * cut).all()


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_padded_rows_can_be_dealt(ranks: int) -> None:
    for length in [*range(1, 300), 1023, 1025, 4000, 9000, 9217]:
        padded = padded_length_to_deal(length, ranks)
        assert length <= padded <= max(length * 5 / 4, length + ranks)
        assert padded % (ranks * block_length_to_deal(padded, ranks)) == 0


def drop_masks(module: torch.nn.Module, *parts: Any, **_: Any) -> Any:
    """As engines do that exchange heads against tokens: twice the tokens, and no mask."""
    query, key, value = (torch.cat([part, part], dim=2) for part in parts[:3])
    return hf_flashmask.integration.flashmask_attention_forward(module, query, key, value, None)


def test_an_engine_that_drops_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.build("llama")
    batch = tiny_models.packed(tiny_models.random_documents([5, 3]))
    mask = bounds.from_position_ids(batch["position_ids"])
    with monkeypatch.context() as patch:
        patch.setitem(AttentionInterface._global_mapping, "flashmask", drop_masks)
        with pytest.raises(NotImplementedError, match=r"has dropped the bounds.*hf_flashmask.sequence_parallel"):
            model(**batch, attention_mask=mask)
        with pytest.raises(RuntimeError):  # whose output does not fit into this model
            model(**batch)
    model(**batch, attention_mask=mask)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_compiled_model_under_an_engine_that_drops_masks(monkeypatch: pytest.MonkeyPatch, fullgraph: bool) -> None:
    """Without `fullgraph`, an error of traced code would only end the graph."""

    def drop(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any) -> Any:
        return hf_flashmask.integration.flashmask_attention_forward(module, query, key, value, None)

    batch = tiny_models.packed(tiny_models.random_documents([5, 3]))
    batch["attention_mask"] = bounds.from_position_ids(batch["position_ids"])
    compiled = torch.compile(tiny_models.build("llama"), backend="eager", fullgraph=fullgraph)
    monkeypatch.setitem(AttentionInterface._global_mapping, "flashmask", drop)
    with pytest.raises(Exception, match=r"is compiled without a mask, under an engine .*hf_flashmask.keep_masks"):
        compiled(**batch)


def test_a_mask_of_fewer_tokens_than_the_layer_has() -> None:
    model = tiny_models.build("llama")
    batch = tiny_models.packed(tiny_models.random_documents([5, 3]))
    embeds = torch.zeros(1, 8, 32)
    cache = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
    call = {"attention_mask": None, cache: None, "position_ids": batch["position_ids"]}
    mask = create_causal_mask(config=model.config, inputs_embeds=embeds, **call)
    heads = torch.zeros(1, 4, 16, 8)
    layer = model.model.layers[0].self_attn
    with pytest.raises(ValueError, match=r"8 queries and 8 keys, .* 16 queries and 16 keys.*sequence_parallel"):
        hf_flashmask.integration.flashmask_attention_forward(layer, heads, heads, heads, mask)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[Any]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


# torch 2.9 has a second way to replace attention, which none of its public functions chooses.
SECOND_MODE = getattr(getattr(experimental._attention, "_DispatchMode", None), "TORCH_FUNCTION", None)


@pytest.fixture(params=[None, SECOND_MODE] if SECOND_MODE else [None])
def ring(one_rank: Any, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """torch's `context_parallel`, in each way that this torch has to replace attention."""
    if request.param:
        monkeypatch.setattr(experimental._attention, "_dispatch_mode", request.param)
    mesh = init_device_mesh("cpu", (1,))
    return lambda: experimental.context_parallel(mesh, buffers=[torch.zeros(1, 8)], buffer_seq_dims=[1])


@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_ring_is_refused_until_it_is_left(
    ring: Callable[[], Any], is_compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = tiny_models.packed(tiny_models.random_documents([5, 3]))
    model = tiny_models.build("llama")
    model = torch.compile(model, backend="eager") if is_compiled else model
    expected = model(**batch).logits
    with ring():
        assert_refuses_ring(model, batch)
        with ring():
            assert_refuses_ring(model, batch)
    assert torch.equal(model(**batch).logits, expected)
    original = nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", lambda *args: original(*args))
    assert torch.equal(model(**batch).logits, expected)


def test_a_ring_that_an_error_has_left(ring: Callable[[], Any]) -> None:
    batch = tiny_models.packed(tiny_models.random_documents([5, 3]))
    model = tiny_models.build("llama")
    expected = model(**batch).logits
    original = nn.functional.scaled_dot_product_attention
    with contextlib.suppress(KeyError), ring():
        raise KeyError
    if nn.functional.scaled_dot_product_attention is not original:  # torch 2.9 to 2.11
        assert_refuses_ring(model, batch)
        with ring():
            pass
    assert torch.equal(model(**batch).logits, expected)


def assert_refuses_ring(model: nn.Module, batch: dict[str, Any]) -> None:
    way_out = "enter the context again and leave it without an error"
    with pytest.raises(NotImplementedError, match=f"torch's `context_parallel`.*{way_out}"):
        model(**batch)


# Models that read positions elsewhere than in `position_ids`


TINY = {
    "vocab_size": tiny_models.VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}


OPT = {"word_embed_proj_dim": 32, "ffn_dim": 48}
CLIP = {"bos_token_id": 1, "eos_token_id": 2}


def of_class(name: str, **options: Any) -> transformers.PreTrainedModel:
    model_class = getattr(transformers, name)
    return model_class._from_config(model_class.config_class(**TINY | options), attn_implementation="flashmask")


@pytest.mark.parametrize(
    ("make", "length", "message"),
    [
        (lambda: tiny_models.build("llama4", attn_temperature_tuning=True, floor_scale=8), 64, "scale scores by the"),
        (lambda: of_class("RobertaForCausalLM", is_decoder=True), 16, "counts positions by the tokens"),
        (lambda: of_class("OPTForCausalLM", **OPT), 16, "counts positions by the tokens"),
    ],
)
def test_rows_whose_positions_depend_on_all_tokens_are_refused(
    one_rank: Any, make: Callable[[], transformers.PreTrainedModel], length: int, message: str
) -> None:
    parallel = hf_flashmask.sequence_parallel(make(), one_rank)
    with pytest.raises((NotImplementedError, ValueError), match=message):
        parallel.shard({"input_ids": torch.ones(1, length, dtype=torch.long), "attention_mask": torch.ones(1, length)})


def test_a_number_of_labels_beside_losses_over_answers_is_refused(one_rank: Any) -> None:
    model = tiny_models.build("llama")
    hf_flashmask.set_loss(model, hf_flashmask.dpo_loss)
    pair = {"prompt": [3, 4, 5], "chosen": [6, 7], "rejected": [8], "ref_logps": [-3.0, -2.0]}
    batch = hf_flashmask.SharedPromptDataCollator(max_length=16)([pair])
    parallel = hf_flashmask.sequence_parallel(model, one_rank)
    with pytest.raises(ValueError, match="losses over answers are the mean over a batch"):
        parallel.shard(batch, num_items=6)


@pytest.mark.parametrize("lengths", [[40], [41], [7, 8]])
def test_padding_does_not_count_for_longrope(one_rank: Any, lengths: list[int]) -> None:
    """The original length is 40 tokens, and more are added."""
    model = tiny_models.build("llama", **tiny_models.longrope(40))
    documents = tiny_models.random_documents(lengths)
    batch, twin = tiny_models.packed(documents), tiny_models.eager_twin(model)
    expected = torch.cat([twin(document).logits for document in documents], dim=1)
    with hf_flashmask.sequence_parallel(model, one_rank, mode="ulysses") as parallel:
        parallel._padded_length = lambda length: length + 48
        for given in (batch, {"input_ids": batch["input_ids"]}) if len(lengths) == 1 else (batch,):
            logits = model(**parallel.shard(given)).logits[:, : sum(lengths)]
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("BertModel", {}, "the pooler of BertModel"),
        ("BartForCausalLM", {"d_model": 32}, "its forward takes no `position_ids`"),
        ("MobileBertModel", {"embedding_size": 32}, r"tokens meet elsewhere than in attention \(trigram_input\)"),
        ("CLIPTextModel", CLIP, "the `pooler_output` of CLIPTextModel"),
        ("GPT2DoubleHeadsModel", {"n_embd": 32, "n_head": 4}, "GPT2SequenceSummary of GPT2DoubleHeadsModel"),
        ("CsmDepthDecoderModel", {}, "its forward takes no `position_ids`"),
    ],
)
def test_models_that_read_other_places_of_a_row_are_refused(
    one_rank: Any, name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(NotImplementedError, match=message):
        hf_flashmask.sequence_parallel(of_class(name, **options), one_rank)


def test_a_mask_of_other_tokens_is_named_before_positions_are_counted(one_rank: Any) -> None:
    batch = {"input_ids": torch.ones(1, 21, dtype=torch.long), "position_ids": torch.arange(21).expand(3, 1, -1)}
    parallel = hf_flashmask.sequence_parallel(tiny_vision.build("qwen2_vl"), one_rank)
    with pytest.raises(ValueError, match=r"`attention_mask` must be that of the whole sequence.*got \[1, 20\]"):
        parallel.shard({**batch, "attention_mask": torch.ones(1, 20)})


@pytest.mark.parametrize("axes", [(), (3,)])
def test_the_shared_largest_position_leaves_the_embeddings_of_each_row(axes: tuple[int, ...]) -> None:
    if axes:
        from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding as Rotary

        more: dict[str, Any] = {"mrope_section": [2, 1, 1]}
    else:
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding as Rotary

        more = {}
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0, **more}
    config = tiny_models.config_of("llama", max_position_embeddings=40, rope_parameters=rope)
    model, hidden = torch.nn.Sequential(Rotary(config)), torch.zeros(2, 60, 32)
    position_ids = torch.stack([torch.arange(60), torch.arange(60).flip(0)]).expand(*axes, -1, -1)
    expected = Rotary(config)(hidden, position_ids)
    assert share_largest_position(model, ())
    for part, of_part in zip(model[0](hidden, position_ids), expected):
        assert torch.equal(part, of_part)


# Batches with images


def with_pixels(name: str) -> tuple[transformers.PreTrainedModel, dict[str, Any]]:
    model = tiny_vision.build(name)
    tokens = tiny_vision.with_image_tokens(model.config, tiny_models.random_documents([21])[0])
    return model, {"input_ids": tokens, "use_cache": False, **tiny_vision.with_image(model.config, tokens)}


@pytest.mark.parametrize("name", ["gemma3_images", "qwen3_vl"])
def test_batches_with_images_are_called_uncut_before_and_after(one_rank: Any, name: str) -> None:
    model, batch = with_pixels(name)
    expected = tiny_models.eager_twin(model)(**batch).logits
    with hf_flashmask.sequence_parallel(model, one_rank, mode="ulysses") as parallel:
        torch.testing.assert_close(model(**parallel.shard(batch)).logits, expected, rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="was not given the mask of the whole sequence"):
            model(**batch)
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", ["no token types", "no ids", "bounds"])
def test_positions_of_images_that_cannot_be_counted(one_rank: Any, change: str) -> None:
    model, batch = with_pixels("qwen2_vl")
    if change == "no token types":
        del batch["mm_token_type_ids"]
    elif change == "no ids":
        batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids"))
    else:
        batch["attention_mask"] = bounds.causal(21)
    parallel = hf_flashmask.sequence_parallel(model, one_rank)
    with pytest.raises(ValueError, match=r"counts positions by the places of images.*or `position_ids` \[3, B, S\]"):
        parallel.shard(batch)
    if change != "no ids":
        parallel.shard({**batch, "position_ids": torch.arange(21).expand(3, 1, -1)})


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ({"image_heat": torch.zeros(1, 21)}, r"how to cut `image_heat` \[1, 21\]"),
        ({"position_ids": None}, r"hands no `position_ids` of the \d+ tokens"),
    ],
)
def test_calls_of_text_models_that_cannot_be_cut(one_rank: Any, added: dict[str, Any], message: str) -> None:
    model, batch = with_pixels("llava")
    model.get_decoder().register_forward_pre_hook(lambda _, args, call: (args, call | added), with_kwargs=True)
    with (
        hf_flashmask.sequence_parallel(model, one_rank) as parallel,
        pytest.raises(NotImplementedError, match=message),
    ):
        model(**parallel.shard(batch))


# Compiled models


@pytest.mark.skipif(
    not hasattr(masking_utils, "blockwise_overlay"), reason="this version of Transformers has no blocks"
)
def test_masks_of_image_blocks_break_graphs(one_rank: Any) -> None:
    model = tiny_vision.build("gemma3_images")
    batch = tiny_models.packed(tiny_models.random_documents([9, 12]))
    batch["token_type_ids"] = tiny_vision.token_types(model.config, batch["input_ids"])
    config = model.config.get_text_config()
    cache = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"

    def make(attention_mask: Any, token_types: Tensor) -> Tensor:
        call = {"inputs_embeds": torch.zeros(1, 21, 32), "position_ids": batch["position_ids"], cache: None}
        blocks = torch.where(token_types == 1, 0, -1)
        return create_causal_mask(config, attention_mask=attention_mask, block_sequence_ids=blocks, **call).bounds

    with hf_flashmask.sequence_parallel(model, one_rank, mode="ulysses") as parallel:
        part = parallel.shard(batch)
        expected = make(None, batch["token_type_ids"])
        with pytest.raises(Unsupported, match="compile without fullgraph=True"):
            torch.compile(make, backend="eager", fullgraph=True)(part["attention_mask"], part["token_type_ids"])
        found = torch.compile(make, backend="eager")(part["attention_mask"], part["token_type_ids"])
        assert torch.equal(bounds.to_dense(found), bounds.to_dense(expected))
        refused = parallel.shard({name: part for name, part in batch.items() if name != "token_type_ids"})
        with pytest.raises(NotImplementedError, match="looks tokens up"):
            torch.compile(make, backend="eager")(refused["attention_mask"], batch["token_type_ids"])
