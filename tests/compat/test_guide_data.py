"""Views and data of the guide's interface."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from byol_fast.compat import guide, guide_data, guide_model
from byol_fast.data.sources import ArraySource
from tests.compat.helpers import normalize, small_guide


@pytest.fixture
def folder(tmp_path: Path, photos: np.ndarray) -> Path:
    """Twelve images of 32 px in three classes."""
    for i, image in enumerate(photos[:12]):
        path = tmp_path / "images" / f"class{i % 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return tmp_path / "images"


def test_normalization_is_undone_exactly() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, 16, 16).contiguous()
    normalize = transforms.Normalize(guide.CIFAR10_MEAN, guide.CIFAR10_STD)
    x = normalize(levels / 255)[None]
    assert torch.equal(guide_model.to_bytes(x, guide.CIFAR10_MEAN, guide.CIFAR10_STD)[0], levels)
    # The guide's own code wraps values around.
    wrapped = np.asarray(transforms.ToPILImage()(x[0]))
    assert (wrapped != levels.permute(1, 2, 0).numpy()).mean() > 0.9


@pytest.mark.parametrize("pattern", ["noise", "stripes", "checks"])
def test_overshoot_of_a_cubic_resize_is_clipped(pattern: str) -> None:
    """Black and white images, resized without clamping: the sharpest edges that there are."""
    y, x = np.mgrid[:60, :60]
    values = {"noise": np.random.default_rng(0).integers(0, 2, (60, 60)), "stripes": x // 3 % 2}
    image = torch.from_numpy(values.get(pattern, (x // 5 + y // 5) % 2)).float().expand(3, -1, -1)
    resized = transforms.Resize(97, transforms.InterpolationMode.BICUBIC)(image)
    assert 255 * float(resized.max()) > 255 + 16
    levels = guide_model.to_bytes(
        transforms.Normalize(guide.CIFAR10_MEAN, guide.CIFAR10_STD)(resized)[None],
        guide.CIFAR10_MEAN,
        guide.CIFAR10_STD,
    )
    assert torch.equal(levels[0], (255 * resized).round().clamp(0, 255).to(torch.uint8))


def test_image_types_give_equal_views(photos: np.ndarray) -> None:
    model = small_guide()
    image = photos[0]
    forms: list[Any] = [normalize(photos[:1])[0], torch.from_numpy(image).permute(2, 0, 1), Image.fromarray(image)]
    results = []
    for form in [*forms, image]:
        torch.manual_seed(5)
        results.append(model.transform(form))
    for first, second in results:
        assert first.shape == second.shape == (3, 16, 16)
        assert torch.equal(first, results[0][0])
        assert torch.equal(second, results[0][1])
    first, second = results[0]
    assert not torch.equal(first, second)
    # Normalized with mean and std 0.5: bytes from -1 to 1.
    levels = (first * 0.5 + 0.5) * 255
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
    assert -1 <= float(first.min()) < float(first.max()) <= 1


def test_images_of_a_batch_have_separate_parameters(photos: np.ndarray) -> None:
    model = small_guide()
    same = normalize(photos[:1]).expand(8, -1, -1, -1)
    torch.manual_seed(3)
    x1, x2 = guide.transform_image(same, model)
    flat = torch.cat([x1, x2]).flatten(1)
    distances = torch.cdist(flat, flat) + torch.eye(16) * 1e3
    assert float(distances.min()) > 0.1
    torch.manual_seed(3)
    again = guide.transform_image(list(same), model)
    assert torch.equal(again[0], x1)
    assert torch.equal(again[1], x2)


def test_images_of_different_sizes_give_one_batch(photos: np.ndarray) -> None:
    pictures = [Image.fromarray(photos[i]).resize((20 + 7 * i, 30)) for i in range(3)]
    x1, x2 = guide.transform_image(pictures, small_guide())
    assert x1.shape == x2.shape == (3, 3, 16, 16)
    assert len({float(x.sum()) for x in x1}) == 3


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.rand(1, 32, 32), r"must be \[3, H, W\]"),
        (torch.zeros(3, 32, 32, dtype=torch.int64), "uint8 or floating point"),
        (torch.full((3, 32, 32), 5.0), "must be normalized with mean"),
        (torch.full((3, 32, 32), float("nan")), "must be normalized with mean"),
        ("photo.jpg", "a PIL image, got str"),
    ],
)
def test_invalid_image_raises(image: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_guide().transform(image)


def test_loaded_images_are_crops_with_their_labels(folder: Path, photos: np.ndarray) -> None:
    loader = guide.load_data(batch_size=5, num_workers=0, root=folder)
    assert len(loader) == 3
    batches = list(loader)
    assert [len(labels) for _, labels in batches] == [5, 5, 2]
    seen = []
    for images, labels in batches:
        for x, label in zip(guide_model.to_bytes(images, guide.CIFAR10_MEAN, guide.CIFAR10_STD), labels, strict=True):
            (position,) = [i for i in range(12) if is_crop(x.permute(1, 2, 0).numpy(), photos[i])]
            assert position % 3 == int(label)
            seen.append(position)
    assert sorted(seen) == list(range(12))
    assert seen != sorted(seen)


@pytest.mark.parametrize(
    ("num_images", "sizes"), [(12, [4, 4, 4]), (13, [4, 4, 5]), (14, [4, 4, 4, 2]), (5, [5]), (1, [1])]
)
def test_one_image_left_joins_the_batch_before(num_images: int, sizes: list[int], photos: np.ndarray) -> None:
    source = ArraySource(photos[:num_images], np.arange(num_images))
    for workers in (0, 2):
        loader = guide_data.CIFARLoader(source, 4, workers)
        batches = list(loader)
        assert [len(images) for images, _ in batches] == [len(labels) for _, labels in batches] == sizes
        assert len(loader) == len(sizes)
        assert sorted(torch.cat([labels for _, labels in batches]).tolist()) == list(range(num_images))


def test_guide_trains_on_one_image_more_than_its_batches(photos: np.ndarray) -> None:
    loader = guide_data.CIFARLoader(ArraySource(photos[:5]), 2, 0)
    losses = guide.train_byol(small_guide(), loader, num_epochs=2)
    assert len(losses) == 4 and np.isfinite(losses).all()


def is_crop(x: np.ndarray, image: np.ndarray) -> bool:
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
    crops = (padded[i : i + 32, j : j + 32] for i in range(9) for j in range(9))
    return any(np.array_equal(x, crop) or np.array_equal(x, crop[:, ::-1]) for crop in crops)


def test_batches_do_not_depend_on_workers(folder: Path) -> None:
    loaders = [guide.load_data(5, workers, root=folder) for workers in (0, 2)]
    epochs = []
    for loader in loaders:
        torch.manual_seed(0)
        epochs.append([*loader, *loader])
    for (a, la), (b, lb) in zip(*epochs, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(la, lb)
    assert not torch.equal(epochs[0][0][0], epochs[0][3][0])  # another epoch, another order


def test_load_data_without_images_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BYOL_FAST_DATA", raising=False)
    with pytest.raises(ValueError, match=r"does not exist.*load_data\(root=FOLDER\), or set BYOL_FAST_DATA"):
        guide.load_data(root=tmp_path / "nothing")
    with pytest.raises(ValueError, match="batch_size must be 1 or more"):
        guide.load_data(0)

    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.CIFAR10.download", offline)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"could not be downloaded \(no route to host\).*BYOL_FAST_DATA=FOLDER"):
        guide.load_data()
    Image.new("RGB", (40, 32)).save(tmp_path / "wide.png")
    with pytest.raises(ValueError, match=r"32 x 32 pixels as CIFAR-10's, got 32 x 40 in .*wide.png"):
        guide.load_data(root=tmp_path)
