"""Maps of the features."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from byol_fast.report.pictures import TSNE_MIN_IMAGES, maps, principal_components
from tests.report.parsing import svg, texts


def test_principal_components_are_those_of_the_covariance() -> None:
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([5.0, 3, 1, 1, 1, 1]) + 7
    y, shares = principal_components(x, 4)
    covariance = np.cov(x.double().numpy().T)
    values, vectors = np.linalg.eigh(covariance)
    assert shares[:2] == pytest.approx(values[::-1][:2] / values.sum(), rel=1e-6)
    for k in range(2):
        expected = (x.double().numpy() - x.double().numpy().mean(0)) @ vectors[:, -1 - k]
        sign = np.sign(expected[np.abs(expected).argmax()])  # the largest coordinate is positive
        assert y[:, k].numpy() == pytest.approx(sign * expected, abs=1e-4)
    flat, nothing = principal_components(torch.ones(5, 1), 4)
    assert flat.shape == (5, 2)
    assert float(flat.abs().max()) == 0
    assert nothing == [0, 0]


def test_maps_name_the_largest_classes() -> None:
    labels = np.repeat(np.arange(14), 2)
    labels[:6] = 3
    labels[-1] = -1
    features = torch.randn(len(labels), 5, generator=torch.Generator().manual_seed(0))
    assert len(labels) < TSNE_MIN_IMAGES
    (chart,) = maps(features, labels, tuple(f"c{i}" for i in range(14)))
    shown = [text for text in texts(svg(chart)) if re.fullmatch(r"c\d+|.*classes", text)]
    assert shown == ["c3", "c4", "c5", "c6", "c7", "c8", "c9", "2 other classes", "c10", "c11"]
    assert texts(svg(maps(features, None, ())[0])).count("c3") == 0
