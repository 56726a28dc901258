"""The run directory: which files a run writes, and where."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

from byol_fast import config as configs
from byol_fast.config import Config, ConfigError
from byol_fast.training.health import assess
from byol_fast.training.locks import RunLock
from byol_fast.training.metrics_file import read as read_metrics
from byol_fast.utils import checkpoint_files
from byol_fast.utils.errors import CheckpointError, write_advice
from byol_fast.utils.files import atomic_write, remove_temporaries
from byol_fast.utils.records import read_json
from byol_fast.utils.run_folder import check_run_folder, not_writable

# Files of a run that has saved no checkpoint yet: such a directory is used again.
_BEFORE_FIRST_CHECKPOINT = {
    "config.json", "environment.json", "metrics.jsonl", "report.html", "profile", "tb", "trackers", "wandb",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class RunResult:
    """Results of a finished run."""

    run_dir: Path
    """The run's folder."""
    steps: int
    """Optimizer steps done."""
    loss: float
    """Mean loss of the last ten steps that were not skipped."""
    knn_top1: float | None
    """kNN accuracy of the trained encoder, 0..1, where there were labels, on the images of all evaluations during the
    run (`knn.max_train`, `knn.max_val`): comparable with `knn_top1_untrained`."""
    knn_top1_untrained: float | None
    """kNN accuracy before the first step, with recalibrated batch norms: the baseline."""
    encoder: Path
    """`encoder.safetensors`; `byol_fast.load_encoder` reads it."""
    knn_k: int | None = None
    """Number of neighbors of `knn_top1`."""
    knn_full_top1: float | None = None
    """kNN accuracy of the trained encoder on all images, with `knn.full_at_end` if `knn_top1` leaves some out."""
    images: int = 0
    """Images trained on, each as often as it was used."""
    images_per_second: float = math.nan
    """Mean over the steps of the run, without evaluations and pauses; NaN if it was not recorded."""
    embedding_std: float = math.nan
    """Mean over the last tenth of the steps: about 1 is healthy, 0 is collapsed; NaN if these were skipped."""
    skipped_steps: int = 0
    """Steps that changed nothing, because the loss or a gradient was not finite."""
    problem: str | None = None
    """Reason why the encoder is of no use: it collapsed, or no step trained it. None: there is no such reason."""


