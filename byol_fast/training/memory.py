"""Memory: how much a run has used, and what would fit where a batch did not."""

from __future__ import annotations

import resource
import sys

import torch

from byol_fast.config import Config
from byol_fast.data.batch import Batch
from byol_fast.models import split_batchnorm
from byol_fast.training.train_step import TrainStep


def peak_gib(device: torch.device) -> float:
    """Most memory in use at once so far, in GiB: by tensors on a GPU, by the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib / 2**20 / (1024 if sys.platform == "darwin" else 1)


def largest_that_fits(step: TrainStep, batch: Batch) -> int:
    """Images of the largest half, quarter, ... of a batch that passes forward and backward; 0 when not even two do.

    The step's networks are not connected to other processes any more after that.
    """
    step.task.call_online_through(lambda network: network)
    for network in step.task.networks():
        split_batchnorm.keep_to_itself(network)
    size = len(batch.index) // 2
    while size >= 2:
        step.drop_gradients()
        if step.device.type == "cuda":
            torch.cuda.empty_cache()
        if _passes(step, batch, size):
            return size
        size //= 2
    return 0


def _passes(step: TrainStep, batch: Batch, size: int) -> bool:
    try:
        with torch.compiler.set_stance("force_eager"):  # a compiled pass would be compiled anew for each size
            step.forward_backward(batch.view1[:size], batch.view2[:size])
    except torch.OutOfMemoryError:
        return False
    return True


def advice(step: TrainStep, batch: Batch, message: str, config: Config) -> str:
    """What to say, and to try, when a batch did not fit.

    Args:
        step: that failed.
        batch: that it failed on.
        message: what torch said, one line.
        config: of the run.
    """
    fits = largest_that_fits(step, batch)
    if not fits:
        way_out = "not even 2 images fit: choose a smaller encoder, or smaller views"
    else:
        times = -(-config.batch_size // fits) * config.accumulate
        way_out = (
            f"{fits} images would fit: --batch-size {fits} --accumulate {times} keeps the learning rate (batch norms "
            f"then see {fits} images)"
        )
    if not config.activation_checkpointing:
        way_out += "; --activation-checkpointing needs less memory for the same batch and takes about a third longer"
    return f"memory: a batch of {config.batch_size} images does not fit {step.device} ({message}); {way_out}"
