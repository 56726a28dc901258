"""Pages in a real browser: no errors, and no horizontal scrolling on a phone."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from byol_fast.report.charts import Series, heat_map, line_chart, scatter
from byol_fast.report.page import Section, chart_grid, details, facts, figure, paragraph, table, write_page

pytestmark = pytest.mark.browser

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PHONE = 390


@pytest.fixture(scope="module")
def browser() -> str:
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed")
    return found


def run(browser: str, profile: Path, page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"),
            *(f"--user-data-dir={profile}", *options, page.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with every kind of content, wider than a phone wherever possible."""
    names = [f"a class with a long name {i}" for i in range(10)]
    noise = np.random.default_rng(0)
    wide = Image.fromarray(noise.integers(0, 256, (60, 1500, 3), dtype=np.uint8))
    charts = [
        line_chart([Series("y", range(50), range(50))], title="Lines " * 20, x_label="x", y_label="y"),
        scatter([Series(n, [k, 2 * k], [k, k]) for k, n in enumerate(names)], title="Points"),
        heat_map([[float(i == j) for j in range(10)] for i in range(10)], names, names, title="Matrix"),
    ]
    sections = [
        Section("Figures", facts([("name", "resnet18_narrow_with_a_very_long_name", "small print")] * 7)),
        Section("Charts", chart_grid(charts)),
        Section("Picture", figure(wide, "a wide picture")),
        Section("Table", table(names, [[0.123456] * 10] * 3) + paragraph("/a/path" * 60, "warn")),
        Section("Folded", details("more", f"<pre>{'x' * 500}</pre>")),
    ]
    path = tmp_path_factory.mktemp("page") / "page.html"
    write_page(path, "A run", sections)
    return path


@pytest.mark.parametrize("width", [PHONE, 1280])
def test_page_is_not_wider_than_the_window(browser: str, page: Path, width: int, tmp_path: Path) -> None:
    # In a frame: a window without a head is never narrower than 500 pixels. The page runs no script, its frame does.
    unfolded = html.escape(page.read_text().replace("<details>", "<details open>"))
    measure = (
        "const f = document.querySelector('iframe'), page = f.contentDocument.documentElement;"
        "document.body.dataset.widths = [f.contentWindow.innerWidth, page.scrollWidth, page.scrollHeight];"
    )
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<!doctype html><body><iframe srcdoc="{unfolded}" style="width:{width}px;height:900px;border:0"></iframe>'
        f"<script>onload = () => {{{measure}}}</script>"
    )
    dumped = run(browser, tmp_path / "profile", frame, "--window-size=1600,1000", "--dump-dom").stdout
    found = re.search(r'data-widths="(\d+),(\d+),(\d+)"', dumped)
    assert found is not None
    assert (int(found[1]), int(found[2])) == (width, width)
    assert int(found[3]) > 1000  # it was laid out


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_page_is_drawn_without_errors(browser: str, page: Path, dark: bool, tmp_path: Path) -> None:
    shot = tmp_path / "shot.png"
    options = ["--blink-settings=preferredColorScheme=0"] if dark else []
    ended = run(browser, tmp_path / "profile", page, f"--window-size={PHONE},1600", f"--screenshot={shot}", *options)
    assert "CONSOLE" not in ended.stderr
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 200
    background = pixels[5, 5]
    assert (background.mean() < 60) == dark
    line = np.array([0x4A, 0xA3, 0xDF] if dark else [0x00, 0x72, 0xB2])  # the first color of the charts
    assert (np.abs(pixels - line).max(axis=2) <= 2).sum() > 100
