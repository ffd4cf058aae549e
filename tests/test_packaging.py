"""The distribution as users get it, and the import name `kernels`, which belongs to Hugging Face's library."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import processes
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version
from run_versions import ALIASES, VERSIONS
from transformers.utils import is_kernels_available

ROOT = Path(__file__).parents[1]
PACKAGES = {"hf_flashmask": ROOT / "hf_flashmask", "flashmask_kernels": ROOT / "kernels/torch-ext/flashmask_kernels"}


def run_python(code: str, *, cwd: Path, paths: tuple[Path, ...] = ()) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    process = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as a release is: the sdist from a clean checkout, then the wheel from the sdist."""
    folder = tmp_path_factory.mktemp("build")
    junk = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder / "checkout", ignore=junk)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(folder / "checkout")]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_both_packages_and_nothing_else(wheel: Path) -> None:
    files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {
        f"{package}/{path.relative_to(source).as_posix()}"
        for package, source in PACKAGES.items()
        for path in source.rglob("*")
        if path.suffix in (".py", ".json", ".typed", ".html")
    }
    assert files == expected
    assert {"hf_flashmask/py.typed", "flashmask_kernels/py.typed", "hf_flashmask/visualization/page.html"} <= files


def test_the_wheel_works_where_it_is_installed(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = """
import flashmask_kernels, hf_flashmask, torch
from transformers import AutoModelForCausalLM, LlamaConfig
config = LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(config, attn_implementation="flashmask")
tokens, positions = torch.arange(12)[None], torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
packed = model(tokens, position_ids=positions).logits
model.set_attn_implementation("eager")
torch.testing.assert_close(packed[:, :5], model(tokens[:, :5]).logits)
torch.testing.assert_close(packed[:, 5:], model(tokens[:, 5:]).logits)
print(flashmask_kernels.__file__, hf_flashmask.__file__, sep="\\n")
"""
    places = run_python(code, cwd=tmp_path, paths=(tmp_path / "site",)).split("\n")
    assert places[0] == str(tmp_path / "site/flashmask_kernels/__init__.py")
    assert places[1] == str(tmp_path / "site/hf_flashmask/__init__.py")


def test_the_version_is_the_same_everywhere(wheel: Path) -> None:
    import hf_flashmask

    assert wheel.name.split("-")[1] == hf_flashmask.__version__ == importlib.metadata.version("hf-flashmask")


def test_every_declared_dependency_is_pinned_inside_its_range() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    extras = ["", *(importlib.metadata.metadata("hf-flashmask").get_all("Provides-Extra") or [])]
    for environment in ({"python_version": version, "sys_platform": "linux"} for version in ("3.10", "3.14")):
        versions = {
            pin.name: next(iter(pin.specifier)).version
            for pin in pins
            if pin.marker is None or pin.marker.evaluate(environment)
        }
        for line in importlib.metadata.requires("hf-flashmask") or []:
            requirement = Requirement(line)
            marker = requirement.marker
            is_needed = marker is None or any(marker.evaluate({**environment, "extra": extra}) for extra in extras)
            if is_needed and requirement.name != "hf-flashmask":
                assert requirement.specifier.contains(versions[requirement.name]), (requirement, environment)


# Continuous integration

WORKFLOWS = {path.name: yaml.safe_load(path.read_text()) for path in (ROOT / ".github/workflows").glob("*.yml")}
STEPS = [
    (name, step) for name, workflow in WORKFLOWS.items() for job in workflow["jobs"].values() for step in job["steps"]
]


def targets_of(script: str) -> set[str]:
    """What the lines of a shell script that call `make` name. An expression of a workflow names each of its values."""
    plain = re.sub(r"\$\{\{(.*?)\}\}", lambda found: " ".join(re.findall(r"[&|]{2} '(\w+)'", found[1])), script)
    calls = re.findall(r"^make ([^<\n]*)", plain, re.MULTILINE)
    return {word for call in calls for word in call.split() if "=" not in word}


def test_the_workflows_call_targets_that_there_are() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    called: dict[str, set[str]] = {name: set() for name in WORKFLOWS}
    for name, step in STEPS:
        called[name] |= targets_of(step.get("run", ""))
    assert all(called.values())
    assert set().union(*called.values()) <= targets
    assert called["ci.yml"] == targets_of((ROOT / ".ci/run").read_text()) | {"coverage"}


def test_the_workflows_name_versions_that_there_are() -> None:
    jobs = WORKFLOWS["ci.yml"]["jobs"]
    assert set(jobs["versions"]["strategy"]["matrix"]["version"]) <= {*VERSIONS, *ALIASES}
    pythons = jobs["test"]["strategy"]["matrix"]["python"]
    classifiers = (ROOT / "pyproject.toml").read_text()
    assert re.findall(r'"Programming Language :: Python :: (3\.\d+)"', classifiers) == pythons
    assert importlib.metadata.metadata("hf-flashmask")["Requires-Python"] == f">={pythons[0]}"
    for page in ("README.md", "docs/supported.md"):
        assert f"Python {pythons[0]} to {pythons[-1]}." in (ROOT / page).read_text()


def test_actions_are_pinned_to_a_release() -> None:
    actions = {step["uses"] for _, step in STEPS if "uses" in step}
    assert actions
    for action in actions:
        assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+(\.\d+)*", action), action


def test_the_oldest_versions_that_are_allowed_are_tested() -> None:
    oldest = {
        pin.name: next(iter(pin.specifier)).version for pin in map(Requirement, VERSIONS["torch-2.9"].requirements)
    }
    needed = [Requirement(line) for line in importlib.metadata.requires("hf-flashmask") or [] if "extra" not in line]
    assert {requirement.name for requirement in needed} == {"torch", "transformers", "triton"}
    for requirement in needed:
        (bound,) = requirement.specifier
        assert (bound.operator, Version(bound.version)) == (">=", Version(oldest[requirement.name]))


def test_kernels_need_neither_transformers_nor_the_plugin(tmp_path: Path) -> None:
    code = """
import sys, torch
sys.modules["transformers"] = sys.modules["hf_flashmask"] = None  # importing them fails
from flashmask_kernels import flashmask_attention
query = torch.randn(1, 2, 5, 8)
torch.testing.assert_close(
    flashmask_attention(query, query, query, is_causal=True),
    torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True),
)
"""
    run_python(code, cwd=tmp_path)


def test_kernels_load_under_another_name_beside_the_installed_ones(tmp_path: Path) -> None:
    """As the Kernel Hub loads them: from a folder, under a name of its own, several versions in one process."""
    code = f"""
import importlib.util, sys, torch, flashmask_kernels
folder = {str(PACKAGES["flashmask_kernels"])!r}
spec = importlib.util.spec_from_file_location("from_the_hub_1a2b", folder + "/__init__.py")
hub = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hub)
assert hub.flashmask_attention is not flashmask_kernels.flashmask_attention
query = torch.randn(1, 2, 5, 8)
bounds = torch.tensor([[[[3, 3, 3, 5, 5]]]], dtype=torch.int32)
expected, _ = flashmask_kernels.reference_attention(query, query, query, bounds)
for package in (hub, flashmask_kernels):
    compiled = torch.compile(package.flashmask_attention, backend="eager", fullgraph=True)
    torch.testing.assert_close(package.flashmask_attention(query, query, query, bounds), expected)
    torch.testing.assert_close(compiled(query, query, query, bounds), expected)
"""
    run_python(code, cwd=tmp_path)


@pytest.mark.hub
def test_the_library_of_the_hub_loads_what_is_published(tmp_path: Path) -> None:
    """Windows that differ between heads, and a row that sees nothing, against dense float32 attention."""
    code = f"""
import pathlib, sys, torch
sys.path.insert(0, {str(ROOT / "examples")!r})
import kernel_hub, kernels
hub = kernel_hub.load_from_checkout(pathlib.Path({str(tmp_path)!r}), "cpu")
assert not {{"flashmask_kernels", "hf_flashmask"}} & set(sys.modules)
(loaded,) = kernels.get_loaded_kernels()

length, hidden_row, windows = 45, 20, (4, 9, 2, 45)
row, column = torch.arange(length)[:, None], torch.arange(length)
visible, planes = [], []
for window in windows:
    visible.append((column <= row) & (row - column < window) & (row != hidden_row))
    intervals = (column + window, length), (0, column), (hidden_row, hidden_row + 1)
    planes.append(torch.stack([torch.as_tensor(end).expand(length) for pair in intervals for end in pair]))
visible, bounds = torch.stack(visible), torch.stack(planes)[None].int()

generator = torch.Generator().manual_seed(0)
query, key, value = (torch.randn(2, heads, length, 24, generator=generator).requires_grad_() for heads in (4, 2, 2))
scores = query @ key.repeat_interleave(2, 1).mT / 24**0.5
weights = scores.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num()
dense = weights @ value.repeat_interleave(2, 1)
out = hub.flashmask_attention(query, key, value, bounds)
torch.testing.assert_close(out, dense, rtol=1e-4, atol=1e-5)
kept = [at for at in range(length) if at != hidden_row]
gradients = [torch.autograd.grad(of[:, :, kept].square().sum(), (query, key, value)) for of in (out, dense)]
for one, other in zip(*gradients):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
print(loaded.metadata.name, loaded.metadata.version, hub.__file__)
"""
    name, version, file = processes.run_python(code).split()
    published = (ROOT / "kernels/build.toml").read_text()
    assert f'name = "{name}"\nversion = {version}\n' in published
    assert Path(file) == tmp_path / "build/torch-cpu/__init__.py"
    assert re.search(r'^backends = .*"cpu".*"cuda"', published, re.MULTILINE)


def test_the_card_has_no_link_that_leads_nowhere() -> None:
    """Relative ones do, on the Hub: it has the card and the kernels, not the repository."""
    links = re.findall(r"\]\(([^)\s]+)", (ROOT / "kernels/README.md").read_text())
    assert len(links) >= 3
    assert all(link.startswith("https://") for link in links)
    repository = "https://github.com/hf-flashmask/hf-flashmask"
    for link in links:
        path = link.removeprefix(f"{repository}/blob/main/")
        assert path == link or (ROOT / path).is_file(), link


def test_transformers_sees_the_same_kernels_library_in_the_repository_as_elsewhere() -> None:
    code = "import hf_flashmask; from transformers.utils import is_kernels_available; print(is_kernels_available())"
    assert run_python(code, cwd=ROOT).strip() == str(is_kernels_available())  # the tests do not see the repository


def test_an_installed_kernels_library_goes_before_the_folder_of_that_name(tmp_path: Path) -> None:
    library = tmp_path / "kernels/__init__.py"
    library.parent.mkdir()
    library.touch()
    code = "import kernels; print(kernels.__file__)"
    assert run_python(code, cwd=ROOT, paths=(tmp_path,)).strip() == str(library)


def test_the_tests_do_not_see_the_folder_as_a_library() -> None:
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is not None


def test_the_page_of_the_package_has_no_link_that_leads_nowhere(wheel: Path) -> None:
    metadata = zipfile.ZipFile(wheel).read(f"{'-'.join(wheel.name.split('-')[:2])}.dist-info/METADATA").decode()
    links = re.findall(r'(?:\]\(|src=")([^)"\s]+)', metadata.partition("\n\n")[2])
    assert len(links) > 20
    assert all(link.startswith(("https://", "#")) for link in links)
    urls = dict(line.split(", ") for line in importlib.metadata.metadata("hf-flashmask").get_all("Project-URL") or [])
    assert f"{urls['Repository']}/blob/main/docs/performance.md" in links
    assert f"git clone {urls['Repository']}\n" in metadata


def test_the_sdist_holds_what_a_contributor_needs(wheel: Path) -> None:
    (sdist,) = wheel.parent.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "Makefile", "mkdocs.yml", "docs/pages.css"} <= names
