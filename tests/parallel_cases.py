"""What `test_parallel.py` computes on several processes: run as a script, it starts them and writes what came out.

The truth is one process with eager attention: each document, each padded row and each path of a tree alone.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import itertools
import json
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.multiprocessing as multiprocessing
from parallel_answers import ANSWER_CASES, AnswerCase, build_model, make_examples, train_step
from parallel_answers import truth as truth_of_answers
from tiny_models import dynamic_rope, longrope
from torch import Tensor, nn
from transformers import masking_utils

WORLD = 4
IGNORED = -100


@dataclass(frozen=True)
class Case:
    """A training step on all ranks, of which every `ranks` share a sequence."""

    name: str
    model: str
    batch: str = "packed"
    mode: str = "ulysses"
    ranks: int = WORLD
    changes: dict[str, Any] = field(default_factory=dict)
    checkpointing: str | None = None
    dtype: str = "float32"
    engine: str | None = None
    nodes: int = 1
    counted: str | None = None
    """How labels are counted where gradients are accumulated over two batches; None for one batch."""


def _cases() -> Iterator[Case]:
    for mode in ("ulysses", "all_gather"):
        for ranks in (2, 4):
            for model in ("llama", "gpt_oss", "gemma3"):
                yield Case(f"{mode}-{ranks}-{model}-packed", model, mode=mode, ranks=ranks)
            yield Case(
                f"{mode}-{ranks}-one_kv_head", "llama", mode=mode, ranks=ranks, changes={"num_key_value_heads": 1}
            )
            yield Case(f"{mode}-{ranks}-left_padding", "llama", "left_padding", mode, ranks)
        yield Case(f"{mode}-six_heads_three_kv_heads", "llama", "packed", mode, 2, SIX_HEADS)
        yield Case(f"{mode}-softcap", "gemma2", mode=mode)
        yield Case(f"{mode}-chunks", "llama4", mode=mode)
        yield Case(f"{mode}-chunks_left_padding", "llama4", "left_padding", mode)
        yield Case(f"{mode}-window", "mistral", "right_padding", mode)
        yield Case(f"{mode}-narrow_values", "deepseek_v3", mode=mode)
        yield Case(f"{mode}-learned_positions", "gpt2", mode=mode)
        yield Case(f"{mode}-mask_alone", "llama", "mask_alone", mode)
        yield Case(f"{mode}-short", "gpt_oss", "short", mode)
        yield Case(f"{mode}-2-long", "gemma3", "long", mode, 2)
        yield Case(f"{mode}-encoder", "bert", "encoder", mode)
        yield Case(f"{mode}-cu_seq_lens", "llama", "cu_seq_lens", mode)
        yield Case(f"{mode}-cu_seq_lens_beside_positions", "gemma3", "cu_seq_lens_beside_positions", mode, 2)
        yield Case(f"{mode}-rows", "gpt_oss", "rows", mode)
        yield Case(f"{mode}-rows_with_bounds", "gemma3", "rows_with_bounds", mode, 2)
        for counted in ("by_group", "over_all_ranks"):
            yield Case(f"{mode}-accumulated_{counted}", "llama", "packed", mode, 2, counted=counted)
        for model in ("llama", "gpt_oss"):
            yield Case(f"{mode}-share_prefixes_{model}", model, "prefixes", mode)
        yield Case(f"{mode}-share_prefixes_left_padding", "llama", "prefixes_left", mode, 2)
        yield Case(f"{mode}-one_document", "llama", "one_document", mode)
        # Of 45 tokens only the last rank of Ulysses has some past 40.
        for rope, changes in (("longrope", longrope(40)), ("dynamic_rope", dynamic_rope(40))):
            yield Case(f"{mode}-{rope}", "llama", "one_document", mode, changes=changes)
        yield Case(f"{mode}-document_ids", "mistral", "document_ids", mode)
        yield Case(f"{mode}-bounds", "llama", "bounds", mode)
        yield Case(f"{mode}-bounds_of_heads", "llama", "bounds_of_heads", mode)
        yield Case(f"{mode}-bounds_of_layer_types", "gemma3", "bounds_of_layer_types", mode)
        yield Case(f"{mode}-image_bounds", "gemma3", "image_bounds", mode)
        yield Case(f"{mode}-image_blocks", "gemma3_images", "image_blocks", mode, 2)
        yield Case(f"{mode}-prefixes_see_themselves", "paligemma2", "image_blocks_left_padding", mode)
        for kind in ("four_planes", "three_planes"):
            yield Case(f"{mode}-{kind}", "qwen2_vl", kind, mode, 2)
        yield Case(f"{mode}-three_planes_left_padding", "qwen2_vl", "three_planes_left_padding", mode)
        for model in ("gemma3_images", "qwen2_vl", "qwen3_vl", "llava"):
            yield Case(f"{mode}-pixels_{model}", model, "pixels", mode, 2)
        for model in ("gemma3_images", "qwen2_vl"):
            yield Case(f"{mode}-pixels_left_padding_{model}", model, "pixels_left_padding", mode)
        for kind, model in (("reentrant", "gemma3_images"), ("not_reentrant", "qwen3_vl")):
            yield Case(f"{mode}-pixels_checkpointing_{kind}", model, "pixels", mode, checkpointing=kind)
        yield Case(f"{mode}-pixels_fsdp2", "qwen2_vl", "pixels", mode, 2, checkpointing="not_reentrant", engine="fsdp2")
        yield Case(f"{mode}-tree", "llama", "tree", mode)
        yield Case(f"{mode}-tree_in_windows", "gpt_oss", "tree", mode)
        yield Case(f"{mode}-tree_past_the_row", "mistral", "tree_past_the_row", mode, 2)
        yield Case(f"{mode}-bounds_in_windows", "mistral", "bounds_of_short_documents", mode)
        yield Case(f"{mode}-bounds_without_positions", "mistral", "bounds_of_one_document", mode, 2)
        for kind in ("reentrant", "not_reentrant"):
            yield Case(f"{mode}-checkpointing_{kind}", "gpt_oss", mode=mode, checkpointing=kind)
        yield Case(f"{mode}-bfloat16", "llama", mode=mode, dtype="bfloat16")
        for engine in ("ddp", "fsdp2"):
            yield Case(f"{mode}-{engine}", "gpt_oss", mode=mode, ranks=2, checkpointing="not_reentrant", engine=engine)
    # Only four ranks repeat key heads. Their number is the second one that the process compiles for.
    for mode, ranks in (("ulysses", 2), ("all_gather", 2), ("ulysses", 4)):
        one_layer = {"num_hidden_layers": 1}
        yield Case(f"{mode}-{ranks}-compiled", "mistral", "packed", mode, ranks, one_layer, engine="compiler")
    for kind, model in (
        ("packed", "gpt_oss"),
        ("left_padding", "llama"),
        ("bounds_of_heads", "llama"),
        ("tree", "gemma3"),
        ("short", "gpt_oss"),
        ("encoder", "bert"),
        ("pixels", "qwen3_vl"),
    ):
        yield Case(f"nodes-{kind}", model, kind, "auto", nodes=2)
    yield Case("nodes-one_kv_head", "llama", mode="auto", changes={"num_key_value_heads": 1}, nodes=2)
    yield Case("nodes-six_heads_three_kv_heads", "llama", mode="auto", changes=SIX_HEADS, nodes=2)
    yield Case("all_gather-heads_not_divided", "llama", "packed", "all_gather", 4, SIX_HEADS)
    yield Case("auto-heads_not_divided", "llama", "packed", "auto", 4, SIX_HEADS)
    yield Case("auto-one_kv_head", "llama", "packed", "auto", 4, {"num_key_value_heads": 1})


SIX_HEADS = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3}
CASES = list(_cases())


# Batches and their truth


class Example(NamedTuple):
    """A batch, and the sequences whose losses it holds, each with its labels: `[1, n]`.

    `calls` is what else the model is called with for each of them. Heads that see different keys need the row as it is,
    under a dense mask.
    """

    batch: dict[str, Any]
    sequences: list[tuple[Tensor, Tensor]]
    calls: list[dict[str, Any]] | None = None


def make_example(kind: str, config: Any) -> Example:
    import tiny_models

    from hf_flashmask import PackedDataCollator, bounds

    if kind in ("left_padding", "right_padding", "mask_alone"):
        documents = tiny_models.random_documents([21, 13, 29])
        batch = tiny_models.padded(documents, "right" if kind == "right_padding" else "left")
        # Padding on the left predicts the first token, which nothing predicts in a document alone.
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"].cumsum(1) <= 1, IGNORED)
        batch["labels"].masked_fill_(batch["attention_mask"] == 0, IGNORED)
        if kind == "mask_alone":  # the distances in the row are those in the document
            del batch["position_ids"]
        return Example(batch, [(document, document) for document in documents])
    if kind == "tree":
        return _tree()
    if kind == "tree_past_the_row":
        tree = _tree()
        tree.batch["attention_mask"][..., 35:] += 10  # 55 of 45 rows, as 45
        return tree
    if kind.startswith("image_blocks"):
        return _image_blocks(config, kind == "image_blocks")
    if kind.startswith("pixels"):
        return _pixels(config, kind == "pixels")
    if kind.startswith(("three_planes", "four_planes")):
        return _positions_in_planes(kind)
    if kind.startswith("prefixes"):
        prompt, *ends = tiny_models.random_documents([19, 7, 12, 5])
        documents = [torch.cat([prompt, end], dim=1) for end in ends] + tiny_models.random_documents([10])
        batch = tiny_models.padded(documents, "left" if kind == "prefixes_left" else "right")
        batch.pop("position_ids", None)
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"].cumsum(1) <= 1, IGNORED)
        batch["labels"].masked_fill_(batch["attention_mask"] == 0, IGNORED)
        return Example(batch, [(document, document) for document in documents])
    lengths = {
        "one_document": [45],
        "bounds_of_one_document": [45],
        "bounds_of_short_documents": [6] * 16 + [1],  # all-gather pads them by more tokens than each has
        "short": [2, 1],
        "long": [300, 40, 500, 7, 260],
    }.get(kind, [17, 3, 25, 1, 9, 6])
    documents = tiny_models.random_documents(lengths)
    if kind.startswith("rows"):
        bounds_for = config if kind == "rows_with_bounds" else None
        collator = PackedDataCollator(27, pad_to_multiple_of=3, bounds_for=bounds_for)
        batch = collator([{"input_ids": document[0]} for document in documents])
        assert len(batch["input_ids"]) > 1
        return Example(batch, [(document, document) for document in documents])
    batch = tiny_models.packed(documents)
    batch["labels"] = batch["input_ids"].masked_fill(batch["position_ids"] == 0, IGNORED)
    if kind == "one_document":
        del batch["position_ids"]
    elif kind == "document_ids":  # the distances in the row are those in the document
        batch["attention_mask"] = (batch.pop("position_ids") == 0).cumsum(1)
    elif kind == "encoder":
        del batch["labels"]
        batch["token_type_ids"] = torch.ones_like(batch["input_ids"])
        calls = [{"token_type_ids": torch.ones_like(document)} for document in documents]
        return Example(batch, [(document, document) for document in documents], calls)
    elif kind == "cu_seq_lens_beside_positions":  # which tell all documents apart but the third from the second
        ends = tiny_models.cumulative_lengths(documents)
        batch["position_ids"][:, ends[2] : ends[3]] += lengths[1]
        batch["cu_seq_lens_q"] = batch["cu_seq_lens_k"] = ends[[0, 2, -1]]
    elif kind == "cu_seq_lens":
        ends = tiny_models.cumulative_lengths(documents).repeat_interleave(2)  # documents without tokens among them
        batch["cu_seq_lens_q"] = batch["cu_seq_lens_k"] = ends
        batch["num_items_in_batch"] = int((batch["labels"] != IGNORED).sum())
        batch["max_length_q"] = batch["max_length_k"] = max(lengths)
    elif kind.startswith("bounds"):
        mask = bounds.from_position_ids(batch["position_ids"])
        windowed = bounds.intersect(mask, bounds.sliding_window(tiny_models.WINDOW, mask.shape[-1]))
        batch["attention_mask"] = mask
        if kind == "bounds_of_one_document":
            del batch["position_ids"]
        elif kind == "bounds_of_layer_types":
            batch["attention_mask"] = {"full_attention": mask, "sliding_attention": windowed}
        elif kind == "bounds_of_heads":
            batch["attention_mask"] = torch.cat([mask, windowed] * (config.num_attention_heads // 2), dim=1)
            return _under_dense_mask(batch)
    elif kind == "image_bounds":
        return _under_dense_mask(batch | {"attention_mask": _bounds_of_images(batch["position_ids"])})
    return Example(batch, [(document, document) for document in documents])


def _packed_or_padded(
    is_packed: bool, change: Callable[[Tensor], Tensor] = lambda document: document
) -> tuple[dict[str, Tensor], list[Tensor], Callable[[list[Tensor]], Tensor]]:
    """A batch with labels, its documents, and what lays out values `[..., 1, n]` of their tokens like the batch."""
    import tiny_models

    lengths = [17, 3, 25, 9] if is_packed else [21, 13, 29]
    documents = [change(document) for document in tiny_models.random_documents(lengths)]
    if is_packed:
        batch = tiny_models.packed(documents)
        batch["labels"] = batch["input_ids"].masked_fill(batch["position_ids"] == 0, IGNORED)
        return batch, documents, functools.partial(torch.cat, dim=-1)
    batch = tiny_models.padded(documents, "left")
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"].cumsum(1) <= 1, IGNORED)
    length = batch["input_ids"].shape[1]

    def lay_out(values: list[Tensor]) -> Tensor:
        return torch.cat([nn.functional.pad(part, (length - part.shape[-1], 0)) for part in values], dim=-2)

    return batch, documents, lay_out


def _positions_in_planes(kind: str) -> Example:
    """Positions of Qwen2-VL: time, height and width, and before them what counts tokens."""
    import tiny_vision

    batch, documents, lay_out = _packed_or_padded("padding" not in kind)
    planes = [tiny_vision.positions(document) for document in documents]
    text = [batch.pop("position_ids")[None]] if kind == "four_planes" else []
    batch["position_ids"] = torch.cat([*text, lay_out(planes)])
    return Example(batch, [(document, document) for document in documents], [{"position_ids": part} for part in planes])


def _image_blocks(config: Any, is_packed: bool) -> Example:
    """Blocks of tokens that see each other, which the model makes of token types."""
    import tiny_vision

    batch, documents, lay_out = _packed_or_padded(is_packed)
    types = [tiny_vision.token_types(config, document) for document in documents]
    batch["token_type_ids"] = lay_out(types)
    if not tiny_vision.takes_shifted_labels(config):
        del batch["labels"]
    calls = [{"token_type_ids": part} for part in types]
    return Example(batch, [(document, document) for document in documents], calls)


def _pixels(config: Any, is_packed: bool) -> Example:
    """Images among the tokens, which have no labels there. Qwen's positions of padded rows are left to the model."""
    import tiny_vision

    change = functools.partial(tiny_vision.with_image_tokens, config)
    batch, documents, lay_out = _packed_or_padded(is_packed, change)
    calls = [tiny_vision.with_image(config, document) for document in documents]
    for name in calls[0]:
        parts = [call[name] for call in calls if name in call]
        batch[name] = lay_out(parts) if name.endswith("token_type_ids") else torch.cat(parts)
    if "image_grid_thw" in batch:
        batch.pop("position_ids")
        if is_packed:
            batch["position_ids"] = lay_out([tiny_vision.positions(document) for document in documents])
    batch["labels"].masked_fill_(batch["input_ids"] == tiny_vision.IMAGE_TOKEN, IGNORED)
    if not tiny_vision.takes_shifted_labels(config):
        del batch["labels"]
    labels = [document.masked_fill(document == tiny_vision.IMAGE_TOKEN, IGNORED) for document in documents]
    return Example(batch, list(zip(documents, labels)), calls)


