"""Search for nearest neighbors by cosine similarity, and selection of queries."""

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
    """The k rows with the largest cosine similarity to each query; the first ones of equals.

    Args:
        features_ND: the rows that are searched.
        queries_QD: the queries.
        k: number of neighbors per query.
        exclude: for each query a row that is left out, the query itself.
        chunk: rows compared at a time; bounds memory to `Q * chunk` similarities.

    Returns:
        Similarities, fp32 `[Q, k]`, descending, and rows, int64 `[Q, k]`, on the CPU.

    Raises:
        ValueError: the shapes do not match, a value is not finite, or there are fewer than k possible neighbors.
    """
    bank, queries = _matrix("features", features_ND), F.normalize(_matrix("queries", queries_QD), dim=1)
    count = len(bank) - (exclude is not None)
    if bank.shape[1] != queries.shape[1]:
        raise ValueError(f"neighbors: queries must be [Q, {bank.shape[1]}], as the features, got {list(queries.shape)}")
    if not 1 <= k <= count:
        raise ValueError(f"neighbors: k must be 1..{count} (possible neighbors), got {k}")
    own = None if exclude is None else torch.as_tensor(exclude)[:, None]
    best = torch.empty(len(queries), 0)
    rows = torch.empty(len(queries), 0, dtype=torch.int64)
    for start in range(0, len(bank), chunk):
        similarity = queries @ F.normalize(bank[start : start + chunk], dim=1).T
        index = torch.arange(start, start + similarity.shape[1]).expand(len(queries), -1)
        if own is not None:
            similarity.masked_fill_(index == own, -torch.inf)
        # A stable sort of earlier rows before later ones: the result does not depend on the chunks.
        best, order = torch.cat([best, similarity], 1).sort(dim=1, descending=True, stable=True)
        best, order = best[:, :k], order[:, :k]
        rows = torch.cat([rows, index], 1).gather(1, order)
    return best, rows


def _matrix(name: str, x: Matrix) -> Tensor:
    matrix = torch.as_tensor(x).float().cpu()
    if matrix.ndim != 2 or not len(matrix):
        raise ValueError(f"neighbors: {name} must be [N, D] with N of 1 or more, got {list(matrix.shape)}")
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError(f"neighbors: {name} must be finite, some are not; embed the images again")
    return matrix


def select_queries(num_images: int, num_queries: int, labels: NDArray[np.int64] | None = None) -> list[int]:
    """Positions of query images, deterministic: from all classes in turn, or evenly spaced without labels.

    Args:
        num_images: number of images.
        num_queries: number of queries; all images if there are fewer.
        labels: classes `[num_images]`, -1 where unknown.
    """
    num_queries = min(num_queries, num_images)
    if labels is None or not (labels >= 0).any():
        return [int(i) for i in evenly_spaced(num_images, num_queries, centered=True)]
    groups = [np.flatnonzero(labels == c) for c in np.unique(labels[labels >= 0])]
    groups = [groups[i] for i in evenly_spaced(len(groups), num_queries, centered=True)]
    sizes = [num_queries // len(groups) + (i < num_queries % len(groups)) for i in range(len(groups))]
    selected = [group[evenly_spaced(len(group), n, centered=True)] for group, n in zip(groups, sizes, strict=True)]
    # Small classes may have too few images: the rest comes from all others.
    rest = np.setdiff1d(np.arange(num_images), np.concatenate(selected))
    rest = rest[evenly_spaced(len(rest), num_queries - sum(map(len, selected)), centered=True)]
    return [int(i) for i in np.concatenate([*selected, rest])]
