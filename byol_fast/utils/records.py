"""JSON objects and checks of their fields: a file may be damaged, edited, or of another version.

A `Kind` is a function of a value and its name; it returns the contract that the value breaks, or None.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from byol_fast.utils.files import open_regular

Kind = Callable[[object, str], str | None]

MAX_DEPTH = 100
"""Levels of lists and objects within each other."""
LARGEST_NUMBER = 1e100
"""Sums and squares of numbers up to this one do not overflow."""
LARGEST_COUNT = 1 << 53


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds something else; the message does not name the file.
    """
    with open(path, encoding="utf-8", opener=open_regular) as file:
        return parse_object(file.read())


def parse_object(text: str) -> dict[str, Any]:
    """The JSON object in a text.

    Raises:
        ValueError: the text is no JSON, or not an object.
    """
    try:
        content = json.loads(text)
    except RecursionError:
        content = None
    if not isinstance(content, dict) or _is_deep(content):
        raise ValueError(f"it must be a JSON object of at most {MAX_DEPTH} levels")
    return content


def _is_deep(value: object) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        inner = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)]
        level = [v for values in inner for v in values]
    return bool(level)


class JSONLine(NamedTuple):
    """A line of a file of JSON objects that is not blank."""

    number: int
    """Counted from 1."""
    content: dict[str, Any] | None
    """The object; None for a line that is damaged or holds something else."""
    is_whole: bool
    """The line ends with a line feed. The last one does not if a crash has cut it off."""


def read_json_lines(path: Path) -> Iterator[JSONLine]:
    """Lines of a file with a JSON object each, none if the file does not exist."""
    if not path.exists():
        return
    with open(path, encoding="utf-8", errors="replace", opener=open_regular) as file:
        *whole, cut_off = file.read().split("\n")
    for i, line in enumerate([*whole, cut_off], 1):
        if not line.strip():
            continue
        content: dict[str, Any] | None = None
        with suppress(ValueError):
            content = parse_object(line)
        yield JSONLine(i, content, i <= len(whole))


def _kind(contract: str, accepts: Callable[[Any], bool]) -> Kind:
    return lambda value, name: None if accepts(value) else f"{name} must be {contract}, got {_short(value)}"


# Compared, because math.isfinite raises an error for an int that is too large for a float.
number = _kind(
    "a number", lambda v: isinstance(v, int | float) and not isinstance(v, bool) and abs(v) <= LARGEST_NUMBER
)
count = _kind("a whole number", lambda v: isinstance(v, int) and not isinstance(v, bool) and 0 <= v <= LARGEST_COUNT)
share = _kind("a number from 0 to 1", lambda v: number(v, "") is None and 0 <= v <= 1)
text = _kind("text", lambda v: isinstance(v, str))
flag = _kind("true or false", lambda v: isinstance(v, bool))


def list_of(kind: Kind, length: int | None = None) -> Kind:
    """Kind of a list.

    Args:
        kind: of its entries.
        length: number of entries; None: any.
    """

    def check(value: object, name: str) -> str | None:
        if not isinstance(value, list) or (length is not None and len(value) != length):
            return f"{name} must be a list{'' if length is None else f' of {length}'}, got {_short(value)}"
        return next((p for i, v in enumerate(value) if (p := kind(v, f"{name}[{i}]")) is not None), None)

    return check


def record_of(fields: Mapping[str, Kind], *, required: bool = False) -> Kind:
    """Kind of an object.

    Args:
        fields: kinds of its fields; others may be anything.
        required: all fields must be there; otherwise they may be missing or null.
    """

    def check(value: object, name: str) -> str | None:
        if not isinstance(value, dict):
            return f"{name} must be an object, got {_short(value)}"
        prefix = f"{name}." if name else ""
        for field, kind in fields.items():
            if field not in value and required:
                return f"{prefix}{field} is missing"
            if required or value.get(field) is not None:
                problem = kind(value[field], f"{prefix}{field}")
                if problem is not None:
                    return problem
        return None

    return check


def _short(value: object) -> str:
    if isinstance(value, list | dict):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    # The digits of a large int are not converted: Python limits their number.
    return "a huge number" if isinstance(value, int) and abs(value) > LARGEST_COUNT else f"{json.dumps(value):.40}"


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested dictionary in one level, its keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
