"""Triton if it is installed: `jit` and `tl` for the kernels; else a clear error at launch.

Triton has wheels for Linux only. Elsewhere the package still imports and its CPU operators work.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor

__all__ = ["constexpr_function", "device_guard", "jit", "next_power_of_2", "tl", "tl_dtype"]

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

    class _NoLanguage:
        """Placeholder of `triton.language`: annotations and constants need it before any launch."""

        tensor = object
        constexpr = staticmethod(lambda value: value)

    tl = _NoLanguage


class _NoKernel:
    """Placeholder of a compiled kernel: a launch raises and names what is missing."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getitem__(self, grid: object) -> Callable[..., None]:
        raise RuntimeError(
            f"byol_kernels: kernel {self._name} must be compiled by Triton, got an environment without it; "
            "pip install triton, or move the tensors to the CPU"
        )


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`, or a stand-in that raises when launched."""
    return _NoKernel(function.__name__) if triton is None else triton.jit(function)


def constexpr_function(function: Callable[..., Any]) -> Any:
    """`triton.constexpr_function`, which is called when a kernel is compiled."""
    return function if triton is None else triton.constexpr_function(function)


def device_guard(tensor: Tensor) -> AbstractContextManager[None]:
    """Context in which the GPU of a tensor is the current one, which Triton launches on; no effect for a CPU tensor."""
    return cast("AbstractContextManager[None]", torch.cuda.device_of(tensor))  # type: ignore[no-untyped-call]


def tl_dtype(dtype: torch.dtype) -> Any:
    """The Triton element type of a floating-point torch dtype."""
    return getattr(tl, str(dtype).removeprefix("torch."))


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is at least `number` (and at least 1)."""
    return 1 << max(number - 1, 0).bit_length()
