"""Training and validation parts of a data set, by the names of folders and shards."""

from __future__ import annotations

import itertools
import logging
import os
import posixpath
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from byol_fast.data.errors import SourceError
from byol_fast.data.sources.listing import EXTENSIONS, list_folder, walk
from byol_fast.data.sources.shards import SHARDS, find_shards
from byol_fast.utils.files import printable_name

log = logging.getLogger(__name__)

_TRAINING = ("train", "training")
_VALIDATION = ("val", "validation", "valid", "dev", "eval", "evaluation", "test", "testing")
"""In order of preference."""

_NAME = f"(?P<part>(?i:trainval|{'|'.join(sorted((*_TRAINING, *_VALIDATION), key=len, reverse=True))}))"
_KIND = "(?i:set|split|data|images?|imgs?)"
_USUAL = re.compile(rf"{_NAME}(?P<ending>(?:[-_. ]?(?:{_KIND}|\d+))*)")
"""Whole names of folders that are parts: `train`, `Test`, `val2017`, `training_set`, `train_images`."""
_WORD = re.compile(rf"(?:(?<![A-Za-z])|(?<=[a-z])(?=[A-Z])){_NAME}{_KIND}?(?:[A-Z]$|(?![A-Za-z]))")
"""A part's name as a word of a longer one: `imagenet-train-000`, `cars_test`, `trainA`."""


def part_of(name: str) -> str | None:
    """Part of a data set that is a word of a name, in lower case: `train`, `val`, `test`, ...; None without one."""
    match = _WORD.search(name)
    return match["part"].lower() if match is not None else None


def split_folder(root: Path, arg_name: str) -> tuple[Path, Path | None]:
    """Folders of the training and validation images of a data set: the folder itself and None if it has no such parts.

    The parts may lie in a folder that holds all images.

    Raises:
        SourceError: there are several training folders, or a folder cannot be listed.
    """
    names = list_folder(root, arg_name)
    matches = {name: match for name in names if (match := _USUAL.fullmatch(name))}
    # A file may have such a name; a broken link is an error if it is the part that is used.
    usual = {name: match for name, match in matches.items() if not os.path.isfile(root / name)}  # noqa: PTH113
    named = {name: match["part"].lower() for name, match in usual.items()}
    parts = {name: part for name, part in named.items() if _has_data(root / name, arg_name)}
    training = [name for name, part in parts.items() if part in _TRAINING]
    if not training:  # an empty folder `train` is an error, because nobody means the validation images alone
        empty = [name for name, part in named.items() if part == "train"]
        if parts and empty:
            return root / empty[0], None
        inner = None if parts else _folder_of_all(root, names, arg_name)
        split = (root, None) if inner is None else split_folder(inner, arg_name)
        return (root, None) if split[0] == inner else split
    training = list({(root / name).resolve(): name for name in training}.values())  # a link and its target are one
    if len(training) > 1:
        if len(parts) == len(training) and all(name[-1].isdigit() for name in training):
            return root, None  # train1, train2, ...
        raise SourceError(_question(root, list(parts), arg_name))

    train = training[0]
    val = min(  # of several, one for the same year
        (name for name, part in parts.items() if part in _VALIDATION),
        key=lambda name: (_VALIDATION.index(parts[name]), usual[name]["ending"] != usual[train]["ending"], name),
        default=None,
    )
    others = [name for name in names if name not in {train, val}]
    folders = [name for name in others if os.path.isdir(root / name)] if val is None else []  # noqa: PTH112
    may_be_class = any(_has_images(root / name, arg_name) for name in folders)
    own = filter(_is_image, list_folder(root / train, arg_name)) if may_be_class else ()
    if any(os.path.isfile(root / train / name) for name in own):  # noqa: PTH113
        return root, None  # a class named train
    if others:
        used = f"{train} and {val} are" if val else f"{train} is"
        level = logging.WARNING if may_be_class else logging.INFO
        log.log(level, "%s: only %s used, not %s", root, used, ", ".join(map(printable_name, others[:5])))
    return root / train, None if val is None else root / val


def split_shards(root: Path, arg_name: str) -> tuple[list[Path], list[Path]] | None:
    """Training and validation shards of a folder; None if no names say which those are.

    The name of a shard counts, or else the nearest folder that is named for a part.

    Raises:
        SourceError: some shards are validation images by their names, and none are training images.
    """
    for suffix in SHARDS:
        named: dict[str, list[Path]] = {}
        for shard in find_shards(root, suffix, arg_name) or ():
            named.setdefault(_part_of_shard(shard.relative_to(root)), []).append(shard)
        training = sorted(shard for part in _TRAINING for shard in named.pop(part, []))
        val = next((named.pop(part) for part in _VALIDATION if part in named), [])
        others = [printable_name(str(shards[0].relative_to(root))) for shards in named.values()]
        if training:
            if others:
                unused = ", ".join(others)
                log.info("%s: shards that are neither training nor validation images are not used (%s)", root, unused)
            return training, val
        if val and others:
            shown = ", ".join([printable_name(str(val[0].relative_to(root))), *others])
            raise SourceError(
                f"{arg_name}: the shards in {root} seem to be parts of a data set ({shown}), and it is not clear which "
                f"to train on; set {arg_name} to a pattern of those, such as {root}/*{suffix} for all, and "
                "knn.val_root to one of the others"
            )
    return None


