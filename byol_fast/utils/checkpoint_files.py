"""Names of checkpoint files; without torch, so that a run folder is checked before it is imported."""

from __future__ import annotations

import re
from pathlib import Path

NAME = re.compile(r"(best_)?step_(\d+)\.pt")
"""Name of a checkpoint: `step_000000012.pt`, `best_step_000000009.pt`."""


def path_at_step(folder: Path, step: int) -> Path:
    """Path of the checkpoint after `step` steps."""
    return folder / f"step_{step:09d}.pt"


def saved_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, in ascending order; without the best one."""
    if not folder.is_dir():
        return []
    matches = (NAME.fullmatch(p.name) for p in folder.iterdir())
    return sorted(int(match[2]) for match in matches if match and not match[1])


def newest_first(folder: Path, step: int | None = None) -> list[Path]:
    """Paths of the checkpoints in a folder, also of the best one, from the newest to the oldest.

    Args:
        folder: of the checkpoints.
        step: only those of this step; None: all.
    """
    if not folder.is_dir():
        return []
    steps = {p: int(match[2]) for p in folder.iterdir() if (match := NAME.fullmatch(p.name))}
    steps = {p: at for p, at in steps.items() if step in {None, at}}
    # Of the same step, the best one comes last: mostly it is a link to the other.
    return sorted(steps, key=lambda p: (steps[p], p.name), reverse=True)
