"""Limits of what is read: sizes of images, known from their headers, and files that are not regular ones."""

from __future__ import annotations

import io
import os
import socket
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from byol_fast import config as configs
from byol_fast.data import CorruptImageError, SourceError, open_source
from byol_fast.data.decode import MAX_PIXELS, decode, header_size, open_image, reader_of, size_problem
from byol_fast.data.integrity import bytes_need_check, check_bytes, read_file
from byol_fast.data.sources import FileSource
from byol_fast.export.encoder import load_encoder
from byol_fast.utils import checkpoint as checkpoints
from byol_fast.utils.files import open_regular
from tests.data.corrupt_files import GRAY, JPEG, PICTURE, PNG, animated, config, fill, rotated_by_exif, save
from tests.data.helpers import loader_of
from tests.data.kinds import Photos

WIDTH, HEIGHT = 14_351, 6_235
"""Sides of an image with exactly as many pixels as allowed."""


def with_segments(*segments: bytes) -> bytes:
    """A JPEG with more segments in front of its frame."""
    return JPEG[:2] + b"".join(segments) + JPEG[2:]


def segment(marker: int, size: int) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, size) + bytes(size - 2)


PICTURE_3 = Image.fromarray(PICTURE).resize((37, 23))
HEADERS: dict[str, bytes] = {
    "JPEG": save("JPEG", PICTURE_3),
    "progressive JPEG": save("JPEG", PICTURE_3, progressive=True),
    "CMYK JPEG": save("JPEG", PICTURE_3.convert("CMYK")),
    "JPEG with EXIF": rotated_by_exif(),
    "JPEG with a profile of 5 MB": with_segments(*[segment(0xE2, 65_535)] * 80),
    "JPEG with padding": with_segments(b"\xff" * 3, segment(0xE1, 60_000), b"\xff"),
    "several JPEGs": save("MPO", PICTURE_3, save_all=True, append_images=[Image.fromarray(PICTURE)]),
    "PNG": save("PNG", PICTURE_3),
    "gray PNG": save("PNG", Image.fromarray(GRAY)),
    "lossy WebP": save("WEBP", PICTURE_3),
    "lossless WebP": save("WEBP", PICTURE_3, lossless=True),
    "WebP with alpha": save("WEBP", PICTURE_3.convert("RGBA")),
    "animated WebP": animated("WEBP"),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_header_size_is_that_of_pil(kind: str) -> None:
    data = HEADERS[kind]
    with Image.open(io.BytesIO(data)) as image:
        assert header_size(reader_of(data)) == open_image(data).size == image.size
    assert not bytes_need_check(data)


def patched(data: bytes, old: bytes, new: bytes) -> bytes:
    assert data.count(old) >= 1
    return data.replace(old, new)


def enlarged(kind: str, width: int, height: int) -> bytes:
    """A picture of 3 x 5 whose header names another size; there are no pixels for it."""
    small = Image.new("RGB", (3, 5))
    if kind == "WEBP":
        data = save(kind, small, save_all=True, append_images=[Image.new("RGB", (3, 5), "red")])
        canvas = [(side - 1).to_bytes(3, "little") for side in (3, 5, width, height)]
        return patched(data, canvas[0] + canvas[1], canvas[2] + canvas[3])
    if kind == "TIFF":
        data = save(kind, small)
        for tag, old, new in ((256, 3, width), (257, 5, height)):
            entries = [struct.pack(f"<HHI{code}", tag, field, 1, old) for field, code in ((3, "Hxx"), (4, "I"))]
            data = patched(data, next(e for e in entries if e in data), struct.pack("<HHII", tag, 4, 1, new))
        return data
    if kind == "PPM":
        return patched(save(kind, small), b"3 5", f"{width} {height}".encode())
    formats = {"JPEG": (">HH", True), "PNG": (">II", False), "BMP": ("<ii", False), "JPEG2000": (">II", True)}
    order, height_first = formats[kind]
    if kind == "JPEG2000":  # the box of the file counts height first, the code stream width first
        data = save(kind, small)
        data = patched(data, struct.pack(">II", 5, 3), struct.pack(">II", height, width))
        return patched(data, struct.pack(">II", 3, 5), struct.pack(">II", width, height))
    sides = ((5, 3), (height, width)) if height_first else ((3, 5), (width, height))
    data = patched(save(kind, small), struct.pack(order, *sides[0]), struct.pack(order, *sides[1]))
    return data[:29] + struct.pack(">I", zlib.crc32(data[12:29])) + data[33:] if kind == "PNG" else data


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000"])
@pytest.mark.parametrize("pil_limit", [Image.MAX_IMAGE_PIXELS, None])
def test_size_is_refused_before_pixels_are_decoded(
    kind: str, pil_limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a program sets PIL's limit to, and without its warning, which is an error here."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pil_limit)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for width, height, message in (
            (WIDTH, HEIGHT + 1, "must have at most 89,478,485 pixels, got 14,351 x 6,236; "),
            (16_000, 12_000, "must have at most 89,478,485 pixels, got 16,000 x 12,000; "),
            (15_000, 299, "must have sides of a ratio up to 50:1, got 15,000 x 299; "),
        ):
            data = enlarged(kind, width, height)
            assert (check_bytes(data) or "").startswith(message), kind
            assert bytes_need_check(data)


def test_bmp_from_top_to_bottom_is_limited() -> None:
    data = enlarged("BMP", 3, -5)
    assert decode(data).size == (3, 5)
    assert "got 20,000 x 20,000" in (check_bytes(enlarged("BMP", 20_000, -20_000)) or "")


def test_tile_of_a_tiff_is_limited() -> None:
    """A picture of one pixel in a tile of 400 million."""
    tags = {256: 1, 257: 1, 258: 8, 259: 8, 262: 1, 277: 1, 322: 20_000, 323: 20_000, 324: 8, 325: 8}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    data = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    assert check_bytes(data) == "must have tiles of at most 89,478,485 pixels, got 20,000 x 20,000"


def test_sizes_at_the_limits_are_allowed() -> None:
    assert WIDTH * HEIGHT == MAX_PIXELS == Image.MAX_IMAGE_PIXELS
    for width, height in ((WIDTH, HEIGHT), (1, 1), (1, 50), (50, 1), (60_000, 1_200)):
        assert size_problem(width, height) is None
        assert size_problem(width, height + MAX_PIXELS) is not None
    assert not bytes_need_check(enlarged("PNG", WIDTH, HEIGHT))
    for width, height in ((1, 51), (51, 1), (WIDTH, HEIGHT + 1), (0, 0), (0, 7), (2, 101)):
        assert size_problem(width, height) is not None


@pytest.mark.slow
def test_image_at_the_limit_is_read(backend: str, tmp_path: Path) -> None:
    fill(tmp_path, 7)
    Image.new("1", (WIDTH, HEIGHT), 1).save(tmp_path / "x.png")
    batch = next(loader_of(open_source(tmp_path), config(backend, "raise")))
    assert batch.views[0][batch.index == 7].float().mean() == 255


# ---- arrays and datasets -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 51), (102, 2), (1, 60_000), (20_000, 20_000)])
def test_arrays_beyond_the_limits_are_refused(shape: tuple[int, int]) -> None:
    """Without their memory: all values are one."""
    pixel = np.zeros((), np.uint8)
    sides = f"got {shape[1]:,} x {shape[0]:,}"
    for layout in ((2, *shape), (2, *shape, 3), (2, 3, *shape)):
        with pytest.raises(SourceError, match=rf"data\.root: images must have .*{sides}"):
            open_source(np.broadcast_to(pixel, layout), arg_name="data.root")
    assert len(open_source(np.zeros((2, 1, 50), np.uint8))) == 2


def test_npz_is_refused_by_its_header(tmp_path: Path) -> None:
    """With 4.8 TB of pixels that are not there."""
    path = tmp_path / "x.npz"
    for shape, dtype, message in (
        ((4, 20_000, 20_000, 3), "|u1", "images must have at most 89,478,485 pixels, got 20,000 x 20,000"),
        ((4, 3, 4, 60_000), "|u1", "images must have sides of a ratio up to 50:1, got 60,000 x 4"),
        ((1000, 20_000, 20_000, 3), "<f4", "must be uint8"),
        ((10**9, 500, 500, 3), "|u1", "must be a .npz file whose arrays fit the memory"),
    ):
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"shape": shape, "fortran_order": False, "descr": dtype})
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("images.npy", header.getvalue())
        with pytest.raises(SourceError, match=rf"^images: .*x\.npz.* {message}"):
            open_source(path)


