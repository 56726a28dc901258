"""Effective rank of features."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from byol_fast.evaluate import rankme


@pytest.mark.parametrize("shape", [(200, 30), (30, 200), (40, 40), (5, 1), (1, 5)], ids=str)
def test_rankme_equals_formula_on_singular_values(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=shape) * np.geomspace(1, 1e-3, shape[1]) + 0.3).astype(np.float32)
    sigma = np.linalg.svd(x.astype(np.float64), compute_uv=False)
    p = sigma / sigma.sum() + 1e-7
    expected = np.exp(-(p * np.log(p)).sum())
    assert rankme(torch.from_numpy(x), chunk=7) == pytest.approx(expected, rel=1e-6)


def test_rankme_of_known_ranks() -> None:
    basis = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64))[0]
    for rank in (1, 2, 16, 64):  # as many equal directions
        x = torch.randn(500, rank, dtype=torch.float64)
        x = torch.linalg.qr(x)[0] @ basis[:rank]
        assert rankme(x) == pytest.approx(rank, rel=1e-3)
    assert rankme(torch.zeros(4, 3)) == 0
    assert math.isnan(rankme(torch.full((4, 3), math.nan)))
    with pytest.raises(ValueError, match=r"features must be \[N, D\]"):
        rankme(torch.zeros(0, 3))
