"""Activation checkpointing of an encoder's blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from byol_fast.models.split_batchnorm_layers import SplitBatchNormBase, frozen_running_stats


def checkpoint_blocks(encoder: nn.Module) -> int:
    """Apply activation checkpointing to each encoder block.

    Blocks are the modules within the encoder's `nn.Sequential`s that have layers of their own: a ResNet's residual
    blocks, a transformer's layers. Gradients and running statistics stay the same.

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
        self._own_forward: Callable[..., Any] | None = vars(block).get("forward")  # set on the instance

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        block = self._block
        forward = self._own_forward or partial(type(block).forward, block)
        if not block.training:
            return forward(*inputs, **options)

        # Split batch norms do not count a recomputed batch again; torch's own norms must be told, and other layers
        # (spectral norm) must find their buffers as they were in the first pass.
        norms = [m for m in block.modules() if isinstance(m, _NormBase)]
        plain = [m for m in norms if not isinstance(m, SplitBatchNormBase)]
        of_norms = {id(b) for norm in norms for b in norm.buffers()}
        others = [b for b in block.buffers() if id(b) not in of_norms]
        values = [b.clone() for b in others]

        @contextmanager
        def recomputation() -> Iterator[None]:
            with frozen_running_stats(plain), _values_of(others, values):
                yield

        return checkpoint(
            partial(forward, **options),
            *inputs,
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), recomputation()),
        )


@contextmanager
def _values_of(buffers: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """Within this, buffers have these values."""
    before = [b.clone() for b in buffers]
    _copy(buffers, values)
    try:
        yield
    finally:
        _copy(buffers, before)


@torch.no_grad()
def _copy(buffers: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for buffer, value in zip(buffers, values, strict=True):
        buffer.copy_(value)
