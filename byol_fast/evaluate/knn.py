"""Evaluation by k nearest neighbors on frozen features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from byol_fast.config import ConfigError
from byol_fast.config.evaluation import KNNSettings
from byol_fast.config.fields import Temperature, check
from byol_fast.evaluate.encoder import PretrainedEncoder
from byol_fast.evaluate.metrics import Scores, score
from byol_fast.evaluate.results import Baseline, Evaluation
from byol_fast.evaluate.runner import Entry, EvalRun, OnResult
from byol_fast.utils.progress import Progress

CURVE_KS = (1, 5, 20, 100, 200)
"""Numbers of neighbors of the curve."""


def evaluate_knn(
    encoder: str | Path | PretrainedEncoder,
    train: object = None,
    test: object = None,
    *,
    settings: KNNSettings | None = None,
    output_dir: Path | None = None,
    progress: Progress | None = None,
    on_result: OnResult | None = None,
    **changes: Any,
) -> Evaluation:
    """Evaluate an encoder by its cosine nearest neighbors, which vote with exp(similarity / temperature).

    Args:
        encoder: a run folder, an exported encoder, or a `PretrainedEncoder`.
        train: labeled images, anything that `byol_fast.data.open_source` takes; a folder with `train` and `val` (or
            `test`) inside serves as both. None: the images of the run.
        test: labeled images of classes that the training images have. None: the test images that belong to `train`.
        settings: of the protocol; None: the defaults.
        output_dir: folder that the record `knn.json` is written to; None: none is written.
        progress: shows progress; None: nothing is shown.
        on_result: called with each result, after its record is written.
        **changes: fields of the settings to replace.

    Raises:
        ValueError: the images or settings do not fit.
        ConfigError: the folder cannot be written.

    Examples:
        >>> evaluate_knn("runs/first", "photos/train", "photos/val", k=(20,)).top1
    """
    run = EvalRun(
        encoder,
        train,
        test,
        settings or KNNSettings(),
        changes,
        output_dir=output_dir,
        progress=progress,
        on_result=on_result,
    )
    s, config = run.settings, run.pretrained.config
    num_train = len(run.images.train)
    if s.k and max(s.k) > num_train:
        raise ConfigError(f"eval: k must be at most the number of training images, {num_train}, got {max(s.k)}")
    default_k = min(config.knn.k if config is not None else 20, num_train)
    ks = s.k or (default_k, *(k for k in CURVE_KS if k != default_k and k <= num_train))
    temperature = s.temperature or (config.knn.temperature if config is not None else 0.07)

    (_, scores), *baselines = [(entry.name, _scores_by_k(entry, ks, temperature)) for entry in run.entries()]
    k, scores_at_k = scores[0]
    return run.finish(
        "knn",
        scores_at_k,
        chosen={"k": k, "temperature": temperature},
        baselines=[Baseline.of(name, baseline_scores[0][1]) for name, baseline_scores in baselines],
        curve=sorted({k: at_k.top1 for k, at_k in scores}.items()),
        curve_label="k, neighbors (test images)",
    )


def _scores_by_k(entry: Entry, ks: Sequence[int], temperature: float) -> list[tuple[int, Scores]]:
    """Each k, cut to the number of training images that can be read, and the scores of its votes."""
    images = entry.run.images
    train_x, train_y = entry.features(images.train, "training images")
    test_x, test_y = entry.features(images.test, "test images")
    ks = [min(k, len(train_x)) for k in ks]
    with entry.run.progress.bar(None, f"{entry.name}: nearest neighbors"):
        rankings = knn_rankings(
            train_x, train_y, test_x, ks=ks, temperature=temperature, num_classes=len(images.classes), num_ranked=5
        )
    return [(k, score(ranking, test_y, images.classes)) for k, ranking in zip(ks, rankings, strict=True)]


@torch.no_grad()
def knn_predict(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    *,
    k: int,
    temperature: float,
    num_classes: int,
    chunk: int = 1024,
) -> Tensor:
    """Rank the classes of each test sample by the votes of its k nearest training samples.

    Cosine similarity; a neighbor votes with `exp(similarity / temperature)` (Wu et al., arXiv 1805.01978).

    Args:
        train_x: features `[M, D]`, floating point, normalized or not.
        train_y: classes `[M]`, integers in 0..num_classes-1.
        test_x: features `[N, D]`.
        k: number of neighbors, 1..M.
        temperature: positive.
        num_classes: number of classes.
        chunk: test samples compared at a time; bounds memory to `chunk * M` similarities.

    Returns:
        Class numbers, int64 `[N, num_classes]`, most votes first; classes with equal votes in ascending order.

    Raises:
        ValueError: shapes do not match, k or labels out of range, or temperature not positive.
    """
    return knn_rankings(
        train_x, train_y, test_x, ks=(k,), temperature=temperature, num_classes=num_classes, chunk=chunk
    )[0]


@torch.no_grad()
def knn_rankings(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    *,
    ks: Sequence[int],
    temperature: float,
    num_classes: int,
    num_ranked: int | None = None,
    chunk: int = 1024,
) -> list[Tensor]:
    """`knn_predict` for several k, in one search.

    Args:
        train_x: as for `knn_predict`.
        train_y: as for `knn_predict`.
        test_x: as for `knn_predict`.
        ks: numbers of neighbors, each 1..M.
        temperature: as for `knn_predict`.
        num_classes: as for `knn_predict`.
        num_ranked: number of classes to rank, the best ones, in memory that does not grow with the number of classes;
            None: all.
        chunk: as for `knn_predict`.

    Returns:
        A ranking for each k, `[N, num_ranked]`, or `[N, num_classes]` if there are fewer.

    Raises:
        ValueError: as `knn_predict`.
    """
    if train_x.ndim != 2 or test_x.ndim != 2 or train_x.shape[1] != test_x.shape[1]:
        raise ValueError(
            "knn_predict: train_x and test_x must be [M, D] and [N, D], "
            f"got {list(train_x.shape)} and {list(test_x.shape)}"
        )
    if train_y.shape != train_x.shape[:1]:
        raise ValueError(f"knn_predict: train_y must be [{len(train_x)}], one per feature, got {list(train_y.shape)}")
    for k in ks:
        if not 1 <= k <= len(train_x):
            raise ValueError(f"knn_predict: k must be 1..{len(train_x)} (training samples), got {k}")
    check("knn_predict: temperature", Temperature, temperature)
    if int(train_y.min()) < 0 or int(train_y.max()) >= num_classes:
        raise ValueError(
            f"knn_predict: train_y must be 0..{num_classes - 1}, got {int(train_y.min())}..{int(train_y.max())}"
        )
    train_y, num_ranked = train_y.long(), min(num_ranked or num_classes, num_classes)
    bank = _normalize(train_x)
    rankings: list[list[Tensor]] = [[] for _ in ks]
    for queries in torch.split(test_x, chunk):
        similarity, nearest = (_normalize(queries) @ bank.T).topk(max(ks), dim=1)
        # exp(s / T) overflows fp32 for T < 0.0113; scaling a row so that its largest vote is 1 keeps the ranking.
        votes = ((similarity - similarity[:, :1]) / temperature).exp()
        classes = train_y[nearest]
        for k, rankings_of_k in zip(ks, rankings, strict=True):
            rankings_of_k.append(_rank_classes(classes[:, :k], votes[:, :k], num_ranked))
    empty = torch.empty(0, num_ranked, dtype=torch.int64, device=test_x.device)
    return [torch.cat([empty, *rankings_of_k]) for rankings_of_k in rankings]


def _rank_classes(classes: Tensor, votes: Tensor, num_ranked: int) -> Tensor:
    """The R classes with the most votes, best first; those with equal votes in ascending order.

    Args:
        classes: of the neighbors `[N, k]`.
        votes: of the neighbors `[N, k]`, zero or more.
        num_ranked: R.
    """
    # Of the classes without votes, only 0..R-1 can be among the first R: each gets a vote of 0.
    others = torch.arange(num_ranked, device=classes.device).expand(len(classes), -1)
    classes, votes = torch.cat([classes, others], dim=1), F.pad(votes, (0, num_ranked))
    # --- number the different classes of each row, in ascending order
    ascending, order = classes.sort(dim=1)
    numbers = F.pad((ascending[:, 1:] != ascending[:, :-1]).cumsum(dim=1), (1, 0))
    class_of = torch.zeros_like(numbers).scatter_(1, numbers, ascending)
    # --- sum the votes of each class in the order of the neighbors, and sort
    number_of_neighbor = torch.empty_like(numbers).scatter_(1, order, numbers)
    sums = torch.zeros_like(votes).scatter_add_(1, number_of_neighbor, votes)
    sums.masked_fill_(torch.arange(sums.shape[1], device=sums.device) > numbers[:, -1:], -1)  # no class
    best = sums.argsort(dim=1, descending=True, stable=True)[:, :num_ranked]
    return class_of.gather(1, best)


def _normalize(x: Tensor) -> Tensor:
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=1)


@dataclass(frozen=True, slots=True)
class KNNResult:
    """Accuracy of a kNN classifier."""

    top1: float
    """Share of test samples whose first-ranked class is correct, 0..1."""
    top5: float
    """Share of test samples whose class is among the first five."""
    num_train: int
    num_test: int
    k: int
    """Number of neighbors that voted."""


def knn_accuracy(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, *, k: int, temperature: float, num_classes: int
) -> KNNResult:
    """Accuracy of `knn_predict`; k is limited to the number of training samples."""
    k = min(k, len(train_x))
    (ranking,) = knn_rankings(
        train_x, train_y, test_x, ks=(k,), temperature=temperature, num_classes=num_classes, num_ranked=5
    )
    hits = ranking == test_y.to(ranking.device)[:, None]
    return KNNResult(
        top1=float(hits[:, 0].float().mean()),
        top5=float(hits.any(dim=1).float().mean()),
        num_train=len(train_x),
        num_test=len(test_x),
        k=k,
    )
