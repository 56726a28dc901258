"""Encoders of users' own: each trains as in plain torch, or is refused with a message before the first step."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import byol_fast
from byol_fast import config as configs
from byol_fast.config import Config
from byol_fast.models import BYOL, SimSiam, revert_split_batchnorm
from byol_fast.models.base import IMAGENET_MEAN, IMAGENET_STD
from byol_fast.training import builder
from tests.training.helpers import train_step

SIZES: dict[str, Any] = {"hidden_dim": 16, "projection_dim": 8, "image_size": 16}
Encoder = Callable[[], nn.Module]


def around(*layers: nn.Module) -> nn.Module:
    """A small encoder with these layers, on four channels, in its middle."""
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), *layers, nn.ReLU(), nn.AdaptiveAvgPool2d(2))


def partly_frozen() -> nn.Module:
    """A frozen stem, whose batch norm is in eval mode, and a trained layer."""
    stem = around(nn.BatchNorm2d(4)).requires_grad_(False).eval()
    return nn.Sequential(stem, nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))


def shared() -> nn.Module:
    norm = nn.BatchNorm2d(4)
    return around(norm, nn.Conv2d(4, 4, 1), norm)


class Mask(nn.Module):
    """An additive mask, whose constant is infinite."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tensor([0.0, -math.inf, 0.0, 0.0]).view(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * (x + self.mask).softmax(dim=1)


