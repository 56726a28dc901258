from __future__ import annotations

import numpy as np
import pytest
import torch

from byol_fast.evaluate import knn_accuracy, knn_predict


def by_loops(
    train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, k: int, temperature: float, classes: int
) -> np.ndarray:
    """The definition, one sample and one neighbour at a time, in float64."""
    rankings = []
    for query in test_x.astype(np.float64):
        similar = [float(query @ x) / (np.linalg.norm(query) * np.linalg.norm(x)) for x in train_x.astype(np.float64)]
        votes = np.zeros(classes)
        for i in sorted(range(len(similar)), key=lambda i: -similar[i])[:k]:
            votes[train_y[i]] += np.exp(similar[i] / temperature)
        rankings.append(sorted(range(classes), key=lambda c: -votes[c]))
    return np.array(rankings)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 0.1), (57, 1.0)])
def test_ranking_is_the_definition(k: int, temperature: float) -> None:
    rng = np.random.default_rng(k)
    train_x, train_y = rng.normal(size=(57, 6)).astype(np.float32), rng.integers(0, 4, 57)
    test_x = rng.normal(size=(23, 6)).astype(np.float32) * 10
    expected = by_loops(train_x, train_y, test_x, k, temperature, 4)
    got = knn_predict(
        torch.from_numpy(train_x),
        torch.from_numpy(train_y),
        torch.from_numpy(test_x),
        k=k,
        temperature=temperature,
        num_classes=4,
        chunk=7,
    )
    # Classes without a vote follow in rising order in both: the sort is stable.
    np.testing.assert_array_equal(got.numpy(), expected)


def test_tiny_temperature_does_not_overflow() -> None:
    x = torch.eye(3)
    got = knn_predict(x, torch.tensor([0, 1, 2]), x, k=3, temperature=1e-3, num_classes=3)
    assert got[:, 0].tolist() == [0, 1, 2]


def test_accuracy_counts_first_and_first_five() -> None:
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
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"num_classes": 2}, r"train_y must be 0..1, got 0..2"),
        ({"test_x": torch.ones(2, 5)}, "train_x and test_x must be"),
        ({"train_y": torch.zeros(3, dtype=torch.long)}, r"train_y must be \[4\]"),
    ],
)
def test_bad_arguments_are_explained(change: dict[str, object], message: str) -> None:
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
