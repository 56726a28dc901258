"""LARS, with the moving average of the target and low-precision copies, for all parameters in two launches.

The rule of BYOL's reference code (google-deepmind/deepmind-research, byol/utils/optimizers.py). Per tensor:

    d = g + weight_decay p                      (d = g for biases and norm parameters)
    r = eta |p| / |d|                           (r = 1 where either norm is 0, and for biases and norm parameters)
    v = momentum v + r d
    p = p - lr v

The learning rate is outside the momentum, so a changing one acts at once. Two things differ from the LARC of most
PyTorch packages: the ratio is of |p| to |d|, not to |g| + weight_decay |p|, and no norm ever leaves the device.

Launch 1 takes the partial norms of each tensor; the program that draws a tensor's last ticket adds them up in a fixed
order, so runs repeat bit for bit. Launch 2 applies the rule and, while the parameter is in registers, updates its
target and writes the copies. It moves 40 bytes a float32 parameter with target and two bfloat16 copies.

With a `found_inf` flag, launch 1 sets it to 1 if any gradient has an infinity or a NaN, and launch 2 writes nothing
where it is not 0, so the gradients need no separate finite check. Adapted tensors are not read again for it, because a
finite sum of squares has finite terms; the gradients of the others (biases and norm parameters) are read once more.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from byol_kernels import reference
from byol_kernels._multi_tensor import CHUNK, NUM_WARPS, Column, MultiTensorPlan, plan_for, same_layout
from byol_kernels._triton import device_guard, jit, tl, tl_dtype
from byol_kernels.ema import check_tau, lerp

BLOCK_PARTIALS = 1024

# -------------------------------------------------------------------------------- kernels


@jit
def _load(
    address: tl.tensor,
    offsets: tl.tensor,
    count: tl.tensor,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> tl.tensor:
    """The first `count` elements at an address that is a multiple of 16 bytes if ALIGNED; zeros after them."""
    ptr = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)
    return tl.load(ptr + offsets, mask=offsets < count, other=0.0)


@jit
def _store(
    address: tl.tensor,
    offsets: tl.tensor,
    value: tl.tensor,
    count: tl.tensor,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> None:
    ptr = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)
    tl.store(ptr + offsets, value.to(DTYPE), mask=offsets < count)


@jit
def _norms_chunk(
    p_address: tl.tensor,
    g_address: tl.tensor,
    count: tl.tensor,
    decay: tl.tensor,
    inv_scale: tl.tensor,
    KIND: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
) -> tl.tensor:
    ACC: tl.constexpr = tl.float64 if KIND[0] == tl.float64 else tl.float32
    offsets = tl.arange(0, CHUNK)
    p = _load(p_address, offsets, count, KIND[0], ALIGNED).to(ACC)
    d = _load(g_address, offsets, count, KIND[1], ALIGNED).to(ACC) * inv_scale + decay * p
    return tl.sum(p * p, axis=0).to(tl.float32), tl.sum(d * d, axis=0).to(tl.float32)


@jit
def _has_non_finite(
    g_address: tl.tensor,
    count: tl.tensor,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """True if any of the first `count` elements of a gradient is an infinity or a NaN."""
    # Compared in the gradient's own precision: a finite float64 may be infinite in float32.
    WIDE: tl.constexpr = tl.float64 if KIND[1] == tl.float64 else tl.float32
    offsets = tl.arange(0, BLOCK)
    non_finite = tl.zeros((BLOCK,), tl.int1)
    # In blocks: all at once would take more registers than the norms do.
    start = 0
    while start < count:
        g = _load(g_address, start + offsets, count, KIND[1], False).to(WIDE)
        non_finite |= ~(tl.abs(g) < float("inf"))  # a NaN is not less than anything
        start += BLOCK
    return tl.max(non_finite.to(tl.int32), axis=0) != 0


@jit
def _lars_norms_kernel(
    addresses_ptr: tl.tensor,  # [K, R] int64: parameter, gradient, ...
    rows_ptr: tl.tensor,  # [R, 4] int64: elements, kind, first chunk, tag = 2 * group + adapt
    chunks_ptr: tl.tensor,  # [C, 2] int64: row, chunk within the row; the adapted rows with a gradient come first
    groups_ptr: tl.tensor,  # [groups, 4]: momentum, weight decay, eta, lr
    num_rows: tl.tensor,
    num_chunks: tl.tensor,  # of the adapted rows; the grid has as many programs, or those of all rows with found_inf
    grad_scale_ptr: tl.tensor,  # [] or None
    found_inf_ptr: tl.tensor,  # [] out, or None: set to 1 if any gradient has an infinity or a NaN
    partials_ptr: tl.tensor,  # [2, C] squares of parameter and update
    tickets_ptr: tl.tensor,  # [R] int32: 0 before, 0 after
    ratios_ptr: tl.tensor,  # [R] out
    KINDS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_PARTIALS: tl.constexpr,
) -> None:
    chunk = tl.program_id(0)
    row = tl.load(chunks_ptr + 2 * chunk)
    first = tl.load(chunks_ptr + 2 * chunk + 1) * CHUNK
    row_numel = tl.load(rows_ptr + 4 * row)
    kind = tl.load(rows_ptr + 4 * row + 1)
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
    kind_of_norms = kind
    if found_inf_ptr is not None:
        kind_of_norms = tl.where(chunk < num_chunks, kind, -1)  # rows that are not adapted have none
    p_square = 0.0
    d_square = float("inf")
    for k in tl.static_range(len(KINDS)):
        if kind_of_norms == k:
            p = p_address + first * (KINDS[k][0].primitive_bitwidth // 8)
            g = g_address + first * (KINDS[k][1].primitive_bitwidth // 8)
            if full:
                # A count that is known to be CHUNK or 0 leaves the accesses 128 bits wide.
                p_square, d_square = _norms_chunk(p, g, CHUNK, decay, inv_scale, KINDS[k], True, CHUNK)
            else:
                p_square, d_square = _norms_chunk(p, g, numel, decay, inv_scale, KINDS[k], False, CHUNK)
    if found_inf_ptr is not None:
        # Any non-finite gradient makes the sum of squares non-finite, whatever scale and decay are, so a finite sum
        # clears the chunk. The reverse does not hold: squares overflow, and the parameter may be the non-finite one.
        # In that case, and for rows without norms, the gradient itself is checked.
        if (g_address != 0) & ~(d_square < float("inf")):
            for k in tl.static_range(len(KINDS)):
                if kind == k:
                    g = g_address + first * (KINDS[k][1].primitive_bitwidth // 8)
                    if _has_non_finite(g, tl.minimum(numel, CHUNK), KINDS[k], CHUNK // 4):
                        # No atomic: all programs store the same value, and none of this launch reads it.
                        tl.store(found_inf_ptr, 1.0)
        if chunk >= num_chunks:
            return
    tl.store(partials_ptr + chunk, p_square)
    tl.store(partials_ptr + num_chunks + chunk, d_square)

    # The barrier puts this program's stores before its ticket; acquire and release order them across programs.
    tl.debug_barrier()
    ticket = tl.atomic_add(tickets_ptr + row, 1, sem="acq_rel", scope="gpu")
    row_chunks = tl.cdiv(row_numel, CHUNK)
    if ticket == row_chunks - 1:
        p_squares = tl.zeros((BLOCK_PARTIALS,), tl.float32)
        d_squares = tl.zeros((BLOCK_PARTIALS,), tl.float32)
        start = 0
        while start < row_chunks:
            index = start + tl.arange(0, BLOCK_PARTIALS)
            partial_ptr = partials_ptr + first_chunk + index
            # .cg reads L2, where the other programs' stores are.
            p_squares += tl.load(partial_ptr, mask=index < row_chunks, other=0.0, cache_modifier=".cg")
            d_squares += tl.load(partial_ptr + num_chunks, mask=index < row_chunks, other=0.0, cache_modifier=".cg")
            start += BLOCK_PARTIALS
        p_norm = tl.sqrt_rn(tl.sum(p_squares, axis=0))
        d_norm = tl.sqrt_rn(tl.sum(d_squares, axis=0))
        eta = tl.load(groups_ptr + 4 * group + 2)
        ratio = tl.where((p_norm > 0.0) & (d_norm > 0.0), eta * tl.div_rn(p_norm, d_norm), 1.0)
        tl.store(ratios_ptr + row, ratio)
        tl.store(tickets_ptr + row, 0)


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
    weight: tl.tensor,
    KIND: tl.constexpr,
    HAS: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    ACC: tl.constexpr = tl.float64 if KIND[0] == tl.float64 else tl.float32
    offsets = tl.arange(0, CHUNK)
    # What a row may lack is predicated and not branched around: all loads then start together.
    p = _load(p_address, offsets, count, KIND[0], ALIGNED)
    g = _load(g_address, offsets, g_count, KIND[1], ALIGNED).to(ACC)
    v = _load(v_address, offsets, g_count, KIND[2], ALIGNED).to(ACC)
    if HAS[0]:
        t = _load(t_address, offsets, t_count, KIND[3], ALIGNED)
    v = momentum * v + ratio * (g * inv_scale + decay * p.to(ACC))
    p = tl.where(offsets < g_count, (p.to(ACC) - lr * v).to(KIND[0]), p)
    _store(v_address, offsets, v, g_count, KIND[2], ALIGNED)
    _store(p_address, offsets, p, g_count, KIND[0], ALIGNED)
    if HAS[0]:
        # The average is of the parameter as it is stored, which is what a separate EMA would read.
        T_ACC: tl.constexpr = tl.float64 if KIND[3] == tl.float64 else tl.float32
        t = lerp(t.to(T_ACC), p.to(T_ACC), tl.cast(weight, T_ACC)).to(KIND[3])
        _store(t_address, offsets, t, t_count, KIND[3], ALIGNED)
    if HAS[1]:
        _store(p_copy_address, offsets, p, p_copy_count, KIND[4], ALIGNED)
    if HAS[2]:
        _store(t_copy_address, offsets, t, t_copy_count, KIND[5], ALIGNED)


@jit
def _lars_apply_kernel(
    addresses_ptr: tl.tensor,  # [K, R] int64: parameter, gradient, momentum, target, copy of parameter, copy of target
    rows_ptr: tl.tensor,  # [R, 4] int64: elements, kind, first chunk, tag = 2 * group + adapt
    chunks_ptr: tl.tensor,  # [C, 2] int64: row, chunk within the row
    groups_ptr: tl.tensor,  # [groups, 4]: momentum, weight decay, eta, lr
    lr_addresses_ptr: tl.tensor,  # [groups] int64: where lr is, or 0
    ratios_ptr: tl.tensor,  # [R]
    num_rows: tl.tensor,
    tau_ptr: tl.tensor,  # [] or None
    weight: tl.tensor,  # 1 - tau where tau_ptr is None
    grad_scale_ptr: tl.tensor,  # [] or None
    found_inf_ptr: tl.tensor,  # [] or None
    KINDS: tl.constexpr,
    HAS: tl.constexpr,  # whether any row has a target, a copy of the parameter, a copy of the target
    CHUNK: tl.constexpr,
) -> None:
    if found_inf_ptr is not None:  # noqa: SIM102 - decided when compiled; the next one at run time
        if tl.load(found_inf_ptr) != 0.0:
            return
    row = tl.load(chunks_ptr + 2 * tl.program_id(0))
    first = tl.load(chunks_ptr + 2 * tl.program_id(0) + 1) * CHUNK
    numel = tl.load(rows_ptr + 4 * row) - first
    kind = tl.load(rows_ptr + 4 * row + 1)
    tag = tl.load(rows_ptr + 4 * row + 3)
    p_address = tl.load(addresses_ptr + row)
    g_address = tl.load(addresses_ptr + num_rows + row)
    v_address = tl.load(addresses_ptr + 2 * num_rows + row)
    t_address = tl.load(addresses_ptr + 3 * num_rows + row)
    p_copy_address = tl.load(addresses_ptr + 4 * num_rows + row)
    t_copy_address = tl.load(addresses_ptr + 5 * num_rows + row)

    hyper_ptr = groups_ptr + 4 * (tag // 2)
    adapt = tag % 2 == 1
    momentum = tl.load(hyper_ptr)
    decay = tl.load(hyper_ptr + 1, mask=adapt, other=0.0)
    ratio = tl.load(ratios_ptr + row, mask=adapt, other=1.0)
    lr_address = tl.load(lr_addresses_ptr + tag // 2)
    lr = tl.load(hyper_ptr + 3)
    lr = tl.load(lr_address.to(tl.pointer_type(tl.float32)), mask=lr_address != 0, other=lr)
    inv_scale = 1.0
    if grad_scale_ptr is not None:
        inv_scale = tl.div_rn(1.0, tl.load(grad_scale_ptr).to(tl.float32))
    if tau_ptr is not None:
        weight = 1.0 - tl.load(tau_ptr)

    every = p_address | g_address | v_address | t_address | p_copy_address | t_copy_address
    full = (numel >= CHUNK) & (every % 16 == 0)
    for k in tl.static_range(len(KINDS)):
        if kind == k:
            KIND: tl.constexpr = KINDS[k]
            p = p_address + first * (KIND[0].primitive_bitwidth // 8)
            g = g_address + first * (KIND[1].primitive_bitwidth // 8)
            v = v_address + first * (KIND[2].primitive_bitwidth // 8)
            t = t_address + first * (KIND[3].primitive_bitwidth // 8)
            pc = p_copy_address + first * (KIND[4].primitive_bitwidth // 8)
            tc = t_copy_address + first * (KIND[5].primitive_bitwidth // 8)
            if full:
                _apply_chunk(
                    p, g, v, t, pc, tc,
                    tl.where(g_address != 0, CHUNK, 0), tl.where(t_address != 0, CHUNK, 0),
                    tl.where(p_copy_address != 0, CHUNK, 0), tl.where(t_copy_address != 0, CHUNK, 0), CHUNK,
                    lr, momentum, decay, ratio, inv_scale, weight, KIND, HAS, True, CHUNK,
                )  # fmt: skip
            else:
                _apply_chunk(
                    p, g, v, t, pc, tc,
                    tl.where(g_address != 0, numel, 0), tl.where(t_address != 0, numel, 0),
                    tl.where(p_copy_address != 0, numel, 0), tl.where(t_copy_address != 0, numel, 0), numel,
                    lr, momentum, decay, ratio, inv_scale, weight, KIND, HAS, False, CHUNK,
                )  # fmt: skip


# -------------------------------------------------------------------------------- operators


class _Arguments(NamedTuple):
    """What the operator is called with; the lists beside a `..._rows` have one tensor for each of these rows."""

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    momentum_buffers: Sequence[Tensor]
    grad_rows: Sequence[int]
    targets: Sequence[Tensor]
    target_rows: Sequence[int]
    param_copies: Sequence[Tensor]
    param_copy_rows: Sequence[int]
    target_copies: Sequence[Tensor]
    target_copy_rows: Sequence[int]
    group: Sequence[int]
    adapt: Sequence[bool]
    lr_tensors: Sequence[Tensor | None]
    lr: Sequence[float]
    momentum: Sequence[float]
    weight_decay: Sequence[float]
    eta: Sequence[float]
    tau_tensor: Tensor | None
    tau: float
    grad_scale: Tensor | None
    found_inf: Tensor | None

    def columns(self) -> list[Column]:
        """The lists of tensors as a plan takes them."""
        return [
            Column("params", self.params, written=True),
            Column("grads", self.grads, tuple(self.grad_rows)),
            Column("momentum_buffers", self.momentum_buffers, tuple(self.grad_rows), written=True),
            Column("target", self.targets, tuple(self.target_rows), written=True),
            Column("copies of params", self.param_copies, tuple(self.param_copy_rows), written=True),
            Column("copies of target", self.target_copies, tuple(self.target_copy_rows), written=True),
        ]


def _plan(a: _Arguments, columns: Sequence[Column]) -> MultiTensorPlan:
    with_grad = set(a.grad_rows)
    return plan_for(
        "LARS.step",
        columns,
        front=[adapt and row in with_grad for row, adapt in enumerate(a.adapt)],
        tags=[2 * group + adapt for group, adapt in zip(a.group, a.adapt, strict=True)],
    )


def _lars_step_cpu(*arguments: Any) -> None:
    a = _Arguments(*arguments)
    if not _plan(a, a.columns()).num_chunks:
        return
    if a.found_inf is not None:
        if not reference.all_finite(a.grads):
            a.found_inf.fill_(1.0)
        if float(a.found_inf) != 0.0:
            return
    lr = [value if tensor is None else float(tensor) for tensor, value in zip(a.lr_tensors, a.lr, strict=True)]
    scale = 1.0 if a.grad_scale is None else float(a.grad_scale)
    tau = a.tau if a.tau_tensor is None else float(a.tau_tensor)

    def by_row(rows: Sequence[int], tensors: Sequence[Tensor]) -> list[Tensor | None]:
        entries: list[Tensor | None] = [None] * len(a.params)
        for row, tensor in zip(rows, tensors, strict=True):
            entries[row] = tensor
        return entries

    reference.lars_step_(
        a.params,
        by_row(a.grad_rows, a.grads),
        by_row(a.grad_rows, a.momentum_buffers),
        by_row(a.target_rows, a.targets),
        lr=[lr[g] for g in a.group],
        momentum=[a.momentum[g] for g in a.group],
        weight_decay=[a.weight_decay[g] for g in a.group],
        eta=[a.eta[g] for g in a.group],
        adapt=a.adapt,
        grad_scale=scale,
        tau=tau,
    )
    if a.param_copies:
        torch._foreach_copy_(list(a.param_copies), [a.params[row] for row in a.param_copy_rows])
    if a.target_copies:
        target_of = dict(zip(a.target_rows, a.targets, strict=True))
        torch._foreach_copy_(list(a.target_copies), [target_of[row] for row in a.target_copy_rows])


def _increment_versions(a: _Arguments) -> None:
    """Tells autograd what a kernel has written."""
    torch.autograd.graph.increment_version(
        [
            *(a.params[row] for row in a.grad_rows),
            *a.momentum_buffers,
            *a.targets,
            *a.param_copies,
            *a.target_copies,
            *(() if a.found_inf is None else (a.found_inf,)),
        ]
    )


def _lars_step_cuda(*arguments: Any) -> None:
    a = _Arguments(*arguments)
    columns = a.columns()
    plan = _plan(a, columns)
    if not plan.num_chunks:
        return
    device = a.params[0].device

    # A scalar on the CPU is read here: there is nothing to wait for.
    tau, tau_tensor = a.tau, a.tau_tensor
    if tau_tensor is not None and tau_tensor.device != device:
        tau, tau_tensor = float(tau_tensor), None
    hyper: list[float] = []
    lr_addresses: list[float] = []
    for g, tensor in enumerate(a.lr_tensors):
        on_device = tensor is not None and tensor.device == device
        hyper += [a.momentum[g], a.weight_decay[g], a.eta[g], a.lr[g] if tensor is None or on_device else float(tensor)]
        lr_addresses.append(tensor.data_ptr() if tensor is not None and on_device else 0)
    groups = plan.constant("groups", "f", hyper, device)
    lr_table = plan.constant("lr", "q", lr_addresses, device)

    tables = plan.tables(columns)
    kinds = tuple(tuple(map(tl_dtype, kind)) for kind in plan.kinds)
    num_rows, front = len(a.params), plan.num_front_chunks
    num_programs = front if a.found_inf is None else plan.num_chunks
    ratios = plan.workspace("ratios", num_rows, torch.float32, device)
    with device_guard(a.params[0]):
        if num_programs:
            _lars_norms_kernel[(num_programs,)](
                tables.addresses, tables.rows, tables.chunks, groups, num_rows, front, a.grad_scale, a.found_inf,
                plan.workspace("partials", 2 * front, torch.float32, device),
                plan.workspace("tickets", num_rows, torch.int32, device),
                ratios,
                KINDS=tuple(kind[:2] for kind in kinds), CHUNK=CHUNK, BLOCK_PARTIALS=BLOCK_PARTIALS,
                num_warps=NUM_WARPS, enable_fp_fusion=True,
            )  # fmt: skip
        _lars_apply_kernel[(plan.num_chunks,)](
            tables.addresses, tables.rows, tables.chunks, groups, lr_table, ratios, num_rows,
            tau_tensor, 1.0 - tau, a.grad_scale, a.found_inf,
            KINDS=kinds, HAS=(bool(a.targets), bool(a.param_copies), bool(a.target_copies)), CHUNK=CHUNK,
            num_warps=NUM_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    _increment_versions(a)


torch.library.define(
    "byol_kernels::lars_step_",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, int[] grad_rows,"
    " Tensor(c!)[] targets, int[] target_rows, Tensor(d!)[] param_copies, int[] param_copy_rows,"
    " Tensor(e!)[] target_copies, int[] target_copy_rows, int[] group, bool[] adapt,"
    " Tensor?[] lr_tensors, float[] lr, float[] momentum, float[] weight_decay, float[] eta,"
    " Tensor? tau_tensor, float tau, Tensor? grad_scale, Tensor(f!)? found_inf) -> ()",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
torch.library.impl("byol_kernels::lars_step_", "CPU", _lars_step_cpu)
torch.library.impl("byol_kernels::lars_step_", "CUDA", _lars_step_cuda)


def _lars_step_fake(*args: Any) -> None:
    return None


torch.library.register_fake("byol_kernels::lars_step_", _lars_step_fake)


# -------------------------------------------------------------------------------- public class


class LARS(torch.optim.Optimizer):
    """LARS by the rule of BYOL's reference code, for all parameters in two launches and without a host sync.

    Per tensor: d = g + weight_decay p; r = eta |p| / |d|, or 1 where either norm is 0; v = momentum v + r d;
    p = p - lr v (google-deepmind/deepmind-research, byol/utils/optimizers.py; LARS: You et al. 2017,
    arXiv 1708.03888). Biases and the parameters of normalisation layers, which are those of one dimension or none,
    have d = g and r = 1.

    `step` can also update the target network and write low-precision copies in the same two launches. It can be
    captured into a CUDA graph once one step has run; lr and tau as 0-dim tensors on the device are then read at every
    replay. With `torch.amp.GradScaler` the unscaling and the skipping of a step happen on the device.

    The attribute `found_inf` (set by `GradScaler` or by the training loop) is None or a float32 flag on the device of
    the parameters, an input and an output. A step sets it to 1 if any gradient, before unscaling, has an infinity or a
    NaN; the launch that computes the norms finds them, so no separate pass over the gradients is needed. If the flag
    is not 0 then or was not on entry, the step writes nothing else. It is never reset to 0. None: no check.

    Args:
        params: parameters, or groups of them with their own lr, momentum, weight_decay, eta or exclude_1d. They are
            floating point, dense, on one device. Momentum has the dtype of its parameter; the arithmetic is in
            float32, or in float64 for float64 parameters (norms and scalars are float32 on a GPU all the same).
        lr: learning rate; a float, or a 0-dim tensor (float32 if it is on a GPU).
        momentum: decay of the momentum.
        weight_decay: L2 penalty, added to the gradient.
        eta: trust coefficient.
        exclude_1d: leave tensors of one dimension or none out of weight decay and adaptation.

    Raises:
        ValueError: on hyperparameters out of range.
    """

    _step_supports_amp_scaling = True  # GradScaler then hands over grad_scale and found_inf instead of acting on them
    grad_scale: Tensor | None
    found_inf: Tensor | None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eta: float = 1e-3,
        *,
        exclude_1d: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "eta": eta,
            "exclude_1d": exclude_1d,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, after checking its hyperparameters."""
        group = {**self.defaults, **param_group}
        lr = group["lr"]
        if isinstance(lr, Tensor):
            if lr.dim() != 0 or not lr.is_floating_point() or (lr.device.type == "cuda" and lr.dtype != torch.float32):
                raise ValueError(
                    f"LARS: lr must be a number or a 0-dim tensor (float32 on a GPU), got shape {tuple(lr.shape)} of "
                    f"{lr.dtype} on {lr.device}; make it with torch.tensor(0.2, device='cuda')"
                )
        elif not (lr >= 0.0 and math.isfinite(lr)):
            raise ValueError(f"LARS: lr must be finite and not negative, got {lr}; BYOL's is 0.2 * batch / 256")
        for name in ("weight_decay", "eta"):
            if not (group[name] >= 0.0 and math.isfinite(group[name])):
                raise ValueError(
                    f"LARS: {name} must be finite and not negative, got {group[name]}; BYOL's is "
                    f"{'1.5e-6' if name == 'weight_decay' else '1e-3'}"
                )
        if not 0.0 <= group["momentum"] < 1.0:
            raise ValueError(f"LARS: momentum must be in [0, 1), got {group['momentum']}; BYOL's is 0.9")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        ema: tuple[Iterable[Tensor | None] | Mapping[Tensor, Tensor], float | Tensor] | None = None,
        copies: Iterable[Tensor | None] | Mapping[Tensor, Tensor] | None = None,
    ) -> Any:
        """One step; optionally the target's moving average and low-precision copies in the same two launches.

        Parameters without a gradient stay as they are; their targets and copies are written all the same. With a
        `found_inf` flag (see the class) that is not 0, or that an infinity or a NaN in a gradient sets to 1, nothing
        else is written, targets and copies included.

        Args:
            closure: evaluates the model again and returns the loss.
            ema: (targets, tau): afterwards target = tau * target + (1 - tau) * parameter, as `ema_update_`. Targets
                are a mapping from parameter to target, or one entry per parameter in the order of `param_groups`, None
                for a parameter without a target (the predictor's).
            copies: where to write the updated weights in another dtype: a mapping from parameter or target to its
                copy, or one entry per parameter, None for no copy.

        Returns:
            What the closure returned, or None.

        Raises:
            ValueError: on targets or copies that do not fit their parameters, or that share memory with anything
                else of the step; on a `found_inf` that is not one float32 number on their device. Nothing has been
                written then.
            RuntimeError: if the first step is being captured into a CUDA graph.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        params = [p for group in self.param_groups for p in group["params"]]
        if not params:
            return loss
        target_of, tau_tensor, tau = {}, None, 1.0
        if ema is not None:
            target_of = _by_partner("ema targets", ema[0], params, params)
            tau_tensor, tau = check_tau("LARS.step", ema[1])
        copy_of = _by_partner("copies", copies, params, [*params, *target_of.values()]) if copies is not None else {}

        # Each look at a tensor that fell out of the cache counts, so what is not asked for is not looked for.
        names = [*map(id, params)]
        grad_rows, grads = _present([p.grad for p in params])
        target_rows, targets = _present([target_of.get(name) for name in names])
        param_copy_rows, param_copies = _present([copy_of.get(name) for name in names] if copy_of else ())
        target_copy_rows, target_copies = _present(
            [copy_of.get(id(target_of.get(name))) for name in names] if copy_of else ()
        )
        for row, grad in zip(grad_rows, grads, strict=True):
            if grad.layout != torch.strided:
                raise ValueError(
                    f"LARS.step: the gradient of params[{row}] must be dense, got {grad.layout}; "
                    "make the embedding with sparse=False"
                )
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None:
            _check_found_inf(found_inf, params[0].device)
        groups = self.param_groups
        group_of = [g for g, group in enumerate(groups) for _ in group["params"]]
        step = _lars_step_cpu if reference.is_plain(params[0]) else torch.ops.byol_kernels.lars_step_.default
        step(
            params,
            grads,
            [self._momentum_buffer(params[row]) for row in grad_rows],
            grad_rows,
            targets,
            target_rows,
            param_copies,
            param_copy_rows,
            target_copies,
            target_copy_rows,
            group_of,
            [p.dim() > 1 or not groups[g]["exclude_1d"] for g, p in zip(group_of, params, strict=True)],
            [group["lr"] if isinstance(group["lr"], Tensor) else None for group in groups],
            [0.0 if isinstance(group["lr"], Tensor) else float(group["lr"]) for group in groups],
            *([float(group[name]) for group in groups] for name in ("momentum", "weight_decay", "eta")),
            tau_tensor,
            tau,
            getattr(self, "grad_scale", None),
            found_inf,
        )
        return loss

    def _momentum_buffer(self, param: Tensor) -> Tensor:
        """The momentum of a parameter in the parameter's layout, which a checkpoint need not have had."""
        state = self.state[param]
        buffer = cast("Tensor | None", state.get("momentum_buffer"))
        if buffer is None or not same_layout(buffer, param):
            if param.is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "LARS.step: momentum must exist before a CUDA graph is captured, got a first step within the "
                    "capture; run one step before it"
                )
            laid_out = torch.zeros_like(param, memory_format=torch.preserve_format)
            buffer = state["momentum_buffer"] = laid_out if buffer is None else laid_out.copy_(buffer)
        return buffer


