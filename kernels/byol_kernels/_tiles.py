"""Square tiles of an image, pixel by pixel, for the blur and the crop.

Their addresses have one dimension. Of two dimensions without consecutive addresses, Triton 3.6 gives the threads of a
warp the first one, the rows: each byte is then in another sector of memory (measured on an H200, see
benchmarks/NOTES.md).
"""

from byol_kernels._triton import jit, tl


@jit
def tile_rows(top: tl.tensor, SIDE: tl.constexpr) -> tl.tensor:
    """Row of each pixel of a tile, [SIDE * SIDE]."""
    return top + tl.arange(0, SIDE * SIDE) // SIDE


@jit
def tile_cols(left: tl.tensor, SIDE: tl.constexpr) -> tl.tensor:
    """Column of each pixel of a tile, [SIDE * SIDE]."""
    return left + tl.arange(0, SIDE * SIDE) % SIDE


@jit
def load_tile(at: tl.tensor, mask: tl.tensor, SIDE: tl.constexpr) -> tl.tensor:
    """Values at the addresses of a tile, [SIDE, SIDE]; 0 where the mask is false. None loads all."""
    x = tl.load(at) if mask is None else tl.load(at, mask=mask, other=0)
    return x.reshape(SIDE, SIDE)


@jit
def store_tile(at: tl.tensor, x: tl.tensor, mask: tl.tensor, SIDE: tl.constexpr) -> None:
    """Write a tile [SIDE, SIDE] to its addresses where the mask is true."""
    tl.store(at, x.reshape(SIDE * SIDE), mask=mask)
