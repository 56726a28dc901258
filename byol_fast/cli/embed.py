"""`byol-fast embed`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from byol_fast.cli.options import parse
from byol_fast.config import ConfigError, DataConfig
from byol_fast.config.fields import (
    BatchSize,
    Device,
    OnCorrupt,
    Precision,
    SheetNeighbors,
    SheetQueries,
    Threads,
    check_fields,
)
from byol_fast.data.sources.paths import check_path
from byol_fast.utils.files import check_features_path, check_output_file, check_png_file, printable_name
from byol_fast.utils.progress import current
from byol_fast.utils.run_folder import encoder_files

if TYPE_CHECKING:
    from torch import nn

    from byol_fast.data import ImageSource
    from byol_fast.evaluate import Features
    from byol_fast.evaluate.neighbors import Matrix


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write the features of all images of a folder, and a sheet of nearest neighbors."""

    encoder: tyro.conf.Positional[Path]
    """A run folder, or an exported encoder."""
    folder: tyro.conf.Positional[Path]
    """Folder of images; or a list, tar or Parquet shards, a .npz file."""
    output: Path = Path("features.npz")
    """File to write, .npz or .parquet: features, paths, labels where known."""
    neighbors: Path | None = None
    """PNG file to write: some images, each beside those with the most similar features. With --query neighbors.png
    beside the output by default."""
    queries: SheetQueries | None = None
    """Number of images on that sheet, selected from all classes; default: one of each, from 8 to 20."""
    k: SheetNeighbors = 8
    """Number of neighbors of each."""
    query: tuple[Path, ...] = ()
    """Images to find the most similar ones of: their paths are printed, and the sheet shows them."""
    batch_size: BatchSize = 256
    """Images per batch."""
    device: Device = "auto"
    """auto: the GPU if there is one."""
    precision: Precision = "auto"
    """Precision of the network; auto: bf16 where the hardware has it. Features are written as fp32."""
    threads: Threads = 0
    """Decoding threads; 0: one per core."""
    on_corrupt: OnCorrupt = "raise"
    """raise: stop at an image that cannot be read; skip: leave it out and list it."""
    image_column: str = ""
    """Parquet: name of the column of images, if it cannot be inferred."""
    label_column: str = ""
    """Parquet: name of the column of labels, if it cannot be inferred."""
    cache: Path = DataConfig().cache
    """Folder for indexes of tar shards and images of Parquet files."""
    overwrite: bool = False
    """Replace existing files."""

    def __post_init__(self) -> None:
        check_fields(self, "embed: ")
        if self.query and self.neighbors is None:
            object.__setattr__(self, "neighbors", self.output.with_name("neighbors.png"))


def main(argv: list[str]) -> int:
    """Run the command; return the exit code."""
    options = parse(Options, argv, "byol-fast embed")
    _check_options(options)

    from byol_fast.data import open_source
    from byol_fast.data.sources import FileSource
    from byol_fast.evaluate import save_features
    from byol_fast.evaluate.features import check_saving
    from byol_fast.export.encoder import load_encoder
    from byol_fast.report.neighbor_sheet import neighbor_sheet, save_sheet

    encoder = load_encoder(options.encoder)
    data_options = DataConfig(
        image_column=options.image_column,
        label_column=options.label_column,
        cache=options.cache,
        on_corrupt=options.on_corrupt,
    )
    source = open_source(options.folder, arg_name="folder", options=data_options)
    query_source = FileSource(root=Path(), paths=tuple(map(str, options.query))) if options.query else None
    # What cannot be written is found before the work of an hour, not after it.
    check_saving(source, encoder[1], options.output)
    title = f"Nearest neighbors: {encoder[1]['encoder']}, {encoder[1]['step']} steps"
    if options.neighbors is not None:
        _check_sheet(source, query_source, options, title)
    own = None
    if query_source is not None:  # first: an error there should not come after an hour
        own = query_source, _embed(encoder, query_source, options, is_query=True).features
    results = _embed(encoder, source, options)
    save_features(results, options.output)
    print(_summary(results, options.output))
    if options.neighbors is not None:
        embedded = source.subset(results.index)
        if own is not None:
            _print_nearest(embedded, results.features, own, options.k)
        with current().bar(None, "drawing the sheet of neighbors"):
            sheet = neighbor_sheet(
                embedded, results.features, queries=options.queries, k=options.k, own=own, title=title
            )
            save_sheet(sheet, options.neighbors)
        print(options.neighbors)
    return 0


