"""What one of several processes does for `test_replicas.py`: cases of engines, models and batches, and their errors.

A case trains one step. Each process has a batch of its own, or, where an engine splits the heads or the rows of one
batch, a part of the same one. Its loss is a sum over its tokens, divided so that the mean over the processes is the
mean over all tokens. The truth is one process under eager attention with each document in a call of its own.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import gc
import json
import multiprocessing
import os
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import tiny_vision
import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from parallel_cases import count_masks, device_of_rank, error_of
from peft import LoraConfig, get_peft_model
from tiny_models import VOCABULARY, build, eager_twin, longrope, packed
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor.experimental import context_parallel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_flashmask import bounds, keep_masks, share_prefixes
from hf_flashmask.training import PackedDataCollator

LENGTHS = [[5, 1, 9, 7, 2], [3, 12, 4], [8, 8, 1], [2, 17]]
"""The documents of each process; the processes have rows of different lengths."""

Results = dict[str, dict[str, Any]]


# Models


CHANGED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_one_kv_head": ("llama", {"num_key_value_heads": 1}),
    "llama_four_kv_heads": ("llama", {"num_key_value_heads": 4}),
    # Of the first row, only the second of two parts is longer.
    "llama_longrope": ("llama", longrope(7)),
    # Rounding in bfloat16 sends a token to another expert.
    "gpt_oss_all_experts": ("gpt_oss", {"num_experts_per_tok": 4}),
}


def build_model(name: str) -> transformers.PreTrainedModel:
    if name == "gemma3_images":
        model = tiny_vision.build(name)
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_("language_model" in parameter_name)
        return model
    architecture, changes = CHANGED.get(name, (name, {}))
    return build(architecture, **changes)


# Batches


def documents_of(rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randint(1, VOCABULARY, (1, length), generator=generator) for length in LENGTHS[rank]]


def num_labels(ranks: int) -> int:
    return sum(length - 1 for rank in range(ranks) for length in LENGTHS[rank])


def loss_of_documents(logits: Tensor, documents: list[Tensor]) -> Tensor:
    """The sum over documents that stand one after the other in one row."""
    losses, start = [], 0
    for document in (document.to(logits.device) for document in documents):
        part = logits[0, start : start + document.shape[1] - 1].float()
        losses.append(nn.functional.cross_entropy(part, document[0, 1:], reduction="sum"))
        start += document.shape[1]
    return torch.stack(losses).sum()


def token_types(document: Tensor) -> Tensor:
    """An image from the second to the fifth token."""
    index = torch.arange(document.shape[1])[None]
    return ((index >= 1) & (index < 5)).long()


def on_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {
        name: on_device(value, device) if isinstance(value, dict) else value.to(device) for name, value in batch.items()
    }


def batch_of(kind: str, rank: int, model: transformers.PreTrainedModel) -> dict[str, Any]:
    """A packed row. `bounds` and `heads` say with the mask what `packed` says with positions."""
    documents = documents_of(rank)
    batch: dict[str, Any] = packed(documents)
    length = batch["input_ids"].shape[1]
    own = bounds.from_position_ids(batch["position_ids"])
    if kind == "images":
        batch["token_type_ids"] = torch.cat([token_types(document) for document in documents], dim=1)
    elif kind == "bounds":
        if len(set(getattr(model.config, "layer_types", None) or ())) > 1:
            window = bounds.sliding_window(model.config.sliding_window, length)
            batch["attention_mask"] = {
                "full_attention": own,
                "sliding_attention": bounds.intersect(own, window),
            }
        else:
            batch["attention_mask"] = own
    elif kind == "heads":  # the last heads see the tokens before their document as well
        batch["attention_mask"] = torch.cat([own, own, bounds.causal(length), bounds.causal(length)], dim=1)
    elif kind == "padded":  # on the left
        batch = {name: nn.functional.pad(value, (3, 0)) for name, value in batch.items()}
        batch["attention_mask"] = nn.functional.pad(torch.ones(1, length, dtype=torch.long), (3, 0))
    return on_device(batch, model.device)


def loss_of_batch(model: nn.Module, kind: str, rank: int, config_of_model: transformers.PreTrainedModel) -> Tensor:
    if kind == "tree":
        return preference_loss(model, rank)
    logits = model(**batch_of(kind, rank, config_of_model), use_cache=False).logits
    return loss_of_documents(logits[:, 3:] if kind == "padded" else logits, documents_of(rank))


def true_loss(twin: transformers.PreTrainedModel, kind: str, rank: int) -> Tensor:
    documents = documents_of(rank)
    if kind == "tree":
        return preference_loss(twin, rank)
    if kind in ("heads", "row"):
        batch = batch_of("bounds" if kind == "row" else kind, rank, twin)
        visible = bounds.to_dense(batch["attention_mask"], batch["input_ids"].shape[1])
        batch["attention_mask"] = torch.where(visible, 0.0, torch.finfo(torch.float32).min)
        return loss_of_documents(twin(**batch, use_cache=False).logits, documents)
    calls = [{"input_ids": document} for document in documents]
    if kind == "images":
        calls = [call | {"token_type_ids": token_types(call["input_ids"])} for call in calls]
    logits = [twin(**on_device(call, twin.device), use_cache=False).logits for call in calls]
    return loss_of_documents(torch.cat(logits, dim=1), documents)


def preference_loss(model: nn.Module, rank: int) -> Tensor:
    """A prompt with three answers, each in a padded row, and a loss that compares them, as in DPO."""
    generator = torch.Generator().manual_seed(10 + rank)
    prompt = torch.randint(1, VOCABULARY, (7,), generator=generator)
    answers = [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in (4, 2, 6)]
    rows = [torch.cat([prompt, answer]) for answer in answers]
    device = next(model.parameters()).device
    input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(device)
    log_probs = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    of_tokens = log_probs.gather(2, input_ids[:, 1:, None])[..., 0] * mask[:, 1:]
    scores = of_tokens[:, len(prompt) - 1 :].sum(1)
    return -nn.functional.logsigmoid(scores[:1] - scores[1:]).sum()


# Engines


def layers_of(model: transformers.PreTrainedModel) -> nn.ModuleList:
    return getattr(model.model, "language_model", model.model).layers


@functools.cache
def mesh_of(*shape: int) -> DeviceMesh:
    """Cases share it: the groups of a mesh take longer to connect than a case takes to train."""
    return init_device_mesh(device_of_rank().type, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])


def shard(model: transformers.PreTrainedModel, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> nn.Module:
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def replicate_or_shard(engine: str, model: transformers.PreTrainedModel, ranks: int) -> nn.Module:
    kind, _, precision = engine.partition("_")
    is_rounded = precision == "bf16"
    dtypes = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32} if is_rounded else {}
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model.bfloat16() if is_rounded else model)
    if kind in ("fsdp2", "hsdp"):
        policy = MixedPrecisionPolicy(**dtypes)
        return shard(model, mesh_of(ranks) if kind == "fsdp2" else mesh_of(2, ranks // 2), policy)
    if kind == "fsdp1":
        return FullyShardedDataParallel(
            model,
            auto_wrap_policy=ModuleWrapPolicy({type(layers_of(model)[0])}),
            mixed_precision=MixedPrecision(**dtypes),
            use_orig_params=True,
            device_id=device_of_rank(),
        )
    if kind in ("zero2", "zero3"):
        return with_zero(model, stage=int(kind[-1]), is_rounded=is_rounded)
    raise ValueError(engine)


def with_zero(model: nn.Module, stage: int, is_rounded: bool) -> nn.Module:
    import deepspeed

    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": is_rounded},
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), config=settings
    )
    return engine


def is_of_deepspeed(model: nn.Module) -> bool:
    return type(model).__module__.startswith("deepspeed.")


def differentiate(loss: Tensor, model: nn.Module) -> None:
    if is_of_deepspeed(model):
        model.backward(loss)
    else:
        loss.backward()


def whole_gradient(parameter: Tensor, model: nn.Module) -> Tensor | None:
    if is_of_deepspeed(model):
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(parameter)
    gradient = parameter.grad
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """The whole gradient of each parameter, on the CPU, under the name it has in the model alone."""
    gradients = {}
    with contextlib.ExitStack() as stack:
        if isinstance(model, FullyShardedDataParallel):
            stack.enter_context(FullyShardedDataParallel.summon_full_params(model, with_grads=True))
        for name, parameter in model.named_parameters():
            gradient = whole_gradient(parameter, model) if parameter.requires_grad else None  # FSDP1 has zeros there
            if gradient is not None:
                for wrapper in ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "module."):
                    name = name.replace(wrapper, "")
                gradients[name] = gradient.detach().float().cpu().clone()
    return gradients


def errors(loss: Tensor, gradients: dict[str, Tensor], truth: tuple[Tensor, dict[str, Tensor]]) -> dict[str, float]:
    """Relative errors of the loss and of all gradients together; and of the gradient that differs most."""
    true_value, expected = truth
    if set(gradients) != set(expected):
        raise AssertionError(f"gradients of other parameters: {sorted(set(gradients) ^ set(expected))}")
    total = torch.stack([value.norm() for value in expected.values()]).norm()
    differences = {name: (gradients[name] - value).norm() for name, value in expected.items()}
    worst = max(differences, key=lambda name: float(differences[name]))
    return {
        "loss": float((loss.detach().cpu() - true_value).abs() / true_value.abs()),
        "gradients": float(torch.stack(list(differences.values())).norm() / total),
        "worst": worst,
    }


def mean_over_ranks(value: Tensor) -> Tensor:
    value = value.detach().clone().float()
    dist.all_reduce(value)
    return value / dist.get_world_size()


@functools.cache
def truth_of(
    name: str, kind: str, ranks: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the gradients of all batches in one process, on the CPU unless a device is named."""
    twin = eager_twin(build_model(name)).to(device or "cpu", dtype)
    loss = torch.stack([true_loss(twin, kind, rank) for rank in range(ranks)]).sum() / num_labels(ranks)
    loss.backward()
    return loss.detach().cpu(), gradients_of(twin)


