"""Comparison of a run's views with torchvision's: every operator alone, then both views, with the same parameters."""

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
from byol_fast.data.augment_params import PROBABILITIES, AugmentParams, crop_windows, sample_params
from byol_fast.data.loaders.backend import resolve_backend
from byol_fast.data.sources import ArraySource, ImageSource
from byol_fast.data.sources.base import evenly_spaced

NUM_IMAGES = 64
PARTS = ("brightness", "contrast", "saturation", "hue")  # in the order of their numbers in `AugmentParams.order`

Pixels = NDArray[np.uint8]
Against = Literal["PIL", "tensors"]


class Levels(NamedTuple):
    """Absolute differences of pixels in levels of 255; as a limit, infinite where all is allowed."""

    max: float = math.inf
    p999: float = math.inf
    mean: float = math.inf

    def within(self, limit: Levels) -> bool:
        """True if none of the three is above its limit."""
        return all(mine <= largest for mine, largest in zip(self, limit, strict=True))

    def __str__(self) -> str:
        return " / ".join("-" if math.isinf(x) else f"{x:.3g}" for x in self)


# We round once; torchvision's tensors are rounded down after each part of the jitter, half a level on average, and its
# two random orders differ by 1.1. To leave out the clips between the parts costs 27 at the 99.9th percentile.
ROUNDED_DOWN = Levels(max=1, mean=0.5)
JITTER = Levels(p999=6, mean=1.9)
# At its border DALI repeats a crop's outermost pixels, where torchvision leaves out what lies beyond: up to 7 % of the
# weight, in a corner twice. Without antialiasing the mean error is 0.93, the largest 84.
CROP = Levels(max=36, mean=0.25)
VIEW = Levels(mean=JITTER.mean + CROP.mean)  # the largest errors are at the borders
LIMITS = {"crop": CROP, "flip": Levels(0, 0, 0), "solarize": Levels(0, 0, 0), "view 1": VIEW, "view 2": VIEW}
LIMITS |= {"jitter": JITTER, "brightness": ROUNDED_DOWN, "contrast": ROUNDED_DOWN, "saturation": ROUNDED_DOWN}
# torchvision scales the hue by 255.999 / 255 before it rounds down. PIL's luma has .299 and 16 bits, ours .2989. The
# blur is in float32 on both sides: roundings differ where a value lies between two levels.
LIMITS |= {"hue": Levels(1, mean=0.1), "grayscale": Levels(1, mean=0.03), "blur": Levels(1, mean=0.01)}
DESATURATION = Levels(max=2, mean=0.5)  # torchvision rounds down the gray, too, of which more than half is taken
BLUR_FLOAT16 = Levels(max=1, mean=0.25)  # our CUDA kernel's weights and middle values: up to 255 / 2^11 away
NVJPEG_MEAN = 1.9  # a GPU's decoder has another IDCT and another chroma upsampling: what is allowed for the jitter


def compare(
    source: ImageSource, config: Config, device: torch.device, *, num_images: int = NUM_IMAGES
) -> Iterator[tuple[str, Levels, Levels]]:
    """Compare the views of a run's loader with torchvision's, with the parameters of the first epoch.

    Operators that the run uses are compared one by one, at their strength and with probability 1, on center crops;
    crops and whole views on the images.

    Args:
        source: images, of which up to `num_images` are taken, evenly spaced.
        config: of it the views, the seed and `data` are used.
        device: where the views are made.
        num_images: largest number of images.

    Yields:
        Name, error and limit.

    Raises:
        CorruptImageError: an image cannot be read, and `DataConfig.on_corrupt` is "raise"; or too many cannot.
    """
    backend = resolve_backend(config.data, source, device)
    data = replace(config.data, loader=backend.loader, augment=backend.augment, prefetch=1)
    source = source.subset(evenly_spaced(len(source), num_images))
    middles = eval_batches(
        source, config.view1.size, 64, interpolation=config.view1.interpolation, on_corrupt=config.data.on_corrupt
    )
    squares = ArraySource(torch.cat([images for images, _ in middles]).permute(0, 2, 3, 1).numpy())
    # torchvision's PIL rounds between the two passes of a resize as our crops on a CPU do; its float tensors do not.
    rounds_twice = backend.loader == "threaded" or (backend.loader == "device_cache" and device.type == "cpu")
    crop: Against = "PIL" if rounds_twice else "tensors"
    for name, number, views in _cases(config.view1, config.view2):
        whole, limit = name in {"crop", "view 1", "view 2"}, LIMITS[name]
        images = source if whole else squares
        changed = replace(config, data=data, batch_size=len(images), view1=views[0], view2=views[1])
        loader = make_loader(images, changed, device=device)
        batch = next(loader)
        loader.close()
        ours = batch.views[number].permute(0, 2, 3, 1).cpu().numpy()
        inputs = [images.load(i) for i in batch.index.tolist()]
        params = sample_params(views[number], batch.index.numpy(), seed=config.seed, epoch=0, view=number)
        reference = torchvision_views(inputs, params, views[number], crop=crop, colors="tensors")
        error = differences(ours, reference)
        if name == "grayscale":
            error = differences(ours, torchvision_views(inputs, params, views[number]))
        elif name == "saturation" and views[0].saturation > 0.5:
            limit = DESATURATION
        elif name == "blur" and device.type == "cuda" and backend.augment == "kernels":
            limit = BLUR_FLOAT16
        elif name == "jitter":  # where torchvision's PIL and tensors differ by more, that much is allowed
            own = differences(torchvision_views(inputs, params, views[number]), reference)
            limit = limit._replace(p999=max(limit.p999, own.p999))
        if whole and backend.loader == "dali" and device.type == "cuda" and not isinstance(source, ArraySource):
            limit = Levels(mean=limit.mean + NVJPEG_MEAN)
        yield name, error, limit


