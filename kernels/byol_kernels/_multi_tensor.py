"""Lists of tensors for one kernel launch: who checks them, and the tables that the kernel reads.

A multi-tensor kernel walks rows. Row i holds one tensor from each of several columns: for the moving average
a target, its online partner and perhaps a low-precision copy; for LARS a parameter, its gradient, its momentum
and so on. The kernel pairs elements by their place in memory, so all tensors of a row must be laid out alike.

The layout rule. Column 0 decides: its tensors must be dense, in any order of dimensions (the parameters of a
channels_last network are dense but not contiguous, and loading a checkpoint does not change strides). A column
that is written must have the strides of column 0. A column that is only read may have others: it is then first
copied into the layout of column 0, which costs a launch for that tensor and stays correct.

The tables. They are replaced, never changed: a launch in flight, or recorded into a CUDA graph, keeps the table
it was given. A replacement is copied from a pinned buffer of the caching host allocator, which does not reuse
the buffer before the copy is done. No call waits for the device.

CUDA graphs. A recorded launch takes over the tables of the call that warmed it up. Where addresses differ by then
(gradients that the graph allocates itself), the copy of the new table is recorded too, so its pinned buffer has to
outlive the graph, and has to exist already: pinned memory cannot be allocated safely during a capture. Each plan
therefore keeps one spare of every buffer it may need.
"""

import weakref
from array import array
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from itertools import chain, pairwise
from operator import attrgetter
from typing import Literal, NamedTuple

import torch
from torch import Tensor

CHUNK = 4096
"""Elements of one tensor that one program handles: 16 a thread, in 8 warps."""
NUM_WARPS = 8

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_dtype_of, _shape_of, _device_of = attrgetter("dtype"), attrgetter("shape"), attrgetter("device")


class Column(NamedTuple):
    """One list of tensors of a multi-tensor call."""

    name: str
    """What messages call it."""
    tensors: Sequence[Tensor]
    rows: Sequence[int] | None = None
    """The row of each tensor, each at most once; None: tensor i is in row i, and every row has one."""
    written: bool = False
    shape: Literal["row", "stacked", "counter"] = "row"
    """Of each tensor: that of its row; contiguous `[V, *row]`, for a column that is read; or an int64 scalar."""

    def row(self, index: int) -> int:
        """The row that tensor `index` is in."""
        return index if self.rows is None else self.rows[index]


class Tables(NamedTuple):
    """What a kernel reads, on the device of the tensors."""

    addresses: Tensor
    """int64 [columns, rows]; 0 where a row has no tensor in that column."""
    rows: Tensor
    """int64 [rows, 4]: number of elements, kind, first chunk, tag."""
    chunks: Tensor
    """int64 [chunks, 2]: row, chunk within the row."""
    borrowed: list[Tensor]
    """Copies in the layout of column 0; they must live until the kernel is launched."""


