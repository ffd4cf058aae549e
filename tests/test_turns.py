"""The collator of turns against each turn as a row of its own: the text that inference would see, losses, gradients."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from tiny_models import VOCABULARY, build, eager_twin
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import (
    Lfm2Config,
    Lfm2ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from hf_flashmask import bounds
from hf_flashmask.training import TurnsDataCollator

SPECIAL = ["<pad>", "<unk>", "<begin>", "<s>", "<e>", "<eot>", "<head>", "</head>", "<think>", "</think>", "<end>"]
CHARACTERS = " \n.,:{}[]\"'_" + "abcdefghijklmnopqrstuvwxyz" + "0123456789"

CHATML = """
{%- for message in messages -%}
    {{- '<s>' + message.role + '\n' + message.content + '<e>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<s>assistant\n' -}}{%- endif -%}
"""
# As Qwen3: thinking stays in the last message and behind the last question, and is dropped before it.
QWEN = """
{%- if tools %}{{ '<s>system\ntools ' + tools | tojson + '<e>\n' }}{% endif -%}
{%- set state = namespace(last_question=-1) -%}
{%- for message in messages -%}
    {%- if message.role == 'user' %}{% set state.last_question = loop.index0 %}{% endif -%}
{%- endfor -%}
{%- for message in messages -%}
    {%- if message.role == 'assistant' -%}
        {{- '<s>assistant\n' -}}
        {%- if loop.index0 > state.last_question and (loop.last or message.reasoning_content) -%}
            {{- '<think>\n' + (message.reasoning_content or '') + '\n</think>\n\n' -}}
        {%- endif -%}
        {{- message.content or '' -}}
        {%- for call in message.tool_calls or [] -%}
            {{- 'call ' + call.function.name + ' ' + call.function.arguments | tojson -}}
        {%- endfor -%}
        {{- '<e>\n' -}}
    {%- elif message.role == 'tool' -%}
        {{- '<s>user\nresult ' + message.content + '<e>\n' -}}
    {%- else -%}
        {{- '<s>' + message.role + '\n' + message.content + '<e>\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<s>assistant\n' -}}
    {%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif -%}
{%- endif -%}
"""
# As Llama 3.1: content is trimmed, tools stand in the first question, and a message either talks or calls.
LLAMA = """
{{- '<begin>' -}}
{%- for message in messages -%}
    {%- if message.role == 'tool' -%}
        {{- '<head>ipython</head>\n\n' + message.content | tojson + '<eot>' -}}
    {%- elif 'tool_calls' in message -%}
        {%- set call = message.tool_calls[0].function -%}
        {{- '<head>assistant</head>\n\n{"name": ' + call.name | tojson + ', "parameters": ' -}}
        {{- call.arguments | tojson + '}<eot>' -}}
    {%- else -%}
        {{- '<head>' + message.role + '</head>\n\n' -}}
        {%- if message.role == 'user' and tools and loop.first %}{{ tools | tojson + '\n\n' }}{% endif -%}
        {{- message.content | trim + '<eot>' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<head>assistant</head>\n\n' }}{% endif -%}
"""
TEMPLATES = {"chatml": (CHATML, "<e>"), "qwen": (QWEN, "<e>"), "llama": (LLAMA, "<eot>")}


def make_tokenizer(template: str = CHATML, end: str = "<e>") -> PreTrainedTokenizerFast:
    """One token for each character, except that a line break joins the one after it, as in the vocabularies of GPT."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *CHARACTERS, "\n\n"])}
    assert len(vocabulary) <= VOCABULARY
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("\n", "\n")], unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", eos_token=end, chat_template=template
    )


LLAMA = build("llama")


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    return make_tokenizer(*TEMPLATES[name])


# Conversations

TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **others: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **others}


def call(thought: str, argument: str) -> dict[str, Any]:
    function = {"name": "find", "arguments": {"what": argument}}
    return assistant("", reasoning_content=thought, tool_calls=[{"type": "function", "function": function}])


def tool(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text}


