"""The examples, run as a user runs them."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import processes
import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from hf_flashmask.bounds import anchored_blocks, block_diffusion
from hf_flashmask.sharing.prefix_tree import PrefixTree, merge_prefixes
from hf_flashmask.training import SharedPromptDataCollator, TurnsDataCollator

SCRIPT = Path(__file__).parents[1] / "examples/sft_packed.py"
SMALL = ["--steps", "6", "--batch-size", "4", "--max-length", "128", "--hidden-size", "64", "--layers", "1"]

needs_trl = pytest.mark.skipif(sys.version_info < (3, 11), reason="there is no trl for Python 3.10")


@pytest.fixture
def sft_packed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs examples/sft_packed.py in this process; returns its report."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("sft_packed", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def run(*arguments: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *SMALL, "--output", str(tmp_path / "out"), *arguments])
        module.main()
        return json.loads((tmp_path / "out/report.json").read_text())

    return run


@pytest.fixture(scope="module")
def small_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A part of the standard library: reading all of it takes longer than everything else in an example."""
    folder, library = tmp_path_factory.mktemp("library"), Path(sysconfig.get_paths()["stdlib"])
    for package in ("asyncio", "concurrent", "email", "http", "json", "logging", "unittest", "xml"):
        shutil.copytree(library / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture
def run_script(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, small_library: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs an example as `python examples/NAME` does, in this process, on its own texts; returns what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(small_library)})

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments, "--output", "out"])
        runpy.run_path(str(SCRIPT.with_name(name)), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    """A file of documents with two columns of text."""
    words = ("the", "mask", "of", "a", "packed", "row", "keeps", "its", "documents", "apart", "from", "one", "another")
    lengths = torch.randint(2, 60, (24,)).tolist()
    rows = [{"title": f"{n}", "body": " ".join(words[(n * i) % len(words)] for i in range(n))} for n in lengths]
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_sft_packed_runs_in_a_process_of_its_own(documents: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), *SMALL, "--dataset", str(documents), "--text-column", "body"]
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "The two runs agree" in process.stdout
    assert "step 6 of 6, loss " in process.stdout
    for output in (process.stdout, process.stderr):  # a log file, not hundreds of pieces of progress bars
        assert len(output) < 5000
        assert "\r" not in output
    assert (tmp_path / "runs/sft_packed/report.json").exists()


def test_sft_packed_trains_as_padded_eager_does(run_script: Callable[..., str], tmp_path: Path) -> None:
    printed = run_script("sft_packed.py", *SMALL)
    assert "The two runs agree" in printed

    report = json.loads((tmp_path / "out/report.json").read_text())
    packed, padded = report["packed"], report["padded"]
    assert packed["name"] == "flashmask, packed"
    assert padded["name"] == "eager, padded"
    assert len(packed["loss"]) == 6
    assert packed["loss"] == pytest.approx(padded["loss"], abs=report["tolerance"])
    assert report["largest_difference"] == max(abs(a - b) for a, b in zip(packed["loss"], padded["loss"]))
    assert packed["loss"][0] == pytest.approx(math.log(1024), abs=0.5)  # an untrained model guesses
    assert packed["loss"][-1] < packed["loss"][0] - 0.1
    assert packed["padding"] == 0 < padded["padding"]
    alone, apart, leaking = report["sdpa"].values()
    assert apart == pytest.approx(alone, abs=1e-5)
    assert report["leak"] == max(abs(a - b) for a, b in zip(alone, leaking)) > 1e-4
    assert report["padding_saved"] == pytest.approx(padded["padding"] / (padded["padding"] + report["tokens"]))
    for picture in ("loss.png", "mask.png"):
        content = (tmp_path / "out" / picture).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 5000
    for figure in (report["tokens"], padded["padding"]):
        assert f"{figure:,}" in printed


def test_sft_packed_reads_a_file(sft_packed: Callable[..., dict[str, Any]], documents: Path) -> None:
    report = sft_packed("--dataset", str(documents), "--text-column", "body", "--attn", "sdpa")
    assert report["packed"]["name"] == "sdpa, packed"
    assert report["packed"]["loss"] == pytest.approx(report["padded"]["loss"], abs=1e-4)


def test_sft_packed_does_not_guess_the_text_column(sft_packed: Callable[..., dict[str, Any]], documents: Path) -> None:
    with pytest.raises(SystemExit, match=r"--text-column with one of \['title', 'body'\]"):
        sft_packed("--dataset", str(documents))


