"""Device functions of the norms of LARS: sums of squares in float32 and, where these are not accurate, in float64."""

import torch

from byol_kernels._multi_tensor import CHUNK
from byol_kernels._triton import jit, tl

SMALL_SUM = tl.constexpr(CHUNK * 2.0**-100)
"""A smaller sum of CHUNK squares may have terms below 2^-126, which lose their digits in float32."""
MAX_RATIO = tl.constexpr(torch.finfo(torch.float32).max)


@jit
def load(
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
def norms_chunk(
    p_address: tl.tensor,
    g_address: tl.tensor,
    count: tl.tensor,
    decay: tl.tensor,
    inv_scale: tl.tensor,
    DTYPES: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
) -> tl.tensor:
    """Squared norms of parameter and update of one chunk."""
    ACC: tl.constexpr = tl.float64 if DTYPES[0] == tl.float64 else tl.float32
    offsets = tl.arange(0, CHUNK)
    p = load(p_address, offsets, count, DTYPES[0], ALIGNED).to(ACC)
    d = load(g_address, offsets, count, DTYPES[1], ALIGNED).to(ACC) * inv_scale + decay * p
    return tl.sum(p * p, axis=0).to(tl.float32), tl.sum(d * d, axis=0).to(tl.float32)


@jit
def is_accurate(square: tl.tensor) -> tl.tensor:
    """True for a float32 sum of squares that has neither overflowed nor lost digits to underflow."""
    return (square >= SMALL_SUM) & (square < float("inf"))


@jit
def wide_norms_chunk(
    p_address: tl.tensor,
    g_address: tl.tensor,
    count: tl.tensor,
    decay: tl.tensor,
    inv_scale: tl.tensor,
    DTYPES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Squared norms of parameter and update of the first `count` elements, in float64."""
    offsets = tl.arange(0, BLOCK)
    p_square = tl.zeros((BLOCK,), tl.float64)
    d_square = tl.zeros((BLOCK,), tl.float64)
    # In blocks: all at once would take more registers than the norms do.
    start = 0
    while start < count:
        p = load(p_address, start + offsets, count, DTYPES[0], False).to(tl.float64)
        d = load(g_address, start + offsets, count, DTYPES[1], False).to(tl.float64) * inv_scale + decay * p
        p_square += p * p
        d_square += d * d
        start += BLOCK
    return tl.sum(p_square, axis=0), tl.sum(d_square, axis=0)


@jit
def has_non_finite(
    g_address: tl.tensor,
    count: tl.tensor,
    DTYPES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """True if any of the first `count` elements of a gradient is an infinity or a NaN."""
    # Compared in the gradient's own precision: a finite float64 may be infinite in float32.
    WIDE: tl.constexpr = tl.float64 if DTYPES[1] == tl.float64 else tl.float32
    offsets = tl.arange(0, BLOCK)
    non_finite = tl.zeros((BLOCK,), tl.int1)
    # In blocks: all at once would take more registers than the norms do.
    start = 0
    while start < count:
        g = load(g_address, start + offsets, count, DTYPES[1], False).to(WIDE)
        non_finite |= ~(tl.abs(g) < float("inf"))  # a NaN is not less than anything
        start += BLOCK
    return tl.max(non_finite.to(tl.int32), axis=0) != 0


@jit
def wide_ratio(
    partials_ptr: tl.tensor,
    num_adapted_chunks: tl.tensor,
    row_chunks: tl.tensor,
    trust_coefficient: tl.tensor,
    BLOCK_PARTIALS: tl.constexpr,
) -> tl.tensor:
    """Trust ratio of a row from the sums of its partial norms in float64."""
    p_squares = tl.zeros((BLOCK_PARTIALS,), tl.float64)
    d_squares = tl.zeros((BLOCK_PARTIALS,), tl.float64)
    start = 0
    while start < row_chunks:
        index = start + tl.arange(0, BLOCK_PARTIALS)
        mask = index < row_chunks
        p_squares += tl.load(partials_ptr + index, mask=mask, other=0.0, cache_modifier=".cg")
        d_squares += tl.load(partials_ptr + num_adapted_chunks + index, mask=mask, other=0.0, cache_modifier=".cg")
        start += BLOCK_PARTIALS
    p_square = tl.sum(p_squares, axis=0)
    d_square = tl.sum(d_squares, axis=0)
    ratio = trust_coefficient * tl.sqrt(p_square / d_square)
    ratio = tl.where(ratio > MAX_RATIO, MAX_RATIO, ratio).to(tl.float32)  # not `minimum`: a NaN has to stay NaN
    return tl.where((p_square > 0.0) & (d_square > 0.0), ratio, 1.0)
