"""Writes the performance tables of README.md and docs/ from `benchmarks/results/`: no number there is typed by hand.

    python -m benchmarks.readme [--check]

A table stands between `<!-- results FOLDER/FILE.json [suites=TEXT] [rows=NAME;NAME] [extras=NAME,NAME]
[title=TEXT] -->` and `<!-- end results -->`: the suites whose name contains the text, their rows (default: all), these
extras as columns, and a title instead of the suite's name. Results of the GPU queue: `<!-- queue FOLDER title=TEXT
rows=ITEM/FIGURE/LABEL;... [extras=NAME,NAME] -->` and `<!-- end queue -->`, a row for each figure. What the results say
about accuracy and whole runs: `<!-- table NAME -->` and `<!-- end table -->` with a name of `results_page.TABLES`.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any

from benchmarks import results_page
from benchmarks.records import machine, queue_figures
from byol_fast.bench.results import CandidateResult, SuiteResult, load
from byol_fast.utils.files import atomic_write

ROOT = Path(__file__).parents[1]
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
FROM_IMAGES = {"data", "end-to-end"}
BLOCK = re.compile(r"<!-- results (.+?) -->\n.*?<!-- end results -->", re.DOTALL)
QUEUE_BLOCK = re.compile(r"<!-- queue (.+?) -->\n.*?<!-- end queue -->", re.DOTALL)
TABLE_BLOCK = re.compile(r"<!-- table (\S+) -->\n(.*?)<!-- end table -->", re.DOTALL)
TITLES = {
    "peak_gib": "peak memory, GiB", "ops": "operators per call", "host_syncs": "host syncs", "gb_per_s": "GB/s",
    "share_of_copy": "share of the bandwidth of a copy", "data_wait": "time waiting for data", "note": "details",
    "flags": "process-wide flags", "images_per_second": "images/s",
}  # fmt: skip

# Candidates that were measured and have been removed from the package since: PIL's color path, DALI's approximate
# jitter, and the C code for CPUs.
REMOVED = {
    "byol_fast: threaded + PIL's operators",
    "byol_fast: dali + its operators, color hsv",
    "byol_fast: LARS.step(ema=...)",
    "byol_fast: LARS.step(ema=..., copies=...), bfloat16",
}
# The candidate without that C code is the operator of today.
RENAMED = {"byol_fast, where there is no C compiler": "byol_fast: LARS.step(ema=...)"}


def table(suite: SuiteResult, extras: list[str], title: str = "") -> list[str]:
    """A suite as Markdown, the rows of this package in bold."""
    heads = [title or suite.name, suite.unit, "times faster", *(TITLES[name] for name in extras)]
    rows = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * 2 + "|---" * len(extras) + "|"]
    for number, candidate in enumerate(suite.candidates):
        low, middle, high = suite.quantiles(candidate.timing)
        faster, faster_low, faster_high = suite.times_faster(candidate)  # than the first row
        speed = "1" if number == 0 else f"{faster:.2f} [{faster_low:.2f} - {faster_high:.2f}]"
        name = _label(candidate)
        cells = [name, f"{_short(middle)} [{_short(low)} - {_short(high)}]", speed]
        if candidate.is_byol_fast:
            cells = [f"**{cell}**" for cell in cells]
        rows.append("| " + " | ".join(cells + [_extra(name, candidate.extras.get(name)) for name in extras]) + " |")
    return rows


def caption(file: str, content: dict[str, Any]) -> str:
    """Source of a table: file, machine, versions, commit."""
    record, settings = content["environment"], content["settings"]
    threads = f", {settings['threads']} thread{'s' * (settings['threads'] != 1)}" if settings.get("threads") else ""
    commit = f"commit {record['commit'][:9]}{' with changes' if record['dirty'] else ''}" if record["commit"] else ""
    versions = f"torch {record['packages']['torch']}"
    images = "synthetic JPEGs" if settings.get("images") == "synthetic" and content["name"] in FROM_IMAGES else ""
    parts = (f"{machine(record)}{threads}", images, versions, commit, record["date"], f"load {record['load']}")
    where = ", ".join(filter(None, parts))
    return f"(`benchmarks/results/{file}`: median [20 % - 80 % quantile] over rounds; {where})"


def render(text: str, results: Path) -> str:
    """The text with its tables made from the results.

    Raises:
        ValueError: a block names suites, rows or a table that do not exist, or a file is damaged.
        OSError: a file is missing.
    """

    def block(match: re.Match[str]) -> str:
        file, options, extras = _options(match[1])
        content, suites = load(results / file)
        rows = list(filter(None, options.get("rows", "").split(";")))
        parts: list[str] = []
        for suite in suites:
            if options.get("suites", "") in suite.name:
                parts += [*table(_selected(suite, rows, file), extras, options.get("title", "")), ""]
        if not parts:
            raise ValueError(f"readme: {file} must have suites whose name contains {options['suites']!r}, got none")
        return f"<!-- results {match[1]} -->\n" + "\n".join([*parts, caption(file, content)]) + "\n<!-- end results -->"

    def queue_block(match: re.Match[str]) -> str:
        folder, options, extras = _options(match[1])
        lines = queue_table(results / folder, options["title"], options["rows"].split(";"), extras)
        return f"<!-- queue {match[1]} -->\n" + "\n".join(lines) + "\n<!-- end queue -->"

    def table_block(match: re.Match[str]) -> str:
        name, before = match.groups()
        if name not in results_page.TABLES:
            raise ValueError(f"readme: a table must be one of {', '.join(results_page.TABLES)}, got {name!r}")
        lines = results_page.TABLES[name](results)
        content = before if lines is None else "\n".join([*lines, ""])
        return f"<!-- table {name} -->\n{content}<!-- end table -->"

    return TABLE_BLOCK.sub(table_block, QUEUE_BLOCK.sub(queue_block, BLOCK.sub(block, text)))


def _options(text: str) -> tuple[str, dict[str, str], list[str]]:
    """Source, options and extras of a block."""
    source, *words = shlex.split(text)
    options = dict(word.split("=", 1) for word in words)
    return source, options, list(filter(None, options.get("extras", "").split(",")))


def queue_table(folder: Path, title: str, rows: list[str], extras: list[str]) -> list[str]:
    """Figures of the GPU queue as Markdown, with their source.

    The interval of a speed is the widest that the quantiles of both times allow.

    Args:
        folder: of a GPU's results.
        title: of the first column.
        rows: `ITEM/FIGURE/LABEL`; speeds are relative to the first.
        extras: values of the figures that get a column.

    Raises:
        ValueError: an item has no such figure.
        FileNotFoundError: an item has no file.
    """
    heads = [title, "ms", "times faster", *(TITLES[name] for name in extras)]
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (2 + len(extras)) + "|"]
    first: dict[str, Any] = {}
    headers: dict[str, dict[str, Any]] = {}
    for row in rows:
        item, figure, label = row.split("/")
        headers[item], values = _figure(folder / f"{item}.jsonl", figure)
        first = first or values
        low, middle, high = (values[name] for name in ("ms_p20", "ms", "ms_p80"))
        slowest, fastest = first["ms_p20"] / high, first["ms_p80"] / low
        speed = "1" if values is first else f"{first['ms'] / middle:.2f} [{slowest:.2f} - {fastest:.2f}]"
        cells = [label, f"{_short(middle)} [{_short(low)} - {_short(high)}]", speed]
        cells += [_extra(name, values.get(name)) for name in extras]
        cells = [f"**{cell}**" if label.startswith("byol_fast") else cell for cell in cells]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, "", _queue_caption(folder, headers)]


def _figure(path: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Header of an item's result, and a figure of it by name."""
    header, figures = queue_figures(path)
    if name not in figures:
        raise ValueError(f"readme: {path.parent.name}/{path.name} must have the figure {name!r}")
    return header, figures[name]


