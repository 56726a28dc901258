"""Two views of each image on CPU threads: torchvision's decoder, then our crop, color and blur operators.

Augmentation parameters are those of all other loaders (see `byol_fast.data.augment_params`); pixels differ by the
rounding of decoder and crop. Decoders and operators release the interpreter's lock, so threads share the work and
nothing needs to be copied between processes.
"""

from __future__ import annotations

import itertools
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from byol_fast.config import Config
from byol_fast.data.augment import chosen, finish, needed, parts
from byol_fast.data.augment_params import crop_window, crop_windows
from byol_fast.data.batch import Batch
from byol_fast.data.integrity import CorruptImageError, CorruptImages
from byol_fast.data.loaders.base import PlannedLoader, thread_count
from byol_fast.data.loaders.prefetch import SideStream, single_core_threads
from byol_fast.data.sampler import Plan
from byol_fast.data.sources import ArraySource, EncodedSource, ImageSource
from byol_kernels import resized_crop

# torchvision's decoder of JPEGs, by its operator: the function around it warns that it will go one day. PIL decodes
# then.
_decode_jpeg: Any = getattr(torch.ops.image, "decode_jpeg", None)
_RGB = 3

_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}

Rows = slice
Bad = list[tuple[int, str]]
Make = Callable[[Plan, Rows], Bad]


class _Started:
    """A batch that threads are working on."""

    def __init__(
        self, plan: Plan, views: list[Tensor], make: Make, pool: ThreadPoolExecutor, tasks: Iterable[Rows]
    ) -> None:
        self.plan, self.views, self._make = plan, views, make
        self.work = [pool.submit(make, plan, rows) for rows in tasks]

    def failures(self) -> Bad:
        """Wait for all rows; the images that could not be read, and why."""
        return [bad for part in self.work for bad in part.result()]

    def change(self, plan: Plan, pool: ThreadPoolExecutor) -> None:
        """Make the rows anew in which the plan has another image now."""
        changed = np.flatnonzero(plan.index != self.plan.index).tolist()
        self.work = [pool.submit(self._make, plan, slice(row, row + 1)) for row in changed]
        self.plan = plan


class TorchvisionLoader(PlannedLoader):
    """Two views of each image: crops on CPU threads, color and blur there as well or, where there is one, on a GPU.

    Batches are raw: uint8, `[B, 3, S, S]`, channels_last, on `device`.
    """

    def __init__(
        self,
        source: ImageSource,
        config: Config,
        *,
        device: torch.device,
        shard_id: int = 0,
        num_shards: int = 1,
        report: Path | None = None,
    ) -> None:
        super().__init__(source, config, device=device, shard_id=shard_id, num_shards=num_shards, report=report)
        self.backend = "torchvision, kernels"
        self._views = (config.view1, config.view2)
        self._names = tuple(needed(view) for view in self._views)
        self._side_stream = SideStream(device, ahead=config.data.prefetch + 1)
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: deque[_Started] = deque()

    def _made_by(self) -> str:
        return f"torchvision {torchvision.__version__}, kernels"

    def _make(self) -> Batch:
        threads = thread_count(self.config.data.threads)
        if self._pool is None:
            self._pool = single_core_threads(threads, "byol-fast-views")
        while len(self._ahead) <= self.config.data.prefetch:
            self._ahead.append(self._begin(self._pool, threads, self._step + len(self._ahead)))
        started = self._ahead[0]
        while bad := started.failures():
            try:
                self.bad.add(bad, self._step)
            except CorruptImageError:
                self._restart()  # so that the next call tries again
                raise
            started.change(self.planner(self._step), self._pool)
        self._ahead.popleft()
        view1, view2 = self._side_stream(partial(self._placed, started))
        return self._batch((view1, view2), started.plan.index)

    def _begin(self, pool: ThreadPoolExecutor, threads: int, step: int) -> _Started:
        shape = (self.batch_size, self._views[0].size, self._views[0].size, 3)
        gpu = self.device.type == "cuda"
        views = [torch.empty(shape, dtype=torch.uint8, pin_memory=gpu).permute(0, 3, 1, 2) for _ in self._views]
        make = partial(self._make_rows, views)
        tasks = parts(self.batch_size, self._views[0].size, threads)
        return _Started(self.planner(step), views, make, pool, tasks)

    def _placed(self, started: _Started) -> tuple[Tensor, Tensor]:
        """The views on the device, and finished there if the threads made crops only."""
        first, second = started.views
        if self.device.type == "cpu":
            return first, second
        first, second = (view.to(self.device, non_blocking=True) for view in (first, second))
        first, second = (
            finish(view, chosen(d, names, slice(None)), config)
            for view, d, names, config in zip(
                (first, second), started.plan.draws, self._names, self._views, strict=True
            )
        )
        return first, second

    def _make_rows(self, views: list[Tensor], plan: Plan, rows: Rows) -> Bad:
        size = self._views[0].size
        gpu = self.device.type == "cuda"
        bad: Bad = []
        if gpu:
            targets = [view[rows] for view in views]
        else:
            shape = (rows.stop - rows.start, size, size, 3)
            targets = [torch.empty(shape, dtype=torch.uint8).permute(0, 3, 1, 2) for _ in views]
        if isinstance(self.source, ArraySource):
            self._crops_of_arrays(self.source, targets, plan, rows)
        else:
            bad = self._crops_of_files(targets, plan, rows)
        if not gpu:
            for view, crops, draws, names, config in zip(
                views, targets, plan.draws, self._names, self._views, strict=True
            ):
                view[rows] = finish(crops, chosen(draws, names, rows), config)
        return bad

    def _crops_of_arrays(self, source: ArraySource, crops: list[Tensor], plan: Plan, rows: Rows) -> None:
        images = torch.from_numpy(source.images[plan.index[rows]]).permute(0, 3, 1, 2)
        for crop, draws, config in zip(crops, plan.draws, self._views, strict=True):
            windows = crop_windows(draws.crop[rows], images.shape[2], images.shape[3], config.aspect)
            crop[:] = resized_crop(images, torch.from_numpy(windows), config.size, interpolation=config.interpolation)

    def _crops_of_files(self, crops: list[Tensor], plan: Plan, rows: Rows) -> Bad:
        bad: Bad = []
        for k, row in enumerate(range(rows.start, rows.stop)):
            try:
                image = decoded(self.source, int(plan.index[row]))
            except CorruptImageError as error:
                bad.append((int(plan.index[row]), error.reason))
                continue
            for crop, draws, config in zip(crops, plan.draws, self._views, strict=True):
                window = torch.tensor([crop_window(draws.crop[row], image.shape[2], image.shape[3], config.aspect)])
                crop[k] = resized_crop(image, window, config.size, interpolation=config.interpolation)[0]
        return bad

    def _restart(self) -> None:
        for started in self._ahead:
            for part in started.work:
                part.cancel()
        self._ahead.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=True)
            self._pool = None


