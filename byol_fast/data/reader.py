"""Encoded images for DALI: read ahead by threads, looked at on the way, bad ones replaced before DALI sees them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import MappingProxyType
from typing import Generic, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from byol_fast.data.integrity import (
    CorruptImageError,
    CorruptImages,
    bytes_need_check,
    check_bytes,
    check_file,
    file_needs_check,
)
from byol_fast.data.sources import ArraySource, EncodedSource, FileSource, ImageSource

IO_THREADS = 16
"""Threads that wait for disks and networks; they hardly compute."""


class HasIndex(Protocol):
    """A batch before it is made."""

    @property
    def index(self) -> NDArray[np.int64]:
        """Positions of its images in the source."""
        ...


Encoding = Literal["file", "bytes", "array"]
P = TypeVar("P", bound=HasIndex)
Row = NDArray[np.uint8] | str  # what DALI takes, or what is wrong with it


class Reader(Generic[P]):
    """Hands out the images of one batch after another, as DALI's graph takes them.

    These are: of files their names (DALI reads them), of other encoded images their bytes, of arrays the arrays
    `[H, W, 3]`. While one batch is handed out, the next one is read.

    Args:
        source: the images.
        plan: says what batch number n consists of, bad images replaced.
        bad: the images that are known to be bad; what is found here is added.
        threads: for images that Python decodes.
    """

    def __init__(self, source: ImageSource, plan: Callable[[int], P], bad: CorruptImages, *, threads: int) -> None:
        self.source, self.bad = source, bad
        self._plan = plan
        self.encoding: Encoding = "array"
        """What is handed out."""
        if isinstance(source, EncodedSource):
            self.encoding = "file" if isinstance(source, FileSource) else "bytes"
        self.size: tuple[int, int] | None = None
        """Height and width of all images, where that is known."""
        if isinstance(source, ArraySource):
            self.size = (source.images.shape[1], source.images.shape[2])
        # Files are read by DALI's own threads; they are looked at only once one of them was bad.
        self._direct = isinstance(source, ArraySource) or (isinstance(source, FileSource) and not bad.by_index)
        self._threads = threads if self.encoding == "array" else IO_THREADS
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: tuple[int, int, P, dict[int, Future[Row]]] | None = None

    def __call__(self, step: int, last: int | None = None) -> tuple[P, list[NDArray[np.uint8]] | NDArray[np.uint8]]:
        """The plan of batch number `step` and its images; reads the next batch ahead, unless this is the `last`.

        Raises:
            CorruptImageError: an image cannot be read, and such are not to be passed over, or there are too many.
        """
        if self._direct:
            plan = self._plan(step)
            if isinstance(self.source, ArraySource):
                return plan, self.source.images[plan.index]
            return plan, [self._name(int(i)) for i in plan.index]
        plan, rows = self._take_ahead(step)
        while bad := [(i, row) for i, future in rows.items() if isinstance(row := future.result(), str)]:
            self.bad.add(bad, step)
            plan = self._plan(step)
            rows = self._submit(plan, rows)
        if step != last:
            following = self._plan(step + 1)
            self._ahead = step + 1, len(self.bad.by_index), following, self._submit(following)
        return plan, [row for i in plan.index if not isinstance(row := rows[int(i)].result(), str)]

    def close(self) -> None:
        """Stop the threads."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
        self._ahead = None

    def _take_ahead(self, step: int) -> tuple[P, dict[int, Future[Row]]]:
        """What was begun for this step, brought up to date if more images are known to be bad by now."""
        ahead, self._ahead = self._ahead, None
        rows: dict[int, Future[Row]] = {}
        if ahead is not None and ahead[0] == step:
            rows = ahead[3]
            if ahead[1] == len(self.bad.by_index):
                return ahead[2], rows
        plan = self._plan(step)
        return plan, self._submit(plan, rows)

    def _submit(self, plan: P, begun: Mapping[int, Future[Row]] = MappingProxyType({})) -> dict[int, Future[Row]]:
        """The images of a plan, each once: those that are begun, and the others."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, "byol-fast-read")
        return {i: begun.get(i) or self._pool.submit(self._read, i) for i in dict.fromkeys(plan.index.tolist())}

    def _read(self, i: int) -> Row:
        source = self.source
        try:
            if isinstance(source, FileSource):
                path = source.path(i)
                return (file_needs_check(path) and check_file(path)) or self._name(i)
            if isinstance(source, EncodedSource):
                data = source.read(i)
                return (bytes_need_check(data) and check_bytes(data)) or np.frombuffer(data, np.uint8)
            return np.asarray(source.load(i))
        except CorruptImageError as error:
            return error.reason

    def _name(self, i: int) -> NDArray[np.uint8]:
        assert isinstance(self.source, FileSource)
        return np.frombuffer(os.fsencode(self.source.path(i).absolute()), np.uint8)
