"""Counter-based random numbers: functions of a key and a counter, without state.

The generator is SplitMix64's finalizer over the hashed key
(Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def stream_key(seed: int, epoch: int, stream: int) -> int:
    """Key of a stream of random numbers in an epoch, before an item's number is hashed into it: 64 bits, as an int64.

    Args:
        seed: seed of the run, 0 or more.
        epoch: pass over the data, from 0.
        stream: number of a view, or another use of random numbers.
    """
    return int(_stream(seed, epoch, stream).view(np.int64)[0])


def item_keys(seed: int, epoch: int, stream: int, index: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Key of each of the items `index` `[B]` in a stream; see `stream_key`."""
    return _mix((_stream(seed, epoch, stream) ^ index.astype(np.uint64)) + _GAMMA)


def random_bits(keys: NDArray[np.uint64], counter: int | NDArray[np.int64]) -> NDArray[np.uint64]:
    """64 random bits for each pair of key and counter, which are broadcast against each other."""
    return _mix(keys + np.array(counter, np.uint64, ndmin=1) * _GAMMA)


def uniform(keys: NDArray[np.uint64], count: int) -> NDArray[np.float64]:
    """Numbers in [0, 1), `[len(keys), count]`."""
    return (random_bits(keys[:, None], np.arange(1, count + 1)) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _stream(seed: int, epoch: int, stream: int) -> NDArray[np.uint64]:
    key = np.zeros(1, np.uint64)
    for part in (seed, epoch, stream):
        key = _mix((key ^ np.uint64(part)) + _GAMMA)
    return key


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
