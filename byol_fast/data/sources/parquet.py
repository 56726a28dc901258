"""Parquet files with encoded images, as on the Hugging Face hub.

A single row of a Parquet file cannot be read: its row group (100 rows or more) has to be read and decompressed, which a
global shuffle would do for every image. `datasets` copies images and labels once into the cache, as a memory-mapped
Arrow file with random access. The cached copy belongs to byol_fast: mapping it is safe, because no other program
truncates it.
"""

from __future__ import annotations

import contextlib
import glob
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from byol_fast.config.fields import expand_home
from byol_fast.data.errors import SourceError
from byol_fast.data.sources.base import NUM_SAMPLED_SIZES, ClassLabels, digest, evenly_spaced, labels_from_text
from byol_fast.data.sources.columns import (
    LABEL_COLUMNS,
    Columns,
    LabelColumn,
    find_by_name,
    find_columns,
    find_parts,
    is_text,
    read_labels,
    warn_parts,
)
from byol_fast.data.sources.datasets import HuggingFaceSource, check_stored_files
from byol_fast.data.sources.files import FileSource
from byol_fast.data.sources.lists import open_files
from byol_fast.data.sources.shards import LFS_POINTER, cache_path, file_stamp, is_lfs_pointer
from byol_fast.utils.files import open_regular, printable_name
from byol_fast.utils.progress import current

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, kw_only=True)
class ParquetSource(HuggingFaceSource):
    """Rows of Parquet files, read from a cached copy."""

    files: tuple[Path, ...]
    """The Parquet files."""
    starts: NDArray[np.int64]
    """Index of the first row of each file."""
    title: str
    """Name of the whole, for messages."""

    @cached_property
    def fingerprint(self) -> str:  # noqa: D102 (inherited)
        names = "\0".join(path.name for path in self.files)
        return digest([os.fsencode(names), self.starts.tobytes(), self.index.tobytes()])

    @cached_property
    def sizes(self) -> tuple[int, ...]:  # noqa: D102 (inherited)
        return tuple(self.num_bytes(i) for i in evenly_spaced(len(self), NUM_SAMPLED_SIZES).tolist())

    def sample_name(self, i: int) -> str:  # noqa: D102 (inherited)
        return _row_name(self.files, self.starts, int(self.index[i]))

    def folder(self, i: int) -> Path:  # noqa: D102 (inherited)
        return self.files[_file_of_row(self.starts, int(self.index[i]))].parent

    def describe(self) -> str:  # noqa: D102 (inherited)
        return f"{self._counts()} in {printable_name(self.title)}"


def open_parquet(
    files: Sequence[Path], title: str, arg_name: str, cache: Path, *, image_column: str = "", label_column: str = ""
) -> ParquetSource | FileSource:
    """The images of Parquet files, row by row: encoded ones, or files, relative to the folder of the Parquet file.

    Args:
        files: in order.
        title: name of the whole, for messages.
        arg_name: name of the argument, for error messages.
        cache: folder for the copy.
        image_column: as in `open_hugging_face`.
        label_column: as in `open_hugging_face`.

    Raises:
        SourceError: `datasets` is missing, a file is damaged or has no such column, or the disk is full.
    """
    try:
        import datasets
    except ImportError:
        raise SourceError(f"{arg_name}: {title} is Parquet, which needs datasets; pip install datasets") from None
    tables = [_read_footer(path, arg_name) for path in files]
    rows = [table.footer.num_rows for table in tables]
    starts = np.cumsum(rows) - rows
    tables = [table for table in tables if table.footer.num_rows]
    if not tables:
        raise SourceError(f"{arg_name}: {title} has no rows")
    path, _, schema = tables[0]
    features = _read_features(schema, list(dict.fromkeys(schema.names)))
    columns = find_columns(schema, features, str(path), arg_name, image_column, label_column)
    _check_image_column(tables, columns, arg_name)
    for column in find_parts(schema):
        values = [_read_column(path, column, arg_name) for path, _, other in tables if column in other.names]
        warn_parts(column, {value for part in values for value in part.unique().to_pylist()}, title)
    class_labels = ClassLabels(None, (), columns.label_problem)
    if columns.label:
        class_labels = _read_labels(
            tables, columns.label, title, arg_name, lambda i: _row_name(files, starts, i), strict=bool(label_column)
        )
    elif texts := _partition_labels(tables):
        class_labels = labels_from_text(texts, title, lambda i: _row_name(files, starts, i))

    if columns.has_paths:
        root, names = _read_paths(tables, columns.image, arg_name)
        return open_files(root, names, class_labels, title, arg_name)
    if (feature := features.get(columns.image)) is None:
        type_ = schema.field(columns.image).type
        raise SourceError(
            f"{arg_name}: column {columns.image} of {path} must be binary or {{bytes, path}}, got {type_}"
        )
    if isinstance(feature, datasets.Image):
        feature = datasets.Image(decode=False)
    dataset = _load_copy(tables, columns.image, feature, title, arg_name, expand_home(cache) / "parquet")
    source = ParquetSource(
        dataset, columns.image, np.arange(len(dataset)), *class_labels, files=tuple(files), starts=starts, title=title
    )
    check_stored_files(source, title, arg_name)
    return source


