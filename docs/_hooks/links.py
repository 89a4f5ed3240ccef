"""Files outside docs/ that the site has, links to them, and notebooks as pages.

Links are written as they work in the repository. Those to files that the site has not become plain text.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
OUTSIDE = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "benchmarks/REPORT.md",
    "benchmarks/STUDIES.md",
    "benchmarks/results/*.json",
    "benchmarks/results/*.png",
)
LINK = re.compile(r"\[([^\[\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add files from outside docs/, and a page for each notebook."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            uri = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    for file in list(files):
        if file.src_uri.endswith(".ipynb"):
            content = notebook_page(Path(str(file.abs_src_path)))
            files.append(File.generated(config, _page_of_notebook(file.src_uri), content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links."""
    here = page.file.src_uri
    in_repository = here if (ROOT / here).is_file() else f"docs/{here}"

    def rewritten(match: re.Match[str]) -> str:
        text, target, anchor = match.group(1), match.group(2), match.group(3) or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(in_repository), target))
        if "://" in target or not (ROOT / path).exists():
            return match.group()
        uri = _page_of_notebook(path.removeprefix("docs/"))
        if files.get_file_from_path(uri) is None:
            return text
        return f"[{text}]({posixpath.relpath(uri, posixpath.dirname(here) or '.')}{anchor})"

    return LINK.sub(rewritten, markdown)


def notebook_page(path: Path) -> str:
    """Return a notebook's cells as Markdown, with a link to the notebook itself."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(f"```python\n{text}\n```" if cell["cell_type"] == "code" else text)
    download = f'<a href="../{path.name}" download>Download this page as a notebook.</a>'
    return "\n\n".join([parts[0], download, *parts[1:]])


def _page_of_notebook(uri: str) -> str:
    return uri.removesuffix(".ipynb") + ".md" if uri.endswith(".ipynb") else uri
