"""Makes the README's sheet of nearest neighbours: `python docs/neighbours.py RUN`, with a run of `byol-fast demo`.

The images are the packaged Fashion-MNIST's validation images (see `byol_fast/data/demo`).
"""

from __future__ import annotations

import sys
from pathlib import Path

from byol_fast.data.sources.arrays import open_demo
from byol_fast.evaluate import embed_folder
from byol_fast.export.encoder import load_encoder
from byol_fast.report.neighbor_sheet import neighbor_sheet, save_sheet


def main() -> None:
    """Write `neighbours.png` beside this file."""
    encoder = load_encoder(sys.argv[1])
    _, images = open_demo()
    found = embed_folder(encoder, images)
    title = f"Nearest neighbours: {encoder[1]['encoder']}, {encoder[1]['step']} steps"
    save_sheet(
        neighbor_sheet(images, found.features, queries=5, title=title), Path(__file__).with_name("neighbours.png")
    )


if __name__ == "__main__":
    main()
