"""Out-of-memory errors: search for the largest batch that fits."""

from __future__ import annotations

import torch

from byol_fast.config import Config
from byol_fast.data.batch import Batch
from byol_fast.models import split_batchnorm
from byol_fast.training.train_step import TrainStep


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
    fits = largest_that_fits(step, batch)
    if not fits:
        way_out = "not even 2 images fit: choose a smaller encoder, or smaller views"
    else:
        times = -(-config.batch_size // fits) * config.grad_accum_steps
        way_out = (
            f"{fits} images would fit: --batch-size {fits} --grad-accum-steps {times} keeps the learning rate (batch "
            f"norms then see {fits} images)"
        )
    if not config.activation_checkpointing:
        way_out += "; --activation-checkpointing needs less memory for the same batch and takes about a third longer"
    return f"memory: a batch of {config.batch_size} images does not fit {step.device} ({message}); {way_out}"
