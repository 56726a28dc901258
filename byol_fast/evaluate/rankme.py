"""Effective rank of features."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from byol_fast.data.sources.base import evenly_spaced

RANKME_IMAGES = 25_600
"""Number of images that is enough for a stable value (RankMe, section 3.2)."""


@torch.no_grad()
def rankme(features_ND: Tensor, *, eps: float = 1e-7, chunk: int = 4096) -> float:
    """Effective rank of features: `exp(-sum_k p_k log p_k)` with `p_k = sigma_k / sum(sigma) + eps`.

    RankMe, arXiv 2210.02885, equation 1. The singular values sigma of the features (not centered) are computed as
    roots of the eigenvalues of the smaller Gram matrix, in float64.

    Args:
        features_ND: features `[N, D]`, floating point, on any device.
        eps: added to every p_k, as in the paper.
        chunk: rows converted to float64 at a time.

    Returns:
        From 1 (all features lie on one line) to about min(N, D); 0 if all are zero, NaN if one is not finite.

    Raises:
        ValueError: the features are not `[N, D]`, or there are none.
    """
    if features_ND.ndim != 2 or not features_ND.numel():
        raise ValueError(f"rankme: features must be [N, D] with N and D 1 or more, got {list(features_ND.shape)}")
    num, dim = features_ND.shape
    if num < dim:
        x = features_ND.double()
        gram = x @ x.T
    else:
        gram = features_ND.new_zeros(dim, dim, dtype=torch.float64)
        for rows in torch.split(features_ND, chunk):
            x = rows.double()
            gram.addmm_(x.T, x)
    if not bool(torch.isfinite(gram).all()):
        return math.nan
    sigma = torch.linalg.eigvalsh(gram).clamp_(min=0).sqrt_()
    total = sigma.sum()
    if not total > 0:
        return 0.0
    p = sigma / total + eps
    return float((-(p * p.log()).sum()).exp())


def subsample_rows(features_ND: Tensor, limit: int = RANKME_IMAGES) -> Tensor:
    """At most `limit` rows, evenly spaced."""
    if len(features_ND) <= limit:
        return features_ND
    return features_ND[torch.from_numpy(evenly_spaced(len(features_ND), limit)).to(features_ND.device)]
