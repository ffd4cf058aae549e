"""Random sequences of calls on the same tensors, changed in every way between the calls, against fresh tensors.

    python tests/fuzz_calls.py 10000          on the CPU
    python tests/fuzz_calls.py 2000 --gpu     on the GPU: streams and CUDA graphs as well

Each sequence has tensors that tell documents apart: `position_ids`, `cu_seq_lens_q`, bounds, a dict of bounds, a dense
mask, a 2-D mask. Between calls they are changed in place, through an array that shares their memory, through `.data`,
in inference mode, or not; calls come with and without gradients, in inference mode, from other threads, for one model
or another of the same configuration. Every result must be what new tensors of the same contents give.
"""

from __future__ import annotations

import argparse
import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

if __name__ == "__main__":
    import conftest  # noqa: F401  (the environment of the tests)

import torch
from tiny_models import build
from torch import Tensor

from hf_flashmask import bounds

LENGTH = 9
MODES = (torch.enable_grad, torch.no_grad, torch.inference_mode)
_models: dict[tuple[str, str], list[torch.nn.Module]] = {}


def models(name: str, device: torch.device) -> list[torch.nn.Module]:
    """Two models of one configuration, with other weights."""
    key = name, device.type
    if key not in _models:
        first = build(name)
        second = type(first)(first.config).eval()
        second.load_state_dict(first.state_dict())
        with torch.no_grad():
            for parameter in second.parameters():
                parameter.mul_(0.9)
        _models[key] = [first.to(device), second.to(device)]
    return _models[key]


def tensors_in(arguments: dict[str, Any]) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(arguments)


def in_all_tensors(function: Callable[[Tensor], Tensor], arguments: dict[str, Any]) -> dict[str, Any]:
    return torch.utils._pytree.tree_map(function, arguments)


