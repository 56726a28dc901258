"""Memory layouts of tensor lists: which ones pair element by element, and the checks of a multi-tensor call."""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from byol_kernels._dtypes import FLOAT_DTYPES, LOW_PRECISION_DTYPES


class Column(NamedTuple):
    """One list of tensors of a multi-tensor call."""

    name: str
    """The name that messages use."""
    tensors: Sequence[Tensor]
    rows: Sequence[int] | None = None
    """The row of each tensor, each at most once; None: tensor i is in row i, and every row has one."""
    written: bool = False
    shape: Literal["row", "stacked", "counter"] = "row"
    """Shape of each tensor: that of its row; contiguous `[V, *row]`, for a column that is read; an int64 scalar."""
    is_average: bool = False
    """An average is refused in a low precision, where it would stop moving."""

    def row(self, index: int) -> int:
        """The row of tensor `index`."""
        return index if self.rows is None else self.rows[index]


def is_dense(tensor: Tensor) -> bool:
    """True if the elements fill one stretch of memory without gaps or overlap, in any order of dimensions."""
    if tensor.numel() == 0:
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def same_layout(a: Tensor, b: Tensor) -> bool:
    """True if two tensors of one shape have equal strides, dimensions of size 1 aside."""
    return a.stride() == b.stride() or all(
        s == t or size == 1 for s, t, size in zip(a.stride(), b.stride(), a.shape, strict=True)
    )


def check_match(op_name: str, columns: Sequence[Column]) -> None:
    """Check dtypes, devices and shapes against column 0.

    Raises:
        ValueError: on the first tensor that does not match.
    """
    first = columns[0]
    device = first.tensors[0].device
    for column in columns:
        for index, t in enumerate(column.tensors):
            name, partner = f"{column.name}[{index}]", first.tensors[column.row(index)]
            partner_name = f"{first.name}[{column.row(index)}]"
            if column.shape == "counter":
                if t.dtype != torch.int64 or t.dim() or t.device != device:
                    raise ValueError(
                        f"{op_name}: {name} must be an int64 scalar on {device}, got {t.dtype} of shape "
                        f"{tuple(t.shape)} on {t.device}; make it with torch.tensor(0, device='{device}')"
                    )
                continue
            if t.dtype not in FLOAT_DTYPES:
                raise ValueError(
                    f"{op_name}: {name} must be floating point, got {t.dtype}; leave integer buffers out of the list"
                )
            if column.is_average and t.dtype in LOW_PRECISION_DTYPES:
                raise ValueError(
                    f"{op_name}: {name} must be float32 or float64, got {t.dtype}, in which an average stops moving; "
                    "keep the target in float32 and have the low-precision weights written by copies="
                )
            if t.device != device:
                raise ValueError(
                    f"{op_name}: {name} must be on the device of {first.name}[0], {device}, got {t.device}; "
                    f"move it with .to('{device}')"
                )
            if column.shape == "stacked":
                if t.shape[1:] != partner.shape or not t.dim() or not t.is_contiguous():
                    raise ValueError(
                        f"{op_name}: {name} must be contiguous and [V, C] for {partner_name} of shape "
                        f"{tuple(partner.shape)}, got {tuple(t.shape)} with strides {t.stride()}; pass both lists in "
                        "the same order"
                    )
            elif t.shape != partner.shape:
                raise ValueError(
                    f"{op_name}: {name} must have the shape of {partner_name}, {tuple(partner.shape)}, "
                    f"got {tuple(t.shape)}; pass both lists in the same order"
                )


def find_other_layouts(op_name: str, columns: Sequence[Column]) -> list[tuple[int, int]]:
    """Tensors that must first be copied into the layout of their partner in column 0, as (column, index).

    Raises:
        ValueError: if a tensor of column 0 is not dense, or a written tensor has another layout than its partner.
    """
    first = columns[0]
    for index, t in enumerate(first.tensors):
        if not is_dense(t):
            raise ValueError(
                f"{op_name}: {first.name}[{index}] must be dense (no gaps or overlap in memory), got strides "
                f"{t.stride()} for shape {tuple(t.shape)}; pass a tensor of its own, for instance from .contiguous()"
            )
    others = []
    for k, column in enumerate(columns[1:], 1):
        if column.shape != "row":
            continue
        for index, t in enumerate(column.tensors):
            partner = first.tensors[column.row(index)]
            if t.numel() == 0 or same_layout(t, partner):
                continue
            if column.written:
                raise ValueError(
                    f"{op_name}: {column.name}[{index}] must have the strides of {first.name}[{column.row(index)}], "
                    f"{partner.stride()}, got {t.stride()}; allocate it with torch.empty_like or use one "
                    "memory_format for both networks"
                )
            others.append((k, index))
    return others


def check_no_overlap(op_name: str, columns: Sequence[Column]) -> None:
    """Check that no tensor that is written shares memory with any other of the call.

    Raises:
        ValueError: on the first pair that does.
    """
    # --- written against written: sorted by address, only neighbors can overlap first
    written = sorted(
        (t.data_ptr(), t.data_ptr() + t.nbytes, k, index)
        for k, column in enumerate(columns)
        if column.written
        for index, t in enumerate(column.tensors)
        if t.numel()
    )
    for (_, end, k, index), (start, _, other_k, other_index) in pairwise(written):
        if start < end:
            raise _overlap_error(op_name, columns, (k, index), (other_k, other_index))
    # --- written against read
    starts = [start for start, *_ in written]
    for k, column in enumerate(columns):
        if column.written:
            continue
        for index, t in enumerate(column.tensors):
            if t.numel() == 0:
                continue
            start = t.data_ptr()
            last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
            # Written tensors are disjoint, so only the last one that starts before this one's end can reach into it.
            before = bisect_left(starts, start + (last + 1) * t.element_size()) - 1
            if before >= 0 and written[before][1] > start:
                raise _overlap_error(op_name, columns, written[before][2:], (k, index))


def _overlap_error(op_name: str, columns: Sequence[Column], a: tuple[int, int], b: tuple[int, int]) -> ValueError:
    names = [f"{columns[k].name}[{index}]" for k, index in (a, b)]
    return ValueError(
        f"{op_name}: {names[0]} must not share memory with {names[1]}, got overlapping tensors; "
        "list a tied parameter once, and make the other network with copy.deepcopy"
    )
