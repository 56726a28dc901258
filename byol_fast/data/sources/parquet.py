"""Parquet files with encoded images, as the Hugging Face hub holds them.

A row of a Parquet file cannot be read alone: its row group (100 rows and more) has to be read and decompressed. A
global shuffle would do that for every image. So the images of a file are copied once, as they are, one after the
other into a file of the cache, and read from there by offset, like the members of a tar file.
"""

from __future__ import annotations

import fcntl
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from byol_fast.data.sources.base import SourceError, digest, labels_from_text
from byol_fast.data.sources.shards import (
    Index,
    ShardSource,
    cache_name,
    joined,
    load_index,
    pack_texts,
    save_index,
    stamp_of,
    unpack_texts,
)
from byol_fast.utils.files import atomic_path

log = logging.getLogger(__name__)

_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo", "image_bytes", "bytes")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "cls", "target")
_BATCH_ROWS = 64


@dataclass(frozen=True, eq=False, kw_only=True)
class ParquetSource(ShardSource):
    """Rows of Parquet files; `shards` are their images in the cache."""

    origins: tuple[Path, ...]
    """The Parquet files, one for each shard."""
    row: NDArray[np.int64]
    """Row of each image in its file `[N]`."""

    @cached_property
    def fingerprint(self) -> str:  # noqa: D102 (inherited)
        names = "\0".join(origin.name for origin in self.origins)
        return digest([names.encode(), self.shard.tobytes(), self.row.tobytes()])

    def where(self, i: int) -> str:  # noqa: D102 (inherited)
        return f"{self.origins[self.shard[i]]}:row {self.row[i]}"

    def _own_subset(self, index: NDArray[np.int64]) -> dict[str, Any]:
        return {"row": self.row[index]}


def open_parquet(
    files: Sequence[Path], title: str, where: str, cache: Path, *, image_column: str = "", label_column: str = ""
) -> ParquetSource:
    """The images of Parquet files, row by row.

    Args:
        files: in order.
        title: what people call the whole.
        where: name of the argument, for error messages.
        cache: folder that the copies of the images are kept in.
        image_column: encoded images: binary, or `{bytes, path}` as Hugging Face stores them. Empty: found by name and
            type.
        label_column: class numbers or names. Empty: found by name; without one there are no labels.

    Raises:
        SourceError: pyarrow is missing, a file is damaged, has no such column, or the cache has no room.
    """
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise SourceError(
            f"{where}: {title} is Parquet, which needs pyarrow; pip install pyarrow (or byol_fast[parquet])"
        ) from None
    folder = cache.expanduser() / "parquet"
    copies = [cache_name(path, folder, ".images") for path in files]
    indexes = [
        _unpacked(path, copy, where, image_column, label_column) for path, copy in zip(files, copies, strict=True)
    ]
    if not any(len(index["offset"]) for index in indexes):
        raise SourceError(f"{where}: {title} has no rows")
    labels, classes = _labels(indexes, title)
    return ParquetSource(
        shards=tuple(copies),
        origins=tuple(files),
        row=np.concatenate([np.arange(len(index["offset"])) for index in indexes]),
        labels=labels,
        classes=classes,
        title=title,
        **joined(indexes),
    )


def _labels(indexes: Sequence[Index], title: str) -> tuple[NDArray[np.int64] | None, tuple[str, ...]]:
    texts = [text for index in indexes for text in unpack_texts(index["labels"], len(index["offset"]))]
    labels, classes = labels_from_text(texts)
    if labels is None and any(texts):
        log.warning("%s: %d of %d rows have no label: taken as unlabelled", title, texts.count(""), len(texts))
    names = tuple(str(name) for name in indexes[0]["classes"])
    if labels is not None and len(names) > int(labels.max()):
        classes = names
    return labels, classes


def _unpacked(path: Path, copy: Path, where: str, image_column: str, label_column: str) -> Index:
    """The index of a file's images in the cache; copies them there if that has not been done."""
    stored = copy.with_suffix(".npz")
    stamp = stamp_of(path, (image_column, label_column))
    if copy.is_file() and (known := load_index(stored, stamp)) is not None:
        return known
    try:
        with _alone(copy):
            if copy.is_file() and (known := load_index(stored, stamp)) is not None:
                return known  # another process was faster
            index = _unpack(path, copy, where, image_column, label_column)
            save_index(stored, stamp, index)
            return index
    except OSError as error:
        raise SourceError(
            f"{where}: the images of {path} could not be copied into {copy.parent} ({error}); "
            "set --data.cache to a folder with room"
        ) from error


