"""CPU performance: convolutions of small feature maps, and reuse of freed memory."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Largest number of output positions for which explicit matrix products were measured to be faster
# (benchmarks/NOTES.md).
SMALL_MAP = 4
SMALL_MAP_WEIGHT_GRADIENT = 9

Pair = tuple[int, int]


def keep_freed_memory() -> bool:
    """Make the C library reuse large freed blocks instead of returning them to the system.

    A step allocates activations of tens of megabytes. By default, blocks above 32 MB are mapped anew each time, and the
    kernel clears every page. The cost: the resident size of the process stays at its peak.

    Returns:
        True on success; only glibc has the settings (`man mallopt`).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    mmap_threshold, trim_threshold = -3, -1
    return bool(mallopt(mmap_threshold, 2**30)) and bool(mallopt(trim_threshold, 2**31 - 1))


def use_small_map_convolutions(network: nn.Module) -> int:
    """Compute convolutions with few output positions as matrix products over the pixels inside the image.

    A 3x3 kernel on a 2x2 map multiplies 20 of 36 times by padding, and torch reorders the weights, which are larger
    than the map, in each call. The function is the same, its rounding differs. Only channels_last networks in eager
    mode on a CPU are affected; in all other cases the convolutions call torch.

    Args:
        network: any network, converted in place; parameters keep their names and values.

    Returns:
        Number of converted convolutions.
    """
    converted = [m for m in network.modules() if type(m) is nn.Conv2d and _is_supported(m)]
    for module in converted:
        module.__class__ = SmallMapConv2d
    return len(converted)


def _is_supported(conv: nn.Conv2d) -> bool:
    plain = conv.groups == 1 and conv.dilation == (1, 1) and conv.bias is None and conv.padding_mode == "zeros"
    return plain and not isinstance(conv.padding, str)


class SmallMapConv2d(nn.Conv2d):
    """`nn.Conv2d` without bias, with another implementation for small output maps."""

    plain_class: ClassVar[type[nn.Module]] = nn.Conv2d

    def forward(self, input: Tensor) -> Tensor:
        """The function of `nn.Conv2d`."""
        is_traced = torch.compiler.is_compiling() or torch._C._is_tracing()
        if is_traced or input.device.type != "cpu" or input.ndim != 4:
            return super().forward(input)
        geometry = _Geometry(
            cast("Pair", tuple(input.shape[2:])), cast("Pair", self.kernel_size), cast("Pair", self.stride),
            cast("Pair", self.padding),
        )  # fmt: skip
        height, width = geometry.out
        if not 0 < height * width <= SMALL_MAP_WEIGHT_GRADIENT:
            return super().forward(input)
        x, weight = input, self.weight
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            x, weight = x.to(dtype), weight.to(dtype)
        if x.dtype != weight.dtype or not all(t.is_contiguous(memory_format=torch.channels_last) for t in (x, weight)):
            return super().forward(input)
        return cast("Tensor", _SmallMapConv.apply(x, weight, geometry))


