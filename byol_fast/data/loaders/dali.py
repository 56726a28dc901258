"""Two views of each image in one DALI graph, augmented or only cropped, and plain resized images for evaluation.

Colours and blur are the graph's own operators, or our kernels take its crops and do the rest (`DataConfig.augment`).
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
from byol_fast.data.augment_params import ATTEMPTS, BRIGHTNESS, CONTRAST, HUE, SATURATION, ViewDraws, crop_windows
from byol_fast.data.batch import Batch
from byol_fast.data.integrity import BadImageError, BadImages, check_bytes, suspicious_bytes
from byol_fast.data.loaders.base import PlannedLoader, thread_count
from byol_fast.data.loaders.factory import resolve
from byol_fast.data.loaders.prefetch import SideStream, single_core_threads
from byol_fast.data.reader import Encoding, Reader
from byol_fast.data.sampler import Plan
from byol_fast.data.sources import EncodedSource, ImageSource

_dali: Any = nvidia.dali  # much of it is made at import time, out of sight of a type checker
fn, types = _dali.fn, _dali.types
Node = Any  # nvidia.dali.data_node.DataNode, with the operators of arithmetic
Feed = Callable[[], list[Any]]

CROPS_ONLY: dict[str, Any] = {"jitter": 0.0, "grayscale": 0.0, "blur": 0.0, "solarize": 0.0}
"""Changes of a view's configuration for a graph that leaves the rest to our kernels."""

