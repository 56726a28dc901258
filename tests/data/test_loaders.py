"""Loaders: order, determinism, exact resume, shards, evaluation batches, choice of the loader."""

from __future__ import annotations

import io
import sys
import threading
import types
from typing import Any

import numpy as np
import pytest
import torch

from byol_fast.config import ConfigError, DataConfig, Preprocessing, ViewConfig, replace
from byol_fast.data import Batch, ImageSource, SourceError, ViewLoader, eval_batches
from byol_fast.data.loaders.backend import Backend, resolve_backend, resolve_decoder
from byol_fast.data.loaders.threads import single_core_threads
from byol_fast.data.sampler import BatchSampler
from byol_fast.data.sources import ArraySource, FileSource
from byol_fast.models.base import stack_views
from tests.data.conftest import skip_without_dali
from tests.data.helpers import CPU, config_of, error, loader_of, pixels, plain, same

VIEW1 = ViewConfig(size=16)
VIEW2 = ViewConfig(size=16, blur_p=0.1, solarize_p=0.2)
LOCAL = {"num_local_views": 2, "local_view.size": 8, "local_view.color_jitter_p": 0.0}


@pytest.fixture
def backend(any_backend: str) -> str:
    return any_backend


@pytest.fixture(params=["files", "arrays"])
def source(request: pytest.FixtureRequest, files: FileSource, arrays: ArraySource) -> ImageSource:
    if request.param == "arrays":
        return arrays
    if "backend" in request.fixturenames and request.getfixturevalue("backend").startswith("device_cache"):
        pytest.skip("the device cache takes arrays")
    return files


@pytest.fixture(params=["dali", "threaded"])
def decoder(request: pytest.FixtureRequest) -> Any:
    return skip_without_dali(request.param)


def take(loader: ViewLoader, n: int) -> list[Batch]:
    return [next(loader) for _ in range(n)]


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded


def test_batches_are_raw_channels_last_and_indexed(backend: str, arrays: ArraySource) -> None:
    loader = loader_of(arrays, config_of(backend, plain(64), plain(64, solarize_p=1.0), batch_size=16))
    for batch in take(loader, 3):
        assert batch.is_raw and batch.index.dtype == torch.int64
        assert batch.views[0].shape == (16, 3, 64, 64)
        assert batch.views[0].is_contiguous(memory_format=torch.channels_last)
        originals = arrays.images[batch.index.numpy()]
        assert np.array_equal(pixels(batch.views[0]), originals)
        # the second view follows its own configuration
        assert np.array_equal(pixels(batch.views[1]), np.where(originals < 128, originals, 255 - originals))
        stacked = stack_views(batch.views)
        assert torch.equal(stacked, torch.cat(batch.views))
        # without a copy, except for views that DALI owns
        assert (stacked.data_ptr() == batch.views[0].data_ptr()) == (backend != "dali")


def test_epochs_visit_every_image_once_in_new_orders(backend: str, source: ImageSource) -> None:
    loader = loader_of(source, config_of(backend, plain(8), batch_size=8))
    assert loader.batches_per_epoch == len(source) // 8
    first, second = (torch.cat([b.index for b in take(loader, loader.batches_per_epoch)]) for _ in range(2))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(len(source)))
    assert not torch.equal(first, second)
    assert first.tolist() != sorted(first.tolist())


def test_views_do_not_depend_on_threads(backend: str, source: ImageSource) -> None:
    config = config_of(backend, VIEW1, VIEW2)
    one, three = (
        take(loader_of(source, replace(config, {"data": changes})), 7)
        for changes in ({"threads": 1}, {"threads": 3, "prefetch": 4})
    )
    assert all(same(a, b) for a, b in zip(one, three, strict=True))


def test_views_depend_on_the_seed(backend: str, arrays: ArraySource) -> None:
    config = config_of(backend, VIEW1, VIEW2)
    one, other = (take(loader_of(arrays, replace(config, {"seed": seed})), 3) for seed in (0, 1))
    assert not any(same(a, b) for a, b in zip(one, other, strict=True))


def test_views_differ_between_epochs(backend: str, arrays: ArraySource) -> None:
    only = ArraySource(arrays.images[:2])
    batches = take(loader_of(only, config_of(backend, VIEW1, VIEW2, batch_size=2)), 4)
    views = [view[b.index.tolist().index(0)] for b in batches for view in (b.views[0], b.views[1])]
    assert all(not torch.equal(a, b) for i, a in enumerate(views) for b in views[:i])


