"""GPU queue: tests and measurements that need a GPU, in order of value, within a time limit (`make gpu`).

An item is skipped if it was answered before with the same files and versions, if a requirement is missing, or if its
predicted time does not fit the time left; then the next one that fits runs. Results go to benchmarks/results/GPU as
they arrive, and to results.tgz in the folder --out, which is updated as items end. The summary is always printed last.
With --rehearse the same code runs on the CPU with tiny sizes; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from benchmarks.gpu import plan, results
from benchmarks.gpu.item import Item
from benchmarks.gpu.process import Worker, last_lines
from benchmarks.gpu.results import ARCHIVE, RESULTS, Status
from benchmarks.gpu.summary import STATES, Outcome, summary

MINUTES, REHEARSAL_MINUTES = 6.3, 60.0
OVERRUN, REHEARSAL_OVERRUN = 3.0, 10.0
"""Factor of the predicted seconds after which an item is ended, so that one that hangs does not block the others."""
MAX_START_SECONDS = 120.0
"""Seconds after which a process that has not started is killed."""
REPACK_SECONDS = 10.0
"""Minimum time between two archives while an item runs."""


class Queue:
    """A run of the queue.

    Args:
        options: of the command line.
        items: to run, in their order.
        start: `time.monotonic()` at the start of the time limit.
    """

    def __init__(self, options: argparse.Namespace, items: Sequence[Item], start: float) -> None:
        self.options, self.items, self.start = options, items, start
        self.rehearsal: bool = options.rehearse
        self.seconds = 60.0 * options.minutes
        self.deadline = start + self.seconds - plan.MARGIN
        self.outcomes: list[Outcome] = []
        self.shared: Worker | None = None
        self.stop = ""
        """Reason why no further item starts: the name of a signal, or a process that does not start."""
        self.environment: dict[str, Any] = {}
        self.folder = self.out = Path()
        self.startup_log = Path()
        self._last_pack = 0.0

    def run(self) -> int:
        """Run the items and return the exit code."""
        with tempfile.TemporaryDirectory(prefix="byol-fast-gpu-") as temporary, self._signals():
            self.startup_log = Path(temporary) / "startup.log"
            self.shared, problem = self._start_worker()
            if self.shared is None:
                print(f"python -m benchmarks.gpu: {problem}", file=sys.stderr)
                return 2
            device = "cpu" if self.rehearsal else str(self.shared.environment.get("gpu"))
            scratch = "gpu-rehearsal-" if self.rehearsal else "gpu-results-"
            self.out = self.options.out or Path(tempfile.mkdtemp(prefix=scratch))
            parent = self.options.results or (Path(tempfile.mkdtemp(prefix=scratch)) if self.rehearsal else RESULTS)
            self.folder = parent.resolve() / results.slug(device)
            internal_error = False
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.out.mkdir(parents=True, exist_ok=True)
                self._pack()
                for item in self.items:
                    self._run(item)
            except Exception:
                traceback.print_exc()
                internal_error = True
            finally:
                if self.shared is not None:
                    self.shared.end()
            too_large = self._pack()
            self._summarize(device, too_large)
        failed = internal_error or any(outcome.state == "failed" for outcome in self.outcomes)
        return 1 if failed or self.stop else 0

    # ------------------------------------------------------------------------------------------ items

    def _run(self, item: Item) -> None:
        """Run an item, or record why it is skipped."""
        if self.shared is not None and self.shared.exit_reason():  # killed while idle
            self.shared.end()
            self.shared = None
        warm = self.shared is not None and not item.own_process
        predicted = plan.seconds_of(item, warm=warm)
        skip_reason = self._reason_to_skip(item, warm=warm)
        if skip_reason:
            self._report(Outcome(name=item.name, state="skipped", predicted=predicted, reason=skip_reason))
            return
        left = self.deadline - time.monotonic()
        say(f"\n==== {item.name}: {item.question} ({predicted:.0f} s predicted, {left:.0f} s left)")
        start = time.monotonic()
        worker, problem = (self.shared, "") if warm else self._start_worker()
        if worker is None:
            is_over = time.monotonic() >= self.deadline
            self.stop = self.stop or ("no time is left" if is_over else "processes do not start")
            state: Literal["skipped", "failed"] = "skipped" if is_over else "failed"
            self._report(Outcome(name=item.name, state=state, predicted=predicted, reason=problem))
            return
        if not item.own_process:
            self.shared = worker
        usable = False
        try:
            status, reason, usable = self._run_on(worker, item, predicted, start)
        finally:
            if item.own_process or not usable:
                worker.end()
                self.shared = None if worker is self.shared else self.shared
        seconds = time.monotonic() - start
        reason, log = results.without_folders(reason), self.folder / item.name / "log.txt"
        if log.exists():
            log.write_text(results.without_folders(log.read_text(errors="replace")))
        path = results.path_of(self.folder, item)
        results.write_footer(path, item, status, seconds, reason)
        result = results.read(path)
        figures = result.figures if result is not None else []
        self._report(
            Outcome(name=item.name, state=status, predicted=predicted, seconds=seconds, reason=reason, figures=figures)
        )
        self._pack()

    def _reason_to_skip(self, item: Item, *, warm: bool) -> str:
        if self.stop:
            return f"not started: {self.stop}"
        answered = "" if self.options.again else plan.answered(item, self.folder, results.versions())
        free = None if self.shared is None else self.shared.free_gib
        reason = answered or plan.missing_requirements(item, rehearsal=self.rehearsal, free_gib=free)
        least, left = plan.least_seconds(item, warm=warm), self.deadline - time.monotonic()
        return reason or (f"needs {least:.0f} s, {max(left, 0):.0f} are left" if least > left or left < 0 else "")

    def _run_on(self, worker: Worker, item: Item, predicted: float, start: float) -> tuple[Status, str, bool]:
        """Run an item on a worker; return the status, the reason if it is not complete, and if the worker is usable."""
        records, folder = results.path_of(self.folder, item), self.folder / item.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        results.write_header(records, item, worker.environment, predicted)
        allowed = (REHEARSAL_OVERRUN if self.rehearsal else OVERRUN) * item.seconds
        deadline = min(self.deadline, time.monotonic() + allowed)
        worker.send(item=item.name, records=str(records), folder=str(folder), deadline=deadline)
        self._last_pack = time.monotonic()
        with Tail(folder / "log.txt") as tail:
            reply = worker.receive(deadline, lambda: self._watch(tail))
        if reply is not None:
            return reply["status"], reply["reason"], reply["usable"]
        exit_reason = worker.exit_reason()
        if exit_reason:
            return "failed", f"{last_lines(folder / 'log.txt')}\n{exit_reason}".strip()[-3000:], False
        worker.end()  # before its records are read
        result = results.read(records)
        status: Status = "partial" if result is not None and result.figures else "failed"
        if self.stop:
            return status, f"ended by {self.stop}", False
        limit = "end of the time limit" if deadline == self.deadline else f"limit of {allowed:.0f} s for this item"
        return status, f"ended after {time.monotonic() - start:.0f} s: {limit}", False

    def _start_worker(self) -> tuple[Worker | None, str]:
        """Start a worker; return it, or None and the reason."""
        worker = Worker(items=self.options.items, log=self.startup_log, rehearsal=self.rehearsal)
        limit = min(self.deadline, time.monotonic() + MAX_START_SECONDS)
        hello = worker.receive(limit, lambda: bool(self.stop))
        if hello is not None and "error" not in hello:
            worker.environment = self.environment = hello["environment"]
            return worker, ""
        exit_reason = worker.exit_reason()
        worker.end()
        if hello is not None:
            return None, str(hello["error"])
        if self.stop:
            return None, f"ended by {self.stop}"
        return None, f"{last_lines(self.startup_log)}\n{exit_reason or 'a process did not start in time'}".strip()

    # ------------------------------------------------------------------------------------------ signals and output

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Let a signal end the running item; archive and summary are still written."""

        def stop(signum: int, _frame: FrameType | None) -> None:
            self.stop = self.stop or signal.Signals(signum).name

        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, stop) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _watch(self, tail: Tail) -> bool:
        """Print the output of the running item and archive its records; return True if it has to stop."""
        tail.show()
        if time.monotonic() - self._last_pack > REPACK_SECONDS:
            self._pack()
        return bool(self.stop)

    def _pack(self) -> list[str]:
        """Archive the results and return the files that were too large; an error (a full disk) is only printed."""
        self._last_pack = time.monotonic()
        try:
            return results.pack(self.folder, self.out / ARCHIVE)
        except OSError as error:
            say(f"{self.out / ARCHIVE} could not be written: {error}")
            return []

    def _report(self, outcome: Outcome) -> None:
        """Append and print the outcome of an item."""
        self.outcomes.append(outcome)
        took = "" if outcome.state == "skipped" else f" after {outcome.seconds:.1f} s"
        reason = f": {outcome.reason.splitlines()[-1]}" if outcome.reason else ""
        say(f"---- {outcome.name}: {STATES.get(outcome.state, outcome.state)}{took}{reason}")

    def _summarize(self, device: str, too_large: Sequence[str]) -> None:
        states = [STATES.get(outcome.state, outcome.state) for outcome in self.outcomes]
        counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        packages = self.environment.get("packages", {})
        where = f"{device}, torch {packages.get('torch')}, commit {str(self.environment.get('commit'))[:9]}"
        used = f"{time.monotonic() - self.start:.0f} of {self.seconds:.0f} s"
        title = "Rehearsal, figures mean nothing" if self.rehearsal else "GPU queue"
        head = f"{title}: {where}, {self.environment.get('date')}: {counts or 'no items'}; {used}"
        large = f"; too large for it: {', '.join(too_large)}" if too_large else ""
        foot = f"Results: {self.folder}; {self.out / ARCHIVE}{large}"
        say("\n" + summary(head, self.outcomes, foot)[:-1])


