"""The attention function by itself, what it refuses, and what masks cost."""

from __future__ import annotations

import gc
import sys
import weakref
from typing import Any

import pytest
import torch
import transformers
from tiny_models import build, config_of, cumulative_lengths, eager_twin, logits_alone, packed, random_documents
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

from flashmask_kernels import dispatch, reference_attention, schedules
from flashmask_kernels.configs import Config, Configs
from flashmask_kernels.dropout import draw_seed, kept_elements
from hf_flashmask import bounds, integration
from hf_flashmask.integration import Mask, flashmask_attention_forward, flashmask_mask

# The mask function


def mask_for(**changes: Any) -> Mask:
    arguments = {"batch_size": 2, "q_length": 6, "kv_length": 6, "mask_function": masking_utils.causal_mask_function}
    return flashmask_mask(**{**arguments, **changes})


def test_masks_without_bounds_hide_nothing_but_the_triangle() -> None:
    padded = torch.tensor([[True] * 6, [False] + [True] * 5])
    both = masking_utils.bidirectional_mask_function
    everything, triangle = mask_for(mask_function=both, allow_is_bidirectional_skip=True), mask_for()
    assert (everything.bounds, everything.is_causal, triangle.bounds, triangle.is_causal) == (None, False, None, True)
    for changes in (
        {"attention_mask": torch.ones(2, 6, dtype=torch.bool)},
        {"attention_mask": padded},
        {"allow_is_causal_skip": False},
        {"mask_function": both},
        {"mask_function": masking_utils.sliding_window_causal_mask_function(3)},
        {"kv_length": 8, "q_offset": 2},
        {"kv_length": 8},
        {"q_offset": torch.tensor(0)},
    ):
        assert mask_for(**changes).bounds is not None, changes


@pytest.mark.parametrize("position_ids", [None, torch.tensor([[0, 1, 0, 1, 2, 3]])])
def test_plain_causal_layers_that_call_themselves_bidirectional(position_ids: Tensor | None) -> None:
    inputs = random_inputs(q_len=6)
    out, _ = flashmask_attention_forward(
        attention_module(is_causal=False), *inputs, mask_for(), position_ids=position_ids
    )
    visible = bounds.causal(6) if position_ids is None else bounds.from_position_ids(position_ids)
    torch.testing.assert_close(out, dense_attention(*inputs, bounds.to_dense(visible)))


def test_a_window_is_in_the_bounds_even_if_the_model_does_not_pass_it_on() -> None:
    module = attention_module()
    inputs = random_inputs(q_len=6)
    mask = mask_for(mask_function=masking_utils.sliding_window_causal_mask_function(3))
    out, _ = flashmask_attention_forward(module, *inputs, mask)
    torch.testing.assert_close(out, dense_attention(*inputs, bounds.to_dense(bounds.sliding_window(3, 6))))


# The attention function


def attention_module(**attributes: Any) -> nn.Module:
    module = nn.Module()
    for name, value in {"is_causal": True, **attributes}.items():
        setattr(module, name, value)
    return module


def random_inputs(q_len: int = 7, kv_len: int | None = None, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    kv_len = q_len if kv_len is None else kv_len
    shapes = ((batch, q_len, 4, 8), (batch, kv_len, 2, 8), (batch, kv_len, 2, 12))
    query, key, value = (torch.randn(shape).transpose(1, 2) for shape in shapes)
    return query, key, value


def dense_attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """`[B, S_q, H, D_v]`; float64 inside."""
    key, value = (tensor.double().repeat_interleave(query.shape[1] // key.shape[1], 1) for tensor in (key, value))
    scores = query.double() @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    return (scores.masked_fill(~visible, -torch.inf).softmax(-1) @ value).transpose(1, 2).to(query.dtype)


def same_document(position_ids: Tensor) -> Tensor:
    document = (position_ids == 0).cumsum(-1)
    return (document[:, :, None] == document[:, None, :])[:, None]


@pytest.mark.parametrize("window", [None, 0, 1, 3, 50])
@pytest.mark.parametrize("has_documents", [False, True])
@pytest.mark.parametrize("is_causal", [True, False])
def test_rebuilding_from_hints(is_causal: bool, has_documents: bool, window: int | None) -> None:
    inputs = random_inputs()
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 0, 0], [0, 1, 2, 3, 4, 0, 1]])
    row, column = torch.arange(7)[:, None], torch.arange(7)
    visible = (column <= row) if is_causal else torch.ones(7, 7, dtype=torch.bool)
    if window:
        visible = visible & ((row - column).abs() < window)
    if has_documents:
        visible = visible & same_document(position_ids)
    out, weights = flashmask_attention_forward(
        attention_module(is_causal=is_causal),
        *inputs,
        None,
        sliding_window=window,
        position_ids=position_ids if has_documents else None,
    )
    assert weights is None
    assert out.shape == (2, 7, 4, 12)
    assert out.is_contiguous()
    torch.testing.assert_close(out, dense_attention(*inputs, visible))


