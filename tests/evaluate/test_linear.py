"""Linear classifiers trained by SGD."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from byol_fast.evaluate.linear import LinearClassifiers


def test_classifiers_train_independently() -> None:
    x, y = torch.randn(64, 6, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 3

    def trained(lr: tuple[float, ...]) -> list[Tensor]:
        classifiers = LinearClassifiers(6, 3, lr, torch.Generator().manual_seed(1))
        optimizer = classifiers.optimizer()
        for step in range(5):
            classifiers.set_lr(optimizer, step, 5, 64)
            optimizer.zero_grad()
            torch.stack([torch.nn.functional.cross_entropy(logits, y) for logits in classifiers(x)]).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return [p.detach() for layer in classifiers.layers for p in layer.parameters()]

    together = trained((0.4, 0.05))
    for both, alone in zip(together, [*trained((0.4,)), *trained((0.05,))], strict=True):
        assert torch.equal(both, alone)
    # By hand: Nesterov momentum 0.9, cosine decay to 0, learning rate scaled by 64 / 256.
    reference = torch.nn.Linear(6, 3)
    initial = LinearClassifiers(6, 3, (0.4,), torch.Generator().manual_seed(1)).layers[0]
    reference.load_state_dict(initial.state_dict())
    velocity = [torch.zeros_like(p) for p in reference.parameters()]
    for step in range(5):
        lr = 0.4 * 64 / 256 * 0.5 * (1 + math.cos(math.pi * step / 5))
        gradients = torch.autograd.grad(
            torch.nn.functional.cross_entropy(reference(x), y), list(reference.parameters())
        )
        with torch.no_grad():
            for p, v, g in zip(reference.parameters(), velocity, gradients, strict=True):
                v.mul_(0.9).add_(g)
                p.sub_(lr * (g + 0.9 * v))
    for parameter, expected in zip(together[:2], reference.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected.detach())
