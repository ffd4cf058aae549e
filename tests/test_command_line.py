"""`python -m hf_flashmask`, as a user calls it."""

from __future__ import annotations

import base64
import html
import json
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from time import sleep

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner, Result

import hf_flashmask
from flashmask_kernels import configs, environment
from flashmask_kernels.launch import launcher
from flashmask_kernels.report import describe_kernels
from hf_flashmask import SharedPromptDataCollator, bounds
from hf_flashmask.command_line import bench, explain
from hf_flashmask.command_line.app import app
from hf_flashmask.command_line.environment import describe_environment
from hf_flashmask.command_line.estimate import Cost, WayToTrain, estimate_ways_to_train
from hf_flashmask.command_line.sequences import read_sequences


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


# The report


def test_the_report_names_versions_with_the_tested_range_and_what_is_installed() -> None:
    printed = call().output
    for expected in (hf_flashmask.__version__, torch.__version__, transformers.__version__, "is registered", "cpu"):
        assert expected in printed
    for line in (r"triton +[0-9.]+.* \(tested: 3.5 to 3.9\)", "accelerate [0-9]", "magi-attention "):
        assert re.search(line, printed), line


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """Makes "cuda" a device of a compute capability."""
    configs.architecture.cache_clear()

    def of_capability(*capability: int) -> list[str]:
        configs.architecture.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return describe_kernels(torch.device("cuda"))

    yield of_capability
    configs.architecture.cache_clear()


def test_the_report_says_why_the_kernels_for_a_gpu_do_not_run(gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "_HAS_GLUON", True)
    assert "kernels for sm_90: 16-bit heads of" in gpu(9, 0)[0]
    assert "NOT used: there are none for this GPU" in gpu(8, 0)[0]
    assert "served as sm_86" in gpu(12, 0)[0]

    monkeypatch.setattr(configs, "_HAS_GLUON", False)
    monkeypatch.setattr(configs, "TRITON_VERSION", (4, 1))
    assert "NOT used: they are tested with Triton 3.6 to" in gpu(9, 0)[0]
    assert "this is 4.1" in gpu(9, 0)[0]

    monkeypatch.setattr(environment, "PORTABLE", True)
    assert gpu(9, 0)[0].endswith("NOT used: FLASHMASK_PORTABLE is 1")


def test_the_report_says_why_launches_are_slow(gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "NOT" not in gpu(8, 0)[-1]
    monkeypatch.setattr(launcher, "_IS_FAST", False)
    assert gpu(8, 0)[-1].endswith("NOT used: it is tested with Triton 3.5 to 3.9")
    monkeypatch.setattr(environment, "FAST_LAUNCH", False)
    assert gpu(8, 0)[-1].endswith("NOT used: FLASHMASK_FAST_LAUNCH is 0")


@pytest.mark.parametrize(("value", "is_repeatable"), [("0", False), ("1", True)])
def test_the_report_says_which_gradients_are_repeatable(
    value: str, is_repeatable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASH_ATTENTION_DETERMINISTIC", value)
    line = next(line for line in describe_environment().splitlines() if line.startswith("gradients"))
    assert ("heads of 33 to 64" in line) == (not is_repeatable)


def test_the_report_of_a_gpu_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashmask_kernels.configs", None)
    monkeypatch.delattr("flashmask_kernels.configs")
    (line,) = describe_kernels(torch.device("cuda"))
    assert "install triton" in line


# run

PROGRAM = """
import subprocess, sys
if sys.argv[1] == "launch":  # as `accelerate launch` does
    sys.exit(subprocess.run([sys.executable, __file__, *sys.argv[2:]]).returncode)
assert "torch" not in sys.modules  # most processes never import Transformers
import sitecustomize_of_the_user
from transformers import AutoModelForCausalLM, LlamaConfig
config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
model = AutoModelForCausalLM.from_config(config, attn_implementation="flashmask")
print(sys.argv[1:], model.config._attn_implementation)
"""


def test_run_registers_in_the_processes_that_the_program_starts(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, types; sys.modules['sitecustomize_of_the_user'] = types.ModuleType('found')"
    )
    command = [sys.executable, "-m", "hf_flashmask", "run", str(tmp_path / "program.py")]
    process = subprocess.run(
        [*command, "launch", "-m", "--help"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout == "['-m', '--help'] flashmask\n"


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, str]]]:
    """The commands that would replace this process, with their environments."""
    commands: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(os, "execvpe", lambda file, command, environment: commands.append((command, environment)))
    return commands


def test_run_takes_modules_and_commands(executed: list[tuple[list[str], dict[str, str]]]) -> None:
    assert call("run", "-m", "trl.cli.main", "sft", "--help").exit_code == 0
    assert call("run", Path(sys.executable).name, "-m", "x", "--config=a b").exit_code == 0
    (module, _), (command, _) = executed
    assert module == [sys.executable, "-m", "trl.cli.main", "sft", "--help"]
    assert Path(command[0]).samefile(sys.executable)
    assert command[1:] == ["-m", "x", "--config=a b"]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("trian.py", "there is no file trian.py"),
        ("trian", "'trian' is neither a Python file nor a command; give a module as `-m trian`"),
    ],
)
def test_run_refuses_what_is_not_there(
    target: str, message: str, executed: list[tuple[list[str], dict[str, str]]]
) -> None:
    result = call("run", target)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert not executed


