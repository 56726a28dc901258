"""Comparison of a run's views with torchvision's: each operator alone, then whole views, with the same parameters.

The reference is torchvision in float64, which rounds nowhere. With each value goes the largest error that rounding to
whole levels may cause there: it follows from the image and the parameters, and is no number that was measured on some
photographs. A correct loader is therefore within the bounds for all images.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from byol_fast.config import Config, Preprocessing, ViewConfig
from byol_fast.data import eval_batches, make_loader
from byol_fast.data.augment_params import PROBABILITIES, AugmentParams, crop_box, sample_augment_params
from byol_fast.data.loaders.backend import resolve_backend
from byol_fast.data.sources import ArraySource, ImageSource
from byol_fast.data.sources.base import evenly_spaced
from byol_kernels.photometric.params import ADJUSTMENTS, BRIGHTNESS, CONTRAST, HUE

NUM_IMAGES = 64

Pixels = NDArray[np.uint8]
Crop = Literal["rounded twice", "rounded once", "repeated border"]

ROUNDING = 0.5
FLOAT32 = 0.01
"""Error of float32 arithmetic in levels of 255, with a margin: a few units in the last place of 255, 1.5e-5."""
LUMA = 0.03
"""Difference between the weights of red in torchvision's gray image, .2989, and in the standard's, .299, for 255."""
HUE_GAIN = 3.0
"""Largest error of a hue shift for an error of 1 in each channel: its middle value is a m + b v +- x for the smallest,
largest and middle value of a pixel, with |a| + |b| <= 2."""
CUBIC_GAIN = 1.25
"""Largest sum of the absolute weights of a cubic filter, midway between two pixels: 2 (9 + 1) / 16."""
FIXED_POINT = 0.1
"""Error of the 16-bit weights of PyTorch's resize of bytes, of both passes."""
FILTER_TABLE = 0.5
"""Error of the table of 129 values in which DALI looks up its filter: 0.16 in each pass, more where it overshoots."""
BLUR_FLOAT16 = 3 * 255 / 2**11
"""Error of the weights and intermediate values of our CUDA kernel, float16."""
NVJPEG_MEAN = 1.9
"""Mean error of a GPU's JPEG decoder, which has another IDCT and chroma upsampling: a limit that was measured."""


class Comparison(NamedTuple):
    """Errors of an operator or a view, in levels of 255."""

    name: str
    """Name of the operator, or `view 1`, `view 2`; `view 3` is the first local one."""
    largest: float
    """Largest error."""
    mean: float
    """Mean error."""
    bound: float
    """Largest error that rounding explains, over all pixels."""
    num_wrong: int
    """Number of values whose error is above the bound at their pixel."""
    ok: bool
    """True if there are none; for JPEGs that a GPU decodes, if the mean error is small enough."""

    def __str__(self) -> str:
        wrong = "" if self.ok else f" ({self.num_wrong:,} values are wrong)"
        error = f"{self.largest:.3g} / {self.mean:.3g}"
        return f"{self.name:12s} {error:16s} at most {self.bound:<6.3g} {'OK' if self.ok else 'FAIL'}{wrong}"


