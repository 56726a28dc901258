"""Checkpoints: written whole or not at all, verified by a checksum, read without running code from them."""

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

FORMAT = 3
# A checkpoint is a file of torch.save and behind it this line with the digest of what is before: one file, so that
# nothing can come between data and checksum, and torch.load still reads it (zip readers pass over what follows).
_LABEL = b"\nsha256:"
_TRAILER_SIZE = len(_LABEL) + 64 + 1
_NAME = re.compile(r"step_(\d+)\.pt")
_BEST_NAME = re.compile(r"best_step_(\d+)\.pt")


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
    """Write a checkpoint and its checksum, then delete the oldest ones beyond `keep`.

    Raises:
        CheckpointError: it could not be written (disk full, folder read-only); earlier checkpoints are untouched.
    """
    path = path_of(folder, step)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in (*folder.glob(".step_*.pt.*"), *folder.glob(".best_*.pt.*")):  # by a process killed as it wrote
            left.unlink(missing_ok=True)
        with atomic_path(path) as temporary:
            torch.save({"format": FORMAT, "step": step, **payload}, temporary)
            _seal(temporary)
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


def keep_as_best(path: Path) -> None:
    """Keep a checkpoint, as `best_step_N.pt`, until another one is the best.

    Raises:
        CheckpointError: it could not be written.
    """
    best = path.with_name(f"best_{path.name}")
    try:
        with atomic_path(best) as temporary:
            temporary.unlink()
            try:
                os.link(path, temporary)  # the same data under a second name
            except OSError:
                shutil.copyfile(path, temporary)
    except OSError as error:
        raise CheckpointError(f"checkpoint: {best} could not be written ({error}); free space, then resume") from error
    for other in path.parent.iterdir():
        if other != best and _BEST_NAME.fullmatch(other.name):
            other.unlink(missing_ok=True)


def best_in(folder: Path) -> Path | None:
    """The checkpoint with the best kNN accuracy, where there is one."""
    found = sorted(p for p in folder.iterdir() if _BEST_NAME.fullmatch(p.name)) if folder.is_dir() else []
    return found[-1] if found else None


def _seal(path: Path) -> None:
    """Write the digest of a file behind its data."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    with path.open("ab") as file:
        file.write(_LABEL + digest.encode() + b"\n")


def _is_whole(path: Path) -> bool:
    """Whether a file ends with the digest of its data."""
    size = path.stat().st_size - _TRAILER_SIZE
    if size <= 0:
        return False
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while size and (block := file.read(min(size, 1 << 22))):
            digest.update(block)
            size -= len(block)
        return file.read() == _LABEL + digest.hexdigest().encode() + b"\n"


def load(path: Path) -> dict[str, Any]:
    """Read one checkpoint onto the CPU.

    Raises:
        CheckpointError: missing, damaged, or written in another format.
    """
    try:
        whole = _is_whole(path)
        payload: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint: {path} does not exist") from None
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"checkpoint: {path} is damaged (not a file of torch.save, or with more in it than tensors and plain "
            "values); delete it to use an earlier one"
        ) from error
    except (OSError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"checkpoint: {path} is damaged ({reason}); delete it to use an earlier one") from error
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        found = payload.get("format") if isinstance(payload, dict) else type(payload).__name__
        raise CheckpointError(
            f"checkpoint: {path} must be of format {FORMAT}, got {found}; another version of byol_fast wrote it: "
            "resume with that version, or start a new run"
        )
    if not whole:
        raise CheckpointError(
            f"checkpoint: {path} is damaged (its checksum is not that of its data); delete it to use an earlier one"
        )
    return payload


def load_latest(folder: Path) -> dict[str, Any]:
    """Read the newest checkpoint that is whole, the best one if all others are damaged; says which are passed over.

    Raises:
        CheckpointError: there is none.
    """
    best = best_in(folder)
    reason = "it is empty"
    for path in [*(path_of(folder, step) for step in reversed(steps_in(folder))), *([best] if best else [])]:
        try:
            return load(path)
        except CheckpointError as error:
            log.warning("%s; trying the one before", error)
            reason = str(error)
    raise CheckpointError(f"checkpoint: {folder} holds no usable checkpoint ({reason}); start the run anew")
