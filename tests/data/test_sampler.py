"""Order of an epoch on several processes: properties for any size, batch size and number of shards.

`python -m tests.data.test_sampler` prints a table of sizes, shards, batches and repetitions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from byol_fast.config import ViewConfig
from byol_fast.data.sampler import BatchSampler, permutation

VIEW = ViewConfig(size=8)

SIZES = st.integers(1, 300)
SHARDS = st.integers(1, 8)
BATCHES = st.integers(1, 20)
SEEDS = st.integers(0, 2**31 - 1)


def samplers(
    n: int, shards: int, batch: int, seed: int = 0, excluded: Sequence[Collection[int]] | None = None
) -> list[BatchSampler]:
    options: dict[str, Any] = {"batch_size": batch, "seed": seed, "num_shards": shards}
    excluded = excluded or [()] * shards
    return [BatchSampler(n, (VIEW, VIEW), shard_id=i, excluded=known, **options) for i, known in enumerate(excluded)]


def epoch_of(parts: list[BatchSampler], epoch: int) -> NDArray[np.int64]:
    """Image indices of an epoch in the order of the batches: `[batches * batch size, shards]`, flattened."""
    count = parts[0].batches_per_epoch
    indices = [np.concatenate([p(epoch * count + s).index for s in range(count)]) for p in parts]
    return np.stack(indices, axis=1).ravel()


@settings(max_examples=80, deadline=None)
@given(n=SIZES, shards=SHARDS, batch=BATCHES, seed=SEEDS, epoch=st.integers(0, 50))
def test_epoch_covers_all_images(n: int, shards: int, batch: int, seed: int, epoch: int) -> None:
    """Equals the definition: the permutation of the epoch, padded from its own start, split into batches."""
    per_shard = -(-n // shards)
    assume(batch <= per_shard and shards <= n)
    parts = samplers(n, shards, batch, seed)
    assert {p.batches_per_epoch for p in parts} == {per_shard // batch}
    seen = epoch_of(parts, epoch)
    order = permutation(n, seed=seed, epoch=epoch)
    filled = np.concatenate([order, order])[: per_shard * shards]  # fewer than shards <= n are repeated
    assert np.array_equal(seen, filled[: len(seen)])
    counts = Counter(seen.tolist())
    repeated, lost = sum(c - 1 for c in counts.values()), n - len(counts)
    assert max(counts.values()) <= 2 and repeated <= (-n) % shards < shards
    assert lost <= (batch - 1) * shards  # what does not fill a batch
    assert not (repeated and lost)  # nothing is repeated before everything was seen


@settings(max_examples=60, deadline=None)
@given(n=st.integers(16, 300), shards=st.integers(2, 8), seed=SEEDS)
def test_order_does_not_depend_on_world_size(n: int, shards: int, seed: int) -> None:
    """The images of a batch on all shards are those of one process with the global batch."""
    assume(n >= 2 * shards)
    many, one = epoch_of(samplers(n, shards, 2, seed), 3), epoch_of(samplers(n, 1, 2 * shards, seed), 3)
    common = min(len(many), len(one))
    assert common >= n - 2 * shards and np.array_equal(many[:common], one[:common])


def test_permutations_are_uniform_and_uncorrelated() -> None:
    """All orders of 4 images are equally likely over epochs and seeds (chi-square, p > 1e-6)."""
    for many in (
        [permutation(4, seed=1, epoch=e) for e in range(12_000)],
        [permutation(4, seed=s, epoch=1) for s in range(12_000)],
    ):
        counts = Counter(tuple(order.tolist()) for order in many)
        assert len(counts) == 24
        assert sum((c - 500) ** 2 / 500 for c in counts.values()) < 73.7  # chi-square, 23 degrees, 1e-6
    n = 10_000
    orders = [permutation(n, seed=s, epoch=e) for s in range(3) for e in range(3)]
    for i, a in enumerate(orders):
        for b in [*orders[:i], np.arange(n)]:
            assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(n)


def test_ranks_have_disjoint_images_and_parameters() -> None:
    """Ranks share one seed: parameters are a function of image and epoch, and no two ranks have the same images."""
    parts = samplers(96, 4, 8, seed=5)
    specs = [[p(s) for s in range(3)] for p in parts]
    images = [{int(i) for spec in rank for i in spec.index} for rank in specs]
    assert all(not (a & b) for k, a in enumerate(images) for b in images[:k])
    crops = [tuple(row) for rank in specs for spec in rank for d in spec.params for row in d.crop_candidates]
    assert len(set(crops)) == 2 * 96  # all views of an epoch have different parameters


def test_repeated_image_has_equal_views() -> None:
    """10 images on 4 shards: two are repeated in the epoch, with the same views both times."""
    parts = samplers(10, 4, 1, seed=2)
    rows: dict[int, list[bytes]] = {}
    for p in parts:
        for s in range(p.batches_per_epoch):
            spec = p(s)
            rows.setdefault(int(spec.index[0]), []).append(b"".join(d.crop_candidates.tobytes() for d in spec.params))
    assert sorted(len(views) for views in rows.values()) == [1] * 8 + [2] * 2
    assert all(len(set(views)) == 1 for views in rows.values())


def epoch_with_late_discovery(
    n: int, shards: int, batch: int, seed: int, *, epoch: int, bad: Collection[int]
) -> NDArray[np.int64]:
    """Epoch in which each shard finds corrupt images when it reads them."""
    excluded: list[set[int]] = [set() for _ in range(shards)]
    dealt: list[NDArray[np.int64]] = []
    for p, known in zip(samplers(n, shards, batch, seed, excluded), excluded, strict=True):
        count = p.batches_per_epoch
        rows = []
        for s in range(count):
            while met := set(p(epoch * count + s).index.tolist()) & set(bad):
                known.update(met)
            rows.append(p(epoch * count + s).index)
        dealt.append(np.concatenate(rows))
    return np.stack(dealt, axis=1).ravel()


@settings(max_examples=50, deadline=None)
@given(n=st.integers(8, 200), shards=SHARDS, batch=st.integers(1, 8), seed=SEEDS, data=st.data())
def test_replacements_do_not_depend_on_discovery_time(
    n: int, shards: int, batch: int, seed: int, data: st.DataObject
) -> None:
    assume(batch <= -(-n // shards))
    bad = data.draw(st.sets(st.integers(0, n - 1), max_size=n // 2))
    before = epoch_of(samplers(n, shards, batch, seed), 1)
    informed = samplers(n, shards, batch, seed, [bad] * shards)
    whole = epoch_of(informed, 1)
    assert not set(whole.tolist()) & bad
    stays = ~np.isin(before, list(bad))
    assert np.array_equal(whole[stays], before[stays])  # all other images stay in place
    assert np.array_equal(epoch_with_late_discovery(n, shards, batch, seed, epoch=1, bad=bad), whole)
    assert {p.batches_per_epoch for p in informed} == {-(-n // shards) // batch}


def test_replacements_differ_between_epochs() -> None:
    stand_ins = []
    for epoch in range(300):
        [all_images], [without_7] = samplers(50, 1, 50, seed=3), samplers(50, 1, 50, seed=3, excluded=[{7}])
        stand_ins.append(int(without_7.index(epoch)[all_images.index(epoch) == 7][0]))
    assert 7 not in stand_ins and len(set(stand_ins)) == 49  # expected to miss 49 * (1 - 1/49)^300 = 0.1 of them


@pytest.mark.parametrize("n", [10, 37, 1000])
def test_epoch_counts(n: int) -> None:
    rows = [row(n, shards, 4) for shards in (1, 2)]
    assert rows[0][2] == n // 4 and all(r[3] + n - r[4] == r[2] * 4 * r[1] for r in rows)


def row(n: int, shards: int, batch: int) -> tuple[int, int, int, int, int]:
    """Images, shards, batches per epoch and shard, repeated images, dropped images."""
    parts = samplers(n, shards, batch)
    counts = Counter(epoch_of(parts, 0).tolist())
    return n, shards, parts[0].batches_per_epoch, sum(c - 1 for c in counts.values()), n - len(counts)


if __name__ == "__main__":
    print("| images | shards | batch | batches per epoch and shard | repeated | dropped |")
    print("|---|---|---|---|---|---|")
    for n_, batch_ in ((37, 1), (101, 4), (1000, 16), (10_007, 32)):
        for shards_ in range(1, 9):
            if batch_ <= -(-n_ // shards_):
                _, _, count_, twice, left = row(n_, shards_, batch_)
                print(f"| {n_} | {shards_} | {batch_} | {count_} | {twice} | {left} |")