class SkippedBlock(nn.Module):
    """Stochastic depth of a user's own: the block is left out for a whole batch."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.block, self.draw = nn.Conv2d(4, 4, 1), draw

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x) if not self.training or self.draw() < 0.999 else x


TAKEN: dict[str, tuple[Encoder, str]] = {
    "map": (lambda: nn.Conv2d(3, 4, 5), "batched"),
    "partly frozen": (partly_frozen, "batched"),
    "frozen": (lambda: around(nn.BatchNorm2d(4)).requires_grad_(False), "batched"),
    "momenta": (lambda: around(nn.BatchNorm2d(4, momentum=0.5), nn.BatchNorm2d(4, momentum=0.01)), "batched"),
    "momentum None": (lambda: around(nn.BatchNorm2d(4, momentum=None)), "batched"),
    "no running stats": (lambda: around(nn.BatchNorm2d(4, track_running_stats=False)), "batched"),
    "instance norm": (lambda: around(nn.InstanceNorm2d(4, affine=True)), "batched"),
    "instance norm stats": (lambda: around(nn.InstanceNorm2d(4, track_running_stats=True)), "separate"),
    "weight norm": (lambda: around(parametrizations.weight_norm(nn.Conv2d(4, 4, 1)), nn.BatchNorm2d(4)), "batched"),
    "spectral norm": (lambda: around(parametrizations.spectral_norm(nn.Conv2d(4, 4, 3))), "separate"),
    "spectral norm hook": (lambda: around(nn.utils.spectral_norm(nn.Conv2d(4, 4, 3)), nn.BatchNorm2d(4)), "separate"),
    "shared norm": (shared, "separate"),
    "forward as a method": (lambda: own_forward(lambda forward: forward), "batched"),
    "infinite mask": (lambda: around(nn.BatchNorm2d(4), Mask()), "batched"),
}
"""Encoders that are trained, and how the views pass them."""


class Returns(nn.Module):
    """An encoder with an output of its own."""

    def __init__(self, output: Callable[[Tensor], Any], *, in_eval: bool = True) -> None:
        super().__init__()
        self.conv, self.output, self.in_eval = nn.Conv2d(3, 4, 3), output, in_eval

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        return self.output(y) if self.training or self.in_eval else y


@pytest.mark.parametrize("draw", [lambda: float(torch.rand(())), random.random], ids=["torch", "random"])
def test_encoder_that_draws_for_a_batch_takes_views_one_by_one(draw: Callable[[], float]) -> None:
    """Also in a run in which both ways draw the same."""
    model = BYOL(around(nn.BatchNorm2d(4), SkippedBlock(draw)), **SIZES)
    assert (model.view_batching, model.not_batched_reason) == ("separate", "it draws random numbers for a whole batch")


def test_encoder_without_values_takes_views_one_by_one() -> None:
    with torch.device("meta"):
        model = BYOL(around(nn.BatchNorm2d(4)), **SIZES)
    assert model.not_batched_reason == "it has no values on the meta device, with which it could be tried"


@pytest.mark.parametrize("method", [BYOL, SimSiam])
def test_bytes_reach_an_encoder_in_its_dtype(method: Any) -> None:
    model = method(around(nn.BatchNorm2d(4)).double(), **SIZES)
    a, b = torch.randint(256, (2, 4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    expected = model.forward_train(*((v.double() / 255 - mean) / std for v in (a, b))).loss
    assert expected.dtype == torch.float64
    torch.testing.assert_close(model.forward_train(a, b).loss, expected, rtol=1e-5, atol=0)


class Late(nn.Module):
    """An encoder that makes a layer in its first pass."""

    def __init__(self, make: Callable[[nn.Module], None]) -> None:
        super().__init__()
        self.conv, self.make = nn.Conv2d(3, 4, 3), make

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).mean((2, 3))
        if not hasattr(self, "late"):
            self.make(self)
        features: Tensor = self.late(y) if isinstance(self.late, nn.Module) else y + self.late
        return features


def own_forward(change: Callable[[Any], Any]) -> nn.Module:
    encoder = around(nn.BatchNorm2d(4))
    encoder.forward = change(encoder.forward)
    return encoder


def vit(size: int) -> nn.Module:
    return torchvision.models.VisionTransformer(size, 8, 1, 1, 8, 8)  # type: ignore[no-any-return]


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "vit of another size": (lambda: vit(32), r"must accept \[B, 3, 16, 16\] images.*Wrong image height.*views' size"),
    "vit by name": (lambda: "vit_b_32", "'vit_b_32' must take images of 16 pixels.*views' size"),
    "tuple": (lambda: Returns(lambda y: (y, y)), "must return a floating-point tensor.*got tuple.*picks the features"),
    "dict": (lambda: Returns(lambda y: {"features": y}), "got dict"),
    "tuple in train mode": (lambda: Returns(lambda y: (y, y), in_eval=False), "in train mode, got tuple"),
    "other features": (lambda: Returns(lambda y: y[:, :2], in_eval=False), "same features in train and eval mode"),
    "a number": (lambda: Returns(lambda y: y.mean()), r"got \[\] of torch.float32"),
    "a number per image": (lambda: Returns(lambda y: y.mean((1, 2, 3))), r"got \[2\] of torch.float32"),
    "no features": (lambda: Returns(lambda y: y[:, :0]), r"got \[2, 0, 14, 14\]"),
    "classes": (lambda: Returns(lambda y: y.argmax(1)), "got .* of torch.int64"),
    "its own error": (lambda: Returns(lambda y: y.flatten(9)), "it failed with: Dimension out of range"),
    "no parameters": (nn.Flatten, "must have parameters to train"),
    "late layer": (
        lambda: Late(lambda encoder: setattr(encoder, "late", nn.Linear(4, 4))),
        "before its first pass, got new ones in it: late.bias, late.weight; make them in __init__",
    ),
    "late buffer": (lambda: Late(lambda encoder: encoder.register_buffer("late", torch.zeros(4))), "in it: late;"),
    "forward in a closure": (
        lambda: own_forward(lambda forward: lambda x: forward(x) * 2),
        "copy of Sequential must use wei",
    ),
    "decorated forward": (lambda: own_forward(torch.autocast("cpu")), "got the original's: a function"),
    "TorchScript": (lambda: torch.jit.script(nn.Conv2d(3, 4, 3)), "got a TorchScript one"),
    "lazy": (lambda: around(nn.LazyBatchNorm2d()), "must know their sizes, got an uninitialized LazyBatchNorm2d at 1"),
    "weight norm hook": (
        lambda: around(nn.utils.weight_norm(nn.Conv2d(4, 4, 1))),
        "copy.deepcopy must be able to copy.*from torch.nn.utils.parametrizations",
    ),
    "function": (lambda: torchvision.models.resnet18, "must be a model's name or a torch.nn.Module, got function"),
}


@pytest.mark.parametrize("method", [BYOL, SimSiam])
@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning", "ignore:.*torch.jit.script:FutureWarning")
def test_encoder_is_refused_with_the_reason(name: str, method: Any) -> None:
    encoder, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        method(encoder(), **SIZES)


def build(name: str, method: Any) -> Any:
    torch.manual_seed(0)
    model = method(TAKEN[name][0](), **SIZES)
    assert model.view_batching == TAKEN[name][1]
    return model


@pytest.mark.parametrize("method", [BYOL, SimSiam])
@pytest.mark.parametrize("name", TAKEN)
def test_encoder_trains_as_in_plain_torch(name: str, method: Any) -> None:
    """Loss, gradients and buffers of two steps, against one pass for each view through torch's own layers."""
    model = build(name, method).double()
    plain = copy.deepcopy(model)
    revert_split_batchnorm(plain)
    for a in torch.randn(2, 2, 6, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)):
        losses = model.forward_train(*a).loss, plain_loss(plain, a)
        torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
        for loss in losses:
            loss.backward()
    for (parameter, p), q in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), parameter
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-11, msg=parameter)
    for (buffer, a), b in zip(plain.named_buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-13, msg=buffer)


