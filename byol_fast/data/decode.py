"""Decode the bytes of an image, by PIL or, where the pixels are the same, by torchvision, which is faster."""

from __future__ import annotations

import contextlib
import io
import math
import re
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torchvision  # noqa: F401 (registers the operator)
from PIL import Image, UnidentifiedImageError
from torch import Tensor

MAX_PIXELS = 89_478_485
"""Largest number of pixels of an image: PIL's limit, but not changed by a program that changes PIL's."""

MAX_ASPECT = 50
"""Largest ratio of the sides of an image: the memory of a resize to a fixed shorter side grows with it."""

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000")
"""Formats that PIL may decode: those of DALI, so that all loaders accept the same files."""

JPEG_HEAD, JPEG_TAIL = b"\xff\xd8\xff", b"\xff\xd9"
PNG_HEAD, PNG_TAIL = b"\x89PNG", b"IEND\xaeB`\x82"
_PNG_PIXELS = {b"IHDR", b"PLTE", b"IDAT", b"IEND"}  # chunks
_HUFFMAN, _ARITHMETIC = {0xC0, 0xC1, 0xC2}, {0xC9, 0xCA}  # starts of frames of lossy JPEGs
_WEBP_EXIF = 8
_HEADER_BYTES = 30  # of a PNG or WebP up to its size
_MAX_SEGMENTS = 10_000  # in front of the frame of a JPEG, and bytes of padding
_TILE_WIDTH, _TILE_HEIGHT = 322, 323  # tags of TIFF

ReadAt = Callable[[int, int], bytes]
"""Returns bytes of a file: so many from an offset on, fewer at its end."""

# torchvision's JPEG decoder, called as an operator: its Python function warns of a future removal. PIL decodes where
# there is no such operator.
_decode_jpeg: Any = getattr(torch.ops.image, "decode_jpeg", None)
_RGB = 3

_FULL_RANGES = (1, 255, 4095, 65535)
_MIN_16_BIT = 4096
"""Smallest largest value of a 16-bit picture that is not black: below it, 12 bits or fewer were stored in 16."""


class UnusableImageError(ValueError):
    """An intact image that is not supported; the message is the predicate of a sentence about the image."""


class ImageSizeError(UnusableImageError):
    """An image with too many pixels, or much longer than wide."""


class PixelDepthError(UnusableImageError):
    """Pixel values whose range is not known."""

    def __init__(self, kind: str, low: float, high: float) -> None:
        full = next((str(limit) for limit in _FULL_RANGES if low >= 0 and high <= limit), "LARGEST")
        super().__init__(
            f"must have 8 bits per channel, or 16 of which more than 12 are used, got {kind} with values "
            f"{low:,.6g} to {high:,.6g}; convert it to 8 bits, for example "
            f"PIL.Image.fromarray((x * (255 / {full})).round().astype('uint8'))"
        )


def decode(data: bytes) -> Image.Image:
    """Decode an image to RGB, as stored: EXIF rotation is not applied, as in torchvision's ImageFolder.

    Raises:
        Exception: of any type, depending on the decoder and the damage; `integrity.check_bytes` returns a description.
    """
    if (size := header_size(reader_of(data))) is not None:  # before PIL allocates the canvas of a WebP
        check_size(*size)
    try:
        image = open_image(_png_pixels(data) if data.startswith(PNG_HEAD) else data)
    except UnidentifiedImageError:  # also a JPEG with damaged segments that its pixels do not need
        if (pixels := decode_jpeg(data)) is None:
            raise
        return Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    tags = getattr(image, "tag_v2", {})
    tile = tags.get(_TILE_WIDTH, 0), tags.get(_TILE_HEIGHT, 0)
    if math.prod(tile) > MAX_PIXELS:  # libtiff decodes all of a tile, also if the image is smaller
        raise ImageSizeError(f"must have tiles of at most {MAX_PIXELS:,} pixels, got {tile[0]:,} x {tile[1]:,}")
    return to_rgb(image)


