"""Two views of each image by PIL and torchvision on CPU threads, for where DALI is not.

Draws the same crops, colours and blurs as the DALI loader (see `byol_fast.data.views`); the pixels differ by the
rounding of the operators. PIL releases the interpreter's lock while it decodes and resizes, so threads share the work
and nothing needs to be copied between processes.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms.v2 import functional as F

from byol_fast.config import Config, ViewConfig
from byol_fast.data.batch import Batch
from byol_fast.data.integrity import BadImageError, BadImages
from byol_fast.data.loader import Plan, PlannedLoader, thread_count
from byol_fast.data.sources import ImageSource
from byol_fast.data.views import BRIGHTNESS, CONTRAST, HUE, SATURATION, ViewDraws, crop_windows

_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class _Started:
    """A batch that threads are working on."""

    def __init__(
        self,
        plan: Plan,
        views: list[torch.Tensor],
        make: Callable[[Plan, int], None],
        pool: ThreadPoolExecutor,
    ) -> None:
        self.plan, self.views, self._make = plan, views, make
        self.work = [pool.submit(make, plan, row) for row in range(len(plan.index))]

    def failures(self) -> list[tuple[int, str]]:
        """Wait for all rows; the images that could not be read, and why."""
        bad = []
        for row, part in enumerate(self.work):
            try:
                part.result()
            except BadImageError as error:
                bad.append((int(self.plan.index[row]), error.reason))
        return bad

    def change(self, plan: Plan, pool: ThreadPoolExecutor) -> None:
        """Make the rows anew in which the plan has another image now."""
        for row in np.flatnonzero(plan.index != self.plan.index).tolist():
            self.work[row] = pool.submit(self._make, plan, row)
        self.plan = plan


class TorchvisionLoader(PlannedLoader):
    """Two views of each image by PIL and torchvision.

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
        self.backend = "torchvision"
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: deque[_Started] = deque()

    def _made_by(self) -> str:
        return f"torchvision {torchvision.__version__}"

    def _make(self) -> Batch:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(thread_count(self.config.data.threads), "byol-fast-views")
        while len(self._ahead) <= self.config.data.prefetch:
            self._ahead.append(self._begin(self._pool, self._step + len(self._ahead)))
        started = self._ahead[0]
        while bad := started.failures():
            self.bad.add(bad, self._step)
            started.change(self.planner(self._step), self._pool)
        self._ahead.popleft()
        view1, view2 = (view.permute(0, 3, 1, 2).to(self.device, non_blocking=True) for view in started.views)
        return Batch(view1, view2, torch.from_numpy(started.plan.index.copy()))

    def _begin(self, pool: ThreadPoolExecutor, step: int) -> _Started:
        configs = (self.config.view1, self.config.view2)
        shape = (self.batch_size, configs[0].size, configs[0].size, 3)
        views = [torch.empty(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda") for _ in configs]
        arrays = [view.numpy() for view in views]

        def make(plan: Plan, row: int) -> None:
            image = self.source.load(int(plan.index[row]))
            for array, config, draws in zip(arrays, configs, plan.draws, strict=True):
                array[row] = augment(image, draws, row, config)

        return _Started(self.planner(step), views, make, pool)

    def _restart(self) -> None:
        for started in self._ahead:
            for part in started.work:
                part.cancel()
        self._ahead.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=True)
            self._pool = None


def augment(image: Image.Image, d: ViewDraws, i: int, view: ViewConfig) -> NDArray[np.uint8]:
    """One view `[S, S, 3]` of an RGB image with the parameters in row i of `d`.

    The order is the reference's: crop, flip, jitter, grayscale, blur, solarize.
    """
    top, left, h, w = crop_windows(d.crop[i : i + 1], image.height, image.width, view.aspect)[0].tolist()
    x = image.crop((left, top, left + w, top + h)).resize((view.size, view.size), _RESAMPLING[view.interpolation])
    if d.flip[i]:
        x = x.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if d.jitter[i]:
        x = jitter(x, d.factors[i], d.order[i])
    if d.grayscale[i]:
        x = x.convert("L").convert("RGB")
    y = np.array(x)
    if d.blur[i]:
        y = blur(y, float(d.sigma[i]), int(d.window[i]))
    if d.solarize[i]:
        y = np.where(y < view.solarize_threshold, y, 255 - y)
    return y


def jitter(x: Image.Image, factors: NDArray[np.float32], order: NDArray[np.int32]) -> Image.Image:
    """Brightness, contrast, saturation and hue in the given order."""
    parts: dict[int, Callable[[Image.Image, float], Image.Image]] = {
        BRIGHTNESS: F.adjust_brightness,
        CONTRAST: F.adjust_contrast,
        SATURATION: F.adjust_saturation,
        HUE: F.adjust_hue,
    }
    for part in order.tolist():
        factor = float(factors[part])
        if factor != (0.0 if part == HUE else 1.0):
            x = parts[part](x, factor)
    return x


def blur(x: NDArray[np.uint8], sigma: float, window: int) -> NDArray[np.uint8]:
    """Gaussian blur of `[H, W, 3]` with a window of that many pixels, mirrored at the borders."""
    radius = window // 2
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2).astype(np.float32)
    weights /= weights.sum()
    y = x.astype(np.float32)
    for axis in (0, 1):
        pad = [(radius, radius) if a == axis else (0, 0) for a in range(3)]
        padded = np.pad(y, pad, mode="reflect")
        n = x.shape[axis]
        y = weights[radius] * y
        for k in range(radius):
            # the window is symmetric: one multiplication for both sides
            low, high = (np.take(padded, range(s, s + n), axis=axis) for s in (k, window - 1 - k))
            y += weights[k] * (low + high)
    return np.rint(y).astype(np.uint8)


def eval_batches(
    source: ImageSource,
    size: int,
    batch_size: int,
    *,
    interpolation: Literal["bicubic", "bilinear"],
    threads: int,
    device: torch.device,
    bad: BadImages,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """See `byol_fast.data.eval_batches`."""
    chunks = iter([np.arange(i, min(i + batch_size, len(source))) for i in range(0, len(source), batch_size)])
    pool = ThreadPoolExecutor(thread_count(threads), "byol-fast-eval")

    def make(i: int) -> NDArray[np.uint8] | str:
        try:
            return centre(source.load(i), size, interpolation)
        except BadImageError as error:
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
