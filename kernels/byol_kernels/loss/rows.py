"""Loss, gradient and moments of the rows of one program of the loss kernel."""

from byol_kernels._triton import jit, tl


@jit
def load_unit_rows(
    ptr: tl.tensor, rows: tl.tensor, cols: tl.tensor, stride: tl.tensor, mask: tl.tensor, eps: tl.tensor
) -> tl.tensor:
    """Rows divided by max(norm, eps), their norms, and the factors 1 / max(norm, eps)."""
    offsets = rows.to(tl.int64)[:, None] * stride + cols[None, :]
    x = tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    norm = tl.sqrt_rn(tl.sum(x * x, axis=1))
    scale = tl.div_rn(1.0, tl.where(norm < eps, eps, norm))  # not `maximum`: a NaN norm has to stay NaN
    return x * scale[:, None], norm, scale


@jit
def cosine_of(p_hat: tl.tensor, z_hat: tl.tensor) -> tl.tensor:
    """Cosines of normalized rows, within -1 and 1; that of a NaN is NaN."""
    cosine = tl.sum(p_hat * z_hat, axis=1)
    return tl.where(cosine > 1.0, 1.0, tl.where(cosine < -1.0, -1.0, cosine))


@jit
def add_moments(
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
def global_view_rows(
    p_ptr: tl.tensor,  # [B, D]
    z_ptr: tl.tensor,  # [B, D] targets of the other view
    p_stride: tl.tensor,
    z_stride: tl.tensor,
    grad_ptr: tl.tensor,  # [B, D], or None
    row_loss_ptr: tl.tensor,  # [B], or None
    partial_ptr: tl.tensor,  # [] sum of row losses
    p_moments_ptr: tl.tensor,  # [2, D] mean and sum of squared deviations, or None
    z_moments_ptr: tl.tensor,  # [2, D], or None
    first_row: tl.tensor,
    end_row: tl.tensor,
    dim: tl.tensor,
    eps: tl.tensor,
    grad_factor: tl.tensor,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """One pair: predictions of a view against the projections of the other."""
    # Four running vectors beside a tile would not fit the registers: wide rows take a second pass over z.
    SECOND_PASS_Z: tl.constexpr = BLOCK_D > 4096
    cols = tl.arange(0, BLOCK_D)
    loss_sum = tl.zeros((BLOCK_B,), tl.float32)
    if p_moments_ptr is not None:
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
        p_hat, p_norm, p_scale = load_unit_rows(p_ptr, rows, cols, p_stride, mask, eps)
        z_hat, _, _ = load_unit_rows(z_ptr, rows, cols, z_stride, mask, eps)
        cosine = cosine_of(p_hat, z_hat)
        row_loss = 2.0 - 2.0 * cosine
        loss_sum += tl.where(valid, row_loss, 0.0)
        if grad_ptr is not None:
            # Below eps the denominator is a constant, so the part along p_hat vanishes.
            along = tl.where(p_norm < eps, 0.0, cosine)
            grad = (z_hat - p_hat * along[:, None]) * (p_scale * grad_factor)[:, None]
            at = rows.to(tl.int64)[:, None] * dim + cols[None, :]
            tl.store(grad_ptr + at, grad.to(grad_ptr.dtype.element_ty), mask=mask)
        if p_moments_ptr is not None:
            tl.store(row_loss_ptr + rows, row_loss, mask=valid)
            count = (start - first_row).to(tl.float32)
            num_valid = tl.minimum(end_row - start, BLOCK_B).to(tl.float32)
            p_mean, p_m2 = add_moments(p_mean, p_m2, count, p_hat, valid, num_valid)
            if not SECOND_PASS_Z:
                z_mean, z_m2 = add_moments(z_mean, z_m2, count, z_hat, valid, num_valid)
        start += BLOCK_B
    if p_moments_ptr is not None and SECOND_PASS_Z:
        start = first_row
        while start < end_row:
            rows = start + tl.arange(0, BLOCK_B)
            valid = rows < end_row
            mask = valid[:, None] & (cols < dim)[None, :]
            z_hat, _, _ = load_unit_rows(z_ptr, rows, cols, z_stride, mask, eps)
            count = (start - first_row).to(tl.float32)
            num_valid = tl.minimum(end_row - start, BLOCK_B).to(tl.float32)
            z_mean, z_m2 = add_moments(z_mean, z_m2, count, z_hat, valid, num_valid)
            start += BLOCK_B

    # --- partial results
    tl.store(partial_ptr, tl.sum(loss_sum, axis=0))
    if p_moments_ptr is not None:
        tl.store(p_moments_ptr + cols, p_mean, mask=cols < dim)
        tl.store(p_moments_ptr + dim + cols, p_m2, mask=cols < dim)
        tl.store(z_moments_ptr + cols, z_mean, mask=cols < dim)
        tl.store(z_moments_ptr + dim + cols, z_m2, mask=cols < dim)


@jit
def local_view_rows(
    p_ptr: tl.tensor,  # [B, D]
    z1_ptr: tl.tensor,  # [B, D]
    z2_ptr: tl.tensor,  # [B, D]
    p_stride: tl.tensor,
    z1_stride: tl.tensor,
    z2_stride: tl.tensor,
    grad_ptr: tl.tensor,  # [B, D], or None
    row_loss_ptr: tl.tensor,  # [2, B], or None
    partial_ptr: tl.tensor,  # [] sum of row losses
    first_row: tl.tensor,
    end_row: tl.tensor,
    batch: tl.tensor,
    dim: tl.tensor,
    eps: tl.tensor,
    grad_factor: tl.tensor,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Two pairs: predictions of a local view against the projections of both global ones."""
    cols = tl.arange(0, BLOCK_D)
    loss_sum = tl.zeros((BLOCK_B,), tl.float32)
    start = first_row
    while start < end_row:
        rows = start + tl.arange(0, BLOCK_B)
        valid = rows < end_row
        mask = valid[:, None] & (cols < dim)[None, :]
        p_hat, p_norm, p_scale = load_unit_rows(p_ptr, rows, cols, p_stride, mask, eps)
        z1_hat, _, _ = load_unit_rows(z1_ptr, rows, cols, z1_stride, mask, eps)
        cosine1 = cosine_of(p_hat, z1_hat)
        z2_hat, _, _ = load_unit_rows(z2_ptr, rows, cols, z2_stride, mask, eps)
        cosine2 = cosine_of(p_hat, z2_hat)
        row_loss1 = 2.0 - 2.0 * cosine1
        row_loss2 = 2.0 - 2.0 * cosine2
        loss_sum += tl.where(valid, row_loss1 + row_loss2, 0.0)
        if grad_ptr is not None:
            along = tl.where(p_norm < eps, 0.0, cosine1 + cosine2)
            grad = (z1_hat + z2_hat - p_hat * along[:, None]) * (p_scale * grad_factor)[:, None]
            at = rows.to(tl.int64)[:, None] * dim + cols[None, :]
            tl.store(grad_ptr + at, grad.to(grad_ptr.dtype.element_ty), mask=mask)
        if row_loss_ptr is not None:
            tl.store(row_loss_ptr + rows, row_loss1, mask=valid)
            tl.store(row_loss_ptr + batch + rows, row_loss2, mask=valid)
        start += BLOCK_B
    tl.store(partial_ptr, tl.sum(loss_sum, axis=0))
