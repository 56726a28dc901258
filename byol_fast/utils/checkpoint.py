"""Checkpoints: written atomically, verified by a checksum, loaded without executing code."""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch

from byol_fast.utils.files import atomic_path

log = logging.getLogger(__name__)

FORMAT = 4
# A checkpoint is a file of torch.save, followed by a line with the SHA-256 of the data: one file, so that data and
# checksum are replaced together. torch.load still reads it, because zip readers ignore what follows the archive.
_TRAILER = b"\nsha256:"
_TRAILER_SIZE = len(_TRAILER) + 64 + 1
_NAME = re.compile(r"step_(\d+)\.pt")
_BEST_NAME = re.compile(r"best_step_(\d+)\.pt")


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, or from another run."""


def path_at_step(folder: Path, step: int) -> Path:
    """Path of the checkpoint after `step` steps."""
    return folder / f"step_{step:09d}.pt"


def saved_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, in ascending order."""
    if not folder.is_dir():
        return []
    return sorted(int(match[1]) for match in (_NAME.fullmatch(p.name) for p in folder.iterdir()) if match)


def save(folder: Path, step: int, payload: dict[str, Any], *, keep: int) -> Path:
    """Write a checkpoint and its checksum, then delete the oldest checkpoints beyond `keep`.

    Raises:
        CheckpointError: it could not be written (disk full, folder read-only); earlier checkpoints are unchanged.
    """
    path = path_at_step(folder, step)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Remove temporary files of processes that were killed while writing.
        for temporary in (*folder.glob(".step_*.pt.*"), *folder.glob(".best_*.pt.*")):
            temporary.unlink(missing_ok=True)
        with atomic_path(path) as temporary:
            torch.save({"format": FORMAT, "step": step, **payload}, temporary)
            _append_digest(temporary)
    except (OSError, RuntimeError) as error:  # torch's zip writer reports a full disk as RuntimeError
        intact = ", ".join(map(str, saved_steps(folder))) or "none"
        free = shutil.disk_usage(folder if folder.exists() else Path("/")).free / 2**30
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"checkpoint: {path} could not be written ({free:.2f} GiB free there; {reason}); free space or fix the "
            f"folder's permissions, then resume; intact checkpoints: {intact}"
        ) from error
    for old in saved_steps(folder)[:-keep]:
        path_at_step(folder, old).unlink(missing_ok=True)
    return path


def save_as_best(path: Path) -> None:
    """Keep a checkpoint as `best_step_N.pt`, in place of the earlier best.

    Raises:
        CheckpointError: it could not be written.
    """
    best = path.with_name(f"best_{path.name}")
    try:
        with atomic_path(best) as temporary:
            temporary.unlink()
            try:
                os.link(path, temporary)  # no second copy of the data
            except OSError:
                shutil.copyfile(path, temporary)
    except OSError as error:
        raise CheckpointError(f"checkpoint: {best} could not be written ({error}); free space, then resume") from error
    for other in path.parent.iterdir():
        if other != best and _BEST_NAME.fullmatch(other.name):
            other.unlink(missing_ok=True)


def best_path(folder: Path) -> Path | None:
    """Path of the checkpoint with the best kNN accuracy, or None."""
    paths = sorted(p for p in folder.iterdir() if _BEST_NAME.fullmatch(p.name)) if folder.is_dir() else []
    return paths[-1] if paths else None


def _append_digest(path: Path) -> None:
    """Append the SHA-256 of a file to it."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    with path.open("ab") as file:
        file.write(_TRAILER + digest.encode() + b"\n")


def _verify_digest(path: Path) -> bool:
    """Return True if a file ends with the SHA-256 of its data."""
    size = path.stat().st_size - _TRAILER_SIZE
    if size <= 0:
        return False
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while size and (block := file.read(min(size, 1 << 22))):
            digest.update(block)
            size -= len(block)
        return file.read() == _TRAILER + digest.hexdigest().encode() + b"\n"


def load(path: Path) -> dict[str, Any]:
    """Load one checkpoint onto the CPU.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or in another format.
    """
    try:
        intact = _verify_digest(path)
        payload: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint: {path} does not exist") from None
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"checkpoint: {path} is damaged (not a file of torch.save, or it has more than tensors and plain "
            "values); delete it to use an earlier one"
        ) from error
    except (OSError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"checkpoint: {path} is damaged ({reason}); delete it to use an earlier one") from error
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        stored = payload.get("format") if isinstance(payload, dict) else type(payload).__name__
        raise CheckpointError(
            f"checkpoint: {path} must have format {FORMAT}, got {stored}; it was written by another version of "
            "byol_fast: resume with that version, or start a new run"
        )
    if not intact:
        raise CheckpointError(
            f"checkpoint: {path} is damaged (its checksum does not match); delete it to use an earlier one"
        )
    return payload


def load_latest(folder: Path) -> dict[str, Any]:
    """Load the newest intact checkpoint, or the best one if all others are damaged; logs those that are skipped.

    Raises:
        CheckpointError: no checkpoint is intact.
    """
    best = best_path(folder)
    reason = "it is empty"
    for path in [*(path_at_step(folder, step) for step in reversed(saved_steps(folder))), *([best] if best else [])]:
        try:
            return load(path)
        except CheckpointError as error:
            log.warning("%s; trying an earlier checkpoint", error)
            reason = str(error)
    raise CheckpointError(f"checkpoint: {folder} has no usable checkpoint ({reason}); start a new run")