# Cases. Each returns errors, or the message of the error that was raised.


def train_step(engine: str, name: str, kind: str, checkpointing: str = "") -> dict[str, float]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = build_model(name).to(device_of_rank())
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        if checkpointing == "reentrant":
            model.enable_input_require_grads()
    wrapped = replicate_or_shard(engine, model, ranks)
    with share_prefixes(model) if kind == "tree" else contextlib.nullcontext():
        loss = loss_of_batch(wrapped, kind, rank, model) * ranks / num_labels(ranks)
    differentiate(loss, wrapped)
    result = errors(mean_over_ranks(loss), gradients_of(wrapped), truth_of(name, kind, ranks))
    if "bf16" in engine:
        rounded = truth_of(name, kind, ranks, torch.bfloat16, device_of_rank())
        own = errors(*rounded, truth_of(name, kind, ranks))
        result |= {"eager_loss": own["loss"], "eager_gradients": own["gradients"]}
    return result


def train_lora(engine: str, name: str) -> dict[str, float]:
    rank, ranks = dist.get_rank(), dist.get_world_size()

    def with_lora(model: transformers.PreTrainedModel) -> nn.Module:
        torch.manual_seed(3)
        return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))

    model = build_model(name)
    adapted, twin = with_lora(model), with_lora(eager_twin(model))
    total = torch.stack([true_loss(twin, "packed", rank) for rank in range(ranks)]).sum() / num_labels(ranks)
    total.backward()
    if engine == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(adapted)
    else:
        mesh = mesh_of(ranks)
        for layer in layers_of(model):
            fully_shard(layer, mesh=mesh)
        wrapped = fully_shard(adapted, mesh=mesh)
    loss = loss_of_batch(wrapped, "packed", rank, model) * ranks / num_labels(ranks)
    loss.backward()
    return errors(mean_over_ranks(loss), gradients_of(wrapped), (total, gradients_of(twin)))