class Images:
    """A dataset of given items."""

    def __init__(self, *items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Any:
        return self.items[i]


@pytest.mark.parametrize(
    "item", [Image.new("L", (51, 1)), np.zeros((1, 51, 3), np.uint8), np.zeros((3, 1, 51), np.uint8)]
)
def test_images_of_datasets_beyond_the_limits_are_corrupt(item: Any) -> None:
    source = open_source(Images(Image.new("RGB", (50, 1)), item))
    assert source.load(0).size == (50, 1)
    with pytest.raises(CorruptImageError, match=r"Images\[1\] must have sides of a ratio up to 50:1, got 51 x 1;"):
        source.load(1)
    with pytest.raises(SourceError, match=r"images: Images\[0\] must have sides"):
        open_source(Images(item))


def test_lazy_image_of_a_dataset_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    source = open_source(Photos([PNG, enlarged("PNG", 20_000, 20_000)]))
    with pytest.raises(CorruptImageError, match="must have at most 89,478,485 pixels, got 20,000 x 20,000"):
        source.load(1)


# ---- regular files -------------------------------------------------------------------------------------------------


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    os.chdir(path.parent)  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)


SPECIAL: dict[str, tuple[Callable[[Path], Any], str]] = {
    "FIFO": (make_fifo, "cannot be read (it is a FIFO, not a regular file)"),
    "socket": (make_socket, "cannot be read (it is a socket or a device, not a regular file)"),
    "zeros": (lambda path: path.symlink_to("/dev/zero"), "cannot be read (it is a device, not a regular file)"),
    "terminal": (lambda path: path.symlink_to("/dev/ptmx"), "cannot be read (it is a device, not a regular file)"),
    "folder": (Path.mkdir, "is a folder"),
    "sparse file": (lambda path: _sparse(path, 2**40), "must have at most 2,147,479,552 bytes, got 1,099,511,627,776"),
}


