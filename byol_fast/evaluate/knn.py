"""k nearest neighbours on frozen features: the cheapest honest look at a representation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


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

    Cosine similarity; a neighbour votes with `exp(similarity / temperature)` (Wu et al., arXiv 1805.01978).

    Args:
        train_x: features `[M, D]`, floating point, of any length.
        train_y: classes `[M]`, integers in 0..num_classes-1.
        test_x: features `[N, D]`.
        k: neighbours, 1..M.
        temperature: positive.
        num_classes: number of classes.
        chunk: test samples compared at a time; bounds memory to `chunk * M` similarities.

    Returns:
        int64 `[N, num_classes]`: class numbers, most votes first; classes with equal votes in rising order.

    Raises:
        ValueError: shapes that do not fit, k out of range, temperature not positive, labels out of range.
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
    chunk: int = 1024,
) -> list[Tensor]:
    """`knn_predict` for several k, in one search.

    Args:
        train_x: as for `knn_predict`.
        train_y: as for `knn_predict`.
        test_x: as for `knn_predict`.
        ks: numbers of neighbours, each 1..M.
        temperature: as for `knn_predict`.
        num_classes: as for `knn_predict`.
        chunk: as for `knn_predict`.

    Returns:
        A ranking for each k.

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
    if not temperature > 0:
        raise ValueError(f"knn_predict: temperature must be positive, got {temperature}")
    if int(train_y.min()) < 0 or int(train_y.max()) >= num_classes:
        raise ValueError(
            f"knn_predict: train_y must be 0..{num_classes - 1}, got {int(train_y.min())}..{int(train_y.max())}"
        )
    train_y = train_y.long()
    bank = _unit(train_x)
    found: list[list[Tensor]] = [[] for _ in ks]
    for queries in torch.split(test_x, chunk):
        similarity, nearest = (_unit(queries) @ bank.T).topk(max(ks), dim=1)
        # exp(s/T) overflows fp32 for T < 0.0113; the largest vote of a row may be 1 without changing the ranking.
        votes = ((similarity - similarity[:, :1]) / temperature).exp()
        classes = train_y[nearest]
        for k, rankings in zip(ks, found, strict=True):
            scores = votes.new_zeros(len(queries), num_classes).scatter_add_(1, classes[:, :k], votes[:, :k])
            rankings.append(scores.argsort(dim=1, descending=True, stable=True))
    empty = torch.empty(0, num_classes, dtype=torch.int64, device=test_x.device)
    return [torch.cat([empty, *rankings]) for rankings in found]


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=1)


@dataclass(frozen=True, slots=True)
class KNNResult:
    """Outcome of a kNN evaluation."""

    top1: float
    """Share of test samples whose first-ranked class is right, 0..1."""
    top5: float
    """Share whose class is among the first five."""
    num_train: int
    num_test: int


def knn_accuracy(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, *, k: int, temperature: float, num_classes: int
) -> KNNResult:
    """Accuracy of `knn_predict`; a k larger than the training set is taken as all of it."""
    k = min(k, len(train_x))
    ranking = knn_predict(train_x, train_y, test_x, k=k, temperature=temperature, num_classes=num_classes)
    hits = ranking[:, :5] == test_y.to(ranking.device)[:, None]
    return KNNResult(
        top1=float(hits[:, 0].float().mean()),
        top5=float(hits.any(dim=1).float().mean()),
        num_train=len(train_x),
        num_test=len(test_x),
    )
