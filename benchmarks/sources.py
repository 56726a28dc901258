"""CPU time of fetching encoded images in shuffled order from each kind of source.

    python -m benchmarks.sources FOLDER [--images 2000] [--rounds N] [--save FOLDER]

FOLDER holds JPEG files, which are repeated to that many images. All files are in the page cache, so the disk is not
measured. All sources are checked to return the same bytes before anything is timed.
"""

from __future__ import annotations

import argparse
import io
import itertools
import tarfile
import tempfile
import time
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from byol_fast.bench.results import Results
from byol_fast.bench.timing import interleaved
from byol_fast.config import DataConfig
from byol_fast.data import open_source
from byol_fast.data.sources import EncodedSource, FileSource

IMAGES_PER_CALL = 200
ROW_GROUP = 100  # rows per row group, as Hugging Face writes images; the cost of reading by group grows with it


def write(folder: Path, images: list[bytes]) -> dict[str, Path]:
    """Write the images as files, tar shards and a Parquet file; return the paths by kind."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    files, tars = folder / "files", folder / "tars"
    files.mkdir()
    tars.mkdir()
    for k in range(0, len(images), 500):
        with tarfile.open(tars / f"{k // 500:03d}.tar", "w") as tar:
            for i in range(k, min(k + 500, len(images))):
                (files / f"{i:06d}.jpg").write_bytes(images[i])
                for ending, data in (("jpg", images[i]), ("cls", b"0")):
                    info = tarfile.TarInfo(f"{i:06d}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    paths = {"files": files, "tar": tars}
    table = pa.table({"image": [{"bytes": data, "path": None} for data in images], "label": [0] * len(images)})
    paths["Parquet"] = folder / "images.parquet"
    pq.write_table(table, paths["Parquet"], row_group_size=ROW_GROUP)
    return paths


def row_group_reader(path: Path, num_cached: int) -> Callable[[int], bytes]:
    """Reader that loads a whole row group per row and caches the last groups: the way without a copy."""
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    rows = file.metadata.row_group(0).num_rows

    @lru_cache(num_cached)
    def group(number: int) -> Any:
        return file.read_row_group(number, columns=["image.bytes"]).column("image").combine_chunks().field("bytes")

    def read(i: int) -> bytes:
        data: bytes = group(i // rows)[i % rows].as_py()
        return data

    return read


def main() -> None:
    """Time the sources and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    files = open_source(arguments.folder)
    assert isinstance(files, FileSource)
    images = [files.read(i % len(files)) for i in range(arguments.images)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        paths = write(folder, images)
        options = DataConfig(cache=folder / "cache")
        readers: dict[str, Callable[[int], bytes]] = {}
        for name, path in paths.items():
            start = time.process_time()
            source = open_source(path, options=options)
            first = time.process_time() - start
            start = time.process_time()
            open_source(path, options=options)
            again = time.process_time() - start
            print(f"open {name}: {1e6 * first / len(images):.1f} us an image the first time, then "
                  f"{1e6 * again / len(images):.1f}")  # fmt: skip
            assert isinstance(source, EncodedSource)
            readers[f"byol_fast: {name}"] = source.read
        readers["Parquet by row group, the last 4 cached"] = row_group_reader(paths["Parquet"], 4)
        order = np.random.default_rng(0).permutation(len(images)).tolist()
        for name, read in readers.items():
            assert all(read(i) == images[i] for i in order[:20]), name
        results = Results("sources", "cpu")
        calls = itertools.count()

        def fetch(read: Callable[[int], bytes]) -> None:
            start = next(calls) * IMAGES_PER_CALL % len(order)
            for i in order[start : start + IMAGES_PER_CALL]:
                read(i)

        def decode() -> None:
            for i in range(IMAGES_PER_CALL):
                files.load(i % len(files))

        cases: dict[str, Callable[[], None]] = {name: partial(fetch, read) for name, read in readers.items()}
        cases["decode (PIL), for comparison"] = decode
        times = interleaved(cases, rounds=arguments.rounds, warmup=1, clock=time.process_time)
        results.add("fetch an image", times, unit="images/CPU-s", num_items=IMAGES_PER_CALL)
        if arguments.save is not None:
            results.save(arguments.save)


if __name__ == "__main__":
    main()
