"""Seeded command lines in worker processes.

python -m tests.cli START STOP [--workers 2]      those of these numbers: prints the ones that fail
python -m tests.cli NUMBER                        one of them, with its output
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from tests.cli import command_lines
from tests.cli.workers import Workers, fork_server, remove


def main() -> int:
    """Run seeded command lines, print those that fail and what all of them cost; 1 if any failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("start", type=int)
    parser.add_argument("stop", type=int, nargs="?")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path, default="/dev/null", help="file for all outcomes, one a line")
    options = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    numbers = range(options.start, options.stop or options.start + 1)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        workers = Workers(folder, fork_server())
        workers.build_zoo()
        lines = {number: command_lines.command_line(number) for number in numbers}
        with ThreadPoolExecutor(options.workers) as pool, options.json.open("w") as records:
            outcomes = []
            for outcome in pool.map(lambda number: workers.run(lines[number], number), numbers):
                outcomes.append(outcome)
                records.write(json.dumps(asdict(outcome) | {"fault": outcome.fault}) + "\n")
                records.flush()
                if outcome.fault or options.stop is None:
                    print(outcome.describe(), flush=True)
        remove(folder)
    if options.stop is None:
        print(outcomes[0].output)
    failed = sum(outcome.fault is not None for outcome in outcomes)
    seconds = sum(outcome.cpu_seconds for outcome in outcomes)
    print(f"{len(outcomes)} command lines, {failed} failed, {seconds:.0f} CPU-seconds")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
