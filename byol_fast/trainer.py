"""From a configuration to a trained encoder."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from byol_fast import checkpoint as checkpoints
from byol_fast import config as configs
from byol_fast import environment
from byol_fast.capture import compiled_forward
from byol_fast.config import Config, ConfigError
from byol_fast.data import ImageSource, eval_batches, make_loader, split
from byol_fast.display import Display
from byol_fast.evaluate import KNNResult, calibrated, embed, knn_accuracy
from byol_fast.export import export_encoder
from byol_fast.files import atomic_write
from byol_fast.methods import BYOL
from byol_fast.metrics import MetricsLog, Speed, Stopwatch
from byol_fast.metrics import read as read_metrics
from byol_fast.optim import make_optimizer
from byol_fast.schedules import RunSchedule
from byol_fast.state import TrainState
from byol_fast.step import StepMetrics, TrainStep

log = logging.getLogger(__name__)

# Fields that may change between a run and its resumption: they do not change what is computed.
RESUMABLE_CHANGES = frozenset(
    {"name", "out", "log_every", "checkpoint_every", "keep_checkpoints", "data.root", "data.cache", "data.prefetch"}
    | {"data.threads", "knn.val_root"}
)


# A checkpoint after every epoch of a few steps would cost more than the steps.
MIN_CHECKPOINT_STEPS = 100

# Images that the norms of an untrained encoder are calibrated on.
CALIBRATION_IMAGES = 10_240


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
    """Mean loss of the last ten steps."""
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


def resolve_autocast(name: str, device: torch.device) -> torch.dtype | None:
    """Dtype of a configuration's precision; None for fp32."""
    fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else environment.cpu_has_bf16()
    return torch.bfloat16 if name == "bf16" or (name == "auto" and fast) else None


