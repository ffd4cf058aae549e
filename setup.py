"""The page of the package is README.md, with links that lead to the repository. All else is in pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
TARGET = re.compile(r'(?P<before>\]\(|src=")(?!https?:|#)(?P<path>[^)"\s]+)')


def page_of_the_package() -> str:
    found = re.search(r'^Repository = "(.*)"$', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert found is not None

    def absolute(link: re.Match[str]) -> str:
        kind = "raw" if link["before"].startswith("src") else "blob"
        return f"{link['before']}{found[1]}/{kind}/main/{link['path']}"

    return TARGET.sub(absolute, (ROOT / "README.md").read_text(encoding="utf-8"))


setup(long_description=page_of_the_package(), long_description_content_type="text/markdown")
