"""`generate` under flashmask against eager attention: every search, cache and way to continue."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from tiny_models import DECODERS, VOCABULARY, WINDOW, WINDOWED, build, eager_twin, packed, padded, random_documents

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
# Every kind of attention that decoding tells apart: plain, windows, softcap, sinks, chunks.
KINDS = ["llama", "mistral", "gemma2", "gpt_oss", "llama4"]
# These pass `block_sequence_ids` to a creator of chunked masks that does not take them, with any implementation.
IS_BROKEN = {("llama4", "static")} if Version("5.9") <= Version(transformers.__version__) < Version("5.20") else set()


# Transformers 5.17 gives windowed models masks that are shorter than the keys of their cache, eager attention too.
IS_5_17 = Version(transformers.__version__).release[:2] == (5, 17)


def with_caches(names: list[str], caches: list[str | None]) -> list[tuple[str, str | None]]:
    return [(name, cache) for name in names for cache in caches if (name, cache) not in IS_BROKEN]


def prompts(lengths: list[int], side: str = "left") -> dict[str, Any]:
    """A batch of padded prompts, and the settings of greedy generation."""
    batch = padded(random_documents(lengths), side)
    del batch["position_ids"]
    return {**batch, "max_new_tokens": 2 * WINDOW, "do_sample": False, "pad_token_id": 0}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("name", "cache"), with_caches(DECODERS, ["dynamic", "static"]))
def test_greedy_generation_equals_eager(name: str, side: str, cache: str) -> None:
    model = build(name)
    # Far into the padding on its right a row of a windowed layer sees nothing, and eager attention averages all keys.
    lengths = [10, 9, 10] if side == "right" and name in WINDOWED else [9, 3, 7]
    arguments = {**prompts(lengths, side), "cache_implementation": cache}
    # Generating with a static cache compiles the model on a GPU, and a copy made afterwards would run that code.
    twin = eager_twin(model)
    assert torch.equal(model.generate(**arguments), twin.generate(**arguments))


@pytest.mark.parametrize(
    "search",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 3, "do_sample": True},
        {"do_sample": True, "num_return_sequences": 2},
        {"prefill_chunk_size": 4},
    ],
    ids=["beams", "sampled_beams", "samples", "prompt_in_chunks"],
)
@pytest.mark.parametrize(("name", "cache"), with_caches(KINDS, ["dynamic", "static", None]))
def test_searches_equal_eager(name: str, cache: str | None, search: dict[str, Any]) -> None:
    model = build(name)
    twin = eager_twin(model)
    caching = {"use_cache": False} if cache is None else {"cache_implementation": cache}
    if cache is None and "prefill_chunk_size" in search:
        search = {}
    arguments = {**prompts([9, 3, 7]), **search, **caching, "return_dict_in_generate": True, "output_logits": True}
    outputs = []
    for either in (model, twin):
        torch.manual_seed(5)
        outputs.append(either.generate(**arguments))
    ours, expected = outputs
    assert torch.equal(ours.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(expected.logits), **TOLERANCE)


class Steps:
    """Counts the calls of a model that `generate` makes, and those with several tokens against a cache."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.lengths: list[int] = []
        model.register_forward_pre_hook(self._record, with_kwargs=True)

    def _record(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.lengths.append(kwargs["input_ids"].shape[1])

    @property
    def of_several_tokens(self) -> int:
        return sum(length > 1 for length in self.lengths[1:])


@pytest.mark.parametrize("name", ["llama"] if IS_5_17 else KINDS)
def test_assisted_generation_equals_greedy_generation(name: str) -> None:
    model = build(name)
    arguments = {**prompts([11]), "max_new_tokens": 4 * WINDOW}
    expected = eager_twin(model).generate(**arguments)
    # An assistant that is sometimes right: the model itself with blurred weights.
    assistant = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    assistant.generation_config.num_assistant_tokens = 3
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    steps = Steps(model)
    assert torch.equal(model.generate(**arguments, assistant_model=assistant), expected)
    assert steps.of_several_tokens > 1
    assert len(steps.lengths) < expected.shape[1] - 11, "no guess was right"


@pytest.mark.parametrize("name", KINDS)
def test_guesses_looked_up_in_the_prompt_equal_greedy_generation(name: str) -> None:
    model = build(name)
    arguments = prompts([5])
    for key in ("input_ids", "attention_mask"):
        arguments[key] = arguments[key].repeat(1, 3)
    # What greedy generation would say is in the prompt already, so that some guesses are right.
    said = eager_twin(model).generate(**arguments)
    arguments["input_ids"] = torch.cat([said, said[:, :15]], dim=1)
    arguments["attention_mask"] = torch.ones_like(arguments["input_ids"])
    expected = eager_twin(model).generate(**arguments)
    steps = Steps(model)
    # An end token that does not exist: Transformers 5.4 cannot look guesses up without any.
    assert torch.equal(model.generate(**arguments, prompt_lookup_num_tokens=3, eos_token_id=VOCABULARY), expected)
    assert steps.of_several_tokens > 0


@pytest.mark.parametrize(("name", "cache"), with_caches(KINDS, ["dynamic", "static"]))
def test_generation_continues_from_a_returned_cache(name: str, cache: str) -> None:
    """A second turn of a conversation sees the first, through the cache, as eager attention sees the whole of it."""
    model = build(name)
    twin = eager_twin(model)
    arguments = prompts([9, 3, 7])
    kinds = {"dynamic": transformers.DynamicCache, "static": transformers.StaticCache}
    length = {"max_cache_len": 64} if cache == "static" else {}
    past = kinds[cache](config=model.config, **length)
    first = model.generate(**arguments, past_key_values=past, return_dict_in_generate=True)
    turn = torch.randint(1, VOCABULARY, (3, 6))
    arguments["input_ids"] = torch.cat([first.sequences, turn], dim=1)
    new = torch.ones(3, arguments["input_ids"].shape[1] - 9, dtype=torch.long)
    arguments["attention_mask"] = torch.cat([arguments["attention_mask"], new], dim=1)
    steps = Steps(model)
    second = model.generate(**arguments, past_key_values=first.past_key_values)
    assert torch.equal(second, twin.generate(**arguments))
    assert steps.lengths[0] == 7, "the cache holds all but the last token of the first turn"


@pytest.mark.parametrize("name", KINDS)
def test_a_cache_is_continued_by_several_tokens_at_once(name: str) -> None:
    model = build(name)
    document = random_documents([17])[0]
    expected = eager_twin(model)(document).logits
    cache = transformers.DynamicCache(config=model.config)
    pieces = [model(piece, past_key_values=cache).logits for piece in document.split([6, 1, 7, 3], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, **TOLERANCE)


@pytest.mark.parametrize(("name", "cache"), with_caches(KINDS, ["dynamic", "static"]))
def test_several_tokens_continue_a_row_padded_on_the_left(name: str, cache: str) -> None:
    """Positions count the columns, as models do that are given none: chunks still begin at the first token."""
    model = build(name)
    tokens = torch.randint(1, VOCABULARY, (2, 17))
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0
    expected = eager_twin(model)(tokens, attention_mask=mask).logits
    length = {"max_cache_len": 20} if cache == "static" else {}
    past = {"dynamic": transformers.DynamicCache, "static": transformers.StaticCache}[cache](
        config=model.config, **length
    )
    pieces, ends = tokens.split([6, 1, 7, 3], dim=1), (6, 7, 14, 17)
    masks = [mask[:, :end] for end in ends]
    logits = [model(piece, attention_mask=part, past_key_values=past).logits for piece, part in zip(pieces, masks)]
    is_token = mask.bool()
    torch.testing.assert_close(torch.cat(logits, dim=1)[is_token], expected[is_token], **TOLERANCE)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_compiled_generation_with_a_static_cache(name: str) -> None:
    model = build(name)
    arguments = {**prompts([9, 3, 7]), "cache_implementation": "static"}
    expected = eager_twin(model).generate(**arguments)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    assert torch.equal(model.generate(**arguments), expected)
    torch._dynamo.reset()


# Packed prompts


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}])
def test_packed_prompts_are_refused(options: dict[str, Any]) -> None:
    """A step of one token does not tell which documents of the prompt it goes on with."""
    model, call = build("llama"), packed(random_documents([5, 4])) | {"max_new_tokens": 3, "do_sample": False} | options
    for mask in ({}, {"attention_mask": torch.ones(1, 9, dtype=torch.long)}):
        with pytest.raises(NotImplementedError, match="the tokens that generate appends would see all of them"):
            model.generate(**call, **mask)


def test_positions_of_one_document_in_each_row_are_taken() -> None:
    model = build("llama")
    batch = padded(random_documents([6, 4, 1]), "left")
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**batch, **options), eager_twin(model).generate(**batch, **options))
