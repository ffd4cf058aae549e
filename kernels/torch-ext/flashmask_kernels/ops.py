"""`flashmask_attention`, its operators in ``torch.ops.flashmask_kernels``, and the choice of an implementation.

Eager calls go through an autograd.Function, which costs a third of an operator's dispatch and can reuse the schedule
of a bounds tensor from layer to layer. Under `torch.compile`, `torch.export`, fake tensors and dispatch modes the
same steps are operators of a graph. In training, equal schedules are common subexpressions of it; an inference graph
keeps those, and `share_in_graph` is for it.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.weak import WeakIdKeyDictionary

from .dropout import draw_seed
from .tiled import tiled_backward, tiled_forward

if TYPE_CHECKING:
    from .configs import Configs

MAX_INTERVALS = 16
MIN_HEAD_DIM, MAX_HEAD_DIM = 8, 512
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@overload
def flashmask_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor | None = None,
    *,
    is_causal: bool = ...,
    scale: float | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    dropout_p: float = ...,
    deterministic: bool = ...,
    return_lse: Literal[False] = False,
) -> Tensor: ...
@overload
def flashmask_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor | None = None,
    *,
    is_causal: bool = ...,
    scale: float | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    dropout_p: float = ...,
    deterministic: bool = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def flashmask_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    deterministic: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention under a mask given as bounds (FlashMask, arXiv 2410.01359), with gradients.

    Args:
        query: ``[B, H, S_q, D]``; float16, bfloat16 or float32 (float64 off the GPU), inside of `torch.autocast` any
            of them. Any strides; the last dimension is best contiguous.
        key: ``[B, H_kv, S_k, D]``, H a multiple of H_kv.
        value: ``[B, H_kv, S_k, D_v]``.
        bounds: int32 ``[B or 1, H, H_kv or 1, C, S_k]``, the rows hidden from each key: C = 1 (LTS, with the causal
            triangle aligned at the bottom right), 2 (LTS, UTE) or 2n (n intervals of start, end; up to 16). None:
            causal or full attention.
        is_causal: only without ``bounds``, which hold the whole mask: causal, aligned at the bottom right.
        scale: factor of the scores, by default ``D ** -0.5``.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        sinks: ``[H]``, a logit per head that takes part in the softmax and has no value.
        dropout_p: probability with which a weight of the softmax counts for nothing; the others are scaled by
            ``1 / (1 - dropout_p)``. The seed is drawn from the default generator of the device; the same seed drops the
            same weights on every device.
        deterministic: bitwise repeatable gradients. Every implementation here gives them anyway.
        return_lse: also return the log-sum-exp of each row.

    Returns:
        output ``[B, H, S_q, D_v]`` in the query's dtype, laid out as ``[B, S_q, H, D_v]``; with ``return_lse`` also
        float32 ``[B, H, S_q]`` (natural logarithm). A row that sees nothing has output 0, log-sum-exp -inf (the sink,
        if there is one) and gradients 0. What is hidden counts for nothing even if it is NaN or infinite; what sees
        NaN becomes NaN.

    Raises:
        TypeError, ValueError: a wrong dtype, device, shape or combination; named with what came and what is accepted.
    """
    if torch.is_autocast_enabled(query.device.type):
        query, key, value = (_autocast(tensor) for tensor in (query, key, value))
        with torch.autocast(query.device.type, enabled=False):  # which would round the float32 steps of plain torch
            return flashmask_attention(
                query, key, value, bounds, is_causal=is_causal, scale=scale, softcap=softcap, sinks=sinks,
                dropout_p=dropout_p, deterministic=deterministic, return_lse=return_lse,
            )  # type: ignore[call-overload]  # fmt: skip
    arguments = is_causal, scale, softcap, float(dropout_p)
    if _runs_as_operator(query):
        out, lse = _attend_in_graph(query, key, value, bounds, sinks, *arguments)
        return (out, lse) if return_lse else out
    return _attend(query, key, value, bounds, sinks, *arguments, return_lse)