def plain_loss(model: Any, views: Tensor) -> Tensor:
    online = model.online
    projections = [online.projector(online.encoder(view).flatten(1)) for view in views]
    targets = [p.detach() for p in projections]
    if isinstance(model, BYOL):
        with torch.no_grad():
            targets = [model.target.projector(model.target.encoder(view).flatten(1)) for view in views]
    p1, p2 = (online.predictor(p) for p in projections)
    cosines = F.cosine_similarity(p1, targets[1]) + F.cosine_similarity(p2, targets[0])
    return (4 - 2 * cosines).mean() if isinstance(model, BYOL) else -cosines.mean() / 2


@pytest.mark.parametrize("optimizer", ["lars", "sgd"])
@pytest.mark.parametrize("name", TAKEN)
def test_skipped_step_leaves_an_encoder_as_it_was(name: str, optimizer: str) -> None:
    model = build(name, BYOL)
    step = train_step(model, optimizer=optimizer)
    images = torch.randn(2, 6, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    batch = byol_fast.data.Batch((images[0], images[1]), None, torch.arange(6))
    assert step(batch, 0).skipped == 0
    before = copy.deepcopy(model.state_dict())
    images[0, 3, 1, 2, 5] = torch.nan
    assert step(batch, 1).skipped == 1
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


IN_SHORT = {"partly frozen", "spectral norm", "shared norm"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in IN_SHORT else pytest.mark.slow) for name in TAKEN]
)
def test_encoder_runs_through_pretrain(name: str, tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps and an export: what is frozen stays, in the target too; what is not moves, and the target follows."""
    model = build(name, BYOL)
    before = copy.deepcopy(model)
    monkeypatch.setattr(builder, "build_model", lambda *_, **__: model)
    config = configs.replace(tiny, {"steps": 2, "knn.enabled": "off", "optim.lr": 10.0})
    result = byol_fast.pretrain(config.data.root, config)
    for network in ("online", "target"):
        encoders = (m.get_submodule(f"{network}.encoder") for m in (before, model))
        for (key, p), (_, q) in zip(*(encoder.named_parameters() for encoder in encoders), strict=True):
            is_frozen = key.startswith("0.") if name == "partly frozen" else name == "frozen"
            if is_frozen or p.ndim > 1:  # biases in front of a norm have no gradient but rounding
                assert torch.equal(p, q) == is_frozen, (network, key)
    assert result.encoder is not None
    exported = load_file(result.encoder)
    assert all(torch.equal(exported[key], value) for key, value in model.encoder.state_dict().items())


def test_encoder_of_another_size_ends_a_run_before_its_first_step(tiny: Config) -> None:
    config = configs.replace(tiny, {"steps": 2, "model.encoder": "vit_b_32", "model.cifar_stem": False})
    with pytest.raises(ValueError, match="'vit_b_32' must take images of 16 pixels"):
        byol_fast.pretrain(config.data.root, config)
