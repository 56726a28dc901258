"""Device cache: the views of all other loaders, from parameters that are sampled on the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from byol_fast.config import ViewConfig
from byol_fast.data.augment_params import crop_boxes, params_table
from byol_fast.data.loaders.device_cache import DeviceCacheLoader
from byol_fast.data.random_numbers import stream_key
from byol_fast.data.sampler import BatchSampler
from byol_fast.data.sources import ArraySource
from byol_kernels import sample_view_params
from tests.data.conftest import photo_like
from tests.data.helpers import config_of, loader_of, same

VIEW1 = ViewConfig(size=24)
VIEW2 = ViewConfig(size=24, blur_p=0.1, solarize_p=0.2, interpolation="bilinear", blur_kernel=0)


def test_device_params_equal_the_samplers() -> None:
    """Bit for bit, with the loader's own table and keys, in several epochs."""
    views, seed = (VIEW1, ViewConfig(size=24, scale=(0.9, 1.0), ratio=(0.2, 0.3), hue=0.5)), 2**40 + 1
    sampler = BatchSampler(500, views, batch_size=500, seed=seed)
    for epoch in range(3):
        spec = sampler(epoch)
        for number, (view, expected) in enumerate(zip(views, spec.params, strict=True)):
            key, columns = torch.tensor(stream_key(seed, epoch, number)), torch.from_numpy(params_table(view, 40, 56))
            params = sample_view_params(torch.from_numpy(spec.index), key, columns, blur_kernel=view.blur_kernel)
            assert np.array_equal(params.crop_box, crop_boxes(expected.crop_candidates, 40, 56, view.ratio))
            for name in params._fields[1:]:
                assert np.array_equal(getattr(params, name), getattr(expected, name)), name


@pytest.mark.parametrize("shards", [1, 3])
def test_views_equal_those_of_the_threaded_loader(shards: int) -> None:
    """On a CPU both crop with the same operator; images are not square, epochs change, shards differ."""
    source = ArraySource(photo_like(30, 40, 28))
    for shard in range(shards):
        loaders = [
            loader_of(source, config_of(name, VIEW1, VIEW2, batch_size=4), shard_id=shard, num_shards=shards)
            for name in ("device_cache", "threaded")
        ]
        assert all(same(*(next(loader) for loader in loaders)) for _ in range(10))


def test_read_only_arrays_cause_no_warning(recwarn: Any) -> None:
    images = photo_like(8, 24, 24)
    images.setflags(write=False)
    next(loader_of(ArraySource(images), config_of("device_cache", VIEW1, VIEW2)))
    assert not [w for w in recwarn if "writable" in str(w.message)]


def test_arrays_are_not_copied_on_a_cpu(arrays: ArraySource) -> None:
    loader = loader_of(arrays, config_of("device_cache", VIEW1, VIEW2))
    assert isinstance(loader, DeviceCacheLoader)
    assert loader._images.data_ptr() == arrays.images.ctypes.data
