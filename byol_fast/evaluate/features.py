"""Features of a folder of images, and the files they are kept in."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from byol_fast.config import ConfigError, DataConfig
from byol_fast.data import ImageSource, eval_batches, open_source
from byol_fast.data.sources import FileSource
from byol_fast.evaluate.extract import embed
from byol_fast.evaluate.rankme import rankme, spread_rows
from byol_fast.export.encoder import load_encoder
from byol_fast.models.layers import Normalize
from byol_fast.utils.files import atomic_path
from byol_fast.utils.precision import resolve_precision

log = logging.getLogger(__name__)

PARTS = {"train", "training", "val", "valid", "validation", "test"}
"""Names of folders that are parts of a data set rather than classes."""

Encoder = str | Path | tuple[nn.Module, dict[str, Any]]
"""A run, an exported encoder, or what `load_encoder` returned."""

Progress = Callable[[int, int], None]
"""Called with the images that are done, and how many there are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Features:
    """What an encoder makes of images."""

    features: NDArray[np.float32]
    """A row for each image `[N, D]`."""
    paths: tuple[str, ...]
    """Where each image lies: relative to the folder that was given, `shard:member`, or source and number."""
    index: NDArray[np.int64]
    """Number of each image among all of the folder `[N]`; some are missing where images were skipped."""
    labels: NDArray[np.int64] | None = None
    """Class of each image `[N]`, -1 where it is not known; None where none is."""
    classes: tuple[str, ...] = ()
    """Names of the classes."""
    skipped: tuple[str, ...] = ()
    """Images that could not be read and were left out."""
    rankme: float = float("nan")
    """Effective rank of the features: see `byol_fast.evaluate.rankme`."""
    about: dict[str, Any] = field(default_factory=dict)
    """The encoder's description, as in `encoder.json`, and the precision that it was run with."""


def embed_folder(
    encoder: Encoder,
    images: object,
    *,
    batch_size: int = 256,
    device: str = "auto",
    precision: str = "auto",
    threads: int = 0,
    on_bad: Literal["raise", "skip"] = "raise",
    options: DataConfig | None = None,
    progress: Progress | None = None,
) -> Features:
    """Features of every image of a folder, in the order of its paths.

    Images are resized and cropped in the middle to the size that the encoder was trained on, not augmented.

    Args:
        encoder: a run folder, an exported encoder, or the pair that `load_encoder` returns (it moves to the device).
        images: a folder, or whatever else `byol_fast.data.open_source` takes.
        batch_size: images at a time.
        device: auto, cpu or cuda.
        precision: of the network: auto, bf16, fp16, tf32 or fp32; the features are fp32 in any case.
        threads: decoding threads; 0 means one for each core.
        on_bad: whether an image that cannot be read is an error, or left out.
        options: of it `cache`, `image_column` and `label_column` are used.
        progress: told after every batch how far it is.

    Returns:
        Features, paths, and labels where they are known.

    Raises:
        FileNotFoundError: there is no such encoder.
        SourceError: there are no such images.
        CorruptImageError: an image cannot be read, and `on_bad` is "raise"; or half of all cannot.
        ValueError: a feature is not finite.

    Example:
        >>> found = byol_fast.evaluate.embed_folder("runs/first", "photos")
        >>> found.features.shape, found.paths[0]
    """
    from byol_fast.utils.device import resolve_device

    where = resolve_device(device)
    numbers = resolve_precision(precision, where)
    network, about = load_encoder(encoder) if isinstance(encoder, str | Path) else encoder
    source = open_source(images, arg_name="images", options=options)
    if source.labels is not None and set(source.classes) <= PARTS:
        parts = " and ".join(source.classes)
        log.warning("embed: the folders %s are taken as classes; for those inside, give one of the folders", parts)
    network = network.to(where)
    normalize = Normalize(tuple(about["mean"]), tuple(about["std"])).to(where)
    rows = np.empty((len(source), about["feature_dim"]), np.float32)
    kept: list[Tensor] = []
    count = 0
    batches = eval_batches(
        source,
        about["image_size"],
        batch_size,
        interpolation=about.get("interpolation", "bicubic"),
        threads=threads,
        device=where,
        on_bad=on_bad,
    )
    for batch in batches:
        x = embed(network, [batch], normalize=normalize, device=where, autocast=numbers.autocast)
        rows[count : count + len(x)] = x.cpu().numpy()
        count += len(x)
        kept.append(batch[1])
        if progress is not None:
            progress(int(batch[1][-1]) + 1, len(source))
    features = rows[:count]
    if not np.isfinite(features).all():
        raise ValueError(
            f"embed: features must be finite, {numbers.name} gives some that are not; use precision fp32, or check "
            "the run's loss"
        )
    index = torch.cat(kept).numpy()
    left_out = np.setdiff1d(np.arange(len(source)), index)
    names = list(_names(source))
    return Features(
        features=features,
        paths=tuple(names[i] for i in index),
        index=index,
        labels=None if source.labels is None else source.labels[index],
        classes=source.classes,
        skipped=tuple(names[i] for i in left_out),
        rankme=rankme(spread_rows(torch.from_numpy(features)).to(where)),
        about=about | {"precision": numbers.name},
    )


