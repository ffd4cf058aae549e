"""Forward and backward of one small case, for compute-sanitizer to watch.

    compute-sanitizer --tool memcheck python tests/sanitize_attention.py hopper 128     # or: portable, and a head size

racecheck is for the portable kernels. It does not follow mbarriers and named barriers between warps: with those of
sm_90 it reports every scalar that one warp hands to another, and the states in which Triton's own code starts them.
Triton's own sanitizer follows them (Triton 3.6, which then compiles for half an hour on one core):

    TRITON_INSTRUMENTATION_MODE=consan CUDA_LAUNCH_BLOCKING=1 python tests/sanitize_attention.py hopper 128
"""

from __future__ import annotations

import argparse
import os

import torch
import triton
from attention_checks import model_tensor

from flashmask_kernels import dispatch, flashmask_attention

LENGTH = 1100


def give_all_warps_registers() -> None:
    """Triton's sanitizer computes in every warp. Those that load and deal out tiles have 24 registers, with which
    instrumented code waits for more for ever.
    """
    from triton.experimental.gluon import language as gl

    from flashmask_kernels.hopper import forward, fused_backward, key_value_gradient, query_gradient

    # As many as each warp starts with.
    two_passes = (forward, 168), (key_value_gradient, 168), (query_gradient, 168)
    for module, registers in (*two_passes, (fused_backward, 128)):
        for name in {"REGISTERS", "REGISTERS_WITH_MASKS"} & set(vars(module)):
            setattr(module, name, gl.constexpr([registers] * len(getattr(module, name).value)))


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("kernels", choices=["hopper", "portable"])
    parser.add_argument("head_dim", type=int)
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INSTRUMENTATION_MODE") == "consan" and arguments.kernels == "hopper":
        give_all_warps_registers()
    # Where Triton's sanitizer keeps what it knows of barriers and buffers.
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))
    dispatch.FEWEST_SPECIALIZED_ELEMENTS = 0 if arguments.kernels == "hopper" else 1 << 60
    torch.manual_seed(0)
    ends = (torch.arange(LENGTH, device="cuda") // 400 + 1) * 400
    documents = ends.clamp(max=LENGTH).int()[None, None, None]
    intervals = torch.randint(LENGTH, (1, 1, 4, LENGTH), device="cuda", dtype=torch.int32)
    for bounds in (documents, intervals):
        query, key, value = (
            model_tensor(1, LENGTH, heads, arguments.head_dim, torch.bfloat16, "cuda").requires_grad_()
            for heads in (4, 2, 2)
        )
        specialized = dispatch.specializes(query, value, bounds, None, 0.0)
        assert specialized == (arguments.kernels == "hopper"), "this GPU and head size have no such kernels"
        # In this thread: the allocator is not known in those of autograd.
        with torch.autograd.set_multithreading_enabled(False):
            flashmask_attention(query, key, value, bounds).float().square().sum().backward()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
