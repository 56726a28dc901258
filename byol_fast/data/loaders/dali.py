"""Views of images from one DALI pipeline, augmented or only cropped, and center crops for evaluation.

Our kernels augment the crops of the pipeline, or its own operators do (`DataConfig.augment`, `dali_views.py`). The
pipeline is the same on the CPU and on a GPU (there, decoding is "mixed" and all else runs on the device). Images are
decoded once. The parameters of the pipeline's operators (with our kernels crop and flip alone) are its inputs, from
`byol_fast.data.augment_params`: DALI has no random state that would have to be saved.

Import this module only where DALI is wanted: it imports DALI.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

# DALI takes host memory below this size from malloc, by default 32 MB: every intermediate image of a batch is then
# mapped and faulted in anew. With its own pool 224 px views take about a fifth less CPU time.
os.environ.setdefault("DALI_MALLOC_POOL_THRESHOLD", "256k")

import nvidia.dali
from nvidia.dali.pipeline import Pipeline, pipeline_def

from byol_fast.config import Config, Preprocessing, ViewConfig
from byol_fast.data.augment import apply_photometric, required_params, select_rows
from byol_fast.data.batch import Batch, Views, empty_views
from byol_fast.data.errors import CorruptImageError
from byol_fast.data.integrity import CorruptImages, check_bytes
from byol_fast.data.loaders.base import DeterministicLoader
from byol_fast.data.loaders.dali_views import CROPS_ONLY, Node, center_crop_node, fn, types, view_inputs, view_node
from byol_fast.data.loaders.image_reader import Encoding, ImageReader, NotReadByDALIError, find_defect, for_dali
from byol_fast.data.loaders.threads import resolve_num_threads
from byol_fast.data.sampler import BatchSpec
from byol_fast.data.sources import EncodedSource, ImageSource

Feed = Callable[[], list[Any]]


class DALILoader(DeterministicLoader):
    """Views of images by DALI.

    Batches are raw: uint8, `[B, 3, S, S]`, channels_last, on `device`. They stay valid while held. Our kernels write
    the views into one buffer; views by DALI's own operators (`augment="dali"`) lie in memory that DALI owns, one
    buffer for each, and stacking them takes a copy.

    Args:
        source: the images.
        config: see `DeterministicLoader`.
        view_configs: see `DeterministicLoader`.
        augment: "kernels" for our operators after the crop, "dali" for DALI's own.
        options: see `DeterministicLoader`.
    """

    _by_name = True
    _pipe: Pipeline | None = None
    _reader: ImageReader[BatchSpec] | None = None

    def __init__(
        self,
        source: ImageSource,
        config: Config,
        view_configs: tuple[ViewConfig, ...],
        *,
        augment: Literal["kernels", "dali"],
        **options: Any,
    ) -> None:
        super().__init__(source, config, view_configs, **options)
        self._kernels = augment == "kernels"
        self.name = f"dali {self.device}" + (", kernels" if self._kernels else "")
        self._names = tuple(required_params(view, flip=False) for view in view_configs)  # the pipeline mirrors for free
        self._in_flight: deque[BatchSpec] = deque()
        self._on_cpu = self._kernels and self.device.type == "cpu"  # our kernels on threads, beside the pipeline
        self._ahead: deque[tuple[BatchSpec, Views, list[Future[None]]]] = deque()

    def _backend_version(self) -> str:
        kernels = ", kernels" if self._kernels else ""
        return f"dali {nvidia.dali.__version__} on {self.device.type}{kernels}"

    def _load_batch(self) -> Batch:
        retried = False
        while True:
            try:
                if self._pipe is None:
                    self._pipe = self._build_pipeline()
                return self._next_batch(self._pipe)
            except CorruptImageError:
                self._restart()
                raise
            except NotReadByDALIError:
                self._restart()
                self._by_name = False
            except RuntimeError as error:
                in_flight = [spec.index for spec in self._in_flight]
                self._restart()  # an error leaves a DALI pipeline unusable
                unreadable = _find_corrupt(error, self.source, in_flight, self.corrupt, self.device, retried)
                self.corrupt.add(unreadable, self._batch_number)
                retried = not unreadable

    def _next_batch(self, pipe: Pipeline) -> Batch:
        """The next batch. DALI runs ahead: specs wait in `_in_flight` until their crops leave the pipeline."""
        if self._on_cpu:
            while len(self._ahead) < 2:  # one batch is augmented while the pipeline crops the next
                self._ahead.append(self._start_augment(*self._next_crops(pipe)))
            spec, views, chunks = self._ahead.popleft()
            for chunk in chunks:
                chunk.result()
        elif self._kernels:
            spec, views = self._augment_on_stream(pipe)
        else:
            spec, views = self._next_crops(pipe)
        return self._batch(views, spec.index)

    def _next_crops(self, pipe: Pipeline) -> tuple[BatchSpec, Views]:
        """Run the pipeline: contents of the next batch and its crops `[B, 3, S, S]`.

        The queue of specs is empty until the first run feeds the pipeline, so it is only read afterwards.
        """
        crops = tuple(crops.permute(0, 3, 1, 2) for crops in _run(pipe, self.device))
        return self._in_flight.popleft(), crops

    def _start_augment(self, spec: BatchSpec, crops: Views) -> tuple[BatchSpec, Views, list[Future[None]]]:
        """Let threads augment the crops of a batch."""
        views = empty_views(self.sizes, self.batch_size, device=self.device)
        return spec, views, self._on_threads(partial(self._apply_photometric, views, spec, crops))

    def _augment_on_stream(self, pipe: Pipeline) -> tuple[BatchSpec, Views]:
        """Launch the augmentation of the next batch beside the training step."""
        specs: list[BatchSpec] = []

        def compute() -> Views:
            spec, crops = self._next_crops(pipe)
            specs.append(spec)
            views = empty_views(self.sizes, self.batch_size, device=self.device)
            self._apply_photometric(views, spec, crops, slice(None))
            return views

        views = self._augment_stream(compute)
        return specs[0], views

    def _apply_photometric(self, views: Views, spec: BatchSpec, crops: Views, rows: slice) -> None:
        """Write some rows of a batch into its views: colors, blur and solarization of the crops."""
        for out, crop, params, names, view in zip(
            views, crops, spec.params, self._names, self.view_configs, strict=True
        ):
            apply_photometric(crop[rows], select_rows(params, names, rows), view, out=out[rows])

    def _build_pipeline(self) -> Pipeline:
        reader = self._reader = ImageReader(
            self.source, self.sampler, self.corrupt, num_threads=self.num_threads, by_name=self._by_name
        )
        size = reader.image_size
        view_configs = tuple(replace(view, **CROPS_ONLY) if self._kernels else view for view in self.view_configs)
        numbers = iter(range(self._batch_number, 2**62))

        def inputs_of_views(spec: BatchSpec) -> list[dict[str, NDArray[Any]]]:
            return [view_inputs(params, view, size) for params, view in zip(spec.params, view_configs, strict=True)]

        def feed() -> list[Any]:
            spec, images = reader(next(numbers))
            self._in_flight.append(spec)
            return [images, *(value for inputs in inputs_of_views(spec) for value in inputs.values())]

        return _views_pipeline(
            feed,
            names=[list(inputs) for inputs in inputs_of_views(self.sampler(self._batch_number))],
            encoding=reader.encoding,
            gpu=self.device.type == "cuda",
            view_configs=view_configs,
            hw_decoder_load=self.config.data.hw_decoder_load,
            **_pipeline_options(self.batch_size, self.num_threads, self.config.data.prefetch, self.device),
        )

    def _restart(self) -> None:
        super()._restart()
        self._pipe = None
        self._in_flight.clear()
        self._ahead.clear()
        if self._reader is not None:
            self._reader.close()
            self._reader = None


# ---- evaluation ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Chunk:
    """Images of a batch for evaluation."""

    index: NDArray[np.int64]


def center_crops(
    source: ImageSource,
    preprocessing: Preprocessing,
    batch_size: int,
    threads: int,
    device: torch.device,
    corrupt: CorruptImages,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Center crops by DALI; arguments and results as in `byol_fast.data.eval_batches`."""
    rest, num_before, by_name = np.arange(len(source)), -1, True
    while len(rest := np.array([i for i in rest.tolist() if i not in corrupt.by_index], np.int64)):
        retried, num_before = len(rest) == num_before, len(rest)
        chunks = [_Chunk(rest[i : i + batch_size]) for i in range(0, len(rest), batch_size)]
        try:
            for images, index in _run_center_crops(
                source, chunks, preprocessing, batch_size, threads, device, corrupt, retried, by_name
            ):
                yield images.permute(0, 3, 1, 2), index
                rest = rest[rest > int(index[-1])]
        except NotReadByDALIError:
            by_name = False