def open_image(data: bytes) -> Image.Image:
    """An image whose header is read and whose pixels are not, without PIL's own limit and its warning.

    Raises:
        Exception: of any type, depending on the decoder and the damage.
    """
    Image.preinit()  # the common formats
    for name in FORMATS:
        if name not in Image.OPEN:
            Image.init()
        factory, accepts = Image.OPEN[name]
        accepted = accepts is None or accepts(data[:16])
        if not accepted or isinstance(accepted, str):  # a text says why the format is not supported
            continue
        with contextlib.suppress(SyntaxError, IndexError, TypeError, struct.error):
            return factory(io.BytesIO(data), "")
    raise UnidentifiedImageError("not an image of a supported format")


def check_size(width: int, height: int) -> None:
    """Raise ImageSizeError for a width and height in pixels that are not supported."""
    if (problem := size_problem(width, height)) is not None:
        raise ImageSizeError(problem)


def size_problem(width: int, height: int) -> str | None:
    """Predicate of a sentence about an image, or images, whose width and height in pixels are not supported."""
    if width * height > MAX_PIXELS:
        return f"must have at most {MAX_PIXELS:,} pixels, got {width:,} x {height:,}; scale down, or cut into parts"
    if not 0 < max(width, height) <= MAX_ASPECT * min(width, height):
        return f"must have sides of a ratio up to {MAX_ASPECT}:1, got {width:,} x {height:,}; crop, or cut into parts"
    return None


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB; 16-bit values are divided by 256, where PIL would clip them.

    Raises:
        ImageSizeError: the image is too large or too narrow.
        PixelDepthError: the values are floating-point numbers, 32-bit integers, or 16-bit integers all below 4,096.
    """
    check_size(*image.size)
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        # PIL reads 16-bit PGM, and before version 11 also PNG, into 32 bits.
        has_16_bits = image.mode.startswith("I;16") or image.format in {"PNG", "PPM"}
        if not has_16_bits or 0 < values.max() < _MIN_16_BIT:  # black is black in any range
            raise PixelDepthError(f"mode {image.mode}", values.min(), values.max())
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    has_16_bits = _has_16_bit_channels(image)  # known until the pixels are loaded, of which PIL keeps the upper bytes
    rgb = image.convert("RGB")
    if has_16_bits:
        upper_bytes = np.asarray(rgb)
        low, high = int(upper_bytes.min()) << 8, (int(upper_bytes.max()) << 8) + 255
        if high < _MIN_16_BIT:
            raise PixelDepthError(f"mode {image.mode} of 16 bits", low, high)
    return rgb


def _has_16_bit_channels(image: Image.Image) -> bool:
    """Return True for a color image (PNG, TIFF, PPM) of 16 bits per channel that PIL has opened, not yet loaded."""
    tiles = getattr(image, "tile", None)
    args = tiles[0][3] if tiles else ""
    raw_mode, *options = args if isinstance(args, tuple) else (args,)
    is_16_bit_ppm = image.format == "PPM" and options == [2**16 - 1]
    return is_16_bit_ppm or re.search(";16[BLN]", str(raw_mode)) is not None


def decode_jpeg(data: bytes) -> Tensor | None:
    """Decode a common JPEG by torchvision, faster than by PIL and to the same pixels.

    Returns:
        RGB, uint8 `[1, 3, H, W]`, channels_last; None if PIL has to decode it, or to say what is wrong with it.
    """
    if _decode_jpeg is None or not is_common_jpeg(data):
        return None
    try:
        image: Tensor = _decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), _RGB)
    except RuntimeError:
        return None
    return image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)


def is_common_jpeg(data: bytes) -> bool:
    """True for baseline and progressive JPEGs of 8 bits, gray or with three colors, within the limits of size.

    Others, CMYK above all, are converted to RGB in several ways; ours is PIL's.
    """
    frame = _jpeg_frame(reader_of(data)) if data.startswith(JPEG_HEAD) else None
    return (
        frame is not None
        and frame.marker in _HUFFMAN
        and frame.bits == 8
        and frame.components in {1, 3}
        and size_problem(frame.width, frame.height) is None
    )


def has_common_kind(read: ReadAt) -> bool:
    """True for the kinds of images from whose bytes DALI decodes the pixels of PIL (5 us).

    That is a JPEG of 8 bits, lossy, in CMYK only with Adobe's marker; a PNG that is not animated; a WebP without EXIF.
    """
    head = read(0, _HEADER_BYTES)
    if head.startswith(JPEG_HEAD):
        frame = _jpeg_frame(read)
        if frame is None or frame.bits != 8 or frame.marker not in _HUFFMAN | _ARITHMETIC:
            return False
        return frame.components in {1, 3} or (frame.components == 4 and frame.has_adobe)
    if head.startswith(PNG_HEAD):
        return not _is_animated_png(read)
    is_webp = len(head) == _HEADER_BYTES and head.startswith(b"RIFF") and head[8:12] == b"WEBP"
    return is_webp and not (head[12:16] == b"VP8X" and head[20] & _WEBP_EXIF)


# ---- headers -------------------------------------------------------------------------------------------------------


class _Frame(NamedTuple):
    """Start of the frame of a JPEG."""

    marker: int
    bits: int
    height: int
    width: int
    components: int
    has_adobe: bool
    """True if Adobe's marker is in front of it."""


