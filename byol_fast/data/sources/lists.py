"""Lists of image files: `.txt`, `.csv` and `.tsv`."""

from __future__ import annotations

import codecs
import csv
import io
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from byol_fast.data.errors import SourceError
from byol_fast.data.sources.base import ClassLabels, evenly_spaced, labels_from_text
from byol_fast.data.sources.columns import PART_COLUMNS, PATH_COLUMNS, find_by_name, find_labels, warn_parts
from byol_fast.data.sources.files import FileSource
from byol_fast.utils.files import open_regular, printable_name

log = logging.getLogger(__name__)

NUM_CHECKED = 100
"""Number of listed files of which one at least must exist."""

_DELIMITERS = (",", ";", "\t")
_NO_LABELS = "the list has no labels (expected path, tab, label)"


class _Listing(NamedTuple):
    """Content of a list."""

    names: list[str]
    """Path of each image."""
    labels: list[str]
    """Label of each image, empty for none."""
    label_problem: str
    """Reason why there are no labels, as a clause; empty if the list has labels."""


def open_list(path: Path, arg_name: str, *, image_column: str = "", label_column: str = "") -> FileSource:
    """The images named in a list; paths are relative to the folder of the list.

    Each line of a `.txt` is a path, or a path, a tab and a label. (A space, comma or semicolon and a label behind every
    path are read too, if the paths without them exist and the whole lines do not.) A table (`.csv`, `.tsv`, or a `.txt`
    with a header) has commas, semicolons or tabs, a column `path` (or `file`, `filename`, `image`, ...) and optionally
    `label` (or `class`, `target`, ...). Labels are texts without the spaces around them; those that occur are the
    classes.

    Args:
        path: the list, in UTF-8 or UTF-16 with a byte order mark.
        arg_name: name of the argument, for error messages.
        image_column: column of a table with the paths; empty: selected by name.
        label_column: column of a table with the labels; empty: selected by name.

    Raises:
        SourceError: the list cannot be read, is empty, has no such column, or names no file that exists.
    """
    text = _read_text(path, arg_name)
    delimiter = _find_delimiter(text, path, image_column)
    if delimiter is not None:
        listing = _read_table(text, delimiter, path, arg_name, image_column, label_column)
    else:
        listing = _read_lines(text, path.parent)
    names, texts, problem = listing
    if not names:
        raise SourceError(f"{arg_name}: {path} lists no images; expected one path a line, or path, tab, label")
    class_labels = ClassLabels(None, (), problem)
    if not problem:
        class_labels = labels_from_text(texts, str(path), lambda i: printable_name(names[i]))
    return open_files(path.parent, names, class_labels, str(path), arg_name)


