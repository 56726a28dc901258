"""From a configuration to a trained encoder."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from byol_fast import config as configs
from byol_fast.config import Config, ConfigError
from byol_fast.data import BadImageError, Batch, make_loader, split
from byol_fast.export.encoder import export_encoder
from byol_fast.models import split_batchnorm
from byol_fast.models.activation_checkpoint import checkpoint_blocks
from byol_fast.models.builder import make_task
from byol_fast.optim.optimizers import make_optimizer
from byol_fast.optim.schedules import RunSchedule
from byol_fast.report.build import report
from byol_fast.training import distributed, memory
from byol_fast.training.callbacks import Callback
from byol_fast.training.cuda_graph import CapturedStep, choose_mode, compiled
from byol_fast.training.knn_monitor import KNNDuringTraining, Snapshot, knn_problem
from byol_fast.training.metrics import MetricsLog, Speed, Stopwatch, TensorBoard
from byol_fast.training.metrics import read as read_metrics
from byol_fast.training.online_probe import OnlineProbe
from byol_fast.training.state import TrainState
from byol_fast.training.train_step import StepMetrics, TrainStep
from byol_fast.utils import checkpoint as checkpoints
from byol_fast.utils import cpu_tuning, env
from byol_fast.utils.files import atomic_write
from byol_fast.utils.precision import resolve_precision
from byol_fast.utils.profiler_ranges import phase
from byol_fast.utils.progress import Display
from byol_fast.utils.signals import StopRequest

log = logging.getLogger(__name__)

# Fields that may change between a run and its resumption: they do not change what is computed (the mode only how it is
# rounded, of which the run warns).
RESUMABLE_CHANGES = frozenset(
    {"name", "out", "log_every", "checkpoint_every", "keep_checkpoints", "data.root", "data.cache", "data.prefetch"}
    | {"data.threads", "knn.val_root", "mode", "max_autotune", "cudnn_benchmark", "tensorboard"}
    | {"timeout_minutes", "max_bad_steps"}
    | {"activation_checkpointing", "data.on_bad", "data.max_bad", "data.accept_changed", "probe.enabled", "probe.lr"}
)

# A checkpoint after every epoch of a few steps would cost more than the steps.
MIN_CHECKPOINT_STEPS = 100

_ENOUGH = 1000  # above all signal numbers: a callback ends the run


class Interrupted(Exception):  # noqa: N818  (not an error: someone asked the run to stop)
    """The run was asked to stop; what it had done is saved.

    Args:
        signum: the signal that asked.
        run_dir: the run's folder.
        step: steps finished and saved.
    """

    def __init__(self, signum: int, run_dir: Path, step: int) -> None:
        super().__init__(
            f"{signal.Signals(signum).name}: saved after step {step}; go on with: byol-fast train --resume {run_dir}"
        )
        self.signum = signum
        self.run_dir = run_dir
        self.step = step


class TrainingError(RuntimeError):
    """Training cannot go on; says at which step, why, and which checkpoint is the last good one."""


class _StopRequested(Exception):  # noqa: N818
    """Raised between batches of an evaluation when a signal has arrived."""


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a finished run leaves."""

    run_dir: Path
    """The run's folder."""
    steps: int
    """Optimizer steps done."""
    loss: float
    """Mean loss of the last ten steps that counted."""
    knn_top1: float | None
    """kNN accuracy of the trained encoder, 0..1, where there were labels."""
    knn_top1_untrained: float | None
    """The same of the untrained encoder with calibrated batch norms: the honest baseline."""
    encoder: Path
    """`encoder.safetensors`; `byol_fast.load_encoder` reads it."""


