"""The trained encoder as two files that anything can read: weights and a description."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from byol_fast import config as configs
from byol_fast.config import Config, ConfigError
from byol_fast.models.encoders import build_encoder
from byol_fast.utils import checkpoint as checkpoints
from byol_fast.utils.env import version
from byol_fast.utils.files import atomic_path, atomic_write

log = logging.getLogger(__name__)

PREFIX = "online.encoder."


def export_encoder(
    encoder: nn.Module, config: Config, folder: Path, *, step: int, feature_dim: int
) -> tuple[Path, Path]:
    """Write `encoder.safetensors` and `encoder.json`.

    The weights carry torchvision's own names, so that they load into the plain torchvision model.

    Args:
        encoder: the online encoder.
        config: the run's configuration.
        folder: where to write; made when missing.
        step: steps the encoder was trained for.
        feature_dim: size of its features.

    Returns:
        Paths of the weights and of the description.

    Raises:
        ConfigError: the folder cannot be written.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}
    description = _description(config, step=step, feature_dim=feature_dim)
    weights, about = folder / "encoder.safetensors", folder / "encoder.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(weights) as temporary:
            save_file(state, temporary, metadata={"format": "pt"})
        atomic_write(about, json.dumps(description, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"export: {folder} cannot be written ({error}); choose another folder") from None
    return weights, about


def _description(config: Config, *, step: int, feature_dim: int) -> dict[str, Any]:
    """What one has to know to use an encoder."""
    return {
        "encoder": config.model.encoder,
        "cifar_stem": config.model.cifar_stem,
        "feature_dim": feature_dim,
        "image_size": config.view1.size,
        "interpolation": config.view1.interpolation,
        "mean": list(config.model.mean),
        "std": list(config.model.std),
        "recipe": config.recipe,
        "step": step,
        "byol_fast": version("byol_fast"),
    }


def export_run(run: Path, folder: Path | None = None) -> tuple[Path, Path]:
    """Export the online encoder of a run's newest checkpoint.

    Args:
        run: a run folder.
        folder: where to write; the run folder when None.

    Raises:
        ConfigError: not a run folder.
        CheckpointError: it holds no usable checkpoint.
    """
    config, encoder, description = _from_checkpoint(run)
    step, feature_dim = description["step"], description["feature_dim"]
    return export_encoder(encoder, config, folder or run, step=step, feature_dim=feature_dim)


def newest_encoder(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The online encoder of a run's newest checkpoint; without checkpoints what `load_encoder` reads."""
    if (path / "config.json").exists() and checkpoints.steps_in(path / "checkpoints"):
        return _from_checkpoint(path)[1:]
    return load_encoder(path)


def _from_checkpoint(run: Path) -> tuple[Config, nn.Module, dict[str, Any]]:
    """The online encoder of a run's newest checkpoint, in eval mode, with its configuration and description."""
    config = configs.load(run / "config.json")
    payload = checkpoints.load_latest(run / "checkpoints")
    encoder = build_encoder(config.model.encoder, image_size=config.view1.size, cifar_stem=config.model.cifar_stem)
    encoder.load_state_dict({k.removeprefix(PREFIX): v for k, v in payload["model"].items() if k.startswith(PREFIX)})
    return config, encoder.eval(), _description(config, step=payload["step"], feature_dim=payload["feature_dim"])


def load_encoder(path: Path | str) -> tuple[nn.Module, dict[str, Any]]:
    """Read a trained encoder.

    Args:
        path: a run folder, or the folder `byol-fast export` wrote to, or its `encoder.safetensors`. Of a run that has
            exported nothing yet the newest checkpoint is taken.

    Returns:
        The encoder in eval mode, and the content of `encoder.json`. Its input is `(x / 255 - mean) / std`,
        `[B, 3, H, W]`; its output `[B, feature_dim]` (flatten what lies behind the batch).

    Raises:
        FileNotFoundError: no exported encoder and no run there.
        CheckpointError: a run that has neither an exported encoder nor a usable checkpoint.
    """
    path = Path(path)
    weights = path / "encoder.safetensors" if path.is_dir() else path.with_suffix(".safetensors")
    if path.is_dir() and not weights.exists() and (path / "config.json").exists():
        _, encoder, description = _from_checkpoint(path)
        log.info("%s has exported no encoder yet: that of its checkpoint of step %d", path, description["step"])
        return encoder, description
    about = weights.with_suffix(".json")
    for file in (weights, about):
        if not file.exists():
            raise FileNotFoundError(f"load_encoder: {file} does not exist; write it with `byol-fast export RUN`")
    description = json.loads(about.read_text())
    saved = checkpoints.steps_in(weights.parent / "checkpoints")
    if saved and saved[-1] > description["step"]:
        log.warning(
            "%s has an encoder of step %d, and a checkpoint of step %d: `byol-fast export %s` takes over the latter",
            weights.parent,
            description["step"],
            saved[-1],
            weights.parent,
        )
    encoder = build_encoder(
        description["encoder"], image_size=description["image_size"], cifar_stem=description["cifar_stem"]
    )
    encoder.load_state_dict(load_file(weights))
    return encoder.eval(), description
