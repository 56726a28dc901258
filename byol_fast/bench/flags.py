"""Process-wide flags of torch's GPU libraries. In a comparison all candidates of a precision run with the same ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class BackendFlags:
    """Flags that decide how a GPU computes convolutions and matrix products; they change nothing on a CPU."""

    tf32_convolutions: bool
    tf32_products: bool
    cudnn_benchmark: bool

    @classmethod
    def of(cls, precision: str, *, cudnn_benchmark: bool = False) -> BackendFlags:
        """Flags of a comparison's candidates: torch's defaults, with which published loops run, and TF32 for "tf32".

        `byol_fast.Trainer` is stricter in fp32, where it turns TF32 off in convolutions too.
        """
        return cls(True, precision == "tf32", cudnn_benchmark)

    @classmethod
    def in_force(cls) -> BackendFlags:
        """The flags of this process now."""
        backends = torch.backends
        return cls(backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32, backends.cudnn.benchmark)

    def apply(self) -> None:
        """Set them for the whole process."""
        torch.backends.cudnn.allow_tf32 = self.tf32_convolutions
        torch.backends.cuda.matmul.allow_tf32 = self.tf32_products
        torch.backends.cudnn.benchmark = self.cudnn_benchmark

    def __str__(self) -> str:
        convolutions, products, benchmark = (
            "on" if flag else "off" for flag in (self.tf32_convolutions, self.tf32_products, self.cudnn_benchmark)
        )
        return f"TF32 in convolutions {convolutions}, in matrix products {products}; cudnn.benchmark {benchmark}"


EXACT = BackendFlags(False, False, False)
"""No TF32 anywhere: for showing that candidates compute the same."""
