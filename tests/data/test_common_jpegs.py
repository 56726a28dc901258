"""JPEGs that torchvision decodes to the bytes of PIL, and those that it is not given."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from byol_fast.data.decode import is_common_jpeg
from byol_fast.data.sources import FileSource
from tests.data.helpers import pixels


def test_common_jpegs_decode_to_the_bytes_of_pil(files: FileSource, photographs: FileSource) -> None:
    for source in (files, photographs):
        for i in range(len(source)):
            assert is_common_jpeg(source.read(i))
            assert np.array_equal(pixels(source.load_tensor(i))[0], np.asarray(source.load(i)))


def test_other_images_are_not_common_jpegs() -> None:
    from PIL import Image

    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))

    def saved(mode: str, format: str, **options: Any) -> bytes:
        buffer = io.BytesIO()
        image.convert(mode).save(buffer, format, **options)
        return buffer.getvalue()

    good = saved("RGB", "jpeg")
    for common in (good, saved("L", "jpeg"), saved("RGB", "jpeg", progressive=True)):
        assert is_common_jpeg(common)
    for other in (saved("CMYK", "jpeg"), saved("RGB", "png"), good[:20], good[:2], b"", bytes(64), good[2:]):
        assert not is_common_jpeg(other)
    start = good.index(b"\xff\xc0")
    assert not is_common_jpeg(good[: start + 5] + b"\xff\xff\xff\xff" + good[start + 9 :])  # 4 gigapixels
