"""Values of a run's files as text, also those that are missing or of another type than expected."""

from __future__ import annotations

import json
import math
from typing import Any

from byol_fast.utils.intervals import Interval, share_interval
from byol_fast.utils.records import number

UNKNOWN = "?"


def as_text(value: object) -> str:
    """Text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def finite(value: object) -> float | None:
    """A number, or None for anything else."""
    return float(value) if isinstance(value, int | float) and number(value, "") is None else None


def percent(value: object) -> str:
    """A share in percent with one decimal."""
    share = finite(value)
    return UNKNOWN if share is None else f"{share:.1%}"


def readable(value: float, digits: int = 3) -> str:
    """A number to so many significant digits, with commas, and without an exponent unless it is tiny or huge.

    Digits before the point are never dropped: `2,310`, `0.0123`, `1.2e-5`.
    """
    if isinstance(value, int) and abs(value) < 10**15:
        return f"{value:,}"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    is_extreme = not -5 < int(exponent) < 15
    text = mantissa if is_extreme else f"{value:,.{max(0, digits - 1 - int(exponent))}f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return f"{text}e{int(exponent)}" if is_extreme and value else text


def count(value: object) -> str:
    """A whole number with commas."""
    return f"{value:,}" if isinstance(value, int) else UNKNOWN


def interval(record: dict[str, Any], key: str = "top1_ci95") -> Interval | None:
    """Both ends of an interval of a record."""
    ends = record.get(key)
    if not isinstance(ends, list | tuple) or len(ends) != 2:
        return None
    low, high = finite(ends[0]), finite(ends[1])
    return None if low is None or high is None else (low, high)


def accuracy_interval(share: float | None, num_images: float | None) -> Interval | None:
    """95 % interval of an accuracy, 0..1; None where one of the two is not known."""
    if share is None or not 0 <= share <= 1 or not num_images or num_images < 1:
        return None
    return share_interval(share, round(num_images))


def differ(a: Interval | None, b: Interval | None) -> bool:
    """True for two known intervals that do not overlap."""
    return a is not None and b is not None and (a[1] < b[0] or b[1] < a[0])


def interval_text(record: dict[str, Any], key: str = "top1_ci95", prefix: str = "") -> str:
    """An interval of a record in percent; empty where it has none."""
    ends = interval(record, key)
    return "" if ends is None else f"{prefix}{ends[0]:.1%} to {ends[1]:.1%}"


def plural(num: int, one: str, many: str) -> str:
    """A number and the form of a word that goes with it."""
    return f"{num:,} {one if num == 1 else many}"


def duration(seconds: float | None) -> str:
    """A time in hours, minutes and seconds."""
    if seconds is None or not math.isfinite(seconds):
        return UNKNOWN
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