def _cases(view1: ViewConfig, view2: ViewConfig) -> Iterator[tuple[str, int, tuple[ViewConfig, ViewConfig]]]:
    """Name, number of the view that is compared, and both views."""
    off: dict[str, Any] = dict.fromkeys(PROBABILITIES.values(), 0.0)
    crop = replace(view1, **off)
    yield "crop", 0, (crop, crop)
    for name, probability in PROBABILITIES.items():
        view = max((view1, view2), key=lambda view: float(getattr(view, probability)))
        if getattr(view, probability) == 0:
            continue
        alone = replace(view, **off | {probability: 1.0, "scale": (1.0, 1.0), "ratio": (1.0, 1.0)})
        parts = [part for part in PARTS if getattr(view, part) > 0] if name == "jitter" else []
        for part in parts:
            others: dict[str, Any] = dict.fromkeys((other for other in parts if other != part), 0.0)
            only = replace(alone, **others)
            yield part, 0, (only, only)
        if parts or name != "jitter":
            yield name, 0, (alone, alone)
    yield "view 1", 0, (view1, view2)
    yield "view 2", 1, (view1, view2)


def torchvision_views(
    images: list[Image.Image], d: AugmentParams, view: ViewConfig, *, crop: Against = "PIL", colors: Against = "PIL"
) -> Pixels:
    """Views `[B, S, S, 3]` of B RGB images as torchvision's own functions make them, in its order.

    Args:
        images: B images.
        d: augmentation parameters of the images.
        view: the configuration that the parameters were drawn for.
        crop: crop a PIL image, or a tensor in floating point.
        colors: apply all that follows to PIL images, or to uint8 tensors, where colors are rounded down.
    """
    made, how = [], F.InterpolationMode(view.interpolation)
    for i, image in enumerate(images):
        x: Any = F.pil_to_tensor(image).float() if crop == "tensors" else image
        top, left, h, w = crop_windows(d.crop[i : i + 1], image.height, image.width, view.ratio)[0].tolist()
        x = F.resized_crop(x, top, left, h, w, [view.size, view.size], interpolation=how, antialias=True)
        if crop == "tensors":
            x = F.to_pil_image(x.round().clamp(0, 255).to(torch.uint8))
        x = F.pil_to_tensor(x) if colors == "tensors" else x
        x = F.horizontal_flip(x) if d.flip[i] else x
        for part in d.order[i].tolist() if d.jitter[i] else ():
            if getattr(view, PARTS[part]) > 0:  # ColorJitter leaves a part out that has no range
                x = getattr(F, f"adjust_{PARTS[part]}")(x, float(d.factors[i, part]))
        x = F.rgb_to_grayscale(x, 3) if d.grayscale[i] else x
        if d.blur[i]:
            window = min(int(d.window[i]), 2 * view.size - 1)
            x = F.gaussian_blur(x, [window, window], [float(d.sigma[i])] * 2)
        x = F.solarize(x, view.solarize_threshold) if d.solarize[i] else x
        made.append(np.asarray(x) if isinstance(x, Image.Image) else x.permute(1, 2, 0).numpy())
    return np.stack(made)


def differences(ours: Pixels, theirs: Pixels) -> Levels:
    """Largest, 99.9th percentile and mean of the absolute differences of pixels."""
    counts = np.bincount(np.abs(ours.astype(np.int16) - theirs).ravel(), minlength=256)
    share = counts.cumsum() / counts.sum()
    mean = counts @ np.arange(256) / counts.sum()
    return Levels(max=float(np.flatnonzero(counts)[-1]), p999=float((share < 0.999).sum()), mean=float(mean))