def train_with_accelerate(name: str, fsdp: bool) -> dict[str, float]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    accelerator = Accelerator(cpu=True)
    if fsdp:  # accelerate gives it to no CPU of its own accord
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["GptOssDecoderLayer"],
            activation_checkpointing=True,
        )
        accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    model = build_model(name)
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    loss = loss_of_batch(model, "packed", rank, build_model(name)) * ranks / num_labels(ranks)
    accelerator.backward(loss)
    result = errors(mean_over_ranks(loss), gradients_of(model), truth_of(name, "packed", ranks))
    AcceleratorState._reset_state()
    PartialState._reset_state()
    return result


def train_with_trainer(name: str) -> dict[str, float]:
    """Two steps of Trainer with packed rows against two steps of SGD on documents alone."""
    ranks = dist.get_world_size()
    generator = torch.Generator().manual_seed(5)
    lengths = [5, 9, 3, 12, 4, 8, 2, 7]
    examples = [{"input_ids": torch.randint(1, VOCABULARY, (n,), generator=generator).tolist()} for n in lengths]
    model = build_model(name)
    twin = eager_twin(model)
    half = len(examples) // 2
    for step in range(2):
        documents = [torch.tensor([example["input_ids"]]) for example in examples[step * half : (step + 1) * half]]
        logits = torch.cat([twin(document).logits for document in documents], dim=1)
        loss = loss_of_documents(logits, documents) / sum(document.shape[1] - 1 for document in documents)
        loss.backward()
        with torch.no_grad():
            for parameter in twin.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
                parameter.grad = None
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder,
            use_cpu=True,
            per_device_train_batch_size=half // ranks,
            max_steps=2,
            learning_rate=0.1,
            lr_scheduler_type="constant",
            optim="sgd",
            max_grad_norm=0.0,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
        )
        collator = PackedDataCollator()
        trainer = transformers.Trainer(model, arguments, train_dataset=examples, data_collator=collator)
        trainer.train()
    difference = [(a - b).norm() for (_, a), (_, b) in zip(model.named_parameters(), twin.named_parameters())]
    moved = [(a - b).norm() for a, b in zip(build_model(name).parameters(), twin.parameters())]
    AcceleratorState._reset_state()
    PartialState._reset_state()
    return {"loss": 0.0, "gradients": float(torch.stack(difference).norm() / torch.stack(moved).norm())}


