"""`byol-fast export`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import tyro

from byol_fast.cli.options import complain
from byol_fast.config import ConfigError


def main(argv: list[str]) -> int:
    """Run it; return the exit code."""

    def export(
        run: tyro.conf.Positional[Path],
        format: Literal["torchvision", "torch-export", "onnx", "timm"] = "torchvision",
        output: Path | None = None,
        with_normalize: bool = False,
    ) -> int:
        """Write the online encoder of a run's newest checkpoint.

        What is not plain weights is compared with the encoder on random images before it is kept.

        Args:
            run: the run folder, or an exported encoder.
            format: torchvision (encoder.safetensors and encoder.json), torch-export (encoder.pt2, a program of
                torch.export), onnx (encoder.onnx), timm (encoder_timm.safetensors).
            output: folder to write into; the run folder by default.
            with_normalize: torch-export and onnx: take uint8 images, and divide by 255, mean and deviation within.
        """
        from byol_fast.export.encoder import export_run, newest_encoder
        from byol_fast.export.formats import ExportError, export_as

        if format == "torchvision":
            if with_normalize:
                raise ConfigError("export: torchvision's weights hold no normalisation; drop --with-normalize")
            for path in export_run(run, output):
                print(path)
            return 0
        for chatty in ("onnxscript", "onnx_ir"):  # they tell every rewriting of the graph
            logging.getLogger(chatty).setLevel(logging.WARNING)
        encoder, about = newest_encoder(run)
        folder = output or (run if run.is_dir() else run.parent)
        try:
            made = export_as(encoder, about, format, folder, with_normalize=with_normalize)
        except ExportError as error:
            return complain(str(error), 1)
        print(f"{made.path} ({made.path.stat().st_size / 2**20:.1f} MiB, {about['encoder']}, step {about['step']})")
        if made.difference is not None:
            batches = " and ".join(map(str, made.batches))
            print(
                f"equal to the encoder: largest difference {made.difference:.2g} at features up to {made.largest:.2g}, "
                f"in batches of {batches} images"
            )
        if made.note:
            print(made.note)
        return 0

    return tyro.cli(export, args=argv, prog="byol-fast export")
