"""The EMA in plain PyTorch: the CPU path, and in float64 the oracle of the kernel."""

from collections.abc import Sequence

import torch
from torch import Tensor

from byol_kernels._dtypes import accumulation_dtype


def ema_update_(target: Sequence[Tensor], online: Sequence[Tensor], tau: float, copies: Sequence[Tensor] = ()) -> None:
    """Update `target = tau * target + (1 - tau) * online`, then `copies = target`.

    Args:
        target: tensors to update.
        online: their partners.
        tau: the decay, from 0 to 1.
        copies: of the updated targets, in other dtypes; none, or as many.
    """
    if tau == 0.0:  # not by lerp, nor for 1: 0 times a NaN or an infinity is a NaN
        torch._foreach_copy_(list(target), list(online))
    elif tau < 1.0:
        _lerp_(target, online, 1.0 - tau)
    if copies:
        torch._foreach_copy_(list(copies), list(target))


def _lerp_(target: Sequence[Tensor], online: Sequence[Tensor], weight: float) -> None:
    if all(t.dtype == o.dtype for t, o in zip(target, online, strict=True)):
        torch._foreach_lerp_(list(target), list(online), weight)
    else:
        for t, o in zip(target, online, strict=True):
            acc = accumulation_dtype(t.dtype)
            t.copy_(torch.lerp(t.to(acc), o.to(acc), weight))