class MultiTensorPlan:
    """The checked lists of one multi-tensor call and, for a GPU, the tables that its kernels read.

    `plan_for` finds the plan of a call. The same tensors as before, where and as they were, cost a look at their
    addresses, sizes and strides; others laid out alike cost a comparison of all there is to know about them; tensors
    that moved (gradients move at every eager step under `zero_grad(set_to_none=True)`) cost a new address
    table; anything else is checked and built anew.

    Attributes:
        kinds: the distinct tuples of dtypes that a row has, one dtype per column.
        num_chunks: programs that cover all rows.
        num_front_chunks: programs that cover the rows which were asked to come first.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._signature: object = None
        self._pointers: list[tuple[int, ...]] = []
        self._seen: object = None
        self._watched: list[weakref.ref[Tensor]] = []
        self._relaid: list[tuple[int, int]] = []
        self._addresses: Tensor | None = None
        self._sizes: tuple[Tensor, Tensor] | None = None
        self._constants: dict[str, tuple[tuple[float, ...], Tensor]] = {}
        self._workspace: dict[str, Tensor] = {}
        self._spares: dict[str, Tensor] = {}
        self._donor: MultiTensorPlan | None = None
        self._kept: list[Tensor] = []
        self.kinds: tuple[tuple[torch.dtype, ...], ...] = ()
        self.num_chunks = 0
        self.num_front_chunks = 0

    def update(
        self, columns: Sequence[Column], front: Sequence[bool], tags: Sequence[int], by_index: bool = False
    ) -> None:
        """Checks the lists where they differ from those of the last call, and drops the tables that no longer hold.

        Args:
            columns: the lists; the first has a tensor for every row.
            front: whether the chunks of a row come before those of the others, so that a launch may cover these
                rows alone; empty for no such rows.
            tags: an integer for each row that the kernel finds beside its size; empty for zeros.
            by_index: whether elements are paired by their indices, so that it does not matter where they are.

        Raises:
            ValueError: on tensors that do not match, whose layout is not supported, or that share memory.
        """
        extra = _extra(columns, front, tags)
        glance = _glance_by_index if by_index else _glance
        if self._seen and self._seen == (extra, glance(columns)):
            return
        signature = _signature(columns, extra)
        pointers = [tuple(map(Tensor.data_ptr, c.tensors)) for c in columns]
        alike = signature == self._signature
        if alike and pointers == self._pointers:
            self._watched = [weakref.ref(t, self._forget) for c in columns for t in c.tensors]
            self._seen = extra, glance(columns)
            return
        self._signature = self._seen = None  # a call that raises leaves nothing to trust
        self._addresses = None
        if not alike:
            _check_match(self._what, columns)
            self._relaid = _other_layouts(self._what, columns)
            self._sizes = None
            self._constants.clear()
            self._workspace.clear()
            self._count(columns, front, tags)
        _check_memory(self._what, columns)
        self._signature, self._pointers = signature, pointers

    def _forget(self, _: object) -> None:
        """Of a tensor that is gone another one may take the name."""
        self._seen = None

    def _count(self, columns: Sequence[Column], front: Sequence[bool], tags: Sequence[int]) -> None:
        reference = columns[0].tensors
        dtypes = [[t.dtype] * len(columns) for t in reference]
        for k, column in enumerate(columns):
            for index, t in enumerate(column.tensors):
                dtypes[column.row(index)][k] = t.dtype
        kinds = [tuple(row) for row in dtypes]
        self.kinds = tuple(dict.fromkeys(kinds))

        numel = [t.numel() for t in reference]
        num_chunks = [-(-n // CHUNK) for n in numel]
        order = sorted(range(len(numel)), key=lambda row: not front[row]) if front else range(len(numel))
        first_chunk, total = [0] * len(numel), 0
        for row in order:
            first_chunk[row] = total
            total += num_chunks[row]
        self.num_chunks = total
        self.num_front_chunks = sum(num_chunks[row] for row in order if front and front[row])
        self._row_values = [
            value
            for row, n in enumerate(numel)
            for value in (n, self.kinds.index(kinds[row]), first_chunk[row], tags[row] if tags else 0)
        ]
        self._chunk_values = [value for row in order for chunk in range(num_chunks[row]) for value in (row, chunk)]

    def tables(self, columns: Sequence[Column]) -> Tables:
        """The tables for these lists, which `update` has seen last."""
        device = columns[0].tensors[0].device
        num_rows = len(columns[0].tensors)
        if self._sizes is None:
            self._sizes = (
                self._to_device("rows", array("q", self._row_values), device).view(num_rows, 4),
                self._to_device("chunks", array("q", self._chunk_values), device).view(-1, 2),
            )
        addresses, borrowed = self._addresses, []
        if addresses is None or self._relaid:
            table = [[0] * num_rows for _ in columns]
            for k, pointers in enumerate(self._pointers):
                for index, pointer in enumerate(pointers):
                    table[k][columns[k].row(index)] = pointer
            for k, index in self._relaid:
                row = columns[k].row(index)
                borrowed.append(torch.empty_like(columns[0].tensors[row], dtype=columns[k].tensors[index].dtype))
                borrowed[-1].copy_(columns[k].tensors[index])
                table[k][row] = borrowed[-1].data_ptr()
            addresses = self._to_device("addresses", array("q", chain.from_iterable(table)), device)
            self._addresses = addresses = addresses.view(len(columns), num_rows)
        self._stock("addresses", addresses)
        return Tables(addresses, *self._sizes, borrowed)

    def constant(self, name: str, kind: str, values: Sequence[float], device: torch.device) -> Tensor:
        """A small device table of numbers, uploaded again only when they change.

        Args:
            name: which table.
            kind: "q" for int64, "f" for float32, "d" for float64.
            values: the numbers.
            device: where to.

        Returns:
            The table [len(values)].
        """
        key = tuple(values)
        known = self._constants.get(name)
        if known is None or known[0] != key:
            known = (key, self._to_device(name, array(kind, key), device))
            self._constants[name] = known
        self._stock(name, known[1])
        return known[1]

    def workspace(self, name: str, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A device buffer of this plan [numel]: zeros at first, and after that as its kernels leave it."""
        if name not in self._workspace:
            self._workspace[name] = torch.zeros(numel, dtype=dtype, device=device)
        return self._workspace[name]

    def record(self, columns: Sequence[Column], front: Sequence[bool], tags: Sequence[int]) -> "MultiTensorPlan":
        """A plan for a launch that is being recorded into a CUDA graph, with the tables that this one has.

        Args:
            columns: the lists, of the same layouts as those of this plan.
            front: as in `update`.
            tags: as in `update`.

        Returns:
            The plan. It must live as long as the graph.
        """
        plan = MultiTensorPlan(self._what)
        plan._donor = self
        plan._signature, plan._pointers, plan._relaid = self._signature, self._pointers, self._relaid
        plan._addresses, plan._sizes, plan._constants = self._addresses, self._sizes, dict(self._constants)
        plan.kinds, plan.num_chunks, plan.num_front_chunks = self.kinds, self.num_chunks, self.num_front_chunks
        plan.update(columns, front, tags)
        return plan

    def describes(self, what: str, signature: object) -> bool:
        """Whether this is the plan of that function for lists of these layouts, wherever they are in memory."""
        return self._what == what and self._signature == signature

    def _to_device(self, name: str, values: "array[int] | array[float]", device: torch.device) -> Tensor:
        dtype = {"q": torch.int64, "f": torch.float32, "d": torch.float64}[values.typecode]
        if not values:
            return torch.empty(0, dtype=dtype, device=device)
        table = torch.frombuffer(values, dtype=dtype)
        if device.type != "cuda":
            return table.clone()
        if self._donor is None:
            staging = torch.empty(table.shape, dtype=dtype, pin_memory=True)
        else:
            spare = self._donor._spares.pop(name, None)
            if spare is None:
                raise _not_warmed_up(self._what)
            staging = spare
            self._kept.append(staging)
        return staging.copy_(table).to(device, non_blocking=True)

    def _stock(self, name: str, table: Tensor) -> None:
        """Keeps a pinned buffer for a table of this size, for a capture to take."""
        if table.is_cuda and self._donor is None and name not in self._spares:
            self._spares[name] = torch.empty(table.numel(), dtype=table.dtype, pin_memory=True)


