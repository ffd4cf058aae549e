"""Write what `benchmarks/results/` say into README.md and the pages in docs/, between their markers, and draw it.

python benchmarks/report.py          # rewrite the sections and the pictures
python benchmarks/report.py --check  # fail when a page does not hold what the results say

attention_gpu, training_gpu and parallel_gpu collect several runs. Of the runs that have its rows, each table shows the
one that was changed last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from measurement import RESULTS, latest_run, runs_of
from parallel_cost import (
    ACROSS_ULYSSES,
    GPUS_OF_A_NODE,
    PASSES,
    Constants,
    Group,
    Links,
    Measured,
    Model,
    Prediction,
    Step,
    TileCost,
    calibrate,
    imbalance,
    predict,
)
from parallel_gpu import BANDWIDTH, Workload
from parallel_ways import ONE_GPU, WAYS
from peers import PEERS

README = Path(__file__).parent.parent / "README.md"
PICTURE = README.parent / "docs" / "shared_prompts.png"
BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
PERFORMANCE = README.parent / "docs" / "performance.md"
MANY_GPUS = README.parent / "docs" / "many_gpus.md"
PUBLISHED = Path(__file__).parent / "published.json"
MASK_NAMES = {
    "full": "full",
    "causal": "causal",
    "sliding_window": "sliding window",
    "causal_document": "packed documents",
    "document": "documents, bidirectional",
    "share_question": "shared questions",
    "global_sliding_window": "global tokens and window",
    "causal_blockwise": "causal blockwise",
    "prefix_lm_document": "prefix-LM documents",
    "prefix_lm_causal": "prefix-LM",
    "qk_sparse": "QK-sparse",
    "hash_sparse": "hash-sparse",
    "random_eviction": "random eviction",
    "block_causal_document": "block-causal documents",
    "random_intervals": "random intervals",
}
ROW_NAMES = {"steps": "{}", "whole documents": "up to {}, whole documents"}
"""Of the workloads of training, with their length."""
OURS, FLEX, WITHOUT = "flashmask", "flex_attention", "no attention"
FLEX_FORMS = (FLEX, "flex_attention, 64 x 64")
CUDNN_FLEX = "cuDNN flex_attention"
RIVALS = (OURS, f"{OURS}, deterministic", CUDNN_FLEX, f"{CUDNN_FLEX}, deterministic", "FA4 varlen", FLEX)
LARGEST_FUSED_HEAD = 64
"""Larger heads have kernels for the backward in two passes alone, which are deterministic."""
LAYERS_OF_A_MASK = 16
"""That attend under a mask that is made once, where the time to make it is counted."""
HEADLINE: dict[str, Any] = {"length": 32768, "heads": 32, "kv_heads": 8, "head_dim": 128}

Json = dict[str, Any]


def measured(run: Json, **wanted: Any) -> list[Json]:
    """The rows without errors that have these values; of attention, in the order of the tables, not of measuring."""
    rows = [row for row in run["rows"] if "error" not in row and all(row[name] == wanted[name] for name in wanted)]
    return sorted(rows, key=place_in_table) if rows and "mask" in rows[0] else rows


def place_in_table(row: Json) -> tuple[int, int]:
    return list(MASK_NAMES).index(row["mask"]), list(PEERS).index(row["implementation"])


def times_as_fast(rows: list[Json]) -> dict[tuple[str, int], float]:
    """Forward and backward of flashmask against the faster form of FlexAttention, by mask and sample."""
    times: dict[tuple[str, int], dict[str, float]] = {}
    for row in rows:
        times.setdefault((row["mask"], row["sample"]), {})[row["implementation"]] = row["milliseconds"]["total"]
    return {
        key: min(flex) / of[OURS]
        for key, of in times.items()
        if OURS in of and (flex := [of[form] for form in FLEX_FORMS if form in of])
    }


def table(header: list[str], rows: list[list[str]], left: int = 1) -> list[str]:
    """A Markdown table; all columns but the first ``left`` are numbers."""
    align = "".join("---|" if column < left else "--:|" for column in range(len(header)))
    return [f"| {' | '.join(header)} |", f"|{align}", *(f"| {' | '.join(row)} |" for row in rows)]


def picture(name: str, alternative: str) -> list[str]:
    return ["", f'<img src="{name}.png" width="640" alt="{alternative}">']


def attention_section(run: Json) -> list[str]:
    environment, rows = run["environment"], measured(run, protocol="bar", sample=0)
    shown = measured(run, protocol="bar", sample=0, **HEADLINE)
    if not shown:
        return []
    cells = {(row["mask"], row["implementation"]): row for row in shown}
    names = list(dict.fromkeys(row["implementation"] for row in shown))
    ratios = times_as_fast(shown)
    body = []
    for mask in dict.fromkeys(row["mask"] for row in shown):
        found = [cells.get((mask, name)) for name in names]
        visible = next(row["visible"] for row in found if row)
        ratio = f"{ratios[mask, 0]:.2f}" if (mask, 0) in ratios else "-"
        speeds = [f"{row['tflops']['total']:.0f}" if row else "-" for row in found]
        body.append([MASK_NAMES[mask], f"{visible:.1%}", *speeds, ratio])
    lines = [
        f"**{environment['device']}**, {heads(run['settings'] | HEADLINE)}, one row of {HEADLINE['length']:,} tokens: "
        f"forward and backward, TFLOP/s over the visible pairs. {versions(environment)}",
        "",
        *table(["mask", "visible", *names, f"times {FLEX}"], body),
    ]
    if len(ratios) > 1:
        mean = statistics.geometric_mean(ratios.values())
        lines += ["", f"Geometric mean: {mean:.2f} times as fast as `{FLEX}`. {mask_making(cells)}"]
    lines += picture("speed_per_mask", "Speed of flashmask and FlexAttention under each mask")
    if len({shape_of(row) for row in rows}) > 1:
        against = f"Other shapes, against `{FLEX}` over all masks measured"
        if any(row["implementation"] == FLEX_FORMS[1] for row in rows):
            against += "; with a forward tile of 64 x 64 where its default for heads of 64 spills registers"
        lines += ["", f"{against}:", "", *shapes_table(rows)]
    return lines


def rivals_section(runs: list[Json]) -> list[str]:
    """Beside the fastest CUDA kernels: every mask, length and head size, from the newest of ``runs`` that has it."""
    environment = runs[-1]["environment"]
    cases: dict[tuple[int, ...], dict[str, dict[str, Json]]] = {}
    for run in runs:
        for shape, masks in by_shape_and_mask(rivals_rows(run)).items():
            cases.setdefault(shape, {}).update(masks)
    founds = [found for masks in cases.values() for found in masks.values()]
    names = [name for name in RIVALS if any(name in found for found in founds)]

    def label(mask: str, found: dict[str, Json]) -> str:
        return MASK_NAMES[mask] + ("" if found[OURS]["kernels"] == environment.get("kernels") else " ¹")

    lines = [
        f"**Beside the fastest CUDA kernels, {environment['device']}**, {run['settings']['dtype']}: forward / backward "
        "/ both, TFLOP/s over the visible pairs; the fastest of each row is bold. cuDNN Frontend's `flex_attention` "
        "takes the visible intervals of each query, FlashAttention-4 documents and windows. A dash: the implementation "
        "cannot express the mask, or was not measured. Each row is from one run; ¹ marks those with earlier kernels of "
        f"flashmask. {rivals_versions(environment)}",
    ]
    for shape, masks in sorted(cases.items(), key=lambda case: (-case[0][0], case[0])):
        length, size, count, kv_heads = shape
        title = f"{length:,} tokens, {count} query and {kv_heads} key heads of size {size}:"
        ordered = sorted(masks.items(), key=lambda item: list(MASK_NAMES).index(item[0]))
        body = [[label(mask, found), *speeds_of(found, names)] for mask, found in ordered]
        lines += ["", title, "", *table(["mask", *names], body)]
    return [*lines, "", wins(founds, names)]


def rivals_rows(run: Json) -> list[Json]:
    """Of their implementations, where flashmask was measured, with the hash of its kernels. Where only the
    deterministic kernels of flashmask exist, its rows stand for both.
    """
    rows = measured(run, protocol="bar", sample=0)
    ours = {(shape_of(row), row["mask"]) for row in rows if row["implementation"] == OURS}
    kernels = run["environment"].get("kernels")
    rows = [
        {**row, "kernels": kernels}
        for row in rows
        if row["implementation"] in RIVALS and (shape_of(row), row["mask"]) in ours
    ]
    found = {(shape_of(row), row["mask"], row["implementation"]) for row in rows}
    for row in rows.copy():
        is_only = row["head_dim"] > LARGEST_FUSED_HEAD and (shape_of(row), row["mask"], RIVALS[1]) not in found
        if row["implementation"] == OURS and is_only:
            rows.append({**row, "implementation": RIVALS[1]})
    return sorted(rows, key=place_in_table)


def by_shape_and_mask(rows: Iterable[Json]) -> dict[tuple[int, ...], dict[str, dict[str, Json]]]:
    """Rows by shape, mask and implementation."""
    found: dict[tuple[int, ...], dict[str, dict[str, Json]]] = {}
    for row in rows:
        found.setdefault(shape_of(row), {}).setdefault(row["mask"], {})[row["implementation"]] = row
    return found


def speeds_of(found: dict[str, Json], names: list[str]) -> list[str]:
    has_others = any(not name.startswith(OURS) for name in found)
    fastest = max(found, key=lambda name: found[name]["tflops"]["total"]) if has_others else None
    cells = []
    for name in names:
        if name in found:
            parts = (found[name]["tflops"][part] for part in ("forward", "backward", "total"))
            cell = " / ".join(f"{speed:.0f}" for speed in parts)
            cells.append(f"**{cell}**" if name == fastest else cell)
        else:
            cells.append("-")
    return cells


def speed_with_mask(row: Json) -> float:
    """TFLOP/s of both passes of a layer, with its share of making the mask."""
    times = row["milliseconds"]
    return row["tflops"]["total"] * times["total"] / (times["total"] + times.get("mask", 0) / LAYERS_OF_A_MASK)


def wins(cases: list[dict[str, Json]], names: list[str]) -> str:
    """Who is fastest how often among those with a rival, and which of the two deterministic ones is.

    Args:
        cases: rows by implementation, of each shape and mask.
    """
    ours, theirs = RIVALS[1], RIVALS[3]
    shared = [found for found in cases if found.keys() & {CUDNN_FLEX, "FA4 varlen"}]

    def counts(speed: Callable[[Json], float]) -> str:
        fastest = [max(found, key=lambda name: speed(found[name])) for found in shared]
        return ", ".join(f"{name} {fastest.count(name)}" for name in names if name in fastest)

    text = (
        f"The fastest over both passes, of {len(shared)} rows with another CUDA kernel: "
        f"{counts(lambda row: row['tflops']['total'])}. With the time to make the mask once for {LAYERS_OF_A_MASK} "
        "layers (flashmask's bounds and schedules, cuDNN's plan of intervals that are given; FlashAttention-4 makes "
        f"nothing): {counts(speed_with_mask)}."
    )
    if both := [found for found in cases if {ours, theirs} <= found.keys()]:
        ahead = sum(found[ours]["tflops"]["total"] > found[theirs]["tflops"]["total"] for found in both)
        text += f" Of the two deterministic backward passes, flashmask's is the faster in {ahead} of {len(both)}."
    return text


def rivals_versions(environment: dict[str, str]) -> str:
    packages = {"nvidia-cudnn-frontend": "cuDNN Frontend", "flash-attn-4": "flash-attn-4"}
    found = [f"{name} {environment[package]}" for package, name in packages.items() if package in environment]
    return ", ".join([*found, versions(environment)])


def families() -> dict[str, tuple[Json, Json]]:
    """By mask of `families.py`, the rows of flashmask and FlexAttention in the newest run of both."""
    pairs: dict[str, tuple[Json, Json]] = {}
    for run in runs_of("attention_families_gpu"):
        cells = {(row["mask"], row["implementation"]): row for row in run["rows"] if "tflops" in row}
        both = dict.fromkeys(mask for mask, _ in cells if {(mask, OURS), (mask, FLEX)} <= cells.keys())
        pairs |= {mask: (cells[mask, OURS], cells[mask, FLEX]) for mask in both}
    return pairs


def families_headline() -> list[str]:
    """In a sentence: what attention under all of them gains."""
    ratios = [flex["milliseconds"]["total"] / ours["milliseconds"]["total"] for ours, flex in families().values()]
    if not ratios:
        return []
    return [
        f"**Masks of block diffusion, draft models, video and packed images** at the sizes of projects, "
        f"{len(ratios)} of them: {statistics.median(ratios):.2f} times FlexAttention in the median, "
        f"{min(ratios):.2f} to {max(ratios):.2f}. [Each of them](docs/performance.md).",
    ]


def families_section() -> list[str]:
    """The masks of `families.py` at the shapes of their projects."""
    pairs = families()
    if not pairs:
        return []
    run = runs_of("attention_families_gpu")[-1]
    body = []
    for mask, (ours, flex) in pairs.items():
        size = f"{ours['length']:,} x {ours.get('kv_length', ours['length']):,}"
        speeds = [f"{row['tflops']['total']:.0f}" for row in (ours, flex)]
        making = [f"{row['milliseconds']['mask']:.2f}" for row in (ours, flex)]
        ratio = flex["milliseconds"]["total"] / ours["milliseconds"]["total"]
        count = f"{ours['heads']}/{ours['kv_heads']}"
        body.append([mask, size, count, f"{ours['visible']:.1%}", *speeds, f"{ratio:.2f}", *making])
    environment = run["environment"]
    header = [
        "mask",
        "rows x keys",
        "heads",
        "visible",
        OURS,
        FLEX,
        "times",
        f"mask, ms: {OURS}",
        "compiled `create_block_mask`",
    ]
    return [
        f"**{environment['device']}**, the masks that people train today at the shapes of their projects, "
        f"{run['settings']['dtype']}, query and key heads of size {HEADLINE['head_dim']}: forward and backward, "
        f"TFLOP/s over the visible pairs, and the device's time to make the mask. {versions(environment)}",
        "",
        *table(header, body),
    ]


def example_steps_section(run: Json) -> list[str]:
    """A training step of the examples at the sizes of projects."""
    environment, rows = run["environment"], measured(run)
    steps: dict[str, dict[str, Json]] = {}
    for row in rows:
        steps.setdefault(row["workload"], {})[row["implementation"]] = row
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    body = []
    for workload, found in steps.items():
        cells = [
            f"{found[name]['milliseconds']:.0f} ({found[name]['peak_mib'] / 1024:.0f})" if name in found else "-"
            for name in names
        ]
        ours, flex = found.get(OURS), found.get(FLEX)
        ratios = [
            f"{flex['milliseconds'] / row['milliseconds']:.2f}" if flex and row else "-"
            for row in (ours, found.get(WITHOUT))
        ]
        making = [f"{row['mask_milliseconds']:.2f}" if row else "-" for row in (ours, flex)]
        is_checkpointed = run["settings"]["workloads"][workload]["is_checkpointed"]
        body.append([workload + (", checkpointing" if is_checkpointed else ""), *cells, *ratios, *making])
    return [
        f"**{environment['device']}**, a training step of [block_diffusion.py](../examples/block_diffusion.py) and of "
        f"[draft_model.py](../examples/draft_model.py) at the sizes of projects ([example_steps_gpu.py]"
        "(../benchmarks/example_steps_gpu.py)), which makes its mask anew: ms (peak GiB), "
        f"{run['settings']['dtype']}, AdamW, random weights; and ms to make the mask, of host and device together, "
        f"with flashmask's schedules. At most: how many times as fast as with {FLEX} a step is without attention. "
        f"{versions(environment)}",
        "",
        *table(["a step", *names, f"times {FLEX}", "at most", f"mask: {OURS}", "compiled `create_block_mask`"], body),
    ]


def shape_of(row: Json) -> tuple[int, int, int, int]:
    return row["length"], row["head_dim"], row["heads"], row["kv_heads"]


def shapes_table(rows: list[Json]) -> list[str]:
    body = []
    for shape in sorted({shape_of(row) for row in rows}):
        ratios = times_as_fast([row for row in rows if shape_of(row) == shape])
        if ratios:
            (mask, _), least = min(ratios.items(), key=lambda item: item[1])
            length, head_dim, count, kv_heads = shape
            mean = statistics.geometric_mean(ratios.values())
            least_on = f"{least:.2f} ({MASK_NAMES[mask]})"
            body.append(
                [f"{length:,}", f"{count}/{kv_heads}", str(head_dim), str(len(ratios)), f"{mean:.2f}", least_on]
            )
    return table(["tokens", "heads", "size", "masks", "geometric mean", "least"], body, left=0)


def mask_making(cells: dict[tuple[str, str], Json]) -> str:
    making = {key: row["milliseconds"] for key, row in cells.items() if "mask" in row["milliseconds"]}
    parts = {mask: time["mask"] / time["forward"] for (mask, name), time in making.items() if name == OURS}
    if "causal_document" not in parts:
        return ""
    times = ", ".join(
        f"{name} {time['mask']:.2f} ms" for (mask, name), time in making.items() if mask == "causal_document"
    )
    most = max(parts, key=parts.__getitem__)
    return (
        f"Time on the device to make the mask of packed documents, once a step: {times}. With flashmask this is "
        f"{parts['causal_document']:.1%} of the forward pass of one layer's attention; the largest share of any mask "
        f"is {parts[most]:.1%}, for {MASK_NAMES[most]}."
    )


def failures(run: Json, protocol: str) -> list[str]:
    """What did not run, and why."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in run["rows"]:
        if "error" in row and row["protocol"] == protocol:
            where = (
                f"{MASK_NAMES[row['mask']]} ({row['length']:,}, {row['heads']}/{row['kv_heads']}, {row['head_dim']})"
            )
            found.setdefault((row["implementation"], row["error"].splitlines()[0][:160]), []).append(where)
    lines = [f"- {peer}: `{error}` on {', '.join(where)}" for (peer, error), where in found.items()]
    lines += [f"- {peer}: {reason}" for peer, reason in run["settings"]["not_installed"].items()]
    return ["", "Not measured:", "", *lines] if lines else []


