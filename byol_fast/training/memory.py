"""Memory of a run: the check before its first step, and the message when it runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from byol_fast import config as configs
from byol_fast.config import Config, ConfigError
from byol_fast.data import CorruptImageError, ImageSource
from byol_fast.data.augment import PIXELS_PER_CHUNK
from byol_fast.data.batch import Batch
from byol_fast.data.decode import header_size, reader_of, size_problem
from byol_fast.data.loaders.backend import resolve_backend
from byol_fast.data.loaders.threads import resolve_num_threads
from byol_fast.data.sources import ArraySource, EncodedSource
from byol_fast.data.sources.base import evenly_spaced
from byol_fast.models import split_batchnorm
from byol_fast.training.distributed import World
from byol_fast.training.memory_estimate import GIB, MemoryEstimate, estimate_memory, try_estimate
from byol_fast.training.train_step import TrainStep
from byol_fast.utils.memory import AvailableMemory, available_memory, release_freed_memory, resident_memory
from byol_fast.utils.precision import Precision

log = logging.getLogger(__name__)

REFUSED, WARNED = 1.15, 0.85
"""Share of the available memory, with swap, above which a run is refused; share without, from which on it is warned
of."""
SAMPLED_IMAGES = 8
"""Images whose sizes are read, for the memory of decoding."""
CHUNK_COPIES = 8
"""Copies of a chunk of pixels, in bytes, that the augmentation of a thread has in memory at once (measured)."""


class Demand(NamedTuple):
    """Bytes that one process needs beside what it has already."""

    device: int
    """On its GPU; 0 on a CPU."""
    machine: int


# -------------------------------------------------------------------------------- before the first step


def check_memory(
    config: Config, source: ImageSource, device: torch.device, precision: Precision, world: World
) -> list[str]:
    """Compare the estimated memory of a run with what the device, the control group and the machine have left.

    All processes must call it.

    Args:
        config: of the run; nothing is done without `memory_check`.
        source: the training images.
        device: of this process.
        precision: of the networks.
        world: the processes of the run.

    Returns:
        A line for the startup summary.

    Raises:
        ConfigError: the run needs more than `REFUSED` of the memory; names the batch that fits.
    """
    if not config.memory_check:
        return []
    estimate = world.run_on_main(lambda: try_estimate(config, device.type, precision, num_processes=world.size))
    if isinstance(estimate, str):
        return [f"memory was not estimated: {estimate}"]
    left = _least(world.all_gather(_available(device, world.local_size)))
    demand = _demand(config, source, device, estimate)

    def fits(smaller: Config) -> bool:
        # Most sizes are ruled out by the least that they need, which takes no time.
        activations = estimate.activations * smaller.batch_size // config.batch_size
        least = MemoryEstimate(estimate.weights, estimate.optimizer, activations, 0)
        if _largest_share(_demand(smaller, source, device, least), left)[0] >= WARNED:
            return False
        one = estimate_memory(smaller, device.type, precision, num_processes=world.size)
        return _largest_share(_demand(smaller, source, device, one), left)[0] < WARNED

    # Rank 0 decides for all: machines may have unequal numbers of threads.
    with_swap = [_with_swap(one) for one in left]
    share, needed, available = world.run_on_main(lambda: _largest_share(demand, with_swap))
    if share > REFUSED:
        world.run_on_main(lambda: _refuse(config, needed, available, fits))
        return []
    share, needed, available = _largest_share(demand, left)
    if share >= WARNED and world.is_main_process:
        log.warning(
            "memory: a step needs about %.1f GiB, %.0f%% of what is available: it may not fit; a smaller --batch-size "
            "or --activation-checkpointing needs less",
            needed / GIB,
            100 * share,
        )
    return [_summary(estimate, demand, left)]


def _demand(config: Config, source: ImageSource, device: torch.device, estimate: MemoryEstimate) -> Demand:
    on_device, on_machine = loader_memory(config, source, device)
    if device.type == "cuda":
        return Demand(on_device + estimate.total, on_machine)
    return Demand(0, on_machine + estimate.total)


def loader_memory(config: Config, source: ImageSource, device: torch.device) -> Demand:
    """Memory of batches of views that wait for their step, of decoding, and of images on the device.

    Args:
        config: of the run.
        source: the training images.
        device: of the training.
    """
    backend = resolve_backend(config.data, source, device)
    batch = config.batch_size * 3 * sum(view.size**2 for view in config.view_configs)
    views = batch * (config.data.prefetch + 1 + config.grad_accum_steps)
    threads = resolve_num_threads(config.data.threads)
    decoding = threads * CHUNK_COPIES * 3 * PIXELS_PER_CHUNK + 2 * 3 * _pixels_at_once(source, threads)  # and a copy
    if device.type != "cuda":
        return Demand(0, views + decoding)
    if backend.loader == "device_cache":
        assert isinstance(source, ArraySource)
        return Demand(views + source.images.nbytes, 0)
    return Demand(views, batch * (config.data.prefetch + 1) + decoding)


def _pixels_at_once(source: ImageSource, threads: int) -> int:
    """Pixels of images that threads decode at a time, one of them the largest, by the headers of some images.

    0 where nothing is decoded, or nothing known.
    """
    pixels: list[int] = []
    if isinstance(source, EncodedSource):
        for i in evenly_spaced(len(source), SAMPLED_IMAGES).tolist():
            try:
                size = header_size(reader_of(source.read(i)))
            except CorruptImageError:
                continue
            if size is not None and size_problem(*size) is None:
                pixels.append(size[0] * size[1])
    return max(pixels) + (threads - 1) * sum(pixels) // len(pixels) if pixels else 0


Available = tuple[AvailableMemory | None, AvailableMemory | None]
"""Of the GPU and of the machine; None where there is none, or where it is not known."""


def _available(device: torch.device, local_size: int) -> Available:
    """Memory that is left for one of the processes on this machine."""
    gpu = None
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # kept by torch's allocator
        gpu = AvailableMemory(free, str(device))
    release_freed_memory()
    machine = available_memory()
    if machine is not None and local_size > 1:
        where = f"{machine.where} for each of {local_size} processes"
        machine = AvailableMemory(machine.bytes // local_size, where, machine.swap // local_size)
    return gpu, machine


def _least(of_processes: list[Available]) -> Available:
    gpus, machines = ([one for one in of_all if one is not None] for of_all in zip(*of_processes, strict=True))
    return min(gpus, default=None), min(machines, default=None)


def _with_swap(available: AvailableMemory | None) -> AvailableMemory | None:
    if available is None or not available.swap:
        return available
    return AvailableMemory(available.bytes + available.swap, f"{available.where}, with its swap")


def _largest_share(demand: Demand, left: Sequence[AvailableMemory | None]) -> tuple[float, int, AvailableMemory]:
    """Share of the memory that is needed where it is shortest, the bytes needed there, and those available."""
    shares = [
        (needed / max(available.bytes, 1), needed, available)
        for needed, available in zip(demand, left, strict=True)
        if available is not None
    ]
    return max(shares, default=(0.0, 0, AvailableMemory(0, "")))


def _summary(estimate: MemoryEstimate, demand: Demand, left: Available) -> str:
    """The estimate in one line, beside what is available and what the process has already."""
    loading = (demand.device + demand.machine - estimate.total) / GIB
    places = [f"{one.bytes / GIB:.1f} GiB on {one.where}" for one in left if one is not None]
    return (
        f"memory: {estimate}, {loading:.2f} GiB to load images; available: {', '.join(places) or 'not known'}; this "
        f"process has {resident_memory() / GIB:.2f} GiB without them"
    )


def _refuse(config: Config, needed: int, available: AvailableMemory, fits: Callable[[Config], bool]) -> None:
    size = config.batch_size // 2
    while size >= 2 and not fits(_with_batch_size(config, size)):
        size //= 2
    raise ConfigError(
        f"memory: a batch of {config.batch_size} images must fit into memory, needs about {needed / GIB:.1f} GiB and "
        f"{available.bytes / GIB:.1f} GiB are available on {available.where}; {_advice(config, size)}; "
        "--no-memory-check starts all the same"
    )


# -------------------------------------------------------------------------------- smaller batches


def _with_batch_size(config: Config, size: int) -> Config:
    """The configuration with as many images a step, or a few more, in smaller batches."""
    steps = -(-config.batch_size // size) * config.grad_accum_steps
    return configs.replace(config, {"batch_size": size, "grad_accum_steps": steps})


def _advice(config: Config, fits: int) -> str:
    """Options for less memory.

    Args:
        config: of the run that does not fit.
        fits: images of the largest batch that fits; below 2 if none does.
    """
    if fits < 2:
        advice = "not even 2 images fit: choose a smaller encoder, or smaller views"
    else:
        steps = _with_batch_size(config, fits).grad_accum_steps
        more = fits * steps / (config.batch_size * config.grad_accum_steps)
        effect = "keeps the learning rate" if more == 1 else f"raises the learning rate by {more - 1:.0%}"
        advice = (
            f"{fits} images would fit: --batch-size {fits} --grad-accum-steps {steps} {effect} (batch norms then see "
            f"{fits} images)"
        )
    if not config.activation_checkpointing:
        advice += "; --activation-checkpointing needs less memory for the same batch and takes about a third longer"
    return advice


# -------------------------------------------------------------------------------- out of memory


def largest_that_fits(step: TrainStep, batch: Batch) -> int:
    """Images of the largest half, quarter, ... of a batch that passes forward and backward; 0 when not even two do.

    The step's networks are not connected to other processes any more after that.
    """
    step.model.wrap_online(lambda network: network)
    for network in step.model.networks():
        split_batchnorm.disable_sync(network)
    size = len(batch.index) // 2
    while size >= 2:
        step.zero_grad()
        if step.device.type == "cuda":
            torch.cuda.empty_cache()
        if _passes(step, batch, size):
            return size
        size //= 2
    return 0


def _passes(step: TrainStep, batch: Batch, size: int) -> bool:
    try:
        with torch.compiler.set_stance("force_eager"):  # a compiled pass would be compiled anew for each size
            step.forward_backward(step.to_device([view[:size] for view in batch.views]))
    except torch.OutOfMemoryError:
        return False
    return True


def out_of_memory_message(step: TrainStep, batch: Batch, message: str, config: Config) -> str:
    """Out-of-memory message with the largest batch size that fits.

    Args:
        step: that failed.
        batch: that it failed on.
        message: what torch said, one line.
        config: of the run.
    """
    advice = _advice(config, largest_that_fits(step, batch))
    return f"memory: a batch of {config.batch_size} images does not fit {step.device} ({message}); {advice}"
