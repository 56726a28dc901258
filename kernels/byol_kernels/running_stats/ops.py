"""Running statistics of batch normalization as an operator: schema, dispatch, checks.

A batch norm whose input is V stacked views updates its running statistics once per view, in order, as `torch.nn` does
in V calls:

    running_mean = (1 - momentum) running_mean + momentum batch_mean_v
    running_var  = (1 - momentum) running_var  + momentum batch_var_v         (batch_var_v unbiased)
    num_batches_tracked += 1

With `momentum=None` the factor is 1 / num_batches_tracked, the cumulative average. A skipped step must not update them:
the kernel reads the `found_inf` flag and writes nothing.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from byol_kernels._multi_tensor import Column, MultiTensorPlan, plan_for
from byol_kernels.running_stats import kernels, reference

# -------------------------------------------------------------------------------- operator


class _Arguments(NamedTuple):
    """Arguments of the operator; `counters` has one for each of `counter_rows`."""

    running_mean: Sequence[Tensor]
    running_var: Sequence[Tensor]
    batch_mean: Sequence[Tensor]
    batch_var: Sequence[Tensor]
    counters: Sequence[Tensor]
    counter_rows: Sequence[int]
    momentum: Sequence[float]
    found_inf: Tensor | None

    def columns(self) -> list[Column]:
        """The lists of tensors for a plan."""
        return [
            Column("running_mean", self.running_mean, written=True),
            Column("running_var", self.running_var, written=True),
            Column("batch_mean", self.batch_mean, shape="stacked"),
            Column("batch_var", self.batch_var, shape="stacked"),
            Column("num_batches_tracked", self.counters, tuple(self.counter_rows), written=True, shape="counter"),
        ]

    def plan(self, columns: Sequence[Column]) -> MultiTensorPlan:
        """The checked plan of these lists."""
        return plan_for("update_running_stats_", columns, flags=[len(means) for means in self.batch_mean])


def _update_running_stats_cpu(*arguments: Any) -> None:
    a = _Arguments(*arguments)
    a.plan(a.columns())
    if a.found_inf is None or float(a.found_inf) == 0.0:
        reference.update_running_stats_(*a[:-1])
        torch.autograd.graph.increment_version([*a.running_mean, *a.running_var, *a.counters])


def _update_running_stats_cuda(*arguments: Any) -> None:
    a = _Arguments(*arguments)
    columns = a.columns()
    kernels.update_running_stats(a.plan(columns), columns, momentum=a.momentum, found_inf=a.found_inf)
    torch.autograd.graph.increment_version([*a.running_mean, *a.running_var, *a.counters])


def _update_running_stats_fake(*args: Any) -> None:
    return None


torch.library.define(
    "byol_kernels::update_running_stats_",
    "(Tensor(a!)[] running_mean, Tensor(b!)[] running_var, Tensor[] batch_mean, Tensor[] batch_var,"
    " Tensor(c!)[] counters, int[] counter_rows, float[] momentum, Tensor? found_inf) -> ()",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
torch.library.impl("byol_kernels::update_running_stats_", "CPU", _update_running_stats_cpu)
torch.library.impl("byol_kernels::update_running_stats_", "CUDA", _update_running_stats_cuda)
torch.library.register_fake("byol_kernels::update_running_stats_", _update_running_stats_fake)


# -------------------------------------------------------------------------------- public function


@torch.no_grad()
def update_running_stats_(
    running_mean: Sequence[Tensor],
    running_var: Sequence[Tensor],
    batch_mean: Sequence[Tensor],
    batch_var: Sequence[Tensor],
    num_batches_tracked: Sequence[Tensor | None],
    momentum: Sequence[float | None],
    *,
    found_inf: Tensor | None = None,
) -> None:
    """Update the running statistics of batch norms with the statistics of one or several batches, in place.

    `running = (1 - momentum) running + momentum batch`, once for each row of the batch statistics, as `torch.nn` does
    it call by call; num_batches_tracked counts the rows. One launch for all layers on a GPU. No derivative flows into
    them, in any mode of differentiation.

    Args:
        running_mean: `[C]` per layer, floating point, on one device.
        running_var: likewise.
        batch_mean: `[V, C]` per layer, contiguous: means of V batches, in order.
        batch_var: likewise: unbiased variances.
        num_batches_tracked: counter per layer, int64 scalar, or None.
        momentum: per layer; None for the cumulative average, which needs a counter.
        found_inf: scalar on the device. Where it is not 0 nothing is written, whatever the statistics hold.

    Raises:
        ValueError: lists of different lengths, shapes, devices or dtypes that do not fit, tensors that share memory, or
            a momentum out of range. Nothing has been written then.
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
        if factor is not None and not 0.0 <= factor <= 1.0:  # a negative one would be the cumulative average
            raise ValueError(
                f"update_running_stats_: momentum[{layer}] must be from 0 to 1, got {factor}; pass None for the "
                "cumulative average"
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
    torch.ops.byol_kernels.update_running_stats_.default(
        list(running_mean),
        list(running_var),
        list(batch_mean),
        list(batch_var),
        [counter for counter in num_batches_tracked if counter is not None],
        rows,
        [-1.0 if factor is None else float(factor) for factor in momentum],
        found_inf,
    )
