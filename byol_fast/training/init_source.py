"""The weights that a run starts from, as they are named in its configuration; without torch."""

from __future__ import annotations

from pathlib import Path

from byol_fast import config as configs
from byol_fast.config import Config, ConfigError
from byol_fast.config.encoder_names import OWN
from byol_fast.config.fields import expand_home, suggestion
from byol_fast.config.io import place_hint
from byol_fast.training.run_dir import RunDir

PACKAGES = ("torchvision", "timm")
"""Values of `init_from` that mean a package's pretrained weights, not a path."""
INIT_OPTIONS = ("init_from", "init_partial", "init_sha256")
"""Options of the initial weights; a resumed run keeps those that it was started with."""
SUFFIXES = (".safetensors", ".pt", ".pth", ".pth.tar", ".ckpt", ".torch")
"""Ends of the names of files with weights."""


def with_absolute_source(config: Config) -> Config:
    """A configuration with the absolute path of `init_from`, so that its run can be resumed from any folder."""
    if not config.init_from or config.init_from in PACKAGES:
        return config
    return configs.replace(config, {"init_from": expand_home(config.init_from).absolute()})


def check_init_from(config: Config) -> None:
    """Check `init_from` as far as that needs no torch: a package, or the path and the kind of a file.

    Raises:
        ConfigError: there are no such weights.
    """
    source, encoder = config.init_from, config.model.encoder
    if source in PACKAGES:
        package = "timm" if encoder.startswith("timm/") else "torchvision"
        if encoder in OWN:
            raise ConfigError(
                f"config: init_from must be a path with encoder {encoder!r}, which {source} does not have, got "
                f"{source!r}; choose another encoder, or give a file of weights"
            )
        if source != package:
            other = f"timm/{encoder}" if source == "timm" else encoder.removeprefix("timm/")
            raise ConfigError(
                f"config: init_from must be {package!r} or a path with encoder {encoder!r}, got {source!r}; set it to "
                f"{package}, or model.encoder to {other}"
            )
    elif source:
        _check_path(expand_home(source))


def _check_path(path: Path) -> None:
    """Check the path of a run, an export or a file of weights."""
    if not path.exists():
        advice = suggestion(str(path), PACKAGES) or "give a run folder, an exported encoder or a file of weights"
        raise ConfigError(f"config: init_from is {path}, which does not exist{place_hint(path)}; {advice}")
    if path.is_dir():
        if not RunDir(path).has_checkpoints() and not RunDir(path).encoder.exists():
            raise ConfigError(
                f"config: init_from is {path}, a folder without checkpoints and without encoder.safetensors; give a "
                "run folder or an exported encoder"
            )
    elif not path.name.endswith(SUFFIXES):
        raise ConfigError(
            f"config: init_from must be a file whose name ends in {', '.join(SUFFIXES)}, got {path}; rename it if it "
            "is one of these"
        )