def _sparse(path: Path, size: int) -> None:
    path.touch()
    os.truncate(path, size)


@pytest.mark.parametrize("kind", SPECIAL)
def test_special_file_is_a_corrupt_image(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make, reason = SPECIAL[kind]
    make(tmp_path / "target")
    (tmp_path / "x.jpg").symlink_to("target")
    for name in ("target", "x.jpg"):
        source = FileSource(root=tmp_path, paths=(name,))
        with pytest.raises(CorruptImageError) as caught:
            source.load(0)
        assert caught.value.reason.startswith(reason) and caught.value.path == tmp_path / name
        assert source.needs_check(0)


def test_regular_file_is_opened(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(JPEG)
    assert read_file(tmp_path / "x.jpg") == JPEG
    with open(tmp_path / "x.jpg", "rb", opener=open_regular) as file:
        assert file.read() == JPEG
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "y.jpg")


@pytest.mark.parametrize("name", ["x.tar", "x*.tar", "x.npz", "x.txt", "x.csv", "x.parquet", "x*.parquet"])
def test_fifo_is_no_source(name: str, tmp_path: Path) -> None:
    make_fifo(tmp_path / name.replace("*", ""))
    problem = "which is no regular file" if "*" in name else "is neither a file nor a folder"
    with pytest.raises(SourceError, match=rf"^images: .*x\.\w+,? {problem};"):
        open_source(tmp_path / name)


@pytest.mark.parametrize("suffix", [".tar", ".npz", ".txt", ".csv", ".parquet"])
def test_source_replaced_by_a_fifo_is_refused(suffix: str, tmp_path: Path) -> None:
    """After it was found to be a file."""
    from byol_fast.data.sources.arrays import open_npz
    from byol_fast.data.sources.lists import open_list
    from byol_fast.data.sources.parquet import open_parquet
    from byol_fast.data.sources.tar import open_tars

    path = tmp_path / f"x{suffix}"
    make_fifo(path)
    opens: dict[str, Callable[[], Any]] = {
        ".tar": lambda: open_tars([path], "x", "images", tmp_path, on_corrupt="raise"),
        ".npz": lambda: open_npz(path, "images"),
        ".parquet": lambda: open_parquet([path], "x", "images", tmp_path),
    }
    if suffix == ".parquet":
        pytest.importorskip("datasets")
    with pytest.raises(SourceError, match=r"it is a FIFO, not a regular file"):
        opens.get(suffix, lambda: open_list(path, "images"))()


def test_fifos_of_a_run_are_refused(tmp_path: Path) -> None:
    for name in ("config.json", "step_1.pt", "encoder.safetensors", "encoder.json"):
        make_fifo(tmp_path / name)
    reads: tuple[Callable[[], Any], ...] = (
        lambda: configs.load(tmp_path / "config.json"),
        lambda: checkpoints.load(tmp_path / "step_1.pt"),
        lambda: load_encoder(tmp_path),
    )
    for read in reads:
        with pytest.raises(
            (configs.ConfigError, checkpoints.CheckpointError), match="it is a FIFO, not|must be a regular file"
        ):
            read()
