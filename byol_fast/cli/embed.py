"""`byol-fast embed`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro
from rich.console import Console

from byol_fast.config import ConfigError, DataConfig

DEFAULT_CACHE = DataConfig().cache

if TYPE_CHECKING:
    from byol_fast.evaluate import Features


def main(argv: list[str]) -> int:
    """Run it; return the exit code."""

    def embed(
        encoder: tyro.conf.Positional[Path],
        folder: tyro.conf.Positional[Path],
        output: Path = Path("features.npz"),
        neighbors: Path | None = None,
        queries: int = 8,
        k: int = 8,
        query: tuple[Path, ...] = (),
        batch_size: int = 256,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        precision: Literal["auto", "bf16", "fp16", "tf32", "fp32"] = "auto",
        threads: int = 0,
        on_bad: Literal["raise", "skip"] = "raise",
        image_column: str = "",
        label_column: str = "",
        cache: Path = DEFAULT_CACHE,
        overwrite: bool = False,
    ) -> None:
        """Write the features of every image of a folder; show which images the encoder takes for similar.

        Args:
            encoder: a run folder, or an exported encoder.
            folder: of images; or a list, tar or Parquet shards, a .npz file.
            output: the file to write, .npz or .parquet: features, paths, labels where known.
            neighbors: a PNG file: some images, and beside each those with the most similar features.
            queries: images on that sheet, chosen from all classes.
            k: neighbors of each.
            query: images of your own that the sheet shows instead of chosen ones.
            batch_size: images at a time.
            device: auto is the GPU where there is one.
            precision: of the network; auto is bf16 where the hardware has it. Features are written as fp32.
            threads: decoding threads; 0 means one for each core.
            on_bad: an image that cannot be read is an error, or is left out and listed.
            image_column: Parquet: the column of images, where its name says nothing.
            label_column: Parquet: the column of labels, where its name says nothing.
            cache: folder that indexes of tar shards and the images of Parquet files are kept in.
            overwrite: replace files that exist.
        """
        if query and neighbors is None:
            raise ConfigError("embed: query is for the sheet of neighbors; add --neighbors FILE.png")
        if missing := [str(path) for path in query if not path.exists()]:
            raise ConfigError(f"embed: query images must exist, {', '.join(missing)} does not; check the spelling")
        if neighbors is not None and neighbors.suffix.lower() != ".png":
            raise ConfigError(f"embed: neighbors must be a file that ends in .png, got {neighbors}")
        if min(queries, k, batch_size) < 1:
            raise ConfigError(f"embed: queries, k and batch_size must be 1 or more, got {queries}, {k}, {batch_size}")

        from byol_fast.data import CorruptImageError, open_source
        from byol_fast.data.sources import FileSource
        from byol_fast.evaluate import embed_folder, save_features
        from byol_fast.evaluate.features import check_features_path
        from byol_fast.export.encoder import load_encoder
        from byol_fast.report.neighbor_sheet import neighbor_sheet, save_sheet
        from byol_fast.utils.progress import Progress

        check_features_path(output)
        for path in (output, *([neighbors] if neighbors is not None else [])):
            _check_writable(path, overwrite)
        network = load_encoder(encoder)
        source = open_source(
            folder,
            arg_name="folder",
            options=DataConfig(image_column=image_column, label_column=label_column, cache=cache),
        )
        own = FileSource(root=Path(), paths=tuple(map(str, query))) if query else None
        common: dict[str, Any] = {"device": device, "precision": precision, "threads": threads}
        try:
            # First what is quick: an image that is misspelt need not cost an hour.
            asked = None if own is None else embed_folder(network, own, **common).features
            with Progress(Console() if sys.stdout.isatty() else None).bar(len(source), "images") as bar:
                found = embed_folder(
                    network,
                    source,
                    batch_size=batch_size,
                    on_bad=on_bad,
                    progress=lambda done, _: bar.advance(done),
                    **common,
                )
            save_features(found, output)
            print(_summary(found, output))
            if neighbors is not None:
                sheet = neighbor_sheet(
                    source.subset(found.index),
                    found.features,
                    queries=queries,
                    k=k,
                    own=None if own is None or asked is None else (own, asked),
                    title=f"Nearest neighbors: {network[1]['encoder']}, {network[1]['step']} steps",
                )
                save_sheet(sheet, neighbors)
                print(neighbors)
        except CorruptImageError as error:
            if own is None and on_bad == "skip":
                raise
            raise ConfigError(
                f"embed: {error.path} {error.reason}; replace it, or leave such images out: --on-bad skip"
            ) from error

    tyro.cli(embed, args=argv, prog="byol-fast embed")
    return 0


def _check_writable(path: Path, overwrite: bool) -> None:
    """Refuse what cannot be written before an hour has gone into it, and what an hour has gone into before."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"embed: {path} cannot be written ({error}); choose another file") from error
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        why = "it is a folder" if path.is_dir() else f"no permission to write into {path.parent}"
        raise ConfigError(f"embed: {path} cannot be written ({why}); choose another file")
    if path.exists() and not overwrite:
        raise ConfigError(f"embed: {path} exists already; choose another file, or add --overwrite")


def _summary(found: Features, output: Path) -> str:
    count, dim = found.features.shape
    labels = f", {len(found.classes)} classes" if found.labels is not None else ""
    text = f"{output}: {count:,} images, {dim} features each{labels}"
    text += f"; RankMe {found.rankme:.1f} of at most {min(count, dim)}"
    if found.skipped:
        shown = ", ".join(found.skipped[:5]) + (", ..." if len(found.skipped) > 5 else "")
        text += f"\nleft out because they cannot be read: {len(found.skipped)} ({shown}); the file lists them"
    return text
