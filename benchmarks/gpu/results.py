"""Results of the queue: a file of JSON lines an item, and the archive of all of them.

The first line of `ITEM.jsonl` says what was measured where, then each figure has a line, and the last line says how the
item ended. A file without a last line is of an item that was cut off, and counts as partial.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from benchmarks.gpu.item import Item
from byol_fast.utils import env
from byol_fast.utils.files import atomic_path, atomic_write

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
ARCHIVE = "results.tgz"
LARGEST = 10 * 2**20
"""Bytes of a file that still goes into the archive: one huge file must not keep all the others on the GPU host."""

Status = Literal["complete", "partial", "failed"]


def slug(device: str) -> str:
    """Folder of a device's results: `h100_80gb_hbm3`."""
    return re.sub(r"[^a-z0-9]+", "_", device.lower().removeprefix("nvidia ")).strip("_")


def versions() -> dict[str, str | None]:
    """Versions that decide figures, from the installed metadata: nothing is imported."""
    return {name: env.version(name) for name in ("torch", "triton")}


# ---------------------------------------------------------------------------------------------- digest


def digest(item: Item) -> str:
    """Digest of the names and contents of what an item depends on."""
    total = hashlib.sha256()
    for name in item.depends_on:
        total.update(f"{name}\0{_digest_of(ROOT / name)}\0".encode())
    return total.hexdigest()[:16]


@cache
def _digest_of(path: Path) -> str:
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    total = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        inside = file.relative_to(path).parts
        hidden = any(part.startswith(".") or part == "__pycache__" for part in inside)
        if file.is_file() and not hidden and file.suffix != ".pyc" and not file.is_relative_to(RESULTS):
            total.update(f"{'/'.join(inside)}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\0".encode())
    return total.hexdigest()


# ---------------------------------------------------------------------------------------------- one result


@dataclass(frozen=True, kw_only=True)
class Result:
    """A result file as it was read."""

    begin: dict[str, Any]
    """The first line: item, question, digest, versions, environment, ..."""
    figures: list[dict[str, Any]]
    end: dict[str, Any]
    """The last line: status, seconds, why; empty where the item was cut off."""

    @property
    def status(self) -> Status:
        """Status in its last line; of an item that was cut off, by its figures."""
        status: Status = self.end.get("status", "partial" if self.figures else "failed")
        return status

    def answers(self, item: Item, installed: dict[str, str | None] | None) -> bool:
        """True if the item need not run again.

        Args:
            item: whose result it is.
            installed: versions that it must have been measured with; None for any.
        """
        same = self.begin.get("digest") == digest(item) and installed in (None, self.begin.get("versions"))
        return same and self.status == "complete"


def path_of(folder: Path, item: Item) -> Path:
    """The result file of an item."""
    return folder / f"{item.name}.jsonl"


def read(path: Path) -> Result | None:
    """The result in a file; None without one. A line that was cut off in the middle is left out."""
    if not path.is_file():
        return None
    begin: dict[str, Any] = {}
    end: dict[str, Any] = {}
    figures = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            continue
        if not isinstance(values, dict):
            continue
        if "figure" in values:
            figures.append(values)
        elif "status" in values:
            end = values
        else:
            begin = values
    return Result(begin=begin, figures=figures, end=end)


def begin(path: Path, item: Item, about: dict[str, Any], predicted: float) -> None:
    """Begin an item's result, in the place of an earlier one.

    Args:
        path: of the result file.
        item: that is about to run.
        about: environment record of the process that runs it.
        predicted: seconds.
    """
    line = {
        "item": item.name,
        "question": item.question,
        "begun": time.strftime("%Y-%m-%d %H:%M:%S"),
        "digest": digest(item),
        "versions": versions(),
        "commit": about.get("commit"),
        "predicted": predicted,
        "environment": about,
    }
    atomic_write(path, json.dumps(line) + "\n")


def finish(path: Path, item: Item, status: Status, seconds: float, why: str) -> None:
    """End an item's result.

    Args:
        path: of the result file.
        item: that ran.
        status: how complete it is.
        seconds: that it took.
        why: it is not complete.
    """
    line = json.dumps({"item": item.name, "status": status, "seconds": round(seconds, 2), "why": why})
    cut_off = not path.read_bytes().endswith(b"\n")
    with path.open("a") as file:
        file.write(("\n" if cut_off else "") + line + "\n")


# ---------------------------------------------------------------------------------------------- all of them


def pack(folder: Path, archive: Path) -> list[str]:
    """Write the archive of a folder of results, whole or not at all; return the files that were too large for it.

    It unpacks in the root of a checkout to benchmarks/results/GPU; results that lie elsewhere, as those of a rehearsal
    do, to a folder that is named as theirs.
    """
    prefix = (
        folder.relative_to(ROOT) if folder.parent == RESULTS else Path(folder.parent.name) / folder.name
    ).as_posix()
    too_large = []
    with atomic_path(archive) as temporary, tarfile.open(temporary, "w:gz", compresslevel=6) as tar:
        for path in sorted(folder.rglob("*")):
            if path.is_symlink() or not path.is_file():
                continue
            if path.stat().st_size > LARGEST:
                too_large.append(path.relative_to(folder).as_posix())
                continue
            content = path.read_bytes()  # at once: a running item may be writing to it
            entry = tarfile.TarInfo(f"{prefix}/{path.relative_to(folder).as_posix()}")
            entry.size, entry.mtime = len(content), int(path.stat().st_mtime)
            tar.addfile(entry, io.BytesIO(content))
    return too_large
