"""Parsers of pages and charts."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

SVG = "{http://www.w3.org/2000/svg}"
VOID = {"meta", "link", "img", "br"}
HOSTILE = "<script>alert('x')</script> & \"quoted\" \x00\x07\ud800 ]]> 漢字"


def svg(text: str) -> ET.Element:
    """A chart; an error where it is not well-formed."""
    root = ET.fromstring(text)
    assert root.tag == f"{SVG}svg"
    return root


def texts(chart: ET.Element) -> list[str]:
    """All texts of a chart."""
    return [element.text or "" for element in chart.iter(f"{SVG}text")]


def vertices(path: ET.Element) -> list[list[tuple[float, float]]]:
    """Points of every unbroken piece of a path."""
    pieces = re.findall(r"M([^M]*)", path.get("d", ""))
    flat = [[float(n) for n in re.findall(r"-?[\d.]+", piece)] for piece in pieces]
    return [list(zip(n[::2], n[1::2], strict=True)) for n in flat]


def lines(chart: ET.Element) -> list[list[tuple[float, float]]]:
    """Points of every unbroken line in the color of a series."""
    paths = [p for p in chart.iter(f"{SVG}path") if re.search(r"stroke: var.*stroke-width: 1.8", p.get("style", ""))]
    return [piece for path in paths for piece in vertices(path)]


def dots(chart: ET.Element) -> list[tuple[float, float]]:
    """Positions of dots without tooltips; the legend's included."""
    tipped = {id(path) for path in tipped_paths(chart).values()}
    return [
        piece[0]
        for path in chart.iter(f"{SVG}path")
        for piece in vertices(path)
        if id(path) not in tipped and len(piece) == 2 and 0 < piece[1][0] - piece[0][0] < 0.05
    ]


def tipped_paths(chart: ET.Element) -> dict[str, ET.Element]:
    """Shapes by the text of their tooltip."""
    groups = [g for g in chart.iter(f"{SVG}g") if g.find(f"{SVG}title") is not None]
    return {g.findtext(f"{SVG}title", ""): p for g in groups if (p := g.find(f"{SVG}path")) is not None}


def boxes(chart: ET.Element) -> dict[str, tuple[float, float, float, float]]:
    """Left, top, right and bottom of every shape with a tooltip, by its text."""
    found = {}
    for text, path in tipped_paths(chart).items():
        x, y = zip(*(point for piece in vertices(path) for point in piece), strict=True)
        found[text] = (min(x), min(y), max(x), max(y))
    return found


def ticks(chart: ET.Element, axis: str) -> dict[str, float]:
    """Position of each labeled grid line of an axis, in pixels, by its label."""
    found = {}
    for group in chart.iter(f"{SVG}g"):
        children = list(group)
        if [child.tag for child in children] != [f"{SVG}path", f"{SVG}text"]:
            continue
        (x0, y0), (x1, _) = vertices(children[0])[0]
        if (x0 == x1) == (axis == "x"):
            found[children[1].text or ""] = x0 if axis == "x" else y0
    return found


class Page(HTMLParser):
    """A parsed page; an error where its tags are not balanced."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self.headings: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        elif tag in {"td", "th"}:
            self.rows[-1].append("")
        elif tag in {"h1", "h2", "h3"}:
            self.headings.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            return
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data
        if self.open and self.open[-1] in {"h1", "h2", "h3"}:
            self.headings[-1] += data

    def check(self) -> None:
        """Assert that nothing runs, nothing is fetched, every link has a target, and ids are unique."""
        ids = [a["id"] for _, a in self.tags if "id" in a]
        assert len(set(ids)) == len(ids)
        for tag, attributes in self.tags:
            assert tag not in {"script", "iframe", "object", "embed", "base", "form"}
            for name, value in attributes.items():
                assert not name.startswith("on"), (tag, name)
                if name in {"src", "href", "xlink:href"}:
                    assert value is not None
                    assert value.startswith("data:") or value[1:] in ids, (tag, name, value[:80])
                if name == "style":
                    assert "url(" not in (value or "")
        headings = [tag for tag, _ in self.tags if tag in {"h1", "h2", "h3"}]
        assert headings[0] == "h1"
        assert headings.count("h1") == 1


def read(text: str) -> Page:
    """A page that passed `Page.check`, with well-formed charts."""
    page = Page(text)
    page.check()
    assert "@import" not in text
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in text
    for chart in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        svg(chart)
    return page
