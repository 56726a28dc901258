"""A contact sheet: images, the two views of each as the run's own loader makes them, and what was drawn for them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from byol_fast.config import Config, ConfigError, ViewConfig
from byol_fast.data.augment_params import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    PROBABILITIES,
    SATURATION,
    AugmentParams,
    crop_windows,
    sample_params,
)
from byol_fast.data.batch import Batch
from byol_fast.data.loaders.backend import resolve_backend
from byol_fast.data.loaders.factory import make_loader
from byol_fast.data.sources import ImageSource, SourceError
from byol_fast.utils.files import atomic_path

INK, FAINT, PAPER, TRAY = "#1f2328", "#8b949e", "#ffffff", "#f3f4f6"
VIEW_COLORS = ("#0969da", "#c2590a")

TILE = 224
"""Room for a view in pixels, and for the text below it."""
MARGIN, GAP, HEADING, LINE = 28, 20, 26, 16
TEXT, TITLE = 12, 20
LABEL_WIDTH, TAG = 52, 16
MAX_COLUMNS = 2

Box = tuple[int, int, int, int]
Fact = tuple[str, list[str]]

_PARTS = {BRIGHTNESS: "brightness", CONTRAST: "contrast", SATURATION: "saturation", HUE: "hue"}


@dataclass(frozen=True, slots=True)
class Sample:
    """An image and its two views."""

    name: str
    """Where it comes from."""
    original: Image.Image
    """As stored."""
    views: tuple[Image.Image, Image.Image]
    """As the network gets them, before they are normalized."""
    windows: tuple[Box, Box]
    """The crops: top, left, height, width."""
    facts: tuple[list[Fact], list[Fact]]
    """What was drawn for each view: an operator, and its values in lines; no lines where it did not happen."""


def contact_sheet(
    source: ImageSource, config: Config, *, device: torch.device, num: int, epoch: int = 0
) -> Image.Image:
    """Show the first images of an epoch, and what a run makes of them; see `samples` for the arguments and errors."""
    made = samples(source, config, device=device, num=num, epoch=epoch)
    backend = resolve_backend(config.data, source, device)
    work = f"{backend.loader} on {device.type}, colors by {'our kernels' if backend.augment == 'kernels' else 'DALI'}"
    about = f"{config.view1.size} px, seed {config.seed}, epoch {epoch}; {work}; {source.describe()}"
    return sheet(made, config.recipe, about)


def samples(source: ImageSource, config: Config, *, device: torch.device, num: int, epoch: int = 0) -> list[Sample]:
    """Make the views of the first images of an epoch, by the loader and with the draws that a run has.

    Args:
        source: the training images.
        config: of it the views, the seed and `data` are used.
        device: where the loader is to work.
        num: so many images, or all where there are fewer.
        epoch: pass over the data, from 0.

    Raises:
        ConfigError: `num` or `epoch` is out of its contract.
        SourceError: there are fewer than two images.
        CorruptImageError: an image cannot be read, and `DataConfig.on_corrupt` is "raise".
    """
    if num < 1:
        raise ConfigError(f"preview: num must be 1 or more, got {num}")
    if epoch < 0:
        raise ConfigError(f"preview: epoch must be 0 or more, got {epoch}")
    if len(source) < 2:
        raise SourceError(f"preview: at least 2 images must be there, got {len(source)}; a batch takes no fewer")
    num = min(num, len(source))
    loader = make_loader(source, dataclasses.replace(config, batch_size=max(num, 2)), device=device)
    loader.load_state_dict(loader.state_dict() | {"step": epoch * loader.steps_per_epoch})
    batch = next(loader)
    loader.close()
    index = batch.index.numpy()[:num]
    pixels = _levels(batch, config)
    views = (config.view1, config.view2)
    draws = [
        sample_params(view, index, seed=config.seed, epoch=epoch, view=number) for number, view in enumerate(views)
    ]
    made = []
    for row, i in enumerate(index.tolist()):
        original = source.load(i)
        windows, facts = [], []
        for view, d in zip(views, draws, strict=True):
            top, left, h, w = crop_windows(d.crop[row : row + 1], original.height, original.width, view.ratio)[0]
            windows.append((int(top), int(left), int(h), int(w)))
            facts.append(_facts(view, views, d, row, windows[-1], original.size))
        made.append(
            Sample(
                name=source.sample_name(i),
                original=original,
                views=(Image.fromarray(pixels[0][row]), Image.fromarray(pixels[1][row])),
                windows=(windows[0], windows[1]),
                facts=(facts[0], facts[1]),
            )
        )
    return made


def _levels(batch: Batch, config: Config) -> list[NDArray[np.uint8]]:
    """Both views as uint8 `[B, S, S, 3]`."""
    found = []
    for view in batch.views:
        x = view.permute(0, 2, 3, 1).cpu()
        if not batch.is_raw:
            x = x.float() * torch.tensor(config.model.std) + torch.tensor(config.model.mean)
            x = (x * 255).round().clamp(0, 255).to(torch.uint8)
        found.append(x.numpy())
    return found


def _facts(
    view: ViewConfig,
    views: tuple[ViewConfig, ViewConfig],
    d: AugmentParams,
    row: int,
    window: Box,
    size: tuple[int, int],
) -> list[Fact]:
    """What was drawn, for the operators that either view may have."""
    top, left, h, w = window
    facts = [("crop", [f"{w} x {h} at {left}, {top} ({h * w / (size[0] * size[1]):.0%})"])]
    spread = {BRIGHTNESS: view.brightness, CONTRAST: view.contrast, SATURATION: view.saturation, HUE: view.hue}
    parts = [p for p in d.order[row].tolist() if spread[p] > 0]
    shown = [f"{_PARTS[p]} {d.factors[row, p]:{'+' if p == HUE else ''}.2f}" for p in parts]
    jitter = [", ".join(shown[k : k + 2]) + ("," if k + 2 < len(shown) else "") for k in range(0, len(shown), 2)]
    for mask, label, values in (
        ("flip", "flip", ["yes"]),
        ("jitter", "jitter", jitter or ["nothing to change"]),
        ("grayscale", "gray", ["yes"]),
        ("blur", "blur", [f"sigma {d.sigma[row]:.2f}"]),
        ("solarize", "solarize", [f"from {view.solarize_threshold}"]),
    ):
        if any(getattr(v, PROBABILITIES[mask]) > 0 for v in views):
            facts.append((label, values if getattr(d, mask)[row] else []))
    return facts


# ---- the sheet -----------------------------------------------------------------------------------------------------


def sheet(made: list[Sample], title: str, subtitle: str) -> Image.Image:
    """Draw a contact sheet.

    Args:
        made: what to show, at least one.
        title: of the sheet.
        subtitle: a line of small print beneath it.

    Returns:
        An RGB image. The views are shown pixel by pixel, small ones enlarged a whole number of times; only those of
        448 pixels and more are reduced, to 224.
    """
    size = made[0].views[0].width
    tile = size * round(TILE / size) or TILE
    step = max(tile, TILE) + GAP
    columns = min(MAX_COLUMNS, len(made))
    num_lines = max(sum(max(len(values), 1) for _, values in facts) for sample in made for facts in sample.facts)
    card = (3 * step - GAP + 2 * MARGIN, tile + GAP // 2 + num_lines * LINE + MARGIN)
    top = MARGIN + TITLE + LINE + 2 * GAP + HEADING
    canvas = Image.new("RGB", (columns * card[0], top + -(-len(made) // columns) * card[1]), PAPER)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default
    pen.text((MARGIN, MARGIN - 4), title, INK, font(TITLE))
    pen.text((MARGIN, MARGIN + TITLE + 4), subtitle, FAINT, font(TEXT))
    for column in range(columns):
        for k, (name, color) in enumerate(zip(("original", "view 1", "view 2"), (INK, *VIEW_COLORS), strict=True)):
            left = column * card[0] + MARGIN + k * step
            pen.text((left, top - HEADING), name, color, font(TEXT + 2))
            pen.line((left, top - 5, left + step - GAP - 1, top - 5), color, 2)
    for n, sample in enumerate(made):
        row, column = divmod(n, columns)
        _draw_card(canvas, sample, (column * card[0] + MARGIN, top + row * card[1]), tile, step)
    return canvas


def _draw_card(canvas: Image.Image, sample: Sample, at: tuple[int, int], tile: int, step: int) -> None:
    """An image, its views, and below each of them what there is to say."""
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(TEXT)
    left, top = at
    below = top + tile + GAP // 2
    _draw_original(canvas, sample, at, tile)
    pen.text((left, below), _shortened(sample.name, pen, step - GAP), INK, font)
    pen.text((left, below + LINE), f"{sample.original.width} x {sample.original.height}", FAINT, font)
    for k, (view, facts) in enumerate(zip(sample.views, sample.facts, strict=True)):
        left += step
        how = Image.Resampling.NEAREST if tile >= view.width else Image.Resampling.LANCZOS
        canvas.paste(view.resize((tile, tile), how), (left, top))
        line = below
        for label, values in facts:
            pen.text((left, line), label, VIEW_COLORS[k] if values else FAINT, font)
            for value in values or ["-"]:
                pen.text((left + LABEL_WIDTH, line), value, INK if values else FAINT, font)
                line += LINE


def _shortened(name: str, pen: ImageDraw.ImageDraw, width: int) -> str:
    """The end of a path, whole folders where possible."""
    font = ImageFont.load_default(TEXT)
    parts = Path(name).parts
    shown = name
    for k in range(1, len(parts)):
        if pen.textlength(shown, font) <= width:
            break
        shown = "../" + "/".join(parts[k:])
    while len(shown) > 4 and pen.textlength(shown, font) > width:
        shown = ".." + shown[3:]
    return shown


def _draw_original(canvas: Image.Image, sample: Sample, at: tuple[int, int], tile: int) -> None:
    """The whole image, with both crops outlined."""
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(TEXT)
    scale = tile / max(sample.original.size)
    width, height = (max(1, round(side * scale)) for side in sample.original.size)
    left, top = at[0] + (tile - width) // 2, at[1] + (tile - height) // 2
    how = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
    pen.rectangle((*at, at[0] + tile - 1, at[1] + tile - 1), TRAY)
    canvas.paste(sample.original.resize((width, height), how), (left, top))
    tags = []
    for number, (y, x, h, w) in enumerate(sample.windows):
        x0, y0 = left + round(x * scale), top + round(y * scale)
        x1, y1 = max(left + round((x + w) * scale), x0 + TAG), max(top + round((y + h) * scale), y0 + TAG)
        pen.rectangle((x0, y0, x1 - 1, y1 - 1), outline=PAPER, width=4)
        pen.rectangle((x0 + 1, y0 + 1, x1 - 2, y1 - 2), outline=VIEW_COLORS[number], width=2)
        tags.append(((x0 + 1, y0 + 1), (x1 - TAG, y1 - TAG))[number])
    for number, (x, y) in enumerate(tags):
        pen.rectangle((x, y, x + TAG - 2, y + TAG - 2), VIEW_COLORS[number])
        pen.text((x + TAG / 2 - 1, y + TAG / 2 - 1), str(number + 1), PAPER, font, anchor="mm")


def check_path(path: Path) -> None:
    """Refuse a file name that is no PNG's.

    Raises:
        ConfigError: so it is.
    """
    if path.suffix.lower() != ".png":
        raise ConfigError(f"preview: output must be a file that ends in .png, got {path}")


def write(image: Image.Image, path: Path) -> None:
    """Save a sheet as PNG, whole or not at all.

    Raises:
        ConfigError: the path is no PNG's, or cannot be written.
    """
    check_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            image.save(temporary, format="png", optimize=True)
    except OSError as error:
        raise ConfigError(f"preview: output must be a file that can be written, got {path} ({error})") from error
