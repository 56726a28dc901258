"""A pretrained encoder with what is needed to run it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from byol_fast import config as configs
from byol_fast.config import Config, Preprocessing
from byol_fast.config.fields import expand_home
from byol_fast.export.encoder import load_encoder
from byol_fast.models.encoders import build_encoder
from byol_fast.models.layers import Normalize
from byol_fast.utils.files import printable_name


@dataclass(frozen=True, eq=False, kw_only=True)
class PretrainedEncoder:
    """An encoder, its input format and its origin."""

    name: str
    """Name in logs and results."""
    encoder: nn.Module
    """Maps normalized `[B, 3, S, S]` to features."""
    preprocessing: Preprocessing
    """Maps images to its input; for a network of your own, `Preprocessing(crop=224)` is ImageNet's."""
    step: int | None = None
    """Number of training steps."""
    folder: Path | None = None
    """Folder of its files; results are written to `eval` inside."""
    config: Config | None = None
    """Configuration of its run."""
    init_fn: Callable[[], nn.Module] | None = None
    """Builds the same network with new weights, for untrained baselines."""

    @property
    def normalize(self) -> Normalize:
        """Maps uint8 images to its input."""
        return Normalize(self.preprocessing.mean, self.preprocessing.std)

    def untrained(self, seed: int) -> nn.Module:
        """The same network with new weights.

        Raises:
            ValueError: there is no `init_fn`.
        """
        if self.init_fn is None:
            raise ValueError(
                f"eval: no untrained baseline for {self.name}: pass PretrainedEncoder.init_fn, or disable baselines"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.init_fn()


def load_pretrained(path: str | Path) -> PretrainedEncoder:
    """Load the encoder of a run, or an exported one.

    Args:
        path: a run folder, a folder that `byol-fast export` wrote, or an `encoder.safetensors`.

    Raises:
        TypeError: it is no path.
        FileNotFoundError: there is no encoder.
        CheckpointError: the run has no usable checkpoint yet.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(
            "eval: encoder must be a run folder, an exported encoder, or a PretrainedEncoder, got "
            f"{type(path).__name__}; make one with byol_fast.evaluate.PretrainedEncoder(name=..., encoder=module, "
            "preprocessing=byol_fast.config.Preprocessing(crop=224))"
        )
    path = expand_home(path)
    if not path.exists():
        raise FileNotFoundError(
            f"eval: {path} does not exist; pass a run folder, or an encoder written by `byol-fast export`"
        )
    encoder, metadata = load_encoder(path)
    folder = path if path.is_dir() else path.parent
    config = configs.load(folder / "config.json") if (folder / "config.json").exists() else None

    def init_fn() -> nn.Module:
        return build_encoder(
            metadata["encoder"],
            image_size=metadata["image_size"],
            cifar_stem=metadata["cifar_stem"],
            zero_init_residual=config is not None and config.model.zero_init_residual,
        )

    return PretrainedEncoder(
        name=f"{metadata['encoder']} of {printable_name(path)}",
        encoder=encoder,
        preprocessing=Preprocessing.of_metadata(metadata),
        step=metadata["step"],
        folder=folder,
        config=config,
        init_fn=init_fn,
    )
