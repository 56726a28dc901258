"""Every operator alone, and the whole view, against torchvision with the same drawn parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms.v2 import functional as F

from byol_fast.config import ViewConfig
from byol_fast.data.loader import Planner, make_loader
from byol_fast.data.sources import ArraySource, FileSource, ImageSource, open_source
from byol_fast.data.views import BRIGHTNESS, CONTRAST, HUE, SATURATION, ViewDraws, crop_windows
from tests.data.helpers import config_of, error, loader_of, pixels, plain

JITTER = {BRIGHTNESS: F.adjust_brightness, CONTRAST: F.adjust_contrast, SATURATION: F.adjust_saturation}
Reference = Callable[[Image.Image, ViewDraws, int], Image.Image | NDArray[Any]]


def chw(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def part(which: int) -> Reference:
    return lambda image, d, i: JITTER[which](image, float(d.factors[i, which]))


def hue_of_tensor(image: Image.Image, d: ViewDraws, i: int) -> NDArray[Any]:
    array: NDArray[Any] = F.adjust_hue(chw(image), float(d.factors[i, HUE])).permute(1, 2, 0).numpy()
    return array


def hue_of_pil(image: Image.Image, d: ViewDraws, i: int) -> Image.Image:
    """Keeps the hue in 8 bits, unlike the tensors' (mean difference 0.3 of 255)."""
    shifted: Image.Image = F.adjust_hue(image, float(d.factors[i, HUE]))
    return shifted


def whole_jitter(image: Image.Image, d: ViewDraws, i: int) -> Image.Image:
    for which in d.order[i]:
        adjust = F.adjust_hue if which == HUE else JITTER[int(which)]
        image = adjust(image, float(d.factors[i, which]))
    return image


def gaussian(kernel: int) -> Reference:
    def reference(image: Image.Image, d: ViewDraws, i: int) -> NDArray[Any]:
        sigma = float(d.sigma[i])
        array: NDArray[Any] = F.gaussian_blur(chw(image), [kernel, kernel], [sigma, sigma]).permute(1, 2, 0).numpy()
        return array

    return reference


# Operator: how to switch it on, what it should do, and the largest and mean error of DALI in levels of 255. One level
# is the difference between rounding and truncating, which is what torchvision does; half a level its mean. PIL's luma
# has 16-bit weights: it is off by at most 3 * 255 / 2**17 = 0.006 before rounding.
OPERATORS: dict[str, tuple[dict[str, Any], Reference, float, float]] = {
    "nothing": ({}, lambda image, d, i: image, 0, 0),
    "flip": ({"flip": 1.0}, lambda image, d, i: F.horizontal_flip(image), 0, 0),
    "brightness": ({"jitter": 1.0, "contrast": 0, "saturation": 0, "hue": 0}, part(BRIGHTNESS), 1, 0.5),
    "contrast": ({"jitter": 1.0, "brightness": 0, "saturation": 0, "hue": 0}, part(CONTRAST), 1, 0.5),
    "saturation": ({"jitter": 1.0, "brightness": 0, "contrast": 0, "hue": 0}, part(SATURATION), 1, 0.5),
    "hue": ({"jitter": 1.0, "brightness": 0, "contrast": 0, "saturation": 0, "hue": 0.5}, hue_of_tensor, 1, 0.1),
    "grayscale": ({"grayscale": 1.0}, lambda image, d, i: F.rgb_to_grayscale(image, 3), 1, 0.006),
    "blur 23": ({"blur": 1.0, "blur_kernel": 23}, gaussian(23), 1, 0.01),
    "blur 3": ({"blur": 1.0, "blur_kernel": 3}, gaussian(3), 1, 0.01),
    "solarize": ({"solarize": 1.0}, lambda image, d, i: F.solarize(image, 128), 0, 0),
    "solarize 64": (
        {"solarize": 1.0, "solarize_threshold": 64},
        lambda image, d, i: F.solarize(image, 64),
        0,
        0,
    ),
}


def draws_of(source: ImageSource, view: ViewConfig, batch_size: int) -> tuple[NDArray[np.int64], ViewDraws]:
    plan = Planner(len(source), (view, view), batch_size=batch_size, seed=0)(0)
    return plan.index, plan.draws[0]


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_alone(name: str, backend: str, arrays: ArraySource) -> None:
    changes, reference, worst, mean = OPERATORS[name]
    view = plain(64, **changes)
    batch = next(loader_of(arrays, config_of(backend, view, batch_size=48)))
    index, draws = draws_of(arrays, view, 48)
    assert np.array_equal(index, batch.index)
    if backend == "torchvision" and not name.startswith("blur"):
        worst = mean = 0  # the same functions of PIL
        reference = hue_of_pil if name == "hue" else reference
    expected = np.stack([np.asarray(reference(arrays.load(int(k)), draws, i)) for i, k in enumerate(index)])
    difference = error(pixels(batch.view1), expected)
    assert difference.max() <= worst
    assert difference.mean() <= mean


