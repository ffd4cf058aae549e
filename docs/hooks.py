"""What the site has besides docs/*.md: README.md as its first page, and the changelog.

Pages link to files of the repository as they do on disk, and so work in a clone; on the site such links lead to the
repository.
"""

from __future__ import annotations

import re
from pathlib import Path
from posixpath import normpath, relpath
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
FROM_THE_ROOT = {"index.md": "README.md", "changelog.md": "CHANGELOG.md"}
TARGET = re.compile(r'(?<=\]\()(?!https?:|mailto:|#)([^)\s#]+)(?=[)#])|(?<=src=")(?!https?:)([^"]+)(?=")')


def on_files(files: Files, config: Any) -> Files:
    for page, source in FROM_THE_ROOT.items():
        text = TARGET.sub(lambda link: from_docs(link[0]), (ROOT / source).read_text())
        files.append(File.generated(config, page, content=text))
    return files


def from_docs(link: str) -> str:
    """A link of a file in the root, as a file in docs/ has it."""
    if link in FROM_THE_ROOT.values():
        return next(page for page, source in FROM_THE_ROOT.items() if source == link)
    return link.removeprefix("docs/") if link.startswith("docs/") else f"../{link}"


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    folder = Path("docs", page.file.src_uri).parent.as_posix()

    def resolve(link: re.Match[str]) -> str:
        path = normpath(f"{folder}/{link[0]}")
        if path in FROM_THE_ROOT.values():
            return relpath(f"docs/{from_docs(path)}", folder)
        is_page = path.startswith("docs/") and not (ROOT / path).is_dir() and not path.endswith(".py")
        return link[0] if is_page else f"{config.repo_url}/blob/main/{path}"

    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else TARGET.sub(resolve, part) for part in parts)


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Pictures in HTML are found from a page's file, but a page is served from a folder of its own."""
    return html if page.file.src_uri == "index.md" else re.sub(r'src="(?=(masks/)?\w+\.png")', 'src="../', html)


def on_post_build(config: Any) -> None:
    """MkDocs checks links in Markdown; pictures in HTML are checked here."""
    site = Path(config.site_dir)
    for page in site.rglob("index.html"):
        for source in re.findall(r'<img[^>]* src="(?!https?:|data:)([^"]+)"', page.read_text()):
            if not (page.parent / source).exists():
                raise PluginError(f"{page.relative_to(site)} shows {source}, which does not exist")
