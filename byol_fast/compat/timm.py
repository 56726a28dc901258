"""Drop-in replacement for timm's `ModelEmaV3`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from byol_fast.compat.precision import is_low_precision
from byol_kernels import ema_update_

_Pair = tuple[Tensor, Tensor]  # average, value
_CHUNK = 1 << 22
"""Elements for which random numbers are made at a time."""


class ModelEmaV3(nn.Module):
    """EMA of a model as in timm: `ema = decay * ema + (1 - decay) * model`, all parameters in one launch.

    Buffers as in timm: floating-point buffers of the state are averaged, integer ones copied; with `exclude_buffers`
    all are copied. (BYOL's target keeps its own buffers: `update_momentum`.) A parameter shared by two layers is
    averaged once; in timm, once per layer.

    An EMA in bfloat16 is rounded at random, with timm's numbers, so that updates below half a unit in the last place
    add up. In float16, or with stochastic_rounding=False, they are lost: pass dtype=torch.float32.

    Args:
        model: network to average; `module` is a copy of it in eval mode.
        decay: from 0 to 1.
        min_decay: smallest decay of the warm-up.
        update_after_step: the EMA equals the model until one step after this one.
        use_warmup: `decay = 1 - (1 + step / warmup_gamma) ** -warmup_power`, between the two.
        warmup_gamma: see `use_warmup`.
        warmup_power: see `use_warmup`.
        device: of the EMA; None for the model's.
        dtype: of the EMA; None for the model's.
        stochastic_rounding: round an EMA in bfloat16 at random.
        stochastic_rounding_seed: of the random numbers, which are independent of torch's default generator.
        foreach: all tensors at once; False: one by one, by torch.
        exclude_buffers: copy the buffers.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.9999,
        min_decay: float = 0.0,
        update_after_step: int = 0,
        use_warmup: bool = False,
        warmup_gamma: float = 1.0,
        warmup_power: float = 2 / 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        stochastic_rounding: bool = True,
        stochastic_rounding_seed: int = 0,
        foreach: bool = True,
        exclude_buffers: bool = False,
    ) -> None:
        super().__init__()
        self.module = copy.deepcopy(model).eval().to(device=device, dtype=dtype)
        self.decay, self.min_decay, self.update_after_step = decay, min_decay, update_after_step
        self.use_warmup, self.warmup_gamma, self.warmup_power = use_warmup, warmup_gamma, warmup_power
        self.foreach, self.exclude_buffers = foreach, exclude_buffers
        self.stochastic_rounding, self.stochastic_rounding_seed = stochastic_rounding, stochastic_rounding_seed
        self._generator: torch.Generator | None = None  # made on the device of the first update

    def get_decay(self, step: int | None = None) -> float:
        """Decay of a step.

        Args:
            step: number of finished steps; None: without warm-up.
        """
        if step is None:
            return self.decay
        step = max(0, step - self.update_after_step - 1)
        if step == 0:
            return 0.0
        if not self.use_warmup:
            return self.decay
        warm = float(1 - (1 + step / self.warmup_gamma) ** -self.warmup_power)
        return max(min(warm, self.decay), self.min_decay)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int | None = None) -> None:
        """Update the EMA; call it after the optimizer's step.

        Args:
            model: trained network.
            step: see `get_decay`.
        """
        pairs: list[_Pair]
        if self.exclude_buffers:
            pairs = list(zip(self.module.parameters(), model.parameters(), strict=True))
            copied = list(zip(self.module.buffers(), model.buffers(), strict=True))
        else:
            stored = list(zip(_stored_tensors(self.module), _stored_tensors(model), strict=True))
            pairs = [pair for pair in stored if pair[0].is_floating_point()]
            copied = [pair for pair in stored if not pair[0].is_floating_point()]
        decay = self.get_decay(step)
        fused: list[_Pair] = []
        rounded: list[_Pair] = []
        others: list[_Pair] = []
        for average, value in pairs:
            is_rounded = self.stochastic_rounding and average.dtype == torch.bfloat16
            is_fused = self.foreach and not is_low_precision(average)
            group = rounded if is_rounded else fused if is_fused else others
            group.append((average, value.to(average.device)))
        ema_update_([average for average, _ in fused], [value for _, value in fused], decay)
        for group in [rounded] if self.foreach else [[pair] for pair in rounded]:
            self._lerp_at_random(group, 1.0 - decay)
        if others:
            _lerp_(others, 1.0 - decay, foreach=self.foreach)
        for average, value in copied:
            average.copy_(value)

    def _lerp_at_random(self, pairs: Sequence[_Pair], weight: float) -> None:
        """Move averages in bfloat16, in float32 and rounded at random, in chunks as in timm."""
        chunk: list[_Pair] = []
        numel = 0
        for pair in pairs:
            if chunk and numel + pair[0].numel() > _CHUNK:
                self._lerp_chunk_at_random(chunk, weight)
                chunk, numel = [], 0
            chunk.append(pair)
            numel += pair[0].numel()
        if chunk:
            self._lerp_chunk_at_random(chunk, weight)

    def _lerp_chunk_at_random(self, pairs: Sequence[_Pair], weight: float) -> None:
        averages = [average for average, _ in pairs]
        x = torch.cat([average.reshape(-1) for average in averages]).float()
        x.mul_(1.0 - weight).add_(torch.cat([value.reshape(-1) for _, value in pairs]), alpha=weight)
        if self._generator is None:
            self._generator = torch.Generator(x.device).manual_seed(self.stochastic_rounding_seed)
        # A random number in the 16 bits that bfloat16 lacks carries into those that it has; then they are cut off.
        bits = x.view(torch.int32)
        bits += torch.randint(1 << 16, bits.shape, dtype=torch.int32, device=x.device, generator=self._generator)
        bits &= -(1 << 16)
        parts = torch.split(x, [average.numel() for average in averages])
        for average, part in zip(averages, parts, strict=True):
            average.copy_(part.view(average.shape))

    @torch.no_grad()
    def set(self, model: nn.Module) -> None:
        """Copy the state of the model."""
        for average, value in zip(self.module.state_dict().values(), model.state_dict().values(), strict=True):
            average.copy_(value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Output of the averaged model."""
        return self.module(*args, **kwargs)


def _lerp_(pairs: Sequence[_Pair], weight: float, *, foreach: bool) -> None:
    """`average = (1 - weight) average + weight value`, by torch's operators as in timm."""
    averages, values = [average for average, _ in pairs], [value for _, value in pairs]
    if not foreach:
        for average, value in pairs:
            average.lerp_(value.to(average.dtype), weight)
    elif all(average.dtype == value.dtype for average, value in pairs):
        torch._foreach_lerp_(averages, values, weight)
    else:
        torch._foreach_mul_(averages, 1.0 - weight)
        torch._foreach_add_(averages, values, alpha=weight)


def _stored_tensors(network: nn.Module) -> list[Tensor]:
    """Parameters and buffers that are part of a network's state, in its order, each once."""
    tensors: dict[int, Tensor] = {}
    for module in network.modules():
        stored = [b for name, b in module._buffers.items() if name not in module._non_persistent_buffers_set]
        for tensor in (*module._parameters.values(), *stored):
            if tensor is not None:
                tensors.setdefault(id(tensor), tensor)
    return list(tensors.values())