# estimate


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """The configuration of a small model, and a tokenizer that makes a token of each word."""
    words = Tokenizer(WordLevel({"a": 0, "b": 1, "c": 2, "?": 3}, unk_token="?"))
    words.pre_tokenizer = Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(tmp_path / "model")
    transformers.LlamaConfig(
        vocab_size=4, hidden_size=8, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, head_dim=16
    ).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def write_lines(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_estimate_counts_positions_and_pairs(tmp_path: Path) -> None:
    lengths = [5, 3, 9, 2, 20]
    rows: list[dict[str, object]] = [{"input_ids": list(range(length))} for length in lengths]
    sequences = read_sequences(write_lines(tmp_path / "data.jsonl", rows), None, 10)
    assert sequences.num_truncated == 1
    result = estimate_ways_to_train(sequences, 10, batch_size=5)
    padded, _, dense, packed = result.ways
    assert (padded.positions, padded.pairs) == (50, 500)
    assert (packed.positions, packed.pairs) == (29, 15 + 6 + 45 + 3 + 55)
    assert dense.pairs == 10**2 + 9**2 + 10**2  # rows of 10; 9; 5, 3 and 2
    assert result.padding == 1 - 29 / 50
    assert result.fill == 29 / 30
    assert result.shared == 0


def test_estimate_counts_shared_prefixes(tmp_path: Path, model_folder: Path) -> None:
    rows: list[dict[str, object]] = [
        {"prompt": "a b c", "chosen": " a a", "rejected": " a b b"},
        {"prompt": "b", "chosen": " c", "rejected": " a"},
    ]
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    result = estimate_ways_to_train(
        read_sequences(write_lines(tmp_path / "data.jsonl", rows), tokenizer, 100), 100, batch_size=2
    )
    distinct = {(0, tuple(s[:k])) for s in ("abcaa", "abcabb") for k in range(1, len(s) + 1)}
    distinct |= {(1, tuple(s[:k])) for s in ("bc", "ba") for k in range(1, len(s) + 1)}
    assert result.num_tokens == 5 + 6 + 2 + 2
    assert result.ways[-1].positions == len(distinct)
    assert result.ways[-1].pairs == sum(len(prefix) for _, prefix in distinct)
    assert result.ways[0].positions == 4 * 6


def test_estimate_counts_the_operations_of_a_model(model_folder: Path) -> None:
    """Against torch's own count of a forward pass, of which a backward pass takes twice as much."""
    config = transformers.AutoConfig.from_pretrained(model_folder)
    cost, length = Cost.of(config), 64
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, length, dtype=torch.int64))
    assert WayToTrain("", length, length**2).operations(cost) == pytest.approx(3 * counter.get_total_flops(), rel=0.05)


