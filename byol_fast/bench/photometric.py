"""Suites of the color and blur operators, with those of torchvision, kornia and, on a CPU, PIL and DALI.

All candidates get the same images and the same augmentation parameters (BYOL's: jitter .4 .4 .2 .1 with probability .8,
grayscale .2, sigma .1 to 2), so that random number generation is not timed. Agreement is checked before anything is
timed. `pip install '.[peers]'` installs the other libraries.
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
from byol_fast.data.augment_params import sample_augment_params
from byol_kernels import gaussian_blur, photometric
from byol_kernels.photometric.params import PhotometricParams

SIZE, KERNEL = 224, 23
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TENSOR_JITTER: Any = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
PIL_JITTER: Any = (F1.adjust_brightness, F1.adjust_contrast, F1.adjust_saturation, F1.adjust_hue)


class Problem:
    """Images in the format of each candidate, and one set of augmentation parameters.

    Args:
        batch_size: number of images of 224 px.
        device: of the candidates.
    """

    def __init__(self, batch_size: int, device: str = "cpu") -> None:
        self.on_cpu = torch.device(device).type == "cpu"
        generator = torch.Generator().manual_seed(0)
        coarse = torch.rand(batch_size, 3, 14, 14, generator=generator) * 300 - 20
        smooth = torch.nn.functional.interpolate(coarse, SIZE, mode="bicubic")
        images = (smooth + 8 * torch.randn(smooth.shape, generator=generator)).clamp(0, 255).to(torch.uint8)
        self.images = images.to(device).contiguous(memory_format=torch.channels_last)
        self.planes = images.to(device).contiguous()
        self.planar = list(self.planes)
        self.pil = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images] if self.on_cpu else []
        params = sample_augment_params(ViewConfig(solarize_p=0.2), np.arange(batch_size), seed=0, epoch=0, view=0)
        names = PhotometricParams._fields
        self.params = {name: torch.from_numpy(getattr(params, name)).to(device) for name in names}
        self.lists: dict[str, Any] = {name: values.tolist() for name, values in self.params.items()}
        self.batch_size = batch_size

    def select(self, *names: str) -> dict[str, Any]:
        """Some of the parameters, as keyword arguments of the operators."""
        return {name: self.params[name] for name in names}

    def color(self, x: Any, i: int) -> Any:
        """Jitter and grayscale of image `i` by torchvision, as a tensor or a PIL image."""
        params, adjust = self.lists, PIL_JITTER if isinstance(x, Image.Image) else TENSOR_JITTER
        if params["jitter"][i]:
            for k in params["order"][i]:
                x = adjust[k](x, params["factors"][i][k])
        if not params["grayscale"][i]:
            return x
        return F1.to_grayscale(x, 3) if isinstance(x, Image.Image) else F.rgb_to_grayscale(x, 3)

    def blur(self, x: Tensor, i: int) -> Tensor:
        """The paper's blur of image `i` by torchvision."""
        blurred: Tensor = F.gaussian_blur(x, [KERNEL, KERNEL], [self.lists["sigma"][i]] * 2)
        return blurred


def check_levels(name: str, images: Tensor, expected: Tensor, max_bound: float, mean_bound: float) -> None:
    """Print the largest and the mean difference of two results, in levels of 255.

    Raises:
        AssertionError: one of them exceeds its bound.
    """
    difference = (images.float() - expected.float()).abs()
    largest, mean = difference.max().item(), difference.mean().item()
    print(f"  {name}: largest difference {largest:.0f} of 255, mean {mean:.4f}")
    if not (largest <= max_bound and mean <= mean_bound):
        raise AssertionError(f"{name}: candidates disagree, allowed are {max_bound} and {mean_bound}")


