"""Run the GPU code on a CUDA runtime that does nothing: `make dry SHIM=FOLDER`."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.dry import FAILED, OK

SECTIONS = ("trainer", "steps", "profile", "queue", "local")
PROCESSES = 2
"""Sections at a time."""
TIMEOUT_S = 1800.0
"""A section that takes longer hangs: on two idle cores all of them together take less than 12 minutes."""


def main() -> int:
    """Run all sections and print a line for each thing tried; 1 if anything failed."""
    try:
        site = Path(str(importlib.import_module("fake_gpu").__file__)).parent / "site"
    except ModuleNotFoundError:
        print(
            "dry run: python must be started by a launcher that makes `fake_gpu` importable, got a plain Python; "
            "use make dry SHIM=FOLDER"
        )
        return 2
    # The sitecustomize.py there loads fake_gpu in a process at its start, and in all processes that it starts.
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])}
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(PROCESSES) as pool:
        running = [pool.submit(_section, name, Path(temporary) / f"{name}.log", env) for name in SECTIONS]
        results = [line for section in running for line in section.result()]
    failed = [line for line in results if line.startswith(FAILED)]
    print(f"\ndry run: {len(results)} tried, {len(failed)} failed, {time.monotonic() - begin:.0f} s", *failed, sep="\n")
    return 1 if failed else 0


def _section(name: str, log: Path, env: dict[str, str]) -> list[str]:
    """Run a section in a process of its own and print its results as they come; their lines.

    Args:
        name: of the section.
        log: file for everything else that it prints.
        env: environment of the process.
    """
    results: list[str] = []
    command = [sys.executable, "-m", "tests.dry.sections", name]
    with (
        log.open("w", buffering=1) as others,
        subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=others, text=True, errors="replace"
        ) as process,
    ):
        timer = threading.Timer(TIMEOUT_S, process.kill)
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith((OK, FAILED)):
                results.append(line.rstrip())
                print(results[-1], flush=True)
            else:
                others.write(line)
        code = process.wait()
        timer.cancel()
    if code:
        print(*log.read_text(errors="replace").splitlines()[-30:], sep="\n")
        results.append(f"{FAILED} section {name}: its process ended with exit code {code}, see its last lines above")
        print(results[-1], flush=True)
    return results


if __name__ == "__main__":
    sys.exit(main())
