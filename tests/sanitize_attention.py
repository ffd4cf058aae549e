"""Forward and backward of one small case, for compute-sanitizer to watch.

    compute-sanitizer --tool memcheck python tests/sanitize_attention.py hopper 128     # or: portable, and a head size

racecheck is for the portable kernels. It does not follow mbarriers and named barriers between warps: with those of
sm_90 it reports every scalar that one warp hands to another, and the states in which Triton's own code starts them.
"""

from __future__ import annotations

import argparse

import torch
from attention_checks import model_tensor

from flashmask_kernels import flashmask_attention, ops

LENGTH = 1100


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("kernels", choices=["hopper", "portable"])
    parser.add_argument("head_dim", type=int)
    arguments = parser.parse_args()
    ops._FEWEST_SPECIALIZED_ELEMENTS = 0 if arguments.kernels == "hopper" else 1 << 60
    torch.manual_seed(0)
    ends = (torch.arange(LENGTH, device="cuda") // 400 + 1) * 400
    documents = ends.clamp(max=LENGTH).int()[None, None, None]
    intervals = torch.randint(LENGTH, (1, 1, 4, LENGTH), device="cuda", dtype=torch.int32)
    for bounds in (documents, intervals):
        query, key, value = (
            model_tensor(1, LENGTH, heads, arguments.head_dim, torch.bfloat16, "cuda").requires_grad_()
            for heads in (4, 2, 2)
        )
        specialized = ops._specializes(query, value, bounds, None, 0.0)
        assert specialized == (arguments.kernels == "hopper"), "this GPU and head size have no such kernels"
        flashmask_attention(query, key, value, bounds).float().square().sum().backward()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
