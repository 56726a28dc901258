"""What numbers the networks compute with; weights, losses and updates are fp32 in any case."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from byol_fast.utils import env

Name = Literal["bf16", "fp16", "tf32", "fp32"]


@dataclass(frozen=True, slots=True)
class Precision:
    """Arithmetic of the networks."""

    name: Name
    autocast: torch.dtype | None
    """Dtype of the products; None leaves the weights' own."""

    @property
    def scales_loss(self) -> bool:
        """Whether gradients would underflow without a loss scale."""
        return self.name == "fp16"

    def apply_to_backends(self) -> None:
        """Allow TF32 products or forbid them, for the whole process: torch has no narrower switch."""
        allowed = self.name != "fp32"
        torch.backends.cuda.matmul.allow_tf32 = allowed
        torch.backends.cudnn.allow_tf32 = allowed


def resolve_precision(name: str, device: torch.device) -> Precision:
    """The precision of a configuration; `auto` is bf16 where the hardware multiplies it, else tf32 or fp32."""
    cuda = device.type == "cuda"
    if name == "auto":
        fast = torch.cuda.is_bf16_supported(including_emulation=False) if cuda else env.cpu_has_bf16()
        name = "bf16" if fast else ("tf32" if cuda else "fp32")
    dtypes: dict[str, tuple[Name, torch.dtype | None]] = {
        "bf16": ("bf16", torch.bfloat16),
        "fp16": ("fp16", torch.float16),
        "tf32": ("tf32", None),
        "fp32": ("fp32", None),
    }
    return Precision(*dtypes[name])


class GradScaler:
    """The dynamic loss scale of `torch.amp.GradScaler`, kept on the device: nothing ever waits for it.

    Doubles after 2,000 good steps, halves after a found_inf one.
    """

    INITIAL, GROWTH, BACKOFF, INTERVAL = 65536.0, 2.0, 0.5, 2000

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.full((), self.INITIAL, device=device)
        self._good_steps = torch.zeros((), dtype=torch.int32, device=device)

    def update(self, found_inf: Tensor) -> None:
        """Adapt the scale after a step.

        Args:
            found_inf: fp32 scalar, 1 where the step's gradients were not finite.
        """
        torch._amp_update_scale_(self.scale, self._good_steps, found_inf, self.GROWTH, self.BACKOFF, self.INTERVAL)

    def tensors(self) -> list[Tensor]:
        """All that changes."""
        return [self.scale, self._good_steps]

    def state_dict(self) -> dict[str, float]:
        """The scale and the good steps since it changed."""
        return {"scale": self.scale.item(), "good_steps": self._good_steps.item()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on where `state` was taken."""
        self.scale.fill_(state["scale"])
        self._good_steps.fill_(int(state["good_steps"]))
