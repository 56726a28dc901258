"""Item: the tests marked gpu, one process per group, eight at a time.

A group is a capability (`tests/gpu.py`), or a single file of the kernels, which have the most tests. An error that
ends the CUDA context of one group does not affect the others.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.item import Context
from benchmarks.gpu.items.common import ROOT, is_small
from benchmarks.gpu.items.pytest_records import VARIABLE
from benchmarks.gpu.results import without_folders
from tests.gpu import CAPABILITIES

NUM_PARALLEL = 8
RESERVE = 6.0
"""Seconds before the deadline at which running groups are ended, so that the logs are packed."""
LONGEST = ("training", "step", "kernels", "parity", "decode", "export")
"""Capabilities whose tests take longest; they start first, so that none is left running alone."""
ARCHIVE = "gpu_tests.tgz"


@dataclass(frozen=True)
class Group:
    """Tests that run in one process."""

    name: str
    capability: str
    paths: tuple[str, ...]
    options: tuple[str, ...] = ()


@dataclass
class Outcome:
    """Outcome of a group's tests."""

    passed: int = 0
    skips: Counter[str] = field(default_factory=Counter)
    failures: dict[str, str] = field(default_factory=dict)
    """Test and message."""
    seconds: float = 0.0


def run(context: Context) -> str | None:
    """Run all groups until the deadline; logs and records of each test go into one archive."""
    waiting = groups(small=is_small(context))
    total, unfinished = Counter[str](), []
    deadline = time.monotonic() + context.seconds_left() - RESERVE
    with tempfile.TemporaryDirectory() as folder:
        running: list[Process] = []
        try:
            while (waiting and time.monotonic() < deadline) or running:
                while waiting and len(running) < NUM_PARALLEL and time.monotonic() < deadline:
                    running.append(Process(waiting.pop(0), Path(folder), on_cpu=context.device == "cpu"))
                over = time.monotonic() >= deadline
                for process in [p for p in running if over or p.is_done()]:
                    running.remove(process)
                    timed_out = not process.is_done()
                    process.end()
                    if timed_out:
                        unfinished.append(process.group.name)
                    total += _record(context, process.group, process.outcome(timed_out=timed_out))
                time.sleep(0.1)
        finally:
            for process in running:
                process.end()
            for path in Path(folder).iterdir():
                path.write_text(without_folders(path.read_text(errors="replace")))
            with tarfile.open(context.folder / ARCHIVE, "w:gz") as archive:
                archive.add(folder, arcname="gpu_tests")
    counts = {name: total[name] for name in ("passed", "failed", "skipped")}
    context.record("all tests", **counts, not_started=[group.name for group in waiting], cut_off=unfinished)
    missing = [group.name for group in waiting] + unfinished
    return f"no time for {', '.join(missing)}" if missing else None


def groups(*, small: bool) -> list[Group]:
    """Groups in the order in which they start.

    Args:
        small: only a few fast tests.
    """
    if small:
        return [Group("knn", "knn", ("tests/test_gpu.py",), ("-k", "neighbors_are"))]
    texts = {path: path.read_text() for path in sorted((ROOT / "tests").rglob("test_*.py"))}
    marked = {str(path.relative_to(ROOT)): text for path, text in texts.items() if "mark.gpu" in text}
    names = [*LONGEST, *(name for name in CAPABILITIES if name not in LONGEST)]
    result: list[Group] = []
    for name in [name for name in names if name in CAPABILITIES]:
        if name == "kernels":
            # The fixtures `device...` of these tests are marked in their conftest.py.
            paths = [path for path, text in texts.items() if path.parent.name == "kernels" and "device" in text]
            result += [
                Group(f"kernels, {path.stem.removeprefix('test_')}", name, (str(path.relative_to(ROOT)),))
                for path in paths
            ]
        else:
            # Collecting a file takes a second, so files that do not mention the capability are left out.
            mentioning = tuple(path for path, text in marked.items() if f'"{name}"' in text)
            result.append(Group(name, name, mentioning or tuple(marked)))
    return result


class Process:
    """A process that runs a group's tests.

    Args:
        group: of tests.
        folder: for its log and records.
        on_cpu: rehearse the tests there; see `tests/gpu.py`.
    """

    def __init__(self, group: Group, folder: Path, *, on_cpu: bool) -> None:
        self.group, self._start = group, time.monotonic()
        name = re.sub(r"\W+", "_", group.name)
        self._records, self._log = folder / f"{name}.jsonl", folder / f"{name}.log"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--capability", group.capability]
        command += ["-p", "benchmarks.gpu.items.pytest_records", "-p", "no:cacheprovider", "--show-capture=no"]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [*command, "--continue-on-collection-errors", "--durations=5", *group.options, *group.paths],
                cwd=ROOT,
                env={
                    **os.environ,
                    VARIABLE: str(self._records),
                    **({"BYOL_FAST_REHEARSE": "1"} if on_cpu else {}),
                },
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # child processes of the tests end with them
            )

    def is_done(self) -> bool:
        """True if the process has ended."""
        return self._process.poll() is not None

    def end(self) -> None:
        """Kill the process and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def outcome(self, *, timed_out: bool) -> Outcome:
        """Outcome of the tests, from their records and the exit code.

        Args:
            timed_out: the process was ended at the deadline.
        """
        outcome = Outcome(seconds=time.monotonic() - self._start)
        current = ""
        lines = self._records.read_text().splitlines() if self._records.exists() else []
        for record in map(json.loads, lines):
            if record["kind"] == "start":
                current = record["test"]
                continue
            _count(outcome, record)
            current = "" if record["when"] == "teardown" else current
        code = self._process.returncode
        if timed_out:
            outcome.failures[current or "(collecting)"] = "still running at the deadline"
        elif code < 0 or code > 5:
            reason = f"signal {-code}" if code < 0 else f"exit code {code}"
            outcome.failures[current or "(collecting)"] = f"process ended: {reason}"
        elif code not in {0, 5} and not outcome.failures:
            outcome.failures["(pytest)"] = f"exit code {code}: {last_line(self._log)}"
        return outcome


def _count(outcome: Outcome, record: dict[str, Any]) -> None:
    if record["outcome"] == "failed":
        outcome.failures[record["test"]] = record["why"]
    elif record["outcome"] == "skipped":
        outcome.skips[record["why"]] += 1
    elif record["when"] == "call":
        outcome.passed += 1


def last_line(log: Path) -> str:
    """Last non-empty line of a log."""
    lines = log.read_text(errors="replace").splitlines()
    return next((line for line in reversed(lines) if line.strip()), "no output")


def _record(context: Context, group: Group, outcome: Outcome) -> Counter[str]:
    """Record a group and its failures; return the counts."""
    counts = {"passed": outcome.passed, "failed": len(outcome.failures), "skipped": outcome.skips.total()}
    reasons = [f"{why[:150]} ({number})" for why, number in outcome.skips.most_common(3)]
    values = {"skips": reasons} if reasons else {}
    context.record(f"tests: {group.name}", **counts, seconds=round(outcome.seconds, 1), **values)
    for test, message in outcome.failures.items():
        text, where = " ".join(without_folders(message).split()), CAPABILITIES[group.capability]
        context.record(f"failed: {test}", message=text[:400], look_at=where)
    return Counter(counts)
