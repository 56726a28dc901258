"""Drop-in for timm's `ModelEmaV3`."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from byol_kernels import ema_update_

# ------------------------------------------------------------------------------------------------ timm


class ModelEmaV3(nn.Module):
    """The moving average of a model in timm: `ema = decay * ema + (1 - decay) * model`, all parameters in one launch.

    Buffers as timm has them: averaged where they are floating point and part of the state, copied where they are
    integers; or all copied with `exclude_buffers`. (BYOL's target keeps buffers of its own: `update_momentum`.) There
    is no stochastic rounding: an average in bfloat16 needs `dtype`, or stochastic_rounding=False. A parameter that two
    layers share is averaged once; timm does it once for each.

    Args:
        model: what is averaged; `module` is a copy of it in eval mode.
        decay: from 0 to 1.
        min_decay: least decay of the warm-up.
        update_after_step: up to this step and the next the average is the model.
        use_warmup: `decay = 1 - (1 + step / warmup_gamma) ** -warmup_power`, between the two.
        warmup_gamma: see there.
        warmup_power: see there.
        device: where the average is kept; None: with the model.
        dtype: of the average; None: the model's.
        stochastic_rounding: must be False where the average is in bfloat16.
        foreach: all tensors at once; False: one after the other, by torch.
        exclude_buffers: copy the buffers.

    Raises:
        ValueError: an average in bfloat16 with stochastic rounding.
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
                "ModelEmaV3: dtype must be torch.float32 for a model in bfloat16, got bfloat16, whose average needs "
                "stochastic rounding, which is not here; pass dtype=torch.float32, or stochastic_rounding=False"
            )

    def get_decay(self, step: int | None = None) -> float:
        """The decay of a step.

        Args:
            step: steps that were finished; None: without warm-up.
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
        """Let the average follow the model; call it after the optimizer's step.

        Args:
            model: the same network.
            step: see `get_decay`.
        """
        averages: list[Tensor] = list(self.module.parameters())
        values: list[Tensor] = list(model.parameters())
        if self.exclude_buffers:
            copied = list(zip(self.module.buffers(), model.buffers(), strict=True))
        else:
            pairs = list(zip(_stored_buffers(self.module), _stored_buffers(model), strict=True))
            averages += [mine for mine, _ in pairs if mine.is_floating_point()]
            values += [theirs for mine, theirs in pairs if mine.is_floating_point()]
            copied = [pair for pair in pairs if not pair[0].is_floating_point()]
        decay = self.get_decay(step)
        values = [value.to(mine.device) for mine, value in zip(averages, values, strict=True)]
        if self.foreach:
            ema_update_(averages, values, decay)
        else:
            for mine, value in zip(averages, values, strict=True):
                mine.lerp_(value.to(mine.dtype), 1.0 - decay)
        for mine, theirs in copied:
            mine.copy_(theirs)

    @torch.no_grad()
    def set(self, model: nn.Module) -> None:
        """Make the average the model, all of its state."""
        for mine, theirs in zip(self.module.state_dict().values(), model.state_dict().values(), strict=True):
            mine.copy_(theirs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The averaged model's output."""
        return self.module(*args, **kwargs)


def _stored_buffers(network: nn.Module) -> list[Tensor]:
    """The buffers that are part of a network's state, each once."""
    found: dict[int, Tensor] = {}
    for module in network.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                found.setdefault(id(buffer), buffer)
    return list(found.values())
