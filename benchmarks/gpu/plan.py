"""Plan of the queue: which items can run here, are answered already, or fit the time."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path

from benchmarks.gpu import results
from benchmarks.gpu.item import START_SECONDS, Item

MARGIN = 5.0
"""Seconds reserved for the last archive and the summary."""


def seconds_of(item: Item, *, warm: bool) -> float:
    """Predicted seconds of an item.

    Args:
        item: to run.
        warm: its process has started already.
    """
    return max(0.0, item.seconds - (START_SECONDS if warm else 0.0))


def least_seconds(item: Item, *, warm: bool) -> float:
    """Predicted seconds that must be left to start an item: until its first figure if that is given, else its end."""
    least = item.seconds if item.first_figure is None else min(item.first_figure, item.seconds)
    return max(0.0, least - (START_SECONDS if warm else 0.0))


def missing_requirements(item: Item, *, rehearsal: bool, free_gib: float | None = None) -> str:
    """Reason why an item cannot run here; empty if it can.

    Args:
        item: to run.
        rehearsal: on the CPU.
        free_gib: free GPU memory; None if unknown.
    """
    if rehearsal and item.not_rehearsed:
        return f"cannot be rehearsed: {item.not_rehearsed}"
    absent = [f"package {name}" for name in item.modules if not importable(name)]
    absent += [f"file {name}" for name in item.files if not (results.ROOT / name).exists()]
    absent += [f"program {name}" for name in item.programs if shutil.which(name) is None]
    if absent:
        return f"missing: {', '.join(absent)}"
    if free_gib is not None and free_gib < item.memory_gib:
        return f"needs {item.memory_gib:g} GiB of free GPU memory, {free_gib:.1f} are free"
    return ""


def importable(module: str) -> bool:
    """True if a module exists, without importing it or its parent packages."""
    path: Sequence[str] | None = None
    names = module.split(".")
    for depth in range(1, len(names) + 1):
        spec = PathFinder.find_spec(".".join(names[:depth]), path)
        if spec is None:
            return False
        path = spec.submodule_search_locations and list(spec.submodule_search_locations)
        if path is None and depth < len(names):
            return False
    return True


def answered(item: Item, folder: Path, installed: dict[str, str | None] | None) -> str:
    """Device, day and commit of an item's complete and current result; empty if it has to run."""
    result = results.read(results.path_of(folder, item))
    if result is None or not result.is_current(item, installed):
        return ""
    day, commit = str(result.header.get("started"))[:10], str(result.header.get("commit"))[:9]
    return f"answered {day} on {folder.name}, commit {commit}"


def listing(items: Sequence[Item], *, seconds: float, parent: Path, rehearsal: bool, again: bool) -> str:
    """The plan as text: question, predicted seconds and state of each item.

    Args:
        items: in their order.
        seconds: for all items.
        parent: folder that holds the result folders of all devices.
        rehearsal: on the CPU.
        again: also run answered items.
    """
    folders, installed = _folders(parent, rehearsal=rehearsal)
    lines = [f"{'item':<16}{'seconds':>8}{'total':>7}  question and state"]
    total, left, num_runs = START_SECONDS, seconds - MARGIN - START_SECONDS, 0
    for item in items:
        answers = [text for folder in folders if not again and (text := answered(item, folder, installed))]
        state = missing_requirements(item, rehearsal=rehearsal) or "".join(answers[:1])
        if state:
            state = f"SKIPPED: {state}"
        else:
            warm = not item.own_process
            takes, least = seconds_of(item, warm=warm), least_seconds(item, warm=warm)
            total += takes
            if least > left:
                state = f"SKIPPED: needs {least:.0f} s, {max(left, 0):.0f} are left"
            else:
                state = "runs" if takes <= left else f"runs partially in the {left:.0f} s that are left"
                left -= min(takes, left)
                num_runs += 1
        lines.append(f"{item.name:<16}{item.seconds:>8.0f}{total:>7.0f}  {item.question}\n{'':33}{state}")
    lines.append(
        f"{num_runs} of {len(items)} items would run in {seconds:.0f} s. `seconds` includes the start of a process "
        f"({START_SECONDS:.0f} s); `total` only for items that need a separate process."
    )
    return "\n".join(lines)


def _folders(parent: Path, *, rehearsal: bool) -> tuple[list[Path], dict[str, str | None] | None]:
    """Folders of results to search, and the versions that results must have.

    Without a GPU: the folders of all GPUs and any versions, to plan for another host.
    """
    if rehearsal:
        return [parent / "cpu"], results.versions()
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        listed = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        listed = []
    if listed:
        return [parent / results.slug(listed[0])], results.versions()
    return sorted(path for path in parent.glob("*") if path.is_dir()), None