class _Table(NamedTuple):
    """A Parquet file."""

    path: Path
    footer: Any
    schema: Any
    """Arrow schema."""


def _read_footer(path: Path, arg_name: str) -> _Table:
    from pyarrow import parquet

    try:
        str(path.absolute()).encode()
        with open(path, "rb", opener=open_regular) as file:
            footer = parquet.read_metadata(file)
        return _Table(path, footer, footer.schema.to_arrow_schema())
    except UnicodeEncodeError:
        raise SourceError(
            f"{arg_name}: {printable_name(path)} must have a path in UTF-8, as pyarrow needs; rename it"
        ) from None
    except (OSError, ValueError, NotImplementedError) as error:  # of pyarrow
        problem = f"cannot be read as Parquet ({error}); fetch it again"
        if not isinstance(error, OSError) and is_lfs_pointer(path):
            problem = LFS_POINTER
        raise SourceError(f"{arg_name}: {printable_name(path)} {problem}") from error


def _check_image_column(tables: Sequence[_Table], columns: Columns, arg_name: str) -> None:
    """Raise SourceError if a file has no image column, or one of paths where others have encoded images."""
    first = tables[0]
    for path, _, schema in tables:
        type_ = schema.field(columns.image).type if columns.image in schema.names else None
        if type_ is None or is_text(type_) != columns.has_paths:
            raise SourceError(
                f"{arg_name}: column {columns.image} must have one type in all files, got {type_ or 'none'} in {path} "
                f"and {first.schema.field(columns.image).type} in {first.path}; give files of one kind"
            )


def _read_features(schema: Any, columns: Sequence[str]) -> dict[str, Any]:
    """Features of some columns: their types, and their class names if `datasets` wrote the file."""
    import datasets
    import pyarrow as pa

    features: dict[str, Any] = {}
    for name in columns:
        field = pa.schema([schema.field(name)])
        for described in (field.with_metadata(schema.metadata), field):
            # Errors of any type: columns that are not used may have types and descriptions of other versions.
            with contextlib.suppress(Exception):
                features |= datasets.Features.from_arrow_schema(described)
                break
    return features


def _read_labels(
    tables: Sequence[_Table],
    column: str,
    title: str,
    arg_name: str,
    sample_name: Callable[[int], str],
    *,
    strict: bool,
) -> ClassLabels:
    parts = []
    for path, _, schema in tables:
        if column not in schema.names:
            problem = f"{path} has no column {column}"
            if strict:
                raise SourceError(f"{arg_name}: data.label_column must be a column of all files, but {problem}")
            log.warning("%s: %s: no labels are used", title, problem)
            return ClassLabels(None, (), problem)
        names = getattr(_read_features(schema, [column]).get(column), "names", None) or ()
        parts.append(LabelColumn(_read_column(path, column, arg_name), names, str(path)))
    return read_labels(parts, column, arg_name, sample_name, strict=strict)


def _partition_labels(tables: Sequence[_Table]) -> list[str]:
    """Label of each row from folders such as `label=cat`, which take the place of a column; empty if there are none."""
    labels = []
    root = os.path.commonpath([table.path.absolute().parent for table in tables])
    for path, footer, _ in tables:
        parts = [part.partition("=") for part in path.absolute().parent.relative_to(root).parts]
        pairs = [(key, unquote(value)) for key, equals, value in parts if equals]
        columns = find_by_name([key for key, _ in pairs], LABEL_COLUMNS)
        if not columns:
            return []
        label = dict(pairs)[columns[0]]
        labels += [label if label != "__HIVE_DEFAULT_PARTITION__" else ""] * footer.num_rows
    return labels