def test_is_causal_of_the_call_goes_before_that_of_the_module() -> None:
    inputs = random_inputs()
    everything, triangle = torch.ones(7, 7, dtype=torch.bool), torch.ones(7, 7, dtype=torch.bool).tril()
    for module, is_causal, visible in (
        (attention_module(), False, everything),
        (attention_module(is_causal=False), True, triangle),
        (nn.Module(), None, triangle),
    ):
        out, _ = flashmask_attention_forward(module, *inputs, None, is_causal=is_causal)
        torch.testing.assert_close(out, dense_attention(*inputs, visible))


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss", "afmoe", "llama4"])
def test_documents_are_apart_by_lengths_or_positions(name: str, is_padded: bool, use_cache: bool) -> None:
    """The lengths tell the third from the second, positions the others."""
    model, documents = build(name), random_documents([9, 7, 5, 6])
    expected = logits_alone(eager_twin(model), documents)
    batch, ends = packed(documents), cumulative_lengths(documents)
    batch["position_ids"][:, ends[2] : ends[3]] += 7
    batch["cu_seq_lens_q"] = batch["cu_seq_lens_k"] = ends[[0, 2, 4]]
    if is_padded:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    torch.testing.assert_close(model(**batch, use_cache=use_cache).logits, expected, rtol=1e-4, atol=1e-5)


def test_cu_seq_lens_of_queries_and_keys() -> None:
    inputs = random_inputs(batch=1)
    visible = torch.block_diag(torch.ones(3, 2), torch.ones(4, 5)).bool()
    ends = {"cu_seq_lens_q": torch.tensor([0, 3, 7]), "cu_seq_lens_k": torch.tensor([0, 2, 7])}
    out, _ = flashmask_attention_forward(attention_module(is_causal=False), *inputs, None, **ends)
    torch.testing.assert_close(out, dense_attention(*inputs, visible))


def test_positions_that_do_not_count_tokens_are_no_documents() -> None:
    inputs = random_inputs()
    triangle = torch.ones(7, 7, dtype=torch.bool).tril()
    restarting = torch.tensor([0, 1, 2, 0, 1, 2, 3])
    for position_ids in (restarting.expand(3, 2, 7), torch.tensor([[0, 0]]), restarting.expand(2, 7) + 0j):
        out, _ = flashmask_attention_forward(attention_module(), *inputs, None, position_ids=position_ids)
        torch.testing.assert_close(out, dense_attention(*inputs, triangle))


