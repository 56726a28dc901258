"""README and docs: options, targets, links and paths in the text exist."""

from __future__ import annotations

import contextlib
import io
import re
import tomllib

import pytest

from byol_fast.cli import main
from tests.documents import BLOCK, DOCUMENTS, ROOT

HELP = [
    ["train", "imagenet_resnet50"], ["profile", "demo"], ["preview", "demo"], ["roofline", "demo"], ["doctor"],
    ["export"], ["eval", "knn"], ["eval", "linear"], ["eval", "finetune"], ["embed"], ["report"], ["bench"],
    ["bench", "cifar10"],
]  # fmt: skip
KNOWN = {"--resume", "--help"}
"""Options that no help text lists."""
OTHER_PROGRAMS = ("tar ",)
"""Beginnings of inline code whose options are not ours."""


def test_options_in_the_text_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    known = set(KNOWN)
    for words in HELP:
        output = io.StringIO()
        with contextlib.redirect_stdout(output), pytest.raises(SystemExit):
            main.main([*words, "--help"])
        known |= set(re.findall(r"--[\w.-]+", output.getvalue()))
    unknown = {}
    for document, text in DOCUMENTS.items():
        spans = re.findall(r"`([^`]+)`", BLOCK.sub("", text))
        inline = " ".join(span for span in spans if not span.startswith(OTHER_PROGRAMS))
        options = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*", inline))
        if document != "gpu.md" and options - known:  # gpu.md has other programs' options
            unknown[document] = options - known
    assert not unknown


def test_make_targets_exist() -> None:
    targets = {
        t for text in DOCUMENTS.values() for t in re.findall(r"`?make ((?:test-)?[a-z]+)\b(?=`| [A-Z]|\n)", text)
    }
    assert {"demo", "gpu", "bench", "test-peers"} <= targets
    defined = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert targets <= defined


def test_links_and_paths_exist() -> None:
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        text = path.read_text()
        for file, anchor in re.findall(r"\]\((?!http)([^)#\s]*)(#[^)]*)?\)", text):
            target = (path.parent / file).resolve() if file else path
            assert target.exists(), f"{path.name}: {file}"
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE) if anchor else []
            anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert not anchor or anchor[1:] in anchors, f"{path.name}: {file}{anchor}"
        for name in re.findall(r"`([\w/]+/[\w.]*\.(?:py|md|json|txt)|(?:tests|benchmarks|byol_fast)/[\w/.]*)`", text):
            places = (ROOT, ROOT / "byol_fast", ROOT / "kernels")
            generated = name.startswith(("runs/", "benchmarks/results/GPU"))
            assert generated or any((place / name).exists() for place in places), f"{path.name}: {name}"


def test_every_command_is_described() -> None:
    text = " ".join(DOCUMENTS.values())
    assert not [name for name in main.COMMANDS if name != "demo" and f"byol-fast {name}" not in text]


def test_extras_are_installed_from_the_clone() -> None:
    """The package is on no index: `pip install 'byol_fast[report]'` would fail."""
    code = [path for folder in ("byol_fast", "kernels", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    texts = DOCUMENTS | {str(path): path.read_text() for path in code}
    assert not [name for name, text in texts.items() if re.search(r"install .?byol_fast\[", text)]
    used = {extra for text in texts.values() for extra in re.findall(r"pip install '\.\[([\w,]+)\]'", text)}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert used
    assert {name for extra in used for name in extra.split(",")} <= set(extras)
