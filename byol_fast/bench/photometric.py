"""Colour and blur beside torchvision, kornia and, on a CPU, PIL and DALI.

Every contender gets the same images and the same drawn parameters (BYOL's: jitter .4 .4 .2 .1 with probability .8,
grayscale .2, sigma .1 to 2), so nobody's random numbers are timed. Agreement is checked before anything is timed.
Peers come with `pip install byol_fast[peers]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import repeat
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms import functional as F1
from torchvision.transforms.v2 import functional as F

from byol_fast.bench.counting import Case, Suite, is_installed
from byol_fast.config import ViewConfig
from byol_fast.data.augment_params import sample_params
from byol_kernels import gaussian_blur, photometric

SIZE, KERNEL = 224, 23
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PARTS: Any = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
PIL_PARTS: Any = (F1.adjust_brightness, F1.adjust_contrast, F1.adjust_saturation, F1.adjust_hue)


class Problem:
    """Images in the form that each contender likes best, and one set of draws.

    Args:
        batch: images of 224 px.
        device: where the contenders work.
    """

    def __init__(self, batch: int, device: str = "cpu") -> None:
        self.on_cpu = torch.device(device).type == "cpu"
        generator = torch.Generator().manual_seed(0)
        coarse = torch.rand(batch, 3, 14, 14, generator=generator) * 300 - 20
        smooth = torch.nn.functional.interpolate(coarse, SIZE, mode="bicubic")
        images = (smooth + 8 * torch.randn(smooth.shape, generator=generator)).clamp(0, 255).to(torch.uint8)
        self.images = images.to(device).contiguous(memory_format=torch.channels_last)
        self.planes = images.to(device).contiguous()
        self.planar = list(self.planes)
        self.pil = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images] if self.on_cpu else []
        drawn = sample_params(ViewConfig(solarize=0.2), np.arange(batch), seed=0, epoch=0, view=0)
        names = ("flip", "jitter", "factors", "order", "grayscale", "blur", "sigma", "window", "solarize")
        self.draws = {name: torch.from_numpy(getattr(drawn, name)).to(device) for name in names}
        self.lists: dict[str, Any] = {name: draws.tolist() for name, draws in self.draws.items()}
        self.batch = batch

    def only(self, *names: str) -> dict[str, Any]:
        """Some of the draws, as the operators take them."""
        return {name: self.draws[name] for name in names}

    def colour(self, x: Any, i: int) -> Any:
        """Jitter and grayscale by torchvision, of a tensor or a PIL image."""
        d, parts = self.lists, PIL_PARTS if isinstance(x, Image.Image) else PARTS
        if d["jitter"][i]:
            for part in d["order"][i]:
                x = parts[part](x, d["factors"][i][part])
        if not d["grayscale"][i]:
            return x
        return F1.to_grayscale(x, 3) if isinstance(x, Image.Image) else F.rgb_to_grayscale(x, 3)

    def blur(self, x: Tensor, i: int) -> Tensor:
        """The paper's blur by torchvision."""
        blurred: Tensor = F.gaussian_blur(x, [KERNEL, KERNEL], [self.lists["sigma"][i]] * 2)
        return blurred


def check(what: str, ours: Tensor, theirs: Tensor, largest: float, mean: float) -> None:
    """Say how far two results are apart; raise where it is too far."""
    difference = (ours.float() - theirs.float()).abs()
    found, average = difference.max().item(), difference.mean().item()
    print(f"  {what}: largest difference {found:.0f} of 255, mean {average:.4f}")
    if not (found <= largest and average <= mean):
        raise AssertionError(f"{what}: contenders disagree, allowed are {largest} and {mean}")


def kornia_colour(p: Problem) -> Case:
    """Its operators take a factor for each sample, but one order for the batch."""
    from kornia.color import rgb_to_grayscale
    from kornia.enhance import (
        adjust_brightness_accumulative,
        adjust_contrast_with_mean_subtraction,
        adjust_hue,
        adjust_saturation_with_gray_subtraction,
    )

    jitter, gray = p.draws["jitter"], p.draws["grayscale"]
    brightness, contrast, saturation, hue = p.draws["factors"][jitter].unbind(1)

    def run() -> Tensor:
        x = p.planes.float() / 255
        y = adjust_brightness_accumulative(x[jitter], brightness)
        y = adjust_contrast_with_mean_subtraction(y, contrast)
        y = adjust_saturation_with_gray_subtraction(y, saturation)
        x[jitter] = adjust_hue(y, hue * 2 * math.pi)
        x[gray] = rgb_to_grayscale(x[gray]).expand(-1, 3, -1, -1)
        return (x * 255).round().to(torch.uint8)

    return run