def paper_section(run: Json, published: Json) -> list[str]:
    """The paper's kernel tables, samples averaged, beside what its authors have published since."""
    rows = measured(run, protocol="paper")
    environment = run["environment"]
    lines = [
        f"**{environment['device']}**, {versions(environment)} The protocol of the FlashMask paper: bfloat16, 128K "
        "tokens in all, a hidden size of 4096, as many key heads as query heads. Forward and backward, TFLOP/s of the "
        f"tiles that are not hidden. *Published*: {published['source']}, {published['hardware']} "
        f"({published['protocol']}; their document mask was built from the wrong ends). A dash: the implementation "
        "cannot express the mask, or was not measured.",
    ]
    columns = {version: f"published, {version}" for version in ("V3", "V1")}
    authors = {(row["version"], row["length"], row["head_dim"], row["mask"]): row["total"] for row in published["rows"]}
    for length, head_dim in sorted({(row["length"], row["head_dim"]) for row in rows}):
        here = [row for row in rows if (row["length"], row["head_dim"]) == (length, head_dim)]
        names = [name for name in PEERS if any(row["implementation"] == name for row in here)]
        body = []
        ratios: dict[str, list[float]] = {name: [] for name in names}
        for mask in dict.fromkeys(row["mask"] for row in here):
            samples = [row for row in here if row["mask"] == mask]
            speeds = {name: average([row for row in samples if row["implementation"] == name]) for name in names}
            ours = speeds.get("flashmask")
            for name, speed in speeds.items():
                if ours and speed:
                    ratios[name].append(ours / speed)
            theirs = [authors.get((version, length, head_dim, mask)) for version in columns]
            sparsity = statistics.mean(row["tile_sparsity"] for row in samples)
            cells = [f"{speed:.0f}" if speed else "-" for speed in (*speeds.values(), *theirs)]
            body.append([MASK_NAMES[mask], f"{sparsity:.3f}", *cells])
        means = [f"{statistics.geometric_mean(found):.2f}" if found else "-" for found in ratios.values()]
        body.append(["flashmask, times as fast (geometric mean)", "", *means, *["-"] * len(columns)])
        lines += [
            "",
            f"{length:,} tokens, {4096 // head_dim} heads of size {head_dim}:",
            "",
            *table(["mask", "sparsity", *names, *columns.values()], body),
        ]
    return lines if rows else []


