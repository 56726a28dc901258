"""False alarms and misses of `preview --check` on photographs, on images at the extremes, and with wrong operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from byol_fast import config as configs
from byol_fast.config import Config, Preprocessing, recipes
from byol_fast.data.loaders.backend import dali_installed
from byol_fast.data.loaders.eval import center_crop
from byol_fast.data.sources import ArraySource, FileSource, ImageSource, open_source
from byol_fast.data.sources.arrays import open_demo
from byol_fast.data.sources.base import evenly_spaced
from byol_fast.report import view_check
from tests.conftest import real_data
from tests.data.helpers import CPU, config_of
from tests.data.test_parity import WRONG_PARAMS, SwappedChannels, use_wrong_loader, use_wrong_params

pytestmark = pytest.mark.slow

RECIPES = ("imagenet_resnet50", "demo", "seed_guide", "simsiam_imagenet")
NUM_IMAGES = 48


def as_arrays(source: ImageSource, *, gray: bool = False) -> ArraySource:
    index = evenly_spaced(len(source), NUM_IMAGES).tolist()
    squares = np.stack([center_crop(source.load(i), Preprocessing(crop=64)) for i in index])
    return ArraySource(to_gray(squares) if gray else squares)


def to_gray(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    luma = [np.asarray(Image.fromarray(image).convert("L")) for image in images]
    return np.stack(luma)[..., None].repeat(3, axis=3)


def gray_files(source: ImageSource, folder: Path) -> ImageSource:
    for i in evenly_spaced(len(source), NUM_IMAGES).tolist():
        source.load(i).convert("L").save(folder / f"{i:05}.jpg", quality=90)
    return open_source(folder)


def lines(folder: Path) -> ImageSource:
    """Images of one pixel, and of one or two rows or columns."""
    for i, size in enumerate(((1, 1), (150, 3), (3, 150), (1, 50), (50, 1), (64, 64)) * 4):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (size[1], size[0], 3), np.uint8)).save(
            folder / f"{i:02}.png"
        )
    return open_source(folder)


def configurations(source: ImageSource) -> Iterator[tuple[str, Config]]:
    """Recipes with small views, and every loader of the source."""
    backends = ["threaded", *["device_cache"] * isinstance(source, ArraySource)]
    backends += ["dali", "dali+kernels"] if dali_installed() else []
    for backend in backends:
        for recipe in RECIPES:
            config = recipes.get(recipe)
            size = min(config.view1.size, 64)
            data = config_of(backend, config.view1).data
            yield (
                f"{backend}, {recipe}",
                configs.replace(config, {"data": data, "view1.size": size, "view2.size": size}),
            )


SETS: dict[str, Callable[[Any, Path], ImageSource]] = {
    "photographs": lambda get, _: get("photographs"),
    "photographs, gray": lambda get, folder: gray_files(get("photographs"), folder),
    "photographs, gray arrays": lambda get, _: as_arrays(get("photographs"), gray=True),
    "CIFAR-10": lambda get, _: get("cifar10"),
    "CIFAR-10, gray": lambda get, folder: gray_files(get("cifar10"), folder),
    "CIFAR-10, arrays": lambda get, _: as_arrays(get("cifar10")),
    "Fashion-MNIST": lambda get, _: open_demo()[0],
    "black, white, constant, noise": lambda get, _: get("extremes"),
    "lines and pixels": lambda get, folder: lines(folder),
}


@pytest.fixture(scope="session")
def cifar10(tmp_path_factory: pytest.TempPathFactory) -> FileSource:
    """480 images of CIFAR-10 as JPEGs."""
    import tarfile

    root = tmp_path_factory.mktemp("cifar10")
    with tarfile.open(real_data("cifar10_jpeg.tar.xz")) as tar:
        members = [member for n, member in enumerate(tar) if member.name.endswith(".jpg") and n % 100 == 0]
        tar.extractall(root, members, filter="data")
    source = open_source(root / "train")
    assert isinstance(source, FileSource)
    return source


@pytest.mark.parametrize("name", SETS)
def test_correct_settings_raise_no_false_alarm(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, record_property: Any
) -> None:
    source, num_verdicts, false_alarms = SETS[name](request.getfixturevalue, tmp_path), 0, []
    for title, config in configurations(source):
        for result in view_check.compare(source, config, CPU, num_images=NUM_IMAGES):
            num_verdicts += 1
            false_alarms += [] if result.ok else [f"{title}: {result}"]
    print(f"{name}: {len(false_alarms)} false alarms in {num_verdicts} verdicts")
    assert not false_alarms


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "brightness of 0.36 for 0.4": ({"brightness": 0.36}, "brightness"),
    "contrast of 0.36 for 0.4": ({"contrast": 0.36}, "contrast"),
    "saturation of 0.18 for 0.2": ({"saturation": 0.18}, "saturation"),
    "hue of 0.09 for 0.1": ({"hue": 0.09}, "hue"),
    "largest sigma of 1.8 for 2": ({"blur_sigma": (0.1, 1.8)}, "blur"),
    "threshold of 127 for 128": ({"solarize_threshold": 127}, "solarize"),
    "bilinear for bicubic": ({"interpolation": "bilinear"}, "crop"),
}
NEEDS_COLOR = {"saturation", "hue"}


@pytest.mark.parametrize("name", ["photographs", "photographs, gray arrays", "CIFAR-10, arrays", "Fashion-MNIST"])
def test_wrong_operators_are_not_missed(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gray images have no saturation and hue, and show a wrong order only where it changes brightness and contrast."""
    source = SETS[name](request.getfixturevalue, tmp_path)
    is_gray = "gray" in name or "MNIST" in name
    num_faults, missed = 0, []

    def check(fault: str, operator: str, config: Config) -> None:
        nonlocal num_faults
        num_faults += 1
        results = {r.name: r for r in view_check.compare(source, config, CPU, num_images=NUM_IMAGES)}
        if results[operator].ok:
            missed.append(f"{fault}: {results[operator]}")

    for title, config in configurations(source):
        if not title.endswith("imagenet_resnet50"):
            continue
        for fault, (wrong, operator) in FAULTS.items():
            if is_gray and operator in NEEDS_COLOR:
                continue
            with monkeypatch.context() as patch:
                use_wrong_loader(patch, wrong)
                check(f"{title}, {fault}", operator, config)
        for fault, (change, operator) in WRONG_PARAMS.items():
            if title.startswith("device_cache") or (is_gray and (operator in NEEDS_COLOR or "saturation" in fault)):
                continue  # the device cache samples its parameters itself
            with monkeypatch.context() as patch:
                use_wrong_params(patch, change)
                check(f"{title}, {fault}", operator, config)
        if not is_gray:
            with monkeypatch.context() as patch:
                use_wrong_loader(patch, {}, SwappedChannels)
                check(f"{title}, channels swapped", "crop", config)
    print(f"{name}: {len(missed)} of {num_faults} faults missed")
    assert not missed
