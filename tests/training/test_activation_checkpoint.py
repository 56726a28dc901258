"""Activations that are computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from byol_fast.models.activation_checkpoint import checkpoint_blocks
from byol_fast.models.base import ViewBatching
from byol_fast.models.byol import BYOL
from byol_fast.utils.precision import Precision
from tests.training.helpers import BF16, FP32, batches, small_byol, train_step


@pytest.mark.parametrize("views", ["batched", "separate"])
@pytest.mark.parametrize("precision", [FP32, BF16], ids=["fp32", "bf16"])
def test_recomputed_activations_change_nothing(views: ViewBatching, precision: Precision) -> None:
    """Weights and running statistics: nothing is counted twice, and blocks are computed again with the same weights."""
    data = batches(3)
    states = []
    for recompute in (False, True):
        model = small_byol(views)
        if recompute:
            assert checkpoint_blocks(model.encoder) == 8  # residual blocks of a ResNet-18
        step = train_step(model, precision=precision)
        assert (step.lowp_weights is not None) == (precision is BF16)
        losses = [float(step(batch, k).loss) for k, batch in enumerate(data)]
        states.append((losses, model.state_dict()))
    (losses_a, a), (losses_b, b) = states
    assert losses_a == losses_b
    assert all(torch.equal(a[name], b[name]) for name in a)


class Norm(nn.BatchNorm2d):
    """A batch norm with a forward of its own: no step collects its statistics."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = super().forward(x)
        return 1.5 * y


class Block(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm(self.conv(x)))


@pytest.mark.parametrize(
    ("views", "norm"),
    [
        ("batched", lambda: nn.InstanceNorm2d(8, track_running_stats=True)),  # stacked views are not for it
        ("separate", lambda: Norm(8)),
        ("concat", lambda: Norm(8)),
    ],
    ids=["instance norm", "own forward", "own forward, concat"],
)
def test_norms_that_stay_torchs_are_counted_once_where_activations_are_computed_again(
    views: Any, norm: Callable[[], nn.Module]
) -> None:
    (batch,) = batches(1)
    states = []
    for recompute in (False, True):
        torch.manual_seed(0)
        blocks = nn.Sequential(Block(norm()), Block(nn.BatchNorm2d(8)))
        encoder = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), blocks, nn.AdaptiveAvgPool2d(1))
        model = BYOL(encoder, hidden_dim=16, projection_dim=8, image_size=32, view_batching=views)
        assert (model.not_batched_reason is not None) == (views == "batched")
        if recompute:
            assert checkpoint_blocks(model.encoder) == 2
        train_step(model)(batch, 0)
        states.append(model.state_dict())
    for name, a in states[0].items():
        assert torch.equal(a, states[1][name]), name


def test_recomputation_keeps_less_for_the_backward_pass() -> None:
    """Bytes that autograd holds on to, counted as it packs them."""
    (batch,) = batches(1)

    def kept(recompute: bool) -> int:
        model = small_byol()
        if recompute:
            checkpoint_blocks(model.encoder)
        seen: dict[int, int] = {}

        def pack(t: torch.Tensor) -> torch.Tensor:
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            output = model.forward_train(batch.views[0], batch.views[1])
        del output
        return sum(seen.values()) - sum(p.untyped_storage().nbytes() for p in model.parameters())

    assert kept(True) < 0.7 * kept(False)


def test_an_encoder_without_blocks_cannot_be_recomputed() -> None:
    with pytest.raises(ValueError, match=r"activation_checkpointing: the encoder must have blocks"):
        checkpoint_blocks(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
