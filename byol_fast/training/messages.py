"""Lines and progress bar of a run."""

from __future__ import annotations

import math

from byol_fast.training.builder import TrainerComponents
from byol_fast.training.metrics_file import Record
from byol_fast.training.state import TrainState
from byol_fast.utils.progress import ProgressBar, current


def startup_summary(parts: TrainerComponents) -> list[str]:
    """Lines about the run before its first step: model, data, batch, device, execution mode, notes."""
    config, execution, step, total = parts.config, parts.execution, parts.state.step, parts.total_steps
    world = execution.world
    count = sum(p.numel() for p in parts.state.model.trainable_parameters()) / 1e6
    if step >= total:
        begin = f"already complete at step {step} of {total}:"
    else:
        verb = "resuming" if parts.checkpoint is not None else "extending"
        begin = f"{verb} after step {step} of {total}:" if step else "training"
    batch = f"{config.batch_size}"
    batch += f" x {config.grad_accum_steps} accumulated" if config.grad_accum_steps > 1 else ""
    batch += f" x {world.size} processes" if not world.is_single else ""
    return [
        (
            f"{begin} {config.recipe}: {config.model.encoder}, {count:.1f} M parameters with the heads, "
            f"{len(parts.train_source)} images, {total} steps of {batch}, "
            f"{execution.device} {execution.precision.name}, data by {parts.state.loader.name}"
        ),
        f"mode: {execution.mode.name} ({execution.mode.reason})",
        *parts.notes,
    ]


def training_bar(parts: TrainerComponents) -> ProgressBar:
    """Progress bar of the run; prints nothing on other ranks than 0."""
    line = "step {done}/{total}  {description}  {note}  {times}"
    description = epoch_text(parts.state)
    return ProgressBar(current(), parts.total_steps, description, done=parts.state.step, line=line, keep=True)


def epoch_text(state: TrainState) -> str:
    """Finished epochs, for the progress bar."""
    return f"epoch {state.epoch:.2f}"


def status_line(record: Record) -> str:
    """The metrics of a step, for the progress bar."""
    loss = "skipped" if record["loss"] is None else f"{record['loss']:.4f}"
    std = math.nan if record["embedding_std"] is None else record["embedding_std"]
    return (
        f"loss {loss}  std {std:.2f}  lr {record['lr']:.3g}  tau {record['tau']:.4f}  "
        f"{record['images_per_second']:.1f} img/s  data wait {record['data_wait']:.0%}"
    )
