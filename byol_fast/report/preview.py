"""Contact sheet of images, their views from the run's own loader, and the augmentation parameters of these."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from byol_fast.config import Config, ViewConfig
from byol_fast.config.fields import Range, check
from byol_fast.data.augment_params import PROBABILITIES, AugmentParams, crop_box, sample_augment_params
from byol_fast.data.batch import Batch
from byol_fast.data.loaders.backend import resolve_backend
from byol_fast.data.loaders.factory import make_loader
from byol_fast.data.sources import ImageSource, SourceError
from byol_fast.utils.files import check_png_file, output_file
from byol_kernels.photometric.params import ADJUSTMENTS, HUE

INK, FAINT, PAPER, TRAY = "#1f2328", "#59636e", "#ffffff", "#f3f4f6"
VIEW_COLORS = ("#0969da", "#b64f00", "#1a7f37")
"""Of the two global views, and of the local ones."""

TILE = 224
"""Width of a view, and of the text below it, in pixels."""
MARGIN, GAP, HEADING, LINE = 28, 20, 26, 16
TEXT, TITLE = 12, 20
LABEL_WIDTH, TAG = 52, 16
MAX_TILES, MAX_VIEWS = 6, 5
"""Largest number of pictures beside each other, and of views of an image: more take further lines."""

Box = tuple[int, int, int, int]
Operation = tuple[str, list[str]]
"""Name of an operator, and its parameters in lines; no lines if it was not applied."""


@dataclass(frozen=True, slots=True)
class Sample:
    """An image and its views."""

    name: str
    """Name in its source."""
    original: Image.Image
    """The image as stored."""
    views: tuple[Image.Image, ...]
    """Inputs of the network before the normalization: two global views, then the local ones."""
    boxes: tuple[Box, ...]
    """Crops: top, left, height, width."""
    operations: tuple[list[Operation], ...]
    """Operators of each view."""


def contact_sheet(
    source: ImageSource, config: Config, *, device: torch.device, num: int, epoch: int = 0
) -> Image.Image:
    """Draw the first images of an epoch and their views; see `load_samples` for the arguments and errors."""
    samples = load_samples(source, config, device=device, num=num, epoch=epoch)
    backend = resolve_backend(config.data, source, device)
    loader = f"{backend.loader} on {device.type}, colors by {'our kernels' if backend.augment == 'kernels' else 'DALI'}"
    subtitle = f"seed {config.seed}, epoch {epoch}; {loader}; {source.describe()}"
    return draw_sheet(samples, config.recipe, subtitle)


def load_samples(
    source: ImageSource, config: Config, *, device: torch.device, num: int, epoch: int = 0
) -> list[Sample]:
    """Load the first images of an epoch and their views, with the loader and the parameters of a run.

    Args:
        source: the training images.
        config: of it the views, the seed and `data` are used.
        device: where the views are computed.
        num: number of images; all if there are fewer.
        epoch: pass over the data, from 0.

    Raises:
        ConfigError: `num` or `epoch` is out of range.
        SourceError: there are fewer than two images.
        CorruptImageError: an image cannot be read, and `DataConfig.on_corrupt` is "raise".
    """
    check("preview: num", Annotated[int, Range(1, 256)], num)
    check("preview: epoch", Annotated[int, Range(0, 1_000_000)], epoch)
    if len(source) < 2:
        raise SourceError(f"preview: data.root must have at least 2 images, got {len(source)}; a batch has 2 or more")
    num = min(num, len(source))
    loader = make_loader(source, dataclasses.replace(config, batch_size=max(num, 2)), device=device)
    loader.load_state_dict(loader.state_dict() | {"batch_number": epoch * loader.batches_per_epoch})
    batch = next(loader)
    loader.close()
    index = batch.index.numpy()[:num]
    pixels = _to_uint8(batch, config)
    views = config.view_configs
    params = [sample_augment_params(view, index, seed=config.seed, epoch=epoch, view=i) for i, view in enumerate(views)]
    samples = []
    for row, i in enumerate(index.tolist()):
        original = source.load(i)
        boxes, operations = [], []
        for view, p in zip(views, params, strict=True):
            boxes.append(crop_box(p.crop_candidates[row], original.height, original.width, view.ratio))
            operations.append(_operations(view, views, p, row, boxes[-1], original.size))
        samples.append(
            Sample(
                name=source.sample_name(i),
                original=original,
                views=tuple(Image.fromarray(view[row]) for view in pixels),
                boxes=tuple(boxes),
                operations=tuple(operations),
            )
        )
    return samples


def _to_uint8(batch: Batch, config: Config) -> list[NDArray[np.uint8]]:
    """Views as uint8 `[B, S, S, 3]`."""
    views = []
    for view in batch.views:
        x = view.permute(0, 2, 3, 1).cpu()
        if not batch.is_raw:
            x = x.float() * torch.tensor(config.model.std) + torch.tensor(config.model.mean)
            x = (x * 255).round().clamp(0, 255).to(torch.uint8)
        views.append(x.numpy())
    return views


def _operations(
    view: ViewConfig,
    views: tuple[ViewConfig, ...],
    params: AugmentParams,
    row: int,
    box: Box,
    size: tuple[int, int],
) -> list[Operation]:
    """Operators of one view of an image; of those that any view may have."""
    top, left, h, w = box
    operations = [("crop", [f"{w} x {h} at {left}, {top} ({h * w / (size[0] * size[1]):.0%})"])]
    order = [a for a in params.order[row].tolist() if getattr(view, ADJUSTMENTS[a]) > 0]
    values = [f"{ADJUSTMENTS[a]} {params.factors[row, a]:{'+' if a == HUE else ''}.2f}" for a in order]
    jitter = [", ".join(values[k : k + 2]) + ("," if k + 2 < len(values) else "") for k in range(0, len(values), 2)]
    captions = {
        "flip": ("flip", ["yes"]),
        "jitter": ("jitter", jitter or ["no adjustments"]),
        "grayscale": ("gray", ["yes"]),
        "blur": ("blur", [f"sigma {params.sigma[row]:.2f}"]),
        "solarize": ("solarize", [f"from {view.solarize_threshold}"]),
    }
    for mask, probability in PROBABILITIES.items():
        label, lines = captions[mask]
        if any(getattr(v, probability) > 0 for v in views):
            operations.append((label, lines if getattr(params, mask)[row] else []))
    return operations


# ---- the sheet -----------------------------------------------------------------------------------------------------


def draw_sheet(samples: list[Sample], title: str, subtitle: str) -> Image.Image:
    """Draw a contact sheet.

    Args:
        samples: images and their views, at least one.
        title: title of the sheet.
        subtitle: a line of small print below it.

    Returns:
        An RGB image. Views keep their pixels, enlarged by an integer factor if they are small; views of 448 pixels and
        more are reduced to 224.
    """
    grid = _Grid.of(samples)
    across, down = 1 + grid.num_across, -(-len(samples[0].views) // grid.num_across)
    columns = min(max(MAX_TILES // across, 1), len(samples))
    card = (across * grid.step - GAP + 2 * MARGIN, down * grid.line - HEADING - GAP + MARGIN)
    top = MARGIN + TITLE + LINE + 2 * GAP + HEADING
    canvas = Image.new("RGB", (columns * card[0], top + -(-len(samples) // columns) * card[1]), PAPER)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default
    draw.text((MARGIN, MARGIN - 4), title, INK, font(TITLE))
    draw.text((MARGIN, MARGIN + TITLE + 4), subtitle, FAINT, font(TEXT))
    for column in range(columns):
        left = column * card[0] + MARGIN
        _draw_heading(draw, (left, top), grid, "original", INK)
        for k, view in enumerate(samples[0].views[: grid.num_across]):
            _draw_heading(draw, (left + (1 + k) * grid.step, top), grid, _view_name(k, view), _view_color(k))
    for n, sample in enumerate(samples):
        row, column = divmod(n, columns)
        _draw_card(canvas, sample, (column * card[0] + MARGIN, top + row * card[1]), grid)
    return canvas


class _Grid(NamedTuple):
    """Places of the pictures of an image, in pixels."""

    tile: int
    """Width of the largest picture."""
    step: int
    """From one picture to the next."""
    line: int
    """From one line of views to the next."""
    num_across: int
    """Views in a line."""

    @classmethod
    def of(cls, samples: list[Sample]) -> _Grid:
        """A grid with room for every view and the lines of its operators."""
        tile = max(_tile(view) for view in samples[0].views)
        operations = (operations for sample in samples for operations in sample.operations)
        num_lines = max(sum(max(len(lines), 1) for _, lines in of_view) for of_view in operations)
        line = tile + GAP // 2 + num_lines * LINE + GAP + HEADING
        return cls(tile, max(tile, TILE) + GAP, line, min(MAX_VIEWS, len(samples[0].views)))


def _tile(view: Image.Image) -> int:
    """Width of a view in the sheet."""
    return view.width * round(TILE / view.width) or TILE


def _view_name(k: int, view: Image.Image) -> str:
    return f"view {k + 1}{' (local)' if k > 1 else ''}, {view.width} px"


def _view_color(k: int) -> str:
    return VIEW_COLORS[min(k, 2)]


def _draw_heading(draw: ImageDraw.ImageDraw, at: tuple[int, int], grid: _Grid, name: str, color: str) -> None:
    """Draw the heading above a picture."""
    left, top = at
    draw.text((left, top - HEADING), name, color, ImageFont.load_default(TEXT + 2))
    draw.line((left, top - 5, left + grid.step - GAP - 1, top - 5), color, 2)


def _draw_card(canvas: Image.Image, sample: Sample, at: tuple[int, int], grid: _Grid) -> None:
    """Draw an image and its views, with their descriptions below, and headings above all but the first line."""
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(TEXT)
    left, top = at
    below = top + grid.tile + GAP // 2
    _draw_original(canvas, sample, at, grid.tile)
    draw.text((left, below), _shortened(sample.name, draw, grid.step - GAP), INK, font)
    draw.text((left, below + LINE), f"{sample.original.width} x {sample.original.height}", FAINT, font)
    for k, (view, operations) in enumerate(zip(sample.views, sample.operations, strict=True)):
        line, column = divmod(k, grid.num_across)
        x, y, tile = left + (1 + column) * grid.step, top + line * grid.line, _tile(view)
        if line > 0:
            _draw_heading(draw, (x, y), grid, _view_name(k, view), _view_color(k))
        resampling = Image.Resampling.NEAREST if tile >= view.width else Image.Resampling.LANCZOS
        canvas.paste(view.resize((tile, tile), resampling), (x, y))
        y += grid.tile + GAP // 2
        for label, lines in operations:
            draw.text((x, y), label, _view_color(k) if lines else FAINT, font)
            for text in lines or ["-"]:
                draw.text((x + LABEL_WIDTH, y), text, INK if lines else FAINT, font)
                y += LINE


def _shortened(name: str, draw: ImageDraw.ImageDraw, width: int) -> str:
    """End of a path that fits into a width, from a folder's name on if possible."""
    font = ImageFont.load_default(TEXT)
    parts = Path(name).parts
    shown = name
    for k in range(1, len(parts)):
        if draw.textlength(shown, font) <= width:
            break
        shown = "../" + "/".join(parts[k:])
    while len(shown) > 4 and draw.textlength(shown, font) > width:
        shown = ".." + shown[3:]
    return shown


