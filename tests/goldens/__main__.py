"""Run the worker in both trees, then compare what they wrote."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TREE = HERE.parents[1]


def main() -> int:
    """Compare; the exit code is 1 if any result differs."""
    parser = argparse.ArgumentParser(prog="python -m tests.goldens", description=__doc__)
    parser.add_argument("--base", required=True, help="commit to compare with")
    parser.add_argument("--only", default="", help="run only cases whose name contains this")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base = folder / "base"
        archive = subprocess.run(["git", "archive", arguments.base], cwd=TREE, check=True, capture_output=True).stdout
        (folder / "base.tar").write_bytes(archive)
        with tarfile.open(folder / "base.tar") as tar:
            tar.extractall(base, filter="data")
        runs = {side: _start(side, tree, folder, arguments.only) for side, tree in (("base", base), ("now", TREE))}
        for side, process in runs.items():
            if process.wait() != 0:
                print((folder / f"{side}.log").read_text()[-4000:])
                print(f"{side}: the worker ended with exit status {process.returncode}")
                return 1
        results = {side: json.loads((folder / f"{side}.json").read_text()) for side in runs}
    return _compare(results["base"], results["now"])


def _start(side: str, tree: Path, folder: Path, only: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": f"{tree}:{tree / 'kernels'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "worker.py"), side, str(folder / f"{side}.json"), only]
    with (folder / f"{side}.log").open("wb") as log:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)


def _compare(base: dict[str, Any], now: dict[str, Any]) -> int:
    """Print a line for each case."""
    failures = 0
    for name in base | now:
        then, here = base.get(name), now.get(name)
        if then == here and then is not None:
            print(f"equal    {name}: {_summary(then)}")
            continue
        failures += 1
        print(f"DIFFERS  {name}")
        if then is None or here is None:
            print(f"         only in {'this tree' if then is None else 'the base'}")
            continue
        for key in sorted(then.keys() | here.keys()):
            if then.get(key) != here.get(key):
                print(f"         {key}: {_shortened(then.get(key))} -> {_shortened(here.get(key))}")
    print(f"{len(base | now)} cases, {failures} differ")
    return int(failures > 0)


def _summary(result: dict[str, Any]) -> str:
    tensors = result.get("tensors")
    return f"{len(tensors)} tensors, {len(result) - 1} series" if tensors else f"{len(result)} numbers"


def _shortened(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 160 else text[:157] + "..."


if __name__ == "__main__":
    sys.exit(main())
