"""Checkpoints: written atomically, verified by a checksum before they are loaded, loaded without executing code."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from byol_fast.utils.checkpoint_files import NAME, newest_first, path_at_step, saved_steps
from byol_fast.utils.errors import CheckpointError, reason, write_advice
from byol_fast.utils.files import atomic_path, open_regular

__all__ = [
    "FORMAT",
    "CheckpointError",
    "check_finite",
    "intact_steps",
    "load",
    "newest_first",
    "nonfinite",
    "optimizer_problem",
    "path_at_step",
    "restoring",
    "save",
    "save_as_best",
    "saved_steps",
    "tensor_problem",
    "use_latest",
]

log = logging.getLogger(__name__)

T = TypeVar("T")

FORMAT = 4
# A checkpoint is a file of torch.save, followed by a line with the SHA-256 of the data: one file, so that data and
# checksum are replaced together. torch.load still reads it, because zip readers ignore what follows the archive.
_TRAILER = b"\nsha256:"
_TRAILER_SIZE = len(_TRAILER) + 64 + 1


def intact_steps(folder: Path) -> list[int]:
    """`saved_steps` without damaged checkpoints; reads all of them."""

    def is_readable(step: int) -> bool:
        try:
            return _is_intact(path_at_step(folder, step))
        except OSError:
            return False

    return [step for step in saved_steps(folder) if is_readable(step)]


def save(
    folder: Path, step: int, payload: dict[str, Any], *, keep: int | None = None, previous: int | None = None
) -> Path:
    """Write a checkpoint and its checksum, then delete the oldest checkpoints beyond `keep`.

    Args:
        folder: of the checkpoints; created if missing.
        step: steps finished.
        payload: tensors and plain values.
        keep: checkpoints to keep, this one included; None deletes none.
        previous: step of the good checkpoint that the run saved or resumed before. Those between the two do not count:
            damaged ones that it did not resume from, or ones within a series of skipped steps. Nor do those of later
            steps, which are left alone.

    Raises:
        CheckpointError: it could not be written (disk full, folder read-only); earlier checkpoints are unchanged.
    """
    path = path_at_step(folder, step)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary, _DigestingWriter(temporary.open("wb", buffering=0)) as file:
            torch.save({"format": FORMAT, "step": step, **payload}, file)
            file.write(_TRAILER + file.digest.hexdigest().encode() + b"\n")
    except (OSError, RuntimeError) as error:
        # torch's zip writer ends with a RuntimeError after an OSError of the file, as of a full disk, or after Ctrl-C.
        if isinstance(error, RuntimeError) and isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        intact = ", ".join(map(str, intact_steps(folder))) or "none"
        free = shutil.disk_usage(folder if folder.exists() else Path("/")).free / 2**30
        raise CheckpointError(
            f"checkpoint: {path} could not be written ({free:.2f} GiB free there; {reason(cause)}); free space or fix "
            f"the folder's permissions, then resume; intact checkpoints: {intact}"
        ) from error
    if keep is not None:
        earlier = [s for s in saved_steps(folder) if s < step]
        good = [s for s in earlier if previous is None or s <= previous]
        retained = good[1 - keep :] if keep > 1 else []
        for old in earlier:
            if old not in retained:
                path_at_step(folder, old).unlink(missing_ok=True)
    return path


def save_as_best(path: Path, *, keep_others: bool = False) -> None:
    """Keep a checkpoint as `best_step_N.pt`.

    Args:
        path: of the checkpoint.
        keep_others: keep the earlier best, too.

    Raises:
        CheckpointError: it could not be written.
    """
    best = path.with_name(f"best_{path.name}")
    try:
        # A run killed right after this has the link already; renaming a link over another one of the same file would
        # leave both.
        if not (best.exists() and best.samefile(path)):
            _link_or_copy(path, best)
    except OSError as error:
        raise CheckpointError(
            f"checkpoint: {best} could not be written ({error}); {write_advice(error)}, then resume"
        ) from error
    for other in () if keep_others else path.parent.iterdir():
        if other != best and (match := NAME.fullmatch(other.name)) and match[1]:
            other.unlink(missing_ok=True)


def _link_or_copy(path: Path, copy: Path) -> None:
    """Link a file to another name, atomically; copy it where there are no links."""
    with atomic_path(copy) as temporary:
        temporary.unlink()
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)


class _DigestingWriter(io.BufferedWriter):
    """Digests what it writes into a file, which then need not be read again for its checksum."""

    def __init__(self, file: io.RawIOBase) -> None:
        super().__init__(file)
        self.digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        """Write some bytes."""
        self.digest.update(data)
        return super().write(data)


def _is_intact(path: Path) -> bool:
    """Return True if a file ends with the SHA-256 of its data."""
    digest = hashlib.sha256()
    with open(path, "rb", opener=open_regular) as file:
        size = os.fstat(file.fileno()).st_size - _TRAILER_SIZE
        if size <= 0:
            return False
        while size and (block := file.read(min(size, 1 << 22))):
            digest.update(block)
            size -= len(block)
        return file.read() == _TRAILER + digest.hexdigest().encode() + b"\n"


def load(path: Path) -> dict[str, Any]:
    """Load one checkpoint onto the CPU; only a file whose checksum matches is unpickled.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or in another format.
    """
    try:
        intact = _is_intact(path)
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint: {path} does not exist") from None
    except OSError as error:
        raise CheckpointError(f"checkpoint: {path} cannot be read ({reason(error)})") from error
    if not intact:
        raise CheckpointError(f"checkpoint: {path} is damaged (its checksum does not match); restore it from a copy")
    try:
        payload: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"checkpoint: {path} cannot be loaded ({reason(error)})") from error
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        stored = payload.get("format") if isinstance(payload, dict) else type(payload).__name__
        raise CheckpointError(
            f"checkpoint: {path} must have format {FORMAT}, got {stored}; it was written by another version of "
            "byol_fast: resume with that version, or start a new run"
        )
    return payload


def use_latest(
    folder: Path, use: Callable[[Path], T], *, paths: Sequence[Path] | None = None, quiet: bool = False
) -> T:
    """Result of `use` for the newest checkpoint, or for the one before it where `use` raises a CheckpointError.

    Args:
        folder: of the checkpoints.
        use: gets the path of a checkpoint.
        paths: of the checkpoints, in the order to try; None: `newest_first`.
        quiet: log which were skipped, and why, only for debugging.

    Raises:
        CheckpointError: no checkpoint is usable.
    """
    level = logging.DEBUG if quiet else logging.WARNING
    problem: str | None = None
    for path in newest_first(folder) if paths is None else paths:
        try:
            result = use(path)
        except CheckpointError as error:
            log.log(level, "%s", error)
            problem = problem or str(error)
            continue
        if problem is not None:
            log.log(level, "checkpoint: an earlier one is used instead, %s", path)
        return result
    raise CheckpointError(
        f"checkpoint: {folder} has no usable checkpoint ({problem or 'it is empty'}); start a new run"
    )


@contextmanager
def restoring(path: Path) -> Iterator[None]:
    """Within this, errors about the content of a checkpoint become a CheckpointError; a ValueError explains itself.

    Args:
        path: of the checkpoint.
    """
    try:
        yield
    except (CheckpointError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError):
            raise
        raise CheckpointError(f"checkpoint: {path} cannot be restored ({reason(error)})") from error


def nonfinite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors with a NaN or an infinity. Waits for the device, once per dtype.

    An additive mask of attention, which consists of 0 and -inf, is a legitimate constant.

    Args:
        tensors: by name; those that are not floating point are finite.
    """
    names: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            names.setdefault((tensor.device, tensor.dtype), []).append(name)
    result: list[str] = []
    for group in names.values():
        # The largest magnitude keeps an infinity or NaN and cannot overflow, as a sum of squares can.
        largest = torch.stack(torch._foreach_norm([tensors[name].detach() for name in group], math.inf))
        result += itertools.compress(group, (~torch.isfinite(largest)).tolist())
    return [name for name in result if not _is_mask(tensors[name])]


