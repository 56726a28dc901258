"""Features of a folder of images, and their files."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from byol_fast import config as configs
from byol_fast.config import ConfigError, DataConfig, Preprocessing
from byol_fast.config.fields import require
from byol_fast.data import ImageSource, eval_batches, open_source
from byol_fast.data.sources import FileSource, ParquetSource, TarSource
from byol_fast.data.sources.splits import part_of
from byol_fast.evaluate.extract import extract_features
from byol_fast.evaluate.rankme import rankme, subsample_rows
from byol_fast.export.encoder import load_encoder
from byol_fast.models.layers import Normalize
from byol_fast.utils.device import resolve_device
from byol_fast.utils.files import check_features_path, original_name, output_file, printable_name
from byol_fast.utils.precision import resolve_precision
from byol_fast.utils.progress import Progress

log = logging.getLogger(__name__)

ROW_GROUP_VALUES = 1 << 24
"""Values of a row group of Parquet: writing one of a million rows, as by default, takes many GiB of memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Features:
    """Features of images under an encoder."""

    features: NDArray[np.float32]
    """One row per image `[N, D]`."""
    paths: tuple[str, ...]
    """Path of each image in the folder, `shard:member`, or name and number. Bytes that are not UTF-8 are surrogates, as
    in Python's paths."""
    index: NDArray[np.int64]
    """Position of each image in the folder `[N]`; positions of skipped images are missing."""
    labels: NDArray[np.int64] | None = None
    """Class of each image `[N]`, -1 where unknown; None without labels."""
    classes: tuple[str, ...] = ()
    """Names of the classes."""
    skipped: tuple[str, ...] = ()
    """Paths of images that could not be read."""
    rankme: float = float("nan")
    """Effective rank of the features; see `byol_fast.evaluate.rankme`."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Metadata of the encoder, as in `encoder.json`, and the precision it was run with."""


def embed_folder(
    encoder: str | Path | tuple[nn.Module, dict[str, Any]],
    images: object,
    *,
    batch_size: int = 256,
    device: str = "auto",
    precision: str = "auto",
    threads: int = 0,
    on_corrupt: Literal["raise", "skip"] = "raise",
    options: DataConfig | None = None,
    progress: Progress | None = None,
) -> Features:
    """Features of all images of a folder, in the order of their paths, from center crops without augmentation.

    Args:
        encoder: a run folder, an exported encoder, or the pair that `load_encoder` returns (moved to the device).
        images: a folder, or anything else that `byol_fast.data.open_source` takes.
        batch_size: images per batch.
        device: auto, cpu or cuda.
        precision: of the network: auto, bf16, fp16, tf32 or fp32; features are stored as fp32.
        threads: decoding threads; 0: one per core.
        on_corrupt: raise an error for an image that cannot be read, or skip it.
        options: `cache`, `image_column` and `label_column` are used.
        progress: shows progress; None: nothing is shown.

    Raises:
        TypeError: the encoder is neither a path nor such a pair.
        FileNotFoundError: the encoder does not exist.
        SourceError: the images do not exist.
        CorruptImageError: an image cannot be read and `on_corrupt` is "raise", or half of all images cannot be read.
        ValueError: a feature is not finite.

    Examples:
        >>> results = byol_fast.evaluate.embed_folder("runs/first", "photos")
        >>> results.features.shape, results.paths[0]
    """
    torch_device = resolve_device(device)
    torch_precision = resolve_precision(precision, torch_device)
    network, metadata = load_encoder(encoder) if isinstance(encoder, str | Path) else _check_pair(encoder)
    options = configs.replace(options or DataConfig(), {"on_corrupt": on_corrupt})
    progress = progress or Progress()
    with progress.shown():
        source = open_source(images, arg_name="images", options=options)
    if source.labels is not None and all(map(part_of, source.classes)):
        folders = " and ".join(source.classes)
        log.warning("embed: the folders %s are taken as classes; pass one of them to use the folders inside", folders)
    preprocessing = Preprocessing.of_metadata(metadata)
    batches = eval_batches(
        source,
        preprocessing,
        batch_size,
        threads=threads,
        device=torch_device,
        on_corrupt=on_corrupt,
    )
    features, index = _extract_to_cpu(
        network.to(torch_device),
        progress.track(batches, len(source), "images"),
        len(source),
        metadata["feature_dim"],
        normalize=Normalize(preprocessing.mean, preprocessing.std).to(torch_device),
        device=torch_device,
        autocast=torch_precision.autocast_dtype,
    )
    if not np.isfinite(features).all():
        raise ValueError(
            f"embed: features must be finite, some are not in {torch_precision.name}; set precision fp32, or check "
            "the loss of the run"
        )
    names = _names(source)
    return Features(
        features=features,
        paths=tuple(names[i] for i in index),
        index=index,
        labels=None if source.labels is None else source.labels[index],
        classes=source.classes,
        skipped=tuple(names[i] for i in np.setdiff1d(np.arange(len(source)), index)),
        rankme=rankme(subsample_rows(torch.from_numpy(features)).to(torch_device)),
        metadata=metadata | {"precision": torch_precision.name},
    )


