"""Compute precision of the networks. Weights, losses and updates are always fp32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from byol_fast.config import fields
from byol_fast.utils import env

Name = Literal["bf16", "fp16", "tf32", "fp32"]


@dataclass(frozen=True, slots=True)
class Precision:
    """Compute precision of the networks."""

    name: Name
    autocast_dtype: torch.dtype | None
    """None disables autocast."""

    @property
    def needs_grad_scaler(self) -> bool:
        """True if gradients would underflow without loss scaling."""
        return self.name == "fp16"

    def apply_to_backends(self) -> None:
        """Enable or disable TF32 for the whole process; torch has no narrower setting."""
        allowed = self.name != "fp32"
        torch.backends.cuda.matmul.allow_tf32 = allowed
        torch.backends.cudnn.allow_tf32 = allowed


@contextmanager
def fp32_matmul() -> Iterator[None]:
    """Context, or decorator, in which products of fp32 matrices are fp32 whatever precision the networks have."""
    matmul = torch.backends.cuda.matmul
    # Not `allow_tf32`: it cannot be read where `fp32_precision` was set, and cannot restore the precision "medium".
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def resolve_precision(name: str, device: torch.device) -> Precision:
    """Precision of a configuration; `auto` is bf16 if the hardware supports it, else tf32 (GPU) or fp32 (CPU).

    Raises:
        ConfigError: another name.
    """
    fields.check("config: precision", fields.Precision, name)
    cuda = device.type == "cuda"
    if name == "auto":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if cuda else env.cpu_has_bf16()
        name = "bf16" if has_bf16 else ("tf32" if cuda else "fp32")
    dtypes: dict[str, tuple[Name, torch.dtype | None]] = {
        "bf16": ("bf16", torch.bfloat16),
        "fp16": ("fp16", torch.float16),
        "tf32": ("tf32", None),
        "fp32": ("fp32", None),
    }
    return Precision(*dtypes[name])


class GradScaler:
    """Dynamic loss scale with the rule of `torch.amp.GradScaler`, kept on the device, so that no step synchronizes.

    The scale doubles after 2,000 consecutive finite steps and halves after a non-finite one.
    """

    INITIAL, GROWTH, BACKOFF, INTERVAL = 65536.0, 2.0, 0.5, 2000

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.full((), self.INITIAL, device=device)
        self._good_steps = torch.zeros((), dtype=torch.int32, device=device)

    def update(self, found_inf: Tensor) -> None:
        """Update the scale after a step.

        Args:
            found_inf: fp32 scalar, 1 if any gradient of the step is non-finite.
        """
        torch._amp_update_scale_(self.scale, self._good_steps, found_inf, self.GROWTH, self.BACKOFF, self.INTERVAL)

    def tensors(self) -> list[Tensor]:
        """Tensors that `update` changes."""
        return [self.scale, self._good_steps]

    def state_dict(self) -> dict[str, float]:
        """The scale, and the number of finite steps since it changed."""
        return {"scale": self.scale.item(), "good_steps": self._good_steps.item()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore a state."""
        self.scale.fill_(state["scale"])
        self._good_steps.fill_(int(state["good_steps"]))