def _bounds_of_images(position_ids: Tensor) -> dict[str, Tensor]:
    """Two images whose tokens see each other, each in a document of 17 or 25 tokens: the ranks cut through them."""
    import tiny_models

    from hf_flashmask import bounds

    blocks = torch.full_like(position_ids, -1)
    blocks[0, 3:16], blocks[0, 22:41] = 0, 1
    own = bounds.from_position_ids(position_ids, is_causal=False)
    return {
        "full_attention": bounds.intersect(bounds.causal_with_blocks(blocks), own),
        "sliding_attention": bounds.intersect(bounds.causal_with_blocks(blocks, window=tiny_models.WINDOW), own),
    }


def _under_dense_mask(batch: dict[str, Any]) -> Example:
    """The row as it is, for masks that documents alone do not have."""
    from hf_flashmask import bounds

    def dense(mask: Tensor) -> Tensor:
        visible = bounds.to_dense(mask)
        return torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)

    given = batch["attention_mask"]
    mask = {kind: dense(part) for kind, part in given.items()} if isinstance(given, dict) else dense(given)
    whole = {"attention_mask": mask, "position_ids": batch["position_ids"]}
    return Example(batch, [(batch["input_ids"], batch["labels"])], [whole])


def _tree() -> Example:
    """A shared prompt with three answers, and a document. Only answers have labels."""
    import tiny_models

    from hf_flashmask import bounds

    prompt, *answers = tiny_models.random_documents([11, 7, 12, 5])
    document = tiny_models.random_documents([10])[0]
    parts = [prompt, *answers, document]
    ends = [35] * 11
    start, positions, labels = 11, [torch.arange(11)], [torch.full((1, 11), IGNORED)]
    for answer in answers:
        length = answer.shape[1]
        ends += [start + length] * length
        positions.append(torch.arange(11, 11 + length))
        labels.append(answer.clone())
        labels[-1][:, 0] = IGNORED  # the token before it in the row is another branch's
        start += length
    ends += [45] * 10
    positions.append(torch.arange(10))
    labels.append(document.clone())
    labels[-1][:, 0] = IGNORED
    batch = {
        "input_ids": torch.cat(parts, dim=1),
        "labels": torch.cat(labels, dim=1),
        "position_ids": torch.cat(positions)[None],
        "attention_mask": torch.tensor(ends, dtype=torch.int32)[None, None, None],
    }
    assert bounds.to_dense(batch["attention_mask"]).shape[-1] == 45
    sequences = [(document, document)]
    for answer, own in zip(answers, labels[1:]):
        sequences.append((torch.cat([prompt, answer], 1), torch.cat([labels[0], own], 1)))
    return Example(batch, sequences)


