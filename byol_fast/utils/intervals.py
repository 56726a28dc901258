"""Confidence intervals of accuracies and of means. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z95 = 1.959963984540054
"""The 97.5 % point of the normal distribution."""

Interval = tuple[float, float]


def wilson_interval(hits: int, count: int, z: float = Z95) -> Interval:
    """Wilson score interval of a proportion, 95 % by default (Wilson, JASA 22, 1927).

    `(p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)`: within 0..1, also accurate for few samples
    and proportions near 0 and 1. It covers the sampling of test images, not the variance over training seeds.

    Args:
        hits: successes, 0..count.
        count: trials; the interval of none is 0..1.
        z: quantile of the normal distribution.
    """
    if count == 0:
        return 0.0, 1.0
    p, inverse = hits / count, z * z / count
    center, half = p + inverse / 2, z * math.sqrt(p * (1 - p) / count + inverse / (4 * count))
    low, high = (center - half) / (1 + inverse), (center + half) / (1 + inverse)
    # Exact at 0 and 1, where rounding would leave 1e-17.
    return (0.0 if hits == 0 else low, 1.0 if hits == count else high)


def share_interval(share: float, num_images: int) -> Interval:
    """Wilson's 95 % interval of an accuracy.

    Args:
        share: of the images that are classified correctly, 0..1.
        num_images: test images.
    """
    return wilson_interval(round(share * num_images), num_images)


def mean_interval(shares: Sequence[float], z: float = Z95) -> tuple[float, Interval]:
    """Mean of two or more shares, 0..1, and its 95 % interval `mean -+ z s / sqrt(n)`, cut to 0..1.

    Args:
        shares: a sample; s is its standard deviation, with n - 1 in the denominator.
        z: quantile of the normal distribution; of few shares, that of Student's t with n - 1 degrees of freedom.
    """
    count = len(shares)
    mean = math.fsum(shares) / count
    half = z * math.sqrt(math.fsum((share - mean) ** 2 for share in shares) / (count - 1) / count)
    return mean, (max(mean - half, 0.0), min(mean + half, 1.0))
