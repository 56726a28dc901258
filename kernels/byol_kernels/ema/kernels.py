"""Triton kernel of the EMA, and its launcher.

`target = tau * target + (1 - tau) * online`, computed as a linear interpolation that is exact at both ends: with weight
w = 1 - tau,

    target + w (online - target)            where w < 1/2
    online - (1 - w) (online - target)      elsewhere

At w = 0 and w = 1 one of the two is selected, since 0 times a NaN or an infinity is a NaN. A tau on the device is
clamped to [0, 1]; if it is NaN, nothing is written.

It moves 12 bytes per float32 parameter, the minimum: both are read once, the target is written once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from byol_kernels._multi_tensor import CHUNK, NUM_WARPS, Column, MultiTensorPlan
from byol_kernels._triton import device_guard, jit, tl, tl_dtype


@jit
def lerp(start: tl.tensor, end: tl.tensor, weight: tl.tensor) -> tl.tensor:
    """`torch.lerp`, which at weight 0 is `start` and at weight 1 is `end`, whatever the other one holds."""
    difference = end - start
    between = tl.where(weight < 0.5, start + weight * difference, end - (1.0 - weight) * difference)
    return tl.where(weight == 0.0, start, tl.where(weight == 1.0, end, between))


@jit
def load_ema_weight(tau_ptr: tl.tensor) -> tl.tensor:
    """1 - tau, clamped to [0, 1]; NaN for a tau of NaN."""
    weight = 1.0 - tl.load(tau_ptr)
    return tl.where(weight < 0.0, 0.0, tl.where(weight > 1.0, 1.0, weight))


@jit
def _ema_chunk(
    target_address: tl.tensor,
    online_address: tl.tensor,
    copy_address: tl.tensor,
    numel: tl.tensor,  # elements that are left of the tensor
    weight: tl.tensor,
    TARGET: tl.constexpr,
    ONLINE: tl.constexpr,
    COPY: tl.constexpr,
    HAS_COPY: tl.constexpr,
    FULL: tl.constexpr,  # CHUNK elements, every address a multiple of 16 bytes: unmasked 128-bit accesses
    CHUNK: tl.constexpr,
) -> None:
    """One chunk: target = lerp(target, online, weight), copy = target."""
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
    rows_ptr: tl.tensor,  # [R, 4] int64: elements, dtype combination, first chunk, flags
    chunks_ptr: tl.tensor,  # [C, 2] int64: row, chunk within the row
    num_rows: tl.tensor,
    tau_ptr: tl.tensor,  # [] or None
    weight: tl.tensor,  # 1 - tau where tau_ptr is None
    DTYPE_COMBOS: tl.constexpr,  # (target, online, copy) dtypes that occur
    HAS_COPY: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    # --- the row and the chunk of this program
    row = tl.load(chunks_ptr + 2 * tl.program_id(0))
    first = tl.load(chunks_ptr + 2 * tl.program_id(0) + 1) * CHUNK
    numel = tl.load(rows_ptr + 4 * row) - first
    dtype_combo = tl.load(rows_ptr + 4 * row + 1)
    target = tl.load(addresses_ptr + row)
    online = tl.load(addresses_ptr + num_rows + row)
    copy = target
    if HAS_COPY:
        copy = tl.load(addresses_ptr + 2 * num_rows + row)
    if tau_ptr is not None:
        weight = load_ema_weight(tau_ptr)
        if ~(weight >= 0.0):
            return
    full = (numel >= CHUNK) & ((target | online | copy) % 16 == 0)

    # --- update, with the dtypes of the row: they are known when the kernel is compiled, which of them at run time
    for k in tl.static_range(len(DTYPE_COMBOS)):
        if dtype_combo == k:
            DTYPES: tl.constexpr = DTYPE_COMBOS[k]
            # Addresses in bytes. A chunk is a multiple of 16 bytes, so it keeps the alignment of its tensor.
            t = target + first * (DTYPES[0].primitive_bitwidth // 8)
            o = online + first * (DTYPES[1].primitive_bitwidth // 8)
            c = copy + first * (DTYPES[2].primitive_bitwidth // 8)
            if full:
                _ema_chunk(t, o, c, numel, weight, DTYPES[0], DTYPES[1], DTYPES[2], HAS_COPY, True, CHUNK)
            else:
                _ema_chunk(t, o, c, numel, weight, DTYPES[0], DTYPES[1], DTYPES[2], HAS_COPY, False, CHUNK)


def ema_update(plan: MultiTensorPlan, columns: Sequence[Column], *, tau_tensor: Tensor | None, tau: float) -> None:
    """Launch the EMA of the lists `target`, `online` and perhaps `copies`.

    Args:
        plan: of the lists.
        columns: the lists.
        tau_tensor: the decay, 0-dim, on the device of the lists.
        tau: the decay from 0 to 1 where `tau_tensor` is None.
    """
    if not plan.num_chunks:
        return
    target = columns[0].tensors
    if tau_tensor is None and any(combo[0] == torch.float64 for combo in plan.dtype_combos):
        tau_tensor = plan.constant("tau", "d", [tau], target[0].device)  # as an argument it would be rounded to float32
    tables = plan.tables(columns)
    with device_guard(target[0]):
        _ema_update_kernel[(plan.num_chunks,)](
            tables.addresses, tables.rows, tables.chunks, len(target), tau_tensor, 1.0 - tau,
            DTYPE_COMBOS=tuple((*map(tl_dtype, combo), tl_dtype(combo[0]))[:3] for combo in plan.dtype_combos),
            HAS_COPY=len(columns) > 2, CHUNK=CHUNK, num_warps=NUM_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
