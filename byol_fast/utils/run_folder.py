"""Checks of run folders and exported encoders that need no torch: an error comes at once."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from byol_fast.config import ConfigError
from byol_fast.config.io import place_hint
from byol_fast.utils.errors import write_advice


def check_run_folder(out: Path, name: str) -> None:
    """Check that the folder of a run exists or can be created; creates nothing.

    Args:
        out: folder of the run folders.
        name: of the run; empty for one that is not known yet.

    Raises:
        ConfigError: the name has control characters or is too long, a file is in the way, or a permission is missing.
    """
    if any(letter < " " or letter == "\x7f" for letter in name):
        raise ConfigError(f"config: name must have no control characters, got {name!r}; choose another name")
    path = out / name
    try:
        existing, missing = path.absolute(), [""]
        while not existing.exists():
            existing, missing = existing.parent, [*missing, existing.name]
        if max(len(os.fsencode(part)) for part in missing) > os.pathconf(existing, "PC_NAME_MAX"):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        if not existing.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(existing))
        if not os.access(existing, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(existing))
    except OSError as error:
        raise not_writable(path, error) from None


def not_writable(path: Path, error: OSError) -> ConfigError:
    """Error of a run folder that cannot be created or written."""
    if error.errno == errno.ENAMETOOLONG:
        return ConfigError(f"config: {path} cannot be created ({error.strerror}); set a shorter `name` or `out`")
    advice = write_advice(error) if error.errno != errno.ENOENT else "make it writable"  # as in /proc
    return ConfigError(f"config: {path} cannot be written ({error}); {advice}, or set `out` to another folder")


def encoder_files(path: Path) -> tuple[Path, Path] | None:
    """Weights and metadata of an exported encoder; None for a run that has not exported its encoder yet.

    Args:
        path: a run folder, a folder that `byol-fast export` wrote, or its `encoder.safetensors`.

    Raises:
        FileNotFoundError: there is neither an exported encoder nor a run.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"load_encoder: {path} does not exist{place_hint(path)}; give a run folder, or an encoder written by "
            "`byol-fast export`"
        )
    weights = path / "encoder.safetensors" if path.is_dir() else path.with_suffix(".safetensors")
    if path.is_dir() and not weights.exists() and (path / "config.json").exists():
        return None
    if path.is_file() and path.suffix != ".json" and not weights.exists():
        raise FileNotFoundError(
            f"load_encoder: {path} must be a run folder or an encoder written by `byol-fast export`, got another file; "
            "evaluate a network of your own from Python, as (module, metadata)"
        )
    for file in (weights, weights.with_suffix(".json")):
        if not file.exists():
            raise FileNotFoundError(f"load_encoder: {file} does not exist; write it with `byol-fast export RUN`")
    return weights, weights.with_suffix(".json")