def compare(
    source: ImageSource, config: Config, device: torch.device, *, num_images: int = NUM_IMAGES
) -> Iterator[Comparison]:
    """Compare the views of a run's loader with torchvision's, with the augmentation parameters of the first epoch.

    Operators of the run are compared one by one on center crops, with probability 1 and the strength of the run; crops
    and whole views are compared on the images.

    Args:
        source: images; up to `num_images` of them, evenly spaced, are used.
        config: of it the views, the seed and `data` are used.
        device: where the views are computed.
        num_images: largest number of images.

    Raises:
        CorruptImageError: an image cannot be read, and `DataConfig.on_corrupt` is "raise"; or too many cannot.
    """
    backend = resolve_backend(config.data, source, device)
    data = replace(config.data, loader=backend.loader, augment=backend.augment, prefetch=1)
    source = source.subset(evenly_spaced(len(source), num_images))
    center_crops = eval_batches(source, Preprocessing.of_config(config), 64, on_corrupt=config.data.on_corrupt)
    squares = ArraySource(torch.cat([images for images, _ in center_crops]).permute(0, 2, 3, 1).numpy())
    crop: Crop = "rounded once"
    if backend.loader == "threaded" or (backend.loader == "device_cache" and device.type == "cpu"):
        crop = "rounded twice"  # between the two passes of the resize
    elif backend.loader == "dali":
        crop = "repeated border"
    blur_error = BLUR_FLOAT16 if device.type == "cuda" and backend.augment == "kernels" else FLOAT32
    for name, views in _cases(config.view_configs):
        view, number = views[-1], len(views) - 1
        whole = name == "crop" or name.startswith("view ")
        images = source if whole else squares
        loader = make_loader(images, replace(config, data=data, batch_size=len(images)), views, device=device)
        batch = next(loader)
        loader.close()
        ours = batch.views[number].cpu().double()
        params = sample_augment_params(view, batch.index.numpy(), seed=config.seed, epoch=0, view=number)
        error, bound = torch.empty_like(ours), torch.empty_like(ours)
        for row, i in enumerate(batch.index.tolist()):
            expected, bound[row] = reference_view(
                images.load(i), params, row, view, crop=crop, rounds=backend.augment == "dali", blur_error=blur_error
            )
            error[row] = (ours[row] - expected).abs()
        num_wrong, mean = int((error > bound).sum()), float(error.mean())
        decoded_by_gpu = whole and backend.loader == "dali" and device.type == "cuda"
        if decoded_by_gpu and not isinstance(source, ArraySource):
            ok = mean <= float(bound.mean()) + NVJPEG_MEAN
        else:
            ok = num_wrong == 0
        yield Comparison(name, float(error.max()), mean, float(bound.max()), num_wrong, ok)


def _cases(views: tuple[ViewConfig, ...]) -> Iterator[tuple[str, tuple[ViewConfig, ...]]]:
    """Name and views to load, of which the last is compared."""
    off: dict[str, Any] = dict.fromkeys(PROBABILITIES.values(), 0.0)
    yield "crop", (replace(views[0], **off),)
    for name, probability in PROBABILITIES.items():
        view = max(views, key=lambda view: float(getattr(view, probability)))
        if getattr(view, probability) == 0:
            continue
        alone = replace(view, **off | {probability: 1.0, "scale": (1.0, 1.0), "ratio": (1.0, 1.0)})
        adjustments = [a for a in ADJUSTMENTS if getattr(view, a) > 0] if name == "jitter" else []
        for adjustment in adjustments:
            others: dict[str, Any] = dict.fromkeys((other for other in adjustments if other != adjustment), 0.0)
            yield adjustment, (replace(alone, **others),)
        if adjustments or name != "jitter":
            yield name, (alone,)
    for number in range(1, len(views[:3]) + 1):  # of the local views one, they have the same configuration
        yield f"view {number}", views[:number]


def reference_view(
    image: Image.Image,
    params: AugmentParams,
    row: int,
    view: ViewConfig,
    *,
    crop: Crop = "rounded once",
    rounds: bool = False,
    blur_error: float = FLOAT32,
) -> tuple[Tensor, Tensor]:
    """One view by torchvision's functions in float64, in the order of its transforms, and its largest errors.

    Args:
        image: RGB image.
        params: augmentation parameters of a batch.
        row: position of the image in the batch.
        view: configuration of the view that the parameters were sampled for.
        crop: the way in which the loader rounds the crop, and continues it beyond its border.
        rounds: the loader rounds to whole levels after each operator, not once.
        blur_error: error of the arithmetic of the blur.

    Returns:
        Values from 0 to 255, and bounds of the errors of whole levels that a correct loader returns, `[3, S, S]` each.
    """
    box = crop_box(params.crop_candidates[row], image.height, image.width, view.ratio)
    x, bound = _resized_crop(F.pil_to_tensor(image).double(), box, view, crop)
    if params.flip[row]:
        x, bound = F.horizontal_flip(x), F.horizontal_flip(bound)
    rounding, is_rounded = ROUNDING * rounds + FLOAT32, True
    for number in params.order[row].tolist() if params.jitter[row] else ():
        if getattr(view, ADJUSTMENTS[number]) > 0:  # ColorJitter leaves out an adjustment without a range
            x, bound = _adjust(x, bound, number, float(params.factors[row, number]), rounds)
            bound, is_rounded = bound + rounding, rounds
    if params.grayscale[row]:
        x, bound = _gray(x).expand(3, -1, -1), _gray(bound).expand(3, -1, -1) + LUMA + rounding
        is_rounded = rounds
    if params.blur[row]:
        blur = int(params.kernel_size[row]), float(params.sigma[row])
        before = 0.0 if is_rounded else ROUNDING  # our kernels round what they blur
        x, bound = _blur(x, *blur), _blur(bound + before, *blur) + blur_error + rounding
        is_rounded = rounds
    if params.solarize[row]:
        # A value that rounds up to the threshold reaches it. Next to it, either side may be right.
        limit, inverse = view.solarize_threshold - 0.5, 255 - x
        bound = torch.where((x - limit).abs() <= bound, bound + (inverse - x).abs(), bound)
        x = torch.where(x >= limit, inverse, x)
    return x, bound if is_rounded else bound + ROUNDING