class _Geometry(NamedTuple):
    """Sizes of a convolution, each as (height, width)."""

    map: Pair
    kernel: Pair
    stride: Pair
    padding: Pair

    @property
    def out(self) -> Pair:
        """Height and width of the output."""
        (h, w), (kh, kw), (sh, sw), (ph, pw) = self
        return (h + 2 * ph - kh) // sh + 1, (w + 2 * pw - kw) // sw + 1

    @property
    def small(self) -> bool:
        """True if output and input gradient are faster as matrix products."""
        height, width = self.out
        return height * width <= SMALL_MAP

    def rows(self) -> Iterator[tuple[Pair, tuple[int, slice], tuple[int, slice]]]:
        """Position, image slice and kernel slice, for each output position and each kernel row inside the image."""
        for i in range(self.out[0]):
            first_row, row_taps = _inside(i, 0, self)
            for j in range(self.out[1]):
                first_column, column_taps = _inside(j, 1, self)
                columns = slice(first_column, first_column + len(column_taps))
                taps = slice(column_taps.start, column_taps.stop)
                for row, tap in enumerate(row_taps, first_row):
                    yield (i, j), (row, columns), (tap, taps)

    def outputs_of(self, tap: int, axis: int) -> range:
        """Output indices for which a kernel row (axis 0) or column (axis 1) lies inside the image."""
        size, stride, padding = self.map[axis], self.stride[axis], self.padding[axis]
        first = max(0, -((tap - padding) // stride))
        last = (size - 1 + padding - tap) // stride
        return range(first, min(self.out[axis], last + 1))


def _inside(position: int, axis: int, geometry: _Geometry) -> tuple[int, range]:
    """First image index under the kernel at an output index, and the range of taps inside the image."""
    start = position * geometry.stride[axis] - geometry.padding[axis]
    taps = range(max(0, -start), min(geometry.kernel[axis], geometry.map[axis] - start))
    return start + taps.start, taps


class _SmallMapConv(torch.autograd.Function):
    """Convolution as matrix products on views of NHWC memory, without padding or copies of the weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, geometry: _Geometry) -> Tensor:
        """`y[:, i, j] = sum over kernel rows of x[:, row, columns] @ weight[:, tap, taps].T`."""
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        if not geometry.small:
            return torch.conv2d(x, weight, None, geometry.stride, geometry.padding)
        y = _empty((len(x), len(weight), *geometry.out), x)
        y_BHWO, x_BHWC, w_OHWC = _nhwc(y).zero_(), _nhwc(x), _nhwc(weight)
        for (i, j), (row, columns), (tap, taps) in geometry.rows():
            y_BHWO[:, i, j].addmm_(x_BHWC[:, row, columns].flatten(1), w_OHWC[:, tap, taps].flatten(1).T)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients with respect to input and weight."""
        x, weight = ctx.saved_tensors
        geometry: _Geometry = ctx.geometry
        dy = dy.contiguous(memory_format=torch.channels_last)
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = _input_gradient(dy, x, weight, geometry)
        if ctx.needs_input_grad[1]:
            dweight = _weight_gradient(dy, x, weight, geometry)
        return dx, dweight, None


def _input_gradient(dy: Tensor, x: Tensor, weight: Tensor, geometry: _Geometry) -> Tensor:
    """`dx[:, row, columns] += dy[:, i, j] @ weight[:, tap, taps]`."""
    if not geometry.small:
        dx, _, _ = torch.ops.aten.convolution_backward(
            dy, x, weight, None, geometry.stride, geometry.padding, (1, 1), False, (0, 0), 1, (True, False, False)
        )
        return cast("Tensor", dx)
    dx = _empty(x.shape, x)
    dx_BHWC, dy_BHWO, w_OHWC = _nhwc(dx).zero_(), _nhwc(dy), _nhwc(weight)
    for (i, j), (row, columns), (tap, taps) in geometry.rows():
        dx_BHWC[:, row, columns].flatten(1).addmm_(dy_BHWO[:, i, j], w_OHWC[:, tap, taps].flatten(1))
    return dx


def _weight_gradient(dy: Tensor, x: Tensor, weight: Tensor, geometry: _Geometry) -> Tensor:
    """`dweight[:, tap] = dy.T @ x` over the outputs for which the tap lies inside the image."""
    dweight = _empty(weight.shape, weight)
    dw_OHWC, dy_BHWO, x_BHWC = _nhwc(dweight), _nhwc(dy), _nhwc(x)
    rows, columns = ([geometry.outputs_of(t, axis) for t in range(geometry.kernel[axis])] for axis in (0, 1))
    for a, row_outputs in enumerate(rows):
        for b, column_outputs in enumerate(columns):
            if not (row_outputs and column_outputs):
                dw_OHWC[:, a, b].zero_()
                continue
            under_tap = x_BHWC[:, _positions(a, row_outputs, 0, geometry), _positions(b, column_outputs, 1, geometry)]
            outputs = dy_BHWO[:, _slice(row_outputs), _slice(column_outputs)]
            torch.mm(outputs.flatten(0, 2).T, under_tap.flatten(0, 2), out=dw_OHWC[:, a, b])
    return dweight


def _positions(tap: int, outputs: range, axis: int, geometry: _Geometry) -> slice:
    """Image indices under a tap for these outputs."""
    stride = geometry.stride[axis]
    first, last = (o * stride + tap - geometry.padding[axis] for o in (outputs[0], outputs[-1]))
    return slice(first, last + 1, stride)


def _slice(outputs: range) -> slice:
    return slice(outputs.start, outputs.stop)


def _empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, memory_format=torch.channels_last)


def _nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)