def test_estimate_prints_a_table_and_draws(tmp_path: Path, model_folder: Path) -> None:
    data = write_lines(tmp_path / "data.jsonl", [{"text": "a b c"}, {"text": "b"}, {"text": "a a b b c c"}])
    plot = tmp_path / "plot.png"
    options = ("--tokenizer", str(model_folder), "--max-length", "8", "--plot", str(plot))
    printed = call("estimate", data, *options).output
    assert "3 examples (text), 3 sequences of 1 to 6 tokens, median 3, 10 in all" in printed
    assert "speed by operations" in printed
    assert "examples/s" not in printed, "progress bars do not belong in log files"
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("data.jsonl", {"text": "a"}, "pass --tokenizer"),
        ("data.jsonl", {"title": "a"}, "has the columns title"),
        ("data.xls", {"text": "a"}, "only files ending in"),
        ("data.jsonl", {"input_ids": []}, "has a token"),
        ("data.jsonl", {"input_ids": None}, "`input_ids` of example 0 is None; expected token ids"),
        ("data.jsonl", {"input_ids": "abc"}, "`input_ids` of example 0 is 'abc'; expected token ids"),
    ],
)
def test_estimate_refuses_what_it_cannot_read(name: str, row: dict[str, object], message: str, tmp_path: Path) -> None:
    result = call("estimate", write_lines(tmp_path / name, [row]), "--max-length", "8")
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_estimate_names_a_file_that_does_not_exist(tmp_path: Path) -> None:
    result = call("estimate", str(tmp_path / "data.jsonl"), "--max-length", "8")
    assert result.exit_code == 2
    assert "there is no file" in " ".join(result.output.split())


