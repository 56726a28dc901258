"""Pages in a real browser: accessible, as wide as the window, without errors, and used by keyboard.

Needs a Chromium and `pip install '.[browser]'`: playwright, which drives it, and axe-core, which judges pages.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

import byol_fast
from byol_fast import config as configs
from byol_fast.config import recipes
from byol_fast.profiling import Ceilings, profile
from byol_fast.profiling.page import run_sections
from byol_fast.report.build import report
from byol_fast.report.charts import Series, heat_map, line_chart, scatter
from byol_fast.report.page import Section, chart_grid, details, facts, figure, paragraph, table, write_page
from byol_fast.report.svg import COLORS, DARK_COLORS
from tests.report.test_report import EVALUATION, run_folder, steps

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PHONE, DESKTOP = 360, 1280
PAGES = ("parts", "report", "compared", "profile")
CEILINGS = Ceilings(
    name="this machine", dtype="fp32", bytes_per_s=1e10, flops_per_s=1e11, peak_flops_per_s=1e11, source="assumed"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    playwright = pytest.importorskip("playwright.sync_api")
    path = next((path for name in NAMES if (path := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def axe() -> str:
    """Source of axe-core."""
    package = pytest.importorskip("axe_playwright_python")
    return (Path(package.__path__[0]) / "axe.min.js").read_text()


@contextmanager
def opened(
    browser: Browser, path: Path, *, width: int = DESKTOP, dark: bool = False, script: str = ""
) -> Iterator[Page]:
    """A page, all of it unfolded, after a script that its own policy would refuse."""
    context = browser.new_context(
        viewport={"width": width, "height": 800}, color_scheme="dark" if dark else "light", bypass_csp=bool(script)
    )
    page = context.new_page()
    errors: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: requests.append(request.url.partition(":")[0]))
    page.goto(path.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(element => { element.open = true })")
    if script:
        page.evaluate(script)
    yield page
    context.close()
    assert not errors
    assert set(requests) <= {"file", "data"}


def parts_page(path: Path) -> Path:
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
        Section("Table", table([*names, "x" * 100], [["y" * 200, *[0.123456] * 10]] * 3)),
        Section("Text", paragraph("/a/path" * 60, "warn") + paragraph("good", "good")),
        Section("Folded", details("more", paragraph("x" * 500))),
    ]
    write_page(path, "A run", sections)
    return path


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, photos: np.ndarray) -> dict[str, Path]:
    """Pages of a real run: with all its pictures, beside other runs, and of its profile."""
    root = tmp_path_factory.mktemp("pages")
    for part, images in (("train", photos[:36]), ("val", photos[36:])):
        for i, image in enumerate(images):
            folder = root / "images" / part / f"class {i % 12}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{i}.png")
    view = {"size": 16, "blur_p": 0.3}
    changes: dict[str, object] = {
        "data": {"root": root / "images", "threads": 1},
        "view1": view,
        "view2": view,
        "model": {"encoder": "resnet18_narrow", "hidden_dim": 32, "projection_dim": 16},
        "batch_size": 12,
        "steps": 3,
        "log_every": 1,
        "device": "cpu",
        "precision": "fp32",
        "out": root,
        "name": "a_run_with_a_name_" + "that_is_very_long_" * 6,
        "knn.every_epochs": 1,
    }
    config = configs.replace(recipes.cifar10_resnet18(), changes)
    run = byol_fast.pretrain(recipe=config).run_dir
    _, folder = profile(configs.load(run / "config.json"), resume=run, steps=1, ceilings=CEILINGS)
    (run / "eval").mkdir()
    (run / "eval" / "linear.json").write_text(json.dumps(EVALUATION | {"top1": 0.45}))
    records = steps(20, data_wait=0.5)
    records[4] |= {"loss": None, "embedding_std": None, "skipped": True}
    others = [run_folder(root / "skipped", records), run_folder(root / "one_step", steps(1))]
    return {
        "parts": parts_page(root / "parts.html"),
        "report": report([run], num=50, extra_sections=run_sections),
        "compared": report([run, *others], root / "compared.html"),
        "profile": folder / "profile.html",
    }


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
@pytest.mark.parametrize("name", PAGES)
def test_page_is_accessible_and_fits_the_window(
    browser: Browser, axe: str, pages: dict[str, Path], name: str, width: int, dark: bool
) -> None:
    with opened(browser, pages[name], width=width, dark=dark, script=axe) as page:
        results: dict[str, Any] = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        found = [(v["id"], [node["html"][:120] for node in v["nodes"][:3]]) for v in results["violations"]]
        assert not found
        assert len(results["passes"]) > 25
        assert page.evaluate("document.documentElement.scrollWidth") == width


@pytest.mark.parametrize("name", PAGES)
def test_keyboard_reaches_all_that_scrolls_or_opens(browser: Browser, pages: dict[str, Path], name: str) -> None:
    with opened(browser, pages[name], width=PHONE) as page:
        expected = page.evaluate("document.querySelectorAll('a[href], summary, .scroll').length")
        reached = set()
        for _ in range(expected):
            page.keyboard.press("Tab")
            place, outline = page.evaluate(
                "(e => [[...document.querySelectorAll('*')].indexOf(e), getComputedStyle(e).outline])"
                "(document.activeElement)"
            )
            assert "solid 3px" in outline
            reached.add(place)
        assert len(reached) == expected


def test_keyboard_scrolls_a_wide_table_and_unfolds(browser: Browser, pages: dict[str, Path]) -> None:
    with opened(browser, pages["parts"], width=PHONE, script="null") as page:
        wide = page.locator(".scroll:has(table)")
        wide.focus()
        page.keyboard.press("ArrowRight")
        page.wait_for_function("document.querySelector('.scroll:has(table)').scrollLeft > 0")
        page.locator("summary").focus()
        page.keyboard.press("Enter")
        assert not page.evaluate("document.querySelector('details').open")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_page_is_drawn_in_the_colors_of_the_scheme(
    browser: Browser, pages: dict[str, Path], dark: bool, tmp_path: Path
) -> None:
    with opened(browser, pages["parts"], dark=dark) as page:
        page.screenshot(path=tmp_path / "shot.png", full_page=True)
    pixels = np.asarray(Image.open(tmp_path / "shot.png").convert("RGB")).astype(int)
    assert (pixels[5, 5].mean() < 60) == dark
    line = np.frombuffer(bytes.fromhex((DARK_COLORS if dark else COLORS)[0][1:]), np.uint8).astype(int)
    assert (np.abs(pixels - line).max(axis=2) <= 2).sum() > 100
