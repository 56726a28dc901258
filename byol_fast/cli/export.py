"""`byol-fast export`."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from byol_fast import config as configs
from byol_fast.cli.options import parse, print_error
from byol_fast.config import ConfigError
from byol_fast.config.resnets import has_stem_relu
from byol_fast.utils.progress import current
from byol_fast.utils.records import read_json
from byol_fast.utils.run_folder import encoder_files


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write the online encoder of a run's latest checkpoint.

    Formats other than plain weights are compared with the encoder on random images; if they differ, no file is written.
    """

    run: tyro.conf.Positional[Path]
    """The run folder, or an exported encoder."""
    format: Literal["torchvision", "torch-export", "onnx", "timm"] = "torchvision"
    """torchvision (encoder.safetensors and encoder.json), torch-export (encoder.pt2, a program of torch.export), onnx
    (encoder.onnx), timm (encoder_timm.safetensors)."""
    output: Path | None = None
    """Folder to write into; default: the run folder."""
    with_normalize: bool = False
    """torch-export and onnx: include the division by 255, mean and std; the input is then uint8."""


def main(argv: list[str]) -> int:
    """Run the command; return the exit code."""
    options = parse(Options, argv, "byol-fast export")
    if options.format == "torchvision":
        if options.with_normalize:
            raise ConfigError("export: format torchvision cannot include the normalization; drop --with-normalize")
        configs.load(options.run / "config.json")
    else:
        encoder_files(options.run)

    from byol_fast.export.encoder import export_run, load_latest_encoder
    from byol_fast.export.formats import ExportError, export_as, stem_code

    if options.format == "torchvision":
        paths = export_run(options.run, options.output)
        print(*paths, sep="\n")
        metadata = read_json(paths[1])
        if not has_stem_relu(metadata["encoder"]):  # the weights load without these lines, too, for other features
            print(
                "torchvision's resnet18 needs, before load_state_dict:",
                *stem_code(metadata, "encoder", "relu"),
                sep="\n  ",
            )
        return 0
    for logger in ("onnxscript", "onnx_ir"):  # they log every rewriting of the graph
        logging.getLogger(logger).setLevel(logging.WARNING)
    encoder, metadata = load_latest_encoder(options.run)
    folder = options.output or (options.run if options.run.is_dir() else options.run.parent)
    try:
        with current().bar(None, f"exporting as {options.format}"):
            result = export_as(encoder, metadata, options.format, folder, with_normalize=options.with_normalize)
    except ExportError as error:
        return print_error(str(error), 1)
    size = result.path.stat().st_size / 2**20
    print(f"{result.path} ({size:.1f} MiB, {metadata['encoder']}, step {metadata['step']})")
    print(f"input: {result.input}; B is any number")
    if result.difference is not None:
        batches = " and ".join(map(str, result.batches))
        print(
            f"equal to the encoder: largest difference {result.difference:.2g} of features up to "
            f"{result.largest:.2g}, with batch sizes {batches}"
        )
    if result.note:
        print(result.note)
    return 0
