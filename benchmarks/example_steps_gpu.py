"""A training step of examples/block_diffusion.py and examples/draft_model.py at the sizes of projects, on one GPU.

    python benchmarks/example_steps_gpu.py            # two or three minutes
    python benchmarks/example_steps_gpu.py --smoke    # tiny models, on any device: checked, not timed, not recorded

Losses, noise and anchors are those of the examples. A step draws noise or anchors, makes its mask anew, and computes
forward, backward and AdamW, in bfloat16 from random weights. Each batch is another packed row. What differs is the
mask and Transformers' attention under it:

* `flashmask`: bounds;
* `flex_attention`: `create_block_mask` under `torch.compile`, with the predicate that its users write (families.py);
* `sdpa`: the dense mask of the examples, where it fits in memory;
* `no attention`, a lower limit: everything around attention, with all projections and their gradients.

A draft model gets random hidden states in place of a target's, made once for each batch: projects store them, or
compute them in a pass that costs the same under each mask.

Before anything is timed, loss, hidden states and a gradient of a step are compared with SDPA under the dense mask, a
few rows at a time. `mask_milliseconds` is the time to make a mask, of host and device together; with flashmask it
includes the kernels' schedules. Tokens per second are those of the rows, each of which block diffusion holds twice.
"""

from __future__ import annotations

import argparse
import functools
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from families import sees_anchored_blocks, sees_block_diffusion
from masks import random_row
from measurement import RESULTS, Deadline, Run, build_schedules, require_gpu, time_on_cpu
from peers import LONGEST_DENSE_MASK
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.functional import scaled_dot_product_attention
from training_gpu import (
    FLOOR,
    IMPLEMENTATIONS,
    SHAPES,
    VOCABULARY,
    FirstStep,
    Trainee,
    free_memory,
    time_steps,
)
from transformers import AttentionInterface

from hf_flashmask import bounds

# The examples are scripts and no package: Python looks for what they import beside them.
sys.path.append(str(Path(__file__).parents[1] / "examples"))

import block_diffusion
import draft_model
from _packed_text import DEVICE, Rows, pack

WARM_UP, STEPS = 2, 6  # after two more that are checked
MASK_ID = VOCABULARY - 1
TARGET_LAYERS = 5  # whose hidden states a draft model sees, as in DFlash
PEERS = ("flashmask", "flex_attention", "sdpa", FLOOR)
TRUTH = "sdpa_in_pieces"
ROWS_OF_A_PIECE = 4096
KEY = ("workload", "implementation")


class Workload(NamedTuple):
    """What is trained.

    Attributes:
        shape: of the layers.
        length: tokens of a row.
        documents: of a row.
        block_size: tokens.
        anchors: of a row, of a draft model; 0 for block diffusion.
        is_checkpointed: whether layers are computed again in the backward pass.
    """

    shape: dict[str, Any]
    length: int
    documents: int
    block_size: int
    anchors: int = 0
    is_checkpointed: bool = False

    @property
    def q_len(self) -> int:
        return self.anchors * self.block_size if self.anchors else 2 * self.length

    @property
    def kv_len(self) -> int:
        return self.length + self.q_len if self.anchors else self.q_len


