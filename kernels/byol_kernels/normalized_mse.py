"""The BYOL loss: forward, gradient and mean of both directions in one launch.

For a prediction p and a target projection z, row by row (Grill et al. 2020, arXiv 2006.07733, equation 2):

    p_hat = p / max(|p|, eps)        z_hat = z / max(|z|, eps)        cos = <p_hat, z_hat>
    l(p, z) = 2 - 2 cos                                    (= |p_hat - z_hat|^2 for rows no shorter than eps)
    dl/dp = 2 (cos p_hat - z_hat) / max(|p|, eps)          (the part along p_hat is 0 where |p| < eps)

No gradient flows to z. The forward stores the gradient of the loss in the dtype of p, and the backward multiplies it by
the upstream gradient; on a CPU, where that can be looked at, a plain `loss.backward()` takes it as it is. In float16
the factor -2 / B is left to the backward, or the gradient would be in the subnormals before a loss scale reaches it.

The kernel: one program per block of rows of one pair. Each writes the sum of its row losses; the program that
draws the last ticket adds these partial sums in a fixed order, so the result does not depend on the order in
which programs ran.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from byol_kernels import reference
from byol_kernels._triton import device_guard, jit, next_power_of_2, tl

# One row has to fit the registers of one program, with statistics four running vectors beside it. Wider rows take the
# plain PyTorch path.
MAX_KERNEL_DIM = 16384
MAX_KERNEL_DIM_WITH_STATS = 8192
BLOCK_STD = 32
BLOCK_BWD = 2048
_MAX_PROGRAMS_PER_PAIR = 512
_MAX_PROGRAMS_PER_PAIR_WITH_STATS = 64  # the last program reads all their moments
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


# -------------------------------------------------------------------------------- kernels


@jit
def _load_unit_rows(
    ptr: tl.tensor, rows: tl.tensor, cols: tl.tensor, stride: tl.tensor, mask: tl.tensor, eps: tl.tensor
) -> tl.tensor:
    """Rows divided by max(norm, eps), their norms, and what they were multiplied by."""
    offsets = rows.to(tl.int64)[:, None] * stride + cols[None, :]
    x = tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    norm = tl.sqrt_rn(tl.sum(x * x, axis=1))
    scale = tl.div_rn(1.0, tl.where(norm < eps, eps, norm))  # not `maximum`: a NaN norm has to stay NaN
    return x * scale[:, None], norm, scale


@jit
def _add_moments(
    mean: tl.tensor, m2: tl.tensor, count: tl.tensor, x: tl.tensor, valid: tl.tensor, num_valid: tl.tensor
) -> tl.tensor:
    """Merges the rows of one tile into a running mean and sum of squared deviations (Chan et al. 1979)."""
    tile_mean = tl.sum(x, axis=0) / num_valid
    deviation = tl.where(valid[:, None], x - tile_mean[None, :], 0.0)
    delta = tile_mean - mean
    total = count + num_valid
    m2 += tl.sum(deviation * deviation, axis=0) + delta * delta * (count * num_valid / total)
    mean += delta * (num_valid / total)
    return mean, m2


@jit
def _normalized_mse_fwd_kernel(
    pa_ptr: tl.tensor,  # [B, D]
    za_ptr: tl.tensor,  # [B, D]
    pb_ptr: tl.tensor,  # [B, D], or None: one pair
    zb_ptr: tl.tensor,  # [B, D], or None
    pa_stride: tl.tensor,
    za_stride: tl.tensor,
    pb_stride: tl.tensor,
    zb_stride: tl.tensor,
    loss_ptr: tl.tensor,  # []
    grad_a_ptr: tl.tensor,  # [B, D], or None
    grad_b_ptr: tl.tensor,  # [B, D], or None
    row_loss_ptr: tl.tensor,  # [N, B], or None: no statistics
    cosine_ptr: tl.tensor,  # [], or None
    std_ptr: tl.tensor,  # [2, N, D], or None
    partial_ptr: tl.tensor,  # [N * G] sums of row losses
    moments_ptr: tl.tensor,  # [2, N, G, 2, D] mean and sum of squared deviations, or None
    counter_ptr: tl.tensor,  # [1] int32: 0 before, 0 after
    batch: tl.tensor,
    dim: tl.tensor,
    rows_per_program: tl.tensor,
    eps: tl.tensor,
    grad_factor: tl.tensor,  # what dcos/dp is stored times
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,  # power of two >= G
    BLOCK_PARTIALS: tl.constexpr,  # power of two >= N * G
    BLOCK_STD: tl.constexpr,
) -> None:
    group = tl.program_id(0)
    num_groups = tl.num_programs(0)
    pair = tl.program_id(1)
    num_pairs = tl.num_programs(1)
    if pb_ptr is None:
        p_ptr = pa_ptr
        z_ptr = za_ptr
        grad_ptr = grad_a_ptr
        p_stride = pa_stride
        z_stride = za_stride
    else:
        p_ptr = tl.where(pair == 0, pa_ptr, pb_ptr)
        z_ptr = tl.where(pair == 0, za_ptr, zb_ptr)
        p_stride = tl.where(pair == 0, pa_stride, pb_stride)
        z_stride = tl.where(pair == 0, za_stride, zb_stride)
        if grad_a_ptr is not None:
            grad_ptr = tl.where(pair == 0, grad_a_ptr, grad_b_ptr)

    Z_APART: tl.constexpr = BLOCK_D > 4096
    cols = tl.arange(0, BLOCK_D)
    first_row = group * rows_per_program
    end_row = tl.minimum(first_row + rows_per_program, batch)
    loss_sum = tl.zeros((BLOCK_B,), tl.float32)
    if moments_ptr is not None:
        p_mean = tl.zeros((BLOCK_D,), tl.float32)
        p_m2 = tl.zeros((BLOCK_D,), tl.float32)
        z_mean = tl.zeros((BLOCK_D,), tl.float32)
        z_m2 = tl.zeros((BLOCK_D,), tl.float32)

    start = first_row
    while start < end_row:
        rows = start + tl.arange(0, BLOCK_B)
        valid = rows < end_row
        mask = valid[:, None] & (cols < dim)[None, :]
        p_hat, p_norm, p_scale = _load_unit_rows(p_ptr, rows, cols, p_stride, mask, eps)
        z_hat, _, _ = _load_unit_rows(z_ptr, rows, cols, z_stride, mask, eps)
        cosine = tl.sum(p_hat * z_hat, axis=1)
        cosine = tl.where(cosine > 1.0, 1.0, tl.where(cosine < -1.0, -1.0, cosine))
        row_loss = 2.0 - 2.0 * cosine
        loss_sum += tl.where(valid, row_loss, 0.0)
        if grad_a_ptr is not None:
            along = tl.where(p_norm < eps, 0.0, cosine)
            grad = (z_hat - p_hat * along[:, None]) * (p_scale * grad_factor)[:, None]
            at = rows.to(tl.int64)[:, None] * dim + cols[None, :]
            tl.store(grad_ptr + at, grad.to(grad_ptr.dtype.element_ty), mask=mask)
        if moments_ptr is not None:
            tl.store(row_loss_ptr + pair.to(tl.int64) * batch + rows, row_loss, mask=valid)
            count = (start - first_row).to(tl.float32)
            num_valid = tl.minimum(end_row - start, BLOCK_B).to(tl.float32)
            p_mean, p_m2 = _add_moments(p_mean, p_m2, count, p_hat, valid, num_valid)
            if not Z_APART:
                z_mean, z_m2 = _add_moments(z_mean, z_m2, count, z_hat, valid, num_valid)
        start += BLOCK_B
    if moments_ptr is not None and Z_APART:  # four running vectors beside a tile would not fit the registers
        start = first_row
        while start < end_row:
            rows = start + tl.arange(0, BLOCK_B)
            valid = rows < end_row
            mask = valid[:, None] & (cols < dim)[None, :]
            z_hat, _, _ = _load_unit_rows(z_ptr, rows, cols, z_stride, mask, eps)
            count = (start - first_row).to(tl.float32)
            num_valid = tl.minimum(end_row - start, BLOCK_B).to(tl.float32)
            z_mean, z_m2 = _add_moments(z_mean, z_m2, count, z_hat, valid, num_valid)
            start += BLOCK_B

    tl.store(partial_ptr + pair * num_groups + group, tl.sum(loss_sum, axis=0))
    if moments_ptr is not None:
        p_slot = moments_ptr + (pair * num_groups + group).to(tl.int64) * 2 * dim + cols
        z_slot = p_slot + (num_pairs * num_groups).to(tl.int64) * 2 * dim
        tl.store(p_slot, p_mean, mask=cols < dim)
        tl.store(p_slot + dim, p_m2, mask=cols < dim)
        tl.store(z_slot, z_mean, mask=cols < dim)
        tl.store(z_slot + dim, z_m2, mask=cols < dim)

    # The barrier puts this program's stores before its ticket; acquire and release order them across
    # programs.
    tl.debug_barrier()
    ticket = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    if ticket == num_pairs * num_groups - 1:
        index = tl.arange(0, BLOCK_PARTIALS)
        # .cg reads L2, where the other programs' stores are.
        partial = tl.load(partial_ptr + index, mask=index < num_pairs * num_groups, other=0.0, cache_modifier=".cg")
        total = tl.sum(partial, axis=0)
        tl.store(loss_ptr, total / batch)
        tl.store(counter_ptr, 0)
        if moments_ptr is not None:
            tl.store(cosine_ptr, 1.0 - 0.5 * total / (batch * num_pairs))
            groups = tl.arange(0, BLOCK_G)
            count = tl.minimum(tl.maximum(batch - groups * rows_per_program, 0), rows_per_program)
            count = tl.where(groups < num_groups, count, 0).to(tl.float32)[:, None]
            blocks = tl.cdiv(dim, BLOCK_STD)
            block = 0
            while block < 2 * num_pairs * blocks:
                which = block // blocks  # predictions of each pair, then targets of each pair
                col = block % blocks * BLOCK_STD + tl.arange(0, BLOCK_STD)
                slot = moments_ptr + (which * num_groups + groups).to(tl.int64)[:, None] * 2 * dim + col[None, :]
                mask = (groups < num_groups)[:, None] & (col < dim)[None, :]
                mean = tl.load(slot, mask=mask, other=0.0, cache_modifier=".cg")
                m2 = tl.load(slot + dim, mask=mask, other=0.0, cache_modifier=".cg")
                delta = mean - (tl.sum(count * mean, axis=0) / batch)[None, :]
                variance = tl.sum(m2 + count * delta * delta, axis=0) / batch
                tl.store(std_ptr + which * dim + col, tl.sqrt_rn(variance), mask=col < dim)
                block += 1


@jit
def _normalized_mse_bwd_kernel(
    grad_loss_ptr: tl.tensor,  # []
    grad_a_ptr: tl.tensor,  # [B, D] as the forward stored it
    grad_b_ptr: tl.tensor,  # [B, D], or None: one pair
    out_a_ptr: tl.tensor,  # [B, D]
    out_b_ptr: tl.tensor,  # [B, D], or None
    numel: tl.tensor,
    factor: tl.tensor,  # what the forward left out
    BLOCK: tl.constexpr,
) -> None:
    grad_ptr = grad_a_ptr
    out_ptr = out_a_ptr
    if grad_b_ptr is not None:
        grad_ptr = tl.where(tl.program_id(1) == 0, grad_a_ptr, grad_b_ptr)
        out_ptr = tl.where(tl.program_id(1) == 0, out_a_ptr, out_b_ptr)
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    scale = tl.load(grad_loss_ptr).to(tl.float32) * factor
    grad = tl.load(grad_ptr + offsets, mask=mask).to(tl.float32)
    tl.store(out_ptr + offsets, (grad * scale).to(out_ptr.dtype.element_ty), mask=mask)


# -------------------------------------------------------------------------------- launchers


class _Tickets:
    """Zeroed int32 counters. A launch leaves its counter at zero, so one counter serves every launch of a
    stream.

    A launch recorded into a CUDA graph gets a counter of its own: two graphs may be replayed at the same
    time.
    """

    _SLOTS = 4096

    def __init__(self) -> None:
        self._pools: dict[int, Tensor] = {}
        self._next: dict[int, int] = {}
        self._of_stream: dict[tuple[int, int], Tensor] = {}

    def counter(self, device: torch.device) -> Tensor:
        if device.type != "cuda":  # the interpreter
            return torch.zeros(1, dtype=torch.int32)
        index = torch.cuda.current_device() if device.index is None else device.index
        capturing = torch.cuda.is_current_stream_capturing()
        key = (index, torch.cuda.current_stream(device).cuda_stream)
        if not capturing and key in self._of_stream:
            return self._of_stream[key]
        if index not in self._pools or self._next[index] == self._SLOTS:
            pool = torch.zeros(self._SLOTS, dtype=torch.int32, device=device)
            if capturing:  # zeroed by the graph itself, at each replay, so nobody else may use it
                return pool[:1]
            torch.cuda.current_stream(device).synchronize()  # other streams will use it too; once per pool
            self._pools[index], self._next[index] = pool, 0
        slot = self._next[index]
        self._next[index] += 1
        counter = self._pools[index][slot : slot + 1]
        if not capturing:
            self._of_stream[key] = counter
        return counter


_TICKETS = _Tickets()


def tile_of(dim: int) -> tuple[int, int, int]:
    """BLOCK_B, BLOCK_D and the number of warps for rows of `dim` elements: 8 to 32 elements a thread."""
    block_d = max(next_power_of_2(dim), 32)
    return max(1, 1024 // block_d), block_d, min(16, max(4, block_d // 256))


def _normalized_mse_fwd_cuda(
    pa_BD: Tensor, za_BD: Tensor, pb_BD: Tensor | None, zb_BD: Tensor | None, eps: float, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _launch_fwd(pa_BD, za_BD, pb_BD, zb_BD, eps, with_grad, with_stats=False)[:3]


def _normalized_mse_stats_fwd_cuda(
    pa_BD: Tensor, za_BD: Tensor, pb_BD: Tensor | None, zb_BD: Tensor | None, eps: float, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _launch_fwd(pa_BD, za_BD, pb_BD, zb_BD, eps, with_grad, with_stats=True)


def _launch_fwd(
    pa_BD: Tensor,
    za_BD: Tensor,
    pb_BD: Tensor | None,
    zb_BD: Tensor | None,
    eps: float,
    with_grad: bool,
    with_stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, dim = pa_BD.shape
    max_dim = MAX_KERNEL_DIM_WITH_STATS if with_stats else MAX_KERNEL_DIM
    if pa_BD.dtype == torch.float64 or dim > max_dim:
        return reference.normalized_mse_stats_fwd(pa_BD, za_BD, pb_BD, zb_BD, eps, with_grad)
    pa, za, pb, zb = (
        x if x is None or x.stride(1) == 1 or dim == 1 else x.contiguous() for x in (pa_BD, za_BD, pb_BD, zb_BD)
    )
    assert pa is not None and za is not None
    num_pairs = 1 if pb is None else 2

    block_b, block_d, num_warps = tile_of(dim)
    max_programs = _MAX_PROGRAMS_PER_PAIR_WITH_STATS if with_stats else _MAX_PROGRAMS_PER_PAIR
    tiles = -(-batch // block_b)
    rows_per_program = -(-tiles // max_programs) * block_b
    num_groups = -(-batch // rows_per_program)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=pa_BD.device)

    loss = new()
    grad_a = new(batch, dim, dtype=pa_BD.dtype) if with_grad else None
    grad_b = new(batch, dim, dtype=pa_BD.dtype) if with_grad and pb is not None else None
    row_loss, cosine, std, moments = (
        (new(num_pairs, batch), new(), new(2, num_pairs, dim), new(2, num_pairs, num_groups, 2, dim))
        if with_stats
        else (None, None, None, None)
    )
    with device_guard(pa_BD):
        _normalized_mse_fwd_kernel[(num_groups, num_pairs)](
            pa, za, pb, zb,
            pa.stride(0), za.stride(0), 0 if pb is None else pb.stride(0), 0 if zb is None else zb.stride(0),
            loss, grad_a, grad_b, row_loss, cosine, std,
            new(num_pairs * num_groups), moments, _TICKETS.counter(pa_BD.device),
            batch, dim, rows_per_program, eps, reference.factors(pa_BD)[0],
            BLOCK_B=block_b, BLOCK_D=block_d, BLOCK_G=next_power_of_2(num_groups),
            BLOCK_PARTIALS=next_power_of_2(num_pairs * num_groups), BLOCK_STD=BLOCK_STD,
            num_warps=num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return (
        loss,
        new(0, dtype=pa_BD.dtype) if grad_a is None else grad_a,
        new(0, dtype=pa_BD.dtype) if grad_b is None else grad_b,
        new(0) if row_loss is None else row_loss,
        new(0) if cosine is None else cosine,
        new(0) if std is None else std,
    )


def _normalized_mse_bwd_cuda(
    grad_loss: Tensor, grad_a: Tensor, grad_b: Tensor | None, pa_BD: Tensor, pb_BD: Tensor | None
) -> tuple[Tensor, Tensor]:
    if grad_a.dtype == torch.float64:
        return reference.normalized_mse_bwd(grad_loss, grad_a, grad_b, pa_BD, pb_BD)
    out_a, out_b = torch.empty_like(grad_a), None if grad_b is None else torch.empty_like(grad_b)
    with device_guard(grad_a):
        _normalized_mse_bwd_kernel[(-(-out_a.numel() // BLOCK_BWD), 1 if grad_b is None else 2)](
            grad_loss, grad_a, grad_b, out_a, out_b, out_a.numel(), reference.factors(grad_a)[1],
            BLOCK=BLOCK_BWD, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out_a, grad_a.new_empty(0) if out_b is None else out_b


# -------------------------------------------------------------------------------- operators


def _normalized_mse_fwd_cpu(
    pa_BD: Tensor, za_BD: Tensor, pb_BD: Tensor | None, zb_BD: Tensor | None, eps: float, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    loss, grad_a, grad_b = reference.normalized_mse_fwd(pa_BD, za_BD, pb_BD, zb_BD, eps, with_grad)
    # Those of a small batch are halves of one tensor, but the outputs of an operator must not share memory.
    shared = grad_a.untyped_storage().data_ptr() == grad_b.untyped_storage().data_ptr()
    return loss, grad_a, grad_b.clone() if shared else grad_b


# What is not there is empty: the second gradient of one pair, and gradients that were not asked for.
_IN = "(Tensor pa, Tensor za, Tensor? pb, Tensor? zb, float eps, bool with_grad)"
torch.library.define(
    "byol_kernels::normalized_mse_fwd",
    f"{_IN} -> (Tensor loss, Tensor grad_a, Tensor grad_b)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "byol_kernels::normalized_mse_stats_fwd",
    f"{_IN} -> (Tensor loss, Tensor grad_a, Tensor grad_b, Tensor row_loss, Tensor cosine, Tensor std)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# pa and pb only tie the result to the graph: differentiating twice then meets the error below and not a
# silent zero.
torch.library.define(
    "byol_kernels::normalized_mse_bwd",
    "(Tensor grad_loss, Tensor grad_a, Tensor? grad_b, Tensor pa, Tensor? pb) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl("byol_kernels::normalized_mse_fwd", "CPU", _normalized_mse_fwd_cpu)
torch.library.impl("byol_kernels::normalized_mse_fwd", "CUDA", _normalized_mse_fwd_cuda)
torch.library.impl("byol_kernels::normalized_mse_stats_fwd", "CPU", reference.normalized_mse_stats_fwd)
torch.library.impl("byol_kernels::normalized_mse_stats_fwd", "CUDA", _normalized_mse_stats_fwd_cuda)
torch.library.impl("byol_kernels::normalized_mse_bwd", "CPU", reference.normalized_mse_bwd)
torch.library.impl("byol_kernels::normalized_mse_bwd", "CUDA", _normalized_mse_bwd_cuda)


_ON_CPU = {
    torch.ops.byol_kernels.normalized_mse_fwd.default: reference.normalized_mse_fwd,
    torch.ops.byol_kernels.normalized_mse_stats_fwd.default: reference.normalized_mse_stats_fwd,
}


def _fwd_fake(
    pa: Tensor, za: Tensor, pb: Tensor | None, zb: Tensor | None, eps: float, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        pa.new_empty((), dtype=reference.accumulation_dtype(pa.dtype)),
        pa.new_empty(pa.shape if with_grad else (0,)),
        pa.new_empty(pa.shape if with_grad and pb is not None else (0,)),
    )


def _stats_fwd_fake(
    pa: Tensor, za: Tensor, pb: Tensor | None, zb: Tensor | None, eps: float, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss, grad_a, grad_b = _fwd_fake(pa, za, pb, zb, eps, with_grad)
    num_pairs = 1 if pb is None else 2
    return (
        loss,
        grad_a,
        grad_b,
        loss.new_empty((num_pairs, pa.shape[0])),
        loss.new_empty(()),
        loss.new_empty((2, num_pairs, pa.shape[1])),
    )


def _bwd_fake(
    grad_loss: Tensor, grad_a: Tensor, grad_b: Tensor | None, pa: Tensor, pb: Tensor | None
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(grad_a), grad_a.new_empty(0) if grad_b is None else torch.empty_like(grad_b)


torch.library.register_fake("byol_kernels::normalized_mse_fwd", _fwd_fake)
torch.library.register_fake("byol_kernels::normalized_mse_stats_fwd", _stats_fwd_fake)
torch.library.register_fake("byol_kernels::normalized_mse_bwd", _bwd_fake)


class _Differentiable(torch.autograd.Function):
    """What `torch.library.register_autograd` would build; its general form takes as long as a small batch."""

    @staticmethod
    def forward(ctx: Any, op: Any, pa: Tensor, za: Tensor, pb: Tensor | None, zb: Tensor | None, eps: float) -> Any:
        if reference.is_plain(pa):
            output = _ON_CPU[op](pa, za, pb, zb, eps, True)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                output = op(pa, za, pb, zb, eps, True)
        ctx.set_materialize_grads(False)  # else the backward fills a tensor of zeros for every output but the loss
        ctx.save_for_backward(output[1], None if pb is None else output[2], pa, pb)
        ctx.mark_non_differentiable(*output[1:])
        return output

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 6
        grad_a, grad_b, pa, pb = ctx.saved_tensors
        op = torch.ops.byol_kernels.normalized_mse_bwd.default
        if torch.is_grad_enabled():  # by create_graph=True: through the autograd that refuses
            grad_a, grad_b = op(grad_loss, grad_a, grad_b, pa, pb)
        elif not reference.is_plain(grad_loss):
            with torch._C._AutoDispatchBelowAutograd():
                grad_a, grad_b = op(grad_loss, grad_a, grad_b, pa, pb)
        elif grad_loss.item() * reference.factors(grad_a)[1] != 1.0:
            grad_a, grad_b = reference.normalized_mse_bwd(grad_loss, grad_a, grad_b, pa, pb)
        return None, grad_a, None, None if pb is None else grad_b, None, None


def _autograd_of(name: str) -> None:
    op = getattr(torch.ops.byol_kernels, name).default

    def autograd(
        pa: Tensor, za: Tensor, pb: Tensor | None, zb: Tensor | None, eps: float, with_grad: bool
    ) -> tuple[Tensor, ...]:
        if with_grad and torch.is_grad_enabled():
            return _Differentiable.apply(op, pa, za, pb, zb, eps)  # type: ignore[no-any-return]
        with torch._C._AutoDispatchBelowAutograd():
            return op(pa, za, pb, zb, eps, with_grad)  # type: ignore[no-any-return]

    torch.library.impl(f"byol_kernels::{name}", "Autograd", autograd)


def _refuse_double_backward(ctx: Any, *grads: Tensor | None) -> None:
    raise RuntimeError(
        "byol_kernels: the BYOL loss must be differentiated once, got a second derivative; "
        "write the loss with torch.nn.functional.normalize where a gradient penalty or a Hessian is needed"
    )


_autograd_of("normalized_mse_fwd")
_autograd_of("normalized_mse_stats_fwd")
torch.library.register_autograd("byol_kernels::normalized_mse_bwd", _refuse_double_backward)


# -------------------------------------------------------------------------------- public functions


class LossStats(NamedTuple):
    """What the loss kernel measures in the same pass, for monitoring; no gradient flows through any of it.

    N is the number of (prediction, target) pairs: 1 for `normalized_mse_loss_with_stats`, 2 for
    `byol_loss_with_stats`, in the order (p1, z2), (p2, z1).
    """

    row_loss: Tensor
    """2 - 2 cos of each row, [N, B]."""
    mean_cosine: Tensor
    """Mean of cos over all rows of all pairs, 0-dim."""
    p_std: Tensor
    """[N, D]: per-dimension standard deviation over the batch (correction 0) of the normalised predictions. Its mean
    times sqrt(D) is about 1 for a healthy representation and 0 for a collapsed one."""
    z_std: Tensor
    """The same for the normalised target projections, [N, D]."""


def normalized_mse_loss(p_BD: Tensor, z_BD: Tensor, *, eps: float = 1e-12) -> Tensor:
    r"""Mean squared distance of L2-normalised rows: mean_b (2 - 2 cos(p_b, z_b)), from 0 to 4.

    Equation 2 of BYOL (arXiv 2006.07733). Rows are normalised as `torch.nn.functional.normalize` does it, x /
    max(|x|, eps): a zero row counts as normalised to zero, so its loss is 2 and its gradient -2 z_hat / eps.
    A row whose squared norm overflows float32 (|x| > 1.8e19) counts as normalised to zero too, with a
    gradient of 0. A NaN or an infinity makes the loss NaN, and the gradient of its own row only.

    Args:
        p_BD: predictions [B, D]; bfloat16, float16, float32 or float64, any strides. The gradient flows here.
        z_BD: target projections, of the same shape, dtype and device. No gradient flows here.
        eps: smallest norm that is divided by.

    Returns:
        The loss, 0-dim: float64 for float64 inputs, float32 otherwise. Differentiable once. All sums are
        taken in that dtype, so nothing changes under autocast.

    Raises:
        ValueError: on shapes, dtypes or devices that differ, an empty batch, or a dtype that is not floating
        point.
    """
    _check("normalized_mse_loss", {"p_BD": p_BD, "z_BD": z_BD}, eps)
    return _loss(p_BD, z_BD, None, None, eps)


def normalized_mse_loss_with_stats(p_BD: Tensor, z_BD: Tensor, *, eps: float = 1e-12) -> tuple[Tensor, LossStats]:
    """`normalized_mse_loss` and, from the same pass over the data, what there is to monitor.

    Args:
        p_BD: predictions [B, D].
        z_BD: target projections [B, D].
        eps: smallest norm that is divided by.

    Returns:
        The loss and its `LossStats`.

    Raises:
        ValueError: as `normalized_mse_loss`.
    """
    _check("normalized_mse_loss_with_stats", {"p_BD": p_BD, "z_BD": z_BD}, eps)
    return _loss_with_stats(p_BD, z_BD, None, None, eps)


def byol_loss(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor, *, eps: float = 1e-12) -> Tensor:
    r"""The symmetric BYOL loss: mean_b [l(p1, z2) + l(p2, z1)] with l = 2 - 2 cos, from 0 to 8.

    The two directions are summed, not averaged, as in the reference code (google-deepmind/deepmind-research,
    byol/). One kernel launch on a GPU for the loss, the gradient and the mean of both directions; one for the
    backward.

    Args:
        p1: online predictions of view 1 [B, D]; see `normalized_mse_loss` for dtypes and for zero, tiny and
        huge rows. p2: online predictions of view 2 [B, D]. z1: target projections of view 1 [B, D]. No
        gradient flows here. z2: target projections of view 2 [B, D]. No gradient flows here. eps: smallest
        norm that is divided by.

    Returns:
        The loss, 0-dim: float64 for float64 inputs, float32 otherwise. Differentiable once.

    Raises:
        ValueError: on shapes, dtypes or devices that differ, an empty batch, or a dtype that is not floating
        point.
    """
    _check("byol_loss", {"p1": p1, "p2": p2, "z1": z1, "z2": z2}, eps)
    return _loss(p1, z2, p2, z1, eps)


def byol_loss_with_stats(
    p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor, *, eps: float = 1e-12
) -> tuple[Tensor, LossStats]:
    """`byol_loss` and, from the same pass over the data, what there is to monitor.

    Args:
        p1: online predictions of view 1 [B, D].
        p2: online predictions of view 2 [B, D].
        z1: target projections of view 1 [B, D].
        z2: target projections of view 2 [B, D].
        eps: smallest norm that is divided by.

    Returns:
        The loss and its `LossStats`; index 0 is the pair (p1, z2), index 1 the pair (p2, z1).

    Raises:
        ValueError: as `byol_loss`.
    """
    _check("byol_loss_with_stats", {"p1": p1, "p2": p2, "z1": z1, "z2": z2}, eps)
    return _loss_with_stats(p1, z2, p2, z1, eps)


def _loss(pa: Tensor, za: Tensor, pb: Tensor | None, zb: Tensor | None, eps: float) -> Tensor:
    op, wants_grad = torch.ops.byol_kernels.normalized_mse_fwd.default, _wants_grad(pa, pb)
    loss: Tensor
    if wants_grad and not torch.compiler.is_compiling():
        # What the operator's autograd would do next, without the way there.
        loss = _Differentiable.apply(op, pa, za, pb, zb, eps)[0]
    else:
        loss = op(pa, za, pb, zb, eps, wants_grad)[0]
    return loss


def _loss_with_stats(
    pa: Tensor, za: Tensor, pb: Tensor | None, zb: Tensor | None, eps: float
) -> tuple[Tensor, LossStats]:
    op = torch.ops.byol_kernels.normalized_mse_stats_fwd.default
    loss, _, _, row_loss, cosine, std = op(pa, za, pb, zb, eps, _wants_grad(pa, pb))
    p_std, z_std = std.unbind(0)
    return loss, LossStats(row_loss, cosine, p_std, z_std)


def _wants_grad(pa: Tensor, pb: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (pa.requires_grad or (pb is not None and pb.requires_grad))


def _check(what: str, tensors: dict[str, Tensor], eps: float) -> None:
    (first_name, first), *others = tensors.items()
    shape, dtype, device = first.shape, first.dtype, first.device
    if first.dim() != 2:
        raise ValueError(
            f"{what}: {first_name} must be [batch, dim], got shape {tuple(shape)}; "
            "flatten it to two dimensions, for instance with .flatten(1)"
        )
    if first.numel() == 0:
        raise ValueError(
            f"{what}: {first_name} must hold at least one row and one column, got shape {tuple(shape)}; "
            "skip empty batches"
        )
    if dtype not in _DTYPES:
        raise ValueError(
            f"{what}: {first_name} must be bfloat16, float16, float32 or float64, got {dtype}; convert it with .float()"
        )
    for name, x in others:
        if x.shape != shape:
            raise ValueError(
                f"{what}: {name} must have the shape of {first_name}, {tuple(shape)}, got {tuple(x.shape)}; "
                "pass predictions and projections of the same images"
            )
        if x.dtype != dtype:
            raise ValueError(
                f"{what}: {name} must have the dtype of {first_name}, {dtype}, got {x.dtype}; "
                f"convert it with .to({dtype})"
            )
        if x.device != device:
            raise ValueError(
                f"{what}: {name} must be on the device of {first_name}, {device}, got {x.device}; "
                f"move it with .to('{device}')"
            )
    if not (eps > 0 and math.isfinite(eps)):
        raise ValueError(f"{what}: eps must be positive and finite, got {eps}; leave it at 1e-12")
