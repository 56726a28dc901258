"""Comparison of a run's views with torchvision's: each operator alone, then whole views, with the same parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms.v2 import functional as F

from byol_fast.config import Config, ViewConfig
from byol_fast.data import eval_batches, make_loader
from byol_fast.data.augment_params import PROBABILITIES, AugmentParams, crop_box, sample_augment_params
from byol_fast.data.loaders.backend import resolve_backend
from byol_fast.data.sources import ArraySource, ImageSource
from byol_fast.data.sources.base import evenly_spaced
from byol_kernels.photometric.params import ADJUSTMENTS

NUM_IMAGES = 64

Pixels = NDArray[np.uint8]
Against = Literal["PIL", "tensors"]


class Levels(NamedTuple):
    """Absolute differences of pixels in levels of 255; an infinite limit allows any."""

    max: float = math.inf
    p999: float = math.inf
    mean: float = math.inf

    def within(self, limit: Levels) -> bool:
        """True if none of the three is above its limit."""
        return all(value <= largest for value, largest in zip(self, limit, strict=True))

    def __str__(self) -> str:
        return " / ".join("-" if math.isinf(x) else f"{x:.3g}" for x in self)


# We round once; torchvision's tensors are rounded down after each adjustment, by half a level on average. Two random
# orders of torchvision's jitter differ by 1.1. Without the clipping between adjustments the 99.9th percentile is 27.
ROUNDED_DOWN = Levels(max=1, mean=0.5)
JITTER = Levels(p999=6, mean=1.9)
# At the border of a crop DALI repeats the outermost pixels, where torchvision leaves out the filter's weights beyond
# it: up to 7 % of them, in a corner twice. Without antialiasing the mean error is 0.93, the largest 84.
CROP = Levels(max=36, mean=0.25)
VIEW = Levels(mean=JITTER.mean + CROP.mean)  # the largest errors are at the borders
LIMITS = {"crop": CROP, "flip": Levels(0, 0, 0), "solarize": Levels(0, 0, 0), "view 1": VIEW, "view 2": VIEW}
LIMITS |= {"jitter": JITTER, "brightness": ROUNDED_DOWN, "contrast": ROUNDED_DOWN, "saturation": ROUNDED_DOWN}
# torchvision scales the hue by 255.999 / 255 before it rounds down. PIL's luma has a weight of .299 and 16 bits, ours
# .2989. Both compute the blur in float32: values halfway between two levels may be rounded differently.
LIMITS |= {"hue": Levels(1, mean=0.1), "grayscale": Levels(1, mean=0.03), "blur": Levels(1, mean=0.01)}
DESATURATION = Levels(
    max=2, mean=0.5
)  # torchvision also rounds down the gray image, which has more than half of the weight
BLUR_FLOAT16 = Levels(max=1, mean=0.25)  # weights and intermediate values of our CUDA kernel: errors up to 255 / 2^11
NVJPEG_MEAN = 1.9  # a GPU's decoder has another IDCT and chroma upsampling; the same limit as for the jitter


def compare(
    source: ImageSource, config: Config, device: torch.device, *, num_images: int = NUM_IMAGES
) -> Iterator[tuple[str, Levels, Levels]]:
    """Compare the views of a run's loader with torchvision's, with the augmentation parameters of the first epoch.

    Operators of the run are compared one by one on center crops, with probability 1 and the strength of the run; crops
    and whole views are compared on the images.

    Args:
        source: images; up to `num_images` of them, evenly spaced, are used.
        config: of it the views, the seed and `data` are used.
        device: where the views are computed.
        num_images: largest number of images.

    Yields:
        Name, error and limit.

    Raises:
        CorruptImageError: an image cannot be read, and `DataConfig.on_corrupt` is "raise"; or too many cannot.
    """
    backend = resolve_backend(config.data, source, device)
    data = replace(config.data, loader=backend.loader, augment=backend.augment, prefetch=1)
    source = source.subset(evenly_spaced(len(source), num_images))
    center_crops = eval_batches(
        source, config.view1.size, 64, interpolation=config.view1.interpolation, on_corrupt=config.data.on_corrupt
    )
    squares = ArraySource(torch.cat([images for images, _ in center_crops]).permute(0, 2, 3, 1).numpy())
    # PIL rounds between the two passes of a resize, as our crops on a CPU do; torchvision's float tensors do not.
    rounds_twice = backend.loader == "threaded" or (backend.loader == "device_cache" and device.type == "cpu")
    crop: Against = "PIL" if rounds_twice else "tensors"
    for name, views in _cases(config.view1, config.view2):
        view, number = views[-1], len(views) - 1
        whole, limit = name in {"crop", "view 1", "view 2"}, LIMITS[name]
        images = source if whole else squares
        loader = make_loader(images, replace(config, data=data, batch_size=len(images)), views, device=device)
        batch = next(loader)
        loader.close()
        ours = batch.views[number].permute(0, 2, 3, 1).cpu().numpy()
        inputs = [images.load(i) for i in batch.index.tolist()]
        params = sample_augment_params(view, batch.index.numpy(), seed=config.seed, epoch=0, view=number)
        reference = torchvision_views(inputs, params, view, crop=crop, colors="tensors")
        error = differences(ours, reference)
        if name == "grayscale":
            error = differences(ours, torchvision_views(inputs, params, view))
        elif name == "saturation" and view.saturation > 0.5:
            limit = DESATURATION
        elif name == "blur" and device.type == "cuda" and backend.augment == "kernels":
            limit = BLUR_FLOAT16
        elif name == "jitter":  # if torchvision's own PIL and tensor operators differ by more, that is the limit
            between_torchvisions = differences(torchvision_views(inputs, params, view), reference)
            limit = limit._replace(p999=max(limit.p999, between_torchvisions.p999))
        if whole and backend.loader == "dali" and device.type == "cuda" and not isinstance(source, ArraySource):
            limit = Levels(mean=limit.mean + NVJPEG_MEAN)
        yield name, error, limit


def _cases(view1: ViewConfig, view2: ViewConfig) -> Iterator[tuple[str, tuple[ViewConfig, ...]]]:
    """Name and views to load, of which the last is compared."""
    off: dict[str, Any] = dict.fromkeys(PROBABILITIES.values(), 0.0)
    yield "crop", (replace(view1, **off),)
    for name, probability in PROBABILITIES.items():
        view = max((view1, view2), key=lambda view: float(getattr(view, probability)))
        if getattr(view, probability) == 0:
            continue
        alone = replace(view, **off | {probability: 1.0, "scale": (1.0, 1.0), "ratio": (1.0, 1.0)})
        adjustments = [a for a in ADJUSTMENTS if getattr(view, a) > 0] if name == "jitter" else []
        for adjustment in adjustments:
            others: dict[str, Any] = dict.fromkeys((other for other in adjustments if other != adjustment), 0.0)
            yield adjustment, (replace(alone, **others),)
        if adjustments or name != "jitter":
            yield name, (alone,)
    yield "view 1", (view1,)
    yield "view 2", (view1, view2)


def torchvision_views(
    images: list[Image.Image],
    params: AugmentParams,
    view: ViewConfig,
    *,
    crop: Against = "PIL",
    colors: Against = "PIL",
) -> Pixels:
    """Views `[B, S, S, 3]` of B RGB images by torchvision's functions, in the order of its transforms.

    Args:
        images: B images.
        params: augmentation parameters of the images.
        view: configuration of the view that the parameters were sampled for.
        crop: crop PIL images, or floating-point tensors.
        colors: apply the other operators to PIL images, or to uint8 tensors, where colors are rounded down.
    """
    views, interpolation = [], F.InterpolationMode(view.interpolation)
    for i, image in enumerate(images):
        x: Any = F.pil_to_tensor(image).float() if crop == "tensors" else image
        box = crop_box(params.crop_candidates[i], image.height, image.width, view.ratio)
        x = F.resized_crop(x, *box, [view.size, view.size], interpolation=interpolation, antialias=True)
        if crop == "tensors":
            x = F.to_pil_image(x.round().clamp(0, 255).to(torch.uint8))
        x = F.pil_to_tensor(x) if colors == "tensors" else x
        x = F.horizontal_flip(x) if params.flip[i] else x
        for number in params.order[i].tolist() if params.jitter[i] else ():
            if getattr(view, ADJUSTMENTS[number]) > 0:  # ColorJitter leaves out an adjustment without a range
                x = getattr(F, f"adjust_{ADJUSTMENTS[number]}")(x, float(params.factors[i, number]))
        x = F.rgb_to_grayscale(x, 3) if params.grayscale[i] else x
        if params.blur[i]:
            kernel_size = min(int(params.kernel_size[i]), 2 * view.size - 1)
            x = F.gaussian_blur(x, [kernel_size] * 2, [float(params.sigma[i])] * 2)
        x = F.solarize(x, view.solarize_threshold) if params.solarize[i] else x
        views.append(np.asarray(x) if isinstance(x, Image.Image) else x.permute(1, 2, 0).numpy())
    return np.stack(views)


def differences(ours: Pixels, theirs: Pixels) -> Levels:
    """Largest, 99.9th percentile and mean of the absolute differences of pixels."""
    counts = np.bincount(np.abs(ours.astype(np.int16) - theirs).ravel(), minlength=256)
    share = counts.cumsum() / counts.sum()
    mean = counts @ np.arange(256) / counts.sum()
    return Levels(max=float(np.flatnonzero(counts)[-1]), p999=float((share < 0.999).sum()), mean=float(mean))