def check_parts(names: Sequence[str], title: Path, arg_name: str, *, packed: bool = False) -> None:
    """Raise an error if the folders of all images seem to be different parts of a data set.

    Classes that are named as one part, have such parts inside, or have the same subfolders are a warning.

    Args:
        names: path of each image.
        title: the folder or archive of the images.
        arg_name: name of the argument, for error messages.
        packed: the images are in archives.

    Raises:
        SourceError: the names of several folders are those of different parts, or contain those of different parts and
            there are no other folders.
    """
    folders = {posixpath.normpath(f"/{folder}").lstrip("/") for folder in {name.rpartition("/")[0] for name in names}}
    children: dict[str, set[str]] = {}
    for folder in folders:
        path = folder
        while path:
            parent, _, child = path.rpartition("/")
            children.setdefault(parent, set()).add(child)
            path = parent
    for parent in sorted(children.keys() - folders):
        inside = sorted(children[parent])
        usual = [name for name in inside if _USUAL.fullmatch(name)]
        roles = {_role(name) for name in inside}
        pairs = {(_without_part(name), role) for name in inside if (role := _role(name))}
        are_parts = (
            len({_role(name) for name in usual}) > 1
            or (None not in roles and len(roles) > 1)
            or len({rest for rest, _ in pairs}) < len(pairs)  # seg_train and seg_test, whatever else there is
        )
        has_all = all(f"{folder}/".startswith(f"{parent}/" if parent else "") for folder in folders)
        if are_parts and has_all:
            raise SourceError(_question(title / parent, inside, arg_name, packed=packed))
        if are_parts:
            shown = ", ".join(map(printable_name, inside))
            log.warning("%s: images of all parts are used (%s in %s, and others)", title, shown, printable_name(parent))
            return
        if has_all and usual and len(inside) > 1:
            log.warning("%s: classes, not parts of a data set: %s", title, ", ".join(map(printable_name, usual)))
        elif has_all and _have_same_subfolders(parent, inside, children):
            log.warning(
                "%s: the classes %s have the same subfolders (%s); if they are parts of a data set, set %s to the one "
                "to train on",
                title,
                ", ".join(map(printable_name, inside[:5])),
                ", ".join(map(printable_name, sorted(children[f"{parent}/{inside[0]}".lstrip("/")])[:5])),
                arg_name,
            )


def _have_same_subfolders(parent: str, names: Sequence[str], children: Mapping[str, set[str]]) -> bool:
    """True if several folders have the same subfolders of images, two or more: `trn/cat`, `trn/dog`, `tst/cat`, ..."""
    subfolders = [children.get(f"{parent}/{name}".lstrip("/"), set()) for name in names]
    return len(names) > 1 and len(subfolders[0]) > 1 and all(found == subfolders[0] for found in subfolders)


def _role(name: str) -> str | None:
    """Purpose of the part that a name contains: train, val or test; None without one."""
    part = part_of(name)
    if part is None:
        return None
    return "train" if part in {*_TRAINING, "trainval"} else "test" if part in {"test", "testing"} else "val"


def _without_part(name: str) -> str:
    """A name without its part: `seg_` of `seg_train` and `seg_test`."""
    match = _WORD.search(name)
    return name if match is None else (name[: match.start("part")] + name[match.end("part") :]).lower()


def _part_of_shard(path: Path) -> str:
    """Part that a shard belongs to; empty if its name and folders say nothing."""
    names = [name.rpartition("=")[2] for name in path.parts[:-1]]  # `split=train` is a partition
    folders = [match["part"].lower() for name in names if (match := _USUAL.fullmatch(name))]
    return part_of(path.stem) or (folders[-1] if folders else "")


def _question(root: Path, names: Sequence[str], arg_name: str, *, packed: bool = False) -> str:
    """Error message with the two ways to go on."""
    roles = {name: _role(name) for name in names}
    train = next((name for role in ("train", None) for name in names if roles[name] == role), names[0])
    others = {part_of(name): name for name in reversed(names) if roles[name] not in {"train", None, roles[train]}}
    val = next((others[part] for part in _VALIDATION if part in others), None)
    shown = ", ".join(map(printable_name, names[:5])) + (", ..." if len(names) > 5 else "")
    question = f"the folders in {root} seem to be parts of a data set ({shown}), and it is not clear which to train on"
    if packed:
        return f"{arg_name}: {question}; unpack them, and set {arg_name} to the one to train on"
    one = f"{root / train}" + ("" if val is None else f", and knn.val_root to {root / val}")
    return (
        f"{arg_name}: {question}; set {arg_name} to that one, such as {one}; or, to train on all of them, set "
        f"{arg_name} to a list of the images (.txt)"
    )


def _folder_of_all(root: Path, names: Sequence[str], arg_name: str) -> Path | None:
    """The subfolder that holds all images or shards of a folder; None if there is none."""
    if any(name.lower().endswith(EXTENSIONS + SHARDS) and not os.path.isdir(root / name) for name in names):  # noqa: PTH112
        return None
    folders = [name for name in names if os.path.isdir(root / name)]  # noqa: PTH112
    if len(folders) > 1:
        folders = list(itertools.islice((name for name in folders if _has_data(root / name, arg_name)), 2))
    return root / folders[0] if len(folders) == 1 else None


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def _has_images(folder: Path, arg_name: str) -> bool:
    return any(map(_is_image, walk(folder, arg_name)))


def _has_data(folder: Path, arg_name: str) -> bool:
    """True for a folder with images or shards; also for what cannot be listed, which is an error where it is used."""
    try:
        return any(name.lower().endswith(EXTENSIONS + SHARDS) for name in walk(folder, arg_name))
    except SourceError:
        return True
