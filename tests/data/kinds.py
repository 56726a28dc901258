"""The same images as every kind of source."""

from __future__ import annotations

import importlib.util
import io
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from byol_fast.config import DataConfig
from byol_fast.data import ImageSource, open_source
from byol_fast.data.sources import ArraySource

CLASSES = ("ant", "bee", "cat", "dog")


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def encoded(image: Any, kind: str = "jpeg", **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


def write_tar(path: Path, members: Sequence[tuple[str, bytes]], **options: Any) -> Path:
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_parquet(path: Path, images: Sequence[bytes | None], labels: Sequence[Any], **options: Any) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    structs = [None if data is None else {"bytes": data, "path": f"{i}.jpg"} for i, data in enumerate(images)]
    pq.write_table(pa.table({"image": structs, "label": labels}), path, **options)
    return path


def options(cache: Path) -> DataConfig:
    return DataConfig(cache=cache)


def _folder(folder: Path, images: Sequence[bytes]) -> Any:
    for i, data in enumerate(images):
        path = folder / CLASSES[i * 4 // len(images)] / f"photo {i:03d}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    return folder


def _list(folder: Path, images: Sequence[bytes]) -> Any:
    _folder(folder, images)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.jpg"))
    (folder / "images.txt").write_text("".join(f"{name}\t{name.partition('/')[0]}\n" for name in names))
    return folder / "images.txt"


def _tars(folder: Path, images: Sequence[bytes]) -> Any:
    half = len(images) // 2
    for k, part in enumerate((range(half), range(half, len(images)))):
        members = []
        for i in part:
            members += [(f"{i:06d}.jpg", images[i]), (f"{i:06d}.cls", str(i * 4 // len(images)).encode())]
        write_tar(folder / f"shard-{k}.tar", members)
    return folder / "shard-{0..1}.tar"


def _parquet(folder: Path, images: Sequence[bytes]) -> Any:
    half = len(images) // 2
    for k, part in enumerate((range(half), range(half, len(images)))):
        labels = [i * 4 // len(images) for i in part]
        write_parquet(folder / f"{k}.parquet", [images[i] for i in part], labels, row_group_size=7)
    return folder


class Photos:
    """An indexable dataset."""

    def __init__(self, images: Sequence[bytes]) -> None:
        self.images = images
        self.targets = [i * 4 // len(images) for i in range(len(images))]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return Image.open(io.BytesIO(self.images[i])), self.targets[i]


def _dataset(folder: Path, images: Sequence[bytes]) -> Any:
    return Photos(images)


def _hugging_face(folder: Path, images: Sequence[bytes]) -> Any:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    columns = {
        "image": [{"bytes": data, "path": None} for data in images],
        "label": [i * 4 // len(images) for i in range(len(images))],
    }
    return datasets.Dataset.from_dict(columns, features=features)


def _arrays(folder: Path, images: Sequence[bytes]) -> Any:
    small = [np.asarray(Image.open(io.BytesIO(data)).resize((48, 40))) for data in images]
    return ArraySource(np.stack(small))


KINDS: dict[str, Callable[[Path, Sequence[bytes]], Any]] = {
    "folder": _folder,
    "list": _list,
    "tar": _tars,
    "parquet": _parquet,
    "hugging face": _hugging_face,
    "dataset": _dataset,
    "array": _arrays,
}
NEEDS = {"parquet": "datasets", "hugging face": "datasets"}


def available() -> list[str]:
    """The kinds whose packages are installed."""
    return [kind for kind in KINDS if kind not in NEEDS or installed(NEEDS[kind])]


def make(kind: str, folder: Path, images: Sequence[bytes]) -> ImageSource:
    """Write images as a kind of source into a folder, if they are not there, and open it."""
    folder.mkdir(parents=True, exist_ok=True)
    return open_source(KINDS[kind](folder, images), options=options(folder.parent / "cache"))
