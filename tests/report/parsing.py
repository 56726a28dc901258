"""Reads the pages and charts that the tests made."""

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
    """All that is written on it."""
    return [element.text or "" for element in chart.iter(f"{SVG}text")]


def numbers(path: str) -> list[tuple[str, list[float]]]:
    """Commands of a path, and their numbers."""
    found = re.findall(r"([MLHVZhvlmz])([^MLHVZhvlmz]*)", path)
    return [(command, [float(n) for n in re.findall(r"-?[\d.]+", rest)]) for command, rest in found]


def lines(chart: ET.Element) -> list[list[tuple[float, float]]]:
    """Points of every unbroken line."""
    found: list[list[tuple[float, float]]] = []
    for path in chart.iter(f"{SVG}path"):
        if path.get("stroke-linejoin") != "round":
            continue
        for command, n in numbers(path.get("d", "")):
            if command == "M":
                found.append([])
            found[-1] += list(zip(n[::2], n[1::2], strict=True))
    return found


class Page(HTMLParser):
    """A page taken apart; an error where its tags are not balanced."""

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
        """Nothing runs, nothing is fetched, every link leads somewhere, and no two elements have one name."""
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
    """A page, checked."""
    page = Page(text)
    page.check()
    assert "@import" not in text
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in text
    for chart in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        svg(chart)
    return page
