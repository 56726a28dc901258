"""Low-precision copies of the weights: the fused optimizer writes them, so that no step casts weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# What autocast casts: the weights and biases of products. Norms and embeddings stay fp32, as under autocast.
_PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class LowPrecisionWeights:
    """Copies of fp32 weights in another dtype, swapped in while the networks run.

    The values are those that autocast would cast the weights to: only the time changes. Gradients arrive in the
    copies' dtype, as they do under autocast before it casts them back.

    Args:
        networks: whose weights are copied.
        dtype: of the copies.
    """

    def __init__(self, networks: Sequence[nn.Module], dtype: torch.dtype) -> None:
        self.copies: dict[Tensor, Tensor] = {}
        """The copy of each fp32 weight."""
        self._places: list[tuple[nn.Module, str, nn.Parameter]] = []
        for network in networks:
            for module in network.modules():
                if isinstance(module, _PRODUCTS):
                    self._add(module, dtype)
        self.refresh()

    def _add(self, module: nn.Module, dtype: torch.dtype) -> None:
        for name, weight in module.named_parameters(recurse=False):
            if weight.dtype != torch.float32:
                continue
            if weight not in self.copies:
                copy = torch.empty_like(weight, dtype=dtype, memory_format=torch.preserve_format)
                self.copies[weight] = nn.Parameter(copy, requires_grad=weight.requires_grad)
            self._places.append((module, name, weight))

    @torch.no_grad()
    def refresh(self) -> None:
        """Re-cast the copies after weights were changed outside the optimizer."""
        torch._foreach_copy_(list(self.copies.values()), list(self.copies))

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within this, the networks use the copies."""
        for module, name, weight in self._places:
            module._parameters[name] = self.copies[weight]  # type: ignore[assignment]
        try:
            yield
        finally:
            for module, name, weight in self._places:
                module._parameters[name] = weight

    def move_grads(self) -> None:
        """Move the gradients of the copies to the weights; a weight that other layers use, too, has one already."""
        for weight, copy in self.copies.items():
            if copy.grad is None:
                continue
            if weight.grad is None:
                weight.grad_dtype = copy.dtype  # until `zero_grad`: afterwards others may train the model
                weight.grad = copy.grad
            else:
                weight.grad += copy.grad
            copy.grad = None

    def zero_grad(self) -> None:
        """Free the gradients of weights and copies; those of copies are left over from a backward pass that failed."""
        for weight, copy in self.copies.items():
            weight.grad = copy.grad = None
            weight.grad_dtype = weight.dtype