def short_rows_section(run: Json) -> list[str]:
    """Forward and backward where launches take time: on the device alone, and with the host's part."""
    rows = [row for row in measured(run, sample=0) if "end_to_end" in row["milliseconds"]]
    rows.sort(key=shape_of)
    cells = {(shape_of(row), row["mask"], row["implementation"]): row["milliseconds"] for row in rows}
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    body = []
    for shape, mask in dict.fromkeys((shape_of(row), row["mask"]) for row in rows):
        found = [cells.get((shape, mask, name)) for name in names]
        times = [f"{time['end_to_end']:.2f} ({time['total']:.2f})" if time else "-" for time in found]
        body.append([MASK_NAMES[mask], f"{shape[0]:,}", f"{shape[2]}/{shape[3]}", str(shape[1]), *times])
    title = "Short rows, forward and backward per layer of a stack: ms with the host's part (on the device alone):"
    return ["", title, "", *table(["mask", "tokens", "heads", "size", *names], body)] if body else []


def average(samples: list[Json]) -> float | None:
    """TFLOP/s of the tiles over several samples: all their work over all their time."""
    if not samples:
        return None
    times = [row["milliseconds"]["total"] for row in samples]
    return sum(row["tflops_tiles"]["total"] * time for row, time in zip(samples, times)) / sum(times)


