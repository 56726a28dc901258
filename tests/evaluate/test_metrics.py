"""Accuracies, confidence intervals and confusion matrices."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from byol_fast.evaluate.metrics import MAX_LOGITS, classify, score, top_classes
from byol_fast.utils.intervals import Z95, wilson_interval


@given(count=st.integers(1, 100_000), share=st.floats(0, 1))
@settings(deadline=None)
def test_wilson_interval_inverts_score_test(count: int, share: float) -> None:
    """The interval holds the proportions q with |p - q| <= z sqrt(q (1 - q) / n): at its ends both sides are equal."""
    hits = round(share * count)
    p = hits / count
    for end in wilson_interval(hits, count):
        assert 0 <= end <= 1
        assert math.isclose((p - end) ** 2, Z95**2 * end * (1 - end) / count, rel_tol=1e-6, abs_tol=1e-12)
    low, high = wilson_interval(hits, count)
    assert low <= p <= high


def test_wilson_interval_equals_published_values() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    for hits, count, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        np.testing.assert_allclose(wilson_interval(hits, count), (low, high), atol=5e-5)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_scores_of_known_predictions() -> None:
    names = [f"c{i}" for i in range(7)]
    ranking = torch.tensor([[0, 1, 2, 3, 4], [1, 0, 2, 3, 4], [1, 2, 3, 4, 5], [6, 5, 4, 3, 2], [2, 3, 4, 5, 6]])
    labels = torch.tensor([0, 0, 6, 6, 1])
    scores = score(ranking, labels, names)
    assert scores.top1 == 2 / 5
    assert scores.top5 == 3 / 5
    assert scores.confusion.tolist() == [[0, 0, 1], [0, 1, 1], [1, 2, 1], [6, 1, 1], [6, 6, 1]]
    assert [(c.name, c.count, c.accuracy) for c in scores.per_class[:3]] == [
        ("c0", 2, 0.5),
        ("c1", 1, 0.0),
        ("c2", 0, None),
    ]
    assert scores.per_class[6].ci95 == wilson_interval(1, 2)


def test_confusion_of_many_classes_has_cells_of_images_only() -> None:
    num = 100_000  # the matrix would take 75 GiB
    ranking = torch.tensor([[num - 1], [7], [num - 1], [5]])
    scores = score(ranking, torch.tensor([num - 1, 3, num - 1, 3]), [""] * num)
    assert scores.confusion.tolist() == [[3, 5, 1], [3, 7, 1], [num - 1, num - 1, 2]]
    assert (scores.top1, len(scores.per_class)) == (0.5, num)
    assert scores.per_class[-1].accuracy == 1


def test_chunks_of_rows_have_at_most_the_largest_number_of_logits() -> None:
    sizes: list[int] = []

    def first_column(rows: torch.Tensor) -> torch.Tensor:
        sizes.append(len(rows))
        return rows[:, 0]

    x = torch.arange(14.0).view(7, 2)
    assert classify(first_column, x, MAX_LOGITS // 3, torch.clone).tolist() == x[:, 0].tolist()
    assert sizes == [3, 3, 1]
    assert classify(first_column, x, 2 * MAX_LOGITS, torch.clone).tolist() == x[:, 0].tolist()
    assert sizes[3:] == [1] * 7


@pytest.mark.parametrize("classes", [2, 5, 9])
def test_top_classes_are_sorted_by_logit(classes: int) -> None:
    logits = torch.randn(6, classes, generator=torch.Generator().manual_seed(0))
    expected = logits.numpy().argsort(axis=1)[:, ::-1][:, :5]
    np.testing.assert_array_equal(top_classes(logits).numpy(), expected)
