"""Writes the performance tables of the README from `benchmarks/results/`.

    python -m benchmarks.readme [--check]

Between `<!-- results FOLDER/FILE.json [suites=TEXT] [extras=NAME,NAME] -->` and `<!-- end results -->` are the tables
of the suites whose name contains the text, with these extras as columns.
"""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path
from typing import Any

from byol_fast.bench.results import SuiteResult, load
from byol_fast.utils.files import atomic_write

ROOT = Path(__file__).parents[1]
FROM_IMAGES = {"data", "end-to-end"}
BLOCK = re.compile(r"<!-- results (.+?) -->\n.*?<!-- end results -->", re.DOTALL)
TITLES = {
    "peak_gib": "peak memory, GiB", "ops": "operators per call", "host_syncs": "host syncs", "gb_per_s": "GB/s",
    "share_of_copy": "share of a copy's bandwidth", "data_wait": "time waiting for data", "note": "difference",
    "flags": "process-wide flags",
}  # fmt: skip


def table(suite: SuiteResult, extras: list[str]) -> list[str]:
    """A suite as a Markdown table, byol_fast in bold."""
    heads = [suite.name, suite.unit, "speed relative to the first", *(TITLES[name] for name in extras)]
    rows = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * 2 + "|---" * len(extras) + "|"]
    for number, candidate in enumerate(suite.candidates):
        low, middle, high = suite.quantiles(candidate.timing)
        time, time_low, time_high = suite.relative_to_first(candidate)
        speed = "1" if number == 0 else f"{1 / time:.2f} [{1 / time_high:.2f} - {1 / time_low:.2f}]"
        name = f"{candidate.name} {candidate.extras.get('version', '')}".strip()
        cells = [name, f"{_short(middle)} [{_short(low)} - {_short(high)}]", speed]
        if candidate.is_byol_fast:
            cells = [f"**{cell}**" for cell in cells]
        rows.append("| " + " | ".join(cells + [_extra(name, candidate.extras.get(name)) for name in extras]) + " |")
    return rows


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _extra(name: str, value: Any) -> str:
    if value is None:
        return ""
    if name in {"share_of_copy", "data_wait"}:
        return f"{value:.0%}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def environment_line(content: dict[str, Any]) -> str:
    """Machine, versions, commit and date of a measurement."""
    record, settings = content["environment"], content["settings"]
    machine = record.get("gpu") or f"{record['cpu']}, {record['cpus']} cores"
    threads = f", {settings['threads']} thread{'s' * (settings['threads'] != 1)}" if settings.get("threads") else ""
    commit = f"commit {record['commit'][:9]}{' with changes' if record['dirty'] else ''}" if record["commit"] else ""
    versions = f"torch {record['packages']['torch']}"
    images = "synthetic JPEGs" if settings.get("images") == "synthetic" and content["name"] in FROM_IMAGES else ""
    parts = (f"{machine}{threads}", images, versions, commit, record["date"], f"load {record['load']}")
    return ", ".join(filter(None, parts))


def update_tables(text: str, results: Path) -> str:
    """The text with its tables rebuilt from the results."""

    def block(match: re.Match[str]) -> str:
        file, *options = shlex.split(match[1])
        filters = dict(option.split("=", 1) for option in options)
        content, suites = load(results / file)
        extras = [name for name in filters.get("extras", "").split(",") if name]
        parts: list[str] = []
        for suite in suites:
            if filters.get("suites", "") in suite.name:
                parts += [*table(suite, extras), ""]
        if not parts:
            raise ValueError(f"readme: {file} must have suites whose name contains {filters['suites']!r}, got none")
        source = f"(`benchmarks/results/{file}`: median and the middle 60 % of the rounds; {environment_line(content)})"
        return f"<!-- results {match[1]} -->\n" + "\n".join([*parts, source]) + "\n<!-- end results -->"

    return BLOCK.sub(block, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a table is out of date")
    arguments = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text()
    updated = update_tables(text, ROOT / "benchmarks" / "results")
    if arguments.check:
        raise SystemExit(0 if updated == text else "README.md is out of date: python -m benchmarks.readme")
    atomic_write(readme, updated)


if __name__ == "__main__":
    main()
