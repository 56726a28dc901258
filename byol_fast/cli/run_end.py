"""The end of a run in the terminal: results, files, and commands to go on with."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from byol_fast.config import Config
from byol_fast.report.formatting import duration
from byol_fast.utils.commands import program, shell_path, short_path

if TYPE_CHECKING:
    from byol_fast.training.run_dir import RunResult

USELESS_ENCODER = 3
"""Exit code of a run with a `RunResult.problem`."""
_FILES = ("encoder.safetensors", "encoder.json", "report.html", "metrics.jsonl")
_IMAGES = "path/to/images"
_LABELED_IMAGES = "--train path/to/labeled/train --test path/to/labeled/test"


def print_end(result: RunResult, config: Config, *, seconds: float | None, first_step: int = 0) -> int:
    """Print the end of a run and return the exit code.

    Args:
        result: of the run.
        config: of the run.
        seconds: time since the start; None if the run was complete before, so that nothing was trained.
        first_step: steps done before the start, which are not in that time.
    """
    lines = _results(result, config, seconds, first_step)
    if result.problem is None:
        lines += _next_steps(result, config)
    elif seconds is None:
        lines.append("not trained again: change the options, or start without --resume")
    print("\n".join(lines))
    return USELESS_ENCODER if result.problem and seconds is not None else 0


def _results(result: RunResult, config: Config, seconds: float | None, first_step: int) -> list[str]:
    begin = "already complete" if seconds is None else f"done in {duration(seconds)}"
    if seconds is not None and first_step:
        begin += f" after step {first_step:,}; in all"
    line = f"{begin}: {result.steps:,} steps, {result.images:,} images"
    if (speed := result.images_per_second) > 0:  # not NaN
        line += f", {speed:,.0f} images per second" if speed >= 10 else f", {speed:.2g} images per second"
    lines = [line]
    if result.knn_top1 is not None:
        top1 = result.knn_top1_untrained
        before = "" if top1 is None else f"{top1:.1%} {config.before_training}, "
        lines.append(f"kNN-{result.knn_k} top-1 accuracy: {before}{result.knn_top1:.1%} trained")
    present = [name for name in _FILES if (result.run_dir / name).exists()]
    return [*lines, f"files in {short_path(result.run_dir)}: {', '.join(present)}"]


def _next_steps(result: RunResult, config: Config) -> list[str]:
    """Commands and lines of Python with the names of this run."""
    run = result.run_dir
    images = _IMAGES if config.data.root is None else short_path(config.data.root)
    has_labels = result.knn_top1 is not None  # and validation images: the command finds both
    skips = config.data.on_corrupt == "skip"
    option, argument = (" --on-corrupt skip", ', on_corrupt="skip"') if skips else ("", "")
    return [
        "next, on the command line:",
        f"  {program()} embed {shell_path(run)} {shlex.quote(images)}{option}",
        f"  {program()} eval linear {shell_path(run)}" + ("" if has_labels else f" {_LABELED_IMAGES}") + option,
        f"  {program()} export {shell_path(run)} --format onnx",
        "or in Python:",
        "  import byol_fast",
        f"  encoder, metadata = byol_fast.load_encoder({short_path(run)!r})",
        f"  features = byol_fast.evaluate.embed_folder((encoder, metadata), {images!r}{argument}).features",
    ]
