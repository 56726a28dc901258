"""Parts of labelled images, balanced over the classes: a function of the seed and the class alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from byol_fast.data.augment_params import permutation

Index = NDArray[np.int64]


def balanced_subset(labels: Index, share: float, *, seed: int) -> Index:
    """A share of every class, at least one image of each.

    The images of a class are shuffled by (seed, class), and the first of them are taken: a smaller share is a part of a
    larger one.

    Args:
        labels: class of each image `[N]`.
        share: above 0, at most 1.
        seed: 0 or more.

    Returns:
        Positions, rising.
    """
    return np.sort(np.concatenate([taken for _, taken in _shuffled(labels, share, seed)]))


def hold_out(labels: Index, share: float, *, seed: int) -> tuple[Index, Index]:
    """Split images into those to learn from and those to choose by: the same share of every class.

    A class of two images or more gives at least one and keeps at least one; a class of one image keeps it.

    Args:
        labels: class of each image `[N]`.
        share: of each class that is held out, above 0, at most 0.5.
        seed: 0 or more.

    Returns:
        Positions to learn from and positions held out, each rising.

    Raises:
        ValueError: no class has two images.
    """
    fit, held = [], []
    for _, shuffled in _shuffled(labels, 1.0, seed):
        count = min(max(round(share * len(shuffled)), 1), len(shuffled) - 1)
        fit.append(shuffled[: len(shuffled) - count])
        held.append(shuffled[len(shuffled) - count :])
    if not sum(map(len, held)):
        raise ValueError(
            f"eval: a part of the {len(labels)} training images must be held out to choose by, but no class has two; "
            "give more images, or a single candidate (of lr, epochs, l2)"
        )
    return np.sort(np.concatenate(fit)), np.sort(np.concatenate(held))


def _shuffled(labels: Index, share: float, seed: int) -> list[tuple[int, Index]]:
    """Of each class: its number, and the first of its images in the order of (seed, class)."""
    order = np.argsort(labels, kind="stable")
    numbers, starts = np.unique(labels[order], return_index=True)
    found = []
    for number, members in zip(numbers.tolist(), np.split(order, starts[1:]), strict=True):
        count = max(round(share * len(members)), 1)
        found.append((number, members[permutation(len(members), seed=seed, epoch=number)[:count]]))
    return found
