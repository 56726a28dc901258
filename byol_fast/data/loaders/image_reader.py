"""Images for a DALI pipeline, read in advance and checked."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import MappingProxyType
from typing import Generic, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from byol_fast.data.decode import decode, has_common_kind, reader_of
from byol_fast.data.errors import CorruptImageError
from byol_fast.data.integrity import CorruptImages, bytes_need_check, check_bytes
from byol_fast.data.sources import ArraySource, EncodedSource, FileSource, ImageSource

IO_THREADS = 16
"""Threads that read encoded images: they wait for disks and networks and hardly compute."""

_READ_BY_DALI = (".jpg", ".jpeg", ".png")


class HasIndex(Protocol):
    """The images of a batch."""

    @property
    def index(self) -> NDArray[np.int64]:
        """Positions of the images in the source."""
        ...


Encoding = Literal["file", "bytes", "array"]
S = TypeVar("S", bound=HasIndex)
ImageOrReason = NDArray[np.uint8] | str  # input of DALI, or the reason why the image cannot be read


class _Started(NamedTuple, Generic[S]):
    """A batch whose images are being read in advance."""

    batch_number: int
    num_corrupt: int
    """Corrupt images that were known when it was sampled."""
    spec: S
    images: dict[int, Future[ImageOrReason]]


class NotReadByDALIError(Exception):
    """A file, named like those that DALI reads itself, from which it would not decode the pixels of PIL."""


class ImageReader(Generic[S]):
    """Reader of the images of a DALI pipeline, one batch after another.

    It returns names of files, which DALI reads itself, if all are JPEG or PNG by name; or the bytes of other encoded
    images (see `for_dali`), or arrays `[H, W, 3]`. Threads check or read them one batch in advance. Corrupt images are
    found and replaced before DALI gets them: an error would end its pipeline.

    Args:
        source: the images.
        sample: returns the contents of batch number n, without the known corrupt images.
        corrupt: the known corrupt images; those found here are added.
        num_threads: threads for images that Python decodes.
        by_name: let DALI read files; False after a `NotReadByDALIError`.
    """

    def __init__(
        self,
        source: ImageSource,
        sample: Callable[[int], S],
        corrupt: CorruptImages,
        *,
        num_threads: int,
        by_name: bool,
    ) -> None:
        self.source, self.corrupt = source, corrupt
        self._sample = sample
        self.encoding: Encoding = "array"
        """Form of the images."""
        if isinstance(source, EncodedSource):
            by_name &= isinstance(source, FileSource) and all(p.lower().endswith(_READ_BY_DALI) for p in source.paths)
            self.encoding = "file" if by_name else "bytes"
        self.image_size: tuple[int, int] | None = None
        """Height and width of all images, if known and equal."""
        if isinstance(source, ArraySource):
            self.image_size = (source.images.shape[1], source.images.shape[2])
        # DALI's own threads read files. Each is checked here once, or every time after one of them was corrupt.
        self._check_once = self.encoding == "file" and not corrupt.by_index
        self._checked = bytearray(len(source))
        self._num_threads = num_threads if self.encoding == "array" else IO_THREADS
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: _Started[S] | None = None

    def __call__(
        self, batch_number: int, last: int | None = None
    ) -> tuple[S, list[NDArray[np.uint8]] | NDArray[np.uint8]]:
        """Contents and images of a batch; starts to read the next one, unless this is the `last`.

        Raises:
            CorruptImageError: an image cannot be read and must not be skipped, or too many were.
            NotReadByDALIError: DALI would read a file by its name, and not right; read the contents of files instead.
        """
        if isinstance(self.source, ArraySource):
            spec = self._sample(batch_number)
            return spec, self.source.images[spec.index]
        spec, images = self._take_ahead(batch_number)
        while unreadable := [(i, image) for i, future in images.items() if isinstance(image := future.result(), str)]:
            self.corrupt.add(unreadable, batch_number)
            spec = self._sample(batch_number)
            images = self._submit(spec, images)
        if batch_number != last:
            following = self._sample(batch_number + 1)
            known = len(self.corrupt.by_index)
            self._ahead = _Started(batch_number + 1, known, following, self._submit(following))
        if self._check_once:
            for i in images:
                self._checked[i] = True
        return spec, [self._image(i, images) for i in spec.index.tolist()]

    def _image(self, i: int, images: Mapping[int, Future[ImageOrReason]]) -> NDArray[np.uint8]:
        image = images[i].result() if i in images else self._file_name(i)
        assert not isinstance(image, str)
        return image

    def _take_ahead(self, batch_number: int) -> tuple[S, dict[int, Future[ImageOrReason]]]:
        """The batch that was started in advance, sampled again if more corrupt images are known by now."""
        ahead, self._ahead = self._ahead, None
        images: dict[int, Future[ImageOrReason]] = {}
        if ahead is not None and ahead.batch_number == batch_number:
            images = ahead.images
            if ahead.num_corrupt == len(self.corrupt.by_index):
                return ahead.spec, images
        spec = self._sample(batch_number)
        return spec, self._submit(spec, images)

    def _submit(
        self, spec: S, started: Mapping[int, Future[ImageOrReason]] = MappingProxyType({})
    ) -> dict[int, Future[ImageOrReason]]:
        """The images of a batch, each once: those that were started already, and the others, without checked files."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._num_threads, "byol-fast-read")
        index = [i for i in dict.fromkeys(spec.index.tolist()) if not self._checked[i]]
        return {i: started.get(i) or self._pool.submit(self._read, i) for i in index}

    def _read(self, i: int) -> ImageOrReason:
        source = self.source
        try:
            if isinstance(source, EncodedSource):
                return for_dali(source.read(i)) if self.encoding == "bytes" else self._checked_file_name(source, i)
            return np.asarray(source.load(i))
        except CorruptImageError as error:
            return error.reason

    def _checked_file_name(self, source: EncodedSource, i: int) -> ImageOrReason:
        """Name of a file, or its defect; it is decoded unless header and end prove it complete."""
        if source.needs_check(i):
            data = source.read(i)
            if (problem := check_bytes(data)) is not None:
                return problem
            if not has_common_kind(reader_of(data)):
                raise NotReadByDALIError
        return self._file_name(i)

    def _file_name(self, i: int) -> NDArray[np.uint8]:
        assert isinstance(self.source, FileSource)
        return np.frombuffer(os.fsencode(self.source.path(i).absolute()), np.uint8)

    def close(self) -> None:
        """Stop the threads."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
        self._ahead = None


def find_defect(source: EncodedSource, i: int) -> str | None:
    """The defect of an image; it is decoded unless header and end prove it complete."""
    try:
        data = source.read(i)
    except CorruptImageError as error:
        return error.reason
    return check_bytes(data) if bytes_need_check(data) else None


def for_dali(data: bytes) -> ImageOrReason:
    """Bytes of an encoded image from which DALI decodes the pixels of PIL, or the reason why it cannot be decoded.

    DALI decodes JPEG, PNG and WebP of common kinds. It does not scale the values of PNM files, does not turn TIFF files
    by their tag, inverts CMYK without Adobe's marker and does not know all kinds of images: those, and the rest, are
    decoded by PIL and passed on as PPM.
    """
    if not bytes_need_check(data):
        return np.frombuffer(data, np.uint8)
    if has_common_kind(reader_of(data)):
        return check_bytes(data) or np.frombuffer(data, np.uint8)
    try:
        image = decode(data)
    except Exception:  # decoders raise many types of errors on damaged files
        return check_bytes(data) or "cannot be decoded"
    return np.frombuffer(b"P6 %d %d 255\n" % image.size + image.tobytes(), np.uint8)
