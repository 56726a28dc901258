"""Corrupt and unusual image files of every kind.

`python -m tests.data.corrupt_files` prints the outcome for each, with both loaders and both policies.
"""

from __future__ import annotations

import functools
import io
import os
import struct
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from byol_fast.config import Config, replace
from byol_fast.data import CorruptImageError, open_source
from byol_fast.data.loaders.backend import dali_installed
from tests.data.conftest import photo_like
from tests.data.helpers import config_of, loader_of, pixels, plain

SIZE = 40
UNPRIVILEGED_USER = 65534
PICTURE: NDArray[np.uint8] = photo_like(1, SIZE, SIZE, seed=3)[0]
GRAY: NDArray[np.uint8] = np.asarray(Image.fromarray(PICTURE).convert("L"))


def save(kind: str, image: Image.Image | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(PICTURE) if image is None else image).save(buffer, kind, **options)
    return buffer.getvalue()


PLAIN = (9, 8, 7)
FLAT = np.full((SIZE, SIZE, 3), PLAIN, np.uint8)
JPEG = save("JPEG", quality=95)
PNG = save("PNG")
WEBP = save("WEBP", lossless=True)
LEVELS = GRAY / GRAY.max()
"""Gray levels up to 1."""


def flipped_bytes() -> bytes:
    start = JPEG.index(b"\xff\xda") + 100  # behind the headers, in the pixels
    return JPEG[:start] + bytes(b ^ 0x55 if b != 0xFF else b for b in JPEG[start : start + 12]) + JPEG[start + 12 :]


def wrong_crc() -> bytes:
    at = PNG.index(b"IDAT") + 200
    return PNG[:at] + bytes(4) + PNG[at + 4 :]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(*chunks: bytes) -> bytes:
    """With chunks in front of the pixels."""
    return PNG[:33] + b"".join(chunks) + PNG[33:]


def jpeg_with(*segments: bytes) -> bytes:
    """With segments of the application in front of the others."""
    return JPEG[:2] + b"".join(b"\xff" + s[:1] + struct.pack(">H", len(s) + 1) + s[1:] for s in segments) + JPEG[2:]


def cmyk_without_adobe() -> bytes:
    data = save("JPEG", Image.fromarray(PICTURE).convert("CMYK"), quality=95)
    at = data.index(b"Adobe")
    return data[: at - 4] + data[at + 12 :]


