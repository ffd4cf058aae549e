"""The layout that DESIGN.md describes: which folder may import which, and that the page names them all."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PLUGIN, KERNELS = ROOT / "hf_flashmask", ROOT / "kernels" / "torch-ext" / "flashmask_kernels"

# Folder -> the folders beside it that it may import.
ARROWS = {
    "bounds": set(),
    "integration": {"bounds"},
    "sharing": {"bounds", "integration"},
    "training": {"bounds", "integration", "sharing"},
    "visualization": {"bounds"},
    "parallel": {"bounds", "integration", "sharing", "training"},
    "command_line": {"bounds", "integration", "sharing", "training", "visualization"},
}
KERNEL_ARROWS = {
    "common": {"configs", "dropout", "launch", "schedule"},
    "launch": {"common", "configs", "dropout", "environment", "schedule"},
    "portable": {"common", "configs", "launch", "schedule"},
    "hopper": {"common", "configs", "launch", "schedule"},
}


def imports_of(path: Path, package: Path) -> Iterator[str]:
    """The modules and folders right below `package` that a file in one of its folders imports."""
    depth = len(path.relative_to(package).parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            yield from [node.module.partition(".")[0]] if node.module else [alias.name for alias in node.names]


@pytest.mark.parametrize(("package", "arrows"), [(PLUGIN, ARROWS), (KERNELS, KERNEL_ARROWS)], ids=["plugin", "kernels"])
def test_arrows_go_one_way(package: Path, arrows: dict[str, set[str]]) -> None:
    folders = {path.name for path in package.iterdir() if (path / "__init__.py").exists()}
    assert folders == set(arrows)
    for folder, allowed in arrows.items():
        for path in (package / folder).rglob("*.py"):
            assert set(imports_of(path, package)) <= allowed, path


def test_the_kernels_know_nothing_of_transformers() -> None:
    for path in KERNELS.rglob("*.py"):
        names = {
            name.partition(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom) and not node.level
                else []
            )
        }
        assert names.isdisjoint({"transformers", "hf_flashmask", "flashmask_kernels"}), path


def test_the_design_names_every_file() -> None:
    page = (ROOT / "DESIGN.md").read_text()
    for package in (PLUGIN, KERNELS):
        for path in package.rglob("*.py"):
            inner = len(path.relative_to(package).parts) > 1 and package is KERNELS
            if path.name != "__init__.py" and not inner:
                assert path.name in page, path
        for folder in package.iterdir():
            if folder.is_dir() and (folder / "__init__.py").exists():
                assert f"{folder.name}/" in page, folder


def test_compilers_of_all_versions_trace_what_passes_are_made_of() -> None:
    """The one of torch 2.9 does not trace properties of named tuples. Nothing else tells where no such torch is."""
    for path in (*(PLUGIN / "integration").rglob("*.py"), *(PLUGIN / "bounds").rglob("*.py")):
        classes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)]
        for node in classes:
            methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
            decorators = {ast.unparse(name) for method in methods for name in method.decorator_list}
            is_tuple = "NamedTuple" in map(ast.unparse, node.bases)
            assert not (is_tuple and "property" in decorators), f"{path}: {node.name}"
