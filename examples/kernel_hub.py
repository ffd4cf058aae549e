"""Load the kernels without this package, as from the Kernel Hub, and check them on a row of two documents.

    pip install kernels
    python examples/kernel_hub.py             # the kernels of this checkout, laid out as the Hub has them
    python examples/kernel_hub.py --from-hub  # hf-flashmask/flashmask-kernels

Hugging Face's library `kernels` imports a folder for each device, under a name of its own: nothing is installed. A mask
is one int32 tensor. The output must be that of each document alone; when it is not, the script says so and fails.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import torch
from torch.nn.functional import scaled_dot_product_attention

SOURCE = Path(__file__).resolve().parents[1] / "kernels"
LENGTHS = [300, 724]


def load_from_checkout(folder: Path, backend: str) -> ModuleType:
    """What `kernel-builder` makes of kernels/, and how it is loaded: the package, and who it is, for each backend."""
    from kernels import get_local_kernel

    general = dict(re.findall(r'^(name|version|license) = "?([^"\n]+)"?$', (SOURCE / "build.toml").read_text(), re.M))
    name = general["name"].replace("-", "_")
    variant = folder / "build" / f"torch-{backend}"
    shutil.copytree(SOURCE / "torch-ext" / name, variant, ignore=shutil.ignore_patterns("__pycache__"))
    metadata = {**general, "version": int(general["version"]), "id": f"{name}_of_this_checkout"}
    (variant / "metadata.json").write_text(json.dumps({**metadata, "python-depends": [], "backend": {"type": backend}}))
    return get_local_kernel(folder, backend=backend)


def load_from_hub() -> ModuleType:
    from kernels import get_kernel

    return get_kernel("hf-flashmask/flashmask-kernels", version=1, trust_remote_code=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from-hub", action="store_true", help="download them (default: those of this checkout)")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = "rocm" if torch.version.hip else device
    with tempfile.TemporaryDirectory() as folder:
        flashmask = load_from_hub() if args.from_hub else load_from_checkout(Path(folder), backend)
        query, key, value = (torch.randn(1, heads, sum(LENGTHS), 64, device=device) for heads in (8, 2, 2))

        # A key is hidden from the end of its document on; one plane implies the causal triangle.
        lengths = torch.tensor(LENGTHS, device=device)
        bounds = lengths.cumsum(0).repeat_interleave(lengths).int()[None, None, None]
        packed = flashmask.flashmask_attention(query, key, value, bounds)

    documents = zip(*(tensor.split(LENGTHS, dim=2) for tensor in (query, key, value)))
    alone = [scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True) for q, k, v in documents]
    difference = (packed - torch.cat(alone, dim=2)).abs().max().item()
    print(f"{flashmask.__name__}, not installed: {flashmask.__file__}")
    verdict = f"outputs differ by at most {difference:.1e}"
    if not difference < 1e-2:  # written so that nan fails; matrix products of some GPUs round to 10 bits
        sys.exit(f"The packed row and its documents alone DO NOT AGREE: {verdict}.")
    print(f"The packed row and its documents alone agree: {verdict}.")


if __name__ == "__main__":
    main()
