"""Plan of speed runs (`byol-fast bench cifar10`): configurations, and what is there already; without torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from byol_fast import config as configs
from byol_fast.bench.speed_log import SpeedLog, read_log
from byol_fast.config import Config, ConfigError
from byol_fast.training.preflight import check_start
from byol_fast.training.run_dir import RunDir
from byol_fast.utils.files import check_output_folder

RECIPES = ("cifar10_lightly", "cifar10_fast")
"""Recipes that are run by default."""
EVALUATIONS = 20
"""Most evaluations of a run by default, without that of the untrained encoder and one after the last step."""


def speed_run_config(config: Config) -> Config:
    """A recipe as it is run for speed: kNN-200 on all images, nothing beside it, checkpoints at the evaluations."""
    changes = {
        "knn": {"enabled": "on", "k": 200, "temperature": 0.1, "max_train": 0, "max_val": 0, "full_at_end": False},
        "probe.enabled": "off",
        "log": (),
        "log_every": 100,
        "checkpoint_every": 10**9,
        "keep_checkpoints": 1,
    }
    return configs.replace(config, changes)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedRun:
    """A recipe with a seed."""

    config: Config
    """Its run folder is OUT/NAME."""
    log: SpeedLog | None
    """Its log; None if it has not begun."""
    is_planned: bool = True
    """False if its epochs are to be planned by a measurement."""

    @property
    def is_finished(self) -> bool:
        """True if there is nothing left to train."""
        return self.log is not None and bool(self.log.header["finished"])

    @property
    def checkpointed(self) -> Path | None:
        """Run folder to resume from; None if there is no checkpoint."""
        return self._folder.path if self._folder.has_checkpoints() else None

    def check_not_lost(self) -> None:
        """Check that a log and the checkpoints of its run are both there.

        Raises:
            ConfigError: one of them is gone.
        """
        folder = self._folder
        is_begun = folder.status.exists() or folder.has_checkpoints()
        if is_begun and (self.log is None or not folder.has_checkpoints()):
            gone = f"log, {folder.path}.jsonl," if self.log is None else "folder of checkpoints"
            raise ConfigError(
                f"bench cifar10: {folder.path} must have checkpoints, and a log beside it, but its {gone} "
                "is gone; put it back, delete both, or choose another --output"
            )

    @property
    def _folder(self) -> RunDir:
        return RunDir(self.config.out / self.config.name)


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeedPlan:
    """Recipes and seeds to run."""

    configs: tuple[Config, ...]
    """One for each recipe, as `speed_run_config` returns it, with the user's changes."""
    output: Path
    """Folder of the logs and the run folders."""
    seeds: int = 1
    """Runs of each recipe; their seeds are the configuration's and the following ones."""
    minutes: float | None = None
    """Time of a run, with its setup and evaluations; None: the epochs of the configuration."""
    knn_every: int | None = None
    """Epochs between evaluations; None: as many as give about 20 evaluations."""
    command: str = ""
    """As the user has entered it, for the logs."""

    def with_epochs(self, config: Config, epochs: int) -> Config:
        """A configuration with a number of epochs, and its evaluations at multiples of some epochs."""
        return configs.replace(
            config, {"epochs": epochs, "knn.every_epochs": self.knn_every or -(-epochs // EVALUATIONS)}
        )

    def runs(self) -> list[PlannedRun]:
        """All runs, with the logs of earlier calls; writes nothing.

        With `minutes`, the epochs of a run that has not begun are those of its recipe, unless another seed has begun.

        Raises:
            ConfigError: a recipe is there twice, a log cannot be read or is of another configuration, or a run folder
                cannot be used.
            SourceError: there are no images.
        """
        names = Counter(config.recipe for config in self.configs)
        if repeated := [name for name, times in names.items() if times > 1]:
            raise ConfigError(
                f"bench cifar10: a recipe must be named once, got {repeated[0]} {names[repeated[0]]} times"
            )
        check_output_folder(self.output, "bench cifar10", "choose another --output")
        return [run for config in self.configs for run in self._runs_of(config)]

    def _runs_of(self, config: Config) -> list[PlannedRun]:
        seeds = range(config.seed, config.seed + self.seeds)
        named = [
            configs.replace(config, {"seed": seed, "out": self.output, "name": f"{config.recipe}-seed{seed}"})
            for seed in seeds
        ]
        logs = [read_log(path) if (path := self.log_path(c)).exists() else None for c in named]
        begun = [log for log in logs if log is not None]
        is_planned = self.minutes is None or bool(begun)
        # All seeds of a recipe have the same epochs.
        epochs = begun[0].header["epochs"] if self.minutes is not None and begun else config.epochs
        runs = []
        for c, log in zip(named, logs, strict=True):
            run = PlannedRun(config=self.with_epochs(c, epochs), log=log, is_planned=is_planned)
            if log is not None:
                log.check_same(run.config, self.minutes)
            if not run.is_finished:
                run.check_not_lost()
                check_start(run.config, resume=None if log is None else run.checkpointed)
            runs.append(run)
        return runs

    def log_path(self, config: Config) -> Path:
        """File of the log of a run."""
        return self.output / f"{config.name}.jsonl"
