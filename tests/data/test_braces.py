"""Brace patterns of shards: the names that bash makes of them, and a limit on their number."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from byol_fast.data import SourceError, open_source
from byol_fast.data.sources import TarSource
from byol_fast.data.sources.braces import expand_braces
from tests.data.kinds import options, write_tar

PATTERNS = [
    "a-{08..11}.tar", "{8..10}{x,y}", "plain{}{1}", "{a,{b,c}d}e", "{{0..2},{7..5}}", "{00..3}", "{9..10}", "{3..1}",
    "{a,b}{0..1}{x,y}", "a{b,c", "{a,{b,c}", "a}b{c,d}e", "{x{1,2}}", "{,a}b{c,}", "{-1..1}", "{-01..1}", "{5..5}",
    "{0..2}{", "{{a,b},{{c,d},e}}", "{a..2}", "{1.2}", "{1...3}",
]  # fmt: skip


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_braces_are_expanded_as_in_bash() -> None:
    script = "".join(f"printf '%s\\n' {pattern}; echo;" for pattern in PATTERNS)
    output = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    expected = [names.split("\n") for names in output.removesuffix("\n\n").split("\n\n")]
    assert [[name for name in expand_braces(pattern, "images") if name] for pattern in PATTERNS] == expected


@pytest.mark.parametrize(
    "pattern",
    [
        "{0..1000000}", "{0..99999999}", "{0..999}{0..999}{0..1}", "{a,{0..999999}}",
        "{5..-99999999999999999999999999}", "{0..9}" * 2000, "{a,b}" * 20, f"{{0..{'9' * 900}}}",
    ],
)  # fmt: skip
def test_number_of_names_is_limited(pattern: str, tmp_path: Path) -> None:
    """Counted, not expanded: these would fill the memory."""
    with pytest.raises(SourceError, match=r"^data\.root: a pattern must stand for at most 1,000,000 names, got more"):
        open_source(tmp_path / f"{pattern}.tar", arg_name="data.root")


def test_largest_number_of_names_is_expanded() -> None:
    names = expand_braces("{000..999}/{a,{b..2},{0..997}}", "images")
    assert len(names) == 1_000_000
    assert names[:3] == ["000/a", "000/{b..2}", "000/0"] and names[-1] == "999/997"


def test_depth_is_limited() -> None:
    assert expand_braces("{a," * 40 + "b" + "}" * 40, "images") == ["a"] * 40 + ["b"]
    with pytest.raises(SourceError, match="images: braces must be nested at most 50 deep, got more"):
        expand_braces("{a," * 2000 + "b" + "}" * 2000, "images")


@pytest.mark.parametrize("pattern", ["{a{0..1},b}.tar", "*.tar", "{b,a1,a0}.tar", "{a*,b,*}.tar", "{a0,a1,b,b}.tar"])
def test_shards_in_a_folder_with_brackets(pattern: str, tmp_path: Path) -> None:
    """Brackets in a folder's name are no pattern; a shard that several alternatives name is read once."""
    folder = tmp_path / "set [1]*"
    folder.mkdir()
    for name in ("a0", "a1", "b"):
        write_tar(folder / f"{name}.tar", [(f"{name}.jpg", b"")])
    source = open_source(folder / pattern, options=options(tmp_path / "cache"))
    assert isinstance(source, TarSource) and sorted(source.names) == ["a0.jpg", "a1.jpg", "b.jpg"]


def test_long_pattern_is_no_file_name(tmp_path: Path) -> None:
    names = [f"{i:030d}" for i in range(20)]
    for name in names:
        write_tar(tmp_path / f"{name}.tar", [(f"{name}.jpg", b"")])
    source = open_source(tmp_path / f"{{{','.join(names)}}}.tar", options=options(tmp_path / "cache"))
    assert isinstance(source, TarSource) and source.names == tuple(f"{name}.jpg" for name in names)
