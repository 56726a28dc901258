"""Decode the bytes of an image, by PIL or, where the pixels are the same, by torchvision, which is faster."""

from __future__ import annotations

import io
import re
import struct
from typing import Any

import numpy as np
import torch
import torchvision  # noqa: F401 (registers the operator)
from PIL import Image
from torch import Tensor

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000")
"""Formats that PIL may decode: those of DALI, so that all loaders accept the same files."""

# torchvision's JPEG decoder, called as an operator: its Python function warns of a future removal. PIL decodes where
# there is no such operator.
_decode_jpeg: Any = getattr(torch.ops.image, "decode_jpeg", None)
_RGB = 3

_FULL_RANGES = (1, 255, 4095, 65535)
_MIN_16_BIT = 4096
"""Smallest largest value of a 16-bit picture that is not black: below it, 12 bits or fewer were stored in 16."""


class PixelDepthError(ValueError):
    """Pixel values whose range is not known; the message is the predicate of a sentence about the image."""

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
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB; 16-bit values are divided by 256, where PIL would clip them.

    Raises:
        PixelDepthError: the values are floating-point numbers, 32-bit integers, or 16-bit integers all below 4,096.
    """
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
    """True for baseline and progressive JPEGs of 8 bits, gray or with three colors, up to PIL's size limit.

    Others, CMYK above all, are converted to RGB in several ways; ours is PIL's.
    """
    at = 2
    while data[:2] == b"\xff\xd8" and at + 10 <= len(data) and data[at] == 0xFF:
        marker, length = struct.unpack_from(">BH", data, at + 1)
        if marker in {0xC0, 0xC1, 0xC2}:  # start of frame
            bits, height, width, components = struct.unpack_from(">BHHB", data, at + 4)
            max_pixels = Image.MAX_IMAGE_PIXELS or 1 << 32
            return bits == 8 and components in {1, 3} and 0 < height * width <= max_pixels
        if 0xC0 <= marker <= 0xCF and marker != 0xC4:
            return False
        at += 2 + length
    return False