def _attend_in_graph(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor | None,
    sinks: Tensor | None,
    is_causal: bool,
    scale: float | None,
    softcap: float | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    _check_inputs(query, key, value, bounds, is_causal, scale, softcap, sinks, dropout_p)
    query, key, value = (_with_dense_rows(tensor) for tensor in (query, key, value))
    if bounds is None:
        bounds = _plain_bounds(query.shape[2], key.shape[2], is_causal, query.device)
    bounds = bounds if bounds.is_contiguous() else bounds.contiguous()
    seed = draw_seed(query.device) if dropout_p else None
    specialize = _specializes(query, value, bounds, softcap, dropout_p)
    schedule = _schedule("forward", bounds, query, value, specialize, _schedule_in_graph)
    scale, softcap = _scale_and_softcap(query, scale, softcap)
    return _forward_operator(query, key, value, bounds, sinks, schedule, seed, scale, softcap, dropout_p, specialize)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor | None,
    sinks: Tensor | None,
    is_causal: bool,
    scale: float | None,
    softcap: float | None,
    dropout_p: float,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    kind = _kind_of(query, key, value, bounds, sinks), is_causal, scale, softcap, dropout_p
    plan = _plans.get(kind)
    if plan is None:
        _check_inputs(query, key, value, bounds, is_causal, scale, softcap, sinks, dropout_p)
    if bounds is None:
        bounds = _cached_plain_bounds(query.shape[2], key.shape[2], is_causal, query.device)
    if plan is None:
        given = query, key, value, bounds
        query, key, value = (_with_dense_rows(tensor) for tensor in (query, key, value))
        bounds = bounds.contiguous()
        if any(copy is not tensor for copy, tensor in zip((query, key, value, bounds), given)):
            return _attend(query, key, value, bounds, sinks, is_causal, scale, softcap, dropout_p, return_lse)
        specialize = _specializes(query, value, bounds, softcap, dropout_p)
        plan = _Plan(query, key, value, *_scale_and_softcap(query, scale, softcap), dropout_p, specialize)
        _remember(_plans, kind, plan)
    seed = draw_seed(query.device) if dropout_p else None
    return _Attention.apply(query, key, value, bounds, sinks, seed, plan, return_lse)


def _scale_and_softcap(query: Tensor, scale: float | None, softcap: float | None) -> tuple[float, float | None]:
    return query.shape[-1] ** -0.5 if scale is None else float(scale), None if softcap is None else float(softcap)


def _with_dense_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _autocast(tensor: Tensor) -> Tensor:
    """To the dtype of the autocast region, as `scaled_dot_product_attention` does."""
    if tensor.dtype == torch.float64 or not tensor.is_floating_point():
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


def _check_inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor | None,
    is_causal: bool,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    dropout_p: float,
) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim != 4:
            raise ValueError(f"`{name}` must be 4-D [B, heads, S, D], got shape {tuple(tensor.shape)}")
        if tensor.dtype not in _DTYPES:
            raise TypeError(
                f"`{name}` must be float16, bfloat16, float32 or (not on a GPU) float64, got {tensor.dtype}"
            )
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise TypeError(
                f"`{name}` must have the query's dtype and device, {query.dtype} on {query.device}; "
                f"got {tensor.dtype} on {tensor.device}"
            )
        if not MIN_HEAD_DIM <= tensor.shape[-1] <= MAX_HEAD_DIM:
            raise ValueError(
                f"`{name}` must have a head size from {MIN_HEAD_DIM} to {MAX_HEAD_DIM}, got {tensor.shape[-1]}"
            )
    batch_size, num_heads, _, dim = query.shape
    kv_heads, kv_len = key.shape[1:3]
    if key.shape[0] != batch_size or key.shape[-1] != dim:
        raise ValueError(
            f"`key` must be [B, H_kv, S_k, D] with the query's B = {batch_size} and D = {dim}, got {tuple(key.shape)}"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"`value` must be [B, H_kv, S_k, D_v] like the key, {tuple(key.shape[:3])}, got {tuple(value.shape)}"
        )
    if kv_heads == 0 or num_heads % kv_heads:
        raise ValueError(f"`query` must have a multiple of the key's {kv_heads} heads, got {num_heads}")
    if bounds is not None:
        _check_bounds(bounds, query, batch_size, num_heads, kv_heads, kv_len, is_causal)
    if scale is not None and not scale >= 0:
        raise ValueError(f"`scale` must be at least 0, got {scale}; put a sign into the query")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"`softcap` must be greater than 0, got {softcap}; None turns it off")
    if sinks is not None and (sinks.shape != (num_heads,) or sinks.device != query.device):
        raise ValueError(
            f"`sinks` must be one logit per query head, [{num_heads}] on {query.device}, "
            f"got {tuple(sinks.shape)} on {sinks.device}"
        )
    if not 0 <= dropout_p < 1:
        raise ValueError(f"`dropout_p` must be at least 0 and less than 1, got {dropout_p}")


