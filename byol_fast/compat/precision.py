"""Averages by dtype: `ema_update_` takes those in float32 and float64, the others follow the rule of their library."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from byol_kernels import ema_update_
from byol_kernels.layout import same_layout

Lists = tuple[list[Tensor], list[Tensor]]


def is_low_precision(tensor: Tensor) -> bool:
    """True for bfloat16 and float16, in which the updates of an average are mostly lost."""
    return tensor.dtype in {torch.bfloat16, torch.float16}


def split_by_precision(averages: Iterable[Tensor], values: Iterable[Tensor]) -> tuple[Lists, Lists]:
    """Averages in full precision and their values, and likewise those in low precision."""
    full: Lists = [], []
    low: Lists = [], []
    for average, value in zip(averages, values, strict=True):
        lists = low if is_low_precision(average) else full
        lists[0].append(average)
        lists[1].append(value)
    return full, low


class _Master(NamedTuple):
    """The average of a low-precision parameter, and what the parameter was after the last update."""

    value: Tensor
    """float32."""
    version: int
    address: int


class FullPrecisionAverage:
    """EMA of a network whose parameters may be bfloat16 or float16: then it is kept in float32, and they are its copy.

    Where a parameter was changed since the last update (by loading, by hand), its new values are taken over: those that
    are not what the average rounds to.
    """

    def __init__(self) -> None:
        self._masters: dict[Tensor, _Master] = {}

    @torch.no_grad()
    def update(self, target: nn.Module, online: nn.Module, tau: float) -> None:
        """Update the parameters `target = tau * target + (1 - tau) * online`.

        Args:
            target: network that is updated.
            online: network of the same architecture.
            tau: decay from 0 to 1.
        """
        full, low = split_by_precision(target.parameters(), online.parameters())
        for p in full[0]:
            if p in self._masters:  # converted since then
                p.copy_(self._value(p))
        ema_update_(*full, tau)
        values = [self._value(p) for p in low[0]]
        ema_update_(values, low[1], tau, copies=low[0])
        pairs = zip(low[0], values, strict=True)
        self._masters = {p: _Master(value, p._version, p.data_ptr()) for p, value in pairs}

    def _value(self, p: Tensor) -> Tensor:
        """The average of a parameter in float32, in the layout of the parameter."""
        master = self._masters.get(p)
        if master is None:
            return p.detach().float()
        value = master.value.to(p.device)
        if (master.version, master.address) == (p._version, p.data_ptr()) and same_layout(value, p):
            return value
        is_unchanged = (value.bfloat16() == p) | (value.half() == p)
        return torch.empty_like(p, dtype=torch.float32).copy_(torch.where(is_unchanged, value, p.float()))

    def state(self, target: nn.Module) -> dict[str, Tensor]:
        """The averages in float32, by the names of their parameters.

        Args:
            target: see `update`.
        """
        masters = {name: self._masters.get(p) for name, p in target.named_parameters()}
        return {name: master.value for name, master in masters.items() if master is not None}

    def load(self, target: nn.Module, values: Mapping[str, Tensor]) -> None:
        """Take over the averages that `state` returned.

        Args:
            target: see `update`; with the parameters that belong to the averages, now or afterwards.
            values: the averages.
        """
        named = target.named_parameters()
        self._masters = {p: _Master(values[name].clone(), -1, 0) for name, p in named if name in values}