def training_section(run: Json) -> list[str]:
    environment, settings = run["environment"], run["settings"]
    rows = training_rows(run)
    longest = {(row["shape"], row["implementation"]): row["longest"] for row in measured(run, workload="longest")}
    if not rows:
        return []
    cells = {(training_group(row), row["implementation"]): row for row in rows}
    names = training_names(rows)
    body = []
    for group in training_groups(rows):
        found = [cells.get((group, name)) for name in names]
        steps = [f"{row['tokens_per_second']:,} ({row['peak_mib'] / 1024:.0f})" if row else "-" for row in found]
        speed = {name: row["tokens_per_second"] for name, row in zip(names, found) if row}
        ratio = f"{speed[OURS] / speed[FLEX]:.2f}" if OURS in speed and FLEX in speed else "-"
        shape, length, workload = group
        body.append([shape_name(settings, shape), row_name(length, workload), *steps, ratio])
    for shape in dict.fromkeys(shape for shape, _ in longest):
        fits = [f"{longest[shape, name]:,}" if (shape, name) in longest else "-" for name in names]
        body.append([shape_name(settings, shape), "longest row", *fits, ""])
    return [
        f"**{environment['device']}**, training on packed documents (median {settings['median_document']} tokens, "
        f"a new packing each step), bfloat16, gradient checkpointing, AdamW, vocabulary {settings['vocabulary']:,}, "
        "random weights. Tokens per second (peak GiB). Rows of whole documents have a different length each step, so "
        f"`{FLEX}` runs kernels for any length. {versions(environment)}",
        "",
        *table(["model", "tokens of a row", *names, f"times {FLEX}"], body),
        *picture("training", "Tokens per second of training on packed documents"),
    ]


def training_rows(run: Json) -> list[Json]:
    return [row for row in measured(run) if row["workload"] in ROW_NAMES]


def row_name(length: int, workload: str) -> str:
    return ROW_NAMES[workload].format(f"{length:,}")


def training_group(row: Json) -> tuple[str, int, str]:
    return row["shape"], row["length"], row["workload"]


def training_groups(rows: list[Json]) -> list[tuple[str, int, str]]:
    return sorted({training_group(row) for row in rows})


def training_names(rows: list[Json]) -> list[str]:
    """The implementations, the fastest first."""
    return list(dict.fromkeys(row["implementation"] for row in sorted(rows, key=lambda row: -row["tokens_per_second"])))


def shape_name(settings: Json, shape: str) -> str:
    name = {"1b": "Llama 3.2 1B's shape", "8b": "Llama 3.1 8B's shape"}[shape]
    return f"{name}, {settings['shapes'][shape]['num_hidden_layers']} layers"


def parallel_section(run: Json) -> list[str]:
    """Training on several GPUs: what was measured, beside what the model of costs says, and what it says of more."""
    environment, settings = run["environment"], run["settings"]
    rows = sorted((row for row in run["rows"] if row["workload"] != BANDWIDTH), key=place_among_ways)
    steps = {row["workload"]: step_of(settings, row) for row in measured_ways(rows) if row["way"] == ONE_GPU}
    body = []
    for row in rows:
        guess = prediction(row["way"], steps.get(row["workload"]), row["gpus"], links_of(run))
        body.append(
            [workload_name(row), row["way"], *figures_of_way(row), f"{guess.milliseconds:.0f}" if guess else "-"]
        )
    header = ["model", "way", "tokens/s", "GiB", "step, ms", "attention", "balance", "exposed", "predicted step"]
    return [
        f"**{rows[0]['gpus']} x {environment['device']}**, bfloat16, gradient checkpointing, AdamW, vocabulary "
        f"{settings['vocabulary']:,}, random weights, NCCL {settings['nccl']}. {versions(environment)} All ways but "
        f"`{ONE_GPU}` shard the weights by FSDP2; `data parallel` has a row for each GPU. `attention` are its kernels "
        "on the rank where they take longest, `balance` is that over the mean, `exposed` is the time in which nothing "
        "but collectives runs (with waits for the other rank), all in ms. *Predicted*: from the step of one GPU, the "
        "visible tiles and the bytes on the wire, by `benchmarks/parallel_cost.py`.",
        "",
        *table(header, body, left=2),
    ]


def measured_again(run: Json) -> list[str]:
    """Ways in runs after that of the table, without one GPU to compare with."""
    lines = []
    for other in runs_of("parallel_gpu"):
        if other["environment"]["updated"] > run["environment"]["updated"]:
            speeds: dict[str, list[str]] = {}
            for row in measured_ways(other["rows"]):
                speeds.setdefault(workload_name(row), []).append(f"`{row['way']}` {row['tokens_per_second']:,}")
            date = other["environment"]["date"]
            lines += [f"\nMeasured again, {date}: {name}: {', '.join(ways)} tokens/s." for name, ways in speeds.items()]
    return lines


def links_of(run: Json) -> Links | None:
    bandwidth = next((row for row in run["rows"] if row["workload"] == BANDWIDTH and "error" not in row), None)
    return Links(bandwidth["all_to_all"]) if bandwidth else None


def measured_ways(rows: list[Json]) -> list[Json]:
    return [row for row in rows if "error" not in row and "attention" in row]


def place_among_ways(row: Json) -> tuple[str, int]:
    return row["workload"], list(WAYS).index(row["way"])


def workload_name(row: Json) -> str:
    workload = Workload.parse(row["workload"])
    name = {"1b": "Llama 3.2 1B's shape", "8b": "Llama 3.1 8B's shape"}.get(workload.shape, workload.shape)
    documents = "one document" if workload.documents == "one" else "packed documents"
    return f"{name}, {workload.layers} layers, {workload.length:,} tokens, {documents}"


def figures_of_way(row: Json) -> list[str]:
    if "error" in row:
        return ["out of memory" if row["error"].startswith("OutOfMemory") else row["error"].split(":")[0], *["-"] * 5]
    times = [f"{max(row[name]):.0f}" if name in row else "-" for name in ("attention", "exposed")]
    balance = f"{row['balance']:.2f}" if "balance" in row else "-"
    memory = f"{max(row['peak_mib']) / 1024:.0f}"
    return [f"{row['tokens_per_second']:,}", memory, f"{row['milliseconds']:.0f}", times[0], balance, times[1]]


def step_of(settings: Json, row: Json) -> Step:
    workload = Workload.parse(row["workload"])
    balance = partial(imbalance, workload.lengths(seed=0))
    attention = statistics.mean(row["attention"])
    return Step(row["milliseconds"], attention, workload.length, model_of(settings, row), balance)


def model_of(settings: Json, row: Json) -> Model:
    return Model.of(settings["shapes"][row["shape"]], row["layers"], settings["vocabulary"])


