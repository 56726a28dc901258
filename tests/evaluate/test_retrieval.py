"""Retrieval: metrics beside those of other libraries and a plain loop, ties, images that are no queries."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from byol_fast.data import ImageSource
from byol_fast.evaluate import PretrainedEncoder, evaluate_retrieval
from byol_fast.evaluate.retrieval import retrieval_scores
from tests.evaluate.helpers import CPU, RecordingEncoder, labeled_images
from tests.evaluate.test_knn import clusters

RARE = torch.tensor([7, 11, 11, 9])
"""Classes of the first images of `queries_and_classes`: two that are the only ones of theirs, and a pair."""


def queries_and_classes() -> tuple[Tensor, Tensor]:
    """Features in float64 and classes of 70 images; two of these have a class of their own."""
    x, y = clusters(70, 6, 4, 0)
    y[: len(RARE)] = RARE
    return x, y


def cosines(x: Tensor) -> NDArray[np.float64]:
    unit = x.double().numpy() / np.linalg.norm(x.double().numpy(), axis=1, keepdims=True)
    return np.asarray(unit @ unit.T)


def scores_by_definition(x: Tensor, y: Tensor) -> tuple[float, list[float]]:
    """mAP and recall at 1, 5, 10: a loop over queries and ranks; of equal ones other classes come first."""
    precisions, first_ranks = [], []
    for query, row in enumerate(cosines(x)):
        others = [i for i in range(len(y)) if i != query]
        others.sort(key=lambda i: (-row[i], bool(y[i] == y[query])))
        ranks = [rank for rank, i in enumerate(others, 1) if y[i] == y[query]]
        if ranks:
            precisions.append(np.mean([number / rank for number, rank in enumerate(ranks, 1)]))
            first_ranks.append(ranks[0])
    return float(np.mean(precisions)), [float(np.mean([rank <= k for rank in first_ranks])) for k in (1, 5, 10)]


@pytest.mark.parametrize("max_similarities", [1, 500, 10**6], ids=["a query at a time", "chunks", "all"])
def test_scores_equal_scikit_learn_and_definition(max_similarities: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    x, y = queries_and_classes()
    counts: list[int] = []
    scores = retrieval_scores("x", x, y, on_queries=counts.append, max_similarities=max_similarities)
    assert (scores.num_queries, scores.num_left_out) == (68, 2)
    assert counts == {1: [*range(1, 69)], 500: [*range(7, 68, 7), 68], 10**6: [68]}[max_similarities]
    theirs = []
    for query in [i for i in range(70) if i not in {0, 3}]:
        others = np.arange(70) != query
        theirs.append(metrics.average_precision_score((y == y[query]).numpy()[others], cosines(x)[query][others]))
    assert scores.mean_ap == pytest.approx(np.mean(theirs), abs=1e-6)
    mean_ap, recalls = scores_by_definition(x, y)
    assert scores.mean_ap == pytest.approx(mean_ap, abs=1e-6)
    assert [(r.k, r.recall) for r in scores.recall] == list(zip((1, 5, 10), recalls, strict=True))
    half = 1.959963984540054 * np.std(theirs, ddof=1) / np.sqrt(68)
    np.testing.assert_allclose(scores.mean_ap_ci95, (np.mean(theirs) - half, np.mean(theirs) + half), atol=1e-6)


@pytest.mark.peers
def test_scores_equal_torchmetrics() -> None:
    retrieval = pytest.importorskip("torchmetrics.retrieval", reason="torchmetrics is not installed")
    x, y = queries_and_classes()
    pairs = torch.tensor([[i, j] for i in range(70) for j in range(70) if i != j])
    similarity = (1 + torch.from_numpy(cosines(x))[pairs[:, 0], pairs[:, 1]]) / 2  # theirs are positive
    relevant = y[pairs[:, 0]] == y[pairs[:, 1]]
    scores = retrieval_scores("x", x, y)
    skip: dict[str, Any] = {"empty_target_action": "skip"}
    mean_ap = retrieval.RetrievalMAP(**skip)(similarity, relevant, indexes=pairs[:, 0])
    assert scores.mean_ap == pytest.approx(float(mean_ap), abs=1e-6)
    for recall in scores.recall:  # a hit, in the words of torchmetrics: its recall is the share of relevant images
        hit_rate = retrieval.RetrievalHitRate(top_k=recall.k, **skip)(similarity, relevant, indexes=pairs[:, 0])
        assert recall.recall == pytest.approx(float(hit_rate), abs=1e-6)


def test_equal_similarities_have_their_least_favorable_order() -> None:
    """Cosines of these are exact: 1, 0 and -1, and many are equal. The order of the images does not matter."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(np.eye(4)[rng.integers(0, 4, 50)] * rng.choice([-2.0, 1.0], (50, 1)))
    y = torch.from_numpy(rng.integers(0, 3, 50))
    scores, expected = retrieval_scores("x", x, y), scores_by_definition(x, y)
    assert scores.mean_ap == pytest.approx(expected[0], abs=1e-6)
    assert [r.recall for r in scores.recall] == expected[1]
    order = torch.from_numpy(rng.permutation(50))
    shuffled = retrieval_scores("x", x[order], y[order])
    assert shuffled.mean_ap == pytest.approx(scores.mean_ap, abs=1e-12)
    assert shuffled.recall == scores.recall


