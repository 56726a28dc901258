"""Validation images that are training images, too: found by their contents, in a sample."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from byol_fast.data.errors import CorruptImageError
from byol_fast.data.sources.arrays import ArraySource
from byol_fast.data.sources.base import EncodedSource, ImageSource, evenly_spaced
from byol_fast.utils.progress import current

log = logging.getLogger(__name__)

NUM_VAL = 200
"""Largest number of validation images that are looked for."""
NUM_TRAIN = 100_000
"""Largest number of training images among which they are looked for."""
NUM_DECODED = 200
"""The same where training images have to be decoded for it."""
MAX_BYTES = 1 << 30
"""Largest number of bytes of encoded training images that are read."""
MIN_SHARED = 0.05
"""Share of the validation images from which on a warning says so. Collections from the web have a few percent of
duplicates between their own training and test sets, which hardly change an accuracy."""

_NUM_PLACES = 32
_THREADS = 8  # mostly waiting for the disk
_NUM_CHUNKS = 200  # parts of the images that threads take in turn: between them an interrupt stops the search

T = TypeVar("T")


class SharedImages(NamedTuple):
    """Validation images that are training images, too."""

    pairs: list[tuple[int, int]]
    """Position of each among the validation images, and of its copy among the training images."""
    num_val: int
    """Number of validation images that were looked for."""
    searched: float
    """Share of the training images among which they were looked for."""


def warn_shared_images(train: ImageSource, val: ImageSource, arg_name: str) -> None:
    """Log a warning if validation images are training images, too; a few of them are only mentioned.

    With several processes, the main one looks for all.

    Args:
        train: training images.
        val: validation images.
        arg_name: name of the argument that sets the validation images.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
        return
    shared = find_shared_images(train, val)
    count = len(shared.pairs)
    if not count:
        return
    v, t = shared.pairs[0]
    sampled = "" if shared.num_val == len(val) else "sampled "
    among = "training images" if shared.searched == 1 else f"among {shared.searched:.2g} of the training images"
    text = f"{arg_name}: {count} of {shared.num_val} {sampled}validation images are also {among}, such as "
    text += f"{val.sample_name(v)} (= {train.sample_name(t)})"
    if count < MIN_SHARED * shared.searched * shared.num_val:
        log.info("%s; so few hardly change an accuracy", text)
    else:
        log.warning("%s; accuracies would be too high: give images that are not trained on", text)


def find_shared_images(train: ImageSource, val: ImageSource) -> SharedImages:
    """Validation images that occur among the training images: equal bytes if both are encoded, or else equal pixels.

    The digests of 200 validation images, evenly spaced, are compared with those of the training images that have as
    many bytes as one of them (pixels: the same values at 32 places), in whatever files, shards or tables they are. This
    is exact up to 100,000 training images, of which 1 GiB are read, or 200 that have to be decoded. Beyond that,
    evenly spaced ones stand for all, so that a million take seconds: copies are then missed in proportion, but not
    those of a set that is its own copy.

    Args:
        train: training images.
        val: validation images.
    """
    as_pixels = not (isinstance(train, EncodedSource) and isinstance(val, EncodedSource))
    num_train = NUM_DECODED if as_pixels and not isinstance(train, ArraySource) else NUM_TRAIN
    val_index = evenly_spaced(len(val), NUM_VAL).tolist()
    train_index = evenly_spaced(len(train), num_train).tolist()
    searched = len(train_index) / len(train)

    if not as_pixels or isinstance(train, ArraySource):  # where images are decoded, each one is decoded once
        key = _key_of_pixels if as_pixels else _num_bytes
        keys = set(_map(partial(key, val), val_index)) - {None}
        train_keys = _map(partial(key, train), train_index)
        candidates = [(i, key) for i, key in zip(train_index, train_keys, strict=True) if key in keys]
        num_bytes = sum(key for _, key in candidates if isinstance(key, int))
        if num_bytes > MAX_BYTES:
            selected = evenly_spaced(len(candidates), max(1, len(candidates) * MAX_BYTES // num_bytes)).tolist()
            searched *= len(selected) / len(candidates)
            candidates = [candidates[i] for i in selected]
        train_index = [i for i, _ in candidates]

    digest = _digest_of_pixels if as_pixels else _digest_of_bytes
    copies = dict(zip(_map(partial(digest, train), train_index), train_index, strict=True))
    copies.pop(None, None)
    digests = _map(partial(digest, val), val_index) if copies else [None] * len(val_index)
    pairs = [(i, copies[value]) for i, value in zip(val_index, digests, strict=True) if value in copies]
    return SharedImages(pairs, len(val_index), searched)


def _map(fn: Callable[[int], T | None], index: Sequence[int]) -> list[T | None]:
    """Results for the images at these indices, computed by threads; None for those that cannot be read."""

    def compute(chunk: Sequence[int]) -> list[T | None]:
        results: list[T | None] = []
        for i in chunk:
            try:
                results.append(fn(i))
            except (OSError, CorruptImageError):
                results.append(None)
        return results

    size = -(-len(index) // _NUM_CHUNKS) or 1
    chunks = [index[start : start + size] for start in range(0, len(index), size)]
    all_results: list[T | None] = []
    bar = current().bar(len(index), "comparing training and validation images")
    with bar, ThreadPoolExecutor(_THREADS, "byol-fast-compare") as pool:
        for results in pool.map(compute, chunks):
            all_results += results
            bar.update(len(all_results))
    return all_results


def _num_bytes(source: ImageSource, i: int) -> int | None:
    assert isinstance(source, EncodedSource)
    return source.num_bytes(i) or None


def _digest_of_bytes(source: ImageSource, i: int) -> bytes:
    assert isinstance(source, EncodedSource)
    return hashlib.blake2b(source.read(i)).digest()


def _key_of_pixels(source: ImageSource, i: int) -> bytes:
    values = _pixels(source, i).ravel()
    return values[len(values) // (2 * _NUM_PLACES) :: max(1, len(values) // _NUM_PLACES)].tobytes()


def _digest_of_pixels(source: ImageSource, i: int) -> bytes:
    pixels = _pixels(source, i)
    return hashlib.blake2b(repr(pixels.shape).encode() + pixels.tobytes()).digest()


def _pixels(source: ImageSource, i: int) -> NDArray[Any]:
    return source.images[i] if isinstance(source, ArraySource) else np.asarray(source.load(i))