@contextmanager
def _alone(copy: Path) -> Iterator[None]:
    """Let one process at a time write a copy."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    with copy.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _unpack(path: Path, copy: Path, where: str, image_column: str, label_column: str) -> Index:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{where}: {path} cannot be read as Parquet ({error}); fetch it again") from error
    schema = file.schema_arrow
    column = _image_column(schema, path, where, image_column)
    labels = _label_column(schema, path, where, label_column)
    leaf = f"{column}.bytes" if pa.types.is_struct(schema.field(column).type) else column
    need = _bytes_of(file, leaf)
    free = shutil.disk_usage(copy.parent).free
    if need > free:
        raise SourceError(
            f"{where}: {path} holds {need / 2**30:.1f} GiB of images, which are copied into {copy.parent} once, "
            f"but only {free / 2**30:.1f} GiB are free there; set --data.cache to a folder with room"
        )
    log.info("%s: copying its images (%.2f GiB) to %s, once", path.name, need / 2**30, copy.parent)
    sizes: list[NDArray[np.int64]] = []
    texts: list[str] = []
    with atomic_path(copy) as temporary, temporary.open("wb") as out:
        for batch in _batches(file, [leaf, *([labels] if labels else [])], path, where):
            images = batch.column(column)
            images = pc.struct_field(images, "bytes") if pa.types.is_struct(images.type) else images
            images = pc.fill_null(images.cast(pa.large_binary()), b"")
            ends = np.frombuffer(images.buffers()[1], np.int64)[images.offset : images.offset + len(images) + 1]
            sizes.append(np.diff(ends))
            if ends[-1] > ends[0]:
                out.write(memoryview(images.buffers()[2])[ends[0] : ends[-1]])
            if labels:
                texts.extend(_text(label) for label in batch.column(labels).to_pylist())
    size = np.concatenate(sizes) if sizes else np.empty(0, np.int64)
    names = _class_names(schema, labels)
    return {
        "offset": np.cumsum(size) - size,
        "size": size,
        "labels": pack_texts(texts or [""] * len(size)),
        "classes": np.array(names, np.str_),
    }


def _batches(file: Any, columns: list[str], path: Path, where: str) -> Iterator[Any]:
    import pyarrow as pa

    try:
        yield from file.iter_batches(_BATCH_ROWS, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{where}: {path} is damaged ({str(error).strip()}); fetch it again") from error


def _text(label: object) -> str:
    return "" if label is None else str(label).replace("\0", "").strip()


def _image_column(schema: Any, path: Path, where: str, asked: str) -> str:
    import pyarrow as pa

    def holds_bytes(kind: Any) -> bool:
        if pa.types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0 and holds_bytes(kind.field("bytes").type)
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    fitting = [name for name in schema.names if holds_bytes(schema.field(name).type)]
    columns = ", ".join(f"{name} ({schema.field(name).type})" for name in schema.names)
    if asked:
        if asked not in fitting:
            raise SourceError(
                f"{where}: data.image_column must be a column of encoded images (binary, or {{bytes, path}}) of "
                f"{path}, got {asked!r}; its columns are {columns}"
            )
        return asked
    known = [name for name in _IMAGE_COLUMNS if name in fitting] or (fitting if len(fitting) == 1 else [])
    if not known:
        problem = "several columns of binary data" if fitting else "no column of encoded images (binary, {bytes, path})"
        raise SourceError(
            f"{where}: {path} has {problem}; name one with --data.image-column; its columns are {columns}"
        )
    return known[0]


def _label_column(schema: Any, path: Path, where: str, asked: str) -> str | None:
    import pyarrow as pa

    def is_label(name: str) -> bool:
        kind = schema.field(name).type
        return bool(pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind))

    if asked and (asked not in schema.names or not is_label(asked)):
        raise SourceError(
            f"{where}: data.label_column must be a column of whole numbers or texts of {path}, got {asked!r}; "
            f"its columns are {', '.join(schema.names)}"
        )
    return asked or next((name for name in _LABEL_COLUMNS if name in schema.names and is_label(name)), None)


def _class_names(schema: Any, label_column: str | None) -> list[str]:
    """Names of the classes, where Hugging Face's description of the columns is in the file."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[label_column]["names"]]
    except (KeyError, TypeError, ValueError):
        return []


def _bytes_of(file: Any, leaf: str) -> int:
    """How many bytes a column has when it is read; a little more than its values."""
    total = 0
    for g in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(g)
        chunks = (group.column(c) for c in range(group.num_columns))
        total += sum(int(chunk.total_uncompressed_size) for chunk in chunks if chunk.path_in_schema == leaf)
    return total
