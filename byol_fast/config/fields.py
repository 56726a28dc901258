"""Checks of fields: types, choices, and the ranges of numbers."""

from __future__ import annotations

import difflib
import functools
import os
import types
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


class ConfigError(ValueError):
    """Invalid value or unknown field of a configuration."""


@dataclass(frozen=True, slots=True)
class Range:
    """Smallest and largest value of a number: `steps: Annotated[int, Range(1, 100)]`.

    Bounds keep out what no run needs and what would overflow, hang or fill the memory.
    """

    low: float
    high: float


Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "bf16", "fp16", "tf32", "fp32"]
OnCorrupt = Literal["raise", "skip"]
Loader = Literal["auto", "dali", "threaded", "device_cache"]
Interpolation = Literal["bicubic", "bilinear"]
ViewBatching = Literal["batched", "separate", "concat"]
Schedule = Literal["cosine", "constant"]
TrackerName = Literal["tensorboard", "wandb", "mlflow"]
Probability = Annotated[float, Range(0, 1)]
Threads = Annotated[int, Range(0, 1024)]
Seed = Annotated[int, Range(0, 2**31 - 1)]
ImageSize = Annotated[int, Range(1, 8192)]
BatchSize = Annotated[int, Range(1, 65_536)]
TrainBatchSize = Annotated[int, Range(2, 65_536)]
Width = Annotated[int, Range(1, 65_536)]
GradAccumSteps = Annotated[int, Range(1, 65_536)]
ProfiledSteps = Annotated[int, Range(1, 10_000)]
Epochs = Annotated[int, Range(1, 1_000_000)]
Count = Annotated[int, Range(0, 1_000_000_000)]
LearningRate = Annotated[float, Range(1e-12, 1e4)]
Neighbors = Annotated[int, Range(1, 10_000)]
SheetQueries = Annotated[int, Range(1, 1000)]
SheetNeighbors = Annotated[int, Range(1, 100)]
Temperature = Annotated[float, Range(1e-4, 1e4)]
ChannelMean = Annotated[float, Range(-10, 10)]
ChannelStd = Annotated[float, Range(1e-3, 1e3)]

MAX_VALUES = 10_000
"""Largest number of values of a field that takes several."""
MAX_SHOWN = 200
"""Largest number of characters of a value in a message."""
_TYPE_NAMES = {bool: "True or False", str: "text", Path: "a path"}


def require(ok: bool, where: str, contract: str, value: object, fix: str = "") -> None:
    """Raise a ConfigError `<where> must <contract>, got <value>; <fix>` unless ok."""
    if not ok:
        raise ConfigError(f"{where} must {contract}, got {_shown(value)}{'; ' + fix if fix else ''}")


def check_fields(config: Any, prefix: str) -> None:
    """`check` all fields of a frozen dataclass in its `__post_init__`.

    Args:
        config: the dataclass, whose numbers have a `Range`.
        prefix: of the fields' names in messages.
    """
    for name, hint in _hints(config.__class__).items():
        object.__setattr__(config, name, check(f"{prefix}{name}", hint, getattr(config, name)))


def check(where: str, hint: Any, value: Any) -> Any:
    """A value, converted to a type: paths from text and back, tuples from lists, numbers from NumPy's and torch's.

    Args:
        where: name of the value in messages.
        hint: `int` or `float` with a `Range`, `bool`, `str`, `Path`, a `Literal`, a dataclass; a tuple of these, or one
            of these or None.
        value: to be checked.

    Raises:
        ConfigError: it has another type, or is out of range or none of the choices.
    """
    if get_origin(hint) in {Union, types.UnionType}:
        if value is None:
            return None
        hint = next(arg for arg in get_args(hint) if arg is not types.NoneType)
    kind, *metadata = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    if hasattr(value, "tolist"):
        value = value.tolist()
    if kind is int or kind is float:
        limits = next((entry for entry in metadata if isinstance(entry, Range)), None)
        assert limits is not None, f"{where} is a number without a Range"
        return _check_number(where, kind, limits, value)
    if get_origin(kind) is tuple:
        return _check_tuple(where, get_args(kind), value)
    if get_origin(kind) is Literal:
        return _check_choice(where, get_args(kind), value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is str and isinstance(value, Path):
        return str(value)
    require(isinstance(value, kind), where, f"be {_TYPE_NAMES.get(kind, f'of type {kind.__name__}')}", value)
    return value


def _check_number(where: str, kind: type[int | float], limits: Range, value: Any) -> int | float:
    low, high = limits.low, limits.high
    ok = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool) and low <= value <= high
    contract = f"be an integer from {low:,} to {high:,}" if kind is int else f"be a number from {low:g} to {high:g}"
    require(ok, where, contract, value)
    return kind(value)


def _check_choice(where: str, choices: tuple[str, ...], value: Any) -> Any:
    require(value in choices, where, f"be one of {', '.join(choices)}", value, suggestion(value, choices))
    return value


def suggestion(value: object, choices: Iterable[str]) -> str:
    """`did you mean 'x'?`: the first of the choices that begins with a value, or the closest one; else empty."""
    choices, text = list(choices), str(value)
    longer = [choice for choice in choices if text and choice.startswith(text)]
    near = longer or difflib.get_close_matches(text, choices, n=1)
    return f"did you mean {near[0]!r}?" if near else ""


def expand_home(path: str | Path) -> Path:
    """A path with the home folder for `~` or `~user`; unchanged if there is no such user."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 (Path.expanduser raises an error for a folder named ~x)


def _check_tuple(where: str, hints: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
    is_sequence = isinstance(value, list | tuple)
    if hints[-1] is Ellipsis:
        require(is_sequence and len(value) <= MAX_VALUES, where, f"be a tuple of at most {MAX_VALUES:,} values", value)
        hints = (hints[0],) * len(value)
    require(is_sequence and len(value) == len(hints), where, f"be a tuple of {len(hints)} values", value)
    return tuple(check(where, hint, entry) for hint, entry in zip(hints, value, strict=True))


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python's limit on the digits of an integer
        return "a number of too many digits"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]} ..."


@functools.cache
def _hints(config_type: type) -> dict[str, Any]:
    """Types of the fields, with their ranges."""
    return get_type_hints(config_type, include_extras=True)
