"""Brace patterns: `train-{000..127}.tar`, `{a,b}`, also nested, as bash expands them."""

from __future__ import annotations

import itertools
import re

from byol_fast.data.errors import SourceError

MAX_NAMES = 1_000_000
"""Number of names that a pattern may stand for."""

_MAX_DEPTH = 50
_RANGE = re.compile(r"(-?\d{1,1000})\.\.(-?\d{1,1000})")


def expand_braces(pattern: str, arg_name: str) -> list[str]:
    """Names that a pattern stands for; zeros in front of numbers are preserved, and other braces are as they are.

    Raises:
        SourceError: there are more than `MAX_NAMES` names, or the braces are nested too deeply.
    """
    braces = _Braces(pattern, arg_name)
    if braces.count(0, len(pattern)) > MAX_NAMES:  # before any name is made
        raise SourceError(
            f"{arg_name}: a pattern must stand for at most {MAX_NAMES:,} names, got more from {pattern[:200]}; correct "
            "its ranges, or use * instead"
        )
    return braces.expand(0, len(pattern))


class _Braces:
    """The braces of a pattern that stand for several texts."""

    def __init__(self, pattern: str, arg_name: str) -> None:
        self.pattern = pattern
        self.groups: dict[int, list[int]] = {}
        """Positions of the commas and of the closing brace, by the position of the opening brace."""
        opened: list[list[int]] = []
        for match in re.finditer(r"[{},]", pattern):
            i = match.start()
            if pattern[i] == "{":
                opened.append([i])
            elif opened and pattern[i] == ",":
                opened[-1].append(i)
            elif opened:
                start, *commas = opened.pop()
                if commas or _RANGE.fullmatch(pattern, start + 1, i):
                    self.groups[start] = [*commas, i]
            if len(opened) > _MAX_DEPTH:
                raise SourceError(f"{arg_name}: braces must be nested at most {_MAX_DEPTH} deep, got more")

    def count(self, start: int, end: int) -> int:
        """Number of names of a part of the pattern, or a number above `MAX_NAMES`."""
        count = 1
        while (brace := self._next(start, end)) is not None and count <= MAX_NAMES:
            *commas, close = self.groups[brace]
            if commas:
                count *= sum(self.count(*span) for span in self._alternatives(brace))
            else:
                first, last, _ = self._numbers(brace)
                count *= abs(last - first) + 1
            start = close + 1
        return count

    def expand(self, start: int, end: int) -> list[str]:
        """Names of a part of the pattern."""
        names = [""]
        while (brace := self._next(start, end)) is not None:
            head = self.pattern[start:brace]
            *commas, close = self.groups[brace]
            if commas:
                texts = [text for span in self._alternatives(brace) for text in self.expand(*span)]
            else:
                first, last, digits = self._numbers(brace)
                step = 1 if first <= last else -1
                texts = [f"{number:0{digits}d}" for number in range(first, last + step, step)]
            names = [name + head + text for name, text in itertools.product(names, texts)]
            start = close + 1
        return [name + self.pattern[start:end] for name in names]

    def _next(self, start: int, end: int) -> int | None:
        """Position of the next opening brace of a group."""
        while (start := self.pattern.find("{", start, end)) >= 0:
            if start in self.groups:
                return start
            start += 1
        return None

    def _alternatives(self, brace: int) -> list[tuple[int, int]]:
        """Begin and end of each of the texts between commas."""
        return [(left + 1, right) for left, right in itertools.pairwise([brace, *self.groups[brace]])]

    def _numbers(self, brace: int) -> tuple[int, int, int]:
        """First and last number of a range, and the smallest number of digits."""
        texts = self.pattern[brace + 1 : self.groups[brace][0]].split("..")
        has_zeros = any(text.lstrip("-").startswith("0") and len(text.lstrip("-")) > 1 for text in texts)
        return int(texts[0]), int(texts[1]), max(map(len, texts)) if has_zeros else 0
