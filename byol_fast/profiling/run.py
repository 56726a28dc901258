"""Profile the steps of a real run: its data, its networks, its options."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from byol_fast import config as configs
from byol_fast.config import Config, ConfigError
from byol_fast.profiling import findings as judged
from byol_fast.profiling import probes
from byol_fast.profiling.ceilings import Ceilings, measure
from byol_fast.profiling.flops import mfu
from byol_fast.profiling.rooflines import PHASES, Roofline, roofline
from byol_fast.profiling.telemetry import Telemetry, others
from byol_fast.profiling.trace import PhaseClock, StepTimes, Trace, median_step, phase_rows, traced
from byol_fast.profiling.traffic import LEVELS, Level
from byol_fast.training.callbacks import Callback
from byol_fast.training.trainer import Trainer
from byol_fast.utils.files import atomic_path, atomic_write
from byol_fast.utils.profiler_ranges import Phase, record_range

FORMAT = 1
WARMUP = 3
"""Steps before anything is measured: libraries choose algorithms, graphs are captured, buffers of the loader fill."""
TRACED = 5
"""Steps under torch's profiler at most; it slows them down, and its file grows."""
EXPERIMENT = 2.0
"""Seconds that a pass of an experiment may take on a CPU, about; else it gets fewer images."""
NEEDS_GPU = (
    "kernels launched a step",
    "pauses between kernels and idle share",
    "gradients of convolutions apart by input and weights",
    "power, clocks and energy an image",
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
    """Run some steps as training would, and say where their time goes.

    Nothing is saved of what the steps learn.

    Args:
        config: of the run.
        data: images, as `Trainer` takes them.
        resume: profile the run in this folder, from its newest checkpoint.
        callbacks: hooks into the run; they are profiled too.
        steps: to measure, after a warm-up.
        ceilings: of this device; measured by default.

    Returns:
        The profile as plain JSON values, and the folder it was written to: `profile.json`, `profile.html`,
        `trace.json.gz` (open it at https://ui.perfetto.dev), and on a GPU `memory.pickle`
        (https://pytorch.org/memory_viz).

    Raises:
        ConfigError: an option is invalid, or there are several processes.
        ValueError: the data is missing, empty or too small.
    """
    if steps < 1:
        raise ConfigError(f"profile: steps must be 1 or more, got {steps}")
    trainer = Trainer(config, data=data, resume=resume, callbacks=callbacks)
    if not trainer.world.is_single:
        raise ConfigError("profile: must be one process, got several; start it without torchrun")
    folder = trainer.run_dir / "profile"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = _measured(trainer, steps, folder, ceilings)
        atomic_write(folder / "profile.json", json.dumps(found, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"profile: {folder} cannot be written ({error}); set `out` to another folder") from error
    finally:
        trainer.state.loader.close()

    from byol_fast.profiling.page import sections
    from byol_fast.report.page import write_page

    write_page(folder / "profile.html", f"Profile of {trainer.config.recipe}", sections(found))
    return found, folder


def _measured(trainer: Trainer, steps: int, folder: Path, ceilings: Ceilings | None) -> dict[str, Any]:
    device, step = trainer.device, trainer.train_step
    on_gpu = device.type == "cuda"
    one_step = _one_step(trainer)
    trainer.call_hooks("on_run_begin")
    for _ in range(WARMUP):
        one_step()
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)

    clock = PhaseClock(device)
    trainer.throughput.read()
    with Telemetry(device) as telemetry:
        begin = time.perf_counter()
        if on_gpu:
            # On a GPU the clock makes the host wait after each step: the speed is measured without it.
            for _ in range(steps):
                one_step()
            torch.cuda.synchronize(device)
            seconds = (time.perf_counter() - begin) / steps
        else:
            timed = clock.steps(steps, one_step)
    waited = trainer.throughput.read().data_wait
    if on_gpu:
        peak_bytes = torch.cuda.max_memory_allocated(device)
        with trainer.train_step.without_cuda_graph():  # within a graph there are no ranges
            timed = clock.steps(min(steps, 2 * TRACED), one_step)
        found_waits = waited
    else:
        peak_bytes = 0
        seconds = sum(s.milliseconds for s in timed) / 1e3 / len(timed)
        # The trainer's throughput starts anew whenever it logs, the clock does not.
        found_waits = _sum(timed, "data wait") / sum(s.milliseconds for s in timed)
    record = telemetry.record(steps * trainer.global_batch_size)
    if on_gpu:
        _memory_snapshot(one_step, folder / "memory.pickle")
    trace = traced(device, min(steps, TRACED), one_step, folder / "trace.json.gz")
    batch = next(trainer.state.loader)
    alone = 1.0 if on_gpu else seconds * torch.get_num_threads()  # about what a step takes on one thread
    images = min(len(batch.index), max(8, int(len(batch.index) * EXPERIMENT / alone)))
    experiments = {
        "host_syncs": probes.host_syncs(step, one_step),
        "twice_the_batch": probes.twice_the_batch(step, batch.views),
        "all_cores": probes.on_all_cores(step, batch.views, images=images),
        "bf16": probes.in_bf16(step, batch.views, images=images),
    }
    work, no_roofline = _work(trainer)
    ceilings = ceilings or measure(device, trainer.precision.name)

    quantiles = np.quantile([s.milliseconds / 1e3 for s in timed], [0.2, 0.8])
    found: dict[str, Any] = {
        "format": FORMAT,
        "recipe": trainer.config.recipe,
        "encoder": trainer.config.model.encoder,
        "device": _device_name(trainer),
        "on_cpu": not on_gpu,
        "mode": trainer.mode.name,
        "precision": trainer.precision.name,
        "backend": trainer.state.loader.name,
        "batch_size": trainer.config.batch_size,
        "global_batch_size": trainer.global_batch_size,
        "views_note": trainer.model.views_note,
        "config": configs.to_dict(trainer.config),
        "environment": trainer.environment,
        "date": time.strftime("%Y-%m-%d"),
        "step": {
            "steps": steps,
            "seconds": seconds,
            "seconds_p20": float(quantiles[0]),
            "seconds_p80": float(quantiles[1]),
            "images_per_second": trainer.global_batch_size / seconds,
            "data_wait": float(found_waits),
            "traced_seconds": trace.seconds,
        },
        "phases": _phases(timed, work, ceilings, _level(trainer)),
        "families": trace.families,
        "kernels": trace.kernels,
        "machine": record | {"others": others(record)},
        "gpu": _gpu(trainer, trace, peak_bytes) if on_gpu else None,
        "needs_gpu": [] if on_gpu else list(NEEDS_GPU),
        "roofline": None if work is None else _against(work, ceilings, _level(trainer), seconds),
        "no_roofline": no_roofline,
        "timeline": _timeline(timed, trace),
        "probes": experiments,
        "files": sorted(p.name for p in folder.iterdir() if p.name not in {"profile.json", "profile.html"}),
    }
    found["findings"] = [dataclasses.asdict(f) for f in judged.findings(found)]
    found["notes"] = judged.notes(found)
    return found


def _one_step(trainer: Trainer) -> Callable[[], None]:
    """A step of training as `Trainer.fit` does it, without its files."""

    def one_step() -> None:
        # A finished run has no further step, but its last one can be repeated.
        trainer.state.step = min(trainer.state.step, trainer.total_steps - 1)
        trainer.train_one_step()
        if trainer.state.step % trainer.config.log_every == 0:
            with record_range("metrics"):
                trainer.read_records()
            trainer.metrics.discard()

    return one_step


def _device_name(trainer: Trainer) -> str:
    """What the device is called."""
    if trainer.device.type == "cuda":
        return torch.cuda.get_device_name(trainer.device)
    return str(trainer.environment["cpu"])


def _level(trainer: Trainer) -> Level:
    return "A" if trainer.mode.name == "eager" else "B"


def _sum(steps: Sequence[StepTimes], name: str) -> float:
    return sum(p.milliseconds for s in steps for p in s.phases.get(name, []))


def _work(trainer: Trainer) -> tuple[Roofline | None, str | None]:
    """FLOPs and bytes of a step, or why they are not known."""
    try:
        return roofline(trainer.config, dtype=trainer.precision.name), None
    except ValueError as error:
        return None, str(error)


def _phases(
    steps: Sequence[StepTimes], work: Roofline | None, ceilings: Ceilings, level: Level
) -> list[dict[str, Any]]:
    """The measured phases, beside the least time that the roofline leaves each."""
    rows = phase_rows(steps)
    for row in rows:
        name = row["phase"]
        row["floor_seconds"] = None
        if work is not None and name in PHASES:
            row["floor_seconds"] = work.floor(ceilings, level, phase=name)
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


def _against(work: Roofline, ceilings: Ceilings, level: Level, seconds: float) -> dict[str, Any]:
    """The step beside what the device could do."""
    total = work.total(level)
    points = {phase: {"x": x, "y": y} for phase, (x, y) in work.points(ceilings, level).items()}
    return {
        "ceilings": dataclasses.asdict(ceilings),
        "level": level,
        "flops": total.flops,
        "bytes": total.bytes,
        "mfu": mfu(total.flops, seconds, ceilings.peak_flops_per_s),
        "bandwidth_use": total.bytes / seconds / ceilings.bytes_per_s,
        "floor_seconds": {level: work.floor(ceilings, level) for level in LEVELS},
        "phases": {phase: work.total(level, phase=phase)._asdict() for phase in PHASES},
        "unmodelled": list(work.unmodelled),
        "points": points,
    }


def _timeline(steps: Sequence[StepTimes], trace: Trace) -> dict[str, Any]:
    """One step in the middle: phases, and on a GPU its kernels by family."""
    middle = median_step(steps)
    return {
        "milliseconds": middle.milliseconds,
        "phases": [
            {"phase": name, "begin": p.begin, "end": p.begin + p.milliseconds}
            for name in get_args(Phase)  # the order, and so the colours, of the other charts
            for p in middle.phases.get(name, [])
        ],
        "kernels": [{"family": family, "begin": begin, "end": end} for family, begin, end in trace.spans],
    }


def _memory_snapshot(one_step: Callable[[], None], to: Path) -> None:
    """What allocates memory in a step, for https://pytorch.org/memory_viz."""
    torch.cuda.memory._record_memory_history(max_entries=100_000)
    try:
        one_step()
        with atomic_path(to) as path:
            torch.cuda.memory._dump_snapshot(os.fspath(path))  # type: ignore[no-untyped-call]
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
