"""Plans of multi-tensor kernel launches: checked tensor lists, and the device tables that the kernels read.

A multi-tensor kernel walks rows. Row i holds one tensor from each of several columns: for the EMA a target, its online
partner and perhaps a low-precision copy; for LARS a parameter, its gradient, its momentum and so on. The kernel pairs
elements by their place in memory, so all tensors of a row must be laid out alike.

Layout. Column 0 decides: its tensors must be dense, in any order of dimensions (the parameters of a channels_last
network are dense but not contiguous, and loading a checkpoint does not change strides). A column that is written must
have the strides of column 0. A column that is only read may have others: it is then first copied into the layout of
column 0, which costs a launch for that tensor.

Tables are replaced, never changed: a launch in flight, or recorded into a CUDA graph, keeps the table it was given. A
replacement is copied from a pinned buffer of the caching host allocator, which does not reuse the buffer before the
copy is done. No call waits for the device.

CUDA graphs. A recorded launch takes over the tables of the warm-up call. Where addresses differ by then (gradients that
the graph allocates itself), the copy of the new table is recorded too, so its pinned buffer has to outlive the graph,
and has to exist already: pinned memory cannot be allocated safely during a capture. Each plan therefore keeps one spare
of every buffer it may need.
"""

import weakref
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from itertools import chain
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from byol_kernels.layout import Column, check_match, check_no_overlap, find_other_layouts

__all__ = ["CHUNK", "NUM_WARPS", "Column", "MultiTensorPlan", "Tables", "plan_for"]

CHUNK = 4096
"""Elements of one tensor that one program handles: 16 a thread, in 8 warps."""
NUM_WARPS = 8

# All that a plan depends on but the addresses.
_PROPERTIES = (attrgetter("dtype"), attrgetter("shape"), Tensor.stride, attrgetter("device"))


class Tables(NamedTuple):
    """Kernel arguments, on the device of the tensors."""

    addresses: Tensor
    """int64 [columns, rows]; 0 where a row has no tensor in that column."""
    rows: Tensor
    """int64 [rows, 4]: number of elements, index of the dtype combination, first chunk, flags."""
    chunks: Tensor
    """int64 [chunks, 2]: row, chunk within the row."""
    temporaries: list[Tensor]
    """Copies in the layout of column 0; they must live until the kernel is launched."""