def random_conversation(generator: random.Random, *, has_tools: bool) -> dict[str, Any]:
    def text(longest: int) -> str:
        return "".join(generator.choices("ab", k=generator.randint(1, longest)))  # many common beginnings

    messages = [{"role": "system", "content": text(6)}] if generator.random() < 0.3 and not has_tools else []
    for _ in range(generator.randint(1, 3)):
        messages.append(user(text(5)))
        while has_tools and generator.random() < 0.4:
            messages += [call(text(4), text(3)), tool(text(4))]
        thought = text(6) if generator.random() < 0.8 else None
        messages.append(assistant(text(6), reasoning_content=thought))
        if generator.random() < 0.2:
            messages[-1]["train"] = False
    messages[-1]["train"] = True
    return {"messages": messages, "tools": TOOLS} if has_tools else {"messages": messages}


def random_conversations(name: str, seed: int, count: int = 3) -> list[dict[str, Any]]:
    generator = random.Random(seed)
    return [random_conversation(generator, has_tools=name != "chatml" and index == 0) for index in range(count)]


Row = tuple[list[int], int]
"""The tokens of a turn behind its context, and the number of those of the context."""


def rows_alone(tokenizer: Any, example: dict[str, Any], stop: str) -> list[Row]:
    """Each turn as inference sees it, from the rendered text."""
    rows = []
    options = {"tools": example.get("tools"), **example.get("chat_template_kwargs", {})}
    for place, message in enumerate(example["messages"]):
        if message["role"] != "assistant" or message.get("train") is False or message.get("weight") == 0:
            continue
        context, turn = (
            tokenizer.apply_chat_template(
                example["messages"][:length], tokenize=False, add_generation_prompt=length == place, **options
            )
            for length in (place, place + 1)
        )
        assert turn.startswith(context)
        generated = turn[len(context) :].split(stop)[0] + stop
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (context, generated)]
        rows.append((ids[0] + ids[1], len(ids[0])))
    return rows


def all_rows_alone(tokenizer: Any, examples: Sequence[dict[str, Any]], stop: str) -> list[Row]:
    return [row for example in examples for row in rows_alone(tokenizer, example, stop)]


def predictions(batch: dict[str, Tensor]) -> list[tuple[list[int], int]]:
    """Every label with the tokens that are seen where it is predicted, in their order of positions."""
    found = []
    dense = bounds.to_dense(batch["attention_mask"])[:, 0]
    for row, place in (batch["labels"] != -100).nonzero().tolist():
        visible = dense[row, place - 1].nonzero().flatten()
        positions = batch["position_ids"][row, visible]
        assert torch.equal(positions, torch.arange(len(visible)))
        found.append((batch["input_ids"][row, visible].tolist(), int(batch["labels"][row, place])))
    return sorted(found)


def predictions_alone(rows: Sequence[Row]) -> list[tuple[list[int], int]]:
    return sorted((ids[:place], ids[place]) for ids, start in rows for place in range(start, len(ids)))


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("seed", range(12))
def test_every_turn_is_predicted_once_from_the_context_of_inference(name: str, seed: int) -> None:
    tokenizer, examples = tokenizer_of(name), random_conversations(name, seed)
    rows = all_rows_alone(tokenizer, examples, TEMPLATES[name][1])
    longest = max(len(ids) for ids, _ in rows)
    for max_length in (None, longest, 2 * longest):
        collator = TurnsDataCollator(tokenizer, LLAMA, max_length, pad_to_multiple_of=7)
        batch = collator(examples)
        assert predictions(batch) == predictions_alone(rows)
        assert batch["input_ids"].shape[1] % 7 == 0
        assert max_length is None or batch["input_ids"].shape[1] < max_length + 7
        is_token = batch["attention_mask"][:, 0, 0] > 0
        assert collator.computed_tokens == int(is_token.sum())
        assert collator.given_tokens == sum(len(ids) for ids, _ in rows)
        assert bool((batch["input_ids"][~is_token] == tokenizer.pad_token_id).all())


