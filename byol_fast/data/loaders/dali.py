"""Two views of each image in one DALI graph, augmented or only cropped, and plain resized images for evaluation.

Our kernels color and blur the crops of the graph, or its own operators do (`DataConfig.augment`, `dali_views.py`).
The graph is the same on the CPU and on a GPU (there, decoding is "mixed" and all else runs on the device). Images
are decoded once. All random numbers come from `byol_fast.data.augment_params` as inputs of the graph: DALI has no state
that would have to be saved: a batch is a function of its number.

Import this module only where DALI is wanted: it imports DALI.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

# DALI takes host memory below this size from malloc, by default 32 MB: every intermediate image of a batch is then
# mapped and faulted in anew. With its own pool 224 px views take about a fifth less CPU time.
os.environ.setdefault("DALI_MALLOC_POOL_THRESHOLD", "256k")

import nvidia.dali
import nvidia.dali.math as dm
from nvidia.dali.pipeline import Pipeline, pipeline_def

from byol_fast.config import Config, ViewConfig
from byol_fast.data.augment import Views, chosen, finish, joined, needed, parts
from byol_fast.data.batch import Batch
from byol_fast.data.integrity import CorruptImageError, CorruptImages, bytes_need_check, check_bytes
from byol_fast.data.loaders.base import PlannedLoader, thread_count
from byol_fast.data.loaders.dali_views import CROPS_ONLY, INTERPOLATION, Node, augment, fn, types, view_inputs
from byol_fast.data.loaders.factory import resolve
from byol_fast.data.loaders.prefetch import SideStream, single_core_threads
from byol_fast.data.reader import Encoding, Reader
from byol_fast.data.sampler import Plan
from byol_fast.data.sources import EncodedSource, ImageSource

Feed = Callable[[], list[Any]]


class DaliLoader(PlannedLoader):
    """Two views of each image by DALI.

    Batches are raw: uint8, `[B, 3, S, S]`, channels_last without a copy, on `device`. They stay valid while held.
    """

    _pipe: Pipeline | None = None
    _reader: Reader[Plan] | None = None

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
        self._kernels = resolve(config.data, source, device).augment == "kernels"
        self.backend = f"dali {device}" + (", kernels" if self._kernels else "")
        self._views = (config.view1, config.view2)
        self._names = tuple(needed(view, flip=False) for view in self._views)  # the graph mirrors for free
        self._side_stream = SideStream(device, ahead=config.data.prefetch + 1)
        self._in_flight: deque[Plan] = deque()
        self._on_threads = self._kernels and device.type == "cpu"  # our kernels, beside the graph
        self._pool: ThreadPoolExecutor | None = None
        self._finishing: deque[tuple[Plan, list[Future[Views]]]] = deque()

    def _made_by(self) -> str:
        kernels = ", kernels" if self._kernels else ""
        return f"dali {nvidia.dali.__version__} on {self.device.type}{kernels}"

    def _make(self) -> Batch:
        while True:
            try:
                if self._pipe is None:
                    self._pipe = self._build()
                return self._next(self._pipe)
            except CorruptImageError:
                self._restart()
                raise
            except RuntimeError as error:
                in_flight = [plan.index for plan in self._in_flight]
                self._restart()  # an error leaves a DALI pipeline unusable
                self.bad.add(_find_bad(error, self.source, in_flight, self.bad, self.device), self._step)

    def _next(self, pipe: Pipeline) -> Batch:
        """The next batch. Whatever makes it, all that describes it comes from the plan that left the queue with it."""
        if self._on_threads:
            while len(self._finishing) < 2:  # the one before it is finished while the graph makes the next
                self._finishing.append(self._finish_on_threads(*self._crops(pipe)))
            plan, work = self._finishing.popleft()
            views = joined(work)
        elif self._kernels:
            plan, views = self._finish_on_side_stream(pipe)
        else:
            plan, views = self._crops(pipe)
        return self._batch(views, plan.index)

    def _crops(self, pipe: Pipeline) -> tuple[Plan, Views]:
        """Run the graph: the plan of the next batch and its crops `[B, 3, S, S]`.

        The queue of plans is empty until the first run feeds the graph, so it is only read afterwards.
        """
        view1, view2 = _run(pipe, self.device)
        return self._in_flight.popleft(), (view1.permute(0, 3, 1, 2), view2.permute(0, 3, 1, 2))

    def _finished(self, plan: Plan, crops: Views, rows: slice) -> Views:
        """Colors, blur and solarization of some rows."""
        first, second = (
            finish(view[rows], chosen(d, names, rows), config)
            for view, d, names, config in zip(crops, plan.draws, self._names, self._views, strict=True)
        )
        return first, second

    def _finish_on_side_stream(self, pipe: Pipeline) -> tuple[Plan, Views]:
        plans: list[Plan] = []

        def make() -> Views:
            plan, crops = self._crops(pipe)
            plans.append(plan)
            return self._finished(plan, crops, slice(None))

        views = self._side_stream(make)
        return plans[0], views

    def _finish_on_threads(self, plan: Plan, crops: Views) -> tuple[Plan, list[Future[Views]]]:
        threads = thread_count(self.config.data.threads)
        if self._pool is None:
            self._pool = single_core_threads(threads, "byol-fast-views")
        pieces = parts(self.batch_size, self._views[0].size, threads)
        return plan, [self._pool.submit(self._finished, plan, crops, rows) for rows in pieces]

    def _restart(self) -> None:
        self._pipe = None
        self._in_flight.clear()
        self._finishing.clear()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _build(self) -> Pipeline:
        read = self._reader = Reader(
            self.source, self.planner, self.bad, threads=thread_count(self.config.data.threads)
        )
        size = read.size
        views = self._views
        if self._kernels:
            views = replace(views[0], **CROPS_ONLY), replace(views[1], **CROPS_ONLY)
        steps = iter(range(self._step, 2**62))

        def feed() -> list[Any]:
            plan, images = read(next(steps))
            self._in_flight.append(plan)
            first, second = (view_inputs(d, v, size) for d, v in zip(plan.draws, views, strict=True))
            return [images, *first.values(), *second.values()]

        example = self.planner(self._step).draws
        return _two_views(
            feed,
            names=[list(view_inputs(d, v, size)) for d, v in zip(example, views, strict=True)],
            encoding=read.encoding,
            gpu=self.device.type == "cuda",
            views=views,
            hw_decoder_load=self.config.data.hw_decoder_load,
            **_pipeline_options(self.batch_size, self.config.data.threads, self.config.data.prefetch, self.device),
        )


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
    rest = np.arange(len(source))
    while len(rest := np.array([i for i in rest.tolist() if i not in bad.by_index], np.int64)):
        chunks = [_Chunk(rest[i : i + batch_size]) for i in range(0, len(rest), batch_size)]
        for images, index in _centres(source, chunks, size, batch_size, interpolation, threads, device, bad):
            yield images.permute(0, 3, 1, 2), index
            rest = rest[rest > int(index[-1])]


@dataclass(frozen=True)
class _Chunk:
    index: NDArray[np.int64]


def _centres(
    source: ImageSource,
    chunks: list[_Chunk],
    size: int,
    batch_size: int,
    interpolation: str,
    threads: int,
    device: torch.device,
    bad: CorruptImages,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The middles of images; ends early where DALI met bad ones, which are known then."""

    def plan(number: int) -> _Chunk:
        return _Chunk(np.array([i for i in chunks[number].index.tolist() if i not in bad.by_index], np.int64))

    read = Reader(source, plan, bad, threads=thread_count(threads))
    numbers = iter(range(len(chunks)))
    in_flight: deque[NDArray[np.int64]] = deque()

    def feed() -> Any:
        for number in numbers:
            chunk, images = read(number, last=len(chunks) - 1)
            if len(chunk.index):
                in_flight.append(chunk.index)
                return images
        raise StopIteration

    pipe = _centre(
        feed,
        encoding=read.encoding,
        gpu=device.type == "cuda",
        size=size,
        interpolation=interpolation,
        **_pipeline_options(batch_size, threads, 2, device),
    )
    try:
        while True:
            try:
                (images,) = _run(pipe, device)
            except StopIteration:
                return
            yield images, torch.from_numpy(in_flight.popleft())
    except RuntimeError as error:
        bad.add(_find_bad(error, source, list(in_flight), bad, device), 0)
    finally:
        read.close()