class Tail:
    """Prints the text appended to a file.

    Args:
        path: of the file, which need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.position = path, 0

    def __enter__(self) -> Tail:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.show()

    def show(self) -> None:
        """Print the new text."""
        with contextlib.suppress(OSError), self.path.open("rb") as file:
            file.seek(self.position)
            new = file.read()
            self.position += len(new)
            if new:
                say(new.decode(errors="replace"), end="")


def say(text: str, end: str = "\n") -> None:
    """Print and flush; a closed output is ignored."""
    with contextlib.suppress(OSError):
        print(text, end=end, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the queue, or list it; return 0 if nothing failed."""
    start = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    minutes = f"time limit; {MINUTES:g} by default, {REHEARSAL_MINUTES:g} in a rehearsal"
    parser.add_argument("--minutes", type=float, help=minutes)
    parser.add_argument("--out", type=Path, help=f"folder of {ARCHIVE}; a temporary folder by default")
    parser.add_argument("--list", action="store_true", help="print the plan; needs no GPU")
    parser.add_argument("--only", type=lambda text: text.split(","), help="run only these items: NAME,NAME")
    parser.add_argument("--again", action="store_true", help="also run answered items")
    parser.add_argument("--rehearse", action="store_true", help="run with tiny sizes on the CPU")
    parser.add_argument("--results", type=Path, help="parent of the result folders, for tests and dry runs")
    parser.add_argument("--items", default="benchmarks.gpu.items", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.minutes is None:
        options.minutes = REHEARSAL_MINUTES if options.rehearse else MINUTES
    items: tuple[Item, ...] = importlib.import_module(options.items).ITEMS
    if unknown := set(options.only or ()) - {item.name for item in items}:
        parser.error(f"--only must name some of {', '.join(item.name for item in items)}, got {', '.join(unknown)}")
    items = tuple(item for item in items if not options.only or item.name in options.only)
    if options.out and options.out.resolve().is_relative_to(RESULTS):
        parser.error(f"--out must be a folder outside benchmarks/results, which is archived, got {options.out}")
    if options.rehearse and options.results and options.results.resolve().is_relative_to(RESULTS):
        parser.error(f"--results: a rehearsal must stay out of benchmarks/results, got {options.results}; leave it out")
    if options.list:
        parent = options.results or RESULTS
        seconds = 60 * options.minutes
        print(plan.listing(items, seconds=seconds, parent=parent, rehearsal=options.rehearse, again=options.again))
        return 0
    return Queue(options, items, start).run()
