"""The parity table with everything on a GPU: DALI's decoder and operators there, and the CUDA kernels."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
import torch

from byol_fast import config as configs
from byol_fast.config import recipes
from byol_fast.data import parity
from byol_fast.data.loaders.factory import dali_installed
from byol_fast.data.loaders.threaded import centre
from byol_fast.data.sources import ArraySource, FileSource, ImageSource
from tests.gpu import DEVICE

pytestmark = pytest.mark.gpu("parity")

OPERATORS = {"crop", "flip", "brightness", "contrast", "saturation", "hue", "jitter", "grayscale", "blur", "solarize"}


def assert_parity(source: ImageSource, size: int, *, num_images: int, encoded: bool) -> None:
    config = configs.replace(recipes.imagenet_resnet50(), {"view1.size": size, "view2.size": size})
    backends = parity.backends(source, config, torch.device(DEVICE))
    rows = list(parity.measure(source, config, backends, num_images=num_images))
    assert not list(parity.lines(row for row in rows if not row.ok))[1:]
    measured = defaultdict(set)
    for row in rows:
        measured[row.backend].add(row.operator)
    names = {"torchvision, PIL", "torchvision, kernels"} | (set() if encoded else {"resident, kernels"})
    names |= {"dali, exact", "dali, hsv", "dali, kernels"} if dali_installed() else set()
    for name in names:
        assert measured[name] >= OPERATORS | {"view 1", "view 2"} | ({"decode", "decode, crop"} if encoded else set())


def test_photographs_from_files(photographs: FileSource) -> None:
    assert_parity(photographs, 224, num_images=64, encoded=True)


def test_generated_files_of_odd_sizes(files: FileSource) -> None:
    """There is always something to compare, also where the photographs are not."""
    config = configs.replace(recipes.imagenet_resnet50(), {"view1.size": 48, "view2.size": 48})
    backends = [b for b in parity.backends(files, config, torch.device(DEVICE)) if not b.fused]
    rows = list(parity.measure(files, config, backends, num_images=40))
    assert not list(parity.lines(row for row in rows if not row.ok))[1:]


def test_photographs_in_memory(photographs: FileSource) -> None:
    """No decoder in the way: what is left is the GPU's arithmetic; and the loader of data that lies on the GPU."""
    squares = np.stack([centre(photographs.load(i), 160, "bicubic") for i in range(64)])
    assert_parity(ArraySource(squares), 96, num_images=64, encoded=False)