def dali_pipeline(p: Problem, draws: dict[str, Tensor], graph: Callable[..., Any]) -> Case:
    """A DALI graph of images and one number for each image from every draw, run without prefetching."""
    from nvidia.dali import fn
    from nvidia.dali.pipeline import pipeline_def

    images = list(p.images.permute(0, 2, 3, 1).contiguous().numpy())
    numbers = {name: list(draw.float().numpy()) for name, draw in draws.items()}

    @pipeline_def(  # type: ignore[call-overload, untyped-decorator]
        batch_size=p.batch,
        num_threads=torch.get_num_threads(),
        device_id=None,
        prefetch_queue_depth=1,
        exec_async=False,
        exec_pipelined=False,
    )
    def pipeline() -> Any:
        x = fn.external_source(source=repeat(images), batch=True, layout="HWC", no_copy=True)
        inputs = {
            name: fn.external_source(source=repeat(values), batch=True, no_copy=True)
            for name, values in numbers.items()
        }
        return graph(fn, x, **inputs)

    built = pipeline()
    built.build()

    def run() -> Tensor:
        (result,) = built.run()
        return torch.from_numpy(np.stack([np.asarray(result.at(i)) for i in range(p.batch)])).permute(0, 3, 1, 2)

    return run


def dali_colour(p: Problem) -> Case:
    """Its own way: contrast about the middle, and hue and saturation as a linear map of the colours."""
    jitter, gray = p.draws["jitter"], p.draws["grayscale"]
    brightness, contrast, saturation, hue = torch.where(
        jitter[:, None], p.draws["factors"], torch.tensor([1.0, 1.0, 1.0, 0.0])
    ).unbind(1)
    draws = {"brightness": brightness, "contrast": contrast, "saturation": saturation * ~gray, "hue": hue * 360}
    return dali_pipeline(p, draws, lambda fn, x, **factors: fn.color_twist(x, **factors))


def colour_suite(p: Problem) -> Suite:
    """Jitter and grayscale."""
    draws = p.only("jitter", "factors", "order", "grayscale")
    theirs = torch.stack([p.colour(x, i) for i, x in enumerate(p.planar)])
    check("truncated, against torchvision", photometric(p.images, **draws, truncate=True), theirs, 3, 0.002)
    # torchvision rounds down after each step: half a level a step, and what later steps make of it.
    check("not truncated, against torchvision", photometric(p.images, **draws), theirs, 12, 2.5)
    cases: dict[str, Case] = {
        "ours: photometric": lambda: photometric(p.images, **draws),
        "ours: photometric(truncate=True)": lambda: photometric(p.images, **draws, truncate=True),
        "torchvision v2, tensors": lambda: [p.colour(x, i) for i, x in enumerate(p.planar)],
    }
    if p.on_cpu:
        cases["torchvision v1, PIL"] = lambda: [p.colour(x, i) for i, x in enumerate(p.pil)]
    if is_installed("kornia"):
        cases["kornia, one order a batch"] = kornia = kornia_colour(p)
        one_order = draws | {"order": torch.arange(4, device=p.images.device).expand(p.batch, 4)}
        result = kornia()
        assert isinstance(result, Tensor)
        check("one order, against kornia", photometric(p.images, **one_order), result, 3, 0.2)
    if p.on_cpu and is_installed("nvidia.dali"):
        cases["DALI color_twist, another operator"] = dali_colour(p)
    uncounted = ("torchvision v1, PIL", "DALI color_twist, another operator")
    return Suite(cases, 2 * p.images.numel(), baseline="torchvision v2, tensors", uncounted=uncounted)


