"""Seeded command lines end with success or a message: no traceback, no hang, no failed allocation, nothing left.

A failure names its command line by number: `python -m tests.cli NUMBER` runs it again.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.cli.workers import MEMORY_LIMIT, Main, Workers
from tests.training.helpers import FORK_SERVER

ROOT = Path(__file__).parents[2]


def assert_no_fault(start: int, stop: int) -> None:
    command = [sys.executable, "-m", "tests.cli", str(start), str(stop)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", errors="replace", check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert f"{stop - start} command lines, 0 failed" in ended.stdout


def test_command_lines_have_no_fault() -> None:
    assert_no_fault(0, 60)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, 1000, 100))
def test_many_command_lines_have_no_fault(start: int) -> None:
    assert_no_fault(start, start + 100)


# --- the workers see faults


def raise_error(argv: list[str]) -> None:
    raise TypeError("no message for a user")


def crash(argv: list[str]) -> None:
    ctypes.string_at(0)


def wait_forever(argv: list[str]) -> None:
    threading.Event().wait()


def allocate_too_much(argv: list[str]) -> None:
    try:
        bytearray(2 * MEMORY_LIMIT)
    except MemoryError as error:
        sys.exit(f"config: too large ({type(error).__name__})")


def leave_thread(argv: list[str]) -> None:
    threading.Thread(target=threading.Event().wait, args=(1,), name="reader").start()


def leave_process(argv: list[str]) -> None:
    subprocess.Popen(["sleep", "1"])


def say_nothing(argv: list[str]) -> None:
    sys.exit(2)


def say_little(argv: list[str]) -> None:
    print("could not convert string to float: 'x'\n(set BYOL_FAST_TRACEBACK=1 for the traceback)")


def open_unreadable_file(argv: list[str]) -> None:
    Path("private").touch(0)
    try:
        Path("private").read_bytes()
    except PermissionError:
        sys.exit("private cannot be read")


def succeed(argv: list[str]) -> None:
    print(f"{argv} in {Path.cwd().name}")


@pytest.mark.parametrize(
    ("main", "fault", "output"),
    [
        (raise_error, "traceback", "TypeError: no message"),
        (crash, "crash (SIGSEGV)", "test_command_lines.py"),
        (wait_forever, "hang", "in wait_forever"),
        (allocate_too_much, "failed allocation", "too large"),
        (leave_thread, "left behind: thread reader", ""),
        (leave_process, "left behind: process", ""),
        (say_nothing, "no message", ""),
        (say_little, "raw message", ""),
        (open_unreadable_file, None, "private cannot be read"),
        (succeed, None, "['train'] in work"),
    ],
)
def test_worker_sees_fault(main: Main, fault: str | None, output: str, tmp_path: Path) -> None:
    outcome = Workers(tmp_path, FORK_SERVER).run(
        ["train"], main=main, time_limit_s=5 if main is not wait_forever else 0.5
    )
    assert outcome.fault == fault or (fault and (outcome.fault or "").startswith(fault)), outcome
    assert output in outcome.output