def _resized_crop(x: Tensor, box: tuple[int, int, int, int], view: ViewConfig, crop: Crop) -> tuple[Tensor, Tensor]:
    """Crop and resize values `[3, H, W]`, first the columns, then the rows."""
    x = F.crop(x, *box)
    gain, error = (CUBIC_GAIN if view.interpolation == "bicubic" else 1.0), 0.0
    for dim in (2, 1):
        if x.shape[dim] == view.size:
            continue
        size, repeats = list(x.shape[1:]), 1
        if crop == "repeated border":  # the size on both sides, so that the scale stays the same
            pad = [0, 0, size[1], size[1]] if dim == 2 else [size[0], size[0], 0, 0]
            x, repeats = torch.nn.functional.pad(x[None], pad[2:] + pad[:2], mode="replicate")[0], 3
            size = list(x.shape[1:])
        size[dim - 1] = repeats * view.size
        x = F.resize(x, size, F.InterpolationMode(view.interpolation), antialias=True)
        x = x.narrow(dim, (repeats // 2) * view.size, view.size)
        if crop == "rounded twice":
            x, error = x.clamp(0, 255), gain * error + ROUNDING + FIXED_POINT / 2
        else:
            error = ROUNDING + (FILTER_TABLE if crop == "repeated border" else FLOAT32)
    return x.clamp(0, 255), torch.full_like(x, error)


def _adjust(x: Tensor, bound: Tensor, number: int, factor: float, rounds: bool) -> tuple[Tensor, Tensor]:
    """Apply an adjustment of the jitter."""
    result: Tensor = getattr(F, f"adjust_{ADJUSTMENTS[number]}")(x / 255, factor) * 255
    if number == HUE:
        return result, HUE_GAIN * bound.amax(0, keepdim=True).expand_as(bound)
    if number == BRIGHTNESS:
        return result, factor * bound
    gray = _gray(bound) + (ROUNDING + LUMA if rounds else 0.0)
    if number == CONTRAST:
        gray = gray.mean() + (ROUNDING if rounds else 0.0)
    return result, factor * bound + abs(1 - factor) * gray


def _blur(x: Tensor, kernel_size: int, sigma: float) -> Tensor:
    """Blur the columns, then the rows, which is 40 times as fast as torchvision's blur of both at once."""
    radius, size = kernel_size // 2, x.shape[1]
    # torchvision refuses kernels that reach beyond the mirrored image; it is then mirrored again.
    index = torch.from_numpy(np.pad(np.arange(size), radius, mode="reflect"))
    for dim, kernel in ((1, [1, kernel_size]), (2, [kernel_size, 1])):
        x = F.gaussian_blur(x.index_select(dim, index), kernel, [sigma, sigma]).narrow(dim, radius, size)
    return x


def _gray(x: Tensor) -> Tensor:
    gray: Tensor = F.rgb_to_grayscale(x, 1)
    return gray
