"""The recipe `cifar10_lightly` beside the parts of lightly that its benchmark is made of.

python -m pytest -s tests/compat/test_cifar10_lightly.py    # prints a table of the layers that are compared
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode

from byol_fast import config as configs
from byol_fast.config import Config, ViewConfig, recipes
from byol_fast.data import Batch
from byol_fast.models.byol import BYOL
from byol_fast.training.trainer import Trainer
from tests.compat.helpers import REASON

pytestmark = pytest.mark.peers

IMAGES, BATCH, EPOCHS, STEPS, SIZE = 18, 4, 3, 10, 16
"""Four batches an epoch, two images left over: the second and the third epoch begin within the ten steps."""
TOLERANCE = 1e-9
State = dict[str, Tensor]
PARTS = {"backbone": "encoder", "projection_head": "projector", "prediction_head": "predictor"}
CHILDREN = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")
"""Names of the children of lightly's encoder, which its benchmark puts into a Sequential."""


class LightlyBenchmark(nn.Module):
    """Model and training step of the class `BYOLModel` of lightly's benchmark, without Lightning."""

    def __init__(self) -> None:
        super().__init__()
        models = pytest.importorskip("lightly.models", reason=REASON)
        self.utils = models.utils
        self.criterion = pytest.importorskip("lightly.loss", reason=REASON).NegativeCosineSimilarity()
        children = list(models.ResNetGenerator("resnet-18").children())[:-1]
        self.backbone = nn.Sequential(*children, nn.AdaptiveAvgPool2d(1))
        self.projection_head = models.modules.heads.BYOLProjectionHead(512, 1024, 256)
        self.prediction_head = models.modules.heads.BYOLPredictionHead(256, 1024, 256)
        self.backbone_momentum = copy.deepcopy(self.backbone).requires_grad_(False)
        self.projection_head_momentum = copy.deepcopy(self.projection_head).requires_grad_(False)
        parts = (self.backbone, self.projection_head, self.prediction_head)
        params = [p for part in parts for p in part.parameters()]
        self.optim = torch.optim.SGD(params, lr=6e-2 * BATCH / 128, momentum=0.9, weight_decay=5e-4)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optim, EPOCHS)

    def training_step(self, x0: Tensor, x1: Tensor) -> float:
        """The target is updated before the forward pass."""
        self.utils.update_momentum(self.backbone, self.backbone_momentum, m=0.99)
        self.utils.update_momentum(self.projection_head, self.projection_head_momentum, m=0.99)
        predictions, projections = [], []
        for x in (x0, x1):
            z = self.projection_head(self.backbone(x).flatten(start_dim=1))
            predictions.append(self.prediction_head(z))
            with torch.no_grad():
                y = self.backbone_momentum(x).flatten(start_dim=1)
                projections.append(self.projection_head_momentum(y))
        (p0, p1), (z0, z1) = predictions, projections
        loss = 0.5 * (self.criterion(p0, z1) + self.criterion(p1, z0))
        self.optim.zero_grad()
        loss.backward()
        self.optim.step()
        return float(loss.detach())

    def states(self) -> tuple[State, State]:
        """Weights and buffers of the online and the target networks, by our names."""
        online = {ours: self.state_dict()[theirs].clone() for ours, theirs in self.names().items()}
        target = {ours: self.state_dict()[theirs].clone() for ours, theirs in self.names("_momentum").items()}
        return online, target

    def names(self, suffix: str = "") -> dict[str, str]:
        """Our names of the weights and buffers of the networks whose attributes end so, and lightly's."""
        names = {}
        for name in self.state_dict():
            part, rest = name.split(".", 1)
            ours = PARTS.get(part.removesuffix(suffix)) if part.endswith(suffix) else None
            if ours == "encoder":
                child, rest = rest.split(".", 1)
                rest = f"{CHILDREN[int(child)]}.{rest}".replace(".shortcut.", ".downsample.")
            if ours is not None:
                names[f"{ours}.{rest.removeprefix('layers.')}"] = name
        return names


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def small(folder: Path) -> Config:
    """The recipe with few small images, and small batches."""
    rng = np.random.default_rng(0)
    np.savez(folder / "images.npz", images=rng.integers(0, 256, (IMAGES, SIZE, SIZE, 3), dtype=np.uint8))
    run = {"data.root": folder / "images.npz", "data.threads": 1, "out": folder / "runs", "memory_check": False}
    changes = {"batch_size": BATCH, "epochs": EPOCHS, "device": "cpu", "mode": "eager"}
    return configs.with_image_size(configs.replace(recipes.cifar10_lightly(), run | changes), SIZE)


