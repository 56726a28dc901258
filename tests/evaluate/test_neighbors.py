"""Search for nearest neighbors and selection of queries."""

from __future__ import annotations

import numpy as np
import pytest

from byol_fast.evaluate import nearest
from byol_fast.evaluate.neighbors import select_queries


@pytest.mark.parametrize("chunk", [7, 50, 1000])
def test_nearest_equals_definition(chunk: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 6)).astype(np.float32)
    x[31] = 2 * x[4]  # equally similar to anything, later
    queries = [4, 17, 49]
    similarity, rows = nearest(x, x[queries], k=49, exclude=queries, chunk=chunk)
    unit = x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    for row, query in enumerate(queries):
        cosines = unit @ unit[query]
        others = sorted((i for i in range(50) if i != query), key=lambda i: (-round(cosines[i], 6), i))
        assert rows[row].tolist() == others
        np.testing.assert_allclose(similarity[row], cosines[others], atol=1e-6)


def test_queries_come_from_all_classes() -> None:
    labels = np.repeat([0, 1, 2, 3], [100, 50, 2, 1])
    for num in (1, 2, 4, 6, 20, 500):
        selected = select_queries(153, num, labels)
        assert selected == select_queries(153, num, labels)
        assert len(set(selected)) == len(selected) == min(num, 153)
        assert len({int(labels[i]) for i in selected}) == min(num, 4)
    assert select_queries(100, 4) == select_queries(100, 4, np.full(100, -1)) == [12, 37, 62, 87]