@pytest.mark.parametrize(
    ("argument", "variable", "expected"),
    [(None, None, False), (None, "0", False), (None, "1", True), (False, "1", False), (True, None, True)],
)
def test_deterministic_gradients_are_asked_for_as_with_flash_attention(
    argument: bool | None, variable: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`modeling_flash_attention_utils._process_flash_attention_kwargs`: the argument goes before the variable."""
    asked = []

    def attend(query: Tensor, *arguments: Any, deterministic: bool, **options: Any) -> Tensor:
        asked.append(deterministic)
        return query

    monkeypatch.setattr(integration.attention, "flashmask_attention", attend)
    monkeypatch.delenv("FLASH_ATTENTION_DETERMINISTIC", raising=False)
    if variable is not None:
        monkeypatch.setenv("FLASH_ATTENTION_DETERMINISTIC", variable)
    flashmask_attention_forward(attention_module(), *random_inputs(), None, deterministic=argument)
    assert asked == [expected]


def test_scaling_softcap_and_sinks() -> None:
    query, key, value = random_inputs()
    sinks = torch.randn(4, requires_grad=True)
    out, _ = flashmask_attention_forward(
        attention_module(), query, key, value, None, scaling=0.7, softcap=2.0, s_aux=sinks
    )
    reference_sinks = sinks.detach().double().requires_grad_()
    keys, values = (tensor.double().repeat_interleave(2, 1) for tensor in (key, value))
    scores = 2.0 * torch.tanh(query.double() @ keys.transpose(-1, -2) * 0.7 / 2.0)
    scores = scores.masked_fill(~torch.ones(7, 7, dtype=torch.bool).tril(), -torch.inf)
    logits = torch.cat([scores, reference_sinks.view(1, 4, 1, 1).expand(2, 4, 7, 1)], -1)
    expected = (logits.softmax(-1)[..., :-1] @ values).transpose(1, 2)
    torch.testing.assert_close(out, expected.float())
    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(sinks.grad, reference_sinks.grad.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("q_len", [1, 5, 16])
@pytest.mark.parametrize("num_planes", [1, 2, 6])
def test_a_few_rows_against_a_cache_give_the_same_without_gradients(q_len: int, num_planes: int) -> None:
    """Steps of generation take a shorter path."""
    inputs = random_inputs(q_len, kv_len=37)
    mask = torch.randint(-2, q_len + 3, (2, 1, num_planes, 37), dtype=torch.int32)
    mask[0, :, :2] = torch.tensor([0, 99])[:num_planes, None]
    module = attention_module()
    out, _ = flashmask_attention_forward(module, *inputs, mask, scaling=0.3)
    with torch.no_grad():
        decoded, _ = flashmask_attention_forward(module, *inputs, mask, scaling=0.3)
    torch.testing.assert_close(decoded, out)
    assert not decoded[0].any()
    visible = bounds.to_dense(mask, q_len)
    expected = dense_attention(inputs[0] * 0.3 * 8**0.5, *inputs[1:], visible).nan_to_num(0.0)
    torch.testing.assert_close(decoded, expected)


# Once per forward pass


def spy_on_kernel(monkeypatch: pytest.MonkeyPatch) -> list[Tensor | None]:
    seen: list[Tensor | None] = []
    kernel = integration.attention.flashmask_attention

    def spy(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor | None = None, **kwargs: Any) -> Any:
        seen.append(bounds)
        return kernel(query, key, value, bounds, **kwargs)

    monkeypatch.setattr(integration.attention, "flashmask_attention", spy)
    return seen


@pytest.mark.usefixtures("by_kernels")
@pytest.mark.parametrize("call", [{}, {"use_cache": False}, {"attention_mask": torch.tensor([[1] * 12 + [0]])}])
def test_layers_share_one_tensor_of_bounds(call: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = spy_on_kernel(monkeypatch)
    model = build("llama", num_hidden_layers=4)
    model(**packed(random_documents([5, 8])), **call)
    assert len(seen) == 4
    assert all(bounds is seen[0] for bounds in seen)
    assert seen[0].shape == (1, 1, 1, 13)


def test_layer_types_share_among_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = spy_on_kernel(monkeypatch)
    layer_types = ["sliding_attention", "full_attention"] * 2
    model = build("gemma2", num_hidden_layers=4, layer_types=layer_types)
    model(**packed(random_documents([5, 8])))
    assert seen[0] is seen[2]
    assert seen[1] is seen[3]
    assert seen[0] is not seen[1]


@pytest.mark.usefixtures("by_kernels")
@pytest.mark.parametrize("checkpointing", [None, "reentrant", "non_reentrant"])
@pytest.mark.parametrize(("name", "kinds"), [("llama", 1), ("gemma2", 2)])
def test_layers_share_the_schedules_of_their_bounds(
    name: str, kinds: int, checkpointing: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the kernels there are three, forward, dK and dV, dQ: each needs one schedule for each kind of layer."""
    configs = Configs(*(Config(*tile, 4, 2) for tile in ((32, 16), (16, 32), (16, 16))))
    monkeypatch.setattr(dispatch, "configs_of", lambda *args: configs)
    builds = []
    build_schedule = schedules.build_schedule
    monkeypatch.setattr(schedules, "build_schedule", lambda *args: builds.append(args[1:5]) or build_schedule(*args))
    layer_types = ["sliding_attention", "full_attention"] * 2 if kinds == 2 else None
    model = build(name, num_hidden_layers=4, layer_types=layer_types).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        model.enable_input_require_grads()
    row = packed(random_documents([5, 8]))
    logits = model(**row, use_cache=False).logits
    assert len(builds) == kinds
    logits.square().mean().backward()
    assert len(builds) == 3 * kinds
    assert len(set(builds)) == 3
    torch.testing.assert_close(logits, eager_twin(model)(**row, use_cache=False).logits, rtol=1e-4, atol=1e-5)


def test_a_padded_batch_makes_its_bounds_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, made = spy_on_kernel(monkeypatch), []
    original = integration.mask_function.from_mask_function
    monkeypatch.setattr(
        integration.mask_function, "from_mask_function", lambda *args, **kw: made.append(kw) or original(*args, **kw)
    )
    model = build("gemma2", num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2)
    tokens = torch.cat(random_documents([9, 9]))
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    model(tokens, attention_mask=mask)
    assert len(made) == 2
    assert seen[0] is seen[2] is not seen[1]
    assert seen[1] is seen[3]


def test_changed_positions_are_noticed() -> None:
    inputs = random_inputs(batch=1)
    position_ids = torch.tensor([[0, 1, 2, 3, 4, 5, 6]])
    for restart in (None, 2, 5):
        if restart is not None:
            position_ids[0, restart:] = torch.arange(7 - restart)
        visible = same_document(position_ids) & torch.ones(7, 7, dtype=torch.bool).tril()
        for _ in range(2):
            out, _ = flashmask_attention_forward(attention_module(), *inputs, None, position_ids=position_ids)
            torch.testing.assert_close(out, dense_attention(*inputs, visible))


def test_inference_tensors_are_never_stale() -> None:
    with torch.inference_mode():
        test_changed_positions_are_noticed()


@pytest.mark.parametrize("name", ["gemma2", "mistral"])
def test_a_tree_does_not_outlive_the_call(name: str) -> None:
    mask, position_ids = bounds.from_prefix_tree([-1, 0, 0], [5, 4, 3]), torch.tensor([[*range(9), 5, 6, 7]])
    build(name)(torch.arange(1, 13)[None], position_ids=position_ids, attention_mask=mask, use_cache=False)
    alive = weakref.ref(mask)
    del mask
    gc.collect()
    assert alive() is None


def test_bounds_do_not_outlive_the_positions() -> None:
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    flashmask_attention_forward(attention_module(), *random_inputs(batch=1), None, position_ids=position_ids)
    entries = integration.memo.recent._entries
    made = [weakref.ref(known.entry.value) for known in entries if known.sources and known.sources[0]() is position_ids]
    del position_ids
    gc.collect()
    assert made
    assert all(value() is None for value in made)


@pytest.mark.parametrize(("dim", "dim_v"), [(8, 8), (8, 12), (300, 300)])
@pytest.mark.parametrize(("batch", "heads", "kv_heads"), [(2, 4, 2), (1, 3, 3), (2, 5, 1)])
def test_decoding_steps(batch: int, heads: int, kv_heads: int, dim: int, dim_v: int) -> None:
    """One row that sees all, padding, several rows with a window, a row that sees nothing, a mask for each sequence."""
    kv_len = 13
    shapes = ((heads, 4, dim), (kv_heads, kv_len, dim), (kv_heads, kv_len, dim_v))
    query, key, value = (torch.randn(batch, length, count, size).transpose(1, 2) for count, length, size in shapes)
    start = torch.arange(batch * kv_len, dtype=torch.int32).view(batch, 1, 1, kv_len) % 4
    masks = {
        1: [None, torch.cat([1 + 0 * start, start - 2], 2)],
        4: [torch.cat([start, 3 - start], 2), torch.zeros(1, 1, 2, kv_len, dtype=torch.int32)],
    }
    for q_len, of_rows in masks.items():
        for mask in of_rows:
            rows = query[:, :, -q_len:]
            visible = torch.ones(1, 1, q_len, kv_len, dtype=torch.bool)
            if mask is not None:
                row = torch.arange(q_len)[:, None]
                visible = ~((row >= mask[:, :, :1]) | (row < mask[:, :, 1:]))
            with torch.no_grad():
                output, _ = flashmask_attention_forward(attention_module(), rows, key, value, mask)
            expected = dense_attention(rows, key, value, visible).nan_to_num(0.0)
            torch.testing.assert_close(output, expected)


# What is refused


def test_a_decoding_step_that_sees_everything_needs_no_mask() -> None:
    step = {"q_length": 1, "kv_length": 9, "q_offset": 8}
    assert mask_for(**step).bounds is None
    assert mask_for(**step, attention_mask=torch.ones(2, 9, dtype=torch.bool)).bounds is None
    window, no_padding = masking_utils.sliding_window_causal_mask_function, torch.zeros(2, dtype=torch.long)
    assert mask_for(**step, mask_function=window(9), local_size=9).bounds is None
    chunks = {"mask_function": masking_utils.chunked_causal_mask_function(9, no_padding), "local_size": 9}
    for hidden in (
        {"q_offset": 6},
        {"q_offset": torch.tensor(8)},
        {"attention_mask": torch.tensor([[True] * 9, [False] + [True] * 8])},
        {"mask_function": window(8), "local_size": 8},
        {**chunks, "kv_offset": 3, "q_offset": 11},
        {"allow_is_causal_skip": False},
    ):
        assert mask_for(**{**step, **hidden}).bounds is not None
    query, key, value = random_inputs(1, 9)
    with torch.no_grad():
        for is_causal in (True, False):
            module = attention_module(is_causal=is_causal)
            output, _ = flashmask_attention_forward(module, query, key, value, None, sliding_window=9)
            expected = dense_attention(query, key, value, torch.ones(1, 9, dtype=torch.bool))
            torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("argument", ["position_bias", "indices", "block_indices", "sinks", "cache"])
def test_arguments_that_change_the_result_are_refused(argument: str) -> None:
    with pytest.raises(NotImplementedError, match=f"`{argument}`.*which Module passes"):
        flashmask_attention_forward(attention_module(), *random_inputs(), None, **{argument: torch.ones(1)})
    flashmask_attention_forward(attention_module(), *random_inputs(), None, **{argument: None})


@pytest.mark.parametrize(
    ("name", "setting"),
    [("llama", "attention_dropout"), ("bert", "attention_probs_dropout_prob"), ("gpt2", "attn_pdrop")],
)
def test_attention_dropout_acts_in_training_only(name: str, setting: str) -> None:
    others = {"resid_pdrop": 0.0, "embd_pdrop": 0.0} if name == "gpt2" else {}
    model, plain = build(name, **{setting: 0.25}, **others), build(name, **{setting: 0.0}, **others)
    tokens = random_documents([9])[0]
    torch.testing.assert_close(model(tokens).logits, plain(tokens).logits)
    model.train()
    plain.train()
    first, second = (model(tokens).logits for _ in range(2))
    assert (first - second).abs().max() > 1e-3
    torch.testing.assert_close(plain(tokens).logits, plain(tokens).logits)


def test_a_dict_of_masks_for_layers_of_one_type_is_refused() -> None:
    mask = {"full_attention": bounds.causal(6)}
    with pytest.raises(TypeError, match=r"dict of masks for 'full_attention', but all layers of llama"):
        build("llama")(random_documents([6])[0], attention_mask=mask)


@pytest.mark.parametrize("mask", [bounds.causal(6).numpy(), [[1] * 6]], ids=type)
def test_masks_that_are_no_tensors_are_refused(mask: Any) -> None:
    with pytest.raises(
        TypeError, match=rf"is a {type(mask).__name__}, not a tensor: .*\[B or 1, H or 1, C, S_k\] are int32"
    ):
        build("llama")(random_documents([6])[0], attention_mask=mask)


def test_bounds_of_floats_are_told_to_be_int32() -> None:
    model, tokens = build("llama"), random_documents([6])[0]
    with pytest.raises(NotImplementedError, match=r"cannot add a bias .* are int32: call \.to\(torch\.int32\)"):
        model(tokens, attention_mask=bounds.causal(6).float())
    with pytest.raises(
        ValueError, match=r"a dense mask of shape \[1, 1, 2, 6\].* are int32: call \.to\(torch\.int32\)"
    ):
        model(tokens, attention_mask=bounds.bidirectional(6).float())


def test_attention_dropout_drops_weights() -> None:
    query, key, value = random_inputs()
    batch, heads, q_len, _ = query.shape
    torch.manual_seed(5)
    head = torch.arange(batch * heads).view(batch, heads, 1, 1)
    rows, columns = torch.arange(q_len)[:, None], torch.arange(key.shape[2])
    keep = kept_elements(draw_seed(torch.device("cpu")), head, rows, columns, 0.4)
    expected, _ = reference_attention(query, key, value, bounds.causal(q_len), keep=keep, dropout_p=0.4)
    torch.manual_seed(5)
    output, _ = flashmask_attention_forward(attention_module(), query, key, value, None, dropout=0.4)
    torch.testing.assert_close(output.transpose(1, 2), expected)


def test_output_attentions_warns(caplog: pytest.LogCaptureFixture) -> None:
    integration.name.logger.warning_once.cache_clear()
    transformers.logging.enable_propagation()
    _, weights = flashmask_attention_forward(attention_module(), *random_inputs(), None, output_attentions=True)
    assert weights is None
    assert "never computes the attention weights" in caplog.text
    assert caplog.text.count('Use attn_implementation="eager"') == 1
    assert not any(build("llama")(torch.arange(6)[None], output_attentions=True).attentions)


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "mistral"])
def test_dense_mask_is_converted_once(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    integration.name.logger.warning_once.cache_clear()
    transformers.logging.enable_propagation()
    converted = []
    original = integration.layer_mask.from_dense_mask
    monkeypatch.setattr(
        integration.layer_mask, "from_dense_mask", lambda *args: converted.append(args) or original(*args)
    )
    model, tokens = build(name), torch.cat(random_documents([4, 4]))
    visible = (torch.rand(2, 1, 4, 4) < 0.5) | torch.eye(4, dtype=torch.bool)
    additive = torch.zeros(2, 1, 4, 4).masked_fill(~visible, torch.finfo(torch.float32).min)
    expected = eager_twin(model)(tokens, attention_mask=additive, use_cache=False).logits
    for number, mask in enumerate((visible, additive), 1):
        logits = model(tokens, attention_mask=mask, use_cache=False).logits
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
        assert len(converted) == number
    assert caplog.text.count("converts a dense 4-D `attention_mask`") == 1


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.full((2, 1, 7, 7), -0.5), NotImplementedError, r"cannot add a bias.*sdpa"),
        (torch.zeros(2, 1, 7, 7, requires_grad=True), NotImplementedError, r"cannot add a bias.*sdpa"),
        (torch.ones(2, 1, 1, 7, dtype=torch.long), TypeError, r"int64"),
        (torch.ones(2, 7, dtype=torch.int32), ValueError, r"C = 1 or an even number"),
        (torch.ones(2, 1, 3, 7, dtype=torch.int32), ValueError, r"C = 1 or an even number"),
        (torch.ones(2, 1, 34, 7, dtype=torch.int32), ValueError, r"C = 1 or an even number up to 32"),
        (bounds.causal(6), ValueError, r"last dimension must be the key length, 7"),
        (bounds.causal(7).repeat(3, 1, 1, 1), ValueError, r"must be 1 or the batch, 2"),
        (bounds.causal(7).repeat(2, 3, 1, 1), ValueError, r"must be 1 or the number of query heads, 4"),
        (torch.ones(2, 1, 1, 7, dtype=torch.int32, device="meta"), ValueError, r"is on meta"),
    ],
)
def test_masks_that_are_no_bounds_are_refused(mask: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        flashmask_attention_forward(attention_module(), *random_inputs(), mask)
    assert "`attention_mask`" in str(raised.value)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(2, 1, 7, 6, dtype=torch.bool), ValueError, r"dense mask of shape \[2, 1, 7, 6\].*S_k = 7"),
        (torch.ones(2, 1, 6, 7), ValueError, r"dense mask of shape \[2, 1, 6, 7\].*S_q = 7"),
        (torch.ones(3, 1, 7, 7, dtype=torch.bool), ValueError, r"dense mask of shape \[3, 1, 7, 7\].*B = 2"),
        (torch.ones(2, 3, 7, 7, dtype=torch.bool), ValueError, r"dense mask of shape \[2, 3, 7, 7\].*H = 4"),
        (torch.ones(2, 1, 7, 7, dtype=torch.bool, device="meta"), ValueError, r"is on meta.*\.to\(\)"),
        (torch.randn(2, 1, 7, 7), NotImplementedError, r"cannot add a bias.*sdpa"),
        (bounds.causal(7).long(), TypeError, r"is torch.int64.*bounds.*are int32.*\.to\(torch.int32\)"),
        *(
            (bounds.causal(7).to(torch.uint32).repeat(1, heads, 1, 1), TypeError, "is torch.uint32.*bounds.*are int32")
            for heads in (1, 4)
        ),
        (torch.empty(1, 1, 0, 7, dtype=torch.int32), ValueError, r"C = 1 or an even number.*\[1, 1, 0, 7\]"),
        (torch.ones(1, 1, 3, 7, dtype=torch.int32), ValueError, r"C = 1 or an even number.*\[1, 1, 3, 7\]"),
        (bounds.causal(7).repeat(3, 1, 1, 1), ValueError, r"dimension 0 must be 1 or the batch, 2"),
        (bounds.causal(7).repeat(1, 3, 1, 1), ValueError, r"dimension 1 must be 1 or the number of query heads, 4"),
        (bounds.causal(7).transpose(2, 3), ValueError, r"C = 1 or an even number"),
        (bounds.causal(6), ValueError, r"the last dimension must be the key length, 7"),
        (bounds.causal(7).to("meta"), ValueError, r"is on meta.*\.to\(\)"),
        (torch.ones(2, 6, dtype=torch.long), ValueError, r"shape \[2, 6\]; expected \[2, 7\]"),
        (torch.ones(2, 9, dtype=torch.long), ValueError, r"shape \[2, 9\]; expected \[2, 7\]"),
        (torch.ones(3, 7, dtype=torch.long), ValueError, r"shape \[3, 7\]; expected \[2, 7\]"),
        (torch.ones(2, 7, 7, dtype=torch.bool), ValueError, r"shape \[2, 7, 7\]; expected \[2, 7\]"),
    ],
)
def test_a_model_says_what_is_wrong_with_a_mask(mask: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        build("llama")(torch.cat(random_documents([7, 7])), attention_mask=mask)
    assert "`attention_mask`" in str(raised.value)


def test_cu_seq_lens_of_a_batch_are_refused() -> None:
    ends = torch.tensor([0, 3, 7])
    with pytest.raises(ValueError, match="batch has 2 rows; pass `position_ids`"):
        flashmask_attention_forward(attention_module(), *random_inputs(), None, cu_seq_lens_q=ends)


@pytest.mark.parametrize("wrong", [[5, 7], [0, 7, 5]])
def test_lengths_that_are_not_cumulative_are_refused(wrong: list[int]) -> None:
    tokens = random_documents([12])[0]
    with pytest.raises(ValueError, match=r"`cu_seq_lens_q`\) must hold cumulative lengths: .*\[[05], 7"):
        build("llama")(tokens, cu_seq_lens_q=torch.tensor(wrong), use_cache=False)


def test_mask_functions_of_the_users_own_are_named() -> None:
    config = config_of("llama")
    config._attn_implementation = "flashmask"

    def no_even_rows(batch_idx: int, head_idx: int, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return q_idx % 2 == 1

    with pytest.raises(NotImplementedError, match=r"no_even_rows.*key column 0 .*needs 20 hidden intervals.*sdpa"):
        masking_utils.create_causal_mask(
            config=config,
            inputs_embeds=torch.zeros(1, 40, 32),
            attention_mask=None,
            past_key_values=None,
            and_mask_function=no_even_rows,
        )


def test_bounds_are_not_taken_for_the_weights_of_tokens_in_router_losses() -> None:
    small = {"vocab_size": 9, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "pad_token_id": 0}
    config = transformers.MixtralConfig(**small, num_attention_heads=2, num_key_value_heads=2, num_local_experts=2)
    model = transformers.MixtralForCausalLM._from_config(config, attn_implementation="flashmask")
    call = {"input_ids": torch.arange(1, 9)[None], "use_cache": False, "output_router_logits": True}
    with pytest.raises(NotImplementedError, match="auxiliary loss"):
        model(**call, attention_mask=bounds.causal(8))
    assert model(**call).aux_loss > 0


# What masks cost


class MaskOperations(TorchDispatchMode):
    """Counts what the making of masks, Transformers' part and ours, launches on a GPU, and how often it waits."""

    FILES = ("hf_flashmask/integration/", "masking_utils.py")
    WAITS = ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::is_nonzero")
    NOTHING = ("aten::empty", "aten::empty_like", "aten::new_empty", "aten::detach", "aten::alias", "aten::lift_fresh")

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name.startswith("aten::") and name not in self.NOTHING and not func.is_view and self._is_of_masks():
            # Padding is a fill and a copy; sums of bool are sums of a copy.
            is_two = name == "aten::constant_pad_nd" or (name == "aten::cumsum" and args[0].dtype == torch.bool)
            self.waits += name in self.WAITS
            self.launches += 0 if name in self.WAITS else 1 + is_two
        return result

    def _is_of_masks(self) -> bool:
        frame, files = sys._getframe(1), []
        while frame is not None:
            files.append(frame.f_code.co_filename)
            frame = frame.f_back
        in_kernels = any("flashmask_kernels" in file for file in files)
        return any(name in file for file in files for name in self.FILES) and not in_kernels


# At most so many launches for a whole model: of documents alone, beside a 2-D mask, and with `cu_seq_lens_q` as well.
LAUNCHES = {
    "llama": (8, 18, 26),
    "mistral": (11, 21, 29),
    "gemma2": (11, 23, 34),  # layers of two kinds
    "gpt_oss": (11, 44, 33),  # the same, and the mask function is not told about `position_ids`
    "llama4": (22, 33, 52),  # chunks are made anew with the lengths
    "bert": (11, 34, 21),
}


@pytest.mark.usefixtures("by_kernels")
@pytest.mark.parametrize("name", LAUNCHES)
def test_making_masks_takes_few_launches_and_never_waits_for_the_device(name: str) -> None:
    alone, padded, with_lengths = LAUNCHES[name]
    model, documents = build(name), random_documents([5, 1, 9])
    ones = torch.ones(1, 15, dtype=torch.long)
    ends = {"cu_seq_lens_q": cumulative_lengths(documents), "cu_seq_lens_k": cumulative_lengths(documents)}
    for call, launches in (
        ({"use_cache": False}, alone),
        ({"use_cache": True}, alone),
        ({"use_cache": False, "attention_mask": ones}, padded),
        ({"use_cache": True, "attention_mask": ones.index_fill(1, torch.tensor([13, 14]), 0)}, padded),
        ({"use_cache": False, "attention_mask": ones.index_fill(1, torch.tensor([13, 14]), 2)}, padded),
        ({"use_cache": False, **ends}, with_lengths),
    ):
        with torch.no_grad(), MaskOperations() as operations:
            model(**packed(documents), **call)
        assert operations.waits == 0, call
        assert operations.launches <= launches, call


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
@pytest.mark.parametrize("use_cache", [False, True])
def test_a_gap_in_the_positions_is_not_the_end_of_a_document(name: str, use_cache: bool) -> None:
    """Models of long contexts are trained on positions with gaps (PoSE)."""
    model = build(name)
    row = packed(random_documents([6, 9]))
    row["position_ids"][0, 9:] += 20
    first, second = ({key: value[:, part] for key, value in row.items()} for part in (slice(6), slice(6, None)))
    # With a cache eager attention does not look for documents.
    expected = torch.cat([eager_twin(model)(**part, use_cache=True).logits for part in (first, second)], dim=1)
    torch.testing.assert_close(model(**row, use_cache=use_cache).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("has_gradients", [False, True])
@pytest.mark.parametrize("is_decoding", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_forward_mode_is_refused(name: str, is_decoding: bool, has_gradients: bool) -> None:
    """Where SDPA would compute, too."""
    model = build(name).eval().requires_grad_(has_gradients)
    cache = model(torch.randint(1, 50, (2, 9)), use_cache=True)[1] if is_decoding else None
    cached = {"past_key_values": cache} if is_decoding else {"use_cache": False}
    embeddings = torch.randn(2, 1 if is_decoding else 20, model.config.hidden_size)

    def logits(embeddings: Tensor) -> Tensor:
        return model(inputs_embeds=embeddings, **cached).logits

    with torch.set_grad_enabled(has_gradients):
        with pytest.raises(NotImplementedError, match=r"no derivative in forward mode.*eager"):
            torch.func.jvp(logits, (embeddings,), (embeddings,))
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(embeddings, embeddings)
            with pytest.raises(NotImplementedError, match=r"no derivative in forward mode.*eager"):
                logits(dual)
