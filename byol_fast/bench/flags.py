"""Process-wide flags of torch's GPU backends, equal for all candidates of a precision."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class BackendFlags:
    """TF32 and `cudnn.benchmark`; without effect on a CPU."""

    tf32_convolutions: bool
    tf32_matmul: bool
    cudnn_benchmark: bool

    @classmethod
    def of(cls, precision: str, *, cudnn_benchmark: bool = False) -> BackendFlags:
        """Flags of all candidates of a precision: torch's defaults, as in published loops, and TF32 for "tf32".

        `byol_fast.Trainer` is stricter in fp32: it turns TF32 off in convolutions too.
        """
        return cls(True, precision == "tf32", cudnn_benchmark)

    @classmethod
    def current(cls) -> BackendFlags:
        """Current flags of this process."""
        backends = torch.backends
        return cls(backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32, backends.cudnn.benchmark)

    def apply(self) -> None:
        """Set the flags for the whole process."""
        torch.backends.cudnn.allow_tf32 = self.tf32_convolutions
        torch.backends.cuda.matmul.allow_tf32 = self.tf32_matmul
        torch.backends.cudnn.benchmark = self.cudnn_benchmark

    def __str__(self) -> str:
        convolutions, matmul, benchmark = (
            "on" if flag else "off" for flag in (self.tf32_convolutions, self.tf32_matmul, self.cudnn_benchmark)
        )
        return f"TF32 in convolutions {convolutions}, in matrix products {matmul}; cudnn.benchmark {benchmark}"


EXACT = BackendFlags(False, False, False)
"""No TF32 anywhere, to compare results."""
