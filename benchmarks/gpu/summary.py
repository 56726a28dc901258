"""Summary of a run of the queue: the outcome of each item, and as many figures as fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

MAX_CHARACTERS = 8000
"""Length of a summary: the beginning of longer output may be cut off."""
WIDTH = 180
"""Characters of a line."""
STATES = {"complete": "done"}
"""States that are displayed by another word."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Outcome of an item."""

    name: str
    state: Literal["complete", "partial", "failed", "skipped"]
    predicted: float
    seconds: float = 0.0
    reason: str = ""
    figures: list[dict[str, Any]] = field(default_factory=list)


def summary(head: str, outcomes: Sequence[Outcome], foot: str) -> str:
    """A line per item, figures and the last lines of failures, in at most `MAX_CHARACTERS` characters.

    Args:
        head: first line.
        outcomes: of the items, in their order.
        foot: last line.
    """
    top = [head, *(_line(outcome) for outcome in outcomes)]
    failures: list[str] = []
    for outcome in outcomes:
        if outcome.state == "failed":
            failures += [f"{outcome.name} failed:", *(f"  {line}" for line in outcome.reason.splitlines()[-4:])]
    bottom = [*failures, foot]
    top, bottom = [_clip(line) for line in top], [_clip(line) for line in bottom]
    room = MAX_CHARACTERS - sum(len(line) + 1 for line in [*top, *bottom])
    figures = _figures([outcome for outcome in outcomes if outcome.figures], room)
    return "\n".join([*top, *figures, *bottom])[: MAX_CHARACTERS - 1] + "\n"


def _line(outcome: Outcome) -> str:
    text = f"{STATES.get(outcome.state, outcome.state):<9}{outcome.name:<16}"
    if outcome.state == "skipped":
        return text + outcome.reason
    text += f"{outcome.seconds:6.1f} s (predicted {outcome.predicted:.0f})"
    return text + (f": {outcome.reason.splitlines()[-1]}" if outcome.reason and outcome.state != "failed" else "")


def _figures(outcomes: Sequence[Outcome], room: int) -> list[str]:
    """Figures of each item: they share the room equally, and get what earlier items left unused."""
    lines: list[str] = []
    for position, outcome in enumerate(outcomes):
        shown = [values for values in outcome.figures if values.get("ok") is not True]
        num_passed = len(outcome.figures) - len(shown)
        head = f"{outcome.name}:" + (f" {num_passed} checks passed" if num_passed else "")
        texts = [head, *(f"  {_clip(_figure(values))}" for values in shown)]
        share = (room - sum(len(line) + 1 for line in lines)) // (len(outcomes) - position)
        if sum(len(text) + 1 for text in texts) > share:
            fit = 0
            size = 40  # of the line with the number of omitted figures
            while size + len(texts[fit]) + 1 <= share:
                size += len(texts[fit]) + 1
                fit += 1
            if fit < 2:
                continue
            texts = [*texts[:fit], f"  and {len(texts) - fit} more in its file"]
        lines += texts
    return lines


def _figure(values: dict[str, Any]) -> str:
    parts = [f"{name} {_short(value)}" for name, value in values.items() if name not in {"item", "figure"}]
    return f"{values['figure']}: {', '.join(parts)}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _clip(line: str) -> str:
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 3]}..."