def reader_of(data: bytes) -> ReadAt:
    """Access to a file in memory."""
    return lambda at, count: data[at : at + count]


def header_size(read: ReadAt) -> tuple[int, int] | None:
    """Width and height in pixels in the header of a JPEG, PNG or WebP; None for others, and damaged ones (2 us)."""
    head = read(0, _HEADER_BYTES)
    if head.startswith(JPEG_HEAD):
        frame = _jpeg_frame(read)
        return None if frame is None else (frame.width, frame.height)
    if len(head) < _HEADER_BYTES:
        return None
    kind = head[12:16]
    if head.startswith(PNG_HEAD) and kind == b"IHDR":
        width, height = struct.unpack_from(">II", head, 16)
        return width, height
    if not head.startswith(b"RIFF") or head[8:12] != b"WEBP":
        return None
    if kind == b"VP8X":  # the canvas of all frames
        return 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
    if kind == b"VP8 " and head[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", head, 26)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L" and head[20] == 0x2F:
        bits = int.from_bytes(head[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return None


def _jpeg_frame(read: ReadAt) -> _Frame | None:
    """The first start of a frame in a JPEG, behind segments of any size; None if there is none."""
    at, has_adobe = 2, False
    for _ in range(_MAX_SEGMENTS):
        segment = read(at, 10)
        if len(segment) < 10 or segment[0] != 0xFF:
            return None
        marker, length = struct.unpack_from(">BH", segment, 1)
        if 0xC0 <= marker <= 0xCF and marker not in {0xC4, 0xC8, 0xCC}:
            bits, height, width, components = struct.unpack_from(">BHHB", segment, 4)
            return _Frame(marker, bits, height, width, components, has_adobe)
        has_adobe |= marker == 0xEE and segment[4:9] == b"Adobe"
        if marker == 0xFF:  # a byte of padding
            at += 1
        elif length < 2:
            return None
        else:
            at += 2 + length
    return None


def _is_animated_png(read: ReadAt) -> bool:
    at = 8
    for _ in range(_MAX_SEGMENTS):
        head = read(at, 8)
        if len(head) < 8 or head[4:] in {b"IDAT", b"acTL"}:
            return head[4:] == b"acTL"
        at += 12 + int.from_bytes(head[:4], "big")
    return False


def _png_pixels(data: bytes) -> bytes:
    """A PNG without the chunks that its pixels do not need: PIL refuses long or damaged texts, which DALI ignores.

    Raises:
        OSError: its end is missing; PIL would read it, DALI would not.
    """
    parts, at, kind = [data[:8]], 8, b""
    while kind != b"IEND":
        kind, end = data[at + 4 : at + 8], at + 12 + int.from_bytes(data[at : at + 4], "big")
        if not kind.isalpha() or end > len(data):
            raise OSError("its end is missing")
        if kind in _PNG_PIXELS:
            parts.append(data[at:end])
        at = end
    return b"".join(parts)