def kornia_color(p: Problem) -> Case:
    """Operators of kornia, which take a factor per sample, but one order for the batch."""
    from kornia.color import rgb_to_grayscale
    from kornia.enhance import (
        adjust_brightness_accumulative,
        adjust_contrast_with_mean_subtraction,
        adjust_hue,
        adjust_saturation_with_gray_subtraction,
    )

    jitter, gray = p.params["jitter"], p.params["grayscale"]
    brightness, contrast, saturation, hue = p.params["factors"][jitter].unbind(1)

    def run() -> Tensor:
        x = p.planes.float() / 255
        y = adjust_brightness_accumulative(x[jitter], brightness)
        y = adjust_contrast_with_mean_subtraction(y, contrast)
        y = adjust_saturation_with_gray_subtraction(y, saturation)
        x[jitter] = adjust_hue(y, hue * 2 * math.pi)
        x[gray] = rgb_to_grayscale(x[gray]).expand(-1, 3, -1, -1)
        return (x * 255).round().to(torch.uint8)

    return run


def dali_case(p: Problem, params: dict[str, Tensor], graph: Callable[..., Any]) -> Case:
    """A DALI pipeline, without prefetching, whose graph takes images and a number per image for each parameter."""
    from nvidia.dali import fn
    from nvidia.dali.pipeline import pipeline_def

    images = list(p.images.permute(0, 2, 3, 1).contiguous().numpy())
    columns = {name: list(values.float().numpy()) for name, values in params.items()}

    @pipeline_def(  # type: ignore[call-overload, untyped-decorator]
        batch_size=p.batch_size,
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
            for name, values in columns.items()
        }
        return graph(fn, x, **inputs)

    built = pipeline()
    built.build()

    def run() -> Tensor:
        (result,) = built.run()
        return torch.from_numpy(np.stack([np.asarray(result.at(i)) for i in range(p.batch_size)])).permute(0, 3, 1, 2)

    return run


def dali_color(p: Problem) -> Case:
    """DALI's `color_twist`: contrast about mid-gray, hue and saturation as a linear map of the colors."""
    jitter, gray = p.params["jitter"], p.params["grayscale"]
    brightness, contrast, saturation, hue = torch.where(
        jitter[:, None], p.params["factors"], torch.tensor([1.0, 1.0, 1.0, 0.0])
    ).unbind(1)
    params = {"brightness": brightness, "contrast": contrast, "saturation": saturation * ~gray, "hue": hue * 360}
    return dali_case(p, params, lambda fn, x, **factors: fn.color_twist(x, **factors))


def color_suite(p: Problem) -> Suite:
    """Jitter and grayscale."""
    params = p.select("jitter", "factors", "order", "grayscale")
    expected = torch.stack([p.color(x, i) for i, x in enumerate(p.planar)])
    check_levels("truncated, against torchvision", photometric(p.images, **params, truncate=True), expected, 3, 0.002)
    # torchvision rounds down after each operation: half a level each, amplified by the operations behind it.
    check_levels("not truncated, against torchvision", photometric(p.images, **params), expected, 12, 2.5)
    cases: dict[str, Case] = {
        "byol_fast: photometric": lambda: photometric(p.images, **params),
        "byol_fast: photometric(truncate=True)": lambda: photometric(p.images, **params, truncate=True),
        "torchvision v2, tensors": lambda: [p.color(x, i) for i, x in enumerate(p.planar)],
    }
    if p.on_cpu:
        cases["torchvision v1, PIL"] = lambda: [p.color(x, i) for i, x in enumerate(p.pil)]
    if is_installed("kornia"):
        cases["kornia, one order a batch"] = kornia = kornia_color(p)
        one_order = params | {"order": torch.arange(4, device=p.images.device).expand(p.batch_size, 4)}
        result = kornia()
        assert isinstance(result, Tensor)
        check_levels("one order, against kornia", photometric(p.images, **one_order), result, 3, 0.2)
    if p.on_cpu and is_installed("nvidia.dali"):
        cases["DALI color_twist, another operator"] = dali_color(p)
    uncounted = ("torchvision v1, PIL", "DALI color_twist, another operator")
    return Suite(cases, 2 * p.images.numel(), baseline="torchvision v2, tensors", uncounted=uncounted)