# ---- between Python and DALI ---------------------------------------------------------------------------------------


def _pipeline_options(batch_size: int, threads: int, prefetch: int, device: torch.device) -> dict[str, Any]:
    gpu = device.type == "cuda"
    return {
        "batch_size": batch_size,
        "num_threads": thread_count(threads),
        "device_id": (torch.cuda.current_device() if device.index is None else device.index) if gpu else None,
        "prefetch_queue_depth": prefetch,
        "seed": 0,  # not used: nothing in these graphs is random
    }


def _run(pipe: Pipeline, device: torch.device) -> list[torch.Tensor]:
    """The next outputs, without a copy, ready on torch's current stream without making the host wait."""
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    return [torch.utils.dlpack.from_dlpack(output.as_tensor()) for output in pipe.run(stream)]


def _find_bad(
    error: RuntimeError,
    source: ImageSource,
    in_flight: list[NDArray[np.int64]],
    bad: CorruptImages,
    device: torch.device,
) -> list[tuple[int, str]]:
    """Which images stopped DALI, and why: of those that do not begin and end as they should, else of all.

    Raises:
        RuntimeError: all of them can be decoded, so that it was something else.
    """
    message = str(error)
    if isinstance(source, EncodedSource):
        index = list(dict.fromkeys(int(i) for batch in in_flight for i in batch))
        index.sort(key=lambda i: source.sample_name(i) not in message)
        for check in (_check_if_needed, lambda s, i: _check_by_dali(s, i, device)):
            found = []
            for i in index:
                if (reason := check(source, i)) is not None:
                    found.append((i, reason))
                    if not bad.skip:
                        break
            if found:
                return found
    raise RuntimeError(f"DALI stopped, though all images of the batch can be read: {message}") from error


