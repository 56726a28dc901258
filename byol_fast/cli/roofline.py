"""`byol-fast roofline`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import tyro

from byol_fast.cli.options import print_error
from byol_fast.config import Config, recipes

USAGE = """\
usage: byol-fast roofline RECIPE [--gpu H100 ...] [--measure] [--output FILE.json] [--plot FILE.svg] [--option ...]

Counts the FLOPs and the least memory traffic of a training step at four levels of fusion, and predicts the maximum
images per second of GPUs (A100, H100, H200, RTX 4090; none is needed) or, with --measure, of this machine.
`byol-fast roofline RECIPE --help` lists every option with the recipe's value.
"""


def main(argv: list[str]) -> int:
    """Run the command and return the exit code."""
    name = argv.pop(0) if argv and not argv[0].startswith("-") else None
    if name is None:
        print(USAGE, end="")
        return 0 if argv and argv[0] in {"-h", "--help"} else print_error("byol-fast roofline: a recipe is missing", 2)
    recipe = recipes.get(name)

    def options(
        config: Annotated[Config, tyro.conf.arg(name="")] = recipe,
        gpu: tuple[str, ...] = (),
        measure: bool = False,
        level: str = "B",
        output: Path | None = None,
        plot: Path | None = None,
    ) -> tuple[Config, tuple[str, ...], bool, str, Path | None, Path | None]:
        """Count FLOPs and memory traffic of a training step, and predict the maximum speed of devices.

        Args:
            config: of the run.
            gpu: A100, H100, H200, RTX 4090; all by default.
            measure: measure the ceilings of this machine, and predict for it.
            level: of the plot: A eager, B fused by torch.compile, D batch norm fused with convolutions, E bound.
            output: JSON file to write, with a row per layer, phase and family.
            plot: SVG file to write: roofline of the first device with a point per block of layers.
        """
        return config, gpu, measure, level, output, plot

    config, gpu, measured, level, output, plot = tyro.cli(options, args=argv, prog=f"byol-fast roofline {name}")

    from byol_fast.profiling import GPUS, measure, roofline, stated
    from byol_fast.profiling.traffic import LEVELS
    from byol_fast.utils.device import resolve_device
    from byol_fast.utils.files import atomic_write, check_output_file
    from byol_fast.utils.precision import resolve_precision

    if level not in LEVELS:
        return print_error(f"byol-fast roofline: level must be one of {', '.join(LEVELS)}, got {level!r}", 2)
    for path in (output, plot):
        if path is not None:
            check_output_file(path, "roofline")
    device = resolve_device(config.device)
    if measured:
        dtype = resolve_precision(config.precision, device).name
    else:
        dtype = "bf16" if config.precision == "auto" else config.precision
    ceilings = [measure(device, dtype)] if measured else []
    ceilings += [stated(one, dtype) for one in gpu or (() if measured else GPUS)]
    result = roofline(config, dtype=dtype)
    result.show(ceilings)
    if output is not None:
        atomic_write(output, json.dumps(result.to_json(ceilings), indent=1) + "\n")
        print(output)
    if plot is not None:
        atomic_write(plot, result.chart(ceilings[0], level))
        print(plot)
    return 0