def _check_found_inf(found_inf: Tensor, device: torch.device) -> None:
    if found_inf.numel() != 1 or found_inf.dtype != torch.float32 or found_inf.device != device:
        raise ValueError(
            f"LARS.step: found_inf must be one float32 number on {device}, where the parameters are, got shape "
            f"{tuple(found_inf.shape)} of {found_inf.dtype} on {found_inf.device}; make it with "
            f"torch.zeros((), device='{device}')"
        )


def _by_partner(
    name: str,
    entries: Iterable[Tensor | None] | Mapping[Tensor, Tensor],
    params: Sequence[Tensor],
    partners: Sequence[Tensor],
) -> dict[int, Tensor]:
    """The entries by the `id` of the tensor they belong to."""
    if isinstance(entries, Mapping):
        known = set(map(id, partners))
        for key in entries:
            if id(key) not in known:
                raise ValueError(
                    f"LARS.step: {name} must map tensors of this step, got a key of shape {tuple(key.shape)} that is "
                    "none of them; take the keys from the optimizer's param_groups"
                )
        return {id(key): entry for key, entry in entries.items()}
    listed = list(entries)
    if len(listed) != len(params):
        raise ValueError(
            f"LARS.step: {name} must have one entry for each of the {len(params)} parameters, got {len(listed)}; "
            "put None where a parameter has none, or pass a mapping from parameter to entry"
        )
    return {id(p): entry for p, entry in zip(params, listed, strict=True) if entry is not None}


def _present(entries: Iterable[Tensor | None]) -> tuple[list[int], list[Tensor]]:
    """Rows that have an entry, and the entries."""
    found = [(row, entry) for row, entry in enumerate(entries) if entry is not None]
    return [row for row, _ in found], [entry for _, entry in found]
