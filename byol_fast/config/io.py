"""Configurations: overrides by dotted names, conversion to and from dictionaries and JSON, comparison."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

from byol_fast.config.fields import ConfigError, ImageSize, check, suggestion
from byol_fast.config.resnets import is_resnet
from byol_fast.config.schema import Config

T = TypeVar("T")


def replace(config: T, changes: Mapping[str, object]) -> T:
    """Return a copy of a config with some fields changed.

    Args:
        config: any of this module's dataclasses.
        changes: field name to value. A name may be dotted (`"optim.lr"`); the value of a nested config may be
            a mapping of its fields (`{"optim": {"lr": 0.1}}`).

    Raises:
        ConfigError: unknown field (the nearest name is suggested), wrong type, value out of contract.
    """
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise TypeError(f"config: replace needs a config object, got {type(config).__name__}")
    nested: dict[str, dict[str, object]] = {}
    flat: dict[str, object] = {}
    for name, value in changes.items():
        head, _, rest = name.partition(".")
        if rest:
            nested.setdefault(head, {})[rest] = value
        elif isinstance(value, Mapping):
            nested.setdefault(head, {}).update(value)
        else:
            flat[head] = value
    names = [f.name for f in dataclasses.fields(config)]
    for name in (*flat, *nested):
        if name not in names:
            raise ConfigError(f"config: {type(config).__name__} has no field {name!r}; {_hint(config, name, names)}")
    for name, value in flat.items():
        part = getattr(config, name)
        if dataclasses.is_dataclass(part) and not isinstance(value, type(part)):
            first = dataclasses.fields(part)[0].name
            raise ConfigError(
                f"config: {name} must be a mapping of its options, got {value!r:.50}; for instance "
                f"{name}={{{first!r}: {getattr(part, first)!r}}}"
            )
    values = dict(flat)
    for name, fields in nested.items():
        if not dataclasses.is_dataclass(getattr(config, name)):
            raise ConfigError(f"config: {name} is a single value, got fields {', '.join(fields)} for it")
        values[name] = replace(getattr(config, name), fields)
    return dataclasses.replace(config, **values)


def _hint(config: object, name: str, names: list[str]) -> str:
    """The field that an unknown name may mean, of the config or of its parts."""
    parts = {n: getattr(config, n) for n in names}
    owners = [n for n, part in parts.items() if dataclasses.is_dataclass(part) and hasattr(part, name)]
    if owners:
        return f"did you mean {' or '.join(f'{owner}={{{name!r}: ...}}' for owner in owners)}?"
    return suggestion(name, names) or f"fields are {', '.join(names)}"


def with_image_size(config: Config, size: int) -> Config:
    """A configuration with another size of the global views, in pixels."""
    size = check("image_size", ImageSize, size)
    return replace(config, {"view1.size": size, "view2.size": size})


def to_dict(config: Config) -> dict[str, Any]:
    """A configuration as plain JSON values."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, tuple | list):
            return [plain(v) for v in value]
        return str(value) if isinstance(value, Path) else value

    result: dict[str, Any] = plain(dataclasses.asdict(config))
    return result


PATHS = ("name", "out", "data.root", "data.cache", "knn.val_root")
"""Fields that say where a run lies and reads, and not what it computes."""


def without_paths(config: Config) -> Config:
    """A configuration with the defaults in place of `PATHS`."""
    return replace(config, {name: attrgetter(name)(Config()) for name in PATHS})


def from_dict(values: Mapping[str, object]) -> Config:
    """Inverse of `to_dict`; missing fields have their defaults, an unknown one is a ConfigError."""
    if isinstance(values.get("tensorboard"), bool):
        # Earlier versions had no other tracker, and evaluated on all validation images.
        log = ("tensorboard",) if values["tensorboard"] else ()
        others = {name: value for name, value in values.items() if name != "tensorboard"}
        values = {"log": log} | others | {"knn.max_val": 0}
    model = values.get("model")
    if isinstance(model, Mapping) and isinstance(model.get("pretrained"), bool):
        # Earlier versions had this option for the weights of the encoder's package.
        package = "timm" if str(model.get("encoder")).startswith("timm/") else "torchvision"
        others = {name: value for name, value in model.items() if name != "pretrained"}
        values = ({"init_from": package} if model["pretrained"] else {}) | dict(values) | {"model": others}
    config = replace(Config(), values)
    if config.model.zero_init_residual and not is_resnet(config.model.encoder):
        # Earlier versions took it for any encoder of torchvision, and ignored it.
        return replace(config, {"model.zero_init_residual": False})
    return config


def place_hint(run: Path) -> str:
    """Likely place of a run that does not exist: in `runs`, or below another current folder; else an empty text."""
    if run.is_absolute() or run.exists():
        return ""
    runs = Path("runs")
    try:
        names = [path.name for path in runs.iterdir()] if runs.is_dir() else []
        near = [run] if (runs / run).is_dir() else difflib.get_close_matches(str(run), names, n=1)
        return f" (did you mean {runs / near[0]}?)" if near else f" (the current folder is {Path.cwd()})"
    except OSError:  # it was deleted: a message must not fail for that
        return ""


def load(path: Path) -> Config:
    """Read a `config.json`.

    Raises:
        ConfigError: the file is missing, cannot be read, is not JSON, or holds an unknown or invalid field.
    """
    if path.exists() and not path.is_file():  # reading a FIFO would wait for good
        raise ConfigError(f"config: {path} must be a regular file, got something else; check the path")
    try:
        values = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        hint = place_hint(path.parent)
        raise ConfigError(f"config: {path} does not exist{hint}; give the run folder of a `byol-fast train`") from None
    except OSError as error:
        raise ConfigError(f"config: {path} cannot be read ({error}); make it readable") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"config: {path} is not valid JSON ({error}); restore it or start a new run") from None
    if not isinstance(values, dict):
        raise ConfigError(f"config: {path} must hold a run's configuration, got {values!r:.50}; check the path")
    try:
        return from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{error} (in {path})") from None


def differences(a: Config, b: Config) -> dict[str, tuple[object, object]]:
    """Dotted names of the fields in which two configurations differ, with both values.

    `local_view` is left out if neither has local views: runs that are older than this option have its default, not what
    their recipe has now.
    """
    unused = "local_view." if a.num_local_views == b.num_local_views == 0 else None
    result: dict[str, tuple[object, object]] = {}

    def walk(x: Mapping[str, Any], y: Mapping[str, Any], prefix: str) -> None:
        for name, value in x.items():
            if isinstance(value, dict):
                walk(value, y[name], f"{prefix}{name}.")
            elif value != y[name] and prefix != unused:
                result[prefix + name] = (value, y[name])

    walk(to_dict(a), to_dict(b), "")
    return result