def _names(source: ImageSource) -> Iterator[str]:
    """Names of images that mean the same on another machine, where that is possible."""
    if isinstance(source, FileSource):
        yield from source.paths
        return
    for i in range(len(source)):
        file, colon, inside = source.sample_name(i).partition(":")
        yield f"{Path(file).name}:{inside}" if colon else file


# ---- files ---------------------------------------------------------------------------------------------------------


def check_features_path(path: Path) -> None:
    """Refuse a file that features cannot be written to, before they are computed.

    Raises:
        ConfigError: its ending is neither .npz nor .parquet, or pyarrow is missing for the latter.
    """
    if path.suffix not in {".npz", ".parquet"}:
        raise ConfigError(f"embed: output must be a file that ends in .npz or .parquet, got {path}")
    if path.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ConfigError(f"embed: output is {path}, which needs pyarrow; pip install pyarrow, or write .npz")


def save_features(found: Features, path: Path) -> None:
    """Write features as `.npz` or `.parquet`, whole or not at all.

    `.npz`: `features` fp32 `[N, D]`, `paths` `[N]`, `index` `[N]`, where known `labels` int64 `[N]` and `classes`
    `[C]`; `skipped`, `rankme`, and `about` as JSON. `.parquet`: columns `path`, `index`, `features` (lists of D), where
    known `label` and `class`; the rest as JSON in the metadata `byol_fast`.

    Raises:
        ConfigError: the path ends otherwise, or cannot be written.
    """
    check_features_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            (_write_npz if path.suffix == ".npz" else _write_parquet)(found, temporary)
    except OSError as error:
        raise ConfigError(f"embed: output must be a file that can be written, got {path} ({error})") from error


def _write_npz(found: Features, path: Path) -> None:
    arrays: dict[str, Any] = {"features": found.features, "paths": np.array(found.paths), "index": found.index}
    if found.labels is not None:
        arrays |= {"labels": found.labels, "classes": np.array(found.classes)}
    arrays |= {"rankme": np.float64(found.rankme), "about": np.array(json.dumps(found.about))}
    if found.skipped:
        arrays["skipped"] = np.array(found.skipped)
    with path.open("wb") as file:  # given a path, numpy would append .npz to it
        np.savez(file, **arrays)


def _write_parquet(found: Features, path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    columns: dict[str, Any] = {"path": pa.array([_utf8(name) for name in found.paths]), "index": pa.array(found.index)}
    if found.labels is not None:
        names = [found.classes[label] if label >= 0 else None for label in found.labels.tolist()]
        columns |= {"label": pa.array(found.labels), "class": pa.array(names).dictionary_encode()}
    flat = pa.array(np.ascontiguousarray(found.features).reshape(-1))
    columns["features"] = pa.FixedSizeListArray.from_arrays(flat, found.features.shape[1])
    rest = {"classes": found.classes, "skipped": found.skipped, "rankme": found.rankme, "about": found.about}
    table = pa.table(columns).replace_schema_metadata({"byol_fast": json.dumps(rest)})
    parquet.write_table(table, path)


def _utf8(name: str) -> str:
    """Names of files may hold any bytes, Parquet's texts only UTF-8."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def load_features(path: Path | str) -> Features:
    """Read what `save_features` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: it holds no features.
    """
    path = Path(path)
    check_features_path(path)
    if not path.exists():
        raise FileNotFoundError(f"features: {path} does not exist; write it with `byol-fast embed`")
    try:
        return _read_npz(path) if path.suffix == ".npz" else _read_parquet(path)
    except (KeyError, ValueError, OSError) as error:
        raise ConfigError(f"features: {path} must be a file of `byol-fast embed`, it is not ({error})") from error


def _read_npz(path: Path) -> Features:
    with np.load(path, allow_pickle=False) as file:
        return Features(
            features=file["features"],
            paths=tuple(file["paths"].tolist()),
            index=file["index"],
            labels=file.get("labels"),
            classes=tuple(file["classes"].tolist()) if "classes" in file else (),
            skipped=tuple(file["skipped"].tolist()) if "skipped" in file else (),
            rankme=float(file["rankme"]),
            about=json.loads(str(file["about"])),
        )


def _read_parquet(path: Path) -> Features:
    from pyarrow import parquet

    table = parquet.read_table(path)
    rest = json.loads(table.schema.metadata[b"byol_fast"])
    column = table["features"].combine_chunks()
    return Features(
        features=column.values.to_numpy().reshape(len(table), -1),
        paths=tuple(table["path"].to_pylist()),
        index=table["index"].to_numpy(),
        labels=table["label"].to_numpy() if "label" in table.column_names else None,
        classes=tuple(rest["classes"]),
        skipped=tuple(rest["skipped"]),
        rankme=rest["rankme"],
        about=rest["about"],
    )