class MultiTensorPlan:
    """Checked lists of one multi-tensor call and, for a GPU, the tables that its kernels read.

    `plan_for` finds the plan of a call. The cost of `update` depends on what changed since the last call:

    - nothing: one look at addresses, sizes and strides;
    - other tensors of the same properties: a comparison of all properties;
    - other addresses (gradients move at every eager step under `zero_grad(set_to_none=True)`): a new address table;
    - anything else: all checks, all tables.

    Attributes:
        dtype_combos: the distinct tuples of dtypes that a row has, one dtype per column.
        num_chunks: programs that cover all rows.
        num_adapted_chunks: programs that cover the rows with `adapted_first`.
    """

    def __init__(self, op_name: str) -> None:
        self._op_name = op_name
        self._signature: object = None  # all properties, without addresses
        self._pointers: list[tuple[int, ...]] = []
        self._fingerprint: object = None
        self._weakrefs: list[weakref.ref[Tensor]] = []
        self._other_layouts: list[tuple[int, int]] = []
        self._addresses: Tensor | None = None
        self._rows_and_chunks: tuple[Tensor, Tensor] | None = None
        self._constants: dict[str, tuple[tuple[float, ...], Tensor]] = {}
        self._workspace: dict[str, Tensor] = {}
        self._spare_buffers: dict[str, Tensor] = {}  # pinned, for a capture to take
        self._warm_plan: MultiTensorPlan | None = None  # set in a plan that is being captured
        self._captured_buffers: list[Tensor] = []
        self.dtype_combos: tuple[tuple[torch.dtype, ...], ...] = ()
        self.num_chunks = 0
        self.num_adapted_chunks = 0

    def update(self, columns: Sequence[Column], adapted_first: Sequence[bool], flags: Sequence[int]) -> None:
        """Check the lists where they differ from those of the last call, and drop outdated tables.

        Args:
            columns: the lists; the first has a tensor for every row.
            adapted_first: rows whose chunks come before those of the others, so that a launch may cover these alone
                (for LARS the adapted tensors with a gradient); empty for no such rows.
            flags: an integer per row that the kernel finds beside its size; empty for zeros.

        Raises:
            ValueError: on tensors that do not match, whose layout is not supported, or that share memory.
        """
        extra = (tuple(adapted_first), tuple(flags), *(c.rows for c in columns))
        if self._fingerprint and self._fingerprint == (extra, _fingerprint(columns)):
            return
        signature = _signature(columns, extra)
        pointers = [tuple(map(Tensor.data_ptr, c.tensors)) for c in columns]
        is_same = signature == self._signature
        if is_same and pointers == self._pointers:
            # The fingerprint uses Python's ids, and a new tensor may get the id of one that is gone.
            self._weakrefs = [weakref.ref(t, self._drop_fingerprint) for c in columns for t in c.tensors]
            self._fingerprint = extra, _fingerprint(columns)
            return
        self._signature = self._fingerprint = None  # in case a check raises: the next call checks again
        self._addresses = None
        if not is_same:
            check_match(self._op_name, columns)
            self._other_layouts = find_other_layouts(self._op_name, columns)
            self._rows_and_chunks = None
            self._constants.clear()
            self._workspace.clear()
            self._lay_out_rows(columns, adapted_first, flags)
        check_no_overlap(self._op_name, columns)
        self._signature, self._pointers = signature, pointers

    def _drop_fingerprint(self, _: object) -> None:
        self._fingerprint = None

    def _lay_out_rows(self, columns: Sequence[Column], adapted_first: Sequence[bool], flags: Sequence[int]) -> None:
        """Number the dtype combinations and the chunks, and prepare the contents of the row and chunk tables."""
        first = columns[0].tensors
        dtypes = [[t.dtype] * len(columns) for t in first]  # a tensor that a row lacks has the dtype of column 0
        for k, column in enumerate(columns):
            for index, t in enumerate(column.tensors):
                dtypes[column.row(index)][k] = t.dtype
        combos = [tuple(row) for row in dtypes]
        self.dtype_combos = tuple(dict.fromkeys(combos))

        numel = [t.numel() for t in first]
        num_chunks = [-(-n // CHUNK) for n in numel]
        order: Sequence[int] = range(len(numel))
        if adapted_first:
            order = sorted(order, key=lambda row: not adapted_first[row])
        first_chunk, total = [0] * len(numel), 0
        for row in order:
            first_chunk[row] = total
            total += num_chunks[row]
        self.num_chunks = total
        self.num_adapted_chunks = sum(num_chunks[row] for row in order if adapted_first and adapted_first[row])
        self._row_values = [
            value
            for row, n in enumerate(numel)
            for value in (n, self.dtype_combos.index(combos[row]), first_chunk[row], flags[row] if flags else 0)
        ]
        self._chunk_values = [value for row in order for chunk in range(num_chunks[row]) for value in (row, chunk)]

    def tables(self, columns: Sequence[Column]) -> Tables:
        """The tables of these lists, for which `update` was called last."""
        device = columns[0].tensors[0].device
        num_rows = len(columns[0].tensors)
        if self._rows_and_chunks is None:
            self._rows_and_chunks = (
                self._to_device("rows", array("q", self._row_values), device).view(num_rows, 4),
                self._to_device("chunks", array("q", self._chunk_values), device).view(-1, 2),
            )
        addresses, temporaries = self._addresses, []
        # Temporaries are new at every call, and so are their addresses.
        if addresses is None or self._other_layouts:
            table = [[0] * num_rows for _ in columns]
            for k, pointers in enumerate(self._pointers):
                for index, pointer in enumerate(pointers):
                    table[k][columns[k].row(index)] = pointer
            for k, index in self._other_layouts:
                row = columns[k].row(index)
                copy = torch.empty_like(columns[0].tensors[row], dtype=columns[k].tensors[index].dtype)
                temporaries.append(copy.copy_(columns[k].tensors[index]))
                table[k][row] = copy.data_ptr()
            addresses = self._to_device("addresses", array("q", chain.from_iterable(table)), device)
            self._addresses = addresses = addresses.view(len(columns), num_rows)
        self._reserve_buffer("addresses", addresses)
        return Tables(addresses, *self._rows_and_chunks, temporaries)

    def constant(self, name: str, typecode: str, values: Sequence[float], device: torch.device) -> Tensor:
        """A small device table of numbers, uploaded again only when they change.

        Args:
            name: of the table.
            typecode: "q" for int64, "f" for float32, "d" for float64.
            values: the numbers.
            device: where to.

        Returns:
            The table [len(values)].
        """
        key = tuple(values)
        known = self._constants.get(name)
        if known is None or known[0] != key:
            known = (key, self._to_device(name, array(typecode, key), device))
            self._constants[name] = known
        self._reserve_buffer(name, known[1])
        return known[1]

    def workspace(self, name: str, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A device buffer of this plan [numel]: zeros at first, and after that as its kernels leave it."""
        if name not in self._workspace:
            self._workspace[name] = torch.zeros(numel, dtype=dtype, device=device)
        return self._workspace[name]

    def for_capture(
        self, columns: Sequence[Column], adapted_first: Sequence[bool], flags: Sequence[int]
    ) -> "MultiTensorPlan":
        """A plan for a launch that is being captured into a CUDA graph, starting from the tables of this one.

        Args:
            columns: the lists, of the same layouts as those of this plan.
            adapted_first: as in `update`.
            flags: as in `update`.

        Returns:
            The plan. It must live as long as the graph.
        """
        plan = MultiTensorPlan(self._op_name)
        plan._warm_plan = self
        plan._signature, plan._pointers, plan._other_layouts = self._signature, self._pointers, self._other_layouts
        plan._addresses, plan._rows_and_chunks = self._addresses, self._rows_and_chunks
        plan._constants = dict(self._constants)
        plan.dtype_combos = self.dtype_combos
        plan.num_chunks, plan.num_adapted_chunks = self.num_chunks, self.num_adapted_chunks
        plan.update(columns, adapted_first, flags)
        return plan

    def is_for(self, op_name: str, signature: object) -> bool:
        """True for the plan of this function and of lists of these layouts, wherever they are in memory."""
        return self._op_name == op_name and self._signature == signature

    def _to_device(self, name: str, values: "array[int] | array[float]", device: torch.device) -> Tensor:
        """Upload a table without waiting for the device."""
        dtype = {"q": torch.int64, "f": torch.float32, "d": torch.float64}[values.typecode]
        if not values:
            return torch.empty(0, dtype=dtype, device=device)
        table = torch.frombuffer(values, dtype=dtype)
        if device.type != "cuda":
            return table.clone()
        if self._warm_plan is None:
            staging = torch.empty(table.shape, dtype=dtype, pin_memory=True)
        else:
            spare = self._warm_plan._spare_buffers.pop(name, None)
            if spare is None:
                raise _not_warmed_up(self._op_name)
            staging = spare
            self._captured_buffers.append(staging)
        return staging.copy_(table).to(device, non_blocking=True)

    def _reserve_buffer(self, name: str, table: Tensor) -> None:
        """Keep a pinned buffer for a table of this size, for a capture to take."""
        if table.is_cuda and self._warm_plan is None and name not in self._spare_buffers:
            self._spare_buffers[name] = torch.empty(table.numel(), dtype=table.dtype, pin_memory=True)


_MAX_PLANS = 64
_plans: OrderedDict[object, MultiTensorPlan] = OrderedDict()  # least recently used first
_captured: list[MultiTensorPlan] = []  # a CUDA graph reads its tables at every replay, so they are never freed


def plan_for(
    op_name: str, columns: Sequence[Column], adapted_first: Sequence[bool] = (), flags: Sequence[int] = ()
) -> MultiTensorPlan:
    """The plan of these lists, checked and up to date.

    Plans are kept by function, list and stream, so a table written on one stream is not read on another. A launch
    that is being captured into a CUDA graph gets a plan of its own, which lives as long as the process. It takes the
    spare buffers of the plan of the warm-up, so a capture may hold one launch with lists of one signature, not two.

    Args:
        op_name: the function that messages name.
        columns: the lists; the first has a tensor for every row.
        adapted_first: as in `MultiTensorPlan.update`.
        flags: as in `MultiTensorPlan.update`.

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
            signature = _signature(columns, (tuple(adapted_first), tuple(flags), *(c.rows for c in columns)))
            warm = next((p for p in reversed(_plans.values()) if p.is_for(op_name, signature)), None)
            if warm is None:
                raise _not_warmed_up(op_name)
            _captured.append(warm.for_capture(columns, adapted_first, flags))
            return _captured[-1]
        stream = torch.cuda.current_stream(first.device).cuda_stream
    # The key only says where to look: `update` compares everything.
    key = (op_name, stream, first.data_ptr(), tuple(len(c.tensors) for c in columns))
    plan = _plans.pop(key) if key in _plans else MultiTensorPlan(op_name)
    plan.update(columns, adapted_first, flags)
    _plans[key] = plan
    while len(_plans) > _MAX_PLANS:
        _plans.popitem(last=False)
    return plan


def _signature(columns: Sequence[Column], extra: object) -> object:
    return (extra, *(tuple(map(get, c.tensors)) for c in columns for get in _PROPERTIES))


def _fingerprint(columns: Sequence[Column]) -> bytes:
    """All that may change about tensors whose signature is known.

    The id of a living tensor stands for its dtype and device: changing these takes other memory, too. Strides and
    number of elements of a dense tensor stand for its shape. All in one buffer, because reading a thousand Python
    objects that fell out of the cache takes longer than making them.
    """
    values: list[int] = []  # an array grows one number at a time
    for column in columns:
        for get in (id, Tensor.data_ptr, Tensor.numel):
            values += map(get, column.tensors)
        values += chain.from_iterable(map(Tensor.stride, column.tensors))
    return array("q", values).tobytes()


def _not_warmed_up(op_name: str) -> RuntimeError:
    return RuntimeError(
        f"{op_name}: the tensors must have been through a call before each CUDA graph capture, got none since the last "
        "one; run one step before the capture"
    )