WORKLOADS = {
    "block diffusion, 2 x 4,096, block 32": Workload(SHAPES["1b"], 4096, 1, 32),  # dFactory, dllm
    "block diffusion, 2 x 32,768 packed, block 4": Workload(SHAPES["1b"], 32768, 16, 4, is_checkpointed=True),  # SDAR
    # DFlash's five layers, at the shape of families.py.
    "anchored blocks, 24,576 x 28,672": Workload(SHAPES["8b"] | {"num_hidden_layers": 5}, 4096, 4, 8, anchors=3072),
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
SMOKE_WORKLOADS = {
    "block diffusion": Workload(TINY, 192, 3, 4, is_checkpointed=True),
    "anchored blocks": Workload(TINY, 192, 3, 8, anchors=24),
}


class Batch(NamedTuple):
    """One packed row.

    Attributes:
        seed: of the noise or the anchors.
        features: of a draft model's target, `[1, length, target layers x hidden size]`.
    """

    rows: Rows
    seed: int
    features: Tensor | None = None

    @property
    def tokens(self) -> int:
        return self.rows.input_ids.numel()


def sdpa_in_pieces(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **kwargs: Any
) -> tuple[Tensor, None]:
    """SDPA under a dense mask `[1, 1, S_q, S_k]`, whose kernels cannot address 65,536 x 65,536 pairs at once."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    pieces = [
        scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=kwargs["scaling"])
        for rows, mask in zip(query.split(ROWS_OF_A_PIECE, dim=2), attention_mask.split(ROWS_OF_A_PIECE, dim=2))
    ]
    return torch.cat(pieces, dim=2).transpose(1, 2), None


AttentionInterface.register(TRUTH, sdpa_in_pieces)
make_block_mask = torch.compile(create_block_mask)


class Example(ABC):
    """A model with its optimizer and the step of an example, whose attention and mask can be exchanged.

    Attributes:
        last_norm: the module that computes the last hidden states.
        first_keys: the weights of a projection whose gradient is compared.
    """

    def __init__(self, workload: Workload, model: nn.Module, last_norm: nn.Module, first_keys: nn.Parameter) -> None:
        self.workload, self.model, self.last_norm, self.first_keys = workload, model, last_norm, first_keys
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=DEVICE.type == "cuda")

    @abstractmethod
    def use(self, attention: str) -> None:
        """Let the layers attend by this function of Transformers."""

    @abstractmethod
    def draw(self, batch: Batch) -> Tensor | None:
        """What a step draws before it makes its mask."""

    @abstractmethod
    def masks(self, batch: Batch, drawn: Tensor | None) -> dict[str, Callable[[], Any]]:
        """By implementation, what makes the mask."""

    @abstractmethod
    def loss(self, batch: Batch, drawn: Tensor | None, mask: Any) -> Tensor:
        """As the example computes it."""

    def batch(self, seed: int) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(MASK_ID, (self.workload.length,), generator=generator)
        lengths = random_row(self.workload.length, self.workload.documents, seed).lengths
        return Batch(pack([document.tolist() for document in ids.split(lengths)], self.workload.length)[:], seed)

    def make_mask(self, implementation: str, batch: Batch, drawn: Tensor | None) -> Any:
        return None if implementation == FLOOR else self.masks(batch, drawn)[implementation]()

    def gradients(self, implementation: str, batch: Batch) -> Tensor:
        """Adds the gradients to those of the parameters; returns the loss."""
        drawn = self.draw(batch)
        loss = self.loss(batch, drawn, self.make_mask(implementation, batch, drawn))
        loss.backward()
        return loss.detach()

    def step(self, implementation: str, batch: Batch) -> None:
        self.gradients(implementation, batch)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def first_step(self, implementation: str, batch: Batch) -> FirstStep:
        """Results of a batch, without a change of the weights."""
        self.use(IMPLEMENTATIONS.get(implementation, implementation))
        hidden: list[Tensor] = []
        hook = self.last_norm.register_forward_hook(lambda _, __, output: hidden.append(output.detach()))
        try:
            loss = float(self.gradients(implementation, batch))
            assert self.first_keys.grad is not None
            return FirstStep(loss, hidden[0][0], self.first_keys.grad.clone())
        finally:
            hook.remove()
            self.optimizer.zero_grad(set_to_none=True)

    def mask_milliseconds(self, implementation: str, batch: Batch) -> float:
        drawn, shape = self.draw(batch), self.workload.shape
        row = torch.empty(shape["head_dim"], dtype=torch.bfloat16, device=DEVICE)
        query = row.expand(1, shape["num_attention_heads"], self.workload.q_len, -1)
        value = row.expand(1, shape["num_key_value_heads"], self.workload.kv_len, -1)

        def make() -> None:
            mask = self.make_mask(implementation, batch, drawn)
            if implementation == "flashmask":
                build_schedules(mask, query, value)

        return time_on_cpu(make)["milliseconds"]

    def block_mask(self, mask_mod: Callable[..., Tensor]) -> BlockMask:
        return make_block_mask(mask_mod, None, None, self.workload.q_len, self.workload.kv_len, device=DEVICE.type)


class BlockDiffusion(Example):
    """Of examples/block_diffusion.py."""

    def __init__(self, workload: Workload, dtype: torch.dtype) -> None:
        llama = Trainee(workload.shape, VOCABULARY, DEVICE.type, dtype).model
        if not workload.is_checkpointed:
            llama.gradient_checkpointing_disable()
        super().__init__(workload, llama, llama.model.norm, llama.model.layers[0].self_attn.k_proj.weight)
        self.llama = llama

    def use(self, attention: str) -> None:
        self.llama.set_attn_implementation(attention)

    def draw(self, batch: Batch) -> None:
        """The loss draws its noise itself: the mask does not depend on it."""

    def masks(self, batch: Batch, drawn: Tensor | None) -> dict[str, Callable[[], Any]]:
        rows, size = batch.rows, self.workload.block_size

        def block_mask() -> BlockMask:
            return self.block_mask(
                sees_block_diffusion(rows.document_ids[0].int(), (rows.position_ids[0] // size).int())
            )

        def dense() -> Tensor:
            return block_diffusion.dense_mask(rows, size)

        return {
            "flashmask": lambda: bounds.block_diffusion(size, document_ids=rows.document_ids),
            "flex_attention": block_mask,
            "sdpa": dense,
            TRUTH: dense,
        }

    def loss(self, batch: Batch, drawn: Tensor | None, mask: Any) -> Tensor:
        generator = torch.Generator().manual_seed(batch.seed)
        size = self.workload.block_size
        return block_diffusion.diffusion_loss(self.llama, mask, batch.rows, size, MASK_ID, generator)


class AnchoredBlocks(Example):
    """Of examples/draft_model.py, with features that are given."""

    def __init__(self, workload: Workload, dtype: torch.dtype) -> None:
        shape = workload.shape | {"num_hidden_layers": TARGET_LAYERS}
        target = Trainee(shape, VOCABULARY, DEVICE.type, dtype).model.requires_grad_(False)
        with torch.device(DEVICE):
            drafter = draft_model.Drafter(target, workload.shape["num_hidden_layers"], "sdpa")
        for part in (drafter.fuse, drafter.fused_norm, drafter.layers, drafter.norm):
            part.to(dtype)  # the others are the target's, whose rotary frequencies stay in float32
        super().__init__(workload, drafter, drafter.norm, drafter.get_parameter("layers.0.self_attn.k_proj.weight"))
        self.drafter, self.dtype = drafter, dtype

    def use(self, attention: str) -> None:
        for module in self.drafter.modules():
            if isinstance(module, draft_model.DraftAttention):
                module.config._attn_implementation = attention

    def batch(self, seed: int) -> Batch:
        generator = torch.Generator(DEVICE).manual_seed(seed)
        size = 1, self.workload.length, self.drafter.fuse.in_features
        features = torch.randn(size, generator=generator, device=DEVICE, dtype=self.dtype)
        return super().batch(seed)._replace(features=features)

    def draw(self, batch: Batch) -> Tensor:
        return draft_model.draw_anchors(self.workload.anchors, batch.rows, torch.Generator().manual_seed(batch.seed))

    def masks(self, batch: Batch, drawn: Tensor | None) -> dict[str, Callable[[], Any]]:
        assert drawn is not None
        rows, size, anchors = batch.rows, self.workload.block_size, drawn

        def of_bounds() -> Tensor:
            return bounds.anchored_blocks(anchors, size, self.workload.length, document_ids=rows.document_ids)

        def block_mask() -> BlockMask:
            return self.block_mask(sees_anchored_blocks(rows.document_ids[0].int(), anchors[0].int(), size))

        def dense() -> Tensor:
            return draft_model.dense_mask(rows, anchors, size)

        return {"flashmask": of_bounds, "flex_attention": block_mask, "sdpa": dense, TRUTH: dense}

    def loss(self, batch: Batch, drawn: Tensor | None, mask: Any) -> Tensor:
        assert drawn is not None
        assert batch.features is not None
        size = self.workload.block_size
        return draft_model.draft_loss(self.drafter, batch.features, batch.rows, drawn, mask, size, MASK_ID)


def example_of(workload: Workload, dtype: torch.dtype) -> Example:
    return (AnchoredBlocks if workload.anchors else BlockDiffusion)(workload, dtype)


def peers_of(workload: Workload, peers: list[str]) -> list[str]:
    """Those whose mask fits in memory."""
    return [peer for peer in peers if peer != "sdpa" or workload.kv_len <= LONGEST_DENSE_MASK]


def truth_of(example: Example, batches: list[Batch]) -> Callable[[], FirstStep]:
    """The first batch under the dense mask, computed once when it is asked for."""
    return functools.cache(functools.partial(example.first_step, TRUTH, batches[0]))


def check(example: Example, peer: str, batches: list[Batch], truth: Callable[[], FirstStep]) -> dict[str, Any]:
    """Errors of the first batch, after one of the second: what is compiled for one mask must take another as well."""
    expected = truth()
    example.first_step(peer, batches[1])
    return {"relative_error": example.first_step(peer, batches[0]).check(expected)}


def time_peer(example: Example, peer: str, batches: list[Batch]) -> dict[str, Any]:
    example.use(IMPLEMENTATIONS[peer])
    times = time_steps(lambda batch: example.step(peer, batch), batches, lambda batch: batch.tokens, WARM_UP)
    return times if peer == FLOOR else times | {"mask_milliseconds": example.mask_milliseconds(peer, batches[-1])}


def smoke(peers: list[str]) -> None:
    """Check all that can be checked on this device: FlexAttention has no gradients on a CPU."""
    print("checking on", DEVICE.type, flush=True)
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    for name, workload in SMOKE_WORKLOADS.items():
        torch._dynamo.reset()
        example = example_of(workload, dtype)
        batches = [example.batch(seed) for seed in range(2)]
        truth = truth_of(example, batches)
        for peer in peers:
            if peer != FLOOR and (peer != "flex_attention" or DEVICE.type == "cuda"):
                print(f"{name}: {peer}", check(example, peer, batches, truth), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), metavar="WORKLOAD")
    add("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    add("--missing", action="store_true", help="only what the file of this run lacks")
    add("--minutes", type=float, help="begin nothing new after so long")
    add("--smoke", action="store_true", help="tiny models, checked on any device: nothing is timed or recorded")
    add("--output", type=Path, default=RESULTS, help="folder of the JSON (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.smoke:
        smoke(arguments.peers)
        return
    require_gpu()
    settings = {
        "dtype": "bfloat16",
        "vocabulary": VOCABULARY,
        "target_layers": TARGET_LAYERS,
        "workloads": {name: workload._asdict() for name, workload in WORKLOADS.items()},
    }
    run = Run("example_steps_gpu", settings, KEY, arguments.output)
    deadline = Deadline(arguments.minutes)
    for name in arguments.workloads:
        rows = {peer: {"workload": name, "implementation": peer} for peer in peers_of(WORKLOADS[name], arguments.peers)}
        rows = {peer: row for peer, row in rows.items() if not (arguments.missing and run.has(row))}
        if rows and not deadline.is_over():
            measure(WORKLOADS[name], rows, run, deadline)
    print("out of time: go on with --missing" if deadline.is_over() else f"wrote {run.path}")


def measure(workload: Workload, rows: dict[str, dict[str, Any]], run: Run, deadline: Deadline) -> None:
    """Check and time the implementations of one workload."""
    # Otherwise FlexAttention would run kernels for any length from the second workload on. These are slower.
    torch._dynamo.reset()
    free_memory()
    example = example_of(workload, torch.bfloat16)
    batches = [example.batch(seed) for seed in range(WARM_UP + STEPS)]
    truth = truth_of(example, batches)

    def attempt(row: dict[str, Any], measurement: Callable[[], dict[str, Any]]) -> None:
        free_memory()
        try:
            row |= measurement()
        except Exception as error:  # whatever a peer raises is its result
            row["error"] = f"{type(error).__name__}: {error}"[:500]
            example.optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()  # raises here if the error has left the device unusable

    # All are checked before the first one is timed, which changes the weights.
    for peer, row in rows.items():
        if peer != FLOOR:
            attempt(row, functools.partial(check, example, peer, batches, truth))
    del truth
    for peer, row in rows.items():
        if deadline.is_over():
            break
        if "error" not in row:
            attempt(row, functools.partial(time_peer, example, peer, batches))
        run.add(row)
        print(row, flush=True)


if __name__ == "__main__":
    main()
