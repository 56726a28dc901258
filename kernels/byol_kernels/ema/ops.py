"""The EMA as an operator: schema, dispatch, checks.

target = tau * target + (1 - tau) * online                  (Grill et al. 2020, arXiv 2006.07733, equation 1)
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from byol_kernels._multi_tensor import Column, plan_for
from byol_kernels.derivatives import refuse_transforms
from byol_kernels.ema import kernels, reference

# -------------------------------------------------------------------------------- operator


def _columns(target: Sequence[Tensor], online: Sequence[Tensor], copies: Sequence[Tensor]) -> list[Column]:
    columns = [Column("target", target, written=True, is_average=True), Column("online", online)]
    return [*columns, Column("copies", copies, written=True)] if copies else columns


def _ema_update_cpu(
    target: Sequence[Tensor], online: Sequence[Tensor], tau_tensor: Tensor | None, tau: float, copies: Sequence[Tensor]
) -> None:
    refuse_transforms("ema_update_")
    plan_for("ema_update_", _columns(target, online, copies))  # checks the lists
    reference.ema_update_(target, online, read_tau("ema_update_", tau_tensor, tau), copies)
    torch.autograd.graph.increment_version([*target, *copies])


def _ema_update_cuda(
    target: Sequence[Tensor], online: Sequence[Tensor], tau_tensor: Tensor | None, tau: float, copies: Sequence[Tensor]
) -> None:
    refuse_transforms("ema_update_")
    columns = _columns(target, online, copies)
    if tau_tensor is None or tau_tensor.device != target[0].device:  # on the CPU: nothing to wait for
        tau, tau_tensor = read_tau("ema_update_", tau_tensor, tau), None
    kernels.ema_update(plan_for("ema_update_", columns), columns, tau_tensor=tau_tensor, tau=tau)
    torch.autograd.graph.increment_version([*target, *copies])


def _ema_update_fake(
    target: Sequence[Tensor], online: Sequence[Tensor], tau_tensor: Tensor | None, tau: float, copies: Sequence[Tensor]
) -> None:
    return None


torch.library.define(
    "byol_kernels::ema_update_",
    "(Tensor(a!)[] target, Tensor[] online, Tensor? tau_tensor, float tau, Tensor(b!)[] copies) -> ()",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
torch.library.impl("byol_kernels::ema_update_", "CPU", _ema_update_cpu)
torch.library.impl("byol_kernels::ema_update_", "CUDA", _ema_update_cuda)
torch.library.register_fake("byol_kernels::ema_update_", _ema_update_fake)

# -------------------------------------------------------------------------------- public function


def ema_update_(
    target: Iterable[Tensor],
    online: Iterable[Tensor],
    tau: float | Tensor,
    *,
    copies: Iterable[Tensor] | None = None,
) -> None:
    """Move the target network towards the online network: target = tau * target + (1 - tau) * online, in place.

    Equation 1 of BYOL (arXiv 2006.07733). Pass parameters, not buffers: the target keeps its own BatchNorm
    statistics. tau = 1 leaves the target as it is and tau = 0 makes it the online network, bit for bit, whatever the
    other one holds (of equal dtype, for tau = 0). One launch for all tensors on a GPU, whatever their sizes and dtypes;
    the arithmetic is in float32, or in float64 where the target is.

    An average in bfloat16 or float16 would stop moving: at tau = 0.996 most updates are below half a unit in the last
    place. Keep the target in float32, and have its low-precision weights written by `copies`.

    Args:
        target: tensors to update, float32 or float64, dense, on one device, none sharing memory with another.
        online: their partners, of the same shapes; dtypes and strides may differ (other strides cost a copy).
        tau: the decay, from 0 to 1. As a 0-dim tensor it is read on its device: no synchronization, no
            recompilation, and a CUDA graph follows its changes. A tensor on a GPU cannot raise: there tau is clamped to
            [0, 1], and if it is NaN nothing is written.
        copies: where to write the updated target in another dtype (bfloat16 weights, say) in the same pass; shapes
            and strides of the targets.

    Raises:
        ValueError: on lists of different lengths; shapes, devices or dtypes that do not fit; memory shared with a
            tensor that is written; or a tau out of range that is a number or on the CPU. Nothing has been written then.
        NotImplementedError: within `torch.func` and forward-mode differentiation.
    """
    refuse_transforms("ema_update_")
    target, online = list(target), list(online)
    copies = [] if copies is None else list(copies)
    tau_tensor, tau_float = check_tau("ema_update_", tau)
    for name, tensors in (("online", online), *([("copies", copies)] if copies else [])):
        if len(tensors) != len(target):
            raise ValueError(
                f"ema_update_: {name} must have as many tensors as target, {len(target)}, got {len(tensors)}; "
                "pass the parameters of two networks of the same architecture"
            )
    if target:
        with torch.no_grad():
            torch.ops.byol_kernels.ema_update_.default(target, online, tau_tensor, tau_float, copies)


def check_tau(op_name: str, tau: float | Tensor) -> tuple[Tensor | None, float]:
    """Check tau and convert it to what the operators take: a tensor, or None and a float.

    Args:
        op_name: the function that messages name.
        tau: the decay.

    Returns:
        The tensor and 0, or None and the float.

    Raises:
        ValueError: if tau is a tensor that is not a floating-point scalar, or a number that is not in [0, 1].
    """
    if isinstance(tau, Tensor):
        if tau.dim() != 0 or not tau.is_floating_point():
            raise ValueError(
                f"{op_name}: tau must be a number or a 0-dim floating-point tensor, got shape {tuple(tau.shape)} of "
                f"{tau.dtype}; make it with torch.tensor(0.99)"
            )
        return tau.detach(), 0.0
    return None, read_tau(op_name, None, tau)


def read_tau(op_name: str, tau_tensor: Tensor | None, tau: float) -> float:
    """The decay as a number: that of the tensor, which is read, or the one that is given.

    Args:
        op_name: the function that messages name.
        tau_tensor: the decay, 0-dim, or None.
        tau: the decay where `tau_tensor` is None.

    Raises:
        ValueError: if it is not in [0, 1].
    """
    value = float(tau if tau_tensor is None else tau_tensor)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{op_name}: tau must be from 0 to 1, got {value}; BYOL's is 0.996 at first and 1 at the end")
    return value
