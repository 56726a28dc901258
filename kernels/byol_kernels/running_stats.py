"""Running statistics of batch normalization, for all layers of a step in one launch.

A batch norm whose input is V stacked views moves its running statistics once for each view, in order, as `torch.nn`
does it for V calls:

    running_mean = (1 - momentum) running_mean + momentum batch_mean_v
    running_var  = (1 - momentum) running_var  + momentum batch_var_v         (batch_var_v unbiased)
    num_batches_tracked += 1

With `momentum=None` the factor is 1 / num_batches_tracked, the cumulative average. A step that turns out not to be
finite must not move them: the kernel reads that flag and writes nothing. It selects and does not multiply by zero,
because 0 * NaN is NaN.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from byol_kernels import reference
from byol_kernels._multi_tensor import Column, MultiTensorPlan, plan_for
from byol_kernels._triton import device_guard, jit, tl, tl_dtype

BLOCK_C = 1024
NUM_WARPS = 4

# -------------------------------------------------------------------------------- kernel


@jit
def _move_channels(
    addresses_ptr: tl.tensor,
    row: tl.tensor,
    num_rows: tl.tensor,
    num_channels: tl.tensor,
    num_splits: tl.tensor,
    momentum: tl.tensor,
    count: tl.tensor,
    KIND: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """Both running statistics of one layer."""
    ACC: tl.constexpr = tl.float64 if KIND[0] == tl.float64 else tl.float32
    mean_ptr = tl.load(addresses_ptr + row).to(tl.pointer_type(KIND[0]))
    var_ptr = tl.load(addresses_ptr + num_rows + row).to(tl.pointer_type(KIND[1]))
    batch_mean_ptr = tl.load(addresses_ptr + 2 * num_rows + row).to(tl.pointer_type(KIND[2]))
    batch_var_ptr = tl.load(addresses_ptr + 3 * num_rows + row).to(tl.pointer_type(KIND[3]))
    start = 0
    while start < num_channels:
        channels = start + tl.arange(0, BLOCK_C)
        mask = channels < num_channels
        mean = tl.load(mean_ptr + channels, mask=mask, other=0.0).to(ACC)
        var = tl.load(var_ptr + channels, mask=mask, other=0.0).to(ACC)
        split = 0
        while split < num_splits:
            # Every split counts as a batch of its own.
            cumulative = tl.div_rn(1.0, (count + split + 1).to(tl.float32)).to(tl.float64)
            weight = tl.where(momentum < 0.0, cumulative, momentum).to(ACC)
            offsets = split * num_channels + channels
            mean = (1.0 - weight) * mean + weight * tl.load(batch_mean_ptr + offsets, mask=mask, other=0.0).to(ACC)
            var = (1.0 - weight) * var + weight * tl.load(batch_var_ptr + offsets, mask=mask, other=0.0).to(ACC)
            split += 1
        tl.store(mean_ptr + channels, mean.to(KIND[0]), mask=mask)
        tl.store(var_ptr + channels, var.to(KIND[1]), mask=mask)
        start += BLOCK_C


@jit
def _update_running_stats_kernel(
    addresses_ptr: tl.tensor,  # [5, R] int64: running mean, running variance, batch means, batch variances, counter
    rows_ptr: tl.tensor,  # [R, 4] int64: channels, kind, first chunk, tag = number of splits
    momentum_ptr: tl.tensor,  # [R] float64; negative: cumulative average
    num_rows: tl.tensor,
    found_inf_ptr: tl.tensor,  # [] or None
    KINDS: tl.constexpr,  # dtypes of the first four columns that occur
    BLOCK_C: tl.constexpr,
) -> None:
    if found_inf_ptr is not None:  # noqa: SIM102 - decided when compiled; the next one at run time
        if tl.load(found_inf_ptr) != 0.0:
            return
    # One program a layer: a network has about a hundred, of at most some thousand channels.
    row = tl.program_id(0)
    num_channels = tl.load(rows_ptr + 4 * row)
    kind = tl.load(rows_ptr + 4 * row + 1)
    num_splits = tl.load(rows_ptr + 4 * row + 3)
    momentum = tl.load(momentum_ptr + row)
    counter_address = tl.load(addresses_ptr + 4 * num_rows + row)
    counter_ptr = counter_address.to(tl.pointer_type(tl.int64))
    count = tl.load(counter_ptr, mask=counter_address != 0, other=0)
    for k in tl.static_range(len(KINDS)):
        if kind == k:
            _move_channels(
                addresses_ptr, row, num_rows, num_channels, num_splits, momentum, count, KINDS[k], BLOCK_C
            )  # fmt: skip
    tl.debug_barrier()  # every thread has read the counter
    tl.store(counter_ptr, count + num_splits, mask=counter_address != 0)


# -------------------------------------------------------------------------------- operator

Lists = Sequence[Tensor]


class _Arguments(NamedTuple):
    """What the operator is called with; `counters` has one for each of `counter_rows`."""

    running_mean: Lists
    running_var: Lists
    batch_mean: Lists
    batch_var: Lists
    counters: Lists
    counter_rows: Sequence[int]
    momentum: Sequence[float]
    found_inf: Tensor | None

    def columns(self) -> list[Column]:
        """The lists of tensors as a plan takes them."""
        return [
            Column("running_mean", self.running_mean, written=True),
            Column("running_var", self.running_var, written=True),
            Column("batch_mean", self.batch_mean, shape="stacked"),
            Column("batch_var", self.batch_var, shape="stacked"),
            Column("num_batches_tracked", self.counters, tuple(self.counter_rows), written=True, shape="counter"),
        ]


def _plan(a: _Arguments, columns: Sequence[Column]) -> MultiTensorPlan:
    return plan_for("update_running_stats_", columns, tags=[len(means) for means in a.batch_mean])


def _update_running_stats_cpu(*arguments: Any) -> None:
    a = _Arguments(*arguments)
    _plan(a, a.columns())
    if a.found_inf is None or float(a.found_inf) == 0.0:
        reference.update_running_stats_(*a[:-1])


def _update_running_stats_cuda(*arguments: Any) -> None:
    a = _Arguments(*arguments)
    columns = a.columns()
    plan = _plan(a, columns)
    tables = plan.tables(columns)
    first, num_rows = a.running_mean[0], len(a.running_mean)
    momentum = plan.constant("momentum", "d", a.momentum, first.device)
    with device_guard(first):
        _update_running_stats_kernel[(num_rows,)](
            tables.addresses, tables.rows, momentum, num_rows, a.found_inf,
            KINDS=tuple(tuple(map(tl_dtype, kind[:4])) for kind in plan.kinds), BLOCK_C=BLOCK_C,
            num_warps=NUM_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    torch.autograd.graph.increment_version([*a.running_mean, *a.running_var, *a.counters])


torch.library.define(
    "byol_kernels::update_running_stats_",
    "(Tensor(a!)[] running_mean, Tensor(b!)[] running_var, Tensor[] batch_mean, Tensor[] batch_var,"
    " Tensor(c!)[] counters, int[] counter_rows, float[] momentum, Tensor? found_inf) -> ()",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
torch.library.impl("byol_kernels::update_running_stats_", "CPU", _update_running_stats_cpu)
torch.library.impl("byol_kernels::update_running_stats_", "CUDA", _update_running_stats_cuda)


def _update_running_stats_fake(*args: Any) -> None:
    return None


torch.library.register_fake("byol_kernels::update_running_stats_", _update_running_stats_fake)


# -------------------------------------------------------------------------------- public function


@torch.no_grad()
def update_running_stats_(
    running_mean: Lists,
    running_var: Lists,
    batch_mean: Lists,
    batch_var: Lists,
    num_batches_tracked: Sequence[Tensor | None],
    momentum: Sequence[float | None],
    *,
    found_inf: Tensor | None = None,
) -> None:
    """Move the running statistics of batch norms by the statistics of one or several batches, in place.

    `running = (1 - momentum) running + momentum batch`, once for each row of the batch statistics, as `torch.nn` does
    it call by call; num_batches_tracked counts the rows. One launch for all layers on a GPU.

    Args:
        running_mean: `[C]` of each layer, floating point, on one device.
        running_var: likewise.
        batch_mean: `[V, C]` of each layer, contiguous: means of V batches, in order.
        batch_var: likewise: unbiased variances.
        num_batches_tracked: counter of each layer, int64 scalar, or None.
        momentum: of each layer; None for the cumulative average, which needs a counter.
        found_inf: scalar on the device. Where it is not 0 nothing is written, whatever the statistics hold.

    Raises:
        ValueError: lists of different lengths, shapes, devices or dtypes that do not fit, or tensors that share memory.
            Nothing has been written then.
    """
    for name, entries in (
        ("running_var", running_var), ("batch_mean", batch_mean), ("batch_var", batch_var),
        ("num_batches_tracked", num_batches_tracked), ("momentum", momentum),
    ):  # fmt: skip
        if len(entries) != len(running_mean):
            raise ValueError(
                f"update_running_stats_: {name} must have an entry for each of the {len(running_mean)} layers of "
                f"running_mean, got {len(entries)}; pass None where a layer has no counter or no momentum"
            )
    for layer, (mean_VC, var_VC, counter, factor) in enumerate(
        zip(batch_mean, batch_var, num_batches_tracked, momentum, strict=True)
    ):
        if len(mean_VC) != len(var_VC):
            raise ValueError(
                f"update_running_stats_: batch_var[{layer}] must have as many rows as batch_mean[{layer}], "
                f"{len(mean_VC)}, got {len(var_VC)}; take both from the same batches"
            )
        if factor is None and counter is None:
            raise ValueError(
                f"update_running_stats_: num_batches_tracked[{layer}] must be a counter where momentum is None, got "
                "None; give the layer a momentum"
            )
    if not running_mean:
        return
    if found_inf is not None and (found_inf.numel() != 1 or found_inf.device != running_mean[0].device):
        raise ValueError(
            f"update_running_stats_: found_inf must be a scalar on {running_mean[0].device}, got shape "
            f"{tuple(found_inf.shape)} on {found_inf.device}; make it with torch.zeros((), device=...)"
        )
    rows = [row for row, counter in enumerate(num_batches_tracked) if counter is not None]
    torch.ops.byol_kernels.update_running_stats_(
        list(running_mean),
        list(running_var),
        list(batch_mean),
        list(batch_var),
        [counter for counter in num_batches_tracked if counter is not None],
        rows,
        [-1.0 if factor is None else float(factor) for factor in momentum],
        found_inf,
    )
