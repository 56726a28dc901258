"""One HTML file that holds all it shows: no script, nothing fetched; readable on a phone, in the dark, and on paper."""

from __future__ import annotations

import base64
import io
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from byol_fast.report.svg import DARK_COLORS, escape, palette
from byol_fast.utils.files import atomic_write

if TYPE_CHECKING:
    from PIL.Image import Image

DASH = "\N{EN DASH}"
LEGIBLE = 1000
"""A picture is not shown narrower than so many pixels: on a phone it scrolls, as its writing would be too small."""
LONG = 12
"""Letters of a figure at a glance that is set smaller."""


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a page, with an entry in its table of contents."""

    title: str
    """Its heading, as plain text."""
    html: str
    """What it holds, as HTML; headings within are `<h3>`."""


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table that scrolls within itself where it is wider than the page.

    Args:
        headers: of the columns, as plain text.
        rows: of cells: text, whole numbers as they are, others with four digits; None is a dash.

    Returns:
        HTML; numbers are aligned to the right.
    """
    numeric = [bool(rows) and all(not isinstance(row[k], str) for row in rows) for k in range(len(headers))]
    head = "".join(
        f'<th scope="col"{" class=num" if num else ""}>{escape(text)}</th>'
        for text, num in zip(headers, numeric, strict=True)
    )
    body = []
    for row in rows:
        first, *rest = (escape(cell(value)) for value in row)
        cells = "".join(
            f"<td{' class=num' if num else ''}>{text}</td>" for text, num in zip(rest, numeric[1:], strict=True)
        )
        body.append(f'<tr><th scope="row"{" class=num" if numeric[0] else ""}>{first}</th>{cells}</tr>')
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody>'
        "</table></div>"
    )


def cell(value: object) -> str:
    """A value as a table shows it."""
    if value is None:
        return DASH
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else DASH
    return str(value)


def figure(image: Image, caption: str) -> str:
    """A picture within the page.

    Args:
        image: anything PIL can write; photographs become JPEG, drawings of few colours PNG, whichever is smaller.
        caption: below it, and its description for those who do not see it.

    Returns:
        HTML.
    """
    rgb = image.convert("RGB")
    files = {}
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 88})):
        buffer = io.BytesIO()
        rgb.save(buffer, format=kind, **options)
        files[kind] = buffer.getvalue()
    kind = min(files, key=lambda k: len(files[k]))
    data = base64.b64encode(files[kind]).decode()
    shape = f'width="{image.width}" height="{image.height}" style="min-width:{min(image.width, LEGIBLE)}px"'
    return (
        f'<figure><div class="scroll" tabindex="0"><img src="data:image/{kind};base64,{data}" {shape} '
        f'alt="{escape(caption)}"></div><figcaption>{escape(caption)}</figcaption></figure>'
    )


def chart_grid(charts: Sequence[str]) -> str:
    """Charts side by side, as many as there is room for."""
    return f'<div class="charts">{"".join(charts)}</div>'


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text; `kind` is "", "faint", "good" or "warn"."""
    return f"<p{f' class={kind}' if kind else ''}>{escape(text)}</p>"


def details(summary: str, html: str) -> str:
    """HTML that is folded away under a line of plain text."""
    return f"<details><summary>{escape(summary)}</summary>{html}</details>"


def facts(entries: Sequence[tuple[str, str, str]]) -> str:
    """Figures at a glance: (name, value, small print), as plain text."""
    cards = (
        f"<div><dt>{escape(name)}</dt><dd{' class=long' if len(value) > LONG else ''}>{escape(value)}"
        f"{f'<small>{escape(more)}</small>' if more else ''}</dd></div>"
        for name, value, more in entries
    )
    return f'<dl class="facts">{"".join(cards)}</dl>'


def style() -> str:
    """The style sheet of all pages."""
    return (
        f":root {{{palette()}}}\n@media screen and (prefers-color-scheme: dark) {{:root {{{palette(DARK_COLORS)}}}}}\n"
        + Path(__file__).with_name("style.css").read_text()
    )


def write_page(path: Path, title: str, sections: Sequence[Section]) -> None:
    """Write a page, whole or not at all.

    Args:
        path: the file to write.
        title: of the page, as plain text.
        sections: what it shows.

    Raises:
        OSError: the file cannot be written.
    """
    anchors: list[str] = []
    for section in sections:
        anchor = re.sub(r"[^a-z0-9]+", "-", section.title.lower()).strip("-") or "section"
        anchors.append(anchor if anchor not in anchors else f"{anchor}-{len(anchors)}")
    contents = "".join(
        f'<li><a href="#{anchor}">{escape(section.title)}</a></li>'
        for anchor, section in zip(anchors, sections, strict=True)
    )
    body = "".join(
        f'<section id="{anchor}"><h2>{escape(section.title)}</h2>\n{section.html}</section>\n'
        for anchor, section in zip(anchors, sections, strict=True)
    )
    # The policy holds the page to what it promises: a browser would refuse a script, or anything from elsewhere.
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    atomic_write(
        path,
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style()}</style>\n</head>\n<body>\n"
        f'<header><h1>{escape(title)}</h1>\n<nav aria-label="Contents"><ul>{contents}</ul></nav></header>\n'
        f"<main>\n{body}</main>\n"
        f"<footer>Written by byol_fast, {time.strftime('%Y-%m-%d %H:%M')}.</footer>\n</body>\n</html>\n",
    )