def test_sft_packed_fails_when_documents_see_each_other(
    sft_packed: Callable[..., dict[str, Any]], documents: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def leaking_mask(mask_function: Any = None, **kwargs: Any) -> torch.Tensor | None:
        return sdpa_mask(**kwargs)

    AttentionInterface.register("leaking", AttentionInterface()["sdpa"])
    AttentionMaskInterface.register("leaking", leaking_mask)
    with pytest.raises(SystemExit, match="DO NOT AGREE"):
        sft_packed("--dataset", str(documents), "--text-column", "body", "--attn", "leaking")
    assert "leaking, packed" in capsys.readouterr().out


# Rows that several processes share


LONG_CONTEXT = SCRIPT.with_name("sft_long_context.py")


def check_long_context(folder: Path, printed: str) -> None:
    assert "The processes and one process agree" in printed
    report = json.loads((folder / "report.json").read_text())
    assert report["loss"][0] == pytest.approx(math.log(257), abs=0.5)  # an untrained model guesses
    assert report["loss"][-1] < report["loss"][0] - 0.1
    assert sum(report["shares"]) == pytest.approx(1)
    assert max(report["shares"]) < 0.6
    content = (folder / "mask.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 5000


def test_sft_long_context_starts_processes_that_train_as_one(
    small_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--row-length", "1500", "--documents", "definitions", "--checkpointing", "--steps", "4"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(LONG_CONTEXT), "--texts", str(small_library), *options])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(LONG_CONTEXT), run_name="__main__")
    printed, errors = capfd.readouterr()
    assert ended.value.code == 0, errors
    assert "deprecated" not in errors
    assert '2 processes, 1 x 2, mode="all_gather"' in printed
    check_long_context(tmp_path / "runs/sft_long_context", printed)


def test_sft_long_context_trains_as_one_process_under_torchrun(small_library: Path, tmp_path: Path) -> None:
    options = ["--row-length", "700", "--mode", "ulysses", "--dtype", "bfloat16", "--checkpointing", "--steps", "4"]
    printed = "".join(processes.run_on_ranks(LONG_CONTEXT, ["--texts", str(small_library), *options], 2, tmp_path))
    assert "rank 1: 50.0%" in printed
    check_long_context(tmp_path / "runs/sft_long_context", printed)


def test_sft_long_context_needs_no_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.pyplot", "matplotlib.colors"):
        monkeypatch.setitem(sys.modules, name, None)
    assert not runpy.run_path(str(LONG_CONTEXT))["HAS_MATPLOTLIB"]


# The kernels alone


@pytest.mark.hub
def test_kernel_hub_attends_as_each_document_alone(tmp_path: Path) -> None:
    (printed,) = processes.run_at_once(SCRIPT.with_name("kernel_hub.py"), [], [{}], tmp_path)
    assert "build/torch-cpu/__init__.py" in printed
    assert "The packed row and its documents alone agree" in printed


# Conversations

TURNS = ["--steps", "4", "--batch-size", "2", "--questions", "2", "--hidden-size", "64", "--layers", "1"]


def test_sft_turns_trains_as_a_row_for_each_turn(run_script: Callable[..., str], tmp_path: Path) -> None:
    printed = run_script("sft_turns.py", *TURNS)
    assert "The two runs agree" in printed
    report = json.loads((tmp_path / "out/report.json").read_text())
    tree, rows = report["tree"], report["rows"]
    assert len(tree["loss"]) == 4
    assert tree["loss"] == pytest.approx(rows["loss"], abs=report["tolerance"])
    assert tree["loss"][-1] < tree["loss"][0] - 0.1
    assert tree["positions"] == tree["tokens"] < rows["tokens"] < rows["positions"]
    assert report["tokens_saved"] == 1 - tree["tokens"] / rows["tokens"] > 0.3
    for picture in ("loss.png", "mask.png"):
        content = (tmp_path / "out" / picture).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 5000
    for run in (tree, rows):
        assert f"{run['tokens']:,}" in printed


def test_sft_turns_fails_when_thinking_is_seen_later(
    run_script: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Leaking(TurnsDataCollator):
        def __call__(self, examples: Any) -> dict[str, Any]:
            batch = super().__call__(examples)
            batch["attention_mask"].fill_(batch["input_ids"].shape[1])
            return batch

    monkeypatch.setattr("hf_flashmask.TurnsDataCollator", Leaking)
    with pytest.raises(SystemExit, match="DO NOT AGREE"):
        run_script("sft_turns.py", *TURNS)


# Preference data

PREFERENCE = ["--steps", "6", "--batch-size", "4", "--max-prompt", "60", "--hidden-size", "64", "--layers", "1"]


@pytest.fixture
def preference_example(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs one of the two examples on preference data in this process; returns its report."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def run(name: str, *arguments: str) -> dict[str, Any]:
        script = importlib.import_module(name)
        monkeypatch.setattr(sys, "argv", [name, *PREFERENCE, "--output", str(tmp_path / "out"), *arguments])
        script.main()
        return json.loads((tmp_path / "out/report.json").read_text())

    return run


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """A file of pairs of which the chosen answer goes on counting."""
    numbers = torch.randint(0, 50, (12,)).tolist()
    rows = [
        {
            "prompt": " ".join(str(n + i) for i in range(9)),
            "chosen": " ".join(str(n + i) for i in range(9, 9 + n % 7 + 1)),
            "rejected": "5 7 1 3",
        }
        for n in numbers
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def check_shared_prompt_report(report: dict[str, Any], folder: Path, *, is_reference_at_first: bool = False) -> None:
    shared, unshared = report["shared"], report["unshared"]
    assert len(shared["loss"]) == len(shared["accuracy"]) == len(unshared["accuracy"]) == 6
    assert shared["loss"] == pytest.approx(unshared["loss"], abs=report["tolerance"])
    assert report["largest_difference"] == max(abs(a - b) for a, b in zip(shared["loss"], unshared["loss"]))
    # Where the model starts as its own reference, rounding decides which answer it prefers in the first step.
    first = 1 if is_reference_at_first else 0
    assert shared["accuracy"][first:] == pytest.approx(unshared["accuracy"][first:])
    assert shared["tokens"] < unshared["tokens"]
    assert report["tokens_saved"] == 1 - shared["tokens"] / unshared["tokens"]
    for picture in ("loss.png", "mask.png"):
        content = (folder / picture).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 5000


def test_dpo_shared_prompt_trains_as_unshared(run_script: Callable[..., str], tmp_path: Path) -> None:
    printed = run_script("dpo_shared_prompt.py", *PREFERENCE)
    assert "The two runs agree" in printed
    report = json.loads((tmp_path / "out/report.json").read_text())
    check_shared_prompt_report(report, tmp_path / "out", is_reference_at_first=True)
    assert report["shared"]["loss"][0] == pytest.approx(math.log(2), abs=1e-5)  # the model is its reference
    assert report["tokens_saved"] > 0.25
    for run in ("shared", "unshared"):
        assert f"{report[run]['tokens']:,}" in printed


def test_reward_shared_prompt_trains_as_unshared(
    preference_example: Callable[..., dict[str, Any]], pairs: Path, tmp_path: Path
) -> None:
    report = preference_example("reward_shared_prompt", "--dataset", str(pairs), "--learning-rate", "0.01")
    check_shared_prompt_report(report, tmp_path / "out")
    assert report["shared"]["loss"][-1] < report["shared"]["loss"][0] - 0.1


def test_shared_prompt_examples_fail_when_answers_see_each_other(
    preference_example: Callable[..., dict[str, Any]], pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Leaking(SharedPromptDataCollator):
        def __call__(self, examples: Any) -> dict[str, Any]:
            batch = super().__call__(examples)
            batch["attention_mask"].fill_(batch["input_ids"].shape[1])
            return batch

    monkeypatch.setattr("hf_flashmask.training.SharedPromptDataCollator", Leaking)
    monkeypatch.delitem(sys.modules, "dpo_shared_prompt", raising=False)
    with pytest.raises(SystemExit, match="DO NOT AGREE"):
        preference_example("dpo_shared_prompt", "--dataset", str(pairs))


# Masks of two copies, and of draft tokens

PACKED_TEXT = ["--dense-steps", "3", "--length", "128", "--hidden-size", "64", "--layers", "1"]


def check_dense_report(report: dict[str, Any], folder: Path) -> None:
    ours, dense = report["loss"]["flashmask"], report["loss"]["dense"]
    assert len(dense) == 3 < len(ours)
    assert ours[:3] == pytest.approx(dense, abs=1e-4)
    assert report["largest_loss_difference"] == max(abs(a - b) for a, b in zip(ours, dense))
    assert report["gradient_difference"] < 1e-4
    for picture in ("loss.png", "mask.png"):
        content = (folder / picture).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 5000


BLOCK_DIFFUSION = [*PACKED_TEXT, "--next-token-steps", "20", "--warm-up", "4", "--block-size", "4"]


def test_block_diffusion_trains_as_under_a_dense_mask(run_script: Callable[..., str], tmp_path: Path) -> None:
    printed = run_script("block_diffusion.py", *BLOCK_DIFFUSION, "--steps", "6")
    assert "The two runs agree" in printed
    report = json.loads((tmp_path / "out/report.json").read_text())
    check_dense_report(report, tmp_path / "out")
    next_token, loss = report["next_token_loss"], report["loss"]["flashmask"]
    assert next_token[0] == pytest.approx(math.log(1025), abs=1)  # an untrained model guesses
    assert next_token[-1] < next_token[0] - 0.1
    assert loss[-1] < loss[0]
    assert report["mask_bytes"] == {"flashmask": 2 * 6 * 256 * 4, "dense": 2 * 256 * 256}
    for sampled in (report["before"], report["after"]):
        assert 1 <= sampled["passes"] <= sampled["tokens"]
        assert sampled["text"] in printed


def test_block_diffusion_fails_when_documents_see_each_other(
    run_script: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def leaking(block_size: int, document_ids: torch.Tensor) -> torch.Tensor:
        return block_diffusion(block_size, document_ids=document_ids * 0)

    monkeypatch.setattr("hf_flashmask.bounds.block_diffusion", leaking)
    with pytest.raises(SystemExit, match="DO NOT AGREE"):
        run_script("block_diffusion.py", *BLOCK_DIFFUSION, "--steps", "3", "--next-token-steps", "2")


def test_fewer_steps_than_are_compared_with_a_dense_mask(run_script: Callable[..., str], tmp_path: Path) -> None:
    printed = run_script("block_diffusion.py", *BLOCK_DIFFUSION, "--steps", "2", "--next-token-steps", "2")
    assert "the losses of 2 steps differ" in printed
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["loss"]["flashmask"] == pytest.approx(report["loss"]["dense"], abs=1e-4)


DRAFT = [*PACKED_TEXT, "--target-steps", "20", "--anchors", "8", "--prompts", "32", "--learning-rate", "0.01"]


def test_draft_model_trains_as_under_a_dense_mask(run_script: Callable[..., str], tmp_path: Path) -> None:
    printed = run_script("draft_model.py", *DRAFT, "--steps", "60", "--block-size", "4")
    assert "The two runs agree" in printed
    report = json.loads((tmp_path / "out/report.json").read_text())
    check_dense_report(report, tmp_path / "out")
    assert report["loss"]["flashmask"][-1] < report["loss"]["flashmask"][0] - 0.1
    assert report["mask_bytes"] == {"flashmask": 2 * 2 * 160 * 4, "dense": 2 * 32 * 160}
    assert report["is_same_text"]
    assert 1 <= report["acceptance"]["before"] < report["acceptance"]["after"] <= 4


def test_draft_model_fails_when_blocks_see_their_anchors_later_context(
    run_script: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def leaking(anchors: torch.Tensor, block_size: int, ctx_len: int, **options: Any) -> torch.Tensor:
        return anchored_blocks((anchors + 1).clamp(max=ctx_len - 1), block_size, ctx_len, **options)

    monkeypatch.setattr("hf_flashmask.bounds.anchored_blocks", leaking)
    with pytest.raises(SystemExit, match="DO NOT AGREE"):
        run_script("draft_model.py", *DRAFT, "--steps", "3", *("--target-steps", "2", "--prompts", "2"))


# TRL


@needs_trl
def test_trl_dpo_trains_as_unshared(
    preference_example: Callable[..., dict[str, Any]], pairs: Path, tmp_path: Path
) -> None:
    report = preference_example("trl_dpo", "--dataset", str(pairs), "--learning-rate", "0.01")
    check_shared_prompt_report(report, tmp_path / "out", is_reference_at_first=True)
    assert report["shared"]["loss"][0] == pytest.approx(math.log(2), abs=1e-5)  # the model is its reference
    assert report["shared"]["loss"][-1] < report["shared"]["loss"][0] - 0.1
    assert report["tokens_saved"] > 0.25
    assert report["shared"]["positions"] < report["unshared"]["tokens"] < report["unshared"]["positions"]


@needs_trl
def test_trl_dpo_runs_on_the_texts_of_python(run_script: Callable[..., str], tmp_path: Path) -> None:
    assert "The two runs agree" in run_script("trl_dpo.py", *PREFERENCE)
    report = json.loads((tmp_path / "out/report.json").read_text())
    check_shared_prompt_report(report, tmp_path / "out", is_reference_at_first=True)


@needs_trl
def test_trl_dpo_fails_when_answers_see_each_other(
    preference_example: Callable[..., dict[str, Any]], pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leaking(*args: Any, **kwargs: Any) -> PrefixTree:
        tree = merge_prefixes(*args, **kwargs)
        tree.bounds.fill_(tree.bounds.shape[3])
        return tree

    monkeypatch.setattr("hf_flashmask.sharing.shared_prefix.merge_prefixes", leaking)
    with pytest.raises(SystemExit, match="DO NOT AGREE"):
        preference_example("trl_dpo", "--dataset", str(pairs))
