"""Parts of labeled images. Class-balanced ones depend on the seed and the class only."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from byol_fast.data import ImageSource
from byol_fast.data.sampler import permutation
from byol_fast.data.sources.base import evenly_spaced

Index = NDArray[np.int64]


def subsample(source: ImageSource, limit: int) -> ImageSource:
    """At most `limit` images, evenly spaced, as class folders are sorted by class; 0: all."""
    num_images = len(source)
    return source if not 0 < limit < num_images else source.subset(evenly_spaced(num_images, limit))


def subsample_classes(source: ImageSource, limit: int) -> ImageSource:
    """At most `limit` labeled images, evenly spaced among those of each class, in stored order; 0: all.

    A class gets its share also where the classes alternate, as in some lists. Of class folders, which are sorted by
    class, these are the images of `subsample`.
    """
    num_images = len(source)
    if not 0 < limit < num_images:
        return source
    by_class = np.argsort(np.asarray(source.labels), kind="stable")
    return source.subset(np.sort(by_class[evenly_spaced(num_images, limit)]))


def balanced_subset(labels: Index, share: float, *, seed: int) -> Index:
    """The same share of every class, at least one image of each.

    The images of a class are shuffled by (seed, class), and the first ones are taken: a smaller share is a subset of a
    larger one.

    Args:
        labels: class of each image `[N]`.
        share: above 0, at most 1.
        seed: 0 or more.

    Returns:
        Positions, ascending.
    """
    shuffled = _shuffled_classes(labels, seed=seed)
    return np.sort(np.concatenate([members[: max(round(share * len(members)), 1)] for members in shuffled]))


def draw_shots(labels: Index, shots: int, *, draw: int, seed: int) -> Index:
    """Random images of each class, the same number of all.

    The images of a class are shuffled by (seed, draw, class), and the first ones are taken: those of fewer shots are
    the first columns of those of more.

    Args:
        labels: class of each image `[N]`; each class that occurs, C of them, has at least as many images as shots.
        shots: images per class, 1 or more.
        draw: number of the draw, from 0.
        seed: 0 or more.

    Returns:
        Positions `[C, shots]`, a row for each class.
    """
    return np.stack([members[:shots] for members in _shuffled_classes(labels, seed=seed, draw=draw)])


def train_val_split(labels: Index, val_share: float, *, seed: int) -> tuple[Index, Index]:
    """Split training images into a part to learn from and a held-out part for model selection.

    Each class with two images or more has at least one in either part; the image of a class with one is learned from.

    Args:
        labels: class of each image `[N]`.
        val_share: share of each class that is held out, above 0, at most 0.5.
        seed: 0 or more.

    Returns:
        Positions to learn from and positions held out, each ascending.

    Raises:
        ValueError: no class has two images.
    """
    train, val = [], []
    for members in _shuffled_classes(labels, seed=seed):
        num_val = min(max(round(val_share * len(members)), 1), len(members) - 1)
        train.append(members[: len(members) - num_val])
        val.append(members[len(members) - num_val :])
    if not sum(map(len, val)):
        raise ValueError(
            f"eval: some of the {len(labels)} training images must be held out for model selection, but no class has "
            "two; add images, or pass a single candidate (of lr, epochs, l2)"
        )
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(val))


def _shuffled_classes(labels: Index, *, seed: int, draw: int = 0) -> list[Index]:
    """The images of each class, shuffled by (seed, draw, class)."""
    order = np.argsort(labels, kind="stable")
    numbers, starts = np.unique(labels[order], return_index=True)
    return [
        members[permutation(len(members), seed=seed, epoch=(draw << 32) + number)]
        for number, members in zip(numbers.tolist(), np.split(order, starts[1:]), strict=True)
    ]
