"""Writes the performance tables of the README from `benchmarks/results/`: nothing there is typed by hand.

    python -m benchmarks.readme [--check]

A table stands between `<!-- results FOLDER/FILE.json [suites=TEXT] [extras=NAME,NAME] -->` and `<!-- end results -->`:
the suites whose name contains the text, with these extras as columns.
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
    "peak_gib": "peak memory, GiB", "ops": "operators a call", "host_syncs": "host syncs", "gb_per_s": "GB/s",
    "share_of_copy": "share of a copy's bandwidth", "data_wait": "waits for data", "note": "what it does",
    "flags": "process-wide flags",
}  # fmt: skip


def table(suite: SuiteResult, extras: list[str]) -> list[str]:
    """A suite as Markdown, ours in bold."""
    heads = [suite.name, suite.unit, "speed over the first's", *(TITLES[name] for name in extras)]
    rows = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * 2 + "|---" * len(extras) + "|"]
    for number, contender in enumerate(suite.contenders):
        low, middle, high = suite.shown(contender.timing)
        over, over_low, over_high = suite.over_first(contender)
        # Times of the first over the contender's: how many times as fast it is.
        speed = "1" if number == 0 else f"{1 / over:.2f} [{1 / over_high:.2f} - {1 / over_low:.2f}]"
        name = f"{contender.name} {contender.extras.get('version', '')}".strip()
        cells = [name, f"{_short(middle)} [{_short(low)} - {_short(high)}]", speed]
        if contender.name.startswith("ours"):
            cells = [f"**{cell}**" for cell in cells]
        rows.append("| " + " | ".join(cells + [_extra(name, contender.extras.get(name)) for name in extras]) + " |")
    return rows


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _extra(name: str, value: Any) -> str:
    if value is None:
        return ""
    if name in {"share_of_copy", "data_wait"}:
        return f"{value:.0%}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def where(content: dict[str, Any]) -> str:
    """What the figures were measured on."""
    record, settings = content["environment"], content["settings"]
    machine = record.get("gpu") or f"{record['cpu']}, {record['cpus']} cores"
    threads = f", {settings['threads']} thread{'s' * (settings['threads'] != 1)}" if settings.get("threads") else ""
    commit = f"commit {record['commit'][:9]}{' with changes' if record['dirty'] else ''}" if record["commit"] else ""
    versions = f"torch {record['packages']['torch']}"
    images = "computed photographs" if settings.get("images") == "synthetic" and content["name"] in FROM_IMAGES else ""
    parts = (f"{machine}{threads}", images, versions, commit, record["date"], f"load {record['load']}")
    return ", ".join(filter(None, parts))


def written(text: str, results: Path) -> str:
    """The text with its tables made anew."""

    def block(match: re.Match[str]) -> str:
        file, *options = shlex.split(match[1])
        chosen = dict(option.split("=", 1) for option in options)
        content, suites = load(results / file)
        extras = [name for name in chosen.get("extras", "").split(",") if name]
        parts: list[str] = []
        for suite in suites:
            if chosen.get("suites", "") in suite.name:
                parts += [*table(suite, extras), ""]
        if not parts:
            raise ValueError(f"readme: {file} must have suites whose name contains {chosen['suites']!r}, got none")
        told = f"(`benchmarks/results/{file}`: median and the middle 60 % of the rounds; {where(content)})"
        return f"<!-- results {match[1]} -->\n" + "\n".join([*parts, told]) + "\n<!-- end results -->"

    return BLOCK.sub(block, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where a table is out of date")
    arguments = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text()
    made = written(text, ROOT / "benchmarks" / "results")
    if arguments.check:
        raise SystemExit(0 if made == text else "README.md is out of date: python -m benchmarks.readme")
    atomic_write(readme, made)


if __name__ == "__main__":
    main()
