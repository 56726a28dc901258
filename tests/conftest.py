"""Shared by all tests: a small number of threads, small real-looking data, and where the big real data lies."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from byol_fast import config as configs
from byol_fast.config import Config, recipes
from tests.gpu import CAPABILITIES, REHEARSING

# The tests' networks are tiny: a second thread gains nothing, and waiting for it costs much on a busy machine.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start


def real_data(name: str) -> Path:
    """An archive of real images, in BYOL_FAST_TEST_DATA or the shared folder beside the checkout; skips without it."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    archive = Path(os.environ.get("BYOL_FAST_TEST_DATA", beside)) / name
    if not archive.is_file():
        pytest.skip(f"no {name}; set BYOL_FAST_TEST_DATA to the folder that holds it")
    return archive


@pytest.fixture(scope="session")
def photos() -> np.ndarray:
    """Sixty smooth, colored images, uint8 `[60, 32, 32, 3]`: what photographs look like from afar."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(60, 3, 5, 5, generator=generator) * 255
    smooth = torch.nn.functional.interpolate(coarse, size=32, mode="bicubic", align_corners=False).clamp(0, 255)
    images: np.ndarray = smooth.permute(0, 2, 3, 1).to(torch.uint8).numpy()
    return images


@pytest.fixture
def npz(tmp_path: Path, photos: np.ndarray) -> Path:
    """The same as a `.npz` file with labels of three classes."""
    path = tmp_path / "photos.npz"
    np.savez(path, images=photos, labels=np.arange(60) % 3)
    return path


@pytest.fixture
def tiny(npz: Path, tmp_path: Path) -> Config:
    """A run of seconds: 60 images, batches of 12, a narrow ResNet-18 at 16 px, on the CPU in fp32."""
    view = {"size": 16, "blur_p": 0.3}
    return configs.replace(
        recipes.cifar10_resnet18(),
        {
            "data": {"root": npz, "threads": 1},
            "view1": view,
            "view2": view,
            "model": {"encoder": "resnet18_narrow", "hidden_dim": 32, "projection_dim": 16},
            "batch_size": 12,
            "steps": 12,
            "log_every": 2,
            "checkpoint_every": 5,
            "device": "cpu",
            "precision": "fp32",
            "memory_check": False,
            "out": tmp_path / "runs",
            "name": "tiny",
        },
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `gpu` need a GPU, unless this is a rehearsal, and say what they show."""
    only, here = config.getoption("--capability", default=None), torch.cuda.is_available()
    kept: list[pytest.Item] = []
    others: list[pytest.Item] = []
    for item in items:
        capabilities = [argument for marker in item.iter_markers("gpu") for argument in marker.args or ("",)]
        if unknown := set(capabilities) - set(CAPABILITIES):
            raise pytest.UsageError(
                f"{item.nodeid}: marker gpu must name one of {', '.join(CAPABILITIES)}, got {unknown}; see tests/gpu.py"
            )
        if capabilities and not here and not REHEARSING:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        # The innermost: a test's own marker stands before its module's.
        (kept if only is None or capabilities[:1] == [only] else others).append(item)
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = kept