class Trainer:
    """A run: built from a configuration, started with `fit`.

    Args:
        config: what to do.
        data: images to train on, instead of the configuration's: anything `byol_fast.data.open_source` takes.
        resume: run folder to continue; its checkpoint is loaded and its configuration must agree with `config`.

    Raises:
        ConfigError: a field is invalid, or differs from the run to be resumed in what is computed.
        CheckpointError: `resume` holds no usable checkpoint.
        ValueError: the data is missing, empty or too small.

    Example:
        >>> from byol_fast import Trainer, recipes
        >>> Trainer(recipes.demo()).fit().knn_top1
    """

    def __init__(self, config: Config, *, data: object = None, resume: Path | None = None) -> None:
        if isinstance(data, str | Path):
            config, data = configs.replace(config, {"data.root": Path(data)}), None
        # So that the run can be resumed from any folder.
        if config.data.root is not None:
            config = configs.replace(config, {"data.root": config.data.root.expanduser().absolute()})
        if config.knn.val_root is not None:
            config = configs.replace(config, {"knn.val_root": config.knn.val_root.expanduser().absolute()})
        self.config = config
        self.device = resolve_device(config.device)
        self.autocast = resolve_autocast(config.precision, self.device)
        self.run_dir = resume or config.out / (config.name or f"{config.recipe}-{datetime.now():%Y%m%d-%H%M%S}")
        self.notes: list[str] = []
        payload = self._claim_run_dir(resume)
        self.train_source, self.val_source = split(config, data)
        torch.manual_seed(config.seed)
        self.task = BYOL(
            config.model.encoder,
            hidden_dim=config.model.hidden_dim,
            projection_dim=config.model.projection_dim,
            last_bias=config.model.last_bias,
            image_size=config.view1.size,
            cifar_stem=config.model.cifar_stem,
            zero_init_residual=config.model.zero_init_residual,
            pretrained=config.model.pretrained and payload is None,
            mean=config.model.mean,
            std=config.model.std,
        )
        self.task.to(self.device)
        if config.channels_last:
            self.task.to(memory_format=torch.channels_last)
        optimizer = make_optimizer(config.optim, self.task.trainable_parameters())
        loader = make_loader(self.train_source, config, device=self.device)
        self.state = TrainState(self.task, optimizer, loader)
        self.total_steps = config.steps or config.epochs * loader.steps_per_epoch
        self.train_step = TrainStep(
            self.task,
            optimizer,
            self._schedule(),
            forward=compiled_forward(self.task, config.compile, self.device),
            autocast=self.autocast,
            channels_last=config.channels_last,
        )
        self.metrics = MetricsLog(self.run_dir / "metrics.jsonl")
        self.knn_labels = self._knn_labels()
        self.stopwatch = Stopwatch()
        self._recent: list[tuple[int, StepMetrics]] = []
        self._stop: int | None = None
        if payload is not None:
            self._restore(payload)

    # ------------------------------------------------------------------ set-up

    def _schedule(self) -> RunSchedule:
        optim, steps = self.config.optim, self.total_steps
        if optim.warmup_steps is not None:
            warmup = optim.warmup_steps
            if warmup > steps:
                raise ConfigError(f"config: optim.warmup_steps must be at most the run's {steps} steps, got {warmup}")
        else:
            asked = round(optim.warmup_epochs * self.state.loader.steps_per_epoch)
            warmup = min(asked, steps // 4)
            if warmup < asked:
                self.notes.append(f"warm-up of {asked} steps cut to {warmup}, a quarter of the run's {steps}")
        return RunSchedule(
            total_steps=steps,
            warmup_steps=warmup,
            base_lr=optim.lr,
            batch_size=self.config.batch_size if optim.scale_lr else 256,
            lr_schedule=optim.schedule,
            tau_base=self.config.tau.base,
            tau_schedule=self.config.tau.schedule,
        )

    def _knn_labels(self) -> tuple[Tensor, Tensor] | None:
        """Labels of the training and validation images; None where kNN is off."""
        train, val = self.train_source.labels, self.val_source.labels if self.val_source else None
        if self.config.knn.enabled == "off":
            return None
        if train is not None and val is not None:
            return torch.as_tensor(train), torch.as_tensor(val)
        if self.val_source is None:
            missing = "there are no validation images: set knn.val_root, or give a root with train and val inside"
        else:
            which = "training" if train is None else "validation"
            missing = f"the {which} images have no labels: sort them into one folder per class"
        if self.config.knn.enabled == "on":
            raise ConfigError(f"config: knn.enabled is 'on', but {missing}")
        if train is not None:
            self.notes.append(f"no kNN evaluation: {missing}")
        return None

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
        for difference in environment.differences(json.loads(payload["environment"]), self._environment()):
            log.warning("resume: %s; the run goes on, but not bit for bit as it would have", difference)
        self.state.load_state_dict(payload)

    # ------------------------------------------------------------------ the run

    def fit(self) -> RunResult:
        """Train to the end of the run, then export the encoder.

        Returns:
            What the run left.

        Raises:
            Interrupted: SIGINT or SIGTERM arrived; everything up to the last finished step is saved.
            TrainingError: the loss is not finite.
            CheckpointError: the disk is full or read-only.
        """
        self._stop = None
        self._write_run_folder()
        epoch = self.state.loader.steps_per_epoch
        checkpoint_every = self.config.checkpoint_every or -(-MIN_CHECKPOINT_STEPS // epoch) * epoch
        with self._signals_noted(), Display(self.total_steps, self.state.step) as display:
            for line in self._headline():
                display.say(line)
            self._evaluate_if_due(display)
            while self.state.step < self.total_steps:
                self._train_one_step()
                display.advance(self.state.step)
                if self._due(self.config.log_every):
                    self._log(display)
                if self._due(checkpoint_every):
                    self._save()
                self._evaluate_if_due(display)
                if self._stop is not None and self.state.step < self.total_steps:
                    self._save_and_stop()
            if self.state.evaluated_at == self.total_steps:
                self._save()  # so that a later resume need not evaluate again
        self.state.loader.close()
        return self._finish()

    def _due(self, every: int) -> bool:
        return self.state.step % every == 0 or self.state.step == self.total_steps

    def _train_one_step(self) -> None:
        with self.stopwatch.waiting():
            try:
                batch = next(self.state.loader)
            except ValueError:  # an image that cannot be read: what was learned until here is kept
                self._save()
                raise
        metrics = self.train_step(batch, self.state.step)
        self.state.step += 1
        self._recent.append((self.state.step, metrics))
        self.stopwatch.count(self.config.batch_size)

    def _log(self, display: Display) -> None:
        self._record_steps()
        record = self.metrics.latest
        display.status(
            self.state.step,
            self.state.epoch,
            f"loss {record['loss']:.4f}  std {record['collapse_std']:.2f}  lr {record['lr']:.3g}  "
            f"tau {record['tau']:.4f}  {record['images_per_s']:.1f} img/s  data wait {record['data_wait']:.0%}",
        )
        self._flush_metrics()

    def _record_steps(self) -> None:
        """Queue a record for each step since the last time; the only place where the host waits for the device."""
        if not self._recent:
            return
        values = torch.stack([torch.stack([m.loss.double(), m.collapse_std.double()]) for _, m in self._recent])
        losses_and_stds = values.tolist()
        speed = self.stopwatch.lap()
        for (step, metrics), (loss, spread) in zip(self._recent, losses_and_stds, strict=True):
            if not math.isfinite(loss):
                self._refuse_loss(step, loss)
            self.metrics.add(self._record(step, metrics, loss, spread, speed))
        self._recent.clear()

    def _record(self, step: int, metrics: StepMetrics, loss: float, spread: float, speed: Speed) -> dict[str, Any]:
        return {
            "step": step,
            "epoch": round(step / self.state.loader.steps_per_epoch, 4),
            "loss": loss,
            "lr": metrics.lr,
            "tau": metrics.tau,
            "images_per_s": round(speed.images_per_s, 2),
            "data_wait": round(speed.data_wait, 4),
            "collapse_std": spread,
        }

    def _refuse_loss(self, step: int, loss: float) -> None:
        self._recent.clear()
        self._flush_metrics()
        self._fail(f"the loss of step {step} is {loss}")

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
        step, every = self.state.step, self.config.knn.every_epochs * self.state.loader.steps_per_epoch
        if self.knn_labels is None or self.state.evaluated_at == step or not self._due(every):
            return
        try:
            with self.stopwatch.paused():
                result = self._knn()
        except _StopRequested:
            self._save_and_stop()
        which = "untrained, norms calibrated" if step == 0 else f"epoch {self.state.epoch:.4g}"
        display.say(f"kNN-{self.config.knn.k} top-1 {result.top1:.1%}  ({which}; {result.num_test} images)")
        self._record_steps()
        self.metrics.add(
            {
                "step": step,
                "epoch": round(self.state.epoch, 4),
                "knn_top1": result.top1,
                "knn_top5": result.top5,
                "knn_k": self.config.knn.k,
            }
        )
        self._flush_metrics()
        self.state.evaluated_at = step

    def _knn(self) -> KNNResult:
        """KNN accuracy of the online encoder; the untrained one is judged with calibrated batch norms."""
        assert self.knn_labels is not None
        assert self.val_source is not None
        knn, encoder = self.config.knn, self.task.encoder
        train_y, val_y = self.knn_labels
        train_source, index = self._spaced(knn.max_train)
        common: dict[str, Any] = {
            "normalize": self.task.normalize,
            "device": self.device,
            "autocast": self.autocast,
            "check": self._raise_if_stopped,
        }
        if self.state.step == 0:
            encoder = calibrated(encoder, self._images(self._spaced(CALIBRATION_IMAGES)[0]), **common)
        train_x = embed(encoder, self._images(train_source), **common)
        val_x = embed(encoder, self._images(self.val_source), **common)
        return knn_accuracy(
            train_x,
            train_y[index].to(self.device),
            val_x,
            val_y,
            k=knn.k,
            temperature=knn.temperature,
            num_classes=len(self.train_source.classes),
        )

    def _spaced(self, at_most: int) -> tuple[ImageSource, Tensor]:
        """Evenly spaced training images (class folders come in the order of the classes), and their positions."""
        count = len(self.train_source)
        index = np.arange(count) if not 0 < at_most < count else np.arange(at_most) * count // at_most
        return self.train_source if len(index) == count else self.train_source.subset(index), torch.from_numpy(index)

    def _images(self, source: ImageSource) -> Iterator[tuple[Tensor, Tensor]]:
        view, data = self.config.view1, self.config.data
        return eval_batches(
            source,
            view.size,
            256,
            interpolation=view.interpolation,
            threads=data.threads,
            loader=data.loader,
            device=self.device,
        )

    # ------------------------------------------------------------------ files and signals

    def _headline(self) -> list[str]:
        count = sum(p.numel() for p in self.task.trainable_parameters()) / 1e6
        precision = "bf16" if self.autocast is not None else "fp32"
        step, total = self.state.step, self.total_steps
        if step >= total:
            begin = f"already complete at step {step} of {total}:"
        else:
            begin = f"resuming after step {step} of {total}:" if step else "training"
        return [
            (
                f"{begin} {self.config.recipe}: {self.config.model.encoder}, {count:.1f} M parameters with the heads, "
                f"{len(self.train_source)} images, {total} steps of {self.config.batch_size}, "
                f"{self.device} {precision}, data by {self.state.loader.backend}"
            ),
            *self.notes,
            f"run folder: {self.run_dir}",
        ]

    def _claim_run_dir(self, resume: Path | None) -> dict[str, Any] | None:
        """Refuse a folder that holds another run; read the checkpoint to go on from, where there is one.

        A run that died before its first checkpoint left nothing to lose: its folder is begun anew.
        """
        folder = self.run_dir / "checkpoints"
        if resume is not None and not (self.run_dir / "config.json").exists():
            raise ConfigError(f"resume: {self.run_dir} must be a run folder, it has no config.json; check the path")
        if resume is not None and checkpoints.steps_in(folder):
            return checkpoints.load_latest(folder)
        if self.run_dir.exists() and not self.run_dir.is_dir():
            raise ConfigError(f"config: {self.run_dir} must be a folder, it is a file; choose another name")
        begun = {"config.json", "environment.json", "metrics.jsonl"}
        left = {p.name for p in self.run_dir.iterdir() if p != folder} if self.run_dir.exists() else set()
        if checkpoints.steps_in(folder) or left - begun:
            raise ConfigError(
                f"config: {self.run_dir} must be a new run's folder, it is not empty; continue it with "
                f"--resume {self.run_dir}, or choose another name"
            )
        if left:
            self.notes.append(f"{self.run_dir} has no checkpoint yet: starting from the beginning")
        return None

    def _write_run_folder(self) -> None:
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self.metrics.rewind(self.state.step, evaluated=self.state.evaluated_at == self.state.step)
            atomic_write(self.run_dir / "config.json", json.dumps(configs.to_dict(self.config), indent=2) + "\n")
            record = json.dumps(self._environment(), indent=2)
            atomic_write(self.run_dir / "environment.json", record + "\n")
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
        checkpoints.save(self.run_dir / "checkpoints", self.state.step, payload, keep=self.config.keep_checkpoints)

    def _flush_metrics(self) -> None:
        try:
            self.metrics.flush()
        except OSError as error:
            raise checkpoints.CheckpointError(
                f"metrics: {self.metrics.path} could not be written ({error}); free space, then resume"
            ) from error

    def _environment(self) -> dict[str, Any]:
        return environment.describe(self.device) | {"precision": str(self.autocast or torch.float32)}

    def _save_and_stop(self) -> None:
        assert self._stop is not None
        self._save()
        self.state.loader.close()
        raise Interrupted(self._stop, self.run_dir, self.state.step)

    def _raise_if_stopped(self) -> None:
        if self._stop is not None:
            raise _StopRequested

    @contextmanager
    def _signals_noted(self) -> Iterator[None]:
        """Let SIGINT and SIGTERM end the run after the step under way; a second SIGINT ends it at once."""

        def note(signum: int, _frame: FrameType | None) -> None:
            self._stop = signum
            signal.signal(signal.SIGINT, signal.default_int_handler)
            name = signal.Signals(signum).name
            os.write(2, f"\n{name}: saving after this step; Ctrl-C again stops without saving\n".encode())

        try:
            before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: whoever owns that one handles signals
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _finish(self) -> RunResult:
        weights, _ = export_encoder(
            self.task.encoder,
            self.config,
            self.run_dir,
            step=self.state.step,
            feature_dim=self.task.feature_dim,
        )
        records = read_metrics(self.metrics.path)
        losses = [r["loss"] for r in records if "loss" in r][-10:]
        knn = [(r["step"], r["knn_top1"]) for r in records if "knn_top1" in r]
        return RunResult(
            run_dir=self.run_dir,
            steps=self.state.step,
            loss=sum(losses) / len(losses) if losses else math.nan,
            knn_top1=knn[-1][1] if knn else None,
            knn_top1_untrained=knn[0][1] if knn and knn[0][0] == 0 else None,
            encoder=weights,
        )
