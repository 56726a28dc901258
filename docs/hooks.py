"""Hooks of the site: pages that are files outside docs/ (README.md is its front page), and a check of the reference."""

from __future__ import annotations

import ast
import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

log = logging.getLogger("mkdocs.hooks.reference")
ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/NOTES.md": "notes.md",
    "benchmarks/results/README.md": "result_files.md",
}
RESULTS = "benchmarks/results/"


def on_files(files: Files, config: Any) -> Files:
    """Add the pages, and the results that docs/results.md links to."""
    linked = re.findall(rf"\]\(\.\./({RESULTS}[^)]+)\)", (ROOT / "docs" / "results.md").read_text())
    for source, page in ({file: file for file in linked} | PAGES).items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links between files of the repository into links between pages."""
    uri = page.file.src_uri
    source = next((name for name, target in PAGES.items() if target == uri), f"docs/{uri}")

    def link(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[1]))
        inside = path.startswith(("docs/", RESULTS))
        target = PAGES.get(path, path.removeprefix("docs/") if inside else "")
        return f"]({posixpath.relpath(target, posixpath.dirname(uri) or '.')}" if target else match[0]

    return re.sub(r"\]\((?!\w+:|#)([^)#\s]+)", link, markdown)


def on_page_content(html: str, page: Any, **_: Any) -> None:
    """Warn about public names that a page of the reference lacks, such as a function with the name of its module, and
    about examples outside of an `Examples:` section, which would be shown as quotations.
    """
    if "reference/" not in page.url:
        return
    if "<blockquote" in html:
        log.warning(f"{page.file.src_uri}: an example in a docstring must be in a section `Examples:`")
    for module in re.findall(r"^::: (\S+)$", page.markdown, re.MULTILINE):
        missing = [name for name in _public_names(module) if not re.search(rf'id="[\w.]*\.{name}"', html)]
        if missing and "members:" not in page.markdown:
            log.warning(f"{page.file.src_uri}: {module} has {', '.join(missing)}; name it, as `::: {module}....`")


def _public_names(module: str) -> list[str]:
    """`__all__` of a module, read from its source; empty without one."""
    stem = ROOT / ("kernels" if module.startswith("byol_kernels") else "") / module.replace(".", "/")
    path = stem / "__init__.py" if stem.is_dir() else stem.with_suffix(".py")
    for node in ast.parse(path.read_text()).body if path.exists() else ():
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return list(ast.literal_eval(node.value))
    return []
