"""The moving average of the target network, for all tensors in one launch.

    target = tau * target + (1 - tau) * online                  (Grill et al. 2020, arXiv 2006.07733, equation 1)

computed as a linear interpolation that is exact at both ends: with weight w = 1 - tau,

    target + w (online - target)            where w < 1/2
    online - (1 - w) (online - target)      elsewhere

It moves 12 bytes a float32 parameter, the least there is: both are read once, the target is written once.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from byol_kernels import reference
from byol_kernels._multi_tensor import CHUNK, NUM_WARPS, Column, plan_for
from byol_kernels._triton import device_guard, jit, tl, tl_dtype

# -------------------------------------------------------------------------------- kernels


@jit
def lerp(start: tl.tensor, end: tl.tensor, weight: tl.tensor) -> tl.tensor:
    """`torch.lerp`: exact at weight 0 and weight 1."""
    difference = end - start
    return tl.where(weight < 0.5, start + weight * difference, end - (1.0 - weight) * difference)


@jit
def _ema_chunk(
    target_address: tl.tensor,
    online_address: tl.tensor,
    copy_address: tl.tensor,
    numel: tl.tensor,  # elements from these addresses on
    weight: tl.tensor,
    TARGET: tl.constexpr,
    ONLINE: tl.constexpr,
    COPY: tl.constexpr,
    HAS_COPY: tl.constexpr,
    FULL: tl.constexpr,  # CHUNK elements, every address a multiple of 16 bytes: unmasked 128-bit accesses
    CHUNK: tl.constexpr,
) -> None:
    ACC: tl.constexpr = tl.float64 if tl.float64 == TARGET else tl.float32
    target_ptr = target_address.to(tl.pointer_type(TARGET))
    online_ptr = online_address.to(tl.pointer_type(ONLINE))
    copy_ptr = copy_address.to(tl.pointer_type(COPY))
    offsets = tl.arange(0, CHUNK)
    mask = None
    if FULL:
        target_ptr = tl.multiple_of(target_ptr, 16)
        online_ptr = tl.multiple_of(online_ptr, 16)
        copy_ptr = tl.multiple_of(copy_ptr, 16)
    else:
        mask = offsets < numel
    target = tl.load(target_ptr + offsets, mask=mask)
    online = tl.load(online_ptr + offsets, mask=mask)
    target = lerp(target.to(ACC), online.to(ACC), tl.cast(weight, ACC)).to(TARGET)
    tl.store(target_ptr + offsets, target, mask=mask)
    if HAS_COPY:
        tl.store(copy_ptr + offsets, target.to(COPY), mask=mask)


@jit
def _ema_update_kernel(
    addresses_ptr: tl.tensor,  # [3, R] int64: target, online, copy
    rows_ptr: tl.tensor,  # [R, 4] int64: elements, kind, first chunk, tag
    chunks_ptr: tl.tensor,  # [C, 2] int64: row, chunk within the row
    num_rows: tl.tensor,
    tau_ptr: tl.tensor,  # [] or None
    weight: tl.tensor,  # 1 - tau where tau_ptr is None
    KINDS: tl.constexpr,  # (target, online, copy) dtypes that occur
    HAS_COPY: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    row = tl.load(chunks_ptr + 2 * tl.program_id(0))
    first = tl.load(chunks_ptr + 2 * tl.program_id(0) + 1) * CHUNK
    numel = tl.load(rows_ptr + 4 * row) - first
    kind = tl.load(rows_ptr + 4 * row + 1)
    target = tl.load(addresses_ptr + row)
    online = tl.load(addresses_ptr + num_rows + row)
    copy = target
    if HAS_COPY:
        copy = tl.load(addresses_ptr + 2 * num_rows + row)
    if tau_ptr is not None:
        weight = 1.0 - tl.load(tau_ptr)
    full = (numel >= CHUNK) & ((target | online | copy) % 16 == 0)
    for k in tl.static_range(len(KINDS)):
        if kind == k:
            # Addresses in bytes. A chunk is a multiple of 16 bytes, so it keeps the alignment of its tensor.
            t = target + first * (KINDS[k][0].primitive_bitwidth // 8)
            o = online + first * (KINDS[k][1].primitive_bitwidth // 8)
            c = copy + first * (KINDS[k][2].primitive_bitwidth // 8)
            if full:
                _ema_chunk(t, o, c, numel, weight, KINDS[k][0], KINDS[k][1], KINDS[k][2], HAS_COPY, True, CHUNK)
            else:
                _ema_chunk(t, o, c, numel, weight, KINDS[k][0], KINDS[k][1], KINDS[k][2], HAS_COPY, False, CHUNK)


# -------------------------------------------------------------------------------- operators


def _columns(target: Sequence[Tensor], online: Sequence[Tensor], copies: Sequence[Tensor]) -> list[Column]:
    columns = [Column("target", target, written=True), Column("online", online)]
    return [*columns, Column("copies", copies, written=True)] if copies else columns


def _ema_update_cpu(
    target: list[Tensor], online: list[Tensor], tau_tensor: Tensor | None, tau: float, copies: list[Tensor]
) -> None:
    plan = plan_for("ema_update_", _columns(target, online, copies), by_index=True)
    tau = tau if tau_tensor is None else float(tau_tensor)
    reference.ema_update_(target, online, tau, copies, alike=all(kind[0] == kind[1] for kind in plan.kinds))


def _ema_update_cuda(
    target: Sequence[Tensor], online: Sequence[Tensor], tau_tensor: Tensor | None, tau: float, copies: Sequence[Tensor]
) -> None:
    columns = _columns(target, online, copies)
    plan = plan_for("ema_update_", columns)
    if not plan.num_chunks:
        return
    device = target[0].device
    if tau_tensor is not None and tau_tensor.device != device:  # on the CPU: nothing to wait for
        tau, tau_tensor = float(tau_tensor), None
    if tau_tensor is None and any(kind[0] == torch.float64 for kind in plan.kinds):
        tau_tensor = plan.constant("tau", "d", [tau], device)  # as an argument it would be rounded to float32
    tables = plan.tables(columns)
    with device_guard(target[0]):
        _ema_update_kernel[(plan.num_chunks,)](
            tables.addresses, tables.rows, tables.chunks, len(target), tau_tensor, 1.0 - tau,
            KINDS=tuple((*map(tl_dtype, kind), tl_dtype(kind[0]))[:3] for kind in plan.kinds),
            HAS_COPY=bool(copies), CHUNK=CHUNK, num_warps=NUM_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    torch.autograd.graph.increment_version([*target, *copies])


torch.library.define(
    "byol_kernels::ema_update_",
    "(Tensor(a!)[] target, Tensor[] online, Tensor? tau_tensor, float tau, Tensor(b!)[] copies) -> ()",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
torch.library.impl("byol_kernels::ema_update_", "CPU", _ema_update_cpu)
torch.library.impl("byol_kernels::ema_update_", "CUDA", _ema_update_cuda)


def _ema_update_fake(
    target: Sequence[Tensor], online: Sequence[Tensor], tau_tensor: Tensor | None, tau: float, copies: Sequence[Tensor]
) -> None:
    return None


torch.library.register_fake("byol_kernels::ema_update_", _ema_update_fake)


# -------------------------------------------------------------------------------- public function


def ema_update_(
    target: Iterable[Tensor],
    online: Iterable[Tensor],
    tau: float | Tensor,
    *,
    copies: Iterable[Tensor] | None = None,
) -> None:
    """Moves the target network towards the online network: target = tau * target + (1 - tau) * online, in place.

    Equation 1 of BYOL (arXiv 2006.07733). Pass parameters, not buffers: the target keeps its own BatchNorm
    statistics. tau = 1 leaves the target as it is and tau = 0 makes it the online network, bit for bit (for finite
    values; of equal dtype, for tau = 0). One launch for all tensors on a GPU, whatever their sizes and dtypes; the
    arithmetic is in float32, or in float64 where the target is.

    Args:
        target: tensors to update, floating point, dense, on one device, none sharing memory with another.
        online: their partners, of the same shapes; dtypes and strides may differ (other strides cost a copy).
        tau: the decay, from 0 to 1. As a 0-dim tensor it is read on its device: no synchronisation, no
            recompilation, and a CUDA graph follows its changes.
        copies: where to write the updated target in another dtype (bfloat16 weights, say) in the same pass; shapes
            and strides of the targets.

    Raises:
        ValueError: on lists of different lengths; shapes, devices or dtypes that do not fit; memory shared with a
            tensor that is written; or tau out of range. Nothing has been written then.
    """
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
        update = _ema_update_cpu if reference.is_plain(target[0]) else torch.ops.byol_kernels.ema_update_.default
        with torch.no_grad():
            update(target, online, tau_tensor, tau_float, copies)


def check_tau(what: str, tau: float | Tensor) -> tuple[Tensor | None, float]:
    """Tau as the operators take it: a tensor, or None and a float.

    Args:
        what: the function that messages name.
        tau: the decay.

    Returns:
        The tensor and 0, or None and the float.

    Raises:
        ValueError: if tau is a tensor that is not a floating-point scalar, or a number that is not in [0, 1].
    """
    if isinstance(tau, Tensor):
        if tau.dim() != 0 or not tau.is_floating_point():
            raise ValueError(
                f"{what}: tau must be a number or a 0-dim floating-point tensor, got shape {tuple(tau.shape)} of "
                f"{tau.dtype}; make it with torch.tensor(0.99)"
            )
        return tau.detach(), 0.0
    if not 0.0 <= tau <= 1.0:
        raise ValueError(f"{what}: tau must be from 0 to 1, got {tau}; BYOL's is 0.996 at first and 1 at the end")
    return None, float(tau)
