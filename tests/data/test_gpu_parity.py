"""Operators and whole views against torchvision on a GPU: DALI's decoder and operators, the CUDA kernels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from byol_fast.config import Preprocessing
from byol_fast.data.loaders.eval import center_crop
from byol_fast.data.sources import ArraySource, FileSource, ImageSource
from byol_fast.report import view_check
from tests.data.helpers import OPERATORS, paper
from tests.gpu import DEVICE

pytestmark = pytest.mark.gpu("parity")


def assert_parity(source: ImageSource, backend: str, size: int, num_images: int) -> None:
    found = list(view_check.compare(source, paper(backend, size), torch.device(DEVICE), num_images=num_images))
    assert not [str(result) for result in found if not result.ok]
    assert [result.name for result in found] == [*OPERATORS, "view 1", "view 2"]


def test_photographs_from_files(files_backend: str, photographs: FileSource) -> None:
    assert_parity(photographs, files_backend, 224, 64)


def test_generated_files_of_odd_sizes(files_backend: str, files: FileSource) -> None:
    """Runs without the photographs, too."""
    assert_parity(files, files_backend, 48, 40)


def test_photographs_in_memory(any_backend: str, photographs: FileSource) -> None:
    """Without a decoder: only the GPU's arithmetic differs; includes the device cache."""
    squares = np.stack([center_crop(photographs.load(i), Preprocessing(crop=160)) for i in range(64)])
    assert_parity(ArraySource(squares), any_backend, 96, 64)
