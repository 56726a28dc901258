"""Photographs a run's report in Chromium for the README: `python docs/report.py runs/NAME/report.html`.

The images of the run are in the picture: let it be one of the demo's.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

DESK, PHONE, HEIGHT, GAP = 1180, 390, 1330, 24
ON_THE_PHONE = ("Nearest neighbours", "Map of the features")


def photograph(page: Path, width: int, height: int, to: Path) -> Image.Image:
    """A page as a window of this size shows it."""
    browser = next(path for name in ("chromium", "google-chrome") if (path := shutil.which(name)))
    options = ["--headless", "--no-sandbox", "--hide-scrollbars", f"--window-size={width},{height}"]
    subprocess.run([browser, *options, f"--screenshot={to}", page.as_uri()], check=True, capture_output=True)
    return Image.open(to).convert("RGB")


def main(page: Path) -> None:
    """Write `report.png` beside this file: the page on a desk, and parts of it on phones."""
    text = page.read_text()
    with tempfile.TemporaryDirectory() as folder:
        shots = [photograph(page, DESK, HEIGHT, Path(folder) / "desk.png")]
        for number, title in enumerate(ON_THE_PHONE):
            part = Path(folder) / f"{number}.html"
            kept = re.search(rf"<section[^>]*><h2>{title}</h2>.*?</section>", text, re.DOTALL)
            assert kept is not None, f"the report has no section {title!r}"
            part.write_text(text[: text.index("<body>")] + f"<body>{kept[0]}</body></html>")
            shots.append(photograph(part, PHONE, HEIGHT // 2 - GAP // 2, Path(folder) / f"{number}.png"))
    canvas = Image.new("RGB", (DESK + 3 * GAP + PHONE, HEIGHT + 2 * GAP), "#d5dae0")
    canvas.paste(shots[0], (GAP, GAP))
    for number, shot in enumerate(shots[1:]):
        canvas.paste(shot, (DESK + 2 * GAP, GAP + number * (HEIGHT // 2 + GAP // 2)))
    canvas.quantize(192, dither=Image.Dither.NONE).save(Path(__file__).with_name("report.png"), optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
