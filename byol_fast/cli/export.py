"""`byol-fast export`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import tyro

from byol_fast import config as configs
from byol_fast.cli.options import print_error
from byol_fast.config import ConfigError
from byol_fast.utils.run_folder import encoder_files


def main(argv: list[str]) -> int:
    """Run the command; return the exit code."""

    def export(
        run: tyro.conf.Positional[Path],
        format: Literal["torchvision", "torch-export", "onnx", "timm"] = "torchvision",
        output: Path | None = None,
        with_normalize: bool = False,
    ) -> int:
        """Write the online encoder of a run's latest checkpoint.

        Formats other than plain weights are compared with the encoder on random images; if they differ, no file is
        written.

        Args:
            run: the run folder, or an exported encoder.
            format: torchvision (encoder.safetensors and encoder.json), torch-export (encoder.pt2, a program of
                torch.export), onnx (encoder.onnx), timm (encoder_timm.safetensors).
            output: folder to write into; default: the run folder.
            with_normalize: torch-export and onnx: include the division by 255, mean and std; the input is then uint8.
        """
        if format == "torchvision":
            configs.load(run / "config.json")
        else:
            encoder_files(run)

        from byol_fast.export.encoder import export_run, load_latest_encoder
        from byol_fast.export.formats import ExportError, export_as

        if format == "torchvision":
            if with_normalize:
                raise ConfigError("export: format torchvision cannot include the normalization; drop --with-normalize")
            for path in export_run(run, output):
                print(path)
            return 0
        for logger in ("onnxscript", "onnx_ir"):  # they log every rewriting of the graph
            logging.getLogger(logger).setLevel(logging.WARNING)
        encoder, metadata = load_latest_encoder(run)
        folder = output or (run if run.is_dir() else run.parent)
        try:
            result = export_as(encoder, metadata, format, folder, with_normalize=with_normalize)
        except ExportError as error:
            return print_error(str(error), 1)
        size = result.path.stat().st_size / 2**20
        print(f"{result.path} ({size:.1f} MiB, {metadata['encoder']}, step {metadata['step']})")
        if result.difference is not None:
            batches = " and ".join(map(str, result.batches))
            print(
                f"equal to the encoder: largest difference {result.difference:.2g} of features up to "
                f"{result.largest:.2g}, with batch sizes {batches}"
            )
        if result.note:
            print(result.note)
        return 0

    return tyro.cli(export, args=argv, prog="byol-fast export")