def _queue_caption(folder: Path, headers: dict[str, dict[str, Any]]) -> str:
    """Source of a table: files, GPU, driver, versions, commits."""
    environment = next(iter(headers.values()))["environment"]
    commits = ", ".join(dict.fromkeys(str(header["commit"])[:9] for header in headers.values()))
    driver, torch = environment["nvidia_smi"]["driver_version"], environment["packages"]["torch"]
    where = f"{environment['gpu']}, driver {driver}, torch {torch}, commit {commits}, {environment['date']}"
    files = ", ".join(f"{item}.jsonl" for item in headers)
    return f"(`benchmarks/results/{folder.name}/`, {files}: median [20 % - 80 % quantile] over rounds; {where})"


def _selected(suite: SuiteResult, rows: list[str], file: str) -> SuiteResult:
    """The suite without removed candidates, and with the candidates named by `rows` only, in their order."""
    present = {_label(c): c for c in suite.candidates if c.name not in REMOVED}
    if missing := [row for row in rows if row not in present]:
        raise ValueError(f"readme: {file} must have rows {', '.join(missing)}, got {', '.join(present)}")
    return dataclasses.replace(suite, candidates=tuple(present[row] for row in rows or present))


def _label(candidate: CandidateResult) -> str:
    return f"{RENAMED.get(candidate.name, candidate.name)} {candidate.extras.get('version', '')}".strip()


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _extra(name: str, value: Any) -> str:
    if value is None:
        return ""
    if name in {"share_of_copy", "data_wait"}:
        return f"{value:.0%}"
    return _short(value) if isinstance(value, float) else str(value)


def main() -> None:
    """Write the tables, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a table is out of date")
    arguments = parser.parse_args()
    for path in DOCUMENTS:
        text = path.read_text()
        rendered = render(text, ROOT / "benchmarks" / "results")
        if arguments.check and rendered != text:
            raise SystemExit(f"{path.name} is out of date: python -m benchmarks.readme")
        if rendered != text:
            atomic_write(path, rendered)


if __name__ == "__main__":
    main()
