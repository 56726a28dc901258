"""Triton kernels of the BYOL loss, and their launchers.

One program per block of rows of one view's predictions: of a global view one pair, of a local view two. Each writes the
sum of its row losses; the program that arrives last adds these partial sums in a fixed order, so the result does not
depend on the order in which programs ran.
"""

import torch
from torch import Tensor

from byol_kernels._triton import device_guard, jit, next_power_of_2, tl
from byol_kernels.loss.rows import global_view_rows, local_view_rows

# One row has to fit the registers of one program: beside its target, both targets of a local view, or with statistics
# four running vectors.
MAX_DIM = 16384
MAX_DIM_WITH_LOCAL = 8192
MAX_DIM_WITH_STATS = 8192
BLOCK_STD = 32
BLOCK_BWD = 2048
MAX_PROGRAMS_PER_VIEW = 512
MAX_PROGRAMS_PER_VIEW_WITH_STATS = 64  # the last program reads all their moments


# -------------------------------------------------------------------------------- kernels


@jit
def _normalized_mse_fwd_kernel(
    pa_ptr: tl.tensor,  # [B, D]
    za_ptr: tl.tensor,  # [B, D]
    pb_ptr: tl.tensor,  # [B, D], or None: one pair
    zb_ptr: tl.tensor,  # [B, D], or None
    local_ptr: tl.tensor,  # [K, B, D] predictions of local views, or None
    pa_stride: tl.tensor,
    za_stride: tl.tensor,
    pb_stride: tl.tensor,
    zb_stride: tl.tensor,
    local_view_stride: tl.tensor,
    local_stride: tl.tensor,
    loss_ptr: tl.tensor,  # []
    grad_a_ptr: tl.tensor,  # [B, D], or None
    grad_b_ptr: tl.tensor,  # [B, D], or None
    grad_local_ptr: tl.tensor,  # [K, B, D], or None
    row_loss_ptr: tl.tensor,  # [N, B], or None: no statistics
    cosine_ptr: tl.tensor,  # [], or None
    std_ptr: tl.tensor,  # [2, V, D] of V = 1 or 2 global views, or None
    partial_ptr: tl.tensor,  # [(V + K) * G] sums of row losses
    moments_ptr: tl.tensor,  # [2, V, G, 2, D] mean and sum of squared deviations, or None
    arrival_counter_ptr: tl.tensor,  # [1] int32: 0 before, 0 after
    batch: tl.tensor,
    dim: tl.tensor,
    rows_per_program: tl.tensor,
    eps: tl.tensor,
    grad_factor: tl.tensor,  # the stored gradient is grad_factor * dcos/dp, of a local view the sum of two
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,  # power of two >= G
    BLOCK_PARTIALS: tl.constexpr,  # power of two >= (V + K) * G
    BLOCK_STD: tl.constexpr,
) -> None:
    # --- the view and the block of rows of this program
    group = tl.program_id(0)
    num_groups = tl.num_programs(0)
    view = tl.program_id(1)
    num_views = tl.num_programs(1)
    num_global = num_views if local_ptr is None else 2
    first_row = group * rows_per_program
    end_row = tl.minimum(first_row + rows_per_program, batch)
    program = view * num_groups + group

    # --- its partial results
    if local_ptr is None or view < 2:
        if pb_ptr is None:
            p_ptr = pa_ptr
            z_ptr = za_ptr
            grad_ptr = grad_a_ptr
            p_stride = pa_stride
            z_stride = za_stride
        else:
            p_ptr = tl.where(view == 0, pa_ptr, pb_ptr)
            z_ptr = tl.where(view == 0, za_ptr, zb_ptr)
            p_stride = tl.where(view == 0, pa_stride, pb_stride)
            z_stride = tl.where(view == 0, za_stride, zb_stride)
            grad_ptr = None if grad_a_ptr is None else tl.where(view == 0, grad_a_ptr, grad_b_ptr)
        p_moments_ptr = None if moments_ptr is None else moments_ptr + program.to(tl.int64) * 2 * dim
        z_moments_ptr = (
            None if moments_ptr is None else p_moments_ptr + (num_global * num_groups).to(tl.int64) * 2 * dim
        )
        global_view_rows(
            p_ptr, z_ptr, p_stride, z_stride, grad_ptr,
            None if row_loss_ptr is None else row_loss_ptr + view.to(tl.int64) * batch,
            partial_ptr + program, p_moments_ptr, z_moments_ptr,
            first_row, end_row, dim, eps, grad_factor, BLOCK_B, BLOCK_D,
        )  # fmt: skip
    else:
        k = (view - 2).to(tl.int64)
        local_view_rows(
            local_ptr + k * local_view_stride, zb_ptr, za_ptr, local_stride, zb_stride, za_stride,
            None if grad_local_ptr is None else grad_local_ptr + k * batch * dim,
            None if row_loss_ptr is None else row_loss_ptr + (2 + 2 * k) * batch,
            partial_ptr + program, first_row, end_row, batch, dim, eps, grad_factor, BLOCK_B, BLOCK_D,
        )  # fmt: skip

    # --- arrival: the last program sees the partial results of all
    # The barrier puts this program's stores before its arrival; acquire and release order them across programs.
    tl.debug_barrier()
    num_arrived = tl.atomic_add(arrival_counter_ptr, 1, sem="acq_rel", scope="gpu")

    # --- sums in a fixed order
    if num_arrived == num_views * num_groups - 1:
        index = tl.arange(0, BLOCK_PARTIALS)
        # .cg reads L2, where the other programs' stores are.
        partial = tl.load(partial_ptr + index, mask=index < num_views * num_groups, other=0.0, cache_modifier=".cg")
        total = tl.sum(partial, axis=0)
        if local_ptr is not None:
            total /= num_views - 1  # 2 / N: the mean over N = 2 + 2 K pairs, twice
        tl.store(loss_ptr, total / batch)
        tl.store(arrival_counter_ptr, 0)  # ready for the next launch
        if moments_ptr is not None:
            tl.store(cosine_ptr, 1.0 - 0.5 * total / (batch * num_global))
            # --- merge of the moments, BLOCK_STD columns at a time
            groups = tl.arange(0, BLOCK_G)
            count = tl.minimum(tl.maximum(batch - groups * rows_per_program, 0), rows_per_program)
            count = tl.where(groups < num_groups, count, 0).to(tl.float32)[:, None]
            blocks = tl.cdiv(dim, BLOCK_STD)
            block = 0
            while block < 2 * num_global * blocks:
                which = block // blocks  # predictions of each global view, then targets of each
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
    grad_local_ptr: tl.tensor,  # [K, B, D], or None
    out_a_ptr: tl.tensor,  # [B, D]
    out_b_ptr: tl.tensor,  # [B, D], or None
    out_local_ptr: tl.tensor,  # [K, B, D], or None
    numel: tl.tensor,  # B * D
    factor: tl.tensor,  # the rest of d loss / d cos that the forward left out
    BLOCK: tl.constexpr,
) -> None:
    view = tl.program_id(1)
    grad_ptr = grad_a_ptr
    out_ptr = out_a_ptr
    if grad_b_ptr is not None:
        grad_ptr = tl.where(view == 0, grad_a_ptr, grad_b_ptr)
        out_ptr = tl.where(view == 0, out_a_ptr, out_b_ptr)
    if grad_local_ptr is not None:
        local_offset = (view - 2).to(tl.int64) * numel
        grad_ptr = tl.where(view < 2, grad_ptr, grad_local_ptr + local_offset)
        out_ptr = tl.where(view < 2, out_ptr, out_local_ptr + local_offset)
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