_INTERPOLATION = {"bicubic": types.INTERP_CUBIC, "bilinear": types.INTERP_LINEAR}


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
            except BadImageError:
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
        """Colours, blur and solarization of some rows."""
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
            first, second = (
                _inputs(d, v, self.config.data.color, size) for d, v in zip(plan.draws, views, strict=True)
            )
            return [images, *first.values(), *second.values()]

        example = self.planner(self._step).draws
        return _two_views(
            feed,
            names=[list(_inputs(d, v, self.config.data.color, size)) for d, v in zip(example, views, strict=True)],
            encoding=read.encoding,
            gpu=self.device.type == "cuda",
            views=views,
            color=self.config.data.color,
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
    bad: BadImages,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """See `byol_fast.data.eval_batches`."""
    rest = np.arange(len(source))
    while len(rest := np.array([i for i in rest.tolist() if i not in bad.found], np.int64)):
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
    bad: BadImages,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The middles of images; ends early where DALI met bad ones, which are known then."""

    def plan(number: int) -> _Chunk:
        return _Chunk(np.array([i for i in chunks[number].index.tolist() if i not in bad.found], np.int64))

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


def _inputs(d: ViewDraws, view: ViewConfig, color: str, size: tuple[int, int] | None) -> dict[str, NDArray[Any]]:
    """The draws of a view as its graph takes them: what the view needs, one array `[B, ...]` for each use.

    DALI spends about as much on picking a number out of an array as on a small operator, so nothing is left to pick.
    """
    inputs: dict[str, NDArray[Any]] = {}
    if size is None:
        inputs["sizes"] = np.stack([d.crop[:, ATTEMPTS : 2 * ATTEMPTS], d.crop[:, :ATTEMPTS]], axis=2)
        inputs["position"] = d.crop[:, 2 * ATTEMPTS :]
        inputs["mirror"] = d.flip.astype(np.float64)
    else:
        window = crop_windows(d.crop, *size, view.aspect)
        inputs["start"], inputs["extent"] = window[:, :2], window[:, 2:]
        inputs["from"], inputs["to"] = _corners(window[:, 2:].astype(np.float32), d.flip)
    if view.jitter > 0:
        inputs["jitter"] = d.jitter
        if view.hue > 0:
            inputs["hue"] = d.factors[:, HUE]
        if color == "exact" and _has_affine_parts(view):
            is_hue = d.order == HUE
            parts = d.order[~is_hue].reshape(-1, 3)
            values = np.take_along_axis(d.factors, parts, axis=1)
            inputs["hue_at"] = is_hue.argmax(axis=1).astype(np.int32)
            for k in range(3):
                inputs[f"part{k}"], inputs[f"value{k}"] = parts[:, k], values[:, k]
        elif color == "hsv":
            b, c, s = d.factors[:, BRIGHTNESS], d.factors[:, CONTRAST], d.factors[:, SATURATION]
            inputs["weight"], inputs["gray_weight"], inputs["mean_weight"] = b * c * s, b * c * (1 - s), b * (1 - c)
    if view.grayscale > 0:
        inputs["grayscale"] = d.grayscale
    if view.blur > 0:
        inputs["blur"], inputs["sigma"], inputs["window"] = d.blur, d.sigma, d.window
    if view.solarize > 0:
        inputs["solarize"] = d.solarize
    return {name: np.ascontiguousarray(value) for name, value in inputs.items()}


def _corners(extent: NDArray[np.float32], flip: NDArray[np.bool_]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Where a resize begins and ends in a crop `[B, (h, w)]`: a mirrored one runs from right to left."""
    begin, end = np.zeros_like(extent), extent.copy()
    begin[flip, 1], end[flip, 1] = extent[flip, 1], 0
    return begin, end


def _run(pipe: Pipeline, device: torch.device) -> list[torch.Tensor]:
    """The next outputs, without a copy, ready on torch's current stream without making the host wait."""
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    return [torch.utils.dlpack.from_dlpack(output.as_tensor()) for output in pipe.run(stream)]


def _find_bad(
    error: RuntimeError, source: ImageSource, in_flight: list[NDArray[np.int64]], bad: BadImages, device: torch.device
) -> list[tuple[int, str]]:
    """Which images stopped DALI, and why: of those that do not begin and end as they should, else of all.

    Raises:
        RuntimeError: all of them can be decoded, so that it was something else.
    """
    message = str(error)
    if isinstance(source, EncodedSource):
        index = list(dict.fromkeys(int(i) for batch in in_flight for i in batch))
        index.sort(key=lambda i: source.where(i) not in message)
        for check in (_check_suspicious, lambda s, i: _check_by_dali(s, i, device)):
            found = []
            for i in index:
                if (reason := check(source, i)) is not None:
                    found.append((i, reason))
                    if not bad.skip:
                        break
            if found:
                return found
    raise RuntimeError(f"DALI stopped, though all images of the batch can be read: {message}") from error


def _check_suspicious(source: EncodedSource, i: int) -> str | None:
    try:
        data = source.read(i)
    except BadImageError as error:
        return error.reason
    return check_bytes(data) if suspicious_bytes(data) else None


def _check_by_dali(source: EncodedSource, i: int, device: torch.device) -> str | None:
    try:
        data = source.read(i)
        pipe = _decoded(
            lambda: [np.frombuffer(data, np.uint8)],
            gpu=device.type == "cuda",
            **_pipeline_options(1, 1, 1, device),
        )
        _run(pipe, device)
    except BadImageError as error:
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
    color: str,
    hw_decoder_load: float,
) -> Any:
    data, *inputs = fn.external_source(source=feed, num_outputs=1 + len(names[0]) + len(names[1]), batch=True)
    image = _image(data, encoding, gpu, hw_decoder_load=hw_decoder_load)
    first = {name: inputs[i] for i, name in enumerate(names[0])}
    second = {name: inputs[len(names[0]) + i] for i, name in enumerate(names[1])}
    return augment(image, first, views[0], color, gpu), augment(image, second, views[1], color, gpu)


