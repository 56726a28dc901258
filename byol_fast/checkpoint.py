"""Checkpoints: written whole or not at all, read without running code from them."""

from __future__ import annotations

import logging
import pickle
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch

from byol_fast.files import atomic_path

log = logging.getLogger(__name__)

FORMAT = 1
_NAME = re.compile(r"step_(\d+)\.pt")


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, or of another run."""


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies."""
    return folder / f"step_{step:09d}.pt"


def steps_in(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(int(match[1]) for match in (_NAME.fullmatch(p.name) for p in folder.iterdir()) if match)


def save(folder: Path, step: int, payload: dict[str, Any], *, keep: int) -> Path:
    """Write a checkpoint, then delete the oldest ones beyond `keep`.

    Raises:
        CheckpointError: it could not be written (disk full, folder read-only); earlier checkpoints are untouched.
    """
    path = path_of(folder, step)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".step_*.pt.*"):  # by a process that was killed while it wrote
            left.unlink()
        with atomic_path(path) as temporary:
            torch.save({"format": FORMAT, "step": step, **payload}, temporary)
    except (OSError, RuntimeError) as error:  # torch's zip writer reports a full disk as RuntimeError
        kept = ", ".join(map(str, steps_in(folder))) or "none"
        free = shutil.disk_usage(folder if folder.exists() else Path("/")).free / 2**30
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"checkpoint: {path} could not be written ({free:.2f} GiB free there; {reason}); free space or fix the "
            f"folder's permissions, then resume; checkpoints that are intact: {kept}"
        ) from error
    for old in steps_in(folder)[:-keep]:
        path_of(folder, old).unlink(missing_ok=True)
    return path


def load(path: Path) -> dict[str, Any]:
    """Read one checkpoint onto the CPU.

    Raises:
        CheckpointError: missing, damaged, or written in another format.
    """
    try:
        payload: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint: {path} does not exist") from None
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"checkpoint: {path} is damaged ({reason}); delete it to use an earlier one") from error
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        found = payload.get("format") if isinstance(payload, dict) else type(payload).__name__
        raise CheckpointError(
            f"checkpoint: {path} must be of format {FORMAT}, got {found}; another version of byol_fast wrote it"
        )
    return payload


def load_latest(folder: Path) -> dict[str, Any]:
    """Read the newest checkpoint that is whole; damaged newer ones are passed over with a warning.

    Raises:
        CheckpointError: there is none.
    """
    for step in reversed(steps_in(folder)):
        try:
            return load(path_of(folder, step))
        except CheckpointError as error:
            log.warning("%s; trying the one before", error)
    raise CheckpointError(f"checkpoint: {folder} holds no usable checkpoint; start the run anew")
