"""Compile the shipped kernel configurations for one GPU architecture, without that GPU, and print what each uses as
JSON.

    python tests/compile_kernels.py sm_90

The launch code runs as it does on a GPU, on CPU tensors, with Triton's driver replaced by one that only knows the
target.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import io
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
import uniform_registers
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend, get_ptxas
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager
from uniform_registers import unwritten_reads

from flashmask_kernels import configs, portable
from flashmask_kernels.schedule import build_schedule

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# A head size for every row of the table, some of them not powers of two, and plane counts of every form of the mask.
CASES = [
    (torch.bfloat16, 64, 1),
    (torch.bfloat16, 128, 1),
    (torch.bfloat16, 128, 4),
    (torch.float16, 96, 2),
    (torch.bfloat16, 192, 4),
    (torch.float32, 64, 1),
    (torch.float32, 128, 2),
    (torch.float32, 256, 1),
    (torch.float16, 512, 1),
]
SHORT_CASES = {"short": [(64, 1), (128, 1), (192, 4)], "short in a graph": [(128, 1)]}
"""Head sizes and plane counts of the kernels for rows too short for descriptors: of every row of the table that has
some; of graphs, where dK/dV alone is another, of the usual one."""
DECODING_CASES = {
    "decoding": [(64, 1), (128, 4), (192, 4), (512, 1)],
    "decoding 16 rows": [(128, 4)],
    "decoding unaligned keys": [(128, 1)],
    "decoding unaligned values": [(128, 1)],
}
"""The same of the kernels for few rows, of four heads that share a key. With keys alone that are not aligned to 16
elements, they once read descriptors that nothing had written."""
FORMS = ("", *SHORT_CASES, *DECODING_CASES, "hopper", "fused hopper")
"""The portable kernels, these for short rows and for few, and those for sm_90, with the backward in two passes and in
one."""
ROWS = {"sm_120": "sm_86"}
"""The row of the table that an architecture uses, where it has another name."""


class OfflineDriver:
    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def compiled_kernels(dtype: torch.dtype, head_dim: int, planes: int, form: str) -> list[Any]:
    """Every kernel that a forward and a backward pass launch, of a form that `FORMS` has; none if it is another's."""
    kernels = []
    compile_and_launch = triton.JITFunction.run

    def compile_only(self: triton.JITFunction, *args: Any, **options: Any) -> None:
        kernels.append(compile_and_launch(self, *args, **(options | {"warmup": True})))

    length = 256
    query, key, value, d_out = (
        torch.empty(1, length, heads, head_dim, dtype=dtype).transpose(1, 2) for heads in (4, 2, 2, 4)
    )
    bounds = torch.zeros(1, 1, planes, length, dtype=torch.int32)
    if form in DECODING_CASES:
        if (head_dim, planes) not in DECODING_CASES[form]:
            return []
        few, key, value = query[:, :, : 16 if "16 rows" in form else 1], key[:, :1], value[:, :1]
        part = torch.empty(1, 1, length, head_dim + 8, dtype=dtype)[..., :head_dim]
        key = part if form == "decoding unaligned keys" else key
        value = part if form == "decoding unaligned values" else value
        config = configs.select_decoding_config(torch.device("cuda"), dtype, head_dim)
        if config is not None:
            with mock.patch.object(triton.JITFunction, "run", compile_only):
                decode = portable.DecodingForward(few, key, value, bounds, None, 0.1, None, config)
                decode(few, key, value, bounds, None)
        return kernels
    specialized = form in ("hopper", "fused hopper")
    select = {"hopper": configs.select_specialized_configs, "fused hopper": configs.select_fused_configs}
    is_compiled = configs._OLDEST_GLUON <= configs.TRITON_VERSION  # also where no GPU has run them yet
    with mock.patch.object(configs, "_HAS_GLUON", is_compiled):
        chosen = select.get(form, configs.select_configs)(torch.device("cuda"), dtype, head_dim)
    if chosen is None:
        return []
    if form in SHORT_CASES:
        long = chosen
        chosen = (long.for_short_rows if form == "short" else long.without_descriptors)(*long._fields)
        if chosen == long or (head_dim, planes) not in SHORT_CASES[form]:
            return []
    if specialized:
        from flashmask_kernels import hopper

        backward_kernels = hopper.FusedAttentionBackward if form == "fused hopper" else hopper.AttentionBackward
        forward_kernels, factors = hopper.AttentionForward, (0.1,)
    else:
        forward_kernels, backward_kernels = portable.AttentionForward, portable.AttentionBackward
        factors = 0.1, None, 0.0
    with mock.patch.object(triton.JITFunction, "run", compile_only):
        schedules = [
            build_schedule(bounds, length, *config[:2], name == "key_value_gradient")
            for name, config in zip(chosen._fields, chosen)
        ]
        inputs, by_row, by_schedules = (query, key, value, bounds), schedules[0], schedules[1:]
        forward = forward_kernels(*inputs, None, by_row, *factors, chosen.forward)
        out, lse = forward(*inputs, None, by_row, None)
        backward = backward_kernels(d_out, None, *inputs, out, *by_schedules, *factors, chosen)
        backward(d_out, None, *inputs, out, lse, *by_schedules, None)
    return kernels