def test_views_stay_valid_while_later_batches_are_loaded(backend: str, source: ImageSource) -> None:
    loader = loader_of(source, config_of(backend, VIEW1, VIEW2))
    held = next(loader)
    copies = [held.views[0].clone(), held.views[1].clone(), held.index.clone()]
    take(loader, 9)
    loader.close()
    assert all(torch.equal(a, b) for a, b in zip(copies, (held.views[0], held.views[1], held.index), strict=True))


def test_resume_is_exact(backend: str, source: ImageSource) -> None:
    """40 or 48 images in batches of 8: 5 or 6 batches an epoch."""
    config = replace(config_of(backend, VIEW1, VIEW2), LOCAL)
    loader, batches, states = loader_of(source, config), [], {}
    for number in range(12):
        if number in {3, 5, 7}:  # mid-epoch, the boundary of files, the second epoch
            states[number] = through_a_file(loader.state_dict())
        batches.append(next(loader))
    for number in (3, 5):
        fresh = loader_of(source, config)
        fresh.load_state_dict(states[number])
        assert all(same(a, b) for a, b in zip(batches[number : number + 4], take(fresh, 4), strict=True))
    loader.load_state_dict(states[7])  # back to an earlier batch with the same loader
    again = take(loader, 2)
    loader.close()  # and continues after that
    assert all(same(a, b) for a, b in zip(batches[7:], again + take(loader, 3), strict=True))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"seed": 1}, "seed"),
        ({"batch_size": 4}, "batch_size"),
        ({"view1": {"blur_p": 0.5}}, "view1"),
        ({"view2": {"solarize_p": 0.5}}, "view2"),
        ({"local_view.scale": (0.1, 0.2)}, "view3, view4"),
        ({"num_local_views": 1}, "view4"),
        ({"num_local_views": 3}, "view5"),
    ],
)
def test_state_of_other_settings_is_refused(
    changes: dict[str, Any], field: str, arrays: ArraySource, dali: None
) -> None:
    config = replace(config_of("dali", VIEW1, VIEW2), LOCAL)
    state = loader_of(arrays, config).state_dict()
    with pytest.raises(ValueError, match=rf"but {field} changed"):
        loader_of(arrays, replace(config, changes)).load_state_dict(state)


def test_state_of_other_images_or_shards_is_refused(files: FileSource, arrays: ArraySource) -> None:
    config = config_of("threaded", VIEW1, VIEW2)
    state = loader_of(arrays, config).state_dict()
    brighter = ArraySource(np.bitwise_or(arrays.images, 1, dtype=np.uint8))
    for other in (files, brighter, ArraySource(arrays.images[:-1])):
        with pytest.raises(ValueError, match="but images changed"):
            loader_of(other, config).load_state_dict(state)
    with pytest.raises(ValueError, match="num_shards was 1, now is 2"):
        loader_of(arrays, config, num_shards=2).load_state_dict(state)


def test_other_loader_continues_with_the_same_parameters(dali: None, arrays: ArraySource, caplog: Any) -> None:
    state = loader_of(arrays, config_of("dali", VIEW1, VIEW2)).state_dict() | {"batch_number": 4}
    ours, theirs = (loader_of(arrays, config_of(b, VIEW1, VIEW2)) for b in ("dali", "threaded"))
    ours.load_state_dict(state)
    assert "pixels may differ" not in caplog.text
    theirs.load_state_dict(state)
    assert "pixels may differ" in caplog.text
    a, b = next(ours), next(theirs)
    assert torch.equal(a.index, b.index)
    assert error(pixels(a.views[0]), pixels(b.views[0])).mean() < 1.9