_LAYOUT = (_dtype_of, _shape_of, Tensor.stride, _device_of)
_MAX_PLANS = 64
_plans: OrderedDict[object, MultiTensorPlan] = OrderedDict()
_captured: list[MultiTensorPlan] = []


def plan_for(
    what: str,
    columns: Sequence[Column],
    front: Sequence[bool] = (),
    tags: Sequence[int] = (),
    by_index: bool = False,
) -> MultiTensorPlan:
    """The plan of these lists, checked and up to date.

    Plans are kept by function, list and stream, so a table written on one stream is not read on another. A launch
    that is being recorded into a CUDA graph gets a plan of its own, which lives as long as the process: the graph
    reads its tables at every replay.

    Args:
        what: the function that messages name.
        columns: the lists; the first has a tensor for every row.
        front: as in `MultiTensorPlan.update`.
        tags: as in `MultiTensorPlan.update`.
        by_index: as in `MultiTensorPlan.update`.

    Returns:
        The plan.

    Raises:
        ValueError: on tensors that do not match, whose layout is not supported, or that share memory.
        RuntimeError: if the first call with these lists is being captured into a CUDA graph.
    """
    first = columns[0].tensors[0]
    stream = 0
    if first.device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            signature = _signature(columns, _extra(columns, front, tags))
            donor = next((p for p in reversed(_plans.values()) if p.describes(what, signature)), None)
            if donor is None:
                raise _not_warmed_up(what)
            _captured.append(donor.record(columns, front, tags))
            return _captured[-1]
        stream = torch.cuda.current_stream(first.device).cuda_stream
    # The key only says where to look: `update` compares everything.
    key = (what, stream, first.data_ptr(), tuple(len(c.tensors) for c in columns))
    plan = _plans.pop(key) if key in _plans else MultiTensorPlan(what)
    plan.update(columns, front, tags, by_index)
    _plans[key] = plan
    while len(_plans) > _MAX_PLANS:
        _plans.popitem(last=False)
    return plan


def _extra(columns: Sequence[Column], front: Sequence[bool], tags: Sequence[int]) -> object:
    return (tuple(front), tuple(tags), *(c.rows for c in columns))


def _signature(columns: Sequence[Column], extra: object) -> object:
    """All that a plan depends on but the addresses."""
    return (extra, *(tuple(map(get, c.tensors)) for c in columns for get in _LAYOUT))


def _glance(columns: Sequence[Column]) -> bytes:
    """All that may change about tensors whose signature is known.

    Python's name of a living tensor stands for its dtype and device: to change these takes other memory, too. And the
    strides and the number of elements of a dense tensor stand for its shape. In one piece, because reading a thousand
    objects that fell out of the cache takes longer than making them.
    """
    facts: list[int] = []  # an array grows one number at a time
    for column in columns:
        for fact in (id, Tensor.data_ptr, Tensor.numel):
            facts += map(fact, column.tensors)
        facts += chain.from_iterable(map(Tensor.stride, column.tensors))
    return array("q", facts).tobytes()