@pytest.mark.parametrize("command", ["estimate", "explain"])
def test_a_tokenizer_that_is_not_there_is_named(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(name: str) -> None:
        raise OSError("We couldn't connect")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", no_network)
    torch.save({"input_ids": torch.ones(1, 4).long(), "position_ids": torch.arange(4)[None]}, tmp_path / "batch.pt")
    others = [write_lines(tmp_path / "data.jsonl", [{"text": "a"}]), "--max-length", "8"]
    result = call(command, *(others if command == "estimate" else [str(tmp_path / "batch.pt")]), "--tokenizer", "mine")
    assert result.exit_code == 2
    assert "--tokenizer 'mine' is no folder here, or cannot be read: We couldn't connect" in " ".join(
        result.output.split()
    )


def test_estimate_says_what_to_do_with_columns_of_other_names(tmp_path: Path) -> None:
    result = call("estimate", write_lines(tmp_path / "data.jsonl", [{"body": "a"}]), "--max-length", "8")
    assert result.exit_code == 2
    assert "Rename the columns of the file, such as the one with texts to `text`" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.jsonl", b"", "is empty"),
        ("data.jsonl", b'{"text": "a"}\n no json', "cannot read"),
        ("data.jsonl", b'{"text": "caf\xe9"}\n', "texts are UTF-8: convert the file"),
        ("data.csv", b"text\ncaf\xe9\n", "texts are UTF-8: convert the file"),
        ("data.txt", b"caf\xe9\n", "texts are UTF-8: convert the file"),
        (
            "data.jsonl",
            b'{"text": "a"}\n{"text": null}\n',
            "`text` of example 1 is None; expected a string or messages",
        ),
    ],
)
def test_estimate_says_why_it_cannot_read_a_file(
    name: str, content: bytes, message: str, tmp_path: Path, model_folder: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    result = call("estimate", str(tmp_path / name), "--max-length", "8", "--tokenizer", str(model_folder))
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


# explain


def test_explain_says_that_a_2d_mask_is_not_causal(tmp_path: Path) -> None:
    torch.save({"attention_mask": torch.tensor([[1, 1, 1, 0]])}, tmp_path / "batch.pt")
    printed = call("explain", str(tmp_path / "batch.pt")).output
    assert "attention_mask (a causal model hides later keys besides): int32 [1, 1, " in printed
    assert "██████··\n██████··\n" in printed


@pytest.mark.parametrize(
    "batch",
    [
        {"position_ids": torch.tensor([[0, 1, 2, 0, 1]])},
        {"cu_seq_lens_q": torch.tensor([0, 3, 5], dtype=torch.int32)},
        {"position_ids": torch.arange(5)[None], "attention_mask": torch.tensor([[1, 1, 1, 2, 2]])},
        {"position_ids": torch.arange(5)[None], "attention_mask": torch.tensor([[1.0, 1.0, 1.0, 2.0, 2.0]])},
        {"attention_mask": torch.tensor([[[[3, 3, 3, 5, 5]]]], dtype=torch.int32)},
        {"attention_mask": torch.block_diag(torch.ones(3, 3), torch.ones(2, 2)).tril().bool()[None, None]},
    ],
    ids=["positions", "lengths", "document ids", "ids as float", "bounds", "dense"],
)
def test_explain_shows_the_mask_of_a_batch(batch: dict[str, torch.Tensor], tmp_path: Path) -> None:
    torch.save(batch, tmp_path / "batch.pt")
    printed = call("explain", str(tmp_path / "batch.pt"), "--plot", str(tmp_path / "plot.png")).output
    assert "visible   9 of 25 pairs, 36.0%" in printed
    assert "██········\n████······\n██████····\n······██··\n······████" in printed
    assert f"Picture: {tmp_path / 'plot.png'}" in printed
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_explain_draws_each_mask_of_a_batch(tmp_path: Path) -> None:
    masks = {"full_attention": bounds.causal(5), "sliding_attention": bounds.sliding_window(2, 5)}
    torch.save({"attention_mask": masks}, tmp_path / "batch.pt")
    printed = call("explain", str(tmp_path / "batch.pt"), "--plot", str(tmp_path / "plot.png")).output
    for name in masks:
        assert f"Picture: {tmp_path / f'plot_{name}.png'}" in printed
        assert (tmp_path / f"plot_{name}.png").exists()


def test_explain_says_what_hides_a_key(tmp_path: Path) -> None:
    torch.save({"position_ids": torch.tensor([[0, 1, 2, 0, 1]])}, tmp_path / "batch.pt")
    printed = call("explain", str(tmp_path / "batch.pt"), "--pair", "4", "1").output
    assert "query 4 does not see key 1: it is hidden from the rows 3 and after" in printed
    printed = call("explain", str(tmp_path / "batch.pt"), "--pair", "4", "7").output
    assert "`key` is 7, but the mask has 5, counted from 0" in printed


def test_explain_draws_and_writes_tokens_and_documents(tmp_path: Path) -> None:
    batch = {"position_ids": torch.tensor([[0, 1, 2, 0, 1]]), "input_ids": torch.tensor([[3, 1, 0, 2, 2]])}
    torch.save(batch, tmp_path / "batch.pt")
    Tokenizer(WordLevel({"<a>": 0, " b": 1, "c": 2, "d": 3}, unk_token="c")).save(str(tmp_path / "tokenizer.json"))
    options = (
        "--html",
        str(tmp_path / "mask.html"),
        "--plot",
        str(tmp_path / "mask.svg"),
        "--tokenizer",
        str(tmp_path),
    )
    result = call("explain", str(tmp_path / "batch.pt"), *options)
    assert result.exit_code == 0
    assert f"Page: {tmp_path / 'mask.html'}" in result.output
    page = (tmp_path / "mask.html").read_text(encoding="utf-8")
    packed = re.search(r'id="data">([^<]*)<', page)
    assert packed is not None
    content = json.loads(zlib.decompress(base64.b64decode(packed[1])))
    assert content["keys"] == {
        "tokens": [["d", " b", "<a>", "c", "c"]],
        "documents": [[0, 0, 0, 1, 1]],
        "branches": None,
    }
    assert content["queries"] == content["keys"]
    texts = re.findall(r"<!-- (.*?) -->", (tmp_path / "mask.svg").read_text(encoding="utf-8"))
    assert [html.unescape(text) for text in texts[:5]] == ["d", "b", "<a>", "c", "c"]
    assert "document" in texts
    torch.save(batch["position_ids"], tmp_path / "mask.pt")
    result = call("explain", str(tmp_path / "mask.pt"), *options)
    assert "--tokenizer is for a batch with `input_ids`" in " ".join(result.output.split())


def test_explain_intersects_positions_and_padding(tmp_path: Path) -> None:
    batch = {"position_ids": torch.tensor([[0, 1, 0, 1]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])}
    torch.save(batch, tmp_path / "batch.pt")
    assert "visible   5 of 16" in call("explain", str(tmp_path / "batch.pt")).output


def test_explain_starts_no_document_at_padding() -> None:
    """The positions of padding between tokens tell nothing: as in a model, what is around it is one document."""
    batch = {"position_ids": torch.tensor([[0, 1, 0, 2, 3]]), "attention_mask": torch.tensor([[1, 1, 0, 1, 1]])}
    shown = torch.zeros(5, 5, dtype=torch.bool)
    shown[:, [0, 1, 3, 4]] = torch.ones(5, 5).tril().bool()[:, [0, 1, 3, 4]]
    (mask,) = explain.masks_in_file(batch).values()
    assert torch.equal(bounds.to_dense(mask)[0, 0], shown)


def test_explain_refuses_a_batch_without_a_mask(tmp_path: Path) -> None:
    torch.save({"input_ids": torch.zeros(1, 3)}, tmp_path / "batch.pt")
    result = call("explain", str(tmp_path / "batch.pt"))
    assert result.exit_code == 2
    assert "the batch has input_ids: a mask is in" in " ".join(result.output.split())


def test_explain_reads_the_batches_of_collators(tmp_path: Path) -> None:
    collate = SharedPromptDataCollator()
    torch.save(collate([{"prompt": [5, 6, 7], "chosen": [1], "rejected": [2, 3]}]), tmp_path / "tree.pt")
    torch.save(transformers.BatchEncoding({"position_ids": torch.tensor([[0, 1, 0]])}), tmp_path / "documents.pt")
    assert "query 5 does not see key 3" in call("explain", str(tmp_path / "tree.pt"), "--pair", "5", "3").output
    assert "visible   4 of 9" in call("explain", str(tmp_path / "documents.pt")).output


@pytest.mark.parametrize("name", ["mask.pt", "mask.npy", "mask.safetensors"])
def test_explain_says_why_it_cannot_read_a_file(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("no mask")
    result = call("explain", str(tmp_path / name))
    assert result.exit_code == 2
    assert "a tensor, or a dict of tensors" in " ".join(result.output.split())


def test_explain_refuses_an_empty_mask(tmp_path: Path) -> None:
    torch.save(torch.zeros(1, 1, 1, 0, dtype=torch.int32), tmp_path / "mask.pt")
    result = call("explain", str(tmp_path / "mask.pt"))
    assert result.exit_code == 2
    assert "mask is empty: its shape is [1, 1, 1, 0]" in " ".join(result.output.split())


def test_explain_asks_what_floats_of_two_dimensions_are(tmp_path: Path) -> None:
    torch.save(torch.ones(8, 8).tril(), tmp_path / "mask.pt")
    result = call("explain", str(tmp_path / "mask.pt"))
    assert result.exit_code == 2
    assert "the mask is torch.float32 [8, 8]: a dense mask [S_q, S_k] is bool" in " ".join(result.output.split())


# bench


def test_bench_checks_and_times_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    implementations = bench._implementations

    def with_a_leak(shape: bench.BenchShape, ends: torch.Tensor) -> dict[str, object]:
        found = implementations(shape, ends)
        del found["flex_attention"]  # compiling takes a minute
        whole_row = bench._attend_each_document_alone(torch.tensor([0, shape.length]))
        return found | {"leaking": lambda: whole_row, "failing": lambda: 1 / 0}

    monkeypatch.setattr(bench, "_implementations", with_a_leak)
    options = ("--length", "100", "--documents", "3", "--heads", "4", "--head-size", "16", "--device", "cpu")
    result = call("bench", *options, "--seconds", "0.1", "--plot", str(tmp_path / "plot.png"))
    assert result.exit_code == 0, result.output
    lines = {line.split("  ")[0]: line for line in result.output.splitlines()}
    for name in ("flashmask", "sdpa, dense mask"):
        assert lines[name].count(" ms") == 2
    assert lines["leaking"].endswith("WRONG, and so not timed")
    assert "ZeroDivisionError" in lines["failing"]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_bench_lets_all_take_turns() -> None:
    """A machine that is slow for a while slows all of them alike, and the report says that times vary."""
    calls: list[str] = []

    def implementation(name: str, milliseconds: float) -> Callable[[], None]:
        def call() -> None:
            calls.append(name)
            is_slow = len(calls) > 100  # from then on, whoever is called
            sleep(1e-3 * milliseconds * (4 if is_slow else 1))

        return call

    functions = {"one": implementation("one", 1), "other": implementation("other", 3)}
    candidates = [
        bench._ImplementationToTime(bench.BenchResult(name, 0.0), {"forward": function, "backward": function})
        for name, function in functions.items()
    ]
    times = bench._time_in_turn([run for candidate in candidates for run in candidate.passes.values()], 0.2)
    one, other = (bench._result_with_times(candidate, times) for candidate in candidates)
    assert len([name for name, _ in groupby(calls)]) >= 2 * bench.ROUNDS
    assert one.forward is not None
    assert other.forward is not None
    assert other.forward > 1.2 * one.forward
    shape = bench.BenchShape(16, 1, 1, 1, 8, torch.float32, torch.device("cpu"))
    steady = one._replace(spread=0.02)
    assert "Times vary" not in "\n".join(bench.describe_bench(shape, [steady, steady._replace(spread=None)]))
    assert "Times vary by up to 34%: is the machine busy?" in "\n".join(
        bench.describe_bench(shape, [steady, other._replace(spread=0.34)])
    )


def test_bench_spread_is_the_interquartile_range_over_the_median() -> None:
    assert bench._spread_of_times([4.0, 1.0, 3.0, 2.0, 5.0, 7.0, 6.0]) == (6 - 2) / 4


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", "cpu:1", "cuda:x"])
def test_bench_names_the_devices_that_there_are(device: str) -> None:
    result = call("bench", "--device", device)
    assert result.exit_code == 2
    assert f"--device is '{device}'; here it may be cpu" in " ".join(result.output.split())


def test_bench_refuses_heads_that_do_not_divide() -> None:
    assert call("bench", "--heads", "6", "--kv-heads", "4").exit_code == 2


# Programs of others: docs/recipes/frameworks.md


@pytest.mark.skipif(sys.version_info < (3, 11), reason="there is no trl for Python 3.10")
def test_run_trains_with_the_command_line_of_trl(
    tmp_path: Path, model_folder: Path, executed: list[tuple[list[str], dict[str, str]]]
) -> None:
    """Whose command starts `accelerate launch`, which starts the process that trains."""
    config = transformers.AutoConfig.from_pretrained(model_folder)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(model_folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    tokenizer.add_special_tokens({"eos_token": "c", "pad_token": "?"})
    tokenizer.save_pretrained(model_folder)
    (tmp_path / "data").mkdir()
    write_lines(tmp_path / "data/train.jsonl", [{"text": "a b " * length} for length in range(1, 9)])
    options = {
        "model_name_or_path": str(model_folder),
        "dataset_name": str(tmp_path / "data"),
        "attn_implementation": "flashmask",
        "max_length": "32",
        "max_steps": "1",
        "logging_steps": "1",
        "report_to": "none",
        "output_dir": str(tmp_path / "out"),
        "bf16": "false",
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    call("run", "-m", "trl.cli.main", "sft", *arguments, "--packing", "--use_cpu")
    ((command, environment),) = executed
    environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    assert "'loss': '1." in process.stdout
    assert (tmp_path / "out/model.safetensors").exists()
