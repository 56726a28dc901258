"""Decode the bytes of an image, by PIL or, where the pixels are the same, by torchvision, which is faster."""

from __future__ import annotations

import io
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


def decode(data: bytes) -> Image.Image:
    """Decode an image to RGB, as stored: EXIF rotation is not applied, as in torchvision's ImageFolder.

    Raises:
        Exception: of any type, depending on the decoder and the damage; `integrity.check_bytes` returns a description.
    """
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB; 16-bit values are divided by 256, where PIL would clip them."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


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