def _read_text(path: Path, arg_name: str) -> str:
    try:
        with open(path, "rb", opener=open_regular) as file:
            data = file.read()
        is_utf_16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # "Unicode text" of Excel
        text = data.decode("utf-16") if is_utf_16 else data.decode("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise SourceError(f"{arg_name}: {path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise SourceError(f"{arg_name}: {path} cannot be read as UTF-16 ({error}); save it as UTF-8") from error
    if "\0" in text:
        raise SourceError(f"{arg_name}: {path} must be text in UTF-8, got NUL bytes; save it as UTF-8")
    return text


# ---- lines and tables ----------------------------------------------------------------------------------------------


def _read_lines(text: str, folder: Path) -> _Listing:
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    lines = [line for line in lines if not line.startswith("#") or _is_file(folder, line.partition("\t")[0])]
    pairs = [line.partition("\t") for line in lines]
    if not any(tab for _, tab, _ in pairs):
        separator = _find_separator(lines, folder)
        pairs = [line.rpartition(separator) for line in lines] if separator else pairs
    if pairs and find_by_name(pairs[0][:1], PATH_COLUMNS) and not _is_file(folder, pairs[0][0]):
        del pairs[0]  # a header
    problem = "" if any(separator for _, separator, _ in pairs) else _NO_LABELS
    return _Listing([name.strip() for name, _, _ in pairs], [label.strip() for _, _, label in pairs], problem)


def _find_separator(lines: Sequence[str], folder: Path) -> str | None:
    """Character behind the paths of lines without tabs; None if the lines are paths, or nothing is certain."""
    sampled = [lines[i] for i in evenly_spaced(len(lines), NUM_CHECKED)]
    for separator in (" ", ",", ";"):
        if not all(separator in line for line in lines) or any(_is_file(folder, line) for line in sampled):
            continue
        if any(_is_file(folder, line.rpartition(separator)[0].strip()) for line in sampled):
            return separator
    return None


def _find_delimiter(text: str, path: Path, image_column: str) -> str | None:
    """Delimiter of a table; None for lines of a `.txt`, which is a table if it has a header of two columns or more."""
    suffix = path.suffix.lower()
    default = "\t" if suffix == ".tsv" else ","
    header = next((line.strip() for line in text.split("\n") if line.strip()), "")
    for delimiter in dict.fromkeys((default, *_DELIMITERS)):
        names = [name.strip().strip('"') for name in header.split(delimiter)]
        is_header = image_column in names if image_column else bool(find_by_name(names, PATH_COLUMNS))
        if is_header and (suffix != ".txt" or (len(names) > 1 and not _is_file(path.parent, names[0]))):
            return delimiter
    return None if suffix == ".txt" else default


def _read_table(text: str, delimiter: str, path: Path, arg_name: str, image_column: str, label_column: str) -> _Listing:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    names: list[str] = []
    labels: list[str] = []
    end = 0  # line of the last row
    try:
        header = next(([cell.strip() for cell in row] for row in reader if any(map(str.strip, row))), [])
        end = reader.line_num
        position, label_position, problem = _find_columns(header, path, arg_name, image_column, label_column)
        parts: dict[int, set[str]] = {header.index(name): set() for name in find_by_name(header, PART_COLUMNS)}
        for row in reader:
            for i, values in parts.items():
                values.update(row[i : i + 1])
            name = row[position].strip() if position < len(row) else ""
            if not name or len(row) > len(header):
                _check_row(row, header, name, f"{arg_name}: {path}", reader.line_num)
            if name:
                names.append(name)
                labels.append(row[label_position].strip() if -1 < label_position < len(row) else "")
            end = reader.line_num
    except csv.Error as error:
        raise SourceError(
            f"{arg_name}: {path} must have a second quotation mark for each, and no very long texts, got an error "
            f"behind line {end} ({error}); repair that line"
        ) from error
    for i, values in parts.items():
        warn_parts(header[i], values, str(path))
    return _Listing(names, labels, problem)


def _find_columns(
    header: Sequence[str], path: Path, arg_name: str, image_column: str, label_column: str
) -> tuple[int, int, str]:
    """Positions of the column of paths and of labels (-1: none), and the reason why there is no column of labels."""
    name_column = image_column or next(iter(find_by_name(header, PATH_COLUMNS)), None)
    listed = ", ".join(header) or "nothing"
    if name_column is None:
        raise SourceError(
            f"{arg_name}: {path} must have a header with a column `path` (and `label`), got {listed}; name another "
            "column with --data.image-column, or add the header"
        )
    problem = ""
    if not label_column:
        others = [name for name in header if name != name_column]
        label_column, problem = find_labels(dict.fromkeys(others, "string"), str(path))
    for option, name in (("image_column", name_column), ("label_column", label_column)):
        if name and header.count(name) != 1:
            raise SourceError(
                f"{arg_name}: data.{option} must be one column of {path}, got {name!r}, of which there are "
                f"{header.count(name)}; its columns are {listed}"
            )
    return header.index(name_column), header.index(label_column) if label_column else -1, problem


def _check_row(row: Sequence[str], header: Sequence[str], name: str, title: str, line: int) -> None:
    """Raise SourceError for a row that is not empty, but has no path, or more fields than the header."""
    has_more = any(map(str.strip, row[len(header) :]))
    if has_more or (not name and any(map(str.strip, row))):
        wanted = f"at most {len(header)} fields, as the header has," if has_more else "a path"
        raise SourceError(
            f"{title} must have {wanted} in each line, got {', '.join(row)} in line {line}; repair that line (a path "
            "that contains the separator stands in quotation marks)"
        )


# ---- files ---------------------------------------------------------------------------------------------------------


def open_files(root: Path, names: Sequence[str], labels: ClassLabels, title: str, arg_name: str) -> FileSource:
    r"""Image files that a list or a table names.

    Args:
        root: folder that relative paths start from.
        names: path of each image; `\` is read as `/` where no file is named so.
        labels: of the images.
        title: name of the list, for messages.
        arg_name: name of the argument, for error messages.

    Raises:
        SourceError: none of the files exists, or a path is missing.
    """
    if "" in names or None in names:
        raise SourceError(
            f"{arg_name}: {title} must have a path for each image, got none in row "
            f"{next(i for i, name in enumerate(names) if not name)}; remove the row, or add the path"
        )
    paths = tuple(_posix_name(root, name) for name in names)
    check_some_exist(paths, root, title, arg_name)
    if labels.labels is not None and len(set(paths)) < len(paths):
        first = dict(zip(reversed(paths), reversed(labels.labels.tolist()), strict=True))
        differing = [name for name, label in zip(paths, labels.labels.tolist(), strict=True) if first[name] != label]
        if differing:
            log.warning(
                "%s: %d images are listed again with another label, such as %s",
                title,
                len(differing),
                printable_name(differing[0]),
            )
    return FileSource(root=root, paths=paths, **labels._asdict())


def check_some_exist(names: Sequence[str], root: Path, title: str, arg_name: str) -> None:
    """Raise SourceError if none of up to a hundred files exists: the list belongs in another folder."""
    if "://" in names[0]:
        raise SourceError(f"{arg_name}: {title} lists addresses ({names[0]}); fetch the images and list the files")
    sampled = [names[i] for i in evenly_spaced(len(names), NUM_CHECKED)]
    if not any(_is_file(root, name) for name in sampled):
        example = str(root / sampled[0])
        raise SourceError(
            f"{arg_name}: none of {len(sampled)} files that {title} lists exists, such as "
            f"{example if len(example) <= 300 else example[:300] + '...'}; paths are relative to its folder"
        )


def _posix_name(root: Path, name: str) -> str:
    r"""The name with `/` for `\`, unless a file is named so."""
    if "\\" not in name or os.path.exists(root / name):  # noqa: PTH110 (False for a name that no file can have)
        return name
    return name.replace("\\", "/")


def _is_file(root: Path, name: str) -> bool:
    return os.path.isfile(root / _posix_name(root, name))  # noqa: PTH113