def _check_bounds(
    bounds: Tensor, query: Tensor, batch_size: int, num_heads: int, kv_heads: int, kv_len: int, is_causal: bool
) -> None:
    if bounds.dtype != torch.int32 or bounds.device != query.device:
        raise TypeError(f"`bounds` must be int32 on {query.device}, got {bounds.dtype} on {bounds.device}")
    if bounds.ndim != 4 or bounds.shape[3] != kv_len:
        raise ValueError(
            f"`bounds` must be [B or 1, H or 1, C, S_k] with the key length {kv_len} last, got {tuple(bounds.shape)}"
        )
    if bounds.shape[0] not in (1, batch_size) or bounds.shape[1] not in (1, kv_heads, num_heads):
        raise ValueError(
            f"`bounds` must have batch 1 or {batch_size} and heads 1, {kv_heads} or {num_heads}, "
            f"got {tuple(bounds.shape)}"
        )
    num_planes = bounds.shape[2]
    if num_planes != 1 and (num_planes % 2 or not 2 <= num_planes <= 2 * MAX_INTERVALS):
        raise ValueError(
            "`bounds` must have 1 plane (LTS), 2 (LTS, UTE) or n pairs of start and end with "
            f"n <= {MAX_INTERVALS}, got {num_planes}"
        )
    if is_causal and num_planes != 1:
        raise ValueError(
            "`is_causal` is only for `bounds=None`: bounds hold the whole mask. Hide the causal triangle in them (UTE)"
        )


def _plain_bounds(q_len: int, kv_len: int, is_causal: bool, device: torch.device) -> Tensor:
    """Causal or full attention as bounds."""
    lower_start = torch.full((1, 1, 1, kv_len), q_len, dtype=torch.int32, device=device)
    return lower_start if is_causal else torch.cat([lower_start, torch.zeros_like(lower_start)], dim=2)


# Few, because each keeps the schedules made from it alive as well. One for each stream: another one need not have
# finished what the first one wrote.
@functools.lru_cache(maxsize=4)
def _plain_bounds_of_stream(stream: int, q_len: int, kv_len: int, is_causal: bool, device: torch.device) -> Tensor:
    # Autograd must be able to save it later, which it refuses for a tensor made in inference mode.
    with torch.inference_mode(False):
        return _plain_bounds(q_len, kv_len, is_causal, device)


def _cached_plain_bounds(q_len: int, kv_len: int, is_causal: bool, device: torch.device) -> Tensor:
    stream = _stream_of(device)
    if stream is None:
        return _plain_bounds(q_len, kv_len, is_causal, device)
    return _plain_bounds_of_stream(stream, q_len, kv_len, is_causal, device)


