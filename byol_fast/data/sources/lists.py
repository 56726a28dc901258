"""Lists of image files: `.txt`, `.csv` and `.tsv`."""

from __future__ import annotations

import csv
import logging
from collections.abc import Sequence
from pathlib import Path

from byol_fast.data.sources.base import SourceError, evenly_spaced, labels_from_text
from byol_fast.data.sources.files import FileSource

log = logging.getLogger(__name__)

LISTS = (".txt", ".csv", ".tsv")
"""Names of files that list images."""

_PATH_COLUMNS = ("path", "file", "filename", "file_name", "filepath", "image", "image_path", "image_file")
_LABEL_COLUMNS = ("label", "class", "target", "category", "class_name")


def open_list(path: Path, where: str) -> FileSource:
    """The images that a file lists; names are relative to the folder the list is in.

    In a `.txt` each line is a path, or a path, a tab and a label. (A blank and a number after every path count as
    a label too, where the path alone exists and the whole line does not.) A `.csv` or `.tsv` has a header with a
    column `path` (or `file`, `filename`, `image`, ...) and perhaps one named `label` (or `class`, `target`, ...).
    Labels are numbers, or names, which are sorted.

    Raises:
        SourceError: it cannot be read, lists nothing, or nothing that exists.
    """
    try:
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise SourceError(f"{where}: {path} cannot be read ({error.strerror})") from error
    if path.suffix.lower() == ".txt":
        names, labels = _lines(text, path.parent)
    else:
        names, labels = _columns(text, path, where)
    if not names:
        raise SourceError(f"{where}: {path} lists no images; expected one path a line, or path, tab, label")
    _check_some(names, path, where)
    numbers, classes = labels_from_text(labels)
    if numbers is None and any(labels):
        log.warning("%s: some images have a label and some have none: taken as unlabelled", path)
    return FileSource(root=path.parent, paths=tuple(names), labels=numbers, classes=classes)


def _lines(text: str, folder: Path) -> tuple[list[str], list[str]]:
    lines = [line for line in text.splitlines() if line.strip()]
    pairs = [line.partition("\t") for line in lines]
    if not any(tab for _, tab, _ in pairs):
        ends = [line.rpartition(" ") for line in lines]
        numbered = bool(ends) and all(blank and label.lstrip("-").isdigit() for _, blank, label in ends)
        if numbered and not (folder / lines[0].strip()).exists() and (folder / ends[0][0].strip()).exists():
            pairs = ends
    return [name.strip() for name, _, _ in pairs], [label.strip() for _, _, label in pairs]


def _columns(text: str, path: Path, where: str) -> tuple[list[str], list[str]]:
    rows = csv.DictReader(text.splitlines(), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    header = {(name or "").strip().lower(): name for name in rows.fieldnames or ()}
    name_column = next((header[name] for name in _PATH_COLUMNS if name in header), None)
    label_column = next((header[name] for name in _LABEL_COLUMNS if name in header), None)
    if name_column is None:
        found = ", ".join(header) or "nothing"
        raise SourceError(f"{where}: {path} must have a header with a column `path` (and `label`), got {found}")
    names, labels = [], []
    for row in rows:
        if name := (row[name_column] or "").strip():
            names.append(name)
            labels.append((row[label_column] or "").strip() if label_column is not None else "")
    return names, labels


def _check_some(names: Sequence[str], path: Path, where: str) -> None:
    """Refuse a list when none of up to a hundred of its files is there: the folder it belongs in is another one."""
    looked_at = [names[i] for i in evenly_spaced(len(names), 100)]
    if "://" in names[0]:
        raise SourceError(f"{where}: {path} lists addresses ({names[0]}); fetch the images and list the files")
    if not any((path.parent / name).exists() for name in looked_at):
        raise SourceError(
            f"{where}: none of {len(looked_at)} files that {path} lists exists, such as "
            f"{path.parent / looked_at[0]}; paths are relative to the folder the list is in"
        )
