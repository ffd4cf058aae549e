"""Whether the host may read a value of a tensor now; errors that depend on one."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.utils.import_utils import is_tracing

__all__ = ["may_be_read", "read_and_refuse"]


def may_be_read(tensor: Tensor) -> bool:
    """Neither while a graph is traced nor while a CUDA graph is captured: there its values are not those of the call.

    Elsewhere reading a value of a GPU waits for the device.
    """
    return not is_tracing(tensor) and not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def read_and_refuse(refused: Tensor, reason: str) -> None:
    """Raise `reason` where `refused` is true anywhere. One value is read, in a call that takes more than that."""
    if not may_be_read(refused):
        torch._assert_async(~refused.any(), reason)
    elif bool(refused.any()):
        raise NotImplementedError(reason)