def prediction(way: str, step: Step | None, ranks: int, links: Links | None) -> Prediction | None:
    if step is None or links is None or way not in PREDICTED_WAYS:
        return None
    return predict(step, Group(way, 1, ranks), links)


PREDICTED_WAYS = ("data parallel", "ulysses", "all_gather")
PREDICTED_LENGTHS = (131072, 262144, 1048576)
PREDICTED_MODELS = {"1b": 16, "8b": 32}
"""Shapes, with all layers of the models that have them."""
PREDICTED_MASKS = ("one document", "packed documents")
MEMORY = 139
"""GiB of an H200."""


class Simulation:
    """What `parallel_scaling.py` has counted, with constants that one GPU of a run has measured."""

    def __init__(self, scaling: Json, run: Json) -> None:
        self.rows, self.settings = scaling["rows"], run["settings"]
        self.costs = {row["head_dim"]: TileCost(row["full_us"], row["cut_us"]) for row in self.of("tile")}
        links = links_of(run)
        assert links is not None
        self.links = links
        ones = [row for row in measured_ways(run["rows"]) if row["way"] == ONE_GPU]
        self.constants: Constants = calibrate(
            Measured(
                row["shape"],
                model_of(run["settings"], row),
                row["length"],
                row["milliseconds"] - statistics.mean(row["attention"]),
                max(row["peak_mib"]),
            )
            for row in ones
        )

    def of(self, what: str, **wanted: Any) -> list[Json]:
        found = [row for row in self.rows if row["what"] == what]
        return [row for row in found if all(row[name] == wanted[name] for name in wanted)]

    def balance(self, mask: str, length: int, kind: str, ranks: int, cut: str = "dealt") -> float:
        """`kind`: "tiles", or "time" with the size of heads."""
        if ranks == 1:
            return 1.0
        return self.of("balance", mask=mask, length=length, ranks=ranks, cut=cut)[0][kind]

    def model(self, shape: str) -> Model:
        return Model.of(self.settings["shapes"][shape], PREDICTED_MODELS[shape], self.settings["vocabulary"])

    def step(self, shape: str, model: Model, mask: str, length: int) -> Step:
        (row,) = self.of("row", mask=mask, length=length)
        cost = self.costs[model.head_dim]
        of_head = (row["visible"] - row["cut"]) * cost.full + row["cut"] * cost.cut
        attention = 1e-3 * model.layers * model.heads * of_head
        balance = partial(self.balance, mask, length, f"time_{model.head_dim}")
        return self.constants.step(shape, model, length, attention, balance)

    def best(self, step: Step, ranks: int) -> Group:
        """What moves least, as `mode="auto"` takes it in a node; across nodes both together."""
        if ranks > GPUS_OF_A_NODE:
            return Group.of(ACROSS_ULYSSES, ranks)
        groups = [Group.of(way, ranks) for way in ("ulysses", "all_gather")]
        return min(groups, key=lambda group: group.sent(step.model, step.length).inside)


def scaling_section(scaling: Json, run: Json) -> list[str]:
    """What more GPUs should do: balance and volumes by simulation, times and memory by the model of costs."""
    simulation = Simulation(scaling, run)
    return [
        "## Predicted for 4 to 64 GPUs",
        "",
        "**Predicted, not measured**, but for what the first table compares. "
        "[parallel_scaling.py](../benchmarks/parallel_scaling.py) cuts real rows for so many ranks and counts tiles, "
        f"on a CPU. {versions(scaling['environment'])} [parallel_cost.py](../benchmarks/parallel_cost.py) makes steps "
        "and memory of it. Its constants come from one GPU alone, and what a tile takes from the speed of attention "
        f"under each mask. {simulation.links.inside:.0f} GB/s between GPUs of a node were measured on two; "
        f"{simulation.links.across:.0f} GB/s from each GPU to other nodes are assumed, and nodes have "
        f"{GPUS_OF_A_NODE} GPUs. It knows neither the host's launches, which bound steps of a few ms for a layer, nor "
        "waits for slower ranks, and rather says too little than too much.",
        "",
        "The model against what two GPUs and one have measured:",
        "",
        *table(
            ["model", "way", "step, ms", "predicted", "error", "GiB", "predicted", "error"],
            list(compared_with_measured(simulation, run)),
            left=2,
        ),
        "",
        "**Balance**, the busiest rank over the mean, by tiles of 128 x 128; *by time* counts a cut tile "
        f"{ratio_of_tiles(simulation, 128)} times as much as a full one, as heads of 128 take, *64* "
        f"{ratio_of_tiles(simulation, 64)} times. Packed documents have a median of 700 tokens, long ones are "
        f"{long_documents_name(scaling)}, windows {scaling['settings']['window']:,} tokens, and prompts eight answers "
        "each. Ulysses is at 1.00 where heads share a mask.",
        "",
        *balance_table(simulation),
        "",
        deal_in_words(simulation),
        "",
        "**Sent by a GPU** in a layer and a step, MiB, forward, forward again and backward:",
        "",
        *volume_table(simulation),
        "",
        "**Steps and memory**, by the way that moves least; `times` are multiples of one GPU's rate, which it would "
        f"have if its memory sufficed. More than the {MEMORY} GiB of an H200 are bold. Packed rows gain no more on 64 "
        "GPUs where the weights, which FSDP gathers across nodes, take longer than the computation.",
        "",
        *speed_table(simulation),
        *picture("parallel_scaling", "Predicted rate of each GPU, and balance of three cuts"),
    ]


def beside_prediction(measured: float, predicted: float) -> list[str]:
    """Both, and the error. A model that was fitted to a figure misses it by a rounding, of either sign."""
    error = round(predicted / measured - 1, 2) + 0.0
    return [f"{measured:.0f}", f"{predicted:.0f}", f"{error:+.0%}"]


def compared_with_measured(simulation: Simulation, run: Json) -> Iterator[list[str]]:
    masks = {"one": "one document", "packed": "packed documents"}
    for row in sorted(run["rows"], key=lambda row: row["workload"]):
        if row["way"] not in (ONE_GPU, *PREDICTED_WAYS):
            continue
        ranks = 1 if row["way"] == ONE_GPU else row["gpus"]
        model, group = model_of(run["settings"], row), Group(row["way"], 1, ranks)
        step = simulation.step(row["shape"], model, masks[row["documents"]], row["length"])
        guess = step.milliseconds if ranks == 1 else predict(step, group, simulation.links).milliseconds
        peak = simulation.constants.peak(model, row["length"], group, shards_weights=ranks > 1) / 1024
        if "error" in row:
            figures = [figures_of_way(row)[0], f"{guess:.0f}", "-", "-", f"{peak:.0f}", "-"]
        else:
            held = max(row["peak_mib"]) / 1024
            figures = [*beside_prediction(row["milliseconds"], guess), *beside_prediction(held, peak)]
        yield [workload_name(row), row["way"], *figures]


def ratio_of_tiles(simulation: Simulation, head_dim: int) -> str:
    cost = simulation.costs[head_dim]
    return f"{cost.cut / cost.full:.2f}"


def long_documents_name(scaling: Json) -> str:
    given = scaling["settings"]["documents"] == "given"
    return "those of the paper's benchmark (drawn alike past 128K)" if given else "a dozen in each row"


