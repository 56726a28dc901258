"""Columns of tables: which one holds the images, which one the labels, and the labels of Arrow columns of any type."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from byol_fast.data.errors import SourceError
from byol_fast.data.sources.base import ClassLabels, labels_from_integers, labels_from_text
from byol_fast.data.sources.splits import part_of
from byol_fast.utils.files import printable_name

log = logging.getLogger(__name__)

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo", "image_bytes", "bytes")
"""Usual names of columns with encoded images."""
PATH_COLUMNS = (
    "path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path", "image_file",
    "image_name", "img", "img_path",
)  # fmt: skip
"""Usual names of columns with paths of image files."""
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "cls", "target", "category", "class_name")
"""Usual names of columns with labels."""

PART_COLUMNS = ("split", "subset", "partition", "set")
"""Usual names of columns with the part of the data set that an image belongs to."""

_BINARY = {"binary", "large_binary"}
_MAX_LISTED = 20


class Columns(NamedTuple):
    """Names of columns; an empty one if there is none."""

    image: str
    has_paths: bool
    """True if the images are files, whose paths the column holds as texts."""
    label: str
    label_problem: str
    """Reason why there is no label column, as a clause."""


def find_by_name(names: Iterable[str], usual: Sequence[str]) -> list[str]:
    """The columns with one of the usual names, in order of those; case, spaces and hyphens do not matter."""
    normalized: dict[str, list[str]] = {}
    for name in names:
        normalized.setdefault(re.sub(r"[\s-]+", "_", name.strip().lower()), []).append(name)
    return [name for key in usual for name in normalized.get(key, ())]


def find_columns(
    schema: Any, features: Mapping[str, Any], title: str, arg_name: str, image_column: str, label_column: str
) -> Columns:
    """Select the image and the label column of a table.

    Args:
        schema: Arrow schema.
        features: columns whose types `datasets` knows.
        title: name of the table, for messages.
        arg_name: name of the argument, for messages.
        image_column: name that the user gave, or empty.
        label_column: likewise.

    Raises:
        SourceError: a named column is missing or has the wrong type, or no image column was named and the choice is
            ambiguous.
    """
    kinds = {field.name: _kind(field.type, features.get(field.name)) for field in schema}
    listed = [f"{name} ({kinds[name]})" for name in schema.names]
    columns = ", ".join(listed[:_MAX_LISTED] + ["..."] * (len(listed) > _MAX_LISTED))
    if repeated := next((name for name in schema.names if schema.names.count(name) > 1), None):
        raise SourceError(f"{arg_name}: names of columns must differ, {title} has {repeated!r} twice; rename one")
    image = image_column or _find_images(kinds, columns, title, arg_name)
    if image not in kinds or not _holds_images(kinds[image], by_path=True):
        raise SourceError(
            f"{arg_name}: data.image_column must be a column of encoded images (binary, or {{bytes, path}}) or of "
            f"paths (string) of {title}, got {image!r}; its columns are {columns}"
        )
    has_paths = not _holds_images(kinds[image])
    if label_column:
        if label_column not in kinds or label_column == image or not _holds_labels(kinds[label_column]):
            raise SourceError(
                f"{arg_name}: data.label_column must be a column of integers or texts (or categories) of {title}, got "
                f"{label_column!r}; its columns are {columns}"
            )
        return Columns(image, has_paths, label_column, "")
    return Columns(image, has_paths, *find_labels({name: kind for name, kind in kinds.items() if name != image}, title))


def _find_images(kinds: Mapping[str, str], columns: str, title: str, arg_name: str) -> str:
    encoded = [name for name, kind in kinds.items() if _holds_images(kind)]
    typed = [name for name in encoded if kinds[name] == "image"]
    candidates = typed if len(typed) == 1 else find_by_name(typed, IMAGE_COLUMNS)
    candidates = candidates or find_by_name(encoded, IMAGE_COLUMNS) or (encoded if len(encoded) == 1 else [])
    if not encoded:
        candidates = find_by_name([name for name, kind in kinds.items() if kind == "string"], PATH_COLUMNS)
    if not candidates:
        problem = "several columns of images or binary data" if encoded else "no column of encoded images, or of paths"
        raise SourceError(
            f"{arg_name}: {title} has {problem} (binary, {{bytes, path}}, or texts with a usual name); name one with "
            f"--data.image-column; its columns are {columns}"
        )
    others = [name for name in (typed or encoded or candidates) if name != candidates[0]]
    if not typed and not find_by_name(candidates, IMAGE_COLUMNS):  # its name says nothing, and others may be paths
        others += (
            find_by_name([name for name, kind in kinds.items() if kind == "string"], PATH_COLUMNS) if encoded else []
        )
    if others:
        log.warning(
            "%s: column %s holds the images; %s not used (select another one with --data.image-column)",
            title, candidates[0], _join(others),
        )  # fmt: skip
    return candidates[0]


def find_labels(kinds: Mapping[str, str], title: str) -> tuple[str, str]:
    """The label column, or else the reason why there is none; both logged unless the choice is clear."""
    usual = find_by_name(kinds, LABEL_COLUMNS)
    classes = [name for name, kind in kinds.items() if kind == "class label"]
    candidates = list(dict.fromkeys([*(n for n in usual if n in classes), *classes, *usual]))
    usable = [name for name in candidates if _holds_labels(kinds[name])]
    if usable:
        if others := [name for name in candidates if name != usable[0]]:
            log.warning(
                "%s: column %s holds the labels; %s not used (select another one with --data.label-column)",
                title, usable[0], _join(others),
            )  # fmt: skip
        return usable[0], ""
    if candidates:
        problem = (
            f"column {candidates[0]} of {title} has the type {kinds[candidates[0]]}, not integers or texts; name "
            "another one with --data.label-column"
        )
        log.warning("%s: no labels are used", problem)
        return "", problem
    return "", f"{title} has no column named {', '.join(LABEL_COLUMNS[:4])}, ...; name one with --data.label-column"


def find_parts(schema: Any) -> list[str]:
    """Columns that may name the part of the data set that an image belongs to."""
    return [
        name for name in find_by_name(schema.names, PART_COLUMNS) if _holds_labels(_kind(schema.field(name).type, None))
    ]


def warn_parts(column: str, values: Iterable[object], title: str) -> None:
    """Log a warning if a column names several parts of a data set, which are all used."""
    parts = sorted({str(value) for value in values if part_of(str(value))})
    if len({part_of(part) for part in parts}) > 1:
        log.warning(
            "%s: the images of all parts in column %s are used (%s); to train on one, give a table of its rows",
            title, column, ", ".join(map(printable_name, parts[:5])),
        )  # fmt: skip


def _join(names: Sequence[str]) -> str:
    return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'}"


def _kind(type_: Any, feature: Any) -> str:
    """Type of a column: `image`, `class label`, `string`, or its Arrow type."""
    from pyarrow import types

    name = type(feature).__name__
    if name in {"Image", "ClassLabel"}:
        return "image" if name == "Image" else "class label"
    if types.is_dictionary(type_):
        return f"category of {_kind(type_.value_type, None)}"
    if is_text(type_):
        return "string"
    if types.is_struct(type_):
        fields = {type_.field(i).name: str(type_.field(i).type) for i in range(type_.num_fields)}
        if fields.get("bytes") in _BINARY or (fields.get("bytes") == "null" and "path" in fields):
            return "image file"
        return f"{{{', '.join(fields)}}}"
    return str(type_)


def is_text(type_: Any) -> bool:
    """Return True for Arrow types of texts."""
    from pyarrow import types

    return bool(types.is_string(type_) or types.is_large_string(type_) or types.is_string_view(type_))


def _holds_images(kind: str, *, by_path: bool = False) -> bool:
    return kind in {"image", "image file", *_BINARY} or (by_path and kind == "string")


def _holds_labels(kind: str) -> bool:
    kind = kind.removeprefix("category of ")
    return kind in {"class label", "string", "bool", "null"} or bool(
        re.fullmatch(r"u?int\d+|halffloat|float|double|decimal\d*\(.*\)", kind)
    )


# ---- labels --------------------------------------------------------------------------------------------------------


class LabelColumn(NamedTuple):
    """Label column of one file."""

    values: Any
    """Arrow array."""
    names: Sequence[str]
    """Class names that the values index into; empty if there are none."""
    title: str
    """Name of the file, for messages."""


class _Part(NamedTuple):
    """Labels of one file: numbers `[n]`, or texts."""

    numbers: NDArray[np.integer[Any]] | None
    """-1 for an image without a label."""
    texts: list[str]
    names: tuple[str, ...]
    """Class names that the numbers index into; empty if they are the classes."""

    @property
    def has_labels(self) -> bool:
        """True if an image has a label."""
        return any(self.texts) if self.numbers is None else bool((self.numbers >= 0).any())

    def as_texts(self) -> list[str]:
        """Class name of each image, empty without a label."""
        if self.numbers is None:
            return self.texts
        return [(self.names[i] if self.names else str(i)) if i >= 0 else "" for i in self.numbers.tolist()]


def read_labels(
    columns: Sequence[LabelColumn], column: str, arg_name: str, sample_name: Callable[[int], str], *, strict: bool
) -> ClassLabels:
    """Labels and class names of a column in one or more files; the same name is the same class in all of them.

    Args:
        columns: values of the column in each file.
        column: its name.
        arg_name: name of the argument, for messages.
        sample_name: returns the name of the image at a position.
        strict: raise an error if the values cannot be labels, instead of logging a warning.

    Raises:
        SourceError: integers in one file are names in another one; or see `strict`.
    """
    parts = []
    for part in columns:
        try:
            parts.append(_read_part(part))
        except (ValueError, NotImplementedError) as error:  # of Arrow: a number with a fraction, or too large
            problem = (
                f"column {column} of {part.title} must hold integers, texts or categories, got "
                f"{part.values.type} ({str(error).strip()}); name another one with --data.label-column"
            )
            if strict:
                raise SourceError(f"{arg_name}: {problem}") from error
            log.warning("%s: no labels are used", problem)
            return ClassLabels(None, (), problem)
    filled = [(part, title) for part, (_, _, title) in zip(parts, columns, strict=True) if part.has_labels]
    numbered = [title for part, title in filled if part.numbers is not None and not part.names]
    named = [title for part, title in filled if part.numbers is None or part.names]
    if numbered and named:
        raise SourceError(
            f"{arg_name}: column {column} must have one type in all files, got integers in {numbered[0]} and names in "
            f"{named[0]}; write the names (or the integers) in all of them"
        )
    names = {part.names for part in parts}
    numbers = [part.numbers for part in parts if part.numbers is not None]
    if len(names) == 1 and len(numbers) == len(parts):
        is_same = len({part.dtype for part in numbers}) == 1
        values = np.concatenate(numbers) if is_same else [value for part in numbers for value in part.tolist()]
        return labels_from_integers(values, len(values), arg_name, sample_name, names.pop())
    return labels_from_text([text for part in parts for text in part.as_texts()], arg_name, sample_name)


def _read_part(column: LabelColumn) -> _Part:
    """Labels of one file; raises an error of Arrow if they are neither integers nor texts."""
    import pyarrow as pa
    from pyarrow import compute, types

    values, names = column.values, tuple(map(str, column.names))
    if not _holds_labels(_kind(values.type, None)):  # dates could be converted to integers
        raise ValueError("not one of these types")
    if types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if types.is_boolean(values.type):
        values, names = values.cast(pa.int8()), ("False", "True")
    if types.is_null(values.type):
        return _Part(None, [""] * len(values), ())
    if is_text(values.type):
        return _Part(None, ["" if text is None else text for text in values.to_pylist()], ())
    if not types.is_integer(values.type):
        if types.is_floating(values.type):
            values = values.cast(pa.float64())
            values = compute.if_else(compute.is_nan(values), pa.scalar(None, pa.float64()), values)
        values = values.cast(pa.int64())
    if types.is_uint64(values.type) and not values.null_count:
        numbers = values.to_numpy()  # identifiers above the largest int64
    else:
        numbers = values.cast(pa.int64(), safe=False).fill_null(-1).to_numpy()
    if names and len(numbers) and int(numbers.max()) >= len(names):
        raise ValueError(f"label {int(numbers.max())} of {len(names)} class names")
    return _Part(numbers, [], names)