@pytest.mark.usefixtures("float64")
def test_ten_steps_equal_lightlys(tmp_path: Path) -> None:
    """Weights after each step, the target during it, running statistics of both, and the learning rate."""
    torch.manual_seed(0)
    theirs = LightlyBenchmark()
    trainer = Trainer(small(tmp_path))
    model, start = trainer.model, theirs.states()
    assert isinstance(model, BYOL)
    model.online.load_state_dict(start[0])
    model.target.load_state_dict(start[1])
    loader: DataLoader[int] = DataLoader(range(IMAGES), BATCH, drop_last=True)  # type: ignore[arg-type]
    assert trainer.loader.batches_per_epoch == len(loader)
    assert trainer.total_steps == EPOCHS * len(loader)

    largest: dict[str, dict[str, float]] = {"online": {}, "target": {}}
    views = torch.randn(STEPS, 2, BATCH, 3, SIZE, SIZE)
    for step, (x0, x1) in enumerate(views):
        # The update at the end of our step is the one at the beginning of their next step.
        during = {name: p.detach().clone() for name, p in model.target.named_parameters()}
        output = trainer.train_step(Batch((x0, x1), None, torch.arange(BATCH)), step)
        loss = theirs.training_step(x0, x1)
        assert output.lr * 4 == pytest.approx(theirs.optim.param_groups[0]["lr"], rel=1e-12)
        assert float(output.loss) == pytest.approx(4 + 4 * loss, abs=TOLERANCE)
        if (step + 1) % len(loader) == 0:
            theirs.scheduler.step()
        ours = {"online": model.online.state_dict(), "target": model.target.state_dict() | during}
        for (network, mine), other in zip(ours.items(), theirs.states(), strict=True):
            assert mine.keys() == other.keys()
            for name, tensor in mine.items():
                assert tensor.shape == other[name].shape
                difference = float((tensor - other[name]).abs().max())
                largest[network][name] = max(difference, largest[network].get(name, 0.0))
    print_table(largest, theirs, start[0])
    assert {name: value for values in largest.values() for name, value in values.items() if value > TOLERANCE} == {}
    assert theirs.optim.param_groups[0]["lr"] < 0.3 * 6e-2 * BATCH / 128  # the rate of the third epoch


def print_table(largest: dict[str, dict[str, float]], theirs: LightlyBenchmark, start: State) -> None:
    """Layers of both models, how far their weights moved, and the largest differences in all steps."""
    end, names = theirs.states()[0], theirs.names()
    print("\n| layer | lightly's | weight | moved | online | its statistics | target | its statistics |")
    print("|---|---|---|---:|---:|---:|---:|---:|")
    for layer in dict.fromkeys(name.rpartition(".")[0] for name in end):
        weight = f"{layer}.weight"
        cells = [layer, names[weight].removesuffix(".weight"), "x".join(map(str, end[weight].shape))]
        cells.append(f"{float((end[weight] - start[weight]).abs().max()):.1e}")
        for network in ("online", "target"):
            values = {name: v for name, v in largest[network].items() if name.rpartition(".")[0] == layer}
            for kinds in (("weight", "bias"), ("running_mean", "running_var", "num_batches_tracked")):
                of = [values[f"{layer}.{name}"] for name in kinds if f"{layer}.{name}" in values]
                cells.append(f"{max(of):.1e}" if of else "")
        print(f"| {' | '.join(cells)} |")


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("is_training", [False, True])
def test_features_of_equal_weights_are_lightlys(is_training: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs, ours = LightlyBenchmark(), Trainer(small(tmp_path)).model
    theirs.training_step(*torch.randn(2, BATCH, 3, SIZE, SIZE))  # running statistics other than 0 and 1
    ours.online.load_state_dict(theirs.states()[0])
    images = torch.randn(BATCH, 3, 32, 32)
    with torch.no_grad():
        expected = theirs.backbone.train(is_training)(images).flatten(1)
        features = ours.encoder.train(is_training)(images)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-12)