def _is_mask(tensor: Tensor) -> bool:
    is_zero = tensor == 0
    return bool(is_zero.any()) and bool((is_zero | (tensor == -math.inf)).all())


def check_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Refuse tensors with a NaN or an infinity. Waits for the device, as `nonfinite` does.

    Args:
        tensors: by name.
        what: begin of the message.

    Raises:
        CheckpointError: one is not finite.
    """
    if names := nonfinite(tensors):
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise CheckpointError(f"{what} must be finite, but {names[0]}{more} is not; use an earlier checkpoint")


def tensor_problem(state: Mapping[str, Any], expected: Mapping[str, Tensor]) -> str | None:
    """The first tensor of a state that is missing, unknown, or of another shape; None if all fit."""
    for name, tensor in expected.items():
        got = state.get(name)
        if not isinstance(got, Tensor) or got.shape != tensor.shape:
            kind = list(got.shape) if isinstance(got, Tensor) else "nothing" if got is None else type(got).__name__
            return f"{name} must be {list(tensor.shape)}, got {kind}"
    return next((f"{name} is unknown" for name in state if name not in expected), None)


def optimizer_problem(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> str | None:
    """The first tensor of an optimizer's state that has not the shape of its parameter; None if all fit."""
    groups = optimizer.param_groups
    sizes, own_sizes = ([len(group["params"]) for group in g] for g in (state["param_groups"], groups))
    if sizes != own_sizes:
        return f"the optimizer must have {own_sizes} parameters in its groups, got {sizes}"
    parameters = [parameter for group in groups for parameter in group["params"]]
    for number, values in state["state"].items():
        shape = parameters[number].shape
        for name, value in values.items():
            if isinstance(value, Tensor) and value.ndim and value.shape != shape:  # not a number of steps
                got = list(value.shape)
                return f"{name} of the optimizer's parameter {number} must be {list(shape)}, got {got}"
    return None
