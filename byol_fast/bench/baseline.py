"""The training step as tutorials write it, in plain PyTorch: the baseline of the comparisons."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from byol_fast.bench.problem import AUTOCAST_DTYPES, LR, MOMENTUM, TAU, Problem


def baseline_loss(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor, p_local: Tensor | None = None) -> Tensor:
    """BYOL's loss by `F.normalize`: the mean over the batch of `l(p1, z2) + l(p2, z1)` with `l = 2 - 2 cos`.

    With predictions of K local views [K, B, D] that sum is over all 2 + 2 K pairs, divided by 1 + K.
    """

    def one_direction(p: Tensor, z: Tensor) -> Tensor:
        return 2 - 2 * (p * z).sum(dim=-1)

    p1, p2, z1, z2 = (F.normalize(x, dim=-1) for x in (p1, p2, z1, z2))
    rows = one_direction(p1, z2) + one_direction(p2, z1)
    if p_local is None:
        return rows.mean()
    p_local = F.normalize(p_local, dim=-1)
    return (rows + (one_direction(p_local, z1) + one_direction(p_local, z2)).sum(0)).mean() / (1 + len(p_local))


@torch.no_grad()
def loop_ema(target: Iterable[Tensor], online: Iterable[Tensor], tau: float = TAU) -> None:
    """EMA as a loop over tensors that replaces their memory."""
    for t, o in zip(target, online, strict=True):
        t.data = tau * t.data + (1 - tau) * o.data


class BaselineStep:
    """Four forward passes, the loss by `F.normalize`, an optimizer of torch, EMA in a loop.

    Args:
        problem: networks, batch and device.
        dtype: of the weights.
        optimizer: "sgd" with momentum, or "adam".
        channels_last: NHWC memory.
        precision: "fp32", or the precision of autocast.
        concat: both views in one pass, so that batch norm mixes them (the semantics of byol-pytorch).
        compile_forward: run networks and loss under `torch.compile`.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        dtype: torch.dtype = torch.float32,
        optimizer: str = "sgd",
        channels_last: bool = False,
        precision: str = "fp32",
        concat: bool = False,
        compile_forward: bool = False,
    ) -> None:
        encoder, projector, self.predictor = (m.to(problem.device, dtype) for m in problem.build_networks())
        self.online = nn.Sequential(encoder, nn.Flatten(), projector)
        encoder, projector, _ = (m.to(problem.device, dtype) for m in problem.build_networks())
        self.target = nn.Sequential(encoder, nn.Flatten(), projector).requires_grad_(False)
        self.views = tuple(v.to(dtype) for v in problem.make_views())
        if channels_last:
            for network in (self.online, self.target):
                network.to(memory_format=torch.channels_last)
            self.views = tuple(v.contiguous(memory_format=torch.channels_last) for v in self.views)
        parameters = [*self.online.parameters(), *self.predictor.parameters()]
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(parameters, lr=LR, momentum=MOMENTUM)
            if optimizer == "sgd"
            else torch.optim.Adam(parameters, lr=1e-3)
        )
        self.device_type, self.concat = torch.device(problem.device).type, concat
        self.autocast_dtype = AUTOCAST_DTYPES[precision]
        self.forward: Callable[[], Tensor] = torch.compile(self.loss, dynamic=False) if compile_forward else self.loss

    def loss(self) -> Tensor:
        """Forward passes and loss of the current views."""
        with torch.autocast(self.device_type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            outputs = self.outputs()
        return baseline_loss(*(x if x.dtype == torch.float64 else x.float() for x in outputs))

    def outputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Predictions `p1, p2` and targets `z1, z2`, each `[B, D]`."""
        if self.concat:
            both = torch.cat(self.views)
            with torch.no_grad():
                z1, z2 = self.target(both).chunk(2)
            p1, p2 = self.predictor(self.online(both)).chunk(2)
        else:
            view1, view2 = self.views
            with torch.no_grad():
                z1, z2 = self.target(view1), self.target(view2)
            p1, p2 = self.predictor(self.online(view1)), self.predictor(self.online(view2))
        return p1, p2, z1, z2

    def __call__(self) -> Tensor:
        """Take one training step and return its loss."""
        loss = self.forward()
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        loop_ema(self.target.parameters(), self.online.parameters())
        return loss.detach()