def _stream_of(device: torch.device) -> int | None:
    """The current stream, or None while it is captured into a CUDA graph: a graph owns the memory that is made in it,
    and makes it anew, from what its inputs are then, in every replay.
    """
    if device.type != "cuda":
        return 0
    if torch.cuda.is_current_stream_capturing():
        return None
    return torch._C._cuda_getCurrentRawStream(device.index)  # a Stream object takes ten times as long


def _runs_as_operator(query: Tensor) -> bool:
    return (
        torch.compiler.is_compiling()
        or type(query) not in (Tensor, torch.nn.Parameter)
        or _get_current_dispatch_mode() is not None
    )


# Plans

Kind = tuple[Hashable, ...]
_MOST_REMEMBERED = 4096


def _kind_of(*tensors: Tensor | None) -> Kind:
    """All that plans depend on: device, dtype, shape, strides, and the address up to multiples of 16."""
    kinds = [
        None if tensor is None else (tensor.device, tensor.dtype, tensor.shape, tensor.stride(), tensor.data_ptr() % 16)
        for tensor in tensors
    ]
    return tuple(kinds)  # by way of a list, in less time than from a generator


def _remember(memory: dict[Kind, Any], kind: Kind, value: Any) -> None:
    """Lengths, and with them kinds, may change with every batch: what is full is emptied."""
    if len(memory) >= _MOST_REMEMBERED:
        memory.clear()
    memory[kind] = value


