"""Running statistics of batch norms, moved by a training step instead of its forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from byol_fast import batchnorm
from byol_kernels import update_running_stats_


class RunningStatistics:
    """The buffers of some networks, moved once a step, after it is known whether the step counts.

    Statistics of batch norms are collected by the forward pass (`batchnorm.views_stacked`). Buffers that a layer
    changes by itself are put back where the step is skipped.

    Args:
        networks: changed in place, see `batchnorm.number_layers`.
        collected: whether forward passes collect statistics; without it all buffers are put back.
    """

    def __init__(self, networks: Sequence[nn.Module], *, collected: bool = True) -> None:
        self._layers = batchnorm.number_layers(networks) if collected else []
        moved = {id(buffer) for layer in self._layers for buffer in layer.buffers()}
        self._others = [b for network in networks for b in network.buffers() if id(b) not in moved]
        self._saved = [torch.empty_like(b) for b in self._others]

    @torch.no_grad()
    def save_others(self) -> None:
        """Remember the buffers that a forward pass changes by itself; a ResNet has none."""
        for saved, buffer in zip(self._saved, self._others, strict=True):
            saved.copy_(buffer)

    @torch.no_grad()
    def update(self, collected: Sequence[batchnorm.BatchStats], found_inf: Tensor) -> None:
        """Move the running statistics by what forward passes have collected, in one launch on a GPU.

        Args:
            collected: statistics in the order of the calls.
            found_inf: scalar on the device; where it is not 0 the buffers are what they were before the step.
        """
        for saved, buffer in zip(self._saved, self._others, strict=True):
            buffer.copy_(torch.where(found_inf > 0, saved, buffer))
        # A layer that was called several times takes its turns one after the other.
        turns: list[list[batchnorm.BatchStats]] = []
        calls = [0] * len(self._layers)
        for entry in collected:
            if calls[entry.layer] == len(turns):
                turns.append([])
            turns[calls[entry.layer]].append(entry)
            calls[entry.layer] += 1
        for turn in turns:
            layers = [self._layers[entry.layer] for entry in turn]
            update_running_stats_(
                [cast("Tensor", layer.running_mean) for layer in layers],
                [cast("Tensor", layer.running_var) for layer in layers],
                [entry.mean for entry in turn],
                [entry.var for entry in turn],
                [layer.num_batches_tracked for layer in layers],
                [layer.momentum for layer in layers],
                found_inf=found_inf,
            )