def truth(model: nn.Module, examples: list[Example]) -> tuple[Tensor, list[Tensor]]:
    """The loss over all labels of all examples, and its gradients."""
    total, count = torch.zeros(()), 0
    for example in examples:
        for (tokens, labels), call in zip(example.sequences, example.calls or itertools.repeat({})):
            if "labels" not in example.batch:
                total = total + loss_of_encoder(model(tokens, **call).logits)
                count += tokens.numel()
                continue
            logits = model(tokens, **call).logits[0, :-1].float()
            total = total + nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum", ignore_index=IGNORED)
            count += int((labels[0, 1:] != IGNORED).sum())
    loss = total / count
    loss.backward()
    return loss.detach(), _gradients(model)


def build(name: str, **changes: Any) -> Any:
    import tiny_models
    import tiny_vision

    return tiny_vision.build(name) if name in tiny_vision.MODELS else tiny_models.build(name, **changes)


def loss_of_encoder(logits: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).square().mean(-1).sum()


def _gradients(model: nn.Module) -> list[Tensor]:
    gradients = [torch.zeros_like(part) if part.grad is None else part.grad for part in model.parameters()]
    found = [part.full_tensor() if hasattr(part, "full_tensor") else part for part in gradients]
    model.zero_grad()
    return [part.float() for part in found]