def decoded(source: ImageSource, i: int) -> Tensor:
    """Image `i` of a source in RGB, uint8 `[1, 3, H, W]`, channels_last: what `source.load` gives.

    Ordinary JPEGs are decoded by torchvision, faster than by PIL and to the same bytes.

    Raises:
        CorruptImageError: the image cannot be decoded.
    """
    if isinstance(source, EncodedSource):
        data = source.read(i)
        if _decode_jpeg is not None and is_ordinary_jpeg(data):
            try:
                image: Tensor = _decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), _RGB)
                return image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
            except RuntimeError:
                pass  # PIL says what is wrong with it
    return torch.from_numpy(np.array(source.load(i)))[None].permute(0, 3, 1, 2)


def is_ordinary_jpeg(data: bytes) -> bool:
    """Whether an image is a baseline or progressive JPEG of 8 bits, gray or with three colors, of no forbidding size.

    Others, CMYK above all, are converted to RGB in more than one way: PIL's is ours.
    """
    at = 2
    while data[:2] == b"\xff\xd8" and at + 10 <= len(data) and data[at] == 0xFF:
        marker, length = struct.unpack_from(">BH", data, at + 1)
        if marker in {0xC0, 0xC1, 0xC2}:
            bits, height, width, components = struct.unpack_from(">BHHB", data, at + 4)
            most = Image.MAX_IMAGE_PIXELS or 1 << 32
            return bits == 8 and components in {1, 3} and 0 < height * width <= most
        if 0xC0 <= marker <= 0xCF and marker != 0xC4:
            return False
        at += 2 + length
    return False


def eval_batches(
    source: ImageSource,
    size: int,
    batch_size: int,
    *,
    interpolation: Literal["bicubic", "bilinear"],
    threads: int,
    device: torch.device,
    bad: CorruptImages,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """See `byol_fast.data.eval_batches`."""
    chunks = iter([np.arange(i, min(i + batch_size, len(source))) for i in range(0, len(source), batch_size)])
    pool = ThreadPoolExecutor(thread_count(threads), "byol-fast-eval")

    def make(i: int) -> NDArray[np.uint8] | str:
        try:
            return centre(source.load(i), size, interpolation)
        except CorruptImageError as error:
            return error.reason

    def begin(index: NDArray[np.int64]) -> tuple[NDArray[np.int64], list[Future[NDArray[np.uint8] | str]]]:
        return index, [pool.submit(make, int(i)) for i in index]

    try:
        ahead = deque(begin(index) for index in itertools.islice(chunks, 2))
        while ahead:
            index, work = ahead.popleft()
            ahead.extend(begin(index) for index in itertools.islice(chunks, 1))
            made = [part.result() for part in work]
            bad.add([(int(i), row) for i, row in zip(index, made, strict=True) if isinstance(row, str)], 0)
            good = [i for i, row in enumerate(made) if not isinstance(row, str)]
            if good:
                images = torch.from_numpy(np.stack([row for row in made if not isinstance(row, str)]))
                yield images.permute(0, 3, 1, 2).to(device), torch.from_numpy(index[good])
    finally:
        pool.shutdown(cancel_futures=True)


def centre(image: Image.Image, size: int, interpolation: Literal["bicubic", "bilinear"]) -> NDArray[np.uint8]:
    """The middle `[size, size, 3]` of an RGB image; see `byol_fast.data.eval_batches`."""
    shorter = min(image.size)
    target = size if shorter == size else round(size * 256 / 224)
    w, h = (side * target // shorter for side in image.size)
    left, top = (w - size) // 2, (h - size) // 2
    x = image.resize((w, h), _RESAMPLING[interpolation])
    return np.array(x.crop((left, top, left + size, top + size)))
