"""The run directory: which files a run writes, and where."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from byol_fast import config as configs
from byol_fast.config import Config, ConfigError
from byol_fast.training.metrics import read as read_metrics
from byol_fast.utils import checkpoint as checkpoints
from byol_fast.utils.files import atomic_write

# Files of a run that has saved no checkpoint yet: such a directory is used again.
_BEFORE_FIRST_CHECKPOINT = {"config.json", "environment.json", "metrics.jsonl", "tb", "report.html", "profile"}


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
    """kNN accuracy of the trained encoder, 0..1, where there were labels."""
    knn_top1_untrained: float | None
    """kNN accuracy of the untrained encoder with recalibrated batch norms: the baseline."""
    encoder: Path
    """`encoder.safetensors`; `byol_fast.load_encoder` reads it."""


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
    def tensorboard(self) -> Path:
        """Folder of TensorBoard's event files."""
        return self.path / "tb"

    def corrupt_images(self, rank: int) -> Path:
        """List of the corrupt images that a process has passed over."""
        return self.path / ("corrupt_images.jsonl" if rank == 0 else f"corrupt_images.{rank}.jsonl")

    def prepare(self, *, resume: bool) -> str | None:
        """Check that this run may use the directory; a directory in which no checkpoint was ever saved is reused.

        Args:
            resume: the directory holds the run to be continued.

        Returns:
            A note for the user, or None.

        Raises:
            ConfigError: the directory holds another run, or not the one to be resumed, or is a file.
        """
        if resume and not (self.path / "config.json").exists():
            raise ConfigError(f"resume: {self.path} must be a run folder, it has no config.json; check the path")
        if resume and self.has_checkpoints():
            return None
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"config: {self.path} must be a folder, it is a file; choose another name")
        present = {p.name for p in self.path.iterdir() if p != self.checkpoints} if self.path.exists() else set()
        present = {name for name in present if not name.startswith("corrupt_images.")}
        if self.has_checkpoints() or present - _BEFORE_FIRST_CHECKPOINT:
            raise ConfigError(
                f"config: {self.path} must be a new run's folder, it is not empty; continue it with "
                f"--resume {self.path}, or choose another name"
            )
        return f"{self.path} has no checkpoint yet: starting from the beginning" if present else None

    def has_checkpoints(self) -> bool:
        """True if a checkpoint was saved."""
        return bool(checkpoints.saved_steps(self.checkpoints))

    def write_config(self, config: Config, environment: dict[str, Any]) -> None:
        """Write `config.json` and `environment.json`; creates the directory."""
        self.path.mkdir(parents=True, exist_ok=True)
        atomic_write(self.path / "config.json", json.dumps(configs.to_dict(config), indent=2) + "\n")
        atomic_write(self.path / "environment.json", json.dumps(environment, indent=2) + "\n")

    def result(self, steps: int, encoder: Path) -> RunResult:
        """Results of the run, from its metrics.

        Args:
            steps: optimizer steps done.
            encoder: the exported weights.
        """
        records = read_metrics(self.metrics)
        losses = [r["loss"] for r in records if r.get("loss") is not None][-10:]
        knn = [(r["step"], r["knn_top1"]) for r in records if "knn_top1" in r]
        return RunResult(
            run_dir=self.path,
            steps=steps,
            loss=sum(losses) / len(losses) if losses else math.nan,
            knn_top1=knn[-1][1] if knn else None,
            knn_top1_untrained=knn[0][1] if knn and knn[0][0] == 0 else None,
            encoder=encoder,
        )
