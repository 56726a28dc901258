"""The trained encoder as two files: weights (safetensors) and metadata (JSON)."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from byol_fast import config as configs
from byol_fast.config import Config, Preprocessing
from byol_fast.config.fields import ImageSize, check
from byol_fast.config.resnets import has_stem_relu
from byol_fast.models.encoders import build_encoder
from byol_fast.utils import checkpoint as checkpoints
from byol_fast.utils import records as checks
from byol_fast.utils.env import version
from byol_fast.utils.errors import CheckpointError, reason
from byol_fast.utils.files import atomic_path, atomic_write, open_regular, write_errors
from byol_fast.utils.run_folder import encoder_files

log = logging.getLogger(__name__)

PREFIX = "online.encoder."
"""Prefix of the encoder's weights in a checkpoint."""

_METADATA = checks.record_of(
    {
        "encoder": checks.text,
        "cifar_stem": checks.flag,
        **dict.fromkeys(("feature_dim", "image_size", "step"), checks.count),
    },
    required=True,
)


def export_encoder(
    encoder: nn.Module, config: Config, folder: Path, *, step: int, feature_dim: int
) -> tuple[Path, Path]:
    """Write `encoder.safetensors` and `encoder.json`.

    The weights have torchvision's names and load into the plain torchvision model.

    Args:
        encoder: the online encoder.
        config: the run's configuration.
        folder: where to write; created if missing.
        step: number of training steps.
        feature_dim: size of its features.

    Returns:
        Paths of the weights and of the metadata.

    Raises:
        ConfigError: the folder cannot be written.
        CheckpointError: a weight or a buffer is not finite; nothing is written.
    """
    # Copies: safetensors refuses tensors that share memory, as those of a layer that is used twice do.
    state = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in encoder.state_dict().items()
    }
    checkpoints.check_finite(state, f"export: the encoder of step {step}")
    metadata = _metadata(config, step=step, feature_dim=feature_dim)
    weights_path, metadata_path = folder / "encoder.safetensors", folder / "encoder.json"
    with write_errors(folder, "export", "choose another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(weights_path) as temporary:
            # Not by `save_file`, whose error about a full disk is no OSError.
            temporary.write_bytes(save(state, metadata={"format": "pt"}))
        atomic_write(metadata_path, json.dumps(metadata, indent=2) + "\n")
    return weights_path, metadata_path


def _metadata(config: Config, *, step: int, feature_dim: int) -> dict[str, Any]:
    """Content of `encoder.json`."""
    name = config.model.encoder
    # Programs that load the weights into torchvision's ResNet-18 need it; all other encoders are as their names say.
    stem = {} if has_stem_relu(name) else {"stem_relu": False}
    return {
        "encoder": name,
        "cifar_stem": config.model.cifar_stem,
        **stem,
        "feature_dim": feature_dim,
        "image_size": config.view1.size,
        "preprocessing": Preprocessing.of_config(config).to_dict(),
        "recipe": config.recipe,
        "step": step,
        **_lineage(config),
        "byol_fast": version("byol_fast"),
    }


def _lineage(config: Config) -> dict[str, Any]:
    """Weights that a run began with, for `encoder.json`; empty for a run from random ones."""
    lineage: dict[str, Any] = {}
    if config.init_from:
        lineage |= {"init_from": config.init_from, "sha256": config.init_sha256}
    if config.extend is not None:
        lineage |= {"extend": str(config.extend), "step": config.extended_at}
    return {"lineage": lineage} if lineage else {}


def export_run(run: Path, folder: Path | None = None) -> tuple[Path, Path]:
    """Export the online encoder of a run's latest usable checkpoint.

    Args:
        run: a run folder.
        folder: where to write; None: the run folder.

    Raises:
        ConfigError: not a run folder.
        CheckpointError: it has no usable checkpoint.
    """
    config, encoder, metadata = _from_checkpoint(run)
    step, feature_dim = metadata["step"], metadata["feature_dim"]
    return export_encoder(encoder, config, folder or run, step=step, feature_dim=feature_dim)


def load_latest_encoder(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The online encoder of a run's latest checkpoint; without checkpoints, that of `load_encoder`."""
    if (path / "config.json").exists() and checkpoints.saved_steps(path / "checkpoints"):
        return _from_checkpoint(path)[1:]
    return load_encoder(path)


def _from_checkpoint(run: Path) -> tuple[Config, nn.Module, dict[str, Any]]:
    """Configuration, online encoder in eval mode, and metadata of a run's latest usable checkpoint."""
    config = configs.load(run / "config.json")
    encoder = build_encoder(config.model.encoder, image_size=config.view1.size, cifar_stem=config.model.cifar_stem)

    def use(path: Path) -> dict[str, Any]:
        payload = checkpoints.load(path)
        with checkpoints.restoring(path):
            state = {k.removeprefix(PREFIX): v for k, v in payload["model"].items() if k.startswith(PREFIX)}
            encoder.load_state_dict(state)
            metadata = _metadata(config, step=payload["step"], feature_dim=payload["feature_dim"])
            if problem := _METADATA(metadata, ""):
                raise CheckpointError(f"checkpoint: {path} cannot be restored ({problem})")
        checkpoints.check_finite(state, f"checkpoint: the encoder of {path}")
        return metadata

    metadata = checkpoints.use_latest(run / "checkpoints", use)
    return config, encoder.eval(), metadata


def load_encoder(path: Path | str) -> tuple[nn.Module, dict[str, Any]]:
    """Load a trained encoder.

    Args:
        path: a run folder, a folder that `byol-fast export` wrote, or its `encoder.safetensors`. If a run has not
            exported its encoder yet, that of the latest checkpoint.

    Returns:
        The encoder in eval mode and its metadata, the content of `encoder.json`. `EvalTransform(metadata)` maps images
        to its input `[B, 3, H, W]`; its output, flattened after the batch, is `[B, feature_dim]`.

    Raises:
        FileNotFoundError: there is neither an exported encoder nor a run.
        CheckpointError: the exported encoder is damaged, or the run has neither one nor a usable checkpoint.
    """
    path = Path(path)
    files = encoder_files(path)
    if files is None:
        _, encoder, metadata = _from_checkpoint(path)
        log.info("%s has no exported encoder yet: loading that of the checkpoint of step %d", path, metadata["step"])
        return encoder, metadata
    weights_path, metadata_path = files
    metadata = _read_metadata(metadata_path)
    folder = weights_path.parent
    checkpoint_steps = checkpoints.saved_steps(folder / "checkpoints")
    if checkpoint_steps and checkpoint_steps[-1] > metadata["step"]:
        log.warning(
            "%s: encoder.safetensors is of step %d, the latest checkpoint of step %d; update it: byol-fast export %s",
            folder,
            metadata["step"],
            checkpoint_steps[-1],
            folder,
        )
    encoder = build_encoder(metadata["encoder"], image_size=metadata["image_size"], cifar_stem=metadata["cifar_stem"])
    try:
        # Read, not mapped as by `load_file`: a file that is cut short meanwhile would end the process (SIGBUS).
        with open(weights_path, "rb", opener=open_regular) as stream:
            encoder.load_state_dict(load(stream.read()))
    except (SafetensorError, RuntimeError, OSError) as error:
        raise _damaged(weights_path, error) from error
    return encoder.eval(), metadata


def _read_metadata(path: Path) -> dict[str, Any]:
    """Content of an `encoder.json`.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        metadata = checks.read_json(path)
        problem = _METADATA(metadata, "")
        if problem is not None:
            raise ValueError(problem)
        check("image_size", ImageSize, metadata["image_size"])
        preprocessing = Preprocessing.of_metadata(metadata)
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error
    return metadata | {"preprocessing": preprocessing.to_dict()}


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"load_encoder: {path} is damaged ({reason(error)}); write it again with `byol-fast export RUN`"
    )
