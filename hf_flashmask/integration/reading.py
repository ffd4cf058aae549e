"""Whether the host may read a value of a tensor now."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.utils.import_utils import is_tracing

__all__ = ["may_be_read"]


def may_be_read(tensor: Tensor) -> bool:
    """Neither while a graph is traced nor while a CUDA graph is captured: there its values are not those of the call.

    Elsewhere reading a value of a GPU waits for the device.
    """
    return not is_tracing(tensor) and not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
