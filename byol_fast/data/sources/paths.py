"""Checks of the paths of images, as far as they need no scan and no torch: a misspelt one is an error at once."""

from __future__ import annotations

import os
import re
from pathlib import Path

from byol_fast.config import Config
from byol_fast.config.fields import expand_home
from byol_fast.data.errors import SourceError
from byol_fast.data.sources.listing import EXTENSIONS, list_images, walk
from byol_fast.data.sources.shards import SHARDS, find_shards

LISTS = (".txt", ".csv", ".tsv")
"""Extensions of files that list images."""
NPZ_HELP = "save it with numpy.savez(path, images=images, labels=labels)"
_GIVE = "give a folder of images, a list of them (.txt, .csv), .tar or .parquet shards, or a .npz file"


def check_images(config: Config, data: object = None) -> None:
    """Check the paths of a run's training and validation images.

    Args:
        config: provides `data` and `knn`.
        data: training images that replace those of the configuration; only a path is checked.

    Raises:
        SourceError: there is no path where one is needed, or no images at one.
    """
    if isinstance(data, str | Path):
        check_path(data, "data")
    elif data is None and config.data.root is not None:
        check_path(config.data.root, "data.root")
    elif data is None and config.data.builtin == "none":
        raise SourceError("data: data.root must be set, got None; give --data.root FOLDER")
    if config.knn.enabled != "off" and config.knn.val_root is not None:
        check_path(config.knn.val_root, "knn.val_root")


def check_path(path: str | Path, arg_name: str) -> None:
    """Check that there are images or shards at a path; looks at a folder until the first one.

    Args:
        path: of a folder, a list, a `.npz` file or shards, or a pattern of shards.
        arg_name: name of the argument, for error messages.

    Raises:
        SourceError: there are none, or the file is of another kind.
    """
    path = expand_home(path)
    # Path.is_dir and .is_file raise errors for names that are too long, as those of patterns may be.
    if os.path.isdir(path):  # noqa: PTH112
        if not any(name.lower().endswith(EXTENSIONS + SHARDS) for name in walk(path, arg_name)):
            list_images(path, arg_name)  # says what is there instead
    elif not any(find_shards(path, suffix, arg_name) for suffix in SHARDS):
        _check_file(path, arg_name)


def _check_file(path: Path, arg_name: str) -> None:
    if not os.path.isfile(path):  # noqa: PTH113
        path = path.absolute()
        raise SourceError(f"{arg_name}: {path} {_problem(path)}; {_GIVE}{_nearest_parent(path)}")
    if path.suffix.lower() not in (".npz", *LISTS):
        if path.suffix.lower() in EXTENSIONS:
            raise SourceError(f"{arg_name}: {path} is a single image; give the folder that holds the images")
        hint = "; unpack it first" if re.search(r"\.(tar\.\w+|tgz|zip|gz|xz|zst|7z)$", path.name.lower()) else ""
        raise SourceError(f"{arg_name}: {path} is a file of an unknown kind{hint}; {_GIVE} ({NPZ_HELP})")


def _problem(path: Path) -> str:
    """Reason why a path is neither a file nor a folder."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # a ValueError for a NUL byte
        return "is a broken link" if os.path.islink(path) else "does not exist"  # noqa: PTH114
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return "is neither a file nor a folder"


def _nearest_parent(path: Path) -> str:
    parent = next((p for p in path.parents if os.path.exists(p)), None)  # noqa: PTH110
    if parent is None or parent == parent.parent:
        return ""
    return f" (the nearest folder that exists is {parent})"
