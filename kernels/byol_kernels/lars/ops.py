"""The LARS step as an operator: schema, dispatch, checks."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from byol_kernels._multi_tensor import Column, MultiTensorPlan, plan_for
from byol_kernels.derivatives import refuse_transforms
from byol_kernels.ema.ops import read_tau
from byol_kernels.lars import kernels, reference

_FLOAT32_MAX = torch.finfo(torch.float32).max


class _Arguments(NamedTuple):
    """Arguments of the operator; a list beside a `..._rows` has one tensor for each of these rows."""

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    momentum_buffers: Sequence[Tensor]
    grad_rows: Sequence[int]
    targets: Sequence[Tensor]
    target_rows: Sequence[int]
    param_copies: Sequence[Tensor]
    param_copy_rows: Sequence[int]
    target_copies: Sequence[Tensor]
    target_copy_rows: Sequence[int]
    group: Sequence[int]
    adapt: Sequence[bool]
    lr_tensors: Sequence[Tensor | None]
    lr: Sequence[float]
    momentum: Sequence[float]
    weight_decay: Sequence[float]
    trust_coefficient: Sequence[float]
    tau_tensor: Tensor | None
    tau: float
    grad_scale: Tensor | None
    found_inf: Tensor | None

    def columns(self) -> list[Column]:
        """The lists of tensors for a plan."""
        return [
            Column("params", self.params, written=True),
            Column("grads", self.grads, tuple(self.grad_rows)),
            Column("momentum_buffers", self.momentum_buffers, tuple(self.grad_rows), written=True),
            Column("target", self.targets, tuple(self.target_rows), written=True, is_average=True),
            Column("copies of params", self.param_copies, tuple(self.param_copy_rows), written=True),
            Column("copies of target", self.target_copies, tuple(self.target_copy_rows), written=True),
        ]

    def plan(self, columns: Sequence[Column]) -> MultiTensorPlan:
        """The checked plan of these lists."""
        with_grad = set(self.grad_rows)
        return plan_for(
            "LARS.step",
            columns,
            adapted_first=[adapt and row in with_grad for row, adapt in enumerate(self.adapt)],
            flags=[2 * group + adapt for group, adapt in zip(self.group, self.adapt, strict=True)],
        )

    def checked(self, *, read_all: bool) -> "_Arguments":
        """These arguments with hyperparameters in range.

        Args:
            read_all: read all scalars; otherwise those that are not on the device of the parameters.
        """
        refuse_transforms("LARS.step")
        device, a = self.params[0].device, self
        if read_all or a.tau_tensor is None or a.tau_tensor.device != device:
            a = a._replace(tau_tensor=None, tau=read_tau("LARS.step", a.tau_tensor, a.tau))
        lr, lr_tensors = list(a.lr), list(a.lr_tensors)
        for group, tensor in enumerate(a.lr_tensors):
            if tensor is not None and (read_all or tensor.device != device):
                lr[group], lr_tensors[group] = float(tensor), None
        for values in zip(lr, a.momentum, a.weight_decay, a.trust_coefficient, strict=True):
            check_hyperparameters("LARS.step", *values)
        return a._replace(lr=lr, lr_tensors=lr_tensors)

    def increment_versions(self) -> None:
        """Tell autograd which tensors were written."""
        torch.autograd.graph.increment_version(
            [
                *(self.params[row] for row in self.grad_rows),
                *self.momentum_buffers,
                *self.targets,
                *self.param_copies,
                *self.target_copies,
                *(() if self.found_inf is None else (self.found_inf,)),
            ]
        )


def check_hyperparameters(
    op_name: str, lr: float, momentum: float, weight_decay: float, trust_coefficient: float
) -> None:
    """Raise a ValueError on the first hyperparameter of a group that is out of range."""
    for name, value, usual in (
        ("lr", lr, "0.2 * batch / 256"),
        ("weight_decay", weight_decay, "1.5e-6"),
        ("trust_coefficient", trust_coefficient, "1e-3"),
    ):
        if not 0.0 <= value <= _FLOAT32_MAX:  # a GPU reads it as float32
            raise ValueError(f"{op_name}: {name} must be finite and not negative, got {value}; BYOL's is {usual}")
    if not 0.0 <= momentum < 1.0:
        raise ValueError(f"{op_name}: momentum must be in [0, 1), got {momentum}; BYOL's is 0.9")


def _lars_step_cpu(*arguments: Any) -> None:
    a = _Arguments(*arguments).checked(read_all=True)
    if not a.plan(a.columns()).num_chunks:
        return
    if a.found_inf is not None:
        if not reference.all_finite(a.grads):
            a.found_inf.fill_(1.0)
        if float(a.found_inf) != 0.0:
            torch.autograd.graph.increment_version([a.found_inf])
            return

    def by_row(rows: Sequence[int], tensors: Sequence[Tensor]) -> list[Tensor | None]:
        entries: list[Tensor | None] = [None] * len(a.params)
        for row, tensor in zip(rows, tensors, strict=True):
            entries[row] = tensor
        return entries

    reference.lars_step_(
        a.params,
        by_row(a.grad_rows, a.grads),
        by_row(a.grad_rows, a.momentum_buffers),
        targets := by_row(a.target_rows, a.targets),
        lr=[a.lr[g] for g in a.group],
        momentum=[a.momentum[g] for g in a.group],
        weight_decay=[a.weight_decay[g] for g in a.group],
        trust_coefficient=[a.trust_coefficient[g] for g in a.group],
        adapt=a.adapt,
        grad_scale=1.0 if a.grad_scale is None else float(a.grad_scale),
        tau=a.tau,
    )
    for copy, row in zip(a.param_copies, a.param_copy_rows, strict=True):
        copy.copy_(a.params[row])
    for copy, row in zip(a.target_copies, a.target_copy_rows, strict=True):
        target = targets[row]
        assert target is not None
        copy.copy_(target)
    a.increment_versions()


def _lars_step_cuda(*arguments: Any) -> None:
    a = _Arguments(*arguments).checked(read_all=False)
    columns = a.columns()
    plan = a.plan(columns)
    if not plan.num_chunks:
        return
    kernels.lars_step(
        plan,
        columns,
        lr=a.lr,
        lr_tensors=a.lr_tensors,
        momentum=a.momentum,
        weight_decay=a.weight_decay,
        trust_coefficient=a.trust_coefficient,
        tau=a.tau,
        tau_tensor=a.tau_tensor,
        grad_scale=a.grad_scale,
        found_inf=a.found_inf,
    )
    a.increment_versions()


def _lars_step_fake(*args: Any) -> None:
    return None


torch.library.define(
    "byol_kernels::lars_step_",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, int[] grad_rows,"
    " Tensor(c!)[] targets, int[] target_rows, Tensor(d!)[] param_copies, int[] param_copy_rows,"
    " Tensor(e!)[] target_copies, int[] target_copy_rows, int[] group, bool[] adapt,"
    " Tensor?[] lr_tensors, float[] lr, float[] momentum, float[] weight_decay, float[] trust_coefficient,"
    " Tensor? tau_tensor, float tau, Tensor? grad_scale, Tensor(f!)? found_inf) -> ()",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
torch.library.impl("byol_kernels::lars_step_", "CPU", _lars_step_cpu)
torch.library.impl("byol_kernels::lars_step_", "CUDA", _lars_step_cuda)
torch.library.register_fake("byol_kernels::lars_step_", _lars_step_fake)