def finished_suite(p: Problem) -> Suite:
    """From a crop to what the network takes."""
    draws = p.only("flip", "jitter", "factors", "order", "grayscale", "solarize")

    def ours() -> Tensor:
        return photometric(p.images, **draws, mean=MEAN, std=STD, dtype=torch.bfloat16)

    def theirs(source: list[Any]) -> Tensor:
        views = []
        for i, image in enumerate(source):
            x = p.colour(F.horizontal_flip(image) if p.lists["flip"][i] else image, i)
            x = F.to_image(F.solarize(x, 128) if p.lists["solarize"][i] else x)
            views.append(F.normalize(F.to_dtype(x, torch.float32, scale=True), MEAN, STD).to(torch.bfloat16))
        return torch.stack(views).contiguous(memory_format=torch.channels_last)

    difference = (ours().float() - theirs(p.planar).float()).abs().mean().item() * 255 * min(STD)
    if not difference <= 2.5:
        raise AssertionError(f"finished views: contenders disagree by {difference} levels on average, allowed are 2.5")
    cases: dict[str, Case] = {
        "ours: photometric": ours,
        "torchvision v2, tensors": lambda: theirs(p.planar),
    }
    if p.on_cpu:
        cases["torchvision v1, PIL"] = lambda: theirs(p.pil)
    return Suite(cases, 3 * p.images.numel(), baseline="torchvision v2, tensors", uncounted=("torchvision v1, PIL",))


def blur_suite(p: Problem) -> Suite:
    """Gaussian blur, a sigma for each sample."""
    draws, wide = p.only("sigma", "window"), torch.full((p.batch,), KERNEL, device=p.images.device)
    theirs = torch.stack([p.blur(x, i) for i, x in enumerate(p.planar)])
    check("window of 3 sigma, against torchvision's 23", gaussian_blur(p.images, **draws), theirs, 1, 0.02)
    check("window of 23, against torchvision's", gaussian_blur(p.images, draws["sigma"], wide), theirs, 1, 0.002)
    filters = [ImageFilter.GaussianBlur(sigma) for sigma in p.lists["sigma"]]
    cases: dict[str, Case] = {
        "ours: gaussian_blur, window of 3 sigma": lambda: gaussian_blur(p.images, **draws),
        "ours: gaussian_blur, window of 23": lambda: gaussian_blur(p.images, draws["sigma"], wide),
        "torchvision v2, tensors, window of 23": lambda: [p.blur(x, i) for i, x in enumerate(p.planar)],
    }
    if p.on_cpu:
        cases["PIL's filter, an approximation by boxes"] = lambda: [
            x.filter(f) for x, f in zip(p.pil, filters, strict=True)
        ]
    uncounted = ["PIL's filter, an approximation by boxes"]
    if is_installed("kornia"):
        from kornia.filters import gaussian_blur2d

        sigma = draws["sigma"][:, None].expand(-1, 2)

        def kornia() -> Tensor:
            blurred: Tensor = gaussian_blur2d(p.planes.float(), KERNEL, sigma)
            return blurred.round().to(torch.uint8)

        check("window of 23, against kornia's", gaussian_blur(p.images, draws["sigma"], wide), kornia(), 1, 0.002)
        cases["kornia, window of 23"] = kornia
    if p.on_cpu and is_installed("nvidia.dali"):
        for name, window in (("23", KERNEL), ("its own choice", 0)):
            case = dali_pipeline(
                p,
                {"sigma": draws["sigma"]},
                lambda fn, x, sigma, window=window: fn.gaussian_blur(x, sigma=sigma, window_size=window),
            )
            result = case()
            assert isinstance(result, Tensor)
            check(
                f"window of 23, against DALI's of {name}", gaussian_blur(p.images, draws["sigma"], wide), result, 3, 0.1
            )
            cases[f"DALI, window of {name}"] = case
            uncounted.append(f"DALI, window of {name}")
    wide_blur = "torchvision v2, tensors, window of 23"
    return Suite(cases, 2 * p.images.numel(), baseline=wide_blur, uncounted=tuple(uncounted))


SUITES: dict[str, Callable[[Problem], Suite]] = {
    "colour, uint8 to uint8": colour_suite,
    "flip, colour, solarize, normalise to bfloat16 channels_last": finished_suite,
    "blur, uint8 to uint8": blur_suite,
}
