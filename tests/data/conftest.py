"""Images of the tests: generated ones, and real ones if they are there."""

from __future__ import annotations

import tarfile
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from byol_fast.data.loaders.backend import dali_installed
from byol_fast.data.sources import ArraySource, FileSource, open_source
from tests.conftest import real_data


def skip_without_dali(backend: str = "dali") -> str:
    if backend.startswith("dali") and not dali_installed():
        pytest.skip("DALI is not installed")
    return backend


@pytest.fixture(params=["dali", "threaded"])
def backend(request: pytest.FixtureRequest) -> str:
    """Loaders of files, DALI with its own operators."""
    return skip_without_dali(request.param)


@pytest.fixture(params=["dali", "dali+kernels", "threaded"])
def files_backend(request: pytest.FixtureRequest) -> str:
    """All loaders of encoded images; see `helpers.config_of`."""
    return skip_without_dali(request.param)


@pytest.fixture(params=["dali", "dali+kernels", "threaded", "device_cache"])
def any_backend(request: pytest.FixtureRequest) -> str:
    """All loaders, DALI with its own operators and with our kernels; see `helpers.config_of`."""
    return skip_without_dali(request.param)


@pytest.fixture
def dali() -> None:
    """Skip if DALI is not installed."""
    skip_without_dali()


def photo_like(n: int, height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Smooth noise, more in luminance than in color, with edges and saturated patches, `[n, height, width, 3]`."""
    rng = np.random.default_rng(seed)
    out = np.empty((n, height, width, 3), np.uint8)
    for image in out:
        total = np.zeros((height, width, 3))
        for cells, light, color in ((3, 120.0, 60.0), (7, 60.0, 30.0), (24, 20.0, 10.0)):
            noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
            smooth = np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC)) / 127.5 - 1
            total += light * smooth[..., :1] + color * smooth
        edge = rng.integers(0, width)
        total[:, edge:] += rng.uniform(-60, 60, 3)
        image[:] = np.clip(128 + total, 0, 255)
    return out


@pytest.fixture(scope="session")
def arrays() -> ArraySource:
    """48 photo-like images of 64 x 64."""
    return ArraySource(photo_like(48, 64, 64))


@pytest.fixture(scope="session")
def extremes() -> ArraySource:
    """48 images of 64 x 64 that photographs are between: four of each kind."""
    rng = np.random.default_rng(2)
    shape = (4, 64, 64, 3)
    gray, noise = rng.integers(0, 256, (4, 64, 64, 1), np.uint8), rng.integers(0, 256, shape, np.uint8)
    kinds: list[NDArray[Any]] = [
        np.zeros(shape), np.full(shape, 255), np.full(shape, 128),
        rng.integers(0, 256, (4, 1, 1, 3)), rng.integers(0, 256, (4, 1, 1, 1)),
        gray, noise, np.where(gray < 128, 0, 255), np.where(noise < 128, 0, 255), np.where(gray < 128, 127, 128),
        noise * np.array([1, 0, 0]), np.arange(64)[:, None] % 2 * 255,
    ]  # fmt: skip
    return ArraySource(np.concatenate([np.broadcast_to(kind, shape) for kind in kinds]).astype(np.uint8))


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> FileSource:
    """40 photo-like JPEGs of odd sizes in four classes."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(1)
    for i in range(40):
        height, width = rng.integers(40, 120, 2)
        path = root / f"class{i % 4}" / f"photo {i}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(photo_like(1, int(height), int(width), seed=i)[0]).save(path, quality=90)
    source = open_source(root)
    assert isinstance(source, FileSource)
    return source


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> FileSource:
    """64 ImageNet photographs."""
    archive = real_data("imagenet_sample.tar")
    root = tmp_path_factory.mktemp("photographs")
    with tarfile.open(archive) as tar:
        members = [m for m in tar if m.isfile() and m.name.lower().endswith((".jpg", ".jpeg"))][:64]
        tar.extractall(root, members, filter="data")
    source = open_source(next(root.iterdir()))
    assert isinstance(source, FileSource)
    return source
