"""Training steps with local views, against steps written by hand in plain networks of torch."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from byol_fast.config.fields import ViewBatching
from byol_fast.data import Batch
from byol_fast.models import BYOL, revert_split_batchnorm
from byol_fast.models.networks import OnlineNetwork, TargetNetwork
from byol_fast.optim.schedules import RunSchedule
from byol_fast.training.train_step import TrainStep
from tests.networks import SmallResidualNetwork
from tests.training.helpers import BF16, everything, train_step

B, LR, TAU = 6, 0.1, 0.9


def small_byol(view_batching: ViewBatching = "batched") -> BYOL:
    torch.manual_seed(0)
    return BYOL(SmallResidualNetwork(), hidden_dim=16, projection_dim=8, image_size=16, view_batching=view_batching)


def random_batches(count: int, *sizes: int, dtype: torch.dtype = torch.float64) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        Batch(tuple(torch.randn(B, 3, s, s, dtype=dtype, generator=generator) for s in sizes), None, torch.arange(B))
        for _ in range(count)
    ]


def loss_by_hand(online: OnlineNetwork, target: TargetNetwork, views: tuple[Tensor, ...]) -> Tensor:
    """Each view on its own, and each pair of an online view and another global view."""
    with torch.no_grad():
        z = [F.normalize(target.projector(target.encoder(view).flatten(1)), dim=1) for view in views[:2]]
    p = [F.normalize(online.predictor(online.projector(online.encoder(view).flatten(1))), dim=1) for view in views]
    losses = [(p[i] - z[j]).square().sum(1).mean() for i in range(len(p)) for j in range(2) if i != j]
    return 2 * torch.stack(losses).mean()


@pytest.mark.parametrize("view_batching", ["batched", "separate"])
@pytest.mark.parametrize("sizes", [(16, 16, 8), (16, 12, *[8] * 16)], ids=["one", "sixteen, and view 2 smaller"])
def test_steps_equal_steps_by_hand(sizes: tuple[int, ...], view_batching: ViewBatching) -> None:
    """Weights of both networks and all running statistics after two steps of two batches each."""
    model = small_byol(view_batching).double()
    online, target = copy.deepcopy(model.online), copy.deepcopy(model.target)
    for network in (online, target):
        revert_split_batchnorm(network)
    sgd = torch.optim.SGD(model.trainable_parameters(), lr=LR, fused=True)  # as `build_optimizer` makes it
    schedule = RunSchedule(
        total_steps=2, base_lr=LR, batch_size=256, tau_base=TAU, lr_schedule="constant", tau_schedule="constant"
    )
    step = TrainStep(model, sgd, schedule, grad_accum_steps=2)
    by_hand = torch.optim.SGD(online.parameters(), lr=LR)
    batches = random_batches(4, *sizes)
    for k in range(2):
        pair = batches[2 * k : 2 * k + 2]
        output = step(pair, k)
        losses = [loss_by_hand(online, target, batch.views) for batch in pair]
        by_hand.zero_grad()
        torch.stack(losses).mean().backward()  # type: ignore[no-untyped-call]
        by_hand.step()
        with torch.no_grad():
            for t, p in zip(target.parameters(), online.parameters(), strict=False):  # the predictor has no target
                t.mul_(TAU).add_(p, alpha=1 - TAU)
        assert output.loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-10)
        assert [len(features) for features in output.features] == [2 * B, 2 * B]
    for ours, plain in ((model.online, online), (model.target, target)):
        for (name, a), b in zip(ours.state_dict().items(), plain.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=partial("{}: {}".format, name))


def test_weight_copies_give_the_numbers_of_autocast_with_local_views() -> None:
    (batch,) = random_batches(1, 16, 16, 8, 8, dtype=torch.float32)
    steps = [train_step(small_byol(), precision=BF16, lowp_weights=copies) for copies in (True, False)]
    assert steps[0].lowp_weights is not None
    outputs = [step(batch, 0) for step in steps]
    assert torch.equal(outputs[0].loss, outputs[1].loss)
    assert torch.equal(outputs[0].features[0], outputs[1].features[0])


def test_step_with_a_local_view_that_is_not_finite_changes_nothing() -> None:
    good, bad = random_batches(2, 16, 16, 8, dtype=torch.float32)
    bad.views[2][3, 1, 2, 5] = torch.nan
    step = train_step(small_byol())
    step(good, 0)
    before = everything(step)
    assert step(bad, 1).skipped == 1
    assert all(torch.equal(a, b) for a, b in zip(everything(step), before, strict=True))
