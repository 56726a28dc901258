"""Profile of the steps of a real run: its data, networks and options."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch

from byol_fast import config as configs
from byol_fast.config import Config, ConfigError
from byol_fast.config.fields import ProfiledSteps, check
from byol_fast.profiling import findings as rules
from byol_fast.profiling import probes
from byol_fast.profiling.ceilings import Ceilings, measure
from byol_fast.profiling.flops import mfu
from byol_fast.profiling.rooflines import PHASES, Roofline, roofline
from byol_fast.profiling.trace import PhaseClock, StepTimes, Trace, median_step, phase_rows, trace_steps
from byol_fast.profiling.traffic import LEVELS, Level
from byol_fast.training.callbacks import Callback
from byol_fast.training.locks import exclusive
from byol_fast.training.memory_estimate import try_estimate
from byol_fast.training.trainer import Trainer
from byol_fast.utils.files import atomic_path, atomic_write, write_errors
from byol_fast.utils.profiler_ranges import Phase
from byol_fast.utils.progress import ProgressBar, current
from byol_fast.utils.telemetry import Telemetry, other_cores

FORMAT = 2
WARMUP = 3
"""Steps before the measurement: libraries choose algorithms, graphs are captured, loader buffers fill up."""
MAX_TRACED = 5
"""Maximum number of steps under torch's profiler, which slows them down and writes large files."""
PROBE_SECONDS = 2.0
"""Approximate seconds of one pass of an experiment on a CPU; slower steps get fewer images."""
NUM_STAGES = 7
"""Parts of a profile whose progress is shown."""
NEEDS_GPU = (
    "kernels launched per step",
    "gaps between kernels and idle share",
    "gradients of convolutions separately for input and weights",
    "power, clocks and energy per image",
    "a snapshot of the memory",
)


def profile(
    config: Config,
    *,
    data: object = None,
    resume: Path | None = None,
    callbacks: Sequence[Callback] = (),
    steps: int = 20,
    ceilings: Ceilings | None = None,
) -> tuple[dict[str, Any], Path]:
    """Run some steps as in training, and measure where their time goes.

    The trained weights are not saved.

    Args:
        config: of the run.
        data: images, as in `Trainer`.
        resume: profile the run in this folder, from its newest checkpoint.
        callbacks: hooks into the run; they are profiled, too.
        steps: number of measured steps, after a warm-up.
        ceilings: of this device; measured by default.

    Returns:
        The profile as plain JSON values, and the folder with `profile.json`, `profile.html`, `trace.json.gz` (opens at
        https://ui.perfetto.dev), and on a GPU `memory.pickle` (https://pytorch.org/memory_viz).

    Raises:
        ConfigError: an option is invalid, or there are several processes, or another process runs in the folder.
        ValueError: the data is missing, empty or too small.
        RuntimeError: a run is being built or trained in this process.
    """
    check("profile: steps", ProfiledSteps, steps)
    # No trackers: a profile is no run, nor a part of the one that it resumes.
    trainer = Trainer(configs.replace(config, {"log": ()}), data=data, resume=resume, callbacks=callbacks)
    if not trainer.world.is_single:
        raise ConfigError("profile: must be one process, got several; start it without torchrun")
    folder = trainer.run_dir / "profile"
    try:
        with write_errors(folder, "profile", "set `out` to another folder"):
            folder.mkdir(parents=True, exist_ok=True)
            with exclusive():
                record = _measure(trainer, steps, folder, ceilings)
            atomic_write(folder / "profile.json", json.dumps(record, indent=1) + "\n")
    finally:
        trainer.close()

    from byol_fast.profiling.page import sections
    from byol_fast.report.page import write_page

    with _stage(NUM_STAGES, "drawing the page"):
        write_page(folder / "profile.html", f"Profile of {trainer.config.recipe}", sections(record))
    return record, folder


class _Timing(NamedTuple):
    """Times of the measured steps."""

    seconds: float
    """Mean of a step."""
    data_wait: float
    """Share of the time spent waiting for data."""
    steps: list[StepTimes]
    peak_bytes: int
    """Peak GPU memory; 0 on a CPU."""
    telemetry: dict[str, Any]


