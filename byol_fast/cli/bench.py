"""`byol-fast bench`."""

from __future__ import annotations

from pathlib import Path

import tyro

from byol_fast.bench.options import Options
from byol_fast.cli.options import parse


def main(argv: list[str]) -> int:
    """Run the command and return the exit code."""
    if argv and argv[0] == "compare":
        return _compare(argv[1:])
    if argv and argv[0] == "cifar10":
        from byol_fast.cli import bench_cifar10

        return bench_cifar10.main(argv[1:])
    options = parse(Options, argv, "byol-fast bench")

    from byol_fast.bench.runner import Bench

    Bench(options).run()
    return 0


def _compare(argv: list[str]) -> int:
    def options(before: tyro.conf.Positional[Path], after: tyro.conf.Positional[Path]) -> tuple[Path, Path]:
        """List the changes between two measurements; exit with 1 if byol_fast became slower beyond the noise.

        Args:
            before: folder or file of results.
            after: the same, of the later measurement.
        """
        return before, after

    before, after = tyro.cli(options, args=argv, prog="byol-fast bench compare")

    from byol_fast.bench.compare import compare, table

    changes = compare(before, after)
    print("\n".join(table(changes)))
    slower = [c for c in changes if c.is_byol_fast and c.verdict == "slower"]
    faster = [c for c in changes if c.is_byol_fast and c.verdict == "faster"]
    print(f"{len(changes)} compared; byol_fast: {len(slower)} slower, {len(faster)} faster beyond the noise")
    return 1 if slower else 0
