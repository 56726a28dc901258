"""Cut the packaged demo data out of Fashion-MNIST: `python make.py FOLDER_WITH_THE_FOUR_GZ_FILES`.

The files are those of https://github.com/zalandoresearch/fashion-mnist; Debian's package `dataset-fashion-mnist`
carries them. Taken are the first 1,000 training and the first 200 test images of each class, in file order.
"""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


def read(folder: Path, part: str, per_class: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The first images of each class, `[N, 28, 28]`, and their labels `[N]`."""
    images = np.frombuffer(gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16)
    labels = np.frombuffer(gzip.decompress((folder / f"{part}-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
    taken = np.sort(np.concatenate([np.flatnonzero(labels == c)[:per_class] for c in range(len(CLASSES))]))
    return images.reshape(-1, 28, 28)[taken], labels[taken]


def main(folder: Path) -> None:
    """Write fashion_mnist.npz beside this file."""
    images, labels = read(folder, "train", 1000)
    val_images, val_labels = read(folder, "t10k", 200)
    np.savez_compressed(
        Path(__file__).with_name("fashion_mnist.npz"),
        images=images,
        labels=labels,
        val_images=val_images,
        val_labels=val_labels,
        classes=np.array(CLASSES),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
