"""The trackers that a configuration can name."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from byol_fast.config import ConfigError
from byol_fast.trackers.base import Tracker

_INSTALL = {
    "tensorboard": "pip install tensorboard",
    "wandb": "pip install '.[wandb]' in the clone of byol_fast",
    "mlflow": "pip install '.[mlflow]' in the clone of byol_fast",
}


def check_installed(names: Sequence[str]) -> None:
    """Check that the packages of trackers are installed, without importing them.

    Args:
        names: of `Config.log`.

    Raises:
        ConfigError: one is missing; names the command that installs it.
    """
    for name in names:
        spec = importlib.util.find_spec(name)
        # A folder of that name, which the tracker leaves where it ran, counts as a package without an origin.
        if spec is None or spec.origin is None:
            raise ConfigError(
                f"config: log must name installed trackers, {name} is not; {_INSTALL[name]}, or leave it out of --log"
            )


def build_trackers(names: Sequence[str]) -> list[Tracker]:
    """Trackers by their names in `Config.log`; their packages are imported when they begin."""
    from byol_fast.trackers.mlflow import MLflowTracker
    from byol_fast.trackers.tensorboard import TensorBoardTracker
    from byol_fast.trackers.wandb import WandbTracker

    kinds: dict[str, type[Tracker]] = {
        "tensorboard": TensorBoardTracker,
        "wandb": WandbTracker,
        "mlflow": MLflowTracker,
    }
    return [kinds[name]() for name in names]
