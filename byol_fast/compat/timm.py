"""Drop-in replacement for timm's `ModelEmaV3`."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from byol_kernels import ema_update_


class ModelEmaV3(nn.Module):
    """EMA of a model as in timm: `ema = decay * ema + (1 - decay) * model`, all parameters in one launch.

    Buffers as in timm: floating-point buffers of the state are averaged, integer ones copied; with `exclude_buffers`
    all are copied. (BYOL's target keeps its own buffers: `update_momentum`.) Stochastic rounding is not supported: an
    EMA in bfloat16 needs `dtype`, or stochastic_rounding=False. A parameter shared by two layers is averaged once; in
    timm, once per layer.

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
        stochastic_rounding: must be False for an EMA in bfloat16.
        foreach: all tensors at once; False: one by one, by torch.
        exclude_buffers: copy the buffers.

    Raises:
        ValueError: an EMA in bfloat16 with stochastic rounding.
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
        foreach: bool = True,
        exclude_buffers: bool = False,
    ) -> None:
        super().__init__()
        self.module = copy.deepcopy(model).eval().to(device=device, dtype=dtype)
        self.decay, self.min_decay, self.update_after_step = decay, min_decay, update_after_step
        self.use_warmup, self.warmup_gamma, self.warmup_power = use_warmup, warmup_gamma, warmup_power
        self.foreach, self.exclude_buffers = foreach, exclude_buffers
        if stochastic_rounding and any(p.dtype == torch.bfloat16 for p in self.module.parameters()):
            raise ValueError(
                "ModelEmaV3: dtype must be torch.float32 for a model in bfloat16, got bfloat16, whose EMA needs "
                "stochastic rounding, which is not supported; pass dtype=torch.float32, or stochastic_rounding=False"
            )

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
        averages: list[Tensor] = list(self.module.parameters())
        values: list[Tensor] = list(model.parameters())
        if self.exclude_buffers:
            copied = list(zip(self.module.buffers(), model.buffers(), strict=True))
        else:
            pairs = list(zip(_stored_buffers(self.module), _stored_buffers(model), strict=True))
            averages += [average for average, _ in pairs if average.is_floating_point()]
            values += [value for average, value in pairs if average.is_floating_point()]
            copied = [pair for pair in pairs if not pair[0].is_floating_point()]
        decay = self.get_decay(step)
        values = [value.to(average.device) for average, value in zip(averages, values, strict=True)]
        if self.foreach:
            ema_update_(averages, values, decay)
        else:
            for average, value in zip(averages, values, strict=True):
                average.lerp_(value.to(average.dtype), 1.0 - decay)
        for average, value in copied:
            average.copy_(value)

    @torch.no_grad()
    def set(self, model: nn.Module) -> None:
        """Copy the state of the model."""
        for average, value in zip(self.module.state_dict().values(), model.state_dict().values(), strict=True):
            average.copy_(value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Output of the averaged model."""
        return self.module(*args, **kwargs)


def _stored_buffers(network: nn.Module) -> list[Tensor]:
    """Buffers that are part of a network's state, each once."""
    buffers: dict[int, Tensor] = {}
    for module in network.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                buffers.setdefault(id(buffer), buffer)
    return list(buffers.values())
