"""Loaders of every kind of source, killed in mid-epoch and resumed, continue with the same batches."""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from byol_fast.config import ViewConfig, replace
from byol_fast.data import ImageSource, ViewLoader
from byol_fast.data.loaders.backend import dali_installed
from byol_fast.data.sources import FileSource
from byol_fast.utils.files import atomic_path
from tests.data.conftest import photo_like
from tests.data.helpers import config_of, loader_of
from tests.data.kinds import KINDS, available, encoded, make

VIEW1 = ViewConfig(size=16)
VIEW2 = ViewConfig(size=16, blur_p=0.1, solarize_p=0.2)
NUM_BATCHES = 8  # of 10 images: 40 images are 4 batches an epoch
CORRUPT = 13  # an image that cannot be read


@functools.cache
def pictures() -> list[bytes]:
    rng = np.random.default_rng(0)
    sizes = [(int(h), int(w)) for h, w in rng.integers(24, 60, (40, 2))]
    return [encoded(photo_like(1, h, w, seed=i)[0], quality=90) for i, (h, w) in enumerate(sizes)]


def with_one_corrupt(images: list[bytes]) -> list[bytes]:
    return [data[:300] if i == CORRUPT else data for i, data in enumerate(images)]


def pairs() -> list[tuple[str, str, bool]]:
    """Kind of source, loader, and True if one image is corrupt (and skipped)."""
    backends = ["threaded", *(["dali"] if dali_installed() else [])]
    whole = [(kind, backend, False) for kind in available() for backend in backends]
    return whole + [(kind, backend, True) for kind in ("folder", "tar") for backend in backends]


def open_pair(folder: Path, kind: str, backend: str, corrupt: bool) -> tuple[ImageSource, ViewLoader]:
    images = with_one_corrupt(pictures()) if corrupt else pictures()
    source = make(kind, folder / f"{kind}{'-corrupt' * corrupt}", images)
    config = replace(config_of(backend, VIEW1, VIEW2, batch_size=10), {"data.on_corrupt": "skip"})
    return source, loader_of(
        source, config, corrupt_list=folder / f"{kind}-{backend}-{corrupt}.jsonl" if corrupt else None
    )


def digest_of(loader: ViewLoader) -> str:
    batch = next(loader)
    result = hashlib.blake2b(batch.index.numpy().tobytes(), digest_size=16)
    for view in (batch.views[0], batch.views[1]):
        result.update(view.contiguous().numpy().tobytes())
    return result.hexdigest()


def stored(folder: Path, pair: tuple[str, str, bool]) -> Path:
    return folder / f"{'-'.join(map(str, pair))}.pt"


def work(folder: Path) -> None:
    """Load batches of all pairs in turn, endlessly; log each one, then store the state, as a run does."""
    torch.set_num_threads(1)
    loaders = {pair: open_pair(folder, *pair)[1] for pair in pairs()}
    for number in itertools.count():
        for pair, loader in loaders.items():
            digest = digest_of(loader)
            with (folder / "log.txt").open("a") as log:
                log.write(f"{'|'.join(map(str, pair))}|{number}|{digest}\n")
            with atomic_path(stored(folder, pair)) as temporary:
                torch.save({"num_loaded": number + 1, "loader": loader.state_dict()}, temporary)


def log_of(folder: Path) -> list[tuple[str, int, str]]:
    path = folder / "log.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(line.rsplit("|", 2)[0], int(line.rsplit("|", 2)[1]), line.rsplit("|", 2)[2]) for line in lines]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which another process loaded batches of all pairs until it was killed in the second epoch."""
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-m", "tests.data.test_resume", str(folder)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path[1:]])}
    process = subprocess.Popen(command, env=environment)
    num_batches = 5 * len(pairs()) + 3  # in the middle of a round: batches 1 and 2 of the second epoch
    deadline = time.monotonic() + 300
    while len(log_of(folder)) < num_batches and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    return folder