def _glance_by_index(columns: Sequence[Column]) -> tuple[bytes, bool]:
    """Less than that: where the tensors are, and whether each has the shape of its partner."""
    facts: list[int] = []
    for column in columns:
        facts += map(id, column.tensors)
        facts += map(Tensor.data_ptr, column.tensors)
    shapes = [[*map(_shape_of, column.tensors)] for column in columns]
    return array("q", facts).tobytes(), all(other == shapes[0] for other in shapes)


def _not_warmed_up(what: str) -> RuntimeError:
    return RuntimeError(
        f"{what}: the tensors must have been through a call before each CUDA graph capture, got none since the last "
        "one; run one step before the capture"
    )


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory without gaps or overlap, in any order of dimensions."""
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
    """Whether equal indices are at equal places; the strides of dimensions of size 1 say nothing."""
    return a.stride() == b.stride() or all(
        s == t or size == 1 for s, t, size in zip(a.stride(), b.stride(), a.shape, strict=True)
    )


def _check_match(what: str, columns: Sequence[Column]) -> None:
    first = columns[0]
    device = first.tensors[0].device
    for column in columns:
        for index, t in enumerate(column.tensors):
            name, partner = f"{column.name}[{index}]", first.tensors[column.row(index)]
            partner_name = f"{first.name}[{column.row(index)}]"
            if column.shape == "counter":
                if t.dtype != torch.int64 or t.dim() or t.device != device:
                    raise ValueError(
                        f"{what}: {name} must be an int64 scalar on {device}, got {t.dtype} of shape {tuple(t.shape)} "
                        f"on {t.device}; make it with torch.tensor(0, device='{device}')"
                    )
                continue
            if t.dtype not in _DTYPES:
                raise ValueError(
                    f"{what}: {name} must be floating point, got {t.dtype}; leave integer buffers out of the list"
                )
            if t.device != device:
                raise ValueError(
                    f"{what}: {name} must be on the device of {first.name}[0], {device}, got {t.device}; "
                    f"move it with .to('{device}')"
                )
            if column.shape == "stacked":
                if t.shape[1:] != partner.shape or not t.dim() or not t.is_contiguous():
                    raise ValueError(
                        f"{what}: {name} must be contiguous and [V, C] for {partner_name} of shape "
                        f"{tuple(partner.shape)}, got {tuple(t.shape)} with strides {t.stride()}; pass both lists in "
                        "the same order"
                    )
            elif t.shape != partner.shape:
                raise ValueError(
                    f"{what}: {name} must have the shape of {partner_name}, {tuple(partner.shape)}, "
                    f"got {tuple(t.shape)}; pass both lists in the same order"
                )


def _other_layouts(what: str, columns: Sequence[Column]) -> list[tuple[int, int]]:
    """Column and index of the tensors to be copied into the layout of their partner in column 0."""
    first = columns[0]
    for index, t in enumerate(first.tensors):
        if not is_dense(t):
            raise ValueError(
                f"{what}: {first.name}[{index}] must be dense (no gaps or overlap in memory), got strides {t.stride()} "
                f"for shape {tuple(t.shape)}; pass a tensor of its own, for instance from .contiguous()"
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
                    f"{what}: {column.name}[{index}] must have the strides of {first.name}[{column.row(index)}], "
                    f"{partner.stride()}, got {t.stride()}; allocate it with torch.empty_like or use one "
                    "memory_format for both networks"
                )
            others.append((k, index))
    return others


def _check_memory(what: str, columns: Sequence[Column]) -> None:
    """No tensor that is written may share memory with any other of the call."""
    written = sorted(
        (t.data_ptr(), t.data_ptr() + t.nbytes, k, index)
        for k, column in enumerate(columns)
        if column.written
        for index, t in enumerate(column.tensors)
        if t.numel()
    )
    for (_, end, k, index), (start, _, other_k, other_index) in pairwise(written):
        if start < end:
            _refuse_overlap(what, columns, (k, index), (other_k, other_index))
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
                _refuse_overlap(what, columns, written[before][2:], (k, index))


def _refuse_overlap(what: str, columns: Sequence[Column], a: tuple[int, int], b: tuple[int, int]) -> None:
    names = [f"{columns[k].name}[{index}]" for k, index in (a, b)]
    raise ValueError(
        f"{what}: {names[0]} must not share memory with {names[1]}, got overlapping tensors; "
        "list a tied parameter once, and make the other network with copy.deepcopy"
    )
