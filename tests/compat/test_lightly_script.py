"""The loop of lightly's BYOL example beside `byol_fast.BYOL` with the settings of the table in docs/drop_ins.md."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import byol_fast
from byol_fast.cli.options import parse_config
from byol_fast.compat.lightly import BYOLView1Transform, BYOLView2Transform
from byol_fast.config import recipes
from byol_fast.optim import tau_at
from tests.compat.helpers import REASON, small_network

LR, STEPS = 0.06, 4
HEADS: dict[str, Any] = {"hidden_bias": False, "last_bias": True}

Optimizer = Callable[[Any, float], torch.optim.Optimizer]


def plain_sgd(params: Any, scale: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=LR / scale)


def sgd(params: Any, scale: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=LR / scale, momentum=0.9, weight_decay=5e-4 * scale)


def train_as_lightly(backbone: nn.Module, heads: Any, views: torch.Tensor, optimizer: Optimizer) -> list[float]:
    """The loop of lightly's example, its parts included; tau follows its `cosine_schedule` over the steps."""
    utils = pytest.importorskip("lightly.models.utils", reason=REASON)
    criterion = pytest.importorskip("lightly.loss", reason=REASON).NegativeCosineSimilarity()
    cosine_schedule = pytest.importorskip("lightly.utils.scheduler", reason=REASON).cosine_schedule
    projection_head, prediction_head = heads
    momentum = copy.deepcopy(nn.ModuleList([backbone, projection_head])).requires_grad_(False)
    params = [*backbone.parameters(), *projection_head.parameters(), *prediction_head.parameters()]
    optim, losses = optimizer(params, 1.0), []
    for step, (x0, x1) in enumerate(views):
        tau = cosine_schedule(step - 1, STEPS + 1, 0.996, 1) if step else 1.0  # lightly moves the target before a step
        utils.update_momentum(backbone, momentum[0], m=tau)
        utils.update_momentum(projection_head, momentum[1], m=tau)
        p0, p1 = (prediction_head(projection_head(backbone(x).flatten(1))) for x in (x0, x1))
        with torch.no_grad():
            z0, z1 = (momentum[1](momentum[0](x).flatten(1)) for x in (x0, x1))
        loss = 0.5 * (criterion(p0, z1) + criterion(p1, z0))
        optim.zero_grad()
        loss.backward()
        optim.step()
        losses.append(loss.item())
    return losses


@pytest.mark.peers
@pytest.mark.parametrize("optimizer", [plain_sgd, sgd])
def test_byol_equals_lightly_loop(optimizer: Optimizer) -> None:
    """Four times the loss, plus 4; the same weights with a quarter of the learning rate, and four times the decay."""
    modules = pytest.importorskip("lightly.models.modules", reason=REASON)
    torch.manual_seed(0)
    backbone = small_network().double()
    heads = modules.BYOLProjectionHead(8, 16, 4).double(), modules.BYOLPredictionHead(4, 16, 4).double()
    views = torch.randn(STEPS, 2, 8, 3, 16, 16, dtype=torch.float64)
    model = byol_fast.BYOL(copy.deepcopy(backbone), image_size=16, hidden_dim=16, projection_dim=4, **HEADS)
    model.double()
    for mine, theirs in zip((model.online.projector, model.online.predictor), heads, strict=True):
        mine.load_state_dict(theirs.layers.state_dict())
    model.target.load_state_dict({k: v for k, v in model.online.state_dict().items() if "predictor" not in k})
    optim, losses = optimizer(model.trainable_parameters(), 4.0), []
    for step, (view1, view2) in enumerate(views):
        p1, p2, z1, z2 = model(view1, view2)
        loss = model.loss((p1, p2), (z1, z2))
        optim.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optim.step()
        model.update_target(tau_at(step, STEPS, 0.996))
        losses.append(loss.item())
    assert losses == pytest.approx([4 + 4 * loss for loss in train_as_lightly(backbone, heads, views, optimizer)])
    for mine, theirs in ((model.encoder, backbone), (model.online.projector, heads[0])):
        for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


def test_options_of_the_table_are_lightly_settings() -> None:
    document = (Path(__file__).parents[2] / "docs" / "drop_ins.md").read_text()
    cells = re.findall(r"\| `(--[^`]*)` \|$", document, re.MULTILINE)
    words = " ".join(cell for cell in cells if "adam" not in cell).replace("--image-size 224", "").split()
    config = parse_config(recipes.get("imagenet_resnet50_100"), words, "byol-fast train")
    for view, lightly in ((config.view1, BYOLView1Transform), (config.view2, BYOLView2Transform)):
        assert dataclasses.replace(view, blur_kernel=0) == lightly(input_size=224, gaussian_blur=0.0).config
    model, optim = config.model, config.optim
    assert (model.encoder, model.hidden_dim, model.projection_dim) == ("resnet18", 1024, 256)
    assert {name: getattr(model, name) for name in HEADS} == HEADS
    assert not model.zero_init_residual
    assert (optim.name, optim.lr, optim.scale_lr, optim.momentum) == ("sgd", 0.06 / 4, False, 0)
    assert (optim.weight_decay, optim.schedule, optim.warmup_steps) == (0, "constant", 0)
    assert (config.tau.base, config.tau.schedule) == (0.996, "cosine")