class _Plan:
    """How inputs of one kind are computed: by which kernels, and all that these are launched with but tensors.

    Finding it out takes the host longer than short rows take on the device.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        softcap: float | None,
        dropout_p: float,
        specialize: bool,
        in_graph: bool = False,
    ) -> None:
        self.factors = scale, softcap, dropout_p
        self.specialize = specialize
        is_empty = query.numel() == 0 or key.numel() == 0
        # None: plain torch computes them.
        self.configs = None if is_empty else _launched_configs(query, value, specialize, in_graph)
        self._forward: Callable[..., tuple[Tensor, Tensor]] | None = None
        self._backwards: dict[Kind, Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]] = {}

    def kernels(self) -> tuple[Any, tuple[Any, ...]]:
        """The module of the kernels, and what they take of the factors."""
        if self.specialize:
            from . import hopper

            return hopper, self.factors[:1]
        from . import portable

        return portable, self.factors

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bounds: Tensor,
        sinks: Tensor | None,
        schedule: Tensor,
        seed: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        if not _is_on_current_device(query):
            with torch.cuda.device_of(query):
                return self.forward(query, key, value, bounds, sinks, schedule, seed)
        if self._forward is None:
            assert self.configs is not None
            kernels, factors = self.kernels()
            self._forward = kernels.AttentionForward(
                query, key, value, bounds, sinks, schedule, *factors, self.configs.forward
            )
        return self._forward(query, key, value, bounds, sinks, schedule, seed)

    def backward(
        self,
        d_out: Tensor,
        d_lse: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bounds: Tensor,
        out: Tensor,
        lse: Tensor,
        by_column: Tensor,
        by_row: Tensor,
        seed: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if not _is_on_current_device(query):
            with torch.cuda.device_of(query):
                return self.backward(d_out, d_lse, query, key, value, bounds, out, lse, by_column, by_row, seed)
        # Of saved tensors too: hooks may have moved them.
        kind = _kind_of(d_out, d_lse, query, key, value, bounds, out, lse)
        backward = self._backwards.get(kind)
        if backward is None:
            kernels, factors = self.kernels()
            backward = kernels.AttentionBackward(
                d_out, d_lse, query, key, value, bounds, out, by_column, by_row, *factors, self.configs
            )
            _remember(self._backwards, kind, backward)
        return backward(d_out, d_lse, query, key, value, bounds, out, lse, by_column, by_row, seed)


def _is_on_current_device(tensor: Tensor) -> bool:
    """Where Triton launches. To ask takes less time than to enter a `torch.cuda.device`."""
    return not tensor.is_cuda or tensor.device.index == torch.cuda.current_device()


_plans: dict[Kind, _Plan] = {}


def _plan_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    sinks: Tensor | None,
    scale: float,
    softcap: float | None,
    dropout_p: float,
    specialize: bool,
) -> _Plan:
    """For the operators, whose arguments have been checked and chosen."""
    kind = _kind_of(query, key, value, bounds, sinks), scale, softcap, dropout_p, specialize, "operator"
    plan = _plans.get(kind)
    if plan is None:
        plan = _Plan(query, key, value, scale, softcap, dropout_p, specialize, in_graph=True)
        _remember(_plans, kind, plan)
    return plan


# Implementations


# Of the query: 8K tokens with 16 heads of size 128.
_FEWEST_SPECIALIZED_ELEMENTS = 1 << 24


def _specializes(query: Tensor, value: Tensor, bounds: Tensor, softcap: float | None, dropout_p: float) -> bool:
    """Whether `hopper` computes what it has kernels for: large inputs, because launching it takes longer.

    An exported graph is for every length and every GPU: it keeps to the portable kernels.
    """
    batch_size, num_heads, q_len, dim = query.shape
    kv_heads, kv_len, dim_v = value.shape[1:]
    if (
        query.device.type != "cuda"
        or batch_size * num_heads * q_len * dim < _FEWEST_SPECIALIZED_ELEMENTS
        or min(q_len, kv_len) < 1024
        or not dim % 8 == 0 == dim_v % 8  # TMA reads rows that are multiples of 16 bytes
        or bounds.shape[1] not in (1, kv_heads)  # dK and dV visit all query heads of a key under one mask
        or softcap is not None
        or dropout_p
        or torch.compiler.is_exporting()
    ):
        return False
    try:
        from .configs import select_specialized_configs
    except ImportError:
        return False
    return select_specialized_configs(query.device, query.dtype, max(dim, dim_v)) is not None


def _configs(query: Tensor, value: Tensor, specialize: bool) -> Configs | None:
    """Tile sizes of the Triton kernels for these inputs, or None where `tiled` computes them."""
    if query.device.type not in ("cuda", "xpu") or query.dtype == torch.float64:
        return None
    head_dim = max(query.shape[-1], value.shape[-1])
    try:
        from .configs import select_configs, select_specialized_configs
    except ImportError as error:
        configs, reason = None, f"Triton does not import ({error})"
    else:
        select = select_specialized_configs if specialize else select_configs
        configs = select(query.device, query.dtype, head_dim)
        reason = f"there is no kernel for head size {head_dim}"
    if configs is None:
        warnings.warn(f"flashmask_kernels computes in plain torch, exactly but slowly: {reason}", stacklevel=2)
    return configs


# Of the query. A descriptor takes the host some 4 us; the forward has three, dK/dV and dQ four each. What they save on
# the device at 1K tokens and 32 heads of 128, 1 << 22, in us (H200, three masks): the forward 4 to 12, dQ 4 to 12,
# dK/dV 13 to 20; of 64 1 to 6, 4, and 8 to 12. At 1.5K tokens, dK/dV by pointers makes the backward 17 to 27 % longer.
_FEWEST_DESCRIBED_ELEMENTS = {"forward": 1 << 23, "key_value_gradient": 5 << 20, "query_gradient": 1 << 23}


def _launched_configs(query: Tensor, value: Tensor, specialize: bool, in_graph: bool) -> Configs | None:
    """`_configs`, for kernels that are launched. The schedules of a graph have their tiles at every length: a graph
    that asked for the length would be another for short rows.
    """
    configs = _configs(query, value, specialize)
    if configs is None or specialize:
        return configs
    short = [kernel for kernel, fewest in _FEWEST_DESCRIBED_ELEMENTS.items() if query.numel() < fewest]
    return configs.without_descriptors(*short) if in_graph else configs.for_short_rows(*short)


def _schedule(
    kernel: str, bounds: Tensor, query: Tensor, value: Tensor, specialize: bool, build: Callable[..., Tensor]
) -> Tensor | None:
    """What the kernel of that name in `Configs` visits; None where `tiled` computes."""
    configs = _configs(query, value, specialize)
    if configs is None:
        return None
    config = getattr(configs, kernel)
    return build(bounds, query.shape[2], config.block_m, config.block_n, kernel == "key_value_gradient")


def _column_extrema(bounds: Tensor, block_n: int) -> Tensor:
    from .schedule import column_extrema

    with torch.cuda.device_of(bounds):
        return column_extrema(bounds, block_n)


def _build_schedule(
    bounds: Tensor, q_len: int, block_m: int, block_n: int, by_column: bool, extrema: Tensor | None = None
) -> Tensor:
    from .schedule import build_schedule

    with torch.cuda.device_of(bounds):
        return build_schedule(bounds, q_len, block_m, block_n, by_column, extrema)


class _Schedules:
    """Those of one bounds tensor as it is now, on one stream, by the arguments of `build_schedule`."""

    def __init__(self, stream: int | None, version: int) -> None:
        self.stream, self.version = stream, version
        self._built: dict[tuple[Any, ...], Tensor] = {}
        self._extrema: dict[int, Tensor] = {}  # by the columns of a tile, which forward and backward often share

    def get(self, bounds: Tensor, q_len: int, block_m: int, block_n: int, by_column: bool) -> Tensor:
        arguments = q_len, block_m, block_n, by_column
        schedule = self._built.get(arguments)
        if schedule is None:
            extrema = self._extrema.get(block_n)
            if extrema is None:
                extrema = self._extrema[block_n] = _column_extrema(bounds, block_n)
            schedule = self._built[arguments] = _build_schedule(bounds, *arguments, extrema)
        return schedule


# The layers of one forward pass share their bounds tensor, and so its schedules: {bounds: {stream: schedules}}.
_schedules: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _schedules_of(bounds: Tensor) -> _Schedules:
    stream = _stream_of(bounds.device)
    version = 0 if bounds.is_inference() else bounds._version
    if stream is None:
        return _Schedules(stream, version)
    of_streams = _schedules.setdefault(bounds, {})
    schedules = of_streams.get(stream)
    if schedules is None or schedules.version != version:
        schedules = of_streams[stream] = _Schedules(stream, version)
    return schedules


def _cached_schedule(bounds: Tensor, *arguments: Any) -> Tensor:
    return _schedules_of(bounds).get(bounds, *arguments)


def share_in_graph(tensor: Tensor) -> Tensor:
    """Let `once_in_graph` keep at a tensor what a graph makes of it. Returns the tensor; outside of a graph, as it is.

    Args:
        tensor: made in the graph. An input of the graph would keep it all when the graph has run: pass a view.
    """
    if torch.compiler.is_compiling():
        tensor._made_in_graph = []  # type: ignore[attr-defined]
    return tensor


def once_in_graph(build: Callable[[], Tensor], key: tuple[Any, ...], *sources: Tensor) -> Tensor:
    """`build()`, which reads `sources`, once for equal keys where the first of them went through `share_in_graph`."""
    made = getattr(sources[0], "_made_in_graph", None)
    if made is None:
        return build()
    for known_key, known_sources, result in made:
        same_sources = len(known_sources) == len(sources) and all(a is b for a, b in zip(known_sources, sources))
        if same_sources and known_key == key:
            return result
    result = share_in_graph(build())
    made.append((key, sources, result))
    return result


def _schedule_in_graph(bounds: Tensor, *arguments: Any) -> Tensor:
    return once_in_graph(lambda: _schedule_operator(bounds, *arguments), ("schedule", *arguments), bounds)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    sinks: Tensor | None,
    schedule: Tensor | None,
    seed: Tensor | None,
    scale: float,
    softcap: float | None,
    dropout_p: float,
    specialize: bool,
) -> tuple[Tensor, Tensor]:
    if query.numel() == 0 or key.numel() == 0:
        out, lse = _new_outputs(query, value)
        lse.fill_(-torch.inf)
        return out.zero_(), lse if sinks is None else torch.maximum(lse, sinks.to(lse.dtype)[:, None])
    if schedule is None:
        return tiled_forward(query, key, value, bounds, sinks, seed, scale, softcap, dropout_p)
    plan = _plan_of(query, key, value, bounds, sinks, scale, softcap, dropout_p, specialize)
    return plan.forward(query, key, value, bounds, sinks, schedule, seed)


def _backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    out: Tensor,
    lse: Tensor,
    by_column: Tensor | None,
    by_row: Tensor | None,
    seed: Tensor | None,
    scale: float,
    softcap: float | None,
    dropout_p: float,
    specialize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if query.numel() == 0 or key.numel() == 0:
        d_query, d_key, d_value = (_new_gradient(tensor).zero_() for tensor in (query, key, value))
        return d_query, d_key, d_value, torch.zeros_like(lse)
    if by_column is None or by_row is None:
        return tiled_backward(d_out, d_lse, query, key, value, bounds, out, lse, seed, scale, softcap, dropout_p)
    plan = _plan_of(query, key, value, bounds, None, scale, softcap, dropout_p, specialize)
    arguments = d_out, d_lse, query, key, value, bounds, out, lse, by_column, by_row, seed
    d_query, d_key, d_value, delta = plan.backward(*arguments)
    return d_query, d_key, d_value, delta[..., : lse.shape[2]]


def _new_outputs(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    batch_size, num_heads, q_len, _ = query.shape
    out = query.new_empty(batch_size, q_len, num_heads, value.shape[-1]).transpose(1, 2)
    return out, query.new_empty(batch_size, num_heads, q_len, dtype=torch.promote_types(query.dtype, torch.float32))


def _new_gradient(tensor: Tensor) -> Tensor:
    batch_size, heads, length, dim = tensor.shape
    return tensor.new_empty(batch_size, length, heads, dim).transpose(1, 2)


# Autograd


def _gradients(
    saved: tuple[Tensor, ...],
    d_out: Tensor | None,
    d_lse: Tensor | None,
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]],
) -> tuple[Tensor | None, ...]:
    """Of query, key, value, bounds and sinks."""
    query, key, value, bounds, sinks, seed, out, lse = saved
    d_out = torch.zeros_like(out) if d_out is None else _with_dense_rows(d_out)
    d_lse = None if d_lse is None else d_lse.contiguous()
    d_query, d_key, d_value, delta = backward(d_out, d_lse, query, key, value, bounds, out, lse, seed)
    d_sinks = None
    if sinks is not None:
        # The sink's probability exp(sink - lse) times its score gradient 0 - delta, summed over the rows of its head.
        probabilities = torch.exp(sinks.to(lse.dtype)[:, None] - lse).masked_fill(lse == -torch.inf, 0.0)
        d_sinks = -(probabilities * delta[..., : lse.shape[2]]).sum((0, 2)).to(sinks.dtype)
    return d_query, d_key, d_value, None, d_sinks


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bounds: Tensor,
        sinks: Tensor | None,
        seed: Tensor | None,
        plan: _Plan,
        return_lse: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        # With a `setup_context` of its own the class would bind the arguments by signature, most of 90 us per call.
        if plan.configs is None:
            output = _forward(query, key, value, bounds, sinks, None, seed, *plan.factors, plan.specialize)
        else:
            ctx.schedules = _schedules_of(bounds)
            schedule = ctx.schedules.get(bounds, query.shape[2], *plan.configs.forward[:2], False)
            output = plan.forward(query, key, value, bounds, sinks, schedule, seed)
        ctx.plan = plan
        ctx.save_for_backward(query, key, value, bounds, sinks, seed, *output)
        ctx.set_materialize_grads(False)
        return output if return_lse else output[0]  # autograd takes 3 us for one more

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None = None) -> tuple[Tensor | None, ...]:
        # Without `create_graph` nothing is recorded, and there is nothing that a second backward would have to refuse.
        gradients = _planned_gradients_once if torch.is_grad_enabled() else _planned_gradients
        return gradients(ctx, d_out, d_lse)


def _planned_gradients(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients = _gradients(ctx.saved_tensors, d_out, d_lse, functools.partial(_planned_backward, ctx))
    return *gradients, *[None] * 3


# Takes the host as long as a launch.
_planned_gradients_once = torch.autograd.function.once_differentiable(_planned_gradients)


def _planned_backward(
    ctx: Any,
    d_out: Tensor,
    d_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    out: Tensor,
    lse: Tensor,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    plan: _Plan = ctx.plan
    arguments = d_out, d_lse, query, key, value, bounds, out, lse
    if plan.configs is None:
        return _backward(*arguments, None, None, seed, *plan.factors, plan.specialize)
    schedules: _Schedules = ctx.schedules
    if schedules.stream != _stream_of(bounds.device):
        schedules = _schedules_of(bounds)
    q_len = query.shape[2]
    by_column = schedules.get(bounds, q_len, *plan.configs.key_value_gradient[:2], True)
    by_row = schedules.get(bounds, q_len, *plan.configs.query_gradient[:2], False)
    return plan.backward(*arguments, by_column, by_row, seed)


# Operators


# A second version of this package in the process, loaded under another name, must not replace these operators.
_NAMESPACE = __package__.replace(".", "_")
_schedule_operator = torch.library.custom_op(f"{_NAMESPACE}::schedule", _build_schedule, mutates_args=())
_forward_operator = torch.library.custom_op(f"{_NAMESPACE}::forward", _forward, mutates_args=())
_backward_operator = torch.library.custom_op(f"{_NAMESPACE}::backward", _backward, mutates_args=())


@_schedule_operator.register_fake
def _(bounds: Tensor, q_len: int, block_m: int, block_n: int, by_column: bool, extrema: Tensor | None = None) -> Tensor:
    from .schedule import schedule_shape

    num_masks, kv_len = bounds.shape[0] * bounds.shape[1], bounds.shape[3]
    return bounds.new_empty(schedule_shape(num_masks, q_len, kv_len, block_m, block_n, by_column))


@_forward_operator.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    sinks: Tensor | None,
    schedule: Tensor | None,
    seed: Tensor | None,
    scale: float,
    softcap: float | None,
    dropout_p: float,
    specialize: bool,
) -> tuple[Tensor, Tensor]:
    return _new_outputs(query, value)


@_backward_operator.register_fake
def _(
    d_out: Tensor,
    d_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    out: Tensor,
    lse: Tensor,
    by_column: Tensor | None,
    by_row: Tensor | None,
    seed: Tensor | None,
    scale: float,
    softcap: float | None,
    dropout_p: float,
    specialize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _new_gradient(query), _new_gradient(key), _new_gradient(value), torch.empty_like(lse)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, bounds, sinks, _, seed, *ctx.choices = inputs
    ctx.save_for_backward(query, key, value, bounds, sinks, seed, *output)
    ctx.set_materialize_grads(False)


def _backward_in_graph(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    *_, specialize = ctx.choices

    def backward(
        d_out: Tensor, d_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, *others: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        out, lse, seed = others
        by_column, by_row = (
            _schedule(kernel, bounds, query, value, specialize, _schedule_operator)
            for kernel in ("key_value_gradient", "query_gradient")
        )
        return _backward_operator(
            d_out, d_lse, query, key, value, bounds, out, lse, by_column, by_row, seed, *ctx.choices
        )

    *gradients, d_sinks = _gradients(ctx.saved_tensors, d_out, d_lse, backward)
    return *gradients, d_sinks, *[None] * 6


_forward_operator.register_autograd(_backward_in_graph, setup_context=_setup_context)
