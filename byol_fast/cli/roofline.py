"""`byol-fast roofline`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from byol_fast.cli.options import RunOptions, find_recipe, parse, print_error
from byol_fast.config import ConfigError
from byol_fast.config.encoder_names import check_encoder_name
from byol_fast.profiling.gpus import GPUS, gpu_name
from byol_fast.utils.files import atomic_write, check_output_file

USAGE = """\
usage: byol-fast roofline RECIPE [--gpu H100 ...] [--measure] [--output FILE.json] [--plot FILE.svg] [--option ...]

Counts the FLOPs and the least memory traffic of a training step at four levels of fusion, and predicts the maximum
images per second of GPUs (A100, H100, H200, RTX 4090; none is needed) or, with --measure, of this machine.
`byol-fast roofline RECIPE --help` lists every option with the recipe's value.
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Count FLOPs and memory traffic of a training step, and predict the maximum speed of devices."""

    run: Annotated[RunOptions, tyro.conf.arg(name="")]
    """Options of the run."""
    gpu: tuple[str, ...] = ()
    """A100, H100, H200, RTX 4090; all by default."""
    measure: bool = False
    """Measure the ceilings of this machine, and predict for it."""
    level: Literal["A", "B", "D", "E"] = "B"
    """Of the plot: A eager, B fused by torch.compile, D batch norm fused with convolutions, E bound."""
    output: Path | None = None
    """JSON file to write, with a row per layer, phase and family."""
    plot: Path | None = None
    """SVG file to write: roofline of the first device with a point per block of layers."""


def main(argv: list[str]) -> int:
    """Run the command and return the exit code."""
    name = argv.pop(0) if argv and not argv[0].startswith("-") else None
    if name is None:
        print(USAGE, end="")
        return 0 if argv and argv[0] in {"-h", "--help"} else print_error("byol-fast roofline: a recipe is missing", 2)
    prog = f"byol-fast roofline {name}"
    recipe = find_recipe(name, "byol-fast roofline", images="")
    options = parse(Options, argv, prog, Options(run=RunOptions(config=recipe)))
    if options.run.folder:
        raise ConfigError(f"{prog}: reads no images, got FOLDER {options.run.folder[0]}; drop it")
    config = options.run.resolve(argv, prog)
    check_encoder_name(config.model.encoder)
    for gpu in options.gpu:
        gpu_name(gpu)
    for path in filter(None, (options.output, options.plot)):
        check_output_file(path, "roofline")

    from byol_fast.profiling import measure, roofline, stated
    from byol_fast.training.memory_estimate import try_estimate
    from byol_fast.utils.device import resolve_device
    from byol_fast.utils.precision import resolve_precision

    device = resolve_device(config.device)
    if options.measure:
        dtype = resolve_precision(config.precision, device).name
    else:
        dtype = "bf16" if config.precision == "auto" else config.precision
    ceilings = [measure(device, dtype)] if options.measure else []
    ceilings += [stated(one, dtype) for one in options.gpu or (() if options.measure else GPUS)]
    result = roofline(config, dtype=dtype)
    result.show(ceilings)
    memory = try_estimate(config, device.type if options.measure else "cuda", resolve_precision(dtype, device))
    print(f"memory: {memory}")
    if options.output is not None:
        atomic_write(options.output, json.dumps(result.to_json(ceilings), indent=1) + "\n")
        print(options.output)
    if options.plot is not None:
        atomic_write(options.plot, result.chart(ceilings[0], options.level))
        print(options.plot)
    return 0