def _check_pair(encoder: object) -> tuple[nn.Module, dict[str, Any]]:
    """The pair of a network and its metadata that an argument is."""
    if isinstance(encoder, Sequence) and len(encoder) == 2:
        network, metadata = encoder
        if isinstance(network, nn.Module) and isinstance(metadata, Mapping):
            has_dim, fix = "feature_dim" in metadata, "take it from an encoder.json"
            require(has_dim, "embed_folder: metadata", "have feature_dim, the size of the features", metadata, fix)
            return network, dict(metadata)
    raise TypeError(
        "embed_folder: encoder must be a run folder, an exported encoder, or a pair (module, metadata), got "
        f"{type(encoder).__name__}; metadata is the content of an encoder.json, see byol_fast.load_encoder"
    )


def _extract_to_cpu(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    num_images: int,
    feature_dim: int,
    *,
    normalize: nn.Module,
    device: torch.device,
    autocast: torch.dtype | None,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Features and positions, moved to the CPU after every batch: those of large data sets exceed a GPU's memory."""
    features = np.empty((num_images, feature_dim), np.float32)
    positions: list[Tensor] = []
    count = 0
    for batch in batches:
        x, index = extract_features(network, [batch], normalize=normalize, device=device, autocast=autocast)
        features[count : count + len(x)] = x.cpu().numpy()
        count += len(x)
        positions.append(index)
    return features[:count], torch.cat(positions).numpy()


def _names(source: ImageSource) -> list[str]:
    """Names of images, without the folder where that is possible, so that they are valid on another machine."""
    if isinstance(source, FileSource):
        return list(source.paths)
    if isinstance(source, TarSource):
        shards = zip(source.shard.tolist(), source.names, strict=True)
        return [f"{source.shards[shard].name}:{name}" for shard, name in shards]
    names = [original_name(source.sample_name(i)) for i in range(len(source))]
    return [Path(name).name for name in names] if isinstance(source, ParquetSource) else names


# ---- files ---------------------------------------------------------------------------------------------------------


def check_saving(source: ImageSource, metadata: dict[str, Any], path: Path) -> None:
    """Write the names and classes of images beside a file of their features, and remove that again.

    Args:
        source: the images.
        metadata: of the encoder.
        path: the file.

    Raises:
        ConfigError: the file could not be written once the features are computed.
    """
    names = _names(source)
    trial = Features(
        features=np.zeros((len(names), 1), np.float32),
        paths=tuple(names),
        index=np.arange(len(names)),
        labels=source.labels,
        classes=source.classes,
        skipped=tuple(names[:1]),
        metadata=metadata,
    )
    save_features(trial, path, trial=True)
    dim = metadata["feature_dim"]
    needed, free = 4 * len(names) * dim, shutil.disk_usage(path.parent).free
    if free < needed:
        raise ConfigError(
            f"embed: output needs {needed / 2**30:.3g} GiB for {len(names):,} images with {dim} features, "
            f"{path.parent.absolute()} has {free / 2**30:.3g} GiB free; free space, or choose another folder"
        )


def save_features(features: Features, path: Path, *, trial: bool = False) -> None:
    r"""Write features as `.npz` or `.parquet`, atomically.

    `.npz`: `features` fp32 `[N, D]`, `paths` `[N]`, `index` `[N]`, `skipped`, `rankme`, `metadata` as JSON, and, with
    labels, `labels` int64 `[N]` and `classes` `[C]`. `.parquet`: columns `path`, `index`, `features` (lists of D) and,
    with labels, `label` and `class`; the rest as JSON in the schema's metadata `byol_fast`. Its texts are Unicode: in
    names, a byte that is not UTF-8 is written as `\xHH`, a backslash as `\\`, a line break as `\n`; see
    `byol_fast.utils.files.original_name`.

    Args:
        features: to write.
        path: the file.
        trial: write beside the file and remove that again.

    Raises:
        ConfigError: the suffix is another one, or the file cannot be written.
    """
    check_features_path(path)
    with output_file(path, "embed", trial=trial) as temporary:
        (_write_npz if path.suffix == ".npz" else _write_parquet)(features, temporary)


def _write_npz(features: Features, path: Path) -> None:
    arrays: dict[str, Any] = {"features": features.features, "paths": np.array(features.paths), "index": features.index}
    if features.labels is not None:
        arrays |= {"labels": features.labels, "classes": np.array(features.classes)}
    arrays |= {"rankme": np.float64(features.rankme), "metadata": np.array(json.dumps(features.metadata))}
    if features.skipped:
        arrays["skipped"] = np.array(features.skipped)
    with path.open("wb") as file:  # numpy would append .npz to a path
        np.savez(file, **arrays)


def _write_parquet(features: Features, path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    columns: dict[str, Any] = {
        "path": pa.array([printable_name(name) for name in features.paths]),
        "index": pa.array(features.index),
    }
    if features.labels is not None:
        classes = list(map(printable_name, features.classes))
        names = [classes[label] if label >= 0 else None for label in features.labels.tolist()]
        columns |= {"label": pa.array(features.labels), "class": pa.array(names).dictionary_encode()}
    flat = pa.array(np.ascontiguousarray(features.features).reshape(-1))
    columns["features"] = pa.FixedSizeListArray.from_arrays(flat, features.features.shape[1])
    others = {
        "classes": list(map(printable_name, features.classes)),
        "skipped": list(map(printable_name, features.skipped)),
        "rankme": features.rankme,
        "metadata": features.metadata,
    }
    table = pa.table(columns).replace_schema_metadata({"byol_fast": json.dumps(others)})
    parquet.write_table(table, path, row_group_size=max(1, ROW_GROUP_VALUES // features.features.shape[1]))


def load_features(path: Path | str) -> Features:
    """Read a file of `save_features`.

    Raises:
        FileNotFoundError: the file does not exist.
        ConfigError: it contains no features.
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
            metadata=json.loads(str(file["metadata"])),
        )


def _read_parquet(path: Path) -> Features:
    from pyarrow import parquet

    table = parquet.read_table(path)
    others = json.loads(table.schema.metadata[b"byol_fast"])
    column = table["features"].combine_chunks()
    return Features(
        features=column.values.to_numpy().reshape(len(table), -1),
        paths=tuple(map(original_name, table["path"].to_pylist())),
        index=table["index"].to_numpy(),
        labels=table["label"].to_numpy() if "label" in table.column_names else None,
        classes=tuple(map(original_name, others["classes"])),
        skipped=tuple(map(original_name, others["skipped"])),
        rankme=others["rankme"],
        metadata=others["metadata"],
    )