def resolve_device(name: str) -> torch.device:
    """The device of a configuration.

    Raises:
        ConfigError: a GPU is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("config: device is 'cuda', but torch sees no GPU; check `nvidia-smi`, or set device to 'cpu'")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


class Trainer:
    """A run: built from a configuration, started with `fit`.

    With several processes (torchrun) every one of them builds and fits a trainer of its own; they find each other.

    Args:
        config: what to do.
        data: images to train on, instead of the configuration's: anything `byol_fast.data.open_source` takes.
        resume: run folder to continue; its checkpoint is loaded and its configuration must agree with `config`.
        callbacks: hooks into the run.

    Raises:
        ConfigError: a field is invalid, or differs from the run to be resumed in what is computed.
        CheckpointError: `resume` holds no usable checkpoint.
        ValueError: the data is missing, empty or too small.

    Example:
        >>> from byol_fast import Trainer, recipes
        >>> Trainer(recipes.demo()).fit().knn_top1
    """

    def __init__(
        self,
        config: Config,
        *,
        data: object = None,
        resume: Path | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        if isinstance(data, str | Path):
            config, data = configs.replace(config, {"data.root": Path(data)}), None
        # So that the run can be resumed from any folder.
        if config.data.root is not None:
            config = configs.replace(config, {"data.root": config.data.root.expanduser().absolute()})
        if config.knn.val_root is not None:
            config = configs.replace(config, {"knn.val_root": config.knn.val_root.expanduser().absolute()})
        self.config = config
        self.callbacks = list(callbacks)
        self.world = world = distributed.join(config.device, config.timeout_minutes)
        self.device = resolve_device(config.device)
        self.precision = resolve_precision(config.precision, self.device)
        self.precision.apply_to_backends()
        torch.backends.cudnn.benchmark = config.cudnn_benchmark
        self.mode = choose_mode(config, self.device, self.precision, world.size)
        self.run_dir = world.share(
            resume or config.out / (config.name or f"{config.recipe}-{datetime.now():%Y%m%d-%H%M%S}")
        )
        self.notes: list[str] = []
        resumes = world.from_leader(lambda: self._claim_run_dir(resume))
        payload = checkpoints.load_latest(self.run_dir / "checkpoints") if resumes else None
        with world.leader_first():
            self.train_source, self.val_source = split(config, data)
            torch.manual_seed(config.seed)
            self.task = make_task(config, pretrained=payload is None)
        if self.task.views_note is not None:
            self.notes.append(f"the views pass the networks one by one: {self.task.views_note}")
        if config.max_autotune:
            self.notes.append("max_autotune: kernels are tuned before the first step, for a ResNet-50 25-60 minutes")
        self.task.to(self.device)
        if config.channels_last:
            self.task.to(memory_format=torch.channels_last)
        if self.device.type == "cpu":
            self._suit_the_cpu()
        self._connect_processes()
        if config.activation_checkpointing:
            checkpoint_blocks(self.task.encoder)
        parameters, predictor = self.task.trainable_parameters(), self.task.online.predictor.parameters()
        optimizer = make_optimizer(config.optim, parameters, list(predictor))
        loader = make_loader(
            self.train_source,
            config,
            device=self.device,
            shard_id=world.rank,
            num_shards=world.size,
            report=self.run_dir / ("bad_images.jsonl" if world.leads else f"bad_images.{world.rank}.jsonl"),
        )
        self.total_steps = config.steps or max(config.epochs * loader.steps_per_epoch // config.accumulate, 1)
        self.train_step = TrainStep(
            self.task,
            optimizer,
            self._schedule(loader.steps_per_epoch),
            precision=self.precision,
            forward=compiled(self.task, self.mode, alone=world.alone, max_autotune=config.max_autotune),
            accumulate=config.accumulate,
            channels_last=config.channels_last,
            agree=None if world.alone else distributed.agree,
        )
        if self.mode.name == "graph":
            self.train_step.run = CapturedStep(self.train_step)
        self.probe = self._online_probe()
        self.state = TrainState(
            self.task,
            optimizer,
            loader,
            self.train_step.loss_scale,
            world,
            accumulate=config.accumulate,
            probe=self.probe,
        )
        self.metrics = MetricsLog(self.run_dir / "metrics.jsonl")
        self.tensorboard = TensorBoard(self.run_dir / "tb") if config.tensorboard and world.leads else None
        self.knn = self._knn_during_training()
        self.stopwatch = Stopwatch()
        self.stop_request = StopRequest()
        self._ended_early = False
        self._bad_in_a_row = 0
        self._saved_at = -1
        self._recent: list[tuple[int, StepMetrics, Tensor | None]] = []
        if payload is not None:
            self._restore(payload)

    # ------------------------------------------------------------------ set-up

    def _suit_the_cpu(self) -> None:
        """What was measured to make steps faster there; see `benchmarks/NOTES.md`."""
        cpu_tuning.keep_freed_memory()
        if self.mode.name == "eager" and self.config.channels_last:
            for network in self.task.networks():
                cpu_tuning.use_small_map_convolutions(network)

    def _connect_processes(self) -> None:
        world = self.world
        if world.alone:
            return
        if self.config.sync_batchnorm:
            for network in self.task.networks():
                split_batchnorm.synchronise(network)
        self.task.call_online_through(lambda network: distributed.wrapped(network, self.device))
        torch.manual_seed(self.config.seed + world.rank)  # what networks draw themselves: dropout

    def _schedule(self, batches_per_epoch: int) -> RunSchedule:
        optim, steps, config = self.config.optim, self.total_steps, self.config
        if optim.warmup_steps is not None:
            warmup = optim.warmup_steps
            if warmup > steps:
                raise ConfigError(f"config: optim.warmup_steps must be at most the run's {steps} steps, got {warmup}")
        else:
            asked = round(optim.warmup_epochs * batches_per_epoch / config.accumulate)
            warmup = min(asked, steps // 4)
            if warmup < asked:
                self.notes.append(f"warm-up of {asked} steps cut to {warmup}, a quarter of the run's {steps}")
        return RunSchedule(
            total_steps=steps,
            warmup_steps=warmup,
            base_lr=optim.lr,
            batch_size=self.effective_batch if optim.scale_lr else 256,
            lr_schedule=optim.schedule,
            tau_base=config.tau.base,
            tau_schedule=config.tau.schedule,
        )

    @property
    def effective_batch(self) -> int:
        """Images of an optimizer step, over all processes and accumulated batches."""
        return self.config.batch_size * self.config.accumulate * self.world.size

    def _knn_during_training(self) -> KNNDuringTraining | None:
        problem = knn_problem(self.config, self.train_source, self.val_source)
        if problem is not None:
            if self.config.knn.enabled == "auto" and self.train_source.labels is not None:
                self.notes.append(f"no kNN evaluation: {problem}")
            return None
        assert self.val_source is not None
        return KNNDuringTraining(
            self.config,
            self.task,
            self.train_source,
            self.val_source,
            device=self.device,
            autocast=self.precision.autocast,
            probe=self.probe,
        )

    def _online_probe(self) -> OnlineProbe | None:
        probe, source = self.config.probe, self.train_source
        if probe.enabled == "on" and source.labels is None:
            raise ConfigError(
                "config: probe.enabled is 'on', but the training images have no labels: sort them into one folder per "
                "class, or set it to 'auto'"
            )
        if probe.enabled == "off" or source.labels is None:
            return None
        return OnlineProbe(
            self.task.feature_dim,
            len(source.classes),
            lr=probe.lr,
            device=self.device,
            average=None if self.world.alone else distributed.mean,
        )

    def _restore(self, payload: dict[str, Any]) -> None:
        then = configs.from_dict(json.loads(payload["config"]))
        changed = configs.differences(then, self.config)
        refused = {name: values for name, values in changed.items() if name not in RESUMABLE_CHANGES}
        if refused:
            listed = "; ".join(f"{name} was {a!r} and is {b!r}" for name, (a, b) in refused.items())
            raise ConfigError(
                f"resume: {self.run_dir} must be continued as it was started, but {listed}; "
                "drop these options, or start a new run"
            )
        self.state.load_state_dict(payload)
        self._recall_evaluation()
        self.config = configs.replace(self.config, {"data.accept_changed": False})  # this once
        self.train_step.weights_changed()
        for difference in env.differences(json.loads(payload["environment"]), self._environment()):
            self._warn("resume: %s; the run goes on, but not bit for bit as it would have", difference)

    def _recall_evaluation(self) -> None:
        """An evaluation comes after the checkpoint of its step; the metrics tell whether it was made."""
        step = self.state.step
        if self.world.from_leader(lambda: checkpoints.path_of(self.run_dir / "checkpoints", step).exists()):
            self._saved_at = step
        made = self.world.from_leader(
            lambda: [r["knn_top1"] for r in read_metrics(self.metrics.path) if r["step"] == step and "knn_top1" in r]
        )
        if made:
            self.state.evaluated_at = step
            if step > 0:
                self.state.best = max(self.state.best, made[-1])

    # ------------------------------------------------------------------ the run

    def fit(self) -> RunResult:
        """Train to the end of the run, then export the encoder.

        Returns:
            What the run left.

        Raises:
            Interrupted: SIGINT or SIGTERM arrived; everything up to the last finished step is saved.
            TrainingError: too many steps in a row were not finite, or a batch does not fit the memory.
            CheckpointError: the disk is full or read-only.
        """
        self.world.from_leader(self._write_run_folder)
        checkpoint_every = self.config.checkpoint_every or self._whole_epochs(MIN_CHECKPOINT_STEPS)
        with self.stop_request.noted(), self._display() as display:
            for line in self._headline():
                display.say(line)
            self._tell("on_run_begin")
            self._evaluate_if_due(display)
            while self.state.step < self.total_steps and not self._ended_early:
                self._train_one_step()
                display.advance(self.state.step)
                if self._due(self.config.log_every):
                    self._log(display)
                if self._due(checkpoint_every):
                    self._save()
                self._evaluate_if_due(display)
                self._stop_if_asked()
            if self._saved_at != self.state.step:
                self._save()
        self.state.loader.close()
        return self._finish()

    def stop(self) -> None:
        """End the run after the step under way, as if it were complete: saved, and the encoder exported."""
        self._ended_early = True

    def _whole_epochs(self, at_least: int) -> int:
        """Steps of as many whole epochs as make so many steps."""
        epoch = max(self.state.loader.steps_per_epoch // self.config.accumulate, 1)
        return -(-at_least // epoch) * epoch

    def _due(self, every: int) -> bool:
        return self.state.step % every == 0 or self.state.step == self.total_steps

    def _train_one_step(self) -> None:
        with self.stopwatch.waiting(), phase("data wait"):
            batches = self._next_batches()
        try:
            metrics = self.train_step(batches if self.config.accumulate > 1 else batches[0], self.state.step)
        except torch.OutOfMemoryError as error:
            message = str(error).splitlines()[0]
        else:
            self.state.step += 1
            right = None
            if self.probe is not None:
                labels = torch.as_tensor(self.train_source.labels)[torch.cat([batch.index for batch in batches])]
                right = self.probe.learn(metrics.features, labels, metrics.undone)
            self._recent.append((self.state.step, dataclasses.replace(metrics, features=()), right))
            self.stopwatch.count(self.effective_batch)
            with phase("callbacks"):
                self._tell("on_step_end", metrics)
            return
        raise TrainingError(memory.advice(self.train_step, batches[0], message, self.config))

    def _next_batches(self) -> list[Batch]:
        try:
            return [next(self.state.loader) for _ in range(self.config.accumulate)]
        except BadImageError:
            if self.world.alone:  # what was learned until here is kept; several processes would wait for each other
                self._save()
            raise

    def _log(self, display: Display) -> None:
        self._record_steps()
        record = self.metrics.latest
        loss = "undone" if record["loss"] is None else f"{record['loss']:.4f}"
        spread = math.nan if record["collapse_std"] is None else record["collapse_std"]
        display.status(
            self.state.step,
            self.state.epoch,
            f"loss {loss}  std {spread:.2f}  lr {record['lr']:.3g}  tau {record['tau']:.4f}  "
            f"{record['images_per_s']:.1f} img/s  data wait {record['data_wait']:.0%}",
        )
        self._flush_metrics()

    def _record_steps(self) -> None:
        """Queue a record for each step since the last time; the only place where the host waits for the device."""
        if not self._recent:
            return
        values = torch.stack([metrics.values for _, metrics, _ in self._recent])
        if self.probe is not None:
            rights = [right for _, _, right in self._recent if right is not None]
            values = torch.cat([values, torch.stack(rights).double()[:, None]], dim=1)
        if not self.world.alone:
            values = distributed.mean(values)
        speed, peak = self.stopwatch.lap(), memory.peak_gib(self.device)
        records = []
        bad = 0
        for (step, metrics, _), (loss, spread, undone, *right) in zip(self._recent, values.tolist(), strict=True):
            bad += undone > 0
            self._bad_in_a_row = self._bad_in_a_row + 1 if undone > 0 else 0
            record = self._record(step, metrics, loss, spread, speed, peak)
            if right:
                record["probe_top1"] = right[0]
            if undone > 0:
                spoiled = ("loss", "collapse_std", "probe_top1")
                record |= {name: None for name in spoiled if name in record} | {"undone": True}
            records.append(record)
            if self._bad_in_a_row == self.config.max_bad_steps:
                break
        last = self._recent[-1][0]
        self._recent.clear()
        for record in records:
            self.metrics.add(record)
        self._tell("on_log", records)
        if bad:
            self._warn("%d of the last steps, to step %d, had a loss or gradient that is not finite: undone", bad, last)
        if self._bad_in_a_row >= self.config.max_bad_steps:
            self._flush_metrics()
            self._fail(
                f"the loss or gradient of {self._bad_in_a_row} steps in a row, to step {records[-1]['step']}, was not "
                "finite"
            )

    def _record(
        self, step: int, metrics: StepMetrics, loss: float, spread: float, speed: Speed, peak: float
    ) -> dict[str, Any]:
        return {
            "step": step,
            "epoch": round(step * self.config.accumulate / self.state.loader.steps_per_epoch, 4),
            "loss": loss,
            "lr": metrics.lr,
            "tau": metrics.tau,
            "images_per_s": round(speed.images_per_s, 2),
            "data_wait": round(speed.data_wait, 4),
            "collapse_std": spread,
            "peak_memory_gib": round(peak, 3),
        }

    def _refuse_weights(self) -> None:
        """A checkpoint of non-finite weights would pass for a good one."""
        norms = torch.stack(torch._foreach_norm(list[Tensor](self.task.trainable_parameters())))
        if not bool(torch.isfinite(norms).all()):
            self._fail(f"a weight is not finite after step {self.state.step}")

    def _fail(self, what: str) -> None:
        saved = checkpoints.steps_in(self.run_dir / "checkpoints")
        last = f"the last good checkpoint is of step {saved[-1]}" if saved else "there is no checkpoint yet"
        raise TrainingError(
            f"training: {what}; {last}. A smaller optim.lr, a longer warm-up or precision fp32 usually cures it"
        )

    # ------------------------------------------------------------------ evaluation

    def _evaluate_if_due(self, display: Display) -> None:
        knn, step = self.config.knn, self.state.step
        every = max(knn.every_epochs * self.state.loader.steps_per_epoch // self.config.accumulate, 1)
        if self.knn is None or self.state.evaluated_at == step or not self._due(every):
            return
        with self.stopwatch.paused():
            result = self.world.from_leader(self._knn_unless_stopped)
        if result is None:
            self._stop_if_asked()
            return
        which = "untrained, norms calibrated" if step == 0 else f"epoch {self.state.epoch:.4g}"
        top1 = result.knn.top1
        probe = "" if result.probe_top1 is None else f"linear probe {result.probe_top1:.1%}, "
        display.say(
            f"kNN-{knn.k} top-1 {top1:.1%}, {probe}on {result.knn.num_test} images; RankMe {result.rankme:.0f} on the "
            f"training images  ({which})"
        )
        self._record_steps()
        record = {
            "step": step,
            "epoch": round(self.state.epoch, 4),
            "knn_top1": top1,
            "knn_top5": result.knn.top5,
            "knn_k": knn.k,
            "rankme": result.rankme if math.isfinite(result.rankme) else None,
        }
        if result.probe_top1 is not None:
            record["probe_val_top1"] = result.probe_top1
        if step > 0 and top1 > self.state.best:
            self._keep_as_best()
            self.state.best = top1
        # After that, so that an evaluation whose record is found left nothing undone: see `_recall_evaluation`.
        self.state.evaluated_at = step
        self.metrics.add(record)
        self._flush_metrics()
        self._tell("on_evaluation", record)

    def _keep_as_best(self) -> None:
        if self._saved_at != self.state.step:
            self._save()
        path = checkpoints.path_of(self.run_dir / "checkpoints", self.state.step)
        self.world.from_leader(lambda: checkpoints.keep_as_best(path))

    def _knn_unless_stopped(self) -> Snapshot | None:
        assert self.knn is not None
        try:
            return self.knn(untrained=self.state.step == 0, check=self._raise_if_stopped)
        except _StopRequested:
            return None

    # ------------------------------------------------------------------ files and signals

    def _display(self) -> Display:
        return Display(self.total_steps, self.state.step, silent=not self.world.leads)

    def _headline(self) -> list[str]:
        config = self.config
        count = sum(p.numel() for p in self.task.trainable_parameters()) / 1e6
        step, total = self.state.step, self.total_steps
        if step >= total:
            begin = f"already complete at step {step} of {total}:"
        else:
            begin = f"resuming after step {step} of {total}:" if step else "training"
        parts = [f"{config.batch_size}"]
        parts += [f"x {config.accumulate} accumulated"] if config.accumulate > 1 else []
        parts += [f"x {self.world.size} processes"] if not self.world.alone else []
        return [
            (
                f"{begin} {config.recipe}: {config.model.encoder}, {count:.1f} M parameters with the heads, "
                f"{len(self.train_source)} images, {total} steps of {' '.join(parts)}, "
                f"{self.device} {self.precision.name}, data by {self.state.loader.backend}"
            ),
            f"mode: {self.mode.name} ({self.mode.why})",
            *self.notes,
            f"run folder: {self.run_dir}",
        ]

    def _claim_run_dir(self, resume: Path | None) -> bool:
        """Refuse a folder that holds another run; say whether there is a checkpoint to go on from.

        A run that died before its first checkpoint left nothing to lose: its folder is begun anew.
        """
        folder = self.run_dir / "checkpoints"
        if resume is not None and not (self.run_dir / "config.json").exists():
            raise ConfigError(f"resume: {self.run_dir} must be a run folder, it has no config.json; check the path")
        if resume is not None and checkpoints.steps_in(folder):
            return True
        if self.run_dir.exists() and not self.run_dir.is_dir():
            raise ConfigError(f"config: {self.run_dir} must be a folder, it is a file; choose another name")
        begun = {"config.json", "environment.json", "metrics.jsonl", "tb", "report.html", "profile"}
        left = {p.name for p in self.run_dir.iterdir() if p != folder} if self.run_dir.exists() else set()
        left = {name for name in left if not name.startswith("bad_images.")}
        if checkpoints.steps_in(folder) or left - begun:
            raise ConfigError(
                f"config: {self.run_dir} must be a new run's folder, it is not empty; continue it with "
                f"--resume {self.run_dir}, or choose another name"
            )
        if left:
            self.notes.append(f"{self.run_dir} has no checkpoint yet: starting from the beginning")
        return False

    def _write_run_folder(self) -> None:
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self.metrics.rewind(self.state.step, evaluated=self.state.evaluated_at == self.state.step)
            atomic_write(self.run_dir / "config.json", json.dumps(configs.to_dict(self.config), indent=2) + "\n")
            record = json.dumps(self._environment(), indent=2)
            atomic_write(self.run_dir / "environment.json", record + "\n")
            if self.tensorboard is not None and (problem := self.tensorboard.open(self.state.step)) is not None:
                self.notes.append(problem)
        except OSError as error:
            raise ConfigError(
                f"config: {self.run_dir} cannot be written ({error}); set `out` to another folder"
            ) from None

    def _save(self) -> None:
        self._record_steps()
        self._flush_metrics()
        self._refuse_weights()
        payload = self.state.state_dict() | {
            "config": json.dumps(configs.to_dict(self.config)),
            "environment": json.dumps(self._environment()),
            "feature_dim": self.task.feature_dim,
        }
        folder = self.run_dir / "checkpoints"

        def write() -> Path:
            return checkpoints.save(folder, self.state.step, payload, keep=self.config.keep_checkpoints)

        path = self.world.from_leader(write)
        self._saved_at = self.state.step
        self._tell("on_checkpoint", path)

    def _flush_metrics(self) -> None:
        if not self.world.leads:
            self.metrics.forget()
            return
        try:
            written = self.metrics.flush()
            if self.tensorboard is not None:
                self.tensorboard.write(written)
        except OSError as error:
            raise checkpoints.CheckpointError(
                f"metrics: {self.metrics.path} could not be written ({error}); free space, then resume"
            ) from error

    def _environment(self) -> dict[str, Any]:
        return env.describe(self.device) | {
            "precision": self.precision.name,
            "mode": self.mode.name,
            "max_autotune": self.config.max_autotune,
            "cudnn_benchmark": self.config.cudnn_benchmark,
            "processes": self.world.size,
        }

    def _stop_if_asked(self) -> None:
        """All processes stop after the same step, whichever was asked."""
        asked = self.world.largest(max(self.stop_request.signum, _ENOUGH * self._ended_early))
        if asked >= _ENOUGH:
            self._ended_early = True
        elif asked and self.state.step < self.total_steps:
            self._save()
            self.state.loader.close()
            raise Interrupted(asked, self.run_dir, self.state.step)

    def _raise_if_stopped(self) -> None:
        if self.stop_request.signum:
            raise _StopRequested

    def _tell(self, event: str, *values: object) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self, *values)

    def _warn(self, message: str, *values: object) -> None:
        if self.world.leads:
            log.warning(message, *values)

    def _finish(self) -> RunResult:
        if self.tensorboard is not None:
            self.tensorboard.close()
        result = self.world.from_leader(self._export)
        if self.world.leads:
            self._write_report()
        self._tell("on_run_end", result)
        return result

    def _write_report(self) -> None:
        """What needs no image, within a second or so; `byol-fast report` adds the rest."""
        try:
            report([self.run_dir], pictures=False)
        except Exception as error:  # the run is done and saved: nothing about a page may spoil that
            self._warn("no report.html: %s; try byol-fast report %s", error, self.run_dir)

    def _export(self) -> RunResult:
        weights, _ = export_encoder(
            self.task.encoder,
            self.config,
            self.run_dir,
            step=self.state.step,
            feature_dim=self.task.feature_dim,
        )
        records = read_metrics(self.metrics.path)
        losses = [r["loss"] for r in records if r.get("loss") is not None][-10:]
        knn = [(r["step"], r["knn_top1"]) for r in records if "knn_top1" in r]
        return RunResult(
            run_dir=self.run_dir,
            steps=self.state.step,
            loss=sum(losses) / len(losses) if losses else math.nan,
            knn_top1=knn[-1][1] if knn else None,
            knn_top1_untrained=knn[0][1] if knn and knn[0][0] == 0 else None,
            encoder=weights,
        )
