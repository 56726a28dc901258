"""The parts of a report that need the run's images: views, nearest neighbours, and a map of the features."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from byol_fast import config as configs
from byol_fast.config import Config, ConfigError
from byol_fast.data import BadImageError, ImageSource, eval_batches, split
from byol_fast.evaluate.extract import embed
from byol_fast.export.encoder import load_encoder
from byol_fast.models.layers import Normalize
from byol_fast.report import preview
from byol_fast.report.charts import Series, scatter
from byol_fast.report.neighbor_sheet import neighbour_sheet
from byol_fast.report.page import Section, chart_grid, figure, paragraph
from byol_fast.report.reading import RunFiles
from byol_fast.utils.precision import resolve_precision

log = logging.getLogger(__name__)

VIEWS, QUERIES, NEIGHBOURS = 4, 8, 6
COLOURED = 9
"""Classes that a map shows in colours of their own; the rest share one."""
GREY = 7
"""Place of that colour in the palette."""
TSNE_DIMENSIONS, TSNE_LEAST = 50, 30


def sections(run: RunFiles, *, images: Path | None, num: int) -> list[Section]:
    """Views, neighbours and map of a run; where one cannot be made, why.

    Args:
        run: of it the configuration, and the folder with the encoder.
        images: where the run's images are now; None: where they were.
        num: so many images are embedded at most, evenly spaced.
    """
    if run.config is None:
        return [Section("Images", paragraph("Left out: without a readable config.json the images are not known."))]
    # Who made the views at the time may not be at hand here; what was drawn for them is the same with every loader.
    changes: dict[str, object] = {"data.loader": "auto", "data.augment": "auto", "data.color": "exact"}
    changes |= {"data.on_bad": "skip", "device": "auto"} | ({} if images is None else {"data.root": images.absolute()})
    config = configs.replace(run.config, changes)
    try:
        train, val = split(config)
    except (ValueError, OSError) as error:
        hint = " --images FOLDER says where they are now." if images is None else ""
        return [Section("Images", paragraph(f"Views, neighbours and map are left out: {error}.{hint}"))]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = [_tried("Views", lambda: _views(train, config, device))]
    source = val if val is not None else train
    which = "validation" if val is not None else "training"
    try:
        kept, features = features_of(run.folder, source, config, device=device, num=num)
    except (ValueError, OSError, RuntimeError) as error:
        return [*found, Section("Features", paragraph(f"Neighbours and map are left out: {error}"))]
    about = f"{len(kept):,} {which} images, features of step {run.exported.get('step', run.last_step)}"
    found.append(_tried("Nearest neighbours", lambda: _neighbours(kept, features, about)))
    found.append(
        _tried(
            "Map of the features",
            lambda: chart_grid(maps(features, kept.labels, kept.classes)) + paragraph(about, "faint"),
        )
    )
    return found


def features_of(
    folder: Path, source: ImageSource, config: Config, *, device: torch.device, num: int
) -> tuple[ImageSource, Tensor]:
    """Features of evenly spaced images under a run's encoder.

    Returns:
        The images that could be read, and their features, fp32 `[N, D]` on the CPU.
    """
    encoder, about = load_encoder(folder)
    count = len(source)
    if num < count:
        source = source.subset((np.arange(num, dtype=np.int64) * count) // num)
    log.info("report: computing the features of %d images", len(source))
    kept: list[Tensor] = []

    def images() -> Iterator[tuple[Tensor, Tensor]]:
        for batch, index in eval_batches(
            source,
            about["image_size"],
            128,
            interpolation=config.view1.interpolation,
            threads=config.data.threads,
            device=device,
            on_bad="skip",
        ):
            kept.append(index)
            yield batch, index

    features = embed(
        encoder.to(device),
        images(),
        normalize=Normalize(tuple(about["mean"]), tuple(about["std"])).to(device),
        device=device,
        autocast=resolve_precision("auto", device).autocast,
    ).cpu()
    index = torch.cat(kept).numpy()
    if not bool(torch.isfinite(features).all()):
        raise ValueError("the encoder's features are not finite")
    return (source if len(index) == len(source) else source.subset(index)), features


def maps(features_ND: Tensor, labels: NDArray[np.int64] | None, classes: tuple[str, ...]) -> list[str]:
    """Features on the plane, coloured by class where it is known.

    Principal components of the normalised features (what cosine similarity sees), and t-SNE where scikit-learn is
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
    if len(x) >= TSNE_LEAST and importlib.util.find_spec("sklearn") is not None:
        from sklearn.manifold import TSNE

        placed = TSNE(init="pca", perplexity=min(30, len(x) // 4), random_state=0).fit_transform(projected.numpy())
        charts.append(
            scatter(_by_class(placed, labels, classes), title="t-SNE (only who is near whom means something)")
        )
    return charts


def principal_components(x_ND: Tensor, at_most: int) -> tuple[Tensor, list[float]]:
    """Coordinates along the directions of largest variance.

    Args:
        x_ND: fp32 rows.
        at_most: directions; there are two or more, of zeros if need be.

    Returns:
        fp32 `[N, max(2, min(N, D, at_most))]`, and the share of the variance along each direction. Signs are such that
        the largest coordinate is positive, so that the map of a run is always the same.
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
    def group(name: str, where: NDArray[np.bool_]) -> Series:
        return Series(name, xy_N2[where, 0].tolist(), xy_N2[where, 1].tolist())

    if labels is None or not (labels >= 0).any():
        return [group("images", np.ones(len(xy_N2), bool))]
    present, counts = np.unique(labels[labels >= 0], return_counts=True)
    shown = present if len(present) <= COLOURED + 1 else np.sort(present[np.argsort(-counts, kind="stable")[:COLOURED]])
    groups = [group(classes[c], labels == c) for c in shown.tolist()]
    others = ~np.isin(labels, shown)
    if others.any():
        left = len(present) - len(shown)
        groups.insert(min(GREY, len(groups)), group(f"{left} other classes" if left else "class unknown", others))
    return groups


def _views(source: ImageSource, config: Config, device: torch.device) -> str:
    sheet = preview.contact_sheet(source, config, device=device, num=VIEWS)
    return figure(sheet, "Images, and the two views that the network gets of each in the first epoch")


def _neighbours(source: ImageSource, features: Tensor, about: str) -> str:
    sheet = neighbour_sheet(source, features, queries=QUERIES, k=NEIGHBOURS, title="Most similar features")
    return figure(sheet, f"Left, an image; beside it those whose features are most similar ({about})")


def _tried(title: str, make: Callable[[], str]) -> Section:
    """A section, or why there is none."""
    try:
        return Section(title, make())
    except (BadImageError, ConfigError, ValueError, OSError, RuntimeError) as error:
        return Section(title, paragraph(f"Left out: {error}"))