@pytest.mark.parametrize("n", [16, 37, 101])
@pytest.mark.parametrize("shards", [1, 2, 3, 5, 8])
def test_shards_cover_all_images(n: int, shards: int) -> None:
    samplers = [
        BatchSampler(n, (VIEW1, VIEW2), batch_size=1, seed=3, shard_id=i, num_shards=shards) for i in range(shards)
    ]
    counts = {p.batches_per_epoch for p in samplers}
    assert counts == {-(-n // shards)}
    for epoch in range(2):
        seen = [int(p(epoch * p.batches_per_epoch + s).index[0]) for p in samplers for s in range(p.batches_per_epoch)]
        assert set(seen) == set(range(n))
        assert len(seen) - n == (-n) % shards  # repeated, to fill the last round


def test_shards_are_parts_of_one_epoch(backend: str, arrays: ArraySource) -> None:
    config = config_of(backend, VIEW1, VIEW2, batch_size=8)
    whole = take(loader_of(arrays, replace(config, {"batch_size": 16})), 3)
    parts = [take(loader_of(arrays, config, shard_id=i, num_shards=2), 3) for i in range(2)]
    for number, batch in enumerate(whole):
        for i in range(2):
            assert torch.equal(batch.index[i::2], parts[i][number].index)
            views = batch.views[0][i::2], parts[i][number].views[0]
            assert torch.equal(*views)  # pixels do not depend on the batch size


def test_number_of_views_does_not_change_their_pixels(backend: str, source: ImageSource) -> None:
    """One view, two of two sizes, and these with local ones."""
    config = config_of(backend, VIEW1, replace(VIEW2, {"size": 12}))
    two, *others = (
        take(loader_of(source, changed, **more), 3)
        for changed, more in (
            (config, {}),
            (config, {"view_configs": (VIEW1,)}),
            (replace(config, LOCAL), {}),
            (replace(config, LOCAL | {"num_local_views": 3}), {}),
        )
    )
    sizes = [[16], [16, 12, 8, 8], [16, 12, 8, 8, 8]]
    for batches, expected in zip(others, sizes, strict=True):
        for batch, of_two in zip(batches, two, strict=True):
            assert [view.shape[-1] for view in batch.views] == expected and torch.equal(batch.index, of_two.index)
            for one, other in zip(batch.views, of_two.views, strict=False):
                assert torch.equal(one, other)
            for i, view in enumerate(batch.views):  # of one configuration, with draws of its own
                assert all(view.shape != other.shape or not torch.equal(view, other) for other in batch.views[:i])
    for few, many in zip(others[1], others[2], strict=True):
        assert all(torch.equal(*views) for views in zip(few.views, many.views, strict=False))


def test_views_of_one_size_are_slices_of_one_buffer(backend: str, arrays: ArraySource) -> None:
    batch = next(loader_of(arrays, replace(config_of(backend, VIEW1, VIEW2), LOCAL)))
    for views in (batch.views[:2], batch.views[2:]):
        stacked = stack_views(views)
        assert torch.equal(stacked, torch.cat(views))
        assert (stacked.data_ptr() == views[0].data_ptr()) == (backend != "dali")  # DALI owns its views


def test_an_image_is_decoded_once_for_all_views(files: FileSource, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(config_of("threaded", VIEW1, VIEW2), LOCAL | {"data.prefetch": 1})
    decoded: list[int] = []
    load = FileSource.load_tensor

    def counted(source: FileSource, i: int) -> torch.Tensor:
        decoded.append(i)
        return load(source, i)

    monkeypatch.setattr(FileSource, "load_tensor", counted)
    loader = loader_of(files, config)
    batches = take(loader, loader.batches_per_epoch - 1)
    loader.close()
    assert sorted(decoded[: 8 * len(batches)]) == sorted(i for batch in batches for i in batch.index.tolist())


def test_batch_larger_than_the_data_is_refused(backend: str, arrays: ArraySource) -> None:
    with pytest.raises(SourceError, match=r"batch_size: must be at most .* 48, got 49; use --batch-size 48"):
        loader_of(arrays, config_of(backend, VIEW1, batch_size=49))
    with pytest.raises(SourceError, match="on each of 3 shards, 16, got 17"):
        loader_of(arrays, config_of(backend, VIEW1, batch_size=17), num_shards=3)
    with pytest.raises(ValueError, match=r"shard_id must be 0\.\.1"):
        loader_of(arrays, config_of(backend, VIEW1), shard_id=2, num_shards=2)


def test_eval_batches_are_in_order_and_complete(decoder: Any, source: ImageSource) -> None:
    parts = list(eval_batches(source, Preprocessing(crop=24), 9, loader=decoder, threads=2))
    again = list(eval_batches(source, Preprocessing(crop=24), 9, loader=decoder, threads=1))
    assert torch.cat([index for _, index in parts]).tolist() == list(range(len(source)))
    assert [len(index) for _, index in parts][-1] == len(source) % 9
    for (images, _), (same_images, _) in zip(parts, again, strict=True):
        assert images.dtype == torch.uint8 and images.shape[1:] == (3, 24, 24)
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(images, same_images)


def test_eval_batches_resize_and_crop_the_center(decoder: Any, source: ImageSource) -> None:
    """Against PIL and torchvision: shorter side to 256 / 224 of the size (also upwards), then the center."""
    from PIL import Image
    from torchvision.transforms.functional import center_crop

    for size in (24, 112):
        target = round(size * 256 / 224)
        for images, index in eval_batches(source, Preprocessing(crop=size), 16, loader=decoder):
            for image, i in zip(pixels(images), index.tolist(), strict=True):
                original = source.load(i)
                scale = target / min(original.size)
                w, h = (int(side * scale + 1e-9) for side in original.size)
                expected = np.asarray(center_crop(original.resize((w, h), Image.Resampling.BICUBIC), size))
                assert error(image, expected).mean() <= (0.3 if decoder == "dali" else 0)


def test_eval_batches_keep_arrays_of_the_right_size(arrays: ArraySource) -> None:
    images = torch.cat([images for images, _ in eval_batches(arrays, Preprocessing(crop=64), 20)])
    assert np.array_equal(pixels(images), arrays.images)


def test_without_dali_threads_decode_with_one_warning(monkeypatch: Any, caplog: Any, files: Any) -> None:
    from byol_fast.data.loaders import backend as module

    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    module._warn_without_dali.cache_clear()
    gpu = torch.device("cuda")
    data = config_of("threaded", VIEW1).data
    assert [resolve_backend(data, files, gpu) for _ in range(2)] == [Backend("threaded", "kernels")] * 2
    assert not caplog.text
    auto = DataConfig()
    assert [resolve_backend(auto, files, gpu) for _ in range(2)] == [Backend("threaded", "kernels")] * 2
    assert caplog.text.count("pip install nvidia-dali-cuda130") == 1
    with pytest.raises(SourceError, match=r"data\.loader: dali is not installed; pip install"):
        resolve_decoder("dali", CPU)
    with pytest.raises(SourceError, match=r"data\.augment: dali is not installed; .* --data\.augment kernels"):
        resolve_backend(DataConfig(augment="dali"), files, CPU)


def test_loader_names(backend: str, arrays: ArraySource) -> None:
    names = {
        "dali": f"dali {CPU}",
        "dali+kernels": f"dali {CPU}, kernels",
        "threaded": "threaded, kernels",
        "device_cache": f"device_cache {CPU}",
    }
    assert loader_of(arrays, config_of(backend, VIEW1)).name == names[backend]


def test_automatic_loader(files: FileSource, arrays: ArraySource, monkeypatch: Any, dali: None) -> None:
    gpu = torch.device("cuda")
    small = types.SimpleNamespace(total_memory=9 * arrays.images.nbytes)
    large = types.SimpleNamespace(total_memory=11 * arrays.images.nbytes)

    def resolved(source: ImageSource, device: torch.device, memory: Any = large, **data: Any) -> tuple[str, str]:
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: memory)
        backend = resolve_backend(DataConfig(**data), source, device)
        return backend.loader, backend.augment

    assert resolved(files, CPU) == resolved(arrays, CPU) == ("threaded", "kernels")
    assert resolved(files, gpu) == resolved(arrays, gpu, small) == ("dali", "kernels")
    assert resolved(arrays, gpu) == resolved(arrays, CPU, loader="device_cache") == ("device_cache", "kernels")
    assert resolved(files, CPU, augment="dali") == resolved(arrays, gpu, augment="dali") == ("dali", "dali")
    assert resolved(arrays, gpu, loader="threaded") == ("threaded", "kernels")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"loader": "threaded", "augment": "dali"},
            r"must be auto or dali with .*, got 'threaded'; set --data.augment k",
        ),
        ({"loader": "device_cache", "augment": "dali"}, r"data\.loader must be auto or dali with data\.augment=dali"),
        ({"hw_decoder_load": 1.5}, r"data\.hw_decoder_load must be a number from 0 to 1, got 1.5"),
        ({"augment": "pil"}, r"data\.augment must be one of kernels, dali"),
    ],
)
def test_incompatible_options_are_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DataConfig(**data)


def test_device_cache_requires_arrays(files: FileSource) -> None:
    with pytest.raises(SourceError, match=r"data\.loader: device_cache must have images in memory, got 40 images"):
        loader_of(files, config_of("device_cache", VIEW1))


def test_loader_threads_use_one_core_and_do_not_change_others() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with single_core_threads(4, "test") as pool:
            assert torch.get_num_threads() == 3
            together = threading.Barrier(4)

            def threads_here() -> int:
                together.wait()
                return torch.get_num_threads()

            futures = [pool.submit(threads_here) for _ in range(4)]
            assert [future.result() for future in futures] == [1] * 4
            other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
            seen: list[int] = []
            other.start()
            other.join()
            assert seen == [3]
    finally:
        torch.set_num_threads(before)


def test_pil_decodes_without_torchvisions_decoder(files: FileSource, monkeypatch: Any) -> None:
    config = config_of("threaded", VIEW1, VIEW2)
    expected = take(loader_of(files, config), 2)
    monkeypatch.setattr("byol_fast.data.decode._decode_jpeg", None)
    assert all(same(a, b) for a, b in zip(expected, take(loader_of(files, config), 2), strict=True))
