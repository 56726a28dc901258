"""Sections that need the run's images: views, nearest neighbors, and a map of the features."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from byol_fast import config as configs
from byol_fast.config import Config, ConfigError, Preprocessing
from byol_fast.data import CorruptImageError, ImageSource, eval_batches, open_train_val
from byol_fast.data.sources.base import evenly_spaced
from byol_fast.evaluate.extract import extract_features
from byol_fast.export.encoder import load_encoder
from byol_fast.models.layers import Normalize
from byol_fast.report import preview
from byol_fast.report.charts import Series, scatter
from byol_fast.report.neighbor_sheet import neighbor_sheet
from byol_fast.report.page import Section, chart_grid, figure, paragraph
from byol_fast.report.reading import RunFiles
from byol_fast.utils.files import printable_name
from byol_fast.utils.precision import resolve_precision
from byol_fast.utils.progress import current

NUM_VIEWS, NUM_NEIGHBORS = 4, 6
MAX_CLASSES = 9
"""Classes that a map shows in colors of their own; the rest share one."""
GRAY = 7
"""Index of that color."""
TSNE_DIMENSIONS, TSNE_MIN_IMAGES = 50, 30


def picture_sections(run: RunFiles, *, images: Path | None, num: int) -> list[Section]:
    """Views, nearest neighbors and map of the features; a section that cannot be made says why.

    Args:
        run: the run; its folder contains the encoder.
        images: the folder or file with the run's images, if they were moved.
        num: maximum number of images to embed, evenly spaced.
    """
    if run.config is None:
        return [Section("Images", paragraph("Left out: without a readable config.json the images are not known."))]
    # The run's loader may not be available on this machine; the augmentation parameters are the same with every one.
    changes: dict[str, object] = {"data.loader": "auto", "data.augment": "kernels"}
    changes |= {"data.on_corrupt": "skip", "device": "auto"} | (
        {} if images is None else {"data.root": images.absolute()}
    )
    config = configs.replace(run.config, changes)
    try:
        train, val = open_train_val(config)
    except (ValueError, OSError) as error:
        hint = " If the images were moved, pass --images FOLDER." if images is None else ""
        return [Section("Images", paragraph(f"Views, neighbors and map are left out: {error}.{hint}"))]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sections = [_section("Views", lambda: _views(train, config, device))]
    source, name = (train, "training") if val is None else (val, "validation")
    try:
        embedded, features = features_of(run.folder, source, config, device=device, num=num)
    except (ValueError, OSError, RuntimeError) as error:
        return [*sections, Section("Features", paragraph(f"Neighbors and map are left out: {error}"))]
    caption = f"{len(embedded):,} {name} images, features of step {run.exported.get('step', run.last_step)}"
    return [
        *sections,
        _section("Nearest neighbors", lambda: _neighbors(embedded, features, caption)),
        _section(
            "Map of the features",
            lambda: chart_grid(maps(features, embedded.labels, embedded.classes)) + paragraph(caption, "faint"),
        ),
    ]


def features_of(
    folder: Path, source: ImageSource, config: Config, *, device: torch.device, num: int
) -> tuple[ImageSource, Tensor]:
    """Features of evenly spaced images under a run's encoder.

    Returns:
        The images that could be read, and their features, fp32 `[N, D]` on the CPU.
    """
    encoder, metadata = load_encoder(folder)
    preprocessing = Preprocessing.of_metadata(metadata)
    total = len(source)
    if num < total:
        source = source.subset(evenly_spaced(total, num))
    batches = eval_batches(
        source,
        preprocessing,
        128,
        threads=config.data.threads,
        device=device,
        on_corrupt="skip",
    )
    features, positions = extract_features(
        encoder.to(device),
        current().track(batches, len(source), "features of images"),
        normalize=Normalize(preprocessing.mean, preprocessing.std).to(device),
        device=device,
        autocast=resolve_precision("auto", device).autocast_dtype,
    )
    features, index = features.cpu(), positions.numpy()
    if not bool(torch.isfinite(features).all()):
        raise ValueError("the encoder's features are not finite")
    return (source if len(index) == len(source) else source.subset(index)), features


def maps(features_ND: Tensor, labels: NDArray[np.int64] | None, classes: tuple[str, ...]) -> list[str]:
    """Features in two dimensions, colored by class where it is known.

    Principal components of the normalized features, as cosine similarity compares them, and t-SNE if scikit-learn is
    installed.

    Args:
        features_ND: at least one row.
        labels: class of each row, -1 where unknown.
        classes: their names.

    Returns:
        Charts.
    """
    x = F.normalize(features_ND, dim=1)
    projected, shares = principal_components(x, TSNE_DIMENSIONS)
    x_label, y_label = (f"component {k + 1} ({shares[k]:.0%} of the variance)" for k in range(2))
    groups = _by_class(projected[:, :2].numpy(), labels, classes)
    charts = [scatter(groups, title="Principal components", x_label=x_label, y_label=y_label)]
    if len(x) >= TSNE_MIN_IMAGES and importlib.util.find_spec("sklearn") is not None:
        from sklearn.manifold import TSNE

        mapped = TSNE(init="pca", perplexity=min(30, len(x) // 4), random_state=0).fit_transform(projected.numpy())
        groups = _by_class(mapped, labels, classes)
        charts.append(scatter(groups, title="t-SNE (distances between clusters mean nothing)"))
    return charts


def principal_components(x_ND: Tensor, at_most: int) -> tuple[Tensor, list[float]]:
    """Coordinates along the directions of largest variance.

    Args:
        x_ND: fp32 rows.
        at_most: number of directions; missing ones are filled with zeros up to two.

    Returns:
        fp32 `[N, max(2, min(N, D, at_most))]`, and the share of the variance along each direction. Signs make the
        coordinate with the largest magnitude positive, so that the map of a run is always the same.
    """
    x = x_ND.double()
    x = x - x.mean(0)
    u, sigma, _ = torch.linalg.svd(x, full_matrices=False)
    variance = sigma.square()
    shares = variance / variance.sum().clamp_min(1e-30)
    count = min(len(sigma), at_most)
    y = u[:, :count] * sigma[:count]
    largest = y.gather(0, y.abs().argmax(0, keepdim=True))
    y = y * torch.where(largest < 0, -1.0, 1.0)
    missing = max(0, 2 - count)
    return F.pad(y, (0, missing)).float(), [*shares[:count].tolist(), *[0.0] * missing]


def _by_class(xy_N2: NDArray[np.float32], labels: NDArray[np.int64] | None, classes: tuple[str, ...]) -> list[Series]:
    """Points grouped by class: the largest classes, and the others together."""

    def group(name: str, where: NDArray[np.bool_]) -> Series:
        return Series(name, xy_N2[where, 0].tolist(), xy_N2[where, 1].tolist())

    if labels is None or not (labels >= 0).any():
        return [group("images", np.ones(len(xy_N2), bool))]
    present, counts = np.unique(labels[labels >= 0], return_counts=True)
    shown = present
    if len(present) > MAX_CLASSES + 1:
        shown = np.sort(present[np.argsort(-counts, kind="stable")[:MAX_CLASSES]])
    groups = [group(printable_name(classes[c]), labels == c) for c in shown.tolist()]
    others = ~np.isin(labels, shown)
    if others.any():
        num_others = len(present) - len(shown)
        name = f"{num_others} other classes" if num_others else "class unknown"
        groups.insert(min(GRAY, len(groups)), group(name, others))
    return groups


def _views(source: ImageSource, config: Config, device: torch.device) -> str:
    sheet = preview.contact_sheet(source, config, device=device, num=NUM_VIEWS)
    return figure(sheet, "Images, and their views in the first epoch")


def _neighbors(source: ImageSource, features: Tensor, caption: str) -> str:
    sheet = neighbor_sheet(source, features, k=NUM_NEIGHBORS, title="Nearest neighbors")
    return figure(sheet, f"Left, an image; beside it the images with the most similar features ({caption})")


def _section(title: str, make: Callable[[], str]) -> Section:
    """A section, or the reason why it is left out."""
    try:
        return Section(title, make())
    except (CorruptImageError, ConfigError, ValueError, OSError, RuntimeError) as error:
        return Section(title, paragraph(f"Left out: {error}"))
