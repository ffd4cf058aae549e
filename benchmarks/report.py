"""Write the measured speed from `benchmarks/results/` into README.md, between its benchmark markers, and draw it.

python benchmarks/report.py          # rewrite the section and the picture
python benchmarks/report.py --check  # fail when README.md does not hold what the results say
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from measurement import RESULTS

README = Path(__file__).parent.parent / "README.md"
PICTURE = README.parent / "docs" / "shared_prompts.png"
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


WORKLOADS = {
    "dpo": "DPO, a training step",
    "score": "GRPO, log-probabilities",
    "update": "GRPO, log-probabilities and their gradients",
}
SHARED = "flashmask, shared"


def shared_prompts_section(result: dict[str, Any]) -> list[str]:
    environment, rows = result["environment"], result["rows"]
    steps = [row for row in rows if row["workload"] in WORKLOADS and row["prompt"] == 2048]
    merge = next(row for row in rows if row["workload"] == "merge")
    peers = [name for name in dict.fromkeys(row["implementation"] for row in steps) if name != SHARED]
    lines = [
        f"**{environment['device']}**, `share_prefixes` under TRL's unmodified trainers, Llama 3.2 1B's shape, "
        "bfloat16, gradient checkpointing: prompts of 2,048 tokens, answers of 512, no padding. Milliseconds (peak "
        f"GiB). {versions(environment)}",
        "",
        f"| | answers | vocabulary | {SHARED} | {' | '.join(peers)} | times as fast as the fastest |",
        f"|---|--:|--:|--:|{'--:|' * len(peers)}--:|",
    ]
    for workload, vocabulary in dict.fromkeys((row["workload"], row["vocabulary"]) for row in steps):
        cells = {
            row["implementation"]: row
            for row in steps
            if (row["workload"], row["vocabulary"]) == (workload, vocabulary)
        }
        ours = cells[SHARED]
        fastest = min(row["milliseconds"] for name, row in cells.items() if name != SHARED)
        columns = [
            f"{row['milliseconds']:.0f} ({row['peak_mib'] / 1024:.1f})" if (row := cells.get(name)) else "-"
            for name in (SHARED, *peers)
        ]
        lines.append(
            f"| {WORKLOADS[workload]} | {ours['answers']} | {vocabulary:,} | {' | '.join(columns)} "
            f"| {fastest / ours['milliseconds']:.2f} |"
        )
    return [
        *lines,
        "",
        f"Finding the trees of {merge['rows']} rows takes {merge['host_milliseconds']:.1f} ms, once a forward pass. "
        "With more of each sequence shared:",
        "",
        f'<img src="docs/{PICTURE.name}" width="480" alt="Speed of a DPO step over the shared part of its sequences">',
    ]


def draw_shared_prompts(result: dict[str, Any]) -> None:
    length = result["settings"]["length"]
    steps = {
        (row["prompt"], row["implementation"]): row
        for row in result["rows"]
        if row["workload"] == "dpo" and row["vocabulary"] == result["rows"][1]["vocabulary"]
    }
    prompts = sorted({prompt for prompt, _ in steps})
    part = [prompt / length for prompt in prompts]
    speed = [steps[prompt, "sdpa"]["milliseconds"] / steps[prompt, SHARED]["milliseconds"] for prompt in prompts]
    memory = [steps[prompt, "sdpa"]["peak_mib"] / steps[prompt, SHARED]["peak_mib"] for prompt in prompts]
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    axes.plot(part, [1 / steps[prompt, SHARED]["computed"] for prompt in prompts], color="0.7", label="fewer tokens")
    axes.plot(part, speed, "o-", color="tab:blue", label="faster than sdpa, unshared")
    axes.plot(part, memory, "s-", color="tab:orange", label="less peak memory")
    axes.set(xlabel="part of each sequence that its pair shares", ylabel="times", ylim=(0, None), xlim=(0, 1))
    axes.set_title(f"A DPO step, pairs of {length:,} tokens", loc="left")
    axes.axhline(1, color="0.85", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(PICTURE, dpi=150)
    plt.close(figure)


def heads(settings: dict[str, Any]) -> str:
    shape = f"{settings['heads']} query and {settings['kv_heads']} key heads of size {settings['head_dim']}"
    return f"{settings['dtype']}, {shape}"


def versions(environment: dict[str, str]) -> str:
    return f"torch {environment['torch']}, Triton {environment['triton']}, {environment['date']}."


def results(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def section() -> str:
    sections = (
        gpu_section(results("attention_gpu")),
        shared_prompts_section(results("shared_prompts_gpu")),
        cpu_section(results("attention_cpu")),
    )
    return "\n".join([BEGIN, "\n\n".join("\n".join(lines) for lines in sections), END])


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
    draw_shared_prompts(results("shared_prompts_gpu"))


if __name__ == "__main__":
    main()
