"""Floating-point operations of matrix products and convolutions; a multiply-add counts as two."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch.utils.flop_counter import flop_registry

ATTENTION_BACKWARD = 2.5
"""Ratio of backward to forward FLOPs of fused attention: one of its five products repeats the forward pass
(Dao, arXiv 2307.08691, section 4.1)."""


def forward_flops(func: Any, args: Any, kwargs: Any, output: Any) -> int:
    """FLOPs of one ATen operation by torch's formulas; 0 for operations without products.

    Args:
        func: overload of the operation.
        args: its positional arguments.
        kwargs: its keyword arguments.
        output: its result.
    """
    formula = flop_registry.get(func.overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=output))


def attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int]) -> int:
    """FLOPs of softmax(Q K^T) V, both products.

    Args:
        query: shape `[..., L, D]`.
        key: shape `[..., S, D]`.
        value: shape `[..., S, E]`.
    """
    heads, length, size = math.prod(query[:-2]), query[-2], key[-2]
    return 2 * heads * length * size * (query[-1] + value[-1])


def mfu(flops: float, seconds: float, peak_flops_per_s: float) -> float:
    """Model FLOPs utilization: necessary FLOPs per second over the peak (PaLM, arXiv 2204.02311, app. B).

    Args:
        flops: per step, `Roofline.total(level).flops`; recomputed activations do not count.
        seconds: per step.
        peak_flops_per_s: dense value of the data sheet, in the step's precision.
    """
    if seconds <= 0 or peak_flops_per_s <= 0:
        raise ValueError(f"mfu: seconds and peak must be positive, got {seconds} and {peak_flops_per_s}")
    return flops / seconds / peak_flops_per_s