def _draw_original(canvas: Image.Image, sample: Sample, at: tuple[int, int], tile: int) -> None:
    """Draw the whole image with the outlines of all crops."""
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(TEXT)
    scale = tile / max(sample.original.size)
    width, height = (max(1, round(side * scale)) for side in sample.original.size)
    left, top = at[0] + (tile - width) // 2, at[1] + (tile - height) // 2
    resampling = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
    draw.rectangle((*at, at[0] + tile - 1, at[1] + tile - 1), TRAY)
    canvas.paste(sample.original.resize((width, height), resampling), (left, top))
    tags = []
    for number, (y, x, h, w) in enumerate(sample.boxes):
        x0, y0 = left + round(x * scale), top + round(y * scale)
        x1, y1 = max(left + round((x + w) * scale), x0 + TAG), max(top + round((y + h) * scale), y0 + TAG)
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline=PAPER, width=4)
        draw.rectangle((x0 + 1, y0 + 1, x1 - 2, y1 - 2), outline=_view_color(number), width=2)
        tags.append((x1 - TAG, y1 - TAG) if number == 1 else (x0 + 1, y0 + 1))
    for number, (x, y) in enumerate(tags):
        draw.rectangle((x, y, x + TAG - 2, y + TAG - 2), _view_color(number))
        draw.text((x + TAG / 2 - 1, y + TAG / 2 - 1), str(number + 1), PAPER, font, anchor="mm")


def write(image: Image.Image, path: Path) -> None:
    """Save a sheet as a PNG file, atomically.

    Raises:
        ConfigError: the path does not end in .png, or cannot be written.
    """
    check_png_file(path, "preview", "output")
    with output_file(path, "preview") as temporary:
        image.save(temporary, format="png", optimize=True)
