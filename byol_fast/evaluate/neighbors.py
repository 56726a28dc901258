"""Nearest neighbors by cosine similarity, and which images to ask for theirs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from byol_fast.data.sources.base import evenly_spaced

Matrix = NDArray[np.float32] | Tensor


@torch.no_grad()
def nearest(
    features_ND: Matrix, queries_QD: Matrix, *, k: int, exclude: Sequence[int] | None = None, chunk: int = 16_384
) -> tuple[Tensor, Tensor]:
    """The k most similar rows for each query, by cosine; of equally similar ones the first.

    Args:
        features_ND: where to look.
        queries_QD: what to look for.
        k: neighbours.
        exclude: for each query a row that does not count: itself.
        chunk: rows compared at a time; bounds memory to `Q * chunk` similarities.

    Returns:
        Similarities fp32 `[Q, k]`, falling, and rows int64 `[Q, k]`, on the CPU.

    Raises:
        ValueError: the shapes do not fit, or k is larger than the number of rows that count.
    """
    bank, queries = _matrix("features", features_ND), F.normalize(_matrix("queries", queries_QD), dim=1)
    count = len(bank) - (exclude is not None)
    if bank.shape[1] != queries.shape[1]:
        raise ValueError(f"neighbours: queries must have {bank.shape[1]} columns as the features, got {queries.shape}")
    if not 1 <= k <= count:
        raise ValueError(f"neighbours: k must be 1..{count} (images that can be neighbours), got {k}")
    own = None if exclude is None else torch.as_tensor(exclude)[:, None]
    best = torch.empty(len(queries), 0)
    rows = torch.empty(len(queries), 0, dtype=torch.int64)
    for start in range(0, len(bank), chunk):
        similarity = queries @ F.normalize(bank[start : start + chunk], dim=1).T
        index = torch.arange(start, start + similarity.shape[1]).expand(len(queries), -1)
        if own is not None:
            similarity.masked_fill_(index == own, -torch.inf)
        # Stable, and what came first stays first: the result does not depend on the chunks.
        best, order = torch.cat([best, similarity], 1).sort(dim=1, descending=True, stable=True)
        best, order = best[:, :k], order[:, :k]
        rows = torch.cat([rows, index], 1).gather(1, order)
    return best, rows


def _matrix(what: str, x: Matrix) -> Tensor:
    matrix = torch.as_tensor(x).float().cpu()
    if matrix.ndim != 2 or not len(matrix):
        raise ValueError(f"neighbours: {what} must be [N, D] with N of 1 or more, got {list(matrix.shape)}")
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError(f"neighbours: {what} must be finite, some are not; embed the images anew")
    return matrix


def choose_queries(count: int, num: int, labels: NDArray[np.int64] | None = None) -> list[int]:
    """Images to ask about, the same every time: from all classes in turn, or evenly spaced where there are none.

    Args:
        count: number of images.
        num: how many to choose; all where there are fewer.
        labels: classes `[count]`, -1 where unknown.
    """
    num = min(num, count)
    if labels is None or not (labels >= 0).any():
        return [int(i) for i in evenly_spaced(count, num, centered=True)]
    groups = [np.flatnonzero(labels == c) for c in np.unique(labels[labels >= 0])]
    groups = [groups[i] for i in evenly_spaced(len(groups), num, centered=True)]
    share = [num // len(groups) + (i < num % len(groups)) for i in range(len(groups))]
    spaced = [group[evenly_spaced(len(group), n, centered=True)] for group, n in zip(groups, share, strict=True)]
    rest = np.setdiff1d(np.arange(count), np.concatenate(spaced))
    rest = rest[evenly_spaced(len(rest), num - sum(map(len, spaced)), centered=True)]
    return [int(i) for i in np.concatenate([*spaced, rest])]