def by_pil(data: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def png_of(side: int, bits: int, color_type: int, packed_rows: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", side, side, bits, color_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed_rows) + chunk(b"IEND", b"")


def bomb(side: int = 10_000) -> bytes:
    """A PNG of a few hundred bytes for each thousand rows, and of side * side black pixels."""
    packer = zlib.compressobj(9)
    row = bytes(1 + side // 8)
    return png_of(side, 1, 0, b"".join(packer.compress(row) for _ in range(side)) + packer.flush())


def color_png_of_16_bits(levels: NDArray[Any]) -> bytes:
    """PIL writes none."""
    rows = b"".join(b"\0" + row.tobytes() for row in levels.astype(">u2"))
    return png_of(len(levels), 16, 2, zlib.compress(rows))


def of_depth(kind: str, levels: NDArray[Any], dtype: type[np.generic]) -> bytes:
    """A gray picture whose values are stored as `dtype`."""
    return save(kind, Image.fromarray(levels.astype(dtype)))


def rotated_by_exif(kind: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return save(kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {"quality": 95}))


def pnm(kind: str, levels: NDArray[Any], largest: int) -> bytes:
    """A picture with values up to `largest`."""
    values = levels.astype(">u2" if largest > 255 else "u1").tobytes()
    if kind == "P3":
        values = " ".join(map(str, levels.ravel().tolist())).encode()
    return f"{kind} {SIZE} {SIZE} {largest}\n".encode() + values


def animated(kind: str, **options: Any) -> bytes:
    other = Image.fromarray(255 - PICTURE)
    options |= {"lossless": True} if kind == "WEBP" else {}
    return save(kind, save_all=True, append_images=[other], **options)


def palette() -> bytes:
    return save("PNG", Image.fromarray(PICTURE).convert("P"), transparency=3)


def float_color_tiff() -> bytes:
    """A gray float TIFF with its tags of colors (262) and samples per pixel (277) changed to RGB and 3."""
    data = of_depth("TIFF", np.zeros((SIZE, 3 * SIZE)), np.float32)
    for tag, old, new in ((262, 1, 2), (277, 1, 3), (256, 3 * SIZE, SIZE)):
        for kind, size in ((3, "H"), (4, "I")):
            entry = struct.pack(f"<HHI{size}", tag, kind, 1, old)
            data = data.replace(entry, struct.pack(f"<HHI{size}", tag, kind, 1, new))
    return data


def wrong_depth(values: str, largest: str) -> str:
    return rf"must have 8 bits per channel, or 16 .*, got {values}; convert it to 8 bits.*255 / {largest}\)"


CORRUPT: dict[str, tuple[str, bytes, str]] = {
    "zero bytes": ("x.jpg", b"", r"is empty \(0 bytes\)"),
    "truncated JPEG": ("x.jpg", JPEG[: len(JPEG) // 2], r"is a truncated JPEG \(\d+ bytes\)"),
    "JPEG without its end": ("x.jpg", JPEG[:-2], r"is a truncated JPEG \(\d+ bytes\)"),
    "JPEG header only": ("x.jpg", JPEG[:20], r"is a truncated JPEG|is not an image"),
    "JPEG with a piece missing": ("x.jpg", JPEG[:300] + JPEG[-2:], r"cannot be decoded \(|is not an image"),
    "garbage": ("x.jpg", bytes(range(256)) * 8, "is not an image"),
    "garbage in a JPEG's frame": ("x.jpg", JPEG[:4] + bytes(range(256)) * 8 + JPEG[-2:], "is not an image|cannot be"),
    "HTML": ("x.jpg", b"<!DOCTYPE html><html>404 Not Found</html>", r"is not an image \(it looks like HTML\)"),
    "PDF": ("x.jpg", b"%PDF-1.7 ...", r"is not an image \(it looks like PDF\)"),
    "zip": ("x.jpg", b"PK\x03\x04" + bytes(40), "is not an image .it looks like a zip archive"),
    "Git LFS pointer": (
        "x.jpg",
        b"version https://git-lfs.github.com/spec/v1\noid",
        ".*Git LFS pointer: .* not fetched",
    ),
    "truncated PNG": ("x.png", PNG[: len(PNG) // 2], r"is a truncated PNG \(\d+ bytes\)"),
    "PNG without its end": ("x.png", PNG[:-12], r"is a truncated PNG \(\d+ bytes\)"),
    "PNG with damaged pixels": ("x.png", wrong_crc(), r"cannot be decoded \("),
    "truncated WebP": ("x.webp", WEBP[: len(WEBP) // 2], r"cannot be decoded \("),
    "GIF as .jpg": ("x.jpg", save("GIF"), r"is not an image \(it looks like GIF\)"),
    "AVIF as .jpg": ("x.jpg", bytes(4) + b"ftypavif" + bytes(90), r"is not an image \(it looks like AVIF\)"),
    "HEIC as .jpg": ("x.jpg", bytes(4) + b"ftypheic" + bytes(90), r"is not an image \(it looks like HEIC\)"),
    "video as .jpg": ("x.jpg", bytes(4) + b"ftypisom" + bytes(90), r"is not an image \(it looks like a video\)"),
    "float TIFF in 0..1": ("x.tif", of_depth("TIFF", LEVELS, np.float32), wrong_depth("mode F with .* to 1", "1")),
    "int32 TIFF in 0..255": ("x.tif", of_depth("TIFF", LEVELS * 255, np.int32), wrong_depth("mode I .* to 255", "255")),
    "int32 TIFF up to 100,000": (
        "x.tif",
        of_depth("TIFF", LEVELS * 100_000, np.int32),
        wrong_depth("mode I .* to 100,000", "LARGEST"),
    ),
    "12 bits in a 16-bit TIFF": (
        "x.jpg",
        of_depth("TIFF", LEVELS * 4095, np.uint16),
        wrong_depth("mode I;16 .* to 4,095", "4095"),
    ),
    "12 bits in a 16-bit PNG": (
        "x.png",
        of_depth("PNG", LEVELS * 4095, np.uint16),
        wrong_depth("mode I;16 .* to 4,095", "4095"),
    ),
    "12 bits in a 16-bit color PNG": (
        "x.png",
        color_png_of_16_bits(PICTURE.astype(np.uint16) * 16),
        wrong_depth("mode RGB of 16 bits .* to 4,095", "4095"),
    ),
    "100 million pixels": ("x.png", bomb(), "must have at most 89,478,485 pixels, got 10,000 x 10,000; scale down"),
    "4 x 60,000 PNG": (
        "x.png",
        save("PNG", Image.new("L", (4, 60_000))),
        "must have sides .* to 50:1, got 4 x 60,000; crop",
    ),
    "floating-point color TIFF": ("x.tif", float_color_tiff(), r"is not an image \(it looks like a TIFF .* 8 bits per"),
}
"""File name, contents, and a pattern of the defect."""


def _unreadable(path: Path) -> None:
    path.chmod(0)
    if os.geteuid() == 0:  # may read everything
        os.seteuid(UNPRIVILEGED_USER)


def _dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.parent / "gone")


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


DAMAGED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "deleted during the run": (Path.unlink, "does not exist any more"),
    "link whose file went": (_dangling, "is a broken link"),
    "unreadable (permissions)": (_unreadable, r"cannot be read \(Permission denied\)"),
    "replaced by a folder": (_folder, "is a folder"),
    "replaced by a FIFO": (_fifo, r"cannot be read \(it is a FIFO, not a regular file\)"),
    "replaced by a link to a device": (_device, r"cannot be read \(it is a device, not a regular file\)"),
    "cut off during the run": (lambda path: os.truncate(path, 200), "is a truncated JPEG"),
}
"""Damage to an intact file after the source was opened, and a pattern of the defect."""

UP_TO_16: NDArray[np.uint8] = np.stack([(LEVELS * 4096).astype(np.uint16) >> 8] * 3, 2).astype(np.uint8)
UNUSUAL: dict[str, tuple[str, bytes, NDArray[np.uint8], float]] = {
    "flipped bytes in the pixels": ("x.jpg", flipped_bytes(), PICTURE, 80),
    "PNG as .jpg": ("x.jpg", PNG, PICTURE, 0),
    "WebP as .png": ("x.png", WEBP, PICTURE, 0),
    "upper-case name": ("X.JPEG", JPEG, PICTURE, 4),
    "RGBA": ("x.png", save("PNG", Image.fromarray(PICTURE).convert("RGBA")), PICTURE, 0),
    "gray with alpha": ("x.png", save("PNG", Image.fromarray(GRAY).convert("LA")), np.stack([GRAY] * 3, 2), 0),
    "16-bit PNG": ("x.png", save("PNG", Image.fromarray(GRAY.astype(np.uint16) * 257)), np.stack([GRAY] * 3, 2), 0),
    "16-bit TIFF": ("x.tif", save("TIFF", Image.fromarray(GRAY.astype(np.uint16) * 257)), np.stack([GRAY] * 3, 2), 1),
    "16-bit PNG up to 4,096": ("x.png", of_depth("PNG", LEVELS * 4096, np.uint16), UP_TO_16, 1),
    "16-bit PGM": ("x.pgm", of_depth("PPM", GRAY * 257.0, np.uint16), np.stack([GRAY] * 3, 2), 0),
    "16-bit color PNG": ("x.png", color_png_of_16_bits(PICTURE.astype(np.uint16) * 257), PICTURE, 0),
    "palette": ("x.png", save("PNG", Image.fromarray(PICTURE).convert("P")), PICTURE, 30),
    "palette with transparency": ("x.png", palette(), PICTURE, 30),
    "one bit": ("x.png", save("PNG", Image.fromarray(GRAY > 128)), np.stack([(GRAY > 128) * 255] * 3, 2), 0),
    "WebP": ("x.webp", WEBP, PICTURE, 0),
    "animated WebP (first picture)": ("x.webp", animated("WEBP"), PICTURE, 0),
    "animated PNG (first picture)": ("x.png", animated("PNG"), PICTURE, 0),
    "TIFF": ("x.tiff", save("TIFF"), PICTURE, 0),
    "TIFF of several pages (first)": ("x.tiff", animated("TIFF"), PICTURE, 0),
    "BMP": ("x.BMP", save("BMP"), PICTURE, 0),
    "PPM": ("x.ppm", save("PPM"), PICTURE, 0),
    "gray TIFF with alpha": ("x.tif", save("TIFF", Image.fromarray(GRAY).convert("LA")), np.stack([GRAY] * 3, 2), 0),
    "one-bit TIFF": ("x.tif", save("TIFF", Image.fromarray(GRAY > 128)), np.stack([(GRAY > 128) * 255] * 3, 2), 0),
    "rotated TIFF (PIL turns it)": ("x.tif", rotated_by_exif("TIFF"), np.rot90(PICTURE, 3), 0),
    "EXIF rotation of a WebP (not applied)": ("x.webp", rotated_by_exif("WEBP"), PICTURE, 0),
    "PGM up to 51": ("x.pgm", pnm("P5", GRAY // 5, 51), np.stack([GRAY // 5 * 5] * 3, 2), 0),
    "PPM up to 1,023": ("x.ppm", pnm("P6", PICTURE.astype(int) * 4, 1023), PICTURE, 0.5),
    "PPM of text": ("x.ppm", pnm("P3", PICTURE, 255), PICTURE, 0),
    "16-bit PNG, black": ("x.png", of_depth("PNG", GRAY * 0, np.uint16), np.zeros_like(PICTURE), 0),
    "CMYK JPEG": ("x.jpg", save("JPEG", Image.fromarray(PICTURE).convert("CMYK"), quality=95), PICTURE, 30),
    "CMYK JPEG without Adobe's marker": ("x.jpg", cmyk_without_adobe(), by_pil(cmyk_without_adobe()), 0),
    "JPEG with a damaged segment of Photoshop": (
        "x.jpg", jpeg_with(b"\xedPhotoshop 3.0\x008BIM\x04\x0c"), by_pil(JPEG), 0
    ),
    "JPEG with a video behind the end": ("x.jpg", JPEG + bytes(4) + b"ftypmp42" + bytes(5000), PICTURE, 4),
    "JPEG with bytes between its segments": ("x.jpg", JPEG[:20] + b"junk" + JPEG[20:], by_pil(JPEG), 0),
    "rotated TIFF as .jpg": ("x.jpg", rotated_by_exif("TIFF"), np.rot90(PICTURE, 3), 0),
    "PGM up to 51 as .png": ("x.png", pnm("P5", GRAY // 5, 51), np.stack([GRAY // 5 * 5] * 3, 2), 0),
    "EXIF rotation of a WebP as .png": ("x.png", rotated_by_exif("WEBP"), PICTURE, 0),
    "animated PNG (picture beside the animation)": ("x.png", animated("PNG", default_image=True), PICTURE, 0),
    "PNG with a compressed text of 2 MB": (
        "x.png", png_with(chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(2_000_000)))), PICTURE, 0
    ),
    "PNG with a damaged text": ("x.png", png_with(chunk(b"tEXt", b"x\0abc")[:-4] + bytes(4)), PICTURE, 0),
    "gray JPEG": ("x.jpg", save("JPEG", Image.fromarray(GRAY), quality=95), np.stack([GRAY] * 3, 2), 4),
    "progressive JPEG": ("x.jpg", save("JPEG", progressive=True, quality=95), PICTURE, 4),
    "JPEG 2000 as .jpg": ("x.jpg", save("JPEG2000", irreversible=False), PICTURE, 0),
    "EXIF rotation (not applied)": ("x.jpg", rotated_by_exif(), PICTURE, 4),
    "junk behind the end": ("x.jpg", JPEG + b"junk" * 20, PICTURE, 4),
    "unicode name": ("\u00e9\u4e2d \U0001f600.jpg", JPEG, PICTURE, 4),
    "odd characters in the name": ("a\nb\t%20'\"[x]{1..3}.jpg", JPEG, PICTURE, 4),
    "1 x 1": ("x.png", save("PNG", Image.new("RGB", (1, 1), PLAIN)), FLAT, 0),
    "1 x 50": ("x.png", save("PNG", Image.new("RGB", (1, 50), PLAIN)), FLAT, 0),
    "50 x 1": ("x.webp", save("WEBP", Image.new("RGB", (50, 1), PLAIN), lossless=True), FLAT, 0),
    "junk behind the end of a PNG": ("x.png", PNG + b"junk" * 20, PICTURE, 0),
    "5000 x 4000": ("x.png", save("PNG", Image.new("RGB", (5000, 4000), PLAIN)), FLAT, 0),
}  # fmt: skip
"""File name, contents, expected pixels, and tolerance of the mean difference."""


def fill(folder: Path, count: int = 7) -> None:
    """Write intact images."""
    for i in range(count):
        (folder / f"good {i}.png").write_bytes(intact_png(i))


@functools.cache
def intact_png(seed: int) -> bytes:
    return save("PNG", Image.fromarray(photo_like(1, SIZE, SIZE, seed=seed)[0]))


def config(backend: str, policy: str) -> Config:
    view = plain(SIZE, scale=(1.0, 1.0), ratio=(0.01, 100.0))
    return replace(config_of(backend, view, batch_size=8), {"data.on_corrupt": policy})


def outcome(folder: Path, backend: str, policy: str, damage: Callable[[Path], Any] | None = None) -> str:
    """Defect that a loader reports; `damage` is applied to the file x.jpg after the folder was opened."""
    folder.chmod(0o777)
    user = os.geteuid()
    source = open_source(folder)
    loader = loader_of(source, config(backend, policy), corrupt_list=folder / "bad.jsonl")
    if damage is not None:
        damage(folder / "x.jpg")
    try:
        batches = [next(loader) for _ in range(3)]
        loader.close()
    except CorruptImageError as error:
        return error.reason
    finally:
        os.seteuid(user)
    if policy == "skip" and loader.corrupt.by_index:  # type: ignore[attr-defined]
        [image] = loader.corrupt.by_index.values()  # type: ignore[attr-defined]
        assert all(np.isfinite(pixels(batch.views[0])).all() for batch in batches)
        return f"skipped: {image.reason}"
    return "read"


def main() -> None:
    backends = ["threaded", *(["dali"] if dali_installed() else [])]
    print("| file | loader | on_corrupt raise: the run stops with | on_corrupt skip |\n|---|---|---|---|")

    def show(kind: str, name: str, data: bytes, damage: Callable[[Path], Any] | None = None) -> None:
        lines: dict[tuple[str, str], list[str]] = {}
        for backend in backends:
            outcomes = []
            for policy in ("raise", "skip"):
                with tempfile.TemporaryDirectory() as temporary:
                    folder = Path(temporary)
                    fill(folder)
                    (folder / name).write_bytes(data)
                    outcomes.append(outcome(folder, backend, policy, damage))
            stopped = "read" if outcomes[0] == "read" else f"`{name} {outcomes[0]}`".replace("\n", " ")
            lines.setdefault((stopped, outcomes[1].partition(":")[0]), []).append(backend)
        for (stopped, skipped), loaders in lines.items():
            print(f"| {kind} | {' and '.join(loaders)} | {stopped} | {skipped} |", flush=True)

    for kind, (name, data, _) in CORRUPT.items():
        show(kind, name, data)
    for kind, (damage, _) in DAMAGED.items():
        show(kind, "x.jpg", JPEG, damage)
    for kind, (name, data, _, _) in UNUSUAL.items():
        show(kind, name, data)


if __name__ == "__main__":
    main()