def _measure(trainer: Trainer, steps: int, folder: Path, ceilings: Ceilings | None) -> dict[str, Any]:
    device = trainer.device
    one_step = _one_step(trainer)
    trainer.call_hooks("on_run_begin")
    with _stage(1, "warm-up", WARMUP) as bar:
        for _ in range(WARMUP):
            one_step()
            bar.add(1)
    with _stage(2, "measured steps", steps) as bar:
        timing = _time_steps(trainer, _counted(one_step, bar), steps)
    num_traced = min(steps, MAX_TRACED)
    with _stage(3, "traced steps", num_traced) as bar:
        if device.type == "cuda":
            _memory_snapshot(one_step, folder / "memory.pickle")
        trace = trace_steps(device, num_traced, _counted(one_step, bar), folder / "trace.json.gz")
    experiments = _run_probes(trainer, one_step, timing.seconds)
    with _stage(5, "counting the work of a step, for the roofline"):
        work, no_roofline = _roofline(trainer)
    with _stage(6, "measuring the speed of the device"):
        ceilings = ceilings or measure(device, trainer.precision.name)
    record = _record(trainer, timing, trace, steps) | {
        "phases": _phases(timing.steps, work, ceilings, _level(trainer)),
        "roofline": None if work is None else _compare_with_roofline(work, ceilings, _level(trainer), timing.seconds),
        "no_roofline": no_roofline,
        "probes": experiments,
        "files": sorted(p.name for p in folder.iterdir() if p.name not in {"profile.json", "profile.html"}),
    }
    record["findings"] = [dataclasses.asdict(f) for f in rules.findings(record)]
    record["notes"] = rules.notes(record)
    return record


def _stage(number: int, description: str, total: int | None = None) -> ProgressBar:
    """Progress of a part of the profile."""
    return current().bar(total, f"profile, part {number} of {NUM_STAGES}: {description}")


def _counted(one_step: Callable[[], None], bar: ProgressBar) -> Callable[[], None]:
    """The step, moving a bar."""

    def step() -> None:
        one_step()
        bar.add(1)

    return step


def _one_step(trainer: Trainer) -> Callable[[], None]:
    """A step of training as in `Trainer.fit`, without writing files."""

    def one_step() -> None:
        # A finished run has no further step, but its last one can be repeated.
        trainer.state.step = min(trainer.state.step, trainer.total_steps - 1)
        trainer.train_one_step()
        if trainer.state.step % trainer.config.log_every == 0:
            trainer.queue_records()
            trainer.metrics.discard()

    return one_step


def _time_steps(trainer: Trainer, one_step: Callable[[], None], steps: int) -> _Timing:
    device = trainer.device
    on_gpu = device.type == "cuda"
    clock, peak_bytes = PhaseClock(device), 0
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    waited = trainer.throughput.data_wait_seconds
    with Telemetry(device) as telemetry:
        if on_gpu:
            # The phase clock makes the host wait after each step, so the speed is measured without it.
            start = time.perf_counter()
            for _ in range(steps):
                one_step()
            torch.cuda.synchronize(device)
            seconds = (time.perf_counter() - start) / steps
        else:
            timed = clock.steps(steps, one_step)
    if on_gpu:
        data_wait = (trainer.throughput.data_wait_seconds - waited) / (seconds * steps)
        peak_bytes = torch.cuda.max_memory_allocated(device)
        with trainer.train_step.without_cuda_graph():  # a graph has no ranges
            timed = clock.steps(min(steps, 2 * MAX_TRACED), one_step)
    else:
        total = sum(s.milliseconds for s in timed)
        seconds = total / 1e3 / len(timed)
        data_wait = sum(p.milliseconds for s in timed for p in s.phases.get("data wait", [])) / total
    return _Timing(seconds, data_wait, timed, peak_bytes, telemetry.record(steps * trainer.global_batch_size))


def _run_probes(trainer: Trainer, one_step: Callable[[], None], step_seconds: float) -> dict[str, Any]:
    step, batch = trainer.train_step, next(trainer.loader)
    on_gpu = trainer.device.type == "cuda"
    one_thread = 1.0 if on_gpu else step_seconds * torch.get_num_threads()  # approximate time of a step on one thread
    images = min(len(batch.index), max(8, int(len(batch.index) * PROBE_SECONDS / one_thread)))
    experiments: dict[str, tuple[str, Callable[[], Any]]] = {
        "host_syncs": ("waits of the host", lambda: probes.host_syncs(step, one_step)),
        "double_batch": ("twice the batch", lambda: probes.double_batch(step, batch.views)),
        "all_cores": ("all cores", lambda: probes.on_all_cores(step, batch.views, images=images)),
        "bf16": ("bf16", lambda: probes.in_bf16(step, batch.views, images=images)),
    }
    results: dict[str, Any] = {}
    with _stage(4, "experiments", len(experiments)) as bar:
        for name, (description, experiment) in experiments.items():
            bar.update(len(results), description)
            results[name] = experiment()
    return results