@pytest.mark.parametrize(("kind", "backend", "corrupt"), pairs())
def test_remaining_batches_are_the_same(kind: str, backend: str, corrupt: bool, killed: Path, tmp_path: Path) -> None:
    pair = (kind, backend, corrupt)
    _, loader = open_pair(tmp_path, *pair)
    expected = [digest_of(loader) for _ in range(NUM_BATCHES)]
    assert len(set(expected)) == NUM_BATCHES
    logged = [(number, digest) for name, number, digest in log_of(killed) if name == "|".join(map(str, pair))]
    state = torch.load(stored(killed, pair), weights_only=True)
    num_loaded = state["num_loaded"]
    assert 4 < num_loaded < NUM_BATCHES - 1 and len(logged) - num_loaded in {0, 1}  # killed in mid-epoch
    assert [digest for _, digest in logged] == expected[: len(logged)]
    _, resumed = open_pair(killed, *pair)
    resumed.load_state_dict(state["loader"])
    assert [digest_of(resumed) for _ in range(num_loaded, NUM_BATCHES)] == expected[num_loaded:]
    if corrupt:
        reported = (killed / f"{kind}-{backend}-True.jsonl").read_text().splitlines()
        assert len(reported) == 1 and f'"index": {CORRUPT}' in reported[0]


@pytest.mark.parametrize("kind", [kind for kind in available() if kind != "array"])
def test_state_of_other_images_is_refused_without_accept_changed(kind: str, tmp_path: Path, caplog: Any) -> None:
    config = config_of("threaded", VIEW1, VIEW2)
    state = loader_of(make(kind, tmp_path / "all", pictures()), config).state_dict()
    fewer = make(kind, tmp_path / "fewer", pictures()[1:])
    with pytest.raises(ValueError, match=r"images changed \(images was 40 with .* now is 39 with .*--data\.accept"):
        loader_of(fewer, config).load_state_dict(state)
    asked = replace(config, {"data.accept_changed": True})
    loader = loader_of(fewer, asked)
    loader.load_state_dict(state | {"batch_number": 3})
    assert "resuming with other images: 39 with" in caplog.text
    assert loader.state_dict()["batch_number"] == 3
    with pytest.raises(ValueError, match="but images, seed changed"):
        loader_of(fewer, replace(asked, {"seed": 1})).load_state_dict(state)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind in {"folder", "list", "tar", "parquet"}])
def test_replaced_image_is_logged_and_replaced_data_set_refused(kind: str, tmp_path: Path, caplog: Any) -> None:
    if kind not in available():
        pytest.skip("datasets is not installed")
    images = pictures()
    config = config_of("threaded", VIEW1, VIEW2)
    state = loader_of(make(kind, tmp_path / "bad", with_one_corrupt(images)), config).state_dict()
    loader_of(make(kind, tmp_path / "bad", images), config).load_state_dict(state)
    assert "of 40 that were compared, 1 have another size in bytes" in caplog.text
    smaller = make(kind, tmp_path / "bad", [data + b"\0" for data in images])
    with pytest.raises(ValueError, match="of 40 that were compared 40 have another size in bytes; restore them"):
        loader_of(smaller, config).load_state_dict(state)
    loader_of(smaller, replace(config, {"data.accept_changed": True})).load_state_dict(state)


def test_corrupt_images_stay_excluded_after_a_restart(tmp_path: Path) -> None:
    """Even if they were repaired: the run continues as if it had not been stopped."""
    config = replace(config_of("threaded", VIEW1, VIEW2), {"data.on_corrupt": "skip"})
    source = make("folder", tmp_path / "x", with_one_corrupt(pictures()))
    assert isinstance(source, FileSource)
    loader = loader_of(source, config)
    for _ in range(7):
        next(loader)
    state = loader.state_dict()
    assert [entry[0] for entry in state["corrupt"]] == [CORRUPT]
    expected = [digest_of(loader) for _ in range(5)]
    source.path(CORRUPT).write_bytes(pictures()[CORRUPT])
    again = loader_of(make("folder", tmp_path / "x", pictures()), config)
    again.load_state_dict(state)
    assert [digest_of(again) for _ in range(5)] == expected


if __name__ == "__main__":
    work(Path(sys.argv[1]))
