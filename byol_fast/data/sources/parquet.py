"""Parquet files with encoded images, as on the Hugging Face hub.

A single row of a Parquet file cannot be read: its row group (100 rows or more) has to be read and decompressed, which a
global shuffle would do for every image. `datasets` copies images and labels once into the cache, as a memory-mapped
Arrow file with random access. The cached copy belongs to byol_fast: mapping it is safe, because no other program
truncates it.
"""

from __future__ import annotations

import glob
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from byol_fast.data.sources.base import NUM_SAMPLED_SIZES, SourceError, digest, evenly_spaced
from byol_fast.data.sources.datasets import HuggingFaceSource, find_columns, open_hugging_face
from byol_fast.data.sources.shards import cache_path, file_stamp

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
        return digest([names.encode(), self.starts.tobytes(), self.index.tobytes()])

    @cached_property
    def sizes(self) -> tuple[int, ...]:  # noqa: D102 (inherited)
        return tuple(len(self.read(i)) for i in evenly_spaced(len(self), NUM_SAMPLED_SIZES).tolist())

    def sample_name(self, i: int) -> str:  # noqa: D102 (inherited)
        file = int(np.searchsorted(self.starts, self.index[i], side="right")) - 1
        return f"{self.files[file]}:row {self.index[i] - self.starts[file]}"

    def describe(self) -> str:  # noqa: D102 (inherited)
        return f"{self._counts()} in {self.title}"


def open_parquet(
    files: Sequence[Path], title: str, arg_name: str, cache: Path, *, image_column: str = "", label_column: str = ""
) -> ParquetSource:
    """The images of Parquet files, row by row.

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
        from pyarrow import parquet
    except ImportError:
        raise SourceError(
            f"{arg_name}: {title} is Parquet, which needs datasets; pip install datasets (or byol_fast[parquet])"
        ) from None
    footers = []
    for path in files:
        try:
            footers.append(parquet.read_metadata(path))
        except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
            raise SourceError(f"{arg_name}: {path} cannot be read as Parquet ({error}); fetch it again") from error
    features = datasets.Features.from_arrow_schema(parquet.read_schema(files[0]))
    image, label = find_columns(features, str(files[0]), arg_name, image_column, label_column)
    if label and (without := [p for p, f in zip(files, footers, strict=True) if label not in f.schema.names]):
        log.warning("%s: %s has no column %s: treated as unlabeled", title, without[0], label)
        label = ""
    rows = [footer.num_rows for footer in footers]
    if not any(rows):
        raise SourceError(f"{arg_name}: {title} has no rows")

    columns = [image, label] if label else [image]
    size = sum(_column_size(footer, columns) for footer in footers)
    dataset = _load_copy(files, columns, size, title, arg_name, cache.expanduser() / "parquet")
    source = open_hugging_face(dataset, arg_name, image_column=image, label_column=label)
    return ParquetSource(
        source.dataset, source.column, source.index, source.labels, source.classes,
        files=tuple(files), starts=np.cumsum(rows) - rows, title=title,
    )  # fmt: skip


def _load_copy(files: Sequence[Path], columns: list[str], size: int, title: str, arg_name: str, folder: Path) -> Any:
    """Columns of Parquet files as a `datasets.Dataset`, from a copy in a cache folder that is created if missing."""
    import datasets

    # One folder per set of files; in it one copy, named by the current stamps of the files and by the columns.
    copies = cache_path(files[0], folder, f"-{digest([os.fsencode(path.absolute()) for path in files])[:16]}")
    copy = copies / digest([file_stamp(path, columns).encode() for path in files])[:16]
    bars_disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        copy.mkdir(parents=True, exist_ok=True)
        # os.walk passes over folders that vanish: another process may be renaming its finished copy.
        if not any(name.endswith(".arrow") for _, _, names in os.walk(copy) for name in names):
            _check_space(copies, size, title, arg_name)
            log.info("%s: copying its images (%.2f GiB) to %s, once", title, size / 2**30, copies)
        paths = [glob.escape(str(path.absolute())) for path in files]
        dataset = datasets.Dataset.from_parquet(paths, cache_dir=str(copy), columns=columns)
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


def _column_size(footer: Any, columns: list[str]) -> int:
    """Uncompressed size of some columns of a Parquet file in bytes; slightly more than the size of their values."""
    groups = [footer.row_group(g) for g in range(footer.num_row_groups)]
    chunks = [group.column(c) for group in groups for c in range(group.num_columns)]
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns)
