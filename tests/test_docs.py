"""The pages: their snippets run as they are pasted, their tables hold, their links lead somewhere."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
import runpy
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tokenizers
import torch
import transformers
from packaging.version import Version
from processes import run_on_ranks, run_python
from tiny_models import build, packed, random_documents

from flashmask_kernels import configs
from hf_flashmask import bounds

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOT_RUN = "<!-- not run"
"""Begins the comment above a snippet that no CPU can run; the comment says why."""
RUN_ELSEWHERE = {
    "docs/many_gpus.md": "several processes: its program is run below, see also tests/test_parallel.py",
    "docs/cuda_graphs.md": "a GPU",
    "docs/upstream.md": "code of other libraries",
    "docs/recipes/": "lines for the programs of other projects",
}
EMBEDDINGS = "docs/how_to/embeddings.md"
"""Needs sentence-transformers, as `make embeddings` installs it."""


class Snippet(NamedTuple):
    page: str
    line: int
    code: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def snippets() -> list[Snippet]:
    found = []
    for page in PAGES:
        text, name = page.read_text(), page.relative_to(ROOT).as_posix()
        for block in re.finditer(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
            before = text[: block.start()]
            is_run = NOT_RUN not in before.rstrip().rpartition("\n")[2]
            if is_run and not name.startswith((*RUN_ELSEWHERE, EMBEDDINGS)):
                found.append(Snippet(name, before.count("\n") + 1, block[1]))
    return found


@pytest.fixture
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.filterwarnings(
    "error:.*deprecated:FutureWarning", "default:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # the last one is PEFT's own
@pytest.mark.usefixtures("in_an_empty_folder")
@pytest.mark.parametrize("snippet", snippets(), ids=str)
def test_a_snippet_runs_as_it_is_pasted(snippet: Snippet, tmp_path: Path) -> None:
    if "from trl import" in snippet.code:
        pytest.importorskip("trl", reason="TRL needs Python 3.11")
        warnings.simplefilter("default", FutureWarning)  # its trainers use names that Transformers deprecates
    script = tmp_path / "snippet.py"
    script.write_text(snippet.code)
    runpy.run_path(str(script), run_name="__main__")


def test_the_first_snippet_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    printed = run_python(snippets()[0].code, cwd=tmp_path)
    assert 4 < float(printed.split()[-1]) < 7  # an untrained model guesses one of 256 tokens: log(256) = 5.5


def test_the_first_snippet_trains_replicas(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    code = snippets()[0].code.replace("TrainingArguments(", "TrainingArguments(use_cpu=True, ")
    seed = "import os\nimport torch\ntorch.manual_seed(int(os.environ['RANK']))\n"
    script.write_text(f"{seed}{code}print(sum(weights.sum().item() for weights in model.parameters()))\n")
    first, second = run_on_ranks(script, [], 2, tmp_path)
    assert first.split()[-1] == second.split()[-1]  # apart, each process would train the weights that it has drawn


def test_the_program_for_many_gpus_trains_as_one_process(tmp_path: Path) -> None:
    page = (ROOT / "docs/many_gpus.md").read_text()
    script = tmp_path / "train.py"
    script.write_text(page.partition("```python\n")[2].partition("```")[0])
    printed = run_on_ranks(script, [], 2, tmp_path)
    assert printed[1] == ""

    texts = ["The tokens of a row", "are on several ranks,", "its documents are kept apart."]
    assert all(f'"{text}"' in script.read_text() for text in texts)
    transformers.set_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    optimizer = torch.optim.AdamW(model.parameters())
    for loss in map(float, printed[0].split()):
        documents = [torch.tensor([list(text.encode())]) for text in texts]
        labels = sum(document.shape[1] - 1 for document in documents)
        expected = sum(model(tokens, labels=tokens, num_items_in_batch=labels).loss for tokens in documents)
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        expected.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(printed[0].split()) == 3


def code_of_embeddings() -> str:
    (code,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / EMBEDDINGS).read_text(), flags=re.MULTILINE | re.DOTALL)
    return str(code)


@pytest.mark.embeddings
@pytest.mark.usefixtures("in_an_empty_folder")
def test_embeddings_are_trained_on_packed_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's program, and its embeddings against those of eager attention on padded rows."""
    library = importlib.import_module("sentence_transformers")
    rows: list[tuple[int, ...]] = []
    forward = transformers.BertModel.forward

    def note(self: Any, input_ids: torch.Tensor, **inputs: Any) -> Any:
        rows.append(tuple(input_ids.shape))
        return forward(self, input_ids, **inputs)

    monkeypatch.setattr(transformers.BertModel, "forward", functools.wraps(forward)(note))
    script = tmp_path / "snippet.py"
    script.write_text(code_of_embeddings())
    done = runpy.run_path(str(script), run_name="__main__")
    assert {length for length, _ in rows} == {1}, "one row of all texts"
    assert done["found"] == list(range(16))
    assert float((done["questions"] - done["alone"]).abs().max()) < 1e-5

    trained = done["model"][0].model
    trained.save_pretrained("trained")
    done["model"].tokenizer.save_pretrained("trained")
    modules = library.sentence_transformer.modules
    transformer = modules.Transformer("trained", model_kwargs={"attn_implementation": "eager"})
    padded = library.SentenceTransformer(modules=[transformer, modules.Pooling(64)], device="cpu")
    texts = [pair["anchor"] for pair in done["pairs"]] + ["where"]
    packed = done["model"].encode(texts, convert_to_tensor=True)
    torch.testing.assert_close(packed, padded.encode(texts, convert_to_tensor=True))
    assert rows[-1] == (17, 5)