def _check_if_needed(source: EncodedSource, i: int) -> str | None:
    try:
        data = source.read(i)
    except CorruptImageError as error:
        return error.reason
    return check_bytes(data) if bytes_need_check(data) else None


def _check_by_dali(source: EncodedSource, i: int, device: torch.device) -> str | None:
    try:
        data = source.read(i)
        pipe = _decoded(
            lambda: [np.frombuffer(data, np.uint8)],
            gpu=device.type == "cuda",
            **_pipeline_options(1, 1, 1, device),
        )
        _run(pipe, device)
    except CorruptImageError as error:
        return error.reason
    except RuntimeError as error:
        said = [line for line in str(error).splitlines() if "failure" in line or "rror" in line]
        return check_bytes(data) or f"cannot be decoded by DALI ({said[-1] if said else error})"
    return None


# ---- the graphs ----------------------------------------------------------------------------------------------------


@pipeline_def(enable_conditionals=True)
def _two_views(
    feed: Feed,
    *,
    names: list[list[str]],
    encoding: Encoding,
    gpu: bool,
    views: tuple[ViewConfig, ViewConfig],
    hw_decoder_load: float,
) -> Any:
    data, *inputs = fn.external_source(source=feed, num_outputs=1 + len(names[0]) + len(names[1]), batch=True)
    image = _image(data, encoding, gpu, hw_decoder_load=hw_decoder_load)
    first = {name: inputs[i] for i, name in enumerate(names[0])}
    second = {name: inputs[len(names[0]) + i] for i, name in enumerate(names[1])}
    return augment(image, first, views[0], gpu), augment(image, second, views[1], gpu)


@pipeline_def
def _centre(feed: Callable[[], Any], *, encoding: Encoding, gpu: bool, size: int, interpolation: str) -> Any:
    image = _image(fn.external_source(source=feed, batch=True), encoding, gpu)
    shape = image.shape()
    height, width = fn.cast(shape[0], dtype=types.FLOAT64), fn.cast(shape[1], dtype=types.FLOAT64)
    shorter, larger = dm.min(height, width), float(round(size * 256 / 224))
    fits = fn.cast(shorter == float(size), dtype=types.FLOAT64)
    resized = dm.floor(fn.stack(height, width) * (larger - fits * (larger - size)) / shorter)
    image = fn.resize(
        image, size=fn.cast(resized, dtype=types.FLOAT), interp_type=INTERPOLATION[interpolation], antialias=True
    )
    start = fn.cast(dm.floor((resized - float(size)) * 0.5), dtype=types.INT32)
    return fn.slice(image, start, (size, size), axes=(0, 1))


@pipeline_def
def _decoded(feed: Callable[[], list[Any]], *, gpu: bool) -> Any:
    return _image(fn.external_source(source=feed, batch=True), "bytes", gpu)


def _image(data: Node, encoding: Encoding, gpu: bool, **on_gpu: float) -> Node:
    """RGB images `[H, W, 3]` from names of files, their contents, or arrays."""
    if encoding != "array":
        return fn.decoders.image(
            # Not mapped: a file that another program cuts short meanwhile would end the process (SIGBUS).
            fn.io.file.read(data, dont_use_mmap=True) if encoding == "file" else data,
            device="mixed" if gpu else "cpu",
            output_type=types.RGB,
            adjust_orientation=False,
            **(on_gpu if gpu else {}),
        )
    image = fn.reinterpret(data, layout="HWC")
    return image.gpu() if gpu else image
