"""Running statistics of batch norms, moved by a training step instead of its forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from byol_fast.models import split_batchnorm
from byol_kernels import update_running_stats_


class RunningStats:
    """The buffers of some networks, moved once a step, after it is known whether the step counts.

    Statistics of batch norms are collected by the forward pass (`batchnorm.num_splits`). Buffers that a layer
    changes by itself are put back where the step is skipped.

    Args:
        networks: changed in place, see `batchnorm.index_layers`.
        collected: whether forward passes collect statistics; without it all buffers are put back.
    """

    def __init__(self, networks: Sequence[nn.Module], *, collected: bool = True) -> None:
        self._layers = split_batchnorm.index_layers(networks) if collected else []
        moved = {id(buffer) for layer in self._layers for buffer in layer.buffers()}
        self._others = [b for network in networks for b in network.buffers() if id(b) not in moved]
        self._saved = [torch.empty_like(b) for b in self._others]

    @property
    def num_layers(self) -> int:
        """Batch norms whose statistics are collected."""
        return len(self._layers)

    @torch.no_grad()
    def save_others(self) -> None:
        """Remember the buffers that a forward pass changes by itself; a ResNet has none."""
        for saved, buffer in zip(self._saved, self._others, strict=True):
            saved.copy_(buffer)

    @torch.no_grad()
    def update(self, collected: Sequence[split_batchnorm.BatchStats], found_inf: Tensor) -> None:
        """Move the running statistics by what forward passes have collected, in one launch on a GPU.

        Args:
            collected: statistics in the order of the calls.
            found_inf: scalar on the device; where it is not 0 the buffers are what they were before the step.
        """
        for saved, buffer in zip(self._saved, self._others, strict=True):
            buffer.copy_(torch.where(found_inf > 0, saved, buffer))
        calls: dict[int, list[split_batchnorm.BatchStats]] = {}
        for entry in collected:
            calls.setdefault(entry.layer, []).append(entry)
        if not calls:
            return
        layers = [self._layers[layer] for layer in calls]
        # Always one launch: a second one with lists that look the same could not be captured.
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
    """The statistics of all calls of a layer, one behind the other."""
    return statistics[0] if len(statistics) == 1 else torch.cat(list(statistics))