def test_thinking_is_context_of_its_own_turn_only() -> None:
    tokenizer = tokenizer_of("qwen")
    messages = [
        user("q1"),
        call("t1", "x"),
        tool("r"),
        assistant("a1", reasoning_content="t2"),
        user("q2"),
        assistant("a2", reasoning_content="t3"),
    ]
    batch = TurnsDataCollator(tokenizer, LLAMA)([{"messages": messages}])
    first = '<s>user\nq1<e>\n<s>assistant\n<think>\nt1\n</think>\n\ncall find {"what": "x"}<e>'
    second = first + "\n<s>user\nresult r<e>\n<s>assistant\n<think>\nt2\n</think>\n\na1<e>"
    third = (
        '<s>user\nq1<e>\n<s>assistant\ncall find {"what": "x"}<e>\n<s>user\nresult r<e>\n<s>assistant\na1<e>\n'
        "<s>user\nq2<e>\n<s>assistant\n<think>\nt3\n</think>\n\na2<e>"
    )
    whole = [tokenizer.decode([*seen, label]) for seen, label in predictions(batch)]
    assert [text for text in whole if text.endswith("<e>")] == sorted([first, second, third], key=tokenizer.encode)
    assert all(any(row.startswith(text) for row in (first, second, third)) for text in whole)
    assert batch["input_ids"].shape[1] < len(tokenizer.encode(second)) + len(tokenizer.encode(third)) - 10


def test_a_template_that_keeps_everything_is_one_chain() -> None:
    tokenizer = tokenizer_of("chatml")
    messages = [user("one"), assistant("two"), user("three"), assistant("four"), user("never answered")]
    collator = TurnsDataCollator(tokenizer, LLAMA)
    batch = collator([{"messages": messages}])
    expected = tokenizer.apply_chat_template(messages[:4], tokenize=True, return_dict=True)["input_ids"]
    assert batch["input_ids"].tolist() == [expected[:-1]]  # without the line break that ends the last turn
    assert batch["position_ids"].tolist() == [list(range(len(expected) - 1))]
    assert tokenizer.decode(batch["labels"][0][batch["labels"][0] != -100]) == "two<e>four<e>"
    assert collator.computed_tokens == len(expected) - 1 < collator.given_tokens


@pytest.mark.parametrize("switch", [{"train": False}, {"weight": 0}, {"weight": 0.0, "train": None}])
def test_a_message_can_be_context_only(switch: dict[str, Any]) -> None:
    tokenizer = tokenizer_of("chatml")
    messages = [user("one"), assistant("two", **switch), user("three"), assistant("four", train=True, weight=1)]
    batch = TurnsDataCollator(tokenizer, LLAMA)([{"messages": messages}])
    assert tokenizer.decode(batch["labels"][0][batch["labels"][0] != -100]) == "four<e>"
    assert "two<e>" in tokenizer.decode(batch["input_ids"][0])


def test_columns_of_a_dataset() -> None:
    """Arrow fills keys that other messages have with None, and cannot store tools as they are."""
    tokenizer = tokenizer_of("llama")
    other = call("t", "y")
    other["tool_calls"][0]["function"]["arguments"] = {"where": "y"}
    messages = [user("q"), call("t", "x"), tool("r"), other, tool("r"), assistant("a")]
    example = {"messages": messages, "tools": json.dumps(TOOLS), "chat_template_kwargs": None, "source": "..."}
    batch = TurnsDataCollator(tokenizer, LLAMA)([Dataset.from_list([example])[0]])
    rows = rows_alone(tokenizer, {"messages": messages, "tools": TOOLS}, "<eot>")
    assert predictions(batch) == predictions_alone(rows)


def test_models_that_count_positions_from_another_number_are_refused() -> None:
    config = transformers.RobertaConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, is_decoder=True
    )
    model = transformers.RobertaForCausalLM._from_config(config, attn_implementation="flashmask")
    with pytest.raises(NotImplementedError, match="counts them from the one after `padding_idx`"):
        TurnsDataCollator(tokenizer_of("llama"), model)


def test_options_of_the_template() -> None:
    tokenizer = tokenizer_of("qwen")
    example = {"messages": [user("q"), assistant("a")], "chat_template_kwargs": {"enable_thinking": False}}
    batch = TurnsDataCollator(tokenizer, LLAMA)([example])
    assert tokenizer.decode(batch["labels"][0][batch["labels"][0] != -100]) == "a<e>"


