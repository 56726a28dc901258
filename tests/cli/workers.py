"""Command lines in processes of their own, to find tracebacks, hangs, crashes, failed allocations and threads left.

The processes are forked from a server that has imported the package once and has no threads, so that no command can
disturb another. Root's are without its capabilities, because files without permission are among the data.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import multiprocessing
import os
import re
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from pathlib import Path

from tests.cli import command_lines, zoo

TIME_LIMIT_S = 20.0
"""Of a command line, on an idle machine."""
MEMORY_LIMIT = 4 * 2**30
"""Bytes by which the address space of a process may grow after its imports."""
FAILED_ALLOCATION = re.compile(
    r"MemoryError|bad_alloc|DefaultCPUAllocator|unable to allocate|can(no|')t allocate memory|can't start new thread",
    re.IGNORECASE,
)
MESSAGE = re.compile(r"^[^:\n]+: .*\b(must|cannot|could not|is|are|does|do|has|have|holds)\b")
TRACEBACK_HINT = "(set BYOL_FAST_TRACEBACK=1 for the traceback)"
"""Follows errors that may come from Python or a library; a message of the package says what must be how (`MESSAGE`)."""
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "COLUMNS": "200",
    "HF_HUB_OFFLINE": "1",
    # Nobody listens there: a download fails at once.
    "http_proxy": "http://127.0.0.1:9",
    "https_proxy": "http://127.0.0.1:9",
}
PRELOAD = (
    "datasets",
    "matplotlib.backends.backend_agg",
    "matplotlib.backends.backend_svg",
    "pyarrow.parquet",
    "safetensors.torch",
    "torchvision",
    "tests.cli.workers",
    "tests.networks",
)
NOT_PRELOADED = ("byol_fast.__main__", "byol_fast.bench", "byol_fast.compat", "byol_fast.data.loaders.dali")

Main = Callable[[list[str]], object]


@dataclass(frozen=True)
class Outcome:
    """A command line and what became of it."""

    number: int
    """Of the seeded command line; -1 for others."""
    argv: list[str]
    code: int | None
    """Exit code; None if the process did not end by itself; negative: minus the signal."""
    output: str
    """Standard output and standard error."""
    left: list[str]
    """Threads and processes that outlived the command."""
    cpu_seconds: float

    @property
    def fault(self) -> str | None:
        """A word for what is wrong, or None."""
        if self.code is None:
            return "hang"
        if self.code < 0:
            return f"crash ({signal.Signals(-self.code).name})"
        if "Traceback (most recent call last)" in self.output:
            return "traceback"
        if FAILED_ALLOCATION.search(self.output):
            return "failed allocation"
        if self.left:
            return f"left behind: {', '.join(self.left)}"
        if self.code and not self.output.strip():
            return "no message"
        lines = self.output.splitlines()
        is_raw = TRACEBACK_HINT in lines and not MESSAGE.match(lines[lines.index(TRACEBACK_HINT) - 1])
        return "raw message" if is_raw else None

    def describe(self) -> str:
        """The command line, and of its output the last line, or where in the package it hung or crashed."""
        lines = [line for line in self.output.splitlines() if line.strip() and line != TRACEBACK_HINT] or [""]
        frames = [line for line in lines if line.lstrip().startswith("File") and "byol_fast/" in line]
        ended = self.code is not None and self.code >= 0
        line = lines[-1] if ended or not frames else frames[0]
        command = shlex.join(["byol-fast", *self.argv])
        return f"[{self.number}] {self.fault or 'ok'}, exit code {self.code}: {command}\n    {line.strip()[:400]}"


# --- in the process of a command


def _serve(main: Main, argv: list[str], folder: Path, report: Connection) -> None:
    """Run a command in its folder and report its exit code and what it left behind; what it prints goes to a file."""
    gc.freeze()  # a collection would visit, and so copy, every object that the server has imported
    with (folder / "output").open("wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    faulthandler.enable(sys.stderr)
    os.chdir(folder / "work")
    os.environ["HOME"] = os.environ["TORCH_HOME"] = os.environ["TMPDIR"] = str(folder / "work")
    tempfile.tempdir = None
    _prepare_torch()
    _drop_capabilities()
    _limit_memory()
    code = _exit_code(main, argv)
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    report.send((code, _left_behind(), _cpu_seconds()))


def _prepare_torch() -> None:
    import torch

    from byol_fast.models import encoders
    from tests.networks import SmallResidualNetwork

    encoders.OWN_ENCODERS["small"] = lambda **_: SmallResidualNetwork()
    torch.set_num_threads(1)


def _drop_capabilities() -> None:
    """Give up the rights of root over files that permissions deny."""
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if os.geteuid() == 0 and ctypes.CDLL(None, use_errno=True).capset(header, none):
        raise OSError(ctypes.get_errno(), "capset")


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_LIMIT
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _exit_code(main: Main, argv: list[str]) -> int:
    try:
        main(argv)
    except SystemExit as stopped:
        if isinstance(stopped.code, str):
            print(stopped.code, file=sys.stderr)
        return stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _left_behind() -> list[str]:
    gc.collect()
    threads = [t.name for t in threading.enumerate() if t is not threading.main_thread() and not t.daemon]
    children: list[str] = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError):  # a thread that has just ended
            children += (task / "children").read_text().split()
    return [f"thread {name}" for name in threads] + [f"process {pid}" for pid in children]


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def byol_fast_main(argv: list[str]) -> None:
    """The entry point of the command line."""
    from byol_fast.cli.main import main

    main(argv)


# --- in the process that starts them


class Workers:
    """Runs command lines, each in a process of its own with a copy of the zoo as its current folder.

    Args:
        folder: for the zoo and the folders of the commands.
        context: starts the processes, see `fork_server`.
    """

    def __init__(self, folder: Path, context: ForkServerContext) -> None:
        self.folder = folder
        self._context = context
        (folder / "zoo").mkdir()

    def run(
        self, argv: Sequence[str], number: int = -1, *, main: Main = byol_fast_main, time_limit_s: float = TIME_LIMIT_S
    ) -> Outcome:
        """Run a command line; its folder is removed afterwards."""
        with self._folder(argv) as folder:
            return self._run(main, list(argv), number, folder, time_limit_s)

    def build_zoo(self) -> None:
        """Write the zoo: images, a run that some commands train and evaluate, and its damaged copies."""
        pristine = self.folder / "zoo"
        zoo.write_data(pristine)
        with self._folder([]) as folder:
            for argv in command_lines.commands_of_good_run(pristine):
                outcome = self._run(byol_fast_main, argv, -1, folder, 10 * TIME_LIMIT_S)
                assert outcome.code == 0, outcome.output
            shutil.copytree(folder / "work" / zoo.GOOD_RUN, pristine / zoo.GOOD_RUN)
        zoo.write_runs(pristine)

    @contextmanager
    def _folder(self, words: Sequence[str]) -> Iterator[Path]:
        """Folder of a command, with its part of the zoo in its current folder `work`."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        try:
            zoo.copy(self.folder / "zoo", folder / "work", words)
            yield folder
        finally:
            remove(folder)

    def _run(self, main: Main, argv: list[str], number: int, folder: Path, time_limit_s: float) -> Outcome:
        receiver, sender = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_serve, args=(main, argv, folder, sender))
        process.start()
        sender.close()
        limit = time_limit_s * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
        code, left, cpu_seconds = None, [], 0.0
        if wait([receiver], limit):
            with suppress(EOFError):  # it has died
                code, left, cpu_seconds = receiver.recv()
            process.join(limit)
            code = process.exitcode if code is None else code
        if process.exitcode is None:
            assert process.pid is not None
            os.kill(process.pid, signal.SIGABRT)  # faulthandler writes where each thread is
            process.join(5)
            process.kill()
            process.join()
            code = None
        output = (folder / "output").read_bytes().decode(errors="replace")
        return Outcome(number, argv, code, output, left, cpu_seconds)


def fork_server() -> ForkServerContext:
    """Context whose processes have imported the package, and what it imports later, and have no threads.

    Sets variables of the environment: no GPU, no network, one thread for each library.
    """
    import byol_fast

    os.environ.update(ENVIRONMENT)
    root = Path(byol_fast.__path__[0])
    files = [path.relative_to(root.parent).with_suffix("") for path in root.rglob("*.py") if path.stem != "__init__"]
    names = [".".join(path.parts) for path in files]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([n for n in names if not n.startswith(NOT_PRELOADED)] + list(PRELOAD))
    return context


def remove(folder: Path) -> None:
    """Remove a folder, also one with folders that cannot be entered."""
    for path in folder.rglob("*"):
        if path.is_dir() and not path.is_symlink():
            with suppress(OSError):
                path.chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)
