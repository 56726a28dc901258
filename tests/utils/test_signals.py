"""Signals: during training, and Ctrl-C before it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from byol_fast.utils.signals import GracefulShutdown, exit_on_interrupt, raise_on_interrupt

INTERRUPTED_BAR = """
import os, signal
from byol_fast.utils.signals import exit_on_interrupt

exit_on_interrupt()
from byol_fast.utils.output import PlainConsole
from byol_fast.utils.progress import Progress

with Progress(PlainConsole()).bar(None, "scanning"):
    if (process := os.fork()) == 0:  # as a process of a data loader
        signal.raise_signal(signal.SIGINT)
    print("exit code", os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
    signal.raise_signal(signal.SIGINT)
"""


def test_interrupt_leaves_a_cursor_and_one_line() -> None:
    terminal, other_end = os.openpty()
    command = [sys.executable, "-c", INTERRUPTED_BAR]
    environ = os.environ | {"TERM": "xterm"}
    process = subprocess.Popen(command, stdin=other_end, stdout=other_end, stderr=other_end, env=environ)
    os.close(other_end)
    output = b""
    try:
        while block := os.read(terminal, 10_000):
            output += block
    except OSError:  # EIO: nobody has the other end open
        pass
    os.close(terminal)
    assert process.wait() == 130
    assert b"scanning" in output and b"exit code -2" in output
    assert output.rindex(b"\x1b[?25l") < output.rindex(b"\x1b[?25h")
    assert output.endswith(b"\r\nSIGINT: stopped\r\n") and output.count(b"SIGINT") == 1


@pytest.mark.parametrize("start", [["-m", "byol_fast"], ["-c", "from byol_fast.__main__ import main; main()"]])
@pytest.mark.parametrize(("module", "arguments"), [("tyro", ["--version"]), ("torch", ["train", "demo"])])
def test_interrupt_during_imports_shows_no_traceback(
    start: Sequence[str], module: str, arguments: Sequence[str], tmp_path: Path
) -> None:
    (tmp_path / f"{module}.py").write_text("import signal\nprint('x', end='')\nsignal.raise_signal(signal.SIGINT)\n")
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, *start, *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environ, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "x", "SIGINT: stopped\n")


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda *_: None])
def test_handlers_of_others_stay_and_ours_is_undone(handler: Any) -> None:
    before = signal.getsignal(signal.SIGINT)
    try:
        signal.signal(signal.SIGINT, handler)
        exit_on_interrupt()
        raise_on_interrupt()
        assert signal.getsignal(signal.SIGINT) is handler
        signal.signal(signal.SIGINT, signal.default_int_handler)
        exit_on_interrupt()
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        raise_on_interrupt()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_handlers_of_others_are_restored_and_ignored_signals_stay_ignored(capfd: pytest.CaptureFixture[str]) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    handlers: dict[signal.Signals, Any] = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: lambda *_: None,
        signal.SIGHUP: signal.SIG_IGN,
    }
    shutdown = GracefulShutdown()
    try:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        with shutdown.catch_signals():
            signal.raise_signal(signal.SIGHUP)
            assert shutdown.signum == 0
            signal.raise_signal(signal.SIGTERM)
            assert shutdown.signum == signal.SIGTERM
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert {number: signal.getsignal(number) for number in handlers} == handlers
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert "SIGTERM: saving after this step" in capfd.readouterr().err
