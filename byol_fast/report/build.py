"""The report of a run: the contents of its folder on one page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

from byol_fast.config import ConfigError
from byol_fast.config.fields import Range, check
from byol_fast.report import settings
from byol_fast.report.comparison import comparison
from byol_fast.report.curves import curves
from byol_fast.report.evaluations import evaluations
from byol_fast.report.page import Section, paragraph, write_page
from byol_fast.report.reading import RunFiles, read_run
from byol_fast.report.summary import summary
from byol_fast.utils.files import check_output_file, write_errors

ExtraSections = Callable[[Path], list[Section]]


def report(
    runs: Sequence[Path],
    output: Path | None = None,
    *,
    images: Path | None = None,
    pictures: bool = True,
    num: int = 2000,
    extra_sections: ExtraSections = lambda run_dir: [],
) -> Path:
    """Write the report of a run, or one that compares several.

    Args:
        runs: run folders.
        output: file to write; default: `report.html` in the folder of the run, in the current folder for several runs.
        images: the folder or file with the run's images, if they were moved.
        pictures: show views, nearest neighbors and a map of the features, for which images are read and embedded;
            without them, the page is written from the run folder alone within seconds.
        num: maximum number of images to embed.
        extra_sections: further sections of a single run, from its folder.

    Returns:
        The path of the file.

    Raises:
        ConfigError: a folder is not a run folder, or the file cannot be written.
    """
    if not runs:
        raise ConfigError("report: a run folder is missing")
    check("report: num", Annotated[int, Range(2, 100_000)], num)
    output = output or (runs[0] if len(runs) == 1 else Path()) / "report.html"
    if output.suffix.lower() not in {".html", ".htm"}:
        raise ConfigError(f"report: output must be a file that ends in .html, got {output}")
    files = [read_run(folder) for folder in runs]
    check_output_file(output, "report")
    if len(files) == 1:
        title, sections = (
            f"Run {files[0].name}",
            _sections(files[0], images=images, pictures=pictures, num=num, extra_sections=extra_sections),
        )
    else:
        title, sections = f"{len(files)} runs", comparison(files)
    with write_errors(output, "report"):
        write_page(output, title, sections)
    return output


def _sections(
    run: RunFiles, *, images: Path | None, pictures: bool, num: int, extra_sections: ExtraSections
) -> list[Section]:
    sections = [summary(run), *curves([run]), *evaluations(run)]
    if pictures:
        from byol_fast.report.pictures import picture_sections  # imports torch and the loaders

        sections += picture_sections(run, images=images, num=num)
    else:
        command = f"Views, nearest neighbors and a map of the features: byol-fast report {run.folder}"
        sections.append(Section("Images", paragraph(command, "faint")))
    sections += extra_sections(run.folder)
    return [*sections, *settings.corrupt_images(run), *settings.options(run), *settings.environment(run)]