def train_with_trl(folder: Path) -> dict[str, float]:
    """Two steps of DPOTrainer under DDP with `share_prefixes`, against the same trainer under eager attention."""
    import datasets
    from test_trl import build_model as build_for_trl
    from test_trl import make_tokenizer, preferences
    from transformers import LlamaForCausalLM
    from trl import DPOConfig, DPOTrainer

    def train(attention: str) -> tuple[dict[str, Tensor], share_prefixes | None]:
        path = folder / f"dpo_{attention}"
        build_for_trl(LlamaForCausalLM).save_pretrained(path)  # the first process does
        dist.barrier()
        arguments = DPOConfig(
            str(path),
            use_cpu=True,
            bf16=False,
            max_steps=2,
            per_device_train_batch_size=3,
            gradient_checkpointing=False,
            optim="sgd",
            learning_rate=0.3,
            lr_scheduler_type="constant",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            model_init_kwargs={"attn_implementation": attention},
        )
        data, tokenizer = preferences(), make_tokenizer()
        trainer = DPOTrainer(model=str(path), args=arguments, train_dataset=data, processing_class=tokenizer)
        sharing = None
        with contextlib.ExitStack() as stack:
            if attention == "flashmask":
                sharing = stack.enter_context(share_prefixes(trainer.model, trainer.ref_model))
            trainer.train()
        weights = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
        AcceleratorState._reset_state()
        PartialState._reset_state()
        return weights, sharing

    datasets.config.HF_DATASETS_CACHE = folder / f"cache_{dist.get_rank()}"
    expected, _ = train("eager")
    trained, sharing = train("flashmask")
    assert sharing is not None
    assert sharing.computed_tokens < sharing.given_tokens
    start = build_for_trl(LlamaForCausalLM).state_dict()
    difference = torch.stack([(trained[name] - value).norm() for name, value in expected.items()]).norm()
    moved = torch.stack([(value - start[name]).norm() for name, value in expected.items()]).norm()
    return {"loss": 0.0, "gradients": float(difference / moved)}


def train_tensor_parallel(name: str, kind: str, folder: Path) -> dict[str, float]:
    """Each process has the same batch, and some of the heads."""
    model = build_model(name)
    folder = folder / f"{name}_{dist.get_world_size()}"
    if dist.get_rank() == 0:
        model.save_pretrained(folder)
    dist.barrier()
    parallel = type(model).from_pretrained(folder, attn_implementation="flashmask", tp_plan="auto").eval()
    twin = eager_twin(model)
    expected = true_loss(twin, kind, 0)
    expected.backward()
    with share_prefixes(parallel) if kind == "tree" else contextlib.nullcontext():
        loss = loss_of_batch(parallel, kind, 0, model)
    loss.backward()
    result = errors(loss, gradients_of(parallel), (expected.detach(), gradients_of(twin)))
    heads = layers_of(parallel)[0].self_attn.q_proj.weight
    return result | {"is_sharded": hasattr(heads, "placements")}


# Sequence parallelism as engines do it. They replace the attention function and gather the rows of a layer.


class _Exchange(torch.autograd.Function):
    """All-to-all of `[B, H, S / P, D]` to `[B, H / P, S, D]`, or back."""

    @staticmethod
    def forward(context: Any, value: Tensor, scattered: int, gathered: int) -> Tensor:
        context.dims = scattered, gathered
        parts = torch.stack(value.chunk(dist.get_world_size(), scattered))
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts)  # gloo of torch 2.9 has no other
        return torch.cat(received.unbind(), gathered)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        scattered, gathered = context.dims
        return _Exchange.apply(gradient, gathered, scattered), None, None


def raise_on_all(call: Callable[[], Tensor]) -> Tensor:
    """What `call` returns, or, on all ranks, its error: engines leave the others waiting until the process ends."""
    output = message = None
    try:
        output = call()
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    if any(messages):
        raise RuntimeError(next(filter(None, messages)))
    assert output is not None
    return output


