"""One step of decoding at the shapes of models: flashmask compared with Transformers' `eager` and `sdpa`.

    python benchmarks/decoding_gpu.py                                      # 4 minutes
    python benchmarks/decoding_gpu.py --models "Gemma 2" --lengths 8192 --batches 1
    python benchmarks/decoding_gpu.py --device cpu --lengths 37 --batches 2   # checks itself without a GPU

A step is one layer's attention of one query row per sequence against a cache of keys, under the mask that the
implementation makes for it. `device` is the time on the device with a flushed L2 cache, `host` the time until the call
returns, `mask_device` and `mask_host` the time to make the mask, once a step for all layers.

`flashmask` is what layers call. `flashmask, kernel` is the kernel that splits the keys, also where layers call SDPA;
`flashmask, kernel for many rows` is what ran in its place before. `eager` is the model's own function, which alone has
sinks. `sdpa` is left out where it has neither sinks nor softcap, as Transformers leaves it out.

Before anything is timed, each implementation must equal float32 attention.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from masking_gpu import times
from measurement import RESULTS, require_gpu, write_results
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gpt_oss import modeling_gpt_oss

from flashmask_kernels import dispatch, flashmask_attention
from hf_flashmask.integration import flashmask_attention_forward, flashmask_mask

DTYPE = torch.bfloat16


class Model(NamedTuple):
    """The attention of one kind of layer."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False
    is_padded: bool = False


# A window is measured against a cache that keeps all keys.
MODELS = {
    "Llama 3": Model(32, 8, 128),
    "Llama 3, padded": Model(32, 8, 128, is_padded=True),
    "gpt-oss": Model(64, 8, 64, has_sinks=True),
    "gpt-oss, window": Model(64, 8, 64, window=128, has_sinks=True),
    "Gemma 2": Model(16, 8, 256, softcap=50.0),
    "Gemma 2, window": Model(16, 8, 256, window=4096, softcap=50.0),
    "Gemma 4": Model(32, 4, 512),
    "Gemma 4, window": Model(32, 16, 256, window=1024),
}


class Step(NamedTuple):
    """Tensors `[B, heads, S, D]`; the mask as bool `[B, S]`, and the layer."""

    query: Tensor
    key: Tensor
    value: Tensor
    sinks: Tensor | None
    visible: Tensor
    layer: nn.Module


