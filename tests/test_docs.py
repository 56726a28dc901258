"""The site of the documentation: the messages of its FAQ are those of the code, and its pages are all listed."""

from __future__ import annotations

import ast
import itertools
import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def literals() -> list[str]:
    """All texts in the packages; a NUL byte for each value that is put into one."""
    texts = []
    for path in (*(ROOT / "byol_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(str(v.value) if isinstance(v, ast.Constant) else "\0" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(re.sub(r"%[sdr]", "\0", node.value))
    return texts


def test_messages_of_the_faq_are_those_of_the_code() -> None:
    messages = re.findall(r"^### `(.+)`$", (DOCS / "faq.md").read_text(), re.MULTILINE)
    assert len(messages) > 30
    texts = literals()
    for message in messages:
        pattern = re.compile(".*".join(re.escape(part.strip()) for part in message.split("...")), re.DOTALL)
        assert any(map(pattern.search, texts)), message


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r"([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    assert pages <= set(listed)
    assert len(listed) == len(set(listed))


def test_lists_begin_after_an_empty_line() -> None:
    """Without it a code host shows a list and the site a paragraph."""
    item = re.compile(r"([-*]|\d+\.) ")
    for path in (*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")):
        lines = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE).splitlines()
        for before, line in itertools.pairwise(lines):
            begins = item.match(line) and before and not before.startswith((" ", "#")) and not item.match(before)
            assert not begins, f"{path.name}: {line}"


def test_size_is_named_before_it_is_downloaded() -> None:
    command, environment = ["make", "-n", "-B", ".venv/.ready"], {"PATH": os.environ["PATH"]}
    lines = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    row = r"^\| `make demo`.*\| ([\d.]+ GB) \| ([\d.]+ GB) \|$"
    sizes = re.search(row, (DOCS / "install.md").read_text(), re.MULTILINE)
    assert sizes is not None
    assert f"{sizes[1]} to download and {sizes[2]} on disk" in lines.splitlines()[0]