@pipeline_def
def _centre(feed: Callable[[], Any], *, encoding: Encoding, gpu: bool, size: int, interpolation: str) -> Any:
    image = _image(fn.external_source(source=feed, batch=True), encoding, gpu)
    shape = image.shape()
    height, width = fn.cast(shape[0], dtype=types.FLOAT64), fn.cast(shape[1], dtype=types.FLOAT64)
    shorter, larger = dm.min(height, width), float(round(size * 256 / 224))
    fits = fn.cast(shorter == float(size), dtype=types.FLOAT64)
    resized = dm.floor(fn.stack(height, width) * (larger - fits * (larger - size)) / shorter)
    image = fn.resize(
        image, size=fn.cast(resized, dtype=types.FLOAT), interp_type=_INTERPOLATION[interpolation], antialias=True
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


def augment(image: Node, inputs: dict[str, Node], view: ViewConfig, color: str, gpu: bool) -> Node:
    """One view `[S, S, 3]` of an image, in the reference's order: crop, flip, jitter, grayscale, blur, solarize."""
    x = crop_flip(image, inputs, view)
    if view.jitter > 0 and inputs["jitter"]:
        x = jitter_exact(x, inputs, view, gpu) if color == "exact" else jitter_hsv(x, inputs, view, gpu)
    if view.grayscale > 0 and inputs["grayscale"]:
        x = grayscale(x)
    if view.blur > 0 and inputs["blur"]:
        x = fn.gaussian_blur(x, sigma=inputs["sigma"], window_size=inputs["window"])
    if view.solarize > 0 and inputs["solarize"]:
        x = solarize(x, view.solarize_threshold)
    return x


def crop_flip(image: Node, inputs: dict[str, Node], view: ViewConfig) -> Node:
    """Cut out, resize, mirror or not.

    The crop is cut out before it is resized: DALI's own random resized crop lets the filter reach beyond the crop
    (up to 60 levels at the border). The resize mirrors for free.
    """
    if "start" not in inputs:
        inputs = inputs | crop_window_in_graph(image, inputs, view)
    return fn.resize(
        fn.slice(image, inputs["start"], inputs["extent"], axes=(0, 1)),
        size=(view.size, view.size),
        roi_start=inputs["from"],
        roi_end=inputs["to"],
        interp_type=_INTERPOLATION[view.interpolation],
        antialias=True,
    )


def crop_window_in_graph(image: Node, inputs: dict[str, Node], view: ViewConfig) -> dict[str, Node]:
    """`views.crop_windows` for images whose size only the decoder knows; vectors are (height, width)."""
    shape = image.shape()
    height, width = fn.cast(shape[0], dtype=types.FLOAT64), fn.cast(shape[1], dtype=types.FLOAT64)
    room = fn.stack(height, width)
    candidates = dm.max(dm.floor(dm.sqrt(height * width) * inputs["sizes"] + 0.5), 1.0)
    fits = fn.reductions.min(fn.cast(candidates <= room, dtype=types.INT32), axes=[1])
    rank = fits * types.Constant(np.arange(ATTEMPTS, 0, -1, dtype=np.int32))
    best = fn.reductions.max(rank)
    found = fn.cast(best > 0, dtype=types.INT32)
    chosen = fn.expand_dims(fn.cast(rank == best, dtype=types.INT32) * found, axes=1)
    # reductions take no float64; the sizes are whole numbers by now
    extent = fn.reductions.sum(fn.cast(candidates, dtype=types.INT32) * chosen, axes=[0])
    widest = types.Constant(np.array([1.0 / view.aspect[0], view.aspect[1]]))
    largest = dm.max(dm.min(dm.floor(fn.stack(width, height) * widest + 0.5), room), 1.0)
    extent = extent + largest * (1 - found)
    # where nothing fits: the centre
    start = dm.floor((room - extent + found) * (inputs["position"] * found + 0.5 * (1 - found)))
    mirror = inputs["mirror"] * types.Constant(np.array([0.0, 1.0]))
    return {
        "start": fn.cast(start, dtype=types.INT32),
        "extent": fn.cast(extent, dtype=types.INT32),
        "from": fn.cast(extent * mirror, dtype=types.FLOAT),
        "to": fn.cast(extent * (1.0 - mirror), dtype=types.FLOAT),
    }


def jitter_exact(x: Node, inputs: dict[str, Node], view: ViewConfig, gpu: bool) -> Node:
    """Torchvision's ColorJitter: four parts in random order, each rounded to bytes.

    The hue shift is the expensive part: it is in the graph once, with room for the other three before and after it.
    """
    slots = 3 if _has_affine_parts(view) else 0
    for k in range(slots):
        if inputs["hue_at"] > k:
            x = _affine_part(x, inputs[f"part{k}"], inputs[f"value{k}"], view, gpu)
    if view.hue > 0:
        x = hue(x, inputs["hue"], gpu)
    for k in range(slots):
        if inputs["hue_at"] <= k:
            x = _affine_part(x, inputs[f"part{k}"], inputs[f"value{k}"], view, gpu)
    return x


def _has_affine_parts(view: ViewConfig) -> bool:
    return view.brightness > 0 or view.contrast > 0 or view.saturation > 0


def _affine_part(x: Node, part: Node, value: Node, view: ViewConfig, gpu: bool) -> Node:
    if part == BRIGHTNESS:
        x = brightness(x, value) if view.brightness > 0 else x
    elif part == CONTRAST:
        x = contrast(x, value, gpu) if view.contrast > 0 else x
    else:
        x = saturation(x, value, gpu) if view.saturation > 0 else x
    return x


def jitter_hsv(x: Node, inputs: dict[str, Node], view: ViewConfig, gpu: bool) -> Node:
    """Hue, then saturation, contrast and brightness as one affine map: one rounding, one clip, one order."""
    if view.hue > 0:
        x = hue(x, inputs["hue"], gpu)
    weight, gray_weight, mean_weight = inputs["weight"], inputs["gray_weight"], inputs["mean_weight"]
    if gpu:
        weight, gray_weight, mean_weight = weight.gpu(), gray_weight.gpu(), mean_weight.gpu()
    gray = _gray(x)
    mean = fn.reductions.mean(gray, dtype=types.FLOAT)
    return fn.cast(x * weight + _to_rgb(gray) * gray_weight + mean * mean_weight, dtype=types.UINT8)


def brightness(x: Node, factor: Node) -> Node:
    """`factor * x`."""
    return fn.brightness_contrast(x, brightness=factor)


def contrast(x: Node, factor: Node, gpu: bool) -> Node:
    """`factor * x + (1 - factor) * m`, m the mean of the grey image, rounded as PIL does."""
    mean = dm.floor(fn.reductions.mean(_gray(x), dtype=types.FLOAT) + 0.5)
    if gpu:  # contrast_center would have to be on the CPU
        return fn.cast(x * factor.gpu() + mean * (1.0 - factor).gpu(), dtype=types.UINT8)
    return fn.brightness_contrast(x, contrast=factor, contrast_center=mean)


def saturation(x: Node, factor: Node, gpu: bool) -> Node:
    """`factor * x + (1 - factor) * gray(x)`."""
    rest = 1.0 - factor
    if gpu:
        factor, rest = factor.gpu(), rest.gpu()
    return fn.cast(x * factor + _to_rgb(_gray(x)) * rest, dtype=types.UINT8)


def hue(x: Node, turns: Node, gpu: bool) -> Node:
    """Shift the hue in HSV by a share of the full circle.

    With V = max, m = min, C = V - m and D = C * (hue in sixths), channel c of the result is
    clip(V + C - e_c, m, V), where e_c is the distance of D + C * (shift - o_c) to the nearest multiple of 6 C and
    o = 0, 2, 4 for R, G, B. There is no division. DALI's own `hue` is a linear rotation of the colour plane and
    worse than no hue shift at all.
    """
    f = fn.cast(x, dtype=types.FLOAT)
    r, g, b = f[:, :, 0:1], f[:, :, 1:2], f[:, :, 2:3]
    v = dm.max(r, dm.max(g, b))
    m = dm.min(r, dm.min(g, b))
    c = v - m
    is_r = fn.cast(v == r, dtype=types.FLOAT)
    is_g = fn.cast(v == g, dtype=types.FLOAT) * (1.0 - is_r)
    is_b = 1.0 - is_r - is_g
    d = is_r * (g - b) + is_g * (b - r) + is_b * (r - g) + (is_g * 2.0 + is_b * 4.0) * c
    shift = turns * 6.0 - types.Constant(np.array([0.0, 2.0, 4.0], np.float32))
    if gpu:
        shift = shift.gpu()
    a = dm.abs(d + c * shift)
    e = dm.min(a, dm.abs(a - c * 6.0))
    return fn.cast(dm.clamp(v + c - e, m, v), dtype=types.UINT8)


def grayscale(x: Node) -> Node:
    """The luma of ITU-R 601 on all three channels."""
    return _to_rgb(_gray(x))


def solarize(x: Node, threshold: int) -> Node:
    """Invert the values at or above the threshold."""
    values = [float(v if v < threshold else 255 - v) for v in range(256)]
    return fn.lookup_table(x, keys=list(range(256)), values=values, dtype=types.UINT8)


def _gray(x: Node) -> Node:
    return fn.color_space_conversion(x, image_type=types.RGB, output_type=types.GRAY)


def _to_rgb(gray: Node) -> Node:
    return fn.color_space_conversion(gray, image_type=types.GRAY, output_type=types.RGB)
