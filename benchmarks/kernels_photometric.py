"""Colour and blur beside torchvision, on the CPU.

    python -m benchmarks.kernels_photometric [--rounds N] [--images N] [--save FOLDER]

Every contender gets the same images and the same drawn parameters (BYOL's: jitter .4 .4 .2 .1 with probability .8,
grayscale .2, sigma .1 to 2), so nobody's random numbers are timed. Agreement is checked before anything is timed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from byol_fast.bench import Table, Timing, interleaved
from byol_fast.config import ViewConfig
from byol_fast.data.views import draw
from byol_kernels import gaussian_blur, photometric

SIZE, KERNEL = 224, 23
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PARTS: Any = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)


class Problem:
    """Images in the form that each contender likes best, and one set of draws."""

    def __init__(self, batch: int) -> None:
        generator = torch.Generator().manual_seed(0)
        coarse = torch.rand(batch, 3, 14, 14, generator=generator) * 300 - 20
        smooth = torch.nn.functional.interpolate(coarse, SIZE, mode="bicubic")
        images = (smooth + 8 * torch.randn(smooth.shape, generator=generator)).clamp(0, 255).to(torch.uint8)
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.planar = list(images.contiguous())
        self.pil = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        drawn = draw(ViewConfig(solarize=0.2), np.arange(batch), seed=0, epoch=0, view=0)
        names = ("flip", "jitter", "factors", "order", "grayscale", "blur", "sigma", "window", "solarize")
        self.draws = {name: torch.from_numpy(getattr(drawn, name)) for name in names}
        self.lists: dict[str, Any] = {name: draws.tolist() for name, draws in self.draws.items()}
        self.batch = batch

    def only(self, *names: str) -> dict[str, Any]:
        """Some of the draws, as the operators take them."""
        return {name: self.draws[name] for name in names}

    def colour(self, x: Any, i: int) -> Any:
        """Jitter and grayscale by torchvision, of a tensor or a PIL image."""
        d = self.lists
        if d["jitter"][i]:
            for part in d["order"][i]:
                x = PARTS[part](x, d["factors"][i][part])
        return F.rgb_to_grayscale(x, 3) if d["grayscale"][i] else x

    def blur(self, x: Tensor, i: int) -> Tensor:
        """The paper's blur by torchvision."""
        blurred: Tensor = F.gaussian_blur(x, [KERNEL, KERNEL], [self.lists["sigma"][i]] * 2)
        return blurred


def check(what: str, ours: Tensor, theirs: list[Tensor], largest: float, mean: float) -> None:
    difference = (ours.float() - torch.stack(theirs).float()).abs()
    found, average = difference.max().item(), difference.mean().item()
    print(f"  {what}: largest difference {found:.0f} of 255, mean {average:.4f}")
    if not (found <= largest and average <= mean):
        raise AssertionError(f"{what}: contenders disagree, allowed are {largest} and {mean}")


def colour_suite(p: Problem, rounds: int) -> dict[str, Timing]:
    draws = p.only("jitter", "factors", "order", "grayscale")
    theirs = [p.colour(x, i) for i, x in enumerate(p.planar)]
    check("truncated, against torchvision", photometric(p.images, **draws, truncate=True), theirs, 3, 0.002)
    # torchvision rounds down after each step: half a level a step, and what later steps make of it.
    check("not truncated, against torchvision", photometric(p.images, **draws), theirs, 12, 2.5)
    return interleaved(
        {
            "ours: photometric": lambda: photometric(p.images, **draws),
            "ours: photometric(truncate=True)": lambda: photometric(p.images, **draws, truncate=True),
            "torchvision v2, tensors": lambda: [p.colour(x, i) for i, x in enumerate(p.planar)],
            "torchvision, PIL": lambda: [p.colour(x, i) for i, x in enumerate(p.pil)],
        },
        rounds=rounds,
        clock=time.process_time,
    )


def finished_suite(p: Problem, rounds: int) -> dict[str, Timing]:
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
    return interleaved(
        {
            "ours: photometric": ours,
            "torchvision v2, tensors": lambda: theirs(p.planar),
            "torchvision, PIL": lambda: theirs(p.pil),
        },
        rounds=rounds,
        clock=time.process_time,
    )


def blur_suite(p: Problem, rounds: int) -> dict[str, Timing]:
    draws, wide = p.only("sigma", "window"), torch.full((p.batch,), KERNEL)
    theirs = [p.blur(x, i) for i, x in enumerate(p.planar)]
    check("window of 3 sigma, against torchvision's 23", gaussian_blur(p.images, **draws), theirs, 1, 0.02)
    check("window of 23, against torchvision's", gaussian_blur(p.images, draws["sigma"], wide), theirs, 1, 0.002)
    filters = [ImageFilter.GaussianBlur(sigma) for sigma in p.lists["sigma"]]
    return interleaved(
        {
            "ours: gaussian_blur, window of 3 sigma": lambda: gaussian_blur(p.images, **draws),
            "ours: gaussian_blur, window of 23": lambda: gaussian_blur(p.images, draws["sigma"], wide),
            "torchvision v2, tensors, window of 23": lambda: [p.blur(x, i) for i, x in enumerate(p.planar)],
            "PIL's filter, an approximation by boxes": lambda: [
                x.filter(f) for x, f in zip(p.pil, filters, strict=True)
            ],
        },
        rounds=rounds,
        clock=time.process_time,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--images", type=int, default=32, help="images of 224 px in a batch")
    parser.add_argument("--save", type=Path, help="folder for kernels_photometric.csv and environment.json")
    arguments = parser.parse_args()
    problem = Problem(arguments.images)
    suites: dict[str, Callable[[Problem, int], dict[str, Timing]]] = {
        "colour, uint8 to uint8": colour_suite,
        "flip, colour, solarize, normalise to bfloat16 channels_last": finished_suite,
        "blur, uint8 to uint8": blur_suite,
    }
    print(f"{torch.get_num_threads()} threads, {arguments.rounds} interleaved rounds")
    table = Table(arguments.images, "images/CPU-s")
    for suite, run in suites.items():
        table.add(suite, run(problem, arguments.rounds))
    if arguments.save:
        table.save(arguments.save, "kernels_photometric", torch.device("cpu"))


if __name__ == "__main__":
    main()
