"""Commands that a message suggests, as the user can enter them."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path


def program() -> str:
    """`byol-fast` if that is installed where the shell looks for it, otherwise the same by this interpreter."""
    return "byol-fast" if shutil.which("byol-fast") else f"{shell_path(sys.executable)} -m byol_fast"


def shell_path(path: str | Path) -> str:
    """A short path, quoted for a shell if it needs that."""
    return shlex.quote(short_path(path))


def short_path(path: str | Path) -> str:
    """A path, relative if it lies in the working directory."""
    try:
        folder = Path.cwd()
    except OSError:  # deleted meanwhile: a message must not fail for it
        return str(path)
    absolute = folder / path  # not resolved: a virtual environment's interpreter is a link
    return str(absolute.relative_to(folder) if absolute.is_relative_to(folder) else absolute)