@dataclass(frozen=True, slots=True)
class RunDir:
    """Paths of a run's files."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """The metrics file, `metrics.jsonl`."""
        return self.path / "metrics.jsonl"

    @property
    def encoder(self) -> Path:
        """Weights of the exported encoder, `encoder.safetensors`."""
        return self.path / "encoder.safetensors"

    def corrupt_images(self, rank: int) -> Path:
        """List of the corrupt images that a process has passed over."""
        return self.path / ("corrupt_images.jsonl" if rank == 0 else f"corrupt_images.{rank}.jsonl")

    @property
    def status(self) -> Path:
        """Status file, `status.json`: exists once a checkpoint was saved, and says if the run is finished."""
        return self.path / "status.json"

    def check_usable(self, *, resume: bool) -> str | None:
        """Check that this run may use the directory; a directory in which no checkpoint was ever saved is reused.

        Args:
            resume: the directory holds the run to be continued.

        Returns:
            A note for the user, or None.

        Raises:
            ConfigError: the directory holds another run, or not the one to be resumed, or its checkpoints are gone.
        """
        if resume and self.has_checkpoints():
            return None
        self.check_not_lost()
        # Hidden files are no run's: the lock, or what file managers and network file systems leave.
        present = {p.name for p in self.path.iterdir() if p != self.checkpoints and not p.name.startswith(".")}
        present = {name for name in present if not name.startswith("corrupt_images.")}
        others = present - _BEFORE_FIRST_CHECKPOINT
        # Beside the configuration of a run, other files than an export are the user's: a log, notes.
        is_foreign = bool(others) and not self._has_config()
        if self.has_checkpoints() or is_foreign or "encoder.safetensors" in others:
            raise ConfigError(
                f"config: {self.path} must be a new run's folder, it is not empty; continue it with "
                f"--resume {self.path}, or choose another name"
            )
        return f"{self.path} has no checkpoint yet: starting from the beginning" if present else None

    def _has_config(self) -> bool:
        try:
            configs.load(self.path / "config.json")
        except ConfigError:
            return False
        return True

    def has_checkpoints(self) -> bool:
        """True if there is a checkpoint."""
        return bool(checkpoint_files.newest_first(self.checkpoints))

    def check_not_lost(self) -> None:
        """Check that the checkpoints of a run that has saved one are still there.

        Raises:
            ConfigError: there is none.
        """
        if self.status.exists() and not self.has_checkpoints():
            raise ConfigError(
                f"resume: {self.checkpoints} must hold the checkpoints that this run has saved, it holds none; put the "
                "folder back to continue the run, or start another one with another --name"
            )

    def is_finished(self) -> bool:
        """True if the run came to its end, and was not continued since."""
        return self._read_status().get("finished") is True

    def is_complete_without_checkpoints(self) -> bool:
        """True if the run came to its end and its checkpoints were deleted: the exported encoder is its result."""
        return self.is_finished() and self.encoder.exists() and not self.has_checkpoints()

    def problem(self) -> str | None:
        """`RunResult.problem` of a run that came to its end."""
        problem = self._read_status().get("problem")
        return problem if isinstance(problem, str) and self.is_finished() else None

    def _read_status(self) -> dict[str, Any]:
        try:
            return read_json(self.status)
        except (OSError, ValueError):
            return {}

    def write_status(self, *, finished: bool, problem: str | None = None) -> None:
        """Write `status.json` if there is a checkpoint.

        Args:
            finished: the run came to its end.
            problem: as in `RunResult`.

        Raises:
            CheckpointError: the disk is full or read-only.
        """
        status = {"finished": finished} | ({} if problem is None else {"problem": problem})
        if not self.has_checkpoints() or self._read_status() == status:
            return
        try:
            atomic_write(self.status, json.dumps(status) + "\n")
        except OSError as error:
            raise CheckpointError(
                f"checkpoint: {self.status} could not be written ({error}); {write_advice(error)}, then resume"
            ) from error

    def write_config(self, config: Config, environment: dict[str, Any]) -> None:
        """Write `config.json` and `environment.json`; creates the directory."""
        self.path.mkdir(parents=True, exist_ok=True)
        atomic_write(self.path / "config.json", json.dumps(configs.to_dict(config), indent=2) + "\n")
        atomic_write(self.path / "environment.json", json.dumps(environment, indent=2) + "\n")

    def has_full_evaluation(self, step: int) -> bool:
        """True if the metrics have an evaluation on all images after this step."""
        return any(r["step"] == step and "knn_full_top1" in r for r in read_metrics(self.metrics))

    def result(self, config: Config, steps: int, encoder: Path, *, global_batch_size: int) -> RunResult:
        """Results of the run, from its metrics.

        Args:
            config: of the run.
            steps: optimizer steps done.
            encoder: the exported weights.
            global_batch_size: images per step.
        """
        records = read_metrics(self.metrics)
        health = assess(records, batch_size=config.batch_size, method=config.method)
        speeds = [r["images_per_second"] for r in records if (r.get("images_per_second") or 0) > 0]
        losses = [r["loss"] for r in records if r.get("loss") is not None][-10:]
        knn = [r for r in records if "knn_top1" in r]
        return RunResult(
            run_dir=self.path,
            steps=steps,
            loss=sum(losses) / len(losses) if losses else math.nan,
            knn_top1=knn[-1]["knn_top1"] if knn else None,
            knn_top1_untrained=knn[0]["knn_top1"] if knn and knn[0]["step"] == 0 else None,
            encoder=encoder,
            knn_k=knn[-1].get("knn_k") if knn else None,
            knn_full_top1=next((r["knn_full_top1"] for r in reversed(records) if "knn_full_top1" in r), None),
            images=steps * global_batch_size,
            images_per_second=len(speeds) / math.fsum(1 / s for s in speeds) if speeds else math.nan,
            embedding_std=health.embedding_std,
            skipped_steps=health.skipped_steps,
            problem=health.problem,
        )


def open_run_dir(config: Config, resume: Path | None) -> tuple[RunDir, RunLock, str | None]:
    """Create a run's directory, or find that of the run to be resumed, then lock and check it.

    Args:
        config: of the run; a run without a name gets a new directory.
        resume: run folder to continue.

    Returns:
        The directory, its lock, and a note for the user or None.

    Raises:
        ConfigError: another process runs in the directory, or it holds something else, or cannot be written.
    """
    if resume is not None and not (resume / "config.json").exists():
        raise ConfigError(f"resume: {resume} must be a run folder, it has no config.json; check the path")
    path = resume or config.out / config.name
    if resume is None:
        check_run_folder(config.out, config.name)
    try:
        path, created = _create(config) if resume is None else (resume, [])
        run_dir = RunDir(path.absolute())  # the program may change its working directory during the run
        lock = RunLock(run_dir.path, created)
        try:
            note = run_dir.check_usable(resume=resume is not None)
            remove_temporaries(run_dir.path)  # of killed processes: this one has the lock
            remove_temporaries(run_dir.checkpoints)
            return run_dir, lock, note
        except BaseException:
            lock.release()
            raise
    except OSError as error:
        raise not_writable(path, error) from None


def _create(config: Config) -> tuple[Path, list[Path]]:
    """Create a run's directory; returns it, and the directories that did not exist, the innermost first."""
    stamp = f"{config.recipe}-{datetime.now():%Y%m%d-%H%M%S}"
    for number in count(1):
        # Runs without a name may start in the same second.
        path = config.out / (config.name or (stamp if number == 1 else f"{stamp}-{number}"))
        created = [p for p in (path.absolute(), *path.absolute().parents) if not p.exists()]
        try:
            path.mkdir(parents=True, exist_ok=bool(config.name))
            break
        except FileExistsError:
            if config.name:
                raise ConfigError(f"config: {path} must be a folder, it is a file; choose another name") from None
    return path, created
