"""What these kernels use of Gluon, by one name for every release of Triton that `configs` lets them run with:
`triton.experimental` promises no stability.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.core import _aggregate as aggregate

# Renamed in Triton 3.8; 3.9 has the old name no more.
async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

__all__ = ["TensorDescriptor", "aggregate", "async_load", "gl", "gluon", "hopper", "mbarrier"]