def view_suite(p: Problem) -> Suite:
    """From a crop to the input of the network."""
    params = p.select("flip", "jitter", "factors", "order", "grayscale", "solarize")

    def byol_fast() -> Tensor:
        return photometric(p.images, **params, mean=MEAN, std=STD, dtype=torch.bfloat16)

    def torchvision(source: list[Any]) -> Tensor:
        views = []
        for i, image in enumerate(source):
            x = p.color(F.horizontal_flip(image) if p.lists["flip"][i] else image, i)
            x = F.to_image(F.solarize(x, 128) if p.lists["solarize"][i] else x)
            views.append(F.normalize(F.to_dtype(x, torch.float32, scale=True), MEAN, STD).to(torch.bfloat16))
        return torch.stack(views).contiguous(memory_format=torch.channels_last)

    difference = (byol_fast().float() - torchvision(p.planar).float()).abs().mean().item() * 255 * min(STD)
    if not difference <= 2.5:
        raise AssertionError(f"views: candidates disagree by {difference} levels on average, allowed are 2.5")
    cases: dict[str, Case] = {
        "byol_fast: photometric": byol_fast,
        "torchvision v2, tensors": lambda: torchvision(p.planar),
    }
    if p.on_cpu:
        cases["torchvision v1, PIL"] = lambda: torchvision(p.pil)
    return Suite(cases, 3 * p.images.numel(), baseline="torchvision v2, tensors", uncounted=("torchvision v1, PIL",))


def blur_suite(p: Problem) -> Suite:
    """Gaussian blur with a sigma per sample."""
    params, wide = p.select("sigma", "kernel_size"), torch.full((p.batch_size,), KERNEL, device=p.images.device)
    expected = torch.stack([p.blur(x, i) for i, x in enumerate(p.planar)])
    check_levels("window of 3 sigma, against torchvision's 23", gaussian_blur(p.images, **params), expected, 1, 0.02)
    blurred = gaussian_blur(p.images, params["sigma"], wide)
    check_levels("window of 23, against torchvision's", blurred, expected, 1, 0.002)
    filters = [ImageFilter.GaussianBlur(sigma) for sigma in p.lists["sigma"]]
    cases: dict[str, Case] = {
        "byol_fast: gaussian_blur, window of 3 sigma": lambda: gaussian_blur(p.images, **params),
        "byol_fast: gaussian_blur, window of 23": lambda: gaussian_blur(p.images, params["sigma"], wide),
        "torchvision v2, tensors, window of 23": lambda: [p.blur(x, i) for i, x in enumerate(p.planar)],
    }
    if p.on_cpu:
        cases["PIL's filter, an approximation by boxes"] = lambda: [
            x.filter(f) for x, f in zip(p.pil, filters, strict=True)
        ]
    uncounted = ["PIL's filter, an approximation by boxes"]
    if is_installed("kornia"):
        from kornia.filters import gaussian_blur2d

        sigma = params["sigma"][:, None].expand(-1, 2)

        def kornia() -> Tensor:
            result: Tensor = gaussian_blur2d(p.planes.float(), KERNEL, sigma)
            return result.round().to(torch.uint8)

        check_levels("window of 23, against kornia's", blurred, kornia(), 1, 0.002)
        cases["kornia, window of 23"] = kornia
    if p.on_cpu and is_installed("nvidia.dali"):
        for name, kernel_size in (("23", KERNEL), ("its own choice", 0)):
            case = dali_case(
                p,
                {"sigma": params["sigma"]},
                lambda fn, x, sigma, kernel_size=kernel_size: fn.gaussian_blur(x, sigma=sigma, window_size=kernel_size),
            )
            result = case()
            assert isinstance(result, Tensor)
            check_levels(f"window of 23, against DALI's of {name}", blurred, result, 3, 0.1)
            cases[f"DALI, window of {name}"] = case
            uncounted.append(f"DALI, window of {name}")
    wide_blur = "torchvision v2, tensors, window of 23"
    return Suite(cases, 2 * p.images.numel(), baseline=wide_blur, uncounted=tuple(uncounted))


SUITES: dict[str, Callable[[Problem], Suite]] = {
    "color, uint8 to uint8": color_suite,
    "flip, color, solarize, normalize to bfloat16 channels_last": view_suite,
    "blur, uint8 to uint8": blur_suite,
}