Attend = Callable[..., tuple[Tensor, None]]


def deepspeed(inner: Attend) -> Attend:
    """Ulysses as DeepSpeed registers it under the name of an implementation: it hands None on as the mask."""
    ranks = dist.get_world_size()

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        if "position_ids" in kwargs:
            kwargs["position_ids"] = gather_tokens(kwargs["position_ids"])
        if key.shape[1] < ranks:
            key, value = (tensor.repeat_interleave(ranks // key.shape[1], 1) for tensor in (key, value))
        query, key, value = (_Exchange.apply(tensor, 1, 2) for tensor in (query, key, value))
        output = raise_on_all(lambda: inner(module, query, key, value, None, **kwargs)[0])
        return _Exchange.apply(output, 1, 2), None

    return attend


def accelerate_ulysses(inner: Attend) -> Attend:
    """Ulysses as accelerate's pull request 4209 registers it: it slices sinks and takes cumulative lengths away."""
    ranks, rank = dist.get_world_size(), dist.get_rank()

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        if kwargs.get("position_ids") is None:
            raise ValueError("Ulysses sequence parallelism needs `position_ids` in every attention call")
        if key.shape[1] % ranks:
            raise ValueError("Cannot split the heads across the sequence parallel ranks")
        query, key, value = (_Exchange.apply(tensor, 1, 2) for tensor in (query, key, value))
        kwargs["position_ids"] = gather_tokens(kwargs["position_ids"])
        for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"):
            kwargs.pop(name, None)
        if kwargs.get("s_aux") is not None:
            kwargs["s_aux"] = kwargs["s_aux"].chunk(ranks)[rank]
        output = raise_on_all(lambda: inner(module, query, key, value, None, **kwargs)[0])
        return _Exchange.apply(output, 1, 2), None

    return attend


def gather_tokens(part: Tensor) -> Tensor:
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part)
    return torch.cat(parts, 1)


@contextlib.contextmanager
def ulysses(engine: Callable[[Attend], Attend] = deepspeed) -> Iterator[None]:
    inner = ALL_ATTENTION_FUNCTIONS["flashmask"]
    ALL_ATTENTION_FUNCTIONS["flashmask"] = engine(inner)
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["flashmask"] = inner


def train_ulysses(
    name: str,
    kind: str,
    engine: Callable[[Attend], Attend] = deepspeed,
    keeps_masks: bool = False,
    is_compiled: bool = False,
) -> dict[str, float]:
    """Each process has a part of the first row."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = build_model(name)
    twin = eager_twin(model)
    # The rotation of all documents of a row depends on the longest one.
    true_kinds = {"heads": "heads", "image bounds": "images", "images": "images"}
    expected = true_loss(twin, "row" if name == "llama_longrope" else true_kinds.get(kind, "packed"), 0)
    expected.backward()
    batch = _ulysses_batch(kind, model)
    local = {
        key: value.chunk(ranks, 1)[rank] if isinstance(value, Tensor) and value.ndim == 2 else value
        for key, value in batch.items()
    }
    if kind == "tree":
        own = batch if keeps_masks else local
        local["attention_mask"] = bounds.from_position_ids(own["position_ids"])
    with contextlib.ExitStack() as stack:
        stack.enter_context(ulysses(engine))
        masks = stack.enter_context(count_masks())
        if keeps_masks:
            stack.enter_context(keep_masks(model, dist.group.WORLD, exchanges_in_eval=True))
        called = torch.compile(model, backend="eager") if is_compiled else model
        logits = called(**local, use_cache=False).logits
    labels = torch.full_like(batch["input_ids"], -100)
    start = PADDING if kind == "padded" else 0
    for document in documents_of(0):
        end = start + document.shape[1]
        labels[0, start : end - 1] = document[0, 1:]
        start = end
    return errors_of_parts(model, logits, labels, expected, twin) | {"masks": len(masks)}


def errors_of_parts(
    model: nn.Module, logits: Tensor, labels: Tensor, expected: Tensor, twin: nn.Module
) -> dict[str, float]:
    """Of the sum over all processes, each of which has the logits of a part of the row."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    loss = nn.functional.cross_entropy(logits[0], labels.chunk(ranks, 1)[rank][0], reduction="sum")
    loss.backward()
    gradients = {key: mean_over_ranks(value) * ranks for key, value in gradients_of(model).items()}
    return errors(mean_over_ranks(loss) * ranks, gradients, (expected.detach(), gradients_of(twin)))


def train_ringmaster(name: str) -> dict[str, float]:
    """Ulysses as axolotl's ringmaster has it: under a name of its own, for one document, with what it calls inside."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = build_model(name)
    twin = eager_twin(model)
    document = torch.cat(documents_of(0), dim=1)
    expected = loss_of_documents(twin(document, use_cache=False).logits, [document])
    expected.backward()
    inner = ALL_ATTENTION_FUNCTIONS["flashmask"]

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        if attention_mask is not None:
            raise NotImplementedError("attention_mask must be None")
        query, key, value = (_Exchange.apply(tensor, 1, 2) for tensor in (query, key, value))
        kwargs["is_causal"] = True if kwargs.get("is_causal") is None else kwargs["is_causal"]
        outer, module.config._attn_implementation = module.config._attn_implementation, "flashmask"
        try:
            output = raise_on_all(lambda: inner(module, query, key, value, None, **kwargs)[0])
        finally:
            module.config._attn_implementation = outer
        return _Exchange.apply(output, 1, 2), None

    transformers.AttentionInterface.register("ringmaster_ulysses", attend)
    model.set_attn_implementation("ringmaster_ulysses")
    positions = torch.arange(document.shape[1])[None]
    parts = {"input_ids": document.chunk(ranks, 1)[rank], "position_ids": positions.chunk(ranks, 1)[rank]}
    logits = model(**parts, use_cache=False).logits
    labels = nn.functional.pad(document[:, 1:], (0, 1), value=-100)
    return errors_of_parts(model, logits, labels, expected, twin)


PADDING = 8


def _ulysses_batch(kind: str, model: transformers.PreTrainedModel) -> dict[str, Any]:
    batch = batch_of(kind if kind in ("bounds", "heads", "images") else "packed", 0, model)
    length = batch["input_ids"].shape[1]
    if kind == "right padding":
        batch["input_ids"] = nn.functional.pad(batch["input_ids"], (0, PADDING))
        batch["position_ids"] = torch.cat([batch["position_ids"], torch.arange(2, 2 + PADDING)[None]], 1)
        batch["attention_mask"] = nn.functional.pad(torch.ones(1, length, dtype=torch.long), (0, PADDING))
    if kind.startswith("left padding"):
        amount = PADDING if kind == "left padding" else length
        batch["input_ids"] = nn.functional.pad(batch["input_ids"], (amount, 0), value=1)
        batch["position_ids"] = torch.arange(length + amount)[None]
        batch["attention_mask"] = nn.functional.pad(torch.ones(1, length, dtype=torch.long), (amount, 0))
    if kind == "padded":  # left padding, which the positions of the first document count
        batch = {key: nn.functional.pad(value, (PADDING, 0)) for key, value in batch.items()}
        end = PADDING + LENGTHS[0][0]
        batch["position_ids"][0, :end] = torch.arange(end)
        batch["attention_mask"] = nn.functional.pad(torch.ones(1, length, dtype=torch.long), (PADDING, 0))
    if kind == "document ids":
        batch["attention_mask"] = (batch["position_ids"] == 0).cumsum(1)
        batch["position_ids"] = torch.arange(length)[None]
    if kind == "image bounds":
        types = torch.cat([token_types(document) for document in documents_of(0)], dim=1)
        starts = (types == 1) & (nn.functional.pad(types, (1, 0))[:, :-1] == 0)
        blocks = torch.where(types == 1, starts.cumsum(1) - 1, -1)
        documents = bounds.from_position_ids(batch["position_ids"], is_causal=False)
        window = model.config.get_text_config().sliding_window  # as long as a block
        batch["attention_mask"] = {
            "full_attention": bounds.intersect(bounds.causal_with_blocks(blocks), documents),
            "sliding_attention": bounds.intersect(bounds.causal_with_blocks(blocks, window=window), documents),
        }
    return batch


def keep_without_an_engine() -> dict[str, float]:
    keep_masks(build_model("llama"), dist.group.WORLD)
    return {}


def attend_in_ring(name: str) -> NoReturn:
    """torch's `context_parallel`."""
    model = build_model(name)
    input_ids = torch.randint(1, VOCABULARY, (1, 24))
    positions = torch.arange(24)[None]
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    with context_parallel(mesh, buffers=[input_ids, positions], buffer_seq_dims=[1, 1]):
        refusal = error_of(lambda: model(input_ids=input_ids, position_ids=positions, use_cache=False))
    raise refusal


def after_the_ring(name: str) -> dict[str, float]:
    """Outside of the context the model works again."""
    with contextlib.suppress(NotImplementedError):
        attend_in_ring(name)
    return train_step("ddp", name, "packed")


HAS_TRL = sys.version_info >= (3, 11)
MODELS = ["llama", "llama_one_kv_head", "gpt_oss", "gemma3"]

CASES: dict[int, dict[str, Callable[..., dict[str, Any]]]] = {
    2: {
        **{f"ddp {name} packed": functools.partial(train_step, "ddp", name, "packed") for name in MODELS},
        **{f"fsdp2 {name} packed": functools.partial(train_step, "fsdp2", name, "packed") for name in MODELS},
        **{
            f"{engine} {name} {kind}": functools.partial(train_step, engine, name, kind)
            for engine in ("ddp", "fsdp2")
            for name, kind in (
                ("llama", "bounds"),
                ("gpt_oss", "bounds"),
                ("gemma3", "bounds"),
                ("llama", "heads"),
                ("gemma3", "padded"),
                ("gemma3_images", "images"),
                ("llama", "tree"),
                ("gpt_oss", "tree"),
                ("gemma3", "tree"),
            )
        },
        **{
            f"{engine} {name} {kind} {checkpointing}": functools.partial(train_step, engine, name, kind, checkpointing)
            for engine in ("ddp", "fsdp2")
            for checkpointing in ("reentrant", "not reentrant")
            for name, kind in (
                ("gpt_oss", "packed"),
                ("gpt_oss", "bounds"),
                ("gemma3", "padded"),
                ("llama", "heads"),
                ("gemma3_images", "images"),
                ("gemma3", "tree"),
                ("llama_one_kv_head", "packed"),
            )
        },
        **{f"fsdp1 {name} packed": functools.partial(train_step, "fsdp1", name, "packed") for name in MODELS},
        "fsdp1 gpt_oss bounds": functools.partial(train_step, "fsdp1", "gpt_oss", "bounds"),
        "fsdp1 gemma3 padded": functools.partial(train_step, "fsdp1", "gemma3", "padded"),
        "fsdp1 llama heads": functools.partial(train_step, "fsdp1", "llama", "heads"),
        "fsdp1 gemma3_images images reentrant": functools.partial(
            train_step, "fsdp1", "gemma3_images", "images", "reentrant"
        ),
        "fsdp1 gemma3 tree": functools.partial(train_step, "fsdp1", "gemma3", "tree"),
        **{
            f"{engine} {name} packed": functools.partial(train_step, engine, name, "packed")
            for engine in ("zero2", "zero3")
            for name in MODELS
        },
        "zero3 gpt_oss bounds": functools.partial(train_step, "zero3", "gpt_oss", "bounds"),
        "zero3 gemma3 tree": functools.partial(train_step, "zero3", "gemma3", "tree"),
        **{
            f"{engine}_bf16 {name} packed": functools.partial(train_step, f"{engine}_bf16", name, "packed")
            for engine in ("ddp", "fsdp1", "fsdp2", "zero2", "zero3")
            for name in ("llama", "llama_one_kv_head", "gpt_oss_all_experts", "gemma3")
        },
        "fsdp2_bf16 gpt_oss packed": functools.partial(train_step, "fsdp2_bf16", "gpt_oss", "packed"),
        **{
            f"fsdp2_bf16 {name} {kind} reentrant": functools.partial(train_step, "fsdp2_bf16", name, kind, "reentrant")
            for name, kind in (("gpt_oss", "packed"), ("gemma3_images", "images"), ("llama", "tree"))
        },
        **{f"{engine} llama lora": functools.partial(train_lora, engine, "llama") for engine in ("ddp", "fsdp2")},
        "accelerate ddp gemma3 packed": functools.partial(train_with_accelerate, "gemma3", False),
        "accelerate fsdp2 gpt_oss packed": functools.partial(train_with_accelerate, "gpt_oss", True),
        "trainer ddp gemma3 packed": functools.partial(train_with_trainer, "gemma3"),
        **({"trl dpo ddp llama": train_with_trl} if HAS_TRL else {}),
        **{
            f"tensor {name} {kind}": functools.partial(train_tensor_parallel, name, kind)
            for name, kind in (
                ("llama", "packed"),
                ("gemma3", "packed"),
                ("gpt_oss", "packed"),
                ("llama", "bounds"),
                ("llama", "heads"),
                ("llama", "tree"),
                ("gemma3", "bounds"),
                ("gemma3", "padded"),
                ("gemma3_images", "images"),
                ("llama_one_kv_head", "packed"),
            )
        },
        **{
            f"ulysses {name} {kind}": functools.partial(train_ulysses, name, kind)
            for name, kind in (
                ("llama", "packed"),
                ("llama_one_kv_head", "packed"),
                ("gemma3", "packed"),
                ("llama", "right padding"),
                ("llama", "left padding"),
                ("llama", "left padding of a whole part"),
                ("llama", "document ids"),
                ("llama", "bounds"),
                ("llama", "heads"),
                ("gemma3", "bounds"),
                ("gemma3", "tree"),
                ("gemma3_images", "images"),
                ("gpt_oss", "packed"),
                ("llama4", "packed"),
            )
        },
        **{
            f"kept {engine} {name} {kind}": functools.partial(train_ulysses, name, kind, ulysses_of, True)
            for engine, ulysses_of in (("deepspeed", deepspeed), ("accelerate", accelerate_ulysses))
            for name, kind in (
                ("llama", "packed"),
                ("gemma3", "packed"),
                ("gpt_oss", "packed"),
                ("llama", "document ids"),
                ("llama", "padded"),
                ("llama", "bounds"),
                ("llama", "heads"),
                ("gemma3", "bounds"),
                ("gemma3", "tree"),
                ("gemma3_images", "images"),
                ("gemma3_images", "image bounds"),
                *([("llama_one_kv_head", "packed")] if engine == "deepspeed" else []),
            )
        },
        "kept deepspeed llama_longrope packed": functools.partial(
            train_ulysses, "llama_longrope", "packed", deepspeed, keeps_masks=True
        ),
        "kept deepspeed llama packed compiled": functools.partial(
            train_ulysses, "llama", "packed", deepspeed, keeps_masks=True, is_compiled=True
        ),
        **{f"ringmaster {name}": functools.partial(train_ringmaster, name) for name in ("llama", "gemma3", "gpt_oss")},
        "kept deepspeed without an engine": keep_without_an_engine,
        "ring llama": functools.partial(attend_in_ring, "llama"),
        "after the ring": functools.partial(after_the_ring, "llama"),
    },
    4: {
        **{f"hsdp {name} packed": functools.partial(train_step, "hsdp", name, "packed") for name in MODELS},
        "hsdp gemma3_images images": functools.partial(train_step, "hsdp", "gemma3_images", "images"),
        "hsdp gpt_oss bounds": functools.partial(train_step, "hsdp", "gpt_oss", "bounds"),
        "hsdp gemma3 padded": functools.partial(train_step, "hsdp", "gemma3", "padded"),
        "hsdp llama heads": functools.partial(train_step, "hsdp", "llama", "heads"),
        "hsdp gpt_oss tree": functools.partial(train_step, "hsdp", "gpt_oss", "tree"),
        "ddp gpt_oss packed": functools.partial(train_step, "ddp", "gpt_oss", "packed"),
        "tensor llama heads": functools.partial(train_tensor_parallel, "llama_four_kv_heads", "heads"),
    },
}


def run_case(case: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    torch.manual_seed(0)
    try:
        return case()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}


def run_rank(rank: int, ranks: int, folder: Path, port: int, names: list[str], gpus: int) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
    }
    torch.set_num_threads(1)
    if gpus:
        torch.cuda.set_device(rank)
    timeout = datetime.timedelta(seconds=240 if gpus else 60)  # kernels are compiled
    dist.init_process_group("nccl" if gpus else "gloo", timeout=timeout)
    results: Results = {}
    for name, case in CASES[ranks].items():
        if names and name not in names:
            continue
        start = time.perf_counter()
        results[name] = run_case(functools.partial(case, folder=folder) if name.startswith(("tensor", "trl")) else case)
        results[name]["seconds"] = time.perf_counter() - start
        print(rank, name, results[name], flush=True)
        dist.barrier()
    (folder / f"results_{ranks}_{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def import_what_cases_need() -> None:
    """Forked processes have what is imported before."""
    from transformers import Trainer  # noqa: F401

    if HAS_TRL:
        from trl import DPOTrainer  # noqa: F401
    for name in MODELS:
        build_model(name)


def main(folder: Path, names: list[str], gpus: int) -> None:
    """Run the cases of each number of processes on the CPU, or those named on as many GPUs."""
    if not gpus:  # CUDA does not survive a fork
        import_what_cases_need()
        torch.compile(torch.neg, backend="eager")(torch.ones(1))  # imports the compiler
        gc.collect()
        gc.freeze()  # so that no process searches, and thereby copies, what all of them have
    context = multiprocessing.get_context("spawn" if gpus else "fork")
    for ranks in [gpus] if gpus else CASES:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        processes = [
            context.Process(target=run_rank, args=(rank, ranks, folder, port, names, gpus), daemon=True)
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise SystemExit(f"a process of {ranks} has failed")


if __name__ == "__main__":
    *others, number = sys.argv[1:]
    main(Path(others[0]), others[1:], gpus=int(number))
