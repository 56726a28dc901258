"""Triton kernels of LARS with EMA and low-precision copies, and their launcher.

Launch 1 computes the partial norms of each tensor; the program that arrives last at a tensor adds them up in a fixed
order, so runs repeat bit for bit. Launch 2 applies the rule and, while the parameter is in registers, updates its
target and writes the copies. It moves 40 bytes per float32 parameter with target and two bfloat16 copies.

Squares are summed in float32. Where a sum has overflowed, or is so small that squares may have lost digits, it is
computed again in float64: for a chunk by the program that has just read it, for a tensor by the last one.

With a `found_inf` flag, launch 1 sets it to 1 if any gradient has an infinity or a NaN, and launch 2 writes nothing
where it is not 0, so the gradients need no separate finite check. Adapted tensors are not read again for it, because a
finite sum of squares has finite terms; the gradients of the others (biases and norm parameters) are read once more.
Launch 2 writes nothing either where tau is NaN, or a learning rate on the device is NaN, infinite or negative.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from byol_kernels._multi_tensor import CHUNK, NUM_WARPS, Column, MultiTensorPlan
from byol_kernels._triton import device_guard, jit, next_power_of_2, tl, tl_dtype
from byol_kernels.ema.kernels import lerp, load_ema_weight
from byol_kernels.lars.norms import has_non_finite, is_accurate, load, norms_chunk, wide_norms_chunk, wide_ratio

BLOCK_PARTIALS = 1024


@jit
def _store(
    address: tl.tensor,
    offsets: tl.tensor,
    value: tl.tensor,
    count: tl.tensor,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> None:
    """Store the first `count` elements at an address that is a multiple of 16 bytes if ALIGNED."""
    ptr = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)
    tl.store(ptr + offsets, value.to(DTYPE), mask=offsets < count)


@jit
def _lars_norms_kernel(
    addresses_ptr: tl.tensor,  # [K, R] int64: parameter, gradient, ...
    rows_ptr: tl.tensor,  # [R, 4] int64: elements, dtype combination, first chunk, flags = 2 * group + adapt
    chunks_ptr: tl.tensor,  # [C, 2] int64: row, chunk within the row; the adapted rows with a gradient come first
    groups_ptr: tl.tensor,  # [groups, 4]: momentum, weight decay, trust coefficient, lr
    num_rows: tl.tensor,
    num_adapted_chunks: tl.tensor,  # the grid's programs; with found_inf the grid covers the chunks of all rows
    grad_scale_ptr: tl.tensor,  # [] or None
    found_inf_ptr: tl.tensor,  # [] out, or None: set to 1 if any gradient has an infinity or a NaN
    partials_ptr: tl.tensor,  # [2, C] float64 squares of parameter and update
    arrival_counters_ptr: tl.tensor,  # [R] int32: 0 before, 0 after
    ratios_ptr: tl.tensor,  # [R] out
    DTYPE_COMBOS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_PARTIALS: tl.constexpr,
) -> None:
    # --- the row and the chunk of this program
    chunk = tl.program_id(0)
    row = tl.load(chunks_ptr + 2 * chunk)
    first = tl.load(chunks_ptr + 2 * chunk + 1) * CHUNK
    row_numel = tl.load(rows_ptr + 4 * row)
    dtype_combo = tl.load(rows_ptr + 4 * row + 1)
    first_chunk = tl.load(rows_ptr + 4 * row + 2)
    group = tl.load(rows_ptr + 4 * row + 3) // 2
    p_address = tl.load(addresses_ptr + row)
    g_address = tl.load(addresses_ptr + num_rows + row)
    decay = tl.load(groups_ptr + 4 * group + 1)
    inv_scale = 1.0
    if grad_scale_ptr is not None:
        inv_scale = tl.div_rn(1.0, tl.load(grad_scale_ptr).to(tl.float32))
    numel = row_numel - first
    full = (numel >= CHUNK) & ((p_address | g_address) % 16 == 0)

    # --- squared norms of the chunk
    norms_combo = dtype_combo
    if found_inf_ptr is not None:
        norms_combo = tl.where(chunk < num_adapted_chunks, dtype_combo, -1)  # rows that are not adapted have no norms
    p_square = 0.0
    d_square = float("inf")
    for k in tl.static_range(len(DTYPE_COMBOS)):
        if norms_combo == k:
            p = p_address + first * (DTYPE_COMBOS[k][0].primitive_bitwidth // 8)
            g = g_address + first * (DTYPE_COMBOS[k][1].primitive_bitwidth // 8)
            if full:
                # A count that is known to be CHUNK or 0 leaves the accesses 128 bits wide.
                p_square, d_square = norms_chunk(p, g, CHUNK, decay, inv_scale, DTYPE_COMBOS[k], True, CHUNK)
            else:
                p_square, d_square = norms_chunk(p, g, numel, decay, inv_scale, DTYPE_COMBOS[k], False, CHUNK)
    p_partial = tl.cast(p_square, tl.float64)
    d_partial = tl.cast(d_square, tl.float64)
    if ~(is_accurate(p_square) & is_accurate(d_square)):
        for k in tl.static_range(len(DTYPE_COMBOS)):
            if norms_combo == k:
                p = p_address + first * (DTYPE_COMBOS[k][0].primitive_bitwidth // 8)
                g = g_address + first * (DTYPE_COMBOS[k][1].primitive_bitwidth // 8)
                count = tl.minimum(numel, CHUNK)
                p_partial, d_partial = wide_norms_chunk(p, g, count, decay, inv_scale, DTYPE_COMBOS[k], CHUNK // 4)

    # --- finite check
    if found_inf_ptr is not None:
        # Any non-finite gradient makes the sum of squares non-finite, whatever scale and decay are, so a finite sum
        # clears the chunk. The reverse does not hold: squares overflow, and the parameter may be the non-finite one.
        # In that case, and for rows without norms, the gradient itself is checked.
        if (g_address != 0) & ~(d_partial < float("inf")):
            for k in tl.static_range(len(DTYPE_COMBOS)):
                if dtype_combo == k:
                    g = g_address + first * (DTYPE_COMBOS[k][1].primitive_bitwidth // 8)
                    if has_non_finite(g, tl.minimum(numel, CHUNK), DTYPE_COMBOS[k], CHUNK // 4):
                        # No atomic: all programs store the same value, and none of this launch reads it.
                        tl.store(found_inf_ptr, 1.0)
        if chunk >= num_adapted_chunks:
            return

    # --- arrival: the last program of a row sees the partial norms of all
    tl.store(partials_ptr + chunk, p_partial)
    tl.store(partials_ptr + num_adapted_chunks + chunk, d_partial)
    # The barrier puts this program's stores before its arrival; acquire and release order them across programs.
    tl.debug_barrier()
    num_arrived = tl.atomic_add(arrival_counters_ptr + row, 1, sem="acq_rel", scope="gpu")
    row_chunks = tl.cdiv(row_numel, CHUNK)

    # --- trust ratio of the row
    if num_arrived == row_chunks - 1:
        p_squares = tl.zeros((BLOCK_PARTIALS,), tl.float32)
        d_squares = tl.zeros((BLOCK_PARTIALS,), tl.float32)
        start = 0
        while start < row_chunks:
            index = start + tl.arange(0, BLOCK_PARTIALS)
            partial_ptr = partials_ptr + first_chunk + index
            # .cg reads L2, where the other programs' stores are.
            mask = index < row_chunks
            p_squares += tl.load(partial_ptr, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
            d_partials = tl.load(partial_ptr + num_adapted_chunks, mask=mask, other=0.0, cache_modifier=".cg")
            d_squares += d_partials.to(tl.float32)
            start += BLOCK_PARTIALS
        p_square = tl.sum(p_squares, axis=0)
        d_square = tl.sum(d_squares, axis=0)
        trust_coefficient = tl.load(groups_ptr + 4 * group + 2)
        p_norm = tl.sqrt_rn(p_square)
        d_norm = tl.sqrt_rn(d_square)
        ratio = tl.where((p_norm > 0.0) & (d_norm > 0.0), trust_coefficient * tl.div_rn(p_norm, d_norm), 1.0)
        if ~(is_accurate(p_square) & is_accurate(d_square)):
            ratio = wide_ratio(
                partials_ptr + first_chunk, num_adapted_chunks, row_chunks, trust_coefficient, BLOCK_PARTIALS
            )
        tl.store(ratios_ptr + row, ratio)
        tl.store(arrival_counters_ptr + row, 0)  # ready for the next launch


@jit
def _apply_chunk(
    p_address: tl.tensor,
    g_address: tl.tensor,
    v_address: tl.tensor,
    t_address: tl.tensor,
    p_copy_address: tl.tensor,
    t_copy_address: tl.tensor,
    g_count: tl.tensor,  # a tensor's elements in this chunk, or 0 where the row lacks it
    t_count: tl.tensor,
    p_copy_count: tl.tensor,
    t_copy_count: tl.tensor,
    count: tl.tensor,
    lr: tl.tensor,
    momentum: tl.tensor,
    decay: tl.tensor,
    ratio: tl.tensor,
    inv_scale: tl.tensor,
    one_minus_tau: tl.tensor,
    DTYPES: tl.constexpr,
    HAS_TARGET: tl.constexpr,
    HAS_P_COPY: tl.constexpr,
    HAS_T_COPY: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """One chunk: the LARS rule, the EMA of the target, the copies."""
    ACC: tl.constexpr = tl.float64 if DTYPES[0] == tl.float64 else tl.float32
    offsets = tl.arange(0, CHUNK)
    # What a row may lack is predicated and not branched around: all loads then start together.
    p = load(p_address, offsets, count, DTYPES[0], ALIGNED)
    g = load(g_address, offsets, g_count, DTYPES[1], ALIGNED).to(ACC)
    v = load(v_address, offsets, g_count, DTYPES[2], ALIGNED).to(ACC)
    if HAS_TARGET:
        t = load(t_address, offsets, t_count, DTYPES[3], ALIGNED)
    # --- LARS
    v = momentum * v + ratio * (g * inv_scale + decay * p.to(ACC))
    p = tl.where(offsets < g_count, (p.to(ACC) - lr * v).to(DTYPES[0]), p)
    _store(v_address, offsets, v, g_count, DTYPES[2], ALIGNED)
    _store(p_address, offsets, p, g_count, DTYPES[0], ALIGNED)
    # --- EMA and copies
    if HAS_TARGET:
        # Of the parameter as it is stored, which is what a separate EMA would read.
        T_ACC: tl.constexpr = tl.float64 if DTYPES[3] == tl.float64 else tl.float32
        t = lerp(t.to(T_ACC), p.to(T_ACC), tl.cast(one_minus_tau, T_ACC)).to(DTYPES[3])
        _store(t_address, offsets, t, t_count, DTYPES[3], ALIGNED)
    if HAS_P_COPY:
        _store(p_copy_address, offsets, p, p_copy_count, DTYPES[4], ALIGNED)
    if HAS_T_COPY:
        _store(t_copy_address, offsets, t, t_copy_count, DTYPES[5], ALIGNED)


@jit
def _lars_apply_kernel(
    addresses_ptr: tl.tensor,  # [K, R] int64: parameter, gradient, momentum, target, copy of parameter, copy of target
    rows_ptr: tl.tensor,  # [R, 4] int64: elements, dtype combination, first chunk, flags = 2 * group + adapt
    chunks_ptr: tl.tensor,  # [C, 2] int64: row, chunk within the row
    groups_ptr: tl.tensor,  # [groups, 4]: momentum, weight decay, trust coefficient, lr
    lr_addresses_ptr: tl.tensor,  # [groups] int64: where lr is, or 0
    ratios_ptr: tl.tensor,  # [R]
    num_rows: tl.tensor,
    num_groups: tl.tensor,
    tau_ptr: tl.tensor,  # [] or None
    one_minus_tau: tl.tensor,  # where tau_ptr is None
    grad_scale_ptr: tl.tensor,  # [] or None
    found_inf_ptr: tl.tensor,  # [] or None
    DTYPE_COMBOS: tl.constexpr,
    HAS_TARGET: tl.constexpr,  # any row has a target, a copy of the parameter, a copy of the target
    HAS_P_COPY: tl.constexpr,
    HAS_T_COPY: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,  # power of two >= the number of groups, 0 if no learning rate is on the device
    CHUNK: tl.constexpr,
) -> None:
    # --- skipped step
    if found_inf_ptr is not None:  # noqa: SIM102 - decided when compiled; the next one at run time
        if tl.load(found_inf_ptr) != 0.0:
            return

    # --- the row and the chunk of this program
    row = tl.load(chunks_ptr + 2 * tl.program_id(0))
    first = tl.load(chunks_ptr + 2 * tl.program_id(0) + 1) * CHUNK
    numel = tl.load(rows_ptr + 4 * row) - first
    dtype_combo = tl.load(rows_ptr + 4 * row + 1)
    flags = tl.load(rows_ptr + 4 * row + 3)
    p_address = tl.load(addresses_ptr + row)
    g_address = tl.load(addresses_ptr + num_rows + row)
    v_address = tl.load(addresses_ptr + 2 * num_rows + row)
    t_address = tl.load(addresses_ptr + 3 * num_rows + row)
    p_copy_address = tl.load(addresses_ptr + 4 * num_rows + row)
    t_copy_address = tl.load(addresses_ptr + 5 * num_rows + row)

    # --- hyperparameters
    hyper_ptr = groups_ptr + 4 * (flags // 2)
    adapt = flags % 2 == 1
    momentum = tl.load(hyper_ptr)
    decay = tl.load(hyper_ptr + 1, mask=adapt, other=0.0)
    ratio = tl.load(ratios_ptr + row, mask=adapt, other=1.0)
    lr_address = tl.load(lr_addresses_ptr + flags // 2)
    lr = tl.load(hyper_ptr + 3)
    lr = tl.load(lr_address.to(tl.pointer_type(tl.float32)), mask=lr_address != 0, other=lr)
    inv_scale = 1.0
    if grad_scale_ptr is not None:
        inv_scale = tl.div_rn(1.0, tl.load(grad_scale_ptr).to(tl.float32))
    num_invalid = 0
    if tau_ptr is not None:
        one_minus_tau = load_ema_weight(tau_ptr)
        num_invalid += tl.where(one_minus_tau >= 0.0, 0, 1)
    if BLOCK_GROUPS > 0:
        # The learning rates of all groups, because a step is skipped as a whole.
        groups = tl.arange(0, BLOCK_GROUPS)
        lr_addresses = tl.load(lr_addresses_ptr + groups, mask=groups < num_groups, other=0)
        lrs = tl.load(lr_addresses.to(tl.pointer_type(tl.float32)), mask=lr_addresses != 0, other=0.0)
        num_invalid += tl.sum(tl.where((lrs >= 0.0) & (lrs < float("inf")), 0, 1), axis=0)
    if num_invalid != 0:  # here and not above: until here all loads are under way at once
        return

    # --- update, with the dtypes of the row: they are known when the kernel is compiled, which of them at run time
    every = p_address | g_address | v_address | t_address | p_copy_address | t_copy_address
    full = (numel >= CHUNK) & (every % 16 == 0)
    for k in tl.static_range(len(DTYPE_COMBOS)):
        if dtype_combo == k:
            DTYPES: tl.constexpr = DTYPE_COMBOS[k]
            p = p_address + first * (DTYPES[0].primitive_bitwidth // 8)
            g = g_address + first * (DTYPES[1].primitive_bitwidth // 8)
            v = v_address + first * (DTYPES[2].primitive_bitwidth // 8)
            t = t_address + first * (DTYPES[3].primitive_bitwidth // 8)
            pc = p_copy_address + first * (DTYPES[4].primitive_bitwidth // 8)
            tc = t_copy_address + first * (DTYPES[5].primitive_bitwidth // 8)
            if full:
                _apply_chunk(
                    p, g, v, t, pc, tc,
                    tl.where(g_address != 0, CHUNK, 0), tl.where(t_address != 0, CHUNK, 0),
                    tl.where(p_copy_address != 0, CHUNK, 0), tl.where(t_copy_address != 0, CHUNK, 0), CHUNK,
                    lr, momentum, decay, ratio, inv_scale, one_minus_tau, DTYPES, HAS_TARGET, HAS_P_COPY, HAS_T_COPY,
                    True, CHUNK,
                )  # fmt: skip
            else:
                _apply_chunk(
                    p, g, v, t, pc, tc,
                    tl.where(g_address != 0, numel, 0), tl.where(t_address != 0, numel, 0),
                    tl.where(p_copy_address != 0, numel, 0), tl.where(t_copy_address != 0, numel, 0), numel,
                    lr, momentum, decay, ratio, inv_scale, one_minus_tau, DTYPES, HAS_TARGET, HAS_P_COPY, HAS_T_COPY,
                    False, CHUNK,
                )  # fmt: skip


def lars_step(
    plan: MultiTensorPlan,
    columns: Sequence[Column],
    *,
    lr: Sequence[float],
    lr_tensors: Sequence[Tensor | None],
    momentum: Sequence[float],
    weight_decay: Sequence[float],
    trust_coefficient: Sequence[float],
    tau: float,
    tau_tensor: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """Launch one LARS step.

    Args:
        plan: of the lists; adapted rows with a gradient first, flags 2 * group + adapt.
        columns: lists of parameters, gradients, momentum buffers, targets, copies of parameters, copies of targets.
        lr: learning rate per group.
        lr_tensors: learning rate per group, 0-dim, on the device of the lists; None where `lr` holds.
        momentum: per group.
        weight_decay: per group.
        trust_coefficient: per group.
        tau: decay of the EMA where `tau_tensor` is None.
        tau_tensor: decay of the EMA, 0-dim, on the device of the lists.
        grad_scale: loss scale of the gradients, 0-dim.
        found_inf: flag, in and out.
    """
    device = columns[0].tensors[0].device
    hyper = [value for group in zip(momentum, weight_decay, trust_coefficient, lr, strict=True) for value in group]
    groups = plan.constant("groups", "f", hyper, device)
    lr_addresses = [0 if tensor is None else tensor.data_ptr() for tensor in lr_tensors]
    lr_table = plan.constant("lr", "q", lr_addresses, device)

    tables = plan.tables(columns)
    combos = tuple(tuple(map(tl_dtype, combo)) for combo in plan.dtype_combos)
    num_rows, num_adapted = len(columns[0].tensors), plan.num_adapted_chunks
    has_target, has_p_copy, has_t_copy = (bool(column.tensors) for column in columns[3:])
    ratios = plan.workspace("ratios", num_rows, torch.float32, device)
    num_norms_programs = num_adapted if found_inf is None else plan.num_chunks
    with device_guard(columns[0].tensors[0]):
        if num_norms_programs:
            _lars_norms_kernel[(num_norms_programs,)](
                tables.addresses, tables.rows, tables.chunks, groups, num_rows, num_adapted, grad_scale, found_inf,
                plan.workspace("partials", 2 * num_adapted, torch.float64, device),
                plan.workspace("arrival_counters", num_rows, torch.int32, device),
                ratios,
                DTYPE_COMBOS=tuple(combo[:2] for combo in combos), CHUNK=CHUNK, BLOCK_PARTIALS=BLOCK_PARTIALS,
                num_warps=NUM_WARPS, enable_fp_fusion=True,
            )  # fmt: skip
        _lars_apply_kernel[(plan.num_chunks,)](
            tables.addresses, tables.rows, tables.chunks, groups, lr_table, ratios, num_rows,
            len(lr), tau_tensor, 1.0 - tau, grad_scale, found_inf,
            DTYPE_COMBOS=combos, HAS_TARGET=has_target, HAS_P_COPY=has_p_copy, HAS_T_COPY=has_t_copy,
            BLOCK_GROUPS=next_power_of_2(len(lr)) if any(lr_addresses) else 0, CHUNK=CHUNK,
            num_warps=NUM_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
