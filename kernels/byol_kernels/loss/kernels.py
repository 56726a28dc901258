"""Triton kernels of the BYOL loss, and their launchers.

One program per block of rows of one pair. Each writes the sum of its row losses; the program that arrives last adds
these partial sums in a fixed order, so the result does not depend on the order in which programs ran.
"""

import torch
from torch import Tensor

from byol_kernels._triton import device_guard, jit, next_power_of_2, tl

# One row has to fit the registers of one program, with statistics four running vectors beside it.
MAX_DIM = 16384
MAX_DIM_WITH_STATS = 8192
BLOCK_STD = 32
BLOCK_BWD = 2048
MAX_PROGRAMS_PER_PAIR = 512
MAX_PROGRAMS_PER_PAIR_WITH_STATS = 64  # the last program reads all their moments


# -------------------------------------------------------------------------------- kernels


@jit
def _load_unit_rows(
    ptr: tl.tensor, rows: tl.tensor, cols: tl.tensor, stride: tl.tensor, mask: tl.tensor, eps: tl.tensor
) -> tl.tensor:
    """Rows divided by max(norm, eps), their norms, and the factors 1 / max(norm, eps)."""
    offsets = rows.to(tl.int64)[:, None] * stride + cols[None, :]
    x = tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    norm = tl.sqrt_rn(tl.sum(x * x, axis=1))
    scale = tl.div_rn(1.0, tl.where(norm < eps, eps, norm))  # not `maximum`: a NaN norm has to stay NaN
    return x * scale[:, None], norm, scale


@jit
def _add_moments(
    mean: tl.tensor, m2: tl.tensor, count: tl.tensor, x: tl.tensor, valid: tl.tensor, num_valid: tl.tensor
) -> tl.tensor:
    """Merge the rows of one tile into a running mean and sum of squared deviations (Chan et al. 1979)."""
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
    arrival_counter_ptr: tl.tensor,  # [1] int32: 0 before, 0 after
    batch: tl.tensor,
    dim: tl.tensor,
    rows_per_program: tl.tensor,
    eps: tl.tensor,
    grad_factor: tl.tensor,  # the stored gradient is grad_factor * dcos/dp
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,  # power of two >= G
    BLOCK_PARTIALS: tl.constexpr,  # power of two >= N * G
    BLOCK_STD: tl.constexpr,
) -> None:
    # --- the pair and the block of rows of this program
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

    # Four running vectors beside a tile would not fit the registers: wide rows take a second pass over z.
    SECOND_PASS_Z: tl.constexpr = BLOCK_D > 4096
    cols = tl.arange(0, BLOCK_D)
    first_row = group * rows_per_program
    end_row = tl.minimum(first_row + rows_per_program, batch)
    loss_sum = tl.zeros((BLOCK_B,), tl.float32)
    if moments_ptr is not None:
        p_mean = tl.zeros((BLOCK_D,), tl.float32)
        p_m2 = tl.zeros((BLOCK_D,), tl.float32)
        z_mean = tl.zeros((BLOCK_D,), tl.float32)
        z_m2 = tl.zeros((BLOCK_D,), tl.float32)

    # --- loss, gradient and running moments, tile by tile
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
            # Below eps the denominator is a constant, so the part along p_hat vanishes.
            along = tl.where(p_norm < eps, 0.0, cosine)
            grad = (z_hat - p_hat * along[:, None]) * (p_scale * grad_factor)[:, None]
            at = rows.to(tl.int64)[:, None] * dim + cols[None, :]
            tl.store(grad_ptr + at, grad.to(grad_ptr.dtype.element_ty), mask=mask)
        if moments_ptr is not None:
            tl.store(row_loss_ptr + pair.to(tl.int64) * batch + rows, row_loss, mask=valid)
            count = (start - first_row).to(tl.float32)
            num_valid = tl.minimum(end_row - start, BLOCK_B).to(tl.float32)
            p_mean, p_m2 = _add_moments(p_mean, p_m2, count, p_hat, valid, num_valid)
            if not SECOND_PASS_Z:
                z_mean, z_m2 = _add_moments(z_mean, z_m2, count, z_hat, valid, num_valid)
        start += BLOCK_B
    if moments_ptr is not None and SECOND_PASS_Z:
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

    # --- partial results of this program
    tl.store(partial_ptr + pair * num_groups + group, tl.sum(loss_sum, axis=0))
    if moments_ptr is not None:
        p_slot = moments_ptr + (pair * num_groups + group).to(tl.int64) * 2 * dim + cols
        z_slot = p_slot + (num_pairs * num_groups).to(tl.int64) * 2 * dim
        tl.store(p_slot, p_mean, mask=cols < dim)
        tl.store(p_slot + dim, p_m2, mask=cols < dim)
        tl.store(z_slot, z_mean, mask=cols < dim)
        tl.store(z_slot + dim, z_m2, mask=cols < dim)

    # --- arrival: the last program sees the partial results of all
    # The barrier puts this program's stores before its arrival; acquire and release order them across programs.
    tl.debug_barrier()
    num_arrived = tl.atomic_add(arrival_counter_ptr, 1, sem="acq_rel", scope="gpu")

    # --- sums in a fixed order
    if num_arrived == num_pairs * num_groups - 1:
        index = tl.arange(0, BLOCK_PARTIALS)
        # .cg reads L2, where the other programs' stores are.
        partial = tl.load(partial_ptr + index, mask=index < num_pairs * num_groups, other=0.0, cache_modifier=".cg")
        total = tl.sum(partial, axis=0)
        tl.store(loss_ptr, total / batch)
        tl.store(arrival_counter_ptr, 0)  # ready for the next launch
        if moments_ptr is not None:
            tl.store(cosine_ptr, 1.0 - 0.5 * total / (batch * num_pairs))
            # --- merge of the moments, BLOCK_STD columns at a time
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
    factor: tl.tensor,  # the rest of d loss / d cos that the forward left out
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