def balance_table(simulation: Simulation) -> list[str]:
    columns = [("contiguous", 8), ("contiguous", 64), ("zigzag", 8), ("zigzag", 64)]
    columns += [("dealt", ranks) for ranks in (2, 4, 8, 64)]
    body = []
    for row in simulation.of("row"):
        what = row["mask"], row["length"]
        if row["length"] not in (32768, *PREDICTED_LENGTHS):
            continue
        cells = [simulation.balance(*what, "tiles", ranks, cut) for cut, ranks in columns]
        cells += [simulation.balance(*what, f"time_{dim}", 64) for dim in (128, 64)]
        body.append([f"{row['mask']}, {row['length']:,} tokens", *(f"{cell:.2f}" for cell in cells)])
    header = [f"{cut}, {ranks}" for cut, ranks in columns]
    return table(["row", *header, "dealt, 64, by time", "64"], body)


def deal_in_words(simulation: Simulation) -> str:
    longest = max(row["length"] for row in simulation.of("deal"))
    found = simulation.of("deal", length=longest, ranks=64)[0]
    most = max(row["operations"] for row in simulation.of("deal"))
    return (
        f"Dealing a row of {longest:,} tokens to 64 ranks takes {found['milliseconds']:,.0f} ms on a busy CPU of two "
        f"cores; on a GPU it is {found['operations']} operations of torch without a wait, and at most {most} for "
        "shorter rows, views included."
    )


def volume_table(simulation: Simulation) -> list[str]:
    groups = {
        "Ulysses, 8": Group.of("ulysses", 8),
        "all-gather, 8": Group.of("all_gather", 8),
        "2 x 4": Group.of(ACROSS_ULYSSES, 8, inside=4),
        "8 x 8: in the node": Group.of(ACROSS_ULYSSES, 64),
    }
    body = []
    for shape in PREDICTED_MODELS:
        model = simulation.model(shape)
        for length in PREDICTED_LENGTHS:
            sent = [group.sent(model, length) for group in groups.values()]
            cells = [PASSES * part / 2**20 for part in (*(each.inside for each in sent), sent[-1].across)]
            body.append([f"{shape.upper()}, {length:,} tokens", *(f"{cell:,.0f}" for cell in cells)])
    return table(["row", *groups, "across nodes"], body)


def speed_table(simulation: Simulation) -> list[str]:
    body = []
    for shape, mask, length in predicted_rows():
        step = simulation.step(shape, simulation.model(shape), mask, length)
        alone = simulation.constants.peak(step.model, length, Group(ONE_GPU, 1, 1), shards_weights=False)
        cells = [f"{1e3 * length / step.milliseconds:,.0f}", gib(alone)]
        for ranks in (2, 4, 8, 64):
            group = simulation.best(step, ranks)
            guess = predict(step, group, simulation.links)
            cells += [
                f"{step.milliseconds / guess.milliseconds:.1f}",
                gib(simulation.constants.peak(step.model, length, group)),
            ]
            if ranks == 64:
                cells.append(f"{1e3 * length / guess.milliseconds:,.0f}")
        body.append([f"{shape.upper()}, {step.model.layers} layers, {length:,} tokens, {mask}", *cells])
    of_several = [name for ranks in (2, 4, 8, 64) for name in (f"{ranks} GPUs, times", "GiB")]
    return table(["row", "one GPU, tokens/s", "GiB", *of_several, "64 GPUs, tokens/s"], body)


def predicted_rows() -> list[tuple[str, str, int]]:
    return [(s, mask, length) for s in PREDICTED_MODELS for mask in PREDICTED_MASKS for length in PREDICTED_LENGTHS]


def gib(mib: float) -> str:
    return f"{mib / 1024:.0f}" if mib / 1024 <= MEMORY else f"**{mib / 1024:,.0f}**"


def draw_scaling(scaling: Json, run: Json) -> None:
    simulation = Simulation(scaling, run)
    figure, (rate, balance) = plt.subplots(1, 2, figsize=(10, 3.9), layout="constrained")
    gpus = (1, 2, 4, 8, 64)
    for mask, style in zip(PREDICTED_MASKS, ("-", "--")):
        for number, length in enumerate(PREDICTED_LENGTHS):
            step = simulation.step("8b", simulation.model("8b"), mask, length)
            times = [step.milliseconds] + [
                predict(step, simulation.best(step, ranks), simulation.links).milliseconds for ranks in gpus[1:]
            ]
            shares = [100 * times[0] / ranks / time for ranks, time in zip(gpus, times)]
            label = f"{length // 1024:,}K, {mask}"
            rate.plot(gpus, shares, style, color=f"C{number}", marker="o", markersize=2, label=label)
    rate.set(xlabel="GPUs", ylabel="% of one GPU's rate, each", ylim=(0, 105))
    for cut, style in (("contiguous", ":"), ("zigzag", "--"), ("dealt", "-")):
        for number, length in enumerate(PREDICTED_LENGTHS):
            found = [simulation.balance("packed documents", length, "time_128", ranks, cut) for ranks in gpus]
            label = f"{length // 1024:,}K, {cut}"
            balance.plot(gpus, found, style, color=f"C{number}", marker="o", markersize=2, label=label)
    balance.set(xlabel="ranks", ylabel="busiest rank / mean")
    rate.set_title("Predicted: 8B's shape, 32 layers", loc="left")
    balance.set_title("Simulated: balance of packed documents", loc="left")
    for axes in (rate, balance):
        axes.set_xscale("log", base=2)
        axes.set_xticks(gpus, map(str, gpus))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=7, handlelength=4)
    figure.savefig(PICTURE.parent / "parallel_scaling.png", dpi=150)
    plt.close(figure)


def masking_section(result: Json) -> list[str]:
    """What a training step does about masks, at the length nearest to the headline's."""
    rows = result["rows"]
    length = min({row["length"] for row in rows}, key=lambda length: abs(length - HEADLINE["length"]))
    cells = {(row["mask"], row["implementation"]): row for row in rows if row["length"] == length}
    peers = list(dict.fromkeys(row["implementation"] for row in rows))

    def cost(row: Json | None) -> str:
        if row is None:
            return "-"
        times, memory = row["milliseconds"], row["peak_mib"]
        return f"{times['device']:.2f} / {times['host']:.2f} ms, {row['launches']}, {row['reads']}, {memory:.1f} MiB"

    body = [[mask, *(cost(cells.get((mask, peer))) for peer in peers)] for mask in dict.fromkeys(m for m, _ in cells)]
    return [
        f"Cost of the masks of a step that Transformers asks for, {length:,} tokens: device / host time, launches, "
        f"waits of the host for the device, memory. {versions(result['environment'])}",
        "",
        *table(["masks", *peers], body),
    ]