def step_of(model: Model, batch: int, length: int, device: str) -> Step:
    generator = torch.Generator(device).manual_seed(length)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=DTYPE, device=device, generator=generator)

    index = torch.arange(length, device=device)
    visible = (length - 1 - index < (model.window or length)).expand(batch, -1)
    if model.is_padded:
        visible = visible & left_padding(batch, length, device)
    layer = nn.Module().eval()
    sinks = tensor(model.heads) if model.has_sinks else None
    for name, value in (("num_key_value_groups", model.heads // model.kv_heads), ("sinks", sinks)):
        setattr(layer, name, value)
    query = tensor(batch, 1, model.heads, model.head_dim).transpose(1, 2)
    key, value = (tensor(batch, model.kv_heads, length, model.head_dim) for _ in range(2))
    return Step(query, key, value, sinks, visible, layer)


def left_padding(batch: int, length: int, device: str) -> Tensor:
    """bool `[B, S]`: the longest sequence has no padding, the shortest is about half of that."""
    padding = (torch.arange(batch, device=device) + 1) % batch * length // (2 * batch) if batch > 1 else length // 3
    return torch.arange(length, device=device) >= torch.as_tensor(padding, device=device).reshape(-1, 1)


def attend_in_float32(model: Model, step: Step) -> Tensor:
    """`[B, H, D]`."""
    out = torch.empty(*step.query.shape[:2], model.head_dim, device=step.query.device)
    group = model.heads // model.kv_heads
    for head in range(model.kv_heads):
        rows = slice(head * group, (head + 1) * group)
        scores = step.query[:, rows, 0].float() @ step.key[:, head].float().transpose(1, 2) * model.head_dim**-0.5
        if model.softcap is not None:
            scores = model.softcap * torch.tanh(scores / model.softcap)
        scores = scores.masked_fill(~step.visible[:, None], -torch.inf)
        if step.sinks is not None:
            sinks = step.sinks[rows].float()[:, None].expand(*scores.shape[:2], 1)
            scores = torch.cat([scores, sinks], 2)
        out[:, rows] = scores.softmax(2)[..., : step.key.shape[2]] @ step.value[:, head].float()
    return out


def check(out: Tensor, expected: Tensor) -> None:
    """An output `[B, 1, H, D]` of an implementation against float32."""
    error = float((out[:, 0].float() - expected).norm() / expected.norm())
    assert error < 1e-2, error


class Implementation(NamedTuple):
    """How it makes its mask and attends under it to `[B, 1, H, D]`; inside of `context`."""

    make: Callable[[], Any]
    attend: Callable[[Any], Tensor]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


def implementations(model: Model, step: Step, device: str) -> dict[str, Implementation]:
    batch, _, length, _ = step.key.shape
    asked: dict[str, Any] = {"batch_size": batch, "q_length": 1, "kv_length": length, "q_offset": length - 1}
    asked.update(attention_mask=step.visible if model.is_padded else None, device=device)
    if model.window is not None:
        window = masking_utils.sliding_window_causal_mask_function(model.window)
        asked.update(mask_function=window, local_size=model.window)
    tensors, scale = (step.query, step.key, step.value), model.head_dim**-0.5
    options: dict[str, Any] = {"softcap": model.softcap, "scaling": scale}
    eager = (modeling_gpt_oss if model.has_sinks else modeling_gemma2).eager_attention_forward

    def attend_as_layers(mask: Any) -> Tensor:
        return flashmask_attention_forward(step.layer, *tensors, mask, s_aux=step.sinks, **options)[0]

    def attend_by_kernel(mask: Any) -> Tensor:
        given: dict[str, Any] = {"bounds": mask.bounds, "scale": scale, "softcap": model.softcap, "sinks": step.sinks}
        return flashmask_attention(*tensors, **given).transpose(1, 2)

    def make() -> Any:
        return flashmask_mask(**asked)

    def of_many_rows() -> AbstractContextManager[Any]:
        dispatch.plans.clear()
        return mock.patch.object(dispatch, "decodes", return_value=False)

    found = {
        "flashmask": Implementation(make, attend_as_layers),
        "flashmask, kernel": Implementation(make, attend_by_kernel),
        "flashmask, kernel for many rows": Implementation(make, attend_by_kernel, of_many_rows),
        "eager": Implementation(
            lambda: masking_utils.eager_mask(**asked, dtype=DTYPE),
            lambda mask: eager(step.layer, *tensors, mask, **options)[0],
        ),
    }
    if not model.has_sinks and model.softcap is None:
        found["sdpa"] = Implementation(
            lambda: masking_utils.sdpa_mask(**asked),
            lambda mask: sdpa_attention_forward(step.layer, *tensors, mask, scaling=scale)[0],
        )
        if model.head_dim <= 256 and model.window is None and not model.is_padded and device == "cuda":
            backends = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "FlashAttention-2": SDPBackend.FLASH_ATTENTION}
            for name, backend in backends.items():
                found[f"sdpa, {name}"] = Implementation(
                    lambda: None,
                    lambda _: scaled_dot_product_attention(*tensors, enable_gqa=True).transpose(1, 2),
                    functools.partial(sdpa_kernel, backend),
                )
    return found


@torch.inference_mode()
def measure(name: str, batch: int, length: int, device: str) -> Iterator[dict[str, Any]]:
    model = MODELS[name]
    step = step_of(model, batch, length, device)
    expected = attend_in_float32(model, step)
    for implementation, (make, attend, context) in implementations(model, step, device).items():
        with context():
            made = make()
            row: dict[str, Any] = {"model": name, "batch": batch, "length": length, "implementation": implementation}
            try:
                check(attend(made), expected)
            except RuntimeError as error:  # a backend that this GPU does not have
                print(f"{implementation}: {str(error).splitlines()[0]}")
                continue
            row["milliseconds"], row["spread"] = times(functools.partial(attend, made), device)
            if implementation in ("flashmask", "eager", "sdpa"):
                making, _ = times(make, device)
                row["milliseconds"].update({f"mask_{part}": value for part, value in making.items()})
        dispatch.plans.clear()
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS), metavar="MODEL")
    parser.add_argument("--lengths", type=int, nargs="*", default=[1024, 8192, 32768, 131072])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.device == "cuda":
        require_gpu()
    settings = {
        "dtype": str(DTYPE).removeprefix("torch."),
        "models": {n: MODELS[n]._asdict() for n in arguments.models},
    }
    rows = []
    for name in arguments.models:
        for batch in arguments.batches:
            for length in arguments.lengths:
                for row in measure(name, batch, length, arguments.device):
                    rows.append(row)
                    print(name, batch, length, row["implementation"], row["milliseconds"], flush=True)
                path = write_results("decoding_gpu", arguments.device, settings, rows, arguments.output)
    print("wrote", path)


if __name__ == "__main__":
    main()