def _check_options(options: Options) -> None:
    """Raise an error for paths that cannot be used, before torch is imported."""
    check_features_path(options.output)
    if missing := [str(path) for path in options.query if not path.exists()]:
        raise ConfigError(f"embed: query images must exist, {', '.join(missing)} does not; check the spelling")
    if folders := [str(path) for path in options.query if path.is_dir()]:
        raise ConfigError(f"embed: query must be image files, got the folder {folders[0]}; name the images in it")
    if options.neighbors is not None:
        check_png_file(options.neighbors, "embed", "neighbors")
    for option, path in (("--output", options.output), ("--neighbors", options.neighbors)):
        if path is not None:
            _check_writable(path, option, options.overwrite)
    encoder_files(options.encoder)
    check_path(options.folder, "folder")


def _embed(
    encoder: tuple[nn.Module, dict[str, Any]],
    source: ImageSource,
    options: Options,
    *,
    is_query: bool = False,
) -> Features:
    """Features of images; a corrupt image is an error of the user."""
    from byol_fast.data import CorruptImageError
    from byol_fast.evaluate import embed_folder

    on_corrupt: OnCorrupt = "raise" if is_query else options.on_corrupt
    try:
        return embed_folder(
            encoder,
            source,
            batch_size=options.batch_size,
            device=options.device,
            precision=options.precision,
            threads=options.threads,
            on_corrupt=on_corrupt,
            progress=current(),
        )
    except CorruptImageError as error:
        if on_corrupt == "skip":  # too many
            raise
        remedy = "leave it out of --query" if is_query else "leave out such images with --on-corrupt skip"
        raise ConfigError(f"embed: {error.name} {error.reason}; replace it, or {remedy}") from error


def _check_writable(path: Path, option: str, overwrite: bool) -> None:
    """Raise an error for a file that cannot be written or would be replaced, before torch is imported."""
    check_output_file(path, "embed")
    if path.exists() and not overwrite:
        raise ConfigError(f"embed: {path} exists already; name another file with {option}, or add --overwrite")


def _check_sheet(source: ImageSource, query_source: ImageSource | None, options: Options, title: str) -> None:
    """Draw a sheet of the first two images and write it beside the real one, then remove it."""
    import numpy as np

    from byol_fast.data import CorruptImageError
    from byol_fast.report.neighbor_sheet import default_queries, neighbor_sheet, save_sheet, sheet_size

    assert options.neighbors is not None
    count = options.queries or default_queries(source.labels)
    count = min(count, len(source)) if query_source is None else len(query_source)
    num_others = len(source) - (query_source is None)
    if not num_others:
        raise ConfigError(
            f"embed: neighbors must have 2 or more images to select from, got 1 in {options.folder}; leave --neighbors "
            "out, or name other images with --query"
        )
    sheet_size(count, min(options.k, num_others))
    two, features = source.subset(np.arange(min(2, len(source)))), np.ones((2, 1), np.float32)
    own = None if query_source is None else (query_source.subset(np.arange(1)), features[:1])
    try:
        sheet = neighbor_sheet(two, features[: len(two)], queries=1, k=1, own=own, title=title)
    except CorruptImageError:
        return  # found again, and named, when the images are embedded
    save_sheet(sheet, options.neighbors, trial=True)


def _print_nearest(source: ImageSource, features: Matrix, own: tuple[ImageSource, Matrix], k: int) -> None:
    """Print the images with the most similar features to each query."""
    from byol_fast.evaluate.neighbors import nearest

    similarity, neighbors = nearest(features, own[1], k=min(k, len(source)))
    for query, (scores, rows) in enumerate(zip(similarity.tolist(), neighbors.tolist(), strict=True)):
        print(f"{own[0].sample_name(query)}: the most similar images, by the cosine of their features")
        for score, row in zip(scores, rows, strict=True):
            print(f"  {score:.3f}  {source.sample_name(row)}")


def _summary(results: Features, output: Path) -> str:
    count, dim = results.features.shape
    labels = f", {len(results.classes)} classes" if results.labels is not None else ""
    text = f"{printable_name(output)}: {count:,} images, {dim} features each{labels}"
    text += f"; RankMe {results.rankme:.1f} of at most {min(count, dim)}"
    if results.skipped:
        names = ", ".join(map(printable_name, results.skipped[:5])) + (", ..." if len(results.skipped) > 5 else "")
        text += f"\nskipped because they cannot be read: {len(results.skipped)} ({names}); the file lists them"
    return text