def test_the_model_says_what_stops_generation() -> None:
    """As Gemma, whose tokenizer has another EOS token than the end of a turn."""
    tokenizer, model = make_tokenizer(CHATML, "<end>"), build("llama")
    # An "a" is no special token: the default of a configuration, as in a model from scratch.
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(["<e>", "a"])
    batch = TurnsDataCollator(tokenizer, model)([{"messages": [user("q"), assistant("a")]}])
    assert tokenizer.decode(batch["labels"][0][batch["labels"][0] != -100]) == "a<e>"


def test_a_turn_ends_with_the_first_token_that_stops_generation() -> None:
    """As Phi-3: the end of the conversation has a token of its own."""
    template = CHATML.replace("{%- endif -%}", "{%- else -%}{{- '<end>' -}}{%- endif -%}")
    tokenizer = make_tokenizer(template, "<end>")
    messages = [user("q1"), assistant("a1"), user("q2"), assistant("a2")]
    stops = tokenizer.convert_tokens_to_ids(["<end>", "<e>"])
    batch = TurnsDataCollator(tokenizer, LLAMA, eos_token_id=stops)([{"messages": messages}])
    assert tokenizer.decode(batch["labels"][0][batch["labels"][0] != -100]) == "a1<e>a2<e>"
    batch = TurnsDataCollator(tokenizer, LLAMA)([{"messages": messages}])
    labels = [tokenizer.decode([*seen, label]) for seen, label in predictions(batch)]
    assert sum(text.endswith("<e>\n<end>") for text in labels) == 2


def test_equal_turns_count_as_often_as_they_occur() -> None:
    """A template without history makes rows that are equal."""
    template = "{%- for message in messages[-2:] -%}" + CHATML.split("-%}", 1)[1]
    template = template.replace("messages[-2:]", "(messages[-1:] if add_generation_prompt else messages[-2:])")
    tokenizer = make_tokenizer(template)
    examples = [{"messages": [user("q"), assistant("a")] * 2 + [user("p"), assistant("b")]}]
    rows = all_rows_alone(tokenizer, examples, "<e>")
    assert rows[0] == rows[1]
    assert predictions(TurnsDataCollator(tokenizer, LLAMA)(examples)) == predictions_alone(rows)


