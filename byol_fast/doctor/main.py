"""`byol-fast doctor`: check the environment and the data."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from byol_fast.config import Config, ConfigError, DataConfig, KNNConfig
from byol_fast.doctor.checks import judge
from byol_fast.doctor.system_info import gather
from byol_fast.utils.env import num_cpus
from byol_fast.utils.progress import Progress

PLAIN_WIDTH = 120
"""Columns of the report where there is no terminal."""


SHOWN = 20
"""Bad images that are named; `--json` names all."""


# ---- the data ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class ScanData:
    """Images to look at."""

    root: Path | None = None
    """Whatever `byol-fast train --data.root` takes: every image is decoded, and the bad ones are named."""
    cache: Path = Path("~/.cache/byol_fast")
    """Folder for indexes of tar shards and the images of Parquet files."""
    image_column: str = ""
    """As for training."""
    label_column: str = ""
    """As for training."""
    threads: int = 0
    """Decoding threads; 0 means one per CPU core."""


def scan_data(data: ScanData, *, fast: bool, console: Console) -> dict[str, Any]:
    """Look at training and validation images, and print what was found.

    Returns:
        A `Scan` as plain values for `training`, and for `validation` where there are such images.

    Raises:
        SourceError: there are no images.
    """
    from byol_fast.data import split
    from byol_fast.doctor.scan import scan

    options = DataConfig(
        root=data.root, cache=data.cache, image_column=data.image_column, label_column=data.label_column
    )
    parts = zip(("training", "validation"), split(Config(data=options, knn=KNNConfig())), strict=True)
    found: dict[str, Any] = {}
    for name, source in parts:
        if source is None:
            continue
        shown = Console(stderr=True)
        with Progress(shown if shown.is_terminal else None).bar(len(source), f"{name} images") as bar:
            result = scan(source, threads=data.threads or num_cpus(), fast=fast, progress=bar.advance)
        found[name] = result.as_dict()
        _print_scan(name, found[name], console)
    return found


def _print_scan(name: str, found: dict[str, Any], console: Console) -> None:
    table = Table(title=f"{name} images: {found['source']}", show_header=False, title_justify="left")
    how = f"{found['decoded']:,} of {found['images']:,} decoded in {found['seconds']:.1f} s"
    table.add_row("images", how)
    for side, values in found["pixels"].items():
        table.add_row(f"{side}, pixels", ", ".join(f"{key} {value}" for key, value in values.items()))
    if counts := found["classes"]:
        least, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
        table.add_row("classes", f"{len(counts)}: from {counts[least]:,} images ({least}) to {counts[most]:,} ({most})")
    else:
        table.add_row("classes", "no labels: train works, kNN and linear evaluation need them")
    bad = found["bad"]
    table.add_row("cannot be read", f"[red]{len(bad):,}[/red]" if bad else "[green]none[/green]")
    console.print(table)
    for entry in bad[:SHOWN]:
        console.print(f"{entry['image']} {entry['reason']}", soft_wrap=True, markup=False, style="red")
    if bad:
        more = f"{len(bad) - SHOWN} more: see --json. " if len(bad) > SHOWN else ""
        advice = "Replace them or remove them, or train with --data.on-corrupt skip."
        console.print(more + advice, soft_wrap=True, markup=False)


# ---- the command ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Check whether this machine can train, and that every image can be read."""

    data: ScanData = field(default_factory=ScanData)
    """Images to look at."""
    fast: bool = False
    """Look only at the ends of each image file: finds what was cut off or is no image, in 16 us each."""
    json: bool = False
    """Print the report as JSON."""


def examine(options: Options) -> int:
    """Check this machine, and images where some are given; print a report.

    Returns:
        0, or 1 when something required is broken or an image cannot be read.
    """
    data, fast, as_json = options.data, options.fast, options.json
    if fast and data.root is None:
        raise ConfigError("doctor: --fast is about images; give --data.root too")
    console = Console(highlight=False, quiet=as_json, width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    checks = judge(gather())
    table = Table(title="this machine", title_justify="left")
    for column in ("", "", "found", "what to do"):
        table.add_column(column, overflow="fold")
    marks = {"ok": "[green]ok[/green]", "note": "[yellow]note[/yellow]", "broken": "[red]broken[/red]"}
    for check in checks:
        table.add_row(marks[check.status], check.name, check.found.replace("[", r"\["), check.advice)
    console.print(table)
    usable = all(check.status != "broken" for check in checks)
    images = scan_data(data, fast=fast, console=console) if data.root is not None else {}
    readable = not any(part["bad"] for part in images.values())
    if as_json:
        report = {"usable": usable, "checks": [asdict(check) for check in checks], "images": images}
        print(json.dumps(report, indent=2))
    elif usable:
        console.print("This machine can train." if readable else "This machine can train; some images cannot be read.")
    else:
        broken = ", ".join(check.name for check in checks if check.status == "broken")
        console.print(f"[red]Something required is broken: {broken}.[/red]")
    return 0 if usable and readable else 1