def copy_of(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


class Sequence:
    """One sequence of calls."""

    def __init__(self, random: random.Random, device: torch.device) -> None:
        self.random, self.device = random, device
        self.name = random.choice(["llama", "gemma2", "gpt_oss", "bert", "mistral"])
        self.models = models(self.name, device)
        kinds = ["positions", "positions and padding", "lengths", "bounds", "dense"]
        if self.name in ("gemma2", "gpt_oss"):
            kinds = ["positions", "positions and padding", "lengths", "dict"]  # one tensor for both kinds is refused
        self.kind = random.choice(kinds)
        self.tokens = torch.randint(1, 97, (1, LENGTH), generator=torch.Generator().manual_seed(random.randrange(99)))
        self.tokens = self.tokens.to(device)
        self.arguments = self.on_device(self.draw())

    def draw(self) -> dict[str, Any]:
        """Other documents, in tensors of the same shapes."""
        lengths = [self.random.randint(1, LENGTH)]
        while sum(lengths) < LENGTH:
            lengths.append(self.random.randint(1, LENGTH - sum(lengths)))
        position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
        mask = bounds.from_position_ids(position_ids)
        if self.kind == "positions":
            return {"position_ids": position_ids}
        if self.kind == "positions and padding":
            attention_mask = torch.ones_like(position_ids)
            attention_mask[0, LENGTH - self.random.randint(0, 3) :] = 0
            return {"position_ids": position_ids, "attention_mask": attention_mask}
        if self.kind == "lengths":  # always two documents: the shape stays
            cut = self.random.randint(1, LENGTH - 1)
            return {"cu_seq_lens_q": torch.tensor([0, cut, LENGTH], dtype=torch.int32)}
        if self.kind == "bounds":
            return {"attention_mask": mask}
        if self.kind == "dense":
            return {"attention_mask": bounds.to_dense(mask)}
        return {"attention_mask": {"full_attention": mask, "sliding_attention": mask.clone()}}

    def on_device(self, arguments: dict[str, Any]) -> dict[str, Any]:
        move: Callable[[Tensor], Tensor] = lambda tensor: tensor.clone().to(self.device)  # noqa: E731
        if self.device.type == "cpu" and self.random.random() < 0.5:  # an array owns the memory
            move = lambda tensor: torch.from_numpy(tensor.numpy().copy())  # noqa: E731
        elif self.random.random() < 0.3:
            with torch.inference_mode():
                return in_all_tensors(move, arguments)
        return in_all_tensors(move, arguments)

    def change(self) -> None:
        """Other contents in the same tensors."""
        flat, new = tensors_in(self.arguments), tensors_in(self.draw())
        how = self.random.choice(["copy_", "data", "array", "inference", "stream"])
        for tensor, value in zip(flat, new):
            if tensor.is_inference() or how == "inference":
                with torch.inference_mode():
                    tensor.copy_(value)
            elif how == "data":
                tensor.data.copy_(value)
            elif how == "array" and tensor.device.type == "cpu":
                tensor.numpy()[:] = value.numpy()
            elif how == "stream" and tensor.is_cuda:
                torch.cuda.synchronize()
                with torch.cuda.stream(torch.cuda.Stream()):
                    tensor.copy_(value)
                torch.cuda.synchronize()
            else:
                tensor.copy_(value)

    def call(self, model: torch.nn.Module, arguments: dict[str, Any], mode: Any) -> Tensor:
        with mode():
            return self.logits(model, arguments).clone()

    def logits(self, model: torch.nn.Module, arguments: dict[str, Any]) -> Tensor:
        no_cache = {} if self.name == "bert" else {"use_cache": False}
        return model(self.tokens, **arguments, **no_cache).logits

    def step(self) -> None:
        model, mode = self.random.choice(self.models), self.random.choice(MODES)
        if mode is torch.enable_grad and any(tensor.is_inference() for tensor in tensors_in(self.arguments)):
            mode = torch.no_grad  # autograd saves no inference tensors
        fresh = in_all_tensors(copy_of, self.arguments)
        expected = self.call(model, fresh, torch.no_grad)
        how = self.random.choice(["plain", "thread", "stream", "graph"])
        if how == "thread":
            results: list[Tensor] = []
            thread = threading.Thread(target=lambda: results.append(self.call(model, self.arguments, mode)))
            thread.start()
            thread.join()
            result = results[0]
        elif how == "stream" and self.device.type == "cuda":
            torch.cuda.synchronize()
            with torch.cuda.stream(torch.cuda.Stream()):
                result = self.call(model, self.arguments, mode)
            torch.cuda.synchronize()
        elif how == "graph" and self.can_be_captured():
            result = self.capture_and_replay(model)
            fresh = in_all_tensors(copy_of, self.arguments)
            expected = self.call(model, fresh, torch.no_grad)
        else:
            result = self.call(model, self.arguments, mode)
        place = f"{self.name}, {self.kind}, {how}: "
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5, msg=lambda text: place + text)

    def can_be_captured(self) -> bool:
        """Experts are computed with copies from the host, lengths and dense masks are read, and branches of trees."""
        is_captured = (
            self.device.type == "cuda" and self.name != "gpt_oss" and self.kind in ("positions", "bounds", "dict")
        )
        return is_captured and (self.name, self.kind) != ("mistral", "bounds")

    def capture_and_replay(self, model: torch.nn.Module) -> Tensor:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            logits = self.logits(model, self.arguments)
        if self.random.random() < 0.7:
            self.change()
        graph.replay()
        torch.cuda.synchronize()
        return logits.clone()

    def run(self) -> None:
        for _ in range(self.random.randint(2, 6)):
            if self.random.random() < 0.7:
                self.change()
            self.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sequences", type=int)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--first-seed", type=int, default=0)
    arguments = parser.parse_args()
    device = torch.device("cuda" if arguments.gpu else "cpu")
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.sequences):
        try:
            Sequence(random.Random(seed), device).run()
        except Exception:
            print(f"seed {seed}", file=sys.stderr)
            raise
        if seed % 500 == 499:
            print(f"{seed + 1} sequences", flush=True)
    print(f"{arguments.sequences} sequences, no stale result")


if __name__ == "__main__":
    main()