def _with_unit_stride(x: Tensor | None) -> Tensor | None:
    """The tensor with consecutive columns; a copy only where they are not."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _rows_per_program(batch: int, block_b: int, num_views: int, *, with_stats: bool) -> int:
    """Rows of a program, a multiple of `block_b`; at most twice `MAX_PROGRAMS_PER_VIEW` programs for all views."""
    max_programs = MAX_PROGRAMS_PER_VIEW_WITH_STATS if with_stats else MAX_PROGRAMS_PER_VIEW
    max_programs = max(1, min(max_programs, 2 * MAX_PROGRAMS_PER_VIEW // num_views))
    tiles = -(-batch // block_b)
    return -(-tiles // max_programs) * block_b


def normalized_mse_fwd(
    pa_BD: Tensor,
    za_BD: Tensor,
    pb_BD: Tensor | None,
    zb_BD: Tensor | None,
    local_KBD: Tensor | None,
    eps: float,
    *,
    grad_factor: float,
    with_grad: bool,
    with_stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch the forward of all pairs, of at most `MAX_DIM...` columns and not in float64.

    Args:
        pa_BD: predictions of the first pair.
        za_BD: targets of the first pair.
        pb_BD: predictions of the second pair; None: one pair.
        zb_BD: targets of the second pair, or None.
        local_KBD: predictions that are paired with zb_BD and with za_BD, or None.
        eps: smallest norm that is divided by.
        grad_factor: the stored gradients are grad_factor * dcos/dp.
        with_grad: compute gradients.
        with_stats: compute the outputs beyond the gradients.

    Returns:
        Loss [], gradients of the predictions [B, D], [B, D], [K, B, D], row losses [N, B], mean cosine [], std
        [2, V, D] of V global views; empty where not asked for.
    """
    pa, za, pb, zb, local = map(_with_unit_stride, (pa_BD, za_BD, pb_BD, zb_BD, local_KBD))
    assert pa is not None and za is not None
    (batch, dim), num_global = pa_BD.shape, 1 if pb is None else 2
    num_views = num_global + (0 if local is None else local.shape[0])

    block_b, block_d, num_warps = tile_of(dim)
    rows_per_program = _rows_per_program(batch, block_b, num_views, with_stats=with_stats)
    num_groups = -(-batch // rows_per_program)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=pa_BD.device)

    loss = new()
    grad_a, grad_b, grad_local = (
        new(*x.shape, dtype=pa_BD.dtype) if with_grad and x is not None else None for x in (pa, pb, local)
    )
    row_loss, cosine, std, moments = (
        (
            new(num_global if local is None else 2 * (num_views - 1), batch), new(),
            new(2, num_global, dim), new(2, num_global, num_groups, 2, dim),
        )
        if with_stats
        else (None, None, None, None)
    )  # fmt: skip
    with device_guard(pa_BD):
        _normalized_mse_fwd_kernel[(num_groups, num_views)](
            pa, za, pb, zb, local,
            pa.stride(0), za.stride(0), 0 if pb is None else pb.stride(0), 0 if zb is None else zb.stride(0),
            *((0, 0) if local is None else local.stride()[:2]),
            loss, grad_a, grad_b, grad_local, row_loss, cosine, std,
            new(num_views * num_groups), moments, _ARRIVAL_COUNTERS.counter(pa_BD.device),
            batch, dim, rows_per_program, eps, grad_factor,
            BLOCK_B=block_b, BLOCK_D=block_d, BLOCK_G=next_power_of_2(num_groups),
            BLOCK_PARTIALS=next_power_of_2(num_views * num_groups), BLOCK_STD=BLOCK_STD,
            num_warps=num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return (
        loss,
        new(0, dtype=pa_BD.dtype) if grad_a is None else grad_a,
        new(0, dtype=pa_BD.dtype) if grad_b is None else grad_b,
        new(0, dtype=pa_BD.dtype) if grad_local is None else grad_local,
        new(0) if row_loss is None else row_loss,
        new(0) if cosine is None else cosine,
        new(0) if std is None else std,
    )


def normalized_mse_bwd(
    grad_loss: Tensor, grad_a: Tensor, grad_b: Tensor | None, grad_local: Tensor | None, factor: float
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Launch the backward: the stored gradients, not in float64, times `grad_loss` [] and `factor`."""
    grads = (grad_a, grad_b, grad_local)
    out_a, out_b, out_local = (None if grad is None else torch.empty_like(grad) for grad in grads)
    assert out_a is not None
    num_views = 1 if grad_b is None else 2 if grad_local is None else 2 + grad_local.shape[0]
    with device_guard(grad_a):
        _normalized_mse_bwd_kernel[(-(-out_a.numel() // BLOCK_BWD), num_views)](
            grad_loss, *grads, out_a, out_b, out_local, out_a.numel(), factor,
            BLOCK=BLOCK_BWD, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out_a, out_b, out_local
