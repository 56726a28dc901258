"""Memory of the machine that this process may still use, and memory that it uses."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_NO_LIMIT = 2**62
"""Control groups of version 1 without a limit have a number near 2^63."""


class AvailableMemory(NamedTuple):
    """Memory that can still be allocated."""

    bytes: int
    where: str
    """Owner of the limit, such as "this machine"."""
    swap: int = 0
    """Bytes that the system may move to the disk beyond these, where all gets slow."""


def available_memory(proc: Path = Path("/proc")) -> AvailableMemory | None:
    """Least of what the machine and the control groups of this process leave; None if the system does not report it.

    Pages of files that only cache the disk count as available: the kernel drops them when it needs memory.

    Args:
        proc: where the kernel reports the machine and the process.
    """
    machine: dict[str, int] = {}
    with suppress(OSError):
        lines = re.findall(r"^(\w+):\s+(\d+) kB", (proc / "meminfo").read_text(), re.MULTILINE)
        machine = {name: int(size) * 1024 for name, size in lines}
    swap = machine.get("SwapFree", 0)
    limits = [AvailableMemory(left, "this control group", min(more, swap)) for left, more in _left_in_groups(proc)]
    if "MemAvailable" in machine:
        limits.append(AvailableMemory(machine["MemAvailable"], "this machine", swap))
    if not limits:
        return None
    least = min(limits)
    return least._replace(swap=min(limit.bytes + limit.swap for limit in limits) - least.bytes)


def _left_in_groups(proc: Path) -> Iterator[tuple[int, int]]:
    """Bytes that each control group with a limit leaves, and swap, from this process's own group to the outermost."""
    for folder in _groups(proc):
        is_v2 = (folder / "memory.max").exists()
        names = ("memory.max", "memory.current") if is_v2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        prefix = "" if is_v2 else "total_"
        with suppress(OSError, ValueError):  # a group without limits has no such files, or "max" in them
            limit, used = (int((folder / name).read_text()) for name in names)
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            cached = sum(int(statistics.get(f"{prefix}{kind}_file", 0)) for kind in ("inactive", "active"))
            if limit < _NO_LIMIT:
                yield max(limit - max(used - cached, 0), 0), _swap_of_group(folder)


def _swap_of_group(folder: Path) -> int:
    """Bytes that a control group may still move to the disk; 0 if it does not say, as in version 1."""
    try:
        limit, used = ((folder / f"memory.swap.{kind}").read_text().strip() for kind in ("max", "current"))
        return _NO_LIMIT if limit == "max" else max(int(limit) - int(used), 0)
    except (OSError, ValueError):
        return 0


def _groups(proc: Path) -> Iterator[Path]:
    """Folders of the control groups of this process that may limit its memory, of both versions."""
    try:
        # Names of mount points are bytes of any kind.
        mounts = [line.split(" ") for line in _read(proc / "self/mountinfo").split("\n") if line]
        paths = [line.split(":", 2) for line in _read(proc / "self/cgroup").split("\n") if line]
    except OSError:
        return
    for fields in mounts:
        # Its parent group, its mount point, ... - its type, its device, its options.
        root, mount_point = fields[3], Path(fields[4])
        kind, _, options = fields[fields.index("-") + 1 :][:3]
        if kind not in {"cgroup", "cgroup2"} or (kind == "cgroup" and "memory" not in options.split(",")):
            continue
        wanted = "memory" if kind == "cgroup" else ""
        path = next((path for _, controllers, path in paths if wanted in controllers.split(",")), root)
        # In a container the path may be that of the host, of which only the container's own group is mounted.
        inside = path.startswith(f"{root.rstrip('/')}/") and ".." not in path
        folder = mount_point / os.path.relpath(path, root) if inside else mount_point
        while folder != mount_point:
            yield folder
            folder = folder.parent
        yield mount_point


def _read(path: Path) -> str:
    return path.read_text(errors="surrogateescape")


def release_freed_memory() -> None:
    """Return memory that was freed by this process to the system, which then reports it as available."""
    with suppress(AttributeError, OSError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def resident_memory() -> int:
    """Bytes of this process in the memory of the machine; 0 if the system does not report it."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
