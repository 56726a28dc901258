"""Low-precision copies of the weights, so that no step casts them: the fused optimizer writes them in its own pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from byol_fast.models.base import SelfSupervisedTask

# What autocast casts: the weights and biases of products. Norms and embeddings stay fp32, as under autocast.
_PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class WeightCopies:
    """Copies in another dtype that take the place of the weights while the networks run.

    The values are those that autocast would cast the weights to, so nothing changes but the time. Gradients arrive in
    the copies' dtype, as they do under autocast before it casts them back.

    Args:
        task: the networks.
        dtype: of the copies.
    """

    def __init__(self, task: SelfSupervisedTask, dtype: torch.dtype) -> None:
        self.of: dict[Tensor, Tensor] = {}
        """The copy of each fp32 weight."""
        self._places: list[tuple[nn.Module, str, nn.Parameter]] = []
        for network in task.networks():
            for module in network.modules():
                if isinstance(module, _PRODUCTS):
                    self._add(module, dtype)
        for weight in self.of:
            weight.grad_dtype = dtype
        self.refresh()

    def _add(self, module: nn.Module, dtype: torch.dtype) -> None:
        for name, weight in module.named_parameters(recurse=False):
            if weight.dtype != torch.float32:
                continue
            if weight not in self.of:
                copy = torch.empty_like(weight, dtype=dtype, memory_format=torch.preserve_format)
                self.of[weight] = nn.Parameter(copy, requires_grad=weight.requires_grad)
            self._places.append((module, name, weight))

    @torch.no_grad()
    def refresh(self) -> None:
        """Write the copies anew: the weights have been changed by someone else than the optimizer."""
        torch._foreach_copy_(list(self.of.values()), list(self.of))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the networks see the copies."""
        for module, name, weight in self._places:
            module._parameters[name] = self.of[weight]  # type: ignore[assignment]
        try:
            yield
        finally:
            for module, name, weight in self._places:
                module._parameters[name] = weight

    def hand_over_gradients(self) -> None:
        """Give the gradients of the copies to the weights."""
        for weight, copy in self.of.items():
            if copy.grad is not None:
                weight.grad, copy.grad = copy.grad, None

    def drop_gradients(self) -> None:
        """Free gradients that were not handed over: of a backward pass that did not come to its end."""
        for copy in self.of.values():
            copy.grad = None