# On each rank


def meshes(case: Case | AnswerCase) -> tuple[Any, Any]:
    """All ranks, and those that share a sequence."""
    mesh = mesh_of(world_size() // case.ranks, case.nodes, case.ranks // case.nodes)
    return mesh, mesh["sp"] if case.nodes == 1 else mesh["nodes", "sp"]


@functools.cache
def mesh_of(*shape: int) -> Any:
    """Cases share it: the groups of a mesh take longer to connect than a case takes to train."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device_of_rank().type, shape, mesh_dim_names=("dp", "nodes", "sp")[-len(shape) :])


def run_answer_case(case: AnswerCase) -> dict[str, Any]:
    import tiny_models
    import torch.distributed as dist

    import hf_flashmask

    mesh, sequence = meshes(case)
    model = build_model(case)
    torch.manual_seed(7)
    batches = [make_examples(case) for _ in range(world_size() // case.ranks)]
    expected: tuple[Tensor, list[Tensor]] | None = None
    if dist.get_rank() == 0:
        twin = tiny_models.eager_twin(model)
        loss = truth_of_answers(twin, batches, case)
        loss.backward()
        expected = loss.detach(), _gradients(twin)
    collator = hf_flashmask.SharedPromptDataCollator(max_length=case.max_length)
    called = with_engine(case.engine, model)
    with hf_flashmask.sequence_parallel(called, sequence, mode=case.mode) as parallel:
        loss = train_step(model, called, parallel, collator(batches[mesh["dp"].get_local_rank()]), case)
        loss.backward()
    return differences(loss, model, case, expected)


def run_case(case: Case) -> dict[str, Any]:
    import tiny_models
    import torch.distributed as dist

    import hf_flashmask

    mesh, sequence = meshes(case)
    torch.manual_seed(0)
    model = build(case.model, **case.changes).to(getattr(torch, case.dtype))
    torch.manual_seed(7)
    batches = 2 if case.counted else 1  # of each group
    examples = [make_example(case.batch, model.config) for _ in range(batches * world_size() // case.ranks)]
    expected: tuple[Tensor, list[Tensor]] | None = None
    if dist.get_rank() == 0:
        expected = truth(tiny_models.eager_twin(model), examples)
    model.to(device_of_rank())
    if case.checkpointing:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": case.checkpointing == "reentrant"})
    called = with_engine(case.engine, model)
    sharing = hf_flashmask.share_prefixes(model) if case.batch.startswith("prefixes") else None
    data_mesh = mesh["dp"] if case.ranks < world_size() else None
    with hf_flashmask.sequence_parallel(called, sequence, mode=case.mode, data_mesh=data_mesh) as parallel:
        group = mesh["dp"].get_local_rank()
        own = [example.batch for example in examples[group * batches : (group + 1) * batches]]
        num_items = count_labels(parallel, own, case.counted)
        loss = torch.zeros((), device=device_of_rank())
        for batch in own[1:]:
            earlier = called(**parallel.shard(batch, num_items=num_items)).loss
            earlier.backward()
            loss += earlier.detach()
        part = parallel.shard(own[0], num_items=num_items)
        # FSDP2 rounds tensors to the dtype of the weights, images as in one process.
        floating = {name for name, value in part.items() if isinstance(value, Tensor) and value.is_floating_point()}
        assert floating <= {"pixel_values"}
        with count_masks() as masks:
            output = called(**part)
        if "labels" in part:
            last = output.loss
        else:
            tokens = sum(int(example.batch["input_ids"].count_nonzero()) for example in examples)
            own = part["input_ids"]
            if "pixel_values" in part:
                own = own[:, part["attention_mask"].exchange.rows]
            last = loss_of_encoder(output.logits[own != 0]) * world_size() / tokens
        last.backward()
        loss = loss + last.detach()
        if "labels" in part and not case.engine:
            with torch.no_grad():
                assert torch.allclose(called(**part).loss, last, rtol=1e-2 if case.dtype == "bfloat16" else 1e-5)
    result = {"mode": parallel.mode, "reason": parallel.reason, "masks": len(masks)}
    if sharing is not None:
        sharing.remove()
        result["shared"] = [sharing.computed_tokens, sharing.given_tokens]
    result["layer_types"] = len(set(getattr(model.config.get_text_config(), "layer_types", None) or [None]))
    return result | differences(loss, model, case, expected)


def count_labels(parallel: Any, batches: list[dict[str, Any]], counted: str | None) -> Any:
    """The labels of all groups, each counted once."""
    import torch.distributed as dist

    if counted != "over_all_ranks":
        return parallel.count_labels(*batches) if counted else None
    # As Trainer counts them with `average_tokens_across_devices`: once for each rank.
    count = torch.stack([(batch["labels"] != IGNORED).sum() for batch in batches]).sum()
    dist.all_reduce(count)
    return count / parallel.size


def differences(
    loss: Tensor, model: nn.Module, case: Case | AnswerCase, expected: tuple[Tensor, list[Tensor]] | None
) -> dict[str, Any]:
    """Of the averages over all ranks from the truth, on rank 0."""
    import torch.distributed as dist

    found = [loss.detach().float(), *_gradients(model)]
    added = 1 if case.engine in ("ddp", "fsdp2") else len(found)  # engines have averaged the gradients
    sums = nn.utils.parameters_to_vector(found[:added])
    dist.all_reduce(sums)
    nn.utils.vector_to_parameters(sums / world_size(), found[:added])
    found = [tensor.cpu() for tensor in found]
    if expected is None:
        return {}
    difference = sum((a - b).square().sum() for a, b in zip(found[1:], expected[1])).sqrt()
    return {
        "loss": [float(found[0]), float(expected[0])],
        "gradients": float(difference / sum(b.square().sum() for b in expected[1]).sqrt()),
        "worst": max(float((a - b).norm() / (b.norm() + 1e-2)) for a, b in zip(found[1:], expected[1])),
    }


def world_size() -> int:
    import torch.distributed as dist

    return dist.get_world_size()


def device_of_rank() -> torch.device:
    import torch.distributed as dist

    return torch.device("cuda", dist.get_rank()) if dist.get_backend() == "nccl" else torch.device("cpu")


def with_engine(engine: str | None, model: nn.Module) -> nn.Module:
    import torch.distributed as dist

    if engine == "compiler":  # all ranks trace the same code, for seconds: the first and the last one are enough
        backend = "inductor" if device_of_rank().type == "cuda" else "eager"
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        return compiled if dist.get_rank() in (0, world_size() - 1) else model
    if engine == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if engine == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        everyone = mesh_of(world_size())
        for layer in model.get_decoder().layers:
            fully_shard(layer, mesh=everyone)
        fully_shard(model, mesh=everyone)
    return model


@contextlib.contextmanager
def count_masks() -> Iterator[list[Any]]:
    """The bounds that are made of mask functions."""
    from hf_flashmask.integration import mask_function

    made: list[Any] = []
    original = mask_function.from_mask_function

    def count(*args: Any, **kwargs: Any) -> Tensor:
        made.append(original(*args, **kwargs))
        return made[-1]

    mask_function.from_mask_function = count
    try:
        yield made
    finally:
        mask_function.from_mask_function = original


FAULTS: dict[str, tuple[Callable[..., Any], str]] = {}
"""Name -> what goes wrong on the ranks of one group, and what the error of each rank says."""


def fault(message: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def keep(function: Callable[..., Any]) -> Callable[..., Any]:
        if message != "looks tokens up" or hasattr(masking_utils, "blockwise_overlay"):  # since Transformers 5.9
            FAULTS[function.__name__] = function, message
        return function

    return keep


def _packed() -> dict[str, Any]:
    torch.manual_seed(3)
    return make_example("packed", None).batch


@fault("were given different batches")
def unequal_lengths(parallel: Any, model: nn.Module, rank: int) -> None:
    batch = _packed()
    parallel.shard({name: tensor[:, : 61 - rank] for name, tensor in batch.items()})


@fault("were given different batches")
def mask_on_one_rank(parallel: Any, model: nn.Module, rank: int) -> None:
    batch = _packed()
    if rank == 1:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    parallel.shard(batch)


@fault("with different contents")
def different_contents(parallel: Any, model: nn.Module, rank: int) -> None:
    batch = _packed()
    batch["input_ids"] = batch["input_ids"].roll(rank, 1)
    parallel.shard(batch)


@fault("refused the batch|is not known to sequence_parallel")
def refused_on_one_rank(parallel: Any, model: nn.Module, rank: int) -> None:
    batch = _packed()
    if rank == 0:
        batch["pixel_values"] = torch.zeros(1, 3, 2, 2)
    parallel.shard(batch)


@fault("was not given the mask of the whole sequence")
def batch_not_cut(parallel: Any, model: nn.Module, rank: int) -> None:
    model(**_packed())


@fault("call the model with all that")
def tokens_not_cut(parallel: Any, model: nn.Module, rank: int) -> None:
    batch = _packed()
    model(**{**parallel.shard(batch), "input_ids": batch["input_ids"], "position_ids": batch["position_ids"]})


@fault("must be a tensor|refused the batch")
def no_tensor_on_one_rank(parallel: Any, model: nn.Module, rank: int) -> None:
    parallel.shard({**_packed(), "position_ids": [1, 2]} if rank else _packed())


@fault("for these tokens and this model")
def positions_of_several_dimensions(parallel: Any, model: nn.Module, rank: int) -> None:
    batch = _packed()
    parallel.shard({**batch, "position_ids": batch["position_ids"].expand(3, -1, -1)})


@fault("must be a mapping|refused the batch")
def no_batch_on_one_rank(parallel: Any, model: nn.Module, rank: int) -> None:
    parallel.shard(None if rank == 3 else _packed())


@fault("give one of them")
def two_numbers_of_labels(parallel: Any, model: nn.Module, rank: int) -> None:
    parallel.shard({**_packed(), "num_items_in_batch": 3}, num_items=5)


@fault("Remove share_prefixes for losses of your own")
def shared_prefixes_without_labels(parallel: Any, model: nn.Module, rank: int) -> None:
    import hf_flashmask

    batch = make_example("prefixes", None).batch
    with hf_flashmask.share_prefixes(model):
        parallel.shard({name: value for name, value in batch.items() if name != "labels"})


@fault("set the label of the first token of each row to -100")
def labels_at_padding(parallel: Any, model: nn.Module, rank: int) -> None:
    import hf_flashmask

    batch = make_example("prefixes_left", None).batch
    batch["labels"] = batch["input_ids"]
    with hf_flashmask.share_prefixes(model):
        parallel.shard(batch)


@fault("pass `data_mesh`")
def labels_of_unknown_groups(parallel: Any, model: nn.Module, rank: int) -> None:
    import torch.distributed as dist

    import hf_flashmask

    parallel.remove()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    with hf_flashmask.sequence_parallel(model, pairs[rank // 2]) as of_pair:
        of_pair.shard(_packed(), num_items=5)


@fault("`data_mesh` and `mesh` both hold the ranks")
def data_of_the_same_ranks(parallel: Any, model: nn.Module, rank: int) -> None:
    import hf_flashmask

    parallel.remove()
    group = parallel._groups[0].handle
    hf_flashmask.sequence_parallel(model, group, data_mesh=group)


@fault("looks tokens up")
def image_blocks(parallel: Any, model: nn.Module, rank: int) -> None:
    from transformers.masking_utils import create_causal_mask

    part = parallel.shard(_packed())
    create_causal_mask(
        config=model.config,
        inputs_embeds=torch.zeros(*part["input_ids"].shape, 32),
        attention_mask=part["attention_mask"],
        block_sequence_ids=torch.zeros_like(part["input_ids"]),
        **{"past_key_values": None},
    )


@fault("already")
def twice(parallel: Any, model: nn.Module, rank: int) -> None:
    import hf_flashmask

    hf_flashmask.sequence_parallel(model, parallel._groups[0].handle)


def error_of(call: Callable[[], object]) -> Exception:
    """What `call` raises, to be raised outside of a ring: an error inside leaves torch 2.9 to 2.11 in its state."""
    try:
        call()
    except Exception as error:
        return error
    return AssertionError("no error")


@fault("torch's `context_parallel`")
def ring(parallel: Any, model: nn.Module, rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel

    parallel.remove()
    buffer = torch.zeros(1, 8 * WORLD)
    with context_parallel(init_device_mesh("cpu", (WORLD,)), buffers=[buffer], buffer_seq_dims=[1]):
        refusal = error_of(lambda: model(**_packed()))
    raise refusal


@fault("after `remove")
def after_remove(parallel: Any, model: nn.Module, rank: int) -> None:
    expected = [copy.deepcopy(model)(**_packed()).loss, pickle.loads(pickle.dumps(model))(**_packed()).loss]
    parallel.remove()
    loss = model(**_packed()).loss
    assert loss == expected[0] == expected[1]
    parallel.shard(_packed())


def run_fault(name: str) -> dict[str, Any]:
    """What the ranks of a group of all processes raise."""
    import tiny_models
    import torch.distributed as dist

    import hf_flashmask

    model = tiny_models.build("llama")
    error = "none"
    with hf_flashmask.sequence_parallel(model, dist.group.WORLD) as parallel:
        try:
            FAULTS[name][0](parallel, model, dist.get_rank())
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
    errors: list[Any] = [None] * WORLD
    dist.all_gather_object(errors, error)
    return {"errors": errors}


LOST = {"raises": (8, ""), "absent": (8, "does not call `shard`"), "dies": (120, "")}
"""How a rank is lost -> the seconds after which the one that waits for it gives up, and what its error says."""


def run_lost_ranks() -> dict[str, Any]:
    """Of each pair the second rank is lost. This comes last: groups and processes do not survive it."""
    import datetime

    import torch.distributed as dist

    rank, found = dist.get_rank(), {}
    pairs = {"raises": [0, 1], "absent": [2, 3], "dies": [2, 3]}
    groups = {
        way: dist.new_group(pairs[way], timeout=datetime.timedelta(seconds=timeout))
        for way, (timeout, _) in LOST.items()
    }
    for way in LOST:
        if rank in pairs[way]:
            start = time.monotonic()
            found[way] = {"error": lose_second_rank(way, groups[way], rank), "seconds": time.monotonic() - start}
    return found


def lose_second_rank(way: str, group: Any, rank: int) -> str:
    """The error of this rank, in the forward pass of whose second layer the other one is lost."""
    import tiny_models

    import hf_flashmask

    def lose(*_: Any) -> None:
        if way == "dies":
            os._exit(0)
        raise RuntimeError("this rank raises")

    model = tiny_models.build("llama")
    if rank % 2:
        model.model.layers[1].register_forward_pre_hook(lose)
    with hf_flashmask.sequence_parallel(model, group) as parallel:
        try:
            if way != "absent" or rank % 2 == 0:
                model(**parallel.shard(_packed())).loss.backward()
        except RuntimeError as error:
            return str(error)
    return "none"


def run_rank(rank: int, folder: Path, names: list[str], gpus: int) -> None:
    import datetime

    import torch.distributed as dist

    torch.set_num_threads(1)
    if gpus:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if gpus else "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=gpus or WORLD,
        timeout=datetime.timedelta(seconds=240),
    )
    results: dict[str, Any] = {}
    runs: dict[str, Callable[[], dict[str, Any]]] = {case.name: lambda case=case: run_case(case) for case in CASES}
    runs |= {case.name: lambda case=case: run_answer_case(case) for case in ANSWER_CASES}
    runs |= {name: lambda name=name: run_fault(name) for name in FAULTS}
    for name in [name for name in names if name != "lost"] or ([] if names else runs):
        results[name] = runs[name]()
    (folder / f"{rank}.json").write_text(json.dumps(results))
    if not names or "lost" in names:
        results["lost"] = run_lost_ranks()
        (folder / f"{rank}.json").write_text(json.dumps(results))
        os._exit(0)  # the groups of lost ranks cannot be closed
    dist.destroy_process_group()


def main(folder: Path, names: list[str], gpus: int) -> None:
    """All cases, or those named, on the CPU or on as many GPUs. The first process that fails ends the others."""

    import hf_flashmask.training  # noqa: F401

    for model in {case.model for case in (*CASES, *ANSWER_CASES)}:
        build(model)  # forked processes have what is imported before; CUDA does not survive a fork
    torch.compile(torch.neg, backend="eager")(torch.ones(1))  # imports the compiler
    gc.collect()
    gc.freeze()  # so that no process searches, and thereby copies, what all of them have
    start_method = "spawn" if gpus else "fork"
    multiprocessing.start_processes(run_rank, (folder, names, gpus), nprocs=gpus or WORLD, start_method=start_method)


if __name__ == "__main__":
    *others, number = sys.argv[1:]
    main(Path(others[0]), others[1:], gpus=int(number))
