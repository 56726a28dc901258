"""Loaders on a GPU: views equal to the CPU's, also under load; no host synchronization, no growth of memory.

Where it makes sense a test runs on the CPU too, with nothing of its own to show there: a rehearsal of its code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from byol_fast.config import Config, ViewConfig, replace
from byol_fast.data import Batch, ImageSource, ViewLoader, make_loader
from byol_fast.data.loaders.backend import dali_installed
from byol_fast.data.loaders.device_cache import DeviceCacheLoader
from byol_fast.data.sources import ArraySource, FileSource
from tests.data.helpers import CPU, OFF, config_of, error, pixels, same
from tests.gpu import DEVICE, REHEARSING, Captured, host_syncs_are_errors, launches, only_on_a_gpu

VIEW1 = ViewConfig(size=32)
VIEW2 = ViewConfig(size=32, blur_p=0.1, solarize_p=0.5)
KERNELS = ["threaded", "dali+kernels", "device_cache"]
GPU = torch.device(DEVICE)


def on_both(capability: str) -> pytest.MarkDecorator:
    """Parametrize a test with the CPU, and mark its GPU case."""
    gpu = pytest.param(GPU, marks=pytest.mark.gpu(capability), id="gpu")
    return pytest.mark.parametrize("device", [pytest.param(CPU, id="cpu"), gpu])


def source_of(backend: str, files: FileSource, arrays: ArraySource) -> ImageSource:
    if backend.startswith("dali") and not dali_installed():
        pytest.skip("DALI is not installed")
    return arrays if backend.startswith("device_cache") else files


def settings(backend: str, **changes: Any) -> Config:
    return replace(config_of(backend, VIEW1, VIEW2, batch_size=20), {"data": changes} if changes else {})


def take(loader: ViewLoader, n: int) -> list[Batch]:
    return [next(loader) for _ in range(n)]


def on_host(batch: Batch) -> Batch:
    return dataclasses.replace(batch, views=tuple(view.cpu() for view in batch.views))


@contextmanager
def busy(device: torch.device) -> Iterator[None]:
    """Keep a GPU busy with arithmetic and memory traffic, on its own stream and on the current one."""
    if device.type == "cpu":
        yield
        return
    a, other = torch.randn(4096, 4096, device=device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    other.wait_stream(torch.cuda.current_stream(device))
    for stream in (other, torch.cuda.current_stream(device)):
        with torch.cuda.stream(stream):
            for _ in range(100):
                a = a @ a.clamp(-1, 1)
    yield
    torch.cuda.synchronize(device)


# Levels of 255. Colors in float32 on both sides: next to a half, the next level; the blur has factors of float16.
# Crops of the threaded loader are the same bytes; those of the device cache are rounded once on a GPU and twice on a
# CPU; DALI's decoder and resize on a GPU are other code than on a CPU, within two levels at most places.
MEAN_ERROR = {"threaded": 0.1, "device_cache": 0.5, "dali+kernels": 1.9}


@on_both("parity")
@pytest.mark.parametrize("backend", KERNELS)
def test_views_equal_those_of_the_cpu(backend: str, device: torch.device, files: Any, arrays: Any) -> None:
    source = source_of(backend, files, arrays)
    config = replace(settings(backend), {"view2.size": 24, "num_local_views": 2, "local_view.size": 18})
    loaders = [make_loader(source, config, device=d) for d in (CPU, device)]
    for _ in range(4):  # two epochs
        expected, found = (next(loader) for loader in loaders)
        assert torch.equal(expected.index, found.index) and not found.index.is_cuda
        for a, b in zip(expected.views, found.views, strict=True):
            assert b.device.type == device.type and b.is_contiguous(memory_format=torch.channels_last)
            by_image = error(pixels(a), pixels(b.cpu())).mean(axis=(1, 2, 3))
            assert np.median(by_image) <= MEAN_ERROR[backend]


@on_both("decode")
@pytest.mark.parametrize("backend", [*KERNELS, "dali"])
def test_views_do_not_change_under_load(backend: str, device: torch.device, files: Any, arrays: Any) -> None:
    """Finds a decoder that still writes after its stream has ended: the bytes are those of an idle GPU."""
    if device.type == "cpu" and backend.startswith("dali") and not REHEARSING:
        pytest.skip("shows nothing on a CPU")
    source = source_of(backend, files, arrays)
    quiet = [on_host(batch) for batch in take(make_loader(source, settings(backend), device=device), 8)]
    with busy(device):
        loaded = [on_host(batch) for batch in take(make_loader(source, settings(backend), device=device), 8)]
    assert all(same(a, b) for a, b in zip(quiet, loaded, strict=True))


@pytest.mark.gpu("decode")
@pytest.mark.parametrize("load", [0.0, 0.65, 1.0])
def test_gpu_decoders_agree_with_the_cpu(load: float, files: FileSource) -> None:
    """Under load, for every share of the hardware decoder: an image that is not written yet differs by far."""
    source = source_of("dali", files, files)  # type: ignore[arg-type]
    crops_only = OFF | {"hflip_p": 0.5}
    config = replace(settings("dali", hw_decoder_load=load), {"view1": crops_only, "view2": crops_only})
    expected = take(make_loader(source, config, device=CPU), 4)
    with busy(GPU):
        found = [on_host(batch) for batch in take(make_loader(source, config, device=GPU), 4)]
    for a, b in zip(expected, found, strict=True):
        assert error(pixels(a.views[0]), pixels(b.views[0])).mean(axis=(1, 2, 3)).max() <= 4


@on_both("resume")
@pytest.mark.parametrize("backend", KERNELS)
def test_resume_is_exact(backend: str, device: torch.device, files: Any, arrays: Any) -> None:
    if device.type == "cpu" and backend != "device_cache" and not REHEARSING:
        pytest.skip("test_loaders.py has it")
    source = source_of(backend, files, arrays)
    loader = make_loader(source, settings(backend), device=device)
    take(loader, 3)
    state = loader.state_dict()
    expected = [on_host(batch) for batch in take(loader, 4)]
    fresh = make_loader(source, settings(backend), device=device)
    fresh.load_state_dict(state)
    assert all(same(a, on_host(b)) for a, b in zip(expected, take(fresh, 4), strict=True))


@on_both("decode")
@pytest.mark.parametrize("backend", KERNELS)
def test_views_stay_valid_while_held(backend: str, device: torch.device, files: Any, arrays: Any) -> None:
    if device.type == "cpu" and backend != "device_cache" and not REHEARSING:
        pytest.skip("test_loaders.py has it")
    loader = make_loader(source_of(backend, files, arrays), settings(backend), device=device)
    held = next(loader)
    copy = on_host(held)
    take(loader, 9)
    assert same(copy, on_host(held))


@pytest.mark.gpu("decode")
@pytest.mark.parametrize("backend", KERNELS)
def test_memory_does_not_grow(backend: str, files: Any, arrays: Any) -> None:
    loader = make_loader(source_of(backend, files, arrays), settings(backend), device=GPU)
    only_on_a_gpu("the memory of a CPU's loaders is not counted")
    take(loader, 20)
    torch.cuda.synchronize()
    before = torch.cuda.memory_reserved()
    for _ in range(100):
        batch = next(loader)
        (batch.views[0].float().sum() + batch.views[1].float().sum()).mul_(2)
    torch.cuda.synchronize()
    assert torch.cuda.memory_reserved() <= before + 2**21  # one more block of the allocator


@pytest.mark.gpu("device_cache")
def test_device_cache_does_not_synchronize(arrays: ArraySource) -> None:
    loader = make_loader(arrays, settings("device_cache"), device=GPU)
    take(loader, 3)
    with host_syncs_are_errors():
        take(loader, 10)  # new epochs among them


@pytest.mark.gpu("device_cache")
def test_device_cache_takes_eight_launches(arrays: ArraySource) -> None:
    loader = make_loader(arrays, settings("device_cache"), device=GPU)
    take(loader, 2)  # the first call of `launches` begins an epoch, the second is in the middle of it
    kernels = ["_sample_view_params_kernel", "_resized_crop_kernel", "_photometric_kernel", "_gaussian_blur_kernel"]
    assert sorted(launches(lambda: next(loader)) or 2 * kernels) == sorted(2 * kernels)


@pytest.mark.gpu("device_cache")
def test_device_cache_can_be_captured_in_a_graph(arrays: ArraySource) -> None:
    loader = make_loader(arrays, settings("device_cache"), device=GPU)
    assert isinstance(loader, DeviceCacheLoader)
    first = on_host(next(loader))
    index, keys = loader._index_and_keys(0)
    index, keys = index.clone(), tuple(key.clone() for key in keys)
    graph = Captured(lambda: loader._compute(index, keys))
    for number in (0, 1, 0):
        index.copy_(loader._index_and_keys(number)[0])
        views = graph.replay()
        expected = loader._compute(index, keys)
        assert all(torch.equal(a, b) for a, b in zip(views, expected, strict=True))
    assert torch.equal(views[0].cpu(), first.views[0])
