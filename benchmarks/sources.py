"""What it costs to fetch an encoded image in shuffled order, from each kind of source.

    python -m benchmarks.sources PHOTOGRAPHS [--images 2000] [--rounds N] [--save FOLDER]

PHOTOGRAPHS is a folder of JPEGs; they are repeated to that many images. Everything is in the page cache, so this is
the work of the CPU, not of the disk. That all sources hand out the same bytes is checked before anything is timed.
"""

from __future__ import annotations

import argparse
import io
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

AT_A_TIME = 200  # images of one timed call
GROUP = 100  # rows a row group, as Hugging Face writes images; the cost of reading by group grows with it


def write(folder: Path, images: list[bytes]) -> dict[str, Path]:
    """The images as files, tar shards and Parquet files."""
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
    pq.write_table(table, paths["Parquet"], row_group_size=GROUP)
    return paths


def by_row_group(path: Path, kept: int) -> Callable[[int], bytes]:
    """Read a row by reading its row group, the last `kept` groups kept: what one does without a copy."""
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    rows = file.metadata.row_group(0).num_rows

    @lru_cache(kept)
    def group(number: int) -> Any:
        return file.read_row_group(number, columns=["image.bytes"]).column("image").combine_chunks().field("bytes")

    def read(i: int) -> bytes:
        data: bytes = group(i // rows)[i % rows].as_py()
        return data

    return read


def main() -> None:
    """Time the sources and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", type=Path)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    given = open_source(arguments.photographs)
    assert isinstance(given, FileSource)
    images = [given.read(i % len(given)) for i in range(arguments.images)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        paths = write(folder, images)
        options = DataConfig(cache=folder / "cache")
        readers: dict[str, Callable[[int], bytes]] = {}
        for name, path in paths.items():
            begin = time.process_time()
            source = open_source(path, options=options)
            first = time.process_time() - begin
            begin = time.process_time()
            open_source(path, options=options)
            again = time.process_time() - begin
            print(f"open {name}: {1e6 * first / len(images):.1f} us an image the first time, then "
                  f"{1e6 * again / len(images):.1f}")  # fmt: skip
            assert isinstance(source, EncodedSource)
            readers[f"ours: {name}"] = source.read
        readers["Parquet by row group, the last 4 kept"] = by_row_group(paths["Parquet"], 4)
        order = np.random.default_rng(0).permutation(len(images)).tolist()
        for name, read in readers.items():
            assert all(read(i) == images[i] for i in order[:20]), name
        results = Results("sources", "cpu")
        at = iter(range(10**9))

        def some(read: Callable[[int], bytes]) -> None:
            start = next(at) * AT_A_TIME % len(order)
            for i in order[start : start + AT_A_TIME]:
                read(i)

        def decode() -> None:
            for i in range(AT_A_TIME):
                given.load(i % len(given))

        cases: dict[str, Callable[[], None]] = {name: partial(some, read) for name, read in readers.items()}
        cases["decode (PIL), to compare"] = decode
        times = interleaved(cases, rounds=arguments.rounds, warmup=1, clock=time.process_time)
        results.add("fetch an image", times, unit="images/CPU-s", amount=AT_A_TIME)
        if arguments.save is not None:
            results.save(arguments.save)


if __name__ == "__main__":
    main()
