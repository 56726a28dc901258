"""`byol-fast doctor`: check the environment and the data."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.table import Table
from rich.text import Text

from byol_fast.config import Config, ConfigError, DataConfig, KNNConfig
from byol_fast.config.fields import Threads, check_fields
from byol_fast.doctor.checks import run_checks
from byol_fast.doctor.system_info import collect
from byol_fast.utils.env import num_cpus
from byol_fast.utils.output import PlainConsole
from byol_fast.utils.progress import current

PLAIN_WIDTH = 120
"""Columns of the report without a terminal."""
MAX_SHOWN = 20
"""Bad images that are named; `--json` names all."""


# ---- the data ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class ScanData:
    """Images to check."""

    root: Path | None = None
    """Images in any form that `byol-fast train --data.root` accepts; every image is decoded."""
    cache: Path = Path("~/.cache/byol_fast")
    """Folder for indexes of tar shards and the images of Parquet files."""
    image_column: str = ""
    """As for training."""
    label_column: str = ""
    """As for training."""
    threads: Threads = 0
    """Decoding threads; 0 means one per CPU core."""

    def __post_init__(self) -> None:
        check_fields(self, "doctor: data.")


def scan_data(data: ScanData, *, fast: bool, console: PlainConsole) -> dict[str, Any]:
    """Scan training and validation images and print the results.

    Returns:
        A `Scan` as plain values for `training`, and for `validation` if there are such images.

    Raises:
        SourceError: there are no images.
    """
    from byol_fast.data import open_train_val
    from byol_fast.doctor.scan import scan

    options = DataConfig(
        root=data.root, cache=data.cache, image_column=data.image_column, label_column=data.label_column
    )
    parts = zip(("training", "validation"), open_train_val(Config(data=options, knn=KNNConfig())), strict=True)
    scans: dict[str, Any] = {}
    for name, source in parts:
        if source is None:
            continue
        with current().bar(len(source), f"{name} images") as bar:
            result = scan(source, threads=data.threads or num_cpus(), fast=fast, progress=bar.advance)
        scans[name] = result.as_dict()
        _print_scan(name, scans[name], console, fast=fast)
    return scans


def _print_scan(name: str, scan: dict[str, Any], console: PlainConsole, *, fast: bool) -> None:
    table = Table(title=f"{name} images: {scan['source']}", show_header=False, title_justify="left")
    work = f"header and end of {scan['checked']:,} checked" if fast else f"{scan['decoded']:,} decoded"
    table.add_row("images", f"{scan['images']:,}, {work} in {scan['seconds']:.1f} s")
    for side, values in scan["pixels"].items():
        table.add_row(f"{side}, pixels", ", ".join(f"{key} {value}" for key, value in values.items()))
    if counts := scan["classes"]:
        least, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
        text = f"from {counts[least]:,} images ({least}) to {counts[most]:,} ({most})"
        if counts[least] == counts[most]:
            text = f"{counts[least]:,} image{'s' * (counts[least] != 1)} of each"
        table.add_row("classes", f"{len(counts)}: {text}")
    else:
        problem = f"not used: {scan['label_problem']}" if scan["label_problem"] else "no labels"
        table.add_row("classes", f"{problem} (not needed for training, but for kNN and linear evaluation)")
    corrupt = scan["corrupt"]
    table.add_row("cannot be read", Text(f"{len(corrupt):,}", "red") if corrupt else Text("none", "green"))
    console.print(table)
    for entry in corrupt[:MAX_SHOWN]:
        console.print(f"{entry['image']} {entry['reason']}", soft_wrap=True, style="red")
    if corrupt:
        more = f"{len(corrupt) - MAX_SHOWN} more: see --json. " if len(corrupt) > MAX_SHOWN else ""
        advice = "Replace them or remove them, or train with --data.on-corrupt skip."
        console.print(more + advice, soft_wrap=True)


# ---- the command ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Check your environment and data: versions, GPU, DALI, CPU, memory, and every image."""

    folder: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="FOLDER")] = ()
    """Images to check: short for --data.root."""
    data: ScanData = field(default_factory=ScanData)
    """Images to check."""
    fast: bool = False
    """Check only the header and the end of each file (20 us): finds files that are cut off, too large or no images."""
    json: bool = False
    """Print the report as JSON."""


def main(options: Options) -> int:
    """Check this machine and, if given, images; print a report.

    Returns:
        0, or 1 if a required part is broken or an image cannot be read.
    """
    data, fast, as_json = options.data, options.fast, options.json
    if fast and data.root is None:
        raise ConfigError("doctor: --fast requires images; give the folder, too")
    console = PlainConsole(quiet=as_json, width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    checks = run_checks(collect())
    table = Table(title="environment", title_justify="left")
    for column in ("", "", "result", "advice"):
        table.add_column(column, overflow="fold")
    colors = {"ok": "green", "note": "yellow", "broken": "red"}
    for check in checks:
        table.add_row(Text(check.status, colors[check.status]), check.name, check.result, check.advice)
    console.print(table)
    usable = all(check.status != "broken" for check in checks)
    images = scan_data(data, fast=fast, console=console) if data.root is not None else {}
    readable = not any(part["corrupt"] for part in images.values())
    if as_json:
        report = {"usable": usable, "checks": [asdict(check) for check in checks], "images": images}
        print(json.dumps(report, indent=2))
    elif usable:
        console.print("Ready to train." if readable else "Ready to train, but some images cannot be read.")
    else:
        broken = ", ".join(check.name for check in checks if check.status == "broken")
        console.print(f"Required, but broken: {broken}.", style="red")
    return 0 if usable and readable else 1