def decoding_section(result: Json) -> list[str]:
    """What one layer takes for one new token."""
    times: dict[tuple[str, int, int, str], float] = {
        (row["model"], row["length"], row["batch"], row["implementation"]): row["milliseconds"]["device"]
        for row in result["rows"]
    }
    lengths = sorted({length for _, length, _, _ in times})
    batches = sorted({batch for _, _, batch, _ in times})

    def cell(model: str, length: int, peer: str) -> str:
        found = [times.get((model, length, batch, peer)) for batch in batches]
        return " / ".join(f"{1e3 * time:,.0f}" for time in found if time is not None) or "-"

    peers = [OURS, "flashmask, kernel for many rows", "eager", "sdpa"]
    models = dict.fromkeys(model for model, _, _, _ in times)
    body = [
        [model, f"{length:,}", *(cell(model, length, peer) for peer in peers)]
        for model in models
        for length in lengths[1:]
    ]
    environment = result["environment"]
    return [
        f"**{environment['device']}**, one layer's attention of one new token a sequence against a cache, us on the "
        f"device, batch {' / '.join(map(str, batches))}. `sdpa` has neither sinks nor softcap. Layers with a window "
        "have a cache here that keeps all keys; against one that keeps the window alone, `eager` and `sdpa` take as "
        f"long as at the length of the window. {versions(environment)}",
        "",
        *table(["layer of", "keys", OURS, "the kernel for many rows", "eager", "sdpa"], body),
    ]


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
        f"| | answers | vocabulary | {SHARED} | {' | '.join(peers)} | speedup over the fastest |",
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
        f"Finding the trees of {merge['rows']} rows takes {merge['host_milliseconds']:.1f} ms, once per forward pass. "
        "A DPO step over the part of each sequence that is shared:",
        "",
        f'<img src="{PICTURE.name}" width="480" alt="Speed of a DPO step over the shared part of its sequences">',
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


def draw_speed_per_mask(run: Json) -> None:
    rows = measured(run, protocol="bar", sample=0, **HEADLINE)
    masks = [row["mask"] for row in rows if row["implementation"] == OURS][::-1]
    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    for offset, name, color in ((0.2, OURS, "tab:blue"), (-0.2, FLEX, "0.7")):
        speed = {row["mask"]: row["tflops"]["total"] for row in rows if row["implementation"] == name}
        places = [index + offset for index, mask in enumerate(masks) if mask in speed]
        axes.barh(places, [speed[mask] for mask in masks if mask in speed], 0.4, label=name, color=color)
    axes.set_yticks(range(len(masks)), [MASK_NAMES[mask] for mask in masks])
    axes.set(xlabel="TFLOP/s over the visible pairs, forward and backward")
    finish(figure, axes, "speed_per_mask", f"{HEADLINE['length']:,} tokens")


def draw_speed_over_sparsity(run: Json) -> None:
    """The paper's linear law: time falls with the part of the tiles that is hidden."""
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for mask in ("causal_document", "document", "share_question"):
        rows = sorted(measured(run, protocol="sparsity", implementation=OURS, mask=mask), key=sparsity_of)
        axes.plot(
            [row["tile_sparsity"] for row in rows],
            [row["milliseconds"]["total"] for row in rows],
            "o-",
            label=MASK_NAMES[mask],
        )
    axes.set(xlabel="hidden part of all tiles", ylabel="ms, forward and backward", xlim=(0, 1), ylim=(0, None))
    finish(figure, axes, "speed_over_sparsity", "Time over sparsity")


def sparsity_of(row: Json) -> float:
    return row["tile_sparsity"]


def packed_documents(run: Json) -> list[Json]:
    """Rows of any length with the heads of the headline."""
    shape = {name: size for name, size in HEADLINE.items() if name != "length"}
    return measured(run, protocol="bar", sample=0, mask="causal_document", **shape)


