"""Which implementation computes an attention, and with which tiles.

The choices are made once for inputs of one kind, and kept as a `Plan` with all that the kernels are launched with but
the tensors: making them takes the host longer than short rows take on the device.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import environment
from .schedules import Tiles

if TYPE_CHECKING:
    from .configs import Config, Configs

Kind = tuple[Hashable, ...]
MOST_REMEMBERED = 4096

Family = str
"""Which kernels compute: one of the names below. A plain string, which operators may take."""
PORTABLE, HOPPER, FUSED_HOPPER = "portable", "hopper", "hopper with a fused backward"
DECODING = "decoding"
"""Few rows against many keys. It needs no schedule, and has no backward."""


def kind_of(*tensors: Tensor | None) -> Kind:
    """All that plans depend on: device, dtype, shape, strides, and the address up to multiples of 16."""
    kinds = [
        None if tensor is None else (tensor.device, tensor.dtype, tensor.shape, tensor.stride(), tensor.data_ptr() % 16)
        for tensor in tensors
    ]
    return tuple(kinds)  # by way of a list, in less time than from a generator


def remember_for_kind(memory: dict[Kind, Any], kind: Kind, value: Any) -> None:
    """Keep a value. Lengths, and so kinds, may change with every batch: a full memory is emptied."""
    if len(memory) >= MOST_REMEMBERED:
        memory.clear()
    memory[kind] = value


class Plan:
    """How inputs of one kind are computed. It holds no tensors, and is complete before another thread can see it."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        softcap: float | None,
        dropout_p: float,
        family: Family,
        in_graph: bool = False,
    ) -> None:
        self.factors = scale, softcap, dropout_p
        self.family = family
        is_empty = query.numel() == 0 or key.numel() == 0
        # None: plain torch computes them.
        self.configs = None if is_empty or family == DECODING else launched_configs(query, value, family, in_graph)
        if self.configs is not None:
            self.forward_tiles = *self.configs.forward[:2], False
            self.key_value_gradient_tiles = *self.configs.key_value_gradient[:2], True
            self.query_gradient_tiles = *self.configs.query_gradient[:2], False
        self._forward: Callable[..., tuple[Tensor, Tensor]] | None = None
        self._backwards: dict[Kind, Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]] = {}

    def kernels(self) -> tuple[type[Any], type[Any], tuple[Any, ...]]:
        """The classes of the forward and the backward kernels, and what they take of the factors."""
        if self.family == PORTABLE:
            from . import portable

            return portable.AttentionForward, portable.AttentionBackward, self.factors
        from . import hopper

        backward = hopper.FusedAttentionBackward if self.family == FUSED_HOPPER else hopper.AttentionBackward
        return hopper.AttentionForward, backward, self.factors[:1]

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
            forward, _, factors = self.kernels()
            self._forward = forward(query, key, value, bounds, sinks, schedule, *factors, self.configs.forward)
        return self._forward(query, key, value, bounds, sinks, schedule, seed)

    def decode(
        self, query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, sinks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The results of a plan of the family `DECODING`."""
        if not _is_on_current_device(query):
            with torch.cuda.device_of(query):
                return self.decode(query, key, value, bounds, sinks)
        if self._forward is None:
            from . import portable

            config = decoding_config_of(query, value)
            assert config is not None
            self._forward = portable.DecodingForward(query, key, value, bounds, sinks, *self.factors[:2], config)
        return self._forward(query, key, value, bounds, sinks)

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
        kind = kind_of(d_out, d_lse, query, key, value, bounds, out, lse)
        backward = self._backwards.get(kind)
        if backward is None:
            _, kernels, factors = self.kernels()
            backward = kernels(d_out, d_lse, query, key, value, bounds, out, by_column, by_row, *factors, self.configs)
            remember_for_kind(self._backwards, kind, backward)
        return backward(d_out, d_lse, query, key, value, bounds, out, lse, by_column, by_row, seed)


def _is_on_current_device(tensor: Tensor) -> bool:
    """Whether Triton launches there. To ask takes less time than to enter a `torch.cuda.device`."""
    return not tensor.is_cuda or tensor.device.index == torch.cuda.current_device()


plans: dict[Kind, Plan] = {}


def plan_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    sinks: Tensor | None,
    scale: float,
    softcap: float | None,
    dropout_p: float,
    family: Family,
) -> Plan:
    """The plan of an operator, whose arguments have been checked before."""
    kind = kind_of(query, key, value, bounds, sinks), scale, softcap, dropout_p, family, "operator"
    plan = plans.get(kind)
    if plan is None:
        plan = Plan(query, key, value, scale, softcap, dropout_p, family, in_graph=True)
        remember_for_kind(plans, kind, plan)
    return plan


# Implementations


def family_of(
    query: Tensor,
    value: Tensor,
    bounds: Tensor,
    scale: float,
    softcap: float | None,
    dropout_p: float,
    deterministic: bool,
    needs_gradients: bool,
) -> Family:
    if not needs_gradients and decodes(query, value, bounds, dropout_p):
        return DECODING
    # The scores of `hopper`'s backward begin with the log-sum-exp divided by the scale.
    if not specializes(query, value, bounds, softcap, dropout_p) or scale == 0:
        return PORTABLE
    return HOPPER if deterministic or not fuses_backward(query, value) else FUSED_HOPPER


MOST_DECODED_ROWS = 16


def decodes(query: Tensor, value: Tensor, bounds: Tensor, dropout_p: float) -> bool:
    """Whether `portable.DecodingForward` computes: few rows against a cache. The other kernels would fill a part of
    their tiles, read keys once for each head, and give a GPU no more programs than there are heads.

    An exported graph is for every length: it keeps to the portable kernels.
    """
    q_len, (kv_heads, kv_len) = query.shape[2], value.shape[1:3]
    return (
        q_len < kv_len  # asked first: a graph of whole prompts is for every length
        and q_len <= MOST_DECODED_ROWS
        and query.numel() > 0
        and bounds.shape[1] in (1, kv_heads)  # the heads that share a key are in one tile, under one mask
        and not dropout_p
        and not is_traced_for_export()
        and decoding_config_of(query, value) is not None
    )


def decoding_config_of(query: Tensor, value: Tensor) -> Config | None:
    """How `portable.DecodingForward` is launched; None where other kernels or plain torch compute its inputs."""
    if query.device.type != "cuda" or query.dtype == torch.float64:
        return None
    try:
        from .configs import select_decoding_config
    except ImportError:
        return None
    return select_decoding_config(query.device, query.dtype, max(query.shape[-1], value.shape[-1]))


def is_traced_for_export() -> bool:
    """Whether `torch.export` traces: the flag that `torch.compiler.is_exporting()` returns. Up to torch 2.11, that
    function is True in every graph of `torch.compile` as well.
    """
    return torch.compiler._is_exporting_flag


# Elements of the query: 4K tokens with 16 heads of size 128. From here on the device saves up to 28 % and loses at most
# 4 % (documents of 100 tokens). A layer takes it longer than the host, to which these kernels are 0.2 ms more work.
FEWEST_SPECIALIZED_ELEMENTS = 1 << 23


def specializes(query: Tensor, value: Tensor, bounds: Tensor, softcap: float | None, dropout_p: float) -> bool:
    """Whether `hopper` computes what it has kernels for: large inputs, because launching it takes longer.

    An exported graph is for every length and every GPU: it keeps to the portable kernels.
    """
    batch_size, num_heads, q_len, dim = query.shape
    kv_heads, kv_len, dim_v = value.shape[1:]
    if (
        environment.PORTABLE
        or query.device.type != "cuda"
        or batch_size * num_heads * q_len * dim < FEWEST_SPECIALIZED_ELEMENTS
        or min(q_len, kv_len) < 1024
        or not dim % 8 == 0 == dim_v % 8  # TMA reads rows that are multiples of 16 bytes
        or bounds.shape[1] not in (1, kv_heads)  # dK and dV visit all query heads of a key under one mask
        or softcap is not None
        or dropout_p
        or is_traced_for_export()
    ):
        return False
    try:
        from .configs import select_specialized_configs
    except ImportError:
        return False
    return select_specialized_configs(query.device, query.dtype, max(dim, dim_v)) is not None


def fuses_backward(query: Tensor, value: Tensor) -> bool:
    """Whether `hopper` has one kernel for all gradients of these inputs. It adds dQ in an order that changes."""
    from .configs import LARGEST_FUSED_DIM

    return max(query.shape[-1], value.shape[-1]) <= LARGEST_FUSED_DIM


def configs_of(query: Tensor, value: Tensor, family: Family) -> Configs | None:
    """Tile sizes of the Triton kernels for these inputs, or None where `tiled` computes them."""
    if query.device.type != "cuda":
        return None
    head_dim = max(query.shape[-1], value.shape[-1])
    try:
        from .configs import select_configs, select_fused_configs, select_specialized_configs
    except ImportError as error:
        configs, reason = None, f"Triton does not import ({error})"
    else:
        if query.dtype == torch.float64:
            configs, reason = None, "there is no kernel for float64"
        else:
            select = {
                PORTABLE: select_configs,
                HOPPER: select_specialized_configs,
                FUSED_HOPPER: select_fused_configs,
            }[family]
            configs = select(query.device, query.dtype, head_dim)
            reason = f"there is no kernel for head size {head_dim} in {query.dtype}"
    if configs is None:
        warnings.warn(f"flashmask_kernels computes in plain torch, exactly but slowly: {reason}", stacklevel=2)
    return configs


# Elements of the query. A descriptor takes the host some 4 us; the forward has three, dK/dV and dQ four each. What they
# save on the device at 1K tokens and 32 heads of 128, 1 << 22, in us (H200, three masks): the forward 4 to 12, dQ 4 to
# 12, dK/dV 13 to 20; of 64 1 to 6, 4, and 8 to 12. At 1.5K tokens, dK/dV by pointers makes the backward 17 to 27 %
# longer.
FEWEST_DESCRIBED_ELEMENTS = {"forward": 1 << 23, "key_value_gradient": 5 << 20, "query_gradient": 1 << 23}


def launched_configs(query: Tensor, value: Tensor, family: Family, in_graph: bool) -> Configs | None:
    """`configs_of`, for kernels that are launched. The schedules of a graph have their tiles at every length: a graph
    that asked for the length would be another for short rows.
    """
    configs = configs_of(query, value, family)
    if configs is None or family != PORTABLE:
        return configs
    short = [kernel for kernel, fewest in FEWEST_DESCRIBED_ELEMENTS.items() if query.numel() < fewest]
    return configs.without_descriptors(*short) if in_graph else configs.for_short_rows(*short)


def tiles_of(kernel: str, query: Tensor, value: Tensor, family: Family) -> Tiles | None:
    """Tiles of the kernel of that name in `Configs`; None where `tiled` computes."""
    configs = configs_of(query, value, family)
    if configs is None:
        return None
    config = getattr(configs, kernel)
    return config.block_m, config.block_n, kernel == "key_value_gradient"
