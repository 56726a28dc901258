"""Every test marked `gpu`, a line for each capability: `python -m tests.gpu_report`, or `make gpu-test`.

Each capability has a process of its own, so that an error that breaks one's CUDA context is not taken for another's.
With --rehearse the same runs on the CPU; see `tests/gpu.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.gpu import CAPABILITIES

ROOT = Path(__file__).parents[1]
MINUTES = 6.0


@dataclass
class Outcome:
    """What became of a capability's tests."""

    passed: int = 0
    skips: Counter[str] = field(default_factory=Counter)
    failures: dict[str, str] = field(default_factory=dict)
    """Test and message."""
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        """`ok`, `FAILED` or `skipped`."""
        return "FAILED" if self.failures else "ok" if self.passed else "skipped"


class Run:
    """A capability's tests in a process.

    Args:
        name: of the capability.
        folder: for its log and results.
        arguments: for pytest besides.
    """

    def __init__(self, name: str, folder: Path, arguments: Sequence[str]) -> None:
        self.name, self.begin = name, time.monotonic()
        self.results, self.log = folder / f"{name}.jsonl", folder / f"{name}.log"
        self.results.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--capability", name]
        command += ["-p", "tests.gpu_plugin", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, "--show-capture=no", "--durations=5", *arguments, "tests"],
                cwd=ROOT,
                env={**os.environ, "BYOL_FAST_GPU_RESULTS": str(self.results)},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # what tests have started ends with them
            )

    def over(self, deadline: float) -> bool:
        """Whether it has ended; it is ended at the deadline."""
        if self.process.poll() is None and time.monotonic() < deadline:
            return False
        self._end()
        return True

    def _end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def outcome(self, *, timed_out: bool) -> Outcome:
        """What its tests have written down, and how it ended."""
        found = Outcome(seconds=time.monotonic() - self.begin)
        lines = self.results.read_text().splitlines() if self.results.exists() else []
        under_way = ""
        for record in map(json.loads, lines):
            under_way = record["test"] if record["kind"] == "start" else under_way
            if record["kind"] == "report":
                self._count(found, record)
                under_way = "" if record["when"] == "teardown" else under_way
        code = self.process.returncode
        if timed_out:
            found.failures[under_way or "(collecting)"] = "had not ended when the time was over"
        elif code < 0 or code > 5:
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            found.failures[under_way or "(collecting)"] = f"its process ended: {how}"
        elif code not in {0, 5} and not found.failures:
            found.failures["(pytest)"] = f"exit code {code}: {last_line(self.log)}"
        return found

    @staticmethod
    def _count(found: Outcome, record: dict[str, Any]) -> None:
        if record["outcome"] == "failed":
            found.failures[record["test"]] = record["why"]
        elif record["outcome"] == "skipped":
            found.skips[record["why"]] += 1
        elif record["when"] == "call":
            found.passed += 1


def last_line(log: Path) -> str:
    """Of what a process has printed."""
    lines = log.read_text(errors="replace").splitlines()
    return next((line for line in reversed(lines) if line.strip()), "nothing printed")


def line(name: str, outcome: Outcome) -> str:
    """A capability's line."""
    counts = f"{outcome.passed} passed"
    counts += f", {len(outcome.failures)} failed" if outcome.failures else ""
    counts += f", {outcome.skips.total()} skipped" if outcome.skips else ""
    reasons = "; ".join(f"{why} ({n})" if n > 1 else why for why, n in outcome.skips.most_common(3))
    text = f"{name:<10}{outcome.verdict:<8}{outcome.seconds:6.0f} s  {CAPABILITIES[name].shows}: {counts}"
    return text + (f" ({reasons})" if reasons else "")


def details(name: str, outcome: Outcome, log: Path) -> list[str]:
    """What failed, and what to look at."""
    if not outcome.failures:
        return []
    text = [f"\n{name}: look at {CAPABILITIES[name].look_at}", f"  everything: {log}"]
    for test, message in list(outcome.failures.items())[:5]:
        text.append(f"  python3 -m pytest -m gpu '{test}'")
        text += [f"    {part[:200]}" for part in message.strip().splitlines()[:4]]
    more = len(outcome.failures) - 5
    return [*text, f"  and {more} more"] if more > 0 else text


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tests; 1 where something failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_report", description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="the same on the CPU")
    parser.add_argument("--only", nargs="+", choices=list(CAPABILITIES), metavar="CAPABILITY", help="not all of them")
    parser.add_argument("--minutes", type=float, help=f"for everything; {MINUTES:g}, in a rehearsal 40")
    parser.add_argument("--jobs", type=int, help="processes at a time; by default one for four cores, 4 at most")
    parser.add_argument("--logs", type=Path, help="folder for logs; one for temporary files by default")
    options, rest = parser.parse_known_args(argv)

    begin = time.monotonic()
    if options.rehearse:
        os.environ["BYOL_FAST_REHEARSE"] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    )
    deadline = begin + 60 * (options.minutes or (40 if options.rehearse else MINUTES))
    folder = options.logs or Path(tempfile.mkdtemp(prefix="gpu-test-"))
    folder.mkdir(parents=True, exist_ok=True)
    jobs = options.jobs or max(1, min(4, len(os.sched_getaffinity(0)) // 4))
    print(
        f"{'rehearsal on the CPU' if options.rehearse else 'GPU tests'}, {jobs} at a time; logs: {folder}", flush=True
    )

    # The longest first, so that none is left running alone.
    order = sorted(CAPABILITIES, key=lambda name: name not in {"kernels", "step", "tuned", "training"})
    waiting = [name for name in order if name in (options.only or CAPABILITIES)]
    running: list[Run] = []
    outcomes: dict[str, Outcome] = {}
    logs: dict[str, Path] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs and time.monotonic() < deadline:
                running.append(Run(waiting.pop(0), folder, rest))
            for run in list(running):
                timed_out = run.process.poll() is None and time.monotonic() >= deadline
                if run.over(deadline):
                    running.remove(run)
                    outcomes[run.name], logs[run.name] = run.outcome(timed_out=timed_out), run.log
                    print(line(run.name, outcomes[run.name]), flush=True)
            if waiting and time.monotonic() >= deadline:
                for name in waiting:
                    outcomes[name] = Outcome(failures={"(none)": "was not begun: no time left"})
                    logs[name] = folder
                    print(line(name, outcomes[name]), flush=True)
                waiting.clear()
            time.sleep(0.1)
    finally:
        for run in running:
            run._end()
    for name, outcome in outcomes.items():
        print("\n".join(details(name, outcome, logs[name])), end="\n" if outcome.failures else "")
    failed = [name for name, outcome in outcomes.items() if outcome.failures]
    verdict = f"{len(failed)} of {len(outcomes)} FAILED: {', '.join(failed)}" if failed else "nothing failed"
    print(f"\n{verdict}; {time.monotonic() - begin:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