class _ArrivalCounters:
    """Zeroed int32 counters. A launch leaves its counter at zero, so one counter serves every launch of a stream.

    A launch captured into a CUDA graph gets a counter of its own: two graphs may be replayed at the same time.
    """

    _SLOTS = 4096

    def __init__(self) -> None:
        self._pools: dict[int, Tensor] = {}
        self._next: dict[int, int] = {}
        self._of_stream: dict[tuple[int, int], Tensor] = {}

    def counter(self, device: torch.device) -> Tensor:
        """The counter of the current stream, or a new one during a capture."""
        if device.type != "cuda":  # the interpreter
            return torch.zeros(1, dtype=torch.int32)
        index = torch.cuda.current_device() if device.index is None else device.index
        capturing = torch.cuda.is_current_stream_capturing()
        key = (index, torch.cuda.current_stream(device).cuda_stream)
        if not capturing and key in self._of_stream:
            return self._of_stream[key]
        if index not in self._pools or self._next[index] == self._SLOTS:
            pool = torch.zeros(self._SLOTS, dtype=torch.int32, device=device)
            if capturing:  # zeroed by the graph itself at each replay, so no other launch may use it
                return pool[:1]
            torch.cuda.current_stream(device).synchronize()  # other streams will use it too; once per pool
            self._pools[index], self._next[index] = pool, 0
        slot = self._next[index]
        self._next[index] += 1
        counter = self._pools[index][slot : slot + 1]
        if not capturing:
            self._of_stream[key] = counter
        return counter


_ARRIVAL_COUNTERS = _ArrivalCounters()


def tile_of(dim: int) -> tuple[int, int, int]:
    """BLOCK_B, BLOCK_D and number of warps for rows of `dim` elements: 8 to 32 elements a thread."""
    block_d = max(next_power_of_2(dim), 32)
    return max(1, 1024 // block_d), block_d, min(16, max(4, block_d // 256))


def normalized_mse_fwd(
    pa_BD: Tensor,
    za_BD: Tensor,
    pb_BD: Tensor | None,
    zb_BD: Tensor | None,
    eps: float,
    *,
    grad_factor: float,
    with_grad: bool,
    with_stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch the forward of one or two pairs of at most `MAX_DIM` (`MAX_DIM_WITH_STATS`) columns, not in float64.

    Args:
        pa_BD: predictions of the first pair.
        za_BD: targets of the first pair.
        pb_BD: predictions of the second pair; None: one pair.
        zb_BD: targets of the second pair, or None.
        eps: smallest norm that is divided by.
        grad_factor: the stored gradients are grad_factor * dcos/dp.
        with_grad: compute gradients.
        with_stats: compute the outputs beyond the gradients.

    Returns:
        Loss [], gradients [B, D] of both predictions, row losses [N, B], mean cosine [], std [2, N, D]; empty where
        not asked for.
    """
    pa, za, pb, zb = (
        x if x is None or x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous() for x in (pa_BD, za_BD, pb_BD, zb_BD)
    )
    assert pa is not None and za is not None
    (batch, dim), num_pairs = pa_BD.shape, 1 if pb is None else 2

    block_b, block_d, num_warps = tile_of(dim)
    max_programs = MAX_PROGRAMS_PER_PAIR_WITH_STATS if with_stats else MAX_PROGRAMS_PER_PAIR
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
            new(num_pairs * num_groups), moments, _ARRIVAL_COUNTERS.counter(pa_BD.device),
            batch, dim, rows_per_program, eps, grad_factor,
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


def normalized_mse_bwd(
    grad_loss: Tensor, grad_a: Tensor, grad_b: Tensor | None, factor: float
) -> tuple[Tensor, Tensor | None]:
    """Launch the backward: the stored gradients, not in float64, times `grad_loss` [] and `factor`."""
    out_a, out_b = torch.empty_like(grad_a), None if grad_b is None else torch.empty_like(grad_b)
    with device_guard(grad_a):
        _normalized_mse_bwd_kernel[(-(-out_a.numel() // BLOCK_BWD), 1 if grad_b is None else 2)](
            grad_loss, grad_a, grad_b, out_a, out_b, out_a.numel(), factor,
            BLOCK=BLOCK_BWD, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out_a, out_b
