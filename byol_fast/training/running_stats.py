"""Running statistics of batch norms, updated by the training step instead of the forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from byol_fast.models import split_batchnorm
from byol_fast.models.split_batchnorm_layers import BatchStats
from byol_kernels import update_running_stats_


class RunningStats:
    """Updates the running statistics of some networks once per step, unless the step is skipped.

    In the forward pass (`num_splits(..., batch_stats=[])`) each batch norm appends its statistics to a list, which
    comes out as `ModelOutput.batch_stats` and goes into `update` here. Other buffers, which a layer changes in its
    forward pass, are restored if the step is skipped.

    Args:
        networks: changed in place, see `split_batchnorm.index_layers`.
        has_batch_stats: forward passes collect batch statistics; otherwise all buffers are restored.
    """

    def __init__(self, networks: Sequence[nn.Module], *, has_batch_stats: bool = True) -> None:
        self._layers = split_batchnorm.index_layers(networks) if has_batch_stats else []
        updated = {id(buffer) for layer in self._layers for buffer in layer.buffers()}
        self._others = [b for network in networks for b in network.buffers() if id(b) not in updated]
        self._saved = [torch.empty_like(b) for b in self._others]

    @property
    def num_layers(self) -> int:
        """Batch norms whose statistics are collected."""
        return len(self._layers)

    @torch.no_grad()
    def save_others(self) -> None:
        """Save the buffers that a forward pass changes by itself; a ResNet has none."""
        for saved, buffer in zip(self._saved, self._others, strict=True):
            saved.copy_(buffer)

    @torch.no_grad()
    def update(self, batch_stats: Sequence[BatchStats], found_inf: Tensor) -> None:
        """Update the running statistics with those of the batch, in one launch on a GPU.

        Args:
            batch_stats: statistics in the order of the calls.
            found_inf: scalar on the device; if it is not 0, the buffers stay what they were before the step.
        """
        for saved, buffer in zip(self._saved, self._others, strict=True):
            buffer.copy_(torch.where(found_inf > 0, saved, buffer))
        calls: dict[int, list[BatchStats]] = {}
        for entry in batch_stats:
            calls.setdefault(entry.layer, []).append(entry)
        if not calls:
            return
        layers = [self._layers[layer] for layer in calls]
        # All layers in one call: within one CUDA graph capture, lists with the same signature can be launched once only
        # (`byol_kernels._multi_tensor.plan_for`).
        update_running_stats_(
            [cast("Tensor", layer.running_mean) for layer in layers],
            [cast("Tensor", layer.running_var) for layer in layers],
            [_stacked([entry.mean for entry in entries]) for entries in calls.values()],
            [_stacked([entry.var for entry in entries]) for entries in calls.values()],
            [layer.num_batches_tracked for layer in layers],
            [layer.momentum for layer in layers],
            found_inf=found_inf,
        )


def _stacked(statistics: Sequence[Tensor]) -> Tensor:
    """Statistics of all calls of a layer, concatenated."""
    return statistics[0] if len(statistics) == 1 else torch.cat(list(statistics))
