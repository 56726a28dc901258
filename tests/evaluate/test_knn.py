"""Nearest-neighbor classification."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from byol_fast.config import Preprocessing
from byol_fast.evaluate import PretrainedEncoder, evaluate_knn, knn_accuracy, knn_predict
from byol_fast.evaluate.knn import knn_rankings


def rankings_by_definition(
    train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, k: int, temperature: float, classes: int
) -> np.ndarray:
    """Rankings by the definition, one sample and one neighbor at a time, in float64."""
    rankings = []
    for query in test_x.astype(np.float64):
        similar = [float(query @ x) / (np.linalg.norm(query) * np.linalg.norm(x)) for x in train_x.astype(np.float64)]
        votes = np.zeros(classes)
        for i in sorted(range(len(similar)), key=lambda i: -similar[i])[:k]:
            votes[train_y[i]] += np.exp(similar[i] / temperature)
        rankings.append(sorted(range(classes), key=lambda c: -votes[c]))
    return np.array(rankings)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 0.1), (57, 1.0)])
def test_ranking_equals_definition(k: int, temperature: float) -> None:
    rng = np.random.default_rng(k)
    train_x, train_y = rng.normal(size=(57, 6)).astype(np.float32), rng.integers(0, 4, 57)
    test_x = rng.normal(size=(23, 6)).astype(np.float32) * 10
    expected = rankings_by_definition(train_x, train_y, test_x, k, temperature, 4)
    got = knn_predict(
        torch.from_numpy(train_x),
        torch.from_numpy(train_y),
        torch.from_numpy(test_x),
        k=k,
        temperature=temperature,
        num_classes=4,
        chunk=7,
    )
    # Classes without votes follow in ascending order in both, as the sorts are stable.
    np.testing.assert_array_equal(got.numpy(), expected)


def clusters(count: int, dim: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Samples of overlapping clusters in float64, and their classes."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, count)
    centers = np.random.default_rng(99).normal(size=(classes, dim))
    return torch.from_numpy(centers[y] + 1.5 * rng.normal(size=(count, dim))), torch.from_numpy(y)


def test_rankings_of_several_k_equal_single_ones() -> None:
    (train_x, train_y), (test_x, _) = clusters(80, 6, 4, 0), clusters(30, 6, 4, 1)
    ks = (20, 1, 80)
    together = knn_rankings(train_x, train_y, test_x, ks=ks, temperature=0.1, num_classes=4, chunk=7)
    for k, ranking in zip(ks, together, strict=True):
        alone = knn_predict(train_x, train_y, test_x, k=k, temperature=0.1, num_classes=4)
        assert torch.equal(ranking, alone)


@pytest.mark.parametrize("k", [1, 2, 4, 57])
def test_first_classes_of_many_equal_definition(k: int) -> None:
    """Classes without votes follow those of the neighbors; memory does not grow with their number."""
    rng = np.random.default_rng(k)
    train_x, train_y = rng.normal(size=(57, 6)).astype(np.float32), rng.integers(0, 9, 57)
    test_x = rng.normal(size=(23, 6)).astype(np.float32)
    expected = rankings_by_definition(train_x, train_y, test_x, k, 0.1, 9)
    for num_classes, num_ranked in ((9, 5), (9, 99), (10**12, 9)):
        (got,) = knn_rankings(
            *map(torch.from_numpy, (train_x, train_y, test_x)),
            ks=(k,),
            temperature=0.1,
            num_classes=num_classes,
            num_ranked=num_ranked,
        )
        np.testing.assert_array_equal(got.numpy(), expected[:, :num_ranked])


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (200, 0.1)])
def test_knn_equals_scikit_learn(k: int, temperature: float) -> None:
    neighbors = pytest.importorskip("sklearn.neighbors", reason="scikit-learn is not installed")
    (train_x, train_y), (test_x, _) = clusters(600, 16, 10, 0), clusters(300, 16, 10, 1)
    theirs = neighbors.KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / temperature)
    )
    theirs.fit(train_x.numpy(), train_y.numpy())
    ours = knn_predict(train_x, train_y, test_x, k=k, temperature=temperature, num_classes=10)
    np.testing.assert_array_equal(ours[:, 0].numpy(), theirs.predict(test_x.numpy()))


@pytest.mark.peers
@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (200, 0.1)])
def test_knn_equals_lightly(k: int, temperature: float) -> None:
    benchmarking = pytest.importorskip("lightly.utils.benchmarking", reason="lightly is not installed")
    (train_x, train_y), (test_x, _) = clusters(600, 16, 10, 0), clusters(300, 16, 10, 1)
    unit = torch.nn.functional.normalize
    theirs = benchmarking.knn_predict(unit(test_x), unit(train_x).T, train_y, 10, knn_k=k, knn_t=temperature)
    ours = knn_predict(train_x, train_y, test_x, k=k, temperature=temperature, num_classes=10)
    assert torch.equal(ours[:, 0], theirs[:, 0])


def test_tiny_temperature_does_not_overflow() -> None:
    x = torch.eye(3)
    got = knn_predict(x, torch.tensor([0, 1, 2]), x, k=3, temperature=1e-3, num_classes=3)
    assert got[:, 0].tolist() == [0, 1, 2]


def test_accuracy_of_first_and_first_five_classes() -> None:
    train_x, train_y = torch.eye(8), torch.arange(8)
    result = knn_accuracy(
        train_x, train_y, torch.eye(8)[:4], torch.tensor([0, 1, 2, 7]), k=99, temperature=0.1, num_classes=8
    )
    assert (result.top1, result.num_train, result.num_test) == (0.75, 8, 4)
    assert result.top5 == 0.75  # the rest tie, so class 7 comes last


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k must be 1..4"),
        ({"k": 5}, "k must be 1..4"),
        ({"temperature": 1e-320}, "temperature must be a number from 0.0001 to 10000"),
        ({"num_classes": 2}, r"train_y must be 0..1, got 0..2"),
        ({"test_x": torch.ones(2, 5)}, "train_x and test_x must be"),
        ({"train_y": torch.zeros(3, dtype=torch.long)}, r"train_y must be \[4\]"),
    ],
)
def test_invalid_arguments_are_refused(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "train_x": torch.ones(4, 3),
        "train_y": torch.tensor([0, 1, 2, 0]),
        "test_x": torch.ones(2, 3),
        "k": 2,
        "temperature": 0.1,
        "num_classes": 3,
    }
    with pytest.raises(ValueError, match=message):
        knn_predict(**(arguments | change))  # type: ignore[arg-type]


def test_k_is_the_number_of_images_that_were_read(tmp_path: Path) -> None:
    for i in range(6):
        (tmp_path / "train" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        (tmp_path / "val" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(tmp_path / "train" / str(i % 2) / f"{i}.png")
        Image.new("RGB", (8, 8), (40 * i, 0, 9)).save(tmp_path / "val" / str(i % 2) / f"{i}.png")
    (tmp_path / "train" / "0" / "0.png").write_bytes(b"no image")
    encoder = PretrainedEncoder(name="pixels", encoder=nn.Flatten(), preprocessing=Preprocessing(crop=8))
    options: dict[str, Any] = {"device": "cpu", "precision": "fp32", "threads": 1, "on_corrupt": "skip"}
    result = evaluate_knn(encoder, tmp_path / "train", tmp_path / "val", k=(6, 5, 2), **options)
    assert result.chosen["k"] == 5
    assert [k for k, _ in result.curve] == [2, 5]