def _record(trainer: Trainer, timing: _Timing, trace: Trace, steps: int) -> dict[str, Any]:
    """Fields of the profile without roofline and experiments."""
    on_gpu = trainer.device.type == "cuda"
    quantiles = np.quantile([s.milliseconds / 1e3 for s in timing.steps], [0.2, 0.8])
    return {
        "format": FORMAT,
        "recipe": trainer.config.recipe,
        "encoder": trainer.config.model.encoder,
        "device": torch.cuda.get_device_name(trainer.device) if on_gpu else str(trainer.environment["cpu"]),
        "on_cpu": not on_gpu,
        "mode": trainer.mode.name,
        "precision": trainer.precision.name,
        "loader": trainer.loader.name,
        "batch_size": trainer.config.batch_size,
        "global_batch_size": trainer.global_batch_size,
        "not_batched_reason": trainer.model.not_batched_reason,
        "config": configs.to_dict(trainer.config),
        "environment": trainer.environment,
        "date": time.strftime("%Y-%m-%d"),
        "step": {
            "steps": steps,
            "seconds": timing.seconds,
            "seconds_p20": float(quantiles[0]),
            "seconds_p80": float(quantiles[1]),
            "images_per_second": trainer.global_batch_size / timing.seconds,
            "data_wait": float(timing.data_wait),
            "traced_seconds": trace.seconds,
        },
        "families": trace.families,
        "kernels": trace.kernels,
        "machine": timing.telemetry | {"others": other_cores(timing.telemetry)},
        "gpu": _gpu(trainer, trace, timing.peak_bytes) if on_gpu else None,
        "memory": _memory(trainer),
        "needs_gpu": [] if on_gpu else list(NEEDS_GPU),
        "timeline": _timeline(timing.steps, trace),
    }


def _memory(trainer: Trainer) -> dict[str, int] | None:
    """Estimated memory of a step, in bytes; None for an encoder that cannot be estimated."""
    estimate = try_estimate(trainer.config, trainer.device.type, trainer.precision, num_processes=trainer.world.size)
    return None if isinstance(estimate, str) else dataclasses.asdict(estimate) | {"total": estimate.total}


def _level(trainer: Trainer) -> Level:
    return "A" if trainer.mode.name == "eager" else "B"


def _roofline(trainer: Trainer) -> tuple[Roofline | None, str | None]:
    """Roofline of a step, or None and the reason."""
    try:
        return roofline(trainer.config, dtype=trainer.precision.name), None
    except ValueError as error:
        return None, str(error)


def _phases(
    steps: Sequence[StepTimes], work: Roofline | None, ceilings: Ceilings, level: Level
) -> list[dict[str, Any]]:
    """Measured time of each phase, with the floor of the roofline, which is never above it.

    A higher floor would mean that the ceilings are too low: the notes name the phases for which that was so.
    """
    rows = phase_rows(steps)
    for row in rows:
        name = row["phase"]
        row["floor_seconds"], row["above_ceilings"] = None, None
        if work is not None and name in PHASES:
            floor = work.floor(ceilings, level, phase=name)
            row["floor_seconds"] = min(floor, row["seconds"])
            row["above_ceilings"] = floor / row["seconds"] if floor > row["seconds"] else None
    return rows


def _gpu(trainer: Trainer, trace: Trace, peak_bytes: int) -> dict[str, Any]:
    return {
        "launches": trace.launches,
        "idle": trace.idle,
        "gaps": trace.gaps,
        "peak_bytes": peak_bytes,
        "memory_bytes": torch.cuda.get_device_properties(trainer.device).total_memory,
        "checkpointing": trainer.config.activation_checkpointing,
    }


def _compare_with_roofline(work: Roofline, ceilings: Ceilings, level: Level, seconds: float) -> dict[str, Any]:
    """Measured step relative to the ceilings of the device."""
    total = work.total(level)
    floors = {level: work.floor(ceilings, level) for level in LEVELS}
    # Levels with as much fusion as the measured step, or more, cannot take longer than it.
    floors |= {more: min(floors[more], seconds) for more in LEVELS[LEVELS.index(level) :]}
    points = {phase: {"x": x, "y": y} for phase, (x, y) in work.points(ceilings, level).items()}
    return {
        "ceilings": dataclasses.asdict(ceilings),
        "level": level,
        "flops": total.flops,
        "bytes": total.bytes,
        "mfu": mfu(total.flops, seconds, ceilings.peak_flops_per_s),
        "bandwidth_use": total.bytes / seconds / ceilings.bytes_per_s,
        "floor_seconds": floors,
        "phases": {phase: work.total(level, phase=phase)._asdict() for phase in PHASES},
        "unmodeled": list(work.unmodeled),
        "points": points,
    }


def _timeline(steps: Sequence[StepTimes], trace: Trace) -> dict[str, Any]:
    """The median step: phases, and on a GPU its kernels by family."""
    step = median_step(steps)
    return {
        "milliseconds": step.milliseconds,
        "phases": [
            {"phase": name, "begin": p.start, "end": p.start + p.milliseconds}
            for name in get_args(Phase)  # the order, and so the colors, of the other charts
            for p in step.phases.get(name, [])
        ],
        "kernels": [{"family": family, "begin": start, "end": end} for family, start, end in trace.spans],
    }


def _memory_snapshot(one_step: Callable[[], None], output: Path) -> None:
    """Write the allocations of a step for https://pytorch.org/memory_viz."""
    torch.cuda.memory._record_memory_history(max_entries=100_000)
    try:
        one_step()
        with atomic_path(output) as path:
            torch.cuda.memory._dump_snapshot(os.fspath(path))  # type: ignore[no-untyped-call]
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
