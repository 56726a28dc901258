"""Writes the sheet of neighbors in `docs/evaluation.md`: `python docs/neighbors.py RUN`, RUN from `byol-fast demo`.

The images are the validation images of the packaged Fashion-MNIST (see `byol_fast/data/demo`).
"""

from __future__ import annotations

import sys
from pathlib import Path

from byol_fast.data.sources.arrays import open_demo
from byol_fast.evaluate import embed_folder
from byol_fast.export.encoder import load_encoder
from byol_fast.report.neighbor_sheet import neighbor_sheet, save_sheet


def main() -> None:
    """Write `neighbors.png` beside this file."""
    encoder, metadata = load_encoder(sys.argv[1])
    _, images = open_demo()
    features = embed_folder((encoder, metadata), images).features
    title = f"Nearest neighbors: {metadata['encoder']}, {metadata['step']} steps"
    save_sheet(neighbor_sheet(images, features, title=title), Path(__file__).with_name("neighbors.png"))


if __name__ == "__main__":
    main()
