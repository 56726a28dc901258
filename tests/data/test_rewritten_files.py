"""Files that another program cuts short or rewrites while they are read: an error, never the end of the process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from byol_fast.config import Preprocessing, recipes, replace
from byol_fast.data import CorruptImageError, eval_batches, open_source
from byol_fast.data.loaders.backend import dali_installed
from byol_fast.doctor.scan import scan
from byol_fast.export.encoder import export_encoder, load_encoder
from byol_fast.models.encoders import build_encoder
from tests.data.conftest import photo_like
from tests.data.corrupt_files import JPEG
from tests.data.helpers import config_of, loader_of, plain, same
from tests.data.kinds import available, encoded, make

SIZE = 16
STORED = [kind for kind in available() if kind not in {"list", "array", "dataset", "hugging face"}]

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def pictures(count: int, side: int) -> list[bytes]:
    return [encoded(picture, "png") for picture in photo_like(count, side, side)]


def mapped_files(folder: Path) -> list[str]:
    """Files of a folder that this process maps into its memory."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    return sorted({line.split(maxsplit=5)[-1] for line in maps if f" {folder}/" in line})


@pytest.mark.parametrize("kind", STORED)
def test_images_are_not_mapped(kind: str, files_backend: str, tmp_path: Path) -> None:
    """While a loader has read ahead."""
    source = make(kind, tmp_path / "images", pictures(16, 64))
    loader = loader_of(source, config_of(files_backend, plain(SIZE)))
    next(loader)
    assert mapped_files(tmp_path / "images") == []
    batches: Any = eval_batches(
        source, Preprocessing(crop=SIZE), 4, loader="dali" if "dali" in files_backend else "threaded"
    )
    next(batches)
    assert mapped_files(tmp_path / "images") == []
    batches.close()
    loader.close()


def test_arrays_and_weights_are_not_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "x.npz", images=photo_like(4, SIZE, SIZE))
    source = open_source(tmp_path / "x.npz")
    assert len(source) == 4 and mapped_files(tmp_path) == []

    config = recipes.cifar10_resnet18()
    encoder = build_encoder("resnet18", image_size=32, cifar_stem=True)
    export_encoder(encoder, config, tmp_path, step=1, feature_dim=512)
    mapped: list[list[str]] = []
    load_state_dict = nn.Module.load_state_dict

    def spy(module: nn.Module, *args: Any, **options: Any) -> Any:
        mapped.append(mapped_files(tmp_path))
        return load_state_dict(module, *args, **options)

    monkeypatch.setattr(nn.Module, "load_state_dict", spy)
    load_encoder(tmp_path)
    assert mapped == [[]]


@pytest.mark.parametrize("name", ["dali", "dali+kernels"])
def test_batch_is_read_again_after_its_file_was_replaced(
    name: str, dali: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Intact again when the reason of DALI's error is looked for."""
    for i, data in enumerate(pictures(16, 64)):
        (tmp_path / f"{i}.png").write_bytes(data)
    victim = tmp_path / "3.jpg"
    victim.write_bytes(JPEG)
    source, config = open_source(tmp_path), replace(config_of(name, plain(SIZE)), {"batch_size": 17})
    expected = next(loader_of(source, config))
    victim.write_bytes(JPEG[:300] + JPEG[-2:])  # its first and last bytes are those of an image
    loader: Any = loader_of(source, config)
    restart = loader._restart

    def replace_and_restart() -> None:
        victim.write_bytes(JPEG)
        restart()

    monkeypatch.setattr(loader, "_restart", replace_and_restart)
    assert same(next(loader), expected)
    assert victim.read_bytes() == JPEG and not loader.corrupt.by_index


@pytest.mark.slow
@pytest.mark.parametrize("kind", STORED)
def test_rewritten_files_are_corrupt_images(kind: str, tmp_path: Path) -> None:
    """In a process of its own, which a bus error would end."""
    code = f"from tests.data.test_rewritten_files import read; read({kind!r}, {str(tmp_path)!r})"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert child.returncode == 0, child.stderr[-2000:]
    counts = Counter(json.loads(child.stdout.splitlines()[-1]))
    assert counts["read" if kind == "parquet" else "corrupt"] > 0  # of Parquet the cached copy is read


def read(kind: str, folder: str) -> None:
    """Read images by every reader while a thread cuts some files short and writes them anew; print what happened."""
    source = make(kind, Path(folder) / "images", pictures(32, 256))
    paths = sorted(path for path in (Path(folder) / "images").rglob("*") if path.is_file())
    contents = {path: path.read_bytes() for path in paths[: -(-len(paths) // 8)]}
    stopped = threading.Event()

    def rewrite() -> None:
        while not stopped.is_set():
            for path, data in contents.items():
                os.truncate(path, len(data) // 3)
                path.write_bytes(data)

    counts: Counter[str] = Counter()

    def count(batches: Any) -> None:
        try:
            next(batches)
            counts["read"] += 1
        except CorruptImageError:
            counts["corrupt"] += 1
        except RuntimeError as error:  # at the second try, too
            assert "DALI stopped, though all images of the batch can be read" in str(error)
            counts["changed"] += 1

    writer = threading.Thread(target=rewrite)
    writer.start()
    try:
        for name in ("threaded", *(["dali", "dali+kernels"] if dali_installed() else [])):
            loader = loader_of(source, config_of(name, plain(SIZE)))
            for _ in range(20):
                count(loader)
            loader.close()
        for loader_name in ("threaded", *(["dali"] if dali_installed() else [])):
            loader_option: Any = loader_name
            for _ in range(10):
                count(eval_batches(source, Preprocessing(crop=SIZE), 8, loader=loader_option))
        result = scan(source, threads=2)
        counts["corrupt"] += len(result.corrupt)
    finally:
        stopped.set()
        writer.join()
    print(json.dumps(counts))
