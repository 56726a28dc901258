"""Takes the screenshots of a report and a profile with Chromium, from a run of the demo, whose images they show.

`python docs/report.py runs/NAME/report.html runs/NAME/profile/profile.html`, on an idle machine.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

DESKTOP, PHONE, HEIGHT, GAP = 1180, 390, 1330, 24
PROFILE = 1000, 2440
PHONE_SECTIONS = ("Nearest neighbors", "Map of the features")


def screenshot(page: Path, width: int, height: int, output: Path) -> Image.Image:
    """The page in a window of this size, in pixels."""
    browser = next(path for name in ("chromium", "google-chrome") if (path := shutil.which(name)))
    options = ["--headless", "--no-sandbox", "--hide-scrollbars", f"--window-size={width},{height}"]
    subprocess.run([browser, *options, f"--screenshot={output}", page.as_uri()], check=True, capture_output=True)
    return Image.open(output).convert("RGB")


def main(page: Path) -> None:
    """Write `report.png` beside this file: the page on a desktop, and two sections on a phone."""
    text = page.read_text()
    with tempfile.TemporaryDirectory() as folder:
        shots = [screenshot(page, DESKTOP, HEIGHT, Path(folder) / "desktop.png")]
        for number, title in enumerate(PHONE_SECTIONS):
            part = Path(folder) / f"{number}.html"
            section = re.search(rf"<section[^>]*><h2>{title}</h2>.*?</section>", text, re.DOTALL)
            assert section is not None, f"the report has no section {title!r}"
            part.write_text(text[: text.index("<body>")] + f"<body>{section[0]}</body></html>")
            shots.append(screenshot(part, PHONE, HEIGHT // 2 - GAP // 2, Path(folder) / f"{number}.png"))
    canvas = Image.new("RGB", (DESKTOP + 3 * GAP + PHONE, HEIGHT + 2 * GAP), "#d5dae0")
    canvas.paste(shots[0], (GAP, GAP))
    for number, shot in enumerate(shots[1:]):
        canvas.paste(shot, (DESKTOP + 2 * GAP, GAP + number * (HEIGHT // 2 + GAP // 2)))
    save(canvas, "report.png")


def save(picture: Image.Image, name: str) -> None:
    """Write a picture beside this file, small."""
    picture.quantize(192, dither=Image.Dither.NONE).save(Path(__file__).with_name(name), optimize=True)


def profile(page: Path) -> None:
    """Write `profile.png` beside this file."""
    with tempfile.TemporaryDirectory() as folder:
        save(screenshot(page, *PROFILE, Path(folder) / "profile.png"), "profile.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
    profile(Path(sys.argv[2]).resolve())
