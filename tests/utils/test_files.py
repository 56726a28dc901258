"""Names as text, and files that are written atomically."""

from __future__ import annotations

import io
import os
import random
import re
from pathlib import Path

import pytest
from rich.table import Table

import byol_fast
from byol_fast.utils.files import atomic_path, atomic_write, original_name, printable_name, printable_text
from byol_fast.utils.output import PlainConsole


def test_printable_names_are_one_line_and_reversible() -> None:
    rng = random.Random(0)
    letters = [*"ab\\xu0e9nrt \n\t\r\0\x0b\x1b\x7f\x85\u202e\u200f\u2028é🐈", "\udce9", "\udc80", "\udcff", "\ud800"]
    for _ in range(5000):
        name = "".join(rng.choices(letters, k=rng.randint(0, 9)))
        text = printable_name(name)
        assert original_name(text) == name
        assert printable_text(text) == text
        assert len(text.encode().decode().splitlines()) <= 1
    for name in ("a/b c.jpg", "Ünïcode 漢字 👩\u200d👧.png", "no-break\u202fspace\u00a0"):
        assert printable_name(name) == original_name(name) == name
    assert printable_name(os.fsdecode(b"caf\xe9\n\\")) == r"caf\xe9\n\\"


def test_console_prints_text_as_it_is() -> None:
    out = io.StringIO()
    console = PlainConsole(file=out, width=60, force_terminal=False)
    console.print("[/b] :smile: x:100:y 'a' \x1b[31m \udce9", soft_wrap=True)
    table = Table("[/i]:100:", title="[/b] :smile:")
    table.add_row("[red]a[/red]\x07")
    console.print(table)
    shown = out.getvalue()
    assert shown.splitlines()[0] == r"[/b] :smile: x:100:y 'a' \x1b[31m \xe9"
    assert "[/i]:100:" in shown and r"[red]a[/red]\x07" in shown and "[/b] :smile:" in shown


def test_package_prints_by_plain_consoles() -> None:
    root = Path(byol_fast.__file__).parent
    sources = {path.relative_to(root).as_posix(): path.read_text("utf-8") for path in root.rglob("*.py")}
    users = {name for name, text in sources.items() if re.search(r"(?<![A-Za-z])Console\(|rich import print", text)}
    assert not users, "use PlainConsole"
    columns = re.findall(r"TextColumn\((.*)\)", sources["utils/progress.py"])
    assert columns and all("markup=False" in column for column in columns)


def test_trial_writes_nothing_and_raises_what_the_file_would(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    longest = tmp_path / ("ü" * 127)
    with atomic_path(longest, trial=True) as temporary:
        temporary.write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    atomic_write(longest, "é")
    assert longest.read_bytes() == "é".encode()
    with atomic_path(longest, trial=True) as temporary:
        temporary.write_text("y")
    assert longest.read_bytes() == "é".encode()
    for bad in (tmp_path / "folder", tmp_path / ("ü" * 128), longest / "x", tmp_path / "none" / "x", Path(), Path("/")):
        with pytest.raises(OSError, match=r"Is a directory|File name too long|Not a directory|No such file"):  # noqa: SIM117
            with atomic_path(bad, trial=True):
                pass
    assert len(list(tmp_path.iterdir())) == 2
