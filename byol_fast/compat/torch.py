"""Drop-in replacements for `torch.optim.swa_utils`: `AveragedModel` and `get_ema_multi_avg_fn`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import swa_utils

from byol_kernels import ema_update_


def get_ema_multi_avg_fn(decay: float = 0.999) -> Callable[[Sequence[Tensor], Sequence[Tensor], Any], None]:
    """EMA function for the argument `multi_avg_fn` of `AveragedModel`, of this module or of torch; one launch per call.

    Integer buffers (with `use_buffers`) are averaged and truncated, as in torch. Averages in bfloat16 and float16 are
    updated by torch's operators: most updates are below half a unit in the last place, and lost.

    Args:
        decay: from 0 to 1.

    Raises:
        ValueError: decay is out of range.
    """
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"get_ema_multi_avg_fn: decay must be from 0 to 1, got {decay}; a usual one is 0.999")
    return _Average(decay)


class _Average:
    def __init__(self, decay: float) -> None:
        self.decay = decay

    @torch.no_grad()
    def __call__(self, averages: Sequence[Tensor], values: Sequence[Tensor], num_averaged: Any) -> None:
        """Update the EMA of tensors of one device and dtype."""
        if _is_fused(averages[0]):
            ema_update_(averages, values, self.decay)
        elif averages[0].is_floating_point() or averages[0].is_complex():
            torch._foreach_lerp_(list(averages), list(values), 1 - self.decay)
        else:
            for average, value in zip(averages, values, strict=True):
                average.copy_(average * self.decay + value * (1 - self.decay))


def _is_fused(average: Tensor) -> bool:
    """True for an average that `ema_update_` takes; other dtypes are torch's."""
    return average.dtype in {torch.float32, torch.float64}


class AveragedModel(swa_utils.AveragedModel):
    """`AveragedModel` of torch whose EMA update is one launch if `multi_avg_fn` is from this module.

    Other averages, and the first update, which copies, use torch's implementation.
    """

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Update the average; call it after the optimizer's step.

        Args:
            model: trained network.
        """
        update = self.multi_avg_fn
        if not isinstance(update, _Average) or self.n_averaged == 0:
            super().update_parameters(model)
            return
        averages: list[Tensor] = list(self.module.parameters())
        values: list[Tensor] = list(model.parameters())
        buffers, model_buffers = list(self.module.buffers()), list(model.buffers())
        if self.use_buffers:
            averages += buffers
            values += model_buffers
        else:
            torch._foreach_copy_(buffers, model_buffers)
        groups: dict[tuple[torch.device, torch.dtype | None], tuple[list[Tensor], list[Tensor]]] = {}
        for average, value in zip(averages, values, strict=True):
            dtype = None if _is_fused(average) else average.dtype
            pair = groups.setdefault((average.device, dtype), ([], []))
            pair[0].append(average)
            pair[1].append(value.to(average.device))
        for pair in groups.values():
            update(*pair, None)
        self.n_averaged += 1
