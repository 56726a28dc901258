"""Accuracy with few training images per class: draws, votes and intervals by their definition; too few images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from byol_fast.config import ConfigError, Preprocessing
from byol_fast.evaluate import PretrainedEncoder, evaluate_knn
from byol_fast.evaluate.knn import NUM_DRAWS, few_shot_scores
from byol_fast.evaluate.splits import draw_shots
from tests.evaluate.helpers import CPU, RecordingEncoder, labeled_images
from tests.evaluate.test_knn import clusters, rankings_by_definition


def accuracies_by_definition(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], n: int, k: int
) -> NDArray[np.float64]:
    """Accuracy of each draw of n images per class, by a loop over test images in float64."""
    (train_x, train_y), (test_x, test_y) = ((x.numpy(), y.numpy()) for x, y in (train, test))
    accuracies = []
    for draw in range(NUM_DRAWS):
        selected = draw_shots(train_y, n, draw=draw, seed=3).ravel()
        assert np.bincount(train_y[selected]).tolist() == [n] * 4
        ranking = rankings_by_definition(train_x[selected], train_y[selected], test_x, min(k, n), 0.1, 4)
        accuracies.append(np.mean(ranking[:, 0] == test_y))
    return np.array(accuracies)


def test_scores_equal_definition_and_interval_scipy() -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    train, test = clusters(50, 6, 4, 0), clusters(20, 6, 4, 1)
    draws: list[int] = []
    options: dict[str, Any] = {"shots": (5, 1, 9, 5), "k": 7, "temperature": 0.1, "num_classes": 4, "seed": 3}
    results = few_shot_scores("x", train, test, on_draw=draws.append, **options)
    assert draws == list(range(1, 21))
    assert [(r.name, r.shots, r.k) for r in results] == [("x", 1, 1), ("x", 5, 5), ("x", 9, 7)]
    for result in results:
        accuracies = accuracies_by_definition(train, test, result.shots, 7)
        assert result.top1 == pytest.approx(accuracies.mean(), abs=1e-12)
        assert (result.lowest, result.highest) == pytest.approx((accuracies.min(), accuracies.max()), abs=1e-12)
        interval = stats.t.interval(0.95, 19, accuracies.mean(), stats.sem(accuracies))
        np.testing.assert_allclose(result.top1_ci95, interval, atol=1e-12)


def test_draws_are_nested_and_depend_on_seed_draw_and_class_only() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [30, 20, 10]))
    drawn = draw_shots(labels, 10, draw=4, seed=3)
    assert (labels[drawn] == [[0], [1], [2]]).all()
    assert all(len(set(row)) == 10 for row in drawn.tolist())
    np.testing.assert_array_equal(draw_shots(labels, 3, draw=4, seed=3), drawn[:, :3])
    for other in (draw_shots(labels, 10, draw=5, seed=3), draw_shots(labels, 10, draw=4, seed=4)):
        assert (np.sort(other) != np.sort(drawn)).any(axis=1)[:2].all()
    alike = np.repeat([0, 1], 10)  # the images of a class are not those of the class before it in the next draw
    assert (draw_shots(alike, 10, draw=5, seed=3)[0] != draw_shots(alike, 10, draw=4, seed=3)[1] - 10).any()
    others = np.flatnonzero(labels != 0)
    np.testing.assert_array_equal(others[draw_shots(labels[others], 10, draw=4, seed=3)], drawn[1:])


def test_features_are_computed_once_and_the_result_of_all_images_is_unchanged(pretrained: PretrainedEncoder) -> None:
    images = labeled_images(90, 0, noise=250.0), labeled_images(60, 1, noise=250.0)
    without = evaluate_knn(pretrained, *images, k=(3,), baselines=True, **CPU)
    num_calls = len(RecordingEncoder.calls)
    result = evaluate_knn(pretrained, *images, k=(3,), shots=(1, 30), baselines=True, **CPU)
    assert len(RecordingEncoder.calls) == 2 * num_calls
    assert (without.shots, result.top1, result.baselines) == ((), without.top1, without.baselines)
    names = ["this encoder", "untrained, calibrated", "raw pixels (12 px)"]
    assert [(row.name, row.shots) for row in result.shots] == [(name, n) for name in names for n in (1, 30)]
    few, all_ = result.shots[:2]
    assert few.lowest < few.top1 < few.highest
    # Each draw of 30 has all images: no accuracy differs from that of the usual evaluation.
    assert all_.lowest == all_.top1 == all_.highest == result.top1
    assert all_.top1_ci95 == (result.top1, result.top1)
    record = result.to_dict()
    assert record["settings"]["shots"] == [1, 30]
    assert [row["top1"] for row in record["shots"]] == [row.top1 for row in result.shots]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shots": (1, 11)}, "got 11, but class red has 10; give fewer shots"),
        ({"shots": (10,), "max_train": 29}, "got 10, but class blue has 9;"),
        ({"shots": (1,), "max_train": 10}, "got 1, but class green has 0;"),
        ({"shots": (0,)}, "shots must be an integer from 1 to 1,000,000, got 0"),
    ],
)
def test_class_of_too_few_images_is_named_before_the_work(
    options: dict[str, Any], message: str, pretrained: PretrainedEncoder
) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate_knn(pretrained, labeled_images(30, 0), labeled_images(15, 1), **(CPU | options))
    assert not RecordingEncoder.calls


def test_images_that_cannot_be_read_are_not_drawn(tmp_path: Path) -> None:
    for i in range(6):
        for part in ("train", "val"):
            (tmp_path / part / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (40 * i, 0, 9 * (part == "val"))).save(tmp_path / part / "ab"[i % 2] / f"{i}.png")
    (tmp_path / "train" / "a" / "0.png").write_bytes(b"no image")
    encoder = PretrainedEncoder(name="pixels", encoder=nn.Flatten(), preprocessing=Preprocessing(crop=8))
    options: dict[str, Any] = {"on_corrupt": "skip", "k": (2,), **CPU}
    (row,) = evaluate_knn(encoder, tmp_path / "train", tmp_path / "val", shots=(2,), **options).shots
    assert row.shots == row.k == 2
    with pytest.raises(ConfigError, match="got 3, but class a has 2"):
        evaluate_knn(encoder, tmp_path / "train", tmp_path / "val", shots=(3,), **options)