def resources(kernel: Any, target: GPUTarget) -> dict[str, int]:
    if target.backend == "hip":
        found = {
            name: int(re.search(rf"\.{name}:\s*(\d+)", kernel.asm["amdgcn"])[1])
            for name in ("vgpr_count", "vgpr_spill_count")
        }
        return {
            "registers": found["vgpr_count"],
            "spills": found["vgpr_spill_count"],
            **dict.fromkeys(("serialized", "unwritten", "packed_tests"), 0),
        }
    report = said_by_ptxas(kernel, target)
    unwritten = []
    if "wgmma" in kernel.asm["ptx"]:
        with tempfile.TemporaryDirectory() as folder:
            binary = Path(folder) / "kernel.cubin"
            binary.write_bytes(kernel.asm["cubin"])
            disassemble = [str(Path(get_ptxas(target.arch).path).with_name("nvdisasm")), "-c", str(binary)]
            unwritten = remembered_reads(disassemble, binary)
    return {
        "registers": int(re.search(r"Used (\d+) registers", report)[1]),
        "spills": int(re.search(r"(\d+) bytes spill stores", report)[1]),
        # ptxas says so when it must wait for every wgmma by itself.
        "serialized": len(re.findall(r"serializ|C751[0-9]", report)),
        "unwritten": len(unwritten),
        # LLVM packs the results of tests that it vectorises, and takes them out again.
        "packed_tests": len(re.findall(r"selp\.b16\s+%\w+, -?1, 0,", kernel.asm["ptx"])),
    }


def said_by_ptxas(kernel: Any, target: GPUTarget) -> str:
    """What ptxas says with the options that the installed Triton passes."""
    made_of = triton.__version__, get_ptxas(target.arch).version, target, kernel.metadata.ptx_options, kernel.asm["ptx"]

    def ask() -> str:
        said = io.StringIO()
        with triton.knobs.nvidia.scope(), contextlib.redirect_stdout(said):
            triton.knobs.nvidia.dump_ptxas_log = True
            CUDABackend(target).make_cubin(kernel.asm["ptx"], {}, kernel.metadata, target.arch)
        return said.getvalue()

    return remembered(repr(made_of), "ptxas.log", ask)


def remembered_reads(command: list[str], binary: Path) -> list[str]:
    """What `unwritten_reads` finds in what nvdisasm prints."""
    rules, code = inspect.getsource(uniform_registers), hashlib.sha256(binary.read_bytes()).hexdigest()

    def find() -> str:
        return json.dumps(unwritten_reads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))

    return json.loads(remembered(f"{command[0]} {rules} {code}", "unwritten_reads.json", find))


def remembered(of_what: str, name: str, make: Callable[[], str]) -> str:
    """In Triton's cache, which has what Triton made: NVIDIA's programs take most of the time of a second run."""
    cache = get_cache_manager(hashlib.sha256(of_what.encode()).hexdigest())
    path = cache.get_file(name) or cache.put(make(), name, binary=False)
    return Path(path).read_text()


def report(architecture: str) -> dict[str, dict[str, int]]:
    target = TARGETS[architecture]
    driver.set_active(OfflineDriver(target))
    result = {}
    with mock.patch.object(configs, "architecture", return_value=ROWS.get(architecture, architecture)):
        for dtype, head_dim, planes in CASES:
            for form in FORMS:
                for kernel in compiled_kernels(dtype, head_dim, planes, form):
                    name = f"{kernel.metadata.name} {str(dtype).removeprefix('torch.')} D={head_dim} C={planes}"
                    name = f"{form} {name}" if form else name
                    result[name] = resources(kernel, target) | {"shared": kernel.metadata.shared}
    return result


if __name__ == "__main__":
    print(json.dumps(report(sys.argv[1]), indent=1))
