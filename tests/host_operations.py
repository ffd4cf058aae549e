"""What a computation does on the host."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class HostOperations(TorchDispatchMode):
    """How large the tensors are that a computation makes on the host, and how often it reads one there."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.reads += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.is_cpu:
                self.largest = max(self.largest, tensor.numel())
        return result
