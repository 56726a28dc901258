"""Output that cannot be written, and signals: what a program notices of them."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from byol_fast.utils.output import ignore_output_errors


@pytest.mark.parametrize(
    ("arguments", "redirections", "code"),
    [
        ("--help", ">&-", 0),
        ("--help", ">/dev/full", 0),
        ("train demo --help", "| head -1", 0),
        ("tran", "2>&1 | true", 2),
        ("tran", "<&- >&- 2>&-", 2),
    ],
)
def test_command_without_output_has_its_exit_code(arguments: str, redirections: str, code: int) -> None:
    """Also at the very end, where Python writes what is still buffered."""
    command = f'set -o pipefail; "{sys.executable}" -m byol_fast {arguments} {redirections}'
    result = subprocess.run(["bash", "-c", command], stderr=subprocess.PIPE, text=True, check=False)
    assert result.returncode == code
    assert "Traceback" not in result.stderr and "Exception ignored" not in result.stderr


CLOSED = """
import os
from byol_fast.utils.output import ignore_output_errors
with ignore_output_errors():
    with open("file", "w") as file:
        os.write(2, b"of a library")
        print("x", flush=True)
        file.write("data")
"""


def test_file_does_not_take_a_closed_descriptor(tmp_path: Path) -> None:
    command = ["bash", "-c", f"exec '{sys.executable}' -c '{CLOSED}' >&- 2>&-"]
    subprocess.run(command, check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert (tmp_path / "file").read_text() == "data"


def test_full_disk_with_space_again_takes_output_again(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    os.write(write, bytes(1 << 16))  # a full pipe has the same error class: it may pass
    with os.fdopen(write, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with ignore_output_errors():
            print("lost?", flush=True)
            os.read(read, 1 << 16)
            print("kept", flush=True)
    with os.fdopen(read) as reader:
        assert reader.read().endswith("kept\n")


def test_text_beyond_the_encoding_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    data = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(data, encoding="ascii"))
    with ignore_output_errors():
        print("é", "\udce9.jpg")
    assert data.getvalue() == b"\\xe9 \\udce9.jpg\n"


def test_closed_stream_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    for stream in (closed, None):
        monkeypatch.setattr(sys, "stdout", stream)
        with ignore_output_errors():
            print("x", flush=True)
            sys.stdout.writelines(["x"])
        assert sys.stdout is stream