def draw_memory_over_length(run: Json) -> None:
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    rows = packed_documents(run)
    for name in dict.fromkeys(row["implementation"] for row in rows):
        found = sorted((row["length"], row["peak_mib"]) for row in rows if row["implementation"] == name)
        axes.plot(*zip(*found), "o-", label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set(xlabel="tokens", ylabel="MiB above the inputs")
    finish(figure, axes, "memory_over_length", "Peak memory, forward and backward, packed documents")


def draw_training(run: Json) -> None:
    rows = training_rows(run)
    groups, names = training_groups(rows), training_names(rows)
    width = 0.8 / len(names)
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for index, name in enumerate(names):
        speed = {training_group(row): row["tokens_per_second"] for row in rows if row["implementation"] == name}
        places = [place + index * width for place, group in enumerate(groups) if group in speed]
        axes.bar(places, [speed[group] for group in groups if group in speed], width, label=name)
    labels = [
        f"{shape.upper()}, {row_name(length, workload)}".replace(", ", "\n") for shape, length, workload in groups
    ]
    axes.set_xticks([place + 0.4 - width / 2 for place in range(len(groups))], labels)
    axes.set(ylabel="tokens per second")
    finish(figure, axes, "training", "Training on packed documents")


def finish(figure: Any, axes: Any, name: str, title: str) -> None:
    axes.set_title(title, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside lower center", ncols=3)
    figure.savefig(PICTURE.parent / f"{name}.png", dpi=150)
    plt.close(figure)


def heads(settings: dict[str, Any]) -> str:
    shape = f"{settings['heads']} query and {settings['kv_heads']} key heads of size {settings['head_dim']}"
    return f"{settings['dtype']}, {shape}"


def versions(environment: dict[str, str]) -> str:
    return f"torch {environment['torch']}, Triton {environment['triton']}, {environment['date']}."


def results(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def readme_section() -> str:
    """The tables of the front page; all others are in docs/performance.md."""
    attention, training, shared = headline_run(), training_run(), results("shared_prompts_gpu")
    rivals = rivals_runs()
    sections = (
        steps_section(training, shared) if training else [],
        masks_section(attention) if attention else [],
        families_headline(),
        rivals_headline(rivals) if rivals else [],
    )
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


FRONT_PEERS = {"FlexAttention": FLEX, "FlashAttention-2 varlen": "FA2 varlen", "SDPA": "sdpa"}
"""Of the front page, with their names in results of training."""


def steps_section(training: Json, shared: Json) -> list[str]:
    """Training steps, end to end, as multiples of what the others reach."""
    body = []
    for group in training_groups(rows := training_rows(training)):
        speeds = {row["implementation"]: row["tokens_per_second"] for row in rows if training_group(row) == group}
        shape, length, workload = group
        name = f"{shape_name(training['settings'], shape)}: packed rows of {row_name(length, workload)}"
        body.append([name, f"{speeds[OURS]:,} tokens/s", *times(speeds[OURS], speeds, FRONT_PEERS.values())])
    peers = ("flash_attention_2 varlen", "sdpa")
    steps = [row for row in shared["rows"] if row["workload"] in WORKLOADS and row["prompt"] == 2048]
    for workload in ("dpo", "update"):
        found = [row for row in steps if row["workload"] == workload and row["vocabulary"] == 128_256]
        speeds = {row["implementation"]: 1 / row["milliseconds"] for row in found}
        name = f"`share_prefixes`, {found[0]['answers']} answers a prompt: {WORKLOADS[workload]}"
        body.append([name, f"{1 / speeds[SHARED]:.0f} ms", "-", *times(speeds[SHARED], speeds, peers)])
    return [
        f"**End to end**: how many times as fast a training step is with flashmask. Packed rows on an "
        f"{training['environment']['device']}, shared prompts on an {shared['environment']['device']}.",
        "",
        *table(["a training step", OURS, *FRONT_PEERS], body),
    ]


def masks_section(run: Json) -> list[str]:
    """Attention alone under each mask, as multiples of what the others reach."""
    shown = measured(run, protocol="bar", sample=0, **HEADLINE)
    peers = {**FRONT_PEERS, "SDPA": "sdpa, dense mask", "cuDNN": "cuDNN"}
    body = []
    for mask in dict.fromkeys(row["mask"] for row in shown):
        found = [row for row in shown if row["mask"] == mask]
        speeds = {row["implementation"]: row["tflops"]["total"] for row in found}
        if OURS in speeds:
            ours = f"{speeds[OURS]:.0f} TFLOP/s"
            body.append(
                [MASK_NAMES[mask], f"{found[0]['visible']:.0%}", ours, *times(speeds[OURS], speeds, peers.values())]
            )
    return [
        f"**Attention alone**: how many times as fast flashmask is, forward and backward, on an "
        f"{run['environment']['device']}: {heads(run['settings'] | HEADLINE)}, {HEADLINE['length']:,} tokens.",
        "",
        *table(["mask", "visible", OURS, *peers], body),
    ]


def rivals_headline(runs: list[Json]) -> list[str]:
    """The longest rows beside the fastest CUDA kernels, over all masks that one run has of both, the newest such."""
    run = runs[-1]
    cases = [by_shape_and_mask(rivals_rows(run)) for run in runs]
    length = max(shape[0] for shapes in cases for shape in shapes)
    pairs = {name: (OURS, name) for name in (CUDNN_FLEX, "FA4 varlen", FLEX)}
    pairs["deterministic: " + CUDNN_FLEX] = RIVALS[1], RIVALS[3]
    body = []
    for shape in sorted({shape for shapes in cases for shape in shapes if shape[0] == length}):
        ratios = [ratio_over_masks([shapes.get(shape, {}) for shapes in cases], *pair) for pair in pairs.values()]
        body.append([f"{shape[1]}, {shape[2]}/{shape[3]} heads", *ratios])
    return [
        f"**Beside the fastest CUDA kernels**: how many times as fast flashmask is, forward and backward, on an "
        f"{run['environment']['device']}, {run['settings']['dtype']}, {length:,} tokens. The median over the masks "
        "that both can express, and the range; below 1 the other is faster. Each mask: "
        f"[performance](docs/performance.md). {rivals_versions(run['environment'])}",
        "",
        *table(["size of a head", *pairs], body),
    ]


def ratio_over_masks(runs: Iterable[dict[str, dict[str, Json]]], ours: str, theirs: str) -> str:
    """Of the times of both passes, theirs over ours, of each mask in the newest run that has both.

    Args:
        runs: rows by mask and implementation of each, the newest last.
    """
    by_mask = {
        mask: found[theirs]["milliseconds"]["total"] / found[ours]["milliseconds"]["total"]
        for masks in runs
        for mask, found in masks.items()
        if {ours, theirs} <= found.keys()
    }
    ratios = by_mask.values()
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else "-"


def times(ours: float, speeds: dict[str, float], peers: Iterable[str]) -> list[str]:
    return [f"{ours / speeds[peer]:.2f}" if peer in speeds else "-" for peer in peers]


def speed_sections() -> list[str]:
    """Every table of speed that is not of the paper's protocol."""
    attention, training, steps = headline_run(), training_run(), latest_run("example_steps_gpu")
    masking, rivals = RESULTS / "masking_gpu.json", rivals_runs()
    sections = (
        attention_section(attention) if attention else [],
        [*rivals_section(rivals), *(failures(rivals[-1], "bar") if rivals[-1] != attention else [])] if rivals else [],
        families_section(),
        example_steps_section(steps) if steps else [],
        decoding_section(results("decoding_gpu")),
        masking_section(results(masking.stem)) if masking.exists() else [],
        training_section(training) if training else [],
        shared_prompts_section(results("shared_prompts_gpu")),
        cpu_section(results("attention_cpu")),
    )
    return [line for lines in sections if lines for line in (*lines, "")]


def headline_run() -> Json | None:
    """The newest run with the whole table of masks and the implementations that torch brings."""
    return latest_run(
        "attention_gpu", protocol="bar", mask="full", sample=0, implementation="sdpa, dense mask", **HEADLINE
    )


def rivals_runs(folder: Path = RESULTS) -> list[Json]:
    """The runs that have measured cuDNN Frontend's kernels and ours, the newest last."""
    return [
        run
        for run in runs_of("attention_gpu", folder)
        if {OURS, CUDNN_FLEX} <= {row["implementation"] for row in measured(run, protocol="bar", sample=0)}
    ]


def training_run() -> Json | None:
    """The newest with both shapes."""
    return latest_run("training_gpu", shape="8b")


def lengths_run() -> Json | None:
    """The newest with packed documents of several lengths."""
    runs = [run for run in runs_of("attention_gpu") if len({row["length"] for row in packed_documents(run)}) > 2]
    return runs[-1] if runs else None


def performance_section() -> str:
    paper, sparsity = (latest_run("attention_gpu", protocol=name) for name in ("paper", "sparsity"))
    bar = headline_run()
    lines = speed_sections()
    if paper:
        lines += [*paper_section(paper, json.loads(PUBLISHED.read_text())), *failures(paper, "paper")]
    for name, alternative, is_there in (
        ("speed_over_sparsity", "Time over the hidden part of all tiles", sparsity is not None),
        ("memory_over_length", "Peak memory over the length of the row", lengths_run() is not None),
    ):
        if is_there:
            lines += ["", f"![{alternative}]({name}.png)"]
    short = latest_run("attention_gpu", protocol="bar", length=1024)
    lines += short_rows_section(short) if short else []
    return "\n".join([*lines, *(failures(bar, "bar") if bar else [])]).strip()


def many_gpus_section() -> str:
    run = parallel_run()
    if run is None:
        return "Not measured yet."
    predicted = scaling_section(results("parallel_scaling"), run)
    return "\n".join([*parallel_section(run), *measured_again(run), "", *predicted])


def parallel_run() -> Json | None:
    return latest_run("parallel_gpu", way=ONE_GPU)


def draw() -> None:
    draw_shared_prompts(results("shared_prompts_gpu"))
    bar, sparsity = headline_run(), latest_run("attention_gpu", protocol="sparsity")
    training = training_run()
    if bar:
        draw_speed_per_mask(bar)
    if sparsity:
        draw_speed_over_sparsity(sparsity)
    if lengths := lengths_run():
        draw_memory_over_length(lengths)
    if training and training_rows(training):
        draw_training(training)
    if several := parallel_run():
        draw_scaling(results("parallel_scaling"), several)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    arguments = parser.parse_args()
    pages = ((README, readme_section()), (PERFORMANCE, performance_section()), (MANY_GPUS, many_gpus_section()))
    for page, section in pages:
        text = page.read_text()
        updated = f"{text.split(BEGIN)[0]}{BEGIN}\n{section}\n{END}{text.split(END)[1]}"
        if not arguments.check:
            page.write_text(updated)
        elif updated != text:
            sys.exit(f"{page.name} differs from what benchmarks/results/ say")
    if not arguments.check:
        draw()


if __name__ == "__main__":
    main()
