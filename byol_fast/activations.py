"""Activation checkpointing: keep the borders of an encoder's blocks, compute the inside again for the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from byol_fast import batchnorm


def checkpoint_blocks(encoder: nn.Module) -> int:
    """Let each block of an encoder forget what is inside it until the backward pass.

    Blocks are the modules within the encoder's `nn.Sequential`s that have layers of their own: a ResNet's residual
    blocks, a transformer's layers. Gradients and running statistics are what they are without.

    Args:
        encoder: changed in place.

    Returns:
        Number of blocks.

    Raises:
        ValueError: the encoder has no such blocks.
    """
    blocks = list(_blocks(encoder))
    for block in blocks:
        object.__setattr__(block, "forward", _Recomputed(block))
    if not blocks:
        raise ValueError(
            f"activation_checkpointing: the encoder must have blocks within nn.Sequential, {type(encoder).__name__} "
            "has none; turn it off, or use a ResNet, ConvNeXt or vision transformer"
        )
    return len(blocks)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        is_block = isinstance(module, nn.Sequential) and not isinstance(child, nn.Sequential) and any(child.children())
        if is_block and any(True for _ in child.parameters()):
            yield child
        else:
            yield from _blocks(child)


class _Recomputed:
    """A block's forward pass that runs again in the backward pass."""

    def __init__(self, block: nn.Module) -> None:
        self._block = block

    def __call__(self, *inputs: Any) -> Any:
        block = self._block
        forward: Callable[..., Any] = type(block).forward
        if not block.training:
            return forward(block, *inputs)
        views = batchnorm.views_now(block)

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return _nothing(), _second_time(block, views)

        return checkpoint(forward, block, *inputs, use_reentrant=False, context_fn=contexts)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _second_time(block: nn.Module, views: int) -> Iterator[None]:
    """As the first time, but without counting the batch twice in the running statistics.

    The norms go on writing them (with weight 0): what autograd saves has to be the same both times.
    """
    norms = [m for m in block.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        with batchnorm.views_stacked(block, views):
            yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
