"""Write the measured speed from `benchmarks/results/` into README.md, between its benchmark markers.

python benchmarks/report.py          # rewrite the section
python benchmarks/report.py --check  # fail when README.md does not hold what the results say
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from measurement import RESULTS

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
MASK_NAMES = {
    "causal": "causal",
    "causal_document": "packed documents",
    "shared_question": "shared prompts, two answers each",
}


def gpu_section(result: dict[str, Any]) -> list[str]:
    environment, settings = result["environment"], result["settings"]
    cells = {(row["length"], row["mask"], row["implementation"]): row for row in result["rows"]}
    implementations = list(dict.fromkeys(row["implementation"] for row in result["rows"]))
    lines = [
        f"**{environment['device']}**, {heads(settings)}, {settings['documents']} documents of random lengths. "
        f"TFLOP/s over the visible pairs, forward / backward. {versions(environment)}",
        "",
        f"| mask | tokens | visible | {' | '.join(implementations)} |",
        f"|---|--:|--:|{'--:|' * len(implementations)}",
    ]
    for length, mask in dict.fromkeys((row["length"], row["mask"]) for row in result["rows"]):
        rows = [cells.get((length, mask, name)) for name in implementations]
        speeds = [f"{row['tflops']['forward']:.0f} / {row['tflops']['backward']:.0f}" if row else "-" for row in rows]
        visible = cells[length, mask, implementations[0]]["visible"]
        lines.append(f"| {MASK_NAMES[mask]} | {length:,} | {visible:.1%} | {' | '.join(speeds)} |")
    longest = max(row["length"] for row in result["rows"])
    build = [
        f"{name} {cells[longest, 'causal_document', name]['milliseconds']['mask']:.2f} ms"
        for name in implementations
        if (longest, "causal_document", name) in cells
    ]
    making = f"Making the mask of packed documents at {longest:,} tokens, once a step, takes the device"
    return [*lines, "", f"{making}: {', '.join(build)}."]


def cpu_section(result: dict[str, Any]) -> list[str]:
    environment, settings = result["environment"], result["settings"]
    flashmask, dense = result["rows"]
    return [
        f"**{environment['device']}**, {heads(settings)}, {settings['length']:,} tokens in {settings['documents']} "
        f"equal documents, forward and backward: flashmask {flashmask['milliseconds']:.0f} ms, SDPA with a dense mask "
        f"{dense['milliseconds']:.0f} ms, {dense['milliseconds'] / flashmask['milliseconds']:.1f} times as long. "
        f"{versions(environment)}"
    ]


def heads(settings: dict[str, Any]) -> str:
    shape = f"{settings['heads']} query and {settings['kv_heads']} key heads of size {settings['head_dim']}"
    return f"{settings['dtype']}, {shape}"


def versions(environment: dict[str, str]) -> str:
    return f"torch {environment['torch']}, Triton {environment['triton']}, {environment['date']}."


def section() -> str:
    gpu, cpu = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("attention_gpu", "attention_cpu"))
    return "\n".join([BEGIN, *gpu_section(gpu), "", *cpu_section(cpu), END])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    arguments = parser.parse_args()
    readme = README.read_text()
    before, after = readme.split(BEGIN)[0], readme.split(END)[1]
    updated = before + section() + after
    if arguments.check:
        sys.exit(None if updated == readme else "README.md differs from what benchmarks/results/ say")
    README.write_text(updated)


if __name__ == "__main__":
    main()
