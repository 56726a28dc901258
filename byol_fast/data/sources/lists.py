"""Lists of image files: `.txt`, `.csv` and `.tsv`."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from byol_fast.data.sources.base import SourceError, evenly_spaced, labels_from_text
from byol_fast.data.sources.files import FileSource

LISTS = (".txt", ".csv", ".tsv")
"""Extensions of files that list images."""

_PATH_COLUMNS = ("path", "file", "filename", "file_name", "filepath", "image", "image_path", "image_file")
_LABEL_COLUMNS = ("label", "class", "target", "category", "class_name")


def open_list(path: Path, arg_name: str) -> FileSource:
    """The images named in a list; paths are relative to the folder of the list.

    Each line of a `.txt` is a path, or a path, a tab and a label. (A space and an integer after every path are a label
    too, if the path without them exists and the whole line does not.) A `.csv` or `.tsv` has a header with a column
    `path` (or `file`, `filename`, `image`, ...) and optionally `label` (or `class`, `target`, ...). Labels are
    integers, or names; those that occur are the classes, in order.

    Raises:
        SourceError: the list cannot be read, is empty, or names no file that exists.
    """
    try:
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise SourceError(f"{arg_name}: {path} cannot be read ({error.strerror})") from error
    if path.suffix.lower() == ".txt":
        names, texts = _read_lines(text, path.parent)
    else:
        names, texts = _read_table(text, path, arg_name)
    if not names:
        raise SourceError(f"{arg_name}: {path} lists no images; expected one path a line, or path, tab, label")
    _check_some_exist(names, path, arg_name)
    labels, classes = labels_from_text(texts, str(path), names.__getitem__)
    return FileSource(root=path.parent, paths=tuple(names), labels=labels, classes=classes)


def _read_lines(text: str, folder: Path) -> tuple[list[str], list[str]]:
    lines = [line for line in text.split("\n") if line.strip()]
    pairs = [line.partition("\t") for line in lines]
    if not any(tab for _, tab, _ in pairs):
        by_space = [line.rpartition(" ") for line in lines]
        numbered = bool(by_space) and all(space and label.lstrip("-").isdigit() for _, space, label in by_space)
        if numbered and not (folder / lines[0].strip()).exists() and (folder / by_space[0][0].strip()).exists():
            pairs = by_space
    return [name.strip() for name, _, _ in pairs], [label.strip() for _, _, label in pairs]


def _read_table(text: str, path: Path, arg_name: str) -> tuple[list[str], list[str]]:
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    try:
        table = list(rows)
    except csv.Error as error:
        raise SourceError(
            f"{arg_name}: {path} must have a second quotation mark for each, and no very long texts, got an error "
            f"behind line {rows.line_num} ({error}); repair that line"
        ) from error
    columns = {(name or "").strip().lower(): name for name in rows.fieldnames or ()}
    name_column = next((columns[name] for name in _PATH_COLUMNS if name in columns), None)
    label_column = next((columns[name] for name in _LABEL_COLUMNS if name in columns), None)
    if name_column is None:
        header = ", ".join(columns) or "nothing"
        raise SourceError(f"{arg_name}: {path} must have a header with a column `path` (and `label`), got {header}")
    names, labels = [], []
    for row in table:
        if name := (row[name_column] or "").strip():
            names.append(name)
            labels.append((row[label_column] or "").strip() if label_column is not None else "")
    return names, labels


def _check_some_exist(names: Sequence[str], path: Path, arg_name: str) -> None:
    """Raise SourceError if none of up to a hundred listed files exists: the list belongs in another folder."""
    if "://" in names[0]:
        raise SourceError(f"{arg_name}: {path} lists addresses ({names[0]}); fetch the images and list the files")
    sampled = [names[i] for i in evenly_spaced(len(names), 100)]
    if not any((path.parent / name).exists() for name in sampled):
        raise SourceError(
            f"{arg_name}: none of {len(sampled)} files that {path} lists exists, such as "
            f"{path.parent / sampled[0]}; paths are relative to the folder of the list"
        )
