"""Settings of the forward pass whose activations a backward pass recomputes.

Activation checkpointing of any kind calls a layer again during the backward pass, where the context of the first call
is over. The node of the autograd graph that asks for it was created in that context, and its sequence number tells in
which one.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import NamedTuple

import torch
from torch.utils.checkpoint import CheckpointFunction

MAX_CHANGES = 64
"""Changes of the settings that are remembered for each shape."""


class Settings(NamedTuple):
    """Settings of one call of a batch norm."""

    num_views: int
    """Number of stacked views in the batch."""
    collects_stats: bool
    """The statistics of the batch are collected."""


_last_change = [0]
"""Sequence number of the next autograd node when settings last changed, of any layer."""


def settings_change() -> None:
    """Note that settings of layers change now."""
    if not torch.compiler.is_compiling():
        _last_change[0] = torch._C._autograd._get_sequence_nr()


def is_recomputed() -> bool:
    """True within a backward pass: a forward pass there recomputes activations."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class SettingsHistory:
    """Settings of a layer's calls with batches of one shape; almost always the same ones."""

    def __init__(self) -> None:
        self._changes: list[tuple[int, Settings]] = []

    def record(self, settings: Settings) -> None:
        """Record a call of a first pass."""
        if not self._changes or self._changes[-1][1] != settings:
            self._changes.append((_last_change[0], settings))
            del self._changes[:-MAX_CHANGES]

    def of_first_pass(self) -> Settings:
        """Settings of the call that is recomputed now.

        Raises:
            RuntimeError: too many changes ago.
        """
        if len(self._changes) == 1:
            return self._changes[0][1]
        node = _node_of_first_pass()
        # Changes with equal numbers have no nodes between them: the last of them counts.
        for since, settings in reversed(self._changes):
            if since <= node:
                return settings
        raise RuntimeError(
            f"batch norm: a recomputed forward pass must be among the last {MAX_CHANGES} with another number of views, "
            "got an older one; call backward() sooner"
        )


def _node_of_first_pass() -> int:
    """Sequence number of the autograd node, created in the first pass, that asks for the recomputation."""
    node = torch._C._current_autograd_node()
    # A reentrant checkpoint within another one asks by a node that was created in the recomputation of the outer one.
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is CheckpointFunction.backward.__code__:
            node = frame.f_locals["ctx"]
        frame = frame.f_back
    return int(node._sequence_nr())
