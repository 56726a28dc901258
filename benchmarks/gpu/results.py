"""Results of the queue: a file of JSON lines per item, and the archive of all of them.

`ITEM.jsonl` has a header with question and environment, a line per figure, and a footer with the status. A file without
a footer belongs to an item that was interrupted, and counts as partial.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import sys
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
MAX_FILE_BYTES = 10 * 2**20
"""Larger files are left out of the archive, so that one of them cannot block the transfer of the others."""

Status = Literal["complete", "partial", "failed"]


def without_folders(text: str) -> str:
    """Text without the absolute paths of the checkout and of Python, because results are committed."""
    return text.replace(f"{ROOT}/", "").replace(f"{sys.prefix}/", "")


def slug(device: str) -> str:
    """Folder name of a device's results, such as `h100_80gb_hbm3`."""
    return re.sub(r"[^a-z0-9]+", "_", device.lower().removeprefix("nvidia ")).strip("_")


def versions() -> dict[str, str | None]:
    """Versions that figures depend on, from the installed metadata, without importing the packages."""
    return {name: env.version(name) for name in ("torch", "triton")}


# ---------------------------------------------------------------------------------------------- digest


def digest(item: Item) -> str:
    """Digest of the names and contents of the files that an item depends on."""
    total = hashlib.sha256()
    for name in item.depends_on:
        total.update(f"{name}\0{content_digest(ROOT / name)}\0".encode())
    return total.hexdigest()[:16]


@cache
def content_digest(path: Path) -> str:
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
    """Content of a result file."""

    header: dict[str, Any]
    """First line: item, question, digest, versions, environment, ..."""
    figures: list[dict[str, Any]]
    footer: dict[str, Any]
    """Last line: status, seconds, reason; empty if the item was interrupted."""

    @property
    def status(self) -> Status:
        """Status of the footer; without one, partial if there are figures, else failed."""
        status: Status = self.footer.get("status", "partial" if self.figures else "failed")
        return status

    def is_current(self, item: Item, installed: dict[str, str | None] | None) -> bool:
        """True if the item need not run again.

        Args:
            item: of this result.
            installed: versions that it must have been measured with; None for any.
        """
        same = self.header.get("digest") == digest(item) and installed in (None, self.header.get("versions"))
        return same and self.status == "complete"


def path_of(folder: Path, item: Item) -> Path:
    """Path of an item's result file."""
    return folder / f"{item.name}.jsonl"


def read(path: Path) -> Result | None:
    """Result in a file; None if there is no file. Incomplete lines are ignored."""
    if not path.is_file():
        return None
    header: dict[str, Any] = {}
    footer: dict[str, Any] = {}
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
            footer = values
        else:
            header = values
    return Result(header=header, figures=figures, footer=footer)


def write_header(path: Path, item: Item, environment: dict[str, Any], predicted: float) -> None:
    """Start an item's result file and replace an earlier one.

    Args:
        path: of the result file.
        item: that is about to run.
        environment: record of the process that runs it.
        predicted: seconds.
    """
    line = {
        "item": item.name,
        "question": item.question,
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "digest": digest(item),
        "versions": versions(),
        "commit": environment.get("commit"),
        "predicted": predicted,
        "environment": environment,
    }
    atomic_write(path, json.dumps(line) + "\n")


def write_footer(path: Path, item: Item, status: Status, seconds: float, reason: str) -> None:
    """Complete an item's result file.

    Args:
        path: of the result file.
        item: that ran.
        status: of the item.
        seconds: that it took.
        reason: why it is not complete; empty if it is.
    """
    line = json.dumps({"item": item.name, "status": status, "seconds": round(seconds, 2), "reason": reason})
    cut_off = not path.read_bytes().endswith(b"\n")
    with path.open("a") as file:
        file.write(("\n" if cut_off else "") + line + "\n")


# ---------------------------------------------------------------------------------------------- all of them


def pack(folder: Path, archive: Path) -> list[str]:
    """Write the archive of a folder of results atomically; return the files that were too large for it.

    In the root of a checkout it unpacks to benchmarks/results/GPU; results of another folder, as in a rehearsal, unpack
    to a folder of the same name.
    """
    prefix = (
        folder.relative_to(ROOT) if folder.parent == RESULTS else Path(folder.parent.name) / folder.name
    ).as_posix()
    too_large = []
    with atomic_path(archive) as temporary, tarfile.open(temporary, "w:gz", compresslevel=6) as tar:
        for path in sorted(folder.rglob("*")):
            if path.is_symlink() or not path.is_file():
                continue
            if path.stat().st_size > MAX_FILE_BYTES:
                too_large.append(path.relative_to(folder).as_posix())
                continue
            content = path.read_bytes()  # read at once, because a running item may be writing to it
            entry = tarfile.TarInfo(f"{prefix}/{path.relative_to(folder).as_posix()}")
            entry.size, entry.mtime = len(content), int(path.stat().st_mtime)
            tar.addfile(entry, io.BytesIO(content))
    return too_large
