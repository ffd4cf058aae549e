"""Inputs, masks and the acceptance criterion that the kernel tests share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from flashmask_kernels import flashmask_attention, reference_attention
from flashmask_kernels.reference import visible_mask

# Largest error in units of the largest element.
ROUNDING = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
NOT_FINITE = (float("nan"), float("inf"), float("-inf"))


def model_tensor(batch: int, length: int, heads: int, dim: int, dtype: torch.dtype, device: str) -> Tensor:
    """Random ``[B, heads, S, D]`` with the strides that models pass: a transposed view of ``[B, S, heads, D]``."""
    return torch.randn(batch, length, heads, dim, dtype=dtype, device=device).transpose(1, 2)


def random_documents(length: int, count: int) -> tuple[Tensor, Tensor]:
    """First row and end row of the document of every position, for ``count`` documents of uneven lengths."""
    cuts = torch.randperm(length - 1)[: count - 1].sort().values + 1
    starts, ends = torch.cat([torch.zeros(1, dtype=torch.long), cuts]), torch.cat([cuts, torch.tensor([length])])
    lengths = ends - starts
    return starts.repeat_interleave(lengths), ends.repeat_interleave(lengths)


def _bounds(*planes: Tensor) -> Tensor:
    return torch.stack(planes).to(torch.int32)[None, None]


def random_intervals(batch: int, heads: int, planes: int, q_len: int, kv_len: int) -> Tensor:
    """Any int32 is legal: below 0, above S_q, empty, overlapping, the smallest and the largest."""
    bounds = torch.randint(-q_len // 4 - 2, q_len + q_len // 4 + 3, (batch, heads, planes, kv_len), dtype=torch.int32)
    extreme = torch.where(torch.rand(bounds.shape) < 0.5, torch.iinfo(torch.int32).min, torch.iinfo(torch.int32).max)
    return torch.where(torch.rand(bounds.shape) < 0.05, extreme.to(torch.int32), bounds)


def masks(q_len: int, kv_len: int) -> dict[str, Tensor]:
    """Masks of every plane count that make hidden, cut and full tiles, and fully hidden rows and columns."""
    column = torch.arange(kv_len)
    start, end = random_documents(kv_len, 3)
    shift = kv_len - q_len
    window, everywhere, never = max(1, kv_len // 5), torch.full_like(column, q_len), torch.zeros_like(column)
    return {
        "full": _bounds(everywhere, never),
        "causal": _bounds(everywhere),
        "causal_document": _bounds(end - shift),
        "document": _bounds(end - shift, start - shift),
        "sliding_window": _bounds(column - shift + window),
        "prefix_lm": _bounds(everywhere, torch.where(column < kv_len // 3, 0, column - shift)),
        "global_sliding_window": _bounds(
            torch.where(column < 4, q_len, column + window), everywhere, torch.where(column > 4 + window, 4, 0),
            torch.where(column > 4 + window, column - window, 0),
        ),
        "window_in_documents": _bounds(
            torch.minimum(end, column + window) - shift, everywhere, never, column - shift
        ),
        "three_intervals": _bounds(column + 3, column + 9, column - 20, column - 4, column + 30, everywhere),
        "nothing": _bounds(never),
        "random": random_intervals(1, 1, 2, q_len, kv_len),
    }  # fmt: skip


def assert_matches_reference(
    attend: Callable[..., tuple[Tensor, Tensor]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    reference: Callable[..., tuple[Tensor, Tensor]] = reference_attention,
    slack: Mapping[str, float] = MappingProxyType({}),
) -> None:
    """FlashMask's criterion for output and gradients, and the log-sum-exp besides.

    An error may be twice that of the naive dense computation in the same dtype, plus the rounding that adding and
    subtracting 0.3 does to the truth (dense, in the next wider dtype). In float32, where both errors are a few units
    in the last place and a sum over many rows can favour either, an error up to 3e-6 of the largest element passes
    too. ``attend`` returns output and log-sum-exp, as ``reference`` does. ``slack`` is added to the errors that the
    gradients it names may have.
    """
    wide = torch.float64 if query.dtype == torch.float32 else torch.float32
    leaves = [tensor for tensor in (query, key, value, sinks) if tensor is not None]
    d_out = torch.randn(*query.shape[:3], value.shape[-1], device=query.device).to(query.dtype)
    d_lse = torch.randn(query.shape[:3], device=query.device)

    def run(function: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype) -> dict[str, Tensor]:
        inputs = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
        out, lse = function(*inputs[:3], bounds, softcap=softcap, sinks=inputs[3] if sinks is not None else None)
        sees = lse.detach() != -torch.inf
        loss = (out.to(wide) * d_out).sum() + (torch.where(sees, lse, 0.0).to(wide) * d_lse).sum()
        names = ("d_query", "d_key", "d_value", "d_sinks")
        return {"out": out, "lse": lse, **dict(zip(names, torch.autograd.grad(loss, inputs)))}

    truth = run(lambda *args, **options: reference(*args, dtype=wide, **options), wide)
    naive = run(lambda *args, **options: reference(*args, dtype=query.dtype, **options), query.dtype)
    result = run(attend, query.dtype)

    assert torch.equal(result["lse"] == -torch.inf, truth["lse"] == -torch.inf)
    lse_error = (result["lse"] - truth["lse"]).nan_to_num(0.0).abs().max()
    largest = truth["lse"].nan_to_num(0.0, neginf=0.0).abs().max().clamp(min=1.0)
    assert lse_error <= largest * (1e-5 if query.dtype == torch.float32 else 1e-3), f"lse: {lse_error:.2e}"
    for name in truth.keys() - {"lse"}:
        expected = truth[name].to(wide)
        rounded = expected.to(query.dtype)
        band = 2 * ((rounded + 0.3 - 0.3) - rounded).abs().max().to(wide)
        allowed = 2 * (naive[name].to(wide) - expected).abs().max() + band
        if query.dtype == torch.float32:
            allowed = max(allowed, 3e-6 * expected.abs().max())
        allowed = allowed + slack.get(name, 0.0)
        error = (result[name].to(wide) - expected).abs().max()
        assert result[name].dtype == query.dtype or name == "d_sinks"
        assert error <= allowed, f"{name}: {error:.2e} > {allowed:.2e}"


def assert_near(actual: Tensor, expected: Tensor) -> None:
    """Equal up to rounding in the dtype of ``actual``."""
    atol = ROUNDING[actual.dtype] * expected.nan_to_num(0.0, neginf=0.0).abs().max().item()
    torch.testing.assert_close(actual.to(expected.dtype), expected, rtol=0.0, atol=atol)


def assert_hides_what_is_not_finite(
    attend: Callable[..., tuple[Tensor, Tensor]],
    bad: float,
    dtype: torch.dtype,
    dim: int,
    bounds: Tensor,
    **options: Any,
) -> None:
    """NaN or infinity in keys, values, queries and gradients of the output reaches what sees it, and nothing else.

    The truth is dense attention with 0 in its place, for all that does not depend on it.
    """
    length, device = bounds.shape[-1], bounds.device
    bad_positions = length // 3 + torch.randperm(length // 5)[:4]
    bad_query, bad_key, bad_value = (torch.arange(length, device=device) == position for position in bad_positions[:3])
    bad_value[bad_positions[3]] = True
    where_bad = (bad_query, bad_key, bad_value, bad_query)
    finite = [
        model_tensor(1, length, heads, dim, torch.float32, device).to(dtype).masked_fill(is_bad[:, None], 0.0)
        for heads, is_bad in zip((2, 1, 1, 2), where_bad)
    ]

    def run(function: Callable[..., tuple[Tensor, Tensor]], inputs: list[Tensor], d_out: Tensor) -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        out, lse = function(*leaves, bounds, **options)
        gradients = torch.autograd.grad(out, leaves, d_out)
        return [tensor[0].detach() for tensor in (out, lse, *gradients)]

    visible = visible_mask(bounds, length)[0, 0]
    sees_bad = (visible & (bad_key | bad_value)).any(-1)
    is_bad_row = sees_bad | bad_query
    is_bad_column = (visible & is_bad_row[:, None]).any(0) | bad_key | bad_value
    assert not is_bad_row.all()
    assert not is_bad_column.all()
    result = run(
        attend,
        [tensor.masked_fill(is_bad[:, None], bad) for tensor, is_bad in zip(finite[:3], where_bad)],
        finite[3].masked_fill(bad_query[:, None], bad),
    )
    wide = [tensor.float() for tensor in finite]
    truth = run(reference_attention, wide[:3], wide[3].masked_fill(is_bad_row[:, None], 0.0))
    for actual, expected, is_bad in zip(result, truth, [is_bad_row] * 3 + [is_bad_column] * 2):
        assert_near(actual[:, ~is_bad], expected[:, ~is_bad])
    assert sees_bad.any()
    assert not result[0][:, sees_bad].isfinite().any()
    seen_by_bad = (visible & bad_query[:, None]).any(0)
    assert seen_by_bad.any()
    assert not result[3][:, seen_by_bad].isfinite().any()
    assert not result[4][:, seen_by_bad].isfinite().any()


def assert_documents_are_alone(
    attend: Callable[..., tuple[Tensor, Tensor]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    d_out: Tensor,
    bounds: Tensor,
    documents: list[tuple[int, int]],
) -> None:
    """Output and gradients of the given documents (first row, end row) are those of each alone, under causal masks."""
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    out, _ = attend(*leaves, bounds)
    result = [out.detach(), *torch.autograd.grad(out, leaves, d_out)]
    for start, end in documents:
        alone = [tensor.detach()[:, :, start:end].float().requires_grad_() for tensor in leaves]
        everything = torch.full((1, 1, 1, end - start), end - start, dtype=torch.int32, device=query.device)
        expected, _ = reference_attention(*alone, everything)
        gradients = torch.autograd.grad(expected, alone, d_out[:, :, start:end].float())
        for actual, truth in zip(result, (expected.detach(), *gradients)):
            assert_near(actual[:, :, start:end], truth)


def assert_right_past_32_bit_offsets(attend: Callable[..., tuple[Tensor, Tensor]], dim: int = 128) -> None:
    """On a GPU. The last head and the last document lie past 2^31 elements in every tensor."""
    length, heads, document = 1 << 20, 17 * 128 // dim + 1, 1024
    query, key, value, d_out = (model_tensor(1, length, heads, dim, torch.bfloat16, "cuda") for _ in range(4))
    assert query.numel() > 2**31
    ends = (torch.arange(length, dtype=torch.int32, device="cuda") // document + 1) * document
    documents = [(0, document), (length - document, length)]
    assert_documents_are_alone(attend, query, key, value, d_out, ends[None, None, None], documents)


def assert_replays_as_eager(attend: Callable[..., Tensor], random_inputs: Callable[[], list[Tensor]]) -> None:
    """A replayed CUDA graph of forward and backward uses what its inputs, query, key, value and bounds, hold then."""
    inputs = random_inputs()
    leaves = [tensor.requires_grad_() for tensor in inputs[:3]]

    def step() -> list[Tensor]:
        out = attend(*inputs)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    eager_before = [tensor.clone() for tensor in step()]
    for _ in range(2):
        with torch.no_grad():
            for static, new in zip(inputs, random_inputs()):
                static.copy_(new)
        graph.replay()
        replayed = [tensor.clone() for tensor in captured]
        for ours, eager in zip(replayed, step()):
            assert torch.equal(ours, eager)
    assert not torch.equal(replayed[0], eager_before[0])


def assert_inductor_computes_as_eager(length: int, dim: int, **options: Any) -> None:
    """Three layers that share query heads, keys, values and bounds, forward and backward, in one graph on a GPU."""
    inputs = [model_tensor(1, length, heads, dim, torch.bfloat16, "cuda").requires_grad_() for heads in (8, 2, 2)]
    bounds = masks(length, length)["causal_document"].cuda()

    def step(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        for _ in range(3):
            query = query + flashmask_attention(query, key, value, bounds, **options)
        return query.square().mean()

    expected = torch.autograd.grad(step(*inputs), inputs)
    compiled = torch.compile(step, fullgraph=True)
    for ours, truth in zip(torch.autograd.grad(compiled(*inputs), inputs), expected):
        torch.testing.assert_close(ours, truth, rtol=2e-2, atol=1e-6)