@pytest.mark.parametrize("overflow", ["truncate", "drop"])
def test_turns_longer_than_a_row(overflow: Any) -> None:
    tokenizer, examples = tokenizer_of("qwen"), random_conversations("qwen", 5, count=6)
    rows = all_rows_alone(tokenizer, examples, "<e>")
    lengths = sorted(len(ids) for ids, _ in rows)
    for limit in (lengths[len(rows) // 2], lengths[-1] - 1):
        kept = [row for row in rows if len(row[0]) <= limit]
        if overflow == "truncate":
            kept = [(ids[:limit], start) for ids, start in rows if start < limit]
        batch = TurnsDataCollator(tokenizer, LLAMA, limit, overflow=overflow)(examples)
        assert predictions(batch) == predictions_alone(kept)
        collator = TurnsDataCollator(tokenizer, LLAMA, limit)
        with pytest.raises(ValueError, match=rf"message \d+ of example \d .* more than `max_length` \({limit}\)"):
            collator(examples)


def test_workers_make_the_same_batches() -> None:
    tokenizer, examples = tokenizer_of("qwen"), random_conversations("qwen", 3, count=4)
    expected = list(DataLoader(examples, batch_size=2, collate_fn=TurnsDataCollator(tokenizer, LLAMA, 400)))
    loader = DataLoader(examples, batch_size=2, collate_fn=TurnsDataCollator(tokenizer, LLAMA, 400), num_workers=1)
    for batch, other in zip(loader, expected, strict=True):
        torch.testing.assert_close(batch, other, rtol=0, atol=0)


# Templates of models


def tokenizer_of_model(name: str, stop: str) -> PreTrainedTokenizerFast:
    """The template that a family of models comes with, as TRL stores it, over bytes."""
    trl = pytest.importorskip("trl")
    template = (Path(trl.__file__).parent / f"chat_templates/{name}.jinja").read_text()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=stop, bos_token="<bos>", chat_template=template)


@pytest.mark.parametrize(
    ("name", "stop", "has_tools"),
    [
        ("qwen2_5", "<|im_end|>", True),
        ("qwen3", "<|im_end|>", True),
        ("qwen3_6", "<|im_end|>", True),
        ("llama3_1", "<|eot_id|>", True),
        ("nemotron_3_nano", "<|im_end|>", True),
        ("lfm2", "<|im_end|>", True),
        ("gptoss", "<|return|>", False),
        ("gemma3", "<end_of_turn>", False),
        ("phi3", "<|end|>", False),
    ],
)
def test_templates_of_models(name: str, stop: str, has_tools: bool) -> None:
    tokenizer = tokenizer_of_model(name, stop)
    messages = [user("q1"), assistant("a1", reasoning_content="t1", thinking="t1")]
    if has_tools:
        messages[1:1] = [call("t0", "x"), tool("r")]
    messages += [user("q2"), assistant("a2", reasoning_content="t2", thinking="t2")]
    example = {"messages": messages, "tools": TOOLS if has_tools else None}
    collator = TurnsDataCollator(tokenizer, LLAMA)
    batch = collator([example])
    assert predictions(batch) == predictions_alone(rows_alone(tokenizer, example, stop))
    assert collator.computed_tokens < collator.given_tokens


def test_a_template_of_a_model_that_drops_all_thinking() -> None:
    collator = TurnsDataCollator(tokenizer_of_model("deepseek_r1_distill", "<eos>"), LLAMA)
    with pytest.raises(ValueError, match=r"message 1 .* cannot be located: .* the context goes on with '<think>\\n'"):
        collator([{"messages": [user("q"), assistant("<think>\nt\n</think>\n\na")]}])


# Models


def loss_alone(model: PreTrainedModel, rows: Sequence[Row]) -> Tensor:
    """Mean over the tokens of all turns, each turn in a call of its own."""
    total = torch.zeros(())
    for ids, start in rows:
        logits = model(torch.tensor([ids])).logits[0, start - 1 : -1]
        total = total + torch.nn.functional.cross_entropy(logits.float(), torch.tensor(ids[start:]), reduction="sum")
    return total / sum(len(ids) - start for ids, start in rows)


@pytest.mark.parametrize("rows", ["one", "several"])
@pytest.mark.parametrize(
    ("model_name", "name"),
    [
        ("llama", "chatml"),
        ("llama", "qwen"),
        ("llama", "llama"),
        ("qwen3", "qwen"),
        ("mistral", "qwen"),
        ("gemma2", "llama"),
        ("gemma3", "qwen"),
        ("gpt_oss", "qwen"),
        ("llama4", "qwen"),
    ],
)
def test_loss_and_gradients_equal_each_turn_alone(model_name: str, name: str, rows: str) -> None:
    model = build(model_name)
    twin = eager_twin(model)
    tokenizer, examples = tokenizer_of(name), random_conversations(name, 1)
    alone = all_rows_alone(tokenizer, examples, TEMPLATES[name][1])
    max_length = None if rows == "one" else max(len(ids) for ids, _ in alone) + 3
    collator = TurnsDataCollator(tokenizer, model, max_length, pad_to_multiple_of=5)
    batch = collator(examples)
    assert (batch["input_ids"].shape[0] == 1) == (rows == "one")
    assert collator.computed_tokens < collator.given_tokens

    loss = model(**batch).loss
    loss.backward()
    expected = loss_alone(twin, alone)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for (parameter, trained), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (trained.grad is None) == (other.grad is None), parameter
        if other.grad is not None:
            difference = (trained.grad - other.grad).abs().max().item()
            assert difference <= 2e-5 * max(other.grad.abs().max().item(), 1e-2), parameter


def test_windows_of_more_turns_than_bounds_have_intervals() -> None:
    """The tree is split; without a window it is not."""
    tokenizer, model = tokenizer_of("qwen"), build("mistral")
    messages = [m for n in range(18) for m in (user("q"), assistant(f"a{n}", reasoning_content="t"))]
    examples = [{"messages": messages}]
    collator, unlimited = TurnsDataCollator(tokenizer, model), TurnsDataCollator(tokenizer, LLAMA)
    alone = all_rows_alone(tokenizer, examples, "<e>")
    loss = model(**collator(examples)).loss
    assert loss.item() == pytest.approx(loss_alone(eager_twin(model), alone).item(), rel=1e-5)
    assert predictions(unlimited(examples)) == predictions_alone(alone)
    assert unlimited.computed_tokens < collator.computed_tokens < collator.given_tokens


class RowsAlone:
    """A collator that makes a padded row of each turn."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        rows = all_rows_alone(self.tokenizer, examples, "<e>")
        ids = [torch.tensor(ids) for ids, _ in rows]
        labels = [torch.tensor([-100] * start + ids[start:]) for ids, start in rows]
        return {
            "input_ids": pad_sequence(ids, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        }


def conversations() -> Dataset:
    return Dataset.from_list([{"messages": example["messages"]} for example in random_conversations("chatml", 4, 12)])


def options(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 3e-3,
        "adam_epsilon": 1e-5,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "eval_strategy": "no",
    }


def losses(trainer: Trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def train(model: PreTrainedModel, collator: Any, folder: Path) -> list[float]:
    args = TrainingArguments(**options(folder), per_device_eval_batch_size=12)
    trainer = Trainer(model, args, collator, train_dataset=conversations(), eval_dataset=conversations())
    return [*losses(trainer), trainer.evaluate()["eval_loss"]]


def test_trainer_learns_as_from_separate_rows(tmp_path: Path) -> None:
    """Batches of unequal numbers of trained tokens, two to a step: Trainer weighs each token alike in both."""
    tokenizer = tokenizer_of("qwen")
    model = build("gemma2")
    found = train(model, TurnsDataCollator(tokenizer, model, 300), tmp_path)
    expected = train(build("gemma2", "eager"), RowsAlone(tokenizer), tmp_path)
    assert len(found) == 4
    assert found[2] < found[0]
    assert found == pytest.approx(expected, rel=1e-4)


def test_trl_takes_the_collator_unchanged(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    tokenizer = tokenizer_of("qwen")
    trainer = trl.SFTTrainer(
        build("llama"),
        args=trl.SFTConfig(**options(tmp_path), dataset_kwargs={"skip_prepare_dataset": True}, bf16=False),
        train_dataset=conversations(),
        processing_class=tokenizer,
        data_collator=TurnsDataCollator(tokenizer, LLAMA, 300),
    )
    args = TrainingArguments(**options(tmp_path))
    plain = Trainer(build("llama", "eager"), args, RowsAlone(tokenizer), train_dataset=conversations())
    assert losses(trainer) == pytest.approx(losses(plain), rel=1e-4)


# What is refused


def test_options_are_checked() -> None:
    tokenizer = tokenizer_of("chatml")
    for given, message in [
        ({"max_length": 1}, "`max_length` must be an integer of at least 2, got 1"),
        ({"overflow": "split"}, r"`overflow` must be one of \['error', 'truncate', 'drop'\], got 'split'"),
        ({"strategy": "wrapped"}, "`strategy` must be one of .* got 'wrapped'"),
        ({"pad_to_multiple_of": 0}, "`pad_to_multiple_of` must be an integer of at least 1, got 0"),
        ({"eos_token_id": ["<e>"]}, "`eos_token_id` must be an integer of at least 0, got '<e>'"),
    ]:
        with pytest.raises(ValueError, match=message):
            TurnsDataCollator(tokenizer, LLAMA, **given)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="nor the tokenizer has an EOS token: pass `eos_token_id`"):
        TurnsDataCollator(tokenizer, LLAMA)


def test_models_are_checked() -> None:
    tokenizer = tokenizer_of("chatml")
    with pytest.raises(ValueError, match='TurnsDataCollator needs attn_implementation="flashmask"'):
        TurnsDataCollator(tokenizer, build("llama", "eager"))
    with pytest.raises(ValueError, match="TurnsDataCollator needs a Transformers model, Linear holds none"):
        TurnsDataCollator(tokenizer, torch.nn.Linear(2, 2))
    with pytest.raises(NotImplementedError, match="TurnsDataCollator: with output_router_logits=True"):
        TurnsDataCollator(tokenizer, build("gpt_oss", output_router_logits=True))
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    config = Lfm2Config(vocab_size=97, hidden_size=32, **heads, layer_types=["conv", "full_attention"])
    with pytest.raises(NotImplementedError, match="TurnsDataCollator cannot share what goes from token to token other"):
        TurnsDataCollator(tokenizer, Lfm2ForCausalLM._from_config(config, attn_implementation="flashmask"))
    collator = TurnsDataCollator(tokenizer, build("llama4", floor_scale=8))
    with pytest.raises(
        ValueError, match=r"a row of the batch has \d+ tokens, and this model scales scores by the column"
    ):
        collator([{"messages": [user("q"), assistant("a")]}])


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"text": "..."}, r"example 1 of the batch must have `messages`.*got \['text'\].*remove_unused_columns=False"),
        ({"messages": [{"content": "..."}]}, "message 0 of example 1 of the batch must be a dict with a `role`"),
        ({"messages": [user("q"), assistant("a", weight=0.5)]}, "`train` and `weight` of message 1 .* got 0.5"),
        # The line break of the generation prompt becomes one token with that of the answer.
        ({"messages": [user("q"), assistant("\na")]}, "message 1 .* cannot be located: the chat template of .*white"),
        ({"messages": [user("q"), {"role": "assistant"}]}, "message 1 .* cannot be rendered: the chat template of"),
        ({"messages": [user("q"), assistant("a<e>b")]}, "message 1 .* has '<e>' before its end.*'b<e>"),
    ],
)
def test_bad_examples_are_named(example: dict[str, Any], message: str) -> None:
    tokenizer = tokenizer_of("chatml")
    collator = TurnsDataCollator(tokenizer, LLAMA)
    good = {"messages": [user("q"), assistant("a")]}
    with pytest.raises(ValueError, match=message):
        collator([good, example])
    assert collator.given_tokens == collator.computed_tokens == 0


def test_a_turn_that_cannot_be_located_is_refused() -> None:
    """As DeepSeek-R1: the prompt begins the thinking, which the template drops from the last message as well."""
    template = CHATML.replace("'<s>assistant\n'", "'<s>assistant\n<think>\n'")
    tokenizer = make_tokenizer(template)
    tokenizer.name_or_path = "some/model"
    collator = TurnsDataCollator(tokenizer, LLAMA)
    messages = [user("q"), assistant("a", train=False), user("q"), assistant("a")]
    with pytest.raises(ValueError, match=r"message 3 .* chat template of some/model .* goes on with '<think>\\n', the"):
        collator([{"messages": messages}])


def test_a_turn_without_an_end_is_refused() -> None:
    collator = TurnsDataCollator(make_tokenizer(CHATML, "<end>"), LLAMA)
    with pytest.raises(ValueError, match=r"message 1 .* has no end: .* writes 'a<e>\\n' at its end, and none of"):
        collator([{"messages": [user("q"), assistant("a")]}])


def test_a_batch_without_turns_is_refused() -> None:
    collator = TurnsDataCollator(tokenizer_of("chatml"), LLAMA)
    with pytest.raises(ValueError, match="the batch has no turn to train: none of its 2 examples"):
        collator([{"messages": [user("q")]}, {"messages": [user("q"), assistant("a", train=False)]}])


def test_a_conversation_without_turns_changes_nothing() -> None:
    collator = TurnsDataCollator(tokenizer_of("chatml"), LLAMA)
    conversations = [{"messages": [user("q"), assistant(text)]} for text in ("a", "aa")]
    nothing: list[dict[str, Any]] = [{"messages": []}, {"messages": [user("q")]}]
    batch = collator([nothing[0], conversations[0], nothing[1], conversations[1]])
    for name, expected in collator(conversations).items():
        assert torch.equal(batch[name], expected), name