CALL_OF_A_ROW = re.compile(r"`(bounds\.\w+\(.*?)`")
"""In docs/masks.md; what is in brackets after other arguments is optional, and `name=` stands for `name=name`."""


def test_the_calls_in_the_list_of_masks_fit_the_functions() -> None:
    calls = CALL_OF_A_ROW.findall((ROOT / "docs/masks.md").read_text())
    assert len(calls) > 30
    for call in calls:
        code = re.sub(r"\[, (.*?)\]", r", \1", call)
        tree = ast.parse(re.sub(r"(\w+)=(?=[,)])", r"\1=\1", code), mode="eval")
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("bounds."):
                function = getattr(bounds, ast.unparse(node.func).removeprefix("bounds."))
                keywords = {keyword.arg or "": None for keyword in node.keywords}
                inspect.signature(function).bind(*node.args, **keywords)


@pytest.fixture
def packed_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_an_empty_folder: None) -> Any:
    """A module with the class of the page. The folder "tiny" has a model whose tokenizer adds no special tokens."""
    (tmp_path / "packed_texts.py").write_text(code_of_embeddings().partition("# A tiny model")[0])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "packed_texts", raising=False)
    tokens = ["[PAD]", "[UNK]", "cats", "dogs", "run", "red", "cat", "blue", "dog"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    tokenizer.save_pretrained("tiny")
    build("llama").base_model.save_pretrained("tiny")
    return importlib.import_module("packed_texts")


def embedder(transformer: Any, implementation: str) -> Any:
    library = importlib.import_module("sentence_transformers")
    module = transformer("tiny", model_kwargs={"attn_implementation": implementation})
    pooling = library.sentence_transformer.modules.Pooling(module.get_embedding_dimension())
    return library.SentenceTransformer(modules=[module, pooling], device="cpu")


@pytest.mark.embeddings
def test_texts_without_tokens_have_no_place_in_a_packed_row(packed_texts: Any) -> None:
    model = embedder(packed_texts.PackedTransformer, "flashmask")
    eager = embedder(packed_texts.Transformer, "eager")
    columns = [["cats", "dogs run", "blue dog"], ["red cat", "blue", "dog dog run cats"]]
    losses = [
        packed_texts.MultipleNegativesRankingLoss(one)([one.preprocess(texts) for texts in columns], None)
        for one in (model, eager)
    ]
    torch.testing.assert_close(*losses)
    texts = ["cats", "", "dogs run"]
    with pytest.raises(ValueError, match="text 2 of 3 in the batch has no token"):
        model.preprocess(texts)
    with pytest.raises(ValueError, match="has no token"):
        model.encode(texts)
    model[0].unpad_inputs = False
    torch.testing.assert_close(model.encode(texts), eager.encode(texts))
    padded, expected = (one.encode(columns[0], output_value="token_embeddings") for one in (model, eager))
    torch.testing.assert_close(padded, expected)


@pytest.mark.embeddings
def test_embedding_models_are_loaded_for_packed_rows(packed_texts: Any) -> None:
    model = embedder(packed_texts.PackedTransformer, "flashmask")
    model.save("saved")
    load = functools.partial(type(model), "saved", trust_remote_code=True, device="cpu")
    call = 'SentenceTransformer("saved", trust_remote_code=True, model_kwargs={"attn_implementation": "flashmask"})'
    assert f"`{call}`" in (ROOT / EMBEDDINGS).read_text()
    loaded = load(model_kwargs={"attn_implementation": "flashmask"})
    with pytest.warns(UserWarning, match="rows are padded: pass model_kwargs"):
        padded = load()
    texts = ["cats", "dogs run"]
    assert "cu_seq_lens_q" in loaded.preprocess(texts)
    assert "cu_seq_lens_q" not in padded.preprocess(texts)
    for other in (loaded, padded):
        torch.testing.assert_close(other.encode(texts), model.encode(texts))


CALLS = {
    "plain call": {},
    "`use_cache=False`": {"use_cache": False},
    "2-D mask of ones": {"attention_mask": torch.ones(1, 21)},
    "2-D mask of ids": {"attention_mask": torch.tensor([[1] * 7 + [2] * 5 + [3] * 9])},
}
COLUMNS = [("llama", call) for call in CALLS] + [("gpt_oss", "plain call"), ("afmoe", "plain call")]


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.23"), reason="the table is of Transformers 5.23")
def test_who_leaks_is_who_the_readme_says() -> None:
    """The table's orders of magnitude: a document in a packed row against the same document alone."""
    text = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| (eager|sdpa|flashmask) \| (.*) \|$", text, flags=re.MULTILINE)
    assert [name for name, _ in rows] == ["eager", "sdpa", "flashmask"]
    for implementation, cells in rows:
        for (family, call), cell in zip(COLUMNS, cells.split(" | "), strict=True):
            if cell == "not supported":
                with pytest.raises(ValueError, match="scaled_dot_product_attention"):
                    build(family, implementation)
            else:
                leak = largest_difference(family, implementation, call)
                assert (leak > 1e-2) == (float(cell) > 1e-2), (implementation, family, call, leak)
                assert leak > 1e-2 or leak < 1e-5, (implementation, family, call, leak)


def largest_difference(family: str, implementation: str, call: str) -> float:
    torch.manual_seed(0)
    documents = random_documents([7, 5, 9])
    model = build(family, implementation)
    row = packed(documents)
    if call == "2-D mask of ids":  # rotary embeddings see distances alone
        del row["position_ids"]
    with torch.no_grad():
        together = model(**row, **CALLS[call]).logits
        alone = torch.cat([model(document, use_cache=False).logits for document in documents], dim=1)
    return float((together - alone).abs().max())


@pytest.mark.parametrize("page", ["README.md", "docs/supported.md"])
def test_the_pages_name_the_kernels_for_sm_90(page: str) -> None:
    sizes = f"heads of {configs._SMALLEST_SPECIALIZED_DIM} to {max(configs._SPECIALIZED)}"
    releases = (".".join(map(str, version)) for version in (configs._OLDEST_GLUON, configs._NEWEST_GLUON))
    text = (ROOT / page).read_text()
    assert sizes in text
    assert f"under Triton {' to '.join(releases)};" in text


LINK = re.compile(r"\]\((?!https?://|mailto:|#)([^)#\s]+)(#[^)]*)?\)|src=\"(?!https?://)([^\"]+)\"")


@pytest.mark.parametrize(
    "page", sorted({*PAGES, *ROOT.glob("*.md")}), ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    for link in LINK.finditer(text):
        target = link[1] or link[3]
        assert (page.parent / target).exists(), target
