"""Writes the contact sheet in `docs/data.md` from four computed scenes: `python docs/contact_sheet.py`.

The scenes are computed, so that the picture has no copyright of others.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from byol_fast import config as configs
from byol_fast.config import recipes
from byol_fast.data import open_source
from byol_fast.report import preview

SEED = 239  # of the views: one that shows all operators in four images
HEIGHT, WIDTH = 720, 960  # rendered at twice the size of the pictures
Plane = NDArray[np.float64]

Y, X = np.mgrid[0:HEIGHT, 0:WIDTH] / HEIGHT


def noise(rng: np.random.Generator, cells: int, octaves: int = 5, stretch: float = 1.0) -> Plane:
    """Smooth noise about 0 with details of ever smaller size and amplitude, `stretch` times as wide as high."""
    total = np.zeros((HEIGHT, WIDTH))
    for k in range(octaves):
        n = cells * 2**k
        grid = rng.uniform(-1, 1, (n + 2, int(n * WIDTH / HEIGHT / stretch) + 2)).astype(np.float32)
        total += np.asarray(Image.fromarray(grid).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)) / 2**k
    return total


def color(*rgb: float) -> Plane:
    """RGB from 0 to 255."""
    return np.array(rgb) / 255


def blend(below: Plane, above: Plane, alpha: Plane) -> Plane:
    """One picture over another."""
    a = np.clip(alpha, 0, 1)[..., None]
    return below * (1 - a) + above * a


def gradient(stops: list[tuple[float, tuple[float, float, float]]], at: Plane) -> Plane:
    """Colors between those at given places."""
    places = [place for place, _ in stops]
    return np.stack([np.interp(at, places, [rgb[c] / 255 for _, rgb in stops]) for c in range(3)], axis=-1)


def lake(rng: np.random.Generator) -> Plane:
    """Mountains at dusk, and their reflection."""
    shore = 0.60
    sky = gradient([(0, (38, 52, 104)), (0.3, (120, 98, 150)), (0.48, (238, 150, 120)), (0.6, (255, 214, 150))], Y)
    sun = np.hypot(X - 0.93, Y - 0.47)
    sky = blend(sky, color(255, 238, 200), 0.85 * np.exp(-((sun / 0.13) ** 2)) + (sun < 0.042))
    clouds = noise(rng, 5, 5, 5) * np.exp(-(((Y - 0.22) / 0.16) ** 2))
    sky = blend(sky, color(255, 196, 176), 0.9 * np.clip(clouds - 0.05, 0, 1))
    for base, rough, near, far in (
        (0.43, 0.16, (112, 92, 138), (190, 140, 150)),
        (0.50, 0.11, (70, 62, 104), (140, 104, 128)),
        (0.565, 0.06, (30, 40, 58), (60, 62, 84)),
    ):
        ridge = base - rough * noise(rng, 3, 7)[:1]
        depth = (Y - ridge) / 0.16
        rock = gradient([(0, near), (1, far)], depth + 0.25 * noise(rng, 24, 3))
        sky = blend(sky, rock, (Y - ridge) * HEIGHT)
    depth = np.clip((Y - shore) / (1 - shore), 0, 1)
    ripple = noise(rng, 40, 3, 12)
    mirrored = np.clip((2 * shore - Y) * HEIGHT + 22 * depth * ripple, 0, HEIGHT - 1).astype(int)
    water = sky[mirrored, np.arange(WIDTH)[None, :]] * (0.86 - 0.34 * depth[..., None]) + 0.02 * ripple[..., None]
    return blend(sky, water, (Y - shore) * HEIGHT)


def ball(
    image: Plane, cx: float, cy: float, r: float, skin: Plane, *, squash: float = 1.0, bumps: Plane | float = 0.0
) -> Plane:
    """A shaded, glossy ball, lit from the upper left, with the shadow it throws."""
    shadow = np.hypot((X - cx - 0.5 * r) / (1.5 * r), (Y - cy - 0.86 * r * squash) / (0.34 * r))
    image = image * (1 - 0.62 * np.exp(-(shadow**2)))[..., None]
    u, v = (X - cx) / r, (Y - cy) / (r * squash)
    inside = np.clip(1 - u * u - v * v, 0, 1)
    z = np.sqrt(inside)
    light = np.clip((-0.55 * u - 0.62 * v + 0.56 * z) + bumps * z, 0, 1)
    gloss = np.exp(-(((u + 0.36) ** 2 + (v + 0.42) ** 2) / 0.018))
    rim = 0.16 * (1 - z) ** 2
    shaded = skin * (0.2 + 0.86 * light)[..., None] + (0.6 * gloss + rim)[..., None]
    return blend(image, np.clip(shaded, 0, 1), (1 - np.hypot(u, v)) * r * HEIGHT / 1.5)


def fruit(rng: np.random.Generator) -> Plane:
    """A still life on a wooden table."""
    wall = gradient([(0, (34, 78, 84)), (0.9, (78, 130, 128))], Y + 0.12 * noise(rng, 4) + 0.25 * (1 - X))
    fibres = 0.2 * noise(rng, 20, 3, 24) + 0.16 * noise(rng, 90, 2, 16)
    table = gradient([(0, (96, 56, 30)), (0.5, (168, 108, 62)), (1, (206, 150, 96))], 0.5 + fibres)
    table *= (0.75 + 0.45 * (Y - 0.6))[..., None]
    image = blend(wall, table, (Y - 0.60) * HEIGHT / 2)
    pores = 0.22 * noise(rng, 150, 2)
    streaks = 0.5 - 1.2 * (Y - 0.42) + 0.2 * noise(rng, 9, 4)
    blush = gradient([(0.2, (132, 14, 26)), (0.6, (206, 34, 40)), (0.95, (236, 160, 70))], streaks)
    image = ball(image, 0.40, 0.53, 0.18, blush, squash=0.94)
    stem = np.exp(-(((X - 0.405 - 0.25 * (0.37 - Y) ** 2) / 0.007) ** 4)) * (Y > 0.30) * (Y < 0.40)
    image = blend(image, color(70, 48, 30), stem)
    peel = gradient([(0, (228, 116, 16)), (1, (246, 158, 44))], 0.5 + pores)
    image = ball(image, 0.99, 0.56, 0.155, peel, bumps=0.6 * pores)
    green = gradient([(0, (96, 140, 32)), (1, (176, 200, 72))], 0.5 + 0.3 * noise(rng, 14))
    image = ball(image, 0.70, 0.62, 0.145, green)
    for cx, cy in ((0.16, 0.74), (0.235, 0.785), (0.12, 0.82), (0.20, 0.86)):
        image = ball(image, cx, cy, 0.052, np.broadcast_to(color(92, 40, 110), image.shape))
    return image


def balloons(rng: np.random.Generator) -> Plane:
    """Hot-air balloons over hills."""
    image = gradient([(0, (46, 116, 196)), (0.55, (150, 200, 236)), (0.72, (226, 238, 240))], Y)
    clouds = np.clip(noise(rng, 4, 6, 2.5) + 0.5 * noise(rng, 2, 2) - 0.35, 0, 1)
    image = blend(image, color(252, 252, 255) * (0.86 + 0.14 * noise(rng, 5)[..., None]), 1.1 * clouds * (Y < 0.8))
    for base, rough, low, high in (
        (0.70, 0.05, (96, 140, 130), (130, 168, 140)),
        (0.79, 0.05, (66, 122, 66), (128, 168, 76)),
        (0.90, 0.04, (40, 92, 40), (150, 172, 66)),
    ):
        hill = base - rough * noise(rng, 2, 3)[:1]
        grass = 0.4 * noise(rng, 70, 3, 3) + 0.3 * noise(rng, 6, 2, 4)
        meadow = gradient([(-0.5, low), (0.7, high)], grass + 2 * (Y - base))
        image = blend(image, meadow, (Y - hill) * HEIGHT)
    kinds = (
        (0.42, 0.32, 0.20, ((214, 40, 48), (250, 196, 60), (244, 240, 228))),
        (0.96, 0.24, 0.12, ((36, 70, 160), (244, 240, 228), (60, 160, 190))),
        (1.12, 0.55, 0.07, ((240, 130, 30), (150, 40, 120))),
        (0.75, 0.60, 0.045, ((30, 130, 90), (250, 220, 90))),
    )
    for cx, cy, r, stripes in kinds:
        v = (Y - cy) / r
        lower = np.sqrt(np.clip(1 - (v / 1.35) ** 2, 0, 1)) * (1 - 0.22 * v)
        narrow = np.where(v > 0, lower, np.sqrt(np.clip(1 - v * v, 0, 1)))
        u = (X - cx) / (r * np.maximum(narrow, 1e-3))
        gore = np.floor((np.arcsin(np.clip(u, -1, 1)) / np.pi + 0.5) * 12).astype(int) % len(stripes)
        cloth = np.array(stripes)[gore] / 255
        shade = np.clip(0.62 - 0.42 * u - 0.16 * v + 0.3 * np.sqrt(np.clip(1 - u * u, 0, 1)), 0.2, 1.15)
        inside = (1 - np.abs(u)) * narrow * r * HEIGHT / 1.5 * (v < 1.2)
        image = blend(image, np.clip(cloth * shade[..., None], 0, 1), inside)
        ropes = (np.abs(np.abs(X - cx) - r * (0.10 + 0.1 * (1.62 - v))) < 0.0022) & (v > 1.15) & (v < 1.62)
        image = blend(image, color(60, 50, 44), ropes.astype(float))
        basket = (np.abs(X - cx) < 0.13 * r) & (v > 1.58) & (v < 1.82)
        image = blend(image, color(130, 84, 44) * (0.8 + 0.3 * noise(rng, 60, 2)[..., None]), basket.astype(float))
    return image


def flowers(rng: np.random.Generator) -> Plane:
    """Flowers in a garden that is out of focus."""
    image = gradient([(0, (150, 186, 120)), (0.5, (70, 124, 58)), (1, (24, 62, 30))], Y + 0.16 * noise(rng, 3, 3))
    for _ in range(46):
        cx, cy, r = rng.uniform(0, WIDTH / HEIGHT), rng.uniform(0, 1), rng.uniform(0.02, 0.07)
        glow = [(255, 236, 150), (250, 250, 230), (180, 220, 120), (240, 160, 190)][rng.integers(4)]
        image = blend(image, color(*glow), 0.26 * np.clip((r - np.hypot(X - cx, Y - cy)) * 60, 0, 1) * (1.1 - cy))
    blooms = (
        (0.33, 0.40, 0.26, 17, (250, 190, 30), (206, 110, 10)),
        (0.98, 0.33, 0.20, 13, (236, 80, 140), (150, 24, 90)),
        (0.83, 0.72, 0.17, 21, (250, 250, 246), (180, 190, 214)),
    )
    for cx, cy, *_ in blooms:
        sway = cx + 0.06 * (Y - cy) ** 2
        stem = np.exp(-(((X - sway) / 0.011) ** 4)) * (cy < Y)
        image = blend(image, gradient([(0, (30, 84, 34)), (1, (110, 160, 70))], 0.5 - 30 * (X - sway)), stem)
    for cx, cy, r, petals, tip, root in blooms:
        turn = rng.uniform(0, 1)
        for layer in (1.0, 0.82):
            angle = np.arctan2(Y - cy, X - cx) / (2 * np.pi) * petals + turn + layer * 2.5
            distance = np.hypot(X - cx, (Y - cy) * 1.06) / (r * layer)
            across = np.abs(angle % 1 - 0.5) * 2
            edge = (1 - 0.34 * across**2 * distance) - distance + 0.02 * noise(rng, 12, 3)
            vein = 0.10 * np.sin(angle * 2 * np.pi * 5) * distance
            petal = gradient([(0.1, root), (1, tip)], distance + vein)
            petal *= np.clip(1.16 - 0.62 * across**3 - 0.2 * (1 - layer) * 2 + 0.12 * (cy - Y) / r, 0.2, 1.2)[..., None]
            image = image * (1 - 0.35 * np.exp(-((np.clip(-edge, 0, 9) / 0.12) ** 2)) * (edge < 0))[..., None]
            image = blend(image, np.clip(petal, 0, 1), edge * r * HEIGHT)
        seeds = noise(rng, 130, 2)
        center = np.hypot(X - cx, Y - cy) / (0.33 * r)
        heart = gradient([(0, (40, 22, 12)), (0.7, (110, 64, 22)), (1, (190, 130, 40))], center + 0.3 * seeds)
        image = blend(image, heart, (1 - center) * 0.33 * r * HEIGHT)
    return image


SCENES: tuple[Callable[[np.random.Generator], Plane], ...] = (lake, fruit, balloons, flowers)


def render(scene: Callable[[np.random.Generator], Plane], seed: int) -> Image.Image:
    """A scene as a picture of 480 x 360."""
    pixels = np.clip(scene(np.random.default_rng(seed)), 0, 1)
    return Image.fromarray((255 * pixels).round().astype(np.uint8)).resize((480, 360), Image.Resampling.LANCZOS)


def main() -> None:
    """Write `contact_sheet.png` beside this file."""
    with tempfile.TemporaryDirectory() as folder:
        for number, scene in enumerate(SCENES):
            render(scene, number).save(Path(folder) / f"{scene.__name__}.png")
        config = configs.replace(recipes.imagenet_resnet50(), {"seed": SEED})
        samples = preview.load_samples(open_source(folder), config, device=torch.device("cpu"), num=len(SCENES))
        samples = [dataclasses.replace(sample, name=Path(sample.name).name) for sample in samples]
        sheet = preview.draw_sheet(samples, "imagenet_resnet50", f"seed {SEED}, epoch 0")
        preview.write(sheet, Path(__file__).with_name("contact_sheet.png"))


if __name__ == "__main__":
    main()
