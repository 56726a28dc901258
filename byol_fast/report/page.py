"""Self-contained HTML pages: no scripts, no requests; for desktops, phones, dark mode and print."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from byol_fast.report.formatting import readable
from byol_fast.report.svg import DARK_COLORS, escape, palette
from byol_fast.utils.files import atomic_write

if TYPE_CHECKING:
    from PIL.Image import Image

DASH = "\N{EN DASH}"
MIN_PICTURE_WIDTH = 1000
"""Pictures are not shown narrower than this many pixels: on a phone they scroll, or their text would be too small."""
LONG_VALUE = 12
"""Values with more letters are set smaller by `facts`."""


@dataclass(frozen=True, slots=True)
class Section:
    """A section of a page, with an entry in its table of contents."""

    title: str
    """Its heading, as plain text."""
    html: str
    """Its content as HTML; headings within are `<h3>`."""


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table; if it is wider than the page, it scrolls on its own.

    Args:
        headers: of the columns, as plain text.
        rows: of cells: text, integers, or floats, which get four digits; None is a dash.

    Returns:
        HTML; numbers are aligned to the right.
    """
    numeric = [bool(rows) and all(_is_number(row[k]) for row in rows) for k in range(len(headers))]
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
        f'<div class="scroll" tabindex="0" role="group" aria-label="Table: {escape(", ".join(filter(None, headers)))}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody>"
        "</table></div>"
    )


def cell(value: object) -> str:
    """Text of a table cell."""
    if value is None:
        return DASH
    if isinstance(value, float):
        return readable(value, 4) if math.isfinite(value) else DASH
    return readable(value) if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _is_number(value: object) -> bool:
    """True for numbers, also with a unit of percent, and for what stands in their place."""
    return not isinstance(value, str) or re.fullmatch(r"[-+]?[\d.,]+%?|\?", value) is not None


def figure(image: Image, caption: str) -> str:
    """An embedded picture.

    Args:
        image: the picture; written as JPEG or PNG, whichever is smaller.
        caption: text below it, also its alternative text.

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
    shape = f'width="{image.width}" height="{image.height}" style="min-width:{min(image.width, MIN_PICTURE_WIDTH)}px"'
    text = escape(caption)
    return (
        '<figure><div class="scroll" tabindex="0" role="group" aria-label="Picture">'
        f'<img src="data:image/{kind};base64,{data}" {shape} alt="{text}"></div>'
        f"<figcaption>{text}</figcaption></figure>"
    )


def chart_grid(charts: Sequence[str]) -> str:
    """Charts side by side, as many as fit."""
    return f'<div class="charts">{"".join(charts)}</div>'


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text; `kind` is "", "faint", "good" or "warn"."""
    return f"<p{f' class={kind}' if kind else ''}>{escape(text)}</p>"


def details(summary: str, html: str) -> str:
    """HTML folded away under a line of plain text."""
    return f"<details><summary>{escape(summary)}</summary>{html}</details>"


def facts(entries: Sequence[tuple[str, str, str]]) -> str:
    """Cards of (name, value, small print), as plain text."""
    cards = (
        f"<div><dt>{escape(name)}</dt><dd{' class=long' if len(value) > LONG_VALUE else ''}>{escape(value)}"
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
    """Write a page atomically.

    Args:
        path: the file to write.
        title: of the page, as plain text.
        sections: its content, in this order.

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
    # The browser refuses scripts and requests, should any get in with a name from the outside.
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
        "<footer>Written by byol_fast.</footer>\n</body>\n</html>\n",
    )
