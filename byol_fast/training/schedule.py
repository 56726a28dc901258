"""The schedule of a run, from its configuration and the number of its batches."""

from __future__ import annotations

from fractions import Fraction

from byol_fast.config import Config, ConfigError
from byol_fast.data.sampler import BatchSampler
from byol_fast.optim import RunSchedule
from byol_fast.training.extend import total_too_small
from byol_fast.training.state import steps_in
from byol_fast.utils.commands import short_path


def build_schedule(
    config: Config, sampler: BatchSampler, total_steps: int, global_batch_size: int, notes: list[str]
) -> RunSchedule:
    """Learning rate and tau of a run; of one that extends another, over the added steps and without warm-up.

    Args:
        config: of the run.
        sampler: its batches.
        total_steps: of the run, with those of a run that it extends.
        global_batch_size: images per optimizer step.
        notes: lines for the startup summary; what is not as configured is added.

    Raises:
        ConfigError: the warm-up is longer than the run, or no step is added to those of the extended run.
    """
    optim = config.optim
    if total_steps <= config.extended_at:
        raise total_too_small(config, f"{config.extended_at:,} steps")
    schedule = RunSchedule(
        total_steps=total_steps,
        first_step=config.extended_at,
        warmup_steps=_warmup_steps(config, sampler, total_steps, notes) if config.extend is None else 0,
        base_lr=optim.lr,
        batch_size=global_batch_size if optim.scale_lr else 256,
        lr_schedule=optim.schedule,
        steps_per_epoch=Fraction(sampler.batches_per_epoch, config.grad_accum_steps)
        if optim.lr_interval == "epoch"
        else None,
        tau_base=config.tau.base,
        tau_schedule=config.tau.schedule,
    )
    if config.extend is not None:
        notes.append(_extension(config, schedule))
    return schedule


def _warmup_steps(config: Config, sampler: BatchSampler, total_steps: int, notes: list[str]) -> int:
    optim = config.optim
    if (given := optim.warmup_steps) is not None:
        if given > total_steps:
            raise ConfigError(f"config: optim.warmup_steps must be at most the run's {total_steps} steps, got {given}")
        return given
    asked = round(steps_in(optim.warmup_epochs, sampler, config.grad_accum_steps))
    steps = min(asked, total_steps // 4)
    if steps < asked:
        notes.append(f"warm-up of {asked} steps cut to {steps}, a quarter of the run's {total_steps}")
    return steps


def _extension(config: Config, schedule: RunSchedule) -> str:
    """Learning rate and tau over the added steps, in a line."""
    assert config.extend is not None
    first = schedule.first_step
    lr = f"lr {schedule.lr(first):.4g} {_in_words(schedule.lr_schedule)}, without warm-up"
    tau = f"; tau {schedule.tau(first):.4g} {_in_words(schedule.tau_schedule)}" if config.method == "byol" else ""
    return f"extends {short_path(config.extend)} from step {first:,} to {schedule.total_steps:,}: {lr}{tau}"


def _in_words(schedule: str) -> str:
    return "by cosine again" if schedule == "cosine" else schedule
