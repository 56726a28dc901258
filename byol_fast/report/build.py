"""The report of a run: what its folder holds, on one page."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from byol_fast.config import ConfigError
from byol_fast.report import sections
from byol_fast.report.page import Section, paragraph, write_page
from byol_fast.report.reading import RunFiles, read_run


def report(
    runs: Sequence[Path], to: Path | None = None, *, images: Path | None = None, pictures: bool = True, num: int = 2000
) -> Path:
    """Write the report of a run, or one that compares several.

    Args:
        runs: run folders.
        to: file to write; by default `report.html` in the run's folder, in the current folder for several runs.
        images: where the run's images are, if not where they were.
        pictures: show views, nearest neighbours and a map of the features, for which images are read and embedded;
            without, the page is made from the run folder alone within seconds.
        num: embed so many images at most.

    Returns:
        The file.

    Raises:
        ConfigError: a folder is no run's, or the file cannot be written.
    """
    if not runs:
        raise ConfigError("report: a run folder is missing")
    if num < 2:
        raise ConfigError(f"report: num must be 2 or more, got {num}")
    to = to or (runs[0] if len(runs) == 1 else Path()) / "report.html"
    if to.suffix.lower() not in {".html", ".htm"}:
        raise ConfigError(f"report: to must be a file that ends in .html, got {to}")
    found = [read_run(folder) for folder in runs]
    if len(found) == 1:
        title = f"BYOL run {found[0].name}"
        made = _one(found[0], images=images, pictures=pictures, num=num)
    else:
        title = f"{len(found)} BYOL runs"
        made = sections.comparison(found)
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        write_page(to, title, made)
    except OSError as error:
        raise ConfigError(f"report: to must be a file that can be written, got {to} ({error})") from error
    return to


def _one(run: RunFiles, *, images: Path | None, pictures: bool, num: int) -> list[Section]:
    made = [sections.summary(run), *sections.curves([run]), *sections.evaluations(run)]
    if pictures:
        from byol_fast.report import pictures as drawn  # imports torch and the loaders

        made += drawn.sections(run, images=images, num=num)
    else:
        more = f"Views, nearest neighbours and a map of the features: byol-fast report {run.folder}"
        made.append(Section("Images", paragraph(more, "faint")))
    made += _profile(run)
    return [*made, *sections.bad_images(run), *sections.options(run), *sections.environment(run)]


def _profile(run: RunFiles) -> list[Section]:
    """What `byol-fast profile` found, as its own package shows it."""
    path = run.folder / "profile" / "profile.json"
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text())
        page = importlib.import_module("byol_fast.profiling.page")
        return cast(list[Section], page.sections(found))
    except (OSError, ValueError, KeyError, ImportError) as error:
        return [Section("Profile", paragraph(f"Left out: {path} could not be shown ({error})."))]