def test_weights_begin_with_lightlys_distributions(tmp_path: Path) -> None:
    """Constants are equal; the others are uniform, with the range that the largest of them is close to."""
    torch.manual_seed(0)
    ours, theirs = Trainer(small(tmp_path)).model.online.state_dict(), LightlyBenchmark().states()[0]
    for name, tensor in theirs.items():
        if "running" in name or "num_batches" in name or bool((tensor == tensor.flatten()[0]).all()):
            assert torch.equal(ours[name], tensor), name
        else:
            assert float(ours[name].abs().max()) == pytest.approx(float(tensor.abs().max()), rel=0.03), name
            assert float(ours[name].std()) == pytest.approx(float(tensor.std()), rel=0.1), name


def test_views_have_the_parameters_of_lightlys_transform() -> None:
    """Read out of the transforms of the benchmark as it is now, with its arguments."""
    module = pytest.importorskip("lightly.transforms", reason=REASON)
    pair = module.BYOLTransform(
        view_1_transform=module.BYOLView1Transform(input_size=32, gaussian_blur=0.0),
        view_2_transform=module.BYOLView2Transform(input_size=32, gaussian_blur=0.0),
    )
    recipe = recipes.cifar10_lightly()
    for ours, theirs in zip((recipe.view1, recipe.view2), pair.transforms, strict=True):
        view, mean, std = parameters(theirs)
        assert ours == configs.replace(ours, view)
        assert recipe.model.mean == pytest.approx(mean) and recipe.model.std == pytest.approx(std)


def test_views_of_the_published_table_differ_in_two_parameters() -> None:
    """Until July 2023 the benchmark had `SimCLRTransform` at half its strength, for BYOL too."""
    module = pytest.importorskip("lightly.transforms", reason=REASON)
    pair = module.SimCLRTransform(input_size=32, cj_strength=0.5, gaussian_blur=0.0)
    recipe = recipes.cifar10_lightly()
    for ours, theirs in zip((recipe.view1, recipe.view2), pair.transforms, strict=True):
        view, _, _ = parameters(theirs)
        assert configs.replace(ours, {"saturation": 0.4, "solarize_p": 0.0}) == configs.replace(ours, view)


def parameters(view: Any) -> tuple[dict[str, object], list[float], list[float]]:
    """Fields of a ViewConfig, mean and standard deviation, from one of lightly's transforms."""
    steps: dict[str, Any] = {type(step).__name__: step for step in view.transform.transforms}
    assert {"RandomResizedCrop", "RandomApply", "Normalize"} < steps.keys()
    crop, (jitter,) = steps["RandomResizedCrop"], steps["RandomApply"].transforms
    assert (steps["RandomVerticalFlip"].p, steps["GaussianBlur"].prob, crop.antialias) == (0.0, 0.0, True)
    strengths = {name: getattr(jitter, name) for name in ("brightness", "contrast", "saturation")}
    for low, high in strengths.values():
        assert low == pytest.approx(2 - high)
    solarize = steps.get("RandomSolarization")
    values: dict[str, object] = {
        "scale": tuple(crop.scale),
        "ratio": tuple(crop.ratio),
        "interpolation": InterpolationMode(crop.interpolation).value,
        "size": crop.size[0],
        "hflip_p": steps["RandomHorizontalFlip"].p,
        "color_jitter_p": steps["RandomApply"].p,
        **{name: round(high - 1, 12) for name, (_, high) in strengths.items()},
        "hue": jitter.hue[1],
        "grayscale_p": steps["RandomGrayscale"].p,
        "blur_p": 0.0,
        "solarize_p": 0.0 if solarize is None else solarize.prob,
        "solarize_threshold": ViewConfig().solarize_threshold if solarize is None else solarize.threshold,
    }
    return values, list(steps["Normalize"].mean), list(steps["Normalize"].std)