def _read_column(path: Path, column: str, arg_name: str) -> Any:
    """One column of a Parquet file as an Arrow array."""
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            return file.read(columns=[column]).column(column)
    except (OSError, ValueError, NotImplementedError) as error:
        raise SourceError(f"{arg_name}: column {column} of {path} is damaged ({error}); fetch it again") from error


def _read_paths(tables: Sequence[_Table], column: str, arg_name: str) -> tuple[Path, list[str]]:
    """A folder, and the paths of the images from there, which the files hold relative to their own folders."""
    folders = [table.path.absolute().parent for table in tables]
    root = Path(os.path.commonpath(folders))
    paths: list[str] = []
    for table, folder in zip(tables, folders, strict=True):
        prefix = f"{folder.relative_to(root)}/".removeprefix("./")
        names = _read_column(table.path, column, arg_name).to_pylist()
        paths.extend(name and (name if name.startswith("/") or "://" in name else prefix + name) for name in names)
    return root, paths


def _file_of_row(starts: NDArray[np.int64], row: int) -> int:
    return int(np.searchsorted(starts, row, side="right")) - 1


def _row_name(files: Sequence[Path], starts: NDArray[np.int64], row: int) -> str:
    file = _file_of_row(starts, row)
    return f"{printable_name(str(files[file]))}:row {row - starts[file]}"


def _load_copy(tables: Sequence[_Table], column: str, feature: Any, title: str, arg_name: str, folder: Path) -> Any:
    """A column of Parquet files as a `datasets.Dataset`, from a copy in a cache folder that is created if missing."""
    import datasets

    # One folder per set of files; in it one copy, named by the current stamps of the files and by the column.
    files = [table.path for table in tables]
    size = sum(_column_size(table.footer, column) for table in tables)
    copies = cache_path(files[0], folder, f"-{digest([os.fsencode(path.absolute()) for path in files])[:16]}")
    copy = copies / digest([file_stamp(path, [column]).encode() for path in files])[:16]
    bars_disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        copy.mkdir(parents=True, exist_ok=True)
        # os.walk passes over folders that vanish: another process may be renaming its finished copy.
        if not any(name.endswith(".arrow") for _, _, names in os.walk(copy) for name in names):
            _check_space(copies, size, title, arg_name)
            log.info("%s: copying its images (%.2f GiB) to %s, once", title, size / 2**30, copies)
        paths = [glob.escape(str(path.absolute())) for path in files]
        with current().bar(None, f"copying the images of {printable_name(title)}"):
            dataset = datasets.Dataset.from_parquet(
                paths, features=datasets.Features({column: feature}), cache_dir=str(copy), columns=[column]
            )
    except (OSError, datasets.exceptions.DatasetGenerationError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno is not None:
            raise SourceError(
                f"{arg_name}: the images of {title} could not be copied into {folder} ({cause}); "
                "set --data.cache to a folder with room"
            ) from error
        problem = f"is damaged, or its files differ in their columns ({str(cause).strip()})"
        raise SourceError(f"{arg_name}: {title} {problem}; fetch it again") from error
    finally:
        if not bars_disabled:
            datasets.enable_progress_bars()
    for other in copies.iterdir():
        if other != copy:  # the copy of earlier versions of the files
            shutil.rmtree(other, ignore_errors=True)
    return dataset


def _check_space(folder: Path, size: int, title: str, arg_name: str) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise SourceError(
            f"{arg_name}: {title} has {size / 2**30:.1f} GiB of images, which are copied into {folder} once, "
            f"but only {free / 2**30:.1f} GiB are free there; set --data.cache to a folder with room"
        )


def _column_size(footer: Any, column: str) -> int:
    """Uncompressed size of a column of a Parquet file in bytes; slightly more than the size of its values."""
    groups = [footer.row_group(g) for g in range(footer.num_row_groups)]
    chunks = [group.column(c) for group in groups for c in range(group.num_columns)]
    return sum(c.total_uncompressed_size for c in chunks if f"{c.path_in_schema}.".startswith(f"{column}."))
