"""The last operations on a pixel, and loads and stores of eight interleaved RGB pixels per thread."""

from byol_kernels._triton import jit, tl


@jit
def _byte(word: tl.tensor, index: tl.constexpr, TRUNCATE: tl.constexpr) -> tl.tensor:
    """Byte of a word as float32, from 0 to 255 with TRUNCATE, else from 0 to 1."""
    x = ((word >> (8 * index)) & 255).to(tl.int32).to(tl.float32)
    if not TRUNCATE:
        x *= 1.0 / 255.0
    return x


@jit
def _join8(
    x0: tl.tensor,
    x1: tl.tensor,
    x2: tl.tensor,
    x3: tl.tensor,
    x4: tl.tensor,
    x5: tl.tensor,
    x6: tl.tensor,
    x7: tl.tensor,
) -> tl.tensor:
    """Join eight [G] to [G, 8], all in the registers of one thread."""
    joined = tl.join(tl.join(tl.join(x0, x4), tl.join(x2, x6)), tl.join(tl.join(x1, x5), tl.join(x3, x7)))
    return joined.reshape(x0.shape[0], 8)


@jit
def _split8(x: tl.tensor) -> tl.tensor:
    """Split [G, 8] into eight [G]."""
    even, odd = x.reshape(x.shape[0], 2, 2, 2).split()
    x04, x26 = even.split()
    x15, x37 = odd.split()
    x0, x4 = x04.split()
    x2, x6 = x26.split()
    x1, x5 = x15.split()
    x3, x7 = x37.split()
    return x0, x1, x2, x3, x4, x5, x6, x7


@jit
def load_pixels(
    image_ptr: tl.tensor,  # [3, H, W], any strides
    groups: tl.tensor,  # of 8 pixels
    stride_c: tl.tensor,
    stride_h: tl.tensor,
    stride_w: tl.tensor,
    AREA: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
    TRUNCATE: tl.constexpr,
) -> tl.tensor:
    """Red, green and blue of G groups of 8 pixels, each [G, 8]; 0 beyond the image."""
    T: tl.constexpr = TRUNCATE
    if VECTOR:
        # Eight interleaved pixels are 24 bytes: three 64-bit words, taken apart byte by byte.
        words_ptr = image_ptr.to(tl.pointer_type(tl.int64)) + groups * 3
        mask = groups < AREA // 8
        u = tl.load(words_ptr, mask=mask, other=0)
        v = tl.load(words_ptr + 1, mask=mask, other=0)
        w = tl.load(words_ptr + 2, mask=mask, other=0)
        r = _join8(
            _byte(u, 0, T), _byte(u, 3, T), _byte(u, 6, T), _byte(v, 1, T),
            _byte(v, 4, T), _byte(v, 7, T), _byte(w, 2, T), _byte(w, 5, T),
        )  # fmt: skip
        g = _join8(
            _byte(u, 1, T), _byte(u, 4, T), _byte(u, 7, T), _byte(v, 2, T),
            _byte(v, 5, T), _byte(w, 0, T), _byte(w, 3, T), _byte(w, 6, T),
        )  # fmt: skip
        b = _join8(
            _byte(u, 2, T), _byte(u, 5, T), _byte(v, 0, T), _byte(v, 3, T),
            _byte(v, 6, T), _byte(w, 1, T), _byte(w, 4, T), _byte(w, 7, T),
        )  # fmt: skip
    else:
        pixels = groups[:, None] * 8 + tl.arange(0, 8)[None, :]
        mask = pixels < AREA
        at = image_ptr + (pixels // WIDTH).to(tl.int64) * stride_h + (pixels % WIDTH).to(tl.int64) * stride_w
        r = _byte(tl.load(at, mask=mask, other=0).to(tl.int32), 0, T)
        g = _byte(tl.load(at + stride_c, mask=mask, other=0).to(tl.int32), 0, T)
        b = _byte(tl.load(at + 2 * stride_c, mask=mask, other=0).to(tl.int32), 0, T)
    return r, g, b


@jit
def finish_channel(
    x: tl.tensor, top: tl.tensor, solarize_from: tl.tensor, scale: tl.tensor, bias: tl.tensor
) -> tl.tensor:
    """Solarize and normalize a channel of values from 0 to `top`."""
    return tl.where(x >= solarize_from, top - x, x) * scale + bias


@jit
def store_pixels(
    out_ptr: tl.tensor,  # [H, W, 3]
    groups: tl.tensor,  # of 8 pixels
    mirrored: tl.tensor,
    r: tl.tensor,
    g: tl.tensor,
    b: tl.tensor,
    AREA: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
) -> None:
    """Convert and write groups of 8 pixels, each row mirrored if `mirrored`."""
    OUT: tl.constexpr = out_ptr.dtype.element_ty
    if VECTOR:
        r0, r1, r2, r3, r4, r5, r6, r7 = _split8(r.to(OUT))
        g0, g1, g2, g3, g4, g5, g6, g7 = _split8(g.to(OUT))
        b0, b1, b2, b3, b4, b5, b6, b7 = _split8(b.to(OUT))
        mask = (groups < AREA // 8)[:, None]
        # The three channels are interleaved in registers, so that a thread writes 24 consecutive values.
        if mirrored:
            row = groups // (WIDTH // 8)
            groups = (2 * row + 1) * (WIDTH // 8) - 1 - groups
            at = out_ptr + groups[:, None] * 24 + tl.arange(0, 8)[None, :]
            tl.store(at, _join8(r7, g7, b7, r6, g6, b6, r5, g5), mask=mask)
            tl.store(at + 8, _join8(b5, r4, g4, b4, r3, g3, b3, r2), mask=mask)
            tl.store(at + 16, _join8(g2, b2, r1, g1, b1, r0, g0, b0), mask=mask)
        else:
            at = out_ptr + groups[:, None] * 24 + tl.arange(0, 8)[None, :]
            tl.store(at, _join8(r0, g0, b0, r1, g1, b1, r2, g2), mask=mask)
            tl.store(at + 8, _join8(b2, r3, g3, b3, r4, g4, b4, r5), mask=mask)
            tl.store(at + 16, _join8(g5, b5, r6, g6, b6, r7, g7, b7), mask=mask)
    else:
        pixels = groups[:, None] * 8 + tl.arange(0, 8)[None, :]
        mask = pixels < AREA
        if mirrored:
            pixels = (2 * (pixels // WIDTH) + 1) * WIDTH - 1 - pixels
        at = out_ptr + pixels * 3
        tl.store(at, r.to(OUT), mask=mask)
        tl.store(at + 1, g.to(OUT), mask=mask)
        tl.store(at + 2, b.to(OUT), mask=mask)