@pytest.mark.parametrize("max_similarities", [1, 7 * 334, 10**6], ids=["a query at a time", "chunks", "all"])
@pytest.mark.parametrize(("num", "dim"), [(40, 3), (334, 64), (334, 513)])
def test_equal_features_have_no_hits(num: int, dim: int, max_similarities: int) -> None:
    """Of equal features, too, whose products in fp32 differ in the last bit, as those of odd sizes do."""
    x = torch.randn(1, dim, generator=torch.Generator().manual_seed(0)).expand(num, dim).contiguous()
    scores = retrieval_scores("x", x, torch.arange(num) % 2, max_similarities=max_similarities)
    assert [r.recall for r in scores.recall] == [0, 0, 0]  # all images of the other class come first
    assert scores.mean_ap == pytest.approx(np.mean([i / (num // 2 + i) for i in range(1, num // 2)]))


# ---- evaluations --------------------------------------------------------------------------------------------------


def with_labels(source: ImageSource, labels: NDArray[np.int64] | None) -> ImageSource:
    return source.with_labels(labels, tuple(map(str, range(40))) if labels is not None else ())


def test_queries_without_a_second_image_are_counted(pretrained: PretrainedEncoder, tmp_path: Path) -> None:
    images = with_labels(labeled_images(30, 0), np.array([7, 8, *range(28)]) % 3 + np.array([9, 18, *[0] * 28]))
    result = evaluate_retrieval(pretrained, images, baselines=True, output_dir=tmp_path, **CPU)
    assert [b.name for b in result.baselines] == ["untrained, calibrated", "raw pixels (12 px)"]
    for scores in (result.scores, *result.baselines):
        assert (scores.num_queries, scores.num_left_out) == (28, 2)
        assert 0 < scores.mean_ap_ci95[0] < scores.mean_ap < scores.mean_ap_ci95[1] <= 1
    record = json.loads((tmp_path / "retrieval.json").read_text())
    assert (record["protocol"], record["num_test"], record["num_left_out"]) == ("retrieval", 30, 2)
    assert record["mean_ap"] == result.scores.mean_ap
    assert [r["k"] for r in record["baselines"][0]["recall"]] == [1, 5, 10]
    assert "max_train" not in record["settings"]
    same = evaluate_retrieval(pretrained, images, baselines=True, output_dir=tmp_path, **CPU)
    assert (same.scores, same.baselines) == (result.scores, result.baselines)
    assert not (tmp_path / "earlier").exists()


def test_max_test_leaves_images_of_every_class(pretrained: PretrainedEncoder) -> None:
    """The classes of these images alternate: every third one is of the same."""
    scores = evaluate_retrieval(pretrained, labeled_images(30, 0), max_test=10, **CPU).scores
    assert (scores.num_queries, scores.num_left_out) == (10, 0)


def test_classes_are_separated_and_pixels_are_worse(pretrained: PretrainedEncoder) -> None:
    channels = dataclasses.replace(pretrained, encoder=nn.AdaptiveAvgPool2d(1))
    scores = evaluate_retrieval(channels, labeled_images(60, 0), **CPU).scores
    assert scores.mean_ap > 0.95
    pixels = dataclasses.replace(pretrained, encoder=nn.Flatten())
    assert evaluate_retrieval(pixels, labeled_images(60, 0), **CPU).scores.mean_ap < scores.mean_ap


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: (with_labels(a, None), {}), "the test images must have labels, 30 images.* have none: sort them"),
        (lambda a: (with_labels(a, np.zeros(30, np.int64)), {}), "the test images must have two classes or more"),
        (lambda a: (with_labels(a, np.arange(30)), {}), "each of the 30 test images has a class of its own"),
        (lambda a: (a, {"max_test": 3}), "each of the 3 test images has a class of its own; .*max_test"),
        (lambda a: (a.with_labels(a.labels % 2, ("train", "val")), {}), "one folder per class, .* train and val"),
        (lambda _: (None, {}), "has no run configuration that names images; give --test FOLDER"),
        (lambda a: (a, {"max_train": 3}), "max_train"),
    ],
)
def test_invalid_images_and_settings_are_refused(change: Any, message: str, pretrained: PretrainedEncoder) -> None:
    images, options = change(labeled_images(30, 0))
    with pytest.raises(ValueError, match=message):
        evaluate_retrieval(pretrained, images, **(CPU | options))
    assert not RecordingEncoder.calls
