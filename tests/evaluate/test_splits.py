"""Class-balanced subsets and splits."""

from __future__ import annotations

import numpy as np
import pytest

from byol_fast.data.sources import array_source
from byol_fast.evaluate.splits import balanced_subset, subsample, subsample_classes, train_val_split

LABELS = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 3], [200, 100, 30, 1]))


def test_balanced_subsets_are_nested() -> None:
    previous: set[int] = set()
    for share, counts in (
        (0.01, [2, 1, 1, 1]),
        (0.1, [20, 10, 3, 1]),
        (0.5, [100, 50, 15, 1]),
        (1.0, [200, 100, 30, 1]),
    ):
        index = balanced_subset(LABELS, share, seed=3)
        assert np.bincount(LABELS[index]).tolist() == counts
        assert len(set(index.tolist())) == len(index)
        assert previous <= set(index.tolist())
        previous = set(index.tolist())


def test_balanced_subset_depends_on_seed_and_class_only() -> None:
    index = balanced_subset(LABELS, 0.1, seed=3)
    assert set(balanced_subset(LABELS, 0.1, seed=4)) != set(index)
    # Without class 0 the selection from the other classes is the same.
    others = np.flatnonzero(LABELS != 0)
    without = others[balanced_subset(LABELS[others], 0.1, seed=3)]
    assert set(without) == set(index[LABELS[index] != 0])


def test_subsample_of_classes_has_a_share_of_each() -> None:
    """Of alternating classes, every second image would be one class; of class folders both rules select the same."""
    images = np.zeros((12, 2, 2), np.uint8)
    images[:, 0, 0] = np.arange(12)
    alternating = subsample_classes(array_source(images, np.arange(12) % 2), 6)
    assert isinstance(alternating.labels, np.ndarray) and alternating.labels.tolist() == [0, 1, 0, 1, 0, 1]
    in_folders = array_source(images, np.arange(12) // 5)
    for limit in (0, 1, 5, 6, 7, 11, 12, 13):
        selected = [subsample_classes(in_folders, limit), subsample(in_folders, limit)]
        assert [np.asarray(s.load(i))[0, 0, 0] for s in selected[:1] for i in range(len(s))] == [
            np.asarray(s.load(i))[0, 0, 0] for s in selected[1:] for i in range(len(s))
        ]
        assert len(selected[0]) == (limit if 0 < limit < 12 else 12)


@pytest.mark.parametrize(("share", "counts"), [(0.1, [20, 10, 3, 0]), (0.001, [1, 1, 1, 0]), (0.5, [100, 50, 15, 0])])
def test_split_holds_out_share_of_each_class(share: float, counts: list[int]) -> None:
    fit, held = train_val_split(LABELS, share, seed=1)
    assert sorted([*fit, *held]) == list(range(len(LABELS)))
    assert np.bincount(LABELS[held], minlength=4).tolist() == counts


def test_split_needs_class_of_two_images() -> None:
    with pytest.raises(ValueError, match="no class has two"):
        train_val_split(np.arange(5), 0.2, seed=0)