def _run_center_crops(
    source: ImageSource,
    chunks: list[_Chunk],
    preprocessing: Preprocessing,
    batch_size: int,
    threads: int,
    device: torch.device,
    corrupt: CorruptImages,
    retried: bool,
    by_name: bool,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Center crops of the images in order; ends early, with more of `corrupt` known, if an image stops the pipeline."""

    def sample(number: int) -> _Chunk:
        return _Chunk(np.array([i for i in chunks[number].index.tolist() if i not in corrupt.by_index], np.int64))

    num_threads = resolve_num_threads(threads)
    reader = ImageReader(source, sample, corrupt, num_threads=num_threads, by_name=by_name)
    numbers = iter(range(len(chunks)))
    in_flight: deque[NDArray[np.int64]] = deque()

    def feed() -> Any:
        for number in numbers:
            chunk, images = reader(number, last=len(chunks) - 1)
            if len(chunk.index):
                in_flight.append(chunk.index)
                return images
        raise StopIteration

    pipe = _center_crops_pipeline(
        feed,
        encoding=reader.encoding,
        gpu=device.type == "cuda",
        preprocessing=preprocessing,
        **_pipeline_options(batch_size, num_threads, 2, device),
    )
    try:
        while True:
            try:
                (images,) = _run(pipe, device)
            except StopIteration:
                return
            yield images, torch.from_numpy(in_flight.popleft())
    except RuntimeError as error:
        corrupt.add(_find_corrupt(error, source, list(in_flight), corrupt, device, retried), 0)
    finally:
        reader.close()


# ---- between Python and DALI ---------------------------------------------------------------------------------------


def _pipeline_options(batch_size: int, num_threads: int, prefetch: int, device: torch.device) -> dict[str, Any]:
    gpu = device.type == "cuda"
    return {
        "batch_size": batch_size,
        "num_threads": num_threads,
        "device_id": (torch.cuda.current_device() if device.index is None else device.index) if gpu else None,
        "prefetch_queue_depth": prefetch,
        "seed": 0,  # not used: nothing in these pipelines is random
    }


def _run(pipe: Pipeline, device: torch.device) -> list[torch.Tensor]:
    """Outputs of the next run, without a copy, ordered on torch's current stream without a wait of the host."""
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    return [torch.utils.dlpack.from_dlpack(output.as_tensor()) for output in pipe.run(stream)]


def _find_corrupt(
    error: RuntimeError,
    source: ImageSource,
    in_flight: list[NDArray[np.int64]],
    corrupt: CorruptImages,
    device: torch.device,
    retried: bool,
) -> list[tuple[int, str]]:
    """Images that stopped DALI, and why: first those with a wrong beginning or end are decoded, then all.

    None of them if all can be decoded now: a file may have been rewritten while DALI read it.

    Raises:
        RuntimeError: all can be decoded, and the batch was `retried`: DALI stopped for another reason.
    """
    message = str(error)
    if isinstance(source, EncodedSource):
        index = list(dict.fromkeys(int(i) for batch in in_flight for i in batch))
        index.sort(key=lambda i: source.sample_name(i) not in message)
        for check in (find_defect, lambda s, i: _check_by_dali(s, i, device)):
            unreadable = ((i, reason) for i in index if (reason := check(source, i)) is not None)
            if (first := next(unreadable, None)) is not None:
                return [first, *unreadable] if corrupt.skip else [first]
    if not retried:
        return []
    raise RuntimeError(f"DALI stopped, though all images of the batch can be read: {message}") from error


def _check_by_dali(source: EncodedSource, i: int, device: torch.device) -> str | None:
    try:
        data = source.read(i)
        if isinstance(image := for_dali(data), str):
            return image
        pipe = _decode_pipeline(
            lambda: [image],
            gpu=device.type == "cuda",
            **_pipeline_options(1, 1, 1, device),
        )
        _run(pipe, device)
    except CorruptImageError as error:
        return error.reason
    except RuntimeError as error:
        messages = [line for line in str(error).splitlines() if "failure" in line or "rror" in line]
        return check_bytes(data) or f"cannot be decoded by DALI ({messages[-1] if messages else error})"
    return None


# ---- the pipelines -------------------------------------------------------------------------------------------------


@pipeline_def(enable_conditionals=True)
def _views_pipeline(
    feed: Feed,
    *,
    names: list[list[str]],
    encoding: Encoding,
    gpu: bool,
    view_configs: tuple[ViewConfig, ...],
    hw_decoder_load: float,
) -> Any:
    """Views of each image; `feed` returns the images, then the inputs of each view in the order of its `names`."""
    data, *inputs = fn.external_source(source=feed, num_outputs=1 + sum(map(len, names)), batch=True)
    image = _decode(data, encoding, gpu, hw_decoder_load=hw_decoder_load)
    remaining = iter(inputs)
    outputs = []
    for k, view in enumerate(view_configs):
        outputs.append(view_node(image, {name: next(remaining) for name in names[k]}, view, gpu))
    return tuple(outputs)


@pipeline_def
def _center_crops_pipeline(
    feed: Callable[[], Any], *, encoding: Encoding, gpu: bool, preprocessing: Preprocessing
) -> Any:
    image = _decode(fn.external_source(source=feed, batch=True), encoding, gpu)
    return center_crop_node(image, preprocessing)


@pipeline_def
def _decode_pipeline(feed: Callable[[], list[Any]], *, gpu: bool) -> Any:
    return _decode(fn.external_source(source=feed, batch=True), "bytes", gpu)


def _decode(data: Node, encoding: Encoding, gpu: bool, **on_gpu: float) -> Node:
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
