"""What a `Launcher` does against what Triton does, without a GPU. Prints JSON.

    python tests/launch_kinds.py

`conflicts`: the launch code of all attention kernels is called with random inputs; of equal kinds, Triton's own
specialization must be equal, and so must what kernels get beside tensors. `differences`: of what Triton hands to its
driver in a first call and a `Launcher` in a second one.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any, ClassVar
from unittest import mock

import torch
from compile_kernels import TARGETS, OfflineDriver
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from flashmask_kernels import configs, dispatch, portable
from flashmask_kernels.launch import attention_launcher
from flashmask_kernels.launch.launcher import Launcher
from flashmask_kernels.schedule import schedule_shape

CALLS = 2000
SHAPES = 20


class Record(Launcher):
    """Launches nothing."""

    kind: ClassVar[Any] = None  # of the inputs at the moment
    found: ClassVar[dict[tuple[Any, ...], str]] = {}
    launches: ClassVar[int] = 0
    conflicts: ClassVar[list[str]] = []

    def __call__(self, *tensors: Any) -> None:
        kernel, constants = self._kernel, self._constants
        assert len(tensors) + len(self._numbers) + len(constants) == len(kernel.arg_names)
        binder = kernel.device_caches[0][-1]
        _, specialization, _ = binder(*tensors, *self._numbers, **constants, **self._options)
        found = f"{specialization} {self._programs} {self._numbers} {constants} {self._options}"
        known = Record.found.setdefault((kernel.fn, Record.kind), found)
        Record.launches += 1
        if known != found:
            Record.conflicts.append(f"{kernel.fn.__name__}: {known} and {found}")


def random_tensor(choose: random.Random, batch: int, heads: int, length: int, dim: int, dtype: torch.dtype) -> Tensor:
    """`[B, H, S, D]`, laid out as by models or a part of more, at an even or odd address."""
    offset, padding = choose.choice([(0, 0)] * 20 + [(8, 8), (1, 8)])
    whole = torch.empty(batch, length, heads, dim + padding, dtype=dtype)
    if choose.random() < 0.05:
        whole = torch.empty(batch, heads, length, dim + padding, dtype=dtype).transpose(1, 2)
    return whole[..., offset : offset + dim].transpose(1, 2)


def call(number: int) -> None:
    choose = random.Random(number % SHAPES)
    dtype = choose.choice([torch.bfloat16, torch.float32])
    dim = choose.choice([16, 56, 72, 128, 136])
    batch, kv_heads, planes = choose.choice([1, 2]), choose.choice([1, 2]), choose.choice([1, 2, 4])
    heads = kv_heads * choose.choice([1, 2])
    q_len, kv_len = (choose.choice([1, 16, 33]) for _ in range(2))
    choose = random.Random(number)  # what follows differs between calls of one shape
    query, d_out = (random_tensor(choose, batch, heads, q_len, dim, dtype) for _ in range(2))
    key, value = (random_tensor(choose, batch, kv_heads, kv_len, dim, dtype) for _ in range(2))
    mask_heads = choose.choice([1, kv_heads])
    size = choose.choice([1, batch]) * mask_heads * planes * kv_len
    bounds = torch.empty(size + 1, dtype=torch.int32)[choose.choice([0] * 9 + [1]) :][:size]
    bounds = bounds.view(-1, mask_heads, planes, kv_len)
    sinks = choose.choice([None, torch.empty(heads + 1)[choose.choice([0, 1]) :][:heads]])
    d_lse = choose.choice([None, torch.empty(batch, heads, q_len)])
    scale = choose.choice([0.1, 0.5])
    if choose.random() < 0.2:
        few, config = query[:, :, :16], configs.Config(16, 16, 4, 2)
        Record.kind = dispatch.kind_of(few, key, value, bounds, sinks), scale
        decode = portable.DecodingForward(few, key, value, bounds, sinks, scale, None, config)
        decode(few, key, value, bounds, sinks)
        return
    families = {
        dispatch.PORTABLE: configs.select_configs,
        dispatch.HOPPER: configs.select_specialized_configs,
        dispatch.FUSED_HOPPER: configs.select_fused_configs,
    }
    of_family = {family: select(torch.device("cuda"), dtype, dim) for family, select in families.items()}
    family, chosen = choose.choice([(family, chosen) for family, chosen in of_family.items() if chosen is not None])

    def schedule(config: configs.Config, by_column: bool) -> Tensor:
        shape = schedule_shape(len(bounds) * mask_heads, q_len, kv_len, config.block_m, config.block_n, by_column)
        return torch.empty(shape, dtype=torch.int32)

    if family != dispatch.PORTABLE:
        from flashmask_kernels import hopper

        forward_kernels, factors, seed = hopper.AttentionForward, (scale,), None
        is_fused = family == dispatch.FUSED_HOPPER
        backward_kernels = hopper.FusedAttentionBackward if is_fused else hopper.AttentionBackward
    else:
        forward_kernels, backward_kernels = portable.AttentionForward, portable.AttentionBackward
        kernels = choose.choice([(), ("forward", "query_gradient"), chosen._fields])
        chosen = choose.choice([chosen.without_descriptors, chosen.for_short_rows])(*kernels)
        softcap, dropout_p = choose.choice([None, 5.0]), choose.choice([0.0, 0.1, 0.5])
        factors = scale, softcap, dropout_p
        seed = torch.empty(1, dtype=torch.int64) if dropout_p else None
    inputs, by_row = (query, key, value, bounds), schedule(chosen.forward, False)
    Record.kind = dispatch.kind_of(*inputs, sinks), factors, chosen, family
    forward = forward_kernels(*inputs, sinks, by_row, *factors, chosen.forward)
    out, lse = forward(*inputs, sinks, by_row, seed)
    schedules = schedule(chosen.key_value_gradient, True), schedule(chosen.query_gradient, False)
    Record.kind = dispatch.kind_of(d_out, d_lse, *inputs, out, lse), factors, chosen, family
    backward = backward_kernels(d_out, d_lse, *inputs, out, *schedules, *factors, chosen)
    backward(d_out, d_lse, *inputs, out, lse, *schedules, seed)


def differences_to_triton() -> list[str]:
    """Two calls of forward and backward, compiled and handed to a driver that only notes its arguments."""
    handed_over: list[list[Any]] = []

    def note(self: CompiledKernel) -> Callable[..., None]:
        """Of the driver's arguments, those three that are for profilers are not given by a `Launcher`."""
        return lambda *arguments: handed_over[-1].append(
            [self.metadata.name, *map(plain, arguments[:6] + arguments[9:])]
        )

    def plain(argument: Any) -> Any:
        """Something to compare: a tensor is its address, which differs from call to call if it is a new one."""
        if isinstance(argument, Tensor):
            argument = argument.data_ptr()
        if isinstance(argument, int) and argument > 1 << 32:
            return given.get(argument, "new")
        if isinstance(argument, TensorDescriptor):
            return plain(argument.base), argument.shape, argument.strides, argument.block_shape
        return tuple(plain(part) for part in argument) if isinstance(argument, tuple) else argument

    parts = {"_init_handles": lambda self: None, "run": property(note)}
    parts |= {name: property(lambda self: 0, lambda self, value: None) for name in ("function", "packed_metadata")}
    query, key, value, d_out = (torch.empty(1, 64, heads, 16, dtype=torch.float16) for heads in (4, 2, 2, 4))
    query, key, value, d_out = (tensor.transpose(1, 2) for tensor in (query, key, value, d_out))
    bounds = torch.empty(1, 1, 1, 64, dtype=torch.int32)
    config = configs.Config(32, 32, 4, 2, use_descriptors=True)
    schedule = torch.empty(schedule_shape(1, 64, 64, 32, 32, False), dtype=torch.int32)
    chosen = configs.Configs(config, config._replace(use_descriptors=False), config)
    given = {tensor.data_ptr(): number for number, tensor in enumerate((query, key, value, d_out, bounds, schedule))}
    inputs, factors = (query, key, value, bounds), (0.1, None, 0.0)
    forward = portable.AttentionForward(*inputs, None, schedule, *factors, config)
    with mock.patch.multiple(CompiledKernel, create=True, **parts):
        backward = None
        for _ in range(2):
            handed_over.append([])
            out, lse = forward(*inputs, None, schedule, None)
            backward = backward or portable.AttentionBackward(
                d_out, None, *inputs, out, schedule, schedule, *factors, chosen
            )
            backward(d_out, None, *inputs, out, lse, schedule, schedule, None)
    first, second = handed_over
    assert len(first) == len(second) == 3
    return [f"{one} and {other}" for one, other in zip(first, second) if one != other]


def main() -> None:
    driver.set_active(OfflineDriver(TARGETS["sm_90"]))
    differences = differences_to_triton()
    modules = [attention_launcher, portable.decoding]
    if configs._HAS_GLUON:
        from flashmask_kernels import hopper
        from flashmask_kernels.common import nan_repair, row_statistics

        modules += [nan_repair, row_statistics, hopper.forward, hopper.backward, hopper.fused_backward]
    with mock.patch.object(configs, "architecture", return_value="sm_90"):
        for module in modules:
            mock.patch.object(module, "Launcher", Record).start()
        for number in range(CALLS):
            call(number)
    found = {
        "launches": Record.launches,
        "kinds": len(Record.found),
        "conflicts": Record.conflicts,
        "differences": differences,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