def test_crop_matches_a_resize_in_floating_point(backend: str, arrays: ArraySource) -> None:
    """Same window, same antialiased cubic filter; PIL rounds and clips between its two passes, DALI does not."""
    view = plain(48, area=(0.08, 1.0), aspect=(3 / 4, 4 / 3))
    batch = next(loader_of(arrays, config_of(backend, view, batch_size=48)))
    index, draws = draws_of(arrays, view, 48)
    expected = []
    for k, (top, left, h, w) in zip(index, crop_windows(draws.crop, 64, 64, view.aspect), strict=True):
        crop = chw(arrays.load(int(k))).double()[None, :, top : top + h, left : left + w]
        resized = torch.nn.functional.interpolate(crop, (48, 48), mode="bicubic", antialias=True, align_corners=False)
        expected.append(resized[0].permute(1, 2, 0).clamp(0, 255).round().numpy())
    difference = error(pixels(batch.view1), np.stack(expected))
    assert difference.mean() <= (0.05 if backend == "dali" else 0.25)
    assert np.quantile(difference, 0.999) <= 1
    assert difference.max() <= 2 or backend == "torchvision"  # DALI looks its filter up in a table


def test_whole_jitter(arrays: ArraySource, dali: None) -> None:
    view = plain(64, jitter=1.0)
    batch = next(loader_of(arrays, config_of("dali", view, batch_size=48)))
    index, draws = draws_of(arrays, view, 48)
    expected = np.stack([np.asarray(whole_jitter(arrays.load(int(k)), draws, i)) for i, k in enumerate(index)])
    assert error(pixels(batch.view1), expected).mean() <= 1.9


@pytest.mark.parametrize("color", ["exact", "hsv"])
def test_whole_view_on_photographs(color: Any, photographs: FileSource, dali: None) -> None:
    """Decode, crop, flip and jitter: DALI and PIL from the same files and draws."""
    view = ViewConfig(size=112, jitter=1.0, grayscale=0.0, blur=0.0)
    ours, theirs = (
        next(loader_of(photographs, config_of(b, view, batch_size=64, color=color))) for b in ("dali", "torchvision")
    )
    assert torch.equal(ours.index, theirs.index)
    assert error(pixels(ours.view1), pixels(theirs.view1)).mean() <= 1.9


def test_crops_agree_for_all_shapes_of_files(tmp_path: Any, dali: None) -> None:
    """The window is computed in DALI's graph for files and in Python otherwise; gradients show a shift by a pixel."""
    shapes = [(1, 1), (2, 300), (300, 2), (37, 64), (64, 37), (90, 90), (17, 100), (128, 40)]
    for n, (h, w) in enumerate(shapes * 8):
        y, x = np.mgrid[0:h, 0:w]
        ramp = np.stack([x * 255 / max(w - 1, 1), y * 255 / max(h - 1, 1), (x + y) * 255 / max(h + w - 2, 1)], axis=2)
        Image.fromarray(ramp.round().astype(np.uint8)).save(tmp_path / f"{n:03}.png")
    source = open_source(tmp_path)
    view = plain(24, area=(0.08, 1.0), aspect=(3 / 4, 4 / 3), flip=0.5, interpolation="bilinear")
    ours, theirs = (next(loader_of(source, config_of(b, view, batch_size=64))) for b in ("dali", "torchvision"))
    difference = error(pixels(ours.view1), pixels(theirs.view1))
    assert difference.max() <= 1


def test_both_loaders_make_the_same_views(arrays: ArraySource, dali: None) -> None:
    view1, view2 = ViewConfig(size=32), ViewConfig(size=32, blur=0.1, solarize=0.5)
    ours, theirs = (next(loader_of(arrays, config_of(b, view1, view2, batch_size=48))) for b in ("dali", "torchvision"))
    assert torch.equal(ours.index, theirs.index)
    for a, b in ((ours.view1, theirs.view1), (ours.view2, theirs.view2)):
        difference = error(pixels(a), pixels(b)).mean(axis=(1, 2, 3))
        assert difference.mean() <= 1.9
        assert np.median(difference) <= 1.9


@pytest.mark.gpu
@pytest.mark.parametrize("color", ["exact", "hsv"])
def test_the_graph_on_a_gpu_makes_what_it_makes_on_the_cpu(color: Any, files: FileSource, dali: None) -> None:
    """Not bit for bit: the decoders and the resize round differently."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    config = config_of("dali", ViewConfig(size=32), ViewConfig(size=32, solarize=0.5), batch_size=20, color=color)
    loaders = [make_loader(files, config, device=torch.device(kind)) for kind in ("cpu", "cuda")]
    for _ in range(4):  # two epochs
        cpu, gpu = (next(loader) for loader in loaders)
        assert torch.equal(cpu.index, gpu.index) and not gpu.index.is_cuda
        for a, b in ((cpu.view1, gpu.view1), (cpu.view2, gpu.view2)):
            assert b.is_cuda and b.is_contiguous(memory_format=torch.channels_last)
            assert np.median(error(pixels(a), pixels(b.cpu())).mean(axis=(1, 2, 3))) <= 1.9
