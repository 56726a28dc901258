"""Accuracy on moved images, compared with the exported encoder and a plain search for neighbors."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import byol_fast
from byol_fast import config as configs
from byol_fast.config import Config
from byol_fast.training.moved_images import MovedImages, moved
from byol_fast.training.trainer import Trainer
from byol_fast.utils import checkpoint as checkpoints


def test_moved_images_are_crops_shifts_and_flips() -> None:
    images = torch.randint(1, 256, (12, 3, 20, 20), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    before = torch.get_rng_state()
    results = moved(images)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(moved(images)[kind], result) for kind, result in results.items())

    assert torch.equal(results["flipped"], images.flip(-1))
    shifts = set()
    for image, shifted in zip(images, results["shifted"], strict=True):
        # By 20 % of 20 pixels at most; what comes in is black.
        padded = nn.functional.pad(image, (4, 4, 4, 4))
        shifts.add(
            next((y, x) for y in range(9) for x in range(9) if torch.equal(padded[:, y : y + 20, x : x + 20], shifted))
        )
    assert len(shifts) > 6
    # A crop of a ramp is a ramp of the cropped width: sqrt(area * ratio) of it, with a ratio of 3/4 to 4/3.
    ramp = (torch.arange(100) * 2).to(torch.uint8).expand(12, 3, 100, 100)
    widths = [float(crop[0, 50, 98] - crop[0, 50, 2]) / 96 / 2 for crop in moved(ramp)["cropped"]]
    assert 0.5 < min(widths) < 0.8 < max(widths) <= 1.01


def nearest_neighbor_accuracy(train_x: Tensor, train_y: Tensor, x: Tensor, y: Tensor, *, k: int, T: float) -> float:
    """One image at a time, in float64."""
    hits = 0
    for row, label in zip(x, y.tolist(), strict=True):
        similarity = nn.functional.cosine_similarity(row[None].double(), train_x.double())
        votes = Counter[int]()
        for i in similarity.argsort(descending=True)[:k].tolist():
            votes[int(train_y[i])] += float((similarity[i] / T).exp())  # type: ignore[assignment]
        hits += votes.most_common(1)[0][0] == label
    return hits / len(y)


@pytest.fixture
def evaluated(small: Config, npz: Path, photos: np.ndarray) -> Config:
    """A run with validation images: the training images in other colors."""
    val = npz.with_name("val.npz")
    np.savez(val, images=photos[:30] // 2 + 40, labels=np.arange(30) % 3)
    # Views of the images' own size: center crops are the images.
    sizes = {"view1.size": 32, "view2.size": 32}
    return configs.replace(small, sizes | {"knn": {"val_root": val, "every_epochs": 10, "k": 3}})


def test_accuracies_are_those_of_the_exported_encoder_and_of_pixels(evaluated: Config, photos: np.ndarray) -> None:
    callback = MovedImages()
    result = Trainer(evaluated, callbacks=[callback]).fit()
    assert list(callback.top1) == ["raw pixels", "untrained", "trained"]
    assert all(list(values) == ["as they are", "cropped", "shifted", "flipped"] for values in callback.top1.values())

    encoder, metadata = byol_fast.load_encoder(result.encoder)
    mean, std = (torch.tensor(metadata["preprocessing"][name])[:, None, None] for name in ("mean", "std"))
    train = torch.from_numpy(photos).permute(0, 3, 1, 2)
    plain = train[:30] // 2 + 40
    for name, features in (("trained", encoder), ("raw pixels", nn.Flatten())):
        for kind, images in ({"as they are": plain} | moved(plain)).items():
            with torch.no_grad():
                train_x, x = (features((images / 255 - mean) / std).flatten(1) for images in (train, images))
            labels = torch.arange(60) % 3
            expected = nearest_neighbor_accuracy(train_x, labels, x, labels[:30], k=3, T=evaluated.knn.temperature)
            assert callback.top1[name][kind] == pytest.approx(expected)
    assert callback.top1["trained"]["as they are"] == result.knn_top1
    assert callback.top1["untrained"]["as they are"] == result.knn_top1_untrained

    # Training is the same without it, bit for bit.
    alone = Trainer(configs.replace(evaluated, {"name": "alone"})).fit()
    weights, others = (
        checkpoints.use_latest(run / "checkpoints", checkpoints.load)["model"]
        for run in (result.run_dir, alone.run_dir)
    )
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_run_without_labels_measures_nothing(small: Config) -> None:
    callback = MovedImages()
    Trainer(configs.replace(small, {"steps": 1}), callbacks=[callback]).fit()
    assert callback.top1 == {}
