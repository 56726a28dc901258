"""Views of DALI's batches belong to their index, with its own operators and with our kernels.

On a GPU our kernels work on a stream beside the step, on a CPU on threads. The way of a GPU runs here on the CPU, all
but the stream itself: what it does in which order is the same.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as F
from numpy.typing import NDArray
from PIL import Image

from byol_fast.config import Preprocessing, replace
from byol_fast.config.fields import Loader
from byol_fast.data import Batch, ImageSource, eval_batches, open_source
from byol_fast.data.loaders.backend import dali_installed
from byol_fast.data.sources import ArraySource
from tests.data.helpers import config_of, loader_of, pixels, plain, same

if not dali_installed():
    pytest.skip("DALI is not installed", allow_module_level=True)

from byol_fast.data.loaders.dali import DALILoader

SIZE, COUNT, BATCH = 8, 24, 8  # 3 batches an epoch
LEVELS = 10 * np.arange(COUNT, dtype=np.uint8)
"""Level of all pixels of image i: a view of it shows its number, and if it was solarized."""

Make = Callable[[ImageSource], DALILoader]


@pytest.fixture(params=["dali", "kernels on threads", "kernels beside the step"])
def make(request: pytest.FixtureRequest) -> Make:
    """Builds a loader with one of the three ways to augment."""

    def loader(source: ImageSource) -> DALILoader:
        backend = "dali" if request.param == "dali" else "dali+kernels"
        config = config_of(backend, plain(SIZE, solarize_p=0.5), plain(SIZE, solarize_p=0.2), batch_size=BATCH)
        result = loader_of(source, replace(config, {"data.on_corrupt": "skip"}))
        assert isinstance(result, DALILoader)
        if request.param == "kernels beside the step":
            result._on_cpu = False
        return result

    return loader


def flat_images() -> NDArray[np.uint8]:
    return np.broadcast_to(LEVELS[:, None, None, None], (COUNT, SIZE, SIZE, 3)).copy()


@pytest.fixture
def source() -> ImageSource:
    return ArraySource(flat_images())


def assert_views_match_index(loader: DALILoader, batch: Batch, number: int) -> None:
    spec = loader.sampler(number)
    assert np.array_equal(batch.index.numpy(), spec.index)
    levels = LEVELS[batch.index.numpy()]
    for view, params in zip((batch.views[0], batch.views[1]), spec.params, strict=True):
        expected = np.where(params.solarize & (levels >= 128), 255 - levels, levels)
        assert np.array_equal(pixels(view), np.broadcast_to(expected[:, None, None, None], (BATCH, SIZE, SIZE, 3)))


def test_views_match_the_index_from_the_first_batch_on(make: Make, source: ImageSource) -> None:
    loader = make(source)
    for number in range(7):  # three epochs
        assert_views_match_index(loader, next(loader), number)


@pytest.mark.parametrize("number", [0, 1, 3, 6], ids=["start", "mid-epoch", "second epoch", "third epoch"])
def test_views_match_the_index_after_a_resume(make: Make, source: ImageSource, number: int) -> None:
    first, resumed = make(source), make(source)
    for _ in range(number):
        next(first)
    resumed.load_state_dict(first.state_dict())
    for following in range(number, number + 4):
        batch = next(resumed)
        assert_views_match_index(resumed, batch, following)
        assert same(batch, next(first))


def test_views_match_the_index_after_a_corrupt_image(make: Make, tmp_path: Path) -> None:
    """The pipeline is rebuilt in the batch that contains the image, and again after `close`."""
    for i, image in enumerate(flat_images()):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        (tmp_path / f"{i:02d}.png").write_bytes(buffer.getvalue()[: 60 if i == 5 else None])
    loader = make(open_source(tmp_path))
    for number in range(3):
        assert_views_match_index(loader, next(loader), number)
    assert list(loader.corrupt.by_index) == [5]
    loader.close()
    for number in range(3, 6):
        assert_views_match_index(loader, next(loader), number)


def test_index_does_not_share_memory_with_the_sampler(make: Make, source: ImageSource) -> None:
    """Writing into a batch does not change the order of the epoch."""
    loader, other = make(source), make(source)
    for _ in range(3):
        next(loader).index.zero_()
    for _ in range(3):
        next(other)
    assert torch.equal(next(loader).index, next(other).index)
    assert np.array_equal(loader.sampler.order(0), other.sampler.order(0))


@pytest.mark.parametrize("loader", ["dali", "threaded"])
def test_center_crop_is_that_of_torchvision(tmp_path: Path, loader: Loader) -> None:
    """At both sides of all remainders by 4: torchvision rounds halves of pixels to even."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    sizes = [(20 + i, 20) for i in range(8)] + [(20, 20 + i) for i in range(8)]
    expected = []
    for i, size in enumerate(sizes):
        image = Image.fromarray(pixels).resize(size)
        image.save(tmp_path / f"{i:02d}.png")
        expected.append(F.pil_to_tensor(F.center_crop(image, 14)))
    batches = eval_batches(open_source(tmp_path), Preprocessing(crop=14, resize=20), 5, loader=loader)
    assert torch.equal(torch.cat([images.cpu() for images, _ in batches]), torch.stack(expected))
